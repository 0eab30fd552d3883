//! Other processes: making them, and reaching those that are there.
#![forbid(unsafe_code)]

use std::ffi::{CStr, CString};
use std::sync::OnceLock;

use libc::{
    CLONE_FILES, CLONE_FS, CLONE_SIGHAND, CLONE_THREAD, CLONE_VFORK, CLONE_VM, PTRACE_SEIZE,
    PTRACE_TRACEME, SIGCHLD, SIGKILL,
};

use super::kernel::{Gain, call, clone_that_ends};
use super::{
    Attempt, NO_DESCRIPTOR, Next, alone, capabilities, empty_root, filtered, kernel, limits,
    pid_namespace,
};

pub(super) const ONLY_ITSELF: &str = "reaches no process but itself";

const ONLY_ITS_FAMILY: &str = "reaches its zygote, which has the same policy and the same state";

/// The numbers of the supervisor and of this process, as far as they are to be known here.
static NUMBERS: OnceLock<(i32, i32)> = OnceLock::new();

/// Looks for the other processes, before the filter is on. In a process namespace of its own
/// a worker is number 1 and has no parent.
pub(super) fn look_around() {
    let number = |found: u32| i32::try_from(found).unwrap_or(i32::MAX);
    let parent = number(std::os::unix::process::parent_id());
    NUMBERS.get_or_init(|| (parent, number(std::process::id())));
}

/// The supervisor's number, or a guess at one.
pub(super) fn supervisor() -> i32 {
    NUMBERS.get().map_or(2, |(supervisor, _)| if *supervisor == 0 { 2 } else { *supervisor })
}

/// This process's own number.
pub(super) fn own() -> i32 {
    NUMBERS.get().map_or(1, |(_, own)| *own)
}

/// A number that another worker may have.
pub(super) fn sibling() -> i32 {
    NUMBERS.get().map_or(2, |(_, own)| if *own == 1 { 2 } else { own.saturating_sub(1) })
}

fn path(process: i32, file: &CStr) -> CString {
    CString::new(format!("/proc/{process}/{}", file.to_string_lossy())).unwrap_or_default()
}

pub(super) fn path_of_supervisor(file: &CStr) -> CString {
    path(supervisor(), file)
}

pub(super) fn path_of_sibling(file: &CStr) -> CString {
    path(sibling(), file)
}

fn kill(process: i32) -> Gain {
    call!(libc::SYS_kill, process, 0)
}

/// Reads or writes a word of another process's memory.
fn foreign_memory(number: i64, process: i32) -> Gain {
    let mut word = [0_usize; 1];
    let here = [word.as_mut_ptr().addr(), 8];
    let there = [0x40_0000_usize, 8];
    call!(number, process, here.as_ptr(), 1, there.as_ptr(), 1, 0)
}

/// What a zygote may make where its policy has one worker, as it has here: that, and another
/// one while it is not reaped.
const COPIES_MAX: usize = 2;

/// Makes what is not there any more: processes or threads until the kernel refuses. To make no
/// more than a zygote may is no success.
fn bomb(flags: usize) -> Gain {
    for made in 0..1000_usize {
        if let Err(error) = clone_that_ends(libc::SYS_clone, flags, 0) {
            return if made > COPIES_MAX { Ok(made) } else { Err(error) };
        }
    }
    Ok(1000)
}

/// The first process of a worker's namespace: for one that was forked its zygote, else itself.
const FIRST: i32 = 1;

const THREAD: i32 = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD;

