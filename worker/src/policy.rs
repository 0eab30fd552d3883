//! One policy: its code, its settings, and a fresh instance for every request.

pub(crate) mod arena;
pub(crate) mod engine;
mod guest;
mod instance;
mod memory;
mod preview1;
mod rego;
mod stack;
mod wapc;
mod wasi;

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use conclave_ipc::Role;
use conclave_ipc::exit::WorkerExit;
use conclave_ipc::limits::{MESSAGE_BYTES_MAX, TABLE_ELEMENTS_MAX, TABLES_MAX};
use conclave_ipc::message::{Contract, FaultClass, Load, Operation};
use wasmtime::{Engine, InstancePre, Linker, Module, Store, Trap};

use crate::confine::Confined;
use crate::end;
use crate::session::{Session, Stage};

use arena::{Arena, WASM_PAGE_BYTES};
use guest::Guest;
use instance::Live;
use wapc::{Conversation, Shared, locked};
use wasi::Parked;

/// Something broke; the worker ends after telling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) class: FaultClass,
    pub(crate) message: String,
}

impl Fault {
    fn new(class: FaultClass, message: impl Into<String>) -> Self {
        Self { class, message: message.into() }
    }

    /// What an error of the engine means: a bound that the guest ran into, or a trap.
    fn of_guest(error: &wasmtime::Error, session: &Session) -> Self {
        if let Some(breach) = session.take_breach() {
            return Self { class: breach.class, message: breach.message };
        }
        match error.downcast_ref::<Trap>() {
            Some(trap @ Trap::StackOverflow) => Self::new(FaultClass::Stack, trap.to_string()),
            Some(trap) => Self::new(FaultClass::Trap, trap.to_string()),
            None => Self::new(FaultClass::Trap, error.root_cause().to_string()),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

/// How an evaluation ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The guest answered.
    Verdict { response: Vec<u8>, diagnostics: Vec<u8> },
    /// The guest declared failure in an orderly way.
    Failure(String),
    /// Something broke.
    Fault(Fault),
}

/// What one evaluation asks the guest, as the guest will read it.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    question: Question,
    payload: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
enum Question {
    Validate,
    ValidateSettings,
}

/// A linked module and what every instance of it gets.
pub(crate) struct Template {
    contract: Contract,
    pre: InstancePre<Guest>,
    settings: Vec<u8>,
    memory_bytes_max: usize,
    runs_at_instantiation: bool,
    arena: &'static Arena,
    /// Whether an instance can be set back to an earlier state.
    can_be_set_back: bool,
    /// How Rego is evaluated.
    rules: rego::Rules,
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Template").field("contract", &self.contract).finish_non_exhaustive()
    }
}

impl Template {
    /// Maps the code and resolves its imports; runs none of it.
    pub(crate) fn load(
        confined: &Confined,
        engine: &Engine,
        arena: &'static Arena,
        load: &Load<'_>,
    ) -> Result<Self, Fault> {
        let module = engine::map_code(confined, engine)
            .map_err(|error| Fault::new(FaultClass::BadCode, format!("{error:#}")))?;
        let mut linker = Linker::new(engine);
        let linked = match load.contract {
            Contract::Wapc => wapc::link(&mut linker),
            Contract::Wasi => wasi::link(&mut linker),
            Contract::Opa | Contract::Gatekeeper => rego::link(&mut linker),
        };
        linked.map_err(|error| Fault::new(FaultClass::Link, format!("{error:#}")))?;
        require_export(&module, load.contract)?;
        let memory_bytes_max = usize::try_from(load.memory_bytes_max).unwrap_or(usize::MAX);
        let declared = require_room(&module, load.memory_bytes_max)?;
        // What has no memory has no state in a file. A start section has run before anything
        // could be kept: who is to be fresh is instantiated anew. Rego has no start that could
        // make a difference.
        let can_be_set_back = load.can_be_set_back
            && declared > 0
            && (confined.role() == Role::Snapshot
                || !load.runs_at_instantiation
                || load.contract.is_rego());
        let file = can_be_set_back.then(|| confined.output()).transpose();
        file.and_then(|file| arena.back(file, memory_bytes_max))
            .map_err(|error| Fault::new(FaultClass::Memory, format!("linear memory: {error}")))?;
        let pre = linker
            .instantiate_pre(&module)
            .map_err(|error| Fault::new(FaultClass::Link, format!("{error:#}")))?;
        Ok(Self {
            contract: load.contract,
            pre,
            settings: load.settings.to_vec(),
            memory_bytes_max,
            runs_at_instantiation: load.runs_at_instantiation,
            arena,
            can_be_set_back,
            rules: rego::Rules::of(load),
        })
    }

