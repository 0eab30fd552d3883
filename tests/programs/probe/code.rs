//! Code: having the attacker's own executed, by every route, and changing the code that is there.
#![forbid(unsafe_code)]

use conclave_ipc::layers::Layer;
use libc::{
    MAP_ANONYMOUS, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_EXEC,
    PROT_NONE, PROT_READ, PROT_WRITE,
};

use super::kernel::{Gain, call, execute, peek, poke, shellcode, spare_code};
use super::memory::{ANONYMOUS, PAGE, RW, fresh_page, map};
use super::{
    Attempt, End, First, NO_DESCRIPTOR, Next, alone, filtered, kernel, layered, needed, refused,
    write_execute,
};

const RX: i32 = PROT_READ | PROT_EXEC;
const RWX: i32 = RW | PROT_EXEC;

const SEALED: (Layer, End) = (Layer::CodeSealed, &["EPERM"]);
/// Nothing becomes executable again.
const PROTECTED: Next = Next::Layer(Layer::SyscallFilter, &["forbidden mprotect"]);

fn protect(address: usize, protection: i32) -> Gain {
    call!(libc::SYS_mprotect, address, PAGE, protection)
}

/// An address within this program's code.
pub(super) fn own_code() -> usize {
    (fresh_page as fn() -> Gain as *const ()).expose_provenance()
}