pub(super) const ATTEMPTS: &[Attempt] = &[
    filtered("process/fork", "makes a process", "clone", limits(&["EAGAIN"]), || {
        clone_that_ends(libc::SYS_clone, SIGCHLD as usize, 0)
    }),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "process/old-fork",
        "makes a process by the old call",
        "fork",
        limits(&["EAGAIN"]),
        || clone_that_ends(libc::SYS_fork, 0, 0),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "process/old-vfork",
        "makes a process that shares its memory by the old call",
        "vfork",
        limits(&["EAGAIN"]),
        || clone_that_ends(libc::SYS_vfork, 0, 0),
    ),
    filtered(
        "process/vfork",
        "makes a process that shares its memory",
        "clone",
        limits(&["EAGAIN"]),
        || clone_that_ends(libc::SYS_clone, (CLONE_VM | CLONE_VFORK | SIGCHLD) as usize, 0),
    ),
    filtered("process/thread", "makes a thread", "clone", limits(&["EAGAIN"]), || {
        clone_that_ends(libc::SYS_clone, THREAD as usize, 0)
    }),
    filtered(
        "process/clone3",
        "makes a process by the newer call",
        "clone3",
        limits(&["EAGAIN"]),
        || {
            let arguments = [0_u64, 0, 0, 0, SIGCHLD as u64, 0, 0, 0];
            clone_that_ends(libc::SYS_clone3, arguments.as_ptr().expose_provenance(), 64)
        },
    ),
    filtered(
        "process/fork-bomb",
        "makes processes until none can be made",
        "clone",
        limits(&["EAGAIN"]),
        || bomb(SIGCHLD as usize),
    ),
    filtered(
        "process/thread-bomb",
        "makes threads until none can be made",
        "clone",
        limits(&["EAGAIN"]),
        || bomb(THREAD as usize),
    ),
    filtered(
        "process/execve",
        "becomes another program",
        "execve",
        empty_root(&["ENOENT"]),
        || call!(libc::SYS_execve, c"/bin/true", [0_usize].as_ptr(), [0_usize].as_ptr()),
    ),
    filtered(
        "process/execveat",
        "becomes the program in its image",
        "execveat",
        kernel(&["EACCES", "ENOEXEC"]),
        || call!(libc::SYS_execveat, 4, c"", [0_usize].as_ptr(), [0_usize].as_ptr(), 0x1000),
    ),
    filtered(
        "process/memfd-exec",
        "writes a program to memory and becomes it",
        "memfd_create",
        NO_DESCRIPTOR,
        || {
            let file = call!(libc::SYS_memfd_create, c"a", 0)?;
            call!(libc::SYS_write, file, c"#!/bin/true\n", 12)?;
            call!(libc::SYS_execveat, file, c"", [0_usize].as_ptr(), [0_usize].as_ptr(), 0x1000)
        },
    ),
    filtered(
        "process/kill-supervisor",
        "signals the supervisor",
        "kill",
        pid_namespace(&["ESRCH"]),
        || kill(supervisor()),
    ),
    filtered(
        "process/kill-sibling",
        "signals another worker",
        "kill",
        pid_namespace(&["ESRCH"]),
        || kill(sibling()),
    ),
    filtered(
        "process/kill-all",
        "signals every process that it can reach",
        "kill",
        pid_namespace(&["ESRCH"]),
        || kill(-1),
    ),
    filtered(
        "process/kill-zygote",
        "signals what it was forked from",
        "kill",
        Next::Nothing(&["succeeded", "EPERM"], ONLY_ITS_FAMILY),
        || kill(FIRST),
    ),
    filtered(
        "process/ptrace-zygote",
        "traces what it was forked from",
        "ptrace",
        kernel(&["EPERM", "EACCES"]),
        || call!(libc::SYS_ptrace, PTRACE_SEIZE, FIRST, 0, 0),
    ),
    filtered(
        "process/read-zygote",
        "reads the memory of what it was forked from",
        "process_vm_readv",
        Next::Nothing(&["succeeded", "EFAULT", "EPERM"], ONLY_ITS_FAMILY),
        || foreign_memory(libc::SYS_process_vm_readv, FIRST),
    ),
    filtered("process/kill-group", "signals its process group", "kill", alone(ONLY_ITSELF), || {
        kill(0)
    }),
    filtered("process/kill-itself", "signals itself", "kill", alone(ONLY_ITSELF), || kill(own())),
    filtered(
        "process/tgkill",
        "signals a thread of another worker",
        "tgkill",
        pid_namespace(&["ESRCH"]),
        || call!(libc::SYS_tgkill, sibling(), sibling(), 0),
    ),
    filtered(
        "process/tkill",
        "signals a thread by its number alone",
        "tkill",
        pid_namespace(&["ESRCH"]),
        || call!(libc::SYS_tkill, supervisor(), 0),
    ),
    filtered(
        "process/sigqueue",
        "sends the supervisor a signal with a value",
        "rt_sigqueueinfo",
        pid_namespace(&["ESRCH"]),
        || {
            let mut information = [0_i32; 32];
            information[2] = -1;
            call!(libc::SYS_rt_sigqueueinfo, supervisor(), 0, information.as_ptr())
        },
    ),
    filtered(
        "process/pidfd-open",
        "takes a descriptor of the supervisor's process",
        "pidfd_open",
        pid_namespace(&["ESRCH"]),
        || call!(libc::SYS_pidfd_open, supervisor(), 0),
    ),
    filtered(
        "process/pidfd-self",
        "takes a descriptor of its own process",
        "pidfd_open",
        NO_DESCRIPTOR,
        || call!(libc::SYS_pidfd_open, own(), 0),
    ),
    filtered(
        "process/pidfd-getfd",
        "takes a descriptor out of another process",
        "pidfd_getfd",
        kernel(&["EBADF"]),
        || call!(libc::SYS_pidfd_getfd, 3, 0, 0),
    ),
    filtered(
        "process/pidfd-send-signal",
        "signals a process by its descriptor",
        "pidfd_send_signal",
        kernel(&["EBADF"]),
        || call!(libc::SYS_pidfd_send_signal, 3, SIGKILL, 0, 0),
    ),
    filtered(
        "process/pidfd-self-signal",
        "signals itself by a number that stands for itself",
        "pidfd_send_signal",
        Next::Nothing(&["succeeded", "EBADF"], ONLY_ITSELF),
        || call!(libc::SYS_pidfd_send_signal, -10000, 0, 0, 0),
    ),
    filtered(
        "process/ptrace-supervisor",
        "traces the supervisor",
        "ptrace",
        pid_namespace(&["ESRCH"]),
        || call!(libc::SYS_ptrace, PTRACE_SEIZE, supervisor(), 0, 0),
    ),
    filtered(
        "process/ptrace-sibling",
        "traces another worker",
        "ptrace",
        pid_namespace(&["ESRCH"]),
        || call!(libc::SYS_ptrace, PTRACE_SEIZE, sibling(), 0, 0),
    ),
    filtered(
        "process/ptrace-me",
        "has itself traced by the supervisor",
        "ptrace",
        alone("asks the supervisor, which traces nobody"),
        || call!(libc::SYS_ptrace, PTRACE_TRACEME, 0, 0, 0),
    ),
    filtered(
        "process/read-supervisor",
        "reads the supervisor's memory",
        "process_vm_readv",
        pid_namespace(&["ESRCH"]),
        || foreign_memory(libc::SYS_process_vm_readv, supervisor()),
    ),
    filtered(
        "process/read-sibling",
        "reads another worker's memory",
        "process_vm_readv",
        pid_namespace(&["ESRCH"]),
        || foreign_memory(libc::SYS_process_vm_readv, sibling()),
    ),
    filtered(
        "process/write-supervisor",
        "writes the supervisor's memory",
        "process_vm_writev",
        pid_namespace(&["ESRCH"]),
        || foreign_memory(libc::SYS_process_vm_writev, supervisor()),
    ),
    filtered(
        "process/write-sibling",
        "writes another worker's memory",
        "process_vm_writev",
        pid_namespace(&["ESRCH"]),
        || foreign_memory(libc::SYS_process_vm_writev, sibling()),
    ),
    filtered(
        "process/madvise",
        "has another process's memory given back",
        "process_madvise",
        kernel(&["EBADF", "ESRCH"]),
        || call!(libc::SYS_process_madvise, 3, 0, 0, 21, 0),
    ),
    filtered(
        "process/mrelease",
        "has a dying process's memory given back",
        "process_mrelease",
        kernel(&["EBADF", "ESRCH"]),
        || call!(libc::SYS_process_mrelease, 3, 0),
    ),
    filtered(
        "process/kcmp",
        "compares itself with the supervisor",
        "kcmp",
        pid_namespace(&["ESRCH", "ENOSYS"]),
        || call!(libc::SYS_kcmp, supervisor(), sibling(), 0, 3, 3),
    ),
    filtered(
        "process/setpriority",
        "takes precedence over others",
        "setpriority",
        capabilities(&["EACCES"]),
        || call!(libc::SYS_setpriority, 0, 0, -10),
    ),
    filtered(
        "process/sched-fifo",
        "takes the processor for itself",
        "sched_setscheduler",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_sched_setscheduler, 0, 1, [1_i32].as_ptr()),
    ),
    filtered(
        "process/sched-deadline",
        "has processor time reserved",
        "sched_setattr",
        capabilities(&["EPERM"]),
        || {
            let attributes = [48_u64 | (6 << 32), 0, 0, 1 << 20, 1 << 21, 1 << 21];
            call!(libc::SYS_sched_setattr, 0, attributes.as_ptr(), 0)
        },
    ),
    filtered(
        "process/sched-affinity",
        "leaves the processor it was given",
        "sched_setaffinity",
        alone("it runs on a processor that its supervisor may use, within its deadline"),
        || call!(libc::SYS_sched_setaffinity, 0, 8, [u64::MAX].as_ptr()),
    ),
    filtered(
        "process/sched-affinity-sibling",
        "moves another worker to another processor",
        "sched_setaffinity",
        pid_namespace(&["ESRCH"]),
        || call!(libc::SYS_sched_setaffinity, sibling(), 8, [1_u64].as_ptr()),
    ),
    filtered(
        "process/ioprio",
        "takes precedence at the disk",
        "ioprio_set",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_ioprio_set, 1, 0, 1 << 13),
    ),
    filtered(
        "process/prlimit-sibling",
        "changes another worker's limits",
        "prlimit64",
        pid_namespace(&["ESRCH"]),
        || call!(libc::SYS_prlimit64, sibling(), 7, [0_u64; 2].as_ptr(), 0),
    ),
    filtered("process/setsid", "leaves its session", "setsid", kernel(&["EPERM"]), || {
        call!(libc::SYS_setsid)
    }),
    filtered(
        "process/setpgid",
        "joins another process group",
        "setpgid",
        kernel(&["EPERM", "ESRCH"]),
        || call!(libc::SYS_setpgid, 0, supervisor()),
    ),
    filtered(
        "process/wait",
        "waits for children that it has not",
        "wait4",
        kernel(&["ECHILD"]),
        || call!(libc::SYS_wait4, -1, 0, 1, 0),
    ),
];
