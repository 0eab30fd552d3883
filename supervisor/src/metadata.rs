//! A policy's metadata: the JSON in the module's `io.kubewarden.metadata` section.
//!
//! The fields and their defaults are Kubewarden's; unknown ones are ignored as there.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use conclave_ipc::message::{Contract, ModuleShape};
use semver::Version;
use serde::Deserialize;
use serde::de::Error as _;
use thiserror::Error;

use crate::json_object::Object;
use crate::log::shorten;

/// The Kubewarden release whose policies are understood, as (major, minor); a policy's
/// `minimumKubewardenVersion` is compared with it.
pub(crate) const KUBEWARDEN_VERSION: (u64, u64) = (1, 38);

/// The fields that have a meaning here; the others are checked for their shape.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(dead_code, reason = "some fields are there to be checked for their shape")]
struct Metadata {
    protocol_version: Option<String>,
    rules: Vec<Object<Rule>>,
    annotations: Option<BTreeMap<String, String>>,
    mutating: bool,
    background_audit: Option<bool>,
    execution_mode: Option<String>,
    policy_type: Option<PolicyType>,
    #[serde(default)]
    context_aware_resources: Vec<Object<Resource>>,
    host_capabilities: Option<Vec<String>>,
    minimum_kubewarden_version: Option<Version>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(dead_code, reason = "checked for its shape")]
struct Rule {
    api_groups: Vec<String>,
    api_versions: Vec<String>,
    resources: Vec<String>,
    operations: Vec<Operation>,
}

#[derive(Debug, Deserialize)]
enum Operation {
    #[serde(rename = "CREATE")]
    Create,
    #[serde(rename = "UPDATE")]
    Update,
    #[serde(rename = "DELETE")]
    Delete,
    #[serde(rename = "CONNECT")]
    Connect,
    #[serde(rename = "*")]
    All,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PolicyType {
    Kubernetes,
    Raw,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(dead_code, reason = "checked for its shape")]
struct Resource {
    api_version: String,
    kind: String,
}

/// Why a module can't be run as a policy. What it quotes of the metadata is shortened.
#[derive(Debug, Error)]
pub(crate) enum MetadataError {
    /// The section does not hold a document of the right shape.
    #[error("metadata of the policy is malformed: {0}")]
    Malformed(String),
    /// A waPC policy says nothing about its protocol.
    #[error(
        "Policy is missing protocol version, which is required for KubewardenWapc execution mode"
    )]
    NoProtocolVersion,
    /// A waPC policy speaks another protocol.
    #[error("Policy uses protocol version {0:?} but only V1 is supported")]
    ProtocolVersion(String),
    /// The policy wants a newer host.
    #[error(
        "Policy required Kubewarden version {} but is running on {}.{}",
        .0, KUBEWARDEN_VERSION.0, KUBEWARDEN_VERSION.1
    )]
    TooNew(String),
    /// Nobody knows how to run it, or this version does not.
    #[error("unsupported execution mode {0:?} (supported: kubewarden-wapc, wasi, opa, gatekeeper)")]
    ExecutionMode(String),
    /// The metadata does not say how to run it, and neither do the exports.
    #[error(
        "the module has no metadata and exports neither __guest_call nor _start: say how to run it"
    )]
    UnknownContract,
    /// A Rego module; two modes look the same.
    #[error("the module has no metadata and is compiled from Rego: say opa or gatekeeper")]
    Rego,
}

/// What says how modules are run.
#[derive(Debug)]
pub(crate) enum Execution {
    /// Their metadata, which has to be complete: the daemon.
    Metadata,
    /// The caller's word, else the metadata, else the exports: a single run.
    Chosen(Option<String>),
}

impl Execution {
    /// The contract to run a module by.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub(crate) fn contract(
        &self,
        metadata: Option<&[u8]>,
        shape: ModuleShape,
    ) -> Result<Contract, MetadataError> {
        match self {
            Self::Metadata => contract_to_serve(metadata),
            Self::Chosen(mode) => contract_to_run(mode.as_deref(), metadata, shape),
        }
    }
}

/// Whether the metadata says that the policy is for raw requests.
pub(crate) fn judges_raw_requests(metadata: Option<&[u8]>) -> bool {
    metadata.map(parse).is_some_and(|metadata| {
        metadata.is_ok_and(|metadata| matches!(metadata.policy_type, Some(PolicyType::Raw)))
    })
}

/// What the daemon runs the module as: the metadata decides, and has to be complete.
///
/// # Errors
/// See [`MetadataError`].
fn contract_to_serve(metadata: Option<&[u8]>) -> Result<Contract, MetadataError> {
    let Some(metadata) = metadata else { return Err(MetadataError::NoProtocolVersion) };
    let metadata = parse(metadata)?;
    let contract = match metadata.execution_mode.as_deref() {
        None => Contract::Wapc,
        Some(mode) => contract_of_mode(mode)?,
    };
    check_protocol(contract, &metadata)?;
    Ok(contract)
}

