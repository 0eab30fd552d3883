//! The in-process side of Conclave's benchmark: how fast a policy is evaluated if the
//! process that wants the verdict runs the policy itself.
//!
//! It evaluates a waPC policy as servers without worker processes usually do, with `wapc`
//! and `wasmtime-provider`: the module is compiled once, every request gets a fresh instance
//! with memory allocated on demand, and a thread that advances the engine's epoch once per
//! second interrupts what takes too long. There is neither a process boundary nor a queue
//! nor HTTP: each thread evaluates the same payload again and again.
//!
//! A latency runs from the request for an instance until the response is there. Throughput
//! also pays for what a server has to do before the next evaluation: reading the verdict and
//! disposing of the instance. Compiling and warming up count for neither.
//!
//! The program is a workspace of its own because cargo unifies the features of a dependency
//! across a workspace: the provider's long list for wasmtime (WASI, async, components,
//! profiling and more) would end up in the worker that is shipped and measured.

use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::num::NonZero;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use serde_json::Value;
use wapc::WapcHost;
use wasmtime::{Config, Engine, InstanceAllocationStrategy};
use wasmtime_provider::{EpochDeadlines, WasmtimeEngineProviderBuilder, WasmtimeEngineProviderPre};

type Fault = Box<dyn Error + Send + Sync>;

/// How often the epoch advances.
const TICK: Duration = Duration::from_secs(1);

/// In ticks; two, as the first one may be about to end already.
const DEADLINES: EpochDeadlines = EpochDeadlines { wapc_init: 2, wapc_func: 2 };

/// Measures evaluations of a waPC policy inside this process.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// The policy's module
    policy: PathBuf,
    /// The payload for the operation `validate`: {"request":…,"settings":…}
    payload: PathBuf,
    /// Number of threads that evaluate at the same time
    #[arg(long, value_name = "N", default_value = "1")]
    threads: NonZero<usize>,
    /// Number of measured evaluations, of all threads together
    #[arg(long, value_name = "N", default_value = "10000")]
    requests: NonZero<usize>,
    /// Number of evaluations beforehand, of all threads together
    #[arg(long, value_name = "N", default_value = "1000")]
    warmup: usize,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            // Without a standard error there is still the exit code.
            writeln!(io::stderr(), "baseline: {fault}").ok();
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Fault> {
    let policy = Policy::load(options)?;
    let threads = options.threads.get();
    let barrier = Barrier::new(threads);

    let shares: Vec<Share> = thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|index| {
                let share = |total: usize| {
                    total / options.threads + usize::from(index < total % options.threads)
                };
                let (warmup, requests) = (share(options.warmup), share(options.requests.get()));
                let (policy, barrier) = (&policy, &barrier);
                scope.spawn(move || measure(policy, barrier, warmup, requests))
            })
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect::<Result<_, _>>()
    })?;
    let report = report(&shares).ok_or("nothing was measured")?;
    writeln!(io::stdout(), "{report}")?;
    Ok(())
}

/// A compiled policy and what it is asked.
struct Policy {
    compiled: WasmtimeEngineProviderPre,
    payload: Vec<u8>,
}

impl Policy {
    /// Compiles the policy, and starts the clock that interrupts it.
    fn load(options: &Options) -> Result<Self, Fault> {
        let read =
            |path: &PathBuf| fs::read(path).map_err(|fault| format!("{}: {fault}", path.display()));
        let module = read(&options.policy)?;
        let payload = read(&options.payload)?;

        let mut config = Config::new();
        config.epoch_interruption(true);
        config.allocation_strategy(InstanceAllocationStrategy::OnDemand);
        let engine = Engine::new(&config)?;
        let compiled = WasmtimeEngineProviderBuilder::new()
            .engine(engine.clone())
            .module_bytes(&module)
            .build_pre()?;

        thread::spawn(move || {
            loop {
                thread::sleep(TICK);
                engine.increment_epoch();
            }
        });
        Ok(Self { compiled, payload })
    }

    /// Evaluates the payload in a fresh instance. Returns how long it took until the
    /// response was there, and whether the request was accepted.
    fn evaluate(&self) -> Result<(Duration, bool), Fault> {
        let begun = Instant::now();
        let instance = self.compiled.rehydrate(Some(DEADLINES))?;
        let host = WapcHost::new(Box::new(instance), Some(Box::new(host_call)))?;
        let response = host.call("validate", &self.payload)?;
        let latency = begun.elapsed();

        let verdict: Value = serde_json::from_slice(&response)
            .map_err(|fault| format!("the response isn't JSON: {fault}"))?;
        let accepted = verdict.get("accepted").and_then(Value::as_bool);
        Ok((latency, accepted.ok_or("the response lacks a boolean `accepted`")?))
    }
}

/// Answers a policy's calls: log messages go nowhere, and nothing else is offered.
fn host_call(
    _instance: u64,
    _binding: &str,
    namespace: &str,
    operation: &str,
    _payload: &[u8],
) -> Result<Vec<u8>, Fault> {
    match (namespace, operation) {
        ("tracing", "log") => Ok(Vec::new()),
        _ => Err(format!("the host doesn't offer {namespace}/{operation}").into()),
    }
}

/// What one thread measured.
struct Share {
    begun: Instant,
    ended: Instant,
    latencies: Vec<Duration>,
    accepted: usize,
}

fn measure(
    policy: &Policy,
    barrier: &Barrier,
    warmup: usize,
    requests: usize,
) -> Result<Share, Fault> {
    let warm = (0..warmup).try_for_each(|_| policy.evaluate().map(drop));
    // Even after a failure, or else the other threads would wait for ever.
    barrier.wait();
    warm?;

    let mut latencies = Vec::with_capacity(requests);
    let mut accepted = 0;
    let begun = Instant::now();
    for _ in 0..requests {
        let (latency, verdict) = policy.evaluate()?;
        latencies.push(latency);
        accepted += usize::from(verdict);
    }
    Ok(Share { begun, ended: Instant::now(), latencies, accepted })
}

/// The threads' measurements in one line of JSON; `None` without any.
fn report(shares: &[Share]) -> Option<String> {
    let begun = shares.iter().map(|share| share.begun).min()?;
    let ended = shares.iter().map(|share| share.ended).max()?;
    let accepted: usize = shares.iter().map(|share| share.accepted).sum();
    let mut latencies: Vec<_> = shares.iter().flat_map(|share| &share.latencies).collect();
    latencies.sort_unstable();

    let requests = latencies.len();
    // The least latency that so many of a hundred evaluations didn't exceed.
    let percentile = |percent: usize| {
        let rank = (requests * percent).div_ceil(100);
        latencies.get(rank.checked_sub(1)?).map(|latency| latency.as_secs_f64() * 1e6)
    };
    let (p50, p90, p99, max) =
        (percentile(50)?, percentile(90)?, percentile(99)?, percentile(100)?);
    let (threads, denied) = (shares.len(), requests - accepted);
    let seconds = (ended - begun).as_secs_f64();
    let throughput = requests as f64 / seconds;
    Some(format!(
        "{{\"threads\":{threads},\"requests\":{requests},\"seconds\":{seconds:.6},\
         \"throughput\":{throughput:.1},\"p50_us\":{p50:.1},\"p90_us\":{p90:.1},\
         \"p99_us\":{p99:.1},\"max_us\":{max:.1},\"accepted\":{accepted},\"denied\":{denied}}}"
    ))
}
