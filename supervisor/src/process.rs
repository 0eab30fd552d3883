//! A worker as the supervisor sees it: a process, a channel, and what may come from it.
//!
//! Nothing here waits for a worker without a deadline, and nothing that a worker sends is
//! trusted: a message that is malformed, unexpected or about another evaluation ends it.
#![forbid(unsafe_code)]

mod life;

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use conclave_ipc::frame::{self, FrameBuffer, FrameError};
use conclave_ipc::layers::Layers;
use conclave_ipc::limits::{FRAME_BYTES_MAX, MESSAGE_BYTES_MAX, REPLY_BYTES_MAX};
use conclave_ipc::message::{Confinement, EvaluationId, FaultClass, Reply, Request};
use conclave_ipc::{Phase, Role};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::cgroup::Group;
use crate::placement::{InFlight, Placement, Seat};
use crate::spawn::{LifeGuard, Spawned, Spawner, Start};
use crate::zygote::Zygote;

pub(crate) use life::Death;
use life::Life;

/// From exec, or a fork, to the first message; three milliseconds when the machine is idle.
pub(crate) const START_TIME_MAX: Duration = Duration::from_secs(10);

/// Why a worker is of no more use. Every case ends it.
#[derive(Debug, Error)]
pub(crate) enum WorkerError {
    /// It could not be started.
    #[error("worker can't be started: {0}")]
    Spawn(io::Error),
    /// Its deadline passed.
    #[error("worker missed its deadline")]
    Deadline,
    /// It ended by itself.
    #[error("worker (role {}) {death}", .phase.name())]
    Died {
        /// What it was doing.
        phase: Phase,
        /// How it ended.
        death: Death,
    },
    /// It made a system call that its filter does not let through, and dies of it.
    #[error(
        "worker (role {}) made the system call {}, which is outside its filter, and is killed",
        .phase.name(), syscall_name(*.syscall)
    )]
    Forbidden {
        /// What it was doing.
        phase: Phase,
        /// The call's number.
        syscall: u32,
    },
    /// It reported that its policy broke.
    #[error("{}: {message}", .class.name())]
    Fault {
        /// What kind of thing broke.
        class: FaultClass,
        /// Details for a person.
        message: String,
    },
    /// It sent what it may not send now.
    #[error("worker broke the protocol: {0}")]
    Violation(String),
    /// It sent a frame that is none.
    #[error("worker broke the protocol: {0}")]
    BadFrame(FrameError),
    /// The message for it is too large.
    #[error("message can't be sent: {0}")]
    Unsendable(FrameError),
    /// The channel failed.
    #[error("channel to the worker failed: {0}")]
    Channel(io::Error),
}

impl WorkerError {
    /// Whether the guest was at fault, in a way that its request can be answered with.
    pub(crate) const fn is_of_guest(&self) -> bool {
        matches!(self, Self::Deadline | Self::Fault { .. })
    }

    /// Whether the kernel ended the worker because it wanted more memory than it may have.
    pub(crate) fn is_for_memory(&self) -> bool {
        matches!(self, Self::Died { death, .. } if death.is_for_memory())
    }
}

/// The name of a system call of this processor, for people.
fn syscall_name(number: u32) -> String {
    let known = usize::try_from(number).ok().and_then(syscalls::Sysno::new);
    known.map_or_else(|| format!("number {number:#x}"), |call| call.name().to_owned())
}

/// A worker that was forked, seen from its grandparent.
#[derive(Debug)]
pub(crate) struct Forked {
    /// Its number, as the zygote knows it.
    pub(crate) child: u32,
    /// Its number, as we do.
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    pub(crate) channel: UnixStream,
}

/// A worker process with its channel. Dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Process {
    life: Life,
    /// What it was forked from.
    zygote: Option<Arc<Zygote>>,
    stream: UnixStream,
    incoming: FrameBuffer,
    outgoing: Vec<u8>,
    /// Whether the frame at the front of `incoming` was already handed out.
    handed_out: bool,
    /// The layers that it was born with.
    birth_layers: Layers,
    evaluations: u64,
    pid: Pid,
    seat: Seat,
    phase: Phase,
    /// The control group that it was born into.
    group: Option<Group>,
    /// How many processes of the group had been killed for want of memory by then.
    memory_kills: u64,
}

