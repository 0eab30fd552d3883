//! What the configuration of a policy changes in its verdicts.

use super::Origin;
use super::response::{AdmissionResponse, Cause, Status};

/// The part of a policy's configuration that does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PostProcessing<'a> {
    /// The policy's name.
    pub(crate) policy: &'a str,
    /// Whether the policy only watches.
    pub(crate) monitor: bool,
    /// Whether the policy may change objects.
    pub(crate) allowed_to_mutate: bool,
    /// What to tell users instead of the policy's own message.
    pub(crate) message: Option<&'a str>,
}

/// Applies a policy's configuration to its verdict, in the order that Kubewarden does:
/// monitor mode, permission to mutate, custom message. An audit sees the verdict as it is.
pub(crate) fn post_process(
    mut response: AdmissionResponse,
    rules: &PostProcessing<'_>,
    origin: Origin,
) -> AdmissionResponse {
    match origin {
        Origin::Audit => return response,
        Origin::Validate => {}
    }
    if rules.monitor {
        return AdmissionResponse { allowed: true, mutation: None, status: None, ..response };
    }
    if response.mutation.is_some() && !rules.allowed_to_mutate {
        response.allowed = false;
        response.mutation = None;
        response.status = Some(Status::message(format!(
            "Request rejected by policy {}. The policy attempted to mutate the request, but it \
             is currently configured to not allow mutations.",
            rules.policy
        )));
    }
    if let Some(message) = rules.message
        && !response.allowed
    {
        let status = response.status.get_or_insert_default();
        if let Some(original) = status.message.replace(message.to_owned()) {
            status
                .details
                .get_or_insert_default()
                .causes
                .push(Cause { message: Some(original), ..Cause::default() });
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::response::Details;

    const CUSTOM: PostProcessing<'static> = PostProcessing {
        policy: "p",
        monitor: false,
        allowed_to_mutate: false,
        message: Some("ask the platform team"),
    };

    #[test]
    fn a_custom_message_adds_to_the_causes_there_are() {
        let cause = |message: &str| Cause { message: Some(message.to_owned()), ..Cause::default() };
        let mut response = AdmissionResponse::reject("u", "no", 403);
        response.status.as_mut().unwrap().details =
            Some(Details { causes: vec![cause("first")], ..Details::default() });
        let response = post_process(response, &CUSTOM, Origin::Validate);
        let details = response.status.unwrap().details.unwrap();
        assert_eq!(details.causes, [cause("first"), cause("no")]);
    }
}
