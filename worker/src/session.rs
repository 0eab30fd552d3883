//! The talk with the supervisor while a guest runs: its log lines and its host calls,
//! each counted against a bound. Shared by everything that a guest can reach.
#![forbid(unsafe_code)]

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use conclave_ipc::channel::ChannelError;
use conclave_ipc::limits::{
    HOST_CALL_BYTES_MAX, HOST_CALLS_MAX, LOG_BYTES_MAX, LOG_LINE_BYTES_MAX, log_cost,
};
use conclave_ipc::message::{EvaluationId, FaultClass, LogStream, Operation, Reply, Request};

use crate::Channel;
use crate::policy::Fault;

/// Stands in the log for everything that found no room.
const LOG_IS_FULL: &[u8] = b"(further output of this evaluation is dropped)";

/// The one host call that is answered here: binding, namespace, operation.
const TRACING_LOG: (&str, &str, &str) = ("kubewarden", "tracing", "log");

/// Why a guest can't go on, decided on the host's side of an import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Breach {
    /// What kind of bound it was.
    pub(crate) class: FaultClass,
    /// Names the bound and its value.
    pub(crate) message: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Breach {}

/// A handle to the one channel; cheap to clone.
#[derive(Clone)]
pub(crate) struct Session(Arc<Mutex<State>>);

/// What the guest runs for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// For nobody yet: what it does now is done once for all requests, so nothing that somebody
    /// would learn of may be among it.
    Starting,
    /// For nobody: nobody learns of what it does.
    Practising,
    /// For a request.
    Evaluating(EvaluationId),
}

struct State {
    channel: Channel,
    stage: Stage,
    host_calls: u32,
    /// What is left of the evaluation's part of the log; `None` once it was used up.
    log_bytes_left: Option<usize>,
    breach: Option<Breach>,
    channel_error: Option<ChannelError>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

impl Session {
    pub(crate) fn new(channel: Channel) -> Self {
        Self(Arc::new(Mutex::new(State {
            channel,
            stage: Stage::Starting,
            host_calls: 0,
            log_bytes_left: Some(LOG_BYTES_MAX),
            breach: None,
            channel_error: None,
        })))
    }

    // A panic ends the process, so no thread can have left the lock poisoned.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message that belongs to no guest.
    pub(crate) fn send(&self, reply: &Reply<'_>) -> Result<(), ChannelError> {
        self.state().channel.send(reply)
    }

