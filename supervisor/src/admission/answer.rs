//! What a policy answers, in the formats of Kubewarden's policy protocol. The bytes come from
//! untrusted code: they are an answer only if they are exactly one object of the right shape.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::Error as _;
use serde_json::value::RawValue;

use super::strict_json::StrictText;
use crate::json_object::Object;

/// A policy's answer to `validate`. Absent and `null` are the same.
#[derive(Debug, Clone)]
pub(crate) struct ValidationResponse<'a> {
    pub(crate) accepted: bool,
    pub(crate) message: Option<String>,
    pub(crate) code: Option<u16>,
    /// The complete new object, not a patch.
    pub(crate) mutated_object: Option<StrictText<'a>>,
    pub(crate) audit_annotations: Option<BTreeMap<String, String>>,
    pub(crate) warnings: Option<Vec<String>>,
}

impl<'a> ValidationResponse<'a> {
    /// Reads exactly one JSON object. Unknown keys are ignored.
    ///
    /// # Errors
    ///
    /// Anything else; also a known key of the wrong type, a `code` that is no 16-bit number,
    /// and a mutated object with a repeated key.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, serde_json::Error> {
        let wire: ValidationWire<'a> = parse_object(bytes)?;
        Ok(Self {
            accepted: wire.accepted,
            message: wire.message,
            code: wire.code,
            mutated_object: wire.mutated_object.map(StrictText::check).transpose()?,
            audit_annotations: wire.audit_annotations,
            warnings: wire.warnings,
        })
    }
}

#[derive(Deserialize)]
struct ValidationWire<'a> {
    accepted: bool,
    message: Option<String>,
    code: Option<u16>,
    #[serde(borrow)]
    mutated_object: Option<&'a RawValue>,
    audit_annotations: Option<BTreeMap<String, String>>,
    warnings: Option<Vec<String>>,
}

/// A policy's answer about its settings.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct SettingsResponse {
    /// Whether the policy can work with them.
    pub(crate) valid: bool,
    /// Why not.
    pub(crate) message: Option<String>,
}

impl SettingsResponse {
    /// Reads exactly one JSON object. Unknown keys are ignored.
    ///
    /// # Errors
    ///
    /// Anything else, or no `valid` in it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        parse_object(bytes)
    }

    /// The settings count as invalid.
    pub(crate) fn invalid(message: String) -> Self {
        Self { valid: false, message: Some(message) }
    }
}

fn parse_object<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, serde_json::Error> {
    let text = str::from_utf8(bytes).map_err(serde_json::Error::custom)?;
    serde_json::from_str::<Object<T>>(text).map(|object| object.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(answer: &str) -> String {
        ValidationResponse::parse(answer.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_code_out_of_range_invalidates_the_answer() {
        for code in ["-1", "65536", "403.5", "\"403\""] {
            let answer = format!(r#"{{"accepted":true,"code":{code}}}"#);
            assert!(refusal(&answer).contains("u16"), "{code}");
        }
        ValidationResponse::parse(br#"{"accepted":true,"code":65535}"#).unwrap();
    }

    #[test]
    fn an_answer_is_exactly_one_object() {
        assert!(refusal("").contains("EOF"));
        assert!(refusal("null").contains("invalid type"));
        assert!(refusal("true").contains("invalid type"));
        assert!(refusal(" [true,null,null,null,null,null]").contains("sequence"));
        assert!(refusal("{}").contains("missing field `accepted`"));
        assert!(refusal(r#"{"accepted":null}"#).contains("invalid type"));
        assert!(refusal(r#"{"accepted":"true"}"#).contains("invalid type"));
        assert!(refusal(r#"{"accepted":true}{"accepted":false}"#).contains("trailing"));
        assert!(refusal(r#"{"accepted":false,"accepted":true}"#).contains("duplicate field"));
        ValidationResponse::parse(b"{\"accepted\":true,\"x\":\"\xff\"}").unwrap_err();
    }

    #[test]
    fn a_mutated_object_has_one_reading() {
        let answer = r#"{"accepted":true,"mutated_object":{"a":1,"a":2}}"#;
        assert!(refusal(answer).contains("duplicate key `a`"));
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        let answer = format!(r#"{{"accepted":true,"mutated_object":{deep}}}"#);
        assert!(refusal(&answer).contains("recursion limit"));
    }

    #[test]
    fn settings_are_valid_only_if_the_policy_says_so() {
        assert_eq!(
            SettingsResponse::parse(br#"{"valid":true,"message":null}"#).unwrap(),
            SettingsResponse { valid: true, message: None }
        );
        assert_eq!(
            SettingsResponse::parse(br#"{"valid":false,"message":"no"}"#).unwrap(),
            SettingsResponse::invalid("no".to_owned())
        );
        for answer in ["{}", "[true,null]", "true", r#"{"valid":true} x"#] {
            SettingsResponse::parse(answer.as_bytes()).unwrap_err();
        }
    }
}
