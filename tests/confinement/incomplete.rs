//! Hosts that lack a layer of the sandbox.

use std::fs::{self, File};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use harness::{Client, PATIENCE, Place, can_do_without, children_of, conclave_without, request};
use nix::unistd::Pid;

use crate::{SERVING_LIMITS, assert_limits, assert_without_privileges, status};

#[test]
fn a_host_that_lacks_a_layer_is_refused_and_the_layer_is_named() {
    if !can_do_without(&["user"]) {
        return;
    }
    let place = Place::new();
    let module = place.copy_policy("pod-guard.wasm");
    let policies =
        place.write("policies.yml", format!("guard:\n  module: file://{}\n", module.display()));
    let socket = place.path("socket");
    let request = place.write("request.json", request("pod-ok.json"));
    let serve = [
        "serve",
        "--policies",
        policies.to_str().unwrap(),
        "--socket",
        socket.to_str().unwrap(),
        "--no-cache",
    ];
    let run = [
        "run",
        module.to_str().unwrap(),
        "--request-path",
        request.to_str().unwrap(),
        "--no-cache",
    ];
    for (command, strict) in
        [(&serve[..], &[][..]), (&serve, &["--sandbox", "strict"]), (&run, &[])]
    {
        let output = conclave_without(&["user"], &[command, strict].concat()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let message = String::from_utf8(output.stderr).unwrap();
        for layer in [
            "user namespace",
            "mount namespace",
            "pid namespace",
            "network namespace",
            "empty root",
        ] {
            assert!(
                message.contains(&format!("\n  {layer}: ")),
                "{layer} is not named in: {message}"
            );
        }
        // What the host has is not complained about.
        for layer in ["landlock", "system call filter", "resource limits", "no new privileges"] {
            assert!(!message.contains(&format!("\n  {layer}: ")), "{layer} is named in: {message}");
        }
        assert!(message.contains("--sandbox best-effort"), "{message}");
        assert_eq!(output.stdout, b"");
        assert!(!socket.exists());
    }
}

/// Ends the process that it holds.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn a_host_that_lacks_a_layer_is_served_on_demand_and_the_log_says_what_is_missing() {
    if !can_do_without(&["user"]) {
        return;
    }
    let place = Place::new();
    let module = place.copy_policy("pod-guard.wasm");
    let policies =
        place.write("policies.yml", format!("guard:\n  module: file://{}\n", module.display()));
    let (socket, log) = (place.path("socket"), place.path("log"));
    let arguments =
        ["serve", "--policies", policies.to_str().unwrap(), "--socket", socket.to_str().unwrap()];
    let rest = ["--no-cache", "--log-fmt", "json", "--sandbox", "best-effort", "--workers", "1"];
    let mut command = conclave_without(&["user"], &[&arguments[..], &rest].concat());
    let mut daemon =
        Ended(command.stdout(Stdio::null()).stderr(File::create(&log).unwrap()).spawn().unwrap());
    let start = Instant::now();
    while !fs::read_to_string(&log).unwrap().contains("all policies were tried") {
        assert!(start.elapsed() < PATIENCE, "{}", fs::read_to_string(&log).unwrap());
        assert!(daemon.0.try_wait().unwrap().is_none(), "{}", fs::read_to_string(&log).unwrap());
        thread::sleep(Duration::from_millis(5));
    }
    let text = fs::read_to_string(&log).unwrap();
    let line = text.lines().find(|line| line.contains("sandbox is INCOMPLETE")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["level"], "WARN");
    let missing: Vec<_> = line["missing"].as_str().unwrap().split(", ").collect();
    assert_eq!(
        missing,
        [
            "user namespace",
            "mount namespace",
            "pid namespace",
            "network namespace",
            "ipc namespace",
            "uts namespace",
            "cgroup namespace",
            "empty root"
        ]
    );

    let answer =
        Client::connect(&socket).post("/validate/guard", request("pod-ok.json")).response();
    assert_eq!(answer["allowed"], true, "{answer}");
    let answer =
        Client::connect(&socket).post("/validate/guard", request("pod-privileged.json")).response();
    assert_eq!(answer["allowed"], false, "{answer}");

    // All that does not need a namespace is as it always is.
    let workers = children_of(Pid::from_raw(i32::try_from(daemon.0.id()).unwrap()));
    assert_eq!(workers.len(), 1);
    for pid in workers {
        assert_without_privileges(pid);
        assert_eq!(status(pid, "Seccomp_filters"), "2");
        assert_limits(pid, &SERVING_LIMITS);
    }
}
