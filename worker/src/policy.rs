//! One policy: its code, its settings, and a fresh instance for every request.

pub(crate) mod engine;
mod guest;
mod memory;
mod preview1;
mod wapc;
mod wasi;

use std::fmt;
use std::ops::Range;

use ::wapc::WapcHost;
use conclave_ipc::limits::MESSAGE_BYTES_MAX;
use conclave_ipc::message::{Contract, FaultClass, Load, Operation};
use wasmtime::{
    Engine, Instance, InstancePre, Linker, Module, PoolConcurrencyLimitError, Store, Trap,
};

use crate::confine::Confined;
use crate::session::Session;

use guest::Guest;

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
        if error.is::<PoolConcurrencyLimitError>() {
            // The pool has room for one instance, but for no heap beside its memory.
            return Self::new(FaultClass::Link, "references to host objects are not available");
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
#[derive(Debug)]
pub(crate) struct Job {
    question: Question,
    payload: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
enum Question {
    Validate,
    ValidateSettings,
}

impl Job {
    /// Both contracts take `{"request": R, "settings": S}`, or `S` as such.
    pub(crate) fn new(operation: Operation<'_>, settings: &[u8]) -> Self {
        match operation {
            Operation::Validate(request) => Self {
                question: Question::Validate,
                payload: [br#"{"request":"#, request, br#","settings":"#, settings, b"}"].concat(),
            },
            Operation::ValidateSettings => {
                Self { question: Question::ValidateSettings, payload: settings.to_vec() }
            }
        }
    }
}

/// A linked module and what every instance of it gets.
pub(crate) struct Template {
    contract: Contract,
    pre: InstancePre<Guest>,
    settings: Vec<u8>,
    memory_bytes_max: usize,
    runs_at_instantiation: bool,
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
        load: &Load<'_>,
    ) -> Result<Self, Fault> {
        let module = engine::map_code(confined, engine)
            .map_err(|error| Fault::new(FaultClass::BadCode, format!("{error:#}")))?;
        let mut linker = Linker::new(engine);
        let linked = match load.contract {
            Contract::Wapc => wapc::link(&mut linker),
            Contract::Wasi => wasi::link(&mut linker),
        };
        linked.map_err(|error| Fault::new(FaultClass::Link, format!("{error:#}")))?;
        require_export(&module, load.contract)?;
        require_room(&module, load.memory_bytes_max)?;
        let pre = linker
            .instantiate_pre(&module)
            .map_err(|error| Fault::new(FaultClass::Link, format!("{error:#}")))?;
        Ok(Self {
            contract: load.contract,
            pre,
            settings: load.settings.to_vec(),
            memory_bytes_max: usize::try_from(load.memory_bytes_max).unwrap_or(usize::MAX),
            runs_at_instantiation: load.runs_at_instantiation,
        })
    }
}

impl Template {
    /// Where the native code lies.
    pub(crate) fn code(&self) -> Range<*const u8> {
        self.pre.module().image_range()
    }
}

fn require_export(module: &Module, contract: Contract) -> Result<(), Fault> {
    let name = match contract {
        Contract::Wapc => wapc::ENTRY,
        Contract::Wasi => wasi::ENTRY,
    };
    match module.get_export(name) {
        Some(export) if export.func().is_some() => Ok(()),
        _ => Err(Fault::new(
            FaultClass::Link,
            format!("the module does not export the function {name}"),
        )),
    }
}

/// Instantiation would fail for want of memory before it asked for the limit.
fn require_room(module: &Module, memory_bytes_max: u64) -> Result<(), Fault> {
    const PAGE_BYTES: u64 = 64 << 10;
    let pages = module.resources_required().max_initial_memory_size.unwrap_or(0);
    let declared = pages.saturating_mul(PAGE_BYTES);
    if declared <= memory_bytes_max {
        return Ok(());
    }
    let message = format!(
        "memory limit of {memory_bytes_max} bytes exceeded: the module declares {declared} from the start"
    );
    Err(Fault::new(FaultClass::Memory, message))
}

/// A fresh instance that has run nothing.
struct Fresh {
    store: Store<Guest>,
    instance: Instance,
}

/// What is left of an instance that answered; it is only dropped.
#[expect(dead_code, reason = "held to be dropped later, off the critical path")]
enum Used {
    Wapc(WapcHost),
    Wasi(Store<Guest>),
    Nothing,
}

/// The policy at work.
pub(crate) struct Policy {
    template: Template,
    session: Session,
    fresh: Option<Fresh>,
    used: Used,
}

impl Policy {
    pub(crate) fn new(template: Template, session: Session) -> Self {
        Self { template, session, fresh: None, used: Used::Nothing }
    }

    pub(crate) fn settings(&self) -> &[u8] {
        &self.template.settings
    }

    /// Clears up after the last request and instantiates for the next one, as far as
    /// that runs no guest code. A failure shows again when the request is there.
    pub(crate) fn prepare(&mut self) {
        self.used = Used::Nothing;
        if self.fresh.is_none() && !self.template.runs_at_instantiation {
            self.fresh = self.instantiate().ok();
        }
    }

    /// Answers one job with a fresh instance that never answers another.
    pub(crate) fn evaluate(&mut self, job: &Job) -> Outcome {
        let fresh = match self.fresh.take().map_or_else(|| self.instantiate(), Ok) {
            Ok(fresh) => fresh,
            Err(fault) => return Outcome::Fault(fault),
        };
        let (outcome, used) = match self.template.contract {
            Contract::Wapc => wapc::evaluate(fresh, &self.session, job),
            Contract::Wasi => wasi::evaluate(fresh, &self.session, job),
        };
        self.used = used;
        outcome
    }

    fn instantiate(&self) -> Result<Fresh, Fault> {
        let guest = Guest::new(self.session.clone(), self.template.memory_bytes_max);
        let mut store = Store::new(self.template.pre.module().engine(), guest);
        store.limiter(|guest| guest);
        match self.template.pre.instantiate(&mut store) {
            Ok(instance) => Ok(Fresh { store, instance }),
            Err(error) => Err(Fault::of_guest(&error, &self.session)),
        }
    }
}

/// The message, cut to what a frame may carry.
pub(crate) fn describe(message: &str) -> &str {
    message.get(..message.floor_char_boundary(MESSAGE_BYTES_MAX)).unwrap_or_default()
}
