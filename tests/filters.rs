//! The system call filters: what they say, and that every rule of theirs is needed. For that
//! the worker is run without it, and is killed for the very call that the rule is about.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "filters/rules.rs"]
mod rules;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use harness::{Daemon, Place, conclave, policy, request, user_arguments};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Rules that nothing here needs, and who does. An entry is (filter, system call).
const NEEDED_ELSEWHERE: [(&str, &str, &str); 8] = [
    ("compile", "exit_group", END),
    ("load", "exit_group", END),
    ("zygote", "exit_group", END),
    ("serve", "exit_group", END),
    ("compile", "clock_gettime", NO_VDSO),
    ("load", "clock_gettime", NO_VDSO),
    ("zygote", "clock_gettime", NO_VDSO),
    ("serve", "clock_gettime", NO_VDSO),
];

const END: &str = "the end of a worker that has said its last word: nobody looks how it dies then";

const NO_VDSO: &str = "kernels and processors without a clock that is read in user space";

/// Tests that run at a time; they are processes that wait for processes.
const AT_A_TIME: usize = 3;

/// A policy that a worker runs, and what it is asked.
struct Task {
    module: PathBuf,
    request: PathBuf,
    /// Its settings.
    settings: &'static str,
    /// Whether it judges raw requests.
    raw: bool,
    /// Whether it takes so long to compile that once is enough.
    large: bool,
}

/// Everything that the tasks need, in a directory that the worker's user can reach.
struct Workshop {
    place: Place,
    program: PathBuf,
    tasks: Vec<Task>,
}

/// A WASI policy that does what few do, before it reads its request and thereafter: it asks for
/// randomness and the time, sleeps, grows, touches much of its memory; and it has a lot to say.
const EXERCISER: &str = r#"(module
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get" (func $time (param i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 2048) "{\"accepted\":true,\"valid\":true}")
  (func $print (param $at i32) (param $length i32)
    (i32.store (i32.const 16) (local.get $at))
    (i32.store (i32.const 20) (local.get $length))
    (drop (call $fd_write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 24))))
  (func $work
    (drop (call $random (i32.const 512) (i32.const 64)))
    (drop (call $time (i32.const 1) (i64.const 1) (i32.const 512)))
    (drop (call $time (i32.const 2) (i64.const 1) (i32.const 512)))
    (i32.store (i32.const 272) (i32.const 1))
    (i64.store (i32.const 280) (i64.const 2000000))
    (drop (call $poll (i32.const 256) (i32.const 512) (i32.const 1) (i32.const 768)))
    (drop (memory.grow (i32.const 500)))
    (memory.fill (i32.const 65536) (i32.const 32) (i32.const 30000000)))
  (func (export "_start") (local $round i32)
    (call $work)
    (i32.store (i32.const 16) (i32.const 4096))
    (i32.store (i32.const 20) (i32.const 1024))
    (drop (call $fd_read (i32.const 0) (i32.const 16) (i32.const 1) (i32.const 24)))
    (call $work)
    (loop $again
      (call $print (i32.const 65536) (i32.const 400000))
      (local.set $round (i32.add (local.get $round) (i32.const 1)))
      (br_if $again (i32.lt_u (local.get $round) (i32.const 10))))
    (call $print (i32.const 2048) (i32.const 30))
    (call $exit (i32.const 0))))"#;

fn exerciser() -> Vec<u8> {
    let mut module = wat::parse_str(EXERCISER).unwrap();
    module.extend(harness::metadata_section(&harness::metadata("wasi")));
    module
}

