//! Very many requests leave nothing behind: the same processes, no more descriptors, threads
//! and mappings, and no more memory.
//!
//! `CONCLAVE_ENDURANCE_REQUESTS` is how many there are; a million takes minutes.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::thread;

use harness::{Client, Daemon, Place, request, skipped, status_field};
use nix::unistd::{Pid, geteuid};

/// The ways to start guests, as the key `start` of a policy has them.
const STARTS: [&str; 2] = ["fresh", "snapshot"];

const REQUESTS_DEFAULT: usize = 4_000;

/// Part of the requests that comes first, until caches and pools have what they keep.
const SETTLING_PART: usize = 4;

/// How much more memory a process may have at the end.
const GROWTH_KIB_MAX: u64 = 4 << 10;

/// How many more mappings a process may have at the end: an allocator's arena may be split.
const MAPPINGS_MAX: usize = 8;

/// How many more threads: the daemon has some for long work, which come and go.
const THREADS_MAX: usize = 8;

const CLIENTS: usize = 4;

/// What is asked in turn, and whether it is accepted.
const QUESTIONS: [(&str, &str, bool); 6] = [
    ("pod-guard", "pod-ok.json", true),
    ("host-guard", "pod-careless.json", false),
    ("go-labels", "pod-ok.json", true),
    ("pod-guard", "pod-privileged.json", false),
    ("host-guard", "pod-ok.json", true),
    ("go-labels", "pod-labelled.json", true),
];

/// What a process holds.
#[derive(Debug)]
struct Holdings {
    memory_kib: u64,
    threads: usize,
    /// Of these only root is told about workers.
    descriptors: Option<usize>,
    mappings: Option<usize>,
}

fn holdings(pid: Pid) -> Holdings {
    let kibibytes = |name| -> u64 {
        let field = status_field(pid, name).unwrap();
        field.split_whitespace().next().unwrap().parse().unwrap()
    };
    Holdings {
        memory_kib: kibibytes("RssAnon") + kibibytes("RssShmem"),
        threads: status_field(pid, "Threads").unwrap().parse().unwrap(),
        descriptors: fs::read_dir(format!("/proc/{pid}/fd")).ok().map(Iterator::count),
        mappings: fs::read_to_string(format!("/proc/{pid}/maps"))
            .ok()
            .map(|maps| maps.lines().count()),
    }
}

/// What the daemon and each of its workers hold, by process.
fn all_holdings(daemon: &Daemon) -> BTreeMap<i32, Holdings> {
    let pids = daemon.workers().into_iter().chain([daemon.pid()]);
    pids.map(|pid| (pid.as_raw(), holdings(pid))).collect()
}

/// Shares the requests out to the clients. They stay connected, so that no connection is just
/// being closed when somebody counts.
fn ask(clients: &mut [Client], requests: usize) {
    let bodies = QUESTIONS.map(|(policy, file, accepts)| {
        (format!("/validate/{policy}"), request(file), format!("\"allowed\":{accepts}"))
    });
    let (bodies, step) = (&bodies, clients.len());
    thread::scope(|scope| {
        for (first, client) in clients.iter_mut().enumerate() {
            scope.spawn(move || {
                for index in (first..requests).step_by(step) {
                    let (path, body, expected) = &bodies[index % bodies.len()];
                    let answer = String::from_utf8(client.post(path, body).body).unwrap();
                    assert!(answer.contains(expected), "request {index}, {path}: {answer}");
                }
            });
        }
    });
}

#[test]
fn very_many_requests_leave_nothing_behind() {
    let requests = std::env::var("CONCLAVE_ENDURANCE_REQUESTS")
        .map_or(REQUESTS_DEFAULT, |count| count.parse().unwrap());
    for start in STARTS {
        let place = Place::new();
        let mut policies_yml = String::new();
        for (name, settings) in [
            ("pod-guard", "{}"),
            ("host-guard", "{}"),
            ("go-labels", "{required: [app.kubernetes.io/name]}"),
        ] {
            place.copy_policy(&format!("{name}.wasm"));
            policies_yml += &format!(
                "{name}:\n  module: {name}.wasm\n  settings: {settings}\n\
                 \u{20} timeoutEvalSeconds: 20\n  start: {start}\n\
                 \u{20} snapshot: {{maxAgeSeconds: 3600, maxUses: 100000000}}\n"
            );
        }
        // A line for each verdict would fill the disk.
        let arguments = ["--workers", "2", "--log-level", "warn"];
        let daemon = Daemon::start_ready(place, &policies_yml, &arguments);
        let mut clients = [(); CLIENTS].map(|()| daemon.client());
        ask(&mut clients, requests / SETTLING_PART);
        let before = all_holdings(&daemon);
        ask(&mut clients, requests - requests / SETTLING_PART);
        let after = all_holdings(&daemon);
        compare(start, &before, &after);
    }
}

fn compare(start: &str, before: &BTreeMap<i32, Holdings>, after: &BTreeMap<i32, Holdings>) {
    assert_eq!(Vec::from_iter(before.keys()), Vec::from_iter(after.keys()), "under {start:?}");
    if !geteuid().is_root() {
        skipped("descriptors and mappings of workers are counted by root only");
    }
    for (pid, before) in before {
        let after = &after[pid];
        let about = format!("process {pid} under {start:?}: {before:?}, then {after:?}");
        assert!(after.memory_kib <= before.memory_kib + GROWTH_KIB_MAX, "{about}");
        assert!(after.threads <= before.threads + THREADS_MAX, "{about}");
        assert_eq!(before.descriptors, after.descriptors, "{about}");
        assert_eq!(before.mappings.is_some(), after.mappings.is_some(), "{about}");
        assert!(
            after.mappings.unwrap_or_default()
                <= before.mappings.unwrap_or_default() + MAPPINGS_MAX,
            "{about}"
        );
    }
}
