//! The metadata section of a module, in every way that it is used: a policy runs by a contract
//! only if its metadata says so in the form that serde_json reads, and a refusal is no longer
//! than a message for a person may be.
#![no_main]

use conclave_fuzz::{MESSAGE_BYTES_MAX, is_json, reading};
use conclave_ipc::message::{Contract, ModuleShape};
use conclave_supervisor::fuzzing::{Use, contract};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

const SHAPES: [ModuleShape; 4] =
    [ModuleShape::Wapc, ModuleShape::Wasi, ModuleShape::Rego, ModuleShape::Unknown];

const MODES: [Option<&str>; 5] =
    [None, Some("kubewarden-wapc"), Some("wasi"), Some("opa"), Some("gatekeeper")];

fuzz_target!(|metadata: &[u8]| {
    let value = str::from_utf8(metadata).ok().and_then(reading);
    let served = check(Use::Serve, metadata, value.as_ref());
    for shape in SHAPES {
        for mode in MODES {
            let run = check(Use::Run(mode, shape), metadata, value.as_ref());
            if mode.is_none() {
                assert_eq!(run, served, "with metadata, the exports have no say");
            }
        }
    }
});

fn check(used: Use<'_>, metadata: &[u8], value: Option<&Value>) -> Option<Contract> {
    let contract = match contract(used, metadata) {
        Ok(contract) => contract,
        Err(message) => {
            assert!(message.len() <= MESSAGE_BYTES_MAX, "a message of {} bytes", message.len());
            return None;
        }
    };
    assert!(is_json(metadata), "a contract, but no JSON");
    if let Some(value) = value {
        assert!(value.is_object() && value["rules"].is_array() && value["mutating"].is_boolean());
        let chosen = if let Use::Run(mode, _) = used { mode } else { None };
        match (chosen.or(value["executionMode"].as_str()), contract) {
            (None | Some("kubewarden-wapc"), Contract::Wapc) => {
                assert_eq!(value["protocolVersion"], "v1");
            }
            (Some("wasi"), Contract::Wasi)
            | (Some("opa"), Contract::Opa)
            | (Some("gatekeeper"), Contract::Gatekeeper) => {}
            (mode, contract) => panic!("{mode:?} is run as {contract:?}"),
        }
    }
    Some(contract)
}
