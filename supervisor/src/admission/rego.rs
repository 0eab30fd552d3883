//! What Rego policies come to, as Open Policy Agent's or Gatekeeper's users write them. The
//! bytes come from untrusted code: they are a verdict only if they have exactly its shape.
//!
//! Kubewarden allows what it can't read of a Gatekeeper policy's result; here, as with
//! Gatekeeper itself, that is an error.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use json_patch::Patch;
use serde::Deserialize;

use super::request::ReviewRequest;
use super::response::{AdmissionResponse, Cause, Details, Mutation, Status};
use crate::json_object::Object;

/// The reasons that Kubernetes defines; a status with another text says it to the user.
const REASONS: [&str; 19] = [
    "",
    "Unauthorized",
    "Forbidden",
    "NotFound",
    "AlreadyExists",
    "Conflict",
    "Gone",
    "Invalid",
    "ServerTimeout",
    "Timeout",
    "TooManyRequests",
    "BadRequest",
    "MethodNotAllowed",
    "NotAcceptable",
    "RequestEntityTooLarge",
    "UnsupportedMediaType",
    "InternalError",
    "Expired",
    "ServiceUnavailable",
];

/// The verdict of a policy for OPA: an admission review with the response.
///
/// # Errors
/// There is none, or it is of another shape.
pub(super) fn opa(request: &ReviewRequest<'_>, bytes: &[u8]) -> Result<AdmissionResponse, String> {
    let Object(Review { response: Object(response) }) =
        only_result(bytes)?.ok_or("the entrypoint is undefined")?;
    let mutation = mutation(response.patch, response.patch_type.as_deref())?;
    if mutation.is_some() && request.mutable().is_none() {
        return Ok(AdmissionResponse::reject_mutation_of_nothing(request.uid()));
    }
    Ok(AdmissionResponse {
        allowed: response.allowed,
        mutation,
        status: response.status.map(|Object(status)| status.into()),
        audit_annotations: response.audit_annotations,
        warnings: response.warnings,
        // The policy's word for it does not count.
        ..AdmissionResponse::allow(request.uid())
    })
}

/// The verdict of a policy for Gatekeeper: all violations that it has found.
///
/// # Errors
/// They are of another shape.
pub(super) fn gatekeeper(
    request: &ReviewRequest<'_>,
    bytes: &[u8],
) -> Result<AdmissionResponse, String> {
    let violations: Vec<Object<Violation>> = only_result(bytes)?.unwrap_or_default();
    let messages: Vec<_> = violations.into_iter().map(|Object(violation)| violation.msg).collect();
    let allow = AdmissionResponse::allow(request.uid());
    if messages.is_empty() {
        return Ok(allow);
    }
    let status = Status::message(messages.join(", "));
    Ok(AdmissionResponse { allowed: false, status: Some(status), ..allow })
}

/// The value of the entrypoint; `None` if it is undefined.
fn only_result<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<Option<T>, String> {
    let text = str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let results: Vec<Object<Entry<T>>> =
        serde_json::from_str(text).map_err(|error| error.to_string())?;
    let mut results = results.into_iter().map(|Object(entry)| entry.result);
    match (results.next(), results.next()) {
        (result, None) => Ok(result),
        (_, Some(_)) => Err("more than one result".to_owned()),
    }
}

/// A JSON Patch as a policy writes it; one that does nothing is none.
fn mutation(patch: Option<String>, patch_type: Option<&str>) -> Result<Option<Mutation>, String> {
    let Some(patch) = patch.filter(|patch| !patch.is_empty()) else { return Ok(None) };
    if patch_type != Some("JSONPatch") {
        return Err("a patch whose patchType is not JSONPatch".to_owned());
    }
    let operations = STANDARD.decode(&patch).map_err(|error| format!("patch: {error}"))?;
    let Patch(operations) =
        serde_json::from_slice(&operations).map_err(|error| format!("patch: {error}"))?;
    Ok((!operations.is_empty()).then(|| Mutation::json_patch(patch)))
}

#[derive(Deserialize)]
struct Entry<T> {
    result: T,
}

#[derive(Deserialize)]
struct Violation {
    msg: String,
}

