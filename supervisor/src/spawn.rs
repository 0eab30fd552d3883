//! The only place that starts a process.
//!
//! Workers are cloned from one thread that lives as long as the supervisor, because the
//! kernel ties a worker's parent-death signal to the thread that made it. Between clone
//! and exec the child makes system calls and nothing else: no allocation, no lock.
#![expect(unsafe_code, reason = "clone3 and execveat have no safe form")]

mod offered;

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use conclave_ipc::layers::{Layer, Layers};
use conclave_ipc::{CHANNEL_FD, IMAGE_FD, OUTPUT_FD, Role};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sched::CloneFlags;
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, getegid, geteuid, setsid, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

use crate::cgroup::Group;

/// Where the program to execute waits for `execveat`; closed by it.
const PROGRAM_FD: RawFd = 6;

/// Forbids a user namespace within the one of the process that writes it; namespaces of all
/// other kinds need one (namespaces(7)).
const NESTING: &CStr = c"/proc/sys/user/max_user_namespaces";

/// Not in a form that fits in libc.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Whether messages on a Unix socket may bring descriptors along (Linux 6.16); not yet in libc.
const SO_PASSRIGHTS: libc::c_int = 83;

/// Orders that may wait for the spawning thread; each holds descriptors. Further ones wait
/// to be placed.
const ORDERS_MAX: usize = 64;

/// Exit code of a child that could not become a worker; plus a [`Step`].
const SPAWN_FAILED_BASE: i32 = 200;

/// What a child was doing when it failed; told by its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
enum Step {
    Identity = 1,
    Privileges,
    Descriptors,
    Execute,
}

/// What a worker's exit code says if it failed before it was a worker.
pub(crate) fn describe_failed_spawn(code: i32) -> Option<&'static str> {
    Some(match code.checked_sub(SPAWN_FAILED_BASE)? {
        1 => "could not map its identity into the user namespace",
        2 => "has no privileges in its user namespace",
        3 => "could not take its descriptors",
        4 => "could not be executed",
        _ => return None,
    })
}

/// Namespaces that a worker is born into, beside the user namespace that permits them.
const NAMESPACES: [(Layer, CloneFlags); 6] = [
    (Layer::MountNamespace, CloneFlags::CLONE_NEWNS),
    (Layer::PidNamespace, CloneFlags::CLONE_NEWPID),
    (Layer::NetworkNamespace, CloneFlags::CLONE_NEWNET),
    (Layer::IpcNamespace, CloneFlags::CLONE_NEWIPC),
    (Layer::UtsNamespace, CloneFlags::CLONE_NEWUTS),
    (Layer::CgroupNamespace, CloneFlags::CLONE_NEWCGROUP),
];

/// A worker process, seen from its parent. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    pub(crate) channel: UnixStream,
    /// The layers that it was born with.
    pub(crate) layers: Layers,
}

/// What a worker is started with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start<'a> {
    /// What it is for.
    pub(crate) role: Role,
    /// What it works on, for whoever lists processes.
    pub(crate) label: &'a str,
    /// What it reads.
    pub(crate) image: Option<BorrowedFd<'a>>,
    /// What it writes, in the compile and snapshot roles.
    pub(crate) output: Option<BorrowedFd<'a>>,
    /// The control group that it is born into.
    pub(crate) group: Option<&'a Group>,
}

impl Start<'_> {
    /// A serving worker that is never given anything.
    pub(crate) const TRIAL: Self =
        Self { role: Role::Serve, label: "trial", image: None, output: None, group: None };
}

struct Order {
    role: Role,
    label: CString,
    image: Option<OwnedFd>,
    output: Option<OwnedFd>,
    group: Option<OwnedFd>,
    /// Whether that group bounds all it should.
    bounded: bool,
    reply: oneshot::Sender<io::Result<Spawned>>,
}

/// A handle to the spawning thread.
#[derive(Debug, Clone)]
pub(crate) struct Spawner {
    orders: mpsc::Sender<Order>,
    living: Living,
    /// Whether workers can seal their code.
    pub(crate) seals_code: bool,
}