    /// Waits for the next message and lets `take` copy what it needs of it. `None` if it is none
    /// that the supervisor may send now.
    pub(crate) fn receive<T>(
        &self,
        take: impl FnOnce(Request<'_>) -> Option<T>,
    ) -> Result<Option<T>, ChannelError> {
        Ok(take(self.state().channel.receive()?))
    }

    /// Whether descriptors that come with a message are taken from now on.
    pub(crate) fn take_descriptors(&self, take: bool) {
        self.state().channel.stream_mut().take_descriptors(take);
    }

    /// The descriptor that came with the last message.
    pub(crate) fn descriptor(&self) -> Option<OwnedFd> {
        self.state().channel.stream_mut().descriptor()
    }

    /// Waits for the next evaluation and lets `take` copy what it needs of it.
    /// `None` if the supervisor sent something else.
    pub(crate) fn next<T>(
        &self,
        take: impl FnOnce(Operation<'_>) -> T,
    ) -> Result<Option<(EvaluationId, T)>, ChannelError> {
        let next = self.receive(|request| match request {
            Request::Evaluate { id, operation } => Some((id, take(operation))),
            _ => None,
        })?;
        if let Some((id, _)) = &next {
            self.enter(Stage::Evaluating(*id));
        }
        Ok(next)
    }

    /// Says what the guest runs for from now on; all bounds begin anew.
    pub(crate) fn enter(&self, stage: Stage) {
        self.state().enter(stage);
    }

    /// The breach of a guest that does this before it is asked anything, and would have to do it
    /// for every request.
    pub(crate) fn premature(&self, deed: &str) -> Breach {
        let message = format!("{deed} before it is asked anything");
        self.breach(FaultClass::Snapshot, message)
    }

    /// Goes on if the guest has done nothing that it would have to do for every request.
    pub(crate) fn unless_premature(&self) -> Result<(), Fault> {
        match self.take_breach() {
            Some(Breach { class, message }) => Err(Fault { class, message }),
            None => Ok(()),
        }
    }

    /// Whether the guest has asked for anything at this stage.
    pub(crate) fn has_called_host(&self) -> bool {
        self.state().host_calls > 0
    }

    /// Lets go of the last message.
    pub(crate) fn release(&self) -> Result<(), ChannelError> {
        self.state().channel.release()
    }

    /// The bound that the current evaluation ran into, if any.
    pub(crate) fn take_breach(&self) -> Option<Breach> {
        self.state().breach.take()
    }

    /// The channel's failure in the middle of an evaluation, if any.
    pub(crate) fn take_channel_error(&self) -> Option<ChannelError> {
        self.state().channel_error.take()
    }

    /// Whether the guest may go on after a host call.
    ///
    /// # Errors
    /// It ran into a bound, or the channel is gone.
    pub(crate) fn check(&self) -> wasmtime::Result<()> {
        let state = self.state();
        match (&state.breach, &state.channel_error) {
            (Some(breach), _) => Err(wasmtime::Error::new(breach.clone())),
            (None, Some(error)) => Err(wasmtime::Error::msg(error.to_string())),
            (None, None) => Ok(()),
        }
    }

    /// Remembers a bound that the guest ran into; the first one counts.
    pub(crate) fn breach(&self, class: FaultClass, message: String) -> Breach {
        let breach = Breach { class, message };
        self.state().breach.get_or_insert(breach).clone()
    }

    /// Sends guest output to the log, line by line, until the bound is reached.
    pub(crate) fn log(&self, stream: LogStream, text: &[u8]) {
        let mut state = self.state();
        if state.stage == Stage::Starting {
            drop(state);
            self.premature("it writes output");
            return;
        }
        let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        for piece in lines.flat_map(|line| line.chunks(LOG_LINE_BYTES_MAX)) {
            if !state.send_output(piece.len(), |id| Reply::Log { id, stream, text: piece }) {
                return;
            }
        }
    }

    /// Asks the host something and waits for its answer. The outer error ends the guest.
    pub(crate) fn host_call(
        &self,
        binding: &str,
        namespace: &str,
        operation: &str,
        payload: &[u8],
    ) -> Result<Result<Vec<u8>, String>, Breach> {
        let mut state = self.state();
        if state.stage == Stage::Starting {
            drop(state);
            return Err(self.premature("it makes a host call"));
        }
        if (binding, namespace, operation) == TRACING_LOG {
            return Ok(state.trace(payload));
        }
        state.host_calls = state.host_calls.saturating_add(1);
        if state.host_calls > HOST_CALLS_MAX {
            drop(state);
            let message = format!("more than {HOST_CALLS_MAX} host calls in one evaluation");
            return Err(self.breach(FaultClass::HostCalls, message));
        }
        let names = binding.len().saturating_add(namespace.len()).saturating_add(operation.len());
        let (what, size, limit) = if names > LOG_LINE_BYTES_MAX {
            ("names", names, LOG_LINE_BYTES_MAX)
        } else {
            ("a payload", payload.len(), HOST_CALL_BYTES_MAX)
        };
        if size > limit {
            drop(state);
            let message = format!("host call with {what} of more than {limit} bytes");
            return Err(self.breach(FaultClass::HostCalls, message));
        }
        state.exchange(binding, namespace, operation, payload).map_err(|error| {
            let message = error.to_string();
            state.channel_error = Some(error);
            Breach { class: FaultClass::HostCalls, message }
        })
    }
}

impl State {
    fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.host_calls = 0;
        self.log_bytes_left = Some(LOG_BYTES_MAX);
        self.breach = None;
    }

    /// Passes a log record on, as far as the bound on output goes. The guest does not
    /// learn what became of it.
    fn trace(&mut self, record: &[u8]) -> Result<Vec<u8>, String> {
        self.send_output(record.len(), |id| Reply::Trace { id, record });
        Ok(Vec::new())
    }

    /// Sends a line or record of this length if there is still room for it in the log, and
    /// whether there was. The first that finds none is replaced by a remark.
    fn send_output<'a>(
        &mut self,
        length: usize,
        message: impl FnOnce(EvaluationId) -> Reply<'a>,
    ) -> bool {
        let Stage::Evaluating(id) = self.stage else { return false };
        let Some(left) = self.log_bytes_left else { return false };
        self.log_bytes_left = left.checked_sub(log_cost(length));
        let message = match self.log_bytes_left {
            Some(_) => message(id),
            None => Reply::Log { id, stream: LogStream::Console, text: LOG_IS_FULL },
        };
        if let Err(error) = self.channel.send(&message) {
            self.channel_error = Some(error);
            self.log_bytes_left = None;
        }
        self.log_bytes_left.is_some()
    }

    fn exchange(
        &mut self,
        binding: &str,
        namespace: &str,
        operation: &str,
        payload: &[u8],
    ) -> Result<Result<Vec<u8>, String>, ChannelError> {
        let Stage::Evaluating(id) = self.stage else {
            return Ok(Err("nothing is available for practice".to_owned()));
        };
        self.channel.send(&Reply::HostCall { id, binding, namespace, operation, payload })?;
        match self.channel.receive()? {
            Request::HostAnswer(answer) => Ok(answer.map(<[u8]>::to_vec).map_err(str::to_owned)),
            // The supervisor never does this; a closed channel is the way out.
            _ => Err(ChannelError::Closed),
        }
    }
}
