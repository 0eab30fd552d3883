//! One question to one worker, and what came of it.
#![forbid(unsafe_code)]

use std::time::Duration;

use conclave_ipc::message::{Contract, Operation, Reply, Request};
use tokio::time::Instant;

use super::Policy;
use crate::admission::{Failure, Outcome};
use crate::host_calls::{BoundPassed, HostAccess, HostCall};
use crate::process::{Process, WorkerError, unexpected};

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
            Err(WorkerError::Fault { message, .. }) => {
                Outcome::Failure(self.guest_failure(message.clone()))
            }
            Err(WorkerError::Deadline) => Outcome::Failure(Failure::Deadline),
            // Details are for the log: they speak of processes, not of the request.
            Err(_) => {
                Outcome::Failure(Failure::Unavailable("the policy's worker was lost".to_owned()))
            }
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

impl Policy {
    /// Puts one question to a worker. On an error the worker is of no more use.
    pub(super) async fn ask(
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
            .until(started + self.time_max, async |process| {
                converse(process, operation, &mut access).await
            })
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
            Reply::HostCall { id: about, binding, namespace, operation, payload }
                if about == id =>
            {
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