impl Process {
    /// Starts a worker and waits until it says that it is locked up.
    ///
    /// # Errors
    /// It can't be started, fails on the way, or speaks out of turn.
    pub(crate) async fn start(
        spawner: &Spawner,
        start: Start<'_>,
    ) -> Result<(Self, Confinement), WorkerError> {
        let spawned = spawner.spawn(start).await.map_err(WorkerError::Spawn)?;
        let guard = spawner.living().enter();
        let phase = match start.role {
            Role::Compile => Phase::Compile,
            Role::Serve | Role::Snapshot => Phase::Load,
        };
        let mut process =
            Self::adopt(spawned, guard, phase, start.group.cloned()).map_err(WorkerError::Spawn)?;
        let deadline = Instant::now() + START_TIME_MAX;
        let report = process.until(deadline, Self::await_confinement).await?;
        Ok((process, report))
    }

    fn adopt(
        spawned: Spawned,
        guard: LifeGuard,
        phase: Phase,
        group: Option<Group>,
    ) -> io::Result<Self> {
        let life = Life::of_child(spawned.pidfd, guard)?;
        tracing::debug!(pid = spawned.pid.as_raw(), "worker started");
        Ok(Self {
            life,
            zygote: None,
            stream: UnixStream::from_std(spawned.channel)?,
            incoming: FrameBuffer::new(REPLY_BYTES_MAX),
            outgoing: Vec::new(),
            handed_out: false,
            birth_layers: spawned.layers,
            evaluations: 0,
            pid: spawned.pid,
            seat: Seat::default(),
            phase,
            memory_kills: group.as_ref().map_or(0, Group::memory_kills),
            group,
        })
    }

    /// A worker that was forked from this zygote, once it says that it is locked up.
    ///
    /// # Errors
    /// It can't be watched, or speaks out of turn.
    pub(crate) async fn forked(
        zygote: &Arc<Zygote>,
        of: &Self,
        forked: Forked,
        guard: LifeGuard,
    ) -> Result<(Self, Confinement), WorkerError> {
        let Forked { child, pid, pidfd, channel } = forked;
        let life = Life::of_grandchild(pidfd, guard, Arc::clone(zygote), child)
            .map_err(WorkerError::Spawn)?;
        tracing::debug!(pid = pid.as_raw(), zygote = of.pid.as_raw(), "worker forked");
        let mut process = Self {
            life,
            zygote: Some(Arc::clone(zygote)),
            stream: channel,
            incoming: FrameBuffer::new(REPLY_BYTES_MAX),
            outgoing: Vec::new(),
            handed_out: false,
            birth_layers: of.birth_layers,
            evaluations: 0,
            pid,
            seat: Seat::default(),
            // It has its code, and does nothing else.
            phase: Phase::Serve,
            group: of.group.clone(),
            memory_kills: of.group.as_ref().map_or(0, Group::memory_kills),
        };
        let deadline = Instant::now() + START_TIME_MAX;
        let report = process
            .until(deadline, async |process| match process.receive().await? {
                Reply::Loaded(report) => Ok(process.loaded(report)),
                other => Err(unexpected(&other, Phase::Serve)),
            })
            .await?;
        Ok((process, report))
    }

    /// What it was forked from.
    pub(crate) fn zygote(&self) -> Option<&Arc<Zygote>> {
        self.zygote.as_ref()
    }

    /// Notes that it starts its guest, and will be forked.
    pub(crate) fn will_be_forked(&mut self) {
        self.phase = Phase::Zygote;
    }

    /// What it is doing.
    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether it is to be forked, and evaluates nothing itself.
    pub(crate) fn forks(&self) -> bool {
        self.phase == Phase::Zygote
    }

    async fn await_confinement(&mut self) -> Result<Confinement, WorkerError> {
        let (layers, phase) = (self.birth_layers, self.phase);
        match self.receive().await? {
            Reply::Confined(report) => {
                Ok(Confinement { layers: report.layers.union(layers), ..report })
            }
            other => Err(unexpected(&other, phase)),
        }
    }

