//! Whether a policy's guest is started once or for every request: tried and measured when the
//! policy is loaded, and kept for all its workers.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use super::evaluation::{Answer, Question};
use super::station::{StartError, start_snapshot};
use super::{Blueprint, LoadError, Policy};
use crate::admission::Payload;
use crate::code::Compiler;
use crate::config::StartMode;
use crate::log::shorten;
use crate::metadata::judges_raw_requests;
use crate::process::{Process, WorkerError};
use crate::warmup;

/// Evaluations that are measured on each side, at most.
const EVALUATIONS_MAX: usize = 5;

/// Of a snapshot: the first one continues from where it was started, the second one from a
/// state that was set back.
const SNAPSHOT_EVALUATIONS_MIN: usize = 2;

/// No further evaluation is measured after this time.
const MEASURING_TIME_MAX: Duration = Duration::from_millis(100);

/// What one of them may take, if the policy's own limit is not lower: the policy does not
/// serve meanwhile.
const PRACTICE_TIME_MAX: Duration = Duration::from_secs(2);

/// A start that takes longer is worth being kept, even if nothing else is known.
const START_MICROS_WORTH: u32 = 1000;

/// How the guests of a policy's workers come to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Manner {
    /// Each request has an instance of its own.
    Fresh,
    /// The guest is started once and every request continues from there.
    Snapshot {
        /// What it judges for practice before its state is kept.
        practice: Option<Vec<u8>>,
    },
}

/// What was chosen, and why.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) manner: Manner,
    reason: String,
    /// How long the guest took to start.
    start_micros: Option<u32>,
    /// What an evaluation took from there.
    snapshot_micros: Option<u32>,
    /// What one took from the very start.
    fresh_micros: Option<u32>,
}

impl Choice {
    fn fresh(reason: String, fresh_micros: Option<u32>) -> Self {
        let (start_micros, snapshot_micros) = (None, None);
        Self { manner: Manner::Fresh, reason, start_micros, snapshot_micros, fresh_micros }
    }

    pub(super) fn log(&self, policy: &str) {
        tracing::info!(
            policy,
            start = match self.manner {
                Manner::Fresh => "fresh",
                Manner::Snapshot { .. } => "snapshot",
            },
            reason = shorten(&self.reason),
            start_us = self.start_micros,
            snapshot_us = self.snapshot_micros,
            fresh_us = self.fresh_micros,
            "way to start chosen"
        );
    }
}

/// A worker whose guest is started.
struct Snapshot {
    process: Process,
    start_micros: u32,
    practice: Option<Vec<u8>>,
}

/// What was measured, and the worker if it is still of use.
struct Measured {
    micros: Option<u32>,
    worker: Result<Process, WorkerError>,
}

/// A policy that is being loaded.
pub(super) struct Trial<'a> {
    pub(super) policy: &'a Policy,
    pub(super) compiler: &'a Compiler,
    pub(super) blueprint: &'a Blueprint,
}

