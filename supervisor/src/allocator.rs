//! What the C library's allocator may keep of memory that was given back.
//!
//! By itself glibc learns from large buffers that are freed: it takes the next ones out of
//! its arenas, of which there are eight for each processor, and keeps up to twice the largest
//! in every one of them. A few answers of 16 MiB then stay in the process as hundreds of
//! megabytes, for the rest of its life.
#![expect(unsafe_code, reason = "mallopt is a function of the C library")]

/// Larger blocks are mapped by themselves, and unmapped when they are freed. Requests and
/// answers of the usual size are far smaller.
const MAPPED_FROM_BYTES: libc::c_int = 1 << 20;

/// What may stay free at the end of each arena.
const KEPT_BYTES: libc::c_int = 4 << 20;

/// One for the thread that the runtime's tasks share, one for all others.
const ARENAS: libc::c_int = 2;

/// Bounds what the allocator keeps. To be called before there are many threads.
pub(crate) fn bound() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [
        (libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES),
        (libc::M_TRIM_THRESHOLD, KEPT_BYTES),
        (libc::M_ARENA_MAX, ARENAS),
    ] {
        // SAFETY: mallopt takes two numbers; it is safe to call beside other threads.
        if unsafe { libc::mallopt(option, value) } == 0 {
            tracing::warn!(option, value, "allocator refuses an option");
        }
    }
}
