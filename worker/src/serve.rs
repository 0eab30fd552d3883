//! The serve and snapshot roles: load one policy, in the latter start it, then receive,
//! evaluate, send.
#![forbid(unsafe_code)]

use std::mem::ManuallyDrop;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use conclave_ipc::Role;
use conclave_ipc::exit::WorkerExit;
use conclave_ipc::message::{EvaluationId, Operation, Reply, Request};
use wasmtime::Engine;

use crate::confine::{Confined, Sealed};
use crate::policy::arena::Arena;
use crate::policy::{Fault, Outcome, Policy, Template, describe};
use crate::session::Session;
use crate::{Channel, exit_for};

/// A policy whose code is mapped and has not run yet.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) template: Template,
    /// The bound on the guest's linear memory, in bytes.
    pub(crate) memory_bytes_max: u64,
    seal_code: bool,
    /// How many processes there may be, if it is to be copied for every worker; else 0.
    pub(crate) processes_max: u16,
}

impl Loaded {
    /// Where code lies that is to be sealed.
    pub(crate) fn code_to_seal(&self) -> Option<Range<*const u8>> {
        self.seal_code.then(|| self.template.code())
    }
}

/// Waits for the one [`Request::Load`] and maps the code. A failure has been reported.
pub(crate) fn load(
    confined: &Confined,
    engine: &Engine,
    arena: &'static Arena,
    channel: &mut Channel,
) -> Result<Loaded, WorkerExit> {
    let loaded = match channel.receive() {
        Ok(Request::Load(load)) => {
            Template::load(confined, engine, arena, &load).map(|template| Loaded {
                template,
                memory_bytes_max: load.memory_bytes_max,
                seal_code: load.seal_code,
                processes_max: load.processes_max,
            })
        }
        Ok(_) => return Err(WorkerExit::ProtocolViolation),
        Err(error) => return Err(exit_for(&error)),
    };
    loaded.map_err(|fault| match channel.send(&fault.reply(None)) {
        Ok(()) => WorkerExit::Faulted,
        Err(error) => exit_for(&error),
    })
}

/// Evaluates until the channel is closed or something breaks. Guest code runs only here,
/// and only behind the proof that the serving filter is on.
pub(crate) fn run(
    sealed: &Sealed,
    role: Role,
    loaded: ManuallyDrop<Loaded>,
    mut channel: Channel,
) -> WorkerExit {
    if let Err(error) = channel.send(&Reply::Loaded(sealed.report())) {
        return exit_for(&error);
    }
    let session = Session::new(channel);
    let template = ManuallyDrop::into_inner(loaded).template;
    let mut policy = ManuallyDrop::new(Policy::new(template, session.clone()));
    if role == Role::Snapshot
        && let Some(exit) = start(&session, &mut policy)
    {
        return exit;
    }
    serve(&session, policy)
}

/// Goes on in a process that was forked from a zygote.
pub(crate) fn evaluate(
    sealed: &Sealed,
    session: &Session,
    policy: ManuallyDrop<Policy>,
) -> WorkerExit {
    match session.send(&Reply::Loaded(sealed.report())) {
        Ok(()) => serve(session, policy),
        Err(error) => exit_for(&error),
    }
}

fn serve(session: &Session, mut policy: ManuallyDrop<Policy>) -> WorkerExit {
    loop {
        // Off the critical path: the supervisor has its answer already.
        if let Err(error) = session.release() {
            return exit_for(&error);
        }
        policy.prepare();
        let (id, job) = match session.next(|operation| policy.job(operation)) {
            Ok(Some(next)) => next,
            Ok(None) => return WorkerExit::ProtocolViolation,
            Err(error) => return exit_for(&error),
        };
        let started = Instant::now();
        let outcome = policy.evaluate(job);
        if let Some(exit) = answer(session, id, &outcome, started.elapsed()) {
            return exit;
        }
        // The supervisor may share this processor, and has a client waiting.
        thread::yield_now();
    }
}

/// Waits for the order to start the guest and does so; the exit if the worker can't go on.
pub(crate) fn start(session: &Session, policy: &mut Policy) -> Option<WorkerExit> {
    let practice = session.receive(|request| match request {
        Request::Start { warmup } => {
            let job = |request| policy.job(Operation::Validate(request));
            Some(warmup.map(job))
        }
        _ => None,
    });
    let practice = match practice {
        Ok(Some(practice)) => practice,
        Ok(None) => return Some(WorkerExit::ProtocolViolation),
        Err(error) => return Some(exit_for(&error)),
    };
    let started = policy.start(practice.as_ref());
    let sent = match &started {
        Ok(started) => session.send(&Reply::Started {
            start_micros: u32::try_from(started.took.as_micros()).unwrap_or(u32::MAX),
            memory_bytes: started.memory_bytes as u64,
        }),
        Err(fault) => session.send(&fault.reply(None)),
    };
    match (sent, started) {
        (Err(error), _) => Some(exit_for(&error)),
        (Ok(()), Err(_)) => Some(WorkerExit::Faulted),
        (Ok(()), Ok(_)) => None,
    }
}

/// Sends the outcome; the exit if the worker can't go on.
fn answer(
    session: &Session,
    id: EvaluationId,
    outcome: &Outcome,
    took: Duration,
) -> Option<WorkerExit> {
    if let Some(error) = session.take_channel_error() {
        return Some(exit_for(&error));
    }
    let sent = match outcome {
        Outcome::Verdict { response, diagnostics } => {
            let guest_micros = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
            session.send(&Reply::Verdict { id, response, diagnostics, guest_micros })
        }
        Outcome::Failure(message) => {
            session.send(&Reply::Failure { id, message: describe(message) })
        }
        Outcome::Fault(fault) => session.send(&fault.reply(Some(id))),
    };
    match (sent, outcome) {
        (Err(error), _) => Some(exit_for(&error)),
        // A guest that trapped may have found a way to do worse: never again in here.
        (Ok(()), Outcome::Fault(_)) => Some(WorkerExit::Faulted),
        (Ok(()), Outcome::Verdict { .. } | Outcome::Failure(_)) => None,
    }
}

impl Fault {
    fn reply(&self, id: Option<EvaluationId>) -> Reply<'_> {
        Reply::Fault { id, class: self.class, message: describe(&self.message) }
    }
}