/// What a single run runs the module as: the caller's word, else the metadata, else what
/// the exports suggest.
///
/// # Errors
/// See [`MetadataError`].
fn contract_to_run(
    mode: Option<&str>,
    metadata: Option<&[u8]>,
    shape: ModuleShape,
) -> Result<Contract, MetadataError> {
    let metadata = metadata.map(parse).transpose()?;
    let named =
        mode.or_else(|| metadata.as_ref().and_then(|metadata| metadata.execution_mode.as_deref()));
    let contract = match (named, &metadata, shape) {
        (Some(mode), _, _) => contract_of_mode(mode)?,
        (None, Some(_), _) | (None, None, ModuleShape::Wapc) => Contract::Wapc,
        (None, None, ModuleShape::Wasi) => Contract::Wasi,
        (None, None, ModuleShape::Rego) => return Err(MetadataError::Rego),
        (None, None, ModuleShape::Unknown) => return Err(MetadataError::UnknownContract),
    };
    if let Some(metadata) = &metadata {
        check_protocol(contract, metadata)?;
    }
    Ok(contract)
}

/// Parses a metadata section and checks what holds for every contract.
fn parse(bytes: &[u8]) -> Result<Metadata, MetadataError> {
    // The JSON reader alone would not look into strings that it skips.
    let text = str::from_utf8(bytes).map_err(serde_json::Error::custom);
    let Object(metadata): Object<Metadata> = text
        .and_then(serde_json::from_str)
        .map_err(|error| MetadataError::Malformed(excerpt(&error)))?;
    match &metadata.minimum_kubewarden_version {
        Some(version) if (version.major, version.minor) > KUBEWARDEN_VERSION => {
            Err(MetadataError::TooNew(excerpt(version)))
        }
        _ => Ok(metadata),
    }
}

fn contract_of_mode(mode: &str) -> Result<Contract, MetadataError> {
    match mode {
        "kubewarden-wapc" => Ok(Contract::Wapc),
        "wasi" => Ok(Contract::Wasi),
        "opa" => Ok(Contract::Opa),
        "gatekeeper" => Ok(Contract::Gatekeeper),
        other => Err(MetadataError::ExecutionMode(excerpt(other))),
    }
}

fn check_protocol(contract: Contract, metadata: &Metadata) -> Result<(), MetadataError> {
    match (contract, metadata.protocol_version.as_deref()) {
        (Contract::Wapc, Some("v1"))
        | (Contract::Wasi | Contract::Opa | Contract::Gatekeeper, _) => Ok(()),
        (Contract::Wapc, None) => Err(MetadataError::NoProtocolVersion),
        (Contract::Wapc, Some(other)) => Err(MetadataError::ProtocolVersion(excerpt(other))),
    }
}

