//! The test policies: each gives the same verdicts however it is started.

use std::path::PathBuf;

use harness::{Daemon, Place, request, skipped};
use serde_json::Value;

use crate::STARTS;
use crate::scene::key;

/// A policy, its settings, and what it is asked at which endpoint, with whether it accepts.
type Case = (&'static str, &'static str, &'static str, &'static [(&'static str, bool)]);

const CASES: [Case; 6] = [
    (
        "pod-guard",
        "{}",
        "validate",
        &[
            ("pod-ok.json", true),
            ("pod-privileged.json", false),
            ("deployment-privileged.json", false),
        ],
    ),
    (
        "host-guard",
        "{}",
        "validate",
        &[("pod-ok.json", true), ("pod-careless.json", false), ("pod-delete.json", true)],
    ),
    (
        "secret-guard",
        "{}",
        "validate",
        &[("pod-ok.json", true), ("pod-careless.json", false), ("pod-delete.json", true)],
    ),
    (
        "label-adder",
        "{labels: {cost-center: '4711'}}",
        "validate",
        &[("pod-ok.json", true), ("pod-labelled.json", true)],
    ),
    (
        "raw-gate",
        "{validUsers: [tonio], validActions: [eats], validResources: [hay]}",
        "validate_raw",
        &[("raw-ok.json", true), ("raw-denied.json", false)],
    ),
    (
        "go-labels",
        "{required: [app.kubernetes.io/name], patterns: {team: '[a-z]+'}}",
        "validate",
        &[("pod-ok.json", true), ("pod-labelled.json", true), ("pod-delete.json", true)],
    ),
];

#[test]
fn the_test_policies_say_the_same_however_they_are_started() {
    let mut first: Option<Vec<Value>> = None;
    for start in STARTS {
        let place = Place::new();
        let mut policies = String::new();
        for (name, settings, ..) in CASES {
            place.copy_policy(&format!("{name}.wasm"));
            policies += &format!(
                "{name}:\n  module: {name}.wasm\n  allowedToMutate: true\n\
                 \u{20} timeoutEvalSeconds: 20\n  settings: {settings}\n{}",
                key(start)
            );
        }
        let daemon = Daemon::start_ready(place, &policies, &["--workers", "1"]);
        let mut answers = Vec::new();
        for _ in 0..3 {
            for (name, _, endpoint, asked) in CASES {
                for (file, accepts) in asked {
                    let answer =
                        daemon.post(&format!("/{endpoint}/{name}"), request(file)).response();
                    assert_eq!(answer["allowed"], *accepts, "{name}, {file}: {answer}");
                    assert_ne!(answer["status"]["code"], 500, "{name}, {file}: {answer}");
                    answers.push(answer);
                }
            }
        }
        assert_eq!(first.get_or_insert_with(|| answers.clone()), &answers, "under {start:?}");
    }
}

/// Go's official compiler makes large modules, so this one is built where the compiler is.
#[test]
fn a_go_program_may_read_from_several_goroutines() {
    let module =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/policies/heavy/go-readers.wasm");
    let Ok(module) = std::fs::read(module) else {
        skipped("go-readers.wasm is not there: tests/policies/heavy/build.sh makes it");
        return;
    };
    for start in STARTS {
        let place = Place::new();
        place.write("readers.wasm", &module);
        let policies =
            format!("readers:\n  module: readers.wasm\n  timeoutEvalSeconds: 20\n{}", key(start));
        let daemon = Daemon::start_ready(place, &policies, &["--workers", "1"]);
        for length in [0, 10, 100_000, 3, 20] {
            let body = format!(r#"{{"request":"{}"}}"#, "x".repeat(length));
            let answer = daemon.post("/validate_raw/readers", body).response();
            // What its document has around the request.
            let read = length + r#"{"request":"","settings":{}}"#.len();
            assert_eq!(answer["status"]["message"], format!("{read} bytes"), "{start:?}: {answer}");
        }
    }
}
