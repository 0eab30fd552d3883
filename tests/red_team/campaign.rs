//! Many attempts at once: one daemon whose policies are the attempts, and an honest one.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use conclave_ipc::Phase;
use conclave_ipc::exit::WorkerExit;
use conclave_ipc::layers::{Layer, Layers};
use harness::{Daemon, Place, conclave, conclave_without, status_field};
use serde_json::Value;

use crate::attempts::{Attempt, First};
use crate::offered;

/// How long a whole campaign may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// How often the honest policy is asked meanwhile.
const PAUSE: Duration = Duration::from_millis(50);

/// What the guest of one evaluation may leave in the log, with what the log adds to it.
const LOGGED_BYTES_MAX: usize = 128 << 10;

/// Memory of the supervisor, in KiB: thousands of policies, and none of their output.
const SUPERVISOR_KIB_MAX: u64 = 64 << 10;

/// Room in its table of descriptors: some for each of the policies that are loaded side by side.
const DESCRIPTORS_MAX: u64 = 1024;

/// One attempt under one set of circumstances.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trial {
    pub(crate) attempt: &'static Attempt,
    /// When it is made.
    pub(crate) phase: Phase,
    /// Whether it is made by a worker that was forked from a zygote.
    pub(crate) forked: bool,
    /// The layer that is left out.
    pub(crate) without: Option<Layer>,
}

/// What the probe, and the table, call a worker at that time.
pub(crate) const fn role(phase: Phase, forked: bool) -> &'static str {
    if forked { "forked" } else { phase.name() }
}

impl Trial {
    /// Whether it tells anything. What ends at a deadline is a matter of the supervisor's, not
    /// of any layer nor role, and takes long.
    pub(crate) fn is_made(&self) -> bool {
        !matches!(self.attempt.first, First::Supervisor(_))
            || (self.phase == Phase::Serve && !self.forked && self.without.is_none())
    }

    fn policy(&self) -> String {
        let without = self.without.map(|layer| format!(" without {}", layer.name()));
        let attempt = self.attempt.id.replace('/', " ");
        format!("{attempt} {}{}", role(self.phase, self.forked), without.unwrap_or_default())
    }

    /// The words of its module, see the probe.
    fn module(&self, host: Host) -> String {
        let mut text = "red team\n".to_owned();
        if let (Host::Complete, Some(layer)) = (host, self.without) {
            writeln!(text, "without: {}", layer.name()).unwrap();
        }
        if self.phase == Phase::Compile {
            writeln!(text, "attempt: {}", self.attempt.id).unwrap();
        }
        text
    }
}

/// Where the daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Host {
    /// Here.
    Complete,
    /// Where namespaces of this kind can't be made.
    Without(&'static str),
}

/// What came of attempts.
#[derive(Debug)]
pub(crate) struct Campaign {
    /// Each with the word for its end.
    pub(crate) ends: Vec<(Trial, String)>,
    /// The layers that workers have here.
    pub(crate) offered: Layers,
}

impl Campaign {
    /// Makes the attempts, each in a worker of its own.
    pub(crate) fn run(host: Host, trials: &[Trial]) -> Self {
        let policies: Vec<_> = trials
            .iter()
            .map(|trial| Order {
                policy: trial.policy(),
                module: trial.module(host),
                attempt: trial.attempt.id.to_owned(),
                phase: trial.phase,
                forked: trial.forked,
            })
            .collect();
        let log = attack(host, &policies);
        let field = |line: &Value, name: &str| line[name].as_str().map(ToOwned::to_owned);
        let missing = log.iter().rev().find_map(|line| field(line, "missing")).unwrap_or_default();
        let ends = trials
            .iter()
            .map(|trial| (*trial, end_of(&log, &trial.policy(), trial.phase)))
            .collect();
        Self { ends, offered: offered(&missing) }
    }
}

/// One policy of the daemon.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) policy: String,
    /// The words of its module.
    pub(crate) module: String,
    pub(crate) attempt: String,
    pub(crate) phase: Phase,
    pub(crate) forked: bool,
}

