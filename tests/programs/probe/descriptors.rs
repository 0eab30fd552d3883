//! Descriptors: making more of them, and doing other things with the three that are there.
#![forbid(unsafe_code)]

use libc::{
    F_ADD_SEALS, F_DUPFD, F_GETPIPE_SZ, F_SETFL, F_SETLEASE, F_SETLK, F_SETOWN, F_SETPIPE_SZ,
    F_WRLCK, FIONREAD, O_ASYNC, O_NONBLOCK, SEEK_SET, TIOCSTI,
};

use super::kernel::{Gain, call};
use super::{Attempt, NO_DESCRIPTOR, Next, alone, filtered, kernel, limits, pid_namespace};

const OWN_CHANNEL: &str = "changes how the worker's own end of the channel behaves";
const F_SETSIG: i32 = 10;
const OWN_CODE: &str = "reads its own code, which is sealed";

fn fcntl(descriptor: i32, command: i32, argument: i32) -> Gain {
    call!(libc::SYS_fcntl, descriptor, command, argument)
}

/// `PAGEMAP_SCAN`, with all that it may do: report pages, and protect them against writing.
fn scan(descriptor: i32) -> Gain {
    let area = super::memory::fresh_page()?;
    let mut regions = [0_u64; 12];
    let argument: [u64; 12] = [
        96,
        0,
        area as u64,
        (area as u64).saturating_add(4096),
        0,
        regions.as_mut_ptr().addr() as u64,
        4,
        0,
        0,
        0,
        0,
        1 << 1,
    ];
    call!(libc::SYS_ioctl, descriptor, 0xc060_6610_u32, argument.as_ptr())
}

