//! A daemon with one good policy among hostile ones.

use std::thread;
use std::time::Instant;

use harness::{Daemon, PATIENCE, Place, children_of, is_alive, request};
use serde_json::Value;

use crate::guests::Guest;

/// The text of every answer about a deadline.
pub(crate) const DEADLINE: &str =
    "Policy execution interrupted because it exceeded the allowed execution time";

/// How the log says so.
pub(crate) const DEADLINE_LOGGED: &str = "worker missed its deadline";

/// Workers of each policy.
const WORKERS: &str = "2";

/// A running daemon that serves `neighbour`, a good policy, and hostile ones.
#[derive(Debug)]
pub(crate) struct Town {
    pub(crate) daemon: Daemon,
}

impl Town {
    /// Starts the daemon and waits until every policy was tried.
    pub(crate) fn new(guests: &[Guest]) -> Self {
        let mut town = Self::founded(guests, &[]);
        town.daemon.wait_until_tried();
        town
    }

    /// Starts the daemon with further arguments and waits until it listens.
    pub(crate) fn founded(guests: &[Guest], arguments: &[&str]) -> Self {
        let place = Place::new();
        let good = place.copy_policy("pod-guard.wasm");
        let mut policies = format!("neighbour:\n  module: file://{}\n", good.display());
        for Guest { name, module, timeout_seconds, keys, .. } in guests {
            let module = place.write(&format!("{name}.wasm"), module);
            let module = module.display();
            policies += &format!(
                "{name}:\n  module: file://{module}\n  timeoutEvalSeconds: {timeout_seconds}\n{keys}"
            );
        }
        let workers =
            if arguments.contains(&"--workers") { &[][..] } else { &["--workers", WORKERS] };
        let daemon = Daemon::start(place, &policies, &[workers, arguments].concat());
        Self { daemon }
    }

    /// Whether that policy serves, as `/readiness` has it.
    pub(crate) fn serves(&self, policy: &str) -> bool {
        let readiness = self.daemon.get("/readiness");
        readiness.status == 200 || readiness.json()["policies"].get(policy).is_none()
    }

    /// The good policy gives both of its verdicts.
    pub(crate) fn neighbour_answers(&self) {
        let accepted = self.daemon.post("/validate/neighbour", request("pod-ok.json")).response();
        assert_eq!(accepted["allowed"], true, "{accepted}");
        let refused =
            self.daemon.post("/validate/neighbour", request("pod-privileged.json")).response();
        assert_eq!(refused["allowed"], false, "{refused}");
        assert!(refused["status"]["message"].as_str().unwrap().contains("privileged"), "{refused}");
    }

    /// Asks a policy twice while the good policy is asked as well, and gives its answers.
    pub(crate) fn ask_twice(&self, policy: &str) -> [Value; 2] {
        [(); 2].map(|()| {
            self.neighbour_answers();
            let answer = thread::scope(|scope| {
                let asked = scope.spawn(|| self.ask(policy));
                loop {
                    self.neighbour_answers();
                    if asked.is_finished() {
                        return asked.join().unwrap();
                    }
                }
            });
            self.neighbour_answers();
            answer
        })
    }

    /// One request, one answer: what comes next on the connection is the next answer.
    pub(crate) fn ask(&self, policy: &str) -> Value {
        let mut client = self.daemon.client();
        let answer = client.post(&format!("/validate/{policy}"), request("pod-ok.json")).response();
        let liveness = client.send("GET", "/liveness", &[], b"");
        assert_eq!(
            (liveness.status, liveness.body.as_slice()),
            (200, &b""[..]),
            "{policy} was answered twice"
        );
        answer
    }

    /// Both requests to the policy are rejected with this text, and each of them ended a
    /// worker for this reason.
    pub(crate) fn both_end_a_worker(&self, policy: &str, text: &str, reason: &str) {
        self.both_end_a_worker_like(policy, &format!("{text}\n"), reason);
    }

