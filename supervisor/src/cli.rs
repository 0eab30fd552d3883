//! The command line: raw words in, checked values out.
#![forbid(unsafe_code)]

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use conclave_ipc::limits::REQUEST_BYTES_CEILING;

use crate::config::StartMode;
use crate::sandbox::SandboxMode;

/// Evaluates untrusted admission policies behind locked doors and lets only the verdict out.
#[derive(Debug, Parser)]
#[command(name = "conclave", version, about, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) log: LogOptions,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve policies over a Unix socket
    Serve(ServeOptions),
    /// Evaluate one request with one policy, without the daemon
    ///
    /// Prints the AdmissionResponse as one line of JSON on standard output and everything
    /// else on standard error. Exits with 0 for a verdict of either kind and with 1 when
    /// there is none.
    Run(RunOptions),
    /// Show what workers are locked up with, on this host or in a running daemon
    ///
    /// Takes a worker through every role and prints a table of the layers of the sandbox: what
    /// this host gives, what each role uses, and how to get what is missing. Exits with 0 if
    /// every required layer is in force and with 1 otherwise.
    Sandbox(SandboxOptions),
}

#[derive(Debug, Args)]
pub(crate) struct LogOptions {
    /// Format of the log on standard error
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, env = "CONCLAVE_LOG_FMT")]
    pub(crate) log_fmt: LogFormat,
    /// Least severe level that is logged [default: info; for run: warn]
    #[arg(long, global = true, value_enum, env = "CONCLAVE_LOG_LEVEL")]
    pub(crate) log_level: Option<LogLevel>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people and journald
    Text,
    /// One JSON object per line
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogLevel {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

/// Who starts which program as a worker.
#[derive(Debug, Args)]
pub(crate) struct ProgramOptions {
    /// User to become when started as root [default: conclave if there is one, else nobody]
    #[arg(long, value_name = "NAME", env = "CONCLAVE_USER")]
    pub(crate) user: Option<String>,
    /// The worker program [default: conclave-worker beside this program]
    #[arg(long, value_name = "FILE", env = "CONCLAVE_WORKER")]
    pub(crate) worker: Option<PathBuf>,
}

/// What the commands that evaluate need to run workers.
#[derive(Debug, Args)]
pub(crate) struct WorkerOptions {
    /// What to do when the host lacks a layer of the sandbox: strict refuses to start,
    /// best-effort starts and says on every start what is missing
    #[arg(long, value_enum, default_value_t = SandboxMode::Strict, env = "CONCLAVE_SANDBOX")]
    pub(crate) sandbox: SandboxMode,
    /// Time that one evaluation may take, in seconds; fractions are allowed
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds, env = "CONCLAVE_POLICY_TIMEOUT")]
    pub(crate) policy_timeout: Duration,
    /// Time that the compilation of one module may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds, env = "CONCLAVE_COMPILE_TIMEOUT")]
    pub(crate) compile_timeout: Duration,
    /// Directory for compiled code, reachable for nobody else [default: $CACHE_DIRECTORY as
    /// set by systemd, else conclave below $XDG_CACHE_HOME or ~/.cache]
    #[arg(long, value_name = "DIR", env = "CONCLAVE_CACHE_DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// Compile at every start, keep nothing on disk
    #[arg(long, conflicts_with = "cache_dir")]
    pub(crate) no_cache: bool,
    #[command(flatten)]
    pub(crate) program: ProgramOptions,
}

