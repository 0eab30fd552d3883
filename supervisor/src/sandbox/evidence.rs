//! What the kernel shows of a live worker, below `/proc`; nothing that we intended.
//!
//! The daemon's user may look at all of it, since the workers' user namespaces are its own;
//! root may as well, everybody else sees a part.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use conclave_ipc::layers::Layer;
use conclave_ipc::{Phase, Role};
use nix::unistd::Pid;

/// What the kernel shows of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// It is in force.
    InForce,
    /// It is not.
    Missing,
    /// The kernel does not show this layer to anybody.
    NotShown,
    /// It is not shown to us.
    Hidden,
}

impl Seen {
    /// The word for it in a report.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::InForce => "in force",
            Self::Missing => "missing",
            Self::NotShown => "not shown",
            Self::Hidden => "hidden",
        }
    }

    fn of(result: &io::Result<bool>) -> Self {
        match result {
            Ok(true) => Self::InForce,
            Ok(false) => Self::Missing,
            Err(_) => Self::Hidden,
        }
    }
}

/// The namespaces, as `/proc/PID/ns` names them.
const NAMESPACES: [(Layer, &str); 7] = [
    (Layer::UserNamespace, "user"),
    (Layer::MountNamespace, "mnt"),
    (Layer::PidNamespace, "pid"),
    (Layer::NetworkNamespace, "net"),
    (Layer::IpcNamespace, "ipc"),
    (Layer::UtsNamespace, "uts"),
    (Layer::CgroupNamespace, "cgroup"),
];

/// Limits that are 0 for every worker, as `/proc/PID/limits` names them.
const NOTHING: [&str; 4] =
    ["Max processes", "Max core file size", "Max locked memory", "Max msgqueue size"];

/// Limits that are 0 once the code is loaded.
const NOTHING_IN_SERVICE: [&str; 2] = ["Max open files", "Max file size"];

/// A worker locks itself up within milliseconds of its start.
const SETTLING_TIME_MAX: Duration = Duration::from_secs(1);

/// Between two looks at a worker that is locking itself up.
const SETTLING_PAUSE: Duration = Duration::from_millis(2);

/// What is shown of a name; the longest one of a policy has 253 bytes.
const SHOWN_CHARS_MAX: usize = 256;

/// What workers are compared with.
#[derive(Debug)]
pub(crate) struct Observer {
    /// Our own namespaces, by kind.
    namespaces: BTreeMap<&'static str, PathBuf>,
    /// System call filters that every process of the daemon inherits from its service manager.
    inherited_filters: u32,
}

/// What the kernel shows of one worker.
#[derive(Debug)]
pub(crate) struct Evidence {
    pub(crate) pid: Pid,
    pub(crate) phase: Phase,
    /// What it works on: a policy's name, or a module's digest.
    pub(crate) works_on: String,
    pub(crate) uid: u32,
    pub(crate) threads: u32,
    /// Open descriptors; unknown if we may not look.
    pub(crate) descriptors: Option<usize>,
    /// Memory that is its own, in bytes; unknown if we may not look.
    pub(crate) private_bytes: Option<u64>,
    /// Its control group.
    pub(crate) control_group: String,
    /// System call filters that are its own.
    pub(crate) filters: u32,
    pub(crate) layers: Vec<(Layer, Seen)>,
}

/// The files of one process.
struct Proc(PathBuf);

impl Proc {
    fn of(pid: Pid) -> Self {
        Self(PathBuf::from(format!("/proc/{pid}")))
    }

    fn text(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.0.join(file))
    }

    fn namespace(&self, kind: &str) -> io::Result<PathBuf> {
        fs::read_link(self.0.join("ns").join(kind))
    }

    fn count(&self, directory: &str) -> io::Result<usize> {
        Ok(fs::read_dir(self.0.join(directory))?.count())
    }
}

/// A field of `/proc/PID/status`, without its name.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

fn number(status: &str, name: &str) -> Option<u32> {
    field(status, name)?.split_whitespace().next()?.parse().ok()
}

/// The soft and the hard limit of that name, if both are 0.
fn is_zero(limits: &str, name: &str) -> bool {
    let line = limits.lines().find_map(|line| line.strip_prefix(name));
    line.is_some_and(|values| {
        let values: Vec<_> = values.split_whitespace().take(2).collect();
        values == ["0", "0"]
    })
}

impl Observer {
    /// Compares with this process and, for what is inherited, with the workers' parent.
    ///
    /// # Errors
    /// The kernel's own files can't be read.
    pub(crate) fn new(daemon: Pid) -> io::Result<Self> {
        let own = Proc(PathBuf::from("/proc/self"));
        let namespaces = NAMESPACES
            .into_iter()
            .map(|(_, kind)| Ok((kind, own.namespace(kind)?)))
            .collect::<io::Result<_>>()?;
        let status = Proc::of(daemon).text("status")?;
        let inherited_filters = number(&status, "Seccomp_filters").unwrap_or(0);
        Ok(Self { namespaces, inherited_filters })
    }

