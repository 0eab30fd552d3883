//! How a policy comes to serve: its module is read and compiled, a worker hosts it, its settings
//! are checked, and the way to start its workers is chosen.
#![forbid(unsafe_code)]

use std::io;
use std::time::Duration;

use conclave_ipc::limits::{SERVE_OVERHEAD_BYTES, ZYGOTE_PROCESSES_MAX};
use conclave_ipc::message::{Contract, FaultClass};
use thiserror::Error;
use tokio::time::Instant;

use super::choice::{Manner, Trial};
use super::evaluation::Question;
use super::station::{StartError, start_fresh};
use super::{Blueprint, Environment, Policy};
use crate::admission::body::BodyError;
use crate::admission::decide_settings;
use crate::cgroup::{Group, Limits};
use crate::code::{CompileError, ModuleBytes};
use crate::config::{PolicySpec, StartMode};
use crate::log::shorten;
use crate::metadata::MetadataError;
use crate::process::{Process, WorkerError};

/// How much longer than a request the check of settings may take, which is done once.
const SETTINGS_TIME_FACTOR: u32 = 5;

/// How much longer than the check of its settings, and a request, a guest may take to start.
const START_TIME_FACTOR: u32 = 4;

/// Why a policy can't serve. `Display` is what its requests are answered.
#[derive(Debug, Error)]
pub(crate) enum LoadError {
    /// The module can't be read.
    #[error("bootstrap failure: can't read module {path}: {cause}")]
    Module { path: String, cause: io::Error },
    /// The module is not the one that the configuration pins.
    #[error(
        "bootstrap failure: the module's digest is {actual}, but the configuration pins {expected}"
    )]
    Digest { expected: String, actual: String },
    /// The module can't be compiled.
    #[error("bootstrap failure: {0}")]
    Compile(CompileError),
    /// The module can't be run as a policy.
    #[error("bootstrap failure: {0}")]
    Metadata(MetadataError),
    /// There is no control group for its workers.
    #[error("bootstrap failure: no control group: {0}")]
    Group(io::Error),
    /// No worker can host it.
    #[error("bootstrap failure: {0}")]
    Worker(StartError),
    /// The request to start it with is none.
    #[error("bootstrap failure: warmup: {0}")]
    Warmup(BodyError),
    /// It is to be started once for all requests, and can't be.
    #[error("bootstrap failure: no snapshot can be started: {0}")]
    Snapshot(String),
    /// The configuration says what has no meaning for such a policy.
    #[error("bootstrap failure: {0}")]
    Unfit(&'static str),
    /// The policy refuses its settings.
    #[error("Policy settings are invalid: {0}")]
    Settings(String),
}

impl Policy {
    /// Reads, compiles and checks the policy, and gives its first worker.
    pub(super) async fn first_worker(
        &self,
        environment: &Environment,
    ) -> Result<(Blueprint, Process), LoadError> {
        let module = self.read_module().await?;
        let compiler = &environment.compiler;
        let code = compiler.code(&module).await.map_err(LoadError::Compile)?;
        let contract = environment
            .execution
            .contract(code.metadata.as_deref(), code.facts.shape)
            .map_err(LoadError::Metadata)?;
        require_fit(&self.spec, contract)?;
        let group = self.group(environment).map_err(LoadError::Group)?;
        let mut blueprint = Blueprint {
            code,
            contract,
            group,
            start_time_max: self.time_max,
            processes_max: processes_around_zygote(environment.workers),
            zygote: tokio::sync::Mutex::default(),
        };
        let mut started = start_fresh(compiler, &blueprint, &self.spec).await;
        if let Err(StartError::Worker(WorkerError::Fault { class: FaultClass::BadCode, message })) =
            &started
            && blueprint.code.from_cache
        {
            tracing::warn!(
                policy = self.name(),
                error = shorten(message),
                "cached code does not fit, compiling again"
            );
            blueprint.code = compiler.fresh_code(&module).await.map_err(LoadError::Compile)?;
            started = start_fresh(compiler, &blueprint, &self.spec).await;
        }
        let mut process = started.map_err(LoadError::Worker)?;
        let began = Instant::now();
        self.check_settings(environment, &mut process, contract).await?;
        // That was a start and not much more. The practice is bounded as a request is.
        blueprint.start_time_max =
            began.elapsed().saturating_mul(START_TIME_FACTOR).saturating_add(self.time_max);
        let trial = Trial { policy: self, compiler, blueprint: &blueprint };
        let (choice, process) = trial.choose(process).await?;
        if choice.manner == Manner::Fresh {
            // What was tried is of no more use.
            blueprint.zygote.get_mut().take();
        }
        choice.log(self.name());
        self.choice.get_or_init(|| choice);
        let process = match process {
            Some(process) => process,
            None => {
                start_fresh(compiler, &blueprint, &self.spec).await.map_err(LoadError::Worker)?
            }
        };
        Ok((blueprint, process))
    }

