//! One policy at work: its code, its workers, its queue.
//!
//! The [`Pool`] decides, this file does. A worker has one task of its own that gives it
//! jobs and watches its life; nobody else talks to it.
#![forbid(unsafe_code)]

mod choice;
mod evaluation;
mod load;
mod renewal;
mod station;

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use conclave_ipc::message::Contract;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::admission::{Failure, Payload};
use crate::cgroup::{Delegation, Group};
use crate::code::{Code, Compiler};
use crate::config::{PolicySpec, StartMode};
use crate::log::shorten;
use crate::metadata::Execution;
use crate::placement::Placement;
use crate::pool::{Action, Event, Pool, SlotId};
use crate::process::Process;
use crate::zygote::Zygote;

use choice::{Choice, Manner};
pub(crate) use evaluation::Done;
pub(crate) use load::LoadError;
use station::Station;

/// Jobs that may wait for one policy's workers.
const QUEUE_MAX: usize = 1024;

/// How long a job may wait for a worker; the API server gives up after ten seconds.
const QUEUE_TIME_MAX: Duration = Duration::from_secs(10);

/// How guests are started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Starting {
    pub(crate) mode: StartMode,
    /// How long the state of a started guest is used.
    pub(crate) age_max: Duration,
    /// How often it is used.
    pub(crate) uses_max: NonZeroU64,
}

/// What holds for all policies.
#[derive(Debug)]
pub(crate) struct Environment {
    pub(crate) compiler: Compiler,
    /// The control groups that workers are born into.
    pub(crate) delegation: Option<Delegation>,
    /// Workers of each policy.
    pub(crate) workers: usize,
    /// Time of one evaluation, unless the policy has its own.
    pub(crate) time_max: Duration,
    /// How guests are started, unless the policy says otherwise.
    pub(crate) starting: Starting,
    /// What says how a module is run.
    pub(crate) execution: Execution,
    /// Where evaluations run.
    pub(crate) placement: Placement,
    /// Becomes true when all workers are to end.
    pub(crate) ending: watch::Sender<bool>,
}

impl Environment {
    /// Ends every worker, whatever it is doing, and returns when all are gone.
    pub(crate) async fn end_workers(&self) {
        self.ending.send_replace(true);
        if let Some(delegation) = &self.delegation {
            delegation.kill_workers();
        }
        self.compiler.spawner.living().none().await;
    }

    async fn ended(&self) {
        // The sender lives as long as we do, so there is no error.
        drop(self.ending.subscribe().wait_for(|ending| *ending).await);
    }
}

/// Where a policy stands.
#[derive(Debug, Clone)]
enum Status {
    Starting,
    Serving,
    /// The daemon ends before the policy served.
    Stopping,
    Failed(String),
}

/// Why a job was not done; the request can be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Busy {
    /// Too many jobs wait.
    QueueFull,
    /// No worker was free in time.
    QueueTime,
    /// The daemon stops before the policy serves.
    Stopping,
}

/// One request on its way to a worker.
#[derive(Debug)]
struct Job {
    payload: Payload,
    /// As the log names the request.
    uid: String,
    submitted: Instant,
    reply: oneshot::Sender<Result<Done, Busy>>,
}

/// Everything that a further worker of this policy needs.
#[derive(Debug)]
struct Blueprint {
    code: Arc<Code>,
    contract: Contract,
    /// The control group of the policy's workers.
    group: Option<Group>,
    /// What starting a guest once may take.
    start_time_max: Duration,
    /// How many processes there may be around a zygote, itself included.
    processes_max: u16,
    /// What workers are forked from, if they are.
    zygote: tokio::sync::Mutex<Option<Arc<Zygote>>>,
}

/// One policy: what the configuration says, and its workers.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) spec: PolicySpec,
    time_max: Duration,
    starting: Starting,
    /// How its workers are started; empty until it serves.
    choice: OnceLock<Choice>,
    /// Taken by whoever starts a worker beside one that serves.
    renewals: Semaphore,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    status: Status,
    pool: Pool<Job>,
    inboxes: HashMap<SlotId, mpsc::Sender<Job>>,
}

impl Policy {
    pub(crate) fn new(spec: PolicySpec, environment: &Environment) -> Self {
        let defaults = environment.starting;
        Self {
            time_max: spec.timeout.unwrap_or(environment.time_max),
            starting: Starting {
                mode: spec.start.unwrap_or(defaults.mode),
                age_max: spec.snapshot.age_max.unwrap_or(defaults.age_max),
                uses_max: spec.snapshot.uses_max.unwrap_or(defaults.uses_max),
            },
            choice: OnceLock::new(),
            renewals: Semaphore::new(1),
            spec,
            state: Mutex::new(State {
                status: Status::Starting,
                pool: Pool::new(environment.workers, QUEUE_MAX),
                inboxes: HashMap::new(),
            }),
        }
    }