#[derive(Deserialize)]
struct Review {
    response: Object<Response>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    #[serde(rename = "uid")]
    _uid: String,
    allowed: bool,
    patch: Option<String>,
    patch_type: Option<String>,
    status: Option<Object<StatusWire>>,
    audit_annotations: Option<BTreeMap<String, String>>,
    warnings: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct StatusWire {
    status: Option<Success>,
    message: Option<String>,
    reason: Option<String>,
    details: Option<Object<DetailsWire>>,
    code: Option<u16>,
}

#[derive(Debug, Deserialize)]
enum Success {
    Success,
    Failure,
}

#[derive(Deserialize)]
struct DetailsWire {
    name: Option<String>,
    group: Option<String>,
    kind: Option<String>,
    uid: Option<String>,
    causes: Option<Vec<Object<CauseWire>>>,
    #[serde(alias = "retryAfterSeconds")]
    retry_after_seconds: Option<u32>,
}

#[derive(Deserialize)]
struct CauseWire {
    reason: Option<String>,
    message: Option<String>,
    field: Option<String>,
}

impl From<StatusWire> for Status {
    fn from(wire: StatusWire) -> Self {
        let (reason, text) = match wire.reason {
            Some(reason) if !REASONS.contains(&reason.as_str()) => (None, Some(reason)),
            reason => (reason, None),
        };
        let message = match (wire.message, text) {
            (Some(message), Some(text)) => Some(format!("{message}: {text}")),
            (message, text) => message.or(text),
        };
        Self {
            status: wire.status.map(|status| format!("{status:?}")),
            message,
            reason,
            details: wire.details.map(|Object(details)| details.into()),
            code: wire.code,
        }
    }
}

impl From<DetailsWire> for Details {
    fn from(wire: DetailsWire) -> Self {
        let causes = wire.causes.unwrap_or_default().into_iter();
        Self {
            name: wire.name,
            group: wire.group,
            kind: wire.kind,
            uid: wire.uid,
            causes: causes
                .map(|Object(CauseWire { reason, message, field })| Cause {
                    reason,
                    message,
                    field,
                })
                .collect(),
            retry_after_seconds: wire.retry_after_seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> ReviewRequest<'static> {
        ReviewRequest::raw(br#"{"request":{"uid":"u"}}"#).unwrap()
    }

    fn judged(response: &str) -> Result<AdmissionResponse, String> {
        opa(&request(), format!(r#"[{{"result":{{"response":{response}}}}}]"#).as_bytes())
    }

    fn status(status: &str) -> Status {
        let response = format!(r#"{{"uid":"","allowed":false,"status":{status}}}"#);
        judged(&response).unwrap().status.unwrap()
    }

    #[test]
    fn the_uid_is_the_requests() {
        assert_eq!(judged(r#"{"uid":"other","allowed":true}"#), Ok(AdmissionResponse::allow("u")));
    }

    #[test]
    fn everything_that_a_response_can_say_is_passed_on() {
        let response = judged(
            r#"{"uid":"u","allowed":false,"status":{"status":"Failure","message":"m","reason":"Forbidden","details":{"name":"n","group":"g","kind":"k","uid":"d","causes":[{"reason":"FieldValueInvalid","field":"f"}],"retryAfterSeconds":3},"code":403},"auditAnnotations":{"k":"v"},"warnings":["w"],"other":1}"#,
        );
        let details = Details {
            name: Some("n".to_owned()),
            group: Some("g".to_owned()),
            kind: Some("k".to_owned()),
            uid: Some("d".to_owned()),
            causes: vec![Cause {
                reason: Some("FieldValueInvalid".to_owned()),
                message: None,
                field: Some("f".to_owned()),
            }],
            retry_after_seconds: Some(3),
        };
        let status = Status {
            status: Some("Failure".to_owned()),
            message: Some("m".to_owned()),
            reason: Some("Forbidden".to_owned()),
            details: Some(details),
            code: Some(403),
        };
        assert_eq!(
            response,
            Ok(AdmissionResponse {
                allowed: false,
                status: Some(status),
                audit_annotations: Some(BTreeMap::from([("k".to_owned(), "v".to_owned())])),
                warnings: Some(vec!["w".to_owned()]),
                ..AdmissionResponse::allow("u")
            })
        );
    }

    #[test]
    fn a_reason_in_free_text_is_a_message() {
        assert_eq!(status(r#"{"reason":"no such image"}"#), Status::message("no such image"));
        assert_eq!(status(r#"{"message":"a","reason":"b c"}"#), Status::message("a: b c"));
        assert_eq!(status(r#"{"reason":"Conflict"}"#).reason.as_deref(), Some("Conflict"));
    }

    #[test]
    fn details_need_no_causes() {
        assert_eq!(status(r#"{"details":{"causes":null}}"#).details, Some(Details::default()));
    }

    #[test]
    fn a_patch_is_passed_on_if_it_is_one() {
        let patched = |patch: &str, more: &str| {
            judged(&format!(r#"{{"uid":"","allowed":true,"patch":"{patch}"{more}}}"#))
        };
        let (json_patch, patch) =
            (r#","patchType":"JSONPatch""#, STANDARD.encode(r#"[{"op":"remove","path":"/a"}]"#));
        let mutation = patched(&patch, json_patch).unwrap().mutation;
        assert_eq!(mutation, Some(Mutation::json_patch(patch.clone())));
        assert_eq!(patched("", "").unwrap().mutation, None);
        assert_eq!(patched(&STANDARD.encode("[]"), json_patch).unwrap().mutation, None);
        for (patch, more) in [
            (patch.as_str(), ""),
            (&patch, r#","patchType":"MergePatch""#),
            ("?", json_patch),
            (&STANDARD.encode("{}"), json_patch),
            (&STANDARD.encode(r#"[{"op":"rename"}]"#), json_patch),
        ] {
            patched(patch, more).unwrap_err();
        }
    }

    #[test]
    fn a_response_of_another_shape_is_none() {
        for response in [
            r#"{"allowed":true}"#,
            r#"{"uid":"u"}"#,
            r#"{"uid":"u","allowed":"true"}"#,
            r#"{"uid":"u","allowed":false,"allowed":true}"#,
            r#"{"uid":"u","allowed":true,"status":"ok"}"#,
            r#"{"uid":"u","allowed":true,"status":{"code":-1}}"#,
            r#"{"uid":"u","allowed":true,"status":{"status":"fine"}}"#,
            r#"["u",true]"#,
            "true",
        ] {
            judged(response).unwrap_err();
        }
    }

    #[test]
    fn there_is_exactly_one_result() {
        assert_eq!(opa(&request(), b"[]").unwrap_err(), "the entrypoint is undefined");
        let ok = r#"{"result":{"response":{"uid":"","allowed":true}}}"#;
        for results in [
            String::new(),
            "null".to_owned(),
            ok.to_owned(),
            "[{}]".to_owned(),
            "[true]".to_owned(),
            format!("[{ok},{ok}]"),
            format!("[{ok}]]"),
            r#"[{"result":{"allowed":true}}]"#.to_owned(),
        ] {
            opa(&request(), results.as_bytes()).unwrap_err();
        }
        opa(&request(), b"[{\"result\":\"\xff\"}]").unwrap_err();
    }

    #[test]
    fn gatekeeper_denies_with_all_messages() {
        let found = |text: &str| gatekeeper(&request(), text.as_bytes());
        for none in ["[]", r#"[{"result":[]}]"#] {
            assert_eq!(found(none), Ok(AdmissionResponse::allow("u")));
        }
        let two = r#"[{"result":[{"msg":"a","details":{"x":1}},{"msg":"b"}]}]"#;
        assert_eq!(
            found(two),
            Ok(AdmissionResponse {
                allowed: false,
                status: Some(Status::message("a, b")),
                ..AdmissionResponse::allow("u")
            })
        );
    }

    #[test]
    fn violations_of_another_shape_are_not_taken_for_none() {
        for result in [
            "null",
            "true",
            "false",
            "{}",
            r#""no""#,
            r#"["no"]"#,
            "[{}]",
            r#"[{"msg":1}]"#,
            r#"[{"msg":null}]"#,
            r#"[{"msg":{"a":"b"}}]"#,
            r#"[{"msg":"a"},{"message":"b"}]"#,
            r#"[["a"]]"#,
        ] {
            let error = gatekeeper(&request(), format!(r#"[{{"result":{result}}}]"#).as_bytes());
            assert!(error.is_err(), "{result}");
        }
    }
}