    /// The control group of this policy's workers, if there are any. What it bounds together
    /// is what the limits of each process bound one by one.
    fn group(&self, environment: &Environment) -> io::Result<Option<Group>> {
        let workers = environment.workers as u64;
        // With a snapshot, one more is started beside the others to replace one of them, and
        // the state that is kept takes as much again as the guest's memory.
        let (beside, memories) = match self.starting.mode {
            StartMode::Fresh => (0, 1),
            StartMode::Auto | StartMode::Snapshot => (1, 2),
        };
        let zygotes = 2 * beside;
        let memory = self.spec.memory_bytes_max.saturating_mul(memories);
        let one = memory.saturating_add(SERVE_OVERHEAD_BYTES);
        let limits = Limits {
            memory_bytes: workers.saturating_add(beside).saturating_mul(one),
            // A worker that was killed counts until it is reaped, beside its successor.
            processes: workers.saturating_mul(2).saturating_add(beside + zygotes),
        };
        let delegation = environment.delegation.as_ref();
        delegation.map(|groups| groups.for_policy(self.name(), limits)).transpose()
    }

    async fn read_module(&self) -> Result<ModuleBytes, LoadError> {
        let path = self.spec.module.clone();
        let read = tokio::task::spawn_blocking(move || ModuleBytes::read(&path)).await;
        let module = read.map_err(io::Error::other).flatten().map_err(|cause| {
            LoadError::Module { path: self.spec.module.display().to_string(), cause }
        })?;
        match self.spec.digest {
            Some(expected) if expected != module.digest => Err(LoadError::Digest {
                expected: expected.to_string(),
                actual: module.digest.to_string(),
            }),
            _ => Ok(module),
        }
    }

    async fn check_settings(
        &self,
        environment: &Environment,
        process: &mut Process,
        contract: Contract,
    ) -> Result<(), LoadError> {
        // No client waits for it, and a guest that is started once is slow only now.
        let time_max = self.time_max.saturating_mul(SETTINGS_TIME_FACTOR);
        let question = Question::Settings;
        let done = self.ask(process, contract, question, Duration::ZERO, time_max).await;
        done.log.write(self.name(), "");
        let done = if contract.is_rego() { done.unless_failed() } else { done.unless_lost() };
        let done = done.map_err(|error| LoadError::Worker(error.into()))?;
        let verdict = environment
            .placement
            .at_length(done.answer_bytes(), || decide_settings(done.outcome()));
        if verdict.valid {
            return Ok(());
        }
        let reason = verdict.message.unwrap_or_else(|| "the policy gave no reason".to_owned());
        Err(LoadError::Settings(shorten(&reason).to_owned()))
    }
}

/// The processes that a zygote needs: itself, and workers, of which one that was killed counts
/// beside its successor until it is reaped. What it could make more is what native code could
/// take processor time with that nobody asked for.
fn processes_around_zygote(workers: usize) -> u16 {
    let processes = u16::try_from(workers.saturating_mul(2).saturating_add(1));
    processes.unwrap_or(u16::MAX).min(ZYGOTE_PROCESSES_MAX)
}

/// Checks what the configuration says that is for policies of one kind only.
fn require_fit(spec: &PolicySpec, contract: Contract) -> Result<(), LoadError> {
    let rego_only = spec.entrypoint.is_some() || spec.strict_builtin_errors;
    match (contract.is_rego(), rego_only, spec.context_aware_resources.is_empty()) {
        (false, true, _) => {
            Err(LoadError::Unfit("entrypoint and strictBuiltinErrors are for Rego policies"))
        }
        // They would be part of its data; without them it would see an empty cluster.
        (true, _, false) => Err(LoadError::Unfit(
            "contextAwareResources are not available to Rego policies in this version",
        )),
        (false, false, _) | (true, _, true) => Ok(()),
    }
}
