//! policies.yml: raw text in, checked policies out.
//!
//! The format is that of Kubewarden's policy-server: a mapping from policy names to
//! policies, in YAML or, because JSON is YAML, in JSON. Two deliberate differences: what
//! policy-server ignores (unknown keys) or resolves silently (duplicate names, where the last
//! one wins) is refused here, and a module must be a file. `sha256` is our own key.
//!
//! Scalars are read as YAML 1.2 reads them, so `yes` is a string. As in policy-server, plain
//! numbers with a leading zero or an underscore (`0755`, `1_000`) stay strings, because the
//! YAML versions disagree about their value.
//!
//! The text becomes a tree of [`Node`](yaml::Node)s that know their place, the tree becomes
//! [`PolicySpec`]s, and every refusal says where it looked. Messages repeat names and keys
//! but no value from `settings`: it may be a secret.
#![forbid(unsafe_code)]

mod digest;
mod entry;
mod error;
mod fields;
mod module;
mod name;
mod scope;
mod settings;
mod start;
mod yaml;

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use scope::{Scope, Trail};
use yaml::Value;

use crate::host_capabilities::HostCapabilities;

pub(crate) use digest::{DigestError, Sha256Digest};
pub(crate) use error::{ConfigError, Place, Problem};
pub(crate) use module::{ModuleError, module_path};
pub(crate) use name::{PolicyName, PolicyNameError};
pub(crate) use start::{SnapshotLimits, StartMode, Warmup};

/// Largest policies.yml that is read.
pub(crate) const CONFIG_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Most policies in one file. Each one costs worker processes; a file with more is a mistake.
pub(crate) const POLICIES_MAX: usize = 10_000;

/// Longest policy name: the limit of a Kubernetes object name.
pub(crate) const POLICY_NAME_BYTES_MAX: usize = 253;

/// Longest time that a policy may be given for anything. An admission request waits 30 s at
/// most, so this leaves room for audits and still catches milliseconds written as seconds.
pub(crate) const SECONDS_MAX: u64 = 3600;

