//! One policy at work: its code, its workers, its queue.
//!
//! The [`Pool`] decides, this file does. A worker has one task of its own that gives it
//! jobs and watches its life; nobody else talks to it.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use conclave_ipc::Role;
use conclave_ipc::layers::Layers;
use conclave_ipc::limits::GUEST_MEMORY_BYTES_DEFAULT;
use conclave_ipc::message::{Contract, FaultClass, Load, Operation, Reply, Request};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::admission::{Failure, Outcome, decide_settings};
use crate::code::{Code, CompileError, Compiler, ModuleBytes};
use crate::config::PolicySpec;
use crate::host_calls::{BoundPassed, HostAccess, HostCall};
use crate::metadata::{Execution, MetadataError};
use crate::pool::{Action, Event, Pool, SlotId};
use crate::process::{Process, WorkerError, unexpected};
use crate::sandbox::Weaker;

/// From [`Request::Load`] to [`Reply::Loaded`]: mapping code takes milliseconds.
const LOAD_TIME_MAX: Duration = Duration::from_secs(10);

/// Jobs that may wait for one policy's workers.
const QUEUE_MAX: usize = 1024;

/// How long a job may wait for a worker; the API server gives up after ten seconds.
const QUEUE_TIME_MAX: Duration = Duration::from_secs(10);

/// What holds for all policies.
#[derive(Debug)]
pub(crate) struct Environment {
    pub(crate) compiler: Compiler,
    /// Workers of each policy.
    pub(crate) workers: usize,
    /// Time of one evaluation, unless the policy has its own.
    pub(crate) time_max: Duration,
    /// What says how a module is run.
    pub(crate) execution: Execution,
}

/// Where a policy stands.
#[derive(Debug, Clone)]
enum Status {
    Starting,
    Serving(Contract),
    Failed(String),
}

/// Why a policy can't serve. `Display` is what its requests are answered.
#[derive(Debug)]
pub(crate) enum LoadError {
    /// The module can't be read.
    Module { path: String, source: std::io::Error },
    /// The module is not the one that the configuration pins.
    Digest { expected: String, actual: String },
    /// The module can't be compiled.
    Compile(CompileError),
    /// The module can't be run as a policy.
    Metadata(MetadataError),
    /// No worker can host it.
    Worker(StartError),
    /// The policy refuses its settings.
    Settings(String),
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Module { path, source } => write!(f, "bootstrap failure: can't read module {path}: {source}"),
            Self::Digest { expected, actual } => {
                write!(f, "bootstrap failure: the module's digest is {actual}, but the configuration pins {expected}")
            }
            Self::Compile(error) => write!(f, "bootstrap failure: {error}"),
            Self::Metadata(error) => write!(f, "bootstrap failure: {error}"),
            Self::Worker(error) => write!(f, "bootstrap failure: {error}"),
            Self::Settings(message) => write!(f, "Policy settings are invalid: {message}"),
        }
    }
}

impl std::error::Error for LoadError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Module { source, .. } => Some(source),
            Self::Compile(source) => Some(source),
            Self::Metadata(source) => Some(source),
            Self::Worker(source) => Some(source),
            Self::Digest { .. } | Self::Settings(_) => None,
        }
    }
}

/// Why a worker does not host the policy.
#[derive(Debug)]
pub(crate) enum StartError {
    /// The worker failed, or found the code bad.
    Worker(WorkerError),
    /// The worker is less locked up than it must be.
    Weaker(Weaker),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Worker(error) => write!(f, "{error}"),
            Self::Weaker(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for StartError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Worker(source) => Some(source),
            Self::Weaker(source) => Some(source),
        }
    }
}

impl From<WorkerError> for StartError {
    fn from(error: WorkerError) -> Self {
        Self::Worker(error)
    }
}

/// What came of a job.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) answer: Result<Answer, WorkerError>,
    pub(crate) contract: Contract,
    /// Time in the queue.
    pub(crate) queued: Duration,
    /// Time from handing the job to the worker until its answer.
    pub(crate) worked: Duration,
}

/// What a guest said.
#[derive(Debug)]
pub(crate) enum Answer {
    /// An answer that nobody has looked at yet, and a WASI guest's stderr.
    Verdict { response: Vec<u8>, diagnostics: Vec<u8> },
    /// It declared failure.
    Failure(String),
}

