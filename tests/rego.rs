//! Rego policies through the daemon: what they see, and what becomes of their results.
//!
//! As with Kubewarden, except where that lets pass what it can't read, or evaluates otherwise
//! than Open Policy Agent or Gatekeeper.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use harness::{Daemon, Place, request, run, user_arguments};
use serde_json::{Value, json};

const MODULES: [&str; 5] = [
    "gatekeeper-echo.wasm",
    "gatekeeper-labels.wasm",
    "opa-echo.wasm",
    "opa-guard.wasm",
    "pod-guard.wasm",
];

const UNREADABLE_BY_OPA: &str = "internal server error: cannot interpret OPA policy result: ";

const UNREADABLE_BY_GATEKEEPER: &str =
    "internal server error: cannot interpret Gatekeeper policy result: ";

fn start(policies_yml: &str) -> Daemon {
    let place = Place::new();
    for name in MODULES {
        place.copy_policy(name);
    }
    let mut daemon = Daemon::start(place, policies_yml, &["--workers", "1"]);
    daemon.wait_until_tried();
    daemon
}

/// A review of an operation with this as its object.
fn review(operation: &str, parts: &Value) -> Value {
    let mut review: Value = serde_json::from_str(&request("pod-ok.json")).unwrap();
    review["request"]["operation"] = json!(operation);
    for part in ["object", "oldObject"] {
        review["request"][part] = parts[part].clone();
    }
    review
}

fn judged(daemon: &Daemon, policy: &str, review: &Value) -> Value {
    let response = daemon.post(&format!("/validate/{policy}"), review.to_string()).response();
    assert_eq!(response["uid"], review["request"]["uid"], "{response}");
    response
}

/// The answer of a policy to a raw request.
fn judged_raw(daemon: &Daemon, policy: &str, request: &Value) -> Value {
    let body = json!({ "request": request }).to_string();
    daemon.post(&format!("/validate_raw/{policy}"), body).response()
}

/// What the policy that echoes was shown.
fn shown(response: &Value) -> Value {
    assert_eq!(response["allowed"], true, "{response}");
    serde_json::from_str(response["warnings"][0].as_str().unwrap()).unwrap()
}

#[track_caller]
fn assert_fault(response: &Value, text: &str) {
    assert_eq!(response["allowed"], false, "{response}");
    assert_eq!(response["status"]["code"], 500, "{response}");
    let message = response["status"]["message"].as_str().unwrap();
    assert!(message.starts_with(text), "{message:?} instead of {text:?}");
}

#[test]
fn a_policy_for_opa_judges_with_its_settings_as_data() {
    let daemon = start(
        "guard: {module: opa-guard.wasm, settings: {registries: [registry.example/]}}\n\
         strict: {module: opa-guard.wasm}\n\
         watching: {module: opa-guard.wasm, policyMode: monitor}\n\
         worded: {module: opa-guard.wasm, message: ask the platform team}\n\
         lenient: {module: opa-guard.wasm, entrypoint: policy/lenient}\n",
    );
    let pod = |image: &str| {
        review("CREATE", &json!({"object": {"spec": {"containers": [{"image": image}]}}}))
    };
    let (good, bad) = (pod("registry.example/web:1"), pod("other.example/web:1"));
    assert_eq!(judged(&daemon, "guard", &good)["allowed"], true);
    let message = "image other.example/web:1 is of no registry that is allowed";
    let denied = json!({"message": message, "code": 403});
    assert_eq!(judged(&daemon, "guard", &bad)["status"], denied);
    assert_eq!(judged(&daemon, "strict", &good)["allowed"], false);
    assert_eq!(judged(&daemon, "watching", &bad)["allowed"], true);
    assert_eq!(judged(&daemon, "worded", &bad)["status"]["message"], "ask the platform team");
    let lenient = judged(&daemon, "lenient", &bad);
    assert_eq!((&lenient["allowed"], &lenient["warnings"]), (&json!(true), &json!([message])));
    // Nothing to object to where there is no object.
    assert_eq!(judged(&daemon, "guard", &review("DELETE", &json!({})))["allowed"], true);
}

#[test]
fn a_policy_for_opa_sees_the_request_and_nothing_around_it() {
    let daemon = start("echo: {module: opa-echo.wasm, settings: {settings: [1, 2.5, \"é\"]}}\n");
    for show in [json!({"show": "input", "a": [null, 1.5, "é"]}), json!({"show": "input"})] {
        assert_eq!(shown(&judged_raw(&daemon, "echo", &show)), json!({ "request": show }));
    }
    let data = judged_raw(&daemon, "echo", &json!({"show": "data"}));
    assert_eq!(shown(&data), json!([1, 2.5, "é"]));
    let time = judged_raw(&daemon, "echo", &json!({"show": "time"}));
    assert_eq!(shown(&time), true);
}

