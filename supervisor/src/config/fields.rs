//! Mappings with known keys, and the values that more than one key takes.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::time::Duration;

use super::scope::{Scope, Trail};
use super::yaml::{Node, Value};
use super::{ConfigError, Problem, SECONDS_MAX};

/// A key the Kubernetes controller adds for its own use; its value is not looked at.
const CONTROLLER_KEY: &str = "namespacedName";

/// One mapping whose keys are distinct strings.
pub(super) struct Fields<'a> {
    scope: Scope<'a>,
    trail: &'a Trail<'a>,
    entries: HashMap<&'a str, &'a Node>,
    keys: Vec<(&'a str, &'a Node)>,
}

impl<'a> Fields<'a> {
    pub(super) fn read(
        scope: Scope<'a>,
        trail: &'a Trail<'a>,
        mapping: &'a [(Node, Node)],
    ) -> Result<Self, ConfigError> {
        let keys = distinct_keys(scope, trail, mapping)?;
        let entries =
            keys.iter().zip(mapping).map(|((name, _), (_, value))| (*name, value)).collect();
        Ok(Self { scope, trail, entries, keys })
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    pub(super) fn require_known(&self, known: &'static [&'static str]) -> Result<(), ConfigError> {
        let unknown = self.keys.iter().find(|(name, _)| {
            let harmless = matches!(self.trail, Trail::Policy) && *name == CONTROLLER_KEY;
            !harmless && !known.contains(name)
        });
        match unknown {
            None => Ok(()),
            Some((name, node)) => {
                let key = Trail::Key(self.trail, name).to_string();
                Err(self.scope.refuse(node, Problem::UnknownKey { key, known }))
            }
        }
    }

    /// The value of `key`. Its absence is reported at `owner`.
    pub(super) fn required(&self, owner: &Node, key: &str) -> Result<&'a Node, ConfigError> {
        self.entries.get(key).copied().ok_or_else(|| {
            let key = Trail::Key(self.trail, key).to_string();
            self.scope.refuse(owner, Problem::MissingKey { key })
        })
    }

    /// The checked value of `key`, if it is there.
    pub(super) fn optional<T>(
        &self,
        key: &str,
        check: fn(Scope<'_>, &Trail<'_>, &Node) -> Result<T, ConfigError>,
    ) -> Result<Option<T>, ConfigError> {
        self.entries
            .get(key)
            .map(|node| check(self.scope, &Trail::Key(self.trail, key), node))
            .transpose()
    }
}

/// The keys of a mapping, in its order. All of them are strings, and no two are equal.
pub(super) fn distinct_keys<'a>(
    scope: Scope<'_>,
    trail: &Trail<'_>,
    mapping: &'a [(Node, Node)],
) -> Result<Vec<(&'a str, &'a Node)>, ConfigError> {
    let mut first_lines = HashMap::with_capacity(mapping.len());
    let mut keys = Vec::with_capacity(mapping.len());
    for (node, _) in mapping {
        let Value::Text(name) = &node.value else {
            let key = trail.to_string();
            let found = node.value.kind();
            return Err(scope.refuse(node, Problem::KeyNotText { key, found }));
        };
        if name == "<<" {
            let key = trail.to_string();
            return Err(scope.refuse(node, Problem::MergeKey { key }));
        }
        if let Some(first_line) = first_lines.insert(name.as_str(), node.place.line()) {
            let key = Trail::Key(trail, name).to_string();
            return Err(scope.refuse(node, Problem::DuplicateKey { key, first_line }));
        }
        keys.push((name.as_str(), node));
    }
    Ok(keys)
}

pub(super) fn text<'a>(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &'a Node,
) -> Result<&'a str, ConfigError> {
    match &node.value {
        Value::Text(text) => Ok(text),
        _ => Err(scope.wrong_type(node, key, "a string")),
    }
}

pub(super) fn list<'a>(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &'a Node,
    expected: &'static str,
) -> Result<&'a [Node], ConfigError> {
    match &node.value {
        Value::List(items) => Ok(items),
        _ => Err(scope.wrong_type(node, key, expected)),
    }
}

