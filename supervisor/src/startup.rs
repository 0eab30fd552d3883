//! From a process as it was started to one that can run workers; the same for all commands.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use conclave_ipc::limits::COMPILE_MEMORY_BYTES;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use thiserror::Error;
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, watch};

use crate::allocator;
use crate::cache::Cache;
use crate::cgroup::{Delegation, Limits};
use crate::cli::{ProgramOptions, WorkerOptions};
use crate::code::Compiler;
use crate::identity::{self, IdentityError};
use crate::metadata::Execution;
use crate::placement::Placement;
use crate::policy::{Environment, Starting};
use crate::sandbox::{Sandbox, SandboxError};
use crate::spawn::{Program, Spawner};

/// The worker program's name, beside this one.
const WORKER_NAME: &str = "conclave-worker";

/// Why the process can't run workers.
#[derive(Debug, Error)]
pub(crate) enum StartupError {
    /// The worker program can't be opened.
    #[error("can't open the worker program {}: {cause} (--worker names another)", .path.display())]
    Worker { path: PathBuf, cause: io::Error },
    /// Root can't be given up.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The host does not give a good enough sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A thread can't be started, or alike.
    #[error("can't start {0}: {1}")]
    Io(&'static str, io::Error),
}

/// A process that has given up root and can start workers.
#[derive(Debug)]
pub(crate) struct Prepared {
    spawner: Spawner,
    program: File,
    /// Whether the process was root and became somebody else.
    was_root: bool,
}

/// Opens the worker program, gives up root, and starts the spawning thread, in this order:
/// the path to the program may be one that only root can walk.
///
/// # Errors
/// See [`StartupError`].
pub(crate) fn prepare(options: &ProgramOptions) -> Result<Prepared, StartupError> {
    allocator::bound();
    let path = options.worker.clone().unwrap_or_else(worker_beside_us);
    let program = Program::open(&path).map_err(|cause| StartupError::Worker { path, cause })?;
    let became = identity::give_up_root(options.user.as_deref())?;
    if let Some(user) = &became {
        tracing::info!(user = user.as_str(), "started as root, went on as another user");
    }
    raise_descriptor_limit();
    let reader =
        program.try_clone().map_err(|error| StartupError::Io("the worker program", error))?;
    let spawner =
        Spawner::start(program).map_err(|error| StartupError::Io("the spawning thread", error))?;
    Ok(Prepared { spawner, program: reader, was_root: became.is_some() })
}

/// Every worker costs the supervisor two descriptors and every client one. The soft limit
/// is low for the sake of programs that use `select`, which this one does not.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "limit of descriptors can't be raised");
    }
}

fn worker_beside_us() -> PathBuf {
    match std::env::current_exe() {
        Ok(path) => path.with_file_name(WORKER_NAME),
        Err(_) => PathBuf::from(WORKER_NAME),
    }
}

impl Prepared {
    /// What starts workers.
    pub(crate) fn spawner(&self) -> &Spawner {
        &self.spawner
    }

    /// Tries the sandbox and opens the cache.
    ///
    /// # Errors
    /// The sandbox is not good enough. A cache that can't be used is a warning: the daemon
    /// works without one.
    pub(crate) async fn environment(
        self,
        options: &WorkerOptions,
        workers: usize,
        starting: Starting,
        execution: Execution,
        delegation: Option<Delegation>,
    ) -> Result<Environment, StartupError> {
        let sandbox = Sandbox::try_out(&self.spawner, options.sandbox).await?;
        let cache =
            if options.no_cache { None } else { open_cache(options, self.program, !self.was_root) };
        let compilations = processors();
        let group = delegation
            .as_ref()
            .map(|groups| groups.for_compilations(bounds_of(compilations as u64)))
            .transpose()
            .map_err(|error| StartupError::Io("the control group of compilations", error))?;
        Ok(Environment {
            compiler: Compiler {
                group,
                spawner: self.spawner,
                sandbox: Arc::new(sandbox),
                cache: cache.map(Arc::new),
                time_max: options.compile_timeout,
                permits: Semaphore::new(compilations),
                shared: Mutex::default(),
            },
            delegation,
            workers,
            time_max: options.policy_timeout,
            starting,
            execution,
            placement: Placement::new(),
            ending: watch::Sender::new(false),
        })
    }
}

/// What that many compilations may use together.
const fn bounds_of(compilations: u64) -> Limits {
    Limits {
        memory_bytes: COMPILE_MEMORY_BYTES.saturating_mul(compilations),
        // One that is over counts until it is reaped.
        processes: compilations.saturating_mul(2),
    }
}

/// Takes over the control group that the daemon was started in, if it is the daemon's.
pub(crate) fn take_control_group() -> Option<Delegation> {
    match Delegation::take() {
        Ok(delegation) => {
            let (controllers, missing) = delegation.controllers();
            let (controllers, missing) = (controllers.join(" "), missing.join(" "));
            tracing::info!(controllers, missing, "workers are born into control groups");
            Some(delegation)
        }
        Err(why) => {
            let why = why.to_string();
            tracing::info!(why, "no control groups: the limits of each process have to do");
            None
        }
    }
}

/// The runtime of every command. Its tasks share one thread: a hop to another processor
/// costs more than what the supervisor does for an ordinary request. What takes long is
/// done in [`crate::placement::Placement::at_length`], which lets the tasks go on elsewhere.
///
/// # Errors
/// Its thread can't be started.
pub(crate) fn runtime() -> Result<Runtime, StartupError> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| StartupError::Io("the runtime", error))
}

/// Processors that this process may use.
pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// `home_is_ours` is false for a process that was root: the home in its environment is root's.
fn open_cache(options: &WorkerOptions, program: File, home_is_ours: bool) -> Option<Cache> {
    let default = || default_cache_dir(home_is_ours);
    let Some(directory) = options.cache_dir.clone().or_else(default) else {
        tracing::info!(
            "compiled code is not kept: no directory for it is known (--cache-dir names one)"
        );
        return None;
    };
    match Cache::open(&directory, program) {
        Ok(cache) => Some(cache),
        Err(error) => {
            tracing::warn!(directory = %directory.display(), %error, "compiled code is not kept");
            None
        }
    }
}

fn default_cache_dir(home_is_ours: bool) -> Option<PathBuf> {
    let variable =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    variable("CACHE_DIRECTORY").or_else(|| {
        if !home_is_ours {
            return None;
        }
        let below =
            variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?;
        Some(below.join(Path::new("conclave")))
    })
}
