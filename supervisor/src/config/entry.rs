//! One entry of the file: a policy's name and its keys.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use conclave_ipc::limits::{GUEST_MEMORY_BYTES_CEILING, GUEST_MEMORY_BYTES_DEFAULT};

use super::error::shown;
use super::fields::{Fields, list, seconds, text};
use super::module::module_path;
use super::scope::{Scope, Trail};
use super::settings::settings;
use super::start::{snapshot_limits, start_mode, warmup};
use super::yaml::{Node, Value};
use super::{
    ConfigError, ContextAwareResource, PolicyMode, PolicyName, PolicySpec, Problem, Sha256Digest,
};
use crate::host_capabilities::HostCapabilities;

/// The keys of a policy, as error messages list them.
const POLICY_KEYS: [&str; 15] = [
    "module",
    "policyMode",
    "allowedToMutate",
    "settings",
    "contextAwareResources",
    "hostCapabilities",
    "message",
    "timeoutEvalSeconds",
    "sha256",
    "memory",
    "start",
    "warmup",
    "snapshot",
    "entrypoint",
    "strictBuiltinErrors",
];

/// One page of linear memory, the least that a guest can have.
const MEMORY_BYTES_MIN: u64 = 64 << 10;

pub(super) fn policy_name(scope: Scope<'_>, key: &Node) -> Result<PolicyName, ConfigError> {
    let Value::Text(name) = &key.value else {
        let found = key.value.kind();
        return Err(scope.refuse(key, Problem::NameNotText { found }));
    };
    PolicyName::parse(name).map_err(|reason| {
        let name = shown(name);
        scope.refuse(key, Problem::BadName { name, reason })
    })
}

pub(super) fn policy_spec(
    scope: Scope<'_>,
    name: PolicyName,
    key: &Node,
    entry: &Node,
) -> Result<PolicySpec, ConfigError> {
    let Value::Mapping(entries) = &entry.value else {
        let found = entry.value.kind();
        return Err(scope.refuse(entry, Problem::NotAPolicy { found }));
    };
    let fields = Fields::read(scope, &Trail::Policy, entries)?;
    let is_group = fields.has("policies") || fields.has("expression");
    if is_group && !fields.has("module") {
        return Err(scope.refuse(key, Problem::PolicyGroup));
    }
    fields.require_known(&POLICY_KEYS)?;

    let module_node = fields.required(key, "module")?;
    let module_url = text(scope, &Trail::Key(&Trail::Policy, "module"), module_node)?;
    let module = module_path(scope.path, module_url)
        .map_err(|error| scope.refuse(module_node, Problem::Module(error)))?;

    Ok(PolicySpec {
        name,
        module,
        module_url: module_url.to_owned(),
        digest: fields.optional("sha256", digest)?,
        mode: fields.optional("policyMode", mode)?.unwrap_or_default(),
        allowed_to_mutate: fields.optional("allowedToMutate", boolean)?.unwrap_or(false),
        settings: match fields.optional("settings", settings)? {
            Some(json) => json,
            None => "{}".to_owned(),
        },
        context_aware_resources: fields
            .optional("contextAwareResources", resources)?
            .unwrap_or_default(),
        host_capabilities: fields
            .optional("hostCapabilities", host_capabilities)?
            .unwrap_or_default(),
        message: fields.optional("message", message)?.flatten(),
        timeout: fields.optional("timeoutEvalSeconds", seconds)?.flatten(),
        memory_bytes_max: fields
            .optional("memory", memory)?
            .flatten()
            .unwrap_or(GUEST_MEMORY_BYTES_DEFAULT),
        start: fields.optional("start", start_mode)?,
        warmup: fields.optional("warmup", warmup)?.unwrap_or_default(),
        snapshot: fields.optional("snapshot", snapshot_limits)?.unwrap_or_default(),
        entrypoint: fields.optional("entrypoint", entrypoint)?.flatten(),
        strict_builtin_errors: fields.optional("strictBuiltinErrors", boolean)?.unwrap_or(false),
    })
}

fn boolean(scope: Scope<'_>, key: &Trail<'_>, node: &Node) -> Result<bool, ConfigError> {
    match &node.value {
        Value::Boolean(value) => Ok(*value),
        _ => Err(scope.wrong_type(node, key, "a boolean (true or false)")),
    }
}

fn message(scope: Scope<'_>, key: &Trail<'_>, node: &Node) -> Result<Option<String>, ConfigError> {
    match &node.value {
        Value::Null => Ok(None),
        _ => text(scope, key, node).map(|text| Some(text.to_owned())),
    }
}