    /// Notes that it has loaded its code and serves from now on, and completes its report by
    /// the layers that it was born with.
    pub(crate) fn loaded(&mut self, report: Confinement) -> Confinement {
        self.phase = Phase::Serve;
        Confinement { layers: report.layers.union(self.birth_layers), ..report }
    }

    /// The process.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Runs an exchange with the worker until the deadline. What it ended with was the
    /// worker's last word: it may send nothing more until it is spoken to again.
    ///
    /// # Errors
    /// Those of the exchange, or [`WorkerError::Deadline`], or there is more.
    pub(crate) async fn until<T>(
        &mut self,
        deadline: Instant,
        exchange: impl AsyncFnOnce(&mut Self) -> Result<T, WorkerError>,
    ) -> Result<T, WorkerError> {
        let result = match tokio::time::timeout_at(deadline, exchange(&mut *self)).await {
            Ok(result) => result,
            Err(_elapsed) => Err(WorkerError::Deadline),
        };
        match result {
            Ok(result) => self.rest().map(|()| result),
            // How it ended says more than that the channel is closed.
            Err(WorkerError::Channel(error)) => Err(self.explain(error).await),
            Err(error) => Err(error),
        }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// The message is too large, or the channel is broken.
    pub(crate) async fn send(&mut self, request: &Request<'_>) -> Result<(), WorkerError> {
        frame::encode(request, FRAME_BYTES_MAX, &mut self.outgoing)
            .map_err(WorkerError::Unsendable)?;
        self.stream.write_all(&self.outgoing).await.map_err(WorkerError::Channel)?;
        Ok(())
    }

    /// Sends one short message, and a descriptor with it.
    ///
    /// # Errors
    /// The channel is broken, or full, which it is not before an answer was waited for.
    pub(crate) async fn send_with(
        &mut self,
        request: &Request<'_>,
        descriptor: BorrowedFd<'_>,
    ) -> Result<(), WorkerError> {
        frame::encode(request, FRAME_BYTES_MAX, &mut self.outgoing)
            .map_err(WorkerError::Unsendable)?;
        let (stream, bytes) = (&self.stream, [IoSlice::new(&self.outgoing)]);
        let sent = stream.async_io(Interest::WRITABLE, || {
            let descriptors = [descriptor.as_raw_fd()];
            let with = [ControlMessage::ScmRights(&descriptors)];
            let flags = MsgFlags::MSG_NOSIGNAL;
            Ok(sendmsg::<()>(stream.as_raw_fd(), &bytes, &with, flags, None)?)
        });
        match sent.await {
            Ok(sent) if sent == self.outgoing.len() => Ok(()),
            Ok(_) => Err(WorkerError::Channel(io::ErrorKind::WriteZero.into())),
            Err(error) => Err(WorkerError::Channel(error)),
        }
    }

    /// Lets go of the last message, and of memory that only a large one needed.
    ///
    /// # Errors
    /// What follows it is no frame.
    fn release(&mut self) -> Result<(), WorkerError> {
        if self.handed_out {
            self.handed_out = false;
            self.incoming.consume().map_err(WorkerError::BadFrame)?;
        }
        frame::shrink(&mut self.outgoing);
        Ok(())
    }

    /// Lets go of the last message, after which there must be no other.
    ///
    /// # Errors
    /// There is one.
    fn rest(&mut self) -> Result<(), WorkerError> {
        self.release()?;
        if self.incoming.is_empty() {
            return Ok(());
        }
        Err(self.out_of_turn("more after its last word"))
    }

    /// What was said out of turn is a violation, unless it tells of a forbidden call: that may
    /// come at any time, and so just after what was said in turn.
    fn out_of_turn(&self, violation: &str) -> WorkerError {
        match self.incoming.body().map(frame::decode) {
            Some(Ok(Reply::Forbidden { syscall })) => {
                WorkerError::Forbidden { phase: self.phase, syscall }
            }
            _ => WorkerError::Violation(violation.to_owned()),
        }
    }

    /// Waits for the next message; the previous one is gone.
    ///
    /// # Errors
    /// A bad frame, or a channel that is broken or closed.
    pub(crate) async fn receive(&mut self) -> Result<Reply<'_>, WorkerError> {
        self.release()?;
        while self.incoming.body().is_none() {
            match self.stream.read(self.incoming.space()).await {
                Ok(0) => return Err(WorkerError::Channel(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => self.incoming.advance(read).map_err(WorkerError::BadFrame)?,
                Err(error) => return Err(WorkerError::Channel(error)),
            }
        }
        self.handed_out = true;
        frame::decode(self.incoming.body().unwrap_or_default()).map_err(WorkerError::BadFrame)
    }

    /// A number for the next evaluation; never the same twice for one worker.
    pub(crate) fn next_evaluation(&mut self) -> EvaluationId {
        self.evaluations = self.evaluations.wrapping_add(1);
        EvaluationId(self.evaluations)
    }

    /// Has the process placed for an evaluation that it is about to be given.
    pub(crate) fn take_seat<'a>(&mut self, placement: &'a Placement) -> InFlight<'a> {
        // Its number can't be another's yet: we have not reaped it.
        placement.enter(self.pid, &mut self.seat)
    }

