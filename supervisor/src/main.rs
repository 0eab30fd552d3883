//! The `conclave` program. See the library for what it does.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    conclave_supervisor::main()
}