/// Whether the module has one of that name shows when it is known.
fn entrypoint(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &Node,
) -> Result<Option<String>, ConfigError> {
    match message(scope, key, node)? {
        Some(name) if name.is_empty() => {
            Err(scope.refuse(node, Problem::EmptyText { key: key.to_string() }))
        }
        name => Ok(name),
    }
}

fn mode(scope: Scope<'_>, key: &Trail<'_>, node: &Node) -> Result<PolicyMode, ConfigError> {
    match text(scope, key, node)? {
        "protect" => Ok(PolicyMode::Protect),
        "monitor" => Ok(PolicyMode::Monitor),
        other => {
            let found = shown(other);
            Err(scope.refuse(node, Problem::PolicyMode { found }))
        }
    }
}

/// A `sha256` without a value is refused rather than taken as absent: the operator meant to
/// pin the module.
fn digest(scope: Scope<'_>, key: &Trail<'_>, node: &Node) -> Result<Sha256Digest, ConfigError> {
    text(scope, key, node)?.parse().map_err(|error| scope.refuse(node, Problem::Digest(error)))
}

/// Bytes, as a number or as Kubernetes writes quantities of memory: `134217728`, `128Mi`.
fn memory(scope: Scope<'_>, key: &Trail<'_>, node: &Node) -> Result<Option<u64>, ConfigError> {
    let bytes = match &node.value {
        Value::Null => return Ok(None),
        Value::Unsigned(bytes) => Some(*bytes),
        Value::Text(quantity) => bytes_of(quantity),
        Value::Negative(_) | Value::Float(_) => None,
        _ => return Err(scope.wrong_type(node, key, "a number of bytes, such as 128Mi")),
    };
    bytes
        .filter(|bytes| (MEMORY_BYTES_MIN..=GUEST_MEMORY_BYTES_CEILING).contains(bytes))
        .map(Some)
        .ok_or_else(|| scope.refuse(node, Problem::Memory))
}

