//! The process behind a process descriptor: its end, and how it came.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use conclave_ipc::exit::WorkerExit;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::spawn::{LifeGuard, describe_failed_spawn, register};
use crate::zygote::Zygote;

/// How a worker process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Death {
    /// With an exit code, see [`WorkerExit`].
    Exited(i32),
    /// By a signal: `SIGSYS` is a system call outside the filter.
    Signalled(Signal),
    /// By the kernel, because the memory of its control group did not suffice.
    OutOfMemory,
    /// Nobody knows; it was reaped elsewhere.
    Unknown,
}

impl Death {
    /// Whether it wanted more memory than it may have.
    pub(super) fn is_for_memory(self) -> bool {
        let code = i32::from(WorkerExit::OutOfMemory.code());
        self == Self::OutOfMemory || self == Self::Exited(code)
    }
}

impl fmt::Display for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signalled(Signal::SIGSYS) => {
                f.write_str("made a system call outside its filter and was killed (SIGSYS)")
            }
            Self::Signalled(signal) => write!(f, "was killed by {signal}"),
            Self::Exited(code) => {
                match WorkerExit::from_code(*code)
                    .map(WorkerExit::describe)
                    .or_else(|| describe_failed_spawn(*code))
                {
                    Some(what) => f.write_str(what),
                    None => write!(f, "exited with code {code}"),
                }
            }
            Self::OutOfMemory => f.write_str("was killed at the limit of its policy's memory"),
            Self::Unknown => f.write_str("ended"),
        }
    }
}

impl From<WaitStatus> for Death {
    fn from(status: WaitStatus) -> Self {
        match status {
            WaitStatus::Exited(_, code) => Self::Exited(code),
            WaitStatus::Signaled(_, signal, _) => Self::Signalled(signal),
            _ => Self::Unknown,
        }
    }
}

/// A process. Killed when dropped, and reaped by whoever is its parent.
#[derive(Debug)]
pub(super) struct Life(Option<Living>);

/// A process that is not given up yet.
#[derive(Debug)]
enum Living {
    /// We are its parent.
    Child(Child),
    /// A zygote is.
    Grandchild(Grandchild),
}

/// A child that is not reaped yet.
#[derive(Debug)]
struct Child {
    pidfd: AsyncFd<OwnedFd>,
    /// Counts the process until it is reaped.
    _guard: LifeGuard,
}

/// A process that a zygote was forked for. A task of its own waits for its end and asks the
/// zygote, which nobody else may interrupt.
#[derive(Debug)]
struct Grandchild {
    pidfd: Arc<AsyncFd<OwnedFd>>,
    /// How it has ended, once it has.
    death: watch::Receiver<Option<Death>>,
}

impl Life {
    /// Of a child of ours.
    ///
    /// # Errors
    /// It can't be watched.
    pub(super) fn of_child(pidfd: OwnedFd, guard: LifeGuard) -> io::Result<Self> {
        let child = Child { pidfd: register(pidfd)?, _guard: guard };
        Ok(Self(Some(Living::Child(child))))
    }

    /// Of a child of that zygote's, which knows it by this number.
    ///
    /// # Errors
    /// It can't be watched.
    pub(super) fn of_grandchild(
        pidfd: OwnedFd,
        guard: LifeGuard,
        zygote: Arc<Zygote>,
        number: u32,
    ) -> io::Result<Self> {
        let pidfd = Arc::new(register(pidfd)?);
        let (tell, death) = watch::channel(None);
        let watched = Arc::clone(&pidfd);
        tokio::spawn(async move {
            let ended = watched.readable().await.map(drop);
            let death = match ended {
                Ok(()) => zygote.reap(number).await,
                Err(_) => Death::Unknown,
            };
            // Nobody may want to know any more.
            tell.send_replace(Some(death));
            drop(guard);
        });
        Ok(Self(Some(Living::Grandchild(Grandchild { pidfd, death }))))
    }

    pub(super) async fn death(&self) -> Death {
        match &self.0 {
            Some(Living::Child(child)) => death_of(&child.pidfd).await,
            Some(Living::Grandchild(grandchild)) => grandchild.death().await,
            None => Death::Unknown,
        }
    }

    pub(super) async fn end(&mut self) {
        match self.0.take() {
            Some(Living::Child(child)) => kill_and_reap(child).await,
            Some(Living::Grandchild(grandchild)) => {
                kill(&grandchild.pidfd);
                grandchild.death().await;
            }
            None => {}
        }
    }
}

impl Grandchild {
    async fn death(&self) -> Death {
        // Without a sender the task is gone, and the runtime with it.
        let mut death = self.death.clone();
        death
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|death| *death)
            .unwrap_or(Death::Unknown)
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        match self.0.take() {
            Some(Living::Child(child)) => {
                kill(&child.pidfd);
                // Without a runtime the supervisor is ending, and init reaps.
                if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                    runtime.spawn(kill_and_reap(child));
                }
            }
            Some(Living::Grandchild(grandchild)) => kill(&grandchild.pidfd),
            None => {}
        }
    }
}

async fn kill_and_reap(child: Child) {
    kill(&child.pidfd);
    death_of(&child.pidfd).await;
    let reaped = waitid(
        Id::PIDFd(child.pidfd.get_ref().as_fd()),
        WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG,
    );
    tracing::debug!(?reaped, "worker is gone");
}

/// Ends when the process does, and leaves it to be reaped.
async fn death_of(pidfd: &AsyncFd<OwnedFd>) -> Death {
    // Readable as soon as the process has ended (pidfd_open(2)).
    if pidfd.readable().await.is_err() {
        return Death::Unknown;
    }
    // WNOWAIT leaves the status for whoever asks next; `Drop` takes it.
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    waitid(Id::PIDFd(pidfd.get_ref().as_fd()), flags).map_or(Death::Unknown, Death::from)
}

fn kill(pidfd: &AsyncFd<OwnedFd>) {
    match rustix::process::pidfd_send_signal(pidfd.get_ref(), rustix::process::Signal::KILL) {
        // Already ended.
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => tracing::error!(%error, "worker can't be killed"),
    }
}