/// Reads and checks the policies of the file at `path`, in the order of the file.
///
/// Modules are neither opened nor looked for.
///
/// # Errors
///
/// The file cannot be read, is longer than [`CONFIG_BYTES_MAX`], or [`parse`] refuses it.
pub(crate) fn load(path: &Path) -> Result<Vec<PolicySpec>, ConfigError> {
    let unreadable = |cause| ConfigError::Unreadable { path: path.to_owned(), cause };
    let file = File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    // One byte more than allowed is enough to know that the file is too long.
    file.take(CONFIG_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > CONFIG_BYTES_MAX {
        return Err(ConfigError::TooLong { path: path.to_owned() });
    }
    match str::from_utf8(&bytes) {
        Ok(text) => parse(path, text),
        Err(error) => Err(ConfigError::NotUtf8 {
            path: path.to_owned(),
            line: line_at(&bytes, error.valid_up_to()),
        }),
    }
}

/// Checks the policies in `text`, in the order of the text. Touches no file: `path` says
/// where the text came from, for error messages and for modules given by a relative path.
///
/// # Errors
///
/// The first thing found wrong, with its line and column.
pub(crate) fn parse(path: &Path, text: &str) -> Result<Vec<PolicySpec>, ConfigError> {
    let root = yaml::read_yaml(path, text)?;
    let scope = Scope { path, text, policy: None };
    let entries = match &root.value {
        Value::Null => &[],
        Value::Mapping(entries) => entries.as_slice(),
        other => {
            let found = other.kind();
            return Err(scope.refuse(&root, Problem::NotPolicies { found }));
        }
    };
    if entries.is_empty() {
        return Err(ConfigError::NoPolicies { path: path.to_owned() });
    }
    if let Some((name, _)) = entries.get(POLICIES_MAX) {
        return Err(scope.refuse(name, Problem::TooManyPolicies));
    }

    let mut first_lines = HashMap::with_capacity(entries.len());
    let mut policies = Vec::with_capacity(entries.len());
    for (key, entry) in entries {
        let name = entry::policy_name(scope, key)?;
        let scope = Scope { policy: Some(name.as_str()), ..scope };
        if let Some(first_line) = first_lines.insert(name.clone(), key.place.line()) {
            return Err(scope.refuse(key, Problem::DefinedTwice { first_line }));
        }
        policies.push(entry::policy_spec(scope, name.clone(), key, entry)?);
    }
    Ok(policies)
}

/// Checks a policy's settings that stand in a document of their own, YAML or JSON, and
/// gives them as JSON text. `path` says where the text came from.
///
/// # Errors
///
/// The first thing found wrong, with its line and column.
pub(crate) fn settings_document(path: &Path, text: &str) -> Result<String, ConfigError> {
    let root = yaml::read_yaml(path, text)?;
    let scope = Scope { path, text, policy: None };
    settings::settings(scope, &Trail::Key(&Trail::Policy, "settings"), &root)
}

/// One policy as the operator configured it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PolicySpec {
    /// The name requests use.
    pub(crate) name: PolicyName,
    /// The module's file, as to be opened; relative only if the path of policies.yml was.
    pub(crate) module: PathBuf,
    /// The module as written, for logs and for answers about the policy.
    pub(crate) module_url: String,
    /// What the module's bytes must hash to.
    pub(crate) digest: Option<Sha256Digest>,
    /// Whether the policy's verdict counts.
    pub(crate) mode: PolicyMode,
    /// Whether the policy may change the object under review.
    pub(crate) allowed_to_mutate: bool,
    /// A JSON object: the settings, in the order of the file. `{}` when none were given.
    pub(crate) settings: String,
    /// The kinds of cluster objects the policy may read.
    pub(crate) context_aware_resources: BTreeSet<ContextAwareResource>,
    /// The host calls the policy may make.
    pub(crate) host_capabilities: HostCapabilities,
    /// Replaces the message of a rejection.
    pub(crate) message: Option<String>,
    /// Deadline of one evaluation, in whole milliseconds; `None` for the daemon's default.
    pub(crate) timeout: Option<Duration>,
    /// Linear memory that an evaluation may use, in bytes.
    pub(crate) memory_bytes_max: u64,
    /// How its guest comes to a request; `None` for the daemon's default.
    pub(crate) start: Option<StartMode>,
    /// The request that it is started and measured with.
    pub(crate) warmup: Warmup,
    /// Until when a started guest is used.
    pub(crate) snapshot: SnapshotLimits,
    /// Rego: the entrypoint to evaluate; `None` for the module's first.
    pub(crate) entrypoint: Option<String>,
    /// Rego: whether a builtin that fails ends the evaluation.
    pub(crate) strict_builtin_errors: bool,
}

/// What happens with a policy's verdict.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum PolicyMode {
    /// The verdict is the answer.
    #[default]
    Protect,
    /// The verdict is recorded; the answer is always "allowed".
    Monitor,
}

/// A kind of cluster object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ContextAwareResource {
    /// For example `v1` or `networking.k8s.io/v1`.
    pub(crate) api_version: String,
    /// For example `Namespace`.
    pub(crate) kind: String,
}

