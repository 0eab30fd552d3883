//! Answers that are not verdicts: `{"message", "status"}`.
#![forbid(unsafe_code)]

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, InvalidHeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde::Serialize;

use crate::admission::body::BodyError;
use crate::policy::Busy;

/// What every request is answered with.
pub(super) type Answer = Response<Full<Bytes>>;

/// What a client that finds no room is told to wait, in seconds.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// An answer that is not a verdict.
#[derive(Debug, Serialize)]
pub(super) struct Refusal {
    pub(super) message: String,
    #[serde(serialize_with = "status_number")]
    pub(super) status: StatusCode,
    #[serde(skip)]
    header: Option<(HeaderName, HeaderValue)>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
fn status_number<S: serde::Serializer>(
    status: &StatusCode,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}

impl Refusal {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { message: message.into(), status, header: None }
    }

    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        let refusal = Self::new(StatusCode::SERVICE_UNAVAILABLE, message);
        refusal.with_header(RETRY_AFTER, Ok(RETRY_AFTER_SECONDS))
    }

    pub(super) fn with_header(
        self,
        name: HeaderName,
        value: Result<HeaderValue, InvalidHeaderValue>,
    ) -> Self {
        Self { header: value.ok().map(|value| (name, value)), ..self }
    }

    pub(super) fn into_answer(self) -> Answer {
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut answer = json(self.status, body);
        if let Some((name, value)) = self.header {
            answer.headers_mut().insert(name, value);
        }
        answer
    }
}

impl From<BodyError> for Refusal {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::NotJson(message) => Self::new(StatusCode::BAD_REQUEST, message),
            BodyError::WrongShape(message) => Self::new(StatusCode::UNPROCESSABLE_ENTITY, message),
        }
    }
}

impl From<Busy> for Refusal {
    fn from(busy: Busy) -> Self {
        Self::unavailable(match busy {
            Busy::QueueFull => "too many requests wait for this policy",
            Busy::Stopping => "the daemon is stopping",
            Busy::QueueTime => "no worker of this policy became free in time",
        })
    }
}

/// A JSON answer.
pub(super) fn json(status: StatusCode, body: Vec<u8>) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, JSON);
    answer
}
