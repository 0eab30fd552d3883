//! The confinement, in order. Every step takes something away; a step that the host does
//! not offer is left out of the report and is for the supervisor to judge, a step that
//! fails otherwise ends the worker.
//!
//! The supervisor has already given the process its namespaces, an empty environment and
//! nothing but the numbered descriptors. [`lock`] does the rest up to the loading filter;
//! [`Confined::seal`] closes the door behind the loaded code.

mod descriptors;
mod filesystem;
mod landlock;
mod memory;
mod privileges;
mod resources;
mod speculation;
mod syscalls;
mod violation;
mod zygote;

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use conclave_ipc::Role;
use conclave_ipc::layers::{Layer, Layers};
use conclave_ipc::message::Confinement;
use seccompiler::sock_filter;

pub use syscalls::Filter;
pub use zygote::reap;

/// The worker's command line: `ROLE namespaces|plain LABEL`. The label is for whoever lists
/// processes; it says what the worker works on.
#[derive(Debug, Clone, Copy)]
pub struct Arguments {
    /// What the process is for.
    pub role: Role,
    /// Whether the supervisor gave the process its own user and mount namespace.
    pub namespaces: bool,
}

impl Arguments {
    /// The arguments after the program's name, if they are exactly right.
    pub fn parse(mut words: impl Iterator<Item = String>) -> Option<Self> {
        let role = Role::from_arg(&words.next()?)?;
        let namespaces = match words.next()?.as_str() {
            "namespaces" => true,
            "plain" => false,
            _ => return None,
        };
        let _label = words.next()?;
        words.next().is_none().then_some(Self { role, namespaces })
    }
}

/// Which of the steps down are taken. The program that ships takes all of them and is compiled
/// for [`Complete`] alone; what the tests run leaves one out to see what the others stop.
pub trait Ladder {
    /// Whether the steps that make this layer are taken.
    fn has(&self, _layer: Layer) -> bool {
        true
    }

    /// What a filter lets through.
    fn program(&self, filter: Filter) -> Vec<sock_filter> {
        filter.program()
    }
}

/// Every step.
#[derive(Debug, Clone, Copy)]
pub struct Complete;

impl Ladder for Complete {}

/// Proof that [`lock`] has run to its end; made nowhere else.
#[derive(Debug)]
pub struct Confined {
    report: Confinement,
    role: Role,
}

/// Proof that the serving filter is on; made nowhere but on the last rung.
#[derive(Debug)]
pub struct Sealed {
    report: Confinement,
}

/// Proof that a zygote's filter is on; made nowhere but in [`Confined::seal_zygote`].
#[derive(Debug)]
pub struct Zygote {
    report: Confinement,
}

/// Which step of the confinement failed, and how.
#[derive(Debug)]
pub struct ConfineError {
    step: &'static str,
    source: io::Error,
}

impl ConfineError {
    fn at(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { step, source }
    }
}

impl fmt::Display for ConfineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.source)
    }
}

impl std::error::Error for ConfineError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// The channel to the supervisor, once.
///
/// # Errors
/// The process was not started by a supervisor.
pub fn channel() -> io::Result<UnixStream> {
    descriptors::channel()
}

/// Locks the process up as far as it can be before its code is loaded.
///
/// # Errors
/// The first step that fails although the host offers it.
pub fn lock(arguments: &Arguments, ladder: &impl Ladder) -> Result<Confined, ConfineError> {
    let mut layers = Layers::NONE;
    // Before anything else, so that no later step can be undone by an executed file.
    if ladder.has(Layer::NoNewPrivileges) {
        nix::sys::prctl::set_no_new_privs()
            .map_err(io::Error::from)
            .map_err(ConfineError::at("no_new_privs"))?;
        layers = layers.with(Layer::NoNewPrivileges);
    }

    // Needs the capabilities that the user namespace gave; the next step drops them.
    if arguments.namespaces && ladder.has(Layer::EmptyRoot) {
        filesystem::enter_empty_root().map_err(ConfineError::at("empty root"))?;
        layers = layers.with(Layer::EmptyRoot);
    }
    if ladder.has(Layer::NoCapabilities)
        && privileges::drop_all().map_err(ConfineError::at("capabilities"))?
    {
        layers = layers.with(Layer::NoCapabilities);
    }

    // After the last change of credentials, which would reset both.
    if ladder.has(Layer::NotDumpable) {
        privileges::hide().map_err(ConfineError::at("dumpable"))?;
        layers = layers.with(Layer::NotDumpable);
    }
    if ladder.has(Layer::ParentDeathSignal) {
        privileges::die_with_parent().map_err(ConfineError::at("parent-death signal"))?;
        layers = layers.with(Layer::ParentDeathSignal);
    }
    if ladder.has(Layer::BranchBarrier) && speculation::separate_branch_predictions() {
        layers = layers.with(Layer::BranchBarrier);
    }

    let mut landlock_abi = 0;
    if ladder.has(Layer::Landlock) {
        landlock_abi = landlock::forbid_everything().map_err(ConfineError::at("landlock"))?;
        if landlock_abi > 0 {
            layers = layers.with(Layer::Landlock);
        }
    }
    if ladder.has(Layer::ResourceLimits) {
        resources::limit(arguments.role).map_err(ConfineError::at("resource limits"))?;
        layers = layers.with(Layer::ResourceLimits);
    }

    // Nothing writes to these; a panic is told by the exit code.
    descriptors::close_standard_streams().map_err(ConfineError::at("standard streams"))?;

    let filter = match arguments.role {
        Role::Compile => {
            // It only writes code; who runs code has to wait until it is mapped.
            layers = layers.union(deny_write_execute(ladder)?);
            Filter::Compile
        }
        Role::Serve | Role::Snapshot => Filter::Load,
    };
    // Last: the steps above need calls that no filter allows.
    if ladder.has(Layer::SyscallFilter) {
        violation::report().map_err(ConfineError::at("handler of SIGSYS"))?;
        syscalls::install(&ladder.program(filter))
            .map_err(ConfineError::at("system call filter"))?;
        layers = layers.with(Layer::SyscallFilter);
    }
    let report = Confinement { layers, landlock_abi };
    Ok(Confined { report, role: arguments.role })
}

