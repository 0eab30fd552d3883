//! `conclave run`: one evaluation without the daemon, through the same locked-up worker.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use conclave_ipc::limits::{GUEST_MEMORY_BYTES_DEFAULT, REQUEST_BYTES_CEILING, SETTINGS_BYTES_MAX};
use thiserror::Error;

use crate::admission::body::BodyError;
use crate::admission::request::ReviewRequest;
use crate::admission::{Failure, Origin, PostProcessing, decide};
use crate::cli::RunOptions;
use crate::config::{
    self, ConfigError, PolicyMode, PolicyName, PolicySpec, SnapshotLimits, StartMode, Warmup,
};
use crate::host_capabilities::HostCapabilities;
use crate::metadata::Execution;
use crate::policy::{Environment, LoadError, Policy, Starting};
use crate::startup::{self, StartupError};

/// The policy's name in messages and logs.
const NAME: &str = "policy";

/// For one request nothing is worth being kept.
const ONCE: Starting =
    Starting { mode: StartMode::Fresh, age_max: Duration::ZERO, uses_max: NonZeroU64::MIN };

/// Why there is no verdict.
#[derive(Debug, Error)]
pub(crate) enum RunError {
    /// The process can't run workers.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// A file can't be read.
    #[error("can't read the {what} {}: {cause}", .path.display())]
    Input { what: &'static str, path: PathBuf, cause: io::Error },
    /// The settings are not a mapping.
    #[error(transparent)]
    Settings(#[from] ConfigError),
    /// The module is not named by a file.
    #[error("{0}")]
    Module(String),
    /// The request is not one.
    #[error("{}: {cause}", .path.display())]
    Request { path: PathBuf, cause: BodyError },
    /// The policy can't be run.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The policy went away.
    #[error("{0}")]
    Failure(Failure),
    /// The worker did not become free, which can't be with one request.
    #[error("no worker became free")]
    Busy,
    /// Standard output can't be written to.
    #[error("can't write the verdict: {0}")]
    Output(io::Error),
}

/// Evaluates one request and prints the verdict.
///
/// # Errors
/// There is no verdict, and why.
pub(crate) fn run(options: &RunOptions) -> Result<(), RunError> {
    let prepared = startup::prepare(&options.workers_options.program)?;
    let body = read_request(&options.request_path)?;
    let mut request = parse_request(&body, options.raw)
        .map_err(|cause| RunError::Request { path: options.request_path.clone(), cause })?;
    let spec = policy_spec(options)?;

    let runtime = startup::runtime()?;
    let line = runtime.block_on(async {
        let execution = Execution::Chosen(options.execution_mode.clone());
        let environment =
            prepared.environment(&options.workers_options, 1, ONCE, execution, None).await?;
        let environment = Arc::new(environment);
        let line = evaluate(&environment, spec, &mut request).await;
        environment.end_workers().await;
        line
    })?;
    writeln!(io::stdout(), "{line}").map_err(RunError::Output)
}

async fn evaluate(
    environment: &Arc<Environment>,
    spec: PolicySpec,
    request: &mut ReviewRequest<'_>,
) -> Result<String, RunError> {
    let policy = Arc::new(Policy::new(spec, environment));
    policy.load(environment).await?;
    let done = policy
        .evaluate(request.take_payload(), request.uid())
        .await
        .map_err(RunError::Failure)?
        .map_err(|_busy| RunError::Busy)?;
    done.log.write(NAME, request.uid());
    let rules =
        PostProcessing { policy: NAME, monitor: false, allowed_to_mutate: true, message: None };
    let decision = decide(request, done.outcome(), &rules, Origin::Validate);
    if let Some(failure) = &decision.verdict.failure {
        tracing::warn!(
            failure = failure.to_string(),
            "the policy gave no verdict, so the request is rejected"
        );
    }
    serde_json::to_string(&decision.response).map_err(|error| RunError::Output(error.into()))
}

fn policy_spec(options: &RunOptions) -> Result<PolicySpec, RunError> {
    let settings = match (&options.settings_json, &options.settings_path) {
        (Some(json), _) => config::settings_document(Path::new("--settings-json"), json)?,
        (None, Some(path)) => {
            let text = read_bounded(path, SETTINGS_BYTES_MAX, "settings")?;
            let text = String::from_utf8(text).map_err(|error| RunError::Input {
                what: "settings",
                path: path.clone(),
                cause: io::Error::other(error),
            })?;
            config::settings_document(path, &text)?
        }
        (None, None) => "{}".to_owned(),
    };
    Ok(PolicySpec {
        name: PolicyName::parse(NAME).map_err(|error| RunError::Module(error.to_string()))?,
        module: config::module_path(Path::new(""), &options.policy)
            .map_err(|error| RunError::Module(format!("{}: {error}", options.policy)))?,
        module_url: options.policy.clone(),
        digest: None,
        mode: PolicyMode::Protect,
        allowed_to_mutate: true,
        settings,
        context_aware_resources: BTreeSet::new(),
        host_capabilities: HostCapabilities::parse(&["*".to_owned()])
            .map_err(|error| RunError::Module(error.to_string()))?,
        message: None,
        timeout: None,
        memory_bytes_max: GUEST_MEMORY_BYTES_DEFAULT,
        start: None,
        warmup: Warmup::Off,
        snapshot: SnapshotLimits::default(),
        entrypoint: options.entrypoint.clone(),
        strict_builtin_errors: false,
    })
}

fn parse_request(body: &[u8], raw: bool) -> Result<ReviewRequest<'_>, BodyError> {
    if raw { ReviewRequest::raw_value(body) } else { ReviewRequest::from_review_or_bare(body) }
}

fn read_request(path: &Path) -> Result<Vec<u8>, RunError> {
    read_bounded(path, REQUEST_BYTES_CEILING, "request")
}

/// Reads a file, or standard input for `-`, up to a limit.
fn read_bounded(path: &Path, limit: usize, what: &'static str) -> Result<Vec<u8>, RunError> {
    let failed = |cause| RunError::Input { what, path: path.to_owned(), cause };
    let source: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(path).map_err(failed)?)
    };
    let mut bytes = Vec::new();
    source.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > limit {
        return Err(failed(io::Error::other(format!("larger than the limit of {limit} bytes"))));
    }
    Ok(bytes)
}
