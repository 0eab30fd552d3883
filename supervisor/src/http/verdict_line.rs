//! The one line of the log that a verdict gets.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::Peer;
use super::route::Endpoint;
use crate::admission::request::ReviewRequest;
use crate::admission::{Decision, Failure};
use crate::log::shorten;
use crate::policy::{Done, Policy};

/// What the line says beside the verdict itself.
pub(super) struct VerdictLine<'a> {
    pub(super) endpoint: Endpoint,
    pub(super) policy: &'a Policy,
    pub(super) review: &'a ReviewRequest<'a>,
    pub(super) peer: Peer,
    pub(super) started: Instant,
}

impl VerdictLine<'_> {
    pub(super) fn log(&self, decision: &Decision, done: Option<&Done>) {
        let Decision { response, verdict } = decision;
        let failure = verdict.failure.as_ref().map(Failure::to_string);
        tracing::info!(
            request_uid = shorten(self.review.uid()),
            policy = self.policy.spec.name.as_str(),
            endpoint = self.endpoint.name(),
            allowed = response.allowed,
            // What the policy itself said: differs in monitor mode and for mutations.
            accepted = verdict.allowed,
            mutated = verdict.mutated,
            code = verdict.code,
            reason = verdict.message.as_deref().filter(|_| failure.is_none()).map(shorten),
            failure = failure.as_deref().map(shorten),
            queue_us = done.map(|done| micros(done.queued)),
            guest_us = done.and_then(Done::guest_micros),
            worker_us = done.map(|done| micros(done.worked)),
            total_us = micros(self.started.elapsed()),
            peer_uid = self.peer.uid,
            peer_gid = self.peer.gid,
            "verdict"
        );
    }

    pub(super) fn log_exempt(&self) {
        tracing::info!(
            request_uid = shorten(self.review.uid()),
            policy = self.policy.spec.name.as_str(),
            endpoint = self.endpoint.name(),
            allowed = true,
            namespace = self.review.namespace().map(shorten),
            total_us = micros(self.started.elapsed()),
            peer_uid = self.peer.uid,
            peer_gid = self.peer.gid,
            "verdict without asking the policy: the namespace is exempt"
        );
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
