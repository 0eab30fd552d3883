//! The probe's way to the kernel and the processor: raw calls, raw memory, raw instructions.
//! Nothing checks here what an attempt passes on: that is for the kernel to do.
#![expect(unsafe_code, reason = "an attacker is not held to what is safe")]

use std::arch::{asm, global_asm};
use std::ffi::{CStr, c_long};

use nix::errno::Errno;

/// What an attempt gained: a number that the kernel gave, or its refusal.
pub(crate) type Gain = Result<usize, Errno>;

/// Something that can be an argument of a system call.
pub(crate) trait Word {
    /// As the kernel sees it.
    fn word(self) -> usize;
}

impl Word for usize {
    fn word(self) -> usize {
        self
    }
}

impl Word for i32 {
    fn word(self) -> usize {
        (self as isize).cast_unsigned()
    }
}

impl Word for u32 {
    fn word(self) -> usize {
        self as usize
    }
}

impl Word for i64 {
    fn word(self) -> usize {
        isize::try_from(self).unwrap_or_default().cast_unsigned()
    }
}

impl Word for u64 {
    fn word(self) -> usize {
        usize::try_from(self).unwrap_or(usize::MAX)
    }
}

impl Word for &CStr {
    fn word(self) -> usize {
        self.as_ptr().expose_provenance()
    }
}

impl<T> Word for *const T {
    fn word(self) -> usize {
        self.expose_provenance()
    }
}

impl<T> Word for *mut T {
    fn word(self) -> usize {
        self.expose_provenance()
    }
}

/// A system call with up to six arguments; those that are left out are 0.
macro_rules! call {
    ($number:expr $(, $argument:expr)* $(,)?) => {
        $crate::attempts::kernel::make_call(
            $number,
            &[$($crate::attempts::kernel::Word::word($argument)),*],
        )
    };
}
pub(crate) use call;

/// The function behind [`call!`].
pub(crate) fn make_call(number: c_long, arguments: &[usize]) -> Gain {
    let argument = |index| arguments.get(index).copied().unwrap_or(0_usize);
    // SAFETY: not safe at all. Attempts pass addresses of memory that lives until the call
    // is over, or ones whose loss harms this process alone, which is about to end anyway.
    let result = unsafe {
        libc::syscall(
            number,
            argument(0),
            argument(1),
            argument(2),
            argument(3),
            argument(4),
            argument(5),
        )
    };
    usize::try_from(result).map_err(|_negative| Errno::last())
}

/// A clone whose child ends at once and never touches memory, in particular no stack.
pub(crate) fn clone_that_ends(number: c_long, first: usize, second: usize) -> Gain {
    let result: isize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the child, which may share this stack, makes one more call with registers
    // only and is gone.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov eax, 60",
            "xor edi, edi",
            "syscall",
            "2:",
            inlateout("rax") number => result,
            inlateout("rdi") first => _,
            in("rsi") second,
            in("rdx") 0,
            in("r10") 0,
            in("r8") 0,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        asm!(
            "svc #0",
            "cbnz x0, 2f",
            "mov x8, #93",
            "svc #0",
            "2:",
            inlateout("x8") number => _,
            inlateout("x0") first => result,
            in("x1") second,
            in("x2") 0,
            in("x3") 0,
            in("x4") 0,
        );
    }
    gained(result)
}

/// The kernel's answer as it stands in a register.
fn gained(result: isize) -> Gain {
    match i32::try_from(result) {
        Ok(negative @ -4095..0) => Err(Errno::from_raw(negative.saturating_neg())),
        _ => Ok(result.cast_unsigned()),
    }
}

/// Ends the process.
pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: touches no memory and does not return.
    unsafe { libc::_exit(code) }
}

/// Writes bytes at any address.
pub(crate) fn poke(address: usize, bytes: &[u8]) {
    let place = std::ptr::with_exposed_provenance_mut::<u8>(address);
    // SAFETY: not safe at all; where the address can't be written to, the process dies.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) }
}

/// Reads a byte at any address.
pub(crate) fn peek(address: usize) -> u8 {
    let place = std::ptr::with_exposed_provenance::<u8>(address);
    // SAFETY: not safe at all; where the address can't be read, the process dies.
    unsafe { place.read_volatile() }
}

/// Machine code of a function that returns 42.
#[cfg(target_arch = "x86_64")]
const RETURNS_42: [u8; 6] = [0xb8, 42, 0, 0, 0, 0xc3];
/// Machine code of a function that returns 42.
#[cfg(target_arch = "aarch64")]
const RETURNS_42: [u8; 8] = [0x40, 0x05, 0x80, 0x52, 0xc0, 0x03, 0x5f, 0xd6];

/// The attacker's own code, to be written somewhere.
pub(crate) const fn shellcode() -> &'static [u8] {
    &RETURNS_42
}

