//! What the client is told: the `AdmissionResponse` of `admission.k8s.io/v1`, in the spelling
//! of Kubewarden's policy server.

use std::collections::BTreeMap;

use serde::Serialize;

use super::answer::ValidationResponse;
use super::patch;
use super::request::ReviewRequest;

/// Said when a policy changes an object that is not there.
const MUTATION_OF_NOTHING: &str = "Incoming object is null, which happens only with DELETE \
     operations, but the policy is attempting a mutation. This is not allowed";

/// The verdict as the client sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AdmissionResponse {
    /// The uid of the request.
    pub(crate) uid: String,
    /// Whether the request may pass.
    pub(crate) allowed: bool,
    /// What to change in the object on the way.
    #[serde(flatten)]
    pub(crate) mutation: Option<Mutation>,
    /// Why, and how to tell the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<Status>,
    /// Notes for the audit log. Written as `null` when absent, as are the warnings.
    pub(crate) audit_annotations: Option<BTreeMap<String, String>>,
    /// Shown to the user, whatever the verdict.
    pub(crate) warnings: Option<Vec<String>>,
}

/// A JSON Patch; its two keys appear together or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Mutation {
    patch_type: PatchType,
    patch: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
enum PatchType {
    #[serde(rename = "JSONPatch")]
    JsonPatch,
}

impl Mutation {
    /// Takes the operations as base64.
    pub(crate) fn json_patch(patch: String) -> Self {
        Self { patch_type: PatchType::JsonPatch, patch }
    }
}

/// A `metav1.Status`, in the part of it that a verdict can have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Status {
    /// `Success` or `Failure`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<String>,
    /// For the user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) message: Option<String>,
    /// One of the reasons that Kubernetes defines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// More than fits a message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) details: Option<Details>,
    /// The HTTP status that the API server gives its client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) code: Option<u16>,
}

impl Status {
    /// A status that is only a message.
    pub(crate) fn message(message: impl Into<String>) -> Self {
        Self { message: Some(message.into()), ..Self::default() }
    }
}

/// The details of a [`Status`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Details {
    /// Of the object concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    /// Of the object concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) group: Option<String>,
    /// Of the object concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<String>,
    /// Of the object concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) uid: Option<String>,
    /// What led to the verdict.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) causes: Vec<Cause>,
    /// Kubernetes has this in camel case; the policy server does not, and is followed here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) retry_after_seconds: Option<u32>,
}

/// One cause in [`Details`]; its keys are always written, as `null` if need be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Cause {
    /// One of the cause types that Kubernetes defines.
    pub(crate) reason: Option<String>,
    /// For the user.
    pub(crate) message: Option<String>,
    /// Where in the object.
    pub(crate) field: Option<String>,
}

impl AdmissionResponse {
    /// The request may pass; nothing more to say.
    pub(crate) fn allow(uid: &str) -> Self {
        Self {
            uid: uid.to_owned(),
            allowed: true,
            mutation: None,
            status: None,
            audit_annotations: None,
            warnings: None,
        }
    }

    /// The request may not pass.
    pub(crate) fn reject(uid: &str, message: impl Into<String>, code: u16) -> Self {
        let status = Status { code: Some(code), ..Status::message(message) };
        Self { allowed: false, status: Some(status), ..Self::allow(uid) }
    }

    /// The request may not pass: a policy changes an object that is not there.
    pub(crate) fn reject_mutation_of_nothing(uid: &str) -> Self {
        let status = Status::message(MUTATION_OF_NOTHING);
        Self { allowed: false, status: Some(status), ..Self::allow(uid) }
    }

    /// What a policy's answer means for the request it was given.
    ///
    /// A mutation becomes a patch, also on a denial. Where there is no object, on DELETE, a
    /// mutation becomes a denial of its own and the rest of the answer is dropped.
    pub(crate) fn from_validation(
        request: &ReviewRequest<'_>,
        answer: ValidationResponse<'_>,
    ) -> Self {
        let mutation = match (request.mutable(), answer.mutated_object) {
            (_, None) => None,
            (Some(old), Some(new)) => patch::between(old, new).map(Mutation::json_patch),
            (None, Some(_)) => return Self::reject_mutation_of_nothing(request.uid()),
        };
        let explained = answer.message.is_some() || answer.code.is_some();
        Self {
            uid: request.uid().to_owned(),
            allowed: answer.accepted,
            mutation,
            status: explained.then(|| Status {
                message: answer.message,
                code: answer.code,
                ..Status::default()
            }),
            audit_annotations: answer.audit_annotations,
            warnings: answer.warnings,
        }
    }
}