    /// Looks at a worker that may just have been started: gives it a moment to lock itself up.
    pub(crate) fn look_at_settled(&self, pid: Pid) -> Option<Evidence> {
        let start = Instant::now();
        loop {
            let evidence = self.look_at(pid)?;
            if evidence.filters > 0 || start.elapsed() > SETTLING_TIME_MAX {
                return Some(evidence);
            }
            thread::sleep(SETTLING_PAUSE);
        }
    }

    /// Looks at a worker. `None` if the process is gone.
    pub(crate) fn look_at(&self, pid: Pid) -> Option<Evidence> {
        let process = Proc::of(pid);
        let status = process.text("status").ok()?;
        if field(&status, "State").is_some_and(|state| state.starts_with(['Z', 'X'])) {
            return None;
        }
        let words = fs::read(process.0.join("cmdline")).unwrap_or_default();
        let filters =
            number(&status, "Seccomp_filters").unwrap_or(0).saturating_sub(self.inherited_filters);
        let (phase, works_on) = identify(&words, filters);
        let control_group = process.text("cgroup").unwrap_or_default();
        let control_group =
            control_group.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
        let layers = Layer::ALL
            .into_iter()
            .filter(|layer| layer.is_used_in(phase))
            .map(|layer| (layer, self.see(&process, &status, phase, filters, layer)))
            .collect();
        Some(Evidence {
            pid,
            phase,
            works_on,
            uid: number(&status, "Uid")?,
            threads: number(&status, "Threads")?,
            descriptors: process.count("fd").ok(),
            private_bytes: private_bytes(&process).ok(),
            control_group: presentable(control_group),
            filters,
            layers,
        })
    }

    fn see(&self, process: &Proc, status: &str, phase: Phase, filters: u32, layer: Layer) -> Seen {
        let is = |name: &str, value: &str| Ok(field(status, name) == Some(value));
        Seen::of(&match layer {
            Layer::EmptyRoot => has_empty_root(process),
            Layer::NoNewPrivileges => is("NoNewPrivs", "1"),
            Layer::NoCapabilities => Ok(has_no_capability(status)),
            Layer::ResourceLimits => process.text("limits").map(|limits| {
                let in_service: &[&str] =
                    if phase == Phase::Serve { &NOTHING_IN_SERVICE } else { &[] };
                NOTHING.iter().chain(in_service).all(|name| is_zero(&limits, name))
            }),
            Layer::SyscallFilter => {
                let own = if phase == Phase::Serve { 2 } else { 1 };
                Ok(field(status, "Seccomp") == Some("2") && filters >= own)
            }
            Layer::ControlGroup => process.text("cgroup").map(|group| is_bounded(&group)),
            Layer::CodeSealed => process.text("smaps").map(|maps| code_is_sealed(&maps)),
            Layer::BranchBarrier => Ok(field(status, "SpeculationIndirectBranch")
                .is_some_and(|state| state.ends_with("disabled"))),
            Layer::Landlock
            | Layer::NotDumpable
            | Layer::ParentDeathSignal
            | Layer::WriteExecuteDenied
            | Layer::NoNestedNamespaces => return Seen::NotShown,
            namespace => {
                let kind = NAMESPACES.iter().find(|(layer, _)| *layer == namespace);
                let Some((_, kind)) = kind else { return Seen::NotShown };
                process.namespace(kind).map(|theirs| self.namespaces.get(kind) != Some(&theirs))
            }
        })
    }
}

/// What a worker does, and what it works on. The words are where the worker itself can write,
/// so nothing but names depends on them: who serves has two filters, whatever it says.
fn identify(words: &[u8], filters: u32) -> (Phase, String) {
    let text = String::from_utf8_lossy(words);
    let mut words = text.split('\0').skip(1);
    let role = words.next().unwrap_or_default();
    let phase = match filters {
        2.. => Phase::Serve,
        _ => match Role::from_arg(role) {
            Some(Role::Serve | Role::Snapshot) => Phase::Load,
            Some(Role::Compile) | None => Phase::Compile,
        },
    };
    (phase, presentable(words.nth(1).unwrap_or("?")))
}

/// A foreign text as it can be shown on a terminal.
fn presentable(text: &str) -> String {
    text.chars().take(SHOWN_CHARS_MAX).flat_map(char::escape_debug).collect()
}

/// One mount, read-only, and nothing in it.
fn has_empty_root(process: &Proc) -> io::Result<bool> {
    let mounts = process.text("mountinfo")?;
    let read_only = |line: &str| {
        let options = line.split(' ').nth(5).unwrap_or_default();
        options.split(',').any(|option| option == "ro")
    };
    Ok(mounts.lines().count() == 1 && mounts.lines().all(read_only) && process.count("root/")? == 0)
}

fn has_no_capability(status: &str) -> bool {
    ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].into_iter().all(|set| {
        field(status, set)
            .is_some_and(|bits| !bits.is_empty() && bits.bytes().all(|bit| bit == b'0'))
    })
}

