//! waPC: the imports of module `wapc`, and an engine provider for the `wapc` crate's host.
//! Every pointer and length is checked; out of range ends the guest.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{error, fmt};

use conclave_ipc::limits::{MESSAGE_BYTES_MAX, RESPONSE_BYTES_MAX};
use conclave_ipc::message::{FaultClass, LogStream};
use wapc::wapc_functions::{
    GUEST_CALL, GUEST_ERROR_FN, GUEST_REQUEST_FN, GUEST_RESPONSE_FN, HOST_CALL, HOST_CONSOLE_LOG,
    HOST_ERROR_FN, HOST_ERROR_LEN_FN, HOST_RESPONSE_FN, HOST_RESPONSE_LEN_FN, REQUIRED_STARTS,
};
use wapc::{HOST_NAMESPACE, ModuleState, WapcHost, WebAssemblyEngineProvider};
use wasmtime::{Caller, Error, Linker, Result};

use super::guest::Guest;
use super::instance::Live;
use super::memory::{self, unsigned};
use super::preview1::{self, ProcExit};
use super::{Fault, Job, Outcome, Question};
use crate::session::Session;

/// The export that makes a module a waPC guest.
pub(super) const ENTRY: &str = GUEST_CALL;

/// An instance that the `wapc` crate's host calls, and that is set back between two calls.
pub(super) type Shared = Arc<Mutex<Live>>;

/// The instance, while the guest does not run.
// A panic ends the process, so nobody can have left the lock poisoned.
pub(super) fn locked(live: &Shared) -> MutexGuard<'_, Live> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
}

type BoxError = Box<dyn error::Error + Send + Sync>;

/// A guest and the `wapc` crate's host that talks to it.
pub(super) struct Conversation {
    host: WapcHost,
    fault: FaultCell,
}

impl fmt::Debug for Conversation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Conversation").finish_non_exhaustive()
    }
}

impl Conversation {
    /// Has an instance initialise itself.
    ///
    /// # Errors
    /// How it failed to.
    pub(super) fn begin(live: &Shared, session: &Session) -> Result<Self, Outcome> {
        let fault = FaultCell::default();
        let provider =
            Provider { live: Arc::clone(live), session: session.clone(), fault: fault.clone() };
        let callback_session = session.clone();
        let callback =
            move |_: u64, binding: &str, namespace: &str, operation: &str, payload: &[u8]| {
                match callback_session.host_call(binding, namespace, operation, payload) {
                    Ok(answer) => answer.map_err(BoxError::from),
                    Err(breach) => Err(breach.into()),
                }
            };
        match WapcHost::new(Box::new(provider), Some(Box::new(callback))) {
            Ok(host) => Ok(Self { host, fault }),
            Err(error) => Err(fault.or_failure(&error)),
        }
    }

    /// Asks the guest.
    pub(super) fn ask(&self, job: &Job) -> Outcome {
        let operation = match job.question {
            Question::Validate => "validate",
            Question::ValidateSettings => "validate_settings",
        };
        match self.host.call(operation, &job.payload) {
            Ok(response) => Outcome::Verdict { response, diagnostics: Vec::new() },
            Err(error) => self.fault.or_failure(&error),
        }
    }
}

/// The typed reason of a failed call; the crate's own errors carry only text.
#[derive(Clone, Default)]
struct FaultCell(Arc<Mutex<Option<Fault>>>);

impl FaultCell {
    fn set(&self, fault: Fault) -> Fault {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault.clone());
        fault
    }

    fn or_failure(&self, error: &wapc::errors::Error) -> Outcome {
        match (self.0.lock().unwrap_or_else(PoisonError::into_inner).take(), error) {
            (Some(fault), _) => Outcome::Fault(fault),
            (None, wapc::errors::Error::GuestCallFailure(message)) => {
                Outcome::Failure(message.clone())
            }
            (None, error) => Outcome::Failure(error.to_string()),
        }
    }
}

/// Runs one instance for the `wapc` crate's host.
struct Provider {
    live: Shared,
    session: Session,
    fault: FaultCell,
}

