//! Where checking has got to: in which file and policy, and on the way to which key.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::Path;

use serde_saphyr::Span;

use super::error::shown;
use super::yaml::Node;
use super::{ConfigError, Place, Problem};

/// Where checking has got to: enough to say where a problem lies.
#[derive(Clone, Copy)]
pub(super) struct Scope<'a> {
    pub(super) path: &'a Path,
    pub(super) text: &'a str,
    pub(super) policy: Option<&'a str>,
}

impl Scope<'_> {
    pub(super) fn refuse(self, node: &Node, problem: Problem) -> ConfigError {
        ConfigError::Refused {
            place: Place {
                path: self.path.to_owned(),
                line: node.place.line(),
                column: node.place.column(),
            },
            policy: self.policy.map(str::to_owned),
            problem: Box::new(problem),
        }
    }

    pub(super) fn wrong_type(
        self,
        node: &Node,
        key: &Trail<'_>,
        expected: &'static str,
    ) -> ConfigError {
        let problem =
            Problem::WrongType { key: key.to_string(), expected, found: node.value.kind() };
        self.refuse(node, problem)
    }

    /// Whether a float is an integer that did not fit. The YAML reader turns integers beyond
    /// 64 bits into floats, which would change their value behind the operator's back.
    pub(super) fn is_rounded_integer(self, node: &Node) -> bool {
        written(self.text, node.origin).is_some_and(|text| {
            let integer = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'+' | b'-'));
            integer && text.parse::<u64>().is_err() && text.parse::<i64>().is_err()
        })
    }
}

/// The source text of a scalar, if the YAML reader kept its place.
fn written(text: &str, span: Span) -> Option<&str> {
    let start = usize::try_from(span.byte_offset()?).ok()?;
    let length = usize::try_from(span.byte_len()?).ok()?;
    text.get(start..start.checked_add(length)?)
}

/// The way from a policy to one of its values, kept on the stack so that it costs nothing
/// until it is shown.
#[derive(Clone, Copy)]
pub(super) enum Trail<'a> {
    Policy,
    Key(&'a Trail<'a>, &'a str),
    Item(&'a Trail<'a>, usize),
}

impl fmt::Display for Trail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trail::Policy => Ok(()),
            Trail::Key(Trail::Policy, key) => f.write_str(&shown(key)),
            Trail::Key(parent, key) => write!(f, "{parent}.{}", shown(key)),
            Trail::Item(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}