    /// Answers the jobs that wait for a policy which does not serve yet and now never will.
    pub(crate) fn turn_away_waiting(&self) {
        let mut state = self.state();
        if matches!(state.status, Status::Starting) {
            state.status = Status::Stopping;
            for job in state.pool.drain() {
                // A client that left needs no answer.
                drop(job.reply.send(Err(Busy::Stopping)));
            }
        }
    }

    fn name(&self) -> &str {
        self.spec.name.as_str()
    }

    /// How its workers are started.
    fn manner(&self) -> &Manner {
        self.choice.get().map_or(&Manner::Fresh, |choice| &choice.manner)
    }

    // A panic ends the process (release) or the task that holds no lock any more.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the policy can't answer now; `None` if at least one worker is loaded.
    pub(crate) fn unready(&self) -> Option<String> {
        let state = self.state();
        match &state.status {
            Status::Starting => Some("starting".to_owned()),
            Status::Stopping => Some("stopping".to_owned()),
            Status::Failed(why) => Some(why.clone()),
            Status::Serving if state.pool.loaded() == 0 => Some("no worker is loaded".to_owned()),
            Status::Serving => None,
        }
    }

    /// Why the policy will not answer at all, if so.
    fn failed(&self) -> Option<String> {
        match &self.state().status {
            Status::Failed(why) => Some(why.clone()),
            Status::Starting | Status::Serving | Status::Stopping => None,
        }
    }

    /// Reads, compiles and checks the policy, and starts its workers. Returns when the
    /// policy serves, or can't.
    ///
    /// # Errors
    /// Why it can't; its requests are answered so from now on.
    pub(crate) async fn load(
        self: &Arc<Self>,
        environment: &Arc<Environment>,
    ) -> Result<(), LoadError> {
        match self.first_worker(environment).await {
            Ok((blueprint, process)) => {
                self.state().status = Status::Serving;
                self.staff(environment, &Arc::new(blueprint), process);
                Ok(())
            }
            Err(error) => {
                let waiting = {
                    let mut state = self.state();
                    state.status = Status::Failed(shorten(&error.to_string()).to_owned());
                    state.pool.drain()
                };
                // Whoever waits sees the closed channel, then the status.
                drop(waiting);
                Err(error)
            }
        }
    }

    /// Gives the pool its first worker, and starts the others.
    fn staff(
        self: &Arc<Self>,
        environment: &Arc<Environment>,
        blueprint: &Arc<Blueprint>,
        first: Process,
    ) {
        let mut first = Some(first);
        let slots: Vec<_> = self.state().pool.slots().collect();
        for slot in slots {
            let station = Station {
                policy: Arc::clone(self),
                environment: Arc::clone(environment),
                blueprint: Arc::clone(blueprint),
                slot,
            };
            match first.take() {
                Some(process) => station.spawn(|station| station.work(process)),
                None => station.spawn(Station::start_and_work),
            }
        }
    }

    /// Has one request judged by a worker.
    ///
    /// # Errors
    /// No worker was free; the outer error is why there will never be one.
    pub(crate) async fn evaluate(
        &self,
        payload: Payload,
        uid: &str,
    ) -> Result<Result<Done, Busy>, Failure> {
        if let Some(why) = self.failed() {
            return Err(Failure::Initialisation(why));
        }
        if matches!(self.state().status, Status::Stopping) {
            return Ok(Err(Busy::Stopping));
        }
        let (reply, done) = oneshot::channel();
        self.submit(Job {
            payload,
            uid: shorten(uid).to_owned(),
            submitted: Instant::now(),
            reply,
        });
        // A worker that has the job answers within the policy's time, or is ended.
        match tokio::time::timeout(QUEUE_TIME_MAX.saturating_add(self.time_max), done).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(_closed)) => Err(match self.failed() {
                Some(why) => Failure::Initialisation(why),
                None => Failure::Unavailable("the policy's worker was lost".to_owned()),
            }),
            Err(_elapsed) => Ok(Err(Busy::QueueTime)),
        }
    }

    /// Gives the job to a worker, or has it wait for one, or refuses it.
    fn submit(&self, job: Job) {
        let action = self.state().pool.handle(Event::Submit(job));
        match action {
            Some(Action::Dispatch(slot, job)) => self.dispatch(slot, job),
            // A client that left needs no answer.
            Some(Action::Refuse(job)) => drop(job.reply.send(Err(Busy::QueueFull))),
            Some(Action::Start(_) | Action::StartAfter(..)) | None => {}
        }
    }

    fn dispatch(&self, slot: SlotId, job: Job) {
        let inbox = self.state().inboxes.get(&slot).cloned();
        // A worker that has just died leaves no inbox; the job's sender sees it closed.
        drop(inbox.map(|inbox| inbox.try_send(job)));
    }
}
