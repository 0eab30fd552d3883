//! What a guest may ask of the host. Denied unless granted, and bounded per evaluation.
//!
//! The order of the checks is Kubewarden's: binding, grant, namespace, operation, payload.
#![forbid(unsafe_code)]

use conclave_ipc::limits::{HOST_CALL_BYTES_MAX, HOST_CALLS_MAX, LOG_LINE_BYTES_MAX};

use crate::guest_log::{BoundPassed, GuestLog};
use crate::host_capabilities::HostCapabilities;

/// The one binding that exists.
const BINDING: &str = "kubewarden";

/// The namespaces of host capabilities.
const NAMESPACES: [&str; 5] = ["tracing", "kubernetes", "oci", "net", "crypto"];

/// Which host call it is. Nothing that takes a payload is available.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostCall<'a> {
    pub(crate) binding: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) operation: &'a str,
    pub(crate) payload: &'a [u8],
}

/// What one evaluation of one policy may ask for, and what it has used up.
#[derive(Debug)]
pub(crate) struct HostAccess<'a> {
    grants: &'a HostCapabilities,
    calls_left: u32,
    /// What it leaves for the log.
    pub(crate) log: GuestLog,
}

impl<'a> HostAccess<'a> {
    pub(crate) fn new(grants: &'a HostCapabilities) -> Self {
        Self { grants, calls_left: HOST_CALLS_MAX, log: GuestLog::default() }
    }

    /// Answers a host call; the inner error is for the guest.
    ///
    /// # Errors
    /// The evaluation has used up its host calls, or this one is too large.
    pub(crate) fn answer(
        &mut self,
        call: HostCall<'_>,
    ) -> Result<Result<Vec<u8>, String>, BoundPassed> {
        self.calls_left =
            self.calls_left.checked_sub(1).ok_or(BoundPassed("host calls beyond the limit"))?;
        let HostCall { binding, namespace, operation, payload } = call;
        let names = binding.len().saturating_add(namespace.len()).saturating_add(operation.len());
        if names > LOG_LINE_BYTES_MAX || payload.len() > HOST_CALL_BYTES_MAX {
            return Err(BoundPassed("host call beyond the limit"));
        }
        if binding != BINDING {
            return Ok(Err(format!("unknown binding: {binding}")));
        }
        if !self.grants.allows(namespace, operation) {
            self.log.denied(namespace, operation);
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(grants: &[&str], namespace: &str, operation: &str) -> Result<Vec<u8>, String> {
        let grants: Vec<_> = grants.iter().map(ToString::to_string).collect();
        let grants = HostCapabilities::parse(&grants).unwrap();
        let call = HostCall { binding: "kubewarden", namespace, operation, payload: b"" };
        HostAccess::new(&grants).answer(call).unwrap()
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
        let call = HostCall { binding: "x", namespace: "tracing", operation: "log", payload: b"" };
        let answer = HostAccess::new(&grants).answer(call).unwrap();
        assert_eq!(answer, Err("unknown binding: x".to_owned()));
    }

    #[test]
    fn the_bound_holds_even_if_the_worker_does_not_hold_it() {
        let grants = HostCapabilities::default();
        let mut access = HostAccess::new(&grants);
        let (binding, namespace) = ("kubewarden", "tracing");
        let call = HostCall { binding, namespace, operation: "other", payload: b"" };
        for _ in 0..HOST_CALLS_MAX {
            assert_eq!(access.answer(call).unwrap().unwrap_err(), "unknown operation: other");
        }
        access.answer(call).unwrap_err();

        let large = vec![0; HOST_CALL_BYTES_MAX + 1];
        HostAccess::new(&grants).answer(HostCall { payload: &large, ..call }).unwrap_err();
        let long = "x".repeat(LOG_LINE_BYTES_MAX);
        HostAccess::new(&grants).answer(HostCall { operation: &long, ..call }).unwrap_err();
    }
}
