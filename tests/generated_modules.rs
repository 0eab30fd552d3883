//! Random modules as policies, many in one daemon and one daemon after the other.
//!
//! Whatever a module is, the daemon notices no more than that this policy fails: it lives, a
//! good policy answers all the while, each request has one answer, which is a yes only if the
//! guest has said so, and memory, descriptors and processes do not pile up.
//!
//! `CONCLAVE_GENERATED_SECONDS` is how long this goes on, and `CONCLAVE_GENERATED_SEED` with
//! which modules it begins.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "generated/entry.rs"]
mod entry;
#[path = "generated/modules.rs"]
mod modules;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::mpsc::{self, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use harness::{Daemon, Place, is_alive, request, skipped, status_field};
use modules::{Generated, Random, Says, generate};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, geteuid};

/// Policies of one daemon, beside the good one.
const POLICIES: usize = 24;

/// How often each of them is asked: what the first time left behind shows in the second.
const PASSES: usize = 2;

/// How much more memory the daemon may have after the last pass than after the first.
const GROWTH_KIB_MAX: u64 = 4 << 10;

/// How long a worker that is just being started may take to see that its channel is closed.
const OUTLIVE_TIME_MAX: Duration = Duration::from_secs(1);

/// Descriptors of connections that come and go while it is looked.
const CONNECTIONS_MAX: usize = 4;

const UID: &str = "705ab4f5-6393-11e8-b7cc-42010a800002";

