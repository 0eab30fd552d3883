//! What it saves to start a guest once: the same policy and request through the whole daemon,
//! with a guest that is started anew for every request (`start: fresh`) and with one that is
//! started once (`start: snapshot`).
//!
//! Both daemons run all the while and are asked in turn, several rounds each, so that what
//! else happens on the machine befalls both: read the ratios. A round has a budget of time, so
//! slow policies are asked less often; the number of requests stands in the table. The load
//! generator shares the processors with what it measures. Policies that `tests/policies/heavy`
//! builds are left out, and named, where they are not built.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a benchmark fails by panicking and prints its result"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use harness::{Client, Daemon, Place, policies, request};
use nix::unistd::Pid;

const ROUNDS: usize = 3;

/// How long a round goes on asking.
const ROUND: Duration = Duration::from_secs(2);

/// What is asked before anything is measured.
const WARMUP: Duration = Duration::from_millis(500);

/// How long a module may take to be compiled and loaded; the largest take minutes.
const LOAD_TIME_MAX: Duration = Duration::from_secs(600);

/// The ways to start that are compared; the ratios are of the first to the last.
const STARTS: [&str; 2] = ["fresh", "snapshot"];

const CLIENTS: [usize; 2] = [1, 8];

/// What every policy says about the request.
const ACCEPTED: &[u8] = br#""allowed":true"#;

/// A policy to be measured.
struct Case {
    file: &'static str,
    what: &'static str,
    settings: &'static str,
}

const CASES: [Case; 8] = [
    Case { file: "host-guard.wasm", what: "Rust command, small", settings: "{}" },
    Case {
        file: "go-labels.wasm",
        what: "Go command, small",
        settings: "{required: [app.kubernetes.io/name]}",
    },
    Case { file: "secret-guard.wasm", what: "Rust, waPC, expressions", settings: "{}" },
    Case { file: "go-reactor.wasm", what: "Go, waPC, 0.1 s", settings: "{}" },
    Case { file: "go-init.wasm", what: "Go command, 0.2 s", settings: "{}" },
    Case { file: "go-init-long.wasm", what: "Go command, 2 s", settings: "{}" },
    Case {
        file: "go-cel.wasm",
        what: "Go command, CEL",
        settings: "{variables: [{name: containers, expression: object.spec.containers}], \
                   validations: [{expression: 'variables.containers.all(c, has(c.image))', \
                   message: an image is missing}]}",
    },
    Case {
        file: "go-kyverno.wasm",
        what: "Go command, Kyverno",
        settings: "{policy: '{apiVersion: kyverno.io/v1, kind: ClusterPolicy, \
                   metadata: {name: labels}, spec: {rules: [{name: labels, \
                   match: {any: [{resources: {kinds: [Pod]}}]}, \
                   validate: {message: a label is missing, \
                   pattern: {metadata: {labels: {app.kubernetes.io/name: \"?*\"}}}}}]}}'}",
    },
];

/// A daemon that starts guests in one way, and what was measured of it.
struct Side {
    start: &'static str,
    daemon: Daemon,
    load: Duration,
    /// By [`CLIENTS`].
    cells: [Cell; CLIENTS.len()],
}

/// What a number of clients saw, over all rounds.
#[derive(Debug, Default)]
struct Cell {
    milliseconds: Vec<f64>,
    seconds: f64,
    /// Other answers than the one verdict that all policies give, as when the queue is full.
    refused: usize,
    /// Page faults of the workers.
    faults: u64,
}

impl Cell {
    fn at(&self, part: f64) -> f64 {
        let index = (self.milliseconds.len() as f64 * part) as usize;
        self.milliseconds[index.min(self.milliseconds.len() - 1)]
    }

    fn throughput(&self) -> f64 {
        self.milliseconds.len() as f64 / self.seconds
    }

    fn faults(&self) -> f64 {
        self.faults as f64 / self.milliseconds.len() as f64
    }
}

fn main() {
    // Compiled once, so that the time to load is that of an ordinary restart.
    let cache = Place::new();
    println!(
        "| policy | start | clients | requests | p50 ms | p99 ms | p99/p50 | requests/s | \
         faults/request | MiB/worker | load ms |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for case in &CASES {
        match module(case.file) {
            Some(module) => measure(case, &module, &cache),
            None => println!("| {}: not built | | | | | | | | | | |", case.what),
        }
    }
}

/// Where the module is, if it is.
fn module(file: &str) -> Option<PathBuf> {
    let heavy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/policies/heavy");
    [policies(), heavy].map(|directory| directory.join(file)).into_iter().find(|path| path.exists())
}

fn measure(case: &Case, module: &Path, cache: &Place) {
    let review = request("pod-ok.json");
    // So that the cache has the code when the time to load is taken.
    drop(started(STARTS[0], case, module, cache));
    let mut sides = STARTS.map(|start| started(start, case, module, cache));
    for side in &sides {
        drive(&side.daemon, &review, 1, WARMUP);
    }
    for _ in 0..ROUNDS {
        for (index, clients) in CLIENTS.into_iter().enumerate() {
            for side in &mut sides {
                let before = faults(&side.daemon);
                let round = drive(&side.daemon, &review, clients, ROUND);
                let cell = &mut side.cells[index];
                cell.milliseconds.extend(round.milliseconds);
                cell.seconds += round.seconds;
                cell.refused += round.refused;
                cell.faults += faults(&side.daemon) - before;
            }
        }
    }
    for side in &mut sides {
        for cell in &mut side.cells {
            assert!(!cell.milliseconds.is_empty(), "{} gives no verdicts", case.what);
            cell.milliseconds.sort_by(f64::total_cmp);
        }
    }
    report(case, &sides);
}

