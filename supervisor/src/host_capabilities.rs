//! Which host calls a policy may make.
//!
//! The operator lists patterns under `hostCapabilities` in policies.yml. They are checked
//! once, when the configuration is read, and asked on every host call. The patterns, the
//! known operations and the sentence a refused policy gets are those of Kubewarden's
//! policy-server:
//!
//! | pattern | grants |
//! |---|---|
//! | `*` | every call, also calls this version does not know |
//! | `oci/*`, `oci/v1/*` | every call below that prefix; the prefix must exist |
//! | `oci/v1/verify` | that one call |
//!
//! An empty list grants nothing.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use thiserror::Error;

/// Every call that can be granted by name, as `namespace/operation`.
const KNOWN_CALLS: [&str; 11] = [
    "crypto/v1/is_certificate_trusted",
    "kubernetes/can_i",
    "kubernetes/get_resource",
    "kubernetes/list_resources_all",
    "kubernetes/list_resources_by_namespace",
    "net/v1/dns_lookup_host",
    "oci/v1/manifest_digest",
    "oci/v1/oci_manifest",
    "oci/v1/oci_manifest_config",
    "oci/v1/verify",
    "oci/v2/verify",
];

/// The namespace every policy may call without a grant: it writes log lines and reads nothing.
const UNGATED_NAMESPACE: &str = "tracing";

/// Longest pattern read further. The longest known call has 38 bytes, so anything above this
/// is a mistake, and error messages stay short.
const PATTERN_BYTES_MAX: usize = 128;

/// The host calls one policy may make. The default grants nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HostCapabilities {
    grants: Vec<Grant>,
}

/// One checked pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Grant {
    /// `*`
    Everything,
    /// `oci/*`, kept with its final slash so that `oci/` cannot match `ocilike/…`.
    Below(String),
    /// `oci/v1/verify`
    Call(String),
}

