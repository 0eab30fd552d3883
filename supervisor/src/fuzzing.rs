//! What fuzzing reaches: the parts of the supervisor that read foreign bytes, as functions
//! from plain values to plain values. This module is there in builds for fuzzing only; what
//! has to hold is said, and checked, by the targets in `fuzz`.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use conclave_ipc::message::{Contract, ModuleShape};

use crate::admission::request::ReviewRequest;
use crate::admission::response::{raw_body, review_body};
use crate::admission::{self, Origin, Outcome, PostProcessing};
use crate::config::{self, PolicySpec};
use crate::http;
use crate::metadata::Execution;

/// One policy of a configuration, in the parts that anybody may bound.
#[derive(Debug)]
pub struct Policy {
    /// Its name.
    pub name: String,
    /// Its module's file.
    pub module: PathBuf,
    /// Its settings, as JSON.
    pub settings: String,
    /// Time of one evaluation.
    pub timeout: Option<Duration>,
}

impl From<PolicySpec> for Policy {
    fn from(spec: PolicySpec) -> Self {
        Self {
            name: spec.name.to_string(),
            module: spec.module,
            settings: spec.settings,
            timeout: spec.timeout,
        }
    }
}

/// Reads a policies.yml.
///
/// # Errors
/// The message for the operator.
pub fn policies(path: &Path, text: &str) -> Result<Vec<Policy>, String> {
    match config::parse(path, text) {
        Ok(policies) => Ok(policies.into_iter().map(Policy::from).collect()),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads a settings document.
///
/// # Errors
/// The message for the operator.
pub fn settings(path: &Path, text: &str) -> Result<String, String> {
    config::settings_document(path, text).map_err(|error| error.to_string())
}

/// What says how a module is run.
#[derive(Debug, Clone, Copy)]
pub enum Use<'a> {
    /// Its metadata, for the daemon.
    Serve,
    /// The caller's word, the metadata or the exports, for a single run.
    Run(Option<&'a str>, ModuleShape),
}

/// The contract to run a module by.
///
/// # Errors
/// The message for the operator.
pub fn contract(used: Use<'_>, metadata: &[u8]) -> Result<Contract, String> {
    let (execution, shape) = match used {
        Use::Serve => (Execution::Metadata, ModuleShape::Unknown),
        Use::Run(mode, shape) => (Execution::Chosen(mode.map(str::to_owned)), shape),
    };
    execution.contract(Some(metadata), shape).map_err(|error| error.to_string())
}

/// The endpoint and the policy that a request is for; nothing for endpoints that do not judge.
///
/// # Errors
/// Status and message for the client.
pub fn route(method: &str, path: &str) -> Result<Option<(&'static str, String)>, (u16, String)> {
    http::routed(method, path)
}

/// How a body is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// An `AdmissionReview`.
    Review,
    /// An `AdmissionRequest`.
    Bare,
    /// Either of the two.
    ReviewOrBare,
    /// Any value under `request`.
    Raw,
    /// Any value.
    RawValue,
}

impl Form {
    fn read(self, body: &[u8]) -> Result<ReviewRequest<'_>, String> {
        match self {
            Self::Review => ReviewRequest::from_review(body),
            Self::Bare => ReviewRequest::from_bare(body),
            Self::ReviewOrBare => ReviewRequest::from_review_or_bare(body),
            Self::Raw => ReviewRequest::raw(body),
            Self::RawValue => ReviewRequest::raw_value(body),
        }
        .map_err(|error| error.to_string())
    }
}

/// A body as it was read.
#[derive(Debug)]
pub struct Request {
    /// What the answer has to repeat.
    pub uid: String,
    /// What it is about.
    pub namespace: Option<String>,
    /// What the policy sees.
    pub payload: Vec<u8>,
}

/// Reads the body of an HTTP request.
///
/// # Errors
/// The message for the client.
pub fn request(form: Form, body: &[u8]) -> Result<Request, String> {
    let request = form.read(body)?;
    Ok(Request {
        uid: request.uid().to_owned(),
        namespace: request.namespace().map(str::to_owned),
        payload: request.payload().to_vec(),
    })
}

/// How an answer is judged.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// By which contract the policy answered.
    pub contract: Contract,
    /// Whether an audit asks.
    pub audit: bool,
    /// Whether the policy only watches.
    pub monitor: bool,
    /// Whether the policy may change objects.
    pub allowed_to_mutate: bool,
    /// What to tell users instead of the policy's own message.
    pub message: Option<&'a str>,
}

/// What became of an answer.
#[derive(Debug)]
pub struct Decision {
    /// The body for the client.
    pub body: Vec<u8>,
    /// Whether the request would have passed without the configuration's word.
    pub allowed: bool,
    /// Why the answer is no verdict, if it is none.
    pub failure: Option<String>,
}

/// Decides what a policy's answer means for a request.
///
/// # Errors
/// The body is no request.
pub fn decide(
    form: Form,
    body: &[u8],
    answer: &[u8],
    rules: &Rules<'_>,
) -> Result<Decision, String> {
    let request = form.read(body)?;
    let post_processing = PostProcessing {
        policy: "p",
        monitor: rules.monitor,
        allowed_to_mutate: rules.allowed_to_mutate,
        message: rules.message,
    };
    let origin = if rules.audit { Origin::Audit } else { Origin::Validate };
    let outcome = Outcome::Response(rules.contract, answer);
    let decision = admission::decide(&request, outcome, &post_processing, origin);
    let body = match form {
        Form::Review | Form::Bare | Form::ReviewOrBare => review_body(&decision.response),
        Form::Raw | Form::RawValue => raw_body(&decision.response),
    };
    let failure = decision.verdict.failure.map(|failure| failure.to_string());
    Ok(Decision { body, allowed: decision.verdict.allowed, failure })
}

/// Whether a policy's answer about its settings says that they are valid; else why not.
#[must_use]
pub fn decide_settings(contract: Contract, answer: &[u8]) -> (bool, Option<String>) {
    let decided = admission::decide_settings(Outcome::Response(contract, answer));
    (decided.valid, decided.message)
}
