//! What the kernel shows of a live worker, below `/proc`; nothing that we intended.
//!
//! The daemon's user may look at all of it, since the workers' user namespaces are its own;
//! root may as well, everybody else sees a part.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::iter;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use conclave_ipc::layers::Layer;
use conclave_ipc::limits::ZYGOTE_PROCESSES_MAX;
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
const NOTHING: [&str; 3] = ["Max core file size", "Max locked memory", "Max msgqueue size"];

/// Limits that are 0 in service.
const NOTHING_IN_SERVICE: [&str; 2] = ["Max open files", "Max file size"];

/// The limit that is 0 for everybody but a zygote, and whoever is to become one.
const PROCESSES: &str = "Max processes";

/// A worker locks itself up within milliseconds of its start.
const SETTLING_TIME_MAX: Duration = Duration::from_secs(1);

/// Between two looks at a worker that is locking itself up.
const SETTLING_PAUSE: Duration = Duration::from_millis(2);

/// What is shown of a name; the longest one of a policy has 253 bytes.
const SHOWN_CHARS_MAX: usize = 256;

/// What workers are compared with.
#[derive(Debug)]
pub(crate) struct Observer {
    /// The workers' parent, or grandparent.
    daemon: Pid,
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
    filters: u32,
    /// How many it is to have.
    filters_expected: u32,
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

/// The limit of that name, if the soft and the hard one are the same.
fn limit(limits: &str, name: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    let mut values = line.split_whitespace();
    let (soft, hard) = (values.next()?, values.next()?);
    (soft == hard).then(|| soft.parse().ok())?
}

/// Whether a worker's limits are those of that phase.
fn is_limited(limits: &str, phase: Phase) -> bool {
    let is_zero = |name: &&str| limit(limits, name) == Some(0);
    let processes = limit(limits, PROCESSES).unwrap_or(u64::MAX);
    let (in_service, processes_max): (&[&str], u16) = match phase {
        Phase::Serve => (&NOTHING_IN_SERVICE, 0),
        Phase::Compile => (&[], 0),
        Phase::Load | Phase::Zygote => (&[], ZYGOTE_PROCESSES_MAX),
    };
    NOTHING.iter().chain(in_service).all(is_zero) && processes <= processes_max.into()
}

impl Evidence {
    /// Whether it has gone as far down as its kind goes before it is given anything.
    fn is_settled(&self) -> bool {
        self.filters >= self.filters_expected
    }
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
        Ok(Self { daemon, namespaces, inherited_filters })
    }

    /// Looks at a worker that may just have been started: gives it a moment to lock itself up.
    pub(crate) fn look_at_settled(&self, pid: Pid) -> Option<Evidence> {
        let start = Instant::now();
        loop {
            let evidence = self.look_at(pid)?;
            if evidence.is_settled() || start.elapsed() > SETTLING_TIME_MAX {
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
        let forked = number(&status, "PPid") != Some(self.daemon.as_raw().cast_unsigned());
        let limits = process.text("limits").unwrap_or_default();
        let forks = limit(&limits, PROCESSES) != Some(0);
        let (phase, works_on) = identify(&words, filters, forked, forks);
        let control_group = process.text("cgroup").unwrap_or_default();
        let control_group =
            control_group.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default();
        let filtered = filters >= filters_of(phase, forked);
        let layers = Layer::ALL
            .into_iter()
            .filter(|layer| layer.is_used_in(phase))
            .map(|layer| (layer, self.see(&process, &status, phase, filtered, layer)))
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
            filters_expected: filters_of(phase, forked),
            filters,
            layers,
        })
    }

