//! What the host gives to lock workers up with, and what to do when it lacks something.
#![forbid(unsafe_code)]

pub(crate) mod command;
mod evidence;
mod report;

use std::fmt;
use std::sync::OnceLock;

use conclave_ipc::layers::{Layer, Layers};
use conclave_ipc::message::Confinement;
use thiserror::Error;

use crate::process::{Process, WorkerError};
use crate::spawn::{Spawner, Start};

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
    /// What the first worker had once it was loaded: the rest is only switched on then.
    loaded: OnceLock<Layers>,
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
        Layer::NoNestedNamespaces => {
            "needs user namespaces, and /proc/sys/user to be writable for their owners \
             (ProtectKernelTunables= of a systemd unit makes it read-only)"
        }
        Layer::ControlGroup => {
            "needs cgroup v2 and a control group that is handed to the daemon (Delegate=yes in \
             its systemd unit); until then the limits of each process have to do"
        }
        Layer::CodeSealed => {
            "needs Linux 6.10 or newer, and mseal in the SystemCallFilter= of a systemd unit"
        }
        Layer::BranchBarrier => {
            "needs a processor and kernel settings (spectre_v2_user=) that let a process ask for it"
        }
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
            Process::start(spawner, Start::TRIAL).await.map_err(SandboxError::Trial)?;
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
        Ok(Self { report, loaded: OnceLock::new() })
    }

    /// Checks that a worker that has not loaded anything is no weaker than the trial worker.
    ///
    /// # Errors
    /// It is.
    pub(crate) fn require(&self, layers: Layers) -> Result<(), Weaker> {
        no_weaker(layers, self.report.layers)
    }

    /// Checks that a loaded worker is no weaker than the trial worker, nor than the first one
    /// that was loaded. What that one lacks is told, once.
    ///
    /// # Errors
    /// It is.
    pub(crate) fn require_loaded(&self, layers: Layers) -> Result<(), Weaker> {
        self.require(layers)?;
        let first = self.loaded.get_or_init(|| {
            let lacking = |layer: &Layer| !layers.contains(*layer);
            let lacking: Vec<_> = Layer::ALL.into_iter().filter(lacking).collect();
            if !lacking.is_empty() {
                let missing = names(&lacking);
                tracing::info!(missing, "workers do without these layers (see conclave sandbox)");
            }
            layers
        });
        no_weaker(layers, *first)
    }
}

fn no_weaker(layers: Layers, than: Layers) -> Result<(), Weaker> {
    let lacking = |layer: &Layer| than.contains(*layer) && !layers.contains(*layer);
    let lacking: Vec<_> = Layer::ALL.into_iter().filter(lacking).collect();
    if lacking.is_empty() { Ok(()) } else { Err(Weaker(lacking)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_lacks_what_others_had_is_refused() {
        let confined: Layers = Layer::ALL.into_iter().filter(|layer| layer.is_required()).collect();
        let sandbox = Sandbox {
            report: Confinement { layers: confined, landlock_abi: 1 },
            loaded: OnceLock::new(),
        };
        sandbox.require(confined).unwrap();
        let weaker = sandbox.require(Layers::NONE.with(Layer::Landlock)).unwrap_err().to_string();
        assert!(weaker.contains("system call filter") && !weaker.contains("landlock"), "{weaker}");

        let complete = confined.with(Layer::WriteExecuteDenied);
        sandbox.require_loaded(complete).unwrap();
        let weaker = sandbox.require_loaded(confined).unwrap_err().to_string();
        assert_eq!(weaker, "worker lacks layers of the sandbox: write-execute denied");
    }

    #[test]
    fn a_layer_that_is_not_required_may_be_missing_everywhere() {
        let confined: Layers = Layer::ALL.into_iter().filter(|layer| layer.is_required()).collect();
        let sandbox = Sandbox {
            report: Confinement { layers: confined, landlock_abi: 1 },
            loaded: OnceLock::new(),
        };
        sandbox.require_loaded(confined).unwrap();
        sandbox.require_loaded(confined).unwrap();
    }
}
