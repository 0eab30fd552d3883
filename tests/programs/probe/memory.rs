//! Memory: more of it than there may be, memory that others share, and what can be measured.
#![forbid(unsafe_code)]

use conclave_ipc::layers::Layer;
use libc::{
    MAP_ANONYMOUS, MAP_FIXED, MAP_GROWSDOWN, MAP_HUGETLB, MAP_LOCKED, MAP_NORESERVE, MAP_POPULATE,
    MAP_PRIVATE, MAP_SHARED, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_NONE, PROT_READ, PROT_WRITE,
};
use nix::errno::Errno;

use super::code::own_code;
use super::kernel::{Gain, call, poke, shellcode};
use super::{
    Attempt, CONTROL_GROUP, End, First, NO_DESCRIPTOR, alone, capabilities, filtered, kernel,
    layered, limits, needed, pid_namespace, refused,
};

/// The smallest page of every supported processor.
pub(super) const PAGE: usize = 4096;
const OWN_MEMORY: &str = "changes nothing but the process's own data, which native code may write";
/// What native code runs into when it wants more memory.
const LIMIT: (Layer, End) = (Layer::ResourceLimits, &["ENOMEM"]);
pub(super) const RW: i32 = PROT_READ | PROT_WRITE;
pub(super) const ANONYMOUS: i32 = MAP_PRIVATE | MAP_ANONYMOUS;

pub(super) fn map(address: usize, length: usize, protection: i32, flags: i32) -> Gain {
    call!(libc::SYS_mmap, address, length, protection, flags, -1, 0)
}

/// A page that is readable and writable, and holds the attacker's code.
pub(super) fn fresh_page() -> Gain {
    let page = map(0, PAGE, RW, ANONYMOUS)?;
    poke(page, shellcode());
    Ok(page)
}

/// Addresses, and no memory as long as they are not touched.
fn reserve(length: usize, protection: i32, flags: i32) -> Gain {
    map(0, length, protection, flags | MAP_NORESERVE)
}

/// Has memory mapped in large pieces, touching none of it, until it is refused; succeeds with
/// more than any role may have addresses.
fn hoard(piece: impl Fn(usize) -> Gain) -> Gain {
    const PIECE: usize = 64 << 20;
    for _ in 0..320 {
        piece(PIECE)?;
    }
    Ok(0)
}

/// [`hoard`] of writable memory.
fn grow(flags: i32) -> Gain {
    hoard(|length| reserve(length, RW, flags))
}

/// A page with this program's code, which is every worker's.
fn code_page() -> usize {
    own_code() & !(PAGE - 1)
}

