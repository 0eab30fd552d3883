//! Hostile modules, made from three templates that would accept every request.

use std::fmt::Write as _;

use harness::{metadata, metadata_section};

const WAPC: &str = include_str!("wapc.wat");
const WASI: &str = include_str!("wasi.wat");
const REGO: &str = include_str!("rego.wat");

/// The memory of the templates: two pages.
const MEMORY: &str = r#"(memory (export "memory") 2)"#;

/// How a guest talks to its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contract {
    Wapc,
    Wasi,
    Opa,
}

impl Contract {
    const fn mode(self) -> &'static str {
        match self {
            Self::Wapc => "kubewarden-wapc",
            Self::Wasi => "wasi",
            Self::Opa => "opa",
        }
    }

    /// What an answer of a broken guest begins with.
    pub(crate) const fn fault_prefix(self) -> &'static str {
        match self {
            Self::Wapc => "internal server error: Guest call failure: ",
            Self::Wasi => "",
            Self::Opa => "internal server error: ",
        }
    }

    /// What an answer begins with if the guest's own answer can't be read.
    pub(crate) const fn unreadable_prefix(self) -> &'static str {
        match self {
            Self::Wapc => "internal server error: invalid response from policy: ",
            Self::Wasi => "internal server error: Cannot deserialize policy validation response: ",
            Self::Opa => "internal server error: cannot interpret OPA policy result: ",
        }
    }
}

/// A policy to be served.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) name: String,
    pub(crate) contract: Contract,
    pub(crate) module: Vec<u8>,
    pub(crate) timeout_seconds: f32,
    /// Further keys of the policy, each on a line of its own.
    pub(crate) keys: &'static str,
}

impl Guest {
    /// A module as it stands, with metadata appended.
    pub(crate) fn of_module(name: &str, contract: Contract, mut module: Vec<u8>) -> Self {
        module.extend(metadata_section(&metadata(contract.mode())));
        Self::of_file(name, contract, module)
    }

    /// A module file as it stands.
    pub(crate) fn of_file(name: &str, contract: Contract, module: Vec<u8>) -> Self {
        // Long enough for a busy machine: who waits for a deadline sets a shorter one.
        Self { name: name.to_owned(), contract, module, timeout_seconds: 20.0, keys: "" }
    }

    /// A module in text.
    pub(crate) fn of_text(name: &str, contract: Contract, text: &str) -> Self {
        let module = wat::parse_str(text).unwrap_or_else(|error| panic!("{name}: {error}"));
        Self::of_module(name, contract, module)
    }

    /// The waPC template with hostile code in front of its verdict.
    pub(crate) fn wapc(name: &str, code: &str) -> Self {
        Self::wapc_with(name, "", code)
    }

    /// The same with further fields of the module.
    pub(crate) fn wapc_with(name: &str, fields: &str, code: &str) -> Self {
        Self::of_text(name, Contract::Wapc, &fill(WAPC, fields, code))
    }

    /// The WASI template with hostile code in front of its verdict.
    pub(crate) fn wasi(name: &str, code: &str) -> Self {
        Self::wasi_with(name, "", code)
    }

    /// The same with further fields of the module.
    pub(crate) fn wasi_with(name: &str, fields: &str, code: &str) -> Self {
        Self::of_text(name, Contract::Wasi, &fill(WASI, fields, code))
    }

    /// The template of that contract.
    pub(crate) fn template(contract: Contract, name: &str, fields: &str, code: &str) -> Self {
        match contract {
            Contract::Wapc => Self::wapc_with(name, fields, code),
            Contract::Wasi => Self::wasi_with(name, fields, code),
            Contract::Opa => Self::of_text(name, contract, &fill(REGO, fields, code)),
        }
    }

    /// The same template with another memory, in 64 KiB pages.
    pub(crate) fn with_memory(contract: Contract, name: &str, pages: u32, code: &str) -> Self {
        let template = match contract {
            Contract::Wapc => WAPC,
            Contract::Wasi => WASI,
            Contract::Opa => REGO,
        };
        let memory = format!(r#"(memory (export "memory") {pages})"#);
        let text = fill(template, "", code).replace(MEMORY, &memory);
        Self::of_text(name, contract, &text)
    }

    /// A policy that answers every request with these bytes.
    pub(crate) fn answering(contract: Contract, name: &str, answer: &[u8]) -> Self {
        let length = answer.len();
        let memory = format!(r#"(memory (export "memory") {})"#, 2 + length.div_ceil(65536));
        let fields = data(65536, answer);
        let (template, code) = match contract {
            Contract::Wapc => (
                WAPC,
                format!(
                    "(call $guest_response (i32.const 65536) (i32.const {length})) (return (i32.const 1))"
                ),
            ),
            Contract::Wasi => (
                WASI,
                format!(
                    "(call $print (i32.const 1) (i32.const 65536) (i32.const {length})) (return)"
                ),
            ),
            Contract::Opa => (REGO, "(global.set $result (i32.const 65536))".to_owned()),
        };
        let text = fill(template, &fields, &code).replace(MEMORY, &memory);
        Self::of_text(name, contract, &text)
    }

    /// The same policy, started anew for every request.
    pub(crate) fn fresh(mut self) -> Self {
        self.keys = "  start: fresh\n";
        self
    }

    /// The same policy with a deadline that a test can wait for.
    pub(crate) fn hurried(mut self) -> Self {
        self.timeout_seconds = 0.5;
        self
    }
}

/// The template with its two places filled.
pub(crate) fn fill(template: &str, fields: &str, code: &str) -> String {
    assert!(
        template.contains(";; FIELDS") && template.contains(";; CODE") && template.contains(MEMORY)
    );
    template.replace(";; FIELDS", fields).replace(";; CODE", code)
}

/// A data segment.
pub(crate) fn data(offset: u32, bytes: &[u8]) -> String {
    let mut text = format!("(data (i32.const {offset}) \"");
    for byte in bytes {
        write!(text, "\\{byte:02x}").unwrap();
    }
    text + "\")"
}