    /// The same with a text that only begins like this one.
    pub(crate) fn both_end_a_worker_like(&self, policy: &str, text: &str, reason: &str) {
        assert!(
            self.serves(policy),
            "{policy} can't show what it does; log:\n{}",
            self.daemon.log()
        );
        for answer in self.ask_twice(policy) {
            let message = format!("{}\n", rejection(policy, &answer));
            assert!(message.starts_with(text), "{policy}: {message:?} instead of {text:?}");
        }
        self.wait_for_log(policy, "worker is ended", reason, 2);
    }

    /// Both requests to the policy are rejected with a text like this one, and it keeps its
    /// workers.
    pub(crate) fn both_are_rejected(&self, policy: &str, text: &str) {
        assert!(
            self.serves(policy),
            "{policy} can't show what it does; log:\n{}",
            self.daemon.log()
        );
        for answer in self.ask_twice(policy) {
            let message = rejection(policy, &answer);
            assert!(message.starts_with(text), "{policy}: {message:?} instead of {text:?}");
        }
        assert_eq!(self.logged(policy, "worker is ended").len(), 0, "{policy}");
    }

    /// The policy does not serve, for this reason, and its requests are rejected so.
    pub(crate) fn does_not_serve(&self, policy: &str, reason: &str) {
        assert!(!self.serves(policy), "{policy} serves");
        for answer in self.ask_twice(policy) {
            let message = rejection(policy, &answer);
            assert!(message.contains(reason), "{policy}: {message:?} instead of {reason:?}");
        }
        self.wait_for_log(policy, "policy can't serve", reason, 1);
    }

    /// The policy gives the verdict that its template ends with.
    pub(crate) fn accepts(&self, policy: &str) {
        assert!(self.serves(policy), "{policy} does not serve; log:\n{}", self.daemon.log());
        for answer in self.ask_twice(policy) {
            assert_eq!(answer["allowed"], true, "{policy}: {answer}");
        }
    }

    /// The errors in the log's lines with that message about a policy.
    fn logged(&self, policy: &str, message: &str) -> Vec<String> {
        let lines = self.daemon.log_lines();
        let lines =
            lines.iter().filter(|line| line["policy"] == policy && line["message"] == message);
        lines.map(|line| line["error"].as_str().unwrap_or_default().to_owned()).collect()
    }

    fn wait_for_log(&self, policy: &str, message: &str, reason: &str, count: usize) {
        let start = Instant::now();
        loop {
            let errors = self.logged(policy, message);
            assert!(
                errors.iter().all(|error| error.contains(reason)),
                "{policy}: {errors:?} instead of {reason:?}"
            );
            match errors.len() {
                found if found == count => return,
                found if found > count => panic!("{policy}: {errors:?}"),
                found => {
                    assert!(start.elapsed() < PATIENCE, "{policy}: {found} lines {message:?}");
                    thread::yield_now();
                }
            }
        }
    }
}

impl Drop for Town {
    /// However hostile it was, the daemon is in order afterwards.
    fn drop(&mut self) {
        if thread::panicking() {
            return;
        }
        self.neighbour_answers();
        for line in self.daemon.log().lines() {
            let parsed: Result<Value, _> = serde_json::from_str(line);
            assert!(parsed.is_ok_and(|line| line.is_object()), "not a line of the log: {line}");
        }
        let daemon = self.daemon.pid();
        self.daemon.wait_for("dead workers to be reaped", |_| {
            children_of(daemon).into_iter().all(is_alive)
        });
    }
}

/// The message of a policy's answer that fails closed.
pub(crate) fn rejection<'a>(policy: &str, answer: &'a Value) -> &'a str {
    assert_eq!(answer["allowed"], false, "{policy}: {answer}");
    assert_eq!(answer["status"]["code"], 500, "{policy}: {answer}");
    assert_eq!(answer["uid"], "705ab4f5-6393-11e8-b7cc-42010a800002", "{policy}: {answer}");
    assert!(answer.get("patch").is_none(), "{policy}: {answer}");
    answer["status"]["message"].as_str().unwrap()
}