impl Trial<'_> {
    /// Chooses how workers are started. `fresh` is one that starts its guest for every
    /// request; what is given back is one that was started as chosen, if such a one is left.
    ///
    /// # Errors
    /// The policy is to be started in a way in which it can't.
    pub(super) async fn choose(
        &self,
        fresh: Process,
    ) -> Result<(Choice, Option<Process>), LoadError> {
        let mode = self.policy.starting.mode;
        if mode == StartMode::Fresh {
            return Ok((Choice::fresh("as configured".to_owned(), None), Some(fresh)));
        }
        let code = &self.blueprint.code;
        let request = warmup::request(
            &self.policy.spec.warmup,
            judges_raw_requests(code.metadata.as_deref()),
        )
        .map_err(LoadError::Warmup)?;
        if let Some(obstacle) = code.facts.obstacle {
            return self.without_snapshot(obstacle.describe().to_owned(), None, Some(fresh));
        }
        // First without a snapshot: a request that its guest does not answer is none to
        // practise with, and this worker has a deadline for it. A guest that is slow to start
        // may still answer in time once it is started.
        let fresh = self.measure(fresh, request.as_ref(), 1).await;
        let contract = self.blueprint.contract;
        let practice = request
            .as_ref()
            .filter(|_| fresh.micros.is_some())
            .and_then(|request| request.seen_by(contract).ok())
            .map(Cow::into_owned);
        let slow = matches!(fresh.worker, Err(WorkerError::Deadline));
        let request = request.filter(|_| practice.is_some() || slow);
        let snapshot = match self.start(practice).await {
            Ok(snapshot) => snapshot,
            Err(error) => {
                if let (StartMode::Auto, StartError::Worker(error)) = (mode, &error) {
                    self.warn_if_lost(error);
                }
                return self.without_snapshot(error.to_string(), fresh.micros, fresh.worker.ok());
            }
        };
        let reason = if mode == StartMode::Snapshot {
            "as configured"
        } else if contract.is_rego() {
            // Either way a request continues from there; this way it is done once for all.
            "data is loaded once"
        } else {
            return Ok(self.compare(fresh, snapshot, request.as_ref()).await);
        };
        end(fresh.worker).await;
        Ok(settle(snapshot, reason.to_owned()))
    }

    /// What becomes of a policy that can't be started once for all requests.
    fn without_snapshot(
        &self,
        reason: String,
        fresh_micros: Option<u32>,
        fresh: Option<Process>,
    ) -> Result<(Choice, Option<Process>), LoadError> {
        match self.policy.starting.mode {
            StartMode::Snapshot => Err(LoadError::Snapshot(shorten(&reason).to_owned())),
            StartMode::Auto | StartMode::Fresh => Ok((Choice::fresh(reason, fresh_micros), fresh)),
        }
    }

    /// Starts a guest once for all requests, without practice if it fails with it.
    async fn start(&self, practice: Option<Vec<u8>>) -> Result<Snapshot, StartError> {
        let can_do_without = practice.is_some();
        let mut started = self.start_with(practice).await;
        if can_do_without && matches!(started, Err(StartError::Worker(WorkerError::Fault { .. }))) {
            started = self.start_with(None).await;
        }
        started
    }

    async fn start_with(&self, practice: Option<Vec<u8>>) -> Result<Snapshot, StartError> {
        let Self { policy, compiler, blueprint } = self;
        let started = start_snapshot(compiler, blueprint, &policy.spec, practice.as_deref(), None);
        let (process, start_micros) = started.await?;
        Ok(Snapshot { process, start_micros: start_micros.unwrap_or_default(), practice })
    }

    /// A worker that did not end by its guest's doing is news, even if another way is found.
    fn warn_if_lost(&self, error: &WorkerError) {
        if !error.is_of_guest() {
            let error = error.to_string();
            let error = shorten(&error);
            tracing::warn!(policy = self.policy.name(), error, "worker was lost on trial");
        }
    }

    /// The faster one of two workers.
    async fn compare(
        &self,
        fresh: Measured,
        snapshot: Snapshot,
        request: Option<&Payload>,
    ) -> (Choice, Option<Process>) {
        let Snapshot { process, start_micros, practice } = snapshot;
        let measured = self.measure(process, request, SNAPSHOT_EVALUATIONS_MIN).await;
        let fresh_micros = fresh.micros;
        let process = match measured.worker {
            Ok(process) => process,
            Err(error) => {
                let reason = match error {
                    WorkerError::Deadline => {
                        "it does not answer the practice request in time".to_owned()
                    }
                    error => format!("a started guest failed: {error}"),
                };
                return (Choice::fresh(reason, fresh_micros), fresh.worker.ok());
            }
        };
        let snapshot_micros = measured.micros;
        let (is_better, reason) = is_better(snapshot_micros, fresh_micros, start_micros);
        let start_micros = Some(start_micros);
        let (manner, process) = if is_better {
            end(fresh.worker).await;
            (Manner::Snapshot { practice }, Some(process))
        } else {
            process.end().await;
            (Manner::Fresh, fresh.worker.ok())
        };
        (Choice { manner, reason, start_micros, snapshot_micros, fresh_micros }, process)
    }

    /// Has a request judged a few times, and gives what it took as a rule. What the guest
    /// says meanwhile is dropped: no client has asked.
    async fn measure(
        &self,
        mut worker: Process,
        request: Option<&Payload>,
        evaluations_min: usize,
    ) -> Measured {
        let Some(request) = request else { return Measured { micros: None, worker: Ok(worker) } };
        let (contract, began) = (self.blueprint.contract, Instant::now());
        let time_max = self.policy.time_max.min(PRACTICE_TIME_MAX);
        let mut micros = Vec::new();
        while micros.len() < EVALUATIONS_MAX
            && (micros.len() < evaluations_min || began.elapsed() < MEASURING_TIME_MAX)
        {
            let question = Question::Request(request);
            let done =
                self.policy.ask(&mut worker, contract, question, Duration::ZERO, time_max).await;
            match done.answer {
                // Not longer than it took by our own clock, whatever the worker says.
                Ok(answer) => {
                    let worked = u32::try_from(done.worked.as_micros()).unwrap_or(u32::MAX);
                    micros.push(match answer {
                        Answer::Verdict { guest_micros, .. } => guest_micros.min(worked),
                        Answer::Failure(_) => worked,
                    });
                }
                Err(error) => {
                    self.warn_if_lost(&error);
                    worker.end().await;
                    return Measured { micros: median(micros), worker: Err(error) };
                }
            }
        }
        Measured { micros: median(micros), worker: Ok(worker) }
    }
}

