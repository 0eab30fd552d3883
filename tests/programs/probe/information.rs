//! What a process may ask about the machine, its user and itself, and what it may measure.
#![forbid(unsafe_code)]

use super::kernel::{Gain, call};
use super::{Attempt, alone, filtered, needed};

const HARMLESS: &str = "says what every process of the machine may know";

fn words(number: i64) -> Gain {
    call!(number, [0_u64; 128].as_mut_ptr())
}

pub(super) const ATTEMPTS: &[Attempt] = &[
    filtered(
        "information/uname",
        "asks for the kernel's version and the host's name",
        "uname",
        alone(HARMLESS),
        || words(libc::SYS_uname),
    ),
    filtered(
        "information/sysinfo",
        "asks how loaded the machine is",
        "sysinfo",
        alone(HARMLESS),
        || words(libc::SYS_sysinfo),
    ),
    filtered("information/getpid", "asks for its number", "getpid", alone(HARMLESS), || {
        call!(libc::SYS_getpid)
    }),
    filtered(
        "information/getppid",
        "asks for its parent's number",
        "getppid",
        alone(HARMLESS),
        || call!(libc::SYS_getppid),
    ),
    filtered(
        "information/gettid",
        "asks for its thread's number",
        "gettid",
        alone(HARMLESS),
        || call!(libc::SYS_gettid),
    ),
    filtered("information/getuid", "asks who it is", "getuid", alone(HARMLESS), || {
        call!(libc::SYS_getuid)
    }),
    filtered("information/getgroups", "asks for its groups", "getgroups", alone(HARMLESS), || {
        call!(libc::SYS_getgroups, 0, 0)
    }),
    filtered(
        "information/getrusage",
        "asks what it has used",
        "getrusage",
        alone(HARMLESS),
        || call!(libc::SYS_getrusage, 0, [0_u64; 32].as_mut_ptr()),
    ),
    filtered("information/times", "asks for its processor time", "times", alone(HARMLESS), || {
        words(libc::SYS_times)
    }),
    filtered(
        "information/getcpu",
        "asks on which processor it runs",
        "getcpu",
        alone(HARMLESS),
        || call!(libc::SYS_getcpu, [0_u32].as_mut_ptr(), 0, 0),
    ),
    filtered(
        "information/affinity",
        "asks which processors it may use",
        "sched_getaffinity",
        alone(HARMLESS),
        || call!(libc::SYS_sched_getaffinity, 0, 128, [0_u64; 16].as_mut_ptr()),
    ),
    filtered("information/limits", "asks for its limits", "prlimit64", alone(HARMLESS), || {
        call!(libc::SYS_prlimit64, 0, 7, 0, [0_u64; 2].as_mut_ptr())
    }),
    filtered("information/prctl", "asks whether it is filtered", "prctl", alone(HARMLESS), || {
        call!(libc::SYS_prctl, 21)
    }),
    filtered(
        "information/clock-resolution",
        "asks how fine the clock is",
        "clock_getres",
        alone(HARMLESS),
        || call!(libc::SYS_clock_getres, 0, [0_u64; 2].as_mut_ptr()),
    ),
    #[cfg(target_arch = "x86_64")]
    filtered(
        "information/time",
        "asks for the time by the old call",
        "time",
        alone(HARMLESS),
        || call!(libc::SYS_time, 0),
    ),
    filtered(
        "information/gettimeofday",
        "asks for the time by another call",
        "gettimeofday",
        alone(HARMLESS),
        || words(libc::SYS_gettimeofday),
    ),
    needed("information/clock", "asks for the time", || {
        call!(libc::SYS_clock_gettime, 0, [0_u64; 2].as_mut_ptr())
    }),
    needed("information/random", "asks for random bytes", || {
        call!(libc::SYS_getrandom, [0_u8; 16].as_mut_ptr(), 16, 0)
    }),
    needed("information/yield", "lets others run", || call!(libc::SYS_sched_yield)),
];
