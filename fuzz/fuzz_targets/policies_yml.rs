//! A policies.yml: what is accepted keeps the bounds that its reader states, and a refusal is
//! one line that begins with the file.
#![no_main]

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use conclave_fuzz::{assert_one_line, assert_settings};
use conclave_supervisor::fuzzing::policies;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let policies = match policies(Path::new("conf/policies.yml"), text) {
        Ok(policies) => policies,
        Err(message) => {
            assert_one_line(&message, "conf/policies.yml:");
            return;
        }
    };
    assert!(!policies.is_empty() && policies.len() <= 10_000);
    let names: HashSet<_> = policies.iter().map(|policy| &policy.name).collect();
    assert_eq!(names.len(), policies.len(), "a name is there twice");
    for policy in &policies {
        assert!((1..=253).contains(&policy.name.len()), "{:?}", policy.name);
        assert!(!policy.name.contains(|c: char| c == '/' || c.is_control()), "{:?}", policy.name);
        assert!(!policy.module.as_os_str().as_encoded_bytes().contains(&0));
        assert!(policy.module.starts_with("conf") || policy.module.is_absolute());
        if let Some(timeout) = policy.timeout {
            assert!(timeout >= Duration::from_millis(1) && timeout <= Duration::from_secs(3600));
            assert_eq!(timeout.subsec_nanos() % 1_000_000, 0, "{timeout:?}");
        }
        assert_settings(&policy.settings);
    }
});