/// How many workers there are, from their start until they are reaped.
#[derive(Debug, Clone)]
pub(crate) struct Living(watch::Sender<usize>);

impl Living {
    /// Counts one worker for as long as the guard lives.
    pub(crate) fn enter(&self) -> LifeGuard {
        self.0.send_modify(|count| *count = count.saturating_add(1));
        LifeGuard(self.clone())
    }

    /// Returns when there is no worker any more.
    pub(crate) async fn none(&self) {
        // An error would mean that the sender is gone, but we hold one.
        drop(self.0.subscribe().wait_for(|count| *count == 0).await);
    }
}

/// One worker that is not reaped yet.
#[derive(Debug)]
pub(crate) struct LifeGuard(Living);

impl Drop for LifeGuard {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

/// The worker program, opened while its path could still be reached.
#[derive(Debug)]
pub(crate) struct Program(OwnedFd);

impl Program {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(File::open(path)?.into()))
    }

    pub(crate) fn try_clone(&self) -> io::Result<File> {
        Ok(File::from(self.0.try_clone()?))
    }
}

impl Spawner {
    /// Finds out which namespaces this host gives an ordinary user, and starts the
    /// spawning thread.
    ///
    /// # Errors
    /// The thread can't be started.
    pub(crate) fn start(program: Program) -> io::Result<Self> {
        let (orders, mut inbox) = mpsc::channel::<Order>(ORDERS_MAX);
        let mut forge = Forge { program, layers: offered::offered_layers(), null: null()? };
        thread::Builder::new().name("spawner".to_owned()).spawn(move || {
            while let Some(order) = inbox.blocking_recv() {
                let spawned = forge.spawn(&order);
                // If nobody waits any more, dropping the worker ends it.
                drop(order.reply.send(spawned));
            }
        })?;
        let seals_code = offered::sealing();
        Ok(Self { orders, living: Living(watch::Sender::new(0)), seals_code })
    }

    /// Counts the workers.
    pub(crate) fn living(&self) -> &Living {
        &self.living
    }

    /// Starts a worker.
    ///
    /// # Errors
    /// The kernel refused.
    pub(crate) async fn spawn(&self, start: Start<'_>) -> io::Result<Spawned> {
        let own = |fd: Option<BorrowedFd<'_>>| fd.map(|fd| fd.try_clone_to_owned()).transpose();
        let (reply, spawned) = oneshot::channel();
        let order = Order {
            role: start.role,
            label: CString::new(start.label)?,
            image: own(start.image)?,
            output: own(start.output)?,
            group: own(start.group.map(AsFd::as_fd))?,
            bounded: start.group.is_some_and(Group::is_bounded),
            reply,
        };
        self.orders
            .send(order)
            .await
            .map_err(|_closed| io::Error::other("spawning thread is gone"))?;
        spawned.await.map_err(io::Error::other)?
    }
}

/// Seals nothing, to see whether that may be asked for. Runs in a child.
fn seal_nothing() -> i32 {
    // SAFETY: an empty range at address 0 is sealed, which changes nothing.
    let result = unsafe { libc::syscall(libc::SYS_mseal, 0, 0, 0) };
    i32::from(result != 0)
}

fn null() -> io::Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open("/dev/null")?.into())
}

/// The spawning thread's own state.
struct Forge {
    program: Program,
    layers: Layers,
    null: OwnedFd,
}