fn started(start: &'static str, case: &Case, module: &Path, cache: &Place) -> Side {
    let place = Place::new();
    place.write("policy.wasm", fs::read(module).unwrap());
    let Case { settings, .. } = case;
    let policies_yml = format!(
        "policy:\n  module: policy.wasm\n  start: {start}\n  timeoutEvalSeconds: 60\n\
         \u{20} memory: 512Mi\n  settings: {settings}\n"
    );
    let directory = cache.path("code");
    let began = Instant::now();
    let cache = ["--compile-timeout", "600", "--cache-dir", directory.to_str().unwrap()];
    let daemon = Daemon::start(place, &policies_yml, &cache);
    while !daemon.log().contains("all policies were tried") {
        assert!(began.elapsed() < LOAD_TIME_MAX, "{} does not load", case.what);
        thread::sleep(Duration::from_millis(1));
    }
    let load = began.elapsed();
    let answer = daemon.post("/validate/policy", request("pod-ok.json")).response();
    assert_eq!(answer["allowed"], true, "{} under {start}: {answer}", case.what);
    Side { start, daemon, load, cells: Default::default() }
}

/// Asks with keep-alive clients, each in a thread of its own, for that time. A request that
/// is under way then is waited for and counts.
fn drive(daemon: &Daemon, review: &str, clients: usize, time: Duration) -> Cell {
    let barrier = Barrier::new(clients + 1);
    let socket = daemon.socket();
    let ask = || {
        let mut client = Client::connect(&socket);
        let mut seen = Cell::default();
        barrier.wait();
        let began = Instant::now();
        while began.elapsed() < time {
            let asked = Instant::now();
            let answer = client.post("/validate/policy", review);
            let took = asked.elapsed();
            // Looked for, not parsed: the load generator is to cost little.
            if answer.body.windows(ACCEPTED.len()).any(|part| part == ACCEPTED) {
                seen.milliseconds.push(took.as_secs_f64() * 1e3);
            } else {
                seen.refused += 1;
            }
        }
        seen
    };
    thread::scope(|scope| {
        let handles: Vec<_> = (0..clients).map(|_| scope.spawn(ask)).collect();
        barrier.wait();
        let began = Instant::now();
        let mut all = Cell::default();
        for handle in handles {
            let seen = handle.join().unwrap();
            all.milliseconds.extend(seen.milliseconds);
            all.refused += seen.refused;
        }
        all.seconds = began.elapsed().as_secs_f64();
        all
    })
}

/// Page faults of all workers since they began.
fn faults(daemon: &Daemon) -> u64 {
    let of_worker = |worker: Pid| -> Option<u64> {
        let stat = fs::read_to_string(format!("/proc/{worker}/stat")).ok()?;
        // After the name, which may have spaces: state, six numbers, minor faults.
        stat.rsplit_once(')')?.1.split_whitespace().nth(7)?.parse().ok()
    };
    daemon.workers().into_iter().filter_map(of_worker).sum()
}

/// Memory that a worker shares with nobody, in MiB; only root may look.
fn private_mebibytes(daemon: &Daemon) -> Option<f64> {
    let of_worker = |worker: Pid| -> Option<f64> {
        let rollup = fs::read_to_string(format!("/proc/{worker}/smaps_rollup")).ok()?;
        let kibibytes: Option<u64> = rollup
            .lines()
            .filter(|line| line.starts_with("Private_"))
            .map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum();
        Some(kibibytes? as f64 / 1024.0)
    };
    let workers: Vec<f64> = daemon.workers().into_iter().map(of_worker).collect::<Option<_>>()?;
    Some(workers.iter().sum::<f64>() / workers.len() as f64)
}

fn report(case: &Case, sides: &[Side; STARTS.len()]) {
    for (index, clients) in CLIENTS.into_iter().enumerate() {
        for side in sides {
            let cell = &side.cells[index];
            let refused = if cell.refused == 0 {
                String::new()
            } else {
                format!(", {} refused", cell.refused)
            };
            let memory = private_mebibytes(&side.daemon)
                .map_or_else(|| "?".to_owned(), |memory| format!("{memory:.1}"));
            println!(
                "| {} | {} | {clients} | {}{refused} | {:.3} | {:.3} | {:.1} | {:.0} | {:.0} \
                 | {memory} | {:.0} |",
                case.what,
                side.start,
                cell.milliseconds.len(),
                cell.at(0.5),
                cell.at(0.99),
                cell.at(0.99) / cell.at(0.5),
                cell.throughput(),
                cell.faults(),
                side.load.as_secs_f64() * 1e3,
            );
        }
        let [first, last] = sides.each_ref().map(|side| &side.cells[index]);
        println!(
            "| | ratio | {clients} | | x{:.1} | x{:.1} | | x{:.1} | | | |",
            first.at(0.5) / last.at(0.5),
            first.at(0.99) / last.at(0.99),
            last.throughput() / first.throughput(),
        );
    }
}