#[test]
fn a_response_for_opa_is_passed_on() {
    let daemon = start(
        "echo: {module: opa-echo.wasm, allowedToMutate: true}\n\
         unable: {module: opa-echo.wasm}\n",
    );
    let answer = |response: Value| {
        judged_raw(&daemon, "echo", &json!({"uid": "mine", "response": response}))
    };
    assert_eq!(
        answer(
            json!({"uid": "other", "allowed": true, "warnings": ["w"], "auditAnnotations": {"k": "v"}})
        ),
        json!({"uid": "mine", "allowed": true, "warnings": ["w"], "auditAnnotations": {"k": "v"}})
    );
    let status = |status: Value| {
        answer(json!({"uid": "", "allowed": false, "status": status}))["status"].clone()
    };
    assert_eq!(status(json!({"reason": "no such thing"})), json!({"message": "no such thing"}));
    assert_eq!(status(json!({"reason": "Forbidden"})), json!({"reason": "Forbidden"}));
    let details = json!({"details": {"name": "n"}, "code": 400});
    assert_eq!(status(details.clone()), details);

    // [{"op": "remove", "path": "/response"}]
    let patch = "W3sib3AiOiAicmVtb3ZlIiwgInBhdGgiOiAiL3Jlc3BvbnNlIn1d";
    let patched = json!({"uid": "", "allowed": true, "patchType": "JSONPatch", "patch": patch});
    let answered = answer(patched.clone());
    assert_eq!((&answered["patchType"], &answered["patch"]), (&json!("JSONPatch"), &json!(patch)));
    let refused = judged_raw(&daemon, "unable", &json!({"response": patched}));
    assert_eq!((&refused["allowed"], refused.get("patch")), (&json!(false), None));
}

#[test]
fn what_is_no_response_for_opa_is_rejected() {
    let daemon = start("echo: {module: opa-echo.wasm}\n");
    for result in [
        json!(true),
        json!({"allowed": true}),
        json!({"response": {"allowed": true}}),
        json!({"response": {"uid": ""}}),
        json!({"response": {"uid": "", "allowed": "true"}}),
        json!({"response": {"uid": "", "allowed": true, "status": {"code": "200"}}}),
        json!({"response": {"uid": "", "allowed": true, "patch": "W10="}}),
    ] {
        let answer = judged_raw(&daemon, "echo", &json!({ "result": result }));
        assert_fault(&answer, UNREADABLE_BY_OPA);
    }
    let undefined = format!("{UNREADABLE_BY_OPA}the entrypoint is undefined");
    assert_fault(&judged_raw(&daemon, "echo", &json!({})), &undefined);
    assert_fault(&judged(&daemon, "echo", &review("CREATE", &json!({}))), &undefined);
}

#[test]
fn a_policy_for_gatekeeper_finds_violations_with_its_parameters() {
    let daemon = start(
        "labels: {module: gatekeeper-labels.wasm, settings: {labels: [a, b]}}\n\
         none: {module: gatekeeper-labels.wasm}\n",
    );
    let pod =
        |labels: Value| review("CREATE", &json!({"object": {"metadata": {"labels": labels}}}));
    assert_eq!(judged(&daemon, "labels", &pod(json!({"a": "1", "b": "2"})))["allowed"], true);
    let answer = judged(&daemon, "labels", &pod(json!({"b": "1"})));
    let uid = &pod(json!({}))["request"]["uid"];
    let expected = json!({
        "uid": uid, "allowed": false, "status": {"message": "label a is missing"},
        "auditAnnotations": null, "warnings": null,
    });
    assert_eq!(answer, expected);
    // A set has no order.
    let answer = judged(&daemon, "labels", &pod(json!({"c": "1"})));
    let mut parts: Vec<_> = answer["status"]["message"].as_str().unwrap().split(", ").collect();
    parts.sort_unstable();
    assert_eq!(parts, ["label a is missing", "label b is missing"]);
    assert_eq!(judged(&daemon, "none", &pod(json!({})))["allowed"], true);
}

