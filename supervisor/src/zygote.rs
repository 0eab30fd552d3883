//! A worker whose guest is started, and which is forked for every worker that goes on from
//! there. It is no child of ours that serves then, but a grandchild.
//!
//! What we learn of a grandchild comes from the kernel: its number with its first message, and
//! whose child it is from `/proc`. A zygote can end what was forked from it, and no more.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::time::Duration;

use conclave_ipc::Phase;
use conclave_ipc::layers::{Layer, Layers};
use conclave_ipc::message::{Confinement, Reply, Request};
use nix::sys::socket::sockopt::PassCred;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::log::shorten;
use crate::process::{Death, Forked, Process, START_TIME_MAX, WorkerError, unexpected};
use crate::spawn::Living;

/// How often a zygote is asked how a worker has ended that may be about to, and the pause
/// between.
const REAP_ATTEMPTS: u32 = 50;
const REAP_PAUSE: Duration = Duration::from_millis(2);

/// A process that is forked and evaluates nothing itself.
#[derive(Debug)]
pub(crate) struct Zygote {
    /// `None` once it was of no more use.
    process: Mutex<Option<Process>>,
    policy: String,
    living: Living,
}

impl Zygote {
    /// Of a worker that has started its guest.
    pub(crate) fn new(process: Process, policy: &str, living: Living) -> Arc<Self> {
        let process = Mutex::new(Some(process));
        Arc::new(Self { process, policy: policy.to_owned(), living })
    }

    /// A worker that goes on from where the guest stands, and what it is locked up with.
    ///
    /// # Errors
    /// It can't be forked, or the new worker is of no use.
    pub(crate) async fn new_worker(
        self: &Arc<Self>,
    ) -> Result<(Process, Confinement), WorkerError> {
        let zygote = Arc::clone(self);
        // In a task of its own: half of an exchange would be the end of the zygote.
        let forked = tokio::spawn(async move { zygote.fork_to_the_end().await });
        forked.await.map_err(|error| WorkerError::Spawn(io::Error::other(error)))?
    }

    async fn fork_to_the_end(self: Arc<Self>) -> Result<(Process, Confinement), WorkerError> {
        let mut place = self.process.lock().await;
        let Some(process) = &mut *place else {
            return Err(WorkerError::Spawn(io::Error::other("the zygote is gone")));
        };
        let deadline = Instant::now() + START_TIME_MAX;
        match process.until(deadline, ask_for_fork).await {
            Ok(forked) => Process::forked(&self, process, forked, self.living.enter()).await,
            Err(error) => {
                // With it goes what was forked from it: it can't be told what it is up to.
                *place = None;
                Err(error)
            }
        }
    }

    /// Whether it was ended because it was of no more use.
    pub(crate) async fn is_gone(&self) -> bool {
        self.process.lock().await.is_none()
    }

    /// How the child with that number has ended, which it has.
    pub(crate) async fn reap(&self, child: u32) -> Death {
        let mut place = self.process.lock().await;
        let Some(process) = &mut *place else { return Death::Unknown };
        let deadline = Instant::now() + START_TIME_MAX;
        let status = process
            .until(deadline, async |process| {
                process.send(&Request::Reap { child }).await?;
                match process.receive().await? {
                    Reply::Reaped { status } => Ok(status),
                    other => Err(unexpected(&other, Phase::Zygote)),
                }
            })
            .await;
        match status {
            Ok(status) => death(status),
            Err(error) => {
                let error = error.to_string();
                let (policy, error) = (self.policy.as_str(), shorten(&error));
                tracing::warn!(policy, error, "zygote is ended");
                *place = None;
                Death::Unknown
            }
        }
    }
}

/// Whether a worker with these layers can be forked: what is forked must end with it, and be
/// counted apart from everybody else's processes.
pub(crate) fn can_fork(layers: Layers) -> bool {
    layers.contains(Layer::UserNamespace) && layers.contains(Layer::PidNamespace)
}

/// What a status means; see wait(2).
fn death(status: i32) -> Death {
    // The number is of the zygote's namespace, and nobody looks at it.
    WaitStatus::from_raw(Pid::from_raw(0), status).map_or(Death::Unknown, Death::from)
}

