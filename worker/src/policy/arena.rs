//! The linear memory of the one instance that a worker has, and how it is set back.
//!
//! While a guest is started its memory is a shared mapping of a memory file, so that the file
//! holds what it has written. [`Arena::keep`] turns that into a private mapping of the same
//! file that can only be read. The first write to a page raises a signal; the page is noted
//! and made writable. [`Arena::restore`] copies the noted pages back from the file and returns
//! all memory that the guest has gained since to the kernel. Pages stay noted: a guest
//! touches much the same ones in every run, and then raises no signal and no fault.
//!
//! That is exact without asking the kernel for a map of pages: the descriptor for that would
//! have to be opened after a fork, when nothing can be opened any more.
#![expect(unsafe_code, reason = "maps, protects and copies memory that a guest runs on")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};

use conclave_ipc::limits::GUEST_MEMORY_BYTES_CEILING;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, mprotect};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use wasmtime::{LinearMemory, MemoryCreator, MemoryType};

/// Address space that compiled code may reach without a check: all that 32 bits can name.
pub(super) const RESERVED_BYTES: u64 = GUEST_MEMORY_BYTES_CEILING;

/// And what an instruction can add to an address by itself; wasmtime's own default.
pub(super) const GUARD_BYTES: u64 = 32 << 20;

/// WebAssembly's unit of memory (core specification, 4.2.8).
pub(super) const WASM_PAGE_BYTES: usize = 64 << 10;

/// Noted pages that are copied back, in bytes; beyond that they are dropped, and noted anew.
const NOTED_BYTES_MAX: usize = 8 << 20;

/// The one memory of this process, for the signal handler.
static ARENA: OnceLock<&'static Arena> = OnceLock::new();

/// What handled the signal before.
static ENGINES_HANDLER: OnceLock<SigAction> = OnceLock::new();

/// Room for one linear memory.
#[derive(Debug)]
pub(crate) struct Arena {
    /// Where it begins.
    base: NonNull<c_void>,
    /// The kernel's unit of memory, in bytes.
    page_bytes: usize,
    /// What the guest may use of it, in bytes.
    bytes_max: AtomicUsize,
    /// What the guest has of it, in bytes.
    bytes: AtomicUsize,
    /// Whether an instance has it.
    lent: AtomicBool,
    /// What holds the memory of a guest that is to be set back.
    file: OnceLock<File>,
    kept: OnceLock<Kept>,
}

// SAFETY: nothing but the pointer keeps this from being shared, and what it points to is only
// read and written while nobody else has a reference into it, which the methods ask for.
unsafe impl Send for Arena {}
// SAFETY: as above; all that changes is atomic or set once.
unsafe impl Sync for Arena {}

/// What a memory is set back to.
#[derive(Debug)]
struct Kept {
    /// A second, unchanging view of the file.
    pristine: NonNull<c_void>,
    /// Length of both, in bytes.
    bytes: usize,
    /// The kernel's unit of memory, in bytes.
    page_bytes: usize,
    /// The pages that have been written to, one bit each.
    noted: Box<[AtomicU64]>,
}

