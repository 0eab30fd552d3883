//! A validating policy on the Kubewarden SDK: refuses privileged containers in pods and
//! in the pod templates of the built-in workload kinds.

use kubewarden_policy_sdk::{
    accept_request, logging::KubewardenDrain, protocol_version_guest, reject_request,
    request::ValidationRequest, settings::Validatable, validate_settings,
};
use serde::Deserialize;
use serde_json::Value;
use slog::{Logger, info, o, warn};
use wapc_guest::{CallResult, register_function};

/// What the user may set.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    /// Namespaces in which privileged containers are fine.
    allowed_namespaces: Vec<String>,
    /// Put in front of the rejection message, followed by a colon and a space.
    message_prefix: Option<String>,
}

impl Validatable for Settings {
    fn validate(&self) -> Result<(), String> {
        for name in &self.allowed_namespaces {
            if name.is_empty() {
                return Err("allowed_namespaces must not contain an empty name".to_owned());
            }
            if !is_dns_label(name) {
                return Err(format!("allowed_namespaces: '{name}' is not a namespace name"));
            }
        }
        if self.message_prefix.as_deref() == Some("") {
            return Err("message_prefix must not be empty".to_owned());
        }
        Ok(())
    }
}

/// The part of a pod spec that matters here.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PodSpec {
    containers: Option<Vec<Container>>,
    init_containers: Option<Vec<Container>>,
    ephemeral_containers: Option<Vec<Container>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    name: String,
    security_context: Option<SecurityContext>,
}

#[derive(Debug, Deserialize)]
struct SecurityContext {
    privileged: Option<bool>,
}

impl PodSpec {
    /// A description of each privileged container, in the order of the spec.
    fn privileged(&self) -> Vec<String> {
        let groups = [
            ("init container", &self.init_containers),
            ("container", &self.containers),
            ("ephemeral container", &self.ephemeral_containers),
        ];
        groups
            .into_iter()
            .flat_map(|(what, group)| group.iter().flatten().map(move |c| (what, c)))
            .filter(|(_, c)| {
                c.security_context.as_ref().is_some_and(|s| s.privileged == Some(true))
            })
            .map(|(what, c)| format!("{what} '{}'", c.name))
            .collect()
    }
}

/// Where an object of this kind keeps its pod spec; nothing for kinds that have none.
fn pod_spec_pointer(kind: &str) -> Option<&'static str> {
    match kind {
        "Pod" => Some("/spec"),
        "DaemonSet"
        | "Deployment"
        | "Job"
        | "ReplicaSet"
        | "ReplicationController"
        | "StatefulSet" => Some("/spec/template/spec"),
        "CronJob" => Some("/spec/jobTemplate/spec/template/spec"),
        _ => None,
    }
}

fn is_dns_label(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = name.as_bytes();
    bytes.len() <= 63
        && bytes.first().copied().is_some_and(inner)
        && bytes.last().copied().is_some_and(inner)
        && bytes.iter().all(|&b| inner(b) || b == b'-')
}

#[unsafe(no_mangle)]
pub extern "C" fn wapc_init() {
    register_function("validate", validate);
    register_function("validate_settings", validate_settings::<Settings>);
    register_function("protocol_version", protocol_version_guest);
}

fn validate(payload: &[u8]) -> CallResult {
    let ValidationRequest { settings, request } = ValidationRequest::<Settings>::new(payload)?;
    let log = Logger::root(KubewardenDrain::new(), o!("policy" => "pod-guard"));
    let kind = request.kind.kind.as_str();
    info!(log, "checking {kind} {}", request.name;
        "uid" => &request.uid, "namespace" => &request.namespace, "operation" => &request.operation);

    if settings.allowed_namespaces.contains(&request.namespace) {
        return accept_request();
    }
    // The object of a DELETE is null, which has no pod spec either.
    let spec = pod_spec_pointer(kind).and_then(|at| request.object.pointer(at));
    let spec = match spec {
        None | Some(Value::Null) => return accept_request(),
        Some(spec) => PodSpec::deserialize(spec),
    };
    let message = match spec.map(|spec| spec.privileged()) {
        Ok(found) if found.is_empty() => return accept_request(),
        Ok(found) => format!("privileged mode is not allowed: {}", found.join(", ")),
        Err(error) => format!("cannot read the pod spec: {error}"),
    };
    let message = match settings.message_prefix {
        Some(prefix) => format!("{prefix}: {message}"),
        None => message,
    };
    warn!(log, "denied"; "namespace" => &request.namespace, "name" => &request.name, "why" => &message);
    reject_request(Some(message), None, None, None)
}
