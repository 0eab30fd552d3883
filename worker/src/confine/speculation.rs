//! Branch predictions, where the processor has them controlled per process.
//!
//! Lost: using predictions that another process trained, and training those that another
//! will use (Spectre variant 2 between processes); the kernel puts a barrier between them.
#![expect(unsafe_code, reason = "prctl has no safe wrapper for this option")]

/// Whether the processor and the kernel's settings let a process have it. For ever: it can't
/// be lifted again, and is inherited.
pub(super) fn separate_branch_predictions() -> bool {
    let force = libc::c_ulong::from(libc::PR_SPEC_FORCE_DISABLE);
    // SAFETY: the option takes numbers and touches no memory of ours.
    let result = unsafe {
        libc::prctl(libc::PR_SET_SPECULATION_CTRL, libc::PR_SPEC_INDIRECT_BRANCH, force, 0, 0)
    };
    result == 0
}
