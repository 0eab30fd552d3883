//! Signals, timers and locks: being interrupted, interrupting, and waiting.
#![forbid(unsafe_code)]

use libc::SIGSYS;

use super::code::own_code;
use super::kernel::{Gain, call, peek, shellcode};
use super::processes::{ONLY_ITSELF, sibling};
use super::{Attempt, alone, filtered, kernel, limits, needed, pid_namespace};

/// A `struct sigaction` of the kernel's for that handler.
fn handle(signal: i32, handler: usize) -> Gain {
    let action = [handler, 0x0400_0000, 0, 0];
    call!(libc::SYS_rt_sigaction, signal, action.as_ptr(), 0, 8)
}

/// Blocks every signal.
fn block_all() -> Gain {
    call!(libc::SYS_rt_sigprocmask, 0, [u64::MAX].as_ptr(), 0, 8)
}

pub(super) const ATTEMPTS: &[Attempt] = &[
    filtered(
        "signal/robust-list-sibling",
        "asks for another worker's list of locks",
        "get_robust_list",
        pid_namespace(&["ESRCH"]),
        || {
            call!(
                libc::SYS_get_robust_list,
                sibling(),
                [0_usize].as_mut_ptr(),
                [0_usize].as_mut_ptr()
            )
        },
    ),
    filtered(
        "signal/timers",
        "makes timers until none can be made",
        "timer_create",
        limits(&["EAGAIN"]),
        || call!(libc::SYS_timer_create, 0, 0, [0_i32].as_mut_ptr()),
    ),
    filtered("signal/itimer", "has itself interrupted", "setitimer", alone(ONLY_ITSELF), || {
        call!(libc::SYS_setitimer, 0, [0_i64, 0, 1000, 0].as_ptr(), 0)
    }),
    filtered(
        "signal/pause",
        "waits for a signal for ever",
        "rt_sigtimedwait",
        kernel(&["EAGAIN"]),
        || call!(libc::SYS_rt_sigtimedwait, [u64::MAX].as_ptr(), 0, [0_i64, 1].as_ptr(), 8),
    ),
    filtered(
        "signal/ignore-sigsys",
        "ignores the signal of the filter",
        "rt_sigaction",
        alone("a call that the filter refuses is not made, and ends the process, all the same"),
        || handle(SIGSYS, 1),
    ),
    filtered(
        "signal/handle-sigsys",
        "puts a handler of its own in the filter's way",
        "rt_sigaction",
        alone("a call that the filter refuses is not made, whatever a handler does"),
        || handle(SIGSYS, shellcode().as_ptr().addr()),
    ),
    filtered(
        "signal/block-signals",
        "blocks every signal",
        "rt_sigprocmask",
        alone(ONLY_ITSELF),
        block_all,
    ),
    needed("signal/signal-stack", "gives its handlers another stack", || {
        call!(libc::SYS_sigaltstack, [0_usize, 2, 0].as_ptr(), 0)
    }),
    filtered(
        "signal/futex-lock",
        "takes a lock that raises priorities",
        "futex",
        kernel(&["EFAULT"]),
        || call!(libc::SYS_futex, [0_u32].as_ptr(), 6 | 128, 0, 0),
    ),
    filtered(
        "signal/futex-requeue",
        "moves waiters, whose code in the kernel had holes",
        "futex",
        alone(ONLY_ITSELF),
        || {
            let (one, other) = ([0_u32], [0_u32]);
            call!(libc::SYS_futex, one.as_ptr(), 3 | 128, 1, 1, other.as_ptr(), 0)
        },
    ),
    filtered(
        "signal/futex-shared",
        "wakes whoever waits at a page that all workers share",
        "futex",
        alone("all that passes is that somebody waits; no worker waits there of itself"),
        || {
            let page = own_code() & !4095;
            peek(page);
            call!(libc::SYS_futex, page, 1, 1)
        },
    ),
    filtered(
        "signal/futex-waitv",
        "waits for several locks",
        "futex_waitv",
        kernel(&["EINVAL"]),
        || call!(libc::SYS_futex_waitv, 0, 0, 0, 0, 0),
    ),
    filtered(
        "signal/robust-list",
        "leaves the kernel a list to walk at its death",
        "set_robust_list",
        alone("a list in its own memory"),
        || call!(libc::SYS_set_robust_list, [0_usize; 3].as_ptr(), 24),
    ),
    filtered(
        "signal/tid-address",
        "has the kernel write at its death",
        "set_tid_address",
        alone("a word in its own memory"),
        || call!(libc::SYS_set_tid_address, 0),
    ),
];
