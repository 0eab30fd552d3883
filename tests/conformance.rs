//! Answers that a client gets over the socket: paths, codes, bodies, verdicts.
//!
//! The expected texts and codes are those of Kubewarden's policy server, except where
//! Conclave differs on purpose.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests fail by panicking"
)]

use std::io::Write;
use std::process::{Command, Stdio};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use harness::{
    Client, Daemon, Place, metadata, metadata_section, module, policies, policy, request, skipped,
};
use serde_json::{Value, json};

/// The key order of an answer is part of what clients may compare.
const PRIVILEGED_REVIEW: &str = concat!(
    r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","response":"#,
    r#"{"uid":"8f2a7c1e-0b64-4d0c-9a55-3d8f6c1b2e90","allowed":false,"status":{"message":"#,
    r#""privileged mode is not allowed: init container 'migrate', container 'log-shipper'"},"#,
    r#""auditAnnotations":null,"warnings":null}}"#
);

const PRIVILEGED: &str =
    "privileged mode is not allowed: init container 'migrate', container 'log-shipper'";

const RAW_SETTINGS: &str = "{validUsers: [tonio], validActions: [eats], validResources: [hay]}";

const WAPC: &str = "kubewarden-wapc";

const ACCEPTING: &str = r#"{"accepted":true}"#;

/// A daemon over copies of these built policies, with one worker for each policy.
fn serve(modules: &[&str], policies_yml: &str, arguments: &[&str]) -> Daemon {
    let place = Place::new();
    for name in modules {
        place.copy_policy(name);
    }
    start(place, policies_yml, arguments)
}

fn start(place: Place, policies_yml: &str, arguments: &[&str]) -> Daemon {
    let mut daemon = Daemon::start(place, policies_yml, &[&["--workers", "1"], arguments].concat());
    daemon.wait_until_tried();
    daemon
}

fn uid_of(body: &str) -> Value {
    let body: Value = serde_json::from_str(body).unwrap();
    body["request"]["uid"].clone()
}

/// What an `AdmissionResponse` looks like that only allows.
fn allowed(body: &str) -> Value {
    json!({"uid": uid_of(body), "allowed": true, "auditAnnotations": null, "warnings": null})
}

/// What one looks like that only denies.
#[expect(clippy::needless_pass_by_value, reason = "callers build it on the spot")]
fn denied(body: &str, status: Value) -> Value {
    json!({
        "uid": uid_of(body), "allowed": false, "status": status,
        "auditAnnotations": null, "warnings": null,
    })
}

/// The object of a review after the patch of a response.
fn patched(body: &str, response: &Value) -> Value {
    assert_eq!(response["patchType"], "JSONPatch");
    let patch = BASE64_STANDARD.decode(response["patch"].as_str().unwrap()).unwrap();
    let patch: json_patch::Patch = serde_json::from_slice(&patch).unwrap();
    let mut body: Value = serde_json::from_str(body).unwrap();
    let mut object = body["request"]["object"].take();
    json_patch::patch(&mut object, &patch).unwrap();
    object
}

/// The object of a review with these labels set.
fn labelled(body: &str, labels: &[(&str, &str)]) -> Value {
    let mut body: Value = serde_json::from_str(body).unwrap();
    let mut object = body["request"]["object"].take();
    for (key, value) in labels {
        object["metadata"]["labels"][key] = json!(value);
    }
    object
}

#[test]
fn pod_guard_refuses_privileged_containers_and_names_them() {
    let daemon = serve(
        &["pod-guard.wasm"],
        "plain: {module: pod-guard.wasm}\n\
         prefixed: {module: pod-guard.wasm, settings: {message_prefix: no way}}\n\
         lenient: {module: pod-guard.wasm, settings: {allowed_namespaces: [shop]}}\n",
        &[],
    );
    for name in ["pod-ok.json", "pod-labelled.json", "pod-delete.json"] {
        let body = request(name);
        assert_eq!(daemon.post("/validate/plain", &body).response(), allowed(&body), "{name}");
    }
    let body = request("pod-privileged.json");
    let plain = daemon.post("/validate/plain", &body).response();
    assert_eq!(plain, denied(&body, json!({"message": PRIVILEGED})));
    let prefixed = daemon.post("/validate/prefixed", &body).response();
    assert_eq!(prefixed, denied(&body, json!({"message": format!("no way: {PRIVILEGED}")})));
    assert_eq!(daemon.post("/validate/lenient", &body).response(), allowed(&body));

    let body = request("deployment-privileged.json");
    let deployment = daemon.post("/validate/plain", &body).response();
    let message = "privileged mode is not allowed: container 'api'";
    assert_eq!(deployment, denied(&body, json!({"message": message})));
}