#[test]
fn a_policy_for_gatekeeper_sees_what_gatekeeper_shows_it() {
    let daemon = start("echo: {module: gatekeeper-echo.wasm, settings: {labels: [1]}}\n");
    let seen = |review: &Value| {
        let response = judged(&daemon, "echo", review);
        assert_eq!(response["allowed"], false, "{response}");
        serde_json::from_str::<Value>(response["status"]["message"].as_str().unwrap()).unwrap()
    };
    let (one, other) = (json!({"show": "input", "is": 1}), json!({"show": "input", "is": 2}));
    let created = review("CREATE", &json!({ "object": one }));
    let input = seen(&created);
    assert_eq!(input["parameters"], json!({"labels": [1]}));
    assert_eq!(input["review"]["object"], one);
    assert_eq!(input["review"]["userInfo"], created["request"]["userInfo"]);
    assert_eq!(input.as_object().unwrap().len(), 2);

    let updated =
        seen(&review("UPDATE", &json!({"object": one, "oldObject": other})))["review"].clone();
    assert_eq!((&updated["object"], &updated["oldObject"]), (&one, &other));
    // What is deleted is where everything else is.
    let deleted = seen(&review("DELETE", &json!({ "oldObject": other })))["review"].clone();
    assert_eq!((&deleted["object"], &deleted["oldObject"]), (&other, &other));
}

#[test]
fn gatekeeper_can_keep_an_object_from_being_deleted() {
    let daemon = start("labels: {module: gatekeeper-labels.wasm}\n");
    let object =
        |protected: &str| json!({"metadata": {"name": "n", "labels": {"protected": protected}}});
    let delete = |object: &Value| review("DELETE", &json!({ "oldObject": object }));
    let answer = judged(&daemon, "labels", &delete(&object("yes")));
    assert_eq!(
        (&answer["allowed"], &answer["status"]["message"]),
        (&json!(false), &json!("n is protected"))
    );
    assert_eq!(judged(&daemon, "labels", &delete(&object("no")))["allowed"], true);
    assert_fault(
        &judged(&daemon, "labels", &review("DELETE", &json!({}))),
        "internal server error: Gatekeeper does not judge a DELETE request without oldObject",
    );
}

#[test]
fn what_can_not_be_read_of_gatekeepers_violations_is_rejected() {
    let daemon = start(
        "echo: {module: gatekeeper-echo.wasm}\nwatching: {module: gatekeeper-echo.wasm, policyMode: monitor}\n",
    );
    let found = |found: Value| review("CREATE", &json!({"object": {"found": found}}));
    assert_eq!(judged(&daemon, "echo", &found(json!([])))["allowed"], true);
    let two = judged(&daemon, "echo", &found(json!([{"msg": "a", "more": 1}, {"msg": "b"}])));
    assert_eq!((&two["allowed"], &two["status"]), (&json!(false), &json!({"message": "a, b"})));
    for shape in [
        json!(true),
        json!(false),
        json!({}),
        json!("no"),
        json!(["no"]),
        json!([{}]),
        json!([{"msg": 1}]),
        json!([{"msg": null}]),
        json!([{"msg": {}}]),
        json!([{"msg": "a"}, {"message": "b"}]),
    ] {
        assert_fault(&judged(&daemon, "echo", &found(shape.clone())), UNREADABLE_BY_GATEKEEPER);
        assert_eq!(judged(&daemon, "watching", &found(shape))["allowed"], true);
    }
    // No violation was found, in OPA's words.
    assert_eq!(judged(&daemon, "echo", &review("CREATE", &json!({})))["allowed"], true);
}

#[test]
fn gatekeeper_does_not_judge_raw_requests() {
    let daemon = start("labels: {module: gatekeeper-labels.wasm}\n");
    let answer = judged_raw(&daemon, "labels", &json!({"uid": "u"}));
    assert_fault(
        &answer,
        "internal server error: Gatekeeper does not support raw validation requests",
    );
}

#[test]
fn a_builtin_that_fails_is_undefined_unless_that_is_to_be_strict() {
    let daemon = start(
        "echo: {module: opa-echo.wasm}\n\
         strict: {module: opa-echo.wasm, strictBuiltinErrors: true}\n",
    );
    let failure = json!({"show": "failure"});
    let input = json!({"show": "input"});
    for _ in 0..2 {
        assert_eq!(shown(&judged_raw(&daemon, "echo", &failure)), "no failure");
        assert_fault(
            &judged_raw(&daemon, "strict", &failure),
            "internal server error: hex.decode: ",
        );
        assert_eq!(shown(&judged_raw(&daemon, "strict", &input)), json!({ "request": input }));
    }
    assert!(!daemon.log().contains("worker is ended"), "{}", daemon.log());
}

/// A builtin would be called with the list, and the policy goes on with the object.
#[test]
fn a_key_that_would_be_read_otherwise_is_not_given_to_builtins() {
    let daemon = start("guard: {module: opa-guard.wasm}\n");
    let image = json!({"$serde_json::private::RawValue": "[1]"});
    let pod = review("CREATE", &json!({"object": {"spec": {"containers": [{"image": image}]}}}));
    let text = "internal server error: a builtin is called with a key that is reserved";
    assert_fault(&judged(&daemon, "guard", &pod), text);
}

