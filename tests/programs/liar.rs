//! A program that stands in for the worker and speaks the protocol badly.
//!
//! The supervisor never looks into a module, so a policy's "module" is the script of a lie:
//! a name for the process, the stage at which to lie, what to do there (words that
//! [`frames::Frames::put`] and [`deeds`] know), and perhaps a path. Where there is a path,
//! only the second worker of the policy lies; the workers count themselves with files whose
//! names begin with it. At all other stages, and without a script, the program does what a
//! worker should, except that it locks nothing up and says that it has, and has no guest that
//! it could start.
#![expect(unsafe_code, reason = "takes over inherited descriptors by number")]
#![expect(clippy::unwrap_used, reason = "a liar that fails says so by its exit code")]

#[path = "liar/deeds.rs"]
mod deeds;
#[path = "liar/frames.rs"]
mod frames;

use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::{env, panic};

use conclave_ipc::channel::WorkerEnd;
use conclave_ipc::message::{Operation, Request};
use conclave_ipc::{CHANNEL_FD, IMAGE_FD, OUTPUT_FD, Role};
use conclave_worker::Socket;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{MsgFlags, recv};

use frames::Frames;

/// The exit of a liar that could not do what its script says; no lie exits so.
const FAILED: i32 = 99;

/// The signal to begin with a lie that is told while nobody asks.
const CUE: Signal = Signal::SIGUSR1;

fn main() {
    panic::set_hook(Box::new(|_| std::process::exit(FAILED)));
    // Blocked, it waits; and the first process of a namespace is not even sent others.
    SigSet::from(CUE).thread_block().unwrap();
    // It has not locked itself up, but it must not outlive the daemon either.
    prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
    // SAFETY: the supervisor hands over these two, and nothing else here owns them.
    let [channel, image] = [CHANNEL_FD, IMAGE_FD].map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let role = env::args().nth(1).as_deref().and_then(Role::from_arg).unwrap();
    let compiles = role == Role::Compile;
    // SAFETY: as above; only in these roles there is a third one.
    let output = (role != Role::Serve).then(|| unsafe { File::from_raw_fd(OUTPUT_FD) });
    let script = Script::read(&File::from(image), compiles);
    prctl::set_name(&CString::new(script.name.as_str()).unwrap()).unwrap();
    // For as long as the process lives.
    let channel = Box::leak(Box::new(UnixStream::from(channel)));
    let mut liar = Liar {
        channel,
        given: None,
        frames: Frames { code_bytes: script.text.len() as u64, ..Frames::default() },
        script,
        role,
        output,
        unsent: Vec::new(),
    };
    if compiles { liar.compile() } else { liar.serve() }
}

#[derive(Debug)]
struct Script {
    /// The name that the process takes, at most 15 bytes.
    name: String,
    stage: String,
    acts: String,
    /// All of it.
    text: Vec<u8>,
}

impl Script {
    fn read(image: &File, compiles: bool) -> Self {
        let mut text = vec![0; 4096];
        // Not from the descriptor's own position, which the workers of a policy share.
        let length = image.read_at(&mut text, 0).unwrap();
        text.truncate(length);
        let all = String::from_utf8(text.clone()).unwrap();
        let mut lines = all.lines().map(str::to_owned);
        let mut next = || lines.next().unwrap_or_default();
        let (name, stage, acts, path) = (next(), next(), next(), next());
        let lies = path.is_empty() || compiles || turn(&path) == 2;
        Self { name, stage: if lies { stage } else { String::new() }, acts, text }
    }
}

/// Which worker of its policy this is, counted from 1.
fn turn(path: &str) -> usize {
    (1..).find(|turn| File::create_new(format!("{path}.{turn}")).is_ok()).unwrap()
}

#[derive(Debug)]
struct Liar {
    channel: &'static UnixStream,
    /// The channel for the next worker.
    given: Option<OwnedFd>,
    script: Script,
    role: Role,
    /// Where a compiler writes, and a worker that keeps the state of its guest.
    output: Option<File>,
    frames: Frames,
    /// The frames of a script go out together, so that the supervisor reads them together.
    unsent: Vec<u8>,
}

impl Liar {
    fn compile(&mut self) {
        let mut end = WorkerEnd::new(self.channel);
        self.at("compile-confined", "confined");
        end.receive().unwrap();
        if self.script.stage != "compile" {
            self.act("output");
        }
        self.at("compile", "compiled");
    }

    fn serve(&mut self) {
        self.at("confined", "confined");
        self.answer();
    }

    /// Goes on as the worker that was forked, on the channel that it was given.
    fn serve_forked(&mut self, channel: OwnedFd) -> ! {
        prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
        self.channel = Box::leak(Box::new(UnixStream::from(channel)));
        self.unsent.clear();
        self.at("child", "loaded");
        self.answer();
        std::process::exit(0)
    }

    /// Does what it is asked, until nobody asks any more.
    fn answer(&mut self) {
        let mut end = WorkerEnd::new(Socket::new(self.channel.try_clone().unwrap()));
        end.stream_mut().take_descriptors(self.role == Role::Snapshot);
        loop {
            if self.script.stage == "unread" && self.is_asked_to_validate() {
                self.at("unread", "");
            }
            let (stage, honest) = match end.receive() {
                Ok(Request::Load(_)) => ("load", "loaded"),
                Ok(Request::Evaluate { id, operation }) => {
                    self.frames.id = id.0;
                    match operation {
                        Operation::Validate(_) if self.role == Role::Snapshot => {
                            ("continue", "verdict")
                        }
                        Operation::Validate(_) => ("validate", "verdict"),
                        Operation::ValidateSettings => ("settings", "verdict"),
                    }
                }
                Ok(Request::Start { warmup }) if self.role == Role::Snapshot => {
                    let practises = warmup.is_some() && self.script.stage == "practice";
                    (if practises { "practice" } else { "start" }, "started")
                }
                Ok(Request::Fork) => ("fork", "fork forked"),
                Ok(Request::Reap { child }) => {
                    self.frames.child = child;
                    ("reap", "reaped")
                }
                // To a host call that nobody has waited for.
                Ok(Request::HostAnswer(_)) => continue,
                Ok(_) | Err(_) => return,
            };
            self.given = end.stream_mut().descriptor();
            self.at(stage, honest);
            if stage == "validate" && self.script.stage == "idle" {
                // Only the test knows when the answer has been taken.
                SigSet::from(CUE).wait().unwrap();
                self.at("idle", "");
            }
        }
    }

    /// Looks at the next request without taking it: a length, which message it is, its id,
    /// and what is asked for.
    fn is_asked_to_validate(&self) -> bool {
        let mut head = [0; 7];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL;
        recv(self.channel.as_raw_fd(), &mut head, flags).unwrap();
        matches!(head, [_, _, _, _, 5, _, 0])
    }

    /// Plays the script if this is its stage, else says what a worker should. A script ends
    /// in silence unless its last word is another.
    fn at(&mut self, stage: &str, honest: &str) {
        let lies = self.script.stage == stage;
        let acts = if lies { self.script.acts.clone() } else { honest.to_owned() };
        acts.split(' ').filter(|act| !act.is_empty()).for_each(|act| self.act(act));
        self.send();
        if lies && !acts.ends_with("go-on") {
            deeds::silence();
        }
    }

    /// One word of a script.
    fn act(&mut self, act: &str) {
        if !self.frames.put(act, &mut self.unsent) {
            self.perform(act);
        }
    }

    fn send(&mut self) {
        let mut channel = self.channel;
        channel.write_all(&std::mem::take(&mut self.unsent)).unwrap();
    }
}
