//! What live processes of Conclave may do, read from the kernel and from outside.
//!
//! Workers hide from processes of their own user. Where a test may not look, because it
//! does not run as root, it says so on standard error and goes on.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "confinement/groups.rs"]
mod groups;
#[path = "confinement/incomplete.rs"]
mod incomplete;
#[path = "confinement/reported.rs"]
mod reported;
#[path = "confinement/zygote.rs"]
mod zygote;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use harness::{Daemon, PATIENCE, Place, daemon_user, is_alive, request, status_field};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::unistd::{Pid, geteuid};

/// Every namespace that a worker is to have for itself.
const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

const CAPABILITY_SETS: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

/// What the kernel lists as empty.
const NO_CAPABILITY: &str = "0000000000000000";

/// Limits of a serving worker, by their names in `/proc/PID/limits`. Its memory is the
/// guest's 128 MiB and 512 MiB for all else.
const SERVING_LIMITS: [(&str, &str); 10] = [
    ("Max open files", "0"),
    ("Max processes", "0"),
    ("Max file size", "0"),
    ("Max core file size", "0"),
    ("Max locked memory", "0"),
    ("Max file locks", "0"),
    ("Max pending signals", "0"),
    ("Max msgqueue size", "0"),
    ("Max data size", "671088640"),
    ("Max address space", "7113539584"),
];

/// Limits of a compiling worker.
const COMPILING_LIMITS: [(&str, &str); 10] = [
    ("Max open files", "16"),
    ("Max processes", "0"),
    ("Max file size", "1073741824"),
    ("Max core file size", "0"),
    ("Max locked memory", "0"),
    ("Max file locks", "0"),
    ("Max pending signals", "0"),
    ("Max msgqueue size", "0"),
    ("Max data size", "4294967296"),
    ("Max address space", "17179869184"),
];

/// Says what could not be tested. Not with a macro, whose output is not shown.
fn skip(what: &str) {
    drop(writeln!(io::stderr(), "SKIPPED: {what}"));
}

/// What a look below `/proc` brought; nothing if an ordinary user may not look there.
fn seen<T>(path: &str, result: io::Result<T>) -> Option<T> {
    match result {
        Ok(seen) => Some(seen),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !geteuid().is_root() => {
            skip(&format!("{path} can't be read by an ordinary user"));
            None
        }
        Err(error) => panic!("{path}: {error}"),
    }
}

/// A daemon that serves one policy, from the very start for each request.
fn daemon() -> Daemon {
    daemon_that_starts("fresh")
}

/// A daemon that serves one policy.
fn daemon_that_starts(how: &str) -> Daemon {
    let place = Place::new();
    let module = place.copy_policy("pod-guard.wasm");
    let policies = format!("guard:\n  module: file://{}\n", module.display());
    let mut daemon = Daemon::start_ready(place, &policies, &["--workers", "2", "--start", how]);
    // Ready means that one of them is loaded.
    daemon.wait_for("both workers", |daemon| {
        daemon.workers().into_iter().filter(|pid| is_serving(*pid)).count() == 2
    });
    daemon
}

/// Whether a worker has taken the last step down. What was forked has one filter more.
fn is_serving(pid: Pid) -> bool {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let filters = status_field(pid, "Seccomp_filters");
    filters.is_some_and(|count| count == "2" || count == "3")
        && limits.lines().any(|line| {
            line.strip_prefix("Max processes").is_some_and(|limit| limit.trim().starts_with("0 "))
        })
}

/// Has every worker give a verdict.
fn evaluate(daemon: &Daemon) {
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for name in ["pod-ok.json", "pod-privileged.json"] {
                    let answer = daemon.post("/validate/guard", request(name)).response();
                    assert_eq!(answer["allowed"], name == "pod-ok.json", "{answer}");
                }
            });
        }
    });
}

fn status(pid: Pid, field: &str) -> String {
    status_field(pid, field).unwrap_or_else(|| panic!("process {pid} has no {field}"))
}

fn assert_without_privileges(pid: Pid) {
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    for set in CAPABILITY_SETS {
        assert_eq!(status(pid, set), NO_CAPABILITY, "{set}");
    }
    let user = daemon_user();
    for (field, expected) in [("Uid", user.uid.as_raw()), ("Gid", user.gid.as_raw())] {
        let expected = expected.to_string();
        let found = status(pid, field);
        assert!(found.split_whitespace().all(|id| id == expected && id != "0"), "{field}: {found}");
    }
}

fn assert_limits(pid: Pid, limits: &[(&str, &str)]) {
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    for (name, value) in limits {
        let line =
            text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
        let found: Vec<_> = line[name.len()..].split_whitespace().take(2).collect();
        // Soft and hard alike: nothing can be raised.
        assert_eq!(found, [*value, *value], "{name}");
    }
}