/// Whether the group of cgroup v2 that a process is in bounds its memory and its processes.
fn is_bounded(membership: &str) -> bool {
    let Some(group) = membership.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return false;
    };
    let directory = crate::cgroup::mount_point().map(|mount| mount.join(group));
    let bounded = |directory: &Path, file: &str| {
        let limit = fs::read_to_string(directory.join(file)).unwrap_or_default();
        limit.trim().parse::<u64>().is_ok()
    };
    directory.is_some_and(|group| bounded(&group, "memory.max") && bounded(&group, "pids.max"))
}

/// Whether the mapping of the code, which is the executable one of the image, is sealed.
fn code_is_sealed(maps: &str) -> bool {
    let mut of_code = false;
    for line in maps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if of_code {
                return flags.split_whitespace().any(|flag| flag == "sl");
            }
        } else if line.contains("/memfd:") {
            of_code = line.split(' ').nth(1).is_some_and(|mode| mode.contains('x'));
        }
    }
    false
}

fn private_bytes(process: &Proc) -> io::Result<u64> {
    let rollup = process.text("smaps_rollup")?;
    let kilobytes = |name: &str| {
        let value = field(&rollup, name)?.strip_suffix("kB")?;
        value.trim().parse::<u64>().ok()
    };
    let sum = ["Private_Clean", "Private_Dirty"].into_iter().filter_map(kilobytes).sum::<u64>();
    Ok(sum.saturating_mul(1024))
}

/// The processes whose parent is this one.
pub(crate) fn children_of(parent: Pid) -> io::Result<Vec<Pid>> {
    let wanted = parent.as_raw().cast_unsigned();
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may be gone by now.
        let Ok(status) = Proc::of(Pid::from_raw(pid)).text("status") else { continue };
        if number(&status, "PPid") == Some(wanted) {
            children.push(Pid::from_raw(pid));
        }
    }
    children.sort_unstable();
    Ok(children)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tx\nUid:\t65534\t65534\t65534\t65534\nNoNewPrivs:\t1\n\
        Seccomp:\t2\nSeccomp_filters:\t2\nCapInh:\t0000000000000000\nCapPrm:\t0000000000000000\n\
        CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nCapAmb:\t0000000000000000\n";

    #[test]
    fn fields_are_found_by_their_whole_name() {
        assert_eq!(field(STATUS, "Seccomp"), Some("2"));
        assert_eq!(number(STATUS, "Uid"), Some(65534));
        assert_eq!(field(STATUS, "Secc"), None);
    }

    #[test]
    fn what_a_worker_says_of_itself_hides_nothing_and_is_shown_harmlessly() {
        let worker = b"conclave-worker\0serve\0namespaces\0guard\0";
        assert_eq!(identify(worker, 2), (Phase::Serve, "guard".to_owned()));
        assert_eq!(identify(worker, 1).0, Phase::Load);
        let snapshot = b"conclave-worker\0snapshot\0namespaces\0guard\0";
        assert_eq!(identify(snapshot, 2), (Phase::Serve, "guard".to_owned()));
        assert_eq!(identify(snapshot, 1).0, Phase::Load);
        let liar = b"conclave-worker\0compile\0namespaces\0\x1b[2J\xff\ninnocent\0";
        let (phase, works_on) = identify(liar, 2);
        assert_eq!(phase, Phase::Serve);
        assert_eq!(works_on, "\\u{1b}[2J\u{fffd}\\ninnocent");
        for nothing in [&b""[..], b"\0", &[0xff; 9000]] {
            assert_eq!(identify(nothing, 2), (Phase::Serve, "?".to_owned()));
        }
    }

    #[test]
    fn one_capability_is_seen() {
        assert!(has_no_capability(STATUS));
        assert!(!has_no_capability(&STATUS.replace("CapBnd:\t0000", "CapBnd:\t0020")));
        assert!(!has_no_capability("CapInh:\t0000000000000000\n"));
    }

    #[test]
    fn only_the_code_counts_as_sealed_code() {
        let maps = "\
7f00-7f01 rw-p 0 00:01 12 /memfd:conclave (deleted)\nVmFlags: rd wr mr\n\
7f01-7f02 r-xp 0 00:01 12 /memfd:conclave (deleted)\nSize: 4 kB\nVmFlags: rd ex mr sl \n";
        assert!(code_is_sealed(maps));
        assert!(!code_is_sealed(&maps.replace(" sl", "")));
        assert!(!code_is_sealed(&maps.replace("r-xp", "r--p")));
    }

    #[test]
    fn a_limit_is_zero_only_if_both_are() {
        let limits = "Max processes   0   0   processes\nMax open files   0   16   files\n";
        assert!(is_zero(limits, "Max processes"));
        assert!(!is_zero(limits, "Max open files"));
        assert!(!is_zero(limits, "Max core file size"));
    }

    #[test]
    fn a_process_is_found_below_its_parent() {
        let own = Pid::this();
        let parent = Pid::parent();
        assert!(children_of(parent).unwrap().contains(&own));
    }
}
