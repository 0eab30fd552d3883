//! WASI policies: a command that reads the question on stdin and answers on stdout.
//!
//! It is run from the start for every question; or it is started once, stopped at its first
//! read, and continued from there ([`Parked`]).
#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use conclave_ipc::exit::WorkerExit;
use conclave_ipc::message::FaultClass;
use wasmtime::{AsContextMut, Caller, Instance, Linker, Module, Store};

use super::arena::Arena;
use super::guest::Guest;
use super::instance::{Live, Places, Registers};
use super::memory;
use super::preview1::{self, ProcExit, Wasi};
use super::stack::Stack;
use super::{Fault, Job, Outcome, Question};
use crate::compile::MOVED_START;
use crate::end;
use crate::session::Session;

/// The export that makes a module a WASI command.
pub(super) const ENTRY: &str = "_start";

/// The two names of the host-call import; the second is what Javy-built modules use.
const HOST_MODULES: [&str; 2] = ["host", "kubewarden:javy/host"];

/// A command's arguments.
const VALIDATE: &[&str] = &["policy.wasm", "validate"];
const VALIDATE_SETTINGS: &[&str] = &["policy.wasm", "validate-settings"];

/// Runs an instance from start to end.
pub(super) fn evaluate(live: &mut Live, session: &Session, job: &Job) -> Outcome {
    let Live { store, instance, .. } = live;
    let arguments = match job.question {
        Question::Validate => VALIDATE,
        Question::ValidateSettings => VALIDATE_SETTINGS,
    };
    store.data_mut().wasi = Wasi::command(arguments, &job.payload);
    let ended = run(store, instance);
    outcome(&ended, store.data_mut(), session)
}

fn run(store: &mut Store<Guest>, instance: &Instance) -> wasmtime::Result<()> {
    instance
        .get_typed_func::<(), ()>(&mut *store, ENTRY)
        .and_then(|start| start.call(&mut *store, ()))
}

/// What came of a command that has ended.
fn outcome(ended: &wasmtime::Result<()>, guest: &mut Guest, session: &Session) -> Outcome {
    match ended {
        Ok(()) => answer(guest, true),
        Err(error) => match error.downcast_ref::<ProcExit>() {
            Some(exit) => answer(guest, exit.is_success()),
            None => {
                let fault = Fault::of_guest(error, session);
                // The guest's last words say more than the trap that followed them.
                let words = trimmed(&guest.wasi.take_captured().1);
                Outcome::Fault(if words.is_empty() || fault.class.is_limit() {
                    fault
                } else {
                    Fault { message: words, ..fault }
                })
            }
        },
    }
}

fn answer(guest: &mut Guest, success: bool) -> Outcome {
    let (response, diagnostics) = guest.wasi.take_captured();
    if success {
        Outcome::Verdict { response, diagnostics }
    } else {
        Outcome::Failure(trimmed(&diagnostics))
    }
}

