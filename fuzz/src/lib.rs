//! What the targets share: JSON as others read it, to compare with.

use std::fmt;
use std::path::Path;

use conclave_supervisor::fuzzing::settings;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// The most that a message for a person may take: 4 KiB of foreign text, each byte of it in
/// an escape of up to six, and words of our own.
pub const MESSAGE_BYTES_MAX: usize = 6 * 4096 + 512;

/// The value that serde_json reads; none if it reads none, or not the one that is written.
#[must_use]
pub fn reading(text: &str) -> Option<Value> {
    // With a private key it builds another value than the text says.
    if text.contains("serde_json") || text.contains("RawValue") {
        return None;
    }
    serde_json::from_str(text).ok()
}

/// Whether this is one JSON value and nothing else, at any depth.
#[must_use]
pub fn is_json(text: &[u8]) -> bool {
    serde_json::from_slice::<&RawValue>(text).is_ok()
}

/// Whether no object in a JSON text has a key twice: then as many members are written as
/// there are in the value.
#[must_use]
pub fn has_distinct_keys(text: &str, value: &Value) -> bool {
    let (mut written, mut in_string, mut escaped) = (0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_string = !in_string,
            b':' if !in_string => written += 1,
            _ => {}
        }
    }
    written == members(value)
}

fn members(value: &Value) -> usize {
    match value {
        Value::Object(object) => object.values().map(|inner| 1 + members(inner)).sum(),
        Value::Array(array) => array.iter().map(members).sum(),
        _ => 0,
    }
}

/// Checks settings that were accepted: one JSON object without a repeated key, which reads as
/// itself once more.
pub fn assert_settings(json: &str) {
    assert!(json.starts_with('{') && is_json(json.as_bytes()), "{json}");
    if let Some(value) = reading(json) {
        assert!(has_distinct_keys(json, &value), "{json}");
    }
    if let Ok(again) = settings(Path::new("again.yml"), json) {
        assert_eq!(again, json);
    }
}

/// Checks a message about a file: it names the file, fits a line, and has a bounded length.
pub fn assert_one_line(message: &str, prefix: &str) {
    assert!(message.starts_with(prefix), "{message:?}");
    assert!(!message.contains(char::is_control), "{message:?}");
    assert!(message.len() <= MESSAGE_BYTES_MAX, "{} bytes", message.len());
}

/// The members of a JSON object, also repeated ones, as they are written.
#[derive(Debug)]
pub struct Members<'a>(pub Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;

        impl<'de> Visitor<'de> for Collect {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(members)
            }
        }

        deserializer.deserialize_map(Collect).map(Self)
    }
}
