//! YAML text in, a tree of nodes that know their place out.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::fmt;
use std::path::Path;
use std::thread;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{
    DuplicateKeyPolicy, Error, Location, MergeKeyPolicy, MessageFormatter as _,
    NonFiniteFloatPolicy, Span, Spanned, UserMessageFormatter,
};

use super::error::printable;
use super::{CONFIG_BYTES_MAX, ConfigError, Place};

/// Most nodes (scalars, lists and mappings) after aliases are expanded: 100 for each of
/// [`POLICIES_MAX`](super::POLICIES_MAX) policies. Each one takes some hundred bytes of memory.
const YAML_NODES_MAX: usize = 1_000_000;

/// Most bytes of scalars after aliases are expanded. A file without aliases stays below
/// [`CONFIG_BYTES_MAX`]; this leaves as much again to aliases.
const YAML_SCALAR_BYTES_MAX: usize = 2 * CONFIG_BYTES_MAX;

/// Deepest nesting: what policy-server's YAML reader and the usual JSON readers take.
const YAML_DEPTH_MAX: usize = 128;

/// Stack of the thread that reads the YAML. The reader is recursive and takes 5 KiB a level,
/// in an unoptimised build 42 KiB, so this is three times what [`YAML_DEPTH_MAX`] can need.
const YAML_STACK_BYTES: usize = 16 * 1024 * 1024;

/// Most characters of the YAML reader's own messages.
const MESSAGE_CHARS_MAX: usize = 400;

/// A YAML node and where it stands.
pub(super) struct Node {
    pub(super) value: Value,
    /// Where the node is used: for an alias, the place of the alias.
    pub(super) place: Location,
    /// Which part of the text it was read from: for an alias, the anchored node.
    pub(super) origin: Span,
}

/// What a YAML node says.
pub(super) enum Value {
    Null,
    Boolean(bool),
    /// An integer written with a minus sign.
    Negative(i64),
    /// Any other integer up to 64 bits.
    Unsigned(u64),
    /// A float, or an integer that does not fit.
    Float(f64),
    Text(String),
    List(Vec<Node>),
    /// Keys of any kind, also repeated ones, in the order of the text.
    Mapping(Vec<(Node, Node)>),
}

impl Value {
    /// The kind of value, in the operator's words.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Value::Null => "null",
            Value::Boolean(_) => "a boolean",
            Value::Negative(_) | Value::Unsigned(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Text(_) => "a string",
            Value::List(_) => "a list",
            Value::Mapping(_) => "a mapping",
        }
    }
}

/// Reads the one YAML document in `text`; no text at all is a null.
///
/// The work is done in a thread of its own, so that deep nesting meets a stack of known size
/// whoever calls this.
pub(super) fn read_yaml(path: &Path, text: &str) -> Result<Node, ConfigError> {
    let no_thread = |cause| ConfigError::NoThread { path: path.to_owned(), cause };
    thread::scope(|scope| {
        let reader = thread::Builder::new()
            .name("config".to_owned())
            .stack_size(YAML_STACK_BYTES)
            .spawn_scoped(scope, || read_yaml_here(path, text))
            .map_err(no_thread)?;
        reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn read_yaml_here(path: &Path, text: &str) -> Result<Node, ConfigError> {
    serde_saphyr::from_str_with_options(text, yaml_options()).map_err(|error| {
        // Without a place the text as a whole is at fault.
        let (line, column) =
            error.location().map_or((1, 1), |place| (place.line(), place.column()));
        let message = match error.without_snippet() {
            // The reader's own message repeats the tag, which may be a secret without quotes.
            Error::UnsupportedTag { .. } => {
                Cow::Borrowed("unsupported tag; put a value that begins with \"!\" in quotes")
            }
            other => UserMessageFormatter.format_message(other),
        };
        ConfigError::NotYaml {
            place: Place { path: path.to_owned(), line, column },
            message: printable(&message, MESSAGE_CHARS_MAX),
        }
    })
}

fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: YAML_NODES_MAX,
            // A node makes at most two events; the rest are aliases and the frame.
            max_events: 3 * YAML_NODES_MAX,
            max_total_scalar_bytes: YAML_SCALAR_BYTES_MAX,
            max_depth: YAML_DEPTH_MAX,
            // Many policies may share one anchor; what aliases expand to is bounded above.
            enforce_alias_anchor_ratio: false,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: YAML_NODES_MAX,
        },
        // Passed on, so that our own refusals can name the policy and the key.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        merge_keys: MergeKeyPolicy::AsOrdinary,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        reject_unsupported_tags: true,
        // Kept comments count against a small limit that a long comment would exceed.
        emit_comments: false,
        // A snippet would copy the file, and with it secrets, into the log.
        with_snippet: false,
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Spanned { value, referenced, defined } = Spanned::deserialize(deserializer)?;
        Ok(Self { value, place: referenced, origin: defined.span() })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a scalar, a list or a mapping")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Boolean(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Negative(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut mapping: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = mapping.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Mapping(entries))
    }
}

#[cfg(test)]
mod tests {
    use crate::config::ConfigError;
    use crate::config::tests::{entry, policy, policy_refusal, read, refusal, settings_of};

