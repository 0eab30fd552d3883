//! The log: lines on standard error, for people and journald or as JSON.
//!
//! A verdict never waits for whoever reads the log. Lines gather in a bounded buffer that a
//! thread of its own writes out a few hundred times a second at most; a reader that stops
//! reading costs lines, which are counted, and nothing else.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use conclave_ipc::limits::LOG_LINE_BYTES_MAX;
use tracing::Level;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::time::SystemTime;

use crate::cli::{LogFormat, LogLevel, LogOptions};

/// What may wait for standard error; further lines are dropped and counted.
const BUFFER_BYTES_MAX: usize = 8 << 20;

/// How long lines gather before they are written together.
const GATHER_TIME: Duration = Duration::from_millis(5);

/// How long the end of the process may wait for a reader of standard error.
const LAST_WORDS_TIME_MAX: Duration = Duration::from_millis(500);

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

/// A text of foreign origin, cut to what one field of a line may take.
pub(crate) fn shorten(text: &str) -> &str {
    text.get(..text.floor_char_boundary(LOG_LINE_BYTES_MAX)).unwrap_or_default()
}

/// Starts the log. Dropping the guard writes what still waits.
///
/// # Errors
/// The writing thread can't be started.
pub(crate) fn start(options: &LogOptions, default: LogLevel) -> io::Result<Guard> {
    let lines = Lines::default();
    let writing = lines.clone();
    let thread =
        thread::Builder::new().name("log".to_owned()).spawn(move || writing.write_out())?;
    let level = Level::from(options.log_level.unwrap_or(default));
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(lines.clone())
        .with_target(false);
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
    Ok(Guard { lines, thread })
}

/// Keeps the log going.
#[derive(Debug)]
pub(crate) struct Guard {
    lines: Lines,
    thread: JoinHandle<()>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.lines.close();
        let waited = std::time::Instant::now();
        while !self.thread.is_finished() && waited.elapsed() < LAST_WORDS_TIME_MAX {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The buffer, shared between everything that logs and the thread that writes.
#[derive(Debug, Clone, Default)]
struct Lines(Arc<(Mutex<Waiting>, Condvar)>);

#[derive(Debug, Default)]
struct Waiting {
    bytes: Vec<u8>,
    dropped: u64,
    closed: bool,
}

impl Lines {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut waiting = self.waiting();
        if waiting.bytes.len().saturating_add(line.len()) > BUFFER_BYTES_MAX {
            waiting.dropped = waiting.dropped.saturating_add(1);
            return;
        }
        let was_empty = waiting.bytes.is_empty();
        waiting.bytes.extend_from_slice(line);
        drop(waiting);
        if was_empty {
            self.0.1.notify_one();
        }
    }

    fn close(&self) {
        self.waiting().closed = true;
        self.0.1.notify_one();
    }

    /// Waits for lines, lets more of them gather, and takes them all. `None` at the end.
    fn take(&self, into: &mut Vec<u8>) -> Option<u64> {
        let idle = |waiting: &mut Waiting| waiting.bytes.is_empty() && !waiting.closed;
        let waiting =
            self.0.1.wait_while(self.waiting(), idle).unwrap_or_else(PoisonError::into_inner);
        let closed = waiting.closed;
        drop(waiting);
        if !closed {
            thread::sleep(GATHER_TIME);
        }
        let mut waiting = self.waiting();
        into.clear();
        std::mem::swap(into, &mut waiting.bytes);
        (!into.is_empty()).then(|| std::mem::take(&mut waiting.dropped))
    }

    fn write_out(&self) {
        let mut bytes = Vec::new();
        while let Some(dropped) = self.take(&mut bytes) {
            // Nobody is left to tell if standard error is closed.
            drop(io::stderr().write_all(&bytes));
            if dropped > 0 {
                tracing::error!(
                    lines = dropped,
                    "standard error was not read: log lines were dropped"
                );
            }
        }
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_find_no_room_are_dropped_and_counted() {
        let lines = Lines::default();
        let line = vec![b'x'; BUFFER_BYTES_MAX / 4];
        for _ in 0..6 {
            lines.push(&line);
        }
        let mut bytes = Vec::new();
        assert_eq!(lines.take(&mut bytes), Some(2));
        assert_eq!(bytes.len(), BUFFER_BYTES_MAX);
    }

    #[test]
    fn what_waits_at_the_end_is_still_taken() {
        let lines = Lines::default();
        lines.push(b"last words\n");
        lines.close();
        let mut bytes = Vec::new();
        assert_eq!(lines.take(&mut bytes), Some(0));
        assert_eq!(bytes, b"last words\n");
        assert_eq!(lines.take(&mut bytes), None);
    }
}
