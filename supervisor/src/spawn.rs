//! The only place that starts a process.
//!
//! Workers are cloned from one thread that lives as long as the supervisor, because the
//! kernel ties a worker's parent-death signal to the thread that made it. Between clone
//! and exec the child makes system calls and nothing else: no allocation, no lock.
#![expect(unsafe_code, reason = "clone and execveat have no safe form")]

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use conclave_ipc::layers::{Layer, Layers};
use conclave_ipc::{CHANNEL_FD, IMAGE_FD, OUTPUT_FD, Role};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, clone};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, getegid, geteuid, setsid, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

/// Where the program to execute waits for `execveat`; closed by it.
const PROGRAM_FD: RawFd = 6;

/// Stack of the child between clone and exec: a few frames of system calls.
const CHILD_STACK_BYTES: usize = 64 << 10;

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
    /// The namespaces that it was born into.
    pub(crate) namespaces: Layers,
}

struct Order {
    role: Role,
    image: Option<OwnedFd>,
    output: Option<OwnedFd>,
    reply: oneshot::Sender<io::Result<Spawned>>,
}

/// A handle to the spawning thread.
#[derive(Debug, Clone)]
pub(crate) struct Spawner {
    orders: mpsc::Sender<Order>,
    living: Living,
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
        let mut forge = Forge { program, namespaces: offered_namespaces(), null: null()? };
        thread::Builder::new().name("spawner".to_owned()).spawn(move || {
            while let Some(order) = inbox.blocking_recv() {
                let spawned = forge.spawn(order.role, order.image.as_ref(), order.output.as_ref());
                // If nobody waits any more, dropping the worker ends it.
                drop(order.reply.send(spawned));
            }
        })?;
        Ok(Self { orders, living: Living(watch::Sender::new(0)) })
    }

    /// Counts the workers.
    pub(crate) fn living(&self) -> &Living {
        &self.living
    }

    /// Starts a worker.
    ///
    /// # Errors
    /// The kernel refused.
    pub(crate) async fn spawn(
        &self,
        role: Role,
        image: Option<BorrowedFd<'_>>,
        output: Option<BorrowedFd<'_>>,
    ) -> io::Result<Spawned> {
        let own = |fd: Option<BorrowedFd<'_>>| fd.map(|fd| fd.try_clone_to_owned()).transpose();
        let (reply, spawned) = oneshot::channel();
        let order = Order { role, image: own(image)?, output: own(output)?, reply };
        self.orders
            .send(order)
            .await
            .map_err(|_closed| io::Error::other("spawning thread is gone"))?;
        spawned.await.map_err(io::Error::other)?
    }
}

fn null() -> io::Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open("/dev/null")?.into())
}

/// The spawning thread's own state.
struct Forge {
    program: Program,
    namespaces: Layers,
    null: OwnedFd,
}

impl Forge {
    fn spawn(
        &mut self,
        role: Role,
        image: Option<&OwnedFd>,
        output: Option<&OwnedFd>,
    ) -> io::Result<Spawned> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let namespaced = self.namespaces.contains(Layer::UserNamespace);
        let argv = [c"conclave-worker".to_owned(), CString::new(role.as_str())?]
            .into_iter()
            .chain([if namespaced { c"namespaces".to_owned() } else { c"plain".to_owned() }])
            .collect::<Vec<_>>();
        let plan = Plan {
            argv: argv.iter().map(|word| word.as_ptr()).chain([std::ptr::null()]).collect(),
            identity: namespaced.then(Identity::current).transpose()?,
            descriptors: [
                (self.null.as_raw_fd(), Some(0)),
                (self.null.as_raw_fd(), Some(1)),
                (self.null.as_raw_fd(), Some(2)),
                (theirs.as_raw_fd(), Some(CHANNEL_FD)),
                (image.unwrap_or(&self.null).as_raw_fd(), Some(IMAGE_FD)),
                (output.unwrap_or(&self.null).as_raw_fd(), Some(OUTPUT_FD)),
                (self.program.0.as_raw_fd(), Some(PROGRAM_FD)),
            ]
            .map(|(from, to)| (from, to.unwrap_or(from))),
            closed_from: if output.is_some() { PROGRAM_FD } else { OUTPUT_FD },
        };
        let pid = clone_child(clone_flags(self.namespaces), &mut || plan.become_worker())?;
        let pidfd = open_pidfd(pid)?;
        Ok(Spawned { pid, pidfd, channel: ours, namespaces: self.namespaces })
    }
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

/// Clones, fork-like: the child has a copy of the memory and runs `child` to its end.
fn clone_child(flags: CloneFlags, child: &mut dyn FnMut() -> isize) -> io::Result<Pid> {
    let mut stack = vec![0_u8; CHILD_STACK_BYTES];
    // SAFETY: without CLONE_VM the child shares no memory with this process. What it runs
    // makes system calls only: it takes no lock and allocates nothing that another thread
    // of the parent might have held at that moment.
    let pid = unsafe { clone(Box::new(child), &mut stack, flags, Some(Signal::SIGCHLD as i32)) }?;
    Ok(pid)
}

fn open_pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it. The
    // number of the process was not reused, for only we can reap our child.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
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
    /// Which descriptor becomes which; targets ascend from 0 without a gap.
    descriptors: [(RawFd, RawFd); 7],
    /// The first number that must not be open in the worker.
    closed_from: RawFd,
}

impl Plan {
    /// Runs in the child; returns only on failure, with the exit code.
    fn become_worker(&self) -> isize {
        let step = match self.try_become_worker() {
            Ok(never) => match never {},
            Err(step) => step,
        };
        (SPAWN_FAILED_BASE as isize).saturating_add(step as isize)
    }

    fn try_become_worker(&self) -> Result<std::convert::Infallible, Step> {
        if let Some(identity) = &self.identity {
            identity.apply().map_err(failed(Step::Identity))?;
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

/// The namespaces that work here for this user, tried one by one.
fn offered_namespaces() -> Layers {
    let user = Layers::NONE.with(Layer::UserNamespace);
    let mount = user.with(Layer::MountNamespace);
    // Some hosts give out user namespaces whose privileges are void. Without an empty
    // root the others are worth little, so it is both or nothing.
    if !works(mount) {
        return Layers::NONE;
    }
    NAMESPACES
        .into_iter()
        .map(|(layer, _)| layer)
        .filter(|layer| works(user.with(*layer)))
        .fold(mount, Layers::with)
}

fn works(layers: Layers) -> bool {
    let Ok(identity) = Identity::current() else { return false };
    let mut child = || match try_namespaces(&identity, layers) {
        Ok(()) => 0,
        Err(step) => step as isize,
    };
    match clone_child(clone_flags(layers), &mut child) {
        Ok(pid) => matches!(waitpid(pid, None), Ok(WaitStatus::Exited(_, 0))),
        Err(_) => false,
    }
}

/// Runs in the child.
fn try_namespaces(identity: &Identity, layers: Layers) -> Result<(), Step> {
    identity.apply().map_err(failed(Step::Identity))?;
    if layers.contains(Layer::MountNamespace) {
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .map_err(failed(Step::Privileges))?;
    }
    Ok(())
}
