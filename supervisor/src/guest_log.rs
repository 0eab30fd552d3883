//! What a guest leaves for the log in one evaluation: gathered while it runs, within a bound,
//! and written when its request has been answered, so that nobody waits for the formatting.
#![forbid(unsafe_code)]

use conclave_ipc::limits::{LOG_BYTES_MAX, LOG_LINE_BYTES_MAX, log_cost};
use conclave_ipc::message::LogStream;
use serde::Deserialize;
use serde_json::{Map, Value};

/// What one evaluation may leave, as the supervisor counts it: what the worker lets through,
/// and as much again so that the two need not count alike.
const BUDGET: usize = 2 * LOG_BYTES_MAX;

/// The worker let its guest go beyond a bound that it should have held itself.
#[derive(Debug)]
pub(crate) struct BoundPassed(pub(crate) &'static str);

const BEYOND: BoundPassed = BoundPassed("output beyond the limit");

#[derive(Debug)]
enum Entry {
    Output(LogStream, Vec<u8>),
    Record(Vec<u8>),
    Denied { namespace: String, operation: String },
    Diagnostics(String),
}

/// The entries of one evaluation.
#[derive(Debug)]
pub(crate) struct GuestLog {
    entries: Vec<Entry>,
    left: usize,
    /// For denied host calls, which a worker does not count.
    left_for_denials: usize,
}

impl Default for GuestLog {
    fn default() -> Self {
        Self { entries: Vec::new(), left: BUDGET, left_for_denials: LOG_BYTES_MAX }
    }
}

impl GuestLog {
    /// Keeps a line of guest output.
    ///
    /// # Errors
    /// The line is too long, or the evaluation has used up its part of the log.
    pub(crate) fn output(&mut self, stream: LogStream, text: &[u8]) -> Result<(), BoundPassed> {
        if text.len() > LOG_LINE_BYTES_MAX {
            return Err(BEYOND);
        }
        self.take(text.len())?;
        self.entries.push(Entry::Output(stream, text.to_vec()));
        Ok(())
    }

    /// Keeps the payload of a `tracing/log` call.
    ///
    /// # Errors
    /// The evaluation has used up its part of the log.
    pub(crate) fn record(&mut self, payload: &[u8]) -> Result<(), BoundPassed> {
        self.take(payload.len())?;
        self.entries.push(Entry::Record(payload.to_vec()));
        Ok(())
    }

    /// Keeps a denied host call. The guest may ask as often as it likes; the log hears of it
    /// while there is room.
    pub(crate) fn denied(&mut self, namespace: &str, operation: &str) {
        let cost = log_cost(namespace.len().saturating_add(operation.len()));
        if let Some(left) = self.left_for_denials.checked_sub(cost) {
            self.left_for_denials = left;
            let (namespace, operation) = (namespace.to_owned(), operation.to_owned());
            self.entries.push(Entry::Denied { namespace, operation });
        }
    }

    /// Keeps what a WASI guest wrote to stderr beside its answer.
    pub(crate) fn diagnostics(&mut self, text: String) {
        self.entries.push(Entry::Diagnostics(text));
    }

    fn take(&mut self, bytes: usize) -> Result<(), BoundPassed> {
        self.left = self.left.checked_sub(log_cost(bytes)).ok_or(BEYOND)?;
        Ok(())
    }

    /// Writes the entries, in their order.
    pub(crate) fn write(&self, policy: &str, request_uid: &str) {
        for entry in &self.entries {
            match entry {
                Entry::Output(stream, text) => {
                    let text = &*String::from_utf8_lossy(text);
                    let stream = match stream {
                        LogStream::Console => "console",
                        LogStream::Stdout => "stdout",
                        LogStream::Stderr => "stderr",
                    };
                    tracing::info!(policy, request_uid, stream, text, "guest output");
                }
                Entry::Record(payload) => write_record(policy, request_uid, payload),
                Entry::Denied { namespace, operation } => {
                    tracing::warn!(policy, request_uid, namespace, operation, "host call denied");
                }
                Entry::Diagnostics(stderr) => {
                    tracing::warn!(policy, request_uid, stderr, "policy wrote to stderr");
                }
            }
        }
    }
}

/// The payload of `tracing/log`.
#[derive(Deserialize)]
struct Record {
    level: String,
    message: String,
    #[serde(flatten)]
    data: Map<String, Value>,
}

/// Writes a policy's own log record; what is wrong with it is said in the log.
fn write_record(policy: &str, request_uid: &str, payload: &[u8]) {
    let record = match serde_json::from_slice::<Record>(payload) {
        Ok(record) => record,
        Err(error) => {
            let error = error.to_string();
            tracing::warn!(policy, request_uid, error, "policy sent a malformed log record");
            return;
        }
    };
    let (text, data) = (record.message.as_str(), Value::Object(record.data).to_string());
    let data = data.as_str();
    match record.level.to_ascii_uppercase().as_str() {
        "TRACE" => tracing::trace!(policy, request_uid, text, data, "policy_log"),
        "DEBUG" => tracing::debug!(policy, request_uid, text, data, "policy_log"),
        "INFO" => tracing::info!(policy, request_uid, text, data, "policy_log"),
        "WARNING" => tracing::warn!(policy, request_uid, text, data, "policy_log"),
        "ERROR" => tracing::error!(policy, request_uid, text, data, "policy_log"),
        level => {
            tracing::warn!(policy, request_uid, level, text, data, "policy_log of unknown level");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_even_if_the_worker_does_not_hold_it() {
        let mut log = GuestLog::default();
        let mut lines = 0;
        while log.output(LogStream::Stdout, &[b'x'; 1024]).is_ok() {
            lines += 1;
        }
        assert_eq!(lines, BUDGET / log_cost(1024));
        log.record(&[b'x'; 1024]).unwrap_err();
        assert_eq!(log.entries.len(), lines);
    }

    #[test]
    fn no_single_entry_passes_the_bound() {
        let mut log = GuestLog::default();
        log.output(LogStream::Stdout, &[b'x'; LOG_LINE_BYTES_MAX + 1]).unwrap_err();
        log.record(&[b'x'; BUDGET]).unwrap_err();
        assert!(log.entries.is_empty());
    }

    #[test]
    fn denials_are_bounded_and_take_nothing_from_the_output() {
        let mut log = GuestLog::default();
        for _ in 0..BUDGET {
            log.denied("oci", "v1/verify");
        }
        assert_eq!(log.entries.len(), LOG_BYTES_MAX / log_cost("ociv1/verify".len()));
        log.output(LogStream::Stdout, &[b'x'; LOG_LINE_BYTES_MAX]).unwrap();
    }
}
