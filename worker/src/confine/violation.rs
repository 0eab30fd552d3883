//! The last words of a worker that makes a system call outside its filter.
//!
//! The filters answer such a call with `SIGSYS` instead of the kernel's silent kill, so that
//! the operator can be told which call it was. That loosens nothing: the call is not made,
//! the handler can't be replaced (`rt_sigaction` is outside every filter that stands while
//! foreign code runs), it runs on the one thread there is, reads nothing but what the kernel
//! put on its stack, and ends in a call that is outside the filter as well. As `SIGSYS` is
//! blocked by then, the kernel kills the process for it, as it does at once if the signal was
//! blocked before or has no stack to be delivered on.
#![expect(unsafe_code, reason = "a signal handler, and the siginfo that it is given")]

use std::ffi::c_void;
use std::io;

use conclave_ipc::CHANNEL_FD;
use conclave_ipc::frame::encode_in_place;
use conclave_ipc::message::Reply;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Room for a frame around [`Reply::Forbidden`].
const FRAME_BYTES: usize = 32;

/// The head of `siginfo_t` and its part for `SIGSYS`, on 64-bit processors (sigaction(2)).
#[repr(C)]
struct SigsysInfo {
    signal: i32,
    error: i32,
    code: i32,
    padding: i32,
    address: *const c_void,
    syscall: i32,
    architecture: u32,
}

const _: () = assert!(size_of::<SigsysInfo>() <= size_of::<libc::siginfo_t>());
const _: () = assert!(align_of::<SigsysInfo>() <= align_of::<libc::siginfo_t>());

/// Has violations of the filters told before they kill.
///
/// # Errors
/// `sigaction` failed.
pub(super) fn report() -> io::Result<()> {
    // On the stack that there is: the alternate one has room for the engine's handler only.
    let handler = SigHandler::SigAction(tell_and_die);
    let action = SigAction::new(handler, SaFlags::empty(), SigSet::all());
    // SAFETY: the handler makes system calls and computes on its own stack: it takes no lock
    // and allocates nothing, and does not return.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    Ok(())
}

extern "C" fn tell_and_die(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel gives a valid `siginfo_t`, whose layout for SIGSYS this is, and which
    // is no smaller (asserted above).
    let syscall = unsafe { (*info.cast::<SigsysInfo>()).syscall };
    let last = Reply::Forbidden { syscall: syscall.cast_unsigned() };
    let mut frame = [0; FRAME_BYTES];
    if let Ok(length) = encode_in_place(&last, &mut frame) {
        // A supervisor that does not read now is not waited for.
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the buffer is ours and at least `length` bytes long.
        unsafe { libc::send(CHANNEL_FD, frame.as_ptr().cast(), length.min(FRAME_BYTES), flags) };
    }
    let nothing: *const c_void = std::ptr::null();
    // SAFETY: null pointers are read by nobody: the call is outside every filter.
    unsafe { libc::syscall(libc::SYS_execve, nothing, nothing, nothing) };
    // Without a filter there is no SIGSYS; somebody sent it.
    // SAFETY: ends the process and touches no memory.
    unsafe { libc::_exit(libc::EXIT_FAILURE) };
}