pub(super) const ATTEMPTS: &[Attempt] = &[
    filtered(
        "code/map-rwx",
        "maps memory that is writable and executable",
        "mmap",
        write_execute(&["EACCES"]),
        || {
            let page = map(0, PAGE, RWX, ANONYMOUS)?;
            poke(page, shellcode());
            execute(page)
        },
    ),
    filtered(
        "code/map-rx",
        "maps executable memory that never was writable",
        "mmap",
        alone("an empty page, which nothing can be written to"),
        || map(0, PAGE, RX, ANONYMOUS),
    ),
    filtered(
        "code/map-x-shared",
        "maps executable memory that is shared",
        "mmap",
        write_execute(&["EACCES"]),
        || {
            let page = map(0, PAGE, RWX, MAP_SHARED | MAP_ANONYMOUS)?;
            poke(page, shellcode());
            execute(page)
        },
    ),
    filtered(
        "code/map-wx",
        "maps memory that is writable and executable, not readable",
        "mmap",
        write_execute(&["EACCES"]),
        || {
            let page = map(0, PAGE, PROT_WRITE | PROT_EXEC, ANONYMOUS)?;
            poke(page, shellcode());
            execute(page)
        },
    ),
    filtered(
        "code/map-image-x",
        "maps its image executable once more, data and all",
        "mmap",
        alone(
            "bytes of the image, which only the compiler wrote; none of the attacker's choice at run \
            time",
        ),
        || call!(libc::SYS_mmap, 0, PAGE, RX, MAP_PRIVATE, 4, 0),
    ),
    filtered(
        "code/map-image-rwx",
        "maps its image writable and executable",
        "mmap",
        write_execute(&["EACCES"]),
        || {
            let page = call!(libc::SYS_mmap, 0, PAGE, RWX, MAP_PRIVATE, 4, 0)?;
            poke(page, shellcode());
            execute(page)
        },
    ),
    filtered(
        "code/map-image-shared",
        "maps its image so that writing changes the file",
        "mmap",
        kernel(&["EPERM"]),
        || call!(libc::SYS_mmap, 0, PAGE, RW, MAP_SHARED, 4, 0),
    ),
    filtered(
        "code/protect-rx",
        "makes written memory executable",
        "mprotect",
        write_execute(&["EACCES"]),
        || {
            let page = fresh_page()?;
            protect(page, RX)?;
            execute(page)
        },
    ),
    filtered(
        "code/protect-rwx",
        "makes written memory executable and keeps writing",
        "mprotect",
        write_execute(&["EACCES"]),
        || {
            let page = fresh_page()?;
            protect(page, RWX)?;
            execute(page)
        },
    ),
    filtered(
        "code/protect-image-rx",
        "writes a private copy of its image and runs it",
        "mprotect",
        write_execute(&["EACCES"]),
        || {
            let page = call!(libc::SYS_mmap, 0, PAGE, RW, MAP_PRIVATE, 4, 0)?;
            poke(page, shellcode());
            protect(page, RX)?;
            execute(page)
        },
    ),
    filtered(
        "code/pkey-protect",
        "makes written memory executable by the newer call",
        "pkey_mprotect",
        write_execute(&["EACCES"]),
        || {
            let page = fresh_page()?;
            call!(libc::SYS_pkey_mprotect, page, PAGE, RX, -1)?;
            execute(page)
        },
    ),
    filtered(
        "code/memfd-rx",
        "writes code to a memory file and maps it",
        "memfd_create",
        NO_DESCRIPTOR,
        || {
            let file = call!(libc::SYS_memfd_create, c"a", 0)?;
            call!(libc::SYS_write, file, shellcode().as_ptr(), shellcode().len())?;
            let page = call!(libc::SYS_mmap, 0, PAGE, RX, MAP_PRIVATE, file, 0)?;
            execute(page)
        },
    ),
    filtered(
        "code/shm-exec",
        "attaches shared memory as executable",
        "shmget",
        write_execute(&["EACCES"]),
        || {
            let segment = call!(libc::SYS_shmget, 0, PAGE, 0o1700)?;
            let page = call!(libc::SYS_shmat, segment, 0, 0o10_0000)?;
            poke(page, shellcode());
            execute(page)
        },
    ),
    filtered(
        "code/shm-twice",
        "attaches shared memory writable and executable, at two places",
        "shmget",
        alone("the layer against writable code looks at one mapping at a time"),
        || {
            let segment = call!(libc::SYS_shmget, 0, PAGE, 0o1700)?;
            let page = call!(libc::SYS_shmat, segment, 0, 0)?;
            poke(page, shellcode());
            execute(call!(libc::SYS_shmat, segment, 0, 0o11_0000)?)
        },
    ),
    filtered(
        "code/personality",
        "has all readable memory be executable",
        "personality",
        write_execute(&["EACCES"]),
        || {
            call!(libc::SYS_personality, 0x0040_0000)?;
            execute(fresh_page()?)
        },
    ),
    filtered(
        "code/remap-file-pages",
        "rearranges a mapping of a file",
        "remap_file_pages",
        kernel(&["EINVAL"]),
        || {
            let page = fresh_page()?;
            call!(libc::SYS_remap_file_pages, page, PAGE, 0, 0, 0)
        },
    ),
    filtered(
        "code/write-own-code",
        "writes its own code by process_vm_writev",
        "process_vm_writev",
        kernel(&["EFAULT"]),
        || {
            let here = [shellcode().as_ptr().addr(), 1];
            let there = [own_code(), 1];
            let own = super::processes::own();
            call!(libc::SYS_process_vm_writev, own, here.as_ptr(), 1, there.as_ptr(), 1, 0)
        },
    ),
    refused("code/run-data", "jumps to what it has written", First::Kernel(&["SIGSEGV"]), || {
        execute(fresh_page()?)
    }),
    refused("code/run-stack", "jumps to its stack", First::Kernel(&["SIGSEGV"]), || {
        let code = [0xc3_u8; 16];
        execute(code.as_ptr().expose_provenance())
    }),
    refused("code/poke-code", "writes over its own code", First::Kernel(&["SIGSEGV"]), || {
        poke(own_code(), shellcode());
        Ok(0)
    }),
    refused("code/poke-kernel", "writes into the kernel", First::Kernel(&["SIGSEGV"]), || {
        poke(usize::MAX - (1 << 30), shellcode());
        Ok(0)
    }),
    refused("code/peek-kernel", "reads the kernel", First::Kernel(&["SIGSEGV"]), || {
        Ok(usize::from(peek(usize::MAX - (1 << 30))))
    }),
    layered(
        "code/rewrite-code",
        "makes code writable, changes it, and makes it executable again",
        SEALED,
        PROTECTED,
        || {
            let page = spare_code();
            protect(page, RW)?;
            poke(page, shellcode());
            protect(page, RX)?;
            execute(page)
        },
    ),
    layered("code/replace-code", "maps its image over code", SEALED, PROTECTED, || {
        let page = spare_code();
        call!(libc::SYS_mmap, page, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, 4, 0)?;
        protect(page, RX)?;
        execute(page)
    }),
    layered(
        "code/unmap-code",
        "unmaps code",
        SEALED,
        alone("loses its own code, and can have no other in that place"),
        || call!(libc::SYS_munmap, spare_code(), PAGE),
    ),
    needed(
        "code/discard-code",
        "gives pages of its code back, which come again from the file",
        || call!(libc::SYS_madvise, spare_code(), PAGE, 4),
    ),
    filtered(
        "code/move-code",
        "moves code to where it is not sealed",
        "mremap",
        Next::Layer(Layer::CodeSealed, &["EPERM"]),
        || {
            let place = map(0, PAGE, PROT_NONE, ANONYMOUS)?;
            call!(libc::SYS_mremap, spare_code(), PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place)
        },
    ),
];
