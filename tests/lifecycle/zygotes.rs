//! The lives of zygotes and of the workers that are forked from them.

use std::thread;

use harness::{Daemon, Place, children_of, is_alive, policy, request, status_field};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{ACCEPTING, WAPC, assert_allowed};

const WORKERS: usize = 2;

/// A daemon with two workers that were forked, of a policy that does this and then accepts.
fn forked(body: &str) -> (Daemon, Pid) {
    let place = Place::new();
    place.write("started.wasm", policy(WAPC, ACCEPTING, body));
    let policies = "started: {module: started.wasm, start: snapshot, warmup: none}\n";
    let arguments = ["--workers", "2", "--policy-timeout", "30", "--log-level", "debug"];
    let mut daemon = Daemon::start_ready(place, policies, &arguments);
    wait_for_workers(&mut daemon);
    let zygotes = daemon.zygotes();
    assert_eq!(zygotes.len(), 1, "{zygotes:?}");
    let zygote = zygotes[0];
    let mut workers = daemon.workers();
    workers.sort_unstable();
    assert_eq!(children_of(zygote), workers);
    (daemon, zygote)
}

fn wait_for_workers(daemon: &mut Daemon) {
    daemon.wait_for("both workers", |daemon| {
        let is_serving = |pid: &Pid| status_field(*pid, "Seccomp_filters").as_deref() == Some("3");
        let workers = daemon.workers();
        workers.len() == WORKERS && workers.iter().all(is_serving)
    });
}

fn ask(daemon: &Daemon) {
    assert_allowed(&daemon.post("/validate/started", request("pod-ok.json")));
}

/// One of its workers works, the other one idles.
fn nothing_outlives_the_daemon(signal: Signal) {
    let (mut daemon, zygote) = forked("(call $sleep (i32.const 700))");
    let all: Vec<_> = daemon.workers().into_iter().chain([zygote]).collect();
    let mut client = daemon.client();
    let asking = thread::spawn(move || client.post("/validate/started", request("pod-ok.json")));
    daemon.wait_for("the guest to begin", |daemon| daemon.log().contains("evaluation starts"));
    daemon.signal(signal);
    if signal == Signal::SIGKILL {
        assert_eq!(daemon.wait(), None);
        daemon.wait_for("all to go", |_| !all.iter().any(|process| is_alive(*process)));
        assert!(asking.join().is_err(), "there can't be an answer");
        return;
    }
    assert_eq!(daemon.wait(), Some(0), "{}", daemon.log());
    assert_allowed(&asking.join().unwrap());
    for process in all {
        assert_eq!(status_field(process, "State"), None, "{process} is not even a zombie");
    }
    assert!(!daemon.log().contains("\"WARN\""), "{}", daemon.log());
}

#[test]
fn no_zygote_and_no_forked_worker_outlives_a_daemon_that_is_stopped() {
    nothing_outlives_the_daemon(Signal::SIGTERM);
}

#[test]
fn nor_one_that_is_interrupted() {
    nothing_outlives_the_daemon(Signal::SIGINT);
}

#[test]
fn nor_one_that_is_killed() {
    nothing_outlives_the_daemon(Signal::SIGKILL);
}

/// A terminal's Ctrl-C goes to every process of the foreground group; workers are in none of
/// the daemon's.
#[test]
fn a_terminal_does_not_reach_zygotes_and_forked_workers() {
    let (daemon, zygote) = forked("");
    let group = |pid: Pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields = stat.rsplit_once(')').unwrap().1;
        fields.split_whitespace().nth(2).unwrap().to_owned()
    };
    for process in daemon.workers().into_iter().chain([zygote]) {
        assert_ne!(group(process), group(daemon.pid()));
    }
}

#[test]
fn a_policy_whose_zygote_is_killed_is_back_by_itself() {
    let (mut daemon, zygote) = forked("");
    let lost = daemon.workers();
    kill(zygote, Signal::SIGKILL).unwrap();
    daemon.wait_for("its workers to go", |_| !lost.iter().any(|worker| is_alive(*worker)));
    // Who asks sooner may still be given to one of them.
    daemon.wait_for("the loss to be told", |daemon| {
        daemon.log().matches("\"idle ").count() == WORKERS
    });
    // This one waits for a replacement.
    ask(&daemon);
    wait_for_workers(&mut daemon);
    daemon.wait_until_ready();
    let [successor] = daemon.zygotes()[..] else { panic!("{:?}", daemon.zygotes()) };
    assert_ne!(successor, zygote);
    assert_eq!(status_field(zygote, "State"), None, "it is reaped");
    ask(&daemon);
}

/// It goes on as a sibling that nobody has disturbed.
fn a_lost_worker_is_told_and_replaced(signal: Signal) {
    let (mut daemon, zygote) = forked("");
    let before = daemon.workers();
    let (victim, sibling) = (before[0], before[1]);
    kill(victim, signal).unwrap();
    let told = format!("idle worker (role serve) was killed by {signal}");
    daemon.wait_for("the loss to be told", |daemon| daemon.log().contains(&told));
    wait_for_workers(&mut daemon);
    assert_eq!(daemon.zygotes(), [zygote]);
    let workers = daemon.workers();
    assert!(workers.contains(&sibling) && !workers.contains(&victim), "{workers:?}");
    assert_eq!(status_field(victim, "State"), None, "it is reaped");
    assert_eq!(daemon.log().matches("\"WARN\"").count(), 1, "{}", daemon.log());
    ask(&daemon);
}

#[test]
fn a_forked_worker_that_is_killed_is_replaced_from_the_same_zygote() {
    a_lost_worker_is_told_and_replaced(Signal::SIGKILL);
}

/// The signal is told as the zygote has it, which is not the one of any rule of ours.
#[test]
fn and_so_is_one_that_ends_by_another_signal() {
    a_lost_worker_is_told_and_replaced(Signal::SIGTERM);
}

#[test]
fn a_forked_worker_whose_guest_traps_is_replaced_and_told_of() {
    let (mut daemon, zygote) = forked("unreachable");
    let workers = daemon.workers();
    let answer = daemon.post("/validate/started", request("pod-ok.json")).response();
    assert_eq!((&answer["allowed"], &answer["status"]["code"]), (&false.into(), &500.into()));
    daemon.wait_for("the one that broke to go", |daemon| {
        daemon.workers().iter().filter(|worker| workers.contains(worker)).count() == WORKERS - 1
    });
    wait_for_workers(&mut daemon);
    assert!(daemon.log().contains("trap: "), "{}", daemon.log());
    assert_eq!(daemon.zygotes(), [zygote]);
}