/// Has a zygote fork, and finds out who has come into being.
async fn ask_for_fork(process: &mut Process) -> Result<Forked, WorkerError> {
    let zygote = process.pid();
    let (ours, theirs) = StdStream::pair().map_err(WorkerError::Spawn)?;
    let channel = told_who_sends(ours).map_err(WorkerError::Spawn)?;
    process.send_with(&Request::Fork, theirs.as_fd()).await?;
    drop(theirs);
    let child = match process.receive().await? {
        Reply::Forked { child } => child,
        other => return Err(unexpected(&other, Phase::Zygote)),
    };
    let pid = match sender(&channel).await {
        Ok(pid) => pid,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(stillborn(process, child).await);
        }
        Err(error) => return Err(WorkerError::Channel(error)),
    };
    let pidfd = rustix::process::pidfd_open(
        rustix::process::Pid::from_raw(pid.as_raw())
            .ok_or_else(|| WorkerError::Violation("a message from nobody".to_owned()))?,
        rustix::process::PidfdFlags::empty(),
    )
    .map_err(|error| WorkerError::Spawn(error.into()))?;
    // What has that number now is what the descriptor is of; its parent tells whether it is
    // still who has sent the message. Not a zygote that wants us to take it for its child.
    if pid == zygote || parent_of(pid).map_err(WorkerError::Spawn)? != zygote {
        return Err(WorkerError::Violation("a process that was not forked from it".to_owned()));
    }
    setsockopt(&channel, PassCred, &false).map_err(|error| WorkerError::Spawn(error.into()))?;
    Ok(Forked { child, pid, pidfd, channel })
}

/// How a new worker has ended that has said nothing and closed its channel.
async fn stillborn(process: &mut Process, child: u32) -> WorkerError {
    // It closes its channel a moment before it has ended.
    for _ in 0..REAP_ATTEMPTS {
        if let Err(error) = process.send(&Request::Reap { child }).await {
            return error;
        }
        match process.receive().await {
            Ok(Reply::Reaped { status }) => {
                return WorkerError::Died { phase: Phase::Serve, death: death(status) };
            }
            Ok(Reply::Fault { .. }) => tokio::time::sleep(REAP_PAUSE).await,
            Ok(other) => return unexpected(&other, Phase::Zygote),
            Err(error) => return error,
        }
    }
    WorkerError::Channel(io::ErrorKind::UnexpectedEof.into())
}

/// A stream whose messages come with the number of who sends them.
fn told_who_sends(stream: StdStream) -> io::Result<UnixStream> {
    stream.set_nonblocking(true)?;
    crate::spawn::take_no_descriptors(&stream);
    setsockopt(&stream, PassCred, &true)?;
    UnixStream::from_std(stream)
}

/// Who sends what comes first, which is left there.
async fn sender(channel: &UnixStream) -> io::Result<Pid> {
    let sender = channel.async_io(Interest::READABLE, || {
        let mut byte = [0; 1];
        let mut vectors = [IoSliceMut::new(&mut byte)];
        let mut space = nix::cmsg_space!(UnixCredentials);
        let flags = MsgFlags::MSG_PEEK;
        let message = recvmsg::<()>(channel.as_raw_fd(), &mut vectors, Some(&mut space), flags)?;
        if message.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut parts = message.cmsgs()?;
        parts
            .find_map(|part| match part {
                ControlMessageOwned::ScmCredentials(who) => Some(Pid::from_raw(who.pid())),
                _ => None,
            })
            .ok_or_else(|| io::Error::other("a message from nobody"))
    });
    sender.await
}

/// The parent of that process, by the fourth field of its `stat`; see `proc_pid_stat(5)`.
fn parent_of(pid: Pid) -> io::Result<Pid> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is a name in parentheses, which may hold anything.
    let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
    let parent = parent.and_then(|parent| parent.parse().ok());
    parent.map(Pid::from_raw).ok_or_else(|| io::Error::other("no parent in /proc/PID/stat"))
}