/// The number of the line, counted from 1, that holds the byte at `offset`.
fn line_at(bytes: &[u8], offset: usize) -> usize {
    let newlines = bytes.iter().take(offset).filter(|byte| **byte == b'\n');
    1 + newlines.count()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const DIGEST: &str =
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    pub(super) fn read(text: &str) -> Result<Vec<PolicySpec>, ConfigError> {
        parse(Path::new("conf/policies.yml"), text)
    }

    pub(super) fn refusal(text: &str) -> String {
        let message = read(text).unwrap_err().to_string();
        message.strip_prefix("conf/policies.yml:").unwrap().to_owned()
    }

    /// The policy `p` with `lines` beside its module.
    pub(super) fn policy(lines: &str) -> PolicySpec {
        let mut policies = read(&entry(lines)).unwrap();
        assert_eq!(policies.len(), 1);
        policies.remove(0)
    }

    /// Why the policy `p` with `lines` beside its module is refused; `lines` start on line 3.
    pub(super) fn policy_refusal(lines: &str) -> String {
        refusal(&entry(lines))
    }

    pub(super) fn entry(lines: &str) -> String {
        let indented: String = lines.lines().map(|line| format!("  {line}\n")).collect();
        format!("p:\n  module: p.wasm\n{indented}")
    }

    pub(super) fn settings_of(yaml: &str) -> String {
        policy(&format!("settings: {yaml}")).settings
    }

    #[test]
    fn json_is_accepted() {
        let policies = read(
            "{\"b\": {\"module\": \"b.wasm\", \"settings\": {\"x\": null}},\n\
             \t\"a\": {\"module\": \"a.wasm\", \"allowedToMutate\": true}}",
        )
        .unwrap();
        assert_eq!(policies[0].settings, r#"{"x":null}"#);
        assert!(policies[1].allowed_to_mutate);
    }

    #[test]
    fn policies_keep_the_order_of_the_file() {
        let text = "z: {module: z}\na: {module: a}\nm: {module: m}\nb: {module: b}\n";
        let names: Vec<_> =
            read(text).unwrap().into_iter().map(|policy| policy.name.to_string()).collect();
        assert_eq!(names, ["z", "a", "m", "b"]);
    }

    #[test]
    fn a_configuration_without_policies_is_refused() {
        for text in ["", "\n# nothing\n", "---\n", "null", "{}", "--- {}\n...\n"] {
            let error = read(text).unwrap_err();
            assert!(matches!(error, ConfigError::NoPolicies { .. }), "{text:?}");
            let message = error.to_string();
            assert!(message.starts_with("conf/policies.yml: no policies"), "{message}");
        }
    }

    #[test]
    fn a_top_level_that_is_no_mapping_is_refused() {
        assert_eq!(
            refusal("- a\n"),
            "1:1: expected a mapping from policy names to policies, found a list"
        );
        assert!(refusal("hello").ends_with("found a string"));
    }

    #[test]
    fn a_repeated_policy_is_refused_with_both_lines() {
        assert_eq!(
            refusal("p: {module: a}\nq: {module: b}\n\"p\": {module: a}\n"),
            "3:1: policy \"p\": defined twice (first on line 1)"
        );
    }

    #[test]
    fn more_policies_than_allowed_are_refused_at_the_first_too_many() {
        let policies = |count: usize| -> String {
            (0..count).map(|index| format!("p{index}: {{module: m}}\n")).collect()
        };
        assert_eq!(read(&policies(POLICIES_MAX)).unwrap().len(), POLICIES_MAX);
        assert_eq!(refusal(&policies(POLICIES_MAX + 1)), "10001:1: more than 10000 policies");
    }

    #[test]
    fn load_reads_a_file_and_resolves_modules_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policies.yml");
        std::fs::write(&path, "\u{feff}p: {module: p.wasm}\n").unwrap();
        let policies = load(&path).unwrap();
        assert_eq!(policies[0].module, directory.path().join("p.wasm"));
    }

    #[test]
    fn load_refuses_what_it_cannot_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policies.yml");
        let error = load(&path).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("policies.yml: cannot be read: No such file"), "{text}");
        load(directory.path()).unwrap_err();
    }

    #[test]
    fn load_refuses_files_that_are_too_long_or_no_text() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policies.yml");

        let mut bytes = b"p: {module: p.wasm}\n".to_vec();
        bytes.resize(CONFIG_BYTES_MAX, b'\n');
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(load(&path).unwrap().len(), 1);
        bytes.push(b'\n');
        std::fs::write(&path, &bytes).unwrap();
        let message = load(&path).unwrap_err().to_string();
        assert!(message.ends_with("longer than 16777216 bytes"), "{message}");

        std::fs::write(&path, b"p:\n  module: \xff\n").unwrap();
        let message = load(&path).unwrap_err().to_string();
        assert!(message.ends_with("policies.yml:2: not UTF-8 text"), "{message}");
    }
}
