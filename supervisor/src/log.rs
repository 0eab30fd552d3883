//! The log: lines on standard error, for people and journald or as JSON.
//!
//! Lines are written by a thread of their own: a reader of standard error that stops
//! reading costs lines, not verdicts.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};

use tracing::Level;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::fmt::time::SystemTime;

use crate::cli::{LogFormat, LogLevel, LogOptions};

/// Lines that may wait for standard error; further ones are dropped.
const LINES_MAX: usize = 16 << 10;

impl From<LogLevel> for Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Trace => Self::TRACE,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Info => Self::INFO,
            LogLevel::Warn => Self::WARN,
            LogLevel::Error => Self::ERROR,
        }
    }
}

/// Starts the log. Dropping the guard writes what still waits.
pub(crate) fn start(options: &LogOptions, default: LogLevel) -> WorkerGuard {
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(LINES_MAX)
        .thread_name("log")
        .finish(io::stderr());
    let level = Level::from(options.log_level.unwrap_or(default));
    let builder =
        tracing_subscriber::fmt().with_max_level(level).with_writer(writer).with_target(false);
    match options.log_fmt {
        LogFormat::Json => {
            builder
                .json()
                .flatten_event(true)
                .with_current_span(false)
                .with_span_list(false)
                .init();
        }
        // journald has its own time stamps (systemd.exec(5), $JOURNAL_STREAM).
        LogFormat::Text if std::env::var_os("JOURNAL_STREAM").is_some() => {
            builder.with_ansi(false).without_time().init();
        }
        LogFormat::Text => {
            let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            builder.with_ansi(colours).with_timer(SystemTime).init();
        }
    }
    guard
}
