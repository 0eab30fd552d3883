//! The supervisor: the daemon, its command line, and everything that decides.
//!
//! This is a library so that fuzzing can reach what reads foreign bytes. [`main`] is all that
//! it offers otherwise.
#![deny(unsafe_code)]

mod admission;
mod allocator;
mod cache;
mod cgroup;
mod cli;
mod code;
mod config;
#[cfg(fuzzing)]
pub mod fuzzing;
mod guest_log;
mod host_calls;
mod host_capabilities;
mod http;
mod identity;
mod image;
mod json_object;
mod listen;
mod log;
mod metadata;
mod placement;
mod policy;
mod pool;
mod process;
mod run;
mod sandbox;
mod serve;
mod spawn;
mod startup;
mod warmup;
mod zygote;

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use nix::unistd::geteuid;

use cli::{Cli, Command, LogLevel};

/// Runs the command line that this process was started with to its end.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let was_root = geteuid().is_root();
    let default_level = match cli.command {
        Command::Serve(_) => LogLevel::Info,
        Command::Run(_) | Command::Sandbox(_) => LogLevel::Warn,
    };
    let log = match log::start(&cli.log, default_level) {
        Ok(log) => log,
        Err(error) => {
            complain(&error, was_root);
            return ExitCode::FAILURE;
        }
    };
    let result: Result<(), Box<dyn Error>> = match &cli.command {
        Command::Serve(options) => serve::run(options).map_err(Into::into),
        Command::Run(options) => run::run(options).map_err(Into::into),
        Command::Sandbox(options) => sandbox::command::run(options).map_err(Into::into),
    };
    let code = match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&*error, was_root);
            ExitCode::FAILURE
        }
    };
    // Writes the lines that still wait.
    drop(log);
    code
}

/// Why the command failed, on standard error whatever the log level is. This line is all there
/// is to print, for it is the rule of this program that the `Display` of an error names the
/// cause itself. So no field is a `#[source]`, or called `source`, which thiserror takes for one.
#[expect(clippy::print_stderr, reason = "the last words of a command line program")]
fn complain(error: &dyn Error, was_root: bool) {
    let text = error.to_string();
    eprintln!("conclave: {text}");
    if was_root && text.contains("Permission denied") {
        eprintln!(
            "conclave: root was given up first; files must be within reach of the user that --user \
             names (by itself: conclave, else nobody)"
        );
    }
}
