//! Between HTTP bodies and the verdicts of workers: a pure module, no I/O, no clock.
//!
//! [`request`] turns a body into what the policy sees, [`response`] turns the policy's answer
//! into what the client sees. In between stands [`decide`], the only function that turns a
//! fault into a rejection. Whatever goes wrong with a policy becomes a [`Failure`] first and
//! comes through here, so there is one place to look for how the daemon fails, and it fails
//! closed. The sole exception is written down there: a policy in monitor mode blocks nothing.

#![warn(clippy::wildcard_enum_match_arm)]

mod answer;
pub(crate) mod body;
mod failure;
mod patch;
mod payload;
mod post_processing;
mod rego;
pub(crate) mod request;
pub(crate) mod response;
mod shape;
mod strict_json;

use answer::ValidationResponse;
use conclave_ipc::message::Contract;

use crate::log::shorten;
use request::ReviewRequest;
use response::AdmissionResponse;

pub(crate) use answer::SettingsResponse;
pub(crate) use failure::Failure;
pub(crate) use payload::Payload;
pub(crate) use post_processing::{PostProcessing, post_process};

/// The code of every rejection that a fault leads to.
const FAULT_CODE: u16 = 500;

/// Which endpoint asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// An admission in progress; the verdict is enforced.
    Validate,
    /// An audit of what exists; it wants the policy's own verdict, unprocessed.
    Audit,
}

/// What came of one evaluation.
#[derive(Debug, Clone)]
pub(crate) enum Outcome<'a> {
    /// The policy answered with these bytes, which nobody has looked at yet.
    Response(Contract, &'a [u8]),
    /// There is no answer.
    Failure(Failure),
}

/// The outcome of [`decide`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision {
    /// What the client gets.
    pub(crate) response: AdmissionResponse,
    /// What it would have got without post-processing: for metrics, and for the log when a
    /// policy in monitor mode would have blocked.
    pub(crate) verdict: Verdict,
}

/// A verdict before post-processing, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Whether the request would have passed.
    pub(crate) allowed: bool,
    /// Whether the object would have been changed.
    pub(crate) mutated: bool,
    /// The message of its status.
    pub(crate) message: Option<String>,
    /// The code of its status.
    pub(crate) code: Option<u16>,
    /// Why the policy itself has given no verdict, if it has not.
    pub(crate) failure: Option<Failure>,
}

/// Decides about a request. An answer that reads as a verdict is one; every other outcome is a
/// rejection with code 500, here and nowhere else. The configuration has the last word.
///
/// Monitor mode also covers a policy that never got ready, where Kubewarden would reject: a
/// policy that only watches should not block by being broken. The failure is in the
/// [`Verdict`], for the caller to surface.
pub(crate) fn decide(
    request: &ReviewRequest<'_>,
    outcome: Outcome<'_>,
    rules: &PostProcessing<'_>,
    origin: Origin,
) -> Decision {
    let judged = match outcome {
        Outcome::Response(contract, bytes) => read(request, contract, bytes)
            .map_err(|error| Failure::InvalidResponse(contract, shorten(&error).to_owned())),
        Outcome::Failure(failure) => Err(failure),
    };
    let (response, failure) = match judged {
        Ok(response) => (response, None),
        Err(failure) => {
            let text = failure.to_string();
            let rejection = AdmissionResponse::reject(request.uid(), text, FAULT_CODE);
            (rejection, Some(failure))
        }
    };
    let mut rules = *rules;
    if matches!(failure, Some(Failure::Initialisation(_))) {
        // The custom message explains what the policy forbids. Users who are blocked because
        // the policy is not there should read that instead.
        rules.message = None;
    }
    let status = response.status.as_ref();
    let verdict = Verdict {
        allowed: response.allowed,
        mutated: response.mutation.is_some(),
        message: status.and_then(|status| status.message.clone()),
        code: status.and_then(|status| status.code),
        failure,
    };
    Decision { response: post_process(response, &rules, origin), verdict }
}

/// What an answer means for the request that it is given to; an error if it means nothing.
fn read(
    request: &ReviewRequest<'_>,
    contract: Contract,
    bytes: &[u8],
) -> Result<AdmissionResponse, String> {
    match contract {
        Contract::Wapc | Contract::Wasi => ValidationResponse::parse(bytes)
            .map(|answer| AdmissionResponse::from_validation(request, answer))
            .map_err(|error| error.to_string()),
        Contract::Opa => rego::opa(request, bytes),
        Contract::Gatekeeper => rego::gatekeeper(request, bytes),
    }
}