#[test]
fn label_adder_patches_the_object_that_it_was_given() {
    let daemon = serve(
        &["label-adder.wasm"],
        "labels:\n  module: label-adder.wasm\n  allowedToMutate: true\n\
         \x20 settings: {labels: {team: web, env: prod}}\n",
        &[],
    );
    let body = request("pod-ok.json");
    let response = daemon.post("/validate/labels", &body).response();
    assert_eq!(response["allowed"], true);
    assert_eq!(patched(&body, &response), labelled(&body, &[("team", "web"), ("env", "prod")]));
    assert_eq!(response["warnings"], json!(["label 'env' was added", "label 'team' was added"]));
    assert_eq!(response["auditAnnotations"], json!({"labels-set": "env=prod,team=web"}));

    // One label has the value already, another one has not.
    let body = request("pod-labelled.json");
    let response = daemon.post("/validate/labels", &body).response();
    assert_eq!(patched(&body, &response), labelled(&body, &[("team", "web")]));
    assert_eq!(response["warnings"], json!(["label 'team' was overwritten"]));

    // What has been patched is left alone: no patch at all.
    let mut again: Value = serde_json::from_str(&body).unwrap();
    again["request"]["object"] = labelled(&body, &[("team", "web")]);
    let again = again.to_string();
    assert_eq!(daemon.post("/validate/labels", &again).response(), allowed(&again));
}

#[test]
fn raw_gate_judges_values_that_are_no_kubernetes_requests() {
    let policies_yml = format!("gate: {{module: raw-gate.wasm, settings: {RAW_SETTINGS}}}\n");
    let mut daemon = serve(&["raw-gate.wasm"], &policies_yml, &[]);
    let body = request("raw-ok.json");
    assert_eq!(daemon.post("/validate_raw/gate", &body).response(), allowed(&body));
    let body = request("raw-denied.json");
    let response = daemon.post("/validate_raw/gate", &body).response();
    let status = json!({"message": "resource 'banana' is not allowed", "code": 403});
    assert_eq!(response, denied(&body, status));

    let said = |request: &Value| {
        let response =
            daemon.post("/validate_raw/gate", json!({"request": request}).to_string()).response();
        assert_eq!(response["allowed"], false);
        assert_eq!(response["uid"], "", "a value without a uid is answered without one");
        let code = response["status"]["code"].as_u64().unwrap();
        (code, response["status"]["message"].as_str().unwrap().to_owned())
    };
    let (code, message) = said(&json!({"error": true}));
    assert_eq!(code, 500);
    assert_eq!(
        message,
        "internal server error: Guest call failure: the request asked for an error"
    );
    let (code, message) = said(&json!({"panic": true}));
    assert_eq!(code, 500);
    assert!(message.starts_with("internal server error: Guest call failure: "), "{message}");
    let (code, message) = said(&json!([1, "two", null]));
    assert_eq!((code, message.starts_with("cannot read the request: ")), (400, true), "{message}");
    daemon.wait_for("the guest's last words in the log", |daemon| {
        daemon.log().contains("the request asked for a panic")
    });
}

#[test]
fn go_labels_reads_stdin_and_answers_on_stdout() {
    let mut daemon = serve(
        &["go-labels.wasm"],
        "required: {module: go-labels.wasm, settings: {required: [team]}}\n\
         patterns: {module: go-labels.wasm, settings: {required: [team], patterns: {env: dev|test}}}\n",
        &[],
    );
    let body = request("pod-ok.json");
    let response = daemon.post("/validate/required", &body).response();
    let status = json!({"message": "label \"team\" is missing", "code": 422});
    assert_eq!(response, denied(&body, status));

    let body = request("pod-labelled.json");
    assert_eq!(daemon.post("/validate/required", &body).response(), allowed(&body));
    // The object has the annotation that makes the policy write to stderr.
    daemon.wait_for("the guest's stderr in the log", |daemon| {
        daemon.log().contains("labels: Pod shop-web-1 has 5 labels")
    });
    let response = daemon.post("/validate/patterns", &body).response();
    let message = "label \"env\" has the value \"prod\", which does not match dev|test";
    assert_eq!(response, denied(&body, json!({"message": message, "code": 422})));

    let body = request("pod-delete.json");
    assert_eq!(daemon.post("/validate/patterns", &body).response(), allowed(&body));
}

