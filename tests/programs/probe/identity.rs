//! Who the process is: users, capabilities, namespaces, and the switches of `prctl`.
#![forbid(unsafe_code)]

use conclave_ipc::layers::Layer;
use libc::{
    CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER,
    CLONE_NEWUTS,
};

use super::kernel::{Gain, call};
use super::{
    Attempt, NO_DESCRIPTOR, Next, alone, capabilities, filtered, kernel, limits, pid_namespace,
    write_execute,
};

const CLONE_NEWTIME: i32 = 0x80;
const ONLY_ITSELF: &str = "concerns nobody but the process itself";

fn unshare(flags: i32) -> Gain {
    call!(libc::SYS_unshare, flags)
}

fn prctl(option: i32, value: i64) -> Gain {
    call!(libc::SYS_prctl, option, value, 0, 0, 0)
}

pub(super) const ATTEMPTS: &[Attempt] = &[
    filtered(
        "identity/setuid",
        "becomes another user",
        "setresuid",
        capabilities(&["EPERM", "EINVAL"]),
        || call!(libc::SYS_setresuid, 1, 1, 1),
    ),
    filtered(
        "identity/setgid",
        "joins another group",
        "setresgid",
        capabilities(&["EPERM", "EINVAL"]),
        || call!(libc::SYS_setresgid, 1, 1, 1),
    ),
    filtered(
        "identity/setgroups",
        "joins further groups",
        "setgroups",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_setgroups, 1, [0_u32].as_ptr()),
    ),
    filtered(
        "identity/setfsuid",
        "opens files as another user",
        "setfsuid",
        alone("the call never tells whether it failed; without a capability it does nothing"),
        || call!(libc::SYS_setfsuid, 1),
    ),
    filtered(
        "identity/capset",
        "takes every capability",
        "capset",
        capabilities(&["EPERM"]),
        || {
            let header = [0x2008_0522_u32, 0];
            call!(libc::SYS_capset, header.as_ptr(), [u32::MAX; 6].as_ptr())
        },
    ),
    filtered("identity/capget", "asks for its capabilities", "capget", alone(ONLY_ITSELF), || {
        let header = [0x2008_0522_u32, 0];
        call!(libc::SYS_capget, header.as_ptr(), [0_u32; 6].as_mut_ptr())
    }),
    filtered(
        "identity/ambient",
        "keeps a capability for programs",
        "prctl",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_prctl, 47, 2, 21, 0, 0),
    ),
    filtered(
        "identity/secure-bits",
        "gives user 0 its powers back",
        "prctl",
        capabilities(&["EPERM"]),
        || prctl(28, 0),
    ),
    filtered(
        "identity/user-namespace",
        "has all capabilities in a namespace of its own",
        "unshare",
        Next::Layer(Layer::NoNestedNamespaces, &["ENOSPC"]),
        || unshare(CLONE_NEWUSER),
    ),
    filtered(
        "identity/mount-namespace",
        "makes a mount namespace",
        "unshare",
        capabilities(&["EPERM"]),
        || unshare(CLONE_NEWNS),
    ),
    filtered(
        "identity/pid-namespace",
        "makes a process namespace",
        "unshare",
        capabilities(&["EPERM"]),
        || unshare(CLONE_NEWPID),
    ),
    filtered(
        "identity/network-namespace",
        "makes a network namespace",
        "unshare",
        capabilities(&["EPERM"]),
        || unshare(CLONE_NEWNET),
    ),
    filtered(
        "identity/ipc-namespace",
        "makes a namespace of message queues",
        "unshare",
        capabilities(&["EPERM"]),
        || unshare(CLONE_NEWIPC),
    ),
    filtered(
        "identity/uts-namespace",
        "makes a namespace of host names",
        "unshare",
        capabilities(&["EPERM"]),
        || unshare(CLONE_NEWUTS),
    ),
    filtered(
        "identity/cgroup-namespace",
        "makes a namespace of control groups",
        "unshare",
        capabilities(&["EPERM"]),
        || unshare(CLONE_NEWCGROUP),
    ),
    filtered(
        "identity/time-namespace",
        "makes a namespace of clocks",
        "unshare",
        capabilities(&["EPERM"]),
        || unshare(CLONE_NEWTIME),
    ),
    filtered(
        "identity/setns",
        "enters the supervisor's namespaces",
        "openat",
        NO_DESCRIPTOR,
        || {
            let path = super::processes::path_of_supervisor(c"ns/mnt");
            let namespace = call!(libc::SYS_openat, libc::AT_FDCWD, path.as_c_str(), 0)?;
            call!(libc::SYS_setns, namespace, 0)
        },
    ),
    filtered(
        "identity/setns-descriptor",
        "enters a namespace by what it has",
        "setns",
        kernel(&["EINVAL"]),
        || call!(libc::SYS_setns, 3, 0),
    ),
    filtered(
        "identity/namespace-of-socket",
        "asks for the namespace of its channel",
        "ioctl",
        kernel(&["EPERM", "ENOTTY", "EMFILE"]),
        || call!(libc::SYS_ioctl, 3, 0x894c),
    ),
    filtered(
        "identity/keyctl",
        "reads a key ring",
        "keyctl",
        alone(
            "the ring of a user in its own \
        namespace, which nobody puts a key on",
        ),
        || call!(libc::SYS_keyctl, 0, -4, 1),
    ),
    filtered(
        "identity/add-key",
        "leaves a key behind",
        "add_key",
        alone(
            "a key on a ring that ends \
        with its user namespace; within a quota of the user's",
        ),
        || call!(libc::SYS_add_key, c"user", c"conclave", c"x", 1, -3),
    ),
    filtered(
        "identity/request-key",
        "has a program started to find a key",
        "request_key",
        kernel(&["ENOKEY"]),
        || call!(libc::SYS_request_key, c"user", c"conclave-none", 0, -3),
    ),
    filtered(
        "identity/session-keyring",
        "joins a key ring of another",
        "keyctl",
        alone("the ring of a user in its own namespace, which nobody puts a key on"),
        || call!(libc::SYS_keyctl, 1, 0),
    ),
    filtered(
        "identity/dumpable",
        "makes itself readable for its siblings",
        "prctl",
        alone("siblings are in other namespaces, and can't trace"),
        || prctl(4, 1),
    ),
    filtered(
        "identity/parent-death",
        "outlives the supervisor",
        "prctl",
        alone("its channel ends with the supervisor, and the namespace with its last process"),
        || prctl(1, 0),
    ),
    filtered(
        "identity/new-privileges",
        "asks for no new privileges again",
        "prctl",
        alone("it is already so"),
        || prctl(38, 1),
    ),
    filtered(
        "identity/take-back-no-new-privileges",
        "takes back that nothing gains privileges",
        "prctl",
        kernel(&["EINVAL"]),
        || prctl(38, 0),
    ),
    filtered(
        "identity/weaken-filter",
        "replaces the filter by one of its own",
        "prctl",
        kernel(&["EFAULT"]),
        || call!(libc::SYS_prctl, 22, 2, 16),
    ),
    filtered(
        "identity/strict-filter",
        "puts itself in the strictest mode",
        "prctl",
        kernel(&["SIGKILL"]),
        || prctl(22, 1),
    ),
    filtered(
        "identity/seccomp",
        "stacks a filter of its own",
        "seccomp",
        kernel(&["EFAULT"]),
        || call!(libc::SYS_seccomp, 1, 0, 16),
    ),
    filtered(
        "identity/seccomp-listener",
        "stacks a filter that asks somebody",
        "seccomp",
        limits(&["EMFILE"]),
        || {
            let allow = [0x0006_u64 | (0x7fff_0000 << 32)];
            let program = [1_usize, allow.as_ptr().addr()];
            call!(libc::SYS_seccomp, 1, 8, program.as_ptr())
        },
    ),
    filtered(
        "identity/seccomp-sync",
        "gives its filter to its siblings",
        "seccomp",
        alone("a filter takes away, and never reaches beyond the process"),
        || {
            let allow = [0x0006_u64 | (0x7fff_0000 << 32)];
            let program = [1_usize, allow.as_ptr().addr()];
            call!(libc::SYS_seccomp, 1, 1, program.as_ptr())
        },
    ),
    filtered(
        "identity/allow-writable-code",
        "allows itself writable code again",
        "prctl",
        write_execute(&["EPERM"]),
        || prctl(65, 0),
    ),
    filtered(
        "identity/memory-map",
        "tells the kernel other borders of its memory",
        "prctl",
        capabilities(&["EPERM", "EINVAL"]),
        || call!(libc::SYS_prctl, 35, 6, 0x10_000, 0, 0),
    ),
    filtered(
        "identity/exe-link",
        "claims to be another program",
        "prctl",
        capabilities(&["EBADF", "EPERM", "EINVAL", "EACCES"]),
        || call!(libc::SYS_prctl, 35, 13, 4, 0, 0),
    ),
    filtered(
        "identity/ptracer",
        "lets everybody trace it",
        "prctl",
        Next::Nothing(
            &["EINVAL", "succeeded"],
            "siblings are in other namespaces, and can't trace",
        ),
        || prctl(0x5961_6d61, -1),
    ),
    filtered(
        "identity/syscall-dispatch",
        "has its own calls sent to itself",
        "prctl",
        alone("redirects its own calls to its own handler; those let through meet the filter"),
        || call!(libc::SYS_prctl, 59, 1, 0, 0, [0_u8; 8].as_ptr()),
    ),
    filtered(
        "identity/time-stamps",
        "allows itself the processor's clock",
        "prctl",
        alone(ONLY_ITSELF),
        || prctl(26, 1),
    ),
    filtered(
        "identity/name",
        "takes another name",
        "prctl",
        alone("a name of 15 bytes, shown to who lists processes"),
        || call!(libc::SYS_prctl, 15, c"conclave"),
    ),
    filtered(
        "identity/core-scheduling",
        "shares a processor core on its own terms",
        "prctl",
        Next::Nothing(&["EINVAL", "ENODEV", "succeeded"], "shares a core with itself alone"),
        || call!(libc::SYS_prctl, 62, 1, 0, 0, 0),
    ),
    filtered(
        "identity/speculation",
        "allows itself speculation again",
        "prctl",
        Next::Layer(Layer::BranchBarrier, &["EPERM", "ENXIO", "EINVAL"]),
        || call!(libc::SYS_prctl, 53, 1, 2, 0, 0),
    ),
    filtered(
        "identity/io-flusher",
        "claims to be a part of the kernel's writing",
        "prctl",
        capabilities(&["EPERM"]),
        || prctl(57, 1),
    ),
    filtered(
        "identity/memory-merge",
        "has its pages merged with those of others",
        "prctl",
        Next::Nothing(
            &["succeeded", "EPERM", "EINVAL"],
            "needs a host that merges, and time; tells whether a page of another is the same",
        ),
        || prctl(67, 1),
    ),
    filtered(
        "identity/oom-scores",
        "has others killed for want of memory",
        "openat",
        NO_DESCRIPTOR,
        || call!(libc::SYS_openat, libc::AT_FDCWD, c"/proc/self/oom_score_adj", 1),
    ),
    filtered(
        "identity/subreaper",
        "adopts orphans",
        "prctl",
        alone("it has no descendants"),
        || prctl(36, 1),
    ),
    filtered(
        "identity/personality",
        "makes everything readable executable",
        "personality",
        alone("mapping so is refused by the layer against writable code"),
        || call!(libc::SYS_personality, 0x0040_0000),
    ),
    filtered(
        "identity/no-randomisation",
        "has no random addresses any more",
        "personality",
        alone("takes effect with another program, which it can't become"),
        || call!(libc::SYS_personality, 0x0004_0000),
    ),
    filtered(
        "identity/landlock",
        "makes a Landlock domain of its own",
        "landlock_create_ruleset",
        limits(&["EMFILE", "EOPNOTSUPP", "ENOSYS"]),
        || call!(libc::SYS_landlock_create_ruleset, [1_u64].as_ptr(), 8, 0),
    ),
    filtered(
        "identity/landlock-version",
        "asks for Landlock's version",
        "landlock_create_ruleset",
        alone("a number that every process may know"),
        || call!(libc::SYS_landlock_create_ruleset, 0, 0, 1),
    ),
    filtered(
        "identity/landlock-restrict",
        "changes its domain",
        "landlock_restrict_self",
        kernel(&["EBADF", "EBADFD", "EOPNOTSUPP"]),
        || call!(libc::SYS_landlock_restrict_self, 3, 0),
    ),
    filtered(
        "identity/lsm-modules",
        "asks which security modules there are",
        "lsm_list_modules",
        alone("names that every process may know"),
        || call!(461_i64, [0_u64; 32].as_mut_ptr(), [256_u32].as_mut_ptr(), 0),
    ),
    filtered(
        "identity/lsm-attribute",
        "sets an attribute of a security module",
        "lsm_set_self_attr",
        kernel(&["EINVAL", "EOPNOTSUPP", "E2BIG", "EFAULT", "ENOSYS"]),
        || call!(460_i64, 100, 16, 32, 0),
    ),
    filtered(
        "identity/raise-limit",
        "raises its limit of descriptors",
        "prlimit64",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_prlimit64, 0, 7, [1024_u64, 1024].as_ptr(), 0),
    ),
    filtered(
        "identity/raise-memory-limit",
        "raises its limit of memory",
        "prlimit64",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_prlimit64, 0, 2, [u64::MAX, u64::MAX].as_ptr(), 0),
    ),
    filtered(
        "identity/sethostname",
        "renames the host",
        "sethostname",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_sethostname, c"a", 1),
    ),
    filtered(
        "identity/setdomainname",
        "renames the host's domain",
        "setdomainname",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_setdomainname, c"a", 1),
    ),
    filtered(
        "identity/session",
        "asks for the supervisor's session",
        "getsid",
        pid_namespace(&["ESRCH"]),
        || call!(libc::SYS_getsid, super::processes::supervisor()),
    ),
];
