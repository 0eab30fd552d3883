//! A request on its way to a policy, and how it looks to one of that kind.

use std::borrow::Cow;

use conclave_ipc::message::Contract;

use super::shape::AdmissionRequest;
use crate::json_object::Object;

/// Gatekeeper is about objects of Kubernetes.
const RAW: &str = "Gatekeeper does not support raw validation requests";

/// There is nothing that could be judged.
const NOTHING_DELETED: &str = "Gatekeeper does not judge a DELETE request without oldObject";

/// The text of a request: one JSON value with one reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Payload {
    text: Vec<u8>,
    kind: Kind,
}

/// What kind of request it is, as far as policies see them differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Kubernetes,
    /// A Kubernetes request of the operation `DELETE`.
    Deletion,
    Raw,
}

impl Payload {
    pub(super) fn new(text: Vec<u8>, kind: Kind) -> Self {
        Self { text, kind }
    }

    /// The request as a policy of this kind sees it. Gatekeeper finds an object that is to be
    /// deleted where it finds any other: Kubewarden passes it on as it comes, where constraints
    /// that look at the object alone let every deletion pass.
    ///
    /// # Errors
    /// Such a policy can't judge it, and why.
    pub(crate) fn seen_by(&self, contract: Contract) -> Result<Cow<'_, [u8]>, &'static str> {
        match (contract, self.kind) {
            (Contract::Gatekeeper, Kind::Raw) => Err(RAW),
            (Contract::Gatekeeper, Kind::Deletion) => {
                self.with_deleted_object().map(Cow::Owned).ok_or(NOTHING_DELETED)
            }
            (Contract::Gatekeeper, Kind::Kubernetes)
            | (Contract::Wapc | Contract::Wasi | Contract::Opa, _) => Ok(Cow::Borrowed(&self.text)),
        }
    }

    fn with_deleted_object(&self) -> Option<Vec<u8>> {
        // It was written by ourselves, from this very structure.
        let Object(mut request): Object<AdmissionRequest<'_>> =
            serde_json::from_slice(&self.text).ok()?;
        request.object = Some(request.old_object?);
        serde_json::to_vec(&request).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::request::ReviewRequest;

    const CONTRACTS: [Contract; 4] =
        [Contract::Wapc, Contract::Wasi, Contract::Opa, Contract::Gatekeeper];

    fn payload(operation: &str, more: &str) -> Payload {
        let body = format!(
            r#"{{"uid":"u","kind":{{"group":"","version":"v1","kind":"Pod"}},"resource":{{"group":"","version":"v1","resource":"pods"}},"operation":"{operation}","userInfo":{{}}{more}}}"#
        );
        ReviewRequest::from_bare(body.as_bytes()).unwrap().take_payload()
    }

    fn seen(payload: &Payload, contract: Contract) -> String {
        String::from_utf8(payload.seen_by(contract).unwrap().into_owned()).unwrap()
    }

    #[test]
    fn a_deleted_object_is_the_object_to_gatekeeper_only() {
        let request = payload("DELETE", r#","oldObject":{"b": 1.0,"a":2}"#);
        for contract in CONTRACTS {
            let text = seen(&request, contract);
            let is_copied = text.contains(r#","object":{"b": 1.0,"a":2},"oldObject":{"b": 1.0"#);
            assert_eq!(is_copied, contract == Contract::Gatekeeper, "{text}");
        }
        let request = payload("DELETE", r#","object":1,"oldObject":2"#);
        assert!(seen(&request, Contract::Gatekeeper).contains(r#""object":2,"oldObject":2"#));
    }

    #[test]
    fn other_operations_are_passed_on_as_they_are() {
        for operation in ["CREATE", "UPDATE", "CONNECT", "delete"] {
            let request = payload(operation, r#","oldObject":{"a":2}"#);
            assert_eq!(seen(&request, Contract::Gatekeeper), seen(&request, Contract::Wapc));
        }
    }

    #[test]
    fn gatekeeper_refuses_what_it_can_not_judge() {
        let request = payload("DELETE", r#","object":{}"#);
        assert_eq!(request.seen_by(Contract::Gatekeeper), Err(NOTHING_DELETED));
        let raw = ReviewRequest::raw_value(b"[1]").unwrap().take_payload();
        assert_eq!(raw.seen_by(Contract::Gatekeeper), Err(RAW));
        assert_eq!(seen(&raw, Contract::Opa), "[1]");
    }
}
