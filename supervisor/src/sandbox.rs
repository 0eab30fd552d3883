//! What the host gives to lock workers up with, and what to do when it lacks something.
#![forbid(unsafe_code)]

use std::fmt;

use conclave_ipc::Role;
use conclave_ipc::layers::{Layer, Layers};
use conclave_ipc::message::Confinement;
use thiserror::Error;

use crate::process::{Process, WorkerError};
use crate::spawn::Spawner;

/// What a missing layer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum SandboxMode {
    /// Refuse to start, and name it.
    Strict,
    /// Start, and say on every start what is missing.
    BestEffort,
}

/// The layers that every worker must report, found out by locking one up.
#[derive(Debug)]
pub(crate) struct Sandbox {
    report: Confinement,
}

/// Why the sandbox is not good enough to start.
#[derive(Debug, Error)]
pub(crate) enum SandboxError {
    /// The trial worker failed.
    #[error("no worker can be locked up here: {0}")]
    Trial(WorkerError),
    /// Layers are missing and the mode is strict.
    #[error(fmt = list_missing)]
    Missing(Vec<Layer>),
}

/// The layers, each on a line of its own with the way to get it.
fn list_missing(layers: &[Layer], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    f.write_str("this host lacks layers of the sandbox:")?;
    for layer in layers {
        write!(f, "\n  {}: {}", layer.name(), advice(*layer))?;
    }
    f.write_str("\nstart with --sandbox best-effort to do without")
}

/// A worker that lacks a layer that the trial worker had. It is ended.
#[derive(Debug, Error)]
#[error("worker lacks layers of the sandbox: {}", names(.0))]
pub(crate) struct Weaker(Vec<Layer>);

/// How to get a layer.
const fn advice(layer: Layer) -> &'static str {
    match layer {
        Layer::UserNamespace
        | Layer::MountNamespace
        | Layer::PidNamespace
        | Layer::NetworkNamespace
        | Layer::IpcNamespace
        | Layer::UtsNamespace
        | Layer::CgroupNamespace
        | Layer::EmptyRoot
        | Layer::NoCapabilities => {
            "needs user namespaces for ordinary users (sysctl user.max_user_namespaces above 0, \
             kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0 where \
             they exist; RestrictNamespaces= of a systemd unit must permit them)"
        }
        Layer::Landlock => "needs Linux 5.13 or newer with \"landlock\" in the kernel's lsm= list",
        Layer::SyscallFilter => "needs a kernel with CONFIG_SECCOMP_FILTER",
        Layer::WriteExecuteDenied => "needs Linux 6.3 or newer",
        Layer::NoNewPrivileges
        | Layer::ResourceLimits
        | Layer::NotDumpable
        | Layer::ParentDeathSignal => "every supported kernel has it",
    }
}

fn names(layers: &[Layer]) -> String {
    layers.iter().map(|layer| layer.name()).collect::<Vec<_>>().join(", ")
}

impl Sandbox {
    /// Locks one worker up to see what the host gives, and judges it.
    ///
    /// # Errors
    /// No worker can be locked up, or a layer is missing and the mode is strict.
    pub(crate) async fn try_out(
        spawner: &Spawner,
        mode: SandboxMode,
    ) -> Result<Self, SandboxError> {
        let (process, report) =
            Process::start(spawner, Role::Serve, None, None).await.map_err(SandboxError::Trial)?;
        process.end().await;
        let missing: Vec<_> = report.layers.missing().collect();
        match (mode, missing.is_empty()) {
            (_, true) => tracing::info!(landlock_abi = report.landlock_abi, "sandbox is complete"),
            (SandboxMode::BestEffort, false) => {
                tracing::warn!(
                    missing = names(&missing),
                    "sandbox is INCOMPLETE, starting all the same"
                );
            }
            (SandboxMode::Strict, false) => return Err(SandboxError::Missing(missing)),
        }
        Ok(Self { report })
    }

    /// Checks that a worker is no weaker than the trial worker was, apart from layers that
    /// its state does not have yet.
    ///
    /// # Errors
    /// It is.
    pub(crate) fn require(&self, layers: Layers, not_yet: Layers) -> Result<(), Weaker> {
        let lacking: Vec<_> = Layer::ALL
            .into_iter()
            .filter(|layer| self.report.layers.contains(*layer))
            .filter(|layer| !layers.contains(*layer) && !not_yet.contains(*layer))
            .collect();
        if lacking.is_empty() { Ok(()) } else { Err(Weaker(lacking)) }
    }
}