impl Arena {
    /// Reserves the address space, once.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn reserve() -> io::Result<&'static Self> {
        let length = usize::try_from(RESERVED_BYTES + GUARD_BYTES).map_err(io::Error::other)?;
        let length = NonZeroUsize::new(length).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping, at a place of the kernel's choice.
        let base = unsafe {
            mmap_anonymous(
                None,
                length,
                ProtFlags::PROT_NONE,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
            )
        }?;
        let arena = &*Box::leak(Box::new(Self {
            base,
            // Not later: the first question is a system call.
            page_bytes: rustix::param::page_size(),
            bytes_max: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            lent: AtomicBool::new(false),
            file: OnceLock::new(),
            kept: OnceLock::new(),
        }));
        once(ARENA.set(arena), "reserved")?;
        Ok(arena)
    }

    /// Gives the guest up to `bytes_max` of it: of this file, which is as long, if it is to be
    /// set back to a state of its own.
    ///
    /// # Errors
    /// It was done before, or the kernel refuses.
    pub(super) fn back(&self, file: Option<File>, bytes_max: usize) -> io::Result<()> {
        self.bytes_max.store(bytes_max, Relaxed);
        let (Some(file), Some(length)) = (file, NonZeroUsize::new(bytes_max)) else {
            return Ok(());
        };
        self.map(0, length, ProtFlags::PROT_NONE, MapFlags::MAP_SHARED, &file)?;
        once(self.file.set(file), "backed")
    }

    /// Maps a part of the file in the place that it has.
    fn map(
        &self,
        from: usize,
        length: NonZeroUsize,
        protection: ProtFlags,
        sharing: MapFlags,
        file: &File,
    ) -> io::Result<()> {
        let place = NonZeroUsize::new(self.base.addr().get().saturating_add(from));
        let offset = i64::try_from(from).map_err(io::Error::other)?;
        // SAFETY: the range lies in what was reserved: callers go no further than `bytes_max`,
        // which is at most as much. The guest has no memory there yet, or is stopped and finds
        // the same bytes as before.
        unsafe { mmap(place, length, protection, sharing | MapFlags::MAP_FIXED, file, offset) }?;
        Ok(())
    }

    fn at(&self, offset: usize) -> NonNull<c_void> {
        // SAFETY: callers go no further than `bytes_max`, which lies within the reservation.
        unsafe { self.base.byte_add(offset) }
    }

    fn protect(&self, from: usize, to: usize, protection: ProtFlags) -> io::Result<()> {
        if from >= to {
            return Ok(());
        }
        // SAFETY: only memory of the guest's loses or gains access, and it is either stopped or
        // waits for this very change; the host holds no reference into it meanwhile.
        Ok(unsafe { mprotect(self.at(from), to.saturating_sub(from), protection) }?)
    }

    /// Gives pages back; what is read there next is the file's, or zero.
    fn discard(&self, from: usize, to: usize) -> io::Result<()> {
        if from >= to {
            return Ok(());
        }
        let length = to.saturating_sub(from);
        // SAFETY: as for `protect`: the guest is stopped, and the host holds no reference.
        Ok(unsafe { madvise(self.at(from), length, MmapAdvise::MADV_DONTNEED) }?)
    }

    /// Whether the guest has more memory than what is kept.
    pub(super) fn has_grown(&self) -> bool {
        self.kept.get().is_some_and(|kept| self.bytes.load(Relaxed) > kept.bytes)
    }

    /// What the guest has, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// Makes what the guest has now what it is set back to. The guest is stopped, and nobody
    /// holds a reference into its memory.
    ///
    /// # Errors
    /// It was done before, there is no file or no memory, or the kernel refuses.
    pub(super) fn keep(&self) -> io::Result<()> {
        let (bytes, bytes_max) = (self.bytes.load(Relaxed), self.bytes_max.load(Relaxed));
        let (Some(file), Some(length)) = (self.file.get(), NonZeroUsize::new(bytes)) else {
            return Err(io::Error::other("there is no memory that could be kept"));
        };
        let read = ProtFlags::PROT_READ;
        // SAFETY: a new mapping, at a place of the kernel's choice.
        let pristine = unsafe { mmap(None, length, read, MapFlags::MAP_PRIVATE, file, 0) }?;
        self.map(0, length, read, MapFlags::MAP_PRIVATE, file)?;
        if let Some(rest) = NonZeroUsize::new(bytes_max.saturating_sub(bytes)) {
            self.map(bytes, rest, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE, file)?;
        }
        let page_bytes = self.page_bytes;
        let words = bytes.div_ceil(page_bytes).div_ceil(64);
        let noted = (0..words).map(|_| AtomicU64::new(0)).collect();
        once(self.kept.set(Kept { pristine, bytes, page_bytes, noted }), "kept")
    }

    /// Sets the memory back to what was kept. The guest is stopped, and nobody holds a
    /// reference into its memory. What the instance believes to have is for the caller to
    /// correct, by [`Arena::forget_growth`].
    ///
    /// # Errors
    /// The kernel refuses; the memory is of no more use.
    pub(super) fn restore(&self) -> io::Result<()> {
        let Some(kept) = self.kept.get() else { return Ok(()) };
        let bytes = self.bytes.load(Relaxed);
        if bytes > kept.bytes {
            self.discard(kept.bytes, bytes)?;
            self.protect(kept.bytes, bytes, ProtFlags::PROT_NONE)?;
        }
        if kept.count().saturating_mul(kept.page_bytes) > NOTED_BYTES_MAX {
            self.discard(0, kept.bytes)?;
            self.protect(0, kept.bytes, ProtFlags::PROT_READ)?;
            kept.noted.iter().for_each(|word| word.store(0, Relaxed));
            return Ok(());
        }
        for (page, pages) in kept.runs() {
            let (from, length) = (page * kept.page_bytes, pages * kept.page_bytes);
            // SAFETY: noted pages lie within what is kept, in both mappings.
            let pristine = unsafe { kept.pristine.byte_add(from) }.cast::<u8>();
            let place = self.at(from).cast::<u8>();
            // SAFETY: as above; they are writable in the guest's mapping, which is not the
            // other one, and nobody holds a reference into it.
            unsafe { pristine.copy_to_nonoverlapping(place, length) };
        }
        Ok(())
    }

    /// Has the next growth by one page of WebAssembly's, which the caller makes at once, end
    /// at what is kept. The engine's idea of the size can be changed in no other way.
    pub(super) fn forget_growth(&self) {
        if let Some(kept) = self.kept.get() {
            self.bytes.store(kept.bytes.saturating_sub(WASM_PAGE_BYTES), Relaxed);
        }
    }

    /// Notes the page at this address if it is kept and not noted yet: then the access was a
    /// write, and can be made once more. Runs in a signal handler.
    fn note(&self, address: usize) -> bool {
        let Some(kept) = self.kept.get() else { return false };
        let Some(offset) = address.checked_sub(self.base.addr().get()) else { return false };
        if offset >= kept.bytes {
            return false;
        }
        let page = offset / kept.page_bytes;
        let Some(word) = kept.noted.get(page / 64) else { return false };
        let bit = 1 << (page % 64);
        if word.fetch_or(bit, Relaxed) & bit != 0 {
            return false;
        }
        let from = page * kept.page_bytes;
        let writable = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // Each change of access may split a mapping, and their number is bounded.
        self.protect(from, from.saturating_add(kept.page_bytes), writable).is_ok()
    }

    fn grow_to(&self, bytes: usize) -> io::Result<()> {
        if bytes > self.bytes_max.load(Relaxed) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let accessible = match self.kept.get() {
            Some(kept) => self.bytes.load(Relaxed).max(kept.bytes),
            None => self.bytes.load(Relaxed),
        };
        self.protect(accessible, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        self.bytes.store(bytes, Relaxed);
        Ok(())
    }
}

