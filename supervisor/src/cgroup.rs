//! Control groups for workers, on hosts that hand one over to the daemon (cgroup v2, and
//! `Delegate=yes` in its systemd unit).
//!
//! ```text
//! conclave.service/      handed over; no process of its own, as cgroup v2 wants it
//!   daemon/              the supervisor
//!   workers/
//!     compile/           all compilations
//!     p.NAME/            the workers of one policy
//! ```
//!
//! A worker is born into its group, so that it is bounded before its first instruction. What
//! the groups add to the limits of each process: they count memory of every kind, the
//! kernel's own included; they share processor time evenly among policies, however many
//! workers each has; and they kill all of a policy's workers at once.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// The controllers that bound workers; cgroup-v2.rst of the kernel's documentation.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

/// The supervisor's own group.
const DAEMON: &str = "daemon";

/// Above the groups of workers.
const WORKERS: &str = "workers";

/// What a group may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Memory of all its processes, in bytes.
    pub(crate) memory_bytes: u64,
    /// Processes.
    pub(crate) processes: u64,
}

/// A part of the tree that is ours.
#[derive(Debug)]
pub(crate) struct Delegation {
    workers: PathBuf,
    /// The controllers that groups of workers have.
    controllers: Vec<&'static str>,
}

/// Why there are no control groups. `Display` is for the operator.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotDelegated {
    /// There is no cgroup v2 here, or this process is not in it.
    #[error("no cgroup v2 is mounted that this process is in")]
    NoHierarchy,
    /// The group has other processes in it, so it was not made for us.
    #[error("the control group {} holds other processes as well", .0.display())]
    Shared(PathBuf),
    /// The group is not ours to divide.
    #[error("the control group {} can't be divided: {}", .0.display(), .1)]
    Refused(PathBuf, io::Error),
}

impl Delegation {
    /// Takes over the control group that this process was started in, if it is ours alone.
    ///
    /// # Errors
    /// It is not; nothing was changed.
    pub(crate) fn take() -> Result<Self, NotDelegated> {
        let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let own = own_group(&membership, &mounts).ok_or(NotDelegated::NoHierarchy)?;
        let refused = |error| NotDelegated::Refused(own.clone(), error);
        let processes = fs::read_to_string(own.join("cgroup.procs")).map_err(refused)?;
        if processes.trim() != std::process::id().to_string() {
            return Err(NotDelegated::Shared(own));
        }
        let (daemon, workers) = (own.join(DAEMON), own.join(WORKERS));
        // A group with processes of its own gives no controllers to those below.
        let divided = make(&workers)
            .and_then(|()| make(&daemon))
            .and_then(|()| fs::write(daemon.join("cgroup.procs"), "0"));
        if let Err(error) = divided {
            drop(fs::remove_dir(&daemon));
            drop(fs::remove_dir(&workers));
            return Err(refused(error));
        }
        let enabled = |group: &Path, name: &str| {
            fs::write(group.join("cgroup.subtree_control"), format!("+{name}")).is_ok()
        };
        let controllers = CONTROLLERS
            .into_iter()
            .filter(|name| enabled(&own, name) && enabled(&workers, name))
            .collect();
        let delegation = Self { workers, controllers };
        // Of a predecessor that was killed in a way that spared them.
        delegation.kill_workers();
        Ok(delegation)
    }

