//! The one line of the log that a verdict gets, after what its policy left for the log.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use super::Peer;
use super::route::Endpoint;
use crate::admission::{Failure, Verdict};
use crate::log::shorten;
use crate::policy::{Done, Policy};

/// All that the line says.
pub(super) struct VerdictLine {
    pub(super) endpoint: Endpoint,
    pub(super) policy: Arc<Policy>,
    /// As the log names the request.
    pub(super) request_uid: String,
    pub(super) peer: Peer,
    /// From the head of the request to its answer.
    pub(super) total: Duration,
    /// What the client was told.
    pub(super) allowed: bool,
    /// What the policy itself said; `None` if its namespace spared the request.
    pub(super) verdict: Option<Verdict>,
    /// The evaluation, if there was one.
    pub(super) done: Option<Done>,
}

impl VerdictLine {
    /// Writes the line when the answer is on its way: a task that is made now runs after
    /// the present one, which answers first.
    pub(super) fn write_later(self) {
        tokio::spawn(async move { self.write() });
    }

    fn write(&self) {
        let policy = self.policy.spec.name.as_str();
        let request_uid = self.request_uid.as_str();
        let (peer_uid, peer_gid) = (self.peer.uid, self.peer.gid);
        let (endpoint, total_us) = (self.endpoint.name(), micros(self.total));
        if let Some(done) = &self.done {
            done.log.write(policy, request_uid);
        }
        let Some(verdict) = &self.verdict else {
            tracing::info!(
                request_uid,
                policy,
                endpoint,
                allowed = self.allowed,
                total_us,
                peer_uid,
                peer_gid,
                "verdict without asking the policy: the namespace is exempt"
            );
            return;
        };
        let failure = verdict.failure.as_ref().map(Failure::to_string);
        tracing::info!(
            request_uid,
            policy,
            endpoint,
            allowed = self.allowed,
            // Differs from the above in monitor mode and for refused mutations.
            accepted = verdict.allowed,
            mutated = verdict.mutated,
            code = verdict.code,
            reason = verdict.message.as_deref().filter(|_| failure.is_none()).map(shorten),
            failure = failure.as_deref().map(shorten),
            queue_us = self.done.as_ref().map(|done| micros(done.queued)),
            guest_us = self.done.as_ref().and_then(Done::guest_micros),
            worker_us = self.done.as_ref().map(|done| micros(done.worked)),
            total_us,
            peer_uid,
            peer_gid,
            "verdict"
        );
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
