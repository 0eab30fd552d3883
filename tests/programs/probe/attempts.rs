//! The attempts: what native code in a worker may try, and what is to come of it.
//!
//! The probe makes them; the suite `red_team` reads the same table and looks from outside
//! at what came of each.

pub(crate) mod kernel;

mod code;
mod descriptors;
mod files;
mod identity;
mod information;
mod machine;
mod memory;
mod network;
mod processes;
mod resources;
mod signals;

use conclave_ipc::layers::Layer;

use kernel::Gain;

/// How an attempt ended, in words: the name of an error (`EACCES`) or of a signal (`SIGSEGV`),
/// `forbidden CALL`, `exit CODE`, `succeeded`, `deadline`, `protocol` or `channel`. Several are
/// alternatives, for kernels that differ.
pub(crate) type End = &'static [&'static str];

/// What stops an attempt first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum First {
    /// The system call filter, at the call of this name; without one where the worker can't
    /// tell it: the handler does not run, or the number has no name.
    Filter(&'static str),
    /// The kernel gives this to no ordinary user, or to nobody.
    Kernel(End),
    /// Another layer.
    Layer(Layer, End),
    /// What the supervisor has set up for all of its workers: deadlines, the rules of the
    /// protocol, bounds on memory.
    Supervisor(End),
    /// Nothing: the worker itself needs it, and it reaches nobody else.
    Needed,
}

/// What would stop it next, if the first were not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another layer.
    Layer(Layer, End),
    /// The kernel itself.
    Kernel(End),
    /// None of our layers, and so it ends; this is why that is accepted.
    Nothing(End, &'static str),
    /// What is first is no layer that can be left out.
    NotAsked,
}

/// One attempt.
#[derive(Debug)]
pub(crate) struct Attempt {
    /// `group/name`.
    pub(crate) id: &'static str,
    /// What it tries.
    pub(crate) tries: &'static str,
    /// What stops it.
    pub(crate) first: First,
    /// What would stop it without that.
    pub(crate) next: Next,
    /// Tries it.
    pub(crate) run: fn() -> Gain,
}

impl Attempt {
    /// The part of the id before the slash.
    pub(crate) fn group(&self) -> &'static str {
        self.id.split_once('/').map_or(self.id, |(group, _)| group)
    }
}

/// All of them.
pub(crate) fn all() -> impl Iterator<Item = &'static Attempt> {
    [
        files::ATTEMPTS,
        descriptors::ATTEMPTS,
        network::ATTEMPTS,
        processes::ATTEMPTS,
        signals::ATTEMPTS,
        identity::ATTEMPTS,
        memory::ATTEMPTS,
        code::ATTEMPTS,
        machine::ATTEMPTS,
        information::ATTEMPTS,
        resources::ATTEMPTS,
    ]
    .into_iter()
    .flatten()
}

/// Looks at what attempts need to know of others, before a filter is on.
pub(crate) fn look_around() {
    processes::look_around();
}

/// An attempt that ends in the system call filter, at that call.
const fn filtered(
    id: &'static str,
    tries: &'static str,
    call: &'static str,
    next: Next,
    run: fn() -> Gain,
) -> Attempt {
    Attempt { id, tries, first: First::Filter(call), next, run }
}

/// An attempt that another layer than the filter ends.
const fn layered(
    id: &'static str,
    tries: &'static str,
    first: (Layer, End),
    next: Next,
    run: fn() -> Gain,
) -> Attempt {
    Attempt { id, tries, first: First::Layer(first.0, first.1), next, run }
}

/// An attempt that no layer ends, but the kernel or the supervisor.
const fn refused(
    id: &'static str,
    tries: &'static str,
    first: First,
    run: fn() -> Gain,
) -> Attempt {
    Attempt { id, tries, first, next: Next::NotAsked, run }
}

/// Something that sounds like an attempt, but the worker needs it.
const fn needed(id: &'static str, tries: &'static str, run: fn() -> Gain) -> Attempt {
    Attempt { id, tries, first: First::Needed, next: Next::NotAsked, run }
}

/// One layer alone stops it; why that is accepted.
const fn alone(why: &'static str) -> Next {
    Next::Nothing(&["succeeded"], why)
}

const fn kernel(end: End) -> Next {
    Next::Kernel(end)
}

const fn limits(end: End) -> Next {
    Next::Layer(Layer::ResourceLimits, end)
}

const fn capabilities(end: End) -> Next {
    Next::Layer(Layer::NoCapabilities, end)
}

const fn empty_root(end: End) -> Next {
    Next::Layer(Layer::EmptyRoot, end)
}

const fn pid_namespace(end: End) -> Next {
    Next::Layer(Layer::PidNamespace, end)
}

const fn network_namespace(end: End) -> Next {
    Next::Layer(Layer::NetworkNamespace, end)
}

const fn write_execute(end: End) -> Next {
    Next::Layer(Layer::WriteExecuteDenied, end)
}

/// What else bounds memory. A small host may refuse by itself.
const CONTROL_GROUP: Next = Next::Nothing(
    &["succeeded", "ENOMEM", "exit 75"],
    "uses up memory until the control group of its policy, or the kernel, ends the worker",
);

/// No descriptor can be made any more.
const NO_DESCRIPTOR: Next = limits(&["EMFILE"]);
