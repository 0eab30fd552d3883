//! Why a configuration is refused, in the words the operator reads.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::{
    CONFIG_BYTES_MAX, DigestError, ModuleError, POLICIES_MAX, PolicyNameError, SECONDS_MAX,
};
use crate::host_capabilities::HostCapabilityError;

/// Most characters of a foreign name that an error message repeats.
const SHOWN_CHARS_MAX: usize = 80;

/// Why there are no checked policies.
#[derive(Debug, Error)]
pub(crate) enum ConfigError {
    /// The file could not be opened or read.
    #[error("{}: cannot be read: {cause}", .path.display())]
    Unreadable { path: PathBuf, cause: io::Error },
    /// The file is longer than [`CONFIG_BYTES_MAX`].
    #[error("{}: longer than {CONFIG_BYTES_MAX} bytes", .path.display())]
    TooLong { path: PathBuf },
    /// The thread that reads the YAML could not be started.
    #[error("{}: no thread to read it: {cause}", .path.display())]
    NoThread { path: PathBuf, cause: io::Error },
    /// The file is not text.
    #[error("{}:{line}: not UTF-8 text", .path.display())]
    NotUtf8 { path: PathBuf, line: usize },
    /// The text is not one YAML document within the limits. The message is the YAML reader's,
    /// without the position it would repeat.
    #[error("{place}: {message}")]
    NotYaml { place: Place, message: String },
    /// The file names no policy. A daemon with nothing to evaluate would look healthy.
    #[error("{}: no policies: the file must map at least one name to a policy", .path.display())]
    NoPolicies { path: PathBuf },
    /// The YAML is fine, what it says is not.
    #[error("{place}: {}{problem}", policy_prefix(.policy.as_deref()))]
    Refused {
        place: Place,
        /// The policy it was found in.
        policy: Option<String>,
        problem: Box<Problem>,
    },
}

fn policy_prefix(policy: Option<&str>) -> String {
    policy.map_or_else(String::new, |name| format!("policy \"{}\": ", shown(name)))
}

/// A place in a file; line and column count characters from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) path: PathBuf,
    pub(crate) line: u64,
    pub(crate) column: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.path.display(), self.line, self.column)
    }
}

/// What is wrong with a configuration that is well-formed YAML. `key` is the way to the
/// value inside the policy, for example `settings.allowed[2]`.
#[derive(Debug, Clone, PartialEq, Error)]
pub(crate) enum Problem {
    #[error("expected a mapping from policy names to policies, found {found}")]
    NotPolicies { found: &'static str },
    #[error("more than {POLICIES_MAX} policies")]
    TooManyPolicies,
    #[error("a policy name must be a string, found {found}; put it in quotes")]
    NameNotText { found: &'static str },
    #[error("policy name \"{name}\" {reason}")]
    BadName { name: String, reason: PolicyNameError },
    #[error("defined twice (first on line {first_line})")]
    DefinedTwice { first_line: u64 },
    #[error("expected a mapping of keys, found {found}")]
    NotAPolicy { found: &'static str },
    #[error("this is a policy group; policy groups are not available in this version")]
    PolicyGroup,
    #[error("required key \"{key}\" is missing")]
    MissingKey { key: String },
    #[error("unknown key \"{key}\" (known: {})", .known.join(", "))]
    UnknownKey { key: String, known: &'static [&'static str] },
    #[error("duplicate key \"{key}\" (first on line {first_line})")]
    DuplicateKey { key: String, first_line: u64 },
    #[error("{}keys must be strings, found {found}; put it in quotes", within(.key))]
    KeyNotText { key: String, found: &'static str },
    #[error("{}the merge key \"<<\" is not supported; write the keys out", within(.key))]
    MergeKey { key: String },
    #[error("{key}: expected {expected}, found {found}")]
    WrongType { key: String, expected: &'static str, found: &'static str },
    #[error("{key}: must not be empty")]
    EmptyText { key: String },
    #[error("{key}: .nan and .inf have no JSON form")]
    NotFinite { key: String },
    #[error("{key}: the integer does not fit into 64 bits; write it as a float or in quotes")]
    IntegerTooLarge { key: String },
    #[error("module: {0}")]
    Module(ModuleError),
    #[error("policyMode: expected protect or monitor, found \"{found}\"")]
    PolicyMode { found: String },
    #[error("{key}: must be at least 0.001 and at most {SECONDS_MAX}")]
    Seconds { key: String },
    #[error("start: expected auto, snapshot or fresh, found \"{found}\"")]
    StartMode { found: String },
    #[error("{key}: must be at least 1")]
    NoUse { key: String },
    #[error(
        "memory: must be a number of bytes, or one with Ki, Mi or Gi behind it, of at least 64Ki \
         and at most 4Gi"
    )]
    Memory,
    #[error("sha256: {0}")]
    Digest(DigestError),
    #[error("hostCapabilities: {0}")]
    HostCapability(HostCapabilityError),
}

/// `key` as the beginning of a message; nothing for the policy itself.
fn within(key: &str) -> String {
    if key.is_empty() { String::new() } else { format!("{key}: ") }
}

/// A foreign name made safe for one line of a log, and cut when it is overlong.
pub(super) fn shown(text: &str) -> String {
    printable(text, SHOWN_CHARS_MAX)
}

pub(super) fn printable(text: &str, chars_max: usize) -> String {
    let mut printable = String::new();
    for character in text.chars().take(chars_max) {
        match character {
            '\'' => printable.push(character),
            _ => printable.extend(character.escape_debug()),
        }
    }
    if text.chars().nth(chars_max).is_some() {
        printable.push('…');
    }
    printable
}

#[cfg(test)]
mod tests {
    use crate::config::tests::policy_refusal;

    #[test]
    fn messages_do_not_repeat_settings_or_raw_control_characters() {
        for lines in [
            "settings: {token: s3cr3t, token: s3cr3t}",
            "settings: {token: [s3cr3t, .nan]}",
            "settings: [s3cr3t]",
            "settings: {token: s3cr3t",
            "settings: {token: !!int s3cr3t}",
            "settings: {token: !s3cr3t}",
            "settings: {token: !!s3cr3t x}",
            "settings: {token: *s3cr3t}",
        ] {
            let message = policy_refusal(lines);
            assert!(!message.contains("s3cr3t"), "{message}");
        }
        let message = policy_refusal("\"a\\e[31m\\nb\": 1");
        assert!(message.contains(r#"unknown key "a\u{1b}[31m\nb""#), "{message}");
        let message = policy_refusal(&format!("? {}\n: 1", "k".repeat(100_000)));
        assert!(message.len() < 500, "{message}");
    }
}
