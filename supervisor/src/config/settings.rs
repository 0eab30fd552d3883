//! A policy's settings: YAML in, JSON out.
#![forbid(unsafe_code)]

use super::fields::distinct_keys;
use super::scope::{Scope, Trail};
use super::yaml::{Node, Value};
use super::{ConfigError, Problem};

pub(super) fn settings(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &Node,
) -> Result<String, ConfigError> {
    match &node.value {
        Value::Null => Ok("{}".to_owned()),
        Value::Mapping(_) => {
            let mut json = String::new();
            write_json(scope, key, node, &mut json)?;
            Ok(json)
        }
        _ => Err(scope.wrong_type(node, key, "a mapping")),
    }
}

/// Appends `node` as JSON, mappings in their order. Written by hand because the usual JSON
/// trees sort their keys and turn `.nan` into `null`.
pub(super) fn write_json(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &Node,
    json: &mut String,
) -> Result<(), ConfigError> {
    match &node.value {
        Value::Null => json.push_str("null"),
        Value::Boolean(value) => json.push_str(if *value { "true" } else { "false" }),
        Value::Negative(value) => json.push_str(&value.to_string()),
        Value::Unsigned(value) => json.push_str(&value.to_string()),
        Value::Float(value) => json.push_str(&json_number(scope, key, node, *value)?),
        Value::Text(text) => json.push_str(&json_text(text)),
        Value::List(items) => {
            json.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    json.push(',');
                }
                write_json(scope, &Trail::Item(key, index), item, json)?;
            }
            json.push(']');
        }
        Value::Mapping(entries) => {
            let names = distinct_keys(scope, key, entries)?;
            json.push('{');
            for (index, ((name, _), (_, value))) in names.iter().zip(entries).enumerate() {
                if index > 0 {
                    json.push(',');
                }
                json.push_str(&json_text(name));
                json.push(':');
                write_json(scope, &Trail::Key(key, name), value, json)?;
            }
            json.push('}');
        }
    }
    Ok(())
}

fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn json_number(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &Node,
    value: f64,
) -> Result<String, ConfigError> {
    if scope.is_rounded_integer(node) {
        let key = key.to_string();
        return Err(scope.refuse(node, Problem::IntegerTooLarge { key }));
    }
    match serde_json::Number::from_f64(value) {
        Some(number) => Ok(number.to_string()),
        None => {
            let key = key.to_string();
            Err(scope.refuse(node, Problem::NotFinite { key }))
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::tests::{policy, policy_refusal, settings_of};

    #[test]
    fn settings_become_json_in_the_order_of_the_file() {
        assert_eq!(settings_of("~"), "{}");
        assert_eq!(settings_of(""), "{}");
        assert_eq!(settings_of("{}"), "{}");
        assert_eq!(
            settings_of("{z: [], a: {y: {}, b: ~}, \"quo\\\"te\\n\": 'ü'}"),
            r#"{"z":[],"a":{"y":{},"b":null},"quo\"te\n":"ü"}"#
        );
        assert_eq!(
            policy("settings:\n  text: |\n    one\n    two\n  folded: >-\n    a\n    b").settings,
            r#"{"text":"one\ntwo\n","folded":"a b"}"#
        );
    }

    #[test]
    fn numbers_in_settings_keep_their_kind() {
        let cases = [
            ("5", "5"),
            ("+5", "5"),
            ("-5", "-5"),
            ("5.0", "5.0"),
            ("1e3", "1000.0"),
            ("!!float 5", "5.0"),
            (".5", "0.5"),
            ("0x1F", "31"),
            ("0o17", "15"),
            ("18446744073709551615", "18446744073709551615"),
            ("-9223372036854775808", "-9223372036854775808"),
            ("9007199254740993", "9007199254740993"),
            ("0.1", "0.1"),
        ];
        for (yaml, json) in cases {
            assert_eq!(
                settings_of(&format!("{{n: {yaml}}}")),
                format!("{{\"n\":{json}}}"),
                "{yaml}"
            );
        }
    }

    #[test]
    fn settings_that_json_cannot_hold_are_refused() {
        for number in [".nan", ".inf", "-.INF", "1e999"] {
            assert_eq!(
                policy_refusal(&format!("settings:\n  a: [{{b: {number}}}]")),
                "4:13: policy \"p\": settings.a[0].b: .nan and .inf have no JSON form"
            );
        }
        for number in ["18446744073709551616", "-9223372036854775809", "+99999999999999999999"] {
            assert_eq!(
                policy_refusal(&format!("settings: {{n: {number}}}")),
                "3:17: policy \"p\": settings.n: the integer does not fit into 64 bits; write it \
                 as a float or in quotes"
            );
        }
        assert_eq!(
            policy_refusal("settings: {1: a}"),
            "3:14: policy \"p\": settings: keys must be strings, found an integer; put it in \
             quotes"
        );
        assert!(policy_refusal("settings: {a: {~: b}}").contains("settings.a: keys must be"));
    }
}
