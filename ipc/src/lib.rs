//! The protocol between Conclave's supervisor and its workers, on one page.
//!
//! A worker is started with one end of a Unix stream socket as descriptor
//! [`CHANNEL_FD`]. Both ends come from the same build, so nothing here is a public API.
//! The supervisor trusts no byte that it reads from the channel; the worker trusts the
//! supervisor, which is its only peer.
//!
//! ```text
//! supervisor                                worker (role "serve")
//!     |  exec, descriptors 3 and 4             |
//!     | <-------------------------- Confined - |   locked up, nothing foreign read yet
//!     | - Load ------------------------------> |   maps the code on descriptor 4
//!     | <---------------------------- Loaded - |   can map nothing executable any more
//!     | - Evaluate --------------------------> |
//!     | <------------ Log, Trace, any number - |
//!     | <-------------------------- HostCall - |   any number, one at a time
//!     | - HostAnswer ------------------------> |
//!     | <------------------ Verdict, Failure - |   exactly one; ready for the next Evaluate
//!     |                            or Fault    |   ... or, after a Fault, exits
//!
//! supervisor                                worker (role "compile")
//!     |  exec, descriptors 3, 4 and 5          |
//!     | <-------------------------- Confined - |
//!     | - Compile ---------------------------> |   reads the module on descriptor 4
//!     | <------------------ Compiled, Fault -- |   native code is on descriptor 5; exits
//!
//! supervisor                                worker (role "snapshot")
//!     |  exec, descriptors 3, 4 and 5          |
//!     |  ... as in role "serve" up to Loaded   |
//!     | - Start -----------------------------> |   runs the guest up to its first read
//!     | <-------------------- Started, Fault - |   ... or, after a Fault, exits
//!     |  ... from Evaluate as in role "serve", or, if the process is to be copied:
//!     | - Fork, with a channel --------------> |   makes a worker that goes on from here
//!     | <----------------------------- Forked -|
//!     |  ... on that channel as in role "serve" from Loaded, the new worker's first message
//!     | - Reap ------------------------------> |   after the new worker's end
//!     | <---------------------------- Reaped - |
//! ```
//!
//! In every role a system call outside the filter is the worker's last: the handler of
//! `SIGSYS` says which one it was (Forbidden), and the kernel kills the process.
//!
//! A frame is a length (`u32`, little-endian, of the body alone) and a body: one message
//! in bincode's standard encoding, borrowed from the receive buffer and therefore decoded
//! without any allocation. A frame that is too long, malformed, trailed by bytes, or out
//! of the order above is a protocol violation: it is not answered, the worker is ended.
#![forbid(unsafe_code)]

pub mod channel;
pub mod exit;
pub mod frame;
pub mod layers;
pub mod limits;
pub mod message;

/// The worker's end of the channel: a connected Unix stream socket.
pub const CHANNEL_FD: i32 = 3;

/// What the worker works on, as a sealed read-only memory file: native code in the serve
/// role, the WebAssembly module in the compile role.
pub const IMAGE_FD: i32 = 4;

/// A memory file that is the worker's to fill: native code in the compile role, the guest's
/// linear memory in the snapshot role.
pub const OUTPUT_FD: i32 = 5;

/// What a worker process is for; its first argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Turns one WebAssembly module into native code, and exits.
    Compile,
    /// Hosts one policy and evaluates requests, one at a time, each from the very start.
    Serve,
    /// Hosts one policy that is started once; every request continues from there.
    Snapshot,
}

impl Role {
    /// The command-line word for this role.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Compile => "compile",
            Self::Serve => "serve",
            Self::Snapshot => "snapshot",
        }
    }

    /// The role with that command-line word.
    #[must_use]
    pub fn from_arg(word: &str) -> Option<Self> {
        match word {
            "compile" => Some(Self::Compile),
            "serve" => Some(Self::Serve),
            "snapshot" => Some(Self::Snapshot),
            _ => None,
        }
    }
}

/// What a worker is doing. Each phase has a system call filter of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Reads a module and turns it into native code.
    Compile,
    /// Maps native code; none of it runs yet.
    Load,
    /// Starts a guest, and is forked for every worker that goes on with it: a zygote.
    Zygote,
    /// Runs native code.
    Serve,
}

impl Phase {
    /// Every phase, in the order of a policy's way through them.
    pub const ALL: [Self; 4] = [Self::Compile, Self::Load, Self::Zygote, Self::Serve];

    /// The name in logs, reports and `worker/seccomp.json`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Compile => "compile",
            Self::Load => "load",
            Self::Zygote => "zygote",
            Self::Serve => "serve",
        }
    }
}