#[test]
fn every_endpoint_has_its_own_envelope() {
    let policies_yml = format!(
        "guard: {{module: pod-guard.wasm}}\ngate: {{module: raw-gate.wasm, settings: {RAW_SETTINGS}}}\n"
    );
    let daemon = serve(&["pod-guard.wasm", "raw-gate.wasm"], &policies_yml, &[]);
    for path in ["/validate/guard", "/audit/guard"] {
        let answer = daemon.post(path, request("pod-privileged.json"));
        assert_eq!(String::from_utf8(answer.body).unwrap(), PRIVILEGED_REVIEW);
        assert!(answer.head.contains("\r\ncontent-type: application/json"), "{}", answer.head);
    }
    let answer = daemon.post("/validate_raw/gate", request("raw-denied.json"));
    assert_eq!(
        String::from_utf8(answer.body).unwrap(),
        concat!(
            r#"{"response":{"uid":"f4d2c0aa-2c53-4a3f-8a6e-7e5b9c1d0e42","allowed":false,"status":"#,
            r#"{"message":"resource 'banana' is not allowed","code":403},"#,
            r#""auditAnnotations":null,"warnings":null}}"#
        )
    );
    assert!(answer.head.contains("\r\ncontent-type: application/json"), "{}", answer.head);
    for path in ["/readiness", "/liveness"] {
        let answer = daemon.get(path);
        assert_eq!((answer.status, answer.body.as_slice()), (200, b"".as_slice()), "{path}");
    }
}

/// A body that explains a status code, and its message.
#[track_caller]
fn refusal(answer: &harness::Answer, status: u16) -> String {
    assert_eq!(answer.status, status, "{}", String::from_utf8_lossy(&answer.body));
    assert!(answer.head.contains("\r\ncontent-type: application/json"), "{}", answer.head);
    let body = answer.json();
    assert_eq!(body["status"], status);
    assert_eq!(body.as_object().unwrap().len(), 2, "{body}");
    body["message"].as_str().unwrap().to_owned()
}

#[test]
fn paths_and_methods_that_lead_nowhere_are_refused_with_json() {
    let place = Place::new();
    place.write("p.wasm", policy(WAPC, ACCEPTING, ""));
    let daemon = start(place, "p: {module: p.wasm}\n", &[]);
    let body = request("pod-ok.json");
    for endpoint in ["validate", "audit"] {
        let answer = daemon.post(&format!("/{endpoint}/stranger"), &body);
        assert_eq!(refusal(&answer, 404), "unknown policy: stranger");
        let answer = daemon.post(&format!("/{endpoint}/p%2Fmember"), &body);
        assert_eq!(refusal(&answer, 404), "unknown policy: p/member");
        let answer = daemon.post(&format!("/{endpoint}/a%2Fb%2Fc"), &body);
        refusal(&answer, 500);
        let answer = daemon.post(&format!("/{endpoint}/a%2Fb%2Fc%2fd"), &body);
        refusal(&answer, 500);
    }
    let raw = request("raw-ok.json");
    assert_eq!(
        refusal(&daemon.post("/validate_raw/stranger", &raw), 404),
        "unknown policy: stranger"
    );
    refusal(&daemon.post("/validate_raw/a%2Fb%2Fc", &raw), 500);
    // Percent-encoding is undone, once.
    assert_eq!(daemon.post("/validate/%70", &body).status, 200);
    refusal(&daemon.post("/validate/%2570", &body), 404);

    for path in [
        "/",
        "/validate",
        "/validate/",
        "/validate/p/q",
        "/validates/p",
        "/metrics",
        "/readiness/p",
    ] {
        refusal(&daemon.post(path, &body), 404);
    }
    for (method, path, allow) in [
        ("GET", "/validate/p", "post"),
        ("PUT", "/audit/p", "post"),
        ("DELETE", "/validate_raw/p", "post"),
        ("POST", "/readiness", "get"),
        ("POST", "/liveness", "get"),
    ] {
        let answer = daemon.client().send(method, path, &["Content-Type: application/json"], b"");
        refusal(&answer, 405);
        assert!(answer.head.contains(&format!("\r\nallow: {allow}")), "{}", answer.head);
    }
}

