//! The layers of the sandbox, as both processes name them.

use bincode::{BorrowDecode, Encode};

use crate::Phase;

/// One layer of a worker's confinement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Layer {
    /// An own user namespace: identities and privileges of the host mean nothing inside.
    UserNamespace = 0,
    /// An own mount namespace.
    MountNamespace,
    /// An own process namespace: no other process has a number here.
    PidNamespace,
    /// An own network namespace without any interface that is up.
    NetworkNamespace,
    /// An own namespace of System V IPC and message queues.
    IpcNamespace,
    /// An own namespace of host names.
    UtsNamespace,
    /// An own view of the control groups.
    CgroupNamespace,
    /// The root directory is an empty, read-only file system.
    EmptyRoot,
    /// `no_new_privs`: nothing executed could gain a privilege.
    NoNewPrivileges,
    /// All five capability sets are empty.
    NoCapabilities,
    /// Limits on memory, files, processes, locks, queues and core dumps.
    ResourceLimits,
    /// A Landlock domain without a single rule.
    Landlock,
    /// Not dumpable: no core dump, and not to be traced by other workers.
    NotDumpable,
    /// Killed by the kernel when the supervisor dies.
    ParentDeathSignal,
    /// A filter of system calls that kills the process.
    SyscallFilter,
    /// The kernel refuses to make any writable memory executable (Linux 6.3 and newer).
    WriteExecuteDenied,
    /// No further namespace can be made within the worker's own user namespace.
    NoNestedNamespaces,
    /// A control group of its policy's, with limits on memory, processes and processor time.
    ControlGroup,
    /// The loaded code can't be unmapped, replaced or changed (`mseal`, Linux 6.10 and newer).
    CodeSealed,
    /// Branch predictions are not shared with processes that ran before on the processor.
    BranchBarrier,
}

impl Layer {
    /// Every layer, in the order of a report.
    pub const ALL: [Self; 20] = [
        Self::UserNamespace,
        Self::MountNamespace,
        Self::PidNamespace,
        Self::NetworkNamespace,
        Self::IpcNamespace,
        Self::UtsNamespace,
        Self::CgroupNamespace,
        Self::EmptyRoot,
        Self::NoNewPrivileges,
        Self::NoCapabilities,
        Self::ResourceLimits,
        Self::Landlock,
        Self::NotDumpable,
        Self::ParentDeathSignal,
        Self::SyscallFilter,
        Self::WriteExecuteDenied,
        Self::NoNestedNamespaces,
        Self::ControlGroup,
        Self::CodeSealed,
        Self::BranchBarrier,
    ];

    /// The name in logs and messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::UserNamespace => "user namespace",
            Self::MountNamespace => "mount namespace",
            Self::PidNamespace => "pid namespace",
            Self::NetworkNamespace => "network namespace",
            Self::IpcNamespace => "ipc namespace",
            Self::UtsNamespace => "uts namespace",
            Self::CgroupNamespace => "cgroup namespace",
            Self::EmptyRoot => "empty root",
            Self::NoNewPrivileges => "no new privileges",
            Self::NoCapabilities => "no capabilities",
            Self::ResourceLimits => "resource limits",
            Self::Landlock => "landlock",
            Self::NotDumpable => "not dumpable",
            Self::ParentDeathSignal => "parent-death signal",
            Self::SyscallFilter => "system call filter",
            Self::WriteExecuteDenied => "write-execute denied",
            Self::NoNestedNamespaces => "no nested namespaces",
            Self::ControlGroup => "control group",
            Self::CodeSealed => "code sealed",
            Self::BranchBarrier => "branch barrier",
        }
    }

    /// Whether `--sandbox strict` refuses to start without it.
    ///
    /// The others need a newer kernel, a processor that has them or a delegated control
    /// group, and something stands in front of each: the system call filter refuses
    /// executable memory and new namespaces on every kernel, and the resource limits bound
    /// memory and processes without a control group.
    #[must_use]
    pub const fn is_required(self) -> bool {
        !matches!(
            self,
            Self::WriteExecuteDenied
                | Self::NoNestedNamespaces
                | Self::ControlGroup
                | Self::CodeSealed
                | Self::BranchBarrier
        )
    }

    /// Whether a worker has it in this phase, on a host that offers everything. What maps
    /// native code can't deny itself to do so, and only mapped code can be sealed.
    #[must_use]
    pub const fn is_used_in(self, phase: Phase) -> bool {
        match self {
            Self::WriteExecuteDenied => !matches!(phase, Phase::Load),
            Self::CodeSealed => matches!(phase, Phase::Zygote | Phase::Serve),
            _ => true,
        }
    }

    const fn bit(self) -> u32 {
        1 << (self as u8)
    }
}

/// A set of [`Layer`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, BorrowDecode)]
pub struct Layers(u32);

impl Layers {
    /// No layer.
    pub const NONE: Self = Self(0);

    /// This set and one layer more.
    #[must_use]
    pub const fn with(self, layer: Layer) -> Self {
        Self(self.0 | layer.bit())
    }

    /// The layers that are in either set.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the layer is in the set.
    #[must_use]
    pub const fn contains(self, layer: Layer) -> bool {
        self.0 & layer.bit() != 0
    }

    /// The required layers that this set lacks.
    pub fn missing(self) -> impl Iterator<Item = Layer> {
        Layer::ALL.into_iter().filter(move |layer| layer.is_required() && !self.contains(*layer))
    }
}

impl FromIterator<Layer> for Layers {
    fn from_iter<I: IntoIterator<Item = Layer>>(layers: I) -> Self {
        layers.into_iter().fold(Self::NONE, Self::with)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_without_one_required_layer_names_it() {
        let all: Layers = Layer::ALL.into_iter().collect();
        assert_eq!(all.missing().count(), 0);
        let some: Layers =
            Layer::ALL.into_iter().filter(|layer| *layer != Layer::Landlock).collect();
        assert_eq!(some.missing().collect::<Vec<_>>(), [Layer::Landlock]);
    }
}
