//! A policy for raw requests, straight on the waPC guest library. Besides deciding, it
//! misbehaves on request, so that tests can see how a host deals with it.

use serde::Deserialize;
use serde_json::{Value, json};
use wapc_guest::{CallResult, host_call, register_function};

/// What the user may set: three lists, none of them empty.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Settings {
    valid_users: Vec<String>,
    valid_actions: Vec<String>,
    valid_resources: Vec<String>,
}

/// Things to do before deciding. All may be absent.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Behaviour {
    print: Option<String>,
    panic: bool,
    error: bool,
    hostcall: bool,
}

#[derive(Debug, Deserialize)]
struct Request {
    user: String,
    action: String,
    resource: String,
}

#[derive(Debug, Deserialize)]
struct Payload {
    request: Value,
    settings: Settings,
}

#[unsafe(no_mangle)]
pub extern "C" fn wapc_init() {
    register_function("validate", validate);
    register_function("validate_settings", validate_settings);
    register_function("protocol_version", |_| Ok(br#""v1""#.to_vec()));
}

fn answer(value: &Value) -> CallResult {
    Ok(serde_json::to_vec(value)?)
}

fn reject(code: u16, message: String) -> CallResult {
    answer(&json!({"accepted": false, "code": code, "message": message}))
}

fn validate_settings(payload: &[u8]) -> CallResult {
    let settings: Settings = match serde_json::from_slice(payload) {
        Ok(settings) => settings,
        Err(error) => return answer(&json!({"valid": false, "message": error.to_string()})),
    };
    let lists = [
        ("validUsers", &settings.valid_users),
        ("validActions", &settings.valid_actions),
        ("validResources", &settings.valid_resources),
    ];
    match lists.into_iter().find(|(_, list)| list.is_empty()) {
        Some((name, _)) => {
            answer(&json!({"valid": false, "message": format!("{name} must not be empty")}))
        }
        None => answer(&json!({"valid": true})),
    }
}

fn validate(payload: &[u8]) -> CallResult {
    let Payload { request, settings } = serde_json::from_slice(payload)?;
    let behaviour = Behaviour::deserialize(&request).unwrap_or_default();

    if let Some(text) = behaviour.print {
        println!("stdout: {text}");
        eprintln!("stderr: {text}");
    }
    assert!(!behaviour.panic, "the request asked for a panic");
    if behaviour.error {
        return Err("the request asked for an error".into());
    }
    let mut warnings = Vec::new();
    if behaviour.hostcall {
        let wanted = json!({"api_version": "v1", "kind": "Namespace", "name": "default",
            "disable_cache": false});
        let wanted = serde_json::to_vec(&wanted)?;
        match host_call("kubewarden", "kubernetes", "get_resource", &wanted) {
            Ok(found) => warnings.push(format!("the host answered with {} bytes", found.len())),
            Err(error) => return reject(503, error.to_string()),
        }
    }

    let request = match Request::deserialize(&request) {
        Ok(request) => request,
        Err(error) => return reject(400, format!("cannot read the request: {error}")),
    };
    let checks = [
        ("user", &request.user, &settings.valid_users),
        ("action", &request.action, &settings.valid_actions),
        ("resource", &request.resource, &settings.valid_resources),
    ];
    let refused: Vec<String> = checks
        .into_iter()
        .filter(|(_, value, valid)| !valid.contains(value))
        .map(|(what, value, _)| format!("{what} '{value}' is not allowed"))
        .collect();
    if !refused.is_empty() {
        return reject(403, refused.join(", "));
    }
    if warnings.is_empty() {
        answer(&json!({"accepted": true}))
    } else {
        answer(&json!({"accepted": true, "warnings": warnings}))
    }
}
