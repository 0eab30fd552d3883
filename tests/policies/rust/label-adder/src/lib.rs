//! A mutating policy on the Kubewarden SDK: makes sure that an object carries the labels
//! of the settings.

use std::collections::{BTreeMap, HashMap};

use kubewarden_policy_sdk::{
    accept_request, protocol_version_guest, reject_request, request::ValidationRequest,
    response::ValidationResponse, settings::Validatable, validate_settings,
};
use serde::Deserialize;
use serde_json::{Map, Value};
use wapc_guest::{CallResult, register_function};

/// What the user may set.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    /// The labels to add, or to overwrite where an object has another value.
    labels: BTreeMap<String, String>,
}

impl Validatable for Settings {
    fn validate(&self) -> Result<(), String> {
        if self.labels.is_empty() {
            return Err("labels must not be empty".to_owned());
        }
        for (key, value) in &self.labels {
            if key.is_empty() {
                return Err("labels must not contain an empty key".to_owned());
            }
            if !is_label_value(value) {
                return Err(format!("labels: '{value}' is not a value for '{key}'"));
            }
        }
        Ok(())
    }
}

fn is_label_value(value: &str) -> bool {
    let bytes = value.as_bytes();
    let ends = [bytes.first(), bytes.last()];
    bytes.len() <= 63
        && ends.into_iter().flatten().all(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}

#[unsafe(no_mangle)]
pub extern "C" fn wapc_init() {
    register_function("validate", validate);
    register_function("validate_settings", validate_settings::<Settings>);
    register_function("protocol_version", protocol_version_guest);
}

/// The object below `key`, made if it is missing or null.
fn child<'a>(parent: &'a mut Map<String, Value>, key: &str) -> Option<&'a mut Map<String, Value>> {
    let value = parent.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut()
}

fn validate(payload: &[u8]) -> CallResult {
    let ValidationRequest { settings, request } = ValidationRequest::<Settings>::new(payload)?;
    let mut object = request.object;
    if object.is_null() {
        return accept_request();
    }
    let Some(labels) =
        object.as_object_mut().and_then(|o| child(o, "metadata")).and_then(|m| child(m, "labels"))
    else {
        let message = "metadata.labels of the object is not a map".to_owned();
        return reject_request(Some(message), Some(422), None, None);
    };

    let mut warnings = Vec::new();
    let mut set = Vec::new();
    for (key, value) in settings.labels {
        let before = labels.insert(key.clone(), Value::String(value.clone()));
        match before {
            Some(Value::String(before)) if before == value => continue,
            None => warnings.push(format!("label '{key}' was added")),
            Some(_) => warnings.push(format!("label '{key}' was overwritten")),
        }
        set.push(format!("{key}={value}"));
    }
    if set.is_empty() {
        return accept_request();
    }
    let annotation = ("labels-set".to_owned(), set.join(","));
    Ok(serde_json::to_vec(&ValidationResponse {
        accepted: true,
        message: None,
        code: None,
        mutated_object: Some(object),
        audit_annotations: Some(HashMap::from([annotation])),
        warnings: Some(warnings),
    })?)
}
