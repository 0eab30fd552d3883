//! An instance, and how it is set back to an earlier state.
//!
//! The state of an instance is its linear memory, the values of its globals, its tables and
//! which of its segments are dropped. Modules that change the latter two are never set back
//! (`conclave_ipc::message::Obstacle`); the compile role exports the globals of all others.
#![forbid(unsafe_code)]

use std::fmt;

use wasmtime::{AsContextMut, Global, Instance, Memory, Result, Store, Val};

use super::arena::Arena;
use super::guest::Guest;
use super::preview1::Wasi;
use crate::compile::GLOBAL_EXPORTS;

/// An instance, with what belongs to it on the host's side.
pub(super) struct Live {
    pub(super) store: Store<Guest>,
    pub(super) instance: Instance,
    kept: Option<Registers>,
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live").field("kept", &self.kept.is_some()).finish_non_exhaustive()
    }
}

impl Live {
    pub(super) fn new(store: Store<Guest>, instance: Instance) -> Self {
        Self { store, instance, kept: None }
    }

    /// Makes its state what it is set back to.
    ///
    /// # Errors
    /// It has no memory, or the kernel refuses.
    pub(super) fn keep(&mut self, arena: &Arena) -> Result<()> {
        let places = Places::of(&self.instance, &mut self.store)?;
        self.kept = Some(Registers::read(&places, &mut self.store));
        Ok(arena.keep()?)
    }

    /// Sets it back to the state that was kept.
    ///
    /// # Errors
    /// None was kept, or the kernel refuses; the instance is of no more use.
    pub(super) fn set_back(&mut self, arena: &Arena) -> Result<()> {
        let Some(kept) = &self.kept else {
            return Err(wasmtime::Error::msg("no state was kept"));
        };
        arena.restore()?;
        kept.write(arena, &mut self.store)?;
        self.store.data_mut().wasi = Wasi::logged();
        Ok(())
    }
}

/// Where the state of an instance lies that is not in its linear memory.
#[derive(Debug)]
pub(super) struct Places {
    memory: Memory,
    globals: Vec<Global>,
}

impl Places {
    /// Those of this instance.
    ///
    /// # Errors
    /// It exports no memory.
    pub(super) fn of(instance: &Instance, mut store: impl AsContextMut) -> Result<Self> {
        let memory = instance
            .get_memory(&mut store, "memory")
            .ok_or_else(|| wasmtime::Error::msg("the module exports no memory"))?;
        let globals = (0..)
            .map_while(|index: usize| {
                instance.get_global(&mut store, &format!("{GLOBAL_EXPORTS}{index}"))
            })
            .collect();
        Ok(Self { memory, globals })
    }
}

/// The state of an instance that is not in its linear memory.
#[derive(Debug)]
pub(super) struct Registers {
    memory: Memory,
    globals: Vec<(Global, Val)>,
}

impl Registers {
    /// What they are now.
    pub(super) fn read(places: &Places, mut store: impl AsContextMut) -> Self {
        let globals = places.globals.iter().map(|global| (*global, global.get(&mut store)));
        Self { memory: places.memory, globals: globals.collect() }
    }

    /// Makes them what they were, after linear memory was restored.
    ///
    /// # Errors
    /// The engine refuses a value that it gave, which it does not.
    pub(super) fn write(&self, arena: &Arena, mut store: impl AsContextMut) -> Result<()> {
        for (global, value) in &self.globals {
            global.set(&mut store, *value)?;
        }
        if arena.has_grown() {
            arena.forget_growth();
            self.memory.grow(&mut store, 1)?;
        }
        Ok(())
    }
}