    #[test]
    fn text_that_is_no_yaml_is_refused_with_its_place() {
        assert_eq!(refusal("p:\n  module: [a\nq: 1\n"), "3:2: illegal placement of ':' indicator");
        assert!(refusal("p:\n\tmodule: x\n").starts_with("2:"));
        assert!(refusal("p: *nowhere\n").starts_with("1:4: "));
        assert!(refusal("p: &a [*a]\n").starts_with("1:8: "));
        assert!(refusal("p: {module: x}\n---\nq: {module: x}\n").starts_with("3:1: "));
        assert!(refusal("p: {module: !secret x}\n").starts_with("1:"));
    }

    #[test]
    fn booleans_are_those_of_yaml_1_2() {
        for word in ["true", "True", "TRUE"] {
            assert!(policy(&format!("allowedToMutate: {word}")).allowed_to_mutate);
        }
        assert!(!policy("allowedToMutate: false").allowed_to_mutate);
        for word in ["yes", "on", "y", "1", "\"true\"", "~", "tRue"] {
            let message = policy_refusal(&format!("allowedToMutate: {word}"));
            assert!(message.contains("expected a boolean"), "{word}: {message}");
        }
        assert_eq!(
            settings_of("{a: yes, b: No, c: on, d: TRUE}"),
            r#"{"a":"yes","b":"No","c":"on","d":true}"#
        );
    }

    #[test]
    fn what_only_looks_like_a_number_stays_a_string() {
        for yaml in [
            "\"5\"",
            "'0.5'",
            "!!str 5",
            "0755",
            "-01",
            "1_000",
            "1.2.3",
            "2024-01-01",
            "12:30",
            "\"null\"",
            "'true'",
            "5Gi",
            "nan",
        ] {
            let json = settings_of(&format!("{{n: {yaml}}}"));
            let text = yaml.trim_start_matches("!!str ").trim_matches(['"', '\'']);
            assert_eq!(json, format!("{{\"n\":\"{text}\"}}"), "{yaml}");
        }
    }

    #[test]
    fn aliases_are_expanded_and_merge_keys_are_refused() {
        let text = "a: {module: a, settings: &common {k: [1, 2]}}\n\
                    b: {module: b, settings: *common}\n";
        assert_eq!(read(text).unwrap()[1].settings, r#"{"k":[1,2]}"#);

        let text = "a: &a {module: a}\nb:\n  <<: *a\n";
        assert_eq!(
            refusal(text),
            "3:3: policy \"b\": the merge key \"<<\" is not supported; write the keys out"
        );
        assert!(policy_refusal("settings: {<<: {a: b}}").contains("settings: the merge key"));
    }

    #[test]
    fn an_aliased_value_is_refused_where_it_is_used() {
        let text = "a: {module: a, message: &text hello}\n\
                    b: {module: b, allowedToMutate: *text}\n";
        assert!(refusal(text).starts_with("2:33: policy \"b\": allowedToMutate: expected"));
    }

    #[test]
    fn one_anchor_may_serve_many_policies() {
        let mut text = "p0: {module: m, settings: &s {a: 1}}\n".to_owned();
        for index in 1..2000 {
            text.push_str(&format!("p{index}: {{module: m, settings: *s}}\n"));
        }
        assert_eq!(read(&text).unwrap().len(), 2000);
    }

    #[test]
    fn alias_bombs_are_refused() {
        let mut nodes = "p:\n  module: m\n  settings:\n    l0: &l0 [x]\n".to_owned();
        for level in 1..20 {
            let previous = level - 1;
            nodes.push_str(&format!("    l{level}: &l{level} [*l{previous}"));
            nodes.push_str(&format!(", *l{previous}").repeat(9));
            nodes.push_str("]\n");
        }
        assert!(matches!(read(&nodes), Err(ConfigError::NotYaml { .. })));

        let mut bytes = format!("p:\n  module: &long {}\n  settings:\n", "x".repeat(1_000_000));
        for index in 0..100 {
            bytes.push_str(&format!("    a{index}: *long\n"));
        }
        assert!(matches!(read(&bytes), Err(ConfigError::NotYaml { .. })));
    }

    #[test]
    fn deep_nesting_is_refused_and_moderate_nesting_is_not() {
        let lists = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        let mappings = |depth: usize| format!("{}1{}", "{a: ".repeat(depth), "}".repeat(depth));
        for nested in [lists(125), mappings(125)] {
            assert_eq!(policy(&format!("settings: {{a: {nested}}}")).settings.len(), {
                let compact: usize = nested.replace(' ', "").replace('a', "\"a\"").len();
                compact + "{'a':}".len()
            });
        }
        for depth in [127, 300, 100_000] {
            for nested in [lists(depth), mappings(depth)] {
                let error = read(&entry(&format!("settings: {{a: {nested}}}"))).unwrap_err();
                assert!(matches!(error, ConfigError::NotYaml { .. }), "{depth}");
            }
        }
        let mut chained = "settings:\n  l0: &l0 [x]\n".to_owned();
        for level in 1..1000 {
            chained.push_str(&format!("  l{level}: &l{level} [*l{}]\n", level - 1));
        }
        assert!(matches!(read(&entry(&chained)), Err(ConfigError::NotYaml { .. })));
    }

    #[test]
    fn long_comments_do_no_harm() {
        let comment = "  # why\n".repeat(200);
        let text = format!("p:\n{comment}  module: x\n{comment}  settings:\n{comment}    a: 1\n");
        assert_eq!(read(&text).unwrap()[0].settings, r#"{"a":1}"#);
    }
}