/// Seconds, rounded to the nearest millisecond.
pub(super) fn seconds(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &Node,
) -> Result<Option<Duration>, ConfigError> {
    let seconds = match &node.value {
        Value::Null => return Ok(None),
        Value::Unsigned(seconds) => Some(Duration::from_secs(*seconds)),
        Value::Float(seconds) => Duration::try_from_secs_f64(*seconds).ok(),
        Value::Negative(_) => None,
        _ => return Err(scope.wrong_type(node, key, "a number of seconds")),
    };
    seconds
        .filter(|exact| *exact <= Duration::from_secs(SECONDS_MAX))
        .map(|exact| {
            let rounded = exact + Duration::from_micros(500);
            Duration::new(rounded.as_secs(), rounded.subsec_millis() * 1_000_000)
        })
        .filter(|rounded| !rounded.is_zero())
        .map(Some)
        .ok_or_else(|| scope.refuse(node, Problem::Seconds { key: key.to_string() }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::config::tests::{policy, policy_refusal};

    #[test]
    fn an_unknown_key_is_refused_with_the_known_ones() {
        assert_eq!(
            policy_refusal("message: hi\npolcyMode: monitor"),
            "4:3: policy \"p\": unknown key \"polcyMode\" (known: module, policyMode, \
             allowedToMutate, settings, contextAwareResources, hostCapabilities, message, \
             timeoutEvalSeconds, sha256, memory, start, warmup, snapshot, entrypoint, \
             strictBuiltinErrors)"
        );
        assert!(policy_refusal("Message: hi").contains("unknown key \"Message\""));
    }

    #[test]
    fn the_controllers_key_is_accepted_with_any_value() {
        for value in ["x", "~", "[1]", "{a: {b: c}}"] {
            policy(&format!("namespacedName: {value}"));
        }
        let message = policy_refusal("contextAwareResources: [{namespacedName: x}]");
        assert!(message.contains("unknown key"), "{message}");
    }

    #[test]
    fn a_repeated_key_is_refused_at_every_depth() {
        assert_eq!(
            policy_refusal("module: other.wasm"),
            "3:3: policy \"p\": duplicate key \"module\" (first on line 2)"
        );
        assert_eq!(
            policy_refusal("settings:\n  a: [1, {b: 1, \"b\": 1}]"),
            "4:19: policy \"p\": duplicate key \"settings.a[1].b\" (first on line 4)"
        );
        assert_eq!(
            policy_refusal("contextAwareResources:\n- kind: a\n  kind: b\n  apiVersion: c"),
            "5:5: policy \"p\": duplicate key \"contextAwareResources[0].kind\" (first on line 4)"
        );
        assert!(policy_refusal("namespacedName: 1\nnamespacedName: 1").contains("duplicate key"));
    }

    #[test]
    fn deadlines_are_positive_bounded_and_in_milliseconds() {
        let cases = [
            ("1", 1000),
            ("0.5", 500),
            ("0.1", 100),
            ("1e1", 10_000),
            ("0.0014", 1),
            ("0.0005", 1),
            ("2.9996", 3000),
            ("3600", 3_600_000),
            ("3600.0", 3_600_000),
        ];
        for (written, milliseconds) in cases {
            let policy = policy(&format!("timeoutEvalSeconds: {written}"));
            assert_eq!(policy.timeout, Some(Duration::from_millis(milliseconds)), "{written}");
        }
        for written in ["0", "-0", "0.0", "0.0004", "-1", "-0.5", "3601", "3600.001", "1e30"] {
            assert_eq!(
                policy_refusal(&format!("timeoutEvalSeconds: {written}")),
                "3:23: policy \"p\": timeoutEvalSeconds: must be at least 0.001 and at most 3600"
            );
        }
        for written in [".nan", ".inf", "99999999999999999999"] {
            let message = policy_refusal(&format!("timeoutEvalSeconds: {written}"));
            assert!(message.contains("at most 3600"), "{written}: {message}");
        }
    }
}
