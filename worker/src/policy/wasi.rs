//! WASI policies: a command that reads the question on stdin and answers on stdout.
#![forbid(unsafe_code)]

use wasmtime::{Caller, Linker, Result};

use super::guest::Guest;
use super::memory;
use super::preview1::{self, ProcExit, Wasi};
use super::{Fault, Fresh, Job, Outcome, Question, Used};
use crate::session::Session;

/// The export that makes a module a WASI command.
pub(super) const ENTRY: &str = "_start";

/// The two names of the host-call import; the second is what Javy-built modules use.
const HOST_MODULES: [&str; 2] = ["host", "kubewarden:javy/host"];

/// Runs a fresh instance from start to end.
pub(super) fn evaluate(mut fresh: Fresh, session: &Session, job: &Job) -> (Outcome, Used) {
    let Fresh { store, instance } = &mut fresh;
    let arguments: &[&str] = match job.question {
        Question::Validate => &["policy.wasm", "validate"],
        Question::ValidateSettings => &["policy.wasm", "validate-settings"],
    };
    store.data_mut().wasi = Wasi::command(arguments, &job.payload);
    let ended = instance
        .get_typed_func::<(), ()>(&mut *store, ENTRY)
        .and_then(|start| start.call(&mut *store, ()));
    let (stdout, stderr) = store.data_mut().wasi.take_captured();
    let outcome = match ended {
        Ok(()) => Outcome::Verdict { response: stdout, diagnostics: stderr },
        Err(error) if ProcExit::is_success(&error) => {
            Outcome::Verdict { response: stdout, diagnostics: stderr }
        }
        Err(error) if error.is::<ProcExit>() => Outcome::Failure(trimmed(&stderr)),
        Err(error) => {
            let fault = Fault::of_guest(&error, session);
            // The guest's last words say more than the trap that followed them.
            let words = trimmed(&stderr);
            Outcome::Fault(if words.is_empty() || fault.class.is_limit() {
                fault
            } else {
                Fault { message: words, ..fault }
            })
        }
    };
    (outcome, Used::Wasi(fresh.store))
}

fn trimmed(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

/// Adds the WASI functions and the host call.
///
/// # Errors
/// A name is defined twice, which would be a mistake here.
pub(super) fn link(linker: &mut Linker<Guest>) -> Result<()> {
    preview1::link(linker)?;
    for module in HOST_MODULES {
        linker.func_wrap(module, "call", host_call)?;
    }
    Ok(())
}

/// Answers 0 for success and 1 for an error (the opposite of waPC), and appends the
/// response or the error's text to the guest's own stdin.
#[expect(clippy::too_many_arguments, reason = "the signature is Kubewarden's")]
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
    let answer =
        guest.session.host_call(call.binding, call.namespace, call.operation, call.payload)?;
    match answer {
        Ok(response) => {
            guest.wasi.append_stdin(&response);
            Ok(0)
        }
        Err(error) => {
            guest.wasi.append_stdin(error.as_bytes());
            Ok(1)
        }
    }
}
