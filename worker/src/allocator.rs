//! The worker's allocator: the C library's, which ends the process when there is no more.
//!
//! A worker's memory is bounded by the kernel. At that bound Rust would abort, whose signal
//! reads as a forbidden system call; this exit code says what it was.
#![expect(unsafe_code, reason = "an allocator is unsafe by its contract")]

use std::alloc::{GlobalAlloc, Layout, System};

use conclave_ipc::exit::WorkerExit;

use crate::end::end;

/// See the module.
#[derive(Debug, Default)]
pub struct BoundedAllocator;

// SAFETY: every method hands its arguments to the system's allocator as they are and returns
// what that returns, or does not return.
unsafe impl GlobalAlloc for BoundedAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the same ones.
        require(unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are the same ones.
        require(unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are the same ones.
        require(unsafe { System.realloc(block, layout, size) })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the same ones.
        unsafe { System.dealloc(block, layout) }
    }
}

fn require(block: *mut u8) -> *mut u8 {
    if block.is_null() {
        end(WorkerExit::OutOfMemory);
    }
    block
}