pub(super) const ATTEMPTS: &[Attempt] = &[
    filtered(
        "descriptor/leaked",
        "uses a descriptor that the supervisor may have left open",
        "read",
        kernel(&["EBADF"]),
        || {
            let mut byte = [0_u8; 1];
            (6..64)
                .map(|number| call!(libc::SYS_read, number, byte.as_mut_ptr(), 1))
                .find(Result::is_ok)
                .unwrap_or(Err(nix::errno::Errno::EBADF))
        },
    ),
    filtered("descriptor/dup", "makes a second descriptor", "dup", NO_DESCRIPTOR, || {
        call!(libc::SYS_dup, 3)
    }),
    filtered(
        "descriptor/dup3",
        "makes a second descriptor by number",
        "dup3",
        limits(&["EBADF"]),
        || call!(libc::SYS_dup3, 3, 9, 0),
    ),
    filtered(
        "descriptor/dup3-over",
        "puts its channel in the place of its image",
        "dup3",
        limits(&["EBADF"]),
        || call!(libc::SYS_dup3, 3, 4, 0),
    ),
    filtered(
        "descriptor/dupfd",
        "makes a second descriptor by fcntl",
        "fcntl",
        limits(&["EINVAL"]),
        || fcntl(3, F_DUPFD, 3),
    ),
    filtered(
        "descriptor/exhaust",
        "makes descriptors until none is left",
        "dup",
        NO_DESCRIPTOR,
        || {
            let mut made = 0;
            while call!(libc::SYS_dup, 3).is_ok() && made < 100_000_usize {
                made = made.saturating_add(1);
            }
            if made > 0 { Ok(made) } else { Err(nix::errno::Errno::EMFILE) }
        },
    ),
    filtered("descriptor/pipe", "makes a pipe", "pipe2", NO_DESCRIPTOR, || {
        call!(libc::SYS_pipe2, [0_i32; 2].as_mut_ptr(), 0)
    }),
    filtered("descriptor/eventfd", "makes a counter", "eventfd2", NO_DESCRIPTOR, || {
        call!(libc::SYS_eventfd2, 0, 0)
    }),
    filtered(
        "descriptor/signalfd",
        "makes a descriptor of signals",
        "signalfd4",
        NO_DESCRIPTOR,
        || call!(libc::SYS_signalfd4, -1, [u64::MAX].as_ptr(), 8, 0),
    ),
    filtered("descriptor/timerfd", "makes a timer", "timerfd_create", NO_DESCRIPTOR, || {
        call!(libc::SYS_timerfd_create, 0, 0)
    }),
    filtered(
        "descriptor/epoll",
        "makes a set of descriptors to wait for",
        "epoll_create1",
        NO_DESCRIPTOR,
        || call!(libc::SYS_epoll_create1, 0),
    ),
    filtered("descriptor/memfd", "makes a memory file", "memfd_create", NO_DESCRIPTOR, || {
        call!(libc::SYS_memfd_create, c"a", 0)
    }),
    filtered(
        "descriptor/memfd-secret",
        "makes memory that even the kernel can't see",
        "memfd_secret",
        limits(&["EMFILE", "ENOSYS"]),
        || call!(libc::SYS_memfd_secret, 0),
    ),
    filtered(
        "descriptor/close-range",
        "closes all at once",
        "close_range",
        kernel(&["EINVAL"]),
        || call!(libc::SYS_close_range, 9, 8, 0),
    ),
    filtered(
        "descriptor/unshare-files",
        "has a table of descriptors of its own by closing",
        "close_range",
        alone("it shares its table with nobody"),
        || call!(libc::SYS_close_range, 64, 65, 2),
    ),
    filtered("descriptor/image-read", "reads its image", "read", alone(OWN_CODE), || {
        call!(libc::SYS_read, 4, [0_u8; 16].as_mut_ptr(), 16)
    }),
    filtered(
        "descriptor/image-pread",
        "reads its image at a place",
        "pread64",
        alone(OWN_CODE),
        || call!(libc::SYS_pread64, 4, [0_u8; 16].as_mut_ptr(), 16, 0),
    ),
    filtered(
        "descriptor/image-write",
        "writes to its image",
        "write",
        limits(&["EPERM", "EFBIG"]),
        || call!(libc::SYS_write, 4, c"a", 1),
    ),
    filtered(
        "descriptor/image-pwrite",
        "writes to its image at a place",
        "pwrite64",
        limits(&["EFBIG", "EPERM"]),
        || call!(libc::SYS_pwrite64, 4, c"a", 1, 0),
    ),
    filtered(
        "descriptor/image-truncate",
        "empties its image",
        "ftruncate",
        limits(&["EFBIG", "SIGXFSZ", "EPERM"]),
        || call!(libc::SYS_ftruncate, 4, 0),
    ),
    filtered(
        "descriptor/image-grow",
        "makes its image larger",
        "ftruncate",
        kernel(&["EPERM", "EFBIG", "SIGXFSZ"]),
        || call!(libc::SYS_ftruncate, 4, 1_u64 << 40),
    ),
    filtered(
        "descriptor/image-fallocate",
        "has room kept for its image",
        "fallocate",
        kernel(&["EPERM", "EFBIG", "SIGXFSZ"]),
        || call!(libc::SYS_fallocate, 4, 0, 0, 1_u64 << 32),
    ),
    filtered(
        "descriptor/image-punch",
        "makes a hole in its image",
        "fallocate",
        kernel(&["EPERM"]),
        || call!(libc::SYS_fallocate, 4, 3, 0, 4096),
    ),
    filtered(
        "descriptor/image-seek",
        "moves in its image",
        "lseek",
        alone("nobody reads the image at its place any more"),
        || call!(libc::SYS_lseek, 4, 0, SEEK_SET),
    ),
    filtered(
        "descriptor/image-chmod",
        "changes the mode of its image",
        "fchmod",
        kernel(&["EPERM"]),
        || call!(libc::SYS_fchmod, 4, 0o777),
    ),
    filtered(
        "descriptor/image-lock",
        "locks its image against its siblings",
        "flock",
        alone("nothing of ours locks the image"),
        || call!(libc::SYS_flock, 4, 2 | 4),
    ),
    filtered(
        "descriptor/image-record-lock",
        "locks a part of its image",
        "fcntl",
        alone("nothing of ours locks the image"),
        || {
            let lock = [i64::from(F_WRLCK), 0, 1, 0];
            call!(libc::SYS_fcntl, 4, F_SETLK, lock.as_ptr())
        },
    ),
    filtered(
        "descriptor/image-lease",
        "asks to be told who opens its image",
        "fcntl",
        limits(&["ENOLCK", "EACCES", "EAGAIN", "EINVAL"]),
        || fcntl(4, F_SETLEASE, F_WRLCK),
    ),
    filtered(
        "descriptor/image-seals",
        "adds a seal to its image",
        "fcntl",
        kernel(&["EPERM"]),
        || fcntl(4, F_ADD_SEALS, 0x20),
    ),
    filtered(
        "descriptor/image-sendfile",
        "sends its image through its channel by the kernel",
        "sendfile",
        alone("the supervisor may read a policy's code"),
        || call!(libc::SYS_sendfile, 3, 4, 0, 0),
    ),
    filtered(
        "descriptor/image-splice",
        "moves its image into its channel",
        "splice",
        kernel(&["EINVAL"]),
        || call!(libc::SYS_splice, 4, 0, 3, 0, 1, 0),
    ),
    filtered("descriptor/tee", "copies a pipe", "tee", kernel(&["EINVAL"]), || {
        call!(libc::SYS_tee, 3, 4, 1, 0)
    }),
    filtered("descriptor/vmsplice", "gives pages away", "vmsplice", kernel(&["EBADF"]), || {
        let page = super::memory::fresh_page()?;
        call!(libc::SYS_vmsplice, 3, [page, 4096].as_ptr(), 1, 0)
    }),
    filtered(
        "descriptor/copy-file-range",
        "copies its image over itself",
        "copy_file_range",
        kernel(&["EBADF", "EINVAL", "EPERM", "EXDEV"]),
        || call!(libc::SYS_copy_file_range, 4, 0, 3, 0, 1, 0),
    ),
    filtered(
        "descriptor/cachestat",
        "asks what of its image is in memory",
        "cachestat",
        alone(OWN_CODE),
        || call!(451_i64, 4, [0_u64, 4096].as_ptr(), [0_u64; 5].as_mut_ptr(), 0),
    ),
    filtered(
        "descriptor/bytes-waiting",
        "asks how much waits in its channel",
        "ioctl",
        alone(OWN_CHANNEL),
        || call!(libc::SYS_ioctl, 3, FIONREAD, [0_i32].as_mut_ptr()),
    ),
    filtered(
        "descriptor/inject-terminal",
        "types into the operator's terminal",
        "ioctl",
        kernel(&["EBADF", "ENOTTY", "EINVAL"]),
        || call!(libc::SYS_ioctl, 3, TIOCSTI, c"x"),
    ),
    filtered(
        "descriptor/non-blocking",
        "makes its channel non-blocking by ioctl",
        "ioctl",
        alone(OWN_CHANNEL),
        || call!(libc::SYS_ioctl, 3, 0x5421, [1_i32].as_ptr()),
    ),
    filtered(
        "descriptor/flags",
        "makes its channel non-blocking",
        "fcntl",
        alone(OWN_CHANNEL),
        || fcntl(3, F_SETFL, O_NONBLOCK),
    ),
    filtered(
        "descriptor/signal-owner",
        "has signals sent to the supervisor",
        "fcntl",
        pid_namespace(&["ESRCH"]),
        || {
            fcntl(3, F_SETOWN, super::processes::supervisor())?;
            fcntl(3, F_SETSIG, 9)?;
            fcntl(3, F_SETFL, O_ASYNC)
        },
    ),
    filtered(
        "descriptor/pipe-size",
        "makes a buffer of the kernel's larger",
        "fcntl",
        kernel(&["EBADF", "EINVAL"]),
        || {
            fcntl(3, F_SETPIPE_SZ, 1 << 20)?;
            fcntl(3, F_GETPIPE_SZ, 0)
        },
    ),
    filtered(
        "descriptor/select",
        "waits for descriptors",
        "pselect6",
        alone("waits, until its deadline, for what it has"),
        || call!(libc::SYS_pselect6, 0, 0, 0, 0, [0_i64; 2].as_ptr(), 0),
    ),
    filtered(
        "descriptor/close",
        "closes its image",
        "close",
        alone("takes from itself alone"),
        || call!(libc::SYS_close, 4),
    ),
    filtered(
        "descriptor/close-channel",
        "closes its channel and lives on",
        "close",
        Next::Nothing(&["channel"], "takes from itself alone"),
        || {
            call!(libc::SYS_close, 3)?;
            call!(libc::SYS_clock_nanosleep, 1, 0, [3_000_000_000_i64, 0].as_ptr(), 0)
        },
    ),
    filtered(
        "descriptor/scan-own-pages",
        "asks which of its own pages were written to",
        "ioctl",
        kernel(&["ENOTTY"]),
        || scan(5),
    ),
    filtered(
        "descriptor/write-state",
        "writes to the file of the state that others go on from",
        "pwrite64",
        limits(&["EFBIG", "SIGXFSZ"]),
        || call!(libc::SYS_pwrite64, 5, [0_u8; 8].as_ptr(), 8, 0),
    ),
    filtered(
        "descriptor/grow-state",
        "makes the file of the state as long as it can",
        "ftruncate",
        limits(&["EFBIG", "SIGXFSZ", "EPERM"]),
        || call!(libc::SYS_ftruncate, 5, 1_i64 << 40),
    ),
];
