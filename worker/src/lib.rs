//! A worker: it hosts exactly one policy runtime and reaches nothing but its channel.
//!
//! [`main`] is a ladder going down. Each rung takes something away from the process, and
//! nothing foreign is read before the bottom. This is a library so that the tests can run
//! their own code inside the very confinement that ships.

mod allocator;
mod compile;
pub mod confine;
mod end;
mod policy;
mod serve;
mod session;
mod socket;
mod zygote;

use std::mem::ManuallyDrop;
use std::{env, panic};

use conclave_ipc::channel::{ChannelError, WorkerEnd};
use conclave_ipc::exit::WorkerExit;
use conclave_ipc::message::{FaultClass, Reply};
use conclave_ipc::{Role, limits};

use confine::{Arguments, Complete, Confined, Ladder};
use policy::arena::Arena;

pub use allocator::BoundedAllocator;
pub use end::end;
pub use socket::Socket;

/// The engine as the compile role has it.
///
/// # Errors
/// The processor is not supported.
pub fn engine() -> wasmtime::Result<wasmtime::Engine> {
    policy::engine::new(None)
}

/// The worker's end of the channel, over the real socket.
type Channel = WorkerEnd<Socket>;

/// Runs the worker to its end. The arguments are those of [`Arguments`].
#[must_use]
pub fn main() -> WorkerExit {
    descend(&Complete)
}

/// Runs a worker that takes the steps of this ladder down. What ships is [`main`].
#[must_use]
pub fn descend(ladder: &impl Ladder) -> WorkerExit {
    end_on_panic();
    let Some(arguments) = Arguments::parse(env::args().skip(1)) else {
        return WorkerExit::Usage;
    };
    let Ok(socket) = confine::channel() else {
        return WorkerExit::Usage;
    };
    let mut channel = WorkerEnd::new(Socket::new(socket));
    // The engine is made first: it looks at the machine (processor features, the page
    // map) through files that are gone further down. It has seen nothing foreign.
    let (engine, arena) = match machine(arguments.role) {
        Ok(machine) => machine,
        Err(error) => return give_up(&mut channel, &format!("engine: {error:#}")),
    };
    let confined = match confine::lock(&arguments, ladder) {
        Ok(confined) => confined,
        Err(error) => return give_up(&mut channel, &error.to_string()),
    };
    if let Err(error) = channel.send(&Reply::Confined(confined.report())) {
        return exit_for(&error);
    }
    match arena {
        None => compile::run(&confined, &engine, &mut channel),
        Some(arena) => load_and_serve(confined, &engine, arena, channel, ladder),
    }
}

/// The engine, and linear memory for a role that runs guests. Neither is ever dropped: what
/// unmaps them would need system calls.
fn machine(
    role: Role,
) -> wasmtime::Result<(ManuallyDrop<wasmtime::Engine>, Option<&'static Arena>)> {
    let arena = match role {
        Role::Compile => None,
        Role::Serve | Role::Snapshot => Some(Arena::reserve()?),
    };
    let engine = ManuallyDrop::new(policy::engine::new(arena)?);
    if arena.is_some() {
        policy::arena::note_writes()?;
    }
    Ok((engine, arena))
}

fn load_and_serve(
    confined: Confined,
    engine: &wasmtime::Engine,
    arena: &'static Arena,
    mut channel: Channel,
    ladder: &impl Ladder,
) -> WorkerExit {
    // Never dropped: the code is sealed where it lies.
    let loaded = match serve::load(&confined, engine, arena, &mut channel) {
        Ok(loaded) => ManuallyDrop::new(loaded),
        Err(exit) => return exit,
    };
    let data_bytes_max = loaded.memory_bytes_max.saturating_add(limits::SERVE_OVERHEAD_BYTES);
    let code = loaded.code_to_seal();
    let role = confined.role();
    if role == Role::Snapshot && loaded.processes_max > 0 {
        let processes_max = loaded.processes_max;
        return match confined.seal_zygote(data_bytes_max, processes_max, code, ladder) {
            Ok(zygote) => zygote::run(&zygote, loaded, channel, ladder),
            Err(error) => give_up(&mut channel, &error.to_string()),
        };
    }
    match confined.seal(data_bytes_max, code, ladder) {
        Ok(sealed) => serve::run(&sealed, role, loaded, channel),
        Err(error) => give_up(&mut channel, &error.to_string()),
    }
}

/// Tells what could not be done to lock the process up. Nobody to tell is no matter.
fn give_up(channel: &mut Channel, message: &str) -> WorkerExit {
    let class = FaultClass::Confinement;
    drop(channel.send(&Reply::Fault { id: None, class, message: policy::describe(message) }));
    WorkerExit::ConfineFailed
}

/// The exit for a channel that can't be used any more.
fn exit_for(error: &ChannelError) -> WorkerExit {
    match error {
        ChannelError::Closed => WorkerExit::Done,
        ChannelError::Truncated | ChannelError::Io(_) => WorkerExit::ChannelLost,
        ChannelError::Frame(_) => WorkerExit::ProtocolViolation,
    }
}

/// A panic ends the process at once in every build profile, without unwinding through
/// the engine and without `abort`, whose signal would read as a forbidden system call.
fn end_on_panic() {
    panic::set_hook(Box::new(|_| end(WorkerExit::Panicked)));
}
