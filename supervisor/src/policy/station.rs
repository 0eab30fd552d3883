//! One slot of a policy's pool: the task that starts a worker, gives it jobs, watches its
//! life and sees to its replacement. Nobody else talks to that worker.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use conclave_ipc::Role;
use conclave_ipc::message::Load;
use thiserror::Error;
use tokio::sync::mpsc;

use super::choice::Manner;
use super::evaluation::Question;
use super::renewal::Renewal;
use super::{Blueprint, Busy, Environment, Job, Policy, QUEUE_TIME_MAX};
use crate::code::{Compiler, blocking, request_load, request_start};
use crate::config::PolicySpec;
use crate::image::Draft;
use crate::log::shorten;
use crate::pool::{Action, Event, SlotId};
use crate::process::{Process, WorkerError};
use crate::sandbox::Weaker;
use crate::spawn::Start;
use crate::zygote::{self, Zygote};

/// Why a worker does not host the policy.
#[derive(Debug, Error)]
pub(crate) enum StartError {
    /// The worker failed, or found the code bad.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The worker is less locked up than it must be.
    #[error(transparent)]
    Weaker(#[from] Weaker),
    /// The memory file for the guest can't be made, or not be sealed.
    #[error("memory file for the guest can't be made or sealed: {0}")]
    Memory(#[from] io::Error),
}

/// One page of linear memory.
const PAGE_BYTES: u64 = 64 << 10;

/// Starts a worker in which every request has an instance of its own.
pub(super) async fn start_fresh(
    compiler: &Compiler,
    blueprint: &Blueprint,
    spec: &PolicySpec,
) -> Result<Process, StartError> {
    load_worker(compiler, blueprint, spec, Role::Serve, &guest_memory(spec)?).await
}

/// Has a worker that goes on from where its guest was started, with that request for practice;
/// gives how long the guest took to start, in microseconds, if it was started now. It is not
/// to come from the zygote of the worker that it replaces.
pub(super) async fn start_snapshot(
    compiler: &Compiler,
    blueprint: &Blueprint,
    spec: &PolicySpec,
    practice: Option<&[u8]>,
    replaces: Option<&Arc<Zygote>>,
) -> Result<(Process, Option<u32>), StartError> {
    let mut current = blueprint.zygote.lock().await;
    if let Some(zygote) = current.as_ref()
        && zygote.is_gone().await
    {
        *current = None;
    }
    let renewed = |zygote: &&Arc<Zygote>| replaces.is_none_or(|old| !Arc::ptr_eq(old, zygote));
    if let Some(zygote) = current.as_ref().filter(renewed) {
        let forked = fork(compiler, zygote).await;
        if forked.is_err() {
            *current = None;
        }
        return Ok((forked?, None));
    }
    let (process, start_micros) = start_guest(compiler, blueprint, spec, practice).await?;
    if !process.forks() {
        return Ok((process, Some(start_micros)));
    }
    let zygote = Zygote::new(process, spec.name.as_str(), compiler.spawner.living().clone());
    let worker = fork(compiler, &zygote).await?;
    *current = Some(zygote);
    Ok((worker, Some(start_micros)))
}

async fn fork(compiler: &Compiler, zygote: &Arc<Zygote>) -> Result<Process, StartError> {
    let (worker, report) = zygote.new_worker().await?;
    compiler.sandbox.require_loaded(report.layers)?;
    Ok(worker)
}

/// Starts a worker and its guest.
async fn start_guest(
    compiler: &Compiler,
    blueprint: &Blueprint,
    spec: &PolicySpec,
    practice: Option<&[u8]>,
) -> Result<(Process, u32), StartError> {
    let memory = guest_memory(spec)?;
    let mut process = load_worker(compiler, blueprint, spec, Role::Snapshot, &memory).await?;
    let (memory_bytes_max, time_max) = (spec.memory_bytes_max, blueprint.start_time_max);
    let started = match request_start(&mut process, practice, memory_bytes_max, time_max).await {
        // Whatever becomes of the worker, the state that its requests start from does not change.
        Ok(micros) => blocking(|| memory.seal()).await.map(|_sealed| micros).map_err(Into::into),
        Err(error) => Err(error.into()),
    };
    match started {
        Ok(micros) => Ok((process, micros)),
        Err(error) => {
            // Before another is started, as often as this may happen.
            process.end().await;
            Err(error)
        }
    }
}

/// The file that a guest's linear memory is kept in.
fn guest_memory(spec: &PolicySpec) -> io::Result<Draft> {
    let pages = spec.memory_bytes_max.div_ceil(PAGE_BYTES);
    Draft::of_length(pages.saturating_mul(PAGE_BYTES))
}

/// Starts a worker in that role and has it load the code.
async fn load_worker(
    compiler: &Compiler,
    blueprint: &Blueprint,
    spec: &PolicySpec,
    role: Role,
    memory: &Draft,
) -> Result<Process, StartError> {
    let Blueprint { code, contract, group, .. } = blueprint;
    let start = Start {
        role,
        label: spec.name.as_str(),
        image: Some(code.image.as_fd()),
        output: Some(memory.as_fd()),
        group: group.as_ref(),
    };
    let (mut process, report) = Process::start(&compiler.spawner, start).await?;
    compiler.sandbox.require(report.layers)?;
    let forks = role == Role::Snapshot && zygote::can_fork(report.layers);
    let load = Load {
        contract: *contract,
        settings: spec.settings.as_bytes(),
        entrypoint: spec.entrypoint.as_deref(),
        strict_builtin_errors: spec.strict_builtin_errors,
        runs_at_instantiation: code.facts.runs_at_instantiation,
        processes_max: if forks { blueprint.processes_max } else { 0 },
        can_be_set_back: code.facts.obstacle.is_none(),
        memory_bytes_max: spec.memory_bytes_max,
        seal_code: compiler.spawner.seals_code,
    };
    let report = request_load(&mut process, load).await?;
    compiler.sandbox.require_loaded(report.layers)?;
    if forks {
        process.will_be_forked();
    }
    Ok(process)
}

/// One slot of a policy's pool, and what its workers are made from.
pub(super) struct Station {
    pub(super) policy: Arc<Policy>,
    pub(super) environment: Arc<Environment>,
    pub(super) blueprint: Arc<Blueprint>,
    pub(super) slot: SlotId,
}

impl Station {
    /// Runs a part of this station's life in a task of its own, until the workers end.
    pub(super) fn spawn<F: Future<Output = ()> + Send + 'static>(
        self,
        life: impl FnOnce(Self) -> F,
    ) {
        let environment = Arc::clone(&self.environment);
        let life = life(self);
        tokio::spawn(async move {
            tokio::select! {
                () = life => {}
                () = environment.ended() => {}
            }
        });
    }

    /// Starts a worker as it was chosen for the policy, not from the zygote of the one that it
    /// replaces.
    pub(super) async fn start(
        &self,
        replaces: Option<&Arc<Zygote>>,
    ) -> Result<Process, StartError> {
        let Self { policy, environment, blueprint, .. } = self;
        let (compiler, spec) = (&environment.compiler, &policy.spec);
        match policy.manner() {
            Manner::Fresh => start_fresh(compiler, blueprint, spec).await,
            Manner::Snapshot { practice } => {
                let practice = practice.as_deref();
                let started = start_snapshot(compiler, blueprint, spec, practice, replaces);
                started.await.map(|(process, _)| process)
            }
        }
    }

    pub(super) async fn start_and_work(self) {
        match self.start(None).await {
            Ok(process) => self.work(process).await,
            Err(error) => {
                let error = error.to_string();
                let error = shorten(&error);
                tracing::error!(policy = self.policy.name(), error, "worker can't be started");
                let slot = self.slot;
                self.report(Event::StartFailed(slot));
            }
        }
    }

    /// Gives the worker jobs until it is of no more use, then sees to its replacement.
    pub(super) async fn work(self, mut process: Process) {
        // One job at a time: the pool gives out no other before this one is finished.
        let (inbox, mut jobs) = mpsc::channel(1);
        self.policy.state().inboxes.insert(self.slot, inbox);
        self.report_alive(Event::Started(self.slot));
        let mut renewal = Renewal::new(&self, &process);
        loop {
            let job = tokio::select! {
                // A job that comes with the worker's end is for another one.
                biased;
                () = process.stirs() => match process.unasked().await {
                    Some(error) => {
                        tracing::warn!(policy = self.policy.name(), "idle {error}");
                        None
                    }
                    None => continue,
                },
                successor = renewal.successor(&self) => {
                    // The pool need not know: its next job is for this one.
                    process = successor;
                    renewal = Renewal::new(&self, &process);
                    tracing::debug!(policy = self.policy.name(), "worker is renewed");
                    continue;
                }
                job = jobs.recv() => job,
            };
            let Some(job) = job else { break };
            renewal.used();
            if !self.serve(&mut process, job).await {
                break;
            }
        }
        self.policy.state().inboxes.remove(&self.slot);
        drop(process);
        let (policy, slot) = (Arc::clone(&self.policy), self.slot);
        self.report(Event::Died(slot));
        // A job that was given to a worker just as it died has not been seen by anybody.
        if let Ok(job) = jobs.try_recv() {
            policy.submit(job);
        }
    }

    /// Whether the worker can go on.
    async fn serve(&self, process: &mut Process, job: Job) -> bool {
        let queued = job.submitted.elapsed();
        if job.reply.is_closed() {
            self.report_alive(Event::Finished(self.slot));
            return true;
        }
        if queued > QUEUE_TIME_MAX {
            drop(job.reply.send(Err(Busy::QueueTime)));
            self.report_alive(Event::Finished(self.slot));
            return true;
        }
        let question = Question::Request(&job.payload);
        tracing::debug!(policy = self.policy.name(), request_uid = job.uid, "evaluation starts");
        let in_flight = process.take_seat(&self.environment.placement);
        let (contract, time_max) = (self.blueprint.contract, self.policy.time_max);
        let done = self.policy.ask(process, contract, question, queued, time_max).await;
        drop(in_flight);
        let lost = done.answer.as_ref().err().map(ToString::to_string);
        match &lost {
            Some(error) => {
                tracing::warn!(
                    policy = self.policy.name(),
                    request_uid = job.uid,
                    error = shorten(error),
                    "worker is ended"
                );
            }
            // Before the answer: whoever gets it may ask again at once.
            None => self.report_alive(Event::Finished(self.slot)),
        }
        if let Err(Ok(unwanted)) = job.reply.send(Ok(done)) {
            // The client has left; what its request made the guest say is still news.
            unwanted.log.write(self.policy.name(), &job.uid);
        }
        lost.is_none()
    }

    /// Reports an event after which this task goes on.
    fn report_alive(&self, event: Event<Job>) {
        let action = self.policy.state().pool.handle(event);
        if let Some(Action::Dispatch(slot, job)) = action {
            self.policy.dispatch(slot, job);
        }
    }

    /// Reports an event after which this task ends, and follows the pool's decision.
    fn report(self, event: Event<Job>) {
        let action = self.policy.state().pool.handle(event);
        match action {
            Some(Action::Start(_)) => self.spawn(Self::start_and_work),
            Some(Action::StartAfter(_, delay)) => {
                self.spawn(move |station| station.wait_and_work(delay));
            }
            Some(Action::Dispatch(slot, job)) => self.policy.dispatch(slot, job),
            Some(Action::Refuse(_)) | None => {}
        }
    }

    async fn wait_and_work(self, delay: Duration) {
        tokio::time::sleep(delay).await;
        let action = self.policy.state().pool.handle(Event::RestartDue(self.slot));
        if matches!(action, Some(Action::Start(_))) {
            self.start_and_work().await;
        }
    }
}