impl Done {
    /// The outcome for the admission logic. Every fault is one there.
    pub(crate) fn outcome(&self) -> Outcome<'_> {
        match &self.answer {
            Ok(Answer::Verdict { response, diagnostics }) => {
                Outcome::Response(self.contract, answer_text(self.contract, response, diagnostics))
            }
            Ok(Answer::Failure(message)) => Outcome::Failure(self.guest_failure(message.clone())),
            Err(WorkerError::Fault { message, .. }) => Outcome::Failure(self.guest_failure(message.clone())),
            Err(WorkerError::Deadline) => Outcome::Failure(Failure::Deadline),
            // Details are for the log: they speak of processes, not of the request.
            Err(_) => Outcome::Failure(Failure::Unavailable("the policy's worker was lost".to_owned())),
        }
    }

    fn guest_failure(&self, message: String) -> Failure {
        match self.contract {
            Contract::Wapc => Failure::GuestCall(message),
            Contract::Wasi => Failure::GuestExit(message),
        }
    }
}

/// The answer of a WASI guest is on stdout; an early description of the protocol said
/// stderr, and a guest that followed it leaves stdout empty.
fn answer_text<'a>(contract: Contract, response: &'a [u8], diagnostics: &'a [u8]) -> &'a [u8] {
    let on_stderr = matches!(contract, Contract::Wasi)
        && response.trim_ascii().is_empty()
        && serde_json::from_slice::<serde::de::IgnoredAny>(diagnostics).is_ok();
    if on_stderr { diagnostics } else { response }
}

/// Why a job was not done; the request can be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Busy {
    /// Too many jobs wait.
    QueueFull,
    /// No worker was free in time.
    QueueTime,
}

/// One request on its way to a worker.
#[derive(Debug)]
struct Job {
    payload: Vec<u8>,
    uid: String,
    submitted: Instant,
    reply: oneshot::Sender<Result<Done, Busy>>,
}

/// Everything that a further worker of this policy needs.
#[derive(Debug)]
struct Blueprint {
    code: Code,
    contract: Contract,
}