    /// The question as a guest of this kind reads it.
    fn job(&self, operation: Operation<'_>) -> Job {
        let settings = self.settings.as_slice();
        let Operation::Validate(request) = operation else {
            return Job { question: Question::ValidateSettings, payload: settings.to_vec() };
        };
        let parts: [&[u8]; 5] = match self.contract {
            Contract::Wapc | Contract::Wasi => {
                [br#"{"request":"#, request, br#","settings":"#, settings, b"}"]
            }
            Contract::Opa => [br#"{"request":"#, request, b"}", b"", b""],
            Contract::Gatekeeper => {
                [br#"{"parameters":"#, settings, br#","review":"#, request, b"}"]
            }
        };
        Job { question: Question::Validate, payload: parts.concat() }
    }

    /// Where the native code lies.
    pub(crate) fn code(&self) -> Range<*const u8> {
        self.pre.module().image_range()
    }
}

fn require_export(module: &Module, contract: Contract) -> Result<(), Fault> {
    let name = match contract {
        Contract::Wapc => wapc::ENTRY,
        Contract::Wasi => wasi::ENTRY,
        Contract::Opa | Contract::Gatekeeper => rego::ENTRY,
    };
    match module.get_export(name) {
        Some(export) if export.func().is_some() => Ok(()),
        _ => Err(Fault::new(
            FaultClass::Link,
            format!("the module does not export the function {name}"),
        )),
    }
}

/// The linear memory that the module declares, in bytes, if it may have so much, and its tables
/// too: a limit that is passed from the start is told when the policy is loaded.
fn require_room(module: &Module, memory_bytes_max: u64) -> Result<u64, Fault> {
    let required = module.resources_required();
    if required.num_tables as usize > TABLES_MAX {
        let message =
            format!("the module has {} tables; {TABLES_MAX} are allowed", required.num_tables);
        return Err(Fault::new(FaultClass::Link, message));
    }
    if let Some(elements) = required.max_initial_table_size
        && elements > TABLE_ELEMENTS_MAX as u64
    {
        let message = format!(
            "table limit of {TABLE_ELEMENTS_MAX} elements exceeded: the module declares {elements} from the start"
        );
        return Err(Fault::new(FaultClass::Memory, message));
    }
    let pages = required.max_initial_memory_size.unwrap_or(0);
    let declared = pages.saturating_mul(WASM_PAGE_BYTES as u64);
    if declared <= memory_bytes_max {
        return Ok(declared);
    }
    let message = format!(
        "memory limit of {memory_bytes_max} bytes exceeded: the module declares {declared} from the start"
    );
    Err(Fault::new(FaultClass::Memory, message))
}

/// The policy at work.
#[derive(Debug)]
pub(crate) struct Policy {
    template: Template,
    session: Session,
    guest: Held,
}

/// What stands ready for the next job.
#[derive(Debug)]
enum Held {
    /// Nothing: it is instantiated when it is needed.
    Nothing,
    /// Nothing, and there will never be anything.
    Broken(Fault),
    /// An instance that has run nothing, or was set back to that.
    Fresh(Shared),
    /// An instance that has initialised itself, and is set back to that.
    Initialised(Shared, Conversation),
    /// A command at its first read.
    Parked(Parked),
    /// A Rego policy with its data loaded, or set back to that.
    Ready(Box<rego::Ready>),
}

/// What starting a guest has come to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Started {
    /// How long it took, without the practice.
    pub(crate) took: Duration,
    /// Linear memory, in bytes.
    pub(crate) memory_bytes: usize,
}

impl Policy {
    pub(crate) fn new(template: Template, session: Session) -> Self {
        Self { template, session, guest: Held::Nothing }
    }

    /// The question as the guest will read it.
    pub(crate) fn job(&self, operation: Operation<'_>) -> Job {
        self.template.job(operation)
    }

    /// Sets back what the last request used, or instantiates for the next one as far as that
    /// runs no guest code, except for Rego, whose data is loaded. A failure shows when the
    /// request is there.
    pub(crate) fn prepare(&mut self) {
        let arena = self.template.arena;
        let set_back = match &mut self.guest {
            Held::Fresh(live) if self.template.can_be_set_back => locked(live).set_back(arena),
            Held::Initialised(live, _) => locked(live).set_back(arena),
            Held::Parked(parked) => parked.set_back(),
            Held::Ready(ready) if self.template.can_be_set_back => ready.set_back(arena),
            Held::Broken(_) => return,
            Held::Nothing | Held::Fresh(_) | Held::Ready(_) => {
                // One at a time: there is room for one memory.
                self.guest = Held::Nothing;
                if self.template.contract.is_rego() {
                    self.session.enter(Stage::Practising);
                    let ready = self.instantiate().and_then(|live| self.ready(live));
                    self.guest = ready.map_or_else(Held::Broken, Held::Ready);
                } else if !self.template.runs_at_instantiation {
                    self.guest = self.fresh().map_or_else(Held::Broken, Held::Fresh);
                }
                return;
            }
        };
        if set_back.is_err() {
            // The kernel had no memory for it, and nobody can go on from a state in between.
            end(WorkerExit::OutOfMemory);
        }
    }

    /// Starts the guest, once, and keeps the state that every job continues from.
    ///
    /// # Errors
    /// It can't be kept, or not be set back to it. The guest is of no more use.
    pub(crate) fn start(&mut self, practice: Option<&Job>) -> Result<Started, Fault> {
        if !self.template.can_be_set_back {
            return Err(Fault::new(FaultClass::Snapshot, "it can't be set back"));
        }
        let arena = self.template.arena;
        let began = Instant::now();
        self.session.enter(Stage::Starting);
        let live = self.instantiate()?;
        self.session.unless_premature()?;
        let took = match self.template.contract {
            Contract::Wasi => {
                wasi::require_end(self.template.pre.module())?;
                self.guest = Held::Parked(Parked::start(live, arena, &self.session)?);
                began.elapsed()
            }
            Contract::Wapc => {
                let live = Arc::new(Mutex::new(live));
                let conversation = Conversation::begin(&live, &self.session).map_err(unready)?;
                self.session.unless_premature()?;
                let took = began.elapsed();
                self.session.enter(Stage::Practising);
                if let Some(job) = practice {
                    self.practise(conversation.ask(job))?;
                    if self.session.has_called_host() {
                        return Err(Fault::new(
                            FaultClass::Snapshot,
                            "it makes a host call in its practice",
                        ));
                    }
                }
                locked(&live).keep(arena).map_err(|error| {
                    Fault::new(FaultClass::Snapshot, format!("its state can't be kept: {error}"))
                })?;
                self.guest = Held::Initialised(live, conversation);
                took
            }
            Contract::Opa | Contract::Gatekeeper => {
                let ready = self.ready(live)?;
                self.session.unless_premature()?;
                self.guest = Held::Ready(ready);
                began.elapsed()
            }
        };
        // Once more, to learn what it writes to.
        self.session.enter(Stage::Practising);
        if let Some(job) = practice {
            let outcome = self.evaluate(job.clone());
            self.practise(outcome)?;
            self.prepare();
        }
        Ok(Started { took, memory_bytes: arena.bytes() })
    }

    /// What a practice has come to does not matter, as long as the guest can go on.
    fn practise(&self, outcome: Outcome) -> Result<(), Fault> {
        match outcome {
            Outcome::Fault(fault) => Err(Fault {
                class: FaultClass::Snapshot,
                message: format!("its practice failed: {}", fault.message),
            }),
            Outcome::Verdict { .. } | Outcome::Failure(_) => self.session.unless_premature(),
        }
    }

    /// Answers one job; what it leaves behind is gone before the next.
    pub(crate) fn evaluate(&mut self, job: Job) -> Outcome {
        let live = match &mut self.guest {
            Held::Ready(ready) => return ready.ask(&job, &self.session),
            Held::Parked(parked) => return parked.evaluate(job),
            Held::Initialised(_, conversation) => return conversation.ask(&job),
            Held::Broken(fault) => Err(fault.clone()),
            Held::Fresh(live) => Ok(Arc::clone(live)),
            Held::Nothing => self.fresh(),
        };
        let live = match live {
            Ok(live) => live,
            Err(fault) => return Outcome::Fault(fault),
        };
        let outcome = match self.template.contract {
            Contract::Wapc => match Conversation::begin(&live, &self.session) {
                Ok(conversation) => conversation.ask(&job),
                Err(outcome) => outcome,
            },
            Contract::Wasi => wasi::evaluate(&mut locked(&live), &self.session, &job),
            Contract::Opa | Contract::Gatekeeper => {
                Outcome::Fault(Fault::new(FaultClass::Link, "its data is not loaded"))
            }
        };
        self.guest = Held::Fresh(live);
        outcome
    }

    /// An instance that has run nothing, except for a start section.
    fn fresh(&self) -> Result<Shared, Fault> {
        let mut live = self.instantiate()?;
        if self.template.can_be_set_back {
            live.keep(self.template.arena)
                .map_err(|error| Fault::new(FaultClass::Memory, error.to_string()))?;
        }
        Ok(Arc::new(Mutex::new(live)))
    }

    /// An instance that has run nothing but what Rego begins with.
    fn ready(&self, live: Live) -> Result<Box<rego::Ready>, Fault> {
        let Template { rules, settings, arena, .. } = &self.template;
        let mut ready = Box::new(rego::Ready::begin(live, rules, settings, &self.session)?);
        if self.template.can_be_set_back {
            ready.keep(arena).map_err(|error| Fault::new(FaultClass::Memory, error.to_string()))?;
        }
        Ok(ready)
    }

    fn instantiate(&self) -> Result<Live, Fault> {
        let guest = Guest::new(self.session.clone(), self.template.memory_bytes_max);
        let mut store = Store::new(self.template.pre.module().engine(), guest);
        store.limiter(|guest| guest);
        match self.template.pre.instantiate(&mut store) {
            Ok(instance) => Ok(Live::new(store, instance)),
            Err(error) => Err(Fault::of_guest(&error, &self.session)),
        }
    }
}

/// Why a guest that failed to initialise itself can't be started.
fn unready(outcome: Outcome) -> Fault {
    match outcome {
        Outcome::Fault(fault) => fault,
        Outcome::Failure(message) => Fault::new(FaultClass::Snapshot, message),
        Outcome::Verdict { .. } => Fault::new(FaultClass::Snapshot, "it answers unasked"),
    }
}

/// The message, cut to what a frame may carry.
pub(crate) fn describe(message: &str) -> &str {
    message.get(..message.floor_char_boundary(MESSAGE_BYTES_MAX)).unwrap_or_default()
}
