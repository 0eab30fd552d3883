//! The price of isolation: the same policy and request, evaluated
//!
//! - *in process*, by `wapc` and `wasmtime-provider` as policy servers do that run policies
//!   themselves: a fresh instance per request, epoch interruption on, no HTTP, no JSON
//!   around the request (`tests/baseline`, a program of its own); and
//! - *through Conclave*: a keep-alive client, the Unix socket, the supervisor, a locked
//!   worker, and back, with the verdict logged.
//!
//! The two alternate, several rounds each; the medians of the rounds are compared. The
//! load generator shares the processors with what it measures.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a benchmark fails by panicking and prints its result"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use harness::{Client, Daemon, Place, request};
use serde_json::{Value, json};

const ROUNDS: usize = 5;
const WARMUP: usize = 1_000;

/// One side's figures for one round.
#[derive(Debug, Clone, Copy)]
struct Figures {
    p50_us: f64,
    p99_us: f64,
    throughput: f64,
}

/// A request of a certain size.
struct Scenario {
    name: &'static str,
    review: String,
}

fn main() {
    let baseline = build_baseline();
    let review = request("pod-ok.json");
    let scenarios = [
        Scenario { name: "pod, as it is", review: with_containers(&review, 1) },
        Scenario { name: "pod, containers x 6", review: with_containers(&review, 6) },
    ];
    for scenario in &scenarios {
        compare(&baseline, scenario);
    }
}

fn compare(baseline: &Path, scenario: &Scenario) {
    println!(
        "\n{}: pod-guard (waPC, Rust SDK), AdmissionReview of {} bytes",
        scenario.name,
        scenario.review.len()
    );
    let place = Place::new();
    let module = place.copy_policy("pod-guard.wasm");
    let payload = json!({
        "request": serde_json::from_str::<Value>(&scenario.review).unwrap()["request"],
        "settings": {},
    });
    let payload = place.write("payload.json", payload.to_string());
    let daemon = Daemon::start_ready(
        place,
        "pod-guard:\n  module: pod-guard.wasm\n",
        &["--log-level", "info"],
    );
    println!("| clients | side | p50 us | p99 us | requests/s |");
    println!("| --- | --- | --- | --- | --- |");
    for clients in [1, 8] {
        let requests = if clients == 1 { 4_000 } else { 12_000 };
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let inside = run_baseline(baseline, &module, &payload, clients.min(2), requests);
            let through = drive(&daemon, &scenario.review, clients, requests);
            rounds.push((inside, through));
        }
        let inside = median(rounds.iter().map(|round| round.0).collect());
        let through = median(rounds.iter().map(|round| round.1).collect());
        let threads = if clients == 1 { "" } else { ", 2 threads" };
        println!(
            "| {clients} | in process{threads} | {:.0} | {:.0} | {:.0} |",
            inside.p50_us, inside.p99_us, inside.throughput
        );
        println!(
            "| {clients} | through Conclave | {:.0} | {:.0} | {:.0} |",
            through.p50_us, through.p99_us, through.throughput
        );
        if clients == 1 {
            println!(
                "| | difference | {:+.0} | {:+.0} | |",
                through.p50_us - inside.p50_us,
                through.p99_us - inside.p99_us
            );
            stages(&daemon, through.p50_us, requests);
        } else {
            println!("| | ratio | | | x{:.2} |", through.throughput / inside.throughput);
        }
    }
}

