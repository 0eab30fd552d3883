//! How a policy's guest is started: once for all requests, or for each of them.
#![forbid(unsafe_code)]

use std::num::NonZeroU64;
use std::time::Duration;

use clap::ValueEnum;

use super::error::shown;
use super::fields::{Fields, seconds, text};
use super::scope::{Scope, Trail};
use super::settings::write_json;
use super::yaml::{Node, Value};
use super::{ConfigError, Problem};

/// How a guest comes to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StartMode {
    /// As the faster of the two, measured when the policy is loaded
    Auto,
    /// From a state that is kept of one start
    Snapshot,
    /// From the very start, every time
    Fresh,
}

/// The request that a guest is started and measured with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Warmup {
    /// One that fits most policies.
    #[default]
    Synthetic,
    /// None.
    Off,
    /// This one: any JSON value.
    Given(String),
}

/// Until when a started guest is used; `None` for the daemon's default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SnapshotLimits {
    pub(crate) age_max: Option<Duration>,
    pub(crate) uses_max: Option<NonZeroU64>,
}

pub(super) fn start_mode(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &Node,
) -> Result<StartMode, ConfigError> {
    match text(scope, key, node)? {
        "auto" => Ok(StartMode::Auto),
        "snapshot" => Ok(StartMode::Snapshot),
        "fresh" => Ok(StartMode::Fresh),
        other => {
            let found = shown(other);
            Err(scope.refuse(node, Problem::StartMode { found }))
        }
    }
}

/// Whether it is a request that the policy can read shows when it is known which kind of
/// policy it is.
pub(super) fn warmup(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &Node,
) -> Result<Warmup, ConfigError> {
    match &node.value {
        Value::Null | Value::Boolean(false) => Ok(Warmup::Synthetic),
        Value::Text(word) if word == "none" => Ok(Warmup::Off),
        Value::Mapping(_) | Value::List(_) => {
            let mut json = String::new();
            write_json(scope, key, node, &mut json)?;
            Ok(Warmup::Given(json))
        }
        _ => Err(scope.wrong_type(node, key, "a request (a mapping or a list), false or none")),
    }
}

pub(super) fn snapshot_limits(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &Node,
) -> Result<SnapshotLimits, ConfigError> {
    let entries = match &node.value {
        Value::Null => return Ok(SnapshotLimits::default()),
        Value::Mapping(entries) => entries,
        _ => return Err(scope.wrong_type(node, key, "a mapping")),
    };
    let fields = Fields::read(scope, key, entries)?;
    fields.require_known(&["maxAgeSeconds", "maxUses"])?;
    Ok(SnapshotLimits {
        age_max: fields.optional("maxAgeSeconds", seconds)?.flatten(),
        uses_max: fields.optional("maxUses", uses)?.flatten(),
    })
}

fn uses(scope: Scope<'_>, key: &Trail<'_>, node: &Node) -> Result<Option<NonZeroU64>, ConfigError> {
    let count = match &node.value {
        Value::Null => return Ok(None),
        Value::Unsigned(count) => NonZeroU64::new(*count),
        Value::Negative(_) => None,
        _ => return Err(scope.wrong_type(node, key, "a number of uses")),
    };
    let key = || key.to_string();
    count.map(Some).ok_or_else(|| scope.refuse(node, Problem::NoUse { key: key() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{policy, policy_refusal};

    #[test]
    fn a_policy_that_says_nothing_is_started_as_the_daemon_says() {
        for lines in ["", "snapshot:", "warmup:", "warmup: false"] {
            let policy = policy(lines);
            assert_eq!(policy.start, None, "{lines}");
            assert_eq!(policy.warmup, Warmup::Synthetic, "{lines}");
            assert_eq!(policy.snapshot, SnapshotLimits::default(), "{lines}");
        }
    }

    #[test]
    fn a_mode_is_one_of_three_words() {
        for (word, mode) in [
            ("auto", StartMode::Auto),
            ("snapshot", StartMode::Snapshot),
            ("fresh", StartMode::Fresh),
        ] {
            assert_eq!(policy(&format!("start: {word}")).start, Some(mode));
        }
        assert_eq!(
            policy_refusal("start: Auto"),
            "3:10: policy \"p\": start: expected auto, snapshot or fresh, found \"Auto\""
        );
        assert_eq!(
            policy_refusal("start: true"),
            "3:10: policy \"p\": start: expected a string, found a boolean"
        );
    }

    #[test]
    fn a_warmup_is_a_request_or_switched_off() {
        assert_eq!(policy("warmup: none").warmup, Warmup::Off);
        assert_eq!(
            policy("warmup: {request: {uid: 1, x: [~]}}").warmup,
            Warmup::Given(r#"{"request":{"uid":1,"x":[null]}}"#.to_owned())
        );
        assert_eq!(policy("warmup: [1]").warmup, Warmup::Given("[1]".to_owned()));
        for (written, found) in [("true", "a boolean"), ("5", "an integer"), ("off", "a string")] {
            assert_eq!(
                policy_refusal(&format!("warmup: {written}")),
                format!(
                    "3:11: policy \"p\": warmup: expected a request (a mapping or a list), false \
                     or none, found {found}"
                )
            );
        }
    }

    #[test]
    fn limits_of_snapshots_are_bounded() {
        let snapshot = policy("snapshot: {maxAgeSeconds: 0.5, maxUses: 7}").snapshot;
        let expected = SnapshotLimits {
            age_max: Some(Duration::from_millis(500)),
            uses_max: NonZeroU64::new(7),
        };
        assert_eq!(snapshot, expected);
        for (lines, message) in [
            ("snapshot: 5", "snapshot: expected a mapping, found an integer"),
            ("snapshot: {maxAge: 5}", "unknown key \"snapshot.maxAge\""),
            ("snapshot: {maxUses: 0}", "snapshot.maxUses: must be at least 1"),
            ("snapshot: {maxUses: -1}", "snapshot.maxUses: must be at least 1"),
            ("snapshot: {maxUses: 1.5}", "snapshot.maxUses: expected a number of uses"),
            ("snapshot: {maxAgeSeconds: 0}", "snapshot.maxAgeSeconds: must be at least 0.001"),
            ("snapshot: {maxAgeSeconds: 5m}", "maxAgeSeconds: expected a number of seconds"),
        ] {
            let refusal = policy_refusal(lines);
            assert!(refusal.contains(message), "{refusal}");
        }
    }
}