/// One policy: what the configuration says, and its workers.
#[derive(Debug)]
pub(crate) struct Policy {
    pub(crate) spec: PolicySpec,
    time_max: Duration,
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
        Self {
            time_max: spec.timeout.unwrap_or(environment.time_max),
            spec,
            state: Mutex::new(State {
                status: Status::Starting,
                pool: Pool::new(environment.workers, QUEUE_MAX),
                inboxes: HashMap::new(),
            }),
        }
    }

    fn name(&self) -> &str {
        self.spec.name.as_str()
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
            Status::Failed(why) => Some(why.clone()),
            Status::Serving(_) if state.pool.loaded() == 0 => Some("no worker is loaded".to_owned()),
            Status::Serving(_) => None,
        }
    }

    /// Why the policy will not answer at all, if so.
    fn failed(&self) -> Option<String> {
        match &self.state().status {
            Status::Failed(why) => Some(why.clone()),
            Status::Starting | Status::Serving(_) => None,
        }
    }

    /// Reads, compiles and checks the policy, and starts its workers. Returns when the
    /// policy serves, or can't.
    ///
    /// # Errors
    /// Why it can't; its requests are answered so from now on.
    pub(crate) async fn load(self: &Arc<Self>, environment: &Arc<Environment>) -> Result<(), LoadError> {
        match self.first_worker(environment).await {
            Ok((blueprint, process)) => {
                self.state().status = Status::Serving(blueprint.contract);
                self.staff(environment, Arc::new(blueprint), process);
                Ok(())
            }
            Err(error) => {
                let waiting = {
                    let mut state = self.state();
                    state.status = Status::Failed(error.to_string());
                    state.pool.drain()
                };
                // Whoever waits sees the closed channel, then the status.
                drop(waiting);
                Err(error)
            }
        }
    }

    async fn first_worker(&self, environment: &Environment) -> Result<(Blueprint, Process), LoadError> {
        let module = self.read_module().await?;
        let compiler = &environment.compiler;
        let mut code = compiler.code(&module).await.map_err(LoadError::Compile)?;
        let contract = environment
            .execution
            .contract(code.metadata.as_deref(), code.facts.shape)
            .map_err(LoadError::Metadata)?;
        let mut started = start_worker(compiler, &code, contract, &self.spec.settings).await;
        if let Err(StartError::Worker(WorkerError::Fault { class: FaultClass::BadCode, message })) = &started {
            tracing::warn!(policy = self.name(), error = message.as_str(), "cached code does not fit, compiling again");
            code = compiler.fresh_code(&module).await.map_err(LoadError::Compile)?;
            started = start_worker(compiler, &code, contract, &self.spec.settings).await;
        }
        let mut process = started.map_err(LoadError::Worker)?;
        self.check_settings(&mut process, contract).await?;
        Ok((Blueprint { code, contract }, process))
    }

    async fn read_module(&self) -> Result<ModuleBytes, LoadError> {
        let path = self.spec.module.clone();
        let read = tokio::task::spawn_blocking(move || ModuleBytes::read(&path)).await;
        let module = read.map_err(std::io::Error::other).flatten().map_err(|source| LoadError::Module {
            path: self.spec.module.display().to_string(),
            source,
        })?;
        match self.spec.digest {
            Some(expected) if expected != module.digest => Err(LoadError::Digest {
                expected: expected.to_string(),
                actual: module.digest.to_string(),
            }),
            _ => Ok(module),
        }
    }

    async fn check_settings(&self, process: &mut Process, contract: Contract) -> Result<(), LoadError> {
        let done = self.ask(process, contract, Operation::ValidateSettings, "", Duration::ZERO).await;
        let verdict = decide_settings(done.outcome());
        if verdict.valid {
            return Ok(());
        }
        Err(LoadError::Settings(verdict.message.unwrap_or_else(|| "the policy gave no reason".to_owned())))
    }

    /// Gives the pool its first worker, and starts the others.
    fn staff(self: &Arc<Self>, environment: &Arc<Environment>, blueprint: Arc<Blueprint>, first: Process) {
        let mut first = Some(first);
        let slots: Vec<_> = self.state().pool.slots().collect();
        for slot in slots {
            let station = Station {
                policy: Arc::clone(self),
                environment: Arc::clone(environment),
                blueprint: Arc::clone(&blueprint),
                slot,
            };
            match first.take() {
                Some(process) => drop(tokio::spawn(station.work(process))),
                None => drop(tokio::spawn(station.start_and_work())),
            }
        }
    }

    /// Has one request judged by a worker.
    ///
    /// # Errors
    /// No worker was free; the outer error is why there will never be one.
    pub(crate) async fn evaluate(&self, payload: Vec<u8>, uid: &str) -> Result<Result<Done, Busy>, Failure> {
        if let Some(why) = self.failed() {
            return Err(Failure::Initialisation(why));
        }
        let (reply, done) = oneshot::channel();
        let job = Job { payload, uid: uid.to_owned(), submitted: Instant::now(), reply };
        let action = self.state().pool.handle(Event::Submit(job));
        match action {
            Some(Action::Dispatch(slot, job)) => self.dispatch(slot, job),
            Some(Action::Refuse(_)) => return Ok(Err(Busy::QueueFull)),
            Some(Action::Start(_) | Action::StartAfter(..)) | None => {}
        }
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

    fn dispatch(&self, slot: SlotId, job: Job) {
        let inbox = self.state().inboxes.get(&slot).cloned();
        // A worker that has just died leaves no inbox; the job's sender sees it closed.
        drop(inbox.map(|inbox| inbox.try_send(job)));
    }

    /// Puts one question to a worker. On an error the worker is of no more use.
    async fn ask(
        &self,
        process: &mut Process,
        contract: Contract,
        operation: Operation<'_>,
        uid: &str,
        queued: Duration,
    ) -> Done {
        let started = Instant::now();
        let mut access = HostAccess::new(self.name(), uid, &self.spec.host_capabilities);
        let answer = process
            .until(started + self.time_max, async |process| converse(process, operation, &mut access).await)
            .await;
        Done { answer, contract, queued, worked: started.elapsed() }
    }
}

/// The conversation about one evaluation; every message is checked against it.
async fn converse(
    process: &mut Process,
    operation: Operation<'_>,
    access: &mut HostAccess<'_>,
) -> Result<Answer, WorkerError> {
    let id = process.next_evaluation();
    process.send(&Request::Evaluate { id, operation }).await?;
    loop {
        let answer = match process.receive().await? {
            Reply::Verdict { id: about, response, diagnostics } if about == id => {
                let (response, diagnostics) = (response.to_vec(), diagnostics.to_vec());
                return Ok(Answer::Verdict { response, diagnostics });
            }
            Reply::Failure { id: about, message } if about == id => {
                return Ok(Answer::Failure(message.to_owned()));
            }
            Reply::Log { id: about, stream, text } if about == id => {
                access.log(stream, text).map_err(violation)?;
                continue;
            }
            Reply::HostCall { id: about, binding, namespace, operation, payload } if about == id => {
                let call = HostCall { binding, namespace, operation, payload };
                access.answer(call).map_err(violation)?
            }
            other => return Err(unexpected(&other)),
        };
        process.send(&Request::HostAnswer(answer.as_deref().map_err(String::as_str))).await?;
    }
}

