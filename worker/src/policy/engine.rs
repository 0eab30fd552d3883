//! The wasm engine, every option that matters spelled out; the same for both roles, since
//! code fits only the configuration that it was compiled for.
#![expect(unsafe_code, reason = "maps native code that another process compiled")]

use conclave_ipc::limits::{GUEST_MEMORY_BYTES_CEILING, GUEST_STACK_BYTES, TABLE_ELEMENTS_MAX};
use wasmtime::{
    Config, Enabled, Engine, InstanceAllocationStrategy, Module, PoolingAllocationConfig, Result,
    Strategy,
};

use crate::confine::Confined;

/// Linear memory that a used instance keeps mapped and gets back zeroed or restored; the
/// rest of what it touched is returned to the kernel.
const KEEP_RESIDENT_BYTES: usize = 8 << 20;

/// Tables of one module. Toolchains emit one.
const TABLES_MAX: u32 = 16;

/// Engine data of one instance; grows with a module's tables of functions.
const INSTANCE_BYTES_MAX: usize = 16 << 20;

/// An engine for one module and one instance at a time.
///
/// # Errors
/// The kernel refuses the address space of the pool, or the processor is not supported.
pub fn new() -> Result<Engine> {
    let mut config = Config::new();
    config
        .strategy(Strategy::Cranelift)
        // The deadline is the supervisor's, by killing: the code carries no checks for it.
        .epoch_interruption(false)
        .consume_fuel(false)
        .max_wasm_stack(GUEST_STACK_BYTES)
        // Initial memory is mapped copy-on-write from the code image.
        .memory_init_cow(true)
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool()));
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

/// A pool for exactly one instance. Fresh means fresh: a slot is restored to the module's
/// initial image before it is used again.
fn pool() -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_core_instances(1)
        .max_core_instance_size(INSTANCE_BYTES_MAX)
        .total_memories(1)
        .max_memories_per_module(1)
        .max_memory_size(usize::try_from(GUEST_MEMORY_BYTES_CEILING).unwrap_or(usize::MAX))
        .total_tables(TABLES_MAX)
        .max_tables_per_module(TABLES_MAX)
        .table_elements(TABLE_ELEMENTS_MAX)
        .linear_memory_keep_resident(KEEP_RESIDENT_BYTES)
        .table_keep_resident(KEEP_RESIDENT_BYTES)
        // Restores only the pages that were written to, where the kernel can tell (6.7).
        .pagemap_scan(Enabled::Auto);
    pool
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
        new().unwrap();
    }
}
