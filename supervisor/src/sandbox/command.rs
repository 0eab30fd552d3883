//! `conclave sandbox`: what this host gives to lock workers up with, or what the workers of a
//! running daemon are locked up with. Either is asked of the kernel, with live workers.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use conclave_ipc::limits::{
    COMPILE_MEMORY_BYTES, GUEST_MEMORY_BYTES_DEFAULT, ZYGOTE_PROCESSES_MAX,
};
use conclave_ipc::message::{Contract, Load};
use conclave_ipc::{Phase, Role};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::{Gid, Pid, Uid};
use thiserror::Error;
use tokio::time::Instant;

use super::evidence::{Observer, descendants_of};
use super::report::{HostReport, LiveReport, Trial};
use crate::cgroup::{Group, Limits};
use crate::cli::SandboxOptions;
use crate::code::{request_code, request_load};
use crate::identity::{self, IdentityError};
use crate::image::{Draft, Image};
use crate::process::{Process, WorkerError};
use crate::spawn::{Spawner, Start};
use crate::startup::{self, StartupError};
use crate::zygote::can_fork;

/// A module that exports a function `_start`, which does nothing: its sections for types,
/// functions, exports and code.
const NOTHING: &[u8] = b"\0asm\x01\0\0\0\
    \x01\x04\x01\x60\0\0\
    \x03\x02\x01\0\
    \x07\x0a\x01\x06_start\0\0\
    \x0a\x04\x01\x02\0\x0b";

/// Compiling [`NOTHING`] takes milliseconds.
const COMPILE_TIME_MAX: Duration = Duration::from_secs(10);

/// What the trial workers of all phases may use together.
const TRIAL_LIMITS: Limits = Limits { memory_bytes: COMPILE_MEMORY_BYTES, processes: 4 };

/// Why there is no report, or none to be content with.
#[derive(Debug, Error)]
pub(crate) enum SandboxCommandError {
    /// The process can't run workers.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// A trial worker failed.
    #[error("no worker can be locked up here: {0}")]
    Trial(#[from] WorkerError),
    /// A step on the way to the report failed.
    #[error("can't {0}: {1}")]
    Step(&'static str, io::Error),
    /// Nobody listens there.
    #[error("can't reach a daemon at {}: {cause}", .socket.display())]
    Daemon { socket: PathBuf, cause: io::Error },
    /// The daemon's user can't be become.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The report was printed, and it is not good.
    #[error("{0}")]
    Incomplete(String),
}

fn step(what: &'static str) -> impl FnOnce(io::Error) -> SandboxCommandError {
    move |error| SandboxCommandError::Step(what, error)
}

/// Prints the report.
///
/// # Errors
/// There is none, or a required layer is missing in it.
pub(crate) fn run(options: &SandboxOptions) -> Result<(), SandboxCommandError> {
    let (text, verdict) = match &options.daemon {
        Some(socket) => {
            let report = live_report(socket)?;
            (if options.json { report.json() } else { report.text() }, report.verdict())
        }
        None => {
            let prepared = startup::prepare(&options.program)?;
            let runtime = startup::runtime()?;
            let report = runtime.block_on(host_report(prepared.spawner()))?;
            (if options.json { report.json() } else { report.text() }, report.verdict())
        }
    };
    writeln!(io::stdout(), "{}", text.trim_end()).map_err(step("print the report"))?;
    verdict.map_err(SandboxCommandError::Incomplete)
}

/// Looks at the workers of the daemon that listens there, as the daemon's own user if we are
/// root.
fn live_report(socket: &Path) -> Result<LiveReport, SandboxCommandError> {
    let unreachable = |cause| SandboxCommandError::Daemon { socket: socket.to_owned(), cause };
    let stream = UnixStream::connect(socket).map_err(unreachable)?;
    let peer = getsockopt(&stream, PeerCredentials)
        .map_err(|error| SandboxCommandError::Step("learn who listens", error.into()))?;
    drop(stream);
    identity::become_owner(Uid::from_raw(peer.uid()), Gid::from_raw(peer.gid()))?;
    let daemon = Pid::from_raw(peer.pid());
    let observer = Observer::new(daemon).map_err(step("look at the daemon"))?;
    let descendants = descendants_of(daemon).map_err(step("list processes"))?;
    let workers = descendants.into_iter().filter_map(|pid| observer.look_at_settled(pid)).collect();
    Ok(LiveReport { daemon, uid: peer.uid(), workers })
}

/// Takes one worker through each phase and looks at it there.
async fn host_report(spawner: &Spawner) -> Result<HostReport, SandboxCommandError> {
    let delegation = startup::take_control_group();
    let group = delegation.as_ref().map(|groups| groups.for_policy("trial", TRIAL_LIMITS));
    let group = group.transpose().map_err(step("make a control group"))?;
    let observer = Observer::new(Pid::this()).map_err(step("look at this process"))?;
    let (compile, code) = try_compiling(spawner, &observer, group.as_ref()).await?;
    let group = group.as_ref();
    let [load, serve] = try_loading(spawner, &observer, group, &code, Role::Serve).await?;
    let mut trials = vec![compile, load];
    if can_fork(serve.report.layers) {
        let [_, zygote] = try_loading(spawner, &observer, group, &code, Role::Snapshot).await?;
        trials.push(zygote);
    }
    trials.push(serve);
    Ok(HostReport { trials })
}

async fn try_compiling(
    spawner: &Spawner,
    observer: &Observer,
    group: Option<&Group>,
) -> Result<(Trial, Image), SandboxCommandError> {
    let no_memory = step("make a memory file");
    let module = Image::of(NOTHING).map_err(no_memory)?;
    let output = Draft::new().map_err(step("make a memory file"))?;
    let start = Start {
        role: Role::Compile,
        label: "trial",
        image: Some(module.as_fd()),
        output: Some(output.as_fd()),
        group,
    };
    let (mut process, report) = Process::start(spawner, start).await?;
    let seen = observer.look_at(process.pid());
    process.until(Instant::now() + COMPILE_TIME_MAX, request_code).await?;
    process.end().await;
    let code = output.seal().map_err(step("seal the code"))?;
    Ok((Trial { phase: Phase::Compile, report, seen }, code))
}

/// A worker of that role, before it has loaded the code and thereafter.
async fn try_loading(
    spawner: &Spawner,
    observer: &Observer,
    group: Option<&Group>,
    code: &Image,
    role: Role,
) -> Result<[Trial; 2], SandboxCommandError> {
    let start = Start { role, image: Some(code.as_fd()), group, ..Start::TRIAL };
    let (mut process, report) = Process::start(spawner, start).await?;
    let seen = observer.look_at(process.pid());
    let load = Trial { phase: Phase::Load, report, seen };
    let forks = role == Role::Snapshot;
    let order = Load {
        processes_max: if forks { ZYGOTE_PROCESSES_MAX } else { 0 },
        can_be_set_back: false,
        contract: Contract::Wasi,
        settings: b"{}",
        entrypoint: None,
        strict_builtin_errors: false,
        runs_at_instantiation: false,
        memory_bytes_max: GUEST_MEMORY_BYTES_DEFAULT,
        seal_code: spawner.seals_code,
    };
    let report = request_load(&mut process, order).await?;
    let seen = observer.look_at(process.pid());
    let phase = if forks { Phase::Zygote } else { Phase::Serve };
    process.end().await;
    Ok([load, Trial { phase, report, seen }])
}
