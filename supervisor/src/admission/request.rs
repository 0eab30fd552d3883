//! The body of an HTTP request, turned into the request that the policy sees.
//!
//! A Kubernetes request is read into a typed structure and written out again: unknown keys
//! are dropped, `null` becomes absent, keys come in a fixed order. Its three free-form parts
//! (`object`, `oldObject`, `options`), which are nearly all of its bytes, are checked by
//! [`StrictText`] and copied as text. A raw request is any JSON value, checked likewise and
//! passed on as it is.
//!
//! The shapes are those of `admission.k8s.io/v1` as Kubewarden's policy server reads them.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

use super::body::{BodyError, checked, parse, utf8};
use super::payload::{Kind, Payload};
use super::shape::{AdmissionRequest, Text};
use super::strict_json::StrictText;
use crate::json_object::Object;

/// One request for a verdict, borrowed from the body it came in.
#[derive(Debug, Clone)]
pub(crate) struct ReviewRequest<'a> {
    uid: Text<'a>,
    payload: Cow<'a, [u8]>,
    form: Form<'a>,
}

#[derive(Debug, Clone)]
enum Form<'a> {
    Kubernetes { namespace: Option<Text<'a>>, object: Option<StrictText<'a>>, deletes: bool },
    Raw(StrictText<'a>),
}

impl<'a> ReviewRequest<'a> {
    /// Reads an `AdmissionReview`: an object with the request under `request`. Other keys,
    /// `apiVersion` and `kind` included, are not looked at.
    ///
    /// # Errors
    ///
    /// See [`BodyError`].
    pub(crate) fn from_review(body: &'a [u8]) -> Result<Self, BodyError> {
        let body = utf8(body)?;
        let Object(review): Object<Review<'a>> = parse(body)?;
        Self::normalised(body, review.request.0, "request.")
    }

    /// Reads an `AdmissionRequest` that comes without an envelope.
    ///
    /// # Errors
    ///
    /// See [`BodyError`].
    pub(crate) fn from_bare(body: &'a [u8]) -> Result<Self, BodyError> {
        let body = utf8(body)?;
        let Object(request) = parse(body)?;
        Self::normalised(body, request, "")
    }

    /// Reads either of the two: with a key `request` it is an `AdmissionReview`.
    ///
    /// # Errors
    ///
    /// See [`BodyError`].
    pub(crate) fn from_review_or_bare(body: &'a [u8]) -> Result<Self, BodyError> {
        let Object(envelope): Object<Envelope<'a>> = parse(utf8(body)?)?;
        if envelope.request.is_some() { Self::from_review(body) } else { Self::from_bare(body) }
    }

    /// Reads a raw request: an object with any JSON value under `request`.
    ///
    /// # Errors
    ///
    /// See [`BodyError`].
    pub(crate) fn raw(body: &'a [u8]) -> Result<Self, BodyError> {
        let body = utf8(body)?;
        let Object(review): Object<RawReview<'a>> = parse(body)?;
        Self::verbatim(checked(body, review.request, "request")?)
    }

    /// Reads a raw request that comes without an envelope: any JSON value.
    ///
    /// # Errors
    ///
    /// See [`BodyError`].
    pub(crate) fn raw_value(body: &'a [u8]) -> Result<Self, BodyError> {
        let body = utf8(body)?;
        Self::verbatim(checked(body, parse(body)?, "")?)
    }

    /// The uid that the response has to repeat; empty for a raw request without one.
    pub(crate) fn uid(&self) -> &str {
        &self.uid.0
    }

    /// The namespace that a Kubernetes request is about.
    pub(crate) fn namespace(&self) -> Option<&str> {
        match &self.form {
            Form::Kubernetes { namespace, .. } => namespace.as_ref().map(|text| text.0.as_ref()),
            Form::Raw(_) => None,
        }
    }

