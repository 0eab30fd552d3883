//! The builtins that OPA leaves to the host.
#![forbid(unsafe_code)]

use std::time::SystemTime;

use serde_json::Value;

/// What builtins share in one evaluation.
#[derive(Debug)]
pub(super) struct Evaluation {
    now: SystemTime,
}

impl Evaluation {
    pub(super) fn new() -> Self {
        Self { now: SystemTime::now() }
    }
}

/// Whether there is a builtin of that name.
pub(super) fn is_known(name: &str) -> bool {
    matches!(name, "hex.decode" | "sprintf" | "time.now_ns" | "trace")
}

/// What a builtin comes to; nothing if that is undefined.
///
/// # Errors
/// The builtin fails.
pub(super) fn call(
    state: &mut Evaluation,
    name: &str,
    arguments: &[Value],
) -> Result<Option<Value>, String> {
    match (name, arguments) {
        ("trace", [Value::String(_)]) => Ok(Some(Value::Bool(true))),
        ("time.now_ns", []) => {
            let since = state.now.duration_since(SystemTime::UNIX_EPOCH);
            let nanoseconds = since.map_err(|error| error.to_string())?.as_nanos();
            Ok(u64::try_from(nanoseconds).ok().map(Value::from))
        }
        ("sprintf", [Value::String(format), Value::Array(values)]) => {
            Ok(Some(Value::String(formatted(format, values))))
        }
        ("hex.decode", [Value::String(text)]) => decoded(text).map(Value::String).map(Some),
        _ => Err("arguments of the wrong type".to_owned()),
    }
}

fn formatted(format: &str, values: &[Value]) -> String {
    let mut values = values.iter();
    let mut pieces = format.split('%');
    let mut text = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        match values.next() {
            Some(Value::String(value)) => text.push_str(value),
            Some(value) => text.push_str(&value.to_string()),
            None => text.push_str("%!(MISSING)"),
        }
        text.push_str(piece.get(1..).unwrap_or_default());
    }
    text
}

fn decoded(text: &str) -> Result<String, String> {
    let digits: Option<Vec<_>> = text.chars().map(|digit| digit.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len().is_multiple_of(2)).ok_or("not hexadecimal")?;
    let bytes = digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit));
    let bytes: Option<Vec<_>> = bytes.map(|byte| u8::try_from(byte).ok()).collect();
    String::from_utf8(bytes.unwrap_or_default()).map_err(|error| error.to_string())
}
