//! Limits that the kernel holds for a single process, set as soft and hard limit alike.
#![forbid(unsafe_code)]

use std::io;

use conclave_ipc::Role;
use conclave_ipc::limits::{
    ADDRESS_BYTES, CODE_BYTES_MAX, COMPILE_MEMORY_BYTES, GUEST_MEMORY_BYTES_CEILING,
    SERVE_ADDRESS_BYTES, SERVE_OVERHEAD_BYTES, ZYGOTE_PROCESSES_MAX,
};
use nix::sys::resource::{Resource, setrlimit};

/// Descriptors a worker may have while it loads: the named ones and the engine's.
const DESCRIPTORS_WHILE_LOADING: u64 = 16;

/// Everything but the number of descriptors of a serving worker and its memory, which
/// are set when its code is loaded.
///
/// # Errors
/// `setrlimit` failed.
pub(super) fn limit(role: Role) -> io::Result<()> {
    let (file_bytes, data_bytes) = match role {
        Role::Compile => (CODE_BYTES_MAX, COMPILE_MEMORY_BYTES),
        // What the largest guest may have: it can only become less.
        Role::Serve | Role::Snapshot => (0, GUEST_MEMORY_BYTES_CEILING + SERVE_OVERHEAD_BYTES),
    };
    // It can only become less, so a role that may have to fork is held to less later.
    let processes = match role {
        Role::Compile | Role::Serve => 0,
        Role::Snapshot => ZYGOTE_PROCESSES_MAX.into(),
    };
    let limits = [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_FSIZE, file_bytes),
        (Resource::RLIMIT_NPROC, processes),
        (Resource::RLIMIT_MEMLOCK, 0),
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_LOCKS, 0),
        (Resource::RLIMIT_SIGPENDING, 0),
        (Resource::RLIMIT_NOFILE, DESCRIPTORS_WHILE_LOADING),
        (Resource::RLIMIT_DATA, data_bytes),
        (Resource::RLIMIT_AS, ADDRESS_BYTES),
    ];
    limits.into_iter().try_for_each(|(resource, value)| set(resource, value))
}

/// Bounds private writable memory, and address space. Neither would do alone: the engine
/// reserves gigabytes that it never touches, and memory that is filled and then protected, or
/// only ever read, no longer counts as writable but takes pages or page tables all the same.
///
/// # Errors
/// `setrlimit` failed.
pub(super) fn limit_data(bytes: u64) -> io::Result<()> {
    set(Resource::RLIMIT_DATA, bytes)?;
    set(Resource::RLIMIT_AS, SERVE_ADDRESS_BYTES.saturating_add(bytes))
}

/// Bounds processes. The kernel counts those of this user in this user namespace, the present
/// one included, and those of it that nobody has waited for.
///
/// # Errors
/// `setrlimit` failed.
pub(super) fn limit_processes(processes: u16) -> io::Result<()> {
    set(Resource::RLIMIT_NPROC, processes.into())
}

/// No process and no descriptor can be made any more; those that exist stay usable.
///
/// # Errors
/// `setrlimit` failed.
pub(super) fn forbid_more() -> io::Result<()> {
    set(Resource::RLIMIT_NPROC, 0)?;
    set(Resource::RLIMIT_NOFILE, 0)
}

fn set(resource: Resource, value: u64) -> io::Result<()> {
    Ok(setrlimit(resource, value, value)?)
}
