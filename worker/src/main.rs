//! The `conclave-worker` program. See the library for what it does.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(conclave_worker::main().code())
}
