//! Capabilities, visibility, and the bond to the supervisor's life.
#![expect(unsafe_code, reason = "prctl has no safe wrapper for the secure bits")]

use std::io;

use caps::{CapSet, Capability};
use nix::sys::signal::Signal;

/// `SECBIT_NOROOT`, `SECBIT_NO_SETUID_FIXUP` and `SECBIT_NO_CAP_AMBIENT_RAISE`, each with
/// its lock: user 0 of the namespace is nobody special (linux/securebits.h).
const SECURE_BITS: libc::c_ulong = 0b1100_1111;

/// Empties all five capability sets. `false` if the bounding set is not ours to empty,
/// as for an ordinary user without a user namespace of his own.
///
/// # Errors
/// A set that must be ours to empty is not.
pub(super) fn drop_all() -> io::Result<bool> {
    let may_bound = caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)
        .map_err(io::Error::other)?;
    if may_bound {
        caps::clear(None, CapSet::Bounding).map_err(io::Error::other)?;
        lock_secure_bits()?;
    }
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(io::Error::other)?;
    }
    Ok(caps::read(None, CapSet::Bounding).map_err(io::Error::other)?.is_empty())
}

fn lock_secure_bits() -> io::Result<()> {
    // SAFETY: PR_SET_SECUREBITS takes bits by value and touches no memory of ours.
    match unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECURE_BITS, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// No core dump, and no tracing by processes of the same user.
///
/// # Errors
/// `prctl` failed, which this option does not.
pub(super) fn hide() -> io::Result<()> {
    Ok(nix::sys::prctl::set_dumpable(false)?)
}

/// Killed by the kernel when the supervisor's spawning thread ends, which lives as long as
/// the supervisor.
///
/// If the supervisor died before this call the channel is closed, and the worker ends
/// because no message comes.
///
/// # Errors
/// `prctl` failed, which this option does not.
pub(super) fn die_with_parent() -> io::Result<()> {
    Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)
}
