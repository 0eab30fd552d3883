//! A validating policy with the WASI contract, as small as one is: refuses pods that share
//! the host's network, process ids or IPC. It has no settings.

use std::io::{self, Read, Write};
use std::process::ExitCode;

use serde::Deserialize;

#[derive(Debug, Deserialize)]
struct Input {
    request: Request,
}

#[derive(Debug, Deserialize)]
struct Request {
    /// Absent or null on DELETE.
    object: Option<Object>,
}

#[derive(Debug, Deserialize)]
struct Object {
    spec: Option<Spec>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Spec {
    host_network: bool,
    #[serde(rename = "hostPID")]
    host_pid: bool,
    #[serde(rename = "hostIPC")]
    host_ipc: bool,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let mut input = Vec::new();
    io::stdin().read_to_end(&mut input)?;
    let answer = match std::env::args().nth(1).as_deref() {
        Some("validate") => validate(&input)?,
        Some("validate-settings") => r#"{"valid":true}"#.to_owned(),
        _ => return Err(io::Error::other("the argument is validate or validate-settings")),
    };
    io::stdout().write_all(answer.as_bytes())
}

fn validate(input: &[u8]) -> io::Result<String> {
    let Input { request } = serde_json::from_slice(input)?;
    let spec = request.object.and_then(|object| object.spec).unwrap_or_default();
    let shared: Vec<&str> =
        [(spec.host_network, "network"), (spec.host_pid, "process ids"), (spec.host_ipc, "IPC")]
            .into_iter()
            .filter_map(|(is_shared, what)| is_shared.then_some(what))
            .collect();
    Ok(if shared.is_empty() {
        r#"{"accepted":true}"#.to_owned()
    } else {
        format!(
            r#"{{"accepted":false,"message":"not shared with pods: the host's {}"}}"#,
            shared.join(", ")
        )
    })
}
