//! The vocabulary: one enum per direction, and the words in them. No logic.

use bincode::{BorrowDecode, Encode};

use crate::layers::Layers;

/// Names one evaluation; issued by the supervisor, never reused within a worker's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, BorrowDecode)]
pub struct EvaluationId(pub u64);

/// Supervisor to worker.
#[derive(Debug, Clone, PartialEq, Eq, Encode, BorrowDecode)]
pub enum Request<'a> {
    /// Compile role, once, after [`Reply::Confined`]: compile the module on descriptor 4
    /// to descriptor 5. Answered by [`Reply::Compiled`] or [`Reply::Fault`].
    Compile,
    /// Serve role, once, after [`Reply::Confined`]: host the code on descriptor 4.
    /// Answered by [`Reply::Loaded`] or [`Reply::Fault`].
    Load(Load<'a>),
    /// Snapshot role, once, after [`Reply::Loaded`]: start the guest and keep its state, from
    /// which every evaluation will continue. Answered by [`Reply::Started`] or
    /// [`Reply::Fault`].
    Start {
        /// A request that the guest judges for practice: the text of one JSON value. What a
        /// waPC guest sets up on its first request becomes part of its state.
        warmup: Option<&'a [u8]>,
    },
    /// Snapshot role, if its guest was loaded to be copied ([`Load::processes_max`]), any time after
    /// [`Reply::Started`]: fork. The message comes with a descriptor: the channel of the new
    /// process, which goes on as a worker in the serve role does after [`Reply::Loaded`], its
    /// own first message. Answered by [`Reply::Forked`] or [`Reply::Fault`].
    Fork,
    /// Snapshot role, after [`Reply::Forked`], when that process has ended: how it has ended.
    /// Answered by [`Reply::Reaped`].
    Reap {
        /// As [`Reply::Forked`] named it.
        child: u32,
    },
    /// Serve role, any time after [`Reply::Loaded`] when no evaluation is under way; snapshot
    /// role, if its guest is not to be copied, after [`Reply::Started`].
    /// Answered by exactly one [`Reply::Verdict`], [`Reply::Failure`] or [`Reply::Fault`].
    Evaluate {
        /// Names the evaluation in every reply about it.
        id: EvaluationId,
        /// What the guest is asked to do.
        operation: Operation<'a>,
    },
    /// The answer to the one [`Reply::HostCall`] that is under way.
    HostAnswer(Result<&'a [u8], &'a str>),
}

/// What a worker is to host, and within which bounds.
#[derive(Debug, Clone, PartialEq, Eq, Encode, BorrowDecode)]
pub struct Load<'a> {
    /// How host and guest talk.
    pub contract: Contract,
    /// The policy's settings: the text of one JSON object.
    pub settings: &'a [u8],
    /// Rego: the name of the entrypoint to evaluate; otherwise the one with the number 0.
    pub entrypoint: Option<&'a str>,
    /// Rego: whether a builtin that fails ends the evaluation. Otherwise its expression is
    /// undefined.
    pub strict_builtin_errors: bool,
    /// Whether instantiation runs guest code, see [`ModuleFacts`]; such a module is
    /// instantiated when a request is there, others one ahead.
    pub runs_at_instantiation: bool,
    /// Whether an instance can be set back to an earlier state, see [`ModuleFacts::obstacle`].
    pub can_be_set_back: bool,
    /// Linear memory of the guest, in bytes; a growth beyond ends the evaluation.
    pub memory_bytes_max: u64,
    /// Snapshot role: how many processes there may be, itself included, if the process is to be
    /// forked for every worker and to evaluate nothing itself; else 0.
    pub processes_max: u16,
    /// Whether the code is to be sealed in its place. The supervisor has tried: a filter of
    /// the service manager's may kill for the call.
    pub seal_code: bool,
}

/// What a guest is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub enum Operation<'a> {
    /// Judge this request: the text of one JSON value.
    Validate(&'a [u8]),
    /// Judge the settings given with [`Load`]. Rego has nothing to say about them: such a
    /// policy is made ready, and finds them valid.
    ValidateSettings,
}

