//! From a module to native code: out of the cache, or out of a locked-up compiler.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use conclave_ipc::limits::{CODE_BYTES_MAX, METADATA_BYTES_MAX, MODULE_BYTES_MAX};
use conclave_ipc::message::{Confinement, Load, ModuleFacts, Reply, Request};
use conclave_ipc::{Phase, Role};
use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use crate::cache::Cache;
use crate::cgroup::Group;
use crate::config::Sha256Digest;
use crate::image::{Draft, Image};
use crate::process::{Process, WorkerError, unexpected};
use crate::sandbox::{Sandbox, Weaker};
use crate::spawn::{Spawner, Start};

/// Native code of one module, and what the compiler saw in it.
#[derive(Debug)]
pub(crate) struct Code {
    pub(crate) image: Image,
    /// The module's metadata section, not looked at yet.
    pub(crate) metadata: Option<Vec<u8>>,
    pub(crate) facts: ModuleFacts,
    /// Whether it was compiled by an earlier process, so that it may not fit this machine.
    pub(crate) from_cache: bool,
}

/// A policy's module as it was read from its file.
#[derive(Debug)]
pub(crate) struct ModuleBytes {
    bytes: Arc<Vec<u8>>,
    /// SHA-256 of the bytes.
    pub(crate) digest: Sha256Digest,
}

impl ModuleBytes {
    /// Reads a module file, up to [`MODULE_BYTES_MAX`].
    ///
    /// # Errors
    /// The file can't be read, or is too large.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let limit = MODULE_BYTES_MAX as u64;
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let too_large =
            || io::Error::other(format!("larger than the limit of {MODULE_BYTES_MAX} bytes"));
        if metadata.len() > limit {
            return Err(too_large());
        }
        let mut bytes = Vec::new();
        file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
        if bytes.len() > MODULE_BYTES_MAX {
            return Err(too_large());
        }
        let digest = Sha256Digest::of(&bytes);
        Ok(Self { bytes: Arc::new(bytes), digest })
    }
}

/// Why there is no native code.
#[derive(Debug, Error)]
pub(crate) enum CompileError {
    /// The compiling worker failed, or found the module bad.
    #[error(transparent)]
    Worker(WorkerError),
    /// The compiling worker took too long.
    #[error("compilation took longer than its limit")]
    Deadline,
    /// The compiling worker is less locked up than it must be.
    #[error(transparent)]
    Weaker(#[from] Weaker),
    /// The code has another length than was announced, or is too long.
    #[error("compiler announced code of another length than {0} bytes")]
    WrongLength(u64),
    /// Memory files can't be made, or not be sealed.
    #[error("memory files for the compiler can't be made or sealed: {0}")]
    Io(io::Error),
}

impl From<WorkerError> for CompileError {
    fn from(error: WorkerError) -> Self {
        match error {
            WorkerError::Deadline => Self::Deadline,
            error => Self::Worker(error),
        }
    }
}

impl From<io::Error> for CompileError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Compiles modules, as many at a time as there are processors.
#[derive(Debug)]
pub(crate) struct Compiler {
    pub(crate) spawner: Spawner,
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) cache: Option<Arc<Cache>>,
    /// The control group of all compilations.
    pub(crate) group: Option<Group>,
    /// How long one compilation may take.
    pub(crate) time_max: Duration,
    /// As many as compilations may go on at a time.
    pub(crate) permits: Semaphore,
    /// The code in use, by module.
    pub(crate) shared: Mutex<HashMap<Sha256Digest, SharedCode>>,
}

/// The code of one module, locked while it is being made.
pub(crate) type SharedCode = Arc<tokio::sync::Mutex<Weak<Code>>>;

impl Compiler {
    /// Native code for the module: what another policy of the same module has, or what is in
    /// the cache, or else newly compiled. Policies of one module that ask at the same time
    /// wait for one compilation.
    ///
    /// # Errors
    /// There is none and the module can't be compiled.
    pub(crate) async fn code(&self, module: &ModuleBytes) -> Result<Arc<Code>, CompileError> {
        let place = self.place(&module.digest);
        let mut shared = place.lock().await;
        if let Some(code) = shared.upgrade() {
            return Ok(code);
        }
        let _permit = self.permits.acquire().await.map_err(io::Error::other)?;
        let code = match self.cached(&module.digest).await {
            Some(code) => Arc::new(code),
            None => {
                let code = Arc::new(self.compile(module).await?);
                self.keep(&module.digest, &code).await;
                code
            }
        };
        *shared = Arc::downgrade(&code);
        Ok(code)
    }

    /// Forgets code that a worker could not map, and compiles anew.
    ///
    /// # Errors
    /// The module can't be compiled.
    pub(crate) async fn fresh_code(&self, module: &ModuleBytes) -> Result<Arc<Code>, CompileError> {
        *self.place(&module.digest).lock().await = Weak::new();
        if let Some(cache) = &self.cache {
            cache.forget(&module.digest);
        }
        self.code(module).await
    }