#[test]
fn the_daemon_notices_no_more_than_failed_policies() {
    let seconds = setting("CONCLAVE_GENERATED_SECONDS", 10);
    let mut seed = setting("CONCLAVE_GENERATED_SEED", 1);
    if !geteuid().is_root() {
        skipped("the daemon's descriptors are not counted: only root may look at them");
    }
    let (started, mut seen) = (Instant::now(), BTreeMap::new());
    loop {
        let mut round = Round::new(seed);
        round.run();
        for (outcome, count) in std::mem::take(&mut round.seen) {
            *seen.entry(outcome).or_insert(0) += count;
        }
        if started.elapsed() >= Duration::from_secs(seconds) {
            break;
        }
        seed += 1;
    }
    drop(writeln!(std::io::stderr(), "answers to seeds up to {seed}: {seen:?}"));
    let answered = seen.keys().any(|(_, outcome)| *outcome != "fault");
    assert!(answered, "no guest got as far as an answer: {seen:?}");
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// One daemon and its policies.
struct Round {
    seed: u64,
    policies: Vec<Generated>,
    /// How often a module of which kind was answered how.
    seen: BTreeMap<(&'static str, &'static str), usize>,
}

impl Round {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let policies = (0..POLICIES).map(|number| generate(&mut random, number)).collect();
        Self { seed, policies, seen: BTreeMap::new() }
    }

    fn run(&mut self) {
        let mut daemon = self.start();
        let descriptors_max = descriptors(daemon.pid()) + CONNECTIONS_MAX;
        let mut memory_max = u64::MAX;
        for _ in 0..PASSES {
            thread::scope(|scope| {
                let (done, asking) = mpsc::channel::<()>();
                scope.spawn(|| {
                    let asking = asking;
                    while asking.try_recv() == Err(TryRecvError::Empty) {
                        neighbour_answers(&daemon);
                    }
                });
                for number in 0..POLICIES {
                    self.ask(&daemon, number);
                }
                // As a panic also does.
                drop(done);
            });
            settles(&daemon, memory_max, descriptors_max);
            memory_max = memory_kib(daemon.pid()) + GROWTH_KIB_MAX;
        }
        neighbour_answers(&daemon);
        let mut left = daemon.workers();
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait(), Some(0), "log:\n{}", daemon.log());
        // One that was just being started sees its channel closed.
        let start = Instant::now();
        while !left.is_empty() {
            left.retain(|worker| is_alive(*worker));
            let patient = start.elapsed() < OUTLIVE_TIME_MAX;
            assert!(left.is_empty() || patient, "workers that outlive their daemon: {left:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn start(&self) -> Daemon {
        let place = Place::new();
        let good = place.copy_policy("pod-guard.wasm");
        let mut policies = format!("neighbour:\n  module: file://{}\n", good.display());
        for (number, policy) in self.policies.iter().enumerate() {
            let module = place.write(&format!("{number}.wasm"), &policy.module);
            let module = module.display();
            policies +=
                &format!("p{number}:\n  module: file://{module}\n  timeoutEvalSeconds: 0.1\n");
        }
        let mut daemon = Daemon::start(place, &policies, &["--workers", "1"]);
        daemon.wait_until_tried();
        daemon
    }

    /// Asks a policy once; a second answer would be the answer to the question after it.
    fn ask(&mut self, daemon: &Daemon, number: usize) {
        let Generated { kind, says, .. } = self.policies[number];
        let mut client = daemon.client();
        let answer = client.post(&format!("/validate/p{number}"), request("pod-ok.json"));
        let answer = answer.response();
        let liveness = client.send("GET", "/liveness", &[], b"");
        assert_eq!((liveness.status, liveness.body.len()), (200, 0), "p{number}");

        assert_eq!(answer["uid"], UID, "p{number}: {answer}");
        assert!(answer.get("patch").is_none(), "p{number}: {answer}");
        let outcome = if answer["allowed"] == true {
            assert_eq!(says, Says::Yes, "p{number}, {kind}: {answer}");
            "yes"
        } else if answer["status"]["message"] == "generated" {
            assert_eq!(says, Says::No, "p{number}, {kind}: {answer}");
            "no"
        } else {
            assert_eq!(answer["allowed"], false, "p{number}, {kind}: {answer}");
            assert_eq!(answer["status"]["code"], 500, "p{number}, {kind}: {answer}");
            "fault"
        };
        *self.seen.entry((kind, outcome)).or_insert(0) += 1;
    }
}

impl Drop for Round {
    /// Keeps what has led to a finding.
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        let directory = kept(self.seed);
        for (number, Generated { kind, module, .. }) in self.policies.iter().enumerate() {
            drop(fs::write(directory.join(format!("p{number}-{kind}.wasm")), module));
        }
        let seed = self.seed;
        let directory = directory.display();
        drop(writeln!(std::io::stderr(), "seed {seed}; its modules are in {directory}"));
    }
}

fn kept(seed: u64) -> PathBuf {
    let directory = std::env::temp_dir().join(format!("conclave-generated-{seed}"));
    drop(fs::create_dir_all(&directory));
    directory
}

fn neighbour_answers(daemon: &Daemon) {
    for (name, allowed) in [("pod-ok.json", true), ("pod-privileged.json", false)] {
        let answer = daemon.post("/validate/neighbour", request(name)).response();
        assert_eq!(answer["allowed"], allowed, "{answer}");
    }
}

/// Waits until the daemon has no more than that: workers that are started again may have
/// some for a while.
fn settles(daemon: &Daemon, memory_max: u64, descriptors_max: usize) {
    let started = Instant::now();
    loop {
        let (memory, descriptors) = (memory_kib(daemon.pid()), descriptors(daemon.pid()));
        if memory <= memory_max && descriptors <= descriptors_max {
            return;
        }
        assert!(
            started.elapsed() < harness::PATIENCE,
            "{memory} KiB of {memory_max}, {descriptors} descriptors of {descriptors_max}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}

fn memory_kib(pid: Pid) -> u64 {
    let field = status_field(pid, "RssAnon").unwrap();
    field.trim_end_matches(" kB").trim().parse().unwrap()
}

/// None for an ordinary user, who may not look into a process that is not dumpable.
fn descriptors(pid: Pid) -> usize {
    if !geteuid().is_root() {
        return 0;
    }
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}