fn deny_write_execute(ladder: &impl Ladder) -> Result<Layers, ConfineError> {
    let denied = ladder.has(Layer::WriteExecuteDenied)
        && memory::deny_write_execute().map_err(ConfineError::at("write-execute"))?;
    Ok(if denied { Layers::NONE.with(Layer::WriteExecuteDenied) } else { Layers::NONE })
}

impl Confined {
    /// What is on so far.
    #[must_use]
    pub fn report(&self) -> Confinement {
        self.report
    }

    /// The image that the supervisor handed over: code to serve, or a module to compile.
    #[must_use]
    pub fn image(&self) -> File {
        descriptors::image()
    }

    /// What the process is for.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// The memory file that is the worker's to fill, once.
    ///
    /// # Errors
    /// The supervisor passed none.
    pub fn output(&self) -> io::Result<File> {
        descriptors::output()
    }

    /// Closes the door behind the loaded code: from here on nothing executable can be
    /// mapped, private memory is bounded by `data_bytes_max`, and no descriptor can be opened.
    /// `code` is where code lies that is to be sealed; it must stay there until the process ends.
    ///
    /// # Errors
    /// The first step that fails although the host offers it.
    pub fn seal(
        self,
        data_bytes_max: u64,
        code: Option<Range<*const u8>>,
        ladder: &impl Ladder,
    ) -> Result<Sealed, ConfineError> {
        let report = self.close_off(data_bytes_max, code, ladder)?;
        serve_only(report, ladder)
    }

    /// Does the same, but leaves what a process needs that is forked for every worker, until
    /// there are `processes_max`, itself included.
    ///
    /// # Errors
    /// As for [`Confined::seal`].
    pub fn seal_zygote(
        self,
        data_bytes_max: u64,
        processes_max: u16,
        code: Option<Range<*const u8>>,
        ladder: &impl Ladder,
    ) -> Result<Zygote, ConfineError> {
        if ladder.has(Layer::ResourceLimits) {
            resources::limit_processes(processes_max).map_err(ConfineError::at("process limit"))?;
        }
        let report = self.close_off(data_bytes_max, code, ladder)?;
        if ladder.has(Layer::SyscallFilter) {
            syscalls::install(&ladder.program(Filter::Zygote))
                .map_err(ConfineError::at("zygote's filter"))?;
        }
        Ok(Zygote { report })
    }

    /// What both have in common; the filter comes last.
    fn close_off(
        &self,
        data_bytes_max: u64,
        code: Option<Range<*const u8>>,
        ladder: &impl Ladder,
    ) -> Result<Confinement, ConfineError> {
        let mut report = self.report;
        if ladder.has(Layer::ResourceLimits) {
            resources::limit_data(data_bytes_max).map_err(ConfineError::at("memory limit"))?;
        }
        // Not earlier: publishing the code makes written memory executable.
        report.layers = report.layers.union(deny_write_execute(ladder)?);
        if let Some(code) = code.filter(|_| ladder.has(Layer::CodeSealed))
            && memory::seal_code(&code).map_err(ConfineError::at("sealing the code"))?
        {
            report.layers = report.layers.with(Layer::CodeSealed);
        }
        Ok(report)
    }
}

/// The last rung of everyone who evaluates requests.
fn serve_only(report: Confinement, ladder: &impl Ladder) -> Result<Sealed, ConfineError> {
    if ladder.has(Layer::ResourceLimits) {
        // Not earlier: creating the Landlock ruleset and mapping code need descriptors.
        resources::forbid_more().map_err(ConfineError::at("process and descriptor limit"))?;
    }
    if ladder.has(Layer::SyscallFilter) {
        syscalls::install(&ladder.program(Filter::Serve))
            .map_err(ConfineError::at("serving filter"))?;
    }
    Ok(Sealed { report })
}

impl Zygote {
    /// All that is on.
    #[must_use]
    pub fn report(&self) -> Confinement {
        self.report
    }

    /// Forks. The new process has this channel and no other descriptor that leads anywhere, and
    /// may do no more than any worker that serves.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn fork(&self, channel: OwnedFd, ladder: &impl Ladder) -> Result<Side, ConfineError> {
        if let Some(child) = zygote::fork().map_err(ConfineError::at("fork"))? {
            return Ok(Side::Zygote { child });
        }
        Ok(Side::Worker(self.become_worker(channel, ladder)))
    }

    fn become_worker(
        &self,
        channel: OwnedFd,
        ladder: &impl Ladder,
    ) -> Result<Sealed, ConfineError> {
        descriptors::exchange_channel(&channel).map_err(ConfineError::at("channel"))?;
        drop(channel);
        if ladder.has(Layer::ParentDeathSignal) {
            // A copy does not inherit it.
            privileges::die_with_parent().map_err(ConfineError::at("parent-death signal"))?;
        }
        serve_only(self.report, ladder)
    }
}

/// Which of two processes this is, after a fork.
#[derive(Debug)]
pub enum Side {
    /// The one that was there before.
    Zygote {
        /// The new one, by its number in this namespace.
        child: u32,
    },
    /// The new one, if it could be locked up.
    Worker(Result<Sealed, ConfineError>),
}

impl Sealed {
    /// All that is on.
    #[must_use]
    pub fn report(&self) -> Confinement {
        self.report
    }
}