#[derive(Debug, Args)]
pub(crate) struct ServeOptions {
    /// Policies to serve
    #[arg(long, value_name = "FILE", default_value = "policies.yml", env = "CONCLAVE_POLICIES")]
    pub(crate) policies: PathBuf,
    /// Unix socket to listen on
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/run/conclave/conclave.sock",
        env = "CONCLAVE_SOCKET"
    )]
    pub(crate) socket: PathBuf,
    /// Permissions of the socket, in octal
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = mode, env = "CONCLAVE_SOCKET_MODE")]
    pub(crate) socket_mode: u32,
    /// Group of the socket; the daemon's user must be a member
    #[arg(long, value_name = "GROUP", env = "CONCLAVE_SOCKET_GROUP")]
    pub(crate) socket_group: Option<String>,
    /// User id of a client that may ask; repeat for more. Without this and --allow-gid
    /// everyone may who can open the socket
    #[arg(long, value_name = "UID", value_delimiter = ',', env = "CONCLAVE_ALLOW_UID")]
    pub(crate) allow_uid: Vec<u32>,
    /// Primary group id of a client that may ask; repeat for more
    #[arg(long, value_name = "GID", value_delimiter = ',', env = "CONCLAVE_ALLOW_GID")]
    pub(crate) allow_gid: Vec<u32>,
    /// Largest request body, in bytes
    #[arg(long, value_name = "BYTES", default_value = "8388608", value_parser = body_bytes, env = "CONCLAVE_MAX_BODY_BYTES")]
    pub(crate) max_body_bytes: usize,
    /// Workers of each policy [default: as many as there are processors, at most 4]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=256), env = "CONCLAVE_WORKERS")]
    pub(crate) workers: Option<u16>,
    /// How policies come to a request, unless they say it themselves
    #[arg(long, value_enum, default_value_t = StartMode::Auto, env = "CONCLAVE_START")]
    pub(crate) start: StartMode,
    /// Time that the state of a started policy is used until it is started anew, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds, env = "CONCLAVE_SNAPSHOT_MAX_AGE")]
    pub(crate) snapshot_max_age: Duration,
    /// Requests for which the state of a started policy is used
    #[arg(
        long,
        value_name = "COUNT",
        default_value = "1000000",
        env = "CONCLAVE_SNAPSHOT_MAX_USES"
    )]
    pub(crate) snapshot_max_uses: NonZeroU64,
    /// Namespace whose requests are accepted without asking a policy; repeat for more
    #[arg(
        long,
        value_name = "NAMESPACE",
        value_delimiter = ',',
        env = "CONCLAVE_ALWAYS_ACCEPT_ADMISSION_REVIEWS_ON_NAMESPACE"
    )]
    pub(crate) always_accept_admission_reviews_on_namespace: Vec<String>,
    /// Time that requests in flight get to finish on SIGTERM, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds, env = "CONCLAVE_GRACE_PERIOD")]
    pub(crate) grace_period: Duration,
    #[command(flatten)]
    pub(crate) workers_options: WorkerOptions,
}

#[derive(Debug, Args)]
pub(crate) struct RunOptions {
    /// The policy: a WebAssembly file, as a path or a file:// URL
    #[arg(value_name = "POLICY")]
    pub(crate) policy: String,
    /// The request: an AdmissionReview or its bare request; - is standard input
    #[arg(short, long, value_name = "FILE")]
    pub(crate) request_path: PathBuf,
    /// The settings, as a YAML or JSON file
    #[arg(short, long, value_name = "FILE")]
    pub(crate) settings_path: Option<PathBuf>,
    /// The settings, as JSON
    #[arg(long, value_name = "JSON", conflicts_with = "settings_path")]
    pub(crate) settings_json: Option<String>,
    /// The request is any JSON value, passed to the policy as it is
    #[arg(long)]
    pub(crate) raw: bool,
    /// How to run the policy: kubewarden-wapc, wasi, opa or gatekeeper [default: what its
    /// metadata says]
    #[arg(short, long, value_name = "MODE")]
    pub(crate) execution_mode: Option<String>,
    /// The entrypoint of a Rego policy, such as policy/main [default: its first]
    #[arg(long, value_name = "NAME")]
    pub(crate) entrypoint: Option<String>,
    #[command(flatten)]
    pub(crate) workers_options: WorkerOptions,
}

#[derive(Debug, Args)]
pub(crate) struct SandboxOptions {
    /// Look at the workers of the daemon that listens on this socket instead: what the kernel
    /// shows of them. To see all of it, ask as root or as the daemon's user
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["user", "worker"])]
    pub(crate) daemon: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) program: ProgramOptions,
}

/// Seconds with an optional fraction; at least a millisecond, at most an hour.
fn seconds(word: &str) -> Result<Duration, String> {
    let seconds: f64 =
        word.parse().map_err(|_not_a_number| "not a number of seconds".to_owned())?;
    if (0.001..=3600.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("not between 0.001 and 3600 seconds".to_owned())
    }
}

fn mode(word: &str) -> Result<u32, String> {
    match u32::from_str_radix(word, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("not permissions in octal, such as 660".to_owned()),
    }
}

fn body_bytes(word: &str) -> Result<usize, String> {
    match word.parse() {
        Ok(bytes) if (1..=REQUEST_BYTES_CEILING).contains(&bytes) => Ok(bytes),
        _ => Err(format!("not a number of bytes between 1 and {REQUEST_BYTES_CEILING}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn times_are_bounded_and_may_have_fractions() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for bad in ["0", "-1", "nan", "inf", "3601", "2s", ""] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!(mode("0660"), Ok(0o660));
        assert!(mode("8").is_err() && mode("1777").is_err());
    }
}
