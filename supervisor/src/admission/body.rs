//! Reading the body of an HTTP request as JSON, and what to tell a client whose body is not.
//! The texts are those of Kubewarden's policy server, which its users know.

use std::fmt;

use serde::Deserialize;
use serde_json::error::Category;
use serde_json::value::RawValue;
use thiserror::Error;

use super::strict_json::StrictText;
use crate::log::shorten;

/// Why a body is no request. The text is complete and meant for the client.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub(crate) enum BodyError {
    /// Not one JSON document in UTF-8, or nested too deep to read: HTTP 400.
    NotJson(String),
    /// JSON, but not of the expected shape, or with a repeated key: HTTP 422.
    WrongShape(String),
}

impl BodyError {
    fn new(category: Category, reason: impl fmt::Display) -> Self {
        // It quotes what it found, which can be nearly all of the body.
        let reason = reason.to_string();
        let reason = shorten(&reason);
        match category {
            Category::Data => Self::WrongShape(format!(
                "Failed to deserialize the JSON body into the target type: {reason}"
            )),
            Category::Syntax | Category::Eof | Category::Io => {
                Self::NotJson(format!("Failed to parse the request body as JSON: {reason}"))
            }
        }
    }
}

impl From<&serde_json::Error> for BodyError {
    fn from(error: &serde_json::Error) -> Self {
        Self::new(error.classify(), error)
    }
}

/// The body as text, all of it: the JSON reader alone would not look into what it skips.
///
/// # Errors
///
/// [`BodyError::NotJson`] if it is not UTF-8.
pub(crate) fn utf8(body: &[u8]) -> Result<&str, BodyError> {
    str::from_utf8(body).map_err(|error| BodyError::new(Category::Syntax, error))
}

/// Reads a body as one JSON document with nothing after it.
///
/// # Errors
///
/// See [`BodyError`].
pub(crate) fn parse<'a, T: Deserialize<'a>>(body: &'a str) -> Result<T, BodyError> {
    serde_json::from_str(body).map_err(|error| BodyError::from(&error))
}

/// Checks one free-form part of the body; an error names it and counts lines and columns in
/// the body, as the errors of the typed part do.
///
/// # Errors
///
/// See [`BodyError`] and [`StrictText::check`].
pub(crate) fn checked<'a>(
    body: &str,
    raw: &'a RawValue,
    name: &str,
) -> Result<StrictText<'a>, BodyError> {
    StrictText::check(raw).map_err(|error| {
        let text = error.to_string();
        let inner = format!(" at line {} column {}", error.line(), error.column());
        let reason = text.strip_suffix(&inner).unwrap_or(&text);

        let offset = raw.get().as_ptr().addr().saturating_sub(body.as_ptr().addr());
        let before = body.get(..offset).unwrap_or_default();
        let line = before.matches('\n').count() + error.line();
        let column = if error.line() == 1 {
            before.len() - before.rfind('\n').map_or(0, |newline| newline + 1) + error.column()
        } else {
            error.column()
        };
        let separator = if name.is_empty() { "" } else { ": " };
        BodyError::new(
            error.classify(),
            format_args!("{name}{separator}{reason} at line {line} column {column}"),
        )
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::admission::request::ReviewRequest;

    #[track_caller]
    pub(crate) fn assert_wrong_shape(error: &BodyError, part: &str) {
        let BodyError::WrongShape(text) = error else {
            panic!("{error:?}");
        };
        assert!(
            text.starts_with("Failed to deserialize the JSON body into the target type: "),
            "{text}"
        );
        assert!(text.contains(part), "{text}");
    }

    #[track_caller]
    pub(crate) fn assert_not_json(error: &BodyError, part: &str) {
        let BodyError::NotJson(text) = error else {
            panic!("{error:?}");
        };
        assert!(text.starts_with("Failed to parse the request body as JSON: "), "{text}");
        assert!(text.contains(part), "{text}");
    }

    #[test]
    fn errors_do_not_repeat_all_of_the_body() {
        let long = "x".repeat(1 << 20);
        let body = format!(r#"{{"request":"{long}"}}"#);
        let error = ReviewRequest::from_review(body.as_bytes()).unwrap_err();
        assert_wrong_shape(&error, "invalid type: string \"xxx");
        assert!(error.to_string().len() < 5000);
    }

    #[test]
    fn errors_inside_an_object_are_located_in_the_body() {
        let error = |body: &str| ReviewRequest::raw_value(body.as_bytes()).unwrap_err();
        assert_wrong_shape(
            &error("\n  {\"a\":1,\"a\":2}"),
            ": duplicate key `a` at line 2 column 15",
        );
        assert_wrong_shape(
            &error("[1,\n{\"a\":1,\"a\":2}\n]"),
            ": duplicate key `a` at line 2 column 13",
        );
        let error = ReviewRequest::raw(b"{\"request\":\n {\"a\":1,\n\"a\":2}}").unwrap_err();
        assert_wrong_shape(&error, "request: duplicate key `a` at line 3 column 6");
    }
}
