//! A daemon that serves programs, all of them started in one way.

use std::time::Instant;

use harness::{Daemon, PATIENCE, Place};
use serde_json::{Value, json};

use crate::STARTS;
use crate::program::{Kept, Program, Verdict};

/// What every program is asked, in this order and by one client, and then once more. Texts
/// that begin with an exclamation mark ask for trouble; lengths go up and down, so that what
/// is left of a long one would show behind a short one.
fn requests() -> Vec<String> {
    let long = "long ".repeat(3000);
    ["a", "!", "bb", &long, "!!", "c", "", "!again", "d"].map(str::to_owned).to_vec()
}

/// Serves the programs in every way there is to start them, and asks all of them.
pub(crate) fn play(programs: &[Program]) {
    for start in STARTS {
        let scene = Scene::new(start, programs);
        for program in programs {
            scene.ask_all(program);
        }
    }
}

/// [`play`] with programs none of which breaks its worker.
pub(crate) fn play_calmly(programs: &[Program]) {
    for start in STARTS {
        let scene = Scene::new(start, programs);
        let workers = scene.daemon.workers();
        let serving = programs.iter().any(|program| !program.is_refused_under(start));
        assert_eq!(workers.is_empty(), !serving, "under {start:?}");
        for program in programs {
            scene.ask_all(program);
        }
        let left = scene.daemon.workers();
        assert!(
            left.iter().all(|worker| workers.contains(worker)),
            "under {start:?} a worker was replaced"
        );
    }
}

pub(crate) struct Scene {
    pub(crate) daemon: Daemon,
    /// How guests are started.
    pub(crate) start: &'static str,
}

impl Scene {
    /// Starts the daemon, with one worker for each program, and waits until all were tried.
    pub(crate) fn new(start: &'static str, programs: &[Program]) -> Self {
        let place = Place::new();
        let mut policies = String::new();
        for Program { name, module, timeout_seconds, .. } in programs {
            place.write(&format!("{name}.wasm"), module);
            policies += &format!(
                "{name}:\n  module: {name}.wasm\n  timeoutEvalSeconds: {timeout_seconds}\n{}",
                key(start)
            );
        }
        let mut daemon = Daemon::start(place, &policies, &["--workers", "1"]);
        daemon.wait_until_tried();
        Self { daemon, start }
    }

    /// Every request to the program is answered as it is to be; if it can't be started as it
    /// was to be, the daemon says why.
    pub(crate) fn ask_all(&self, program: &Program) {
        let Program { name, verdict, kept, requests: asked, .. } = program;
        let start = self.start;
        match (start, kept) {
            ("snapshot", Kept::No(why)) => return self.is_refused(name, why),
            ("snapshot", Kept::Either) if !self.serves(name) => return self.is_refused(name, ""),
            ("snapshot", _) => assert_eq!(self.how_started(name)["start"], "snapshot", "{name}"),
            ("auto", Kept::No(why)) => {
                let line = self.how_started(name);
                assert_eq!(line["start"], "fresh", "{name}");
                assert!(line["reason"].as_str().unwrap().contains(why), "{name}: {line}");
            }
            ("auto", _) => assert!(self.how_started(name)["start"].is_string(), "{name}"),
            _ => {}
        }
        assert!(self.serves(name), "{name} under {start:?}; log:\n{}", self.daemon.log());
        let mut client = self.daemon.client();
        let mut first = None;
        for request in [requests(), requests()].concat().into_iter().take(*asked) {
            let document = document(&request);
            let answer = client.post(&format!("/validate_raw/{name}"), body(&request)).response();
            let about = format!("{name} under {start:?}, asked {:.9}: {answer}", request.as_str());
            match verdict {
                Verdict::Says(says) => match says(document.as_bytes()) {
                    Ok(number) => assert_eq!(said(&answer), Some(number), "{about}"),
                    Err(text) => {
                        assert_eq!(answer["allowed"], false, "{about}");
                        assert_eq!(answer["status"]["code"], 500, "{about}");
                        let message = answer["status"]["message"].as_str().unwrap();
                        assert!(message.contains(text), "{about}");
                    }
                },
                Verdict::Same => {
                    assert!(said(&answer).is_some(), "{about}");
                    assert_eq!(
                        *first.get_or_insert_with(|| said(&answer)),
                        said(&answer),
                        "{about}"
                    );
                }
            }
        }
    }

    /// Asks one request and gives the number that the program says.
    pub(crate) fn number(&self, name: &str, request: &str) -> u64 {
        let answer = self.daemon.post(&format!("/validate_raw/{name}"), body(request)).response();
        said(&answer).unwrap_or_else(|| panic!("{name} under {:?}: {answer}", self.start))
    }

    /// Whether the policy serves, as `/readiness` has it.
    fn serves(&self, name: &str) -> bool {
        let readiness = self.daemon.get("/readiness");
        readiness.status == 200 || readiness.json()["policies"].get(name).is_none()
    }

    /// The policy does not serve, and its requests are told why.
    fn is_refused(&self, name: &str, why: &str) {
        assert!(!self.serves(name), "{name} serves");
        let answer = self.daemon.post(&format!("/validate_raw/{name}"), body("a")).response();
        assert_eq!(answer["allowed"], false, "{name}: {answer}");
        let message = answer["status"]["message"].as_str().unwrap();
        assert!(message.contains(why), "{name}: {message}");
    }

    /// The line of the log that says how the program was started.
    pub(crate) fn how_started(&self, name: &str) -> Value {
        let asked = Instant::now();
        loop {
            let mut lines = self.daemon.log_lines().into_iter();
            if let Some(line) =
                lines.find(|line| line["policy"] == name && line["start"].is_string())
            {
                return line;
            }
            assert!(asked.elapsed() < PATIENCE, "{name}: nobody says how it was started");
        }
    }
}

/// The key of `policies.yml` for that way to start.
pub(crate) fn key(start: &str) -> String {
    format!("  start: {start}\n")
}

/// What a client sends.
fn body(request: &str) -> String {
    json!({ "request": request }).to_string()
}

/// What a program reads.
fn document(request: &str) -> String {
    format!(r#"{{"request":{},"settings":{{}}}}"#, json!(request))
}

/// The number in an answer that accepts.
fn said(answer: &Value) -> Option<u64> {
    let message = answer["status"]["message"].as_str()?;
    (answer["allowed"] == true).then(|| u64::from_str_radix(message, 16).ok())?
}
