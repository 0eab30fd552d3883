//! HTTP/1.1 over the Unix socket: paths, bodies and status codes in, answers out.
//!
//! The endpoints and codes are those of Kubewarden's policy server; every error body is
//! `{"message", "status"}`. Whatever a client does costs a bounded amount of memory and
//! time: connections are counted where they are accepted, heads and bodies have deadlines,
//! a client that stops taking its answer is dropped, and all bodies together share one budget.
#![forbid(unsafe_code)]

mod refusal;
mod route;
mod verdict_line;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;

use crate::admission::request::ReviewRequest;
use crate::admission::response::{AdmissionResponse, raw_body, review_body};
use crate::admission::{Decision, Outcome, Payload, PostProcessing, decide};
use crate::config::PolicyMode;
use crate::listen::AllowedPeers;
use crate::log::shorten;
use crate::policy::{Done, Environment, Policy};

use refusal::{Answer, Refusal, json};
use route::{Endpoint, Route, route};
use verdict_line::VerdictLine;

/// Time for the head of a request; also how long a connection may idle.
const HEAD_TIME_MAX: Duration = Duration::from_secs(30);

/// Time for the head of a request from a client that is not on the list, which is then told
/// so and let go.
const STRANGER_TIME_MAX: Duration = Duration::from_secs(2);

/// How long a client may take nothing of an answer that is on its way.
const STALL_TIME_MAX: Duration = Duration::from_secs(10);

/// Time for the body of a request.
const BODY_TIME_MAX: Duration = Duration::from_secs(10);

/// Size of a request's head.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// What all bodies that are being read or judged may take together. Each counts twice: as
/// it was received, and as its policy will see it.
const BODIES_BYTES_MAX: usize = 256 << 20;

/// How the body budget is counted, in bytes.
const BODY_UNIT_BYTES: usize = 4 << 10;

/// What the handlers need.
#[derive(Debug)]
pub(crate) struct Daemon {
    environment: Arc<Environment>,
    policies: HashMap<String, Arc<Policy>>,
    exempt_namespaces: HashSet<String>,
    /// Which clients may ask.
    pub(crate) peers: AllowedPeers,
    body_bytes_max: usize,
    body_budget: Semaphore,
}

impl Daemon {
    pub(crate) fn new(
        environment: Arc<Environment>,
        policies: HashMap<String, Arc<Policy>>,
        exempt_namespaces: HashSet<String>,
        peers: AllowedPeers,
        body_bytes_max: usize,
    ) -> Self {
        let body_budget = Semaphore::new(BODIES_BYTES_MAX.div_euclid(BODY_UNIT_BYTES));
        Self { environment, policies, exempt_namespaces, peers, body_bytes_max, body_budget }
    }
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Whether it is on the list.
    pub(crate) admitted: bool,
}

/// Answers one client's requests, until it leaves or the daemon stops.
pub(crate) async fn serve_connection(
    stream: UnixStream,
    daemon: Arc<Daemon>,
    peer: Peer,
    mut stopped: watch::Receiver<bool>,
) {
    let service = service_fn(move |request| {
        let daemon = Arc::clone(&daemon);
        async move { Ok::<_, Infallible>(daemon.answer(request, peer).await) }
    });
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(STALL_TIME_MAX));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(if peer.admitted { HEAD_TIME_MAX } else { STRANGER_TIME_MAX })
        .keep_alive(peer.admitted)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(Box::pin(stream)), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = told_to_stop(&mut stopped) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(peer_uid = peer.uid, %error, "connection ended early");
    }
}

async fn told_to_stop(stopped: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, which is a stop as well.
    drop(stopped.wait_for(|stopped| *stopped).await);
}