fn trimmed(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

/// A command that is stopped at its first read.
#[derive(Debug)]
pub(super) struct Parked(&'static Desk);

/// Where a command that is stopped and its host hand each other what they have to say. It runs
/// on a stack of its own; whatever it finds there when it goes on, it finds again the next
/// time, so it leaves all that is owned with the desk.
#[derive(Debug)]
pub(super) struct Desk {
    arena: &'static Arena,
    session: Session,
    stack: OnceLock<Stack>,
    /// All of its state but linear memory and the stack, once it is stopped.
    registers: OnceLock<Registers>,
    places: OnceLock<Places>,
    note: Mutex<Note>,
}

#[derive(Debug)]
enum Note {
    Nothing,
    /// To the command: run.
    Start(Box<Live>),
    /// To the command: what it reads.
    Question(Vec<u8>),
    /// To the host: it stands at its first read.
    AtRead,
    /// To the host: it has ended.
    Ended(Outcome),
}

impl Parked {
    /// Runs the command up to its first read, and keeps its state there.
    ///
    /// # Errors
    /// It can't be stopped there: it does something else before that counts, or never reads.
    pub(super) fn start(
        mut live: Live,
        arena: &'static Arena,
        session: &Session,
    ) -> Result<Self, Fault> {
        let failed = |message: String| Fault::new(FaultClass::Snapshot, message);
        let desk = &*Box::leak(Box::new(Desk {
            arena,
            session: session.clone(),
            stack: OnceLock::new(),
            registers: OnceLock::new(),
            places: OnceLock::new(),
            note: Mutex::new(Note::Nothing),
        }));
        let places = Places::of(&live.instance, &mut live.store)
            .map_err(|error| failed(error.to_string()))?;
        // Set once, here.
        drop(desk.places.set(places));
        let guest = live.store.data_mut();
        (guest.desk, guest.wasi) = (Some(desk), Wasi::starting(VALIDATE));
        let stack =
            Stack::new(begin, desk).map_err(|error| failed(format!("no stack: {error}")))?;
        let stack = desk.stack.get_or_init(|| stack);
        desk.put(Note::Start(Box::new(live)));
        stack.enter();
        match desk.take() {
            Note::AtRead => {}
            Note::Ended(Outcome::Fault(fault)) => return Err(fault),
            Note::Ended(Outcome::Verdict { .. } | Outcome::Failure(_)) => {
                return Err(failed("it ends without reading its input".to_owned()));
            }
            Note::Nothing | Note::Start(_) | Note::Question(_) => {
                return Err(failed("it did not start".to_owned()));
            }
        }
        stack.mark();
        arena.keep().map_err(|error| failed(error.to_string()))?;
        Ok(Self(desk))
    }

    /// Has the command go on with this to read, and run to its end.
    pub(super) fn evaluate(&self, job: Job) -> Outcome {
        let unexpected = |what: &str| Outcome::Fault(Fault::new(FaultClass::Snapshot, what));
        if !matches!(job.question, Question::Validate) {
            return unexpected("a command that was started validates requests only");
        }
        let Some(stack) = self.0.stack.get() else { return unexpected("it was not started") };
        self.0.put(Note::Question(job.payload));
        stack.enter();
        match self.0.take() {
            Note::Ended(outcome) => outcome,
            Note::Nothing | Note::Start(_) | Note::Question(_) | Note::AtRead => {
                unexpected("it was not set back")
            }
        }
    }

    /// Sets the command back to its first read.
    pub(super) fn set_back(&self) -> wasmtime::Result<()> {
        self.0.arena.restore()?;
        if let Some(stack) = self.0.stack.get() {
            stack.rewind();
        }
        Ok(())
    }
}

impl Desk {
    // A panic ends the process, so nobody can have left the lock poisoned.
    fn note(&self) -> MutexGuard<'_, Note> {
        self.note.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, note: Note) {
        *self.note() = note;
    }

    fn take(&self) -> Note {
        std::mem::replace(&mut *self.note(), Note::Nothing)
    }

    /// Gives the host its turn. Callers on the command's stack own nothing there.
    fn stop(&self) {
        match self.stack.get() {
            Some(stack) => stack.stop(),
            // It runs on that very stack.
            None => end(WorkerExit::Panicked),
        }
    }

    /// Stops the command at its first read, and goes on with a question as often as there is
    /// one.
    fn at_read(&self, caller: &mut Caller<'_, Guest>) -> wasmtime::Result<()> {
        if self.registers.get().is_none() {
            if let Some(places) = self.places.get() {
                drop(self.registers.set(Registers::read(places, caller.as_context_mut())));
            }
            self.put(Note::AtRead);
            self.stop();
        } else if !self.is_question() {
            // A further read: what there is to read, there is.
            return Ok(());
        }
        let Note::Question(question) = self.take() else { end(WorkerExit::Panicked) };
        caller.data_mut().wasi.ask(question);
        match self.registers.get() {
            Some(registers) => registers.write(self.arena, caller.as_context_mut()),
            None => Ok(()),
        }
    }

    fn is_question(&self) -> bool {
        matches!(*self.note(), Note::Question(_))
    }

    /// Ends a command that was stopped before, without returning to it. One that was not is
    /// ended in the usual way.
    pub(super) fn end(&self, guest: &mut Guest, exit: &ProcExit) {
        if self.registers.get().is_some() {
            self.put(Note::Ended(answer(guest, exit.is_success())));
            self.stop();
        }
    }
}

/// What runs on the command's stack.
extern "C" fn begin(desk: &'static Desk) -> ! {
    if let Note::Start(mut live) = desk.take() {
        let Live { store, instance, .. } = &mut *live;
        let ended = run(store, instance);
        let outcome = match (desk.registers.get(), outcome(&ended, store.data_mut(), &desk.session))
        {
            (None, outcome) | (Some(_), outcome @ Outcome::Fault(_)) => outcome,
            // What it would be set back to is left for good.
            (Some(_), Outcome::Verdict { .. } | Outcome::Failure(_)) => {
                Outcome::Fault(Fault::new(FaultClass::Snapshot, "it returned from its entry"))
            }
        };
        desk.put(Note::Ended(outcome));
        // The host does not come back here: a command that ends in this way is not set back.
        desk.stop();
    }
    end(WorkerExit::Panicked)
}

/// Goes on if the compile role has seen to it that the command does not return from its entry,
/// which a host call would otherwise have to stop for.
pub(super) fn require_end(module: &Module) -> Result<(), Fault> {
    match module.get_export(MOVED_START) {
        Some(_) => Ok(()),
        None => Err(Fault::new(FaultClass::Snapshot, "it can't be told when it ends")),
    }
}

/// Called when a guest is about to read its input.
///
/// # Errors
/// A guest that was started can't be set back.
pub(super) fn await_question(caller: &mut Caller<'_, Guest>) -> wasmtime::Result<()> {
    match caller.data().desk {
        Some(desk) => desk.at_read(caller),
        None => Ok(()),
    }
}

/// Adds the WASI functions and the host call.
///
/// # Errors
/// A name is defined twice, which would be a mistake here.
pub(super) fn link(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    preview1::link(linker)?;
    for module in HOST_MODULES {
        linker.func_wrap(module, "call", host_call)?;
    }
    Ok(())
}

/// Answers 0 for success and 1 for an error (the opposite of waPC), and appends the
/// response or the error's text to the guest's own stdin.
#[expect(clippy::too_many_arguments, reason = "the signature is Kubewarden's")]
fn host_call(
    mut caller: Caller<'_, Guest>,
    a: i32,
    b: i32,
    c: i32,
    d: i32,
    e: i32,
    f: i32,
    g: i32,
    h: i32,
) -> wasmtime::Result<i32> {
    let (data, guest) = memory::split(&mut caller)?;
    let call = memory::host_call(data, [a, b, c, d, e, f, g, h])?;
    let answer =
        guest.session.host_call(call.binding, call.namespace, call.operation, call.payload)?;
    match answer {
        Ok(response) => {
            guest.wasi.append_stdin(&response);
            Ok(0)
        }
        Err(error) => {
            guest.wasi.append_stdin(error.as_bytes());
            Ok(1)
        }
    }
}