fn bytes_of(quantity: &str) -> Option<u64> {
    let units = [("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1 << 30), ("", 1)];
    let (number, unit) =
        units.iter().find_map(|(suffix, unit)| Some((quantity.strip_suffix(suffix)?, *unit)))?;
    let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| number.parse::<u64>().ok()?.checked_mul(unit))?
}

fn resources(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &Node,
) -> Result<BTreeSet<ContextAwareResource>, ConfigError> {
    list(scope, key, node, "a list of {apiVersion, kind}")?
        .iter()
        .enumerate()
        .map(|(index, item)| resource(scope, &Trail::Item(key, index), item))
        .collect()
}

fn resource(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &Node,
) -> Result<ContextAwareResource, ConfigError> {
    let Value::Mapping(entries) = &node.value else {
        return Err(scope.wrong_type(node, key, "a mapping with apiVersion and kind"));
    };
    let fields = Fields::read(scope, key, entries)?;
    fields.require_known(&["apiVersion", "kind"])?;
    let filled = |name| {
        let node = fields.required(node, name)?;
        let key = Trail::Key(key, name);
        match text(scope, &key, node)? {
            "" => {
                let key = key.to_string();
                Err(scope.refuse(node, Problem::EmptyText { key }))
            }
            text => Ok(text.to_owned()),
        }
    };
    Ok(ContextAwareResource { api_version: filled("apiVersion")?, kind: filled("kind")? })
}

fn host_capabilities(
    scope: Scope<'_>,
    key: &Trail<'_>,
    node: &Node,
) -> Result<HostCapabilities, ConfigError> {
    let items = list(scope, key, node, "a list of strings")?;
    let patterns = items
        .iter()
        .enumerate()
        .map(|(index, item)| text(scope, &Trail::Item(key, index), item).map(str::to_owned))
        .collect::<Result<Vec<_>, _>>()?;
    HostCapabilities::parse(&patterns).map_err(|error| {
        let item = items.get(error.index).unwrap_or(node);
        scope.refuse(item, Problem::HostCapability(error))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{DIGEST, policy, policy_refusal, read, refusal};
    use crate::config::{SnapshotLimits, Warmup};
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    #[test]
    fn a_policy_with_only_a_module_gets_the_defaults() {
        let expected = PolicySpec {
            name: PolicyName::parse("p").unwrap(),
            module: PathBuf::from("conf/p.wasm"),
            module_url: "p.wasm".to_owned(),
            digest: None,
            mode: PolicyMode::Protect,
            allowed_to_mutate: false,
            settings: "{}".to_owned(),
            context_aware_resources: BTreeSet::new(),
            host_capabilities: HostCapabilities::default(),
            message: None,
            timeout: None,
            memory_bytes_max: 128 << 20,
            start: None,
            warmup: Warmup::Synthetic,
            snapshot: SnapshotLimits::default(),
            entrypoint: None,
            strict_builtin_errors: false,
        };
        assert_eq!(policy(""), expected);
    }

    #[test]
    fn every_key_is_read() {
        let text = format!(
            "psp-privileged:
  namespacedName: {{namespace: default, name: psp}}
  module: file:///var/lib/policies/psp.wasm
  policyMode: monitor
  allowedToMutate: true
  settings: {{allowed: [1, two]}}
  contextAwareResources:
    - {{apiVersion: v1, kind: Namespace}}
    - apiVersion: apps/v1
      kind: Deployment
    - {{apiVersion: v1, kind: Namespace}}
  hostCapabilities: [\"oci/*\", kubernetes/can_i]
  message: \"not here\"
  timeoutEvalSeconds: 5
  sha256: {DIGEST}
  memory: 64Mi
  entrypoint: policy/main
  strictBuiltinErrors: true
"
        );
        let policies = read(&text).unwrap();
        let policy = &policies[0];
        assert_eq!(policy.name.as_str(), "psp-privileged");
        assert_eq!(policy.module, Path::new("/var/lib/policies/psp.wasm"));
        assert_eq!(policy.module_url, "file:///var/lib/policies/psp.wasm");
        assert_eq!(policy.mode, PolicyMode::Monitor);
        assert!(policy.allowed_to_mutate);
        assert_eq!(policy.settings, r#"{"allowed":[1,"two"]}"#);
        let resources: Vec<_> = policy
            .context_aware_resources
            .iter()
            .map(|resource| (resource.api_version.as_str(), resource.kind.as_str()))
            .collect();
        assert_eq!(resources, [("apps/v1", "Deployment"), ("v1", "Namespace")]);
        assert!(policy.host_capabilities.allows("oci", "v2/verify"));
        assert!(policy.host_capabilities.allows("kubernetes", "can_i"));
        assert!(!policy.host_capabilities.allows("net", "v1/dns_lookup_host"));
        assert_eq!(policy.message.as_deref(), Some("not here"));
        assert_eq!(policy.timeout, Some(Duration::from_secs(5)));
        assert_eq!(policy.digest, Some(DIGEST.parse().unwrap()));
        assert_eq!(policy.entrypoint.as_deref(), Some("policy/main"));
        assert!(policy.strict_builtin_errors);
    }

    #[test]
    fn wrong_types_are_refused_with_key_and_place() {
        let cases = [
            (
                "allowedToMutate: \"yes\"",
                "3:20: policy \"p\": allowedToMutate: expected a boolean (true or false), \
                 found a string",
            ),
            ("message: 5", "3:12: policy \"p\": message: expected a string, found an integer"),
            (
                "policyMode: [protect]",
                "3:15: policy \"p\": policyMode: expected a string, found a list",
            ),
            (
                "timeoutEvalSeconds: \"5\"",
                "3:23: policy \"p\": timeoutEvalSeconds: expected a number of seconds, \
                 found a string",
            ),
            ("settings: [1]", "3:13: policy \"p\": settings: expected a mapping, found a list"),
            (
                "hostCapabilities: \"*\"",
                "3:21: policy \"p\": hostCapabilities: expected a list of strings, \
                 found a string",
            ),
            (
                "hostCapabilities: [oci/*, 1.5]",
                "3:29: policy \"p\": hostCapabilities[1]: expected a string, found a float",
            ),
            (
                "contextAwareResources: {}",
                "3:26: policy \"p\": contextAwareResources: expected a list of \
                 {apiVersion, kind}, found a mapping",
            ),
            (
                "contextAwareResources: [v1/Pod]",
                "3:27: policy \"p\": contextAwareResources[0]: expected a mapping with \
                 apiVersion and kind, found a string",
            ),
            (
                "contextAwareResources: [{apiVersion: 1, kind: Pod}]",
                "3:40: policy \"p\": contextAwareResources[0].apiVersion: expected a string, \
                 found an integer",
            ),
            (
                "entrypoint: [policy, main]",
                "3:15: policy \"p\": entrypoint: expected a string, found a list",
            ),
            ("sha256:", "3:9: policy \"p\": sha256: expected a string, found null"),
        ];
        for (lines, expected) in cases {
            assert_eq!(policy_refusal(lines), expected, "{lines}");
        }
        assert_eq!(
            refusal("p:\n  module: {}\n"),
            "2:11: policy \"p\": module: expected a string, found a mapping"
        );
        assert_eq!(
            refusal("p: x.wasm\n"),
            "1:4: policy \"p\": expected a mapping of keys, found a string"
        );
        assert!(refusal("p:\nq: {module: q}\n").contains("policy \"p\": expected a mapping"));
    }

    #[test]
    fn a_missing_module_is_refused_at_the_policys_name() {
        assert_eq!(
            refusal("q: {module: q}\np:\n  message: hi\n"),
            "2:1: policy \"p\": required key \"module\" is missing"
        );
        assert!(refusal("p: {}\n").contains("required key \"module\""));
    }

    #[test]
    fn a_policy_group_is_refused_as_such() {
        let group = "g:\n  expression: a()\n  message: no\n  policies: {a: {module: a}}\n";
        assert_eq!(
            refusal(group),
            "1:1: policy \"g\": this is a policy group; policy groups are not available in this \
             version"
        );
        assert!(refusal("g: {policies: {}}").contains("policy group"));
        assert!(refusal("g: {expression: a()}").contains("policy group"));
        assert!(policy_refusal("policies: {}").contains("unknown key \"policies\""));
        assert!(policy_refusal("expression: a()").contains("unknown key \"expression\""));
    }

    #[test]
    fn names_that_are_no_strings_are_refused() {
        assert_eq!(
            refusal("1: {module: x}"),
            "1:1: a policy name must be a string, found an integer; put it in quotes"
        );
        assert!(refusal("true: {module: x}").contains("found a boolean"));
        assert!(refusal("? [a]\n: {module: x}").contains("found a list"));
        assert_eq!(read("\"1\": {module: x}").unwrap()[0].name.as_str(), "1");
    }

    #[test]
    fn policy_modes_are_protect_and_monitor() {
        assert_eq!(policy("policyMode: protect").mode, PolicyMode::Protect);
        assert_eq!(policy("policyMode: monitor").mode, PolicyMode::Monitor);
        assert_eq!(
            policy_refusal("policyMode: Monitor"),
            "3:15: policy \"p\": policyMode: expected protect or monitor, found \"Monitor\""
        );
        assert!(policy_refusal("policyMode:").contains("found null"));
    }

    #[test]
    fn resources_need_version_and_kind() {
        assert_eq!(
            policy_refusal("contextAwareResources:\n  - kind: Pod"),
            "4:7: policy \"p\": required key \"contextAwareResources[0].apiVersion\" is missing"
        );
        assert_eq!(
            policy_refusal("contextAwareResources: [{apiVersion: v1, kind: \"\"}]"),
            "3:50: policy \"p\": contextAwareResources[0].kind: must not be empty"
        );
        assert_eq!(
            policy_refusal("contextAwareResources: [{apiVersion: v1, kind: a, name: b}]"),
            "3:53: policy \"p\": unknown key \"contextAwareResources[0].name\" (known: \
             apiVersion, kind)"
        );
        assert!(policy("contextAwareResources: []").context_aware_resources.is_empty());
    }

    #[test]
    fn an_invalid_capability_is_refused_at_its_own_place() {
        assert_eq!(
            policy_refusal("hostCapabilities:\n  - \"oci/*\"\n  - oci/v3/verify"),
            "5:7: policy \"p\": hostCapabilities: invalid pattern \"oci/v3/verify\": unknown \
             segment \"v3\" after \"oci\" (known: v1, v2)"
        );
    }

    #[test]
    fn optional_texts_and_deadlines_may_be_null() {
        let policy = policy("message: ~\ntimeoutEvalSeconds:");
        assert_eq!(policy.message, None);
        assert_eq!(policy.timeout, None);
    }

    #[test]
    fn memory_is_bytes_or_a_quantity_within_bounds() {
        for (written, bytes) in [
            ("65536", 64 << 10),
            ("64Ki", 64 << 10),
            ("\"134217728\"", 128 << 20),
            ("256Mi", 256 << 20),
            ("4Gi", 4 << 30),
            ("~", 128 << 20),
        ] {
            assert_eq!(policy(&format!("memory: {written}")).memory_bytes_max, bytes, "{written}");
        }
        for written in
            ["0", "-1", "65535", "5Gi", "1.5", "128M", "Mi", "\"\"", "+1Mi", "99999999999Gi"]
        {
            let message = policy_refusal(&format!("memory: {written}"));
            assert!(message.contains("memory: must be a number of bytes"), "{written}: {message}");
        }
        assert!(policy_refusal("memory: [1]").contains("expected a number of bytes"));
    }
}
