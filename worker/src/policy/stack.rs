//! A native stack that a computation can be stopped on, and continued from the same point as
//! often as wanted.
//!
//! A WASI command that has come to its first read stands in the middle of a call: of compiled
//! code, of the engine, of a host function. What it goes on with is the bytes of that stack
//! and the registers that were saved on it. [`Stack::mark`] copies them, [`Stack::rewind`]
//! puts them back. No library offers this, as it copies what owns things; here the frames
//! between the stack's beginning and the mark are never left: a run ends inside a further
//! host call, which is not returned from.
#![expect(unsafe_code, reason = "switches stacks, and copies one")]

use std::arch::naked_asm;
use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering::Relaxed};

use conclave_ipc::limits::GUEST_STACK_BYTES;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect};

/// The guest's part, and as much as any thread has for the host's functions.
const BYTES: usize = GUEST_STACK_BYTES + (2 << 20);

/// Below the stack, inaccessible: more than any function of ours takes at once.
const GUARD_BYTES: usize = 64 << 10;

/// What runs on a stack; it never returns.
pub(super) type Run<T> = extern "C" fn(&'static T) -> !;

/// The stack of one computation.
#[derive(Debug)]
pub(super) struct Stack {
    top: *mut u8,
    /// Where the computation left off, while it is stopped.
    stopped: AtomicPtr<u8>,
    /// Where the host left off, while the computation runs.
    host: AtomicPtr<u8>,
    mark: OnceLock<Mark>,
}

// SAFETY: it is used by the one thread of a worker; all that changes is atomic or set once.
unsafe impl Send for Stack {}
// SAFETY: as above.
unsafe impl Sync for Stack {}

/// What the computation is set back to.
#[derive(Debug)]
struct Mark {
    stopped: *mut u8,
    bytes: Box<[u8]>,
}

impl Stack {
    /// A stack on which `run(argument)` will run when it is entered first.
    ///
    /// # Errors
    /// No memory.
    pub(super) fn new<T: Sync>(run: Run<T>, argument: &'static T) -> io::Result<Self> {
        let length = NonZeroUsize::new(GUARD_BYTES + BYTES).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let sharing = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping, at a place of the kernel's choice.
        let bottom = unsafe { mmap_anonymous(None, length, access, sharing) }?;
        // SAFETY: this is the lowest part of the new mapping, which nobody uses.
        unsafe { mprotect(bottom, GUARD_BYTES, ProtFlags::PROT_NONE) }?;
        // SAFETY: one past the end of the mapping.
        let top = unsafe { bottom.as_ptr().cast::<u8>().add(length.get()) };
        // SAFETY: the mapping is fresh, aligned to a page, and larger than the frame.
        let stopped = unsafe { first_frame(top, Frame::new(run, argument)) };
        Ok(Self {
            top,
            stopped: AtomicPtr::new(stopped),
            host: AtomicPtr::new(ptr::null_mut()),
            mark: OnceLock::new(),
        })
    }

    /// Runs the computation until it stops. To be called by the host.
    pub(super) fn enter(&self) {
        let stopped = self.stopped.load(Relaxed);
        // SAFETY: the computation is stopped, as the host runs; what it left on its stack is
        // there as it left it, or as it was marked. This call returns when it stops again.
        unsafe { switch(self.host.as_ptr(), stopped) }
    }

    /// Stops the computation. To be called by it; returns when it is entered again, which may
    /// be any number of times: whatever the callers own on this stack they must leave alone.
    pub(super) fn stop(&self) {
        let host = self.host.load(Relaxed);
        // SAFETY: the host waits in `enter` on its own stack, which it does not leave until this.
        unsafe { switch(self.stopped.as_ptr(), host) }
    }

    /// Remembers where the computation stands, once. To be called by the host.
    pub(super) fn mark(&self) {
        let stopped = self.stopped.load(Relaxed);
        let length = self.top.addr().saturating_sub(stopped.addr());
        // SAFETY: what lies between is the stopped computation's part of the stack, which
        // nobody changes while the host runs.
        let bytes = unsafe { std::slice::from_raw_parts(stopped, length) };
        self.mark.get_or_init(|| Mark { stopped, bytes: bytes.into() });
    }

    /// Sets the computation back to the mark. To be called by the host.
    pub(super) fn rewind(&self) {
        let Some(mark) = self.mark.get() else { return };
        // SAFETY: the bytes go where they came from, below the top of the stack, which the
        // stopped computation alone uses. It left nothing there that wants to be dropped, as
        // it stopped in a call that it does not return from.
        unsafe { ptr::copy_nonoverlapping(mark.bytes.as_ptr(), mark.stopped, mark.bytes.len()) };
        self.stopped.store(mark.stopped, Relaxed);
    }
}

/// Lays out the stack as if the computation had stopped just before its first instruction.
///
/// # Safety
/// `top` is the end of a writable range of at least [`Frame`]'s size, aligned to 16.
unsafe fn first_frame(top: *mut u8, content: Frame) -> *mut u8 {
    // SAFETY: the caller says that there is room.
    let frame = unsafe { top.cast::<Frame>().sub(1) };
    // SAFETY: as above; a frame's size keeps the alignment.
    unsafe { frame.write(content) };
    frame.cast()
}

/// What [`switch`] leaves on a stack, from its lowest address: the registers that a function
/// must give back as it found them (System V ABI for `x86_64`, 3.2.1).
#[cfg(target_arch = "x86_64")]
#[repr(C, align(16))]
struct Frame {
    r15: *const c_void,
    r14: *const c_void,
    /// The first function.
    r13: *const c_void,
    /// Its argument.
    r12: *const c_void,
    rbx: *const c_void,
    rbp: *const c_void,
    returns_to: *const c_void,
    /// For the alignment that a called function finds.
    padding: *const c_void,
}

#[cfg(target_arch = "x86_64")]
impl Frame {
    fn new<T: Sync>(run: Run<T>, argument: &'static T) -> Self {
        Self {
            r15: ptr::null(),
            r14: ptr::null(),
            r13: run as *const c_void,
            r12: ptr::from_ref(argument).cast(),
            rbx: ptr::null(),
            rbp: ptr::null(),
            returns_to: begin as *const c_void,
            padding: ptr::null(),
        }
    }
}

/// Leaves this stack, saving where it stands to `*left`, and goes on on the one that was left
/// at `entered`.
///
/// # Safety
/// `left` can be written to, and `entered` was saved by this function and not entered since, or
/// everything from there to its stack's top has been put back.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn switch(left: *mut *mut u8, entered: *mut u8) {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi], rsp",
        "mov rsp, rsi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

/// What a new stack begins with.
///
/// # Safety
/// The registers are those of a first [`Frame`].
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn begin() -> ! {
    naked_asm!("mov rdi, r12", "sub rsp, 8", "call r13", "ud2")
}

/// What [`switch`] leaves on a stack, from its lowest address: the registers that a function
/// must give back as it found them (Procedure Call Standard for the Arm 64-bit Architecture,
/// 6.1.1 and 6.1.2).
#[cfg(target_arch = "aarch64")]
#[repr(C, align(16))]
struct Frame {
    /// The first function's argument, and the function.
    x19_x20: [*const c_void; 2],
    x21_to_x28: [*const c_void; 8],
    /// The frame pointer `x29`, and `x30`, which `ret` goes to.
    x29_x30: [*const c_void; 2],
    d8_to_d15: [u64; 8],
}

#[cfg(target_arch = "aarch64")]
impl Frame {
    fn new<T: Sync>(run: Run<T>, argument: &'static T) -> Self {
        Self {
            x19_x20: [ptr::from_ref(argument).cast(), run as *const c_void],
            x21_to_x28: [ptr::null(); 8],
            x29_x30: [ptr::null(), begin as *const c_void],
            d8_to_d15: [0; 8],
        }
    }
}

/// Leaves this stack, saving where it stands to `*left`, and goes on on the one that was left
/// at `entered`.
///
/// # Safety
/// `left` can be written to, and `entered` was saved by this function and not entered since, or
/// everything from there to its stack's top has been put back.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
unsafe extern "C" fn switch(left: *mut *mut u8, entered: *mut u8) {
    naked_asm!(
        "sub sp, sp, #160",
        "stp x19, x20, [sp, #0]",
        "stp x21, x22, [sp, #16]",
        "stp x23, x24, [sp, #32]",
        "stp x25, x26, [sp, #48]",
        "stp x27, x28, [sp, #64]",
        "stp x29, x30, [sp, #80]",
        "stp d8, d9, [sp, #96]",
        "stp d10, d11, [sp, #112]",
        "stp d12, d13, [sp, #128]",
        "stp d14, d15, [sp, #144]",
        "mov x2, sp",
        "str x2, [x0]",
        "mov sp, x1",
        "ldp x19, x20, [sp, #0]",
        "ldp x21, x22, [sp, #16]",
        "ldp x23, x24, [sp, #32]",
        "ldp x25, x26, [sp, #48]",
        "ldp x27, x28, [sp, #64]",
        "ldp x29, x30, [sp, #80]",
        "ldp d8, d9, [sp, #96]",
        "ldp d10, d11, [sp, #112]",
        "ldp d12, d13, [sp, #128]",
        "ldp d14, d15, [sp, #144]",
        "add sp, sp, #160",
        "ret",
    )
}

/// What a new stack begins with.
///
/// # Safety
/// The registers are those of a first [`Frame`].
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
unsafe extern "C" fn begin() -> ! {
    naked_asm!("mov x0, x19", "blr x20", "brk #1")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    struct Counted {
        stack: OnceLock<Stack>,
        asked: AtomicU32,
        told: AtomicU32,
    }

    extern "C" fn count(counted: &'static Counted) -> ! {
        let Some(stack) = counted.stack.get() else { std::process::abort() };
        let mut sum = 7;
        stack.stop();
        loop {
            sum += counted.asked.load(Relaxed);
            counted.told.store(sum, Relaxed);
            stack.stop();
        }
    }

    #[test]
    fn a_computation_continues_from_its_mark_as_often_as_wanted() {
        let counted = &*Box::leak(Box::new(Counted {
            stack: OnceLock::new(),
            asked: AtomicU32::new(0),
            told: AtomicU32::new(0),
        }));
        let stack = counted.stack.get_or_init(|| Stack::new(count, counted).unwrap());
        stack.enter();
        stack.mark();
        let ask = |number| {
            counted.asked.store(number, Relaxed);
            stack.enter();
            counted.told.load(Relaxed)
        };
        // Without rewinding it goes on with what it has; with, it has forgotten.
        assert_eq!([ask(1), ask(1)], [8, 9]);
        for number in 0..1000 {
            stack.rewind();
            assert_eq!(ask(number), 7 + number);
        }
    }
}
