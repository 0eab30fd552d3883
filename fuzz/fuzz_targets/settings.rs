//! Settings, as a document of their own and with a secret in them: what is accepted is one
//! JSON object that reads as itself, and no refusal repeats the secret.
#![no_main]

use std::path::Path;

use conclave_fuzz::{assert_one_line, assert_settings};
use conclave_supervisor::fuzzing::{policies, settings};
use libfuzzer_sys::fuzz_target;

const SECRET: &str = "s3cr3t";

fuzz_target!(|text: &str| {
    match settings(Path::new("settings.yml"), text) {
        Ok(json) => assert_settings(&json),
        Err(message) => assert_one_line(&message, "settings.yml:"),
    }

    let (before, after) = text.split_once('\0').unwrap_or((text, ""));
    // These could make it a key, and keys are repeated.
    if before.contains(['\n', '\r', '{', '?', '\u{85}', '\u{2028}', '\u{2029}'])
        || after.contains(':')
        || text.contains(SECRET)
    {
        return;
    }
    let policy = format!("p:\n  module: m\n  settings:\n    token: {before}{SECRET}{after}\n");
    if let Err(message) = policies(Path::new("p.yml"), &policy) {
        assert!(!message.contains(SECRET), "{message:?} about {policy}");
    }
});