/// The body that answers an `AdmissionReview`.
pub(crate) fn review_body(response: &AdmissionResponse) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct AdmissionReview<'a> {
        kind: &'a str,
        api_version: &'a str,
        response: &'a AdmissionResponse,
    }

    body(&AdmissionReview { kind: "AdmissionReview", api_version: "admission.k8s.io/v1", response })
}

/// The body that answers a raw request.
pub(crate) fn raw_body(response: &AdmissionResponse) -> Vec<u8> {
    #[derive(Serialize)]
    struct RawReview<'a> {
        response: &'a AdmissionResponse,
    }

    body(&RawReview { response })
}

fn body(review: &impl Serialize) -> Vec<u8> {
    // Writing strings, booleans and maps with string keys into memory does not fail. If it
    // did, this must not read as a permission: no client takes an empty body for a verdict.
    serde_json::to_vec(review).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde_json::{Value, json};

    const OBJECT: &str = r#"{"metadata":{"name":"x"}}"#;

    fn kubernetes(object: &str) -> String {
        format!(
            r#"{{"uid":"u1","kind":{{"group":"","version":"v1","kind":"Pod"}},"resource":{{"group":"","version":"v1","resource":"pods"}},"operation":"CREATE","userInfo":{{}},"object":{object}}}"#
        )
    }

    fn respond(object: &str, answer: &str) -> AdmissionResponse {
        let body = kubernetes(object);
        let request = ReviewRequest::from_bare(body.as_bytes()).unwrap();
        let answer = ValidationResponse::parse(answer.as_bytes()).unwrap();
        AdmissionResponse::from_validation(&request, answer)
    }

    fn operations(response: &AdmissionResponse) -> Value {
        let mutation = response.mutation.as_ref().unwrap();
        serde_json::from_slice(&STANDARD.decode(&mutation.patch).unwrap()).unwrap()
    }

    #[test]
    fn every_key_is_written_in_its_place() {
        let response = AdmissionResponse {
            uid: "u".to_owned(),
            allowed: false,
            mutation: Some(Mutation::json_patch("W10=".to_owned())),
            status: Some(Status {
                status: Some("Failure".to_owned()),
                message: Some("no".to_owned()),
                reason: Some("Forbidden".to_owned()),
                details: Some(Details {
                    name: Some("n".to_owned()),
                    group: Some("g".to_owned()),
                    kind: Some("k".to_owned()),
                    uid: Some("du".to_owned()),
                    causes: vec![
                        Cause { message: Some("m".to_owned()), ..Cause::default() },
                        Cause {
                            reason: Some("FieldValueInvalid".to_owned()),
                            message: None,
                            field: Some("spec".to_owned()),
                        },
                    ],
                    retry_after_seconds: Some(1),
                }),
                code: Some(403),
            }),
            audit_annotations: Some(BTreeMap::from([
                ("b".to_owned(), "2".to_owned()),
                ("a".to_owned(), "1".to_owned()),
            ])),
            warnings: Some(vec!["careful".to_owned()]),
        };
        let golden = concat!(
            r#"{"uid":"u","allowed":false,"patchType":"JSONPatch","patch":"W10=","#,
            r#""status":{"status":"Failure","message":"no","reason":"Forbidden","#,
            r#""details":{"name":"n","group":"g","kind":"k","uid":"du","causes":["#,
            r#"{"reason":null,"message":"m","field":null},"#,
            r#"{"reason":"FieldValueInvalid","message":null,"field":"spec"}],"#,
            r#""retry_after_seconds":1},"code":403},"#,
            r#""auditAnnotations":{"a":"1","b":"2"},"warnings":["careful"]}"#,
        );
        assert_eq!(
            String::from_utf8(raw_body(&response)).unwrap(),
            format!(r#"{{"response":{golden}}}"#)
        );
        assert_eq!(
            String::from_utf8(review_body(&response)).unwrap(),
            format!(
                r#"{{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","response":{golden}}}"#
            )
        );
    }

    #[test]
    fn absent_keys_are_left_out_except_two() {
        assert_eq!(
            String::from_utf8(raw_body(&AdmissionResponse::allow("u"))).unwrap(),
            r#"{"response":{"uid":"u","allowed":true,"auditAnnotations":null,"warnings":null}}"#
        );
        assert_eq!(
            String::from_utf8(raw_body(&AdmissionResponse::reject("u", "no", 500))).unwrap(),
            r#"{"response":{"uid":"u","allowed":false,"status":{"message":"no","code":500},"auditAnnotations":null,"warnings":null}}"#
        );
        assert_eq!(
            serde_json::to_string(&Details::default()).unwrap(),
            "{}",
            "an empty list of causes is left out"
        );
    }

    #[test]
    fn an_answer_needs_only_accepted() {
        assert_eq!(
            respond(OBJECT, r#" {"accepted":true,"unknown":[1]} "#),
            AdmissionResponse::allow("u1")
        );
    }

    #[test]
    fn nulls_in_an_answer_are_absent() {
        assert_eq!(
            respond(
                OBJECT,
                r#"{"accepted":true,"message":null,"code":null,"mutated_object":null,"audit_annotations":null,"warnings":null}"#
            ),
            AdmissionResponse::allow("u1")
        );
    }

    #[test]
    fn a_denial_carries_what_the_policy_said() {
        let response = respond(
            OBJECT,
            r#"{"accepted":false,"message":"no","code":403,"audit_annotations":{"k":"v"},"warnings":["w"]}"#,
        );
        assert!(!response.allowed);
        let status = response.status.unwrap();
        assert_eq!(status.message.as_deref(), Some("no"));
        assert_eq!(status.code, Some(403));
        assert_eq!(response.audit_annotations.unwrap()["k"], "v");
        assert_eq!(response.warnings.unwrap(), ["w"]);
    }

    #[test]
    fn a_bare_denial_has_no_status() {
        let response = respond(OBJECT, r#"{"accepted":false}"#);
        assert!(!response.allowed);
        assert_eq!(response.status, None);
    }

    #[test]
    fn a_code_alone_makes_a_status() {
        let response = respond(OBJECT, r#"{"accepted":true,"code":0}"#);
        assert_eq!(response.status.unwrap().code, Some(0));
    }

    #[test]
    fn a_mutation_becomes_a_patch() {
        let response =
            respond(OBJECT, r#"{"accepted":true,"mutated_object":{"metadata":{"name":"y"}}}"#);
        assert!(response.allowed);
        assert_eq!(
            operations(&response),
            json!([{"op":"replace","path":"/metadata/name","value":"y"}])
        );
    }

    #[test]
    fn a_mutation_becomes_a_patch_on_a_denial_too() {
        let response = respond(OBJECT, r#"{"accepted":false,"mutated_object":[]}"#);
        assert!(!response.allowed);
        assert_eq!(operations(&response), json!([{"op":"replace","path":"","value":[]}]));
    }

    #[test]
    fn a_mutation_that_changes_nothing_is_no_patch() {
        for same in [OBJECT, r#"{ "metadata": {"name":"\u0078"} }"#] {
            let answer = format!(r#"{{"accepted":true,"mutated_object":{same}}}"#);
            assert_eq!(respond(OBJECT, &answer), AdmissionResponse::allow("u1"));
        }
    }

    #[test]
    fn a_mutation_on_delete_is_a_denial() {
        let response = respond(
            "null",
            r#"{"accepted":true,"message":"m","code":200,"mutated_object":{},"audit_annotations":{"k":"v"},"warnings":["w"]}"#,
        );
        assert_eq!(
            String::from_utf8(raw_body(&response)).unwrap(),
            concat!(
                r#"{"response":{"uid":"u1","allowed":false,"status":{"message":"Incoming object is null, "#,
                r#"which happens only with DELETE operations, but the policy is attempting a mutation. "#,
                r#"This is not allowed"},"auditAnnotations":null,"warnings":null}}"#
            )
        );
    }

    #[test]
    fn a_null_mutation_on_delete_is_none() {
        assert_eq!(
            respond("null", r#"{"accepted":true,"mutated_object":null}"#),
            AdmissionResponse::allow("u1")
        );
    }

    #[test]
    fn a_raw_mutation_starts_from_the_whole_request() {
        let request = ReviewRequest::raw(br#"{"request":{"uid":"r","object":null}}"#).unwrap();
        let answer =
            ValidationResponse::parse(br#"{"accepted":true,"mutated_object":{"uid":"r"}}"#)
                .unwrap();
        let response = AdmissionResponse::from_validation(&request, answer);
        assert_eq!(response.uid, "r");
        assert_eq!(operations(&response), json!([{"op":"remove","path":"/object"}]));
    }
}
