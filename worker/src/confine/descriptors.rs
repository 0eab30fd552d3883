//! The descriptors that the supervisor numbered: 3 the channel, 4 the image, 5 the memory file
//! to be filled. All others were closed before this program was executed.
#![expect(unsafe_code, reason = "takes over inherited descriptors by number")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use conclave_ipc::{CHANNEL_FD, IMAGE_FD, OUTPUT_FD};

static CHANNEL_TAKEN: AtomicBool = AtomicBool::new(false);
static IMAGE_TAKEN: AtomicBool = AtomicBool::new(false);
static OUTPUT_TAKEN: AtomicBool = AtomicBool::new(false);

/// The channel, once.
///
/// # Errors
/// `EBADF` if the supervisor passed none.
pub(super) fn channel() -> io::Result<UnixStream> {
    require_open(CHANNEL_FD)?;
    Ok(UnixStream::from(take(CHANNEL_FD, &CHANNEL_TAKEN)))
}

fn require_open(number: i32) -> io::Result<()> {
    // SAFETY: fcntl with F_GETFD reads a flag and touches no memory.
    match unsafe { libc::fcntl(number, libc::F_GETFD) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Puts another channel in the place of this process's own, for whoever uses that.
///
/// # Errors
/// `dup3` failed.
pub(super) fn exchange_channel(channel: &OwnedFd) -> io::Result<()> {
    // SAFETY: dup3 takes numbers. The owner of the channel's goes on to own what has it now.
    match unsafe { libc::dup3(channel.as_raw_fd(), CHANNEL_FD, libc::O_CLOEXEC) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The image, once.
pub(super) fn image() -> File {
    File::from(take(IMAGE_FD, &IMAGE_TAKEN))
}

/// The memory file to be filled, once.
///
/// # Errors
/// `EBADF` if the supervisor passed none.
pub(super) fn output() -> io::Result<File> {
    require_open(OUTPUT_FD)?;
    Ok(File::from(take(OUTPUT_FD, &OUTPUT_TAKEN)))
}

#[expect(clippy::panic, reason = "a second owner of one descriptor would be a bug of ours")]
fn take(number: i32, taken: &AtomicBool) -> OwnedFd {
    if taken.swap(true, Ordering::Relaxed) {
        panic!("descriptor {number} was already taken");
    }
    // SAFETY: the number is one that the supervisor hands over, nothing else in this
    // program refers to it, and the flag above lets it be taken only once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Closes descriptors 0, 1 and 2.
///
/// # Errors
/// `close_range` failed, which Linux 5.9 and newer do not.
pub(super) fn close_standard_streams() -> io::Result<()> {
    // SAFETY: no owner of these three numbers exists in this program but the standard
    // streams of std, which treat a closed descriptor as a sink.
    match unsafe { libc::close_range(0, 2, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
