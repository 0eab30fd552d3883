//! The compile role: one module in, native code and a few facts out.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};

use conclave_ipc::exit::WorkerExit;
use conclave_ipc::limits::{METADATA_BYTES_MAX, MODULE_BYTES_MAX};
use conclave_ipc::message::{FaultClass, ModuleFacts, ModuleShape, Reply, Request};
use wasmparser::{Encoding, Parser, Payload};
use wasmtime::Engine;

use crate::confine::Confined;
use crate::policy::describe;
use crate::{Channel, exit_for};

/// The custom section that holds a policy's metadata; the first one counts.
const METADATA_SECTION: &str = "io.kubewarden.metadata";

/// The name under which the `index`th mutable global is exported.
pub(crate) fn exported_global(index: usize) -> String {
    format!("conclave:global/{index}")
}

/// Why there is no native code.
struct BadModule(String);

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
    let sent = match compile(confined, engine) {
        Ok((module, code_bytes)) => match facts(&module) {
            Ok((metadata, facts)) => channel.send(&Reply::Compiled { code_bytes, metadata, facts }),
            Err(bad) => refuse(channel, &bad),
        },
        Err(bad) => refuse(channel, &bad),
    };
    sent.map_or_else(|error| exit_for(&error), |()| WorkerExit::Done)
}

fn refuse(
    channel: &mut Channel,
    bad: &BadModule,
) -> Result<(), conclave_ipc::channel::ChannelError> {
    channel.send(&Reply::Fault {
        id: None,
        class: FaultClass::BadModule,
        message: describe(&bad.0),
    })
}

/// The module, and the length of the code that was written for it.
fn compile(confined: &Confined, engine: &Engine) -> Result<(Vec<u8>, u64), BadModule> {
    let module = read_module(confined)
        .map_err(|error| BadModule(format!("can't read the module: {error}")))?;
    if !module.starts_with(b"\0asm") {
        return Err(BadModule(
            "not a WebAssembly module: it does not start with \\0asm".to_owned(),
        ));
    }
    let code =
        engine.precompile_module(&module).map_err(|error| BadModule(format!("{error:#}")))?;
    let mut output = confined
        .output()
        .map_err(|error| BadModule(format!("no output to compile to: {error}")))?;
    output.write_all(&code).map_err(|error| BadModule(format!("can't write the code: {error}")))?;
    Ok((module, code.len() as u64))
}

fn read_module(confined: &Confined) -> io::Result<Vec<u8>> {
    let limit = MODULE_BYTES_MAX as u64;
    let mut module = Vec::new();
    confined.image().take(limit.saturating_add(1)).read_to_end(&mut module)?;
    if module.len() > MODULE_BYTES_MAX {
        return Err(io::Error::other(format!("larger than {MODULE_BYTES_MAX} bytes")));
    }
    Ok(module)
}

/// What the supervisor needs to know of a module without parsing it itself.
fn facts(module: &[u8]) -> Result<(Option<&[u8]>, ModuleFacts), BadModule> {
    let mut metadata = None;
    let (mut wapc, mut start, mut rego, mut runs_at_instantiation) = (false, false, false, false);
    for payload in Parser::new(0).parse_all(module) {
        match payload.map_err(|error| BadModule(error.to_string()))? {
            Payload::Version { encoding: Encoding::Component, .. } => {
                return Err(BadModule(
                    "a WebAssembly component; policies are core modules".to_owned(),
                ));
            }
            Payload::CustomSection(section)
                if section.name() == METADATA_SECTION && metadata.is_none() =>
            {
                // The first section counts.
                metadata = Some(section.data());
            }
            Payload::StartSection { .. } => runs_at_instantiation = true,
            Payload::ExportSection(exports) => {
                for export in exports {
                    let name = export.map_err(|error| BadModule(error.to_string()))?.name;
                    wapc |= name == "__guest_call";
                    start |= name == "_start";
                    rego |= name.starts_with("opa_");
                }
            }
            _ => {}
        }
    }
    if metadata.is_some_and(|bytes| bytes.len() > METADATA_BYTES_MAX) {
        return Err(BadModule(format!("metadata section larger than {METADATA_BYTES_MAX} bytes")));
    }
    let shape = match (wapc, rego, start) {
        (true, _, _) => ModuleShape::Wapc,
        (false, true, _) => ModuleShape::Rego,
        (false, false, true) => ModuleShape::Wasi,
        (false, false, false) => ModuleShape::Unknown,
    };
    Ok((metadata, ModuleFacts { shape, runs_at_instantiation, obstacle: None }))
}
