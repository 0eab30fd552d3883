//! The daemon's life: start, readiness, signals, crashes, what stays on disk.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests fail by panicking"
)]

#[path = "lifecycle/cache.rs"]
mod cache;
#[path = "lifecycle/zygotes.rs"]
mod zygotes;

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use harness::{
    Answer, Daemon, PATIENCE, Place, is_alive, policy, request, run, skipped, status_field,
    user_arguments,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Group, Pid, geteuid};
use serde_json::{Value, json};

const WAPC: &str = "kubewarden-wapc";

const ACCEPTING: &str = r#"{"accepted":true}"#;

/// A daemon over one policy that accepts everything.
fn accepting(place: Place, arguments: &[&str]) -> Daemon {
    place.write("yes.wasm", policy(WAPC, ACCEPTING, ""));
    let mut daemon = Daemon::start_ready(place, "yes: {module: yes.wasm}\n", arguments);
    // All lines about the start are in the log then.
    daemon.wait_until_tried();
    daemon
}

/// A daemon over one policy that sleeps before it accepts.
fn slow(milliseconds: u32, arguments: &[&str]) -> Daemon {
    let place = Place::new();
    let body = format!("(call $sleep (i32.const {milliseconds}))");
    place.write("slow.wasm", policy(WAPC, ACCEPTING, &body));
    let arguments =
        [&["--workers", "2", "--policy-timeout", "30", "--log-level", "debug"], arguments].concat();
    let mut daemon = Daemon::start_ready(place, "slow: {module: slow.wasm}\n", &arguments);
    daemon.wait_for("both workers", |daemon| daemon.workers().len() == 2);
    daemon
}

/// Asks the slow policy, and returns when it is asleep.
fn ask_slow(daemon: &mut Daemon) -> JoinHandle<Answer> {
    let mut client = daemon.client();
    let asking = thread::spawn(move || client.post("/validate/slow", request("pod-ok.json")));
    daemon.wait_for("the guest to begin", |daemon| daemon.log().contains("evaluation starts"));
    asking
}

#[track_caller]
fn assert_allowed(answer: &Answer) {
    assert_eq!(answer.response()["allowed"], true, "{}", String::from_utf8_lossy(&answer.body));
}

/// Ends a daemon in order and keeps its directory.
fn stop(mut daemon: Daemon) -> Place {
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0), "{}", daemon.log());
    std::mem::take(&mut daemon.place)
}

/// `conclave serve` in the place of another daemon, which is expected not to work.
fn serve_in_vain(place: &Place, arguments: &[&str]) -> String {
    let paths = ["policies.yml", "socket", "cache"].map(|name| place.path(name));
    let [policies, socket, cache] = paths.each_ref().map(|path| path.to_str().unwrap());
    let fixed = ["serve", "--policies", policies, "--socket", socket, "--cache-dir", cache];
    let output = run(&[&fixed, user_arguments(), arguments].concat(), b"");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    stderr
}

#[test]
fn readiness_comes_when_every_policy_serves_and_no_sooner() {
    let place = Place::new();
    place.copy_policy("go-labels.wasm");
    place.write("yes.wasm", policy(WAPC, ACCEPTING, ""));
    let mut daemon = Daemon::start(
        place,
        "quick: {module: yes.wasm}\nbig: {module: go-labels.wasm, settings: {required: [team]}}\n",
        &[],
    );
    // Compiling the big one takes seconds.
    let answer = daemon.get("/readiness");
    assert_eq!(answer.status, 503);
    assert_eq!(answer.json()["policies"]["big"], "starting");
    assert_eq!(daemon.get("/liveness").status, 200);

    let mut client = daemon.client();
    daemon.wait_for("readiness", |_| client.send("GET", "/readiness", &[], b"").status == 200);
    for (name, allowed) in [("quick", true), ("big", false)] {
        let response = client.post(&format!("/validate/{name}"), request("pod-ok.json")).response();
        assert_eq!(response["allowed"], allowed, "{name}");
        assert_ne!(response["status"]["code"], 500, "{name}");
    }
    daemon.wait_until_tried();
    let tried =
        daemon.log_lines().into_iter().find(|line| line["message"] == "all policies were tried");
    let tried = tried.unwrap();
    assert_eq!((&tried["serving"], &tried["total"]), (&json!(2), &json!(2)));
}

#[test]
fn a_request_that_comes_too_early_waits_for_its_policy() {
    let place = Place::new();
    place.copy_policy("pod-guard.wasm");
    let daemon = Daemon::start(place, "guard: {module: pod-guard.wasm}\n", &[]);
    assert_allowed(&daemon.post("/validate/guard", request("pod-ok.json")));
}

