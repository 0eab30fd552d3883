//! Forking, and the end of what was forked.
#![expect(unsafe_code, reason = "a system call that copies the process")]

use std::io;

use nix::errno::Errno;

/// Copies this process. `None` in the copy; in this one the number of the copy.
///
/// # Errors
/// The kernel refuses.
pub(super) fn fork() -> io::Result<Option<u32>> {
    // By the bare call, whose flags the filter can see: the C library's would share a word of
    // memory with the kernel, and has nothing to do here where there is one thread.
    // SAFETY: nothing is shared, and the copy goes on on a copy of this stack. There is one
    // thread, so no lock is held by another one in the copied memory.
    let number = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    match Errno::result(number)? {
        0 => Ok(None),
        child => Ok(Some(u32::try_from(child).map_err(io::Error::other)?)),
    }
}

/// How a copy has ended that is no more. Does not wait.
///
/// # Errors
/// There is no such copy, or it lives.
pub fn reap(child: u32) -> io::Result<i32> {
    let child = libc::pid_t::try_from(child).map_err(io::Error::other)?;
    let mut status = 0;
    // SAFETY: the status is written to an integer that outlives the call.
    let reaped = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) };
    match Errno::result(reaped)? {
        0 => Err(io::Error::other("it lives")),
        _ => Ok(status),
    }
}
