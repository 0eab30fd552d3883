//! What the host keeps for one instance, and the bounds on what it may take.
#![forbid(unsafe_code)]

use std::fmt;
use std::sync::Arc;

use conclave_ipc::limits::{TABLE_ELEMENTS_MAX, TABLES_MAX};
use conclave_ipc::message::FaultClass;
use wapc::ModuleState;
use wasmtime::{Error, ResourceLimiter, Result};

use super::preview1::Wasi;
use super::rego;
use super::wasi::Desk;
use crate::session::Session;

/// The host's side of one instance.
pub(super) struct Guest {
    pub(super) session: Session,
    pub(super) wasi: Wasi,
    /// The waPC conversation, once the host has started it.
    pub(super) wapc: Option<Arc<ModuleState>>,
    /// What builtins of Rego are called with, once it is known.
    pub(super) rego: Option<Box<rego::Host>>,
    /// Where it is stopped at its first read, for a command that is started once.
    pub(super) desk: Option<&'static Desk>,
    memory_bytes_max: usize,
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").finish_non_exhaustive()
    }
}

impl Guest {
    pub(super) fn new(session: Session, memory_bytes_max: usize) -> Self {
        Self { session, wasi: Wasi::logged(), wapc: None, rego: None, desk: None, memory_bytes_max }
    }
}

impl ResourceLimiter for Guest {
    /// Ends a guest at its limit instead of failing the growth: most allocators would
    /// trap anyway, and this way the reason is known.
    fn memory_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> Result<bool> {
        if desired <= self.memory_bytes_max {
            return Ok(true);
        }
        let limit = self.memory_bytes_max;
        let message =
            format!("memory limit of {limit} bytes exceeded: the guest asked for {desired}");
        Err(Error::new(self.session.breach(FaultClass::Memory, message)))
    }

    fn table_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> Result<bool> {
        if desired <= TABLE_ELEMENTS_MAX {
            return Ok(true);
        }
        let message = format!(
            "table limit of {TABLE_ELEMENTS_MAX} elements exceeded: the guest asked for {desired}"
        );
        Err(Error::new(self.session.breach(FaultClass::Memory, message)))
    }

    fn tables(&self) -> usize {
        TABLES_MAX
    }

    fn instances(&self) -> usize {
        1
    }

    fn memories(&self) -> usize {
        1
    }
}
