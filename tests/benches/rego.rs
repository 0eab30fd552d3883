//! What a request to a Rego policy costs, and whether that depends on how much data the policy
//! has: the same policy and request with little and with much of it, through the whole daemon.
//!
//! Both daemons run all the while and are asked in turn, so that what else happens on the
//! machine befalls both. The time in the guest is what its worker says: evaluation and, in it,
//! parsing the input. Everything else is Conclave's.
#![expect(
    clippy::print_stdout,
    clippy::indexing_slicing,
    reason = "a benchmark fails by panicking and prints its result"
)]

use std::thread;
use std::time::{Duration, Instant};

use harness::{Client, Daemon, Place, request};

/// Bytes of data beside what the policy asks for.
const DATA_BYTES: [usize; 3] = [0, 10_000, 10_000_000];

const ROUNDS: usize = 5;

const REQUESTS: usize = 2_000;

/// How long a policy may take to be loaded.
const LOAD_TIME_MAX: Duration = Duration::from_secs(300);

const ACCEPTED: &[u8] = br#""allowed":true"#;

struct Side {
    bytes: usize,
    daemon: Daemon,
    load: Duration,
    micros: Vec<u128>,
}

fn main() {
    let review = request("pod-ok.json");
    let mut sides = DATA_BYTES.map(started);
    for _ in 0..ROUNDS {
        for side in &mut sides {
            let mut client = Client::connect(&side.daemon.socket());
            for _ in 0..REQUESTS {
                let asked = Instant::now();
                let answer = client.post("/validate/policy", &review);
                side.micros.push(asked.elapsed().as_micros());
                assert!(answer.body.windows(ACCEPTED.len()).any(|part| part == ACCEPTED));
            }
        }
    }
    println!("| data, bytes | p50 µs | p99 µs | of which guest, p50 µs | load ms |");
    println!("| --- | --- | --- | --- | --- |");
    for side in sides {
        let guest: Vec<u128> = side
            .daemon
            .log_lines()
            .iter()
            .filter_map(|line| line["guest_us"].as_u64().map(u128::from))
            .collect();
        println!(
            "| {} | {} | {} | {} | {} |",
            side.bytes,
            at(&side.micros, 50),
            at(&side.micros, 99),
            at(&guest, 50),
            side.load.as_millis(),
        );
    }
}

fn at(values: &[u128], percent: usize) -> u128 {
    let mut values = values.to_vec();
    values.sort_unstable();
    values[values.len() * percent / 100]
}

fn started(bytes: usize) -> Side {
    let place = Place::new();
    place.copy_policy("opa-guard.wasm");
    let filler = vec!["0123456789abcdef"; bytes / 19];
    let settings = serde_json::json!({"registries": [""], "filler": filler});
    let policies_yml = format!(
        "policy:\n  module: opa-guard.wasm\n  timeoutEvalSeconds: 60\n  memory: 1Gi\n\
         \u{20} settings: {settings}\n"
    );
    let began = Instant::now();
    let daemon = Daemon::start(place, &policies_yml, &["--workers", "1"]);
    while !daemon.log().contains("all policies were tried") {
        assert!(began.elapsed() < LOAD_TIME_MAX, "it does not load");
        thread::sleep(Duration::from_millis(1));
    }
    let load = began.elapsed();
    let answer = daemon.post("/validate/policy", request("pod-ok.json")).response();
    assert_eq!(answer["allowed"], true, "{answer}");
    Side { bytes, daemon, load, micros: Vec::new() }
}