fn violation(BoundPassed(what): BoundPassed) -> WorkerError {
    WorkerError::Violation(what.to_owned())
}

/// Starts a worker and has it load the code.
pub(crate) async fn start_worker(
    compiler: &Compiler,
    code: &Code,
    contract: Contract,
    settings: &str,
) -> Result<Process, StartError> {
    let image = Some(code.image.as_fd());
    let (mut process, report) = Process::start(&compiler.spawner, Role::Serve, image, None).await?;
    let not_yet = Layers::NONE.with(conclave_ipc::layers::Layer::WriteExecuteDenied);
    compiler.sandbox.require(report.layers, not_yet).map_err(StartError::Weaker)?;
    let load = Load {
        contract,
        settings: settings.as_bytes(),
        runs_at_instantiation: code.facts.runs_at_instantiation,
        memory_bytes_max: GUEST_MEMORY_BYTES_DEFAULT,
    };
    let report = process
        .until(Instant::now() + LOAD_TIME_MAX, async |process| {
            process.send(&Request::Load(load)).await?;
            match process.receive().await? {
                Reply::Loaded(report) => Ok(report),
                other => Err(unexpected(&other)),
            }
        })
        .await?;
    let layers = report.layers.union(process.namespaces());
    compiler.sandbox.require(layers, Layers::NONE).map_err(StartError::Weaker)?;
    Ok(process)
}

/// One slot of a policy's pool, and what its workers are made from.
struct Station {
    policy: Arc<Policy>,
    environment: Arc<Environment>,
    blueprint: Arc<Blueprint>,
    slot: SlotId,
}

impl Station {
    async fn start_and_work(self) {
        let Blueprint { code, contract } = &*self.blueprint;
        let settings = &self.policy.spec.settings;
        match start_worker(&self.environment.compiler, code, *contract, settings).await {
            Ok(process) => self.work(process).await,
            Err(error) => {
                tracing::error!(policy = self.policy.name(), %error, "worker can't be started");
                let slot = self.slot;
                self.report(Event::StartFailed(slot));
            }
        }
    }

    /// Gives the worker jobs until it is of no more use, then sees to its replacement.
    async fn work(self, mut process: Process) {
        // One job at a time: the pool gives out no other before this one is finished.
        let (inbox, mut jobs) = mpsc::channel(1);
        self.policy.state().inboxes.insert(self.slot, inbox);
        self.report_alive(Event::Started(self.slot));
        loop {
            let job = tokio::select! {
                job = jobs.recv() => job,
                death = process.death() => {
                    tracing::warn!(policy = self.policy.name(), "idle worker {death}");
                    None
                }
            };
            let Some(job) = job else { break };
            if !self.serve(&mut process, job).await {
                break;
            }
        }
        self.policy.state().inboxes.remove(&self.slot);
        drop(process);
        let slot = self.slot;
        self.report(Event::Died(slot));
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
        let operation = Operation::Validate(&job.payload);
        let done = self.policy.ask(process, self.blueprint.contract, operation, &job.uid, queued).await;
        let lost = done.answer.as_ref().err().map(ToString::to_string);
        match &lost {
            Some(error) => {
                tracing::warn!(policy = self.policy.name(), request_uid = job.uid, error, "worker is ended");
            }
            // Before the answer: whoever gets it may ask again at once.
            None => self.report_alive(Event::Finished(self.slot)),
        }
        drop(job.reply.send(Ok(done)));
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
            Some(Action::Start(_)) => drop(tokio::spawn(self.restart(Duration::ZERO))),
            Some(Action::StartAfter(_, delay)) => drop(tokio::spawn(self.restart(delay))),
            Some(Action::Dispatch(slot, job)) => self.policy.dispatch(slot, job),
            Some(Action::Refuse(_)) | None => {}
        }
    }

    // Boxed because starting, working and restarting go round in a circle.
    fn restart(self, delay: Duration) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
                let action = self.policy.state().pool.handle(Event::RestartDue(self.slot));
                if action.is_none() {
                    return;
                }
            }
            self.start_and_work().await;
        })
    }
}
