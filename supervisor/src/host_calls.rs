//! What a guest may ask of the host. Denied unless granted, and bounded per evaluation.
//!
//! The order of the checks is Kubewarden's: binding, grant, namespace, operation, payload.
#![forbid(unsafe_code)]

use conclave_ipc::limits::{HOST_CALLS_MAX, LOG_BYTES_MAX, log_cost};
use conclave_ipc::message::LogStream;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::host_capabilities::HostCapabilities;
use crate::log::shorten;

/// The one binding that exists.
const BINDING: &str = "kubewarden";

/// The namespaces of host capabilities.
const NAMESPACES: [&str; 5] = ["tracing", "kubernetes", "oci", "net", "crypto"];

/// Guest output that one evaluation may bring to the log, as the supervisor counts it: what
/// the worker lets through, and as much again so that the two need not count alike.
const LOG_BUDGET: usize = 2 * LOG_BYTES_MAX;

/// Which host call it is. Nothing that takes a payload is available.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostCall<'a> {
    pub(crate) binding: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) operation: &'a str,
}

/// What one evaluation of one policy may ask for, and what it has used up.
#[derive(Debug)]
pub(crate) struct HostAccess<'a> {
    policy: &'a str,
    uid: &'a str,
    grants: &'a HostCapabilities,
    calls_left: u32,
    log_left: usize,
}

/// The worker let its guest go beyond a bound that it should have held itself.
#[derive(Debug)]
pub(crate) struct BoundPassed(pub(crate) &'static str);

impl<'a> HostAccess<'a> {
    pub(crate) fn new(policy: &'a str, uid: &'a str, grants: &'a HostCapabilities) -> Self {
        Self { policy, uid, grants, calls_left: HOST_CALLS_MAX, log_left: LOG_BUDGET }
    }

    /// Writes a line of guest output to the log.
    ///
    /// # Errors
    /// The evaluation has used up its part of the log.
    pub(crate) fn log(&mut self, stream: LogStream, text: &[u8]) -> Result<(), BoundPassed> {
        self.take_log(text.len())?;
        let text = &*String::from_utf8_lossy(text);
        let stream = match stream {
            LogStream::Console => "console",
            LogStream::Stdout => "stdout",
            LogStream::Stderr => "stderr",
        };
        tracing::info!(policy = self.policy, request_uid = self.uid, stream, text, "guest output");
        Ok(())
    }

    /// Answers a host call; the inner error is for the guest.
    ///
    /// # Errors
    /// The evaluation has used up its host calls.
    pub(crate) fn answer(
        &mut self,
        call: HostCall<'_>,
    ) -> Result<Result<Vec<u8>, String>, BoundPassed> {
        self.calls_left =
            self.calls_left.checked_sub(1).ok_or(BoundPassed("host calls beyond the limit"))?;
        let HostCall { binding, namespace, operation } = call;
        if binding != BINDING {
            return Ok(Err(format!("unknown binding: {binding}")));
        }
        if !self.grants.allows(namespace, operation) {
            self.log_denial(namespace, operation);
            return Ok(Err(HostCapabilities::denial(namespace, operation)));
        }
        Ok(match (namespace, operation) {
            ("tracing", _) => Err(format!("unknown operation: {operation}")),
            (known, _) if NAMESPACES.contains(&known) => Err(format!(
                "host capability '{namespace}/{operation}' is not available: this host has no network"
            )),
            _ => Err(format!("unknown namespace: {namespace}")),
        })
    }

    /// The guest may ask as often as it likes; the log hears of it while there is room.
    fn log_denial(&mut self, namespace: &str, operation: &str) {
        if self.take_log(namespace.len().saturating_add(operation.len())).is_ok() {
            tracing::warn!(
                policy = self.policy,
                request_uid = self.uid,
                namespace = shorten(namespace),
                operation = shorten(operation),
                "host call denied"
            );
        }
    }

    /// Writes a policy's own log record; what is wrong with it is said in the log.
    ///
    /// # Errors
    /// The evaluation has used up its part of the log.
    pub(crate) fn trace(&mut self, payload: &[u8]) -> Result<(), BoundPassed> {
        let (policy, request_uid) = (self.policy, self.uid);
        self.take_log(payload.len())?;
        let record = match serde_json::from_slice::<Record>(payload) {
            Ok(record) => record,
            Err(error) => {
                let error = error.to_string();
                tracing::warn!(policy, request_uid, error, "policy sent a malformed log record");
                return Ok(());
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
            level => tracing::warn!(
                policy,
                request_uid,
                level,
                text,
                data,
                "policy_log of unknown level"
            ),
        }
        Ok(())
    }

    fn take_log(&mut self, bytes: usize) -> Result<(), BoundPassed> {
        if self.log_left == 0 {
            return Err(BoundPassed("output beyond the limit"));
        }
        self.log_left = self.log_left.saturating_sub(log_cost(bytes));
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(grants: &[&str], namespace: &str, operation: &str) -> Result<Vec<u8>, String> {
        let grants: Vec<_> = grants.iter().map(ToString::to_string).collect();
        let grants = HostCapabilities::parse(&grants).unwrap();
        let call = HostCall { binding: "kubewarden", namespace, operation };
        HostAccess::new("p", "u", &grants).answer(call).unwrap()
    }

    #[test]
    fn the_tracing_namespace_needs_no_grant() {
        assert_eq!(answer(&[], "tracing", "other"), Err("unknown operation: other".to_owned()));
    }

    #[test]
    fn what_is_not_granted_is_denied_before_it_is_looked_at() {
        assert_eq!(
            answer(&[], "no", "such"),
            Err("Policy has not been granted access to the 'no/such' host capability. The violation has been reported.".to_owned())
        );
        assert_eq!(answer(&["*"], "no", "such"), Err("unknown namespace: no".to_owned()));
    }

    #[test]
    fn a_granted_capability_that_needs_a_network_says_so() {
        let error = answer(&["kubernetes/*"], "kubernetes", "get_resource").unwrap_err();
        assert!(error.contains("'kubernetes/get_resource' is not available"), "{error}");
    }

    #[test]
    fn another_binding_does_not_exist() {
        let grants = HostCapabilities::parse(&["*".to_owned()]).unwrap();
        let call = HostCall { binding: "x", namespace: "tracing", operation: "log" };
        let answer = HostAccess::new("p", "u", &grants).answer(call).unwrap();
        assert_eq!(answer, Err("unknown binding: x".to_owned()));
    }

    #[test]
    fn the_bounds_hold_even_if_the_worker_does_not_hold_them() {
        let grants = HostCapabilities::default();
        let mut access = HostAccess::new("p", "u", &grants);
        let call = HostCall { binding: "kubewarden", namespace: "tracing", operation: "other" };
        for _ in 0..HOST_CALLS_MAX {
            assert_eq!(access.answer(call).unwrap().unwrap_err(), "unknown operation: other");
        }
        access.answer(call).unwrap_err();

        let mut access = HostAccess::new("p", "u", &grants);
        let mut lines = 0;
        while access.log(LogStream::Stdout, &[b'x'; 1024]).is_ok() {
            lines += 1;
        }
        assert_eq!(lines, LOG_BUDGET.div_ceil(log_cost(1024)));
        access.trace(b"{}").unwrap_err();
    }
}
