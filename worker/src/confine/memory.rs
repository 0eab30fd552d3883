//! What is memory and what is code, for good.
#![expect(unsafe_code, reason = "neither call has a safe wrapper")]

use std::io;
use std::ops::Range;

/// Memory-deny-write-execute. Lost: making any mapping executable that was not, and mapping
/// anything writable and executable. The loaded code stays executable.
///
/// `false` if the kernel does not know the option (before Linux 6.3).
///
/// # Errors
/// The kernel knows it and refuses.
pub(super) fn deny_write_execute() -> io::Result<bool> {
    let on = libc::PR_MDWE_REFUSE_EXEC_GAIN;
    // SAFETY: PR_SET_MDWE takes flags by value and touches no memory of ours.
    match unsafe { libc::prctl(libc::PR_SET_MDWE, libc::c_ulong::from(on), 0, 0, 0) } {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            error => Err(error),
        },
    }
}

/// Seals the mapped code. Lost: unmapping it, mapping something else in its place, and
/// changing what may be done with it.
///
/// `false` if the range is empty.
///
/// # Errors
/// The kernel refuses; it knows the call since Linux 6.10.
pub(super) fn seal_code(code: &Range<*const u8>) -> io::Result<bool> {
    let length = code.end.addr().saturating_sub(code.start.addr());
    if length == 0 {
        return Ok(false);
    }
    // SAFETY: sealing takes a range by value and changes no byte of it. Nothing in this
    // program unmaps or changes loaded code: what holds it is never dropped.
    match unsafe { libc::syscall(libc::SYS_mseal, code.start, length, 0) } {
        0 => Ok(true),
        _ => Err(io::Error::last_os_error()),
    }
}
