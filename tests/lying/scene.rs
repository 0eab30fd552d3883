//! A daemon whose workers lie, and one policy whose worker does not.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use harness::{Daemon, PATIENCE, Place, conclave, is_alive, request, skipped, status_field};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::lies::{DEADLINE, End, Lie};

/// The policy whose worker is honest.
pub(crate) const HONEST: &str = "honest";

/// The longest line of the log about a worker: the text of one field, escaped in the worst
/// way, and what stands around it.
const LINE_BYTES_MAX: usize = 6 * conclave_ipc::limits::LOG_LINE_BYTES_MAX + 2048;

/// More than the buffers of a socket hold.
const LARGE_BYTES: usize = 4 << 20;

/// Has a worker begin with a lie that it tells while nobody asks.
const CUE: Signal = Signal::SIGUSR1;

/// What is wrong with the supervisor's answer to a lie.
pub(crate) type Verdict = Result<(), String>;

#[derive(Debug)]
pub(crate) struct Scene {
    daemon: Daemon,
    lies: Vec<Lie>,
    /// A pod with [`LARGE_BYTES`].
    large_request: String,
}

impl Scene {
    /// Starts a daemon with these lies, each told by the worker of a policy of its own.
    pub(crate) fn open(lies: &[Lie], arguments: &[&str]) -> Self {
        let place = Place::new();
        let mut policies = policy(&place, HONEST, "", "timeoutEvalSeconds: 30");
        for (number, lie) in lies.iter().enumerate() {
            let Lie { name, stage, script, .. } = lie;
            // The others have time, however slow the machine is.
            let hurried =
                matches!(lie.end, End::NeverServes(DEADLINE) | End::Rejected(DEADLINE, _));
            let seconds = if hurried { "0.5" } else { "30" };
            let mut keys = format!("timeoutEvalSeconds: {seconds}");
            if lie.reads_nothing() {
                keys += &format!("\n  settings: {{ large: {} }}", "x".repeat(LARGE_BYTES));
            }
            if lie.is_of_a_started() {
                keys += "\n  start: snapshot";
            }
            let mut text = format!("{}\n{stage}\n{script}\n", process_name(number));
            if lie.is_told_by_an_heir() {
                text += &format!("{}\n", place.path(name).display());
            }
            policies += &policy(&place, name, &text, &keys);
        }
        let liar = conclave().with_file_name("lying-worker");
        let common = [
            "--worker",
            liar.to_str().unwrap(),
            "--workers",
            "1",
            "--no-cache",
            "--start",
            "fresh",
            "--log-level",
            "warn",
        ];
        let daemon = Daemon::start(place, &policies, &[&common, arguments].concat());
        let mut large: Value = serde_json::from_str(&request("pod-ok.json")).unwrap();
        large["request"]["object"]["metadata"]["annotations"] =
            json!({ "large": "x".repeat(LARGE_BYTES) });
        Self { daemon, lies: lies.to_vec(), large_request: large.to_string() }
    }

    /// Waits until every policy serves or does not.
    pub(crate) fn wait_until_tried(&self) {
        let is_tried = || {
            let readiness = self.daemon.get("/readiness");
            let starting = |why: &Value| why == "starting";
            readiness.status == 200
                || !readiness.json()["policies"].as_object().unwrap().values().any(starting)
        };
        assert!(wait_for(is_tried), "starting for ever: {}", self.daemon.get("/readiness").json());
    }

    /// Asks the honest policy until it is told to stop, and gives how often it answered and
    /// the longest time that it took.
    pub(crate) fn ask_the_honest(&self, stop: &AtomicBool) -> (usize, Duration) {
        let (mut client, mut answers, mut longest) = (self.daemon.client(), 0, Duration::ZERO);
        while !stop.load(Ordering::Relaxed) {
            let asked = Instant::now();
            let path = format!("/validate/{HONEST}");
            let answer = client.post(&path, request("pod-ok.json")).response();
            assert_eq!(answer["allowed"], true, "{answer}");
            longest = longest.max(asked.elapsed());
            answers += 1;
            thread::sleep(Duration::from_millis(2));
        }
        (answers, longest)
    }