    /// What a mutation starts from: the object, or the whole value of a raw request.
    pub(crate) fn mutable(&self) -> Option<StrictText<'a>> {
        match &self.form {
            Form::Kubernetes { object, .. } => *object,
            Form::Raw(value) => Some(*value),
        }
    }

    /// The request as the policy sees it: one JSON value with one reading.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// [`ReviewRequest::payload`], given away; what is left of the request can still be
    /// decided about.
    pub(crate) fn take_payload(&mut self) -> Payload {
        let kind = match self.form {
            Form::Kubernetes { deletes: true, .. } => Kind::Deletion,
            Form::Kubernetes { .. } => Kind::Kubernetes,
            Form::Raw(_) => Kind::Raw,
        };
        Payload::new(std::mem::take(&mut self.payload).into_owned(), kind)
    }

    fn normalised(
        body: &'a str,
        request: AdmissionRequest<'a>,
        prefix: &str,
    ) -> Result<Self, BodyError> {
        let check = |part: Option<&'a RawValue>, name: &str| {
            part.map(|raw| checked(body, raw, &format!("{prefix}{name}"))).transpose()
        };
        let object = check(request.object, "object")?;
        check(request.old_object, "oldObject")?;
        check(request.options, "options")?;

        let mut payload = Vec::with_capacity(body.len());
        serde_json::to_writer(&mut payload, &request).map_err(|error| BodyError::from(&error))?;
        let deletes = request.operation.0 == "DELETE";
        Ok(Self {
            uid: request.uid,
            payload: Cow::Owned(payload),
            form: Form::Kubernetes { namespace: request.namespace, object, deletes },
        })
    }

    fn verbatim(value: StrictText<'a>) -> Result<Self, BodyError> {
        Ok(Self {
            uid: raw_uid(value),
            payload: Cow::Borrowed(value.text().as_bytes()),
            form: Form::Raw(value),
        })
    }
}

/// The string under `uid` if the value is an object that has one.
fn raw_uid(value: StrictText<'_>) -> Text<'_> {
    serde_json::from_str::<Object<RawUid<'_>>>(value.text())
        .ok()
        .and_then(|Object(raw)| raw.uid)
        .and_then(|uid| serde_json::from_str(uid.get()).ok())
        .unwrap_or_default()
}

#[derive(Deserialize)]
struct Review<'a> {
    #[serde(borrow)]
    request: Object<AdmissionRequest<'a>>,
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    request: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawReview<'a> {
    #[serde(borrow)]
    request: &'a RawValue,
}