impl Forge {
    fn spawn(&mut self, order: &Order) -> io::Result<Spawned> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        take_no_descriptors(&ours);
        let namespaced = self.layers.contains(Layer::UserNamespace);
        let argv = [
            c"conclave-worker".to_owned(),
            CString::new(order.role.as_str())?,
            if namespaced { c"namespaces".to_owned() } else { c"plain".to_owned() },
            order.label.clone(),
        ];
        let null = &self.null;
        let plan = Plan {
            argv: argv.iter().map(|word| word.as_ptr()).chain([std::ptr::null()]).collect(),
            identity: namespaced.then(Identity::current).transpose()?,
            no_nesting: self.layers.contains(Layer::NoNestedNamespaces),
            descriptors: [
                (null.as_raw_fd(), 0),
                (null.as_raw_fd(), 1),
                (null.as_raw_fd(), 2),
                (theirs.as_raw_fd(), CHANNEL_FD),
                (order.image.as_ref().unwrap_or(null).as_raw_fd(), IMAGE_FD),
                (order.output.as_ref().unwrap_or(null).as_raw_fd(), OUTPUT_FD),
                (self.program.0.as_raw_fd(), PROGRAM_FD),
            ],
            closed_from: if order.output.is_some() { PROGRAM_FD } else { OUTPUT_FD },
        };
        let flags = clone_flags(self.layers);
        let group = order.group.as_ref().map(AsFd::as_fd);
        let (pid, pidfd) = clone_child(flags, group, &mut || plan.become_worker())?;
        let grouped = order.bounded.then_some(Layer::ControlGroup);
        let layers = self.layers.union(grouped.into_iter().collect());
        Ok(Spawned { pid, pidfd, channel: ours, layers })
    }
}

/// Has the kernel refuse descriptors that a worker sends. One that can't drops them when the
/// message is read.
pub(crate) fn take_no_descriptors(channel: &UnixStream) {
    let off: libc::c_int = 0;
    let length = libc::socklen_t::try_from(size_of_val(&off)).unwrap_or_default();
    let fd = channel.as_raw_fd();
    // SAFETY: the option is an int, read from `off` before the call returns.
    unsafe {
        libc::setsockopt(fd, libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw const off).cast(), length)
    };
}

fn clone_flags(layers: Layers) -> CloneFlags {
    let user = (Layer::UserNamespace, CloneFlags::CLONE_NEWUSER);
    NAMESPACES
        .into_iter()
        .chain([user])
        .filter(|(layer, _)| layers.contains(*layer))
        .map(|(_, flag)| flag)
        .collect()
}

/// The arguments of `clone3`, its second version, which knows `cgroup` (Linux 5.7; clone(2)).
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Clones, fork-like: the child has a copy of the memory and runs `child` to its end. Gives its
/// number and a descriptor of it.
fn clone_child(
    flags: CloneFlags,
    group: Option<BorrowedFd<'_>>,
    child: &mut dyn FnMut() -> i32,
) -> io::Result<(Pid, OwnedFd)> {
    let wide = |flag: libc::c_int| u64::from(flag.cast_unsigned());
    let mut pidfd: RawFd = -1;
    let mut arguments = CloneArguments {
        flags: wide(flags.bits()) | wide(libc::CLONE_PIDFD),
        pidfd: (&raw mut pidfd).addr() as u64,
        exit_signal: wide(libc::SIGCHLD),
        ..CloneArguments::default()
    };
    if let Some(group) = group {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = wide(group.as_raw_fd());
    }
    // SAFETY: without CLONE_VM the child shares no memory with this process and goes on on a
    // copy of this stack. What it runs makes system calls only: it takes no lock and allocates
    // nothing that another thread of the parent might have held at that moment. The kernel
    // writes to `pidfd`, which outlives the call.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<CloneArguments>()) };
    match Errno::result(pid)? {
        0 => {
            let code = child();
            // SAFETY: ends the child at once; nothing of the parent's that it has a copy of
            // is cleared up twice.
            unsafe { libc::_exit(code) }
        }
        pid => {
            let pid = Pid::from_raw(libc::pid_t::try_from(pid).map_err(io::Error::other)?);
            // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
            Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
        }
    }
}