/// What is wrong with a policy's answer. Parser errors quote the text they choke on, which can
/// be all of it.
fn excerpt(error: &serde_json::Error) -> String {
    shorten(&error.to_string()).to_owned()
}

/// What comes of asking a policy about its settings: unless it says that they are valid, they
/// are not.
pub(crate) fn decide_settings(outcome: Outcome<'_>) -> SettingsResponse {
    let failure = match outcome {
        Outcome::Response(runtime, bytes) => match SettingsResponse::parse(bytes) {
            Ok(answer) => return answer,
            Err(error) => {
                return SettingsResponse::invalid(match runtime {
                    Contract::Wapc | Contract::Opa | Contract::Gatekeeper => {
                        format!("error: {}", excerpt(&error))
                    }
                    Contract::Wasi => {
                        format!(
                            "Cannot deserialize settings validation response: {}",
                            excerpt(&error)
                        )
                    }
                });
            }
        },
        Outcome::Failure(failure) => failure,
    };
    SettingsResponse::invalid(match failure {
        Failure::GuestCall(error) => {
            format!("Error invoking settings validation callback: {error}")
        }
        Failure::GuestExit(_)
        | Failure::Evaluation(_)
        | Failure::InvalidResponse(..)
        | Failure::Deadline
        | Failure::Unavailable(_)
        | Failure::Initialisation(_) => failure.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use response::{Status, raw_body};
    use std::collections::BTreeMap;

    const PROTECT: PostProcessing<'static> =
        PostProcessing { policy: "p", monitor: false, allowed_to_mutate: false, message: None };
    const MONITOR: PostProcessing<'static> = PostProcessing { monitor: true, ..PROTECT };
    const CUSTOM: PostProcessing<'static> =
        PostProcessing { message: Some("ask the platform team"), ..PROTECT };

    const DENIAL: &[u8] = br#"{"accepted":false,"message":"no","code":403,"warnings":["w"],"audit_annotations":{"k":"v"}}"#;
    const MUTATION: &[u8] = br#"{"accepted":true,"mutated_object":{"a":1},"warnings":["w"]}"#;
    const REFUSED_MUTATION: &str = "Request rejected by policy p. The policy attempted to mutate the request, but it is currently configured to not allow mutations.";

    fn request() -> ReviewRequest<'static> {
        ReviewRequest::raw(br#"{"request":{"uid":"u"}}"#).unwrap()
    }

    fn answered(bytes: &[u8], rules: &PostProcessing<'_>, origin: Origin) -> AdmissionResponse {
        decide(&request(), Outcome::Response(Contract::Wapc, bytes), rules, origin).response
    }

    fn failed(failure: Failure, rules: &PostProcessing<'_>, origin: Origin) -> AdmissionResponse {
        decide(&request(), Outcome::Failure(failure), rules, origin).response
    }

    fn every_failure() -> [Failure; 10] {
        [
            Failure::GuestCall("boom".to_owned()),
            Failure::GuestExit(" panic: boom\n".to_owned()),
            Failure::Evaluation("aborted: boom".to_owned()),
            Failure::InvalidResponse(Contract::Opa, "bad".to_owned()),
            Failure::InvalidResponse(Contract::Gatekeeper, "bad".to_owned()),
            Failure::InvalidResponse(Contract::Wapc, "bad".to_owned()),
            Failure::InvalidResponse(Contract::Wasi, "bad".to_owned()),
            Failure::Deadline,
            Failure::Unavailable("no worker".to_owned()),
            Failure::Initialisation("Policy settings are invalid: x".to_owned()),
        ]
    }

    #[test]
    fn every_failure_is_a_rejection_with_its_text() {
        let texts = [
            "internal server error: Guest call failure: boom",
            "panic: boom",
            "internal server error: aborted: boom",
            "internal server error: cannot interpret OPA policy result: bad",
            "internal server error: cannot interpret Gatekeeper policy result: bad",
            "internal server error: invalid response from policy: bad",
            "internal server error: Cannot deserialize policy validation response: bad",
            "Policy execution interrupted because it exceeded the allowed execution time",
            "internal server error: no worker",
            "Policy settings are invalid: x",
        ];
        for (failure, text) in every_failure().into_iter().zip(texts) {
            for origin in [Origin::Validate, Origin::Audit] {
                assert_eq!(
                    failed(failure.clone(), &PROTECT, origin),
                    AdmissionResponse::reject("u", text, 500)
                );
            }
        }
    }

    #[test]
    fn an_answer_that_does_not_parse_is_a_failure() {
        for (runtime, text) in [
            (Contract::Wapc, "invalid response from policy: "),
            (Contract::Wasi, "Cannot deserialize policy validation response: "),
            (Contract::Opa, "cannot interpret OPA policy result: "),
            (Contract::Gatekeeper, "cannot interpret Gatekeeper policy result: "),
        ] {
            for bytes in [&b"{}"[..], b"", b"[true]", b"\xff", b"{\"accepted\":true}x"] {
                let outcome = Outcome::Response(runtime, bytes);
                let decision = decide(&request(), outcome, &PROTECT, Origin::Validate);
                assert!(!decision.response.allowed);
                let status = decision.response.status.unwrap();
                assert_eq!(status.code, Some(500));
                let message = status.message.unwrap();
                assert!(
                    message.starts_with(&format!("internal server error: {text}")),
                    "{message}"
                );
                assert!(matches!(decision.verdict.failure, Some(Failure::InvalidResponse(..))));
            }
        }
    }

    #[test]
    fn an_accepted_request_is_allowed() {
        assert_eq!(
            answered(br#"{"accepted":true}"#, &PROTECT, Origin::Validate),
            AdmissionResponse::allow("u")
        );
    }

    #[test]
    fn a_denial_is_a_denial() {
        let response = answered(DENIAL, &PROTECT, Origin::Validate);
        assert!(!response.allowed);
        let status = response.status.unwrap();
        assert_eq!(status.message.as_deref(), Some("no"));
        assert_eq!(status.code, Some(403));
    }

    #[test]
    fn monitor_mode_allows_and_keeps_notes_only() {
        assert_eq!(
            answered(DENIAL, &MONITOR, Origin::Validate),
            AdmissionResponse {
                warnings: Some(vec!["w".to_owned()]),
                audit_annotations: Some(BTreeMap::from([("k".to_owned(), "v".to_owned())])),
                ..AdmissionResponse::allow("u")
            }
        );
        assert_eq!(
            answered(MUTATION, &MONITOR, Origin::Validate),
            AdmissionResponse {
                warnings: Some(vec!["w".to_owned()]),
                ..AdmissionResponse::allow("u")
            }
        );
    }

    #[test]
    fn monitor_mode_ignores_the_custom_message() {
        let rules = PostProcessing { monitor: true, ..CUSTOM };
        let response = answered(DENIAL, &rules, Origin::Validate);
        assert!(response.allowed);
        assert_eq!(response.status, None);
    }

    #[test]
    fn monitor_mode_allows_whatever_fails_and_tells_the_caller() {
        for failure in every_failure() {
            let outcome = Outcome::Failure(failure.clone());
            let decision = decide(&request(), outcome, &MONITOR, Origin::Validate);
            assert_eq!(decision.response, AdmissionResponse::allow("u"));
            assert!(!decision.verdict.allowed);
            assert_eq!(decision.verdict.code, Some(500));
            assert_eq!(decision.verdict.message, Some(failure.to_string()));
            assert_eq!(decision.verdict.failure, Some(failure));
        }
    }

    #[test]
    fn an_audit_sees_the_policys_own_verdict() {
        for rules in [PROTECT, MONITOR, CUSTOM] {
            let response = answered(DENIAL, &rules, Origin::Audit);
            assert!(!response.allowed);
            assert_eq!(response.status.unwrap().message.as_deref(), Some("no"));

            let response = answered(MUTATION, &rules, Origin::Audit);
            assert!(response.allowed);
            assert!(response.mutation.is_some());

            assert!(!failed(Failure::Deadline, &rules, Origin::Audit).allowed);
        }
    }

    #[test]
    fn a_mutation_without_permission_is_a_denial() {
        assert_eq!(
            answered(MUTATION, &PROTECT, Origin::Validate),
            AdmissionResponse {
                allowed: false,
                status: Some(Status::message(REFUSED_MUTATION)),
                warnings: Some(vec!["w".to_owned()]),
                ..AdmissionResponse::allow("u")
            }
        );
    }

    #[test]
    fn a_mutation_without_permission_replaces_the_policys_message() {
        let answer = br#"{"accepted":false,"message":"no","code":403,"mutated_object":{}}"#;
        let response = answered(answer, &PROTECT, Origin::Validate);
        assert_eq!(response.status, Some(Status::message(REFUSED_MUTATION)));
    }

    #[test]
    fn a_mutation_with_permission_is_kept() {
        let rules = PostProcessing { allowed_to_mutate: true, ..PROTECT };
        let response = answered(MUTATION, &rules, Origin::Validate);
        assert!(response.allowed);
        assert!(response.mutation.is_some());
    }

    #[test]
    fn a_mutation_that_changes_nothing_needs_no_permission() {
        let answer = br#"{"accepted":true,"mutated_object":{ "uid": "u" }}"#;
        assert_eq!(answered(answer, &PROTECT, Origin::Validate), AdmissionResponse::allow("u"));
    }

    #[test]
    fn a_custom_message_makes_the_original_a_cause() {
        let body = raw_body(&answered(DENIAL, &CUSTOM, Origin::Validate));
        assert_eq!(
            String::from_utf8(body).unwrap(),
            concat!(
                r#"{"response":{"uid":"u","allowed":false,"status":{"message":"ask the platform team","#,
                r#""details":{"causes":[{"reason":null,"message":"no","field":null}]},"code":403},"#,
                r#""auditAnnotations":{"k":"v"},"warnings":["w"]}}"#
            )
        );
    }

    #[test]
    fn a_custom_message_stands_alone_where_the_policy_said_nothing() {
        let response = answered(br#"{"accepted":false}"#, &CUSTOM, Origin::Validate);
        assert_eq!(response.status, Some(Status::message("ask the platform team")));
    }

    #[test]
    fn a_custom_message_is_not_for_allowed_requests() {
        let answer = br#"{"accepted":true,"message":"fine"}"#;
        let response = answered(answer, &CUSTOM, Origin::Validate);
        assert_eq!(response.status, Some(Status::message("fine")));
    }

    #[test]
    fn a_custom_message_covers_refused_mutations_and_faults() {
        for response in [
            answered(MUTATION, &CUSTOM, Origin::Validate),
            failed(Failure::Deadline, &CUSTOM, Origin::Validate),
        ] {
            let status = response.status.unwrap();
            assert_eq!(status.message.as_deref(), Some("ask the platform team"));
            assert_eq!(status.details.unwrap().causes.len(), 1);
        }
    }

    #[test]
    fn a_custom_message_does_not_hide_that_a_policy_never_got_ready() {
        let failure = Failure::Initialisation("bootstrap failure: x".to_owned());
        assert_eq!(
            failed(failure, &CUSTOM, Origin::Validate),
            AdmissionResponse::reject("u", "bootstrap failure: x", 500)
        );
    }

    #[test]
    fn the_verdict_is_the_one_before_post_processing() {
        let outcome = Outcome::Response(Contract::Wapc, MUTATION);
        let decision = decide(&request(), outcome, &PROTECT, Origin::Validate);
        assert!(!decision.response.allowed);
        assert_eq!(
            decision.verdict,
            Verdict { allowed: true, mutated: true, message: None, code: None, failure: None }
        );
    }

    #[test]
    fn settings_are_invalid_unless_the_policy_says_otherwise() {
        let answer = |runtime, bytes| decide_settings(Outcome::Response(runtime, bytes));
        assert!(answer(Contract::Wapc, br#"{"valid":true}"#).valid);
        assert!(!answer(Contract::Wasi, br#"{"valid":false}"#).valid);
        for (runtime, text) in [
            (Contract::Wapc, "error: missing field `valid`"),
            (
                Contract::Wasi,
                "Cannot deserialize settings validation response: missing field `valid`",
            ),
        ] {
            let response = answer(runtime, b"{}");
            assert!(!response.valid);
            let message = response.message.unwrap();
            assert!(message.starts_with(text), "{message}");
        }
        for failure in every_failure() {
            assert!(!decide_settings(Outcome::Failure(failure)).valid);
        }
        assert_eq!(
            decide_settings(Outcome::Failure(Failure::GuestCall("boom".to_owned()))),
            SettingsResponse::invalid(
                "Error invoking settings validation callback: boom".to_owned()
            )
        );
        assert_eq!(
            decide_settings(Outcome::Failure(Failure::GuestExit("boom\n".to_owned()))),
            SettingsResponse::invalid("boom".to_owned())
        );
    }
}