/// How host and guest talk: the execution modes of Kubewarden's metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, BorrowDecode)]
pub enum Contract {
    /// waPC: `kubewarden-wapc`.
    Wapc,
    /// A WASI command, stdin to stdout: `wasi`.
    Wasi,
    /// Rego as Open Policy Agent evaluates it; the settings are its data: `opa`.
    Opa,
    /// Rego as Gatekeeper evaluates it; the settings are its parameters: `gatekeeper`.
    Gatekeeper,
}

impl Contract {
    /// Whether the module is one that OPA compiled.
    #[must_use]
    pub const fn is_rego(self) -> bool {
        matches!(self, Self::Opa | Self::Gatekeeper)
    }
}

/// Worker to supervisor.
#[derive(Debug, Clone, PartialEq, Eq, Encode, BorrowDecode)]
pub enum Reply<'a> {
    /// First message of either role: the worker is locked up and has read nothing.
    Confined(Confinement),
    /// The module is compiled; its code is on descriptor 5.
    Compiled {
        /// Length of the code, in bytes.
        code_bytes: u64,
        /// The first `io.kubewarden.metadata` section, as it stands.
        metadata: Option<&'a [u8]>,
        /// What the module's sections say about it.
        facts: ModuleFacts,
    },
    /// The code is mapped and the serving filter is on.
    Loaded(Confinement),
    /// The guest is started and its state kept.
    Started {
        /// How long that took, in microseconds, without the practice.
        start_micros: u32,
        /// Linear memory of the guest, in bytes.
        memory_bytes: u64,
    },
    /// The process was forked.
    Forked {
        /// The new process, by its number in the namespace of the one that was forked.
        child: u32,
    },
    /// A forked process has ended and is gone.
    Reaped {
        /// How it has ended, as `wait` has it; see wait(2).
        status: i32,
    },
    /// The guest has answered.
    Verdict {
        /// The evaluation it belongs to.
        id: EvaluationId,
        /// The guest's answer, not looked at: waPC's response, all of stdout, or OPA's result set.
        response: &'a [u8],
        /// All of stderr of a WASI guest, else empty.
        diagnostics: &'a [u8],
        /// How long the guest took, in microseconds, as the worker says.
        guest_micros: u32,
    },
    /// The guest declared failure in an orderly way: a guest error, no response, an exit
    /// code other than 0. The worker lives on.
    Failure {
        /// The evaluation it belongs to.
        id: EvaluationId,
        /// The guest's words.
        message: &'a str,
    },
    /// Something broke; the worker exits after this message.
    Fault {
        /// The evaluation it belongs to; none while compiling or loading.
        id: Option<EvaluationId>,
        /// What kind of thing broke.
        class: FaultClass,
        /// Details for a person.
        message: &'a str,
    },
    /// The guest asks the host for something and waits for [`Request::HostAnswer`].
    HostCall {
        /// The evaluation it belongs to.
        id: EvaluationId,
        /// waPC binding; `kubewarden` for everything that exists.
        binding: &'a str,
        /// For example `tracing` or `kubernetes`.
        namespace: &'a str,
        /// For example `log` or `get_resource`.
        operation: &'a str,
        /// Usually JSON.
        payload: &'a [u8],
    },
    /// A guest's call of `tracing/log`, for the log. Not answered: that call always
    /// succeeds with an empty response, so the worker does not keep its guest waiting.
    Trace {
        /// The evaluation it belongs to.
        id: EvaluationId,
        /// The record as the guest gave it, usually JSON.
        record: &'a [u8],
    },
    /// A line of guest output, for the log. Not answered.
    Log {
        /// The evaluation it belongs to.
        id: EvaluationId,
        /// Where the guest wrote it.
        stream: LogStream,
        /// At most [`crate::limits::LOG_LINE_BYTES_MAX`] bytes, in no particular encoding.
        text: &'a [u8],
    },
    /// The worker has made a system call outside its filter and is about to be killed for
    /// it; its last message, at any time after [`Reply::Confined`].
    Forbidden {
        /// The call's number on this processor.
        syscall: u32,
    },
}