fn a_signal_ends_the_daemon_in_order(signal: Signal) {
    let mut daemon = slow(700, &[]);
    let mut idle = daemon.client();
    assert_eq!(idle.send("GET", "/liveness", &[], b"").status, 200);
    let workers = daemon.workers();
    let asking = ask_slow(&mut daemon);

    daemon.signal(signal);
    daemon.wait_for("the socket to go", |daemon| !daemon.socket().exists());
    UnixStream::connect(daemon.socket()).unwrap_err();
    let answer = asking.join().unwrap();
    assert_allowed(&answer);
    assert!(answer.head.contains("\r\nconnection: close"), "{}", answer.head);

    // The idle connection did not hold up the end.
    assert_eq!(daemon.wait(), Some(0), "{}", daemon.log());
    assert!(daemon.log().contains("\"stopped\""), "{}", daemon.log());
    for worker in workers {
        assert_eq!(status_field(worker, "State"), None, "{worker} is not even a zombie");
    }
}

#[test]
fn sigterm_lets_requests_in_flight_finish_and_nothing_stays() {
    a_signal_ends_the_daemon_in_order(Signal::SIGTERM);
}

#[test]
fn sigint_does_the_same_as_sigterm() {
    a_signal_ends_the_daemon_in_order(Signal::SIGINT);
}

#[test]
fn requests_in_flight_get_no_more_than_the_grace_period() {
    let mut daemon = slow(25_000, &["--grace-period", "0.2"]);
    let workers = daemon.workers();
    let mut client = daemon.client();
    let asking = thread::spawn(move || {
        // The connection ends without an answer, so the client panics: that is the point.
        client.post("/validate/slow", request("pod-ok.json"))
    });
    daemon.wait_for("the guest to begin", |daemon| daemon.log().contains("evaluation starts"));
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0), "{}", daemon.log());
    assert!(asking.join().is_err(), "there can't be an answer");
    assert!(daemon.log().contains("grace period is over"), "{}", daemon.log());
    assert!(!workers.into_iter().any(is_alive));
}

#[test]
fn the_daemon_can_be_ended_while_it_compiles() {
    let place = Place::new();
    place.copy_policy("go-labels.wasm");
    let mut daemon = Daemon::start(place, "big: {module: go-labels.wasm}\n", &[]);
    daemon.wait_for("the compiler", |daemon| !daemon.workers().is_empty());
    let compilers = daemon.workers();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait(), Some(0), "{}", daemon.log());
    assert!(!daemon.socket().exists());
    assert!(!compilers.into_iter().any(is_alive));
}

