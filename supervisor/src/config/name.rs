//! The names of policies.
#![forbid(unsafe_code)]

use std::fmt;

use thiserror::Error;

use super::POLICY_NAME_BYTES_MAX;

/// The name of a policy: 1 to [`POLICY_NAME_BYTES_MAX`] bytes without `/` and without control
/// characters, so that it fits one segment of a URL's path and one line of a log.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PolicyName(String);

impl PolicyName {
    /// # Errors
    ///
    /// The rule that `name` breaks.
    pub(crate) fn parse(name: &str) -> Result<Self, PolicyNameError> {
        if name.is_empty() {
            Err(PolicyNameError::Empty)
        } else if name.len() > POLICY_NAME_BYTES_MAX {
            Err(PolicyNameError::TooLong)
        } else if name.contains('/') {
            Err(PolicyNameError::Slash)
        } else if name.chars().any(char::is_control) {
            Err(PolicyNameError::ControlCharacter)
        } else {
            Ok(Self(name.to_owned()))
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is not a [`PolicyName`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum PolicyNameError {
    #[error("must not be empty")]
    Empty,
    #[error("is longer than {POLICY_NAME_BYTES_MAX} bytes")]
    TooLong,
    #[error("must not contain \"/\"")]
    Slash,
    #[error("must not contain control characters")]
    ControlCharacter,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refusal;

    #[test]
    fn names_that_fit_no_url_or_log_are_refused() {
        assert_eq!(refusal("a/b: {module: x}"), "1:1: policy name \"a/b\" must not contain \"/\"");
        assert!(refusal("\"\": {module: x}").contains("policy name \"\" must not be empty"));
        assert_eq!(
            refusal("\"a\\nb\": {module: x}"),
            "1:1: policy name \"a\\nb\" must not contain control characters"
        );
        let longest = "é".repeat(126) + "x";
        assert_eq!(PolicyName::parse(&longest).unwrap().as_str(), longest);
        assert_eq!(PolicyName::parse(&(longest.clone() + "x")), Err(PolicyNameError::TooLong));
        let message = refusal(&format!("{longest}x: {{module: x}}"));
        assert!(message.contains("…\" is longer than 253 bytes"), "{message}");
    }
}