impl Workshop {
    fn new() -> Self {
        let place = Place::new();
        let directory = conclave().parent().unwrap().to_owned();
        let accept = r#"{"accepted":true}"#;
        let pod = place.write("pod.json", request("pod-privileged.json"));
        let large =
            format!(r#"{{"user":"tonio","action":"eats","resource":"{}"}}"#, "x".repeat(3 << 20));
        let large = place.write("large.json", large);
        let task = |module, request: &Path, settings| Task {
            module,
            request: request.to_owned(),
            settings,
            raw: false,
            large: false,
        };
        let gate = r#"{"validUsers":["tonio"],"validActions":["eats"],"validResources":["hay"]}"#;
        let labels = r#"{"required":["team"]}"#;
        let trap = policy("wasi", accept, "unreachable");
        let overrun = policy("wasi", accept, "(drop (i32.load (i32.const -4)))");
        let mut unlinkable = wat::parse_str(r#"(module (import "no" "such" (func)))"#).unwrap();
        unlinkable.extend(harness::metadata_section(&harness::metadata("wasi")));
        let tasks = vec![
            task(place.copy_policy("pod-guard.wasm"), &pod, "{}"),
            task(place.write("exerciser.wasm", exerciser()), &pod, "{}"),
            Task { large: true, ..task(place.copy_policy("go-labels.wasm"), &pod, labels) },
            Task { raw: true, ..task(place.copy_policy("raw-gate.wasm"), &large, gate) },
            task(place.write("trap.wasm", trap), &pod, "{}"),
            task(place.write("unlinkable.wasm", unlinkable), &pod, "{}"),
            task(place.write("overrun.wasm", overrun), &pod, "{}"),
        ];
        Self { place, program: directory.join("leaner-worker"), tasks }
    }

    /// The worker without that rule, under the name that tells it.
    fn worker(&self, filter: &str, rule: &str) -> PathBuf {
        let path = self.place.path(&format!("worker-without-{filter}-{rule}"));
        if fs::hard_link(&self.program, &path).is_err() {
            fs::copy(&self.program, &path).unwrap();
        }
        path
    }

    /// Runs one task with that worker. Code comes from the cache unless the worker is to
    /// compile it.
    fn run(&self, worker: &Path, task: &Task, compile: bool) -> Output {
        let mut command = Command::new(conclave());
        command.arg("run").arg(&task.module).arg("--request-path").arg(&task.request);
        command.arg("--worker").arg(worker).args(user_arguments()).current_dir("/");
        command.args(["--policy-timeout", "20"]).args(task.raw.then_some("--raw"));
        command.args(["--settings-json", task.settings]);
        if compile {
            command.arg("--no-cache");
        } else {
            command.arg("--cache-dir").arg(self.place.path("cache"));
        }
        command.output().unwrap()
    }

    /// Has a daemon with that worker start each task's guest once and ask it, and gives its log.
    fn serve(&self, worker: &Path) -> String {
        let mut policies = String::new();
        for (number, Task { module, settings, .. }) in self.tasks.iter().enumerate() {
            let module = module.display();
            policies += &format!(
                "task-{number}: {{module: file://{module}, start: snapshot, settings: {settings}}}\n"
            );
        }
        let cache = self.place.path("cache");
        let [worker, cache] = [worker, &cache].map(|path| path.to_str().unwrap());
        let rest = ["--workers", "1", "--policy-timeout", "20"];
        let arguments = [&["--worker", worker, "--cache-dir", cache], &rest[..]].concat();
        let mut daemon = Daemon::start(Place::new(), &policies, &arguments);
        daemon.wait_until_tried();
        for (number, Task { request, raw, .. }) in self.tasks.iter().enumerate() {
            let endpoint = if *raw { "validate_raw" } else { "validate" };
            let request = fs::read_to_string(request).unwrap();
            let request = if *raw { format!("{{\"request\":{request}}}") } else { request };
            let answer = daemon.post(&format!("/{endpoint}/task-{number}"), request);
            assert_eq!(answer.status, 200, "{answer:?}");
        }
        daemon.signal(Signal::SIGTERM);
        daemon.wait();
        daemon.log()
    }
}

/// What the log says of a worker that is killed for a call.
fn killed_for(phase: &str, call: &str) -> String {
    format!("worker (role {phase}) made the system call {call}, which is outside its filter")
}

/// A file of the repository.
fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The filters as they are written.
fn filters() -> Value {
    serde_json::from_str(&read("worker/seccomp.json")).unwrap()
}

/// The rules of the filters, in the order of the file: filter, index, system call.
fn all_rules() -> Vec<(String, usize, String)> {
    let mut rules = Vec::new();
    for (filter, content) in filters().as_object().unwrap() {
        for (index, rule) in content["filter"].as_array().unwrap().iter().enumerate() {
            rules.push((filter.clone(), index, rule["syscall"].as_str().unwrap().to_owned()));
        }
    }
    rules
}

/// Whether some task needs the rule. A rule of one filter may be there for another, which
/// stacks on it: what was forked serves under all three.
fn is_needed(workshop: &Workshop, (filter, index, call): &(String, usize, String)) -> bool {
    let worker = workshop.worker(filter, &index.to_string());
    let phases: &[&str] = match filter.as_str() {
        "compile" => &["compile"],
        "load" => &["load", "zygote", "serve"],
        "zygote" => &["zygote", "serve"],
        _ => &["serve"],
    };
    let compile = filter == "compile";
    let tells = |log: &str| {
        // Without this one nothing can be told.
        let untold = call == "sendto" && log.contains("was killed (SIGSYS)");
        untold || phases.iter().any(|phase| log.contains(&killed_for(phase, call)))
    };
    let is_run_so = |task: &&Task| filter != "zygote" && !(compile && task.large);
    let by_one = workshop.tasks.iter().filter(is_run_so).any(|task| {
        let output = workshop.run(&worker, task, compile);
        tells(&String::from_utf8_lossy(&output.stderr))
    });
    let needed = by_one || (!compile && tells(&workshop.serve(&worker)));
    fs::remove_file(worker).unwrap();
    needed
}

#[test]
fn every_rule_of_every_filter_is_needed() {
    let workshop = Workshop::new();
    let complete = workshop.worker("no", "0");
    for task in &workshop.tasks {
        let output = workshop.run(&complete, task, false);
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(!log.contains("outside its filter"), "{}: {log}", task.module.display());
        let loads = !task.module.ends_with("unlinkable.wasm");
        assert_eq!(output.status.success(), loads, "{}: {log}", task.module.display());
    }
    let log = workshop.serve(&complete);
    assert!(!log.contains("outside its filter"), "{log}");
    let rules = all_rules();
    assert!(rules.len() > 30, "{rules:?}");
    let next = AtomicUsize::new(0);
    let unneeded: Vec<_> = thread::scope(|scope| {
        let search = || {
            let take = || rules.get(next.fetch_add(1, Ordering::Relaxed));
            let mut found = Vec::new();
            while let Some(rule) = take() {
                if !is_needed(&workshop, rule) {
                    found.push((rule.0.as_str(), rule.2.as_str()));
                }
            }
            found
        };
        let searches: Vec<_> = (0..AT_A_TIME).map(|_| scope.spawn(search)).collect();
        searches.into_iter().flat_map(|search| search.join().unwrap()).collect()
    });
    let expected: Vec<_> =
        NEEDED_ELSEWHERE.iter().map(|(filter, call, _)| (*filter, *call)).collect();
    let surprising: Vec<_> = unneeded.iter().filter(|rule| !expected.contains(rule)).collect();
    assert!(surprising.is_empty(), "no task needs {surprising:?}");
}
