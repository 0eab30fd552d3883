//! A validating policy, straight on the waPC guest library, that is slow to begin: refuses pods with
//! something like a secret in an environment variable or an annotation.
//!
//! Its regular expressions are compiled when the first request needs them, as is usual. That
//! costs a hundred times what a request costs afterwards, and a host that gives every request
//! an instance of its own pays it each time.

use std::sync::LazyLock;

use regex::Regex;
use serde::Deserialize;
use serde_json::{Value, json};
use wapc_guest::{CallResult, register_function};

/// Tokens that can be told by their form.
const TOKENS: [(&str, &str); 8] = [
    ("AWS access key", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    ("GitHub token", r"\bgh[oprsu]_[0-9A-Za-z]{36}\b"),
    ("GitLab token", r"\bglpat-[0-9A-Za-z_-]{20}\b"),
    ("Google API key", r"\bAIza[0-9A-Za-z_-]{35}\b"),
    (
        "JSON web token",
        r"\beyJ[0-9A-Za-z_-]{10,200}\.eyJ[0-9A-Za-z_-]{10,400}\.[0-9A-Za-z_-]{10,200}\b",
    ),
    ("npm token", r"\bnpm_[0-9A-Za-z]{36}\b"),
    ("private key", r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"),
    ("Slack token", r"\bxox[abeoprs]-[0-9A-Za-z-]{10,72}\b"),
];

/// Services whose secrets have no form of their own: there is a word in front of them.
const SERVICES: [&str; 26] = [
    "adafruit",
    "airtable",
    "algolia",
    "asana",
    "bitbucket",
    "cloudflare",
    "codecov",
    "contentful",
    "datadog",
    "discord",
    "dropbox",
    "fastly",
    "firebase",
    "grafana",
    "heroku",
    "hubspot",
    "intercom",
    "mailgun",
    "netlify",
    "okta",
    "pagerduty",
    "sentry",
    "snyk",
    "travis",
    "twilio",
    "zendesk",
];

static PATTERNS: LazyLock<Vec<(&str, Regex)>> = LazyLock::new(|| {
    let compile = |pattern: &str| Regex::new(pattern).expect("the patterns are right");
    let tokens = TOKENS.iter().map(|(what, pattern)| (*what, compile(pattern)));
    // Letters of any script may stand around the word.
    let services = SERVICES.iter().map(|service| {
        let pattern = format!(
            r"\b[\w.-]{{0,10}}(?i-u:{service})[\w.-]{{0,10}}\s{{0,3}}[:=]\s{{0,3}}[0-9A-Fa-f]{{32}}\b"
        );
        (*service, compile(&pattern))
    });
    tokens.chain(services).collect()
});

#[unsafe(no_mangle)]
pub extern "C" fn wapc_init() {
    register_function("validate", validate);
    // There is nothing to set.
    register_function("validate_settings", |_| Ok(br#"{"valid":true}"#.to_vec()));
    register_function("protocol_version", |_| Ok(br#""v1""#.to_vec()));
}

#[derive(Debug, Deserialize)]
struct Payload {
    request: Request,
}

#[derive(Debug, Deserialize)]
struct Request {
    /// Absent or null on DELETE.
    #[serde(default)]
    object: Value,
}

fn validate(payload: &[u8]) -> CallResult {
    let Payload { request } = serde_json::from_slice(payload)?;
    let found: Vec<String> = texts(&request.object)
        .into_iter()
        .filter_map(|(place, text)| {
            let (what, _) = PATTERNS.iter().find(|(_, pattern)| pattern.is_match(&text))?;
            Some(format!("{place}: {what}"))
        })
        .collect();
    let answer = if found.is_empty() {
        json!({"accepted": true})
    } else {
        let found = found.join(", ");
        json!({"accepted": false, "message": format!("secrets are not for pods: {found}")})
    };
    Ok(serde_json::to_vec(&answer)?)
}

/// What is searched, by its place: annotations, and the environment of all containers.
fn texts(object: &Value) -> Vec<(String, String)> {
    let annotations = object.pointer("/metadata/annotations").and_then(Value::as_object);
    let annotations = annotations.into_iter().flatten().filter_map(|(name, value)| {
        Some((format!("annotation {name}"), format!("{name}={}", value.as_str()?)))
    });
    let variables = ["initContainers", "containers", "ephemeralContainers"]
        .into_iter()
        .filter_map(|group| object.pointer("/spec")?.get(group)?.as_array())
        .flatten()
        .filter_map(|container| container.get("env")?.as_array())
        .flatten()
        .filter_map(|variable| {
            let name = variable.get("name")?.as_str()?;
            let value = variable.get("value")?.as_str()?;
            Some((format!("variable {name}"), format!("{name}={value}")))
        });
    annotations.chain(variables).collect()
}
