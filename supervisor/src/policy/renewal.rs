//! When a worker whose guest is started is replaced: what a guest has become is not kept for
//! ever. Its successor is started beside it, and it serves until then.
#![forbid(unsafe_code)]

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::Starting;
use super::choice::Manner;
use super::station::{StartError, Station};
use crate::log::shorten;
use crate::process::Process;
use crate::zygote::Zygote;

/// Wait after a successor could not be started.
const RETRY_PAUSE: Duration = Duration::from_secs(10);

/// The successor of one worker, from the time that it is due.
pub(super) struct Renewal {
    /// Never, without a state to be renewed.
    due: Option<Instant>,
    uses_left: u64,
    /// What the worker was forked from, which is as old as its state.
    old: Option<Arc<Zygote>>,
    /// At most one, aborted when dropped.
    starting: JoinSet<Result<Process, StartError>>,
}

impl Renewal {
    /// Of a worker that was just started.
    pub(super) fn new(station: &Station, worker: &Process) -> Self {
        let Starting { age_max, uses_max, .. } = station.policy.starting;
        let due = match station.policy.manner() {
            Manner::Fresh => None,
            Manner::Snapshot { .. } => Instant::now().checked_add(jittered(age_max, chance())),
        };
        let old = worker.zygote().cloned();
        Self { due, uses_left: uses_max.get(), old, starting: JoinSet::new() }
    }

    /// Counts a job.
    pub(super) fn used(&mut self) {
        self.uses_left = self.uses_left.saturating_sub(1);
        if self.uses_left == 0
            && let Some(due) = &mut self.due
        {
            *due = Instant::now().min(*due);
        }
    }

    /// The successor, once it is due and ready. Can be dropped and called again.
    pub(super) async fn successor(&mut self, station: &Station) -> Process {
        let Some(due) = &mut self.due else { return std::future::pending().await };
        loop {
            if self.starting.is_empty() {
                sleep_until(*due).await;
                self.starting.spawn(start(station, self.old.clone()));
            }
            match self.starting.join_next().await {
                Some(Ok(Ok(process))) => return process,
                Some(Ok(Err(error))) => {
                    let error = error.to_string();
                    let (policy, error) = (station.policy.name(), shorten(&error));
                    tracing::warn!(policy, error, "worker can't be renewed yet");
                }
                // A panic was told of by whoever panicked.
                Some(Err(_)) | None => {}
            }
            *due = Instant::now() + RETRY_PAUSE;
        }
    }
}

/// Starts a worker beside those that there are, in turn with the policy's other stations.
fn start(
    station: &Station,
    replaces: Option<Arc<Zygote>>,
) -> impl Future<Output = Result<Process, StartError>> + use<> {
    let station = Station {
        policy: Arc::clone(&station.policy),
        environment: Arc::clone(&station.environment),
        blueprint: Arc::clone(&station.blueprint),
        slot: station.slot,
    };
    async move {
        // Never closed, so there is no error.
        let _turn = station.policy.renewals.acquire().await;
        station.start(replaces.as_ref()).await
    }
}

/// Anything.
fn chance() -> u8 {
    RandomState::new().hash_one(()).to_le_bytes()[0]
}

/// Between three quarters and all of it, so that not all workers are renewed at once.
fn jittered(age_max: Duration, chance: u8) -> Duration {
    age_max.saturating_sub(age_max / 4 * u32::from(chance) / 255)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_worker_grows_too_old_and_none_is_renewed_early() {
        let age = Duration::from_secs(600);
        assert_eq!(jittered(age, 0), age);
        assert_eq!(jittered(age, 255), Duration::from_secs(450));
        assert_eq!(jittered(Duration::ZERO, 99), Duration::ZERO);
    }
}