#[derive(Deserialize)]
struct RawUid<'a> {
    #[serde(borrow)]
    uid: Option<&'a RawValue>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::body::tests::{assert_not_json, assert_wrong_shape};

    /// All keys, in no particular order, with nulls and keys that nobody knows.
    const FULL: &str = r#"{
        "kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "surplus": [1, {}],
        "request": {
            "dryRun": false,
            "options": {"kind": "CreateOptions"},
            "oldObject": null,
            "object": {"z": 1, "a": [ 1.50, "\u00e9" ]},
            "userInfo": {
                "groups": ["g2", "g1"], "username": "alice", "uid": null, "nickname": "al",
                "extra": {"y": [], "x": ["1", "2"]}
            },
            "operation": "CREATE", "namespace": "default", "name": "n\u0061me",
            "requestSubResource": "scale",
            "requestResource": {"group": "", "version": "v1", "resource": "pods"},
            "requestKind": {"group": "", "version": "v1", "kind": "Pod", "extra": 1},
            "subResource": null,
            "resource": {"version": "v1", "group": "apps", "resource": "deployments"},
            "kind": {"version": "v1", "kind": "Deployment", "group": "apps"},
            "unknown": {"a": 1, "a": 2},
            "uid": "705ab4f5"
        }
    }"#;

    /// The smallest acceptable request, with `more` members at its end.
    fn bare(more: &str) -> String {
        format!(
            r#"{{"uid":"u","kind":{{"group":"","version":"v1","kind":"Pod"}},"resource":{{"group":"","version":"v1","resource":"pods"}},"operation":"DELETE","userInfo":{{}}{more}}}"#
        )
    }

    fn review(more: &str) -> String {
        format!(r#"{{"request":{}}}"#, bare(more))
    }

    fn payload(request: &ReviewRequest<'_>) -> String {
        String::from_utf8(request.payload().to_vec()).unwrap()
    }

    fn refusal(body: &str) -> BodyError {
        ReviewRequest::from_review(body.as_bytes()).unwrap_err()
    }

    #[test]
    fn a_review_is_normalised() {
        let request = ReviewRequest::from_review(FULL.as_bytes()).unwrap();
        assert_eq!(
            payload(&request),
            concat!(
                r#"{"uid":"705ab4f5","kind":{"group":"apps","version":"v1","kind":"Deployment"},"#,
                r#""resource":{"group":"apps","version":"v1","resource":"deployments"},"#,
                r#""requestKind":{"group":"","version":"v1","kind":"Pod"},"#,
                r#""requestResource":{"group":"","version":"v1","resource":"pods"},"#,
                r#""requestSubResource":"scale","name":"name","namespace":"default","#,
                r#""operation":"CREATE","#,
                r#""userInfo":{"username":"alice","groups":["g2","g1"],"extra":{"x":["1","2"],"y":[]}},"#,
                r#""object":{"z": 1, "a": [ 1.50, "\u00e9" ]},"options":{"kind": "CreateOptions"},"#,
                r#""dryRun":false}"#
            )
        );
        assert_eq!(request.uid(), "705ab4f5");
        assert_eq!(request.namespace(), Some("default"));
        assert_eq!(request.mutable().unwrap().text(), r#"{"z": 1, "a": [ 1.50, "\u00e9" ]}"#);
    }

    #[test]
    fn the_rest_of_the_keys_keep_their_places() {
        let body = bare(r#","oldObject":[],"subResource":"status","object":0"#);
        let request = ReviewRequest::from_bare(body.as_bytes()).unwrap();
        assert!(payload(&request).ends_with(
            r#"},"subResource":"status","operation":"DELETE","userInfo":{},"object":0,"oldObject":[]}"#
        ));
    }

    #[test]
    fn normalising_twice_changes_nothing() {
        let request = ReviewRequest::from_review(FULL.as_bytes()).unwrap();
        let again = ReviewRequest::from_bare(request.payload()).unwrap();
        assert_eq!(again.payload(), request.payload());
    }

    #[test]
    fn a_null_object_is_absent() {
        let body = review(r#","object":null,"namespace":null,"dryRun":null"#);
        let request = ReviewRequest::from_review(body.as_bytes()).unwrap();
        assert!(request.mutable().is_none());
        assert!(request.mutable().is_none());
        assert_eq!(request.namespace(), None);
        assert_eq!(payload(&request), bare(""));
    }

    #[test]
    fn the_shape_of_the_envelope_may_be_left_open() {
        for body in [review(""), bare("")] {
            let request = ReviewRequest::from_review_or_bare(body.as_bytes()).unwrap();
            assert_eq!(payload(&request), bare(""));
        }
        let error = ReviewRequest::from_review_or_bare(br#"{"request":{}}"#).unwrap_err();
        assert_wrong_shape(&error, "missing field `uid`");
        let error = ReviewRequest::from_review_or_bare(b"{}").unwrap_err();
        assert_wrong_shape(&error, "missing field `uid`");
        assert_not_json(&ReviewRequest::from_review_or_bare(b"{").unwrap_err(), "EOF");
    }

    #[test]
    fn a_missing_request_has_the_known_text() {
        assert_eq!(
            refusal("{}"),
            BodyError::WrongShape(
                "Failed to deserialize the JSON body into the target type: missing field `request` at line 1 column 2"
                    .to_owned()
            )
        );
    }

    #[test]
    fn required_keys_are_required() {
        for key in ["uid", "kind", "resource", "operation", "userInfo"] {
            let body =
                review("").replacen(&format!(r#"{{"request":{{"{key}""#), r#"{"request":{"x""#, 1);
            let body = body.replacen(&format!(r#","{key}""#), r#","x""#, 1);
            assert_wrong_shape(&refusal(&body), &format!("missing field `{key}`"));
        }
    }

    #[test]
    fn wrong_types_are_refused() {
        assert_wrong_shape(&refusal("[]"), "");
        assert_wrong_shape(&refusal(r#"{"request":null}"#), "invalid type: null");
        assert_wrong_shape(&refusal(&review(r#","dryRun":"no""#)), "expected a boolean");
        assert_wrong_shape(&refusal(&review(r#","name":1"#)), "expected a string");
    }

    #[test]
    fn a_list_is_not_read_as_the_fields_in_order() {
        for body in [
            format!("[{}]", bare("")),
            review("").replace(r#"{"group":"","version":"v1","kind":"Pod"}"#, r#"["","v1","Pod"]"#),
            review("").replace(r#""userInfo":{}"#, r#""userInfo":[null,null,null,null]"#),
            review(r#","requestKind":["","v1","Pod"]"#),
        ] {
            assert_wrong_shape(&refusal(&body), "invalid type: sequence, expected an object");
        }
        let error = ReviewRequest::raw(b"[1]").unwrap_err();
        assert_wrong_shape(&error, "invalid type: sequence, expected an object");
    }

    #[test]
    fn what_is_not_json_is_told_apart() {
        assert_not_json(&refusal(""), "EOF while parsing");
        assert_not_json(&refusal("{\"request\":"), "EOF while parsing");
        assert_not_json(&refusal("request=1"), "expected value");
        assert_not_json(&refusal(&format!("{}x", review(""))), "trailing characters");
        assert_not_json(&refusal(&review(r#","object":{"a":}"#)), "expected value");
    }

    #[test]
    fn invalid_utf8_is_refused_even_where_nobody_looks() {
        let body = [br#"{"ignored":""#, &[0xff][..], br#"","request":1}"#].concat();
        assert_not_json(&ReviewRequest::from_review(&body).unwrap_err(), "utf-8");
    }

    #[test]
    fn surrounding_whitespace_is_fine() {
        let body = format!("\n {} \r\n", review(""));
        assert_eq!(payload(&ReviewRequest::from_review(body.as_bytes()).unwrap()), bare(""));
    }

    #[test]
    fn repeated_keys_are_refused_in_every_part() {
        assert_wrong_shape(&refusal(&review(r#","uid":"v""#)), "duplicate field `uid`");
        assert_wrong_shape(
            &refusal(r#"{"request":1,"request":2}"#),
            "", // the first is already of the wrong type
        );
        for part in ["object", "oldObject", "options"] {
            assert_wrong_shape(
                &refusal(&review(&format!(r#","{part}":{{"a":[{{"b":1,"b":1}}]}}"#))),
                &format!("request.{part}: duplicate key `b` at line 1"),
            );
        }
        let extra = review("").replace("{}", r#"{"extra":{"a":[],"\u0061":[]}}"#);
        assert_wrong_shape(&refusal(&extra), "duplicate key `a`");
    }

    #[test]
    fn deep_nesting_is_refused_and_does_not_overflow() {
        let nested = |depth: usize| {
            let list = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
            review(&format!(r#","object":{list}"#))
        };
        ReviewRequest::from_review(nested(127).as_bytes()).unwrap();
        assert_not_json(&refusal(&nested(128)), "recursion limit exceeded");
        assert_not_json(&refusal(&nested(500_000)), "recursion limit exceeded");
    }

    #[test]
    fn a_raw_request_is_passed_on_as_it_is() {
        let request =
            ReviewRequest::raw(br#"{"x":1,"request": {"b": null, "uid":"\u0041b", "a":1.0} }"#)
                .unwrap();
        assert_eq!(payload(&request), r#"{"b": null, "uid":"\u0041b", "a":1.0}"#);
        assert_eq!(request.uid(), "Ab");
        assert_eq!(request.namespace(), None);
        assert_eq!(request.namespace(), None);
    }

    #[test]
    fn a_raw_request_may_be_any_value() {
        for value in ["null", "1", "\"text\"", "[\"uid\"]", "{}", "{\"uid\":7}"] {
            let body = format!("{{\"request\":{value}}}");
            let request = ReviewRequest::raw(body.as_bytes()).unwrap();
            assert_eq!(payload(&request), value);
            assert_eq!(request.uid(), "");

            let body = format!(" {value}\n");
            let request = ReviewRequest::raw_value(body.as_bytes()).unwrap();
            assert_eq!(payload(&request), value);
        }
    }

    #[test]
    fn a_raw_request_needs_its_envelope() {
        let error = ReviewRequest::raw(b"{}").unwrap_err();
        assert_wrong_shape(&error, "missing field `request` at line 1 column 2");
        assert_not_json(&ReviewRequest::raw(br#"{"request":1}{}"#).unwrap_err(), "trailing");
        assert_not_json(&ReviewRequest::raw_value(b"1 2").unwrap_err(), "trailing");
    }
}
