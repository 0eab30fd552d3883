//! The compile role: one module in, native code and a few facts out.
//!
//! A module whose instances can be set back to an earlier state is compiled with a few
//! additions that help with it; any other as it stands.
#![forbid(unsafe_code)]

pub(crate) mod instrument;
mod survey;

use std::borrow::Cow;
use std::io::{self, Read, Write};

use conclave_ipc::channel::ChannelError;
use conclave_ipc::exit::WorkerExit;
use conclave_ipc::limits::MODULE_BYTES_MAX;
use conclave_ipc::message::{FaultClass, Reply, Request};
use wasmparser::BinaryReaderError;
use wasmtime::{Engine, Module};

use crate::confine::Confined;
use crate::policy::describe;
use crate::{Channel, exit_for};

pub(crate) use instrument::GLOBAL_EXPORTS;
use instrument::instrument;
use survey::{Survey, survey};

/// Why there is no native code.
#[derive(Debug)]
struct BadModule(String);

impl From<BinaryReaderError> for BadModule {
    fn from(error: BinaryReaderError) -> Self {
        Self(error.to_string())
    }
}

impl From<wasmtime::Error> for BadModule {
    fn from(error: wasmtime::Error) -> Self {
        Self(format!("{error:#}"))
    }
}

pub(crate) fn run(confined: &Confined, engine: &Engine, channel: &mut Channel) -> WorkerExit {
    match channel.receive() {
        Ok(Request::Compile) => {}
        Ok(
            Request::Load(_)
            | Request::Start { .. }
            | Request::Evaluate { .. }
            | Request::HostAnswer(_),
        ) => {
            return WorkerExit::ProtocolViolation;
        }
        Err(error) => return exit_for(&error),
    }
    let sent = match read_module(confined) {
        Ok(module) => match compile(confined, engine, &module) {
            Ok((code_bytes, Survey { metadata, facts, .. })) => {
                channel.send(&Reply::Compiled { code_bytes, metadata, facts })
            }
            Err(bad) => refuse(channel, &bad),
        },
        Err(bad) => refuse(channel, &bad),
    };
    sent.map_or_else(|error| exit_for(&error), |()| WorkerExit::Done)
}

fn refuse(channel: &mut Channel, bad: &BadModule) -> Result<(), ChannelError> {
    channel.send(&Reply::Fault {
        id: None,
        class: FaultClass::BadModule,
        message: describe(&bad.0),
    })
}

fn read_module(confined: &Confined) -> Result<Vec<u8>, BadModule> {
    let module = read_within_limit(confined)
        .map_err(|error| BadModule(format!("can't read the module: {error}")))?;
    if !module.starts_with(b"\0asm") {
        return Err(BadModule(
            "not a WebAssembly module: it does not start with \\0asm".to_owned(),
        ));
    }
    Ok(module)
}

fn read_within_limit(confined: &Confined) -> io::Result<Vec<u8>> {
    let limit = MODULE_BYTES_MAX as u64;
    let mut module = Vec::new();
    confined.image().take(limit.saturating_add(1)).read_to_end(&mut module)?;
    if module.len() > MODULE_BYTES_MAX {
        return Err(io::Error::other(format!("larger than {MODULE_BYTES_MAX} bytes")));
    }
    Ok(module)
}

/// The length of the code that was written, and what there is to say about the module.
fn compile<'a>(
    confined: &Confined,
    engine: &Engine,
    module: &'a [u8],
) -> Result<(u64, Survey<'a>), BadModule> {
    let (prepared, survey) = prepare(engine, module)?;
    let code = engine.precompile_module(&prepared)?;
    let mut output = confined
        .output()
        .map_err(|error| BadModule(format!("no output to compile to: {error}")))?;
    output.write_all(&code).map_err(|error| BadModule(format!("can't write the code: {error}")))?;
    Ok((code.len() as u64, survey))
}

/// The module as it is to be compiled.
fn prepare<'a>(
    engine: &Engine,
    module: &'a [u8],
) -> Result<(Cow<'a, [u8]>, Survey<'a>), BadModule> {
    // What is found below holds for valid modules, where the engine reads the very same.
    if let Err(invalid) = Module::validate(engine, module) {
        // Compiling words it better.
        return Err(engine.precompile_module(module).err().unwrap_or(invalid).into());
    }
    let survey = survey(module)?;
    let prepared = match &survey.additions {
        Some(additions) => Cow::Owned(instrument(module, additions)?),
        None => Cow::Borrowed(module),
    };
    Ok((prepared, survey))
}
