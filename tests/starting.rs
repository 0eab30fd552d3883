//! How policies come to a request: from the very start or from a state that is kept, as
//! measured or as configured, and how a state that has grown old is replaced.
//!
//! An honest liar stands in for the worker, so that it is known what each way costs.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use harness::{Daemon, PATIENCE, Place, conclave, request};
use serde_json::Value;

/// One policy: its name, the script of its workers, and its keys.
type Policy<'a> = (&'a str, &'a str, &'a str);

fn daemon(policies: &[Policy<'_>], arguments: &[&str]) -> Daemon {
    let place = Place::new();
    let mut text = String::new();
    for (name, script, keys) in policies {
        let module = place.write(&format!("{name}.wasm"), format!("{name}\n{script}\n"));
        text += &format!("{name}: {{module: {}, {keys}}}\n", module.display());
    }
    let liar = conclave().with_file_name("lying-worker");
    let common = ["--worker", liar.to_str().unwrap(), "--workers", "1", "--no-cache"];
    let mut daemon = Daemon::start(place, &text, &[&common, arguments].concat());
    daemon.wait_until_tried();
    daemon
}

/// What the log says about the choice for a policy.
fn choice(daemon: &Daemon, policy: &str) -> Value {
    let is_it = |line: &Value| line["policy"] == policy && line["message"] == "way to start chosen";
    let lines: Vec<_> = daemon.log_lines().into_iter().filter(is_it).collect();
    assert_eq!(lines.len(), 1, "{}", daemon.log());
    lines[0].clone()
}

fn ask(daemon: &Daemon, policy: &str) {
    let answer = daemon.client().post(&format!("/validate/{policy}"), request("pod-ok.json"));
    assert_eq!(answer.response()["allowed"], true, "{}", daemon.log());
}

#[test]
fn the_faster_way_is_chosen() {
    let slow_fresh = "validate\npause:20 verdict go-on";
    let slow_snapshot = "continue\npause:20 verdict go-on";
    let daemon = daemon(
        &[("slow-fresh", slow_fresh, ""), ("slow-snapshot", slow_snapshot, "start: auto")],
        &[],
    );
    for (policy, start) in [("slow-fresh", "snapshot"), ("slow-snapshot", "fresh")] {
        let line = choice(&daemon, policy);
        assert_eq!(line["start"], start, "{line}");
        assert!(line["reason"].as_str().unwrap().starts_with("measured "), "{line}");
        let (fresh, snapshot) = (line["fresh_us"].as_u64(), line["snapshot_us"].as_u64());
        assert_eq!(snapshot < fresh, start == "snapshot", "{line}");
        assert_eq!(line["start_us"], 0, "{line}");
        ask(&daemon, policy);
    }
    // The losers were ended.
    assert_eq!(daemon.workers().len(), 2);
}

#[test]
fn what_can_not_be_kept_is_started_fresh_unless_it_must_not_be() {
    let script = "start\nno-snapshot";
    let daemon =
        daemon(&[("lenient", script, "start: auto"), ("strict", script, "start: snapshot")], &[]);
    let line = choice(&daemon, "lenient");
    assert_eq!(line["start"], "fresh", "{line}");
    assert_eq!(line["reason"], "snapshot: it spoke too early", "{line}");
    ask(&daemon, "lenient");
    let readiness = daemon.get("/readiness").json();
    assert_eq!(
        readiness["policies"]["strict"],
        "bootstrap failure: no snapshot can be started: snapshot: it spoke too early"
    );
}

#[test]
fn what_is_configured_is_not_measured() {
    let slow = "continue\npause:20 verdict go-on";
    let daemon =
        daemon(&[("kept", slow, "start: snapshot"), ("fresh", slow, "")], &["--start", "fresh"]);
    for (policy, start) in [("kept", "snapshot"), ("fresh", "fresh")] {
        let line = choice(&daemon, policy);
        assert_eq!((&line["start"], &line["reason"]), (&start.into(), &"as configured".into()));
        assert_eq!(line["snapshot_us"], Value::Null, "{line}");
        ask(&daemon, policy);
    }
}

#[test]
fn a_guest_that_fails_at_its_practice_is_started_without() {
    let daemon = daemon(&[("shy", "practice\nno-snapshot", "start: snapshot")], &[]);
    assert_eq!(choice(&daemon, "shy")["start"], "snapshot");
    ask(&daemon, "shy");
}

#[test]
fn a_guest_that_does_not_answer_the_practice_request_serves_all_the_same() {
    let began = Instant::now();
    let silent = "validate\nsilence";
    let broken = "validate\nfault";
    let daemon = daemon(&[("silent", silent, ""), ("broken", broken, "")], &[]);
    // Only one that is started answers.
    let line = choice(&daemon, "silent");
    assert_eq!(line["start"], "snapshot", "{line}");
    assert!(line["reason"].as_str().unwrap().contains("in time"), "{line}");
    // Without a measure, it has not been slow to start.
    let line = choice(&daemon, "broken");
    assert_eq!(line["reason"], "not measured; a start takes 0 µs", "{line}");
    assert_eq!(daemon.get("/readiness").status, 200);
    assert!(began.elapsed() < PATIENCE / 3, "{:?}", began.elapsed());
}

#[test]
fn what_a_guest_says_at_its_practice_does_not_reach_the_log() {
    let talks = "validate\nlog:7 trace:7 call verdict go-on";
    let daemon = daemon(&[("talker", talks, "")], &["--log-level", "trace"]);
    assert_ne!(choice(&daemon, "talker")["fresh_us"], Value::Null);
    for message in ["guest output", "policy_log", "host call denied"] {
        assert!(!daemon.log().contains(message), "{}", daemon.log());
    }
}

/// Asks until so many workers have served, and every question is answered.
fn ask_until_renewed(daemon: &Daemon, policy: &str, workers: usize) -> usize {
    let (mut seen, mut asked, began) = (BTreeSet::new(), 0, Instant::now());
    let mut client = daemon.client();
    while seen.len() < workers {
        assert!(began.elapsed() < PATIENCE, "{}", daemon.log());
        let answer = client.post(&format!("/validate/{policy}"), request("pod-ok.json"));
        assert_eq!(answer.response()["allowed"], true, "{}", daemon.log());
        asked += 1;
        seen.extend(daemon.workers().iter().map(|pid| pid.as_raw()));
        std::thread::sleep(Duration::from_millis(1));
    }
    asked
}

#[test]
fn a_started_worker_is_replaced_after_so_many_uses() {
    let keys = "start: snapshot, snapshot: {maxUses: 10}";
    let mut daemon = daemon(&[("used", "", keys)], &["--log-level", "debug"]);
    let asked = ask_until_renewed(&daemon, "used", 4);
    assert!(asked > 20, "{asked}");
    let log = daemon.log();
    assert!(log.contains("worker is renewed"), "{log}");
    assert!(!log.contains("idle worker") && !log.contains("\"WARN\""), "{log}");
    daemon.wait_for("one worker", |daemon| daemon.workers().len() == 1);
}

#[test]
fn a_started_worker_is_replaced_after_some_time_and_nobody_waits_for_it() {
    let keys = "start: snapshot, snapshot: {maxAgeSeconds: 0.2}";
    let daemon = daemon(&[("old", "", keys)], &["--log-level", "debug"]);
    ask_until_renewed(&daemon, "old", 4);
    let log = daemon.log();
    assert!(log.contains("worker is renewed"), "{log}");
    assert!(!log.contains("\"WARN\""), "{log}");
}

#[test]
fn a_fresh_worker_is_not_replaced() {
    let keys = "start: fresh, snapshot: {maxUses: 1, maxAgeSeconds: 0.05}";
    let daemon = daemon(&[("fresh", "", keys)], &[]);
    let workers = daemon.workers();
    for _ in 0..20 {
        ask(&daemon, "fresh");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(daemon.workers(), workers);
}

#[test]
fn a_started_worker_that_dies_is_replaced_by_one_that_is_started() {
    let mut daemon = daemon(&[("mortal", "", "start: snapshot")], &[]);
    let victim = daemon.workers()[0];
    ask(&daemon, "mortal");
    nix::sys::signal::kill(victim, nix::sys::signal::Signal::SIGKILL).unwrap();
    daemon.wait_for("the replacement", |daemon| {
        let workers = daemon.workers();
        workers.len() == 1 && workers[0] != victim && daemon.get("/readiness").status == 200
    });
    let words = std::fs::read(format!("/proc/{}/cmdline", daemon.workers()[0])).unwrap();
    let words: Vec<_> = words.split(|byte| *byte == 0).collect();
    assert_eq!(words[1], b"snapshot");
    ask(&daemon, "mortal");
}

#[test]
fn a_warmup_that_is_no_request_fails_the_policy_by_name_and_key() {
    let daemon = daemon(&[("odd", "", "warmup: {uid: 5}"), ("even", "", "warmup: none")], &[]);
    let readiness = daemon.get("/readiness").json();
    let why = readiness["policies"]["odd"].as_str().unwrap();
    assert!(why.starts_with("bootstrap failure: warmup: "), "{why}");
    assert_eq!(choice(&daemon, "even")["reason"], "not measured; a start takes 0 µs");
}