    /// Ends the process and returns when it is gone.
    pub(crate) async fn end(mut self) {
        self.life.end().await;
    }

    /// Ends when a worker that was asked nothing may be of no more use: when it dies, closes its
    /// channel, or says something. From then on it is to be given nothing before it was looked
    /// at by [`Process::unasked`].
    pub(crate) async fn stirs(&self) {
        tokio::select! {
            biased;
            _death = self.life.death() => {}
            _ready = self.stream.readable() => {}
        }
    }

    /// What a worker that stirs is of no more use for, if so.
    pub(crate) async fn unasked(&mut self) -> Option<WorkerError> {
        match self.stream.try_read(self.incoming.space()) {
            Ok(0) => Some(self.explain(io::ErrorKind::UnexpectedEof.into()).await),
            Ok(read) => {
                // A frame that is too long has no body, and is out of turn all the same.
                drop(self.incoming.advance(read));
                Some(self.out_of_turn("spoke without being asked"))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let death = tokio::time::timeout(Duration::ZERO, self.life.death()).await.ok()?;
                Some(self.post_mortem(death).await)
            }
            Err(error) => Some(self.explain(error).await),
        }
    }

    async fn explain(&mut self, error: io::Error) -> WorkerError {
        match tokio::time::timeout(DEATH_TIME_MAX, self.life.death()).await {
            Ok(death) => self.post_mortem(death).await,
            Err(_elapsed) => WorkerError::Channel(error),
        }
    }

    /// Why a worker that has ended did so.
    pub(crate) async fn post_mortem(&mut self, death: Death) -> WorkerError {
        let phase = self.phase;
        if death == Death::Signalled(Signal::SIGSYS) {
            let said = tokio::time::timeout(DEATH_TIME_MAX, self.forbidden_call()).await;
            if let Ok(Some(syscall)) = said {
                return WorkerError::Forbidden { phase, syscall };
            }
        }
        let killed_for_memory = death == Death::Signalled(Signal::SIGKILL)
            && self.group.as_ref().is_some_and(|group| group.memory_kills() > self.memory_kills);
        let death = if killed_for_memory { Death::OutOfMemory } else { death };
        WorkerError::Died { phase, death }
    }

    /// The call that a dead worker was killed for, if that is among what it said before.
    async fn forbidden_call(&mut self) -> Option<u32> {
        loop {
            if let Reply::Forbidden { syscall } = self.receive().await.ok()? {
                return Some(syscall);
            }
        }
    }
}

/// How long a process may take to end after its channel is closed.
const DEATH_TIME_MAX: Duration = Duration::from_millis(100);

/// The error for a message that is not allowed in this state.
pub(crate) fn unexpected(reply: &Reply<'_>, phase: Phase) -> WorkerError {
    match reply {
        Reply::Forbidden { syscall } => WorkerError::Forbidden { phase, syscall: *syscall },
        Reply::Fault { class, message, .. } => {
            let end = message.floor_char_boundary(MESSAGE_BYTES_MAX);
            let message = message.get(..end).unwrap_or_default().to_owned();
            WorkerError::Fault { class: *class, message }
        }
        other => WorkerError::Violation(format!("unexpected {}", other.name())),
    }
}