    /// The controllers that bound workers, and those that the host does not give.
    pub(crate) fn controllers(&self) -> (&[&'static str], Vec<&'static str>) {
        let missing = CONTROLLERS.into_iter().filter(|name| !self.controllers.contains(name));
        (&self.controllers, missing.collect())
    }

    fn is_complete(&self) -> bool {
        self.controllers().1.is_empty()
    }

    /// Kills every worker there is, whatever it is doing; one write, however many they are.
    pub(crate) fn kill_workers(&self) {
        // Before Linux 5.14 there is no such file, and they are killed one by one.
        drop(fs::write(self.workers.join("cgroup.kill"), "1"));
    }

    /// A group for all compilations.
    ///
    /// # Errors
    /// The kernel refused it or one of its limits.
    pub(crate) fn for_compilations(&self, limits: Limits) -> io::Result<Group> {
        // Killing one compiler for want of memory is enough.
        self.group("compile", limits, false)
    }

    /// A group for the workers of one policy, which are ended together if their memory does
    /// not suffice.
    ///
    /// # Errors
    /// The kernel refused it or one of its limits.
    pub(crate) fn for_policy(&self, name: &str, limits: Limits) -> io::Result<Group> {
        // With a prefix, no name is that of a file which the kernel makes there.
        self.group(&format!("p.{name}"), limits, true)
    }

    fn group(&self, name: &str, limits: Limits, together: bool) -> io::Result<Group> {
        let path = self.workers.join(name);
        make(&path)?;
        let directory = open(&path, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let group =
            Group(Arc::new(Directory { path, descriptor: directory, bounded: self.is_complete() }));
        for controller in &self.controllers {
            match *controller {
                "memory" => {
                    group.set("memory.max", limits.memory_bytes)?;
                    group.set("memory.oom.group", u64::from(together))?;
                    // Only where swap is accounted. Memory that is swapped out is slow for
                    // everybody.
                    drop(group.set("memory.swap.max", 0));
                }
                "pids" => group.set("pids.max", limits.processes)?,
                // Everybody's weight is the default one, which divides evenly.
                _ => {}
            }
        }
        Ok(group)
    }
}

/// The directory of this process's group in the unified hierarchy.
fn own_group(membership: &str, mounts: &str) -> Option<PathBuf> {
    let group = membership.lines().find_map(|line| line.strip_prefix("0::"))?;
    let (root, mount_point) = unified_mount(mounts)?;
    let below = Path::new(group).strip_prefix(root).ok()?;
    Some(Path::new(mount_point).join(below))
}

/// Where the unified hierarchy is mounted, if its root is.
pub(crate) fn mount_point() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let (root, mount_point) = unified_mount(&mounts)?;
    (root == "/").then(|| PathBuf::from(mount_point))
}

/// The mount of the unified hierarchy: which part of it, and where.
fn unified_mount(mounts: &str) -> Option<(&str, &str)> {
    // ID PARENT DEVICE ROOT MOUNTPOINT OPTIONS... - TYPE SOURCE SUPEROPTIONS
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let place = (fields.next()?, fields.next()?);
        after.starts_with("cgroup2 ").then_some(place)
    })
}

/// Makes a group, or keeps the one that a predecessor left.
fn make(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// A control group of workers; removed with its last handle.
#[derive(Debug, Clone)]
pub(crate) struct Group(Arc<Directory>);

#[derive(Debug)]
struct Directory {
    path: PathBuf,
    descriptor: OwnedFd,
    /// Whether it has all the controllers.
    bounded: bool,
}

impl Group {
    /// Whether it bounds memory, processes and processor time.
    pub(crate) fn is_bounded(&self) -> bool {
        self.0.bounded
    }

    /// How often the kernel has killed a process of the group for want of memory.
    pub(crate) fn memory_kills(&self) -> u64 {
        let events = fs::read_to_string(self.0.path.join("memory.events")).unwrap_or_default();
        let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }

    fn set(&self, file: &str, value: u64) -> io::Result<()> {
        let path = self.0.path.join(file);
        let written = File::options()
            .write(true)
            .open(&path)
            .and_then(|mut file| io::Write::write_all(&mut file, value.to_string().as_bytes()));
        written
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.descriptor.as_fd()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // A process that is not reaped yet keeps it; then it stays, empty, until the service ends.
        drop(fs::remove_dir(&self.path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
24 1 8:1 / / rw,relatime - ext4 /dev/root rw
30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
31 24 0:27 / /proc rw - proc proc rw
";

    #[test]
    fn the_group_of_a_service_lies_below_the_mount() {
        let found = own_group("0::/system.slice/conclave.service\n", MOUNTS);
        assert_eq!(found, Some(PathBuf::from("/sys/fs/cgroup/system.slice/conclave.service")));
    }

    #[test]
    fn with_both_hierarchies_the_unified_one_counts() {
        let membership = "12:memory:/x\n1:name=systemd:/y\n0::/z\n";
        let mounts = MOUNTS.replace("/sys/fs/cgroup rw", "/sys/fs/cgroup/unified rw");
        let found = own_group(membership, &mounts);
        assert_eq!(found, Some(PathBuf::from("/sys/fs/cgroup/unified/z")));
    }

    #[test]
    fn a_mount_of_a_part_of_the_hierarchy_shows_that_part() {
        let mounts = MOUNTS.replace("0:26 / ", "0:26 /machine ");
        assert_eq!(own_group("0::/machine/a\n", &mounts), Some(PathBuf::from("/sys/fs/cgroup/a")));
        // A group outside the part can't be reached.
        assert_eq!(own_group("0::/other\n", &mounts), None);
    }

    #[test]
    fn without_the_unified_hierarchy_there_is_no_group() {
        assert_eq!(own_group("3:memory:/x\n", MOUNTS), None);
        assert_eq!(own_group("0::/x\n", "24 1 8:1 / / rw - ext4 /dev/root rw\n"), None);
    }
}