impl Kept {
    fn count(&self) -> usize {
        self.noted.iter().map(|word| word.load(Relaxed).count_ones() as usize).sum()
    }

    /// The runs of noted pages: the first one, and how many.
    fn runs(&self) -> impl Iterator<Item = (usize, usize)> {
        self.noted.iter().enumerate().flat_map(|(index, word)| {
            let mut bits = word.load(Relaxed);
            let mut at = index.saturating_mul(64);
            std::iter::from_fn(move || {
                if bits == 0 {
                    return None;
                }
                let skipped = bits.trailing_zeros();
                bits >>= skipped;
                let run = bits.trailing_ones();
                bits = bits.checked_shr(run).unwrap_or(0);
                let first = at.saturating_add(skipped as usize);
                at = first.saturating_add(run as usize);
                Some((first, run as usize))
            })
        })
    }
}

/// What is done once in the life of a worker, and failed if it was done before.
fn once<T>(set: Result<(), T>, what: &str) -> io::Result<()> {
    set.map_err(|_again| io::Error::other(format!("linear memory is {what} once")))
}

/// Lends the arena to one instance at a time.
#[derive(Debug)]
pub(super) struct Lender(pub(super) &'static Arena);

// SAFETY: what is lent is the arena's reserved range: as long as the engine asks for, its
// guard included, and inaccessible beyond the size that is reported. Nobody changes it
// but through the arena, whose methods ask for a guest that is stopped.
unsafe impl MemoryCreator for Lender {
    fn new_memory(
        &self,
        _: MemoryType,
        minimum: usize,
        _: Option<usize>,
        reserved: Option<usize>,
        guard: usize,
    ) -> Result<Box<dyn LinearMemory>, String> {
        let asked = (reserved.unwrap_or_default() as u64).max(minimum as u64);
        if asked > RESERVED_BYTES || guard as u64 > GUARD_BYTES {
            return Err("the engine asks for more address space than is reserved".to_owned());
        }
        if self.0.lent.swap(true, Relaxed) {
            return Err("references to host objects are not available".to_owned());
        }
        let loan = Loan(self.0);
        self.0.grow_to(minimum).map_err(|error| format!("linear memory: {error}"))?;
        Ok(Box::new(loan))
    }
}

/// What an instance has of the arena. When it is dropped the next instance finds zeros.
#[derive(Debug)]
struct Loan(&'static Arena);

// SAFETY: see `Lender`: the base never moves, and the first `byte_size` bytes are accessible.
unsafe impl LinearMemory for Loan {
    fn byte_size(&self) -> usize {
        self.0.bytes.load(Relaxed)
    }

    fn byte_capacity(&self) -> usize {
        usize::try_from(RESERVED_BYTES).unwrap_or(usize::MAX)
    }

    fn grow_to(&mut self, bytes: usize) -> wasmtime::Result<()> {
        Ok(self.0.grow_to(bytes)?)
    }

    fn as_ptr(&self) -> *mut u8 {
        self.0.base.as_ptr().cast()
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let bytes = self.0.bytes.swap(0, Relaxed);
        // Memory of a file would keep what was written. It is never given to another instance:
        // who is set back is never dropped.
        let cleared = self.0.file.get().is_none()
            && self.0.discard(0, bytes).is_ok()
            && self.0.protect(0, bytes, ProtFlags::PROT_NONE).is_ok();
        self.0.lent.store(!cleared, Relaxed);
    }
}

/// Has first writes to kept memory noted. The engine must exist: the handler of the same
/// signal that it has installed for traps comes second.
///
/// # Errors
/// `sigaction` failed.
pub(crate) fn note_writes() -> io::Result<()> {
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_NODEFER | SaFlags::SA_ONSTACK;
    let action = SigAction::new(SigHandler::SigAction(on_fault), flags, SigSet::empty());
    // SAFETY: the handler takes no lock and allocates nothing: it reads and sets atomic values
    // and makes one system call, or hands over to the handler that was there before.
    let before = unsafe { sigaction(Signal::SIGSEGV, &action) }?;
    once(ENGINES_HANDLER.set(before), "watched")
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a valid `siginfo_t`.
    let info_given = unsafe { &*info };
    // SAFETY: for this signal it has an address.
    let address = unsafe { info_given.si_addr() }.addr();
    if ARENA.get().is_some_and(|arena| arena.note(address)) {
        return;
    }
    match ENGINES_HANDLER.get().map(SigAction::handler) {
        Some(SigHandler::SigAction(handler)) => handler(signal, info, context),
        // There is always one: the engine is made first.
        // SAFETY: ends the process and touches no memory.
        _ => unsafe { libc::_exit(libc::EXIT_FAILURE) },
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use wasmtime::{Engine, Instance, Module, Store};

    use super::*;

    const PAGES: usize = 256;

    /// One test, as there is one arena in a process.
    #[test]
    fn memory_is_set_back_in_every_byte_and_in_size() {
        let arena = Arena::reserve().unwrap();
        let engine: Engine = super::super::engine::new(Some(arena)).unwrap();
        note_writes().unwrap();
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        let bytes_max = PAGES * WASM_PAGE_BYTES;
        file.set_len(bytes_max as u64).unwrap();
        arena.back(Some(file), bytes_max).unwrap();

        let mut store = Store::new(&engine, ());
        let text = r#"(module (memory (export "memory") 2))"#;
        let module = Module::new(&engine, wat::parse_str(text).unwrap()).unwrap();
        let instance = Instance::new(&mut store, &module, &[]).unwrap();
        let memory = instance.get_memory(&mut store, "memory").unwrap();
        memory.grow(&mut store, 158).unwrap();
        let pattern = |index: usize| (index / 7).to_le_bytes()[0];
        for (index, byte) in memory.data_mut(&mut store).iter_mut().enumerate() {
            *byte = pattern(index);
        }
        arena.keep().unwrap();

        // First a few pages, then more than are copied back, then a few again.
        for step in [30_001, 4001, 70_001] {
            for (index, byte) in memory.data_mut(&mut store).iter_mut().enumerate().step_by(step) {
                *byte = !pattern(index);
            }
            let before = memory.grow(&mut store, 3).unwrap();
            assert_eq!(before, 160, "a size that was not set back");
            let grown = memory.data_mut(&mut store).get_mut(160 * WASM_PAGE_BYTES..).unwrap();
            assert!(grown.iter().all(|byte| *byte == 0), "what was gained is not zero");
            grown.fill(1);
            assert!(memory.grow(&mut store, PAGES as u64).is_err(), "more than there is");

            arena.restore().unwrap();
            assert!(arena.has_grown());
            arena.forget_growth();
            memory.grow(&mut store, 1).unwrap();
            assert_eq!(memory.data_size(&store), 160 * WASM_PAGE_BYTES);
            let data = memory.data(&store);
            let wrong = data.iter().enumerate().find(|(index, byte)| **byte != pattern(*index));
            assert_eq!(wrong, None, "after steps of {step}");
        }
    }

    #[test]
    fn runs_of_noted_pages_are_found_across_words() {
        let noted = [0b1001, 1 << 63, u64::MAX, 0, 0b110].map(AtomicU64::new);
        let pristine = NonNull::dangling();
        let kept = Kept { pristine, bytes: 0, page_bytes: 4096, noted: Box::new(noted) };
        let runs: Vec<_> = kept.runs().collect();
        assert_eq!(runs, [(0, 1), (3, 1), (127, 1), (128, 64), (257, 2)]);
        assert_eq!(kept.count(), 69);
    }
}