#[test]
fn bodies_that_are_no_request_are_refused_with_json() {
    let place = Place::new();
    place.write("p.wasm", policy(WAPC, ACCEPTING, ""));
    let daemon = start(place, "p: {module: p.wasm}\n", &[]);
    for endpoint in ["validate", "audit", "validate_raw"] {
        let path = format!("/{endpoint}/p");
        assert_eq!(
            refusal(&daemon.post(&path, "{}"), 422),
            "Failed to deserialize the JSON body into the target type: missing field `request` at line 1 column 2"
        );
        let trailed = request("pod-ok.json") + "{}";
        for no_json in ["", "{", "{\"request\": nothing}", "\u{1}", &trailed] {
            let message = refusal(&daemon.post(&path, no_json), 400);
            assert!(message.starts_with("Failed to parse the request body as JSON: "), "{message}");
        }
        refusal(&daemon.post(&path, b"{\"request\": \"\xff\"}"), 400);
        for media_type in ["", "Content-Type: text/plain", "Content-Type: application/jsonp"] {
            let headers: &[&str] = if media_type.is_empty() { &[] } else { &[media_type] };
            let answer =
                daemon.client().send("POST", &path, headers, request("pod-ok.json").as_bytes());
            let message = refusal(&answer, 415);
            assert_eq!(message, "Expected request with `Content-Type: application/json`");
        }
        for media_type in
            ["application/json; charset=utf-8", "application/vnd.x+json", "Application/JSON"]
        {
            let header = format!("Content-Type: {media_type}");
            let answer =
                daemon.client().send("POST", &path, &[&header], request("pod-ok.json").as_bytes());
            assert_eq!(answer.status, 200, "{media_type}");
        }
    }
    // An AdmissionRequest lacks something; a repeated key could be read in two ways.
    let review = request("pod-ok.json");
    let twice = format!(r#"{}, "request": {{}}}}"#, review.trim_end().strip_suffix('}').unwrap());
    for (body, what) in [
        (r#"{"request": {}}"#, "missing field `uid`"),
        (r#"{"request": {"uid": 1}}"#, "invalid type"),
        (&twice, "duplicate field `request`"),
    ] {
        let message = refusal(&daemon.post("/validate/p", body), 422);
        assert!(message.contains(what), "{message}");
    }
    refusal(&daemon.post("/validate_raw/p", r#"{"request": {"a": 1, "a": 2}}"#), 422);
}

#[test]
fn a_body_beyond_the_limit_is_refused_whether_announced_or_not() {
    let place = Place::new();
    place.write("p.wasm", policy(WAPC, ACCEPTING, ""));
    let daemon = start(place, "p: {module: p.wasm}\n", &["--max-body-bytes", "1000"]);
    let fits = json!({"request": "x".repeat(900)}).to_string();
    let exceeds = json!({"request": "x".repeat(1000)}).to_string();
    assert_eq!(daemon.post("/validate_raw/p", fits).status, 200);
    let message = refusal(&daemon.post("/validate_raw/p", &exceeds), 413);
    assert!(
        message.starts_with("Failed to buffer the request body: length limit exceeded"),
        "{message}"
    );

    let mut client = daemon.client();
    send_chunked(&mut client, "/validate_raw/p", exceeds.as_bytes());
    let message = refusal(&client.read(), 413);
    assert!(
        message.starts_with("Failed to buffer the request body: length limit exceeded"),
        "{message}"
    );
    assert_eq!(daemon.get("/readiness").status, 200);
}

#[test]
fn bodies_of_several_megabytes_pass() {
    let place = Place::new();
    place.write("p.wasm", policy("wasi", ACCEPTING, "(call $print (i32.const 1))"));
    let daemon = start(place, "p: {module: p.wasm}\n", &[]);
    let body = json!({"request": "x".repeat(7 << 20)}).to_string();
    assert_eq!(daemon.post("/validate_raw/p", body).response()["allowed"], true);
}

/// Sends a body in chunks that cut it anywhere.
fn send_chunked(client: &mut Client, path: &str, body: &[u8]) {
    let mut bytes = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Transfer-Encoding: chunked\r\n\r\n"
    )
    .into_bytes();
    for chunk in body.chunks(333) {
        bytes.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
        bytes.extend_from_slice(chunk);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    // The daemon may have answered and closed before the end.
    drop(client.stream().write_all(&bytes));
}

#[test]
fn one_connection_carries_many_requests_however_their_bodies_are_sent() {
    let daemon = serve(&["pod-guard.wasm"], "guard: {module: pod-guard.wasm}\n", &[]);
    let mut client = daemon.client();
    let (good, bad) = (request("pod-ok.json"), request("pod-privileged.json"));
    for _ in 0..50 {
        assert_eq!(client.post("/validate/guard", &good).response(), allowed(&good));
        let response = client.post("/validate/guard", &bad).response();
        assert_eq!(response, denied(&bad, json!({"message": PRIVILEGED})));
        assert_eq!(client.post("/validate/stranger", &good).status, 404);
        assert_eq!(client.send("GET", "/readiness", &[], b"").status, 200);
    }
    send_chunked(&mut client, "/validate/guard", bad.as_bytes());
    assert_eq!(client.read().body, PRIVILEGED_REVIEW.as_bytes());

    // A client that asks before it sends is told to go on.
    let head = format!(
        "POST /validate/guard HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nExpect: 100-continue\r\n\r\n",
        bad.len()
    );
    client.stream().write_all(head.as_bytes()).unwrap();
    assert_eq!(client.read().status, 100);
    client.stream().write_all(bad.as_bytes()).unwrap();
    assert_eq!(client.read().body, PRIVILEGED_REVIEW.as_bytes());
}

#[test]
fn curl_is_answered() {
    if Command::new("curl").arg("--version").output().is_err() {
        skipped("curl is not installed: curl_is_answered");
        return;
    }
    let daemon = serve(&["pod-guard.wasm"], "guard: {module: pod-guard.wasm}\n", &[]);
    let curl = |body: &[u8], arguments: &[&str]| {
        let mut child = Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "60", "--unix-socket"])
            .arg(daemon.socket())
            .args(["--header", "Content-Type: application/json", "--data-binary", "@-"])
            .args(arguments)
            .arg("http://localhost/validate/guard")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(body).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", output.status);
        String::from_utf8(output.stdout).unwrap()
    };
    let body = request("pod-privileged.json");
    assert_eq!(curl(body.as_bytes(), &[]), PRIVILEGED_REVIEW);
    assert_eq!(
        curl(body.as_bytes(), &["--header", "Transfer-Encoding: chunked"]),
        PRIVILEGED_REVIEW
    );
    // Above a megabyte curl asks first, with `Expect: 100-continue`.
    let long = format!("{}{body}", " ".repeat(2 << 20));
    assert_eq!(curl(long.as_bytes(), &[]), PRIVILEGED_REVIEW);
    assert_eq!(curl(long.as_bytes(), &["--header", "Expect: 100-continue"]), PRIVILEGED_REVIEW);
}

#[test]
fn the_configuration_has_the_last_word_except_in_audits() {
    let daemon = serve(
        &["pod-guard.wasm", "label-adder.wasm"],
        "guard-monitor: {module: pod-guard.wasm, policyMode: monitor, message: ask the platform team}\n\
         guard-message: {module: pod-guard.wasm, policyMode: protect, message: ask the platform team}\n\
         label-forbidden: {module: label-adder.wasm, settings: {labels: {team: web}}}\n\
         label-monitor:\n  module: label-adder.wasm\n  policyMode: monitor\n  allowedToMutate: true\n\
         \x20 settings: {labels: {team: web}}\n",
        &[],
    );
    let body = request("pod-privileged.json");
    assert_eq!(daemon.post("/validate/guard-monitor", &body).response(), allowed(&body));
    let status = json!({
        "message": "ask the platform team",
        "details": {"causes": [{"reason": null, "message": PRIVILEGED, "field": null}]},
    });
    assert_eq!(daemon.post("/validate/guard-message", &body).response(), denied(&body, status));

    let forbidden = daemon.post("/validate/label-forbidden", &body).response();
    let message = "Request rejected by policy label-forbidden. The policy attempted to mutate the \
                   request, but it is currently configured to not allow mutations.";
    assert_eq!(forbidden["allowed"], false);
    assert_eq!(forbidden["status"], json!({"message": message}));
    assert_eq!(forbidden.get("patch"), None);
    assert_eq!(forbidden["warnings"], json!(["label 'team' was added"]));

    let monitored = daemon.post("/validate/label-monitor", &body).response();
    let mut expected = allowed(&body);
    expected["warnings"] = json!(["label 'team' was added"]);
    expected["auditAnnotations"] = json!({"labels-set": "team=web"});
    assert_eq!(monitored, expected, "no patch, but the policy's notes");

    for path in ["/audit/guard-monitor", "/audit/guard-message"] {
        let response = daemon.post(path, &body).response();
        assert_eq!(response, denied(&body, json!({"message": PRIVILEGED})), "{path}");
    }
    for path in ["/audit/label-forbidden", "/audit/label-monitor"] {
        let response = daemon.post(path, &body).response();
        assert_eq!(response["allowed"], true);
        assert_eq!(patched(&body, &response), labelled(&body, &[("team", "web")]), "{path}");
    }
}

#[test]
fn an_exempt_namespace_passes_without_the_policy() {
    let denying = r#"{"accepted":false,"message":"no"}"#;
    let place = Place::new();
    place.write("no.wasm", policy(WAPC, denying, ""));
    let daemon = start(
        place,
        "no: {module: no.wasm}\nbroken: {module: missing.wasm}\n",
        &[
            "--always-accept-admission-reviews-on-namespace",
            "kube-system,shop",
            "--always-accept-admission-reviews-on-namespace",
            "conclave",
        ],
    );
    let mut review: Value = serde_json::from_str(&request("pod-ok.json")).unwrap();
    for namespace in ["kube-system", "shop", "conclave"] {
        review["request"]["namespace"] = json!(namespace);
        let body = review.to_string();
        for path in ["/validate/no", "/audit/no", "/validate/broken"] {
            assert_eq!(daemon.post(path, &body).response(), allowed(&body), "{path} {namespace}");
        }
        assert_eq!(
            refusal(&daemon.post("/validate/stranger", &body), 404),
            "unknown policy: stranger"
        );
    }
    for namespace in
        [json!("shop2"), json!("Shop"), json!("kube-system,shop"), json!(""), Value::Null]
    {
        review["request"]["namespace"] = namespace;
        let body = review.to_string();
        let response = daemon.post("/validate/no", &body).response();
        assert_eq!(response, denied(&body, json!({"message": "no"})));
    }
    let raw = json!({"request": {"namespace": "shop", "uid": "u"}}).to_string();
    assert_eq!(
        daemon.post("/validate_raw/no", &raw).response(),
        denied(&raw, json!({"message": "no"}))
    );
}

#[test]
fn a_mutation_of_nothing_is_denied() {
    let place = Place::new();
    let answer = r#"{"accepted":true,"warnings":["w"],"mutated_object":{"a":1}}"#;
    place.write("p.wasm", policy(WAPC, answer, ""));
    let daemon = start(place, "p: {module: p.wasm, allowedToMutate: true}\n", &[]);
    let body = request("pod-delete.json");
    let message = "Incoming object is null, which happens only with DELETE operations, but the \
                   policy is attempting a mutation. This is not allowed";
    assert_eq!(
        daemon.post("/validate/p", &body).response(),
        denied(&body, json!({"message": message}))
    );
}

#[test]
fn every_field_of_a_policys_answer_reaches_the_client() {
    let place = Place::new();
    let answer = r#"{"accepted":false,"message":"no","code":418,"warnings":["w1","w2"],
        "audit_annotations":{"k":"v"},"mutated_object":{"new":true},"unknown":1}"#;
    place.write("p.wasm", policy("wasi", answer, "(call $print (i32.const 1))"));
    let daemon = start(place, "p: {module: p.wasm, allowedToMutate: true}\n", &[]);
    let body = request("pod-ok.json");
    let mut response = daemon.post("/validate/p", &body).response();
    assert_eq!(patched(&body, &response), json!({"new": true}));
    let response = response.as_object_mut().unwrap();
    response.remove("patch");
    response.remove("patchType");
    let expected = json!({
        "uid": uid_of(&body), "allowed": false, "status": {"message": "no", "code": 418},
        "auditAnnotations": {"k": "v"}, "warnings": ["w1", "w2"],
    });
    assert_eq!(Value::Object(response.clone()), expected);
}

#[test]
fn invalid_settings_block_in_protect_mode_and_watch_in_monitor_mode() {
    let daemon = serve(
        &["pod-guard.wasm", "label-adder.wasm"],
        "guard: {module: pod-guard.wasm, message: custom, settings: {message_prefix: ''}}\n\
         watching: {module: label-adder.wasm, policyMode: monitor, settings: {labels: {}}}\n\
         fine: {module: pod-guard.wasm}\n",
        &[],
    );
    let body = request("pod-ok.json");
    let guard = "Policy settings are invalid: message_prefix must not be empty";
    let watching = "Policy settings are invalid: labels must not be empty";
    for path in ["/validate/guard", "/audit/guard"] {
        let response = daemon.post(path, &body).response();
        assert_eq!(response, denied(&body, json!({"message": guard, "code": 500})), "{path}");
    }
    assert_eq!(daemon.post("/validate/watching", &body).response(), allowed(&body));
    let response = daemon.post("/audit/watching", &body).response();
    assert_eq!(response, denied(&body, json!({"message": watching, "code": 500})));
    assert_eq!(daemon.post("/validate/fine", &body).response(), allowed(&body));

    let answer = daemon.get("/readiness");
    assert_eq!(answer.status, 503);
    assert_eq!(answer.json()["policies"], json!({"guard": guard, "watching": watching}));
    assert_eq!(daemon.get("/liveness").status, 200);
}

#[test]
fn a_module_must_have_the_digest_that_is_pinned() {
    let sums = std::fs::read_to_string(policies().join("SHA256SUMS")).unwrap();
    let digest = |name: &str| {
        let line = sums.lines().find(|line| line.ends_with(name)).unwrap();
        line.split(' ').next().unwrap().to_owned()
    };
    let (right, wrong) = (digest("pod-guard.wasm"), digest("raw-gate.wasm"));
    let daemon = serve(
        &["pod-guard.wasm"],
        &format!(
            "right: {{module: pod-guard.wasm, sha256: {right}}}\n\
             wrong: {{module: pod-guard.wasm, sha256: {wrong}}}\n"
        ),
        &[],
    );
    let body = request("pod-ok.json");
    assert_eq!(daemon.post("/validate/right", &body).response(), allowed(&body));
    let response = daemon.post("/validate/wrong", &body).response();
    assert_eq!(response["allowed"], false);
    assert_eq!(response["status"]["code"], 500);
    let message = response["status"]["message"].as_str().unwrap();
    assert!(message.starts_with("bootstrap failure: "), "{message}");
    assert!(message.contains(&right) && message.contains(&wrong), "{message}");
    let unready = daemon.get("/readiness").json();
    assert_eq!(unready["policies"], json!({"wrong": message}));
}

/// A waPC module with these metadata sections.
fn with_metadata(documents: &[&str]) -> Vec<u8> {
    let sections = documents.iter().map(|json| metadata_section(json));
    sections.fold(module(WAPC, ACCEPTING, ""), |module, section| [module, section].concat())
}

/// Name, bytes and why they are of no use here.
fn unfit_modules() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let wapc = metadata(WAPC);
    let changed = |from: &str, to: &str| {
        assert!(wapc.contains(from));
        wapc.replace(from, to)
    };
    vec![
        (
            "bare",
            with_metadata(&[]),
            "Policy is missing protocol version, which is required for KubewardenWapc execution mode",
        ),
        (
            "silent",
            with_metadata(&[&changed(r#""protocolVersion":"v1","#, "")]),
            "Policy is missing protocol version",
        ),
        (
            "unknown",
            with_metadata(&[&changed(r#""v1","#, r#""Unknown","#)]),
            "Policy uses protocol version \"Unknown\" but only V1 is supported",
        ),
        (
            "v2",
            with_metadata(&[&changed(r#""v1","#, r#""v2","#)]),
            "Policy uses protocol version \"v2\" but only V1 is supported",
        ),
        ("not-rego", with_metadata(&[&metadata("opa")]), "does not export the function eval"),
        (
            "future",
            with_metadata(&[&metadata("ferricel")]),
            "unsupported execution mode \"ferricel\"",
        ),
        ("no-json", with_metadata(&["{"]), "metadata of the policy is malformed"),
        (
            "no-rules",
            with_metadata(&["{\"mutating\":false,\"protocolVersion\":\"v1\"}"]),
            "missing field `rules`",
        ),
        (
            "too-new",
            with_metadata(&[&changed(
                r#"{"protocol"#,
                r#"{"minimumKubewardenVersion":"99.0.0","protocol"#,
            )]),
            "Policy required Kubewarden version 99.0.0",
        ),
        ("not-wasi", with_metadata(&[&metadata("wasi")]), "_start"),
        (
            "second-right",
            with_metadata(&[&metadata("ferricel"), &wapc]),
            "unsupported execution mode \"ferricel\"",
        ),
        ("no-module", b"#!/bin/sh\n".to_vec(), "not a WebAssembly module"),
    ]
}

#[test]
fn a_module_without_metadata_for_this_host_does_not_serve() {
    let unfit = unfit_modules();
    let place = Place::new();
    place.write("fine.wasm", with_metadata(&[&metadata(WAPC), "{"]));
    let mut policies_yml = "fine: {module: fine.wasm}\nabsent: {module: absent.wasm}\n".to_owned();
    for (name, bytes, _) in &unfit {
        place.write(&format!("{name}.wasm"), bytes);
        policies_yml.push_str(&format!("{name}: {{module: {name}.wasm}}\n"));
    }
    let daemon = start(place, &policies_yml, &[]);
    let body = request("pod-ok.json");
    assert_eq!(
        daemon.post("/validate/fine", &body).response(),
        allowed(&body),
        "the first section counts"
    );

    let readiness = daemon.get("/readiness");
    assert_eq!(readiness.status, 503);
    let unready = readiness.json()["policies"].take();
    assert_eq!(unready.as_object().unwrap().len(), unfit.len() + 1, "{unready}");
    let expectations =
        unfit.iter().map(|(name, _, why)| (*name, *why)).chain([("absent", "No such file")]);
    for (name, why) in expectations {
        let message = unready[name].as_str().unwrap_or_else(|| panic!("{name} is ready"));
        assert!(
            message.starts_with("bootstrap failure: ") && message.contains(why),
            "{name}: {message}"
        );
        let response = daemon.post(&format!("/validate/{name}"), &body).response();
        assert_eq!(response, denied(&body, json!({"message": message, "code": 500})), "{name}");
    }
}

#[test]
fn only_clients_on_the_list_may_ask() {
    let (user, group) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let (other_user, other_group) = ((user + 1).to_string(), (group + 1).to_string());
    let (user, group) = (user.to_string(), group.to_string());
    let body = request("pod-ok.json");
    for (arguments, admitted) in [
        (vec!["--allow-uid", &other_user], false),
        (vec!["--allow-gid", &other_group], false),
        (vec!["--allow-uid", &other_user, "--allow-uid", &user], true),
        (vec!["--allow-uid", &other_user, "--allow-gid", &group], true),
    ] {
        let place = Place::new();
        place.write("p.wasm", policy(WAPC, ACCEPTING, ""));
        let daemon = start(place, "p: {module: p.wasm}\n", &arguments);
        if admitted {
            assert_eq!(
                daemon.post("/validate/p", &body).response(),
                allowed(&body),
                "{arguments:?}"
            );
            continue;
        }
        for path in ["/validate/p", "/validate/stranger", "/nowhere"] {
            let answer = daemon.post(path, &body);
            refusal(&answer, 403);
            // A stranger does not get to keep a place.
            assert!(answer.head.contains("\r\nconnection: close"), "{}", answer.head);
        }
        refusal(&daemon.get("/readiness"), 403);
        refusal(&daemon.get("/liveness"), 403);
    }
}

#[test]
fn wasi_policies_answer_on_stdout_and_else_on_stderr() {
    let place = Place::new();
    let print = |fd: u8| format!("(call $print (i32.const {fd}))");
    let denying = r#"{"accepted":false,"message":"from here","code":409}"#;
    place.write("stdout.wasm", policy("wasi", denying, &print(1)));
    place.write("stderr.wasm", policy("wasi", denying, &print(2)));
    place.write("exit0.wasm", policy("wasi", denying, &(print(1) + "(call $exit (i32.const 0))")));
    place.write("words.wasm", policy("wasi", "just words\n", &print(2)));
    place.write("silent.wasm", policy("wasi", "", ""));
    place.write("twice.wasm", policy("wasi", ACCEPTING, &(print(1) + &print(1))));
    place.write(
        "exit3.wasm",
        policy("wasi", " can't decide \n", &(print(2) + "(call $exit (i32.const 3))")),
    );
    // An answer does not count when the command fails afterwards, wherever it was written.
    place
        .write("fail1.wasm", policy("wasi", ACCEPTING, &(print(1) + "(call $exit (i32.const 1))")));
    place
        .write("fail2.wasm", policy("wasi", ACCEPTING, &(print(2) + "(call $exit (i32.const 1))")));
    place.write("trap.wasm", policy("wasi", "last words", &(print(2) + "unreachable")));
    let names = [
        "stdout", "stderr", "exit0", "words", "silent", "twice", "exit3", "fail1", "fail2", "trap",
    ];
    let policies_yml: String =
        names.iter().map(|name| format!("{name}: {{module: {name}.wasm}}\n")).collect();
    let daemon = start(place, &policies_yml, &[]);
    let body = request("pod-ok.json");
    let response = |name: &str| daemon.post(&format!("/validate/{name}"), &body).response();

    for name in ["stdout", "stderr", "exit0"] {
        let status = json!({"message": "from here", "code": 409});
        assert_eq!(response(name), denied(&body, status), "{name}");
    }
    for name in ["words", "silent", "twice"] {
        let response = response(name);
        assert_eq!(
            (&response["allowed"], &response["status"]["code"]),
            (&json!(false), &json!(500)),
            "{name}"
        );
        let message = response["status"]["message"].as_str().unwrap();
        let prefix = "internal server error: Cannot deserialize policy validation response: ";
        assert!(message.starts_with(prefix), "{name}: {message}");
    }
    for (name, message) in
        [("exit3", "can't decide"), ("fail1", ""), ("fail2", ACCEPTING), ("trap", "last words")]
    {
        assert_eq!(
            response(name),
            denied(&body, json!({"message": message, "code": 500})),
            "{name}"
        );
    }
}

#[test]
fn a_host_call_needs_a_grant_and_a_policy_learns_why_it_failed() {
    let policies_yml = format!(
        "none: {{module: raw-gate.wasm, settings: {RAW_SETTINGS}}}\n\
         other: {{module: raw-gate.wasm, settings: {RAW_SETTINGS}, hostCapabilities: ['oci/*', kubernetes/can_i]}}\n\
         exact: {{module: raw-gate.wasm, settings: {RAW_SETTINGS}, hostCapabilities: [kubernetes/get_resource]}}\n\
         below: {{module: raw-gate.wasm, settings: {RAW_SETTINGS}, hostCapabilities: ['kubernetes/*']}}\n\
         all: {{module: raw-gate.wasm, settings: {RAW_SETTINGS}, hostCapabilities: ['*']}}\n"
    );
    let mut daemon = serve(&["raw-gate.wasm"], &policies_yml, &[]);
    let body = json!({"request": {"uid": "u", "hostcall": true}}).to_string();
    let denial = "Host error: Policy has not been granted access to the 'kubernetes/get_resource' \
                  host capability. The violation has been reported.";
    let absence = "Host error: host capability 'kubernetes/get_resource' is not available: this \
                   host has no network";
    for (name, message) in [
        ("none", denial),
        ("other", denial),
        ("exact", absence),
        ("below", absence),
        ("all", absence),
    ] {
        let response = daemon.post(&format!("/validate_raw/{name}"), &body).response();
        assert_eq!(response, denied(&body, json!({"message": message, "code": 503})), "{name}");
    }
    let policies_of = |daemon: &Daemon, message: &str| -> Vec<Value> {
        let lines = daemon.log_lines().into_iter();
        lines.filter(|line| line["message"] == message).map(|line| line["policy"].clone()).collect()
    };
    daemon.wait_for("the log", |daemon| policies_of(daemon, "verdict").len() == 5);
    assert_eq!(policies_of(&daemon, "host call denied"), ["none", "other"]);
}