    /// Where policies of that module share their code.
    fn place(&self, digest: &Sha256Digest) -> SharedCode {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(shared.entry(*digest).or_default())
    }

    async fn cached(&self, digest: &Sha256Digest) -> Option<Code> {
        let (cache, key) = (self.cache.clone()?, *digest);
        match spawn_blocking(move || cache.read(&key)).await.ok()? {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(module = %digest, %error, "compiling again");
                None
            }
        }
    }

    async fn keep(&self, digest: &Sha256Digest, code: &Arc<Code>) {
        let Some(cache) = self.cache.clone() else { return };
        let (key, code) = (*digest, Arc::clone(code));
        if let Ok(Err(error)) = spawn_blocking(move || cache.write(&key, &code)).await {
            tracing::warn!(module = %digest, %error, "compiled code is not kept");
        }
    }

    async fn compile(&self, module: &ModuleBytes) -> Result<Code, CompileError> {
        let bytes = Arc::clone(&module.bytes);
        let source = blocking(move || Image::of(&bytes)).await?;
        let output = Draft::new()?;
        let started = Instant::now();
        let digest = module.digest.to_string();
        let start = Start {
            role: Role::Compile,
            label: &digest,
            image: Some(source.as_fd()),
            output: Some(output.as_fd()),
            group: self.group.as_ref(),
        };
        let (mut process, report) = Process::start(&self.spawner, start).await?;
        self.sandbox.require(report.layers)?;
        let (code_bytes, metadata, facts) =
            process.until(started + self.time_max, request_code).await?;
        // The compiler must be gone before its output is sealed, or it could still write.
        process.end().await;
        let image = blocking(|| output.seal()).await?;
        if image.length != code_bytes || code_bytes > CODE_BYTES_MAX {
            return Err(CompileError::WrongLength(image.length));
        }
        tracing::info!(
            module = %module.digest,
            module_bytes = module.bytes.len(),
            code_bytes,
            milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "compiled"
        );
        Ok(Code { image, metadata, facts, from_cache: false })
    }
}

/// Does something slow where nobody else waits for it.
pub(crate) async fn blocking<T: Send + 'static>(
    action: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(action).await?
}

/// From [`Request::Load`] to [`Reply::Loaded`]: mapping code takes milliseconds.
const LOAD_TIME_MAX: Duration = Duration::from_secs(10);

/// Has a worker in the compile role do its work: the length of the code, the metadata section,
/// and what the module's other sections say.
///
/// # Errors
/// The module is bad, or the worker is of no more use.
pub(crate) async fn request_code(
    process: &mut Process,
) -> Result<(u64, Option<Vec<u8>>, ModuleFacts), WorkerError> {
    process.send(&Request::Compile).await?;
    match process.receive().await? {
        Reply::Compiled { metadata: Some(metadata), .. } if metadata.len() > METADATA_BYTES_MAX => {
            Err(WorkerError::Violation("metadata beyond the limit".to_owned()))
        }
        Reply::Compiled { code_bytes, metadata, facts } => {
            Ok((code_bytes, metadata.map(<[u8]>::to_vec), facts))
        }
        other => Err(unexpected(&other, Phase::Compile)),
    }
}

/// Has a worker load its code, and says what it is locked up with then.
///
/// # Errors
/// The code is bad, or the worker is of no more use.
pub(crate) async fn request_load(
    process: &mut Process,
    load: Load<'_>,
) -> Result<Confinement, WorkerError> {
    process
        .until(Instant::now() + LOAD_TIME_MAX, async |process| {
            process.send(&Request::Load(load)).await?;
            match process.receive().await? {
                Reply::Loaded(report) => Ok(process.loaded(report)),
                other => Err(unexpected(&other, Phase::Load)),
            }
        })
        .await
}

/// Has a loaded worker in the snapshot role start its guest, and says how long that took, in
/// microseconds.
///
/// # Errors
/// The guest can't be started once for all requests, or the worker is of no more use.
pub(crate) async fn request_start(
    process: &mut Process,
    practice: Option<&[u8]>,
    memory_bytes_max: u64,
    time_max: Duration,
) -> Result<u32, WorkerError> {
    let (began, phase) = (Instant::now(), process.phase());
    process
        .until(began + time_max, async |process| {
            process.send(&Request::Start { warmup: practice }).await?;
            match process.receive().await? {
                Reply::Started { start_micros, memory_bytes } => {
                    if memory_bytes > memory_bytes_max
                        || Duration::from_micros(start_micros.into()) > began.elapsed()
                    {
                        return Err(WorkerError::Violation("absurd report of a start".to_owned()));
                    }
                    Ok(start_micros)
                }
                other => Err(unexpected(&other, phase)),
            }
        })
        .await
}
