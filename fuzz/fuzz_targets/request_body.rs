//! An HTTP request in the shape that the daemon's own code sees: a method and a path on the
//! first line, the body after it. A route leads where a plain reading of the path says; a body
//! that is accepted is JSON with one reading, and its policy sees exactly that reading.
#![no_main]

use conclave_fuzz::{MESSAGE_BYTES_MAX, has_distinct_keys, is_json, reading};
use conclave_supervisor::fuzzing::{Form, Request, request, route};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

fuzz_target!(|http: &[u8]| {
    let (line, body) = match http.iter().position(|byte| *byte == b'\n') {
        Some(end) => (&http[..end], &http[end + 1..]),
        None => (http, &[][..]),
    };
    if let Ok(line) = str::from_utf8(line) {
        let (method, path) = line.split_once(' ').unwrap_or((line, ""));
        check_route(method, path);
    }
    for form in [Form::Review, Form::Bare, Form::ReviewOrBare, Form::Raw, Form::RawValue] {
        match request(form, body) {
            Ok(request) => check_request(form, body, &request),
            Err(message) => assert!(message.len() <= MESSAGE_BYTES_MAX, "{}", message.len()),
        }
    }
});

fn check_route(method: &str, path: &str) {
    let segments: Vec<_> = path.strip_prefix('/').unwrap_or(path).split('/').collect();
    match route(method, path) {
        Ok(Some((endpoint, policy))) => {
            assert_eq!((method, segments.len(), segments[0]), ("POST", 2, endpoint));
            assert!(["validate", "validate_raw", "audit"].contains(&endpoint));
            assert_eq!(policy, decoded(segments[1]));
        }
        // A method of its own is read as one, and an empty one as GET.
        Ok(None) => assert!(path.ends_with("readiness") || path.ends_with("liveness")),
        Err((status, message)) => {
            assert!(status == 404 || status == 405, "{status}");
            assert!(message.contains(path));
        }
    }
}

fn decoded(segment: &str) -> String {
    let digit = |at: usize| {
        let byte = segment.as_bytes().get(at)?;
        char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
    };
    let (mut bytes, mut at) = (Vec::new(), 0);
    while let Some(byte) = segment.as_bytes().get(at) {
        match (byte, digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push(high << 4 | low);
                at += 3;
            }
            _ => {
                bytes.push(*byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn check_request(form: Form, body: &[u8], accepted: &Request) {
    let payload = str::from_utf8(&accepted.payload).expect("a payload is text");
    let body = str::from_utf8(body).expect("what is accepted is text");
    assert!(is_json(body.as_bytes()) && is_json(payload.as_bytes()));
    let seen = reading(payload);
    if let Some(seen) = &seen {
        assert!(has_distinct_keys(payload, seen), "a key is there twice: {payload}");
        let uid = if seen.is_object() { seen["uid"].as_str() } else { None };
        assert_eq!(accepted.uid, uid.unwrap_or_default());
    }
    if matches!(form, Form::Raw | Form::RawValue) {
        assert!(body.contains(payload), "a raw request is passed on as it is");
        assert_eq!(accepted.namespace, None);
    } else {
        let again = request(Form::Bare, &accepted.payload).expect("a payload is a request");
        assert_eq!(again.payload, accepted.payload, "normalising twice has changed something");
    }
    let (Some(seen), Some(written)) = (seen, reading(body)) else { return };
    assert_eq!(seen, expected(form, &written), "{payload}");
}

/// What the policy has to see of a body, by the body's plain reading.
fn expected(form: Form, body: &Value) -> Value {
    let request = match form {
        Form::Review | Form::Raw => &body["request"],
        Form::ReviewOrBare if !body["request"].is_null() => &body["request"],
        Form::Bare | Form::RawValue | Form::ReviewOrBare => body,
    };
    if matches!(form, Form::Raw | Form::RawValue) {
        return request.clone();
    }
    let kind = ["group", "version", "kind"];
    let resource = ["group", "version", "resource"];
    let inner = |key: &str, value: &Value| match key {
        "kind" | "requestKind" => known(value, &kind, |_, value| value.clone()),
        "resource" | "requestResource" => known(value, &resource, |_, value| value.clone()),
        "userInfo" => known(value, &["username", "uid", "groups", "extra"], |_, v| v.clone()),
        _ => value.clone(),
    };
    let keys = [
        "uid",
        "kind",
        "resource",
        "subResource",
        "requestKind",
        "requestResource",
        "requestSubResource",
        "name",
        "namespace",
        "operation",
        "userInfo",
        "object",
        "oldObject",
        "options",
        "dryRun",
    ];
    known(request, &keys, inner)
}

/// The known keys of an object that are not null.
fn known(object: &Value, keys: &[&str], inner: impl Fn(&str, &Value) -> Value) -> Value {
    let object = object.as_object().expect("what is read as an object is written as one");
    let kept: Map<_, _> = object
        .iter()
        .filter(|(key, value)| keys.contains(&key.as_str()) && !value.is_null())
        .map(|(key, value)| (key.clone(), inner(key, value)))
        .collect();
    Value::Object(kept)
}
