//! Memory-deny-write-execute, where the kernel has it (Linux 6.3).
//!
//! Lost: making any mapping executable that was not, and mapping anything writable and
//! executable. The loaded code stays executable.
#![expect(unsafe_code, reason = "prctl has no safe wrapper for this option")]

use std::io;

/// Whether the kernel knows the option.
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