    fn see(&self, process: &Proc, status: &str, phase: Phase, filters: bool, layer: Layer) -> Seen {
        let is = |name: &str, value: &str| Ok(field(status, name) == Some(value));
        Seen::of(&match layer {
            Layer::EmptyRoot => has_empty_root(process),
            Layer::NoNewPrivileges => is("NoNewPrivs", "1"),
            Layer::NoCapabilities => Ok(has_no_capability(status)),
            Layer::ResourceLimits => {
                process.text("limits").map(|limits| is_limited(&limits, phase))
            }
            Layer::SyscallFilter => Ok(field(status, "Seccomp") == Some("2") && filters),
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

/// The filters of a process that is as far down as that. They stack, and what was forked has
/// those of its zygote.
const fn filters_of(phase: Phase, forked: bool) -> u32 {
    match phase {
        Phase::Compile | Phase::Load => 1,
        Phase::Zygote => 2,
        Phase::Serve => 2 + forked as u32,
    }
}

/// What a worker does, and what it works on. The words are where the worker itself can write,
/// so nothing but names depends on them: who runs foreign code has two filters, whatever it
/// says, and is a zygote as long as it may have processes. Whoever was forked is to serve.
fn identify(words: &[u8], filters: u32, forked: bool, forks: bool) -> (Phase, String) {
    let text = String::from_utf8_lossy(words);
    let mut words = text.split('\0').skip(1);
    let role = words.next().unwrap_or_default();
    let phase = match filters {
        _ if forked => Phase::Serve,
        2 if forks => Phase::Zygote,
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

/// The children of this process, and theirs, and so on.
pub(crate) fn descendants_of(ancestor: Pid) -> io::Result<Vec<Pid>> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may be gone by now.
        let Ok(status) = Proc::of(Pid::from_raw(pid)).text("status") else { continue };
        let parent = number(&status, "PPid").and_then(|parent| i32::try_from(parent).ok());
        parents.extend(parent.map(|parent| (pid, parent)));
    }
    let descends = |pid: &i32| {
        // As many steps as there are processes, in case numbers were used again meanwhile.
        let ancestors = iter::successors(parents.get(pid), |pid| parents.get(pid));
        ancestors.take(parents.len()).any(|pid| *pid == ancestor.as_raw())
    };
    Ok(parents.keys().filter(|pid| descends(pid)).copied().map(Pid::from_raw).collect())
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
        let identify_child = |words, filters| identify(words, filters, false, false);
        assert_eq!(identify_child(worker, 2), (Phase::Serve, "guard".to_owned()));
        assert_eq!(identify_child(worker, 1).0, Phase::Load);
        let snapshot = b"conclave-worker\0snapshot\0namespaces\0guard\0";
        assert_eq!(identify_child(snapshot, 2), (Phase::Serve, "guard".to_owned()));
        assert_eq!(identify_child(snapshot, 1).0, Phase::Load);
        let liar = b"conclave-worker\0compile\0namespaces\0\x1b[2J\xff\ninnocent\0";
        let (phase, works_on) = identify_child(liar, 2);
        assert_eq!(phase, Phase::Serve);
        assert_eq!(works_on, "\\u{1b}[2J\u{fffd}\\ninnocent");
        for nothing in [&b""[..], b"\0", &[0xff; 9000]] {
            assert_eq!(identify_child(nothing, 2), (Phase::Serve, "?".to_owned()));
        }
    }

    #[test]
    fn a_zygote_is_told_by_its_limit_and_what_was_forked_by_its_parent() {
        for words in [&b"conclave-worker\0snapshot\0namespaces\0guard\0"[..], b"x\0serve\0"] {
            assert_eq!(identify(words, 2, false, true).0, Phase::Zygote);
            assert_eq!(identify(words, 1, false, true).0, Phase::Load);
            // Forked and on its way, on purpose or not.
            assert_eq!(identify(words, 2, true, true).0, Phase::Serve);
        }
        assert_eq!((filters_of(Phase::Serve, true), filters_of(Phase::Serve, false)), (3, 2));
    }

    #[test]
    fn only_a_zygote_may_have_processes_and_not_more_than_it_needs() {
        let limits = |processes: &str| {
            let zero = ["Max core file size", "Max locked memory", "Max msgqueue size"]
                .into_iter()
                .chain(NOTHING_IN_SERVICE)
                .map(|name| format!("{name}   0   0   bytes\n"));
            zero.chain([format!("Max processes   {processes}   processes\n")]).collect::<String>()
        };
        let phases = |limits: &str| Phase::ALL.map(|phase| is_limited(limits, phase));
        assert_eq!(phases(&limits("0   0")), [true; 4]);
        assert_eq!(phases(&limits("9   9")), [false, true, true, false]);
        for absurd in ["0   9", "1025   1025", "unlimited   unlimited"] {
            assert_eq!(phases(&limits(absurd)), [false; 4], "{absurd}");
        }
        assert!(!is_limited("", Phase::Zygote));
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
    fn a_limit_is_one_only_if_both_are() {
        let limits = "Max processes   0   0   processes\nMax open files   0   16   files\n";
        assert_eq!(limit(limits, "Max processes"), Some(0));
        assert_eq!(limit(limits, "Max open files"), None);
        assert_eq!(limit(limits, "Max core file size"), None);
    }

    #[test]
    fn a_process_is_found_below_its_parent_and_theirs() {
        let own = Pid::this();
        let parent = Pid::parent();
        let descendants = descendants_of(parent).unwrap();
        assert!(descendants.contains(&own) && !descendants.contains(&parent));
        let grandparent = field(&Proc::of(parent).text("status").unwrap(), "PPid")
            .and_then(|pid| pid.parse().ok())
            .map(Pid::from_raw);
        assert!(descendants_of(grandparent.unwrap()).unwrap().contains(&own));
    }
}