#[test]
fn a_serving_worker_has_no_privileges_one_thread_and_two_filters() {
    let daemon = daemon();
    for _ in 0..2 {
        let workers = daemon.workers();
        assert_eq!(workers.len(), 2);
        for pid in workers {
            assert_without_privileges(pid);
            assert_eq!(status(pid, "Threads"), "1");
            // Mode 2 is a filter, and nothing but a filter that kills is installed.
            assert_eq!(status(pid, "Seccomp"), "2");
            assert_eq!(status(pid, "Seccomp_filters"), "2");
        }
        // It stays so.
        evaluate(&daemon);
    }
}

#[test]
fn a_serving_worker_can_make_no_file_no_process_and_no_descriptor() {
    let daemon = daemon();
    for pid in daemon.workers() {
        assert_limits(pid, &SERVING_LIMITS);
    }
}

#[test]
fn a_policy_may_have_as_much_memory_as_can_be_configured() {
    let place = Place::new();
    let module = place.copy_policy("pod-guard.wasm");
    let policies = format!("guard:\n  module: file://{}\n  memory: 4Gi\n", module.display());
    let daemon = Daemon::start_ready(place, &policies, &["--workers", "1"]);
    let [pid] = daemon.workers()[..] else { panic!("more than one worker") };
    assert_limits(pid, &[("Max data size", "4831838208")]);
    let answer = daemon.post("/validate/guard", request("pod-ok.json")).response();
    assert_eq!(answer["allowed"], true, "{answer}");
}

#[test]
fn a_worker_lives_in_namespaces_of_its_own() {
    let daemon = daemon();
    let workers = daemon.workers();
    for pid in &workers {
        // Its number here, and its number in there.
        assert_eq!(status(*pid, "NSpid"), format!("{pid}\t1"));
    }
    for name in NAMESPACES {
        let of = |process: &str| {
            let path = format!("/proc/{process}/ns/{name}");
            seen(&path, fs::read_link(&path))
        };
        let Some(ours) = of("self") else { continue };
        let Some(theirs) =
            workers.iter().map(|pid| of(&pid.to_string())).collect::<Option<Vec<_>>>()
        else {
            continue;
        };
        let all: BTreeSet<_> = theirs.iter().chain([&ours]).collect();
        // Neither ours nor the other worker's.
        assert_eq!(all.len(), workers.len() + 1, "{name}: {theirs:?}");
    }
}

#[test]
fn a_serving_worker_has_its_channel_its_code_and_its_guests_state_open_and_nothing_else() {
    let daemon = daemon();
    evaluate(&daemon);
    for pid in daemon.workers() {
        let directory = format!("/proc/{pid}/fd");
        let Some(entries) = seen(&directory, fs::read_dir(&directory)) else { continue };
        let mut open: Vec<_> = entries
            .map(|entry| {
                let entry = entry.unwrap();
                let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
                (number, fs::read_link(entry.path()).unwrap().to_str().unwrap().to_owned())
            })
            .collect();
        open.sort();
        let numbers: Vec<_> = open.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [3, 4, 5], "{open:?}");
        assert!(open[0].1.starts_with("socket:"), "{open:?}");
        assert_eq!(open[1].1, "/memfd:conclave (deleted)");
        assert_eq!(open[2].1, "/memfd:conclave (deleted)");
    }
}

#[test]
fn the_code_of_a_worker_can_not_be_changed_by_anybody() {
    let daemon = daemon();
    for pid in daemon.workers() {
        let path = format!("/proc/{pid}/fd/4");
        let Some(image) = seen(&path, File::open(&path)) else { continue };
        let seals = SealFlag::from_bits_retain(fcntl(&image, FcntlArg::F_GET_SEALS).unwrap());
        let all = SealFlag::F_SEAL_WRITE
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_SEAL;
        assert!(seals.contains(all), "{seals:?} of descriptor {}", image.as_raw_fd());
    }
}

#[test]
fn a_worker_sees_an_empty_directory_and_no_environment() {
    let daemon = daemon();
    // So that there is something to be kept back.
    let own = format!("/proc/{}/environ", daemon.pid());
    if let Some(environment) = seen(&own, fs::read(&own)) {
        assert!(!environment.is_empty());
    }
    for pid in daemon.workers() {
        let root = format!("/proc/{pid}/root");
        if let Some(mut entries) = seen(&root, fs::read_dir(&root)) {
            assert!(entries.next().is_none(), "{root} is not empty");
            let made = File::create(format!("{root}/file")).unwrap_err();
            assert_eq!(made.kind(), io::ErrorKind::ReadOnlyFilesystem);
        }
        let mounts = format!("/proc/{pid}/mountinfo");
        if let Some(mounts) = seen(&mounts, fs::read_to_string(&mounts)) {
            assert_eq!(mounts.lines().count(), 1, "{mounts}");
        }
        let directory = format!("/proc/{pid}/cwd");
        if let Some(directory) = seen(&directory, fs::read_dir(&directory)) {
            assert_eq!(directory.count(), 0);
        }
        let environment = format!("/proc/{pid}/environ");
        if let Some(environment) = seen(&environment, fs::read(&environment)) {
            assert_eq!(environment, b"");
        }
    }
}

/// The mappings of a process that are executable: where they are, and what they map.
fn executable(maps: &str) -> BTreeSet<String> {
    let lines = maps.lines().filter(|line| permissions(line).contains('x'));
    lines.map(ToOwned::to_owned).collect()
}

