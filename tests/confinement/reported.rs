//! `conclave sandbox`: what it says of this host, and of a running daemon.

use std::process::{Command, Output};

use harness::{Daemon, Place, can_do_without, conclave, conclave_without, user_arguments};
use nix::unistd::{Pid, geteuid};
use serde_json::Value;

use crate::{daemon, daemon_that_starts, skip};

/// Layers that no process can see of another.
const NOT_SHOWN: [&str; 5] = [
    "landlock",
    "not dumpable",
    "parent-death signal",
    "write-execute denied",
    "no nested namespaces",
];

fn report(mut command: Command) -> (Output, Value) {
    let output = command.arg("--json").current_dir("/").output().unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    (output, report)
}

fn sandbox() -> Command {
    let mut command = Command::new(conclave());
    command.arg("sandbox");
    command
}

fn layer<'a>(report: &'a Value, name: &str) -> &'a Value {
    let layers = report["layers"].as_array().unwrap();
    layers.iter().find(|layer| layer["name"] == name).unwrap_or_else(|| panic!("no layer {name}"))
}

#[test]
fn what_this_host_gives_is_reported_for_every_role() {
    let mut command = sandbox();
    command.args(user_arguments());
    let (output, report) = report(command);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(report["complete"], true);
    for layer in report["layers"].as_array().unwrap() {
        let name = layer["name"].as_str().unwrap();
        assert!(layer["offered"] == true || layer["required"] == false, "{layer}");
        // Who lacks something is told how to get it.
        assert_eq!(layer["howToGet"].is_null(), layer["offered"] == true, "{layer}");
        for (role, state) in layer["roles"].as_object().unwrap() {
            let expected = match (state["reported"] == true, NOT_SHOWN.contains(&name)) {
                (_, true) => "not shown",
                (true, false) => "in force",
                (false, false) => "missing",
            };
            assert_eq!(state["kernel"], expected, "{name}, {role}");
        }
    }
    let roles = |name| layer(&report, name)["roles"].as_object().unwrap().len();
    assert_eq!((roles("landlock"), roles("write-execute denied"), roles("code sealed")), (4, 3, 2));
}

#[test]
fn a_host_that_lacks_layers_is_reported_with_how_to_get_them() {
    if !can_do_without(&["user"]) {
        return;
    }
    let (output, report) = report(conclave_without(&["user"], &["sandbox"]));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(report["complete"], false);
    let lacking = layer(&report, "network namespace");
    assert_eq!((&lacking["offered"], &lacking["required"]), (&false.into(), &true.into()));
    let advice = lacking["howToGet"].as_str().unwrap();
    assert!(advice.contains("user.max_user_namespaces"), "{advice}");
    // Without a user namespace of their own, workers are hidden from their own user as well.
    assert_ne!(lacking["roles"]["serve"]["kernel"], "in force");
    assert_eq!(layer(&report, "system call filter")["roles"]["serve"]["kernel"], "in force");
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("lacks required layers of the sandbox: user namespace"), "{message}");

    let text = conclave_without(&["user"], &["sandbox"]).output().unwrap().stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("network namespace (REQUIRED): needs user namespaces"), "{text}");
}

#[test]
fn the_workers_of_a_daemon_are_reported_as_the_kernel_shows_them() {
    let daemon = daemon();
    let mut command = sandbox();
    command.arg("--daemon").arg(daemon.socket());
    let (output, report) = report(command);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(report["daemon"]["pid"], daemon.pid().as_raw());
    let workers = report["workers"].as_array().unwrap();
    assert_eq!(workers.len(), 2);
    for worker in workers {
        assert_eq!((&worker["role"], &worker["worksOn"]), (&"serve".into(), &"guard".into()));
        assert_eq!((&worker["threads"], &worker["descriptors"]), (&1.into(), &3.into()));
        assert!(worker["privateBytes"].as_u64().unwrap() < 16 << 20, "{worker}");
        let in_force = worker["layers"].as_object().unwrap().values();
        assert!(in_force.filter(|seen| *seen == "in force").count() >= 12, "{worker}");
    }

    let mut command = sandbox();
    let text = command.arg("--daemon").arg(daemon.socket()).output().unwrap().stdout;
    let text = String::from_utf8(text).unwrap();
    for name in ["user namespace", "system call filter"] {
        let line = text.lines().find(|line| line.contains(name)).unwrap();
        assert!(line.contains("2 of 2"), "{text}");
    }
}

#[test]
fn a_zygote_and_what_was_forked_from_it_are_reported_each_by_what_it_is() {
    let daemon = daemon_that_starts("snapshot");
    let mut command = sandbox();
    command.arg("--daemon").arg(daemon.socket());
    let (output, report) = report(command);
    assert!(output.status.success(), "{output:?}");
    let workers = report["workers"].as_array().unwrap();
    let with_role = |role: &str| -> Vec<_> {
        let of_role = workers.iter().filter(|worker| worker["role"] == role);
        of_role.map(|worker| worker["pid"].as_i64().unwrap()).collect()
    };
    let numbers = |pids: Vec<Pid>| {
        let mut numbers: Vec<_> = pids.into_iter().map(|pid| i64::from(pid.as_raw())).collect();
        numbers.sort_unstable();
        numbers
    };
    assert_eq!(with_role("zygote"), numbers(daemon.zygotes()));
    assert_eq!(with_role("serve"), numbers(daemon.workers()));
    assert_eq!((with_role("zygote").len(), workers.len()), (1, 3));
    for worker in workers {
        assert_eq!((&worker["threads"], &worker["worksOn"]), (&1.into(), &"guard".into()));
        for layer in ["resource limits", "system call filter", "pid namespace", "empty root"] {
            assert_eq!(worker["layers"][layer], "in force", "{worker}");
        }
    }
}

#[test]
fn who_may_not_look_into_workers_is_told_so() {
    if !geteuid().is_root() {
        skip("only root can ask as a third user");
        return;
    }
    let place = Place::new();
    let module = place.copy_policy("pod-guard.wasm");
    let policies = format!("guard:\n  module: file://{}\n", module.display());
    let daemon = Daemon::start_ready(place, &policies, &["--socket-mode", "666"]);
    let mut command = Command::new("setpriv");
    command.args(["--reuid=12345", "--regid=12345", "--clear-groups"]).arg(conclave());
    command.args(["sandbox", "--daemon"]).arg(daemon.socket());
    let (output, report) = report(command);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let worker = &report["workers"][0];
    assert_eq!(worker["layers"]["empty root"], "hidden");
    assert_eq!(worker["layers"]["system call filter"], "in force");
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("ask as root, or as the daemon's user"), "{message}");
}

#[test]
fn a_socket_that_nobody_listens_on_is_named() {
    let output = sandbox().args(["--daemon", "/no/such/socket"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("can't reach a daemon at /no/such/socket"), "{message}");
}