pub(super) const ATTEMPTS: &[Attempt] = &[
    filtered(
        "memory/remap-over-code",
        "moves data over code",
        "mremap",
        alone("the data stays data: it can't be executed there either"),
        || {
            let (data, place) = (fresh_page()?, map(0, PAGE, PROT_NONE, ANONYMOUS)?);
            call!(libc::SYS_mremap, data, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place)
        },
    ),
    filtered(
        "memory/remap-keep",
        "moves memory and keeps the old place",
        "mremap",
        alone(OWN_MEMORY),
        || {
            let data = fresh_page()?;
            call!(libc::SYS_mremap, data, PAGE, PAGE, MREMAP_MAYMOVE | 4, 0)
        },
    ),
    needed("memory/map-over-data", "maps over its own data", || {
        let page = fresh_page()?;
        map(page, PAGE, RW, ANONYMOUS | MAP_FIXED)
    }),
    needed("memory/give-back", "gives its own pages back", || {
        call!(libc::SYS_madvise, fresh_page()?, PAGE, 4)
    }),
    filtered(
        "memory/shared",
        "maps memory to share",
        "mmap",
        alone("with no second process there is nobody to share it with"),
        || map(0, PAGE, RW, MAP_SHARED | MAP_ANONYMOUS),
    ),
    filtered(
        "memory/shared-bomb",
        "maps shared memory, which its limit does not count",
        "mmap",
        limits(&["ENOMEM"]),
        || grow(MAP_SHARED | MAP_ANONYMOUS),
    ),
    filtered(
        "memory/stack-bomb",
        "maps memory that grows down, which its limit does not count",
        "mmap",
        limits(&["ENOMEM"]),
        || grow(ANONYMOUS | MAP_GROWSDOWN),
    ),
    layered("memory/bomb", "maps memory beyond its limit", LIMIT, CONTROL_GROUP, || {
        grow(ANONYMOUS)
    }),
    layered(
        "memory/image-bomb",
        "maps its image for writing beyond its limit",
        LIMIT,
        CONTROL_GROUP,
        || hoard(|length| call!(libc::SYS_mmap, 0, length, RW, MAP_PRIVATE | MAP_NORESERVE, 4, 0)),
    ),
    layered(
        "memory/protect-bomb",
        "maps nothing and makes it writable, where the limit is not looked \
        at",
        LIMIT,
        CONTROL_GROUP,
        || {
            hoard(|length| {
                let area = reserve(length, PROT_NONE, ANONYMOUS)?;
                call!(libc::SYS_mprotect, area, length, RW)
            })
        },
    ),
    layered(
        "memory/hidden-bomb",
        "makes writable memory inaccessible, so that it no longer counts",
        LIMIT,
        CONTROL_GROUP,
        || {
            hoard(|length| {
                let area = reserve(length, RW, ANONYMOUS)?;
                call!(libc::SYS_mprotect, area, length, PROT_NONE)
            })
        },
    ),
    layered(
        "memory/heap-bomb",
        "moves the end of its heap beyond its limit",
        LIMIT,
        CONTROL_GROUP,
        || {
            let end = call!(libc::SYS_brk, 0)?;
            let moved = call!(libc::SYS_brk, end.saturating_add(6 << 30))?;
            if moved > end { Ok(moved) } else { Err(Errno::ENOMEM) }
        },
    ),
    layered(
        "memory/remap-bomb",
        "makes a mapping larger beyond its limit",
        LIMIT,
        CONTROL_GROUP,
        || call!(libc::SYS_mremap, fresh_page()?, PAGE, 6_usize << 30, MREMAP_MAYMOVE),
    ),
    layered(
        "memory/address-space",
        "reserves addresses, whose page tables no limit counts",
        LIMIT,
        CONTROL_GROUP,
        || reserve(1 << 40, PROT_READ, ANONYMOUS),
    ),
    refused(
        "memory/page-zero",
        "maps the page that null pointers point to",
        First::Kernel(&["EPERM", "ENOMEM"]),
        || map(0, PAGE, RW, ANONYMOUS | MAP_FIXED),
    ),
    refused(
        "memory/kernel-half",
        "maps in the kernel's half",
        First::Kernel(&["ENOMEM", "EINVAL"]),
        || map(usize::MAX - (1 << 30) + 1, PAGE, RW, ANONYMOUS | MAP_FIXED),
    ),
    refused("memory/map-channel", "maps its channel", First::Kernel(&["ENODEV", "EACCES"]), || {
        call!(libc::SYS_mmap, 0, PAGE, PROT_READ, MAP_PRIVATE, 3, 0)
    }),
    needed("memory/map-state", "maps its guest's state, for itself alone", || {
        call!(libc::SYS_mmap, 0, PAGE, PROT_READ, MAP_PRIVATE, 5, 0)
    }),
    filtered(
        "memory/map-state-shared",
        "maps the state that others go on from, to change it",
        "mmap",
        alone("changes its own file; one that others have is sealed by the supervisor"),
        || call!(libc::SYS_mmap, 0, PAGE, RW, MAP_SHARED, 5, 0),
    ),
    filtered(
        "memory/locked",
        "maps memory that is never given back",
        "mmap",
        limits(&["EAGAIN", "EPERM"]),
        || map(0, PAGE, RW, ANONYMOUS | MAP_LOCKED),
    ),
    filtered(
        "memory/huge-pages",
        "takes pages from the host's reserve",
        "mmap",
        kernel(&["ENOMEM"]),
        || map(0, 2 << 20, RW, ANONYMOUS | MAP_HUGETLB | MAP_POPULATE),
    ),
    filtered(
        "memory/mlock",
        "has its memory never given back",
        "mlockall",
        limits(&["EPERM", "ENOMEM"]),
        || call!(libc::SYS_mlockall, 1),
    ),
    filtered(
        "memory/mlock-page",
        "has one page never given back",
        "mlock2",
        limits(&["EPERM", "ENOMEM"]),
        || call!(libc::SYS_mlock2, own_code(), 1, 0),
    ),
    filtered(
        "memory/merge",
        "has its pages merged with those of others, and measures",
        "madvise",
        alone("merges its own pages; needs a host that merges, and time"),
        || call!(libc::SYS_madvise, fresh_page()?, PAGE, 12),
    ),
    filtered(
        "memory/poison",
        "has the machine take a page for broken",
        "madvise",
        capabilities(&["EPERM", "EINVAL"]),
        || call!(libc::SYS_madvise, fresh_page()?, PAGE, 100),
    ),
    filtered(
        "memory/soft-offline",
        "has the machine retire a page",
        "madvise",
        capabilities(&["EPERM", "EINVAL"]),
        || call!(libc::SYS_madvise, fresh_page()?, PAGE, 101),
    ),
    filtered("memory/guard", "puts guards into its memory", "madvise", alone(OWN_MEMORY), || {
        call!(libc::SYS_madvise, fresh_page()?, PAGE, 102)
    }),
    filtered(
        "memory/remove",
        "makes holes in its image",
        "madvise",
        kernel(&["EACCES", "EINVAL", "EPERM"]),
        || {
            let page = call!(libc::SYS_mmap, 0, PAGE, PROT_READ, MAP_PRIVATE, 4, 0)?;
            call!(libc::SYS_madvise, page, PAGE, 9)
        },
    ),
    filtered(
        "memory/page-out",
        "has shared code written out, and measures who loads it",
        "madvise",
        alone("pages of files that a process may not write are left alone"),
        || call!(libc::SYS_madvise, code_page(), PAGE, 21),
    ),
    filtered(
        "memory/cold",
        "has shared code forgotten, and measures who loads it",
        "madvise",
        alone("makes its own pages be reclaimed sooner"),
        || call!(libc::SYS_madvise, code_page(), PAGE, 20),
    ),
    filtered(
        "memory/advise-dump",
        "has its memory left out of dumps",
        "madvise",
        alone(OWN_MEMORY),
        || call!(libc::SYS_madvise, fresh_page()?, PAGE, 16),
    ),
    filtered(
        "memory/incore",
        "asks which pages of shared code are in memory",
        "mincore",
        alone("the kernel answers for files only to who could write them"),
        || call!(libc::SYS_mincore, code_page(), PAGE, [0_u8; 1].as_mut_ptr()),
    ),
    filtered("memory/msync", "has mappings written out", "msync", alone(OWN_MEMORY), || {
        call!(libc::SYS_msync, fresh_page()?, PAGE, 1)
    }),
    filtered(
        "memory/policy",
        "says on which node its memory is to be",
        "mbind",
        alone("moves its own memory between nodes of the machine"),
        || call!(libc::SYS_mbind, fresh_page()?, PAGE, 0, 0, 0, 0),
    ),
    filtered(
        "memory/move-pages",
        "asks where the pages of another worker are",
        "move_pages",
        pid_namespace(&["ESRCH", "ENOSYS"]),
        || call!(libc::SYS_move_pages, super::processes::supervisor(), 0, 0, 0, 0, 0),
    ),
    filtered(
        "memory/seal",
        "seals memory against its own supervisor",
        "mseal",
        alone(OWN_MEMORY),
        || call!(462_i64, fresh_page()?, PAGE, 0),
    ),
    filtered(
        "memory/protection-key",
        "makes a key for memory",
        "pkey_alloc",
        alone(OWN_MEMORY),
        || call!(libc::SYS_pkey_alloc, 0, 0).or(Ok(0)),
    ),
    filtered(
        "memory/fault-descriptor",
        "handles its own page faults, to stop the kernel half-way",
        "userfaultfd",
        NO_DESCRIPTOR,
        || call!(libc::SYS_userfaultfd, 1),
    ),
    filtered(
        "memory/shm",
        "makes memory that outlives it",
        "shmget",
        alone("System V memory is in the worker's own namespace and ends with it"),
        || call!(libc::SYS_shmget, 7, PAGE, 0o1600),
    ),
    filtered(
        "memory/semaphores",
        "makes semaphores that outlive it",
        "semget",
        alone("System V semaphores are in the worker's own namespace and end with it"),
        || call!(libc::SYS_semget, 7, 1, 0o1600),
    ),
    filtered(
        "memory/message-queue",
        "makes a queue that outlives it",
        "msgget",
        alone("System V queues are in the worker's own namespace and end with it"),
        || call!(libc::SYS_msgget, 7, 0o1600),
    ),
    filtered("memory/posix-queue", "makes a queue with a name", "mq_open", NO_DESCRIPTOR, || {
        call!(libc::SYS_mq_open, c"conclave", libc::O_CREAT | libc::O_RDWR, 0o600, 0)
    }),
];
