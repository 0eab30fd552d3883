//! The request that a guest is started and measured with before any client has asked.
#![forbid(unsafe_code)]

use crate::admission::Payload;
use crate::admission::body::BodyError;
use crate::admission::request::ReviewRequest;
use crate::config::Warmup;

/// The creation of an ordinary pod, which is what most policies have to judge. A dry run, so
/// that a policy which acts on its verdicts does not.
const POD: &[u8] = include_bytes!("warmup/pod.json");

/// That request as a policy sees it, read and written like a client's; nothing if there is
/// to be none, or none fits: nobody knows what a policy for raw requests expects.
///
/// # Errors
/// The configured request is none for this kind of policy.
pub(crate) fn request(warmup: &Warmup, is_raw: bool) -> Result<Option<Payload>, BodyError> {
    let mut request = match (warmup, is_raw) {
        (Warmup::Off, _) | (Warmup::Synthetic, true) => return Ok(None),
        (Warmup::Synthetic, false) => ReviewRequest::from_bare(POD)?,
        (Warmup::Given(json), true) => ReviewRequest::raw_value(json.as_bytes())?,
        (Warmup::Given(json), false) => ReviewRequest::from_review_or_bare(json.as_bytes())?,
    };
    Ok(Some(request.take_payload()))
}

#[cfg(test)]
mod tests {
    use conclave_ipc::message::Contract;

    use super::*;

    fn given(json: &str) -> Warmup {
        Warmup::Given(json.to_owned())
    }

    #[test]
    fn the_synthetic_request_is_a_pod_as_a_client_would_send_it() {
        let payload = request(&Warmup::Synthetic, false).unwrap().unwrap();
        let payload = payload.seen_by(Contract::Wapc).unwrap();
        let again = ReviewRequest::from_bare(&payload).unwrap();
        assert_eq!(again.payload(), &*payload);
        assert_eq!(again.namespace(), Some("warmup"));
        let pod: serde_json::Value = serde_json::from_slice(&payload).unwrap();
        assert_eq!(pod["object"]["spec"]["containers"][0]["name"], "main");
        // Nothing of it is dropped on the way.
        let written: serde_json::Value = serde_json::from_slice(POD).unwrap();
        assert_eq!(pod, written);
    }

    #[test]
    fn there_is_none_when_none_is_wanted_or_known() {
        for is_raw in [false, true] {
            assert_eq!(request(&Warmup::Off, is_raw), Ok(None));
        }
        assert_eq!(request(&Warmup::Synthetic, true), Ok(None));
    }

    #[test]
    fn a_request_of_the_operator_is_read_by_the_kind_of_policy() {
        let bare = String::from_utf8(POD.to_vec()).unwrap();
        let review = format!(r#"{{"kind":"AdmissionReview","request":{bare}}}"#);
        let payload = request(&Warmup::Synthetic, false);
        assert_eq!(request(&given(&bare), false), payload);
        assert_eq!(request(&given(&review), false), payload);
        let list = request(&given("[1, 2]"), true).unwrap().unwrap();
        assert_eq!(*list.seen_by(Contract::Wapc).unwrap(), *b"[1, 2]");
        let error = request(&given(r#"{"uid":"u"}"#), false).unwrap_err().to_string();
        assert!(error.contains("missing field"), "{error}");
    }
}