/// Where the time of the last `requests` verdicts went, from the daemon's own log.
fn stages(daemon: &Daemon, client_us: f64, requests: usize) {
    let lines = daemon.log_lines();
    let verdicts: Vec<_> =
        lines.iter().rev().filter(|line| line["message"] == "verdict").take(requests).collect();
    let stage = |key: &str| {
        let mut values: Vec<_> = verdicts.iter().filter_map(|line| line[key].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or_default()
    };
    let (total, queue, worker, guest) =
        (stage("total_us"), stage("queue_us"), stage("worker_us"), stage("guest_us"));
    println!("| | stage: guest | {guest:.0} | | |");
    println!("| | stage: channel to the worker and back | {:.0} | | |", worker - guest);
    println!("| | stage: queue | {queue:.0} | | |");
    println!("| | stage: parse, decide, answer | {:.0} | | |", total - worker - queue);
    println!("| | stage: socket and HTTP | {:.0} | | |", client_us - total);
}

fn median(mut rounds: Vec<Figures>) -> Figures {
    let mut of = |key: fn(&Figures) -> f64| {
        rounds.sort_by(|one, other| key(one).total_cmp(&key(other)));
        key(&rounds[rounds.len() / 2])
    };
    Figures { p50_us: of(|f| f.p50_us), p99_us: of(|f| f.p99_us), throughput: of(|f| f.throughput) }
}

/// Drives the daemon with keep-alive clients, each in a thread of its own.
fn drive(daemon: &Daemon, review: &str, clients: usize, requests: usize) -> Figures {
    let share = requests / clients;
    let barrier = Barrier::new(clients + 1);
    let socket = daemon.socket();
    let (mut latencies, seconds) = thread::scope(|scope| {
        let handles: Vec<_> = (0..clients)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = Client::connect(&socket);
                    let mut ask = || {
                        let start = Instant::now();
                        let answer = client.post("/validate/pod-guard", review);
                        let took = start.elapsed();
                        assert_eq!(answer.status, 200);
                        took.as_secs_f64() * 1e6
                    };
                    for _ in 0..WARMUP / clients {
                        ask();
                    }
                    barrier.wait();
                    (0..share).map(|_| ask()).collect::<Vec<_>>()
                })
            })
            .collect();
        barrier.wait();
        let start = Instant::now();
        let latencies: Vec<f64> =
            handles.into_iter().flat_map(|handle| handle.join().unwrap()).collect();
        (latencies, start.elapsed().as_secs_f64())
    });
    latencies.sort_by(f64::total_cmp);
    let at =
        |part: f64| latencies[((latencies.len() as f64 * part) as usize).min(latencies.len() - 1)];
    Figures { p50_us: at(0.5), p99_us: at(0.99), throughput: latencies.len() as f64 / seconds }
}

fn run_baseline(
    baseline: &Path,
    module: &Path,
    payload: &Path,
    threads: usize,
    requests: usize,
) -> Figures {
    let output = Command::new(baseline)
        .args([module, payload])
        .args(["--threads", &threads.to_string(), "--requests", &requests.to_string()])
        .args(["--warmup", &WARMUP.to_string()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let line: Value = serde_json::from_slice(&output.stdout).unwrap();
    let figure = |key: &str| line[key].as_f64().expect("the baseline prints numbers");
    Figures { p50_us: figure("p50_us"), p99_us: figure("p99_us"), throughput: figure("throughput") }
}

/// The baseline is a workspace of its own: cargo would give the shipped worker its features.
fn build_baseline() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("baseline/Cargo.toml");
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/baseline");
    println!("building the in-process baseline (minutes, the first time)");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "--quiet", "--locked", "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(&target)
        .status()
        .unwrap();
    assert!(status.success(), "the baseline can't be built");
    fs::canonicalize(target.join("release/baseline")).unwrap()
}

/// The review as compact JSON, with its pod's containers repeated under new names.
fn with_containers(review: &str, times: usize) -> String {
    let mut review: Value = serde_json::from_str(review).unwrap();
    let containers = review["request"]["object"]["spec"]["containers"].as_array().unwrap().clone();
    let repeated: Vec<_> = (0..times)
        .flat_map(|copy| {
            containers.iter().cloned().map(move |mut container| {
                container["name"] =
                    json!(format!("{}-{copy}", container["name"].as_str().unwrap()));
                container
            })
        })
        .collect();
    review["request"]["object"]["spec"]["containers"] = json!(repeated);
    review.to_string()
}