impl Reply<'_> {
    /// The message's name, for log lines about a worker that misbehaves.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Confined(_) => "Confined",
            Self::Compiled { .. } => "Compiled",
            Self::Loaded(_) => "Loaded",
            Self::Started { .. } => "Started",
            Self::Forked { .. } => "Forked",
            Self::Reaped { .. } => "Reaped",
            Self::Verdict { .. } => "Verdict",
            Self::Failure { .. } => "Failure",
            Self::Fault { .. } => "Fault",
            Self::HostCall { .. } => "HostCall",
            Self::Trace { .. } => "Trace",
            Self::Log { .. } => "Log",
            Self::Forbidden { .. } => "Forbidden",
        }
    }
}

/// What a worker has done to itself so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub struct Confinement {
    /// The layers that are on.
    pub layers: Layers,
    /// Landlock's ABI version in force; 0 where the kernel has none.
    pub landlock_abi: u8,
}

/// What a module's sections say about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub struct ModuleFacts {
    /// What the exports suggest, for modules without metadata.
    pub shape: ModuleShape,
    /// Whether a start section makes instantiation run guest code.
    pub runs_at_instantiation: bool,
    /// Why an instance can't be set back to an earlier state, if so.
    pub obstacle: Option<Obstacle>,
}

/// Why an instance of a module can't be set back to an earlier state: that restores linear
/// memory and the values of globals, and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub enum Obstacle {
    /// It does not define and export a memory named `memory`.
    Memory,
    /// It has instructions that change a table.
    Table,
    /// It has instructions that drop a segment.
    Segment,
    /// A mutable global holds a reference, is imported, or there are more than
    /// [`crate::limits::GLOBALS_MAX`].
    Global,
    /// It exports a name that is needed here.
    Name,
    /// It is a command that can't be told when it ends: it does not import `proc_exit`.
    Exit,
}

impl Obstacle {
    /// What stands in the way, for logs.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Memory => "it does not define and export a memory named \"memory\"",
            Self::Table => "it has instructions that change a table",
            Self::Segment => "it has instructions that drop a segment",
            Self::Global => {
                "a mutable global holds a reference or is imported, or there are too many"
            }
            Self::Name => "it exports a name that begins with \"conclave:\"",
            Self::Exit => "it does not import proc_exit",
        }
    }
}

/// What a module's exports say about its contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub enum ModuleShape {
    /// Exports `__guest_call`.
    Wapc,
    /// Exports `_start`, and not `__guest_call`.
    Wasi,
    /// Exports something that starts with `opa_`.
    Rego,
    /// None of these.
    Unknown,
}

/// Where a guest wrote a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, BorrowDecode)]
pub enum LogStream {
    /// waPC's `__console_log`.
    Console,
    /// WASI's descriptor 1, of a waPC guest.
    Stdout,
    /// WASI's descriptor 2, of a waPC guest.
    Stderr,
}

/// What kind of thing broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, BorrowDecode)]
pub enum FaultClass {
    /// A step of the confinement, or the engine before it, failed.
    Confinement,
    /// The module is not one that this worker can compile.
    BadModule,
    /// The native code does not fit this build or machine.
    BadCode,
    /// The module can't be instantiated: imports, exports, sizes.
    Link,
    /// The guest has done something before its first read that must be done for every
    /// request, or never gets there.
    Snapshot,
    /// The guest trapped.
    Trap,
    /// The guest asked for more linear memory than it may have.
    Memory,
    /// The guest recursed beyond its stack.
    Stack,
    /// The guest wrote more output than it may.
    Output,
    /// The guest made more, or larger, host calls than it may.
    HostCalls,
}

impl FaultClass {
    /// The name in logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Confinement => "confinement",
            Self::BadModule => "bad module",
            Self::BadCode => "bad code",
            Self::Link => "link",
            Self::Snapshot => "snapshot",
            Self::Trap => "trap",
            Self::Memory => "memory",
            Self::Stack => "stack",
            Self::Output => "output",
            Self::HostCalls => "host calls",
        }
    }

    /// Whether a bound of ours ended the guest, and not a mistake of its own.
    #[must_use]
    pub const fn is_limit(self) -> bool {
        matches!(self, Self::Memory | Self::Stack | Self::Output | Self::HostCalls)
    }
}