fn excerpt(text: &(impl ToString + ?Sized)) -> String {
    shorten(&text.to_string()).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(extra: &str) -> String {
        format!(
            r#"{{"rules":[{{"apiGroups":[""],"apiVersions":["v1"],"resources":["pods"],"operations":["CREATE","*"]}}],"mutating":false{extra}}}"#
        )
    }

    fn served(extra: &str) -> Result<Contract, String> {
        contract_to_serve(Some(metadata(extra).as_bytes())).map_err(|error| error.to_string())
    }

    #[test]
    fn the_mode_defaults_to_wapc() {
        assert_eq!(served(r#","protocolVersion":"v1""#), Ok(Contract::Wapc));
        assert_eq!(
            served(r#","protocolVersion":"v1","executionMode":null,"contextAware":true"#),
            Ok(Contract::Wapc)
        );
    }

    #[test]
    fn a_policy_is_for_raw_requests_only_if_it_says_so() {
        let is_raw = |extra: &str| judges_raw_requests(Some(metadata(extra).as_bytes()));
        assert!(is_raw(r#","policyType":"raw""#));
        assert!(!is_raw(r#","policyType":"kubernetes""#) && !is_raw(""));
        assert!(!judges_raw_requests(None) && !judges_raw_requests(Some(b"{")));
    }

    #[test]
    fn a_wasi_policy_needs_no_protocol_version() {
        assert_eq!(
            served(r#","executionMode":"wasi","protocolVersion":"Unknown""#),
            Ok(Contract::Wasi)
        );
        assert_eq!(served(r#","executionMode":"wasi""#), Ok(Contract::Wasi));
    }

    #[test]
    fn rego_comes_in_two_modes() {
        for (mode, contract) in [("opa", Contract::Opa), ("gatekeeper", Contract::Gatekeeper)] {
            let extra = format!(r#","executionMode":"{mode}","protocolVersion":"Unknown""#);
            assert_eq!(served(&extra), Ok(contract));
            let run = contract_to_run(Some(mode), None, ModuleShape::Rego);
            assert_eq!(run.unwrap(), contract);
        }
        let unknown = contract_to_run(None, None, ModuleShape::Rego).unwrap_err();
        assert!(matches!(unknown, MetadataError::Rego), "{unknown}");
    }

    #[test]
    fn a_wapc_policy_needs_version_1() {
        let missing = "Policy is missing protocol version, which is required for KubewardenWapc execution mode";
        assert_eq!(served(""), Err(missing.to_owned()));
        assert_eq!(contract_to_serve(None).unwrap_err().to_string(), missing);
        let unknown = r#"Policy uses protocol version "Unknown" but only V1 is supported"#;
        assert_eq!(served(r#","protocolVersion":"Unknown""#), Err(unknown.to_owned()));
    }

    #[test]
    fn a_policy_for_a_newer_minor_version_is_refused_and_patch_versions_do_not_count() {
        served(r#","protocolVersion":"v1","minimumKubewardenVersion":"1.38.99""#).unwrap();
        let error =
            served(r#","protocolVersion":"v1","minimumKubewardenVersion":"1.39.0""#).unwrap_err();
        assert_eq!(error, "Policy required Kubewarden version 1.39.0 but is running on 1.38");
    }

    #[test]
    fn an_unsupported_mode_is_named() {
        let error = served(r#","executionMode":"ferricel""#).unwrap_err();
        assert!(error.starts_with("unsupported execution mode \"ferricel\""), "{error}");
    }

    #[test]
    fn a_section_of_the_wrong_shape_is_an_error_not_an_absence() {
        for bad in
            ["", "[]", "{}", r#"{"rules":[],"mutating":"no"}"#, r#"{"rules":[{}],"mutating":true}"#]
        {
            assert!(
                matches!(contract_to_serve(Some(bad.as_bytes())), Err(MetadataError::Malformed(_))),
                "{bad}"
            );
        }
        let list = r#"["v1",[],null,false,null,null,null,[],null,null]"#;
        let rule = metadata(r#","protocolVersion":"v1""#)
            .replace(r#"{"apiGroups":[""],"apiVersions":["v1"],"resources":["pods"],"operations":["CREATE","*"]}"#, r#"[[""],["v1"],["pods"],["*"]]"#);
        for bad in [list, &rule] {
            let error = contract_to_serve(Some(bad.as_bytes())).unwrap_err().to_string();
            assert!(error.contains("invalid type: sequence, expected an object"), "{error}");
        }
        let mut bytes = metadata(r#","protocolVersion":"v1","skipped":"?""#).into_bytes();
        let place = bytes.iter().position(|byte| *byte == b'?').unwrap();
        contract_to_serve(Some(&bytes)).unwrap();
        bytes[place] = 0xff;
        contract_to_serve(Some(&bytes)).unwrap_err();
        let operation = metadata("").replace("CREATE", "PATCH");
        contract_to_serve(Some(operation.as_bytes())).unwrap_err();
    }

    #[test]
    fn a_refusal_does_not_repeat_all_of_the_metadata() {
        let long = "x".repeat(1 << 20);
        for extra in [
            format!(r#","executionMode":"{long}""#),
            format!(r#","protocolVersion":"{long}""#),
            format!(r#","policyType":"{long}""#),
            format!(r#","minimumKubewardenVersion":"99.0.0-{long}""#),
        ] {
            let error = served(&extra).unwrap_err();
            assert!(error.contains("xxx") && error.len() < 5000, "{} bytes", error.len());
        }
    }

    #[test]
    fn a_single_run_goes_by_the_caller_then_the_metadata_then_the_exports() {
        let wasi = metadata(r#","executionMode":"wasi""#);
        let run = |mode, metadata: Option<&str>, shape| {
            contract_to_run(mode, metadata.map(str::as_bytes), shape)
        };
        assert_eq!(run(None, Some(&wasi), ModuleShape::Wapc).unwrap(), Contract::Wasi);
        assert_eq!(run(Some("wasi"), None, ModuleShape::Wapc).unwrap(), Contract::Wasi);
        assert_eq!(run(None, None, ModuleShape::Wapc).unwrap(), Contract::Wapc);
        assert_eq!(run(None, None, ModuleShape::Wasi).unwrap(), Contract::Wasi);
        run(None, None, ModuleShape::Unknown).unwrap_err();
        run(Some("kubewarden"), None, ModuleShape::Wapc).unwrap_err();
    }
}