fn permissions(line: &str) -> &str {
    line.split_whitespace().nth(1).unwrap()
}

#[test]
fn no_memory_of_a_worker_is_writable_and_executable_and_none_becomes_executable() {
    let daemon = daemon();
    let maps = |pid: Pid| {
        let path = format!("/proc/{pid}/maps");
        seen(&path, fs::read_to_string(&path))
    };
    let workers = daemon.workers();
    let before: Vec<_> = workers.iter().map(|pid| maps(*pid)).collect();
    evaluate(&daemon);
    for (pid, before) in workers.into_iter().zip(before) {
        let (Some(before), Some(after)) = (before, maps(pid)) else { continue };
        for text in [&before, &after] {
            let both = text
                .lines()
                .find(|line| permissions(line).contains('w') && permissions(line).contains('x'));
            assert_eq!(both, None);
        }
        let executable_before = executable(&before);
        assert_eq!(executable(&after), executable_before);
        // The policy, this program, its libraries; nothing anonymous.
        assert!(executable_before.iter().any(|line| line.contains("/memfd:conclave")), "{before}");
        for line in &executable_before {
            assert!(line.contains(['/', '[']), "anonymous executable memory: {line}");
        }
    }
}

/// Reads a file as the daemon's user, without any privilege.
fn reads(path: &str) -> Option<bool> {
    if !geteuid().is_root() {
        return Some(fs::read(path).is_ok());
    }
    let user = daemon_user();
    let status = Command::new("setpriv")
        .arg(format!("--reuid={}", user.uid))
        .arg(format!("--regid={}", user.gid))
        .args(["--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "cat", path])
        .current_dir("/")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.ok().map(|status| status.success())
}

#[test]
fn the_daemon_can_not_be_looked_into_by_its_own_user() {
    let daemon = daemon();
    if reads("/proc/self/environ") != Some(true) {
        skip("setpriv and cat are needed to look at the daemon as its own user");
        return;
    }
    for file in ["environ", "maps", "mem", "auxv", "fd/2"] {
        assert_eq!(reads(&format!("/proc/{}/{file}", daemon.pid())), Some(false), "{file}");
    }
    assert_eq!(reads(&format!("/proc/{}/status", daemon.pid())), Some(true));
}

#[test]
fn the_daemon_is_nobody_of_importance() {
    let daemon = daemon();
    let pid = daemon.pid();
    assert_without_some_privileges(pid);
    if geteuid().is_root() {
        // Started as root it could, and does, give up more.
        assert_without_privileges(pid);
    }
}

/// What holds for a daemon that an ordinary user started.
fn assert_without_some_privileges(pid: Pid) {
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    for set in ["CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status(pid, set), NO_CAPABILITY, "{set}");
    }
    assert!(!status(pid, "Uid").split_whitespace().any(|id| id == "0"));
    assert!(!status(pid, "Gid").split_whitespace().any(|id| id == "0"));
    assert!(!status(pid, "Groups").split_whitespace().any(|id| id == "0"));
}

/// A module that takes a while to compile.
fn laborious() -> String {
    let step = "(local.set 0 (i32.xor (i32.mul (local.get 0) (i32.const 31)) (i32.const 7)))";
    let function = format!("(func (param i32) (result i32) {} (local.get 0))", step.repeat(200));
    format!("(module {})", function.repeat(3000))
}

#[test]
fn a_compiling_worker_is_locked_up_before_it_sees_the_module() {
    let place = Place::new();
    let module = place.assemble("laborious.wasm", &laborious());
    let policies = format!("laborious:\n  module: file://{}\n", module.display());
    let daemon = Daemon::start(place, &policies, &["--no-cache"]);
    let start = Instant::now();
    let pid = loop {
        let compiling = |pid: &Pid| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let confined = status_field(*pid, "Seccomp").is_some_and(|mode| mode == "2");
            confined && words.split(|byte| *byte == 0).any(|word| word == b"compile")
        };
        if let Some(pid) = daemon.workers().into_iter().find(compiling) {
            break pid;
        }
        assert!(
            !daemon.log().contains("all policies were tried"),
            "the compilation was over too soon to be seen"
        );
        assert!(start.elapsed() < PATIENCE, "no compiling worker");
    };
    assert_without_privileges(pid);
    assert_eq!(status(pid, "Threads"), "1");
    assert_eq!(status(pid, "Seccomp_filters"), "1");
    assert_eq!(status(pid, "NSpid"), format!("{pid}\t1"));
    assert_limits(pid, &COMPILING_LIMITS);
    let root = format!("/proc/{pid}/root");
    if let Some(entries) = seen(&root, fs::read_dir(&root)) {
        assert_eq!(entries.count(), 0);
    }
    let maps = format!("/proc/{pid}/maps");
    if let Some(maps) = seen(&maps, fs::read_to_string(&maps)) {
        assert!(
            !maps
                .lines()
                .any(|line| permissions(line).contains('x') && permissions(line).contains('w'))
        );
    }
    assert!(is_alive(pid), "it was over while it was looked at");
}
