//! The kernel at large: its large and rare interfaces, other ways into it, and the machine.
#![forbid(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::kernel::Gain;
use super::kernel::{self as raw, call};
use super::{Attempt, alone, capabilities, filtered, kernel, limits, pid_namespace};
#[cfg(target_arch = "x86_64")]
use super::{First, needed, refused};

const ANOTHER_DOOR: &str = "another way to calls that the other layers refuse as they always do";

/// A number that no kernel has given to a call.
const UNKNOWN: i64 = 999;

pub(super) const ATTEMPTS: &[Attempt] = &[
    filtered(
        "machine/io-uring",
        "makes rings, which make calls that no filter sees",
        "io_uring_setup",
        limits(&["ENOMEM", "EMFILE", "EPERM", "ENOSYS"]),
        || call!(libc::SYS_io_uring_setup, 1, [0_u64; 15].as_mut_ptr()),
    ),
    filtered(
        "machine/io-uring-enter",
        "uses rings that it has not",
        "io_uring_enter",
        kernel(&["EOPNOTSUPP", "EBADF", "ENOSYS"]),
        || call!(libc::SYS_io_uring_enter, 3, 1, 0, 0, 0, 0),
    ),
    filtered(
        "machine/io-uring-register",
        "registers descriptors with rings that it has not",
        "io_uring_register",
        kernel(&["EOPNOTSUPP", "EBADF", "EINVAL", "ENOSYS"]),
        || call!(libc::SYS_io_uring_register, 3, 0, 0, 0),
    ),
    filtered(
        "machine/aio",
        "makes a context for asynchronous files",
        "io_setup",
        alone("room in the kernel for requests about files that it can't open"),
        || call!(libc::SYS_io_setup, 1, [0_usize].as_mut_ptr()),
    ),
    filtered(
        "machine/bpf-map",
        "makes a map in the kernel",
        "bpf",
        capabilities(&["EPERM", "ENOSYS"]),
        || call!(libc::SYS_bpf, 0, [1_u32, 4, 4, 1].as_ptr(), 16),
    ),
    filtered(
        "machine/bpf-program",
        "runs a program in the kernel",
        "bpf",
        capabilities(&["EPERM", "E2BIG", "EINVAL", "ENOSYS"]),
        || call!(libc::SYS_bpf, 5, [1_u64, 0, 0, 0, 0, 0].as_ptr(), 48),
    ),
    filtered(
        "machine/perf",
        "counts events of the machine",
        "perf_event_open",
        limits(&["EACCES", "EPERM", "EMFILE", "ENOENT", "ENOSYS"]),
        || {
            let attributes = [1_u64 | (64 << 32), 0, 0, 0, 0, 0, 0, 0];
            call!(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0)
        },
    ),
    filtered(
        "machine/perf-supervisor",
        "watches the supervisor",
        "perf_event_open",
        pid_namespace(&["ESRCH", "EACCES", "EPERM", "EMFILE", "ENOSYS"]),
        || {
            let attributes = [1_u64 | (64 << 32), 0, 0, 0, 0, 1 << 5 | 1 << 6, 0, 0];
            let other = super::processes::supervisor();
            call!(libc::SYS_perf_event_open, attributes.as_ptr(), other, -1, -1, 0)
        },
    ),
    filtered(
        "machine/kexec",
        "starts another kernel",
        "kexec_load",
        capabilities(&["EPERM", "ENOSYS"]),
        || call!(libc::SYS_kexec_load, 0, 0, 0, 0),
    ),
    filtered(
        "machine/kexec-file",
        "starts another kernel from a file",
        "kexec_file_load",
        capabilities(&["EPERM", "ENOSYS"]),
        || call!(libc::SYS_kexec_file_load, 4, 4, 0, 0, 0),
    ),
    filtered(
        "machine/init-module",
        "puts code into the kernel",
        "init_module",
        capabilities(&["EPERM", "ENOSYS"]),
        || call!(libc::SYS_init_module, 0, 0, c""),
    ),
    filtered(
        "machine/finit-module",
        "puts code from its image into the kernel",
        "finit_module",
        capabilities(&["EPERM", "ENOSYS"]),
        || call!(libc::SYS_finit_module, 4, c"", 0),
    ),
    filtered(
        "machine/delete-module",
        "takes code out of the kernel",
        "delete_module",
        capabilities(&["EPERM", "ENOSYS"]),
        || call!(libc::SYS_delete_module, c"a", 0),
    ),
    filtered(
        "machine/reboot",
        "restarts the machine",
        "reboot",
        capabilities(&["EPERM", "EINVAL"]),
        || call!(libc::SYS_reboot, 1, 2, 3, 0),
    ),
    filtered(
        "machine/swapon",
        "has memory written to a file",
        "swapon",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_swapon, c"/a", 0),
    ),
    filtered("machine/swapoff", "ends swapping", "swapoff", capabilities(&["EPERM"]), || {
        call!(libc::SYS_swapoff, c"/a")
    }),
    filtered(
        "machine/acct",
        "has every process written down",
        "acct",
        capabilities(&["EPERM", "ENOSYS"]),
        || call!(libc::SYS_acct, c"/a"),
    ),
    filtered(
        "machine/quotactl",
        "changes quotas",
        "quotactl",
        kernel(&["EINVAL", "ENOSYS", "ENOENT", "ENODEV", "EPERM"]),
        || call!(libc::SYS_quotactl, 0x8000_0100_u32, c"/dev/sda", 0, 0),
    ),
    filtered(
        "machine/quotactl-fd",
        "changes quotas by a descriptor",
        "quotactl_fd",
        kernel(&["EINVAL", "ENOSYS", "EPERM"]),
        || call!(libc::SYS_quotactl_fd, 4, 0, 0, 0),
    ),
    filtered(
        "machine/syslog",
        "reads the kernel's log",
        "syslog",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_syslog, 3, [0_u8; 64].as_mut_ptr(), 64),
    ),
    filtered(
        "machine/clock-settime",
        "sets the clock",
        "clock_settime",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_clock_settime, 0, [0_i64; 2].as_ptr()),
    ),
    filtered(
        "machine/settimeofday",
        "sets the clock by the old call",
        "settimeofday",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_settimeofday, [0_i64; 2].as_ptr(), 0),
    ),
    filtered("machine/adjtimex", "bends the clock", "adjtimex", capabilities(&["EPERM"]), || {
        let mut change = [0_u64; 26];
        change[0] = 2;
        call!(libc::SYS_adjtimex, change.as_mut_ptr())
    }),
    filtered(
        "machine/vhangup",
        "hangs up the terminal",
        "vhangup",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_vhangup),
    ),
    filtered(
        "machine/sync",
        "has everything written to disk",
        "sync",
        alone("slow for the host, and the filter's alone to refuse"),
        || call!(libc::SYS_sync),
    ),
    filtered(
        "machine/membarrier",
        "interrupts every processor",
        "membarrier",
        alone("interrupts only processors that run this process"),
        || call!(libc::SYS_membarrier, 0, 0, 0),
    ),
    filtered(
        "machine/rseq",
        "registers restartable sequences",
        "rseq",
        kernel(&["EINVAL", "EBUSY", "EPERM"]),
        || call!(libc::SYS_rseq, 32, 32, 0, 0),
    ),
    filtered(
        "machine/restart",
        "restarts a call that was never interrupted",
        "restart_syscall",
        kernel(&["EINTR"]),
        || call!(libc::SYS_restart_syscall),
    ),
    filtered(
        "machine/lookup-dcookie",
        "uses a call that was taken out of the kernel",
        "lookup_dcookie",
        kernel(&["ENOSYS", "EPERM"]),
        || call!(libc::SYS_lookup_dcookie, 0, 0, 0),
    ),
    filtered("machine/unknown", "makes a call that no kernel has", "", kernel(&["ENOSYS"]), || {
        call!(UNKNOWN)
    }),
    filtered(
        "machine/negative",
        "makes a call with the number -1",
        "",
        kernel(&["ENOSYS"]),
        || call!(-1_i64),
    ),
    filtered(
        "machine/no-stack",
        "makes a forbidden call with no stack for a handler",
        "",
        alone(ANOTHER_DOOR),
        || raw::call_without_stack(libc::SYS_getpid),
    ),
    filtered(
        "machine/bad-signal-stack",
        "makes a forbidden call with a bad stack for the handler",
        "",
        alone(ANOTHER_DOOR),
        || {
            call!(libc::SYS_sigaltstack, [16_usize, 0, 1 << 20].as_ptr(), 0)?;
            call!(libc::SYS_getpid)
        },
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "machine/iopl",
        "talks to devices",
        "iopl",
        capabilities(&["EPERM", "ENOSYS"]),
        || call!(libc::SYS_iopl, 3),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "machine/ioperm",
        "talks to one device",
        "ioperm",
        capabilities(&["EPERM", "ENOSYS"]),
        || call!(libc::SYS_ioperm, 0x80, 1, 1),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "machine/modify-ldt",
        "makes segments of its own",
        "modify_ldt",
        alone("segments of its own memory, as data; code for 32-bit programs has no other calls"),
        || call!(libc::SYS_modify_ldt, 1, [0_u32, 0, 0xfffff, 0x51].as_ptr(), 16),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "machine/arch-prctl",
        "moves a segment's base",
        "arch_prctl",
        alone("its own registers"),
        || call!(libc::SYS_arch_prctl, 0x1001, 0),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "machine/thread-area",
        "makes a segment for 32-bit code",
        "set_thread_area",
        kernel(&["ENOSYS", "EFAULT"]),
        || call!(libc::SYS_set_thread_area, 0),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "machine/shadow-stack",
        "maps a shadow stack",
        "map_shadow_stack",
        kernel(&["EOPNOTSUPP", "ENOSYS", "EINVAL"]),
        || call!(453_i64, 0, 4096, 0),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered("machine/x32", "makes a call of the x32 programs", "", kernel(&["ENOSYS"]), || {
        call!(0x4000_0000_i64 | 39)
    }),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "machine/int80",
        "makes a call of the 32-bit programs",
        "",
        alone(ANOTHER_DOOR),
        || raw::int80(20),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "machine/int80-open",
        "opens a file by a call of the 32-bit programs",
        "",
        kernel(&["EFAULT", "EMFILE", "ENOSYS"]),
        || raw::int80(5),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "machine/forged-sigreturn",
        "sets every register by a signal that never came, to go on at \
        a forbidden call",
        "socket",
        limits(&["exit 24"]),
        || raw::forged_sigreturn(socket_address(), 0),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "machine/blocked-sigsys",
        "makes a forbidden call with every signal blocked, so that \
        no handler sees it",
        "",
        limits(&["exit 24"]),
        || raw::forged_sigreturn(socket_address(), u64::MAX),
    ),
    // Recent kernels let these two past every filter; older ones do not have them.
    #[cfg(target_arch = "x86_64")]
    refused(
        "machine/uprobe",
        "makes the kernel's own call for probes, which passes every filter",
        First::Kernel(&[
            "ENXIO",
            "EPROTO",
            "SIGILL",
            "SIGSEGV",
            "forbidden uprobe",
            "forbidden number 0x150",
        ]),
        || call!(336_i64),
    ),
    #[cfg(target_arch = "x86_64")]
    refused(
        "machine/uretprobe",
        "makes the kernel's other call for probes",
        First::Kernel(&[
            "EPERM",
            "SIGILL",
            "SIGSEGV",
            "forbidden uretprobe",
            "forbidden number 0x14f",
        ]),
        || call!(335_i64),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "machine/vsyscall",
        "asks the fixed page of old programs for the time",
        "time",
        alone(ANOTHER_DOOR),
        raw::vsyscall_time,
    ),
    #[cfg(target_arch = "x86_64")]
    needed("machine/rdtsc", "reads the processor's clock", raw::rdtsc),
    filtered(
        "machine/inotify-everything",
        "watches the host's files through what it has",
        "fanotify_mark",
        kernel(&["EBADF", "EINVAL"]),
        || call!(libc::SYS_fanotify_mark, 3, 1, 1, -100, c"/"),
    ),
];

#[cfg(target_arch = "x86_64")]
fn socket_address() -> usize {
    (socket_or_die as extern "C" fn() -> ! as *const ()).expose_provenance()
}

/// Where the forged return goes on; tells by its exit code.
#[cfg(target_arch = "x86_64")]
extern "C" fn socket_or_die() -> ! {
    let gain: Gain = call!(libc::SYS_socket, 1, 1, 0);
    raw::exit(gain.map_or_else(|error| error as i32, |_| 0))
}
