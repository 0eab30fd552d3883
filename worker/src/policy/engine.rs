//! The wasm engine, every option that matters spelled out; the same for both roles, since
//! code fits only the configuration that it was compiled for.
#![expect(unsafe_code, reason = "maps native code that another process compiled")]

use std::sync::Arc;

use conclave_ipc::limits::GUEST_STACK_BYTES;
use wasmtime::{Config, Engine, Module, Result, Strategy};

use super::arena::{self, Arena, Lender};
use crate::confine::Confined;

/// An engine for one module, and its one linear memory, if it runs what it has compiled.
///
/// # Errors
/// The processor is not supported.
pub(crate) fn new(arena: Option<&'static Arena>) -> Result<Engine> {
    let mut config = Config::new();
    config
        .strategy(Strategy::Cranelift)
        // The deadline is the supervisor's, by killing: the code carries no checks for it.
        .epoch_interruption(false)
        .consume_fuel(false)
        .max_wasm_stack(GUEST_STACK_BYTES)
        // Instances are set back and not made anew, so none is mapped from the code image.
        .memory_init_cow(false)
        .memory_reservation(arena::RESERVED_BYTES)
        .memory_guard_size(arena::GUARD_BYTES)
        // A trap's message says enough, and the walk would find what an earlier run has left
        // on a stack that is used again.
        .wasm_backtrace_max_frames(None);
    if let Some(arena) = arena {
        config.with_host_memory(Arc::new(Lender(arena)));
    }
    features(&mut config);
    Engine::new(&config)
}

/// What current toolchains emit (Go 1.26 needs function references), and nothing else.
fn features(config: &mut Config) {
    config
        .wasm_bulk_memory(true)
        .wasm_multi_value(true)
        .wasm_reference_types(true)
        .wasm_function_references(true)
        // Host references are part of reference types; collected objects are not wanted.
        .wasm_gc(false)
        .wasm_simd(true)
        .wasm_relaxed_simd(false)
        .wasm_tail_call(true)
        .wasm_extended_const(true)
        .wasm_exceptions(false)
        .wasm_multi_memory(false)
        .wasm_memory64(false);
}

/// Maps the native code on the image descriptor. Runs none of it.
///
/// # Errors
/// The code is damaged, or was compiled by another build or for another processor.
pub(crate) fn map_code(confined: &Confined, engine: &Engine) -> Result<Module> {
    let image = confined.image();
    // SAFETY: the file is sealed against writing, so it does not change below us. What it
    // holds is native code that the policy's author influenced; the type `Confined` says
    // that this process can do nothing with it that the author may not do.
    unsafe { Module::deserialize_open_file(engine, image) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_accepts_its_configuration() {
        new(None).unwrap();
    }
}