    /// Has a lie told, and sees what comes of it.
    pub(crate) fn play(&self, lie: &Lie) -> Verdict {
        let name = lie.name;
        let known = self.complaints(name).len();
        if let End::NeverServes(log) = lie.end {
            self.is_reported_unready(name, log)?;
            is_rejected(&self.ask(lie)?, "")?;
            // Said before the policies counted as tried.
            self.complains(name, 0, "policy can't serve", log)?;
            let left = [self.workers(lie), self.zygotes(lie)].concat();
            return expect(left.is_empty(), || format!("workers {left:?} live on"));
        }
        let worker = self.worker(lie)?;
        match lie.end {
            End::NeverServes(_) => {}
            End::Rejected(text, log) => {
                if lie.stage == "stopped" {
                    send(worker, Signal::SIGSTOP);
                }
                is_rejected(&self.ask(lie)?, text)?;
                self.complains(name, known, "worker is ended", log)?;
            }
            End::Unheard(log) if lie.is_told_by_an_heir() => {
                send(worker, Signal::SIGKILL);
                self.complains(name, known, "idle worker", "was killed by SIGKILL")?;
                self.complains(name, known + 1, "worker can't be started", log)?;
                is_accepted(&self.ask(lie)?)?;
            }
            End::Unheard(log) => {
                is_accepted(&self.ask(lie)?)?;
                send(worker, CUE);
                self.complains(name, known, "idle", log)?;
            }
            End::Misreported(log) => {
                send(worker, Signal::SIGKILL);
                let has_both = || self.complaints(name).len() > known + 1;
                expect(wait_for(has_both), || "two lines are missing in the log".to_owned())?;
                // How the worker has ended nobody knows; whoever waits long says so first.
                let lines = self.complaints(name);
                let is_of_zygote = |line: &Value| line["message"] == "zygote is ended";
                let place = known + usize::from(!is_of_zygote(&lines[known]));
                self.complains(name, place, "zygote is ended", log)?;
                self.complains(name, 2 * known + 1 - place, "idle", "")?;
                // As soon as there is another zygote.
                let is_back = || self.ask(lie).is_ok_and(|answer| is_accepted(&answer).is_ok());
                expect(wait_for(is_back), || "it does not serve again".to_owned())?;
            }
            End::Unreadable => {
                let text = "internal server error: invalid response from policy: ";
                is_rejected(&self.ask(lie)?, text)?;
                return expect(is_alive(worker), || "its worker was ended".to_owned());
            }
            End::Accepted => {
                is_accepted(&self.ask(lie)?)?;
                return expect(is_alive(worker), || "its worker was ended".to_owned());
            }
        }
        expect(wait_for(|| !is_alive(worker)), || "its worker lives on".to_owned())
    }

    /// Has a lie told without a look at what comes of it.
    pub(crate) fn provoke(&self, lie: &Lie) {
        if lie.is_told_by_an_heir() {
            send(self.worker(lie).unwrap(), Signal::SIGKILL);
        } else {
            self.ask(lie).unwrap();
        }
    }

    /// The log at ERROR and WARN, once so many of its lines have that word.
    pub(crate) fn wait_for_lines(&self, word: &str, count: usize) -> String {
        let has_them =
            || self.daemon.log().lines().filter(|line| line.contains(word)).count() >= count;
        assert!(wait_for(has_them), "{}", self.daemon.log());
        self.daemon.log()
    }

    /// One request, one answer: what comes next on the connection is the next answer.
    fn ask(&self, lie: &Lie) -> Result<Value, String> {
        let large = lie.reads_nothing();
        let body = if large { self.large_request.clone() } else { request("pod-ok.json") };
        let mut client = self.daemon.client();
        let answer = client.post(&format!("/validate/{}", lie.name), body);
        let next = client.send("GET", "/liveness", &[], b"");
        expect((next.status, next.body.as_slice()) == (200, b""), || {
            "its request was answered twice".to_owned()
        })?;
        expect(answer.status == 200, || format!("its request got status {}", answer.status))?;
        Ok(answer.json()["response"].clone())
    }

    /// Why `/readiness` says that a policy does not serve.
    fn unready(&self, policy: &str) -> Option<String> {
        let readiness = self.daemon.get("/readiness");
        if readiness.status == 200 {
            return None;
        }
        Some(readiness.json()["policies"].get(policy)?.as_str().unwrap().to_owned())
    }

    fn is_reported_unready(&self, policy: &str, why: &str) -> Verdict {
        let said = self.unready(policy);
        expect(said.as_ref().is_some_and(|said| said.contains(why)), || {
            format!("/readiness says {:?}", said.as_deref().map(cut))
        })
    }

    /// The lines at WARN or ERROR that name this policy.
    fn complaints(&self, policy: &str) -> Vec<Value> {
        let is_one = |line: &Value| line["level"] == "WARN" || line["level"] == "ERROR";
        let lines = self.daemon.log_lines();
        lines.into_iter().filter(|line| is_one(line) && line["policy"] == policy).collect()
    }

    /// The next complaint about a policy after the known ones is this.
    fn complains(&self, policy: &str, known: usize, message: &str, error: &str) -> Verdict {
        let has_more = || self.complaints(policy).len() > known;
        expect(wait_for(has_more), || format!("the log does not say {error:?}"))?;
        let line = &self.complaints(policy)[known];
        let said = line["message"].as_str().unwrap_or_default();
        // What is wrong with an idle worker is in the message itself.
        let full = format!("{said} {}", line["error"].as_str().unwrap_or_default());
        let bytes = line.to_string().len();
        expect(said.starts_with(message) && full.contains(error), || {
            format!("the log says {:?} instead of {error:?}", brief(line))
        })?;
        expect(bytes <= LINE_BYTES_MAX, || format!("a line of the log has {bytes} bytes"))
    }

