//! Branch predictions, where the processor has them controlled per process.
//!
//! Lost: using predictions that another process trained, and training those that another
//! will use (Spectre variant 2 between processes); the kernel puts a barrier between them.
#![expect(unsafe_code, reason = "prctl has no safe wrapper for this option")]

// From linux/prctl.h; the same for every processor, but libc has them for some only.
const PR_SET_SPECULATION_CTRL: libc::c_int = 53;
const PR_SPEC_INDIRECT_BRANCH: libc::c_ulong = 1;
const PR_SPEC_FORCE_DISABLE: libc::c_ulong = 1 << 3;

/// Whether the processor and the kernel's settings let a process have it. For ever: it can't
/// be lifted again, and is inherited.
pub(super) fn separate_branch_predictions() -> bool {
    // SAFETY: the option takes numbers and touches no memory of ours.
    let result = unsafe {
        libc::prctl(PR_SET_SPECULATION_CTRL, PR_SPEC_INDIRECT_BRANCH, PR_SPEC_FORCE_DISABLE, 0, 0)
    };
    result == 0
}
