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
mod syscalls;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;

use conclave_ipc::Role;
use conclave_ipc::layers::{Layer, Layers};
use conclave_ipc::message::Confinement;

/// The worker's command line: `ROLE namespaces|plain`.
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
        words.next().is_none().then_some(Self { role, namespaces })
    }
}

/// Proof that [`lock`] has run to its end; made nowhere else.
#[derive(Debug)]
pub struct Confined {
    report: Confinement,
    role: Role,
}

/// Proof that the serving filter is on; made nowhere but in [`Confined::seal`].
#[derive(Debug)]
pub struct Sealed {
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
pub fn lock(arguments: &Arguments) -> Result<Confined, ConfineError> {
    let mut layers = Layers::NONE;
    // Before anything else, so that no later step can be undone by an executed file.
    nix::sys::prctl::set_no_new_privs()
        .map_err(io::Error::from)
        .map_err(ConfineError::at("no_new_privs"))?;
    layers = layers.with(Layer::NoNewPrivileges);

    // Needs the capabilities that the user namespace gave; the next step drops them.
    if arguments.namespaces {
        filesystem::enter_empty_root().map_err(ConfineError::at("empty root"))?;
        layers = layers.with(Layer::EmptyRoot);
    }
    if privileges::drop_all().map_err(ConfineError::at("capabilities"))? {
        layers = layers.with(Layer::NoCapabilities);
    }

    // After the last change of credentials, which would reset both.
    privileges::hide_and_die_with_parent().map_err(ConfineError::at("prctl"))?;
    layers = layers.with(Layer::NotDumpable).with(Layer::ParentDeathSignal);

    let landlock_abi = landlock::forbid_everything().map_err(ConfineError::at("landlock"))?;
    if landlock_abi > 0 {
        layers = layers.with(Layer::Landlock);
    }
    resources::limit(arguments.role).map_err(ConfineError::at("resource limits"))?;
    layers = layers.with(Layer::ResourceLimits);

    // Nothing writes to these; a panic is told by the exit code.
    descriptors::close_standard_streams().map_err(ConfineError::at("standard streams"))?;

    // Last: the steps above need calls that no filter allows.
    let filter = match arguments.role {
        Role::Compile => syscalls::Filter::Compile,
        Role::Serve => syscalls::Filter::Load,
    };
    syscalls::install(filter).map_err(ConfineError::at("system call filter"))?;
    layers = layers.with(Layer::SyscallFilter);

    let report = Confinement { layers, landlock_abi };
    Ok(Confined { report, role: arguments.role })
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

    /// Where the compile role writes its result.
    #[must_use]
    pub fn output(&self) -> Option<File> {
        matches!(self.role, Role::Compile).then(descriptors::output)
    }

    /// Closes the door behind the loaded code: from here on nothing executable can be
    /// mapped, no descriptor opened, and private memory is bounded by `data_bytes_max`.
    ///
    /// # Errors
    /// The first step that fails although the host offers it.
    pub fn seal(self, data_bytes_max: u64) -> Result<Sealed, ConfineError> {
        let mut report = self.report;
        resources::limit_data(data_bytes_max).map_err(ConfineError::at("memory limit"))?;
        // Not earlier: creating the Landlock ruleset and mapping code need descriptors.
        resources::forbid_descriptors().map_err(ConfineError::at("descriptor limit"))?;
        // Not earlier: publishing the code makes written memory executable.
        if memory::deny_write_execute().map_err(ConfineError::at("write-execute"))? {
            report.layers = report.layers.with(Layer::WriteExecuteDenied);
        }
        syscalls::install(syscalls::Filter::Serve).map_err(ConfineError::at("serving filter"))?;
        Ok(Sealed { report })
    }
}

impl Sealed {
    /// All that is on.
    #[must_use]
    pub fn report(&self) -> Confinement {
        self.report
    }
}