/// Registers a process descriptor with the runtime; it is readable once the process ended.
///
/// # Errors
/// The runtime can't watch it.
pub(crate) fn register(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` always gives the same open descriptor for as long as it lives,
    // and the `AsyncFd` owns it from here on.
    Ok(unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?)
}

/// Who a worker is in its user namespace: user and group 0 there, ourselves outside.
struct Identity {
    uid_map: CString,
    gid_map: CString,
}

impl Identity {
    fn current() -> io::Result<Self> {
        Ok(Self {
            uid_map: CString::new(format!("0 {} 1", geteuid()))?,
            gid_map: CString::new(format!("0 {} 1", getegid()))?,
        })
    }

    /// Runs in the child.
    fn apply(&self) -> nix::Result<()> {
        // The supervisor is not dumpable, and so are not its copies: their files below
        // /proc belong to root until this is lifted. The worker hides itself again.
        prctl::set_dumpable(true)?;
        put(c"/proc/self/setgroups", c"deny")?;
        put(c"/proc/self/uid_map", &self.uid_map)?;
        put(c"/proc/self/gid_map", &self.gid_map)
    }
}

fn put(path: &CStr, text: &CStr) -> nix::Result<()> {
    let file = open(path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    write(&file, text.to_bytes()).map(drop)
}

/// All that a child needs, made before it exists.
struct Plan {
    argv: Vec<*const libc::c_char>,
    identity: Option<Identity>,
    /// Whether the user namespace is closed to further ones.
    no_nesting: bool,
    /// Which descriptor becomes which; targets ascend from 0 without a gap.
    descriptors: [(RawFd, RawFd); 7],
    /// The first number that must not be open in the worker.
    closed_from: RawFd,
}

impl Plan {
    /// Runs in the child; returns only on failure, with the exit code.
    fn become_worker(&self) -> i32 {
        let step = match self.try_become_worker() {
            Ok(never) => match never {},
            Err(step) => step,
        };
        SPAWN_FAILED_BASE.saturating_add(step as i32)
    }

    fn try_become_worker(&self) -> Result<std::convert::Infallible, Step> {
        if let Some(identity) = &self.identity {
            identity.apply().map_err(failed(Step::Identity))?;
        }
        if self.no_nesting {
            put(NESTING, c"0").map_err(failed(Step::Privileges))?;
        }
        reset_signals().map_err(failed(Step::Descriptors))?;
        // A terminal's Ctrl-C is for the supervisor, which then ends its workers in order.
        setsid().map_err(failed(Step::Descriptors))?;
        self.take_descriptors().map_err(failed(Step::Descriptors))?;
        self.execute().map_err(failed(Step::Execute))
    }

    /// First all sources go above every target, then each to its number.
    fn take_descriptors(&self) -> nix::Result<()> {
        let mut lifted = [-1; 7];
        for ((from, _), place) in self.descriptors.iter().zip(&mut lifted) {
            // SAFETY: the descriptors stay open in the parent's plan while the child runs.
            let from = unsafe { BorrowedFd::borrow_raw(*from) };
            *place = fcntl(from, FcntlArg::F_DUPFD_CLOEXEC(PROGRAM_FD + 1))?;
        }
        for ((_, to), from) in self.descriptors.iter().zip(lifted) {
            let flags = if *to >= self.closed_from { libc::O_CLOEXEC } else { 0 };
            // SAFETY: dup3 takes numbers; it closes what had that number in this child,
            // which executes nothing that would use it.
            Errno::result(unsafe { libc::dup3(from, *to, flags) })?;
        }
        let first = libc::c_uint::try_from(PROGRAM_FD + 1).unwrap_or_default();
        // SAFETY: close_range takes numbers; nothing after this uses those descriptors.
        Errno::result(unsafe { libc::close_range(first, libc::c_uint::MAX, 0) })?;
        Ok(())
    }

    fn execute(&self) -> nix::Result<std::convert::Infallible> {
        let environment: [*const libc::c_char; 1] = [std::ptr::null()];
        // SAFETY: argv and the environment are arrays of pointers to strings that live in
        // the plan, each closed by a null pointer; the path is empty and static.
        unsafe {
            libc::syscall(
                libc::SYS_execveat,
                PROGRAM_FD,
                c"".as_ptr(),
                self.argv.as_ptr(),
                environment.as_ptr(),
                libc::AT_EMPTY_PATH,
            )
        };
        Err(Errno::last())
    }
}

fn failed(step: Step) -> impl FnOnce(Errno) -> Step {
    move |_| step
}

/// What is ignored or blocked would stay so in the worker.
fn reset_signals() -> nix::Result<()> {
    // SAFETY: the default action replaces the one that std set; no handler is installed.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}