/// Runs a daemon until all orders are carried out, and gives its log. It has lived through all
/// of it, answered for an honest policy all the time, and kept nothing.
pub(crate) fn attack(host: Host, orders: &[Order]) -> Vec<Value> {
    let place = Place::new();
    // Forked where that can be.
    let start = if host == Host::Complete { "snapshot" } else { "fresh" };
    let honest = place.write("honest", "red team\n");
    let mut policies = format!("honest: {{start: {start}, module: file://{}}}\n", honest.display());
    let mut modules = HashMap::new();
    for order in orders {
        let name = format!("module-{}", modules.len());
        let module = modules
            .entry(&order.module)
            .or_insert_with_key(|text| place.write(&name, text.as_bytes()));
        let (policy, module) = (&order.policy, module.display());
        let (attempt, role) = (&order.attempt, role(order.phase, order.forked));
        let start = if ["zygote", "forked"].contains(&role) { "snapshot" } else { "fresh" };
        writeln!(policies, "{policy:?}:\n  module: file://{module}").unwrap();
        writeln!(policies, "  start: {start}\n  warmup: none").unwrap();
        writeln!(policies, "  settings: {{attempt: {attempt:?}, role: {role:?}}}").unwrap();
    }
    let probe = conclave().with_file_name("red-team-probe");
    let rest = ["--no-cache", "--workers", "1", "--policy-timeout", "3", "--sandbox"];
    let arguments = [&["--worker", probe.to_str().unwrap()], &rest[..]].concat();
    let mut daemon = match host {
        Host::Complete => Daemon::start(place, &policies, &[&arguments[..], &["strict"]].concat()),
        Host::Without(kind) => Daemon::start_by(
            conclave_without(&[kind], &["serve"]),
            place,
            &policies,
            &[&arguments[..], &["best-effort"]].concat(),
        ),
    };
    let start = Instant::now();
    while !daemon.log().contains("all policies were tried") {
        assert!(start.elapsed() < PATIENCE, "the red team takes too long");
        assert_honest(&daemon);
        thread::sleep(PAUSE);
    }
    assert_honest(&daemon);
    daemon.wait_for("the workers to be gone, but one", |daemon| daemon.workers().len() == 1);
    assert_bounded(&daemon);
    daemon.log_lines()
}

/// The honest policy answers.
fn assert_honest(daemon: &Daemon) {
    let answer = daemon.post("/validate/honest", harness::request("pod-ok.json")).response();
    assert_eq!(answer["allowed"], true, "{answer}");
}

fn assert_bounded(daemon: &Daemon) {
    let number = |field| {
        let text = status_field(daemon.pid(), field).unwrap();
        text.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert!(number("VmHWM") < SUPERVISOR_KIB_MAX, "{} KiB", number("VmHWM"));
    // The size of the table of descriptors, which only ever grows.
    assert!(number("FDSize") <= DESCRIPTORS_MAX, "{} descriptors", number("FDSize"));
    let mut logged: HashMap<String, usize> = HashMap::new();
    for line in daemon.log_lines() {
        // What is asked of the honest one is logged as it should be.
        if let Some(policy) = line["policy"].as_str().filter(|policy| *policy != "honest") {
            *logged.entry(policy.to_owned()).or_default() += line.to_string().len();
        }
    }
    for (policy, bytes) in logged {
        assert!(bytes < LOGGED_BYTES_MAX, "{policy} left {bytes} bytes in the log");
    }
}

/// The word for how an attempt ended. What the daemon says of a system call has to name the
/// role of the worker that made it.
pub(crate) fn end_of(log: &[Value], policy: &str, phase: Phase) -> String {
    let failures = log.iter().filter(|line| line["message"] == "policy can't serve");
    let mut about = failures.filter(|line| line["policy"] == policy);
    let Some(reason) = about.next().and_then(|line| line["error"].as_str()) else {
        return "unseen".to_owned();
    };
    let role = format!("worker (role {}) ", phase.name());
    assert!(!reason.contains("system call") || reason.contains(&role), "{policy}: {reason}");
    word(reason)
}

/// The word for a reason why a policy can't serve.
fn word(reason: &str) -> String {
    let between = |start: &str, end: &str| {
        let (_, rest) = reason.split_once(start)?;
        Some(rest.split_once(end).map_or(rest, |(word, _)| word).to_owned())
    };
    let exit = || WorkerExit::ALL.into_iter().find(|exit| reason.ends_with(exit.describe()));
    let plain = [
        ("and was killed (SIGSYS)", "SIGSYS"),
        ("exceeded the allowed execution time", "deadline"),
        ("missed its deadline", "deadline"),
        ("broke the protocol", "protocol"),
        ("channel to the worker failed", "channel"),
    ];
    between("outcome: ", "\n")
        .or_else(|| Some(format!("forbidden {}", between("made the system call ", ", which")?)))
        .or_else(|| between("was killed by ", " "))
        .or_else(|| Some(format!("exit {}", between("exited with code ", " ")?)))
        .or_else(|| {
            plain.iter().find(|(text, _)| reason.contains(text)).map(|(_, word)| (*word).to_owned())
        })
        .or_else(|| Some(format!("exit {}", exit()?.code())))
        .unwrap_or_else(|| reason.to_owned())
}