/// Jumps to an address and checks that the code of [`shellcode`] is there.
pub(crate) fn execute(address: usize) -> Gain {
    let place = std::ptr::with_exposed_provenance::<()>(address);
    // SAFETY: not safe at all; where there is no code, the process dies.
    let function = unsafe { std::mem::transmute::<*const (), extern "C" fn() -> i32>(place) };
    if function() == 42 { Ok(address) } else { Err(Errno::EFAULT) }
}

/// Overflows the stack by native recursion.
pub(crate) fn recurse(depth: usize) -> usize {
    let frame = std::hint::black_box([depth; 512]);
    if depth == usize::MAX {
        return 0;
    }
    recurse(depth.wrapping_add(1)).wrapping_add(frame.iter().sum::<usize>())
}

/// Makes a call with the stack pointer pointing into nothing.
pub(crate) fn call_without_stack(number: c_long) -> Gain {
    let result: isize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the stack pointer is put back before anything uses the stack.
    unsafe {
        asm!(
            "mov {kept}, rsp",
            "mov rsp, 16",
            "syscall",
            "mov rsp, {kept}",
            kept = out(reg) _,
            inlateout("rax") number => result,
            in("rdi") 0,
            in("rsi") 0,
            in("rdx") 0,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        asm!(
            "mov {kept}, sp",
            "mov {none}, #16",
            "mov sp, {none}",
            "svc #0",
            "mov sp, {kept}",
            kept = out(reg) _,
            none = out(reg) _,
            in("x8") number,
            inlateout("x0") 0_usize => result,
            in("x1") 0,
            in("x2") 0,
        );
    }
    gained(result)
}

/// Returns from a signal that never came, to this code, with these signals blocked.
#[cfg(target_arch = "x86_64")]
pub(crate) fn forged_sigreturn(code: usize, blocked: u64) -> Gain {
    let mut frame = [0_u64; 128];
    // The layout of `struct ucontext` and `struct sigcontext` of the kernel's ABI: rsp at 160
    // bytes, rip at 168, cs to ss at 184, the mask at 296.
    // As a function finds its stack: the return address was pushed below a boundary of 16.
    let stack = (frame.as_ptr().addr() as u64 & !15).wrapping_sub(8);
    frame[20] = stack;
    frame[21] = code as u64;
    frame[23] = 0x002b_0000_0000_0033;
    frame[37] = blocked;
    // SAFETY: not safe at all: the kernel loads every register from the frame.
    unsafe {
        asm!(
            "mov rsp, {frame}",
            "mov eax, 15",
            "syscall",
            "ud2",
            frame = in(reg) frame.as_ptr(),
            options(noreturn),
        );
    }
}

/// A call without arguments through the entry for 32-bit programs.
#[cfg(target_arch = "x86_64")]
pub(crate) fn int80(number: i64) -> Gain {
    let result: i64;
    // SAFETY: the call takes no address; that entry clears the registers named here.
    unsafe {
        asm!(
            "int 0x80",
            inlateout("rax") number => result,
            lateout("r8") _,
            lateout("r9") _,
            lateout("r10") _,
            lateout("r11") _,
        );
    }
    gained(isize::try_from(result).unwrap_or_default())
}

/// Reads the processor's clock.
#[cfg(target_arch = "x86_64")]
pub(crate) fn rdtsc() -> Gain {
    // SAFETY: not privileged, and touches no memory.
    let time = unsafe { std::arch::x86_64::_rdtsc() };
    Ok(usize::try_from(time).unwrap_or(usize::MAX))
}

/// The fixed page that old programs asked for the time.
#[cfg(target_arch = "x86_64")]
pub(crate) fn vsyscall_time() -> Gain {
    let place = std::ptr::with_exposed_provenance::<()>(0xffff_ffff_ff60_0400);
    // SAFETY: not safe at all; where that page is missing, the process dies.
    let time = unsafe { std::mem::transmute::<*const (), extern "C" fn(*mut i64) -> usize>(place) };
    Ok(time(std::ptr::null_mut()))
}

/// Runs what is no instruction.
pub(crate) fn illegal() -> usize {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the process dies here.
    unsafe {
        asm!("ud2");
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the process dies here.
    unsafe {
        asm!("udf #0");
    }
    0
}

#[cfg(target_arch = "x86_64")]
global_asm!(
    ".globl red_team_code",
    ".p2align 12",
    "red_team_code:",
    "mov eax, 42",
    "ret",
    ".p2align 12"
);
#[cfg(target_arch = "aarch64")]
global_asm!(
    ".globl red_team_code",
    ".p2align 12",
    "red_team_code:",
    "mov w0, #42",
    "ret",
    ".p2align 12"
);

unsafe extern "C" {
    #[link_name = "red_team_code"]
    fn red_team_code();
}

/// The address of a page of this program's code that nothing else needs.
pub(crate) fn spare_code() -> usize {
    (red_team_code as unsafe extern "C" fn() as *const ()).expose_provenance()
}

/// That page, as a range.
pub(crate) fn spare_code_page() -> std::ops::Range<*const u8> {
    let start = std::ptr::with_exposed_provenance::<u8>(spare_code());
    start..start.wrapping_add(4096)
}