    /// The worker of a policy, once it is there and loaded.
    fn worker(&self, lie: &Lie) -> Result<Pid, String> {
        let has_one = || self.unready(lie.name).is_none() && self.workers(lie).len() == 1;
        expect(wait_for(has_one), || "has no worker".to_owned())?;
        self.workers(lie).pop().ok_or_else(|| "has lost its worker".to_owned())
    }

    fn workers(&self, lie: &Lie) -> Vec<Pid> {
        self.of_lie(lie, self.daemon.workers())
    }

    fn zygotes(&self, lie: &Lie) -> Vec<Pid> {
        self.of_lie(lie, self.daemon.zygotes())
    }

    /// Those that live and are of that lie's policy.
    fn of_lie(&self, lie: &Lie, processes: Vec<Pid>) -> Vec<Pid> {
        let number = self.lies.iter().position(|other| other.name == lie.name).unwrap();
        let name = process_name(number);
        let is_its = |pid: &Pid| status_field(*pid, "Name").as_deref() == Some(name.as_str());
        processes.into_iter().filter(is_its).filter(|pid| is_alive(*pid)).collect()
    }

    /// So many lines were written at WARN or ERROR, each about one of the lies.
    pub(crate) fn has_said_no_more(&self, count: usize) -> Verdict {
        let log = self.daemon.log();
        for line in log.lines() {
            let parsed: Value =
                serde_json::from_str(line).map_err(|error| format!("{error} in {}", cut(line)))?;
            let policy = parsed["policy"].as_str().unwrap_or_default();
            expect(self.lies.iter().any(|lie| lie.name == policy), || {
                format!("the log says {}", cut(line))
            })?;
        }
        let found = log.lines().count();
        expect(found == count, || format!("the log has {found} lines instead of {count}"))
    }

    /// The processes that there are while nobody lies: one of each policy that serves, and a
    /// zygote of each that is started once.
    pub(crate) fn children_expected(&self) -> usize {
        let serving = self.lies.iter().filter(|lie| !matches!(lie.end, End::NeverServes(_)));
        1 + serving.map(|lie| 1 + usize::from(lie.is_of_a_started())).sum::<usize>()
    }

    /// Waits until every policy that is to serve has its worker again, and measures.
    pub(crate) fn measure(&self) -> Size {
        let pid = self.daemon.pid();
        let all = || [self.daemon.workers(), self.daemon.zygotes()].concat();
        let children = || all().into_iter().filter(|child| is_alive(*child)).count();
        wait_for(|| children() == self.children_expected());
        // The last of them may be on its way from its start to its work.
        thread::sleep(Duration::from_millis(200));
        let resident = status_field(pid, "VmRSS").unwrap();
        let resident = resident.split(' ').next().unwrap().parse().unwrap();
        // Linux 6.2 and newer count them so, for whoever asks.
        let descriptors = fs::metadata(format!("/proc/{pid}/fd")).unwrap().len();
        if descriptors == 0 {
            skipped("this kernel does not tell how many descriptors another's process has");
        }
        Size { resident_kib: resident, descriptors, children: children() }
    }
}

impl Lie {
    /// Whether the worker leaves unread what it is sent.
    fn reads_nothing(&self) -> bool {
        self.stage == "unread" || self.name == "settings-never-read"
    }

    /// Whether it is told by a worker that starts its guest once.
    fn is_of_a_started(&self) -> bool {
        ["start", "fork", "child", "continue", "reap"].contains(&self.stage)
    }

    pub(crate) fn is_told_by_an_heir(&self) -> bool {
        self.name.starts_with("heir-")
    }
}

/// What a daemon takes of the machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) resident_kib: u64,
    pub(crate) descriptors: u64,
    pub(crate) children: usize,
}

/// What the worker of a lie is called in `/proc`.
fn process_name(number: usize) -> String {
    format!("liar-{number}")
}

fn policy(place: &Place, name: &str, text: &str, keys: &str) -> String {
    let module = place.write(&format!("{name}.wasm"), text);
    format!("{name}:\n  module: file://{}\n  {keys}\n", module.display())
}

/// The message of an answer that fails closed begins so.
fn is_rejected(answer: &Value, text: &str) -> Verdict {
    let message = answer["status"]["message"].as_str().unwrap_or_default();
    let closed = answer["allowed"] == false
        && answer["status"]["code"] == 500
        && answer["uid"] == "705ab4f5-6393-11e8-b7cc-42010a800002"
        && answer.get("patch").is_none();
    expect(closed && message.starts_with(text), || {
        format!("its request was answered with {}", brief(answer))
    })
}

fn is_accepted(answer: &Value) -> Verdict {
    expect(answer["allowed"] == true, || format!("an honest answer became {}", brief(answer)))
}

/// Whether the condition holds in the end.
fn wait_for(condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > PATIENCE / 2 {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
    true
}

/// To a process that may have ended.
fn send(worker: Pid, signal: Signal) {
    assert!(matches!(kill(worker, signal), Ok(()) | Err(Errno::ESRCH)));
}

fn expect(holds: bool, what: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(what()) }
}

fn brief(value: &Value) -> String {
    cut(&value.to_string()).to_owned()
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(300)]
}
