//! What a Rego policy comes to, judged for a request: a byte that says how, and the result.
//! Nothing passes unless serde_json reads a response that allows it, or no violation.
#![no_main]

use conclave_fuzz::{MESSAGE_BYTES_MAX, is_json, reading};
use conclave_ipc::message::Contract;
use conclave_supervisor::fuzzing::{Form, Rules, decide};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const REVIEW: &str = r#"{"request":{"uid":"705ab4f5","kind":{"group":"","version":"v1","kind":"Pod"},"resource":{"group":"","version":"v1","resource":"pods"},"operation":"CREATE","userInfo":{},"object":{"a":1}}}"#;

fuzz_target!(|input: &[u8]| {
    let Some((how, results)) = input.split_first() else { return };
    let bit = |number: u8| how & 1 << number != 0;
    let rules = Rules {
        contract: if bit(0) { Contract::Gatekeeper } else { Contract::Opa },
        audit: bit(1),
        monitor: bit(2),
        allowed_to_mutate: bit(3),
        message: bit(4).then_some("ask the platform team"),
    };
    let decision = decide(Form::Review, REVIEW.as_bytes(), results, &rules).expect("a request");
    let body = str::from_utf8(&decision.body).expect("a body is text");
    let body: Value = serde_json::from_str(body).expect("a body is JSON");
    let response = &body["response"];
    assert_eq!(response["uid"], "705ab4f5");
    let watches = rules.monitor && !rules.audit;
    let allowed = response["allowed"].as_bool().expect("a verdict");
    assert!(!allowed || decision.allowed || watches, "allowed against the policy's word");
    if let Some(message) = &decision.failure {
        assert!(!decision.allowed && !message.is_empty() && message.len() <= MESSAGE_BYTES_MAX);
        assert!(watches || response["status"]["code"] == 500);
    }
    let may_mutate = rules.allowed_to_mutate || rules.audit;
    assert!(response.get("patch").is_none() || (may_mutate && !watches), "changed unasked");
    if !decision.allowed {
        return;
    }
    assert!(is_json(results));
    let Some(results) = str::from_utf8(results).ok().and_then(reading) else { return };
    let results = results.as_array().expect("a list");
    match (rules.contract, results.as_slice()) {
        (Contract::Gatekeeper, []) => {}
        (Contract::Gatekeeper, [only]) => assert_eq!(only["result"], serde_json::json!([])),
        (_, [only]) => assert_eq!(only["result"]["response"]["allowed"], true),
        (_, results) => panic!("{} results", results.len()),
    }
});