#[test]
fn a_request_that_waits_for_its_policy_is_answered_when_the_daemon_stops() {
    let place = Place::new();
    place.copy_policy("go-labels.wasm");
    let policies_yml = "big: {module: go-labels.wasm, settings: {required: [team]}}\n";
    let mut daemon = Daemon::start(place, policies_yml, &[]);
    let mut waiting = daemon.client();
    let body = request("pod-ok.json");
    let head = format!(
        "POST /validate/big HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    waiting.stream().write_all((head + &body).as_bytes()).unwrap();
    // The daemon takes up requests in the order in which they come.
    assert_eq!(daemon.get("/liveness").status, 200);
    daemon.signal(Signal::SIGTERM);
    // With its verdict or with the news that there won't be one, but with something.
    let answer = waiting.read();
    assert!(matches!(answer.status, 200 | 503), "{answer:?}");
    assert_eq!(daemon.wait(), Some(0), "{}", daemon.log());
}

#[test]
fn no_worker_outlives_a_daemon_that_is_killed() {
    let mut daemon = slow(25_000, &[]);
    let workers = daemon.workers();
    // One works, one idles.
    let mut client = daemon.client();
    let asking = thread::spawn(move || client.post("/validate/slow", request("pod-ok.json")));
    daemon.wait_for("the guest to begin", |daemon| daemon.log().contains("evaluation starts"));
    daemon.signal(Signal::SIGKILL);
    assert_eq!(daemon.wait(), None);
    daemon.wait_for("the workers to go", |_| !workers.iter().any(|worker| is_alive(*worker)));
    assert!(asking.join().is_err(), "there can't be an answer");
}

#[test]
fn a_worker_that_is_killed_is_replaced() {
    let mut daemon = accepting(Place::new(), &["--workers", "1"]);
    for round in 0..3 {
        let workers = daemon.workers();
        let [victim] = workers.as_slice() else { panic!("{workers:?}") };
        kill(*victim, Signal::SIGKILL).unwrap();
        daemon.wait_for("the loss to be noticed", |daemon| {
            daemon.log().matches("idle worker (role serve) was killed by SIGKILL").count() > round
        });
        // This one waits for the replacement.
        assert_allowed(&daemon.post("/validate/yes", request("pod-ok.json")));
        daemon.wait_until_ready();
        assert_eq!(status_field(*victim, "State"), None, "it is reaped");
        daemon.wait_for("the replacement", |daemon| daemon.workers().len() == 1);
    }
}

#[test]
fn a_request_whose_worker_is_killed_is_rejected() {
    let mut daemon = slow(20_000, &[]);
    let asking = ask_slow(&mut daemon);
    let busy_or_idle = daemon.workers();
    for worker in &busy_or_idle {
        kill(*worker, Signal::SIGKILL).unwrap();
    }
    let response = asking.join().unwrap().response();
    assert_eq!(response["allowed"], false);
    let status =
        json!({"message": "internal server error: the policy's worker was lost", "code": 500});
    assert_eq!(response["status"], status);
    daemon.wait_for("both replacements", |daemon| {
        let workers = daemon.workers();
        workers.len() == 2 && !workers.iter().any(|worker| busy_or_idle.contains(worker))
    });
    daemon.wait_until_ready();
}

#[test]
fn a_live_socket_is_left_alone_and_a_stale_one_is_replaced() {
    let mut daemon = accepting(Place::new(), &[]);
    let inode = fs::metadata(daemon.socket()).unwrap().ino();
    let stderr = serve_in_vain(&daemon.place, &[]);
    assert!(stderr.contains("conclave: another process listens on "), "{stderr}");
    assert_eq!(fs::metadata(daemon.socket()).unwrap().ino(), inode);
    assert_allowed(&daemon.post("/validate/yes", request("pod-ok.json")));

    daemon.signal(Signal::SIGKILL);
    assert_eq!(daemon.wait(), None);
    let place = std::mem::take(&mut daemon.place);
    assert!(place.path("socket").exists(), "a killed daemon can't clean up");
    let daemon = accepting(place, &[]);
    assert_allowed(&daemon.post("/validate/yes", request("pod-ok.json")));
    let place = stop(daemon);
    assert!(!place.path("socket").exists());

    place.write("socket", "precious");
    let stderr = serve_in_vain(&place, &[]);
    assert!(stderr.contains("socket exists and is not a socket"), "{stderr}");
    assert_eq!(fs::read(place.path("socket")).unwrap(), b"precious");
}

#[test]
fn the_socket_is_private_unless_its_permissions_are_given() {
    let mode = |daemon: &Daemon| fs::metadata(daemon.socket()).unwrap().mode() & 0o777;
    let daemon = accepting(Place::new(), &[]);
    assert_eq!(mode(&daemon), 0o600);
    let place = stop(daemon);
    let daemon = accepting(place, &["--socket-mode", "660"]);
    assert_eq!(mode(&daemon), 0o660);
    let place = stop(daemon);

    let own = fs::metadata(place.path("")).unwrap().gid();
    let Some(group) = Group::from_gid(own.into()).unwrap() else {
        skipped(&format!("--socket-group can't be tried: group {own} has no name"));
        return;
    };
    let daemon = accepting(place, &["--socket-mode", "640", "--socket-group", &group.name]);
    assert_eq!(fs::metadata(daemon.socket()).unwrap().gid(), own);
    assert_eq!(mode(&daemon), 0o640);
}

#[test]
fn a_start_that_fails_leaves_no_socket_in_the_way_of_the_next() {
    let place = stop(accepting(Place::new(), &[]));
    let stderr = serve_in_vain(&place, &["--socket-group", "no-such-group"]);
    assert!(stderr.contains("there is no group \"no-such-group\""), "{stderr}");
    assert!(!place.path("socket").exists());
}

#[test]
fn a_stale_socket_that_its_owner_may_not_open_is_replaced_too() {
    // Members of a group may ask, the daemon's own user may not.
    let arguments = ["--socket-mode", "060"];
    let place = Place::new();
    if !geteuid().is_root() {
        skipped("a socket that its owner may not open: only root can tell that it works");
        return;
    }
    let mut daemon = accepting(place, &arguments);
    daemon.signal(Signal::SIGKILL);
    assert_eq!(daemon.wait(), None);
    let daemon = accepting(std::mem::take(&mut daemon.place), &arguments);
    assert_allowed(&daemon.post("/validate/yes", request("pod-ok.json")));
}

#[test]
fn every_verdict_is_one_line_of_the_log() {
    let place = Place::new();
    place.write("yes.wasm", policy(WAPC, ACCEPTING, ""));
    place
        .write("no.wasm", policy(WAPC, r#"{"accepted":false,"message":"not now","code":409}"#, ""));
    place.write("trap.wasm", policy(WAPC, ACCEPTING, "unreachable"));
    let policies_yml = "yes: {module: yes.wasm}\nno: {module: no.wasm}\n\
                        watch: {module: no.wasm, policyMode: monitor}\n\
                        trap: {module: trap.wasm}\nabsent: {module: absent.wasm}\n";
    let mut daemon = Daemon::start(place, policies_yml, &["--workers", "1"]);
    daemon.wait_until_tried();
    let asked = [
        ("yes", true, None),
        ("no", false, Some(409)),
        ("watch", true, Some(409)),
        ("trap", false, Some(500)),
        ("absent", false, Some(500)),
    ];
    let mut client = daemon.client();
    for (index, (name, ..)) in asked.iter().enumerate() {
        let mut review: Value = serde_json::from_str(&request("pod-ok.json")).unwrap();
        review["request"]["uid"] = json!(format!("uid-{index}"));
        client.post(&format!("/validate/{name}"), review.to_string());
    }
    let verdicts = |daemon: &Daemon| -> Vec<Value> {
        daemon.log_lines().into_iter().filter(|line| line["message"] == "verdict").collect()
    };
    daemon.wait_for("the lines", |daemon| verdicts(daemon).len() >= asked.len());
    client.post("/validate/stranger", request("pod-ok.json"));
    daemon.wait_for("the refusal", |daemon| daemon.log().contains("unknown policy: stranger"));

    let lines = verdicts(&daemon);
    assert_eq!(lines.len(), asked.len(), "one line for each verdict, none for a refusal");
    for (index, (line, (name, allowed, code))) in lines.iter().zip(asked).enumerate() {
        assert_eq!(line["request_uid"], format!("uid-{index}"));
        assert_eq!(line["policy"], name);
        assert_eq!(line["endpoint"], "validate");
        assert_eq!(line["allowed"], allowed, "{line}");
        assert_eq!(line.get("code").and_then(Value::as_u64), code, "{line}");
        assert_eq!(line["peer_uid"], geteuid().as_raw());
        let total = line["total_us"].as_u64().unwrap();
        if name == "absent" {
            assert!(line.get("worker_us").is_none(), "no worker was asked: {line}");
        } else {
            let (queue, worker) =
                (line["queue_us"].as_u64().unwrap(), line["worker_us"].as_u64().unwrap());
            assert!(worker > 0 && queue + worker <= total, "{line}");
        }
    }
}

/// Every key of a log line, in a flat object, is there once: readers take the first or the
/// last of two.
#[test]
fn a_client_that_takes_no_answers_is_dropped() {
    let daemon = accepting(Place::new(), &[]);
    let mut client = daemon.client();
    client.stream().set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    let asked = Instant::now();
    // Answers fill the socket, then requests do; then nothing moves until the daemon has had
    // enough. A part of a request that was written before the pause spoils the next: no matter.
    let error = loop {
        match client.stream().write_all(b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n") {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => break error,
            Ok(()) => {}
        }
        assert!(asked.elapsed() < PATIENCE, "the client is still there");
    };
    let dropped = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
    assert!(dropped.contains(&error.kind()), "{error}");
    assert!(asked.elapsed() > Duration::from_secs(5), "dropped at once");
    assert_eq!(daemon.get("/liveness").status, 200);
}

#[test]
fn no_log_line_repeats_a_key() {
    let place = Place::new();
    place
        .write("no.wasm", policy(WAPC, r#"{"accepted":false,"message":"not now"}"#, "(call $log)"));
    place.copy_policy("pod-guard.wasm");
    let mut daemon =
        Daemon::start_ready(place, "no: {module: no.wasm}\nguard: {module: pod-guard.wasm}\n", &[]);
    for (name, body, status) in [
        ("no", request("pod-ok.json").as_str(), 200),
        ("guard", &request("pod-privileged.json"), 200),
        ("no", "{", 400),
        ("stranger", &request("pod-ok.json"), 404),
    ] {
        assert_eq!(daemon.post(&format!("/validate/{name}"), body).status, status);
    }
    daemon.wait_for("the last line", |daemon| daemon.log().contains("stranger"));
    for line in daemon.log().lines() {
        for key in ["message", "timestamp", "level", "policy", "error", "text"] {
            assert!(line.matches(&format!("\"{key}\":")).count() <= 1, "{line}");
        }
    }
}

/// Not a daemon's business, but what the tests above rely on.
#[test]
fn a_process_that_is_gone_is_not_alive() {
    assert!(is_alive(Pid::this()));
    assert!(!is_alive(Pid::from_raw(i32::MAX)));
}