/// Ends a worker that is not needed, if it lives.
async fn end(worker: Result<Process, WorkerError>) {
    if let Ok(process) = worker {
        process.end().await;
    }
}

fn settle(snapshot: Snapshot, reason: String) -> (Choice, Option<Process>) {
    let Snapshot { process, start_micros, practice } = snapshot;
    let choice = Choice {
        manner: Manner::Snapshot { practice },
        reason,
        start_micros: Some(start_micros),
        snapshot_micros: None,
        fresh_micros: None,
    };
    (choice, Some(process))
}

/// Whether a snapshot is better, and the reason.
fn is_better(snapshot: Option<u32>, fresh: Option<u32>, start: u32) -> (bool, String) {
    match (snapshot, fresh) {
        (Some(snapshot), Some(fresh)) => {
            let (faster, slower) = (snapshot.min(fresh), snapshot.max(fresh));
            (snapshot < fresh, format!("measured {} against {}", Micros(faster), Micros(slower)))
        }
        (None, Some(_)) => (false, "a started guest does not answer the request".to_owned()),
        (Some(snapshot), None) => {
            (true, format!("measured {}; otherwise no answer in time", Micros(snapshot)))
        }
        (None, None) => {
            (start > START_MICROS_WORTH, format!("not measured; a start takes {}", Micros(start)))
        }
    }
}

fn median(mut values: Vec<u32>) -> Option<u32> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

/// A time for people.
struct Micros(u32);

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = f64::from(self.0) / 1000.0;
        match self.0 {
            0..1000 => write!(f, "{} µs", self.0),
            1000..100_000 => write!(f, "{millis:.1} ms"),
            100_000.. => write!(f, "{millis:.0} ms"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_faster_one_is_better_and_a_tie_is_not() {
        let (better, reason) = is_better(Some(1900), Some(190_000), 9);
        assert_eq!((better, reason.as_str()), (true, "measured 1.9 ms against 190 ms"));
        let (better, reason) = is_better(Some(90), Some(59), 1_000_000);
        assert_eq!((better, reason.as_str()), (false, "measured 59 µs against 90 µs"));
        assert!(!is_better(Some(59), Some(59), 1_000_000).0);
    }

    #[test]
    fn a_snapshot_that_does_not_answer_what_a_fresh_one_answers_is_no_better() {
        assert!(!is_better(None, Some(u32::MAX), u32::MAX).0);
    }

    #[test]
    fn without_a_measure_a_snapshot_is_better_if_starting_takes_long() {
        assert!(!is_better(None, None, START_MICROS_WORTH).0);
        let (better, reason) = is_better(None, None, START_MICROS_WORTH + 500);
        assert_eq!((better, reason.as_str()), (true, "not measured; a start takes 1.5 ms"));
    }

    #[test]
    fn the_median_is_not_moved_by_one_slow_evaluation() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![7]), Some(7));
        assert_eq!(median(vec![900_000, 60, 58, 61, 59]), Some(60));
    }
}