impl Daemon {
    async fn answer(&self, request: Request<Incoming>, peer: Peer) -> Answer {
        if !peer.admitted {
            let message = format!("user {} (group {}) may not ask", peer.uid, peer.gid);
            return Refusal::new(StatusCode::FORBIDDEN, message).into_answer();
        }
        match route(request.method(), request.uri().path()) {
            Err(refusal) => refusal.into_answer(),
            Ok(Route::Liveness) => json(StatusCode::OK, Vec::new()),
            Ok(Route::Readiness) => self.readiness(),
            Ok(Route::Judge(endpoint, id)) => {
                match self.judge(endpoint, &id, request, peer).await {
                    Ok(answer) => answer,
                    Err(refusal) => {
                        tracing::info!(
                            policy = id,
                            endpoint = endpoint.name(),
                            status = refusal.status.as_u16(),
                            error = refusal.message,
                            peer_uid = peer.uid,
                            peer_gid = peer.gid,
                            "refused"
                        );
                        refusal.into_answer()
                    }
                }
            }
        }
    }

    /// 200 while every policy has at least one loaded worker, else 503 and who has none.
    fn readiness(&self) -> Answer {
        #[derive(Serialize)]
        struct Unready<'a> {
            message: &'a str,
            status: u16,
            policies: BTreeMap<&'a str, String>,
        }
        let policies: BTreeMap<_, _> = self
            .policies
            .iter()
            .filter_map(|(name, policy)| Some((name.as_str(), policy.unready()?)))
            .collect();
        if policies.is_empty() {
            return json(StatusCode::OK, Vec::new());
        }
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let unready =
            Unready { message: "policies are not ready", status: status.as_u16(), policies };
        json(status, serde_json::to_vec(&unready).unwrap_or_default())
    }

    async fn judge(
        &self,
        endpoint: Endpoint,
        id: &str,
        request: Request<Incoming>,
        peer: Peer,
    ) -> Result<Answer, Refusal> {
        let started = Instant::now();
        require_json(&request)?;
        let (body, _budget) = self.read_body(request).await?;
        let placement = &self.environment.placement;
        let mut review = placement.at_length(body.len(), || match endpoint {
            Endpoint::Validate | Endpoint::Audit => ReviewRequest::from_review(&body),
            Endpoint::ValidateRaw => ReviewRequest::raw(&body),
        })?;
        let policy = self.policy(id)?;
        let payload = review.take_payload();
        let exempt =
            review.namespace().is_some_and(|namespace| self.exempt_namespaces.contains(namespace));
        let (response, verdict, done) = if exempt {
            (AdmissionResponse::allow(review.uid()), None, None)
        } else {
            let (decision, done) = self.ask(policy, endpoint, &review, payload).await?;
            (decision.response, Some(decision.verdict), done)
        };
        let answer = answer_with(endpoint, &response);
        let line = VerdictLine {
            endpoint,
            policy: Arc::clone(policy),
            request_uid: shorten(review.uid()).to_owned(),
            peer,
            total: started.elapsed(),
            allowed: response.allowed,
            verdict,
            done,
        };
        line.write_later();
        Ok(answer)
    }

    /// Has the policy judge the request, and decides.
    async fn ask(
        &self,
        policy: &Policy,
        endpoint: Endpoint,
        review: &ReviewRequest<'_>,
        payload: Payload,
    ) -> Result<(Decision, Option<Done>), Refusal> {
        let judged = policy.evaluate(payload, review.uid()).await;
        let (done, outcome) = match &judged {
            Ok(Ok(done)) => (Some(done), done.outcome()),
            Ok(Err(busy)) => return Err((*busy).into()),
            Err(failure) => (None, Outcome::Failure(failure.clone())),
        };
        let decision =
            self.environment.placement.at_length(done.map_or(0, Done::answer_bytes), || {
                decide(review, outcome, &rules(policy), endpoint.origin())
            });
        Ok((decision, judged.ok().and_then(Result::ok)))
    }

    fn policy(&self, id: &str) -> Result<&Arc<Policy>, Refusal> {
        // The policy server reads `group/member` here, and takes more for its own mistake.
        if id.split('/').nth(2).is_some() {
            let message = format!("malformed policy id: {id}");
            return Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, message));
        }
        self.policies
            .get(id)
            .ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, format!("unknown policy: {id}")))
    }

    /// The whole body, and its part of the budget.
    async fn read_body(
        &self,
        request: Request<Incoming>,
    ) -> Result<(Vec<u8>, SemaphorePermit<'_>), Refusal> {
        let body = request.into_body();
        if body.size_hint().lower() > self.body_bytes_max as u64 {
            return Err(self.too_large());
        }
        match timeout(BODY_TIME_MAX, self.collect(body)).await {
            Ok(collected) => collected,
            Err(_elapsed) => Err(Refusal::new(
                StatusCode::REQUEST_TIMEOUT,
                format!("the request body took longer than {} seconds", BODY_TIME_MAX.as_secs()),
            )),
        }
    }

    /// Memory is taken as bytes arrive, so a client that only announces holds none.
    async fn collect(&self, mut body: Incoming) -> Result<(Vec<u8>, SemaphorePermit<'_>), Refusal> {
        let mut budget = self.budget_for(BODY_UNIT_BYTES)?;
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                Refusal::new(
                    StatusCode::BAD_REQUEST,
                    format!("Failed to buffer the request body: {error}"),
                )
            })?;
            let Ok(data) = frame.into_data() else { continue };
            if bytes.len().saturating_add(data.len()) > self.body_bytes_max {
                return Err(self.too_large());
            }
            bytes.extend_from_slice(&data);
            let have = budget.num_permits().saturating_mul(BODY_UNIT_BYTES).div_euclid(2);
            // `Vec` doubles, so this is what it has really taken.
            if bytes.capacity() > have {
                budget.merge(self.budget_for(bytes.capacity().saturating_sub(have))?);
            }
        }
        Ok((bytes, budget))
    }

    fn budget_for(&self, bytes: usize) -> Result<SemaphorePermit<'_>, Refusal> {
        let units = bytes.saturating_mul(2).div_ceil(BODY_UNIT_BYTES);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        self.body_budget
            .try_acquire_many(units)
            .map_err(|_exhausted| Refusal::unavailable("too many request bodies are in memory"))
    }

    fn too_large(&self) -> Refusal {
        let limit = self.body_bytes_max;
        Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("Failed to buffer the request body: length limit exceeded ({limit} bytes)"),
        )
    }
}

