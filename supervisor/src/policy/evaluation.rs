//! One question to one worker, and what came of it.
#![forbid(unsafe_code)]

use std::time::Duration;

use conclave_ipc::Phase;
use conclave_ipc::limits::{LOG_LINE_BYTES_MAX, MESSAGE_BYTES_MAX, RESPONSE_BYTES_MAX};
use conclave_ipc::message::{Contract, Operation, Reply, Request};
use tokio::time::Instant;

use super::Policy;
use crate::admission::{Failure, Outcome, Payload};
use crate::guest_log::{BoundPassed, GuestLog};
use crate::host_calls::{HostAccess, HostCall};
use crate::process::{Process, WorkerError, unexpected};

/// What a worker is asked.
#[derive(Debug, Clone, Copy)]
pub(super) enum Question<'a> {
    /// About a request.
    Request(&'a Payload),
    /// About the settings that it was given.
    Settings,
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
    /// What the guest left for the log; nobody has written it yet.
    pub(crate) log: GuestLog,
}

/// What a guest said.
#[derive(Debug)]
pub(crate) enum Answer {
    /// An answer that nobody has looked at yet, and a WASI guest's stderr.
    Verdict {
        /// All that it answered.
        response: Vec<u8>,
        /// Its stderr.
        diagnostics: Vec<u8>,
        /// How long it took, in microseconds, as its worker says.
        guest_micros: u32,
    },
    /// It declared failure.
    Failure(String),
}

impl Done {
    /// The outcome for the admission logic. Every fault is one there.
    pub(crate) fn outcome(&self) -> Outcome<'_> {
        match &self.answer {
            Ok(Answer::Verdict { response, diagnostics, .. }) => {
                Outcome::Response(self.contract, answer_text(self.contract, response, diagnostics))
            }
            Ok(Answer::Failure(message)) => Outcome::Failure(self.guest_failure(message.clone())),
            Err(WorkerError::Fault { message, .. }) => {
                Outcome::Failure(self.guest_failure(message.clone()))
            }
            Err(WorkerError::Deadline) => Outcome::Failure(Failure::Deadline),
            Err(error) if error.is_for_memory() => Outcome::Failure(Failure::Unavailable(
                "the policy reached its limit of memory".to_owned(),
            )),
            // Details are for the log: they speak of processes, not of the request.
            Err(_) => {
                Outcome::Failure(Failure::Unavailable("the policy's worker was lost".to_owned()))
            }
        }
    }

    /// This, if it is about the guest and not about its worker.
    ///
    /// # Errors
    /// How the worker was lost; that is for the operator, and says nothing of the request.
    pub(crate) fn unless_lost(self) -> Result<Self, WorkerError> {
        match self.answer {
            Err(error) if !error.is_of_guest() => Err(error),
            answer => Ok(Self { answer, ..self }),
        }
    }

    /// This, unless its worker is of no more use, for whatever reason.
    ///
    /// # Errors
    /// The reason.
    pub(super) fn unless_failed(self) -> Result<Self, WorkerError> {
        let answer = self.answer?;
        Ok(Self { answer: Ok(answer), ..self })
    }

    /// How much there is to parse, in bytes.
    pub(crate) fn answer_bytes(&self) -> usize {
        match &self.answer {
            Ok(Answer::Verdict { response, diagnostics, .. }) => {
                response.len().max(diagnostics.len())
            }
            Ok(Answer::Failure(_)) | Err(_) => 0,
        }
    }

    /// What a WASI guest wrote to stderr beside its answer, as far as a log line goes.
    fn unread_diagnostics(&self) -> Option<String> {
        let Ok(Answer::Verdict { response, diagnostics, .. }) = &self.answer else { return None };
        let is_answer =
            std::ptr::eq(answer_text(self.contract, response, diagnostics), diagnostics.as_slice());
        let line = diagnostics.get(..LOG_LINE_BYTES_MAX).unwrap_or(diagnostics).trim_ascii();
        (!is_answer && !line.is_empty()).then(|| String::from_utf8_lossy(line).into_owned())
    }

    /// How long the guest took, in microseconds, as its worker says.
    pub(crate) fn guest_micros(&self) -> Option<u32> {
        match &self.answer {
            Ok(Answer::Verdict { guest_micros, .. }) => Some(*guest_micros),
            Ok(Answer::Failure(_)) | Err(_) => None,
        }
    }

    fn guest_failure(&self, message: String) -> Failure {
        match self.contract {
            Contract::Wapc => Failure::GuestCall(message),
            Contract::Wasi => Failure::GuestExit(message),
            Contract::Opa | Contract::Gatekeeper => Failure::Evaluation(message),
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

impl Policy {
    /// Puts one question to a worker, which has so much time for it. On an error the worker is of no more use.
    pub(super) async fn ask(
        &self,
        process: &mut Process,
        contract: Contract,
        question: Question<'_>,
        queued: Duration,
        time_max: Duration,
    ) -> Done {
        let started = Instant::now();
        let mut access = HostAccess::new(&self.spec.host_capabilities);
        let request = match question {
            Question::Request(payload) => payload.seen_by(contract).map(Some),
            Question::Settings => Ok(None),
        };
        let answer = match &request {
            Ok(request) => {
                let operation =
                    request.as_deref().map_or(Operation::ValidateSettings, Operation::Validate);
                process
                    .until(started + time_max, async |process| {
                        converse(process, operation, &mut access).await
                    })
                    .await
            }
            Err(why) => Ok(Answer::Failure((*why).to_owned())),
        };
        let mut done =
            Done { answer, contract, queued, worked: started.elapsed(), log: access.log };
        if let Some(stderr) = done.unread_diagnostics() {
            done.log.diagnostics(stderr);
        }
        done
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
            Reply::Verdict { id: about, response, diagnostics, guest_micros } if about == id => {
                if response.len() > RESPONSE_BYTES_MAX || diagnostics.len() > MESSAGE_BYTES_MAX {
                    return Err(violation(BoundPassed("answer beyond the limit")));
                }
                let (response, diagnostics) = (response.to_vec(), diagnostics.to_vec());
                return Ok(Answer::Verdict { response, diagnostics, guest_micros });
            }
            Reply::Trace { id: about, record } if about == id => {
                access.log.record(record).map_err(violation)?;
                continue;
            }
            Reply::Failure { id: about, message } if about == id => {
                if message.len() > MESSAGE_BYTES_MAX {
                    return Err(violation(BoundPassed("answer beyond the limit")));
                }
                return Ok(Answer::Failure(message.to_owned()));
            }
            Reply::Log { id: about, stream, text } if about == id => {
                access.log.output(stream, text).map_err(violation)?;
                continue;
            }
            Reply::HostCall { id: about, binding, namespace, operation, payload }
                if about == id =>
            {
                let call = HostCall { binding, namespace, operation, payload };
                access.answer(call).map_err(violation)?
            }
            other => return Err(unexpected(&other, Phase::Serve)),
        };
        process.send(&Request::HostAnswer(answer.as_deref().map_err(String::as_str))).await?;
    }
}

fn violation(BoundPassed(what): BoundPassed) -> WorkerError {
    WorkerError::Violation(what.to_owned())
}
