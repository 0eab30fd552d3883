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

use instrument::instrument;
pub(crate) use instrument::{GLOBAL_EXPORTS, MOVED_START};
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
        Ok(_) => return WorkerExit::ProtocolViolation,
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

#[cfg(test)]
mod tests {
    use arbitrary::Unstructured;
    use conclave_ipc::message::Obstacle;
    use wasm_smith::Config;

    use super::*;

    pub(super) const MEMORY: &str = r#"(memory (export "memory") 1)"#;

    pub(super) const PROC_EXIT: &str =
        r#"(import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))"#;

    pub(super) fn assembled(text: &str) -> Vec<u8> {
        wat::parse_str(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn what_is_not_valid_is_refused_in_the_engines_words() {
        let engine = crate::engine().unwrap();
        let good = assembled(&format!("(module {MEMORY} (global (mut i32) (i32.const 0)))"));
        for module in [
            &good[..good.len() - 1],
            b"\0asm\x02\0\0\0",
            b"\0asm\x0d\0\x01\0",
            &assembled(r#"(module (func (result i32)))"#),
        ] {
            let refused = prepare(&engine, module).unwrap_err().0;
            let words = engine.precompile_module(module).unwrap_err();
            assert_eq!(refused, format!("{words:#}"));
        }
        prepare(&engine, &good).unwrap();
    }

    /// A stream of random bytes: SplitMix64.
    fn random(seed: u64, length: usize) -> Vec<u8> {
        let mut state = seed;
        let words = std::iter::repeat_with(|| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        });
        words.flat_map(u64::to_le_bytes).take(length).collect()
    }

    fn generated(seed: u64) -> Vec<u8> {
        let command = seed.is_multiple_of(2);
        let entry = if command {
            r#"(func (export "_start"))"#
        } else {
            r#"(func (export "__guest_call") (param i32 i32) (result i32) unreachable)"#
        };
        let tables_change = seed.is_multiple_of(8);
        let config = Config {
            module_shape: Some(assembled(&format!("(module {PROC_EXIT} {MEMORY} {entry})"))),
            max_funcs: 30,
            max_instructions: 100,
            bulk_memory_enabled: tables_change,
            reference_types_enabled: tables_change,
            exceptions_enabled: false,
            gc_enabled: false,
            memory64_enabled: false,
            relaxed_simd_enabled: false,
            threads_enabled: false,
            generate_custom_sections: true,
            ..Config::default()
        };
        let bytes = random(seed, 512 << (seed % 6));
        wasm_smith::Module::new(config, &mut Unstructured::new(&bytes)).unwrap().to_bytes()
    }

    #[test]
    fn whatever_is_valid_stays_valid() {
        let engine = crate::engine().unwrap();
        let (mut valid, mut changed, mut globals) = (0, 0, 0);
        for seed in 0..400 {
            let module = generated(seed);
            if Module::validate(&engine, &module).is_err() {
                continue;
            }
            valid += 1;
            let (prepared, survey) = prepare(&engine, &module).unwrap();
            match survey.additions {
                Some(additions) => {
                    changed += 1;
                    globals += additions.globals.len();
                    Module::validate(&engine, &prepared)
                        .unwrap_or_else(|error| panic!("seed {seed}: {error:#}"));
                }
                None => assert_eq!(*prepared, *module),
            }
        }
        assert!(valid >= 300 && changed >= 100 && globals >= 100, "{valid} {changed} {globals}");
    }

    /// The engine sees a module first; this would not harm if it were otherwise.
    #[test]
    fn damaged_modules_are_read_without_harm() {
        for seed in 0..400 {
            let mut module = generated(seed);
            for pair in random(!seed, 16).chunks_exact(4) {
                let at = u16::from_le_bytes([pair[0], pair[1]]);
                let length = module.len();
                module[usize::from(at) % length] = pair[2];
            }
            if let Ok(survey) = survey(&module)
                && let Some(additions) = survey.additions
            {
                drop(instrument(&module, &additions));
            }
        }
    }

    #[test]
    fn an_obstacle_leaves_a_module_as_it_is() {
        let module = assembled(r#"(module (global (mut i32) (i32.const 0)))"#);
        let engine = crate::engine().unwrap();
        let (prepared, survey) = prepare(&engine, &module).unwrap();
        assert_eq!(survey.facts.obstacle, Some(Obstacle::Memory));
        assert_eq!(*prepared, *module);
    }
}