impl WebAssemblyEngineProvider for Provider {
    /// Calls `_start` and `wapc_init`, both if both exist, in this order.
    fn init(&mut self, host: Arc<ModuleState>) -> Result<(), BoxError> {
        let mut live = locked(&self.live);
        let Live { store, instance, .. } = &mut *live;
        store.data_mut().wapc = Some(host);
        for name in REQUIRED_STARTS {
            let Some(start) = instance.get_func(&mut *store, name) else { continue };
            let called =
                start.typed::<(), ()>(&*store).and_then(|start| start.call(&mut *store, ()));
            match called {
                Err(error) if !ProcExit::is_success_of(&error) => {
                    return Err(self
                        .fault
                        .set(initialisation_fault(&error, name, &self.session))
                        .into());
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    fn call(&mut self, operation_length: i32, payload_length: i32) -> Result<i32, BoxError> {
        let mut live = locked(&self.live);
        let Live { store, instance, .. } = &mut *live;
        instance
            .get_typed_func::<(i32, i32), i32>(&mut *store, ENTRY)
            .and_then(|entry| entry.call(&mut *store, (operation_length, payload_length)))
            .map_err(|error| self.fault.set(Fault::of_guest(&error, &self.session)).into())
    }

    fn replace(&mut self, _module: &[u8]) -> Result<(), BoxError> {
        Err("a worker hosts one module in its life".into())
    }
}

fn initialisation_fault(error: &Error, name: &str, session: &Session) -> Fault {
    let fault = Fault::of_guest(error, session);
    Fault { message: format!("{name} failed: {}", fault.message), ..fault }
}

/// Adds module `wapc`, and the WASI functions that language runtimes want.
///
/// # Errors
/// A name is defined twice, which would be a mistake here.
pub(super) fn link(linker: &mut Linker<Guest>) -> Result<()> {
    preview1::link(linker)?;
    linker
        .func_wrap(HOST_NAMESPACE, GUEST_REQUEST_FN, guest_request)?
        .func_wrap(HOST_NAMESPACE, GUEST_RESPONSE_FN, guest_response)?
        .func_wrap(HOST_NAMESPACE, GUEST_ERROR_FN, guest_error)?
        .func_wrap(HOST_NAMESPACE, HOST_CALL, host_call)?
        .func_wrap(HOST_NAMESPACE, HOST_RESPONSE_LEN_FN, host_response_len)?
        .func_wrap(HOST_NAMESPACE, HOST_RESPONSE_FN, host_response)?
        .func_wrap(HOST_NAMESPACE, HOST_ERROR_LEN_FN, host_error_len)?
        .func_wrap(HOST_NAMESPACE, HOST_ERROR_FN, host_error)?
        .func_wrap(HOST_NAMESPACE, HOST_CONSOLE_LOG, console_log)?;
    Ok(())
}

/// The conversation; there is none while a start section runs.
fn conversation(guest: &Guest) -> Result<Arc<ModuleState>> {
    guest.wapc.clone().ok_or_else(|| Error::msg("waPC call before the conversation began"))
}

fn guest_request(mut caller: Caller<'_, Guest>, operation: i32, payload: i32) -> Result<()> {
    let (data, guest) = memory::split(&mut caller)?;
    if let Some(request) = conversation(guest)?.get_guest_request() {
        memory::write(data, unsigned(operation), request.operation.as_bytes())?;
        memory::write(data, unsigned(payload), &request.msg)?;
    }
    Ok(())
}

fn guest_response(mut caller: Caller<'_, Guest>, pointer: i32, length: i32) -> Result<()> {
    let (data, guest) = memory::split(&mut caller)?;
    let response = memory::slice(data, unsigned(pointer), unsigned(length))?;
    if response.len() > RESPONSE_BYTES_MAX {
        let message = format!("response limit of {RESPONSE_BYTES_MAX} bytes exceeded");
        return Err(Error::new(guest.session.breach(FaultClass::Output, message)));
    }
    conversation(guest)?.set_guest_response(response.to_vec());
    Ok(())
}

fn guest_error(mut caller: Caller<'_, Guest>, pointer: i32, length: i32) -> Result<()> {
    let (data, guest) = memory::split(&mut caller)?;
    let error = memory::slice(data, unsigned(pointer), unsigned(length))?;
    let kept = error.get(..MESSAGE_BYTES_MAX).unwrap_or(error);
    conversation(guest)?.set_guest_error(String::from_utf8_lossy(kept).into_owned());
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "the signature is waPC's")]
fn host_call(
    mut caller: Caller<'_, Guest>,
    a: i32,
    b: i32,
    c: i32,
    d: i32,
    e: i32,
    f: i32,
    g: i32,
    h: i32,
) -> Result<i32> {
    let (data, guest) = memory::split(&mut caller)?;
    let call = memory::host_call(data, [a, b, c, d, e, f, g, h])?;
    let answered = conversation(guest)?.do_host_call(
        call.binding,
        call.namespace,
        call.operation,
        call.payload,
    );
    guest.session.check()?;
    answered.map_err(|error| Error::msg(error.to_string()))
}

#[expect(clippy::needless_pass_by_value, reason = "wasmtime hands the caller over by value")]
fn host_response_len(caller: Caller<'_, Guest>) -> Result<i32> {
    Ok(i32::try_from(conversation(caller.data())?.host_response_len())?)
}

fn host_response(mut caller: Caller<'_, Guest>, pointer: i32) -> Result<()> {
    let (data, guest) = memory::split(&mut caller)?;
    let write = |response: &[u8]| memory::write(data, unsigned(pointer), response);
    conversation(guest)?.with_host_response(write).unwrap_or(Ok(()))
}

#[expect(clippy::needless_pass_by_value, reason = "wasmtime hands the caller over by value")]
fn host_error_len(caller: Caller<'_, Guest>) -> Result<i32> {
    let error = conversation(caller.data())?.get_host_error();
    Ok(i32::try_from(error.map_or(0, |text| text.len()))?)
}

fn host_error(mut caller: Caller<'_, Guest>, pointer: i32) -> Result<()> {
    let (data, guest) = memory::split(&mut caller)?;
    match conversation(guest)?.get_host_error() {
        Some(error) => memory::write(data, unsigned(pointer), error.as_bytes()),
        None => Ok(()),
    }
}

fn console_log(mut caller: Caller<'_, Guest>, pointer: i32, length: i32) -> Result<()> {
    let (data, guest) = memory::split(&mut caller)?;
    let text = memory::slice(data, unsigned(pointer), unsigned(length))?;
    guest.session.log(LogStream::Console, text);
    Ok(())
}