impl HostCapabilities {
    /// Checks a list of patterns. The empty list is valid and grants nothing.
    ///
    /// # Errors
    ///
    /// The first pattern that is not one of the three forms, or that names a call this
    /// version does not know; the error carries its place in the list.
    pub(crate) fn parse(patterns: &[String]) -> Result<Self, HostCapabilityError> {
        let grants = patterns
            .iter()
            .enumerate()
            .map(|(index, pattern)| {
                parse_pattern(pattern).map_err(|reason| HostCapabilityError {
                    index,
                    pattern: pattern.chars().take(PATTERN_BYTES_MAX).collect(),
                    reason,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { grants })
    }

    /// Whether the policy may call `operation` (for example `v1/verify`) of `namespace` (for
    /// example `oci`). A grant says nothing about whether the host knows such a call.
    pub(crate) fn allows(&self, namespace: &str, operation: &str) -> bool {
        if namespace == UNGATED_NAMESPACE {
            return true;
        }
        let path = call_path(namespace, operation);
        self.grants.iter().any(|grant| match grant {
            Grant::Everything => true,
            Grant::Below(prefix) => path.starts_with(prefix.as_str()),
            Grant::Call(call) => path == *call,
        })
    }

    /// The error text a policy receives for a call it was not granted.
    pub(crate) fn denial(namespace: &str, operation: &str) -> String {
        let path = call_path(namespace, operation);
        format!(
            "Policy has not been granted access to the '{path}' host capability. \
             The violation has been reported."
        )
    }
}

fn call_path(namespace: &str, operation: &str) -> String {
    format!("{namespace}/{operation}")
}

/// Why a list of patterns was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("invalid pattern {pattern:?}: {reason}")]
pub(crate) struct HostCapabilityError {
    /// Place of the pattern in the list, counted from 0.
    pub(crate) index: usize,
    /// The pattern as written, cut to its first characters when overlong.
    pub(crate) pattern: String,
    /// What is wrong with it.
    pub(crate) reason: PatternError,
}

/// What is wrong with one pattern.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum PatternError {
    /// The pattern is the empty string.
    #[error("it is empty; leave the list empty to grant nothing")]
    Empty,
    /// The pattern cannot name anything known.
    #[error("longer than {PATTERN_BYTES_MAX} bytes")]
    TooLong,
    /// A `*` that is not the whole last segment, as in `oci*` or `*/verify`.
    #[error("\"*\" may only stand alone or as the whole last segment, as in \"oci/*\"")]
    MisplacedWildcard,
    /// A call nobody needs a grant for.
    #[error("the namespace \"{UNGATED_NAMESPACE}\" is always allowed; remove this entry")]
    NeverGated,
    /// A segment that no known call has at this place.
    #[error("unknown segment {segment:?}{} (known: {})", after(.parent), .options.join(", "))]
    UnknownSegment {
        /// The segment as written.
        segment: String,
        /// The known path before it; empty at the start.
        parent: String,
        /// What could stand there.
        options: Vec<&'static str>,
    },
    /// More segments, or `/*`, after a complete call.
    #[error("nothing can follow the complete call {call:?}")]
    BeyondCall {
        /// The call the pattern should have ended with.
        call: String,
    },
    /// The path stops before it names a call.
    #[error("it names no single call; write \"{path}/*\" to grant everything below it")]
    Incomplete {
        /// The path as written.
        path: String,
    },
}

fn after(parent: &str) -> String {
    if parent.is_empty() { String::new() } else { format!(" after {parent:?}") }
}

fn parse_pattern(pattern: &str) -> Result<Grant, PatternError> {
    if pattern == "*" {
        return Ok(Grant::Everything);
    }
    if pattern.is_empty() {
        return Err(PatternError::Empty);
    }
    if pattern.len() > PATTERN_BYTES_MAX {
        return Err(PatternError::TooLong);
    }
    let (path, wildcard) = match pattern.strip_suffix("/*") {
        Some(prefix) => (prefix, true),
        None => (pattern, false),
    };
    if path.contains('*') {
        return Err(PatternError::MisplacedWildcard);
    }
    require_known(path)?;

    let complete = segments_below(path).is_empty();
    match (complete, wildcard) {
        (true, false) => Ok(Grant::Call(path.to_owned())),
        (false, true) => Ok(Grant::Below(format!("{path}/"))),
        (true, true) => Err(PatternError::BeyondCall { call: path.to_owned() }),
        (false, false) => Err(PatternError::Incomplete { path: path.to_owned() }),
    }
}

/// Checks that `path` is the beginning, in whole segments, of some known call.
fn require_known(path: &str) -> Result<(), PatternError> {
    let mut parent = String::new();
    for segment in path.split('/') {
        let options = segments_below(&parent);
        if options.is_empty() {
            return Err(PatternError::BeyondCall { call: parent });
        }
        if !options.contains(segment) {
            if parent.is_empty() && segment == UNGATED_NAMESPACE {
                return Err(PatternError::NeverGated);
            }
            return Err(PatternError::UnknownSegment {
                segment: segment.to_owned(),
                parent,
                options: options.into_iter().collect(),
            });
        }
        if !parent.is_empty() {
            parent.push('/');
        }
        parent.push_str(segment);
    }
    Ok(())
}

/// The segments that follow `parent` in the known calls: none when `parent` is a complete
/// call, the namespaces when it is empty.
fn segments_below(parent: &str) -> BTreeSet<&'static str> {
    KNOWN_CALLS
        .iter()
        .filter_map(|call| {
            if parent.is_empty() {
                Some(*call)
            } else {
                call.strip_prefix(parent)?.strip_prefix('/')
            }
        })
        .filter_map(|rest| rest.split('/').next())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted(patterns: &[&str]) -> HostCapabilities {
        parse(patterns).unwrap()
    }

    fn parse(patterns: &[&str]) -> Result<HostCapabilities, HostCapabilityError> {
        let patterns: Vec<String> = patterns.iter().map(|text| (*text).to_owned()).collect();
        HostCapabilities::parse(&patterns)
    }

    fn refusal(pattern: &str) -> String {
        parse(&[pattern]).unwrap_err().to_string()
    }

    fn split(call: &str) -> (&str, &str) {
        call.split_once('/').unwrap()
    }

    #[test]
    fn an_empty_list_denies_every_call() {
        for capabilities in [HostCapabilities::default(), granted(&[])] {
            for call in KNOWN_CALLS {
                let (namespace, operation) = split(call);
                assert!(!capabilities.allows(namespace, operation), "{call}");
            }
        }
    }

    #[test]
    fn tracing_needs_no_grant() {
        assert!(granted(&[]).allows("tracing", "log"));
        assert!(!granted(&[]).allows("tracing2", "log"));
        assert!(!granted(&[]).allows("Tracing", "log"));
        assert!(!granted(&[]).allows("tracing/log", ""));
    }

    #[test]
    fn the_star_grants_known_and_unknown_calls() {
        let everything = granted(&["*"]);
        for call in KNOWN_CALLS {
            let (namespace, operation) = split(call);
            assert!(everything.allows(namespace, operation), "{call}");
        }
        assert!(everything.allows("future", "v9/anything"));
    }

    #[test]
    fn every_known_call_can_be_granted_and_grants_only_itself() {
        for pattern in KNOWN_CALLS {
            let capabilities = granted(&[pattern]);
            for call in KNOWN_CALLS {
                let (namespace, operation) = split(call);
                assert_eq!(
                    capabilities.allows(namespace, operation),
                    call == pattern,
                    "{pattern} and {call}"
                );
            }
        }
    }

    #[test]
    fn a_prefix_grants_everything_below_it_and_nothing_beside_it() {
        let oci = granted(&["oci/*"]);
        assert!(oci.allows("oci", "v1/verify"));
        assert!(oci.allows("oci", "v2/verify"));
        assert!(oci.allows("oci", "v3/unheard_of"));
        assert!(!oci.allows("ocilike", "v1/verify"));
        assert!(!oci.allows("net", "v1/dns_lookup_host"));

        let oci_v1 = granted(&["oci/v1/*"]);
        assert!(oci_v1.allows("oci", "v1/manifest_digest"));
        assert!(!oci_v1.allows("oci", "v2/verify"));
        assert!(!oci_v1.allows("oci", "v10/verify"));

        let kubernetes = granted(&["kubernetes/*"]);
        assert!(kubernetes.allows("kubernetes", "can_i"));
    }

    #[test]
    fn several_patterns_add_up() {
        let capabilities = granted(&["net/v1/dns_lookup_host", "crypto/v1/*", "crypto/v1/*"]);
        assert!(capabilities.allows("net", "v1/dns_lookup_host"));
        assert!(capabilities.allows("crypto", "v1/is_certificate_trusted"));
        assert!(!capabilities.allows("oci", "v1/verify"));
    }

    #[test]
    fn a_misplaced_star_is_refused() {
        for pattern in ["oci*", "*/verify", "oci/v*", "oci/*/verify", "**", "*/*", "oci/**"] {
            let message = refusal(pattern);
            assert!(message.contains("may only stand alone"), "{message}");
        }
    }

    #[test]
    fn an_unknown_segment_is_refused_with_the_known_ones() {
        assert_eq!(
            refusal("oci/v3/verify"),
            "invalid pattern \"oci/v3/verify\": unknown segment \"v3\" after \"oci\" \
             (known: v1, v2)"
        );
        assert_eq!(
            refusal("docker/*"),
            "invalid pattern \"docker/*\": unknown segment \"docker\" \
             (known: crypto, kubernetes, net, oci)"
        );
        assert!(refusal("oci/v2/manifest_digest").contains("(known: verify)"));
        assert!(refusal("oci/v1/ver/*").contains("unknown segment \"ver\""));
        assert!(refusal("oci/").contains("unknown segment \"\" after \"oci\""));
        assert!(refusal("/*").contains("unknown segment \"\" (known: crypto"));
        assert!(refusal("OCI/*").contains("unknown segment \"OCI\""));
        assert!(refusal(" oci/*").contains("unknown segment \" oci\""));
    }

    #[test]
    fn a_path_that_stops_early_is_refused_with_the_prefix_form() {
        assert!(refusal("oci").contains("write \"oci/*\""));
        assert!(refusal("oci/v1").contains("write \"oci/v1/*\""));
        assert!(refusal("kubernetes").contains("write \"kubernetes/*\""));
    }

    #[test]
    fn a_path_beyond_a_call_is_refused_with_the_call() {
        for pattern in ["oci/v1/verify/*", "oci/v1/verify/now", "oci/v1/verify/"] {
            let message = refusal(pattern);
            assert!(
                message.ends_with("nothing can follow the complete call \"oci/v1/verify\""),
                "{message}"
            );
        }
    }

    #[test]
    fn empty_overlong_and_needless_patterns_are_refused() {
        assert!(refusal("").contains("it is empty"));
        let overlong = refusal(&"x".repeat(100_000));
        assert!(overlong.contains("longer than 128 bytes"));
        assert!(overlong.len() < 256);
        assert!(refusal("tracing/log").contains("always allowed"));
        assert!(refusal("tracing/*").contains("always allowed"));
    }

    #[test]
    fn the_error_tells_the_place_in_the_list() {
        let error = parse(&["*", "oci/v1/verify", "nope"]).unwrap_err();
        assert_eq!(error.index, 2);
        assert_eq!(error.pattern, "nope");
    }

    #[test]
    fn the_denial_names_the_full_path() {
        assert_eq!(
            HostCapabilities::denial("oci", "v1/verify"),
            "Policy has not been granted access to the 'oci/v1/verify' host capability. \
             The violation has been reported."
        );
    }
}
