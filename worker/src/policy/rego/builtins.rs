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

/// Why a builtin comes to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// It fails in OPA as well: undefined, unless errors are strict.
    Error(String),
    /// It would come to something in OPA, and we do not know to what. Taken for undefined, that
    /// might keep a rule from denying; so it ends the evaluation.
    Unsupported(String),
}

/// What a builtin comes to; nothing if that is undefined.
///
/// # Errors
/// The builtin fails.
pub(super) fn call(
    state: &mut Evaluation,
    name: &str,
    arguments: &[Value],
) -> Result<Option<Value>, Failure> {
    match (name, arguments) {
        ("trace", [Value::String(_)]) => Ok(Some(Value::Bool(true))),
        ("time.now_ns", []) => {
            let since = state.now.duration_since(SystemTime::UNIX_EPOCH);
            let nanoseconds = since.map_err(|error| Failure::Error(error.to_string()))?.as_nanos();
            Ok(u64::try_from(nanoseconds).ok().map(Value::from))
        }
        ("sprintf", [Value::String(format), Value::Array(values)]) => {
            formatted(format, values).map(Value::String).map(Some)
        }
        ("hex.decode", [Value::String(text)]) => {
            decoded(text).map(Value::String).map(Some).map_err(Failure::Error)
        }
        _ => Err(Failure::Error("arguments of the wrong type".to_owned())),
    }
}

/// Go's `fmt.Sprintf` for what is surely the same here and there: the verbs `%s` and `%v` of
/// strings, `%d` and `%v` of integers, and `%%`, with a value for each.
fn formatted(format: &str, values: &[Value]) -> Result<String, Failure> {
    let unsupported = |what: &str| Failure::Unsupported(format!("{what} is not supported yet"));
    let (mut text, mut values, mut rest) = (String::new(), values.iter(), format);
    while let Some((before, after)) = rest.split_once('%') {
        text.push_str(before);
        let mut verb = after.chars();
        match verb.next() {
            Some('%') => text.push('%'),
            Some(verb) => match (verb, values.next()) {
                ('s' | 'v', Some(Value::String(value))) => text.push_str(value),
                ('d' | 'v', Some(Value::Number(value))) if value.is_i64() || value.is_u64() => {
                    text.push_str(&value.to_string());
                }
                _ => return Err(unsupported(&format!("the verb %{verb} with that value"))),
            },
            None => return Err(unsupported("a format that ends with %")),
        }
        rest = verb.as_str();
    }
    if values.next().is_some() {
        return Err(unsupported("more values than verbs"));
    }
    text.push_str(rest);
    Ok(text)
}

fn decoded(text: &str) -> Result<String, String> {
    let digits: Option<Vec<_>> = text.chars().map(|digit| digit.to_digit(16)).collect();
    let digits = digits.filter(|digits| digits.len().is_multiple_of(2)).ok_or("not hexadecimal")?;
    let bytes = digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit));
    let bytes: Option<Vec<_>> = bytes.map(|byte| u8::try_from(byte).ok()).collect();
    String::from_utf8(bytes.unwrap_or_default()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_format_is_as_in_go_or_ends_the_evaluation() {
        let of = |format: &str, values: Value| formatted(format, values.as_array().unwrap());
        let text = of("%s has %d of %v, 5%%", json!(["a", 3, "b"])).unwrap();
        assert_eq!(text, "a has 3 of b, 5%");
        for (format, values) in [
            ("%05d", json!([3])),
            ("%q", json!(["a"])),
            ("%v", json!([[1]])),
            ("%v", json!([1.5])),
            ("%s", json!([1])),
            ("%s", json!([])),
            ("none", json!([1])),
            ("100%", json!([])),
        ] {
            let failure = of(format, values).unwrap_err();
            assert!(matches!(failure, Failure::Unsupported(_)), "{format}");
        }
    }
}