#[test]
fn opas_own_errors_are_rejections() {
    let daemon = start("echo: {module: opa-echo.wasm}\n");
    let input = json!({"show": "input"});
    for _ in 0..2 {
        let answer = judged_raw(&daemon, "echo", &json!({"show": "conflict"}));
        assert_fault(&answer, "internal server error: aborted: ");
        assert_eq!(shown(&judged_raw(&daemon, "echo", &input)), json!({ "request": input }));
    }
}

#[test]
fn what_a_policy_says_reaches_the_log() {
    let mut daemon = start("echo: {module: opa-echo.wasm}\n");
    assert_eq!(shown(&judged_raw(&daemon, "echo", &json!({"show": "trace"}))), true);
    daemon.wait_for("the note", |daemon| {
        let is_it = |line: &Value| line["policy"] == "echo" && line["text"] == "a note for the log";
        daemon.log_lines().iter().any(is_it)
    });
}

#[test]
fn every_request_continues_from_the_same_state_however_it_is_started() {
    let daemon = start(
        "auto: {module: opa-guard.wasm}\n\
         snapshot: {module: opa-guard.wasm, start: snapshot}\n\
         fresh: {module: opa-guard.wasm, start: fresh}\n",
    );
    let images: Vec<_> =
        (0..50).map(|number| format!("{}{number}", "x".repeat(number * 100))).collect();
    for image in &images {
        let pod =
            review("CREATE", &json!({"object": {"spec": {"containers": [{"image": image}]}}}));
        let message = format!("image {image} is of no registry that is allowed");
        for policy in ["auto", "snapshot", "fresh"] {
            assert_eq!(judged(&daemon, policy, &pod)["status"]["message"], message, "{policy}");
        }
    }
    let choices: Vec<_> = daemon
        .log_lines()
        .into_iter()
        .filter(|line| line["message"] == "way to start chosen")
        .map(|line| (line["policy"].clone(), line["start"].clone(), line["reason"].clone()))
        .collect();
    for (policy, way, reason) in [
        ("auto", "snapshot", "data is loaded once"),
        ("snapshot", "snapshot", "as configured"),
        ("fresh", "fresh", "as configured"),
    ] {
        assert!(choices.contains(&(json!(policy), json!(way), json!(reason))), "{choices:?}");
    }
}

#[test]
fn what_a_policy_can_not_have_keeps_it_from_serving() {
    let daemon = start(
        "aware: {module: opa-guard.wasm, contextAwareResources: [{apiVersion: v1, kind: Pod}]}\n\
         misnamed: {module: opa-guard.wasm, entrypoint: policy/other}\n\
         wapc: {module: pod-guard.wasm, entrypoint: policy/main}\n\
         strict-wapc: {module: pod-guard.wasm, strictBuiltinErrors: true}\n\
         forgetful: {module: opa-guard.wasm, memory: 64Ki}\n",
    );
    for (policy, text) in [
        ("aware", "contextAwareResources are not available to Rego policies in this version"),
        (
            "misnamed",
            "link: the module has no entrypoint policy/other; there are: policy/lenient, policy/main",
        ),
        ("wapc", "entrypoint and strictBuiltinErrors are for Rego policies"),
        ("strict-wapc", "entrypoint and strictBuiltinErrors are for Rego policies"),
        ("forgetful", "memory: memory limit of 65536 bytes exceeded: the module declares 131072"),
    ] {
        let answer = judged(&daemon, policy, &review("CREATE", &json!({})));
        assert_fault(&answer, &format!("bootstrap failure: {text}"));
    }
}

#[test]
fn a_single_run_knows_rego() {
    let place = Place::new();
    let module = place.copy_policy("opa-guard.wasm");
    let request = place.write("request.json", request("pod-ok.json"));
    let verdict = |more: &[&str]| {
        let (module, request) = (module.to_str().unwrap(), request.to_str().unwrap());
        let arguments = [&["run", module, "-r", request, "--no-cache"], user_arguments(), more];
        let output = run(&arguments.concat(), b"");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    assert_eq!(verdict(&[])["allowed"], false);
    let any = ["--settings-json", r#"{"registries":[""]}"#];
    assert_eq!(verdict(&any)["allowed"], true);
    let lenient = verdict(&["--entrypoint", "policy/lenient"]);
    assert_eq!(lenient["allowed"], true);
    assert!(lenient["warnings"][0].as_str().unwrap().starts_with("image "), "{lenient}");
}