/// [`route`] for fuzzing, in plain values.
#[cfg(fuzzing)]
pub(crate) fn routed(
    method: &str,
    path: &str,
) -> Result<Option<(&'static str, String)>, (u16, String)> {
    let method = method.parse().unwrap_or_default();
    match route(&method, path) {
        Ok(Route::Judge(endpoint, id)) => Ok(Some((endpoint.name(), id))),
        Ok(Route::Readiness | Route::Liveness) => Ok(None),
        Err(refusal) => Err((refusal.status.as_u16(), refusal.message)),
    }
}

/// `application/json`, or anything ending in `+json`, as the policy server demands.
fn require_json(request: &Request<Incoming>) -> Result<(), Refusal> {
    let value = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence =
        value.and_then(|value| value.split(';').next()).map(str::trim).unwrap_or_default();
    let is_json = essence.split_once('/').is_some_and(|(kind, subtype)| {
        let subtype = subtype.to_ascii_lowercase();
        kind.eq_ignore_ascii_case("application")
            && (subtype == "json" || subtype.ends_with("+json"))
    });
    if is_json {
        return Ok(());
    }
    Err(Refusal::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "Expected request with `Content-Type: application/json`",
    ))
}

fn rules(policy: &Policy) -> PostProcessing<'_> {
    PostProcessing {
        policy: policy.spec.name.as_str(),
        monitor: policy.spec.mode == PolicyMode::Monitor,
        allowed_to_mutate: policy.spec.allowed_to_mutate,
        message: policy.spec.message.as_deref(),
    }
}

fn answer_with(endpoint: Endpoint, response: &AdmissionResponse) -> Answer {
    let body = match endpoint {
        Endpoint::Validate | Endpoint::Audit => review_body(response),
        Endpoint::ValidateRaw => raw_body(response),
    };
    json(StatusCode::OK, body)
}
