//! A daemon that was handed a control group.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use harness::{Client, PATIENCE, Place, conclave, daemon_user, policy, request, user_arguments};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, chown, geteuid};
use serde_json::Value;

use crate::skip;

/// A group that belongs to the daemon's user; gone when dropped.
struct Handed(PathBuf);

impl Handed {
    /// Nothing, with a word to the tester, where none can be made.
    fn new(name: &str) -> Option<Self> {
        if !geteuid().is_root() {
            skip("only root can hand over a control group");
            return None;
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let unified = mounts.lines().find(|line| line.contains(" - cgroup2 "));
        let Some(mount) = unified.and_then(|line| line.split(' ').nth(4)) else {
            skip("cgroup v2 is not mounted here");
            return None;
        };
        let path = Path::new(mount).join(format!("conclave-test-{}-{name}", std::process::id()));
        if let Err(error) = fs::create_dir(&path) {
            skip(&format!("no control group can be made here: {error}"));
            return None;
        }
        let handed = Self(path);
        let user = daemon_user();
        // What systemd hands over with Delegate=yes.
        for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            chown(&handed.0.join(file), Some(user.uid), Some(user.gid)).unwrap();
        }
        Some(handed)
    }

    fn has(&self, controller: &str) -> bool {
        let controllers = fs::read_to_string(self.0.join("cgroup.controllers")).unwrap();
        controllers.split_whitespace().any(|name| name == controller)
    }

    fn processes(&self, group: &str) -> Vec<Pid> {
        let text = fs::read_to_string(self.0.join(group).join("cgroup.procs")).unwrap();
        text.lines().map(|line| Pid::from_raw(line.parse().unwrap())).collect()
    }

    fn value(&self, file: &str) -> String {
        fs::read_to_string(self.0.join(file)).unwrap().trim().to_owned()
    }
}

impl Drop for Handed {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove(&entry.path());
        }
    }
    let start = Instant::now();
    // Processes that were killed take a moment.
    while fs::remove_dir(group).is_err() && start.elapsed() < Duration::from_secs(2) {
        thread::sleep(Duration::from_millis(10));
    }
}

/// A daemon within that group.
struct Serving {
    process: Child,
    place: Place,
}

impl Serving {
    fn start(handed: &Handed, place: Place, policies: &str) -> Self {
        let file = place.write("policies.yml", policies);
        let log = File::create(place.path("log")).unwrap();
        fs::set_permissions(place.path("log"), fs::Permissions::from_mode(0o644)).unwrap();
        let move_there = r#"echo $$ > "$0/cgroup.procs" && exec "$@""#;
        let process = Command::new("sh")
            .args(["-c", move_there])
            .arg(&handed.0)
            .arg(conclave())
            .args(["serve", "--no-cache", "--log-fmt", "json", "--workers", "2", "--policies"])
            .arg(file)
            .arg("--socket")
            .arg(place.path("socket"))
            .args(user_arguments())
            .current_dir("/")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let serving = Self { process, place };
        serving.wait_for("all policies were tried");
        serving
    }

    fn wait_for(&self, words: &str) -> Value {
        let start = Instant::now();
        loop {
            let log = fs::read_to_string(self.place.path("log")).unwrap();
            if let Some(line) = log.lines().find(|line| line.contains(words)) {
                return serde_json::from_str(line).unwrap();
            }
            assert!(start.elapsed() < PATIENCE, "no {words:?} in {log}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn stop(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

#[test]
fn workers_are_born_into_the_group_of_their_policy() {
    let Some(handed) = Handed::new("born") else { return };
    let place = Place::new();
    let module = place.copy_policy("pod-guard.wasm");
    let module = module.display();
    // A name that is a file's in every group.
    let policies = format!(
        "guard: {{module: {module}, memory: 64Mi, start: fresh}}\ncgroup.procs: {{module: {module}, start: snapshot}}\n"
    );
    let mut serving = Serving::start(&handed, place, &policies);
    let line = serving.wait_for("workers are born into control groups");
    for name in ["memory", "pids", "cpu"] {
        let given = line["controllers"].as_str().unwrap().split(' ').any(|given| given == name);
        assert_eq!(given, handed.has(name), "{name}: {line}");
    }
    assert_eq!(handed.processes(""), []);
    assert_eq!(handed.processes("daemon").len(), 1);
    let start = Instant::now();
    // One has a zygote as well.
    for (group, processes) in [("workers/p.guard", 2), ("workers/p.cgroup.procs", 3)] {
        while handed.processes(group).len() != processes {
            assert!(start.elapsed() < PATIENCE, "{group}: {:?}", handed.processes(group));
            thread::sleep(Duration::from_millis(5));
        }
    }
    if handed.has("memory") && handed.has("pids") {
        // Two workers of 64 MiB, and what else each may use.
        let bytes = (2 * (64 + 512)) << 20;
        assert_eq!(handed.value("workers/p.guard/memory.max"), bytes.to_string());
        assert_eq!(handed.value("workers/p.guard/memory.oom.group"), "1");
        assert_eq!(handed.value("workers/p.guard/pids.max"), "4");
        // And where a guest may be started once, one more beside them, and its state.
        let bytes = (3_u64 * (2 * 128 + 512)) << 20;
        assert_eq!(handed.value("workers/p.cgroup.procs/memory.max"), bytes.to_string());
        assert_eq!(handed.value("workers/p.cgroup.procs/pids.max"), "7");
    } else {
        skip("this host's cgroup v2 has no controllers for memory and processes");
    }
    let answer = Client::connect(&serving.place.path("socket"))
        .post("/validate/guard", request("pod-privileged.json"))
        .response();
    assert_eq!(answer["allowed"], false, "{answer}");
    serving.stop();
    for group in ["workers/p.guard", "workers/p.cgroup.procs", "daemon"] {
        assert!(!handed.0.join(group).exists() || handed.processes(group).is_empty(), "{group}");
    }
}

/// With the group's limit below the guest's own one, which nobody would configure so, the
/// kernel has to step in.
#[test]
fn a_death_for_want_of_memory_is_told_as_one() {
    let Some(handed) = Handed::new("memory") else { return };
    if !handed.has("memory") {
        skip("this host's cgroup v2 has no controller for memory");
        return;
    }
    let place = Place::new();
    let body = "(drop (memory.grow (i32.const 1600)))
        (memory.fill (i32.const 65536) (i32.const 7) (i32.const 104000000))
        (call $print (i32.const 1))";
    let hungry = place.write("hungry.wasm", policy("wasi", r#"{"accepted":true}"#, body));
    let policies = format!("hungry: {{module: {}, start: fresh}}\n", hungry.display());
    let serving = Serving::start(&handed, place, &policies);
    fs::write(handed.0.join("workers/p.hungry/memory.max"), (48 << 20).to_string()).unwrap();
    let answer = Client::connect(&serving.place.path("socket"))
        .post("/validate/hungry", request("pod-ok.json"))
        .response();
    assert_eq!(answer["allowed"], false, "{answer}");
    assert_eq!(answer["status"]["code"], 500, "{answer}");
    let message = answer["status"]["message"].as_str().unwrap();
    assert!(message.contains("limit of memory"), "{message}");
    let line = serving.wait_for("worker is ended");
    assert!(line["error"].as_str().unwrap().contains("limit of its policy's memory"), "{line}");
}
