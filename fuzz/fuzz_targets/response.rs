//! A policy's answer, judged for a request: a byte that says how, the object under review, a
//! zero byte, and the answer. Nothing passes unless the answer says so in the required form,
//! and a patch leads from the object to the one that the policy wants.
#![no_main]

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use conclave_fuzz::{MESSAGE_BYTES_MAX, is_json, reading};
use conclave_ipc::message::Contract;
use conclave_supervisor::fuzzing::{Decision, Form, Rules, decide, decide_settings};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const UID: &str = "705ab4f5";

/// Of everything that an answer may hold, what makes it one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    Accepted,
    Rejected,
    Nothing,
}

fuzz_target!(|input: &[u8]| {
    let Some((how, rest)) = input.split_first() else { return };
    let bit = |number: u8| how & 1 << number != 0;
    let end = rest.iter().position(|byte| *byte == 0);
    let (object, answer) =
        end.map_or((&b"{\"a\":1}"[..], rest), |end| (&rest[..end], &rest[end + 1..]));
    let rules = Rules {
        contract: if bit(0) { Contract::Wasi } else { Contract::Wapc },
        audit: bit(1),
        monitor: bit(2),
        allowed_to_mutate: bit(3),
        message: bit(4).then_some("ask the platform team"),
    };
    let Ok(object) = str::from_utf8(object) else { return };
    let (form, body) = if bit(5) {
        (Form::Raw, format!(r#"{{"request":{{"uid":"{UID}","object":{object}}}}}"#))
    } else {
        let object = if bit(6) { String::new() } else { format!(",\"object\":{object}") };
        (Form::Review, review(&object))
    };
    if let Ok(decision) = decide(form, body.as_bytes(), answer, &rules) {
        check(&decision, answer, &rules);
        check_mutation(form, &body, answer, &decision, &rules);
    }
    check_settings(rules.contract, answer);
});

fn review(object: &str) -> String {
    format!(
        r#"{{"request":{{"uid":"{UID}","kind":{{"group":"","version":"v1","kind":"Pod"}},"resource":{{"group":"","version":"v1","resource":"pods"}},"operation":"CREATE","userInfo":{{}}{object}}}}}"#
    )
}

/// What the answer says under a key, by a reading of its own.
fn said(answer: &[u8], key: &str) -> Said {
    let Ok(members) = serde_json::from_slice::<conclave_fuzz::Members<'_>>(answer) else {
        return Said::Nothing;
    };
    let mut values = members.0.iter().filter(|(name, _)| name == key).map(|(_, value)| *value);
    match (values.next().map(serde_json::value::RawValue::get), values.next()) {
        (Some("true"), None) => Said::Accepted,
        (Some("false"), None) => Said::Rejected,
        _ => Said::Nothing,
    }
}

fn client_sees(decision: &Decision) -> Value {
    let body = str::from_utf8(&decision.body).expect("a body is text");
    let mut value = reading(body).unwrap_or_else(|| serde_json::from_str(body).expect("JSON"));
    value["response"].take()
}

fn check(decision: &Decision, answer: &[u8], rules: &Rules<'_>) {
    let response = client_sees(decision);
    assert_eq!(response["uid"], UID);
    let allowed = response["allowed"].as_bool().expect("a verdict");
    let said = said(answer, "accepted");
    if decision.allowed {
        assert_eq!(said, Said::Accepted);
        assert!(is_json(answer));
        assert_eq!(decision.failure, None);
    }
    let watches = rules.monitor && !rules.audit;
    assert!(!allowed || decision.allowed || watches, "allowed against the policy's word");
    assert!(!watches || allowed, "a policy that only watches has rejected");
    match &decision.failure {
        Some(message) => {
            assert!(!message.is_empty() && message.len() <= MESSAGE_BYTES_MAX);
            assert!(watches || response["status"]["code"] == 500);
        }
        None => assert_ne!(said, Said::Nothing),
    }
}

/// If the policy changes the object, the client is told how, or nothing passes.
fn check_mutation(form: Form, body: &str, answer: &[u8], decision: &Decision, rules: &Rules<'_>) {
    let response = client_sees(decision);
    let watches = rules.monitor && !rules.audit;
    let may_mutate = rules.allowed_to_mutate || rules.audit;
    let patch = response["patch"].as_str();
    assert_eq!(patch.is_some(), response["patchType"] == "JSONPatch");
    assert!(patch.is_none() || (may_mutate && !watches), "an object is changed unasked");

    let answer = str::from_utf8(answer).ok().and_then(reading);
    let (Some(mut body), Some(answer)) = (reading(body), answer) else { return };
    let key = if form == Form::Raw { "request" } else { "object" };
    let old = if form == Form::Raw { body[key].take() } else { body["request"][key].take() };
    let Some(new) = answer.get("mutated_object").filter(|new| !new.is_null()) else {
        assert_eq!(patch, None);
        return;
    };
    if watches || decision.failure.is_some() {
        return;
    }
    let mut patched = old.clone();
    if let Some(patch) = patch {
        let patch = STANDARD.decode(patch).expect("a patch is base64");
        let patch: json_patch::Patch = serde_json::from_slice(&patch).expect("a patch");
        json_patch::patch(&mut patched, &patch).expect("a patch fits its object");
        assert_ne!(patched, old, "a patch that changes nothing");
    }
    if response["allowed"] == true {
        assert_eq!(&patched, new);
    }
}

fn check_settings(contract: Contract, answer: &[u8]) {
    let (valid, message) = decide_settings(contract, answer);
    if valid {
        assert!(is_json(answer));
        assert_eq!(said(answer, "valid"), Said::Accepted);
    } else {
        assert!(said(answer, "valid") != Said::Nothing || message.is_some());
    }
}
