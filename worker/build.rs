//! Compiles `seccomp.json` to one BPF program per filter, so that a mistake in it stops
//! the build and a worker spends no time on it.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, error, fs};

use seccompiler::{BpfProgram, TargetArch, compile_from_json};

const FILTERS: &str = "seccomp.json";

fn main() -> Result<(), Box<dyn error::Error>> {
    println!("cargo::rerun-if-changed={FILTERS}");
    println!("cargo::rerun-if-changed=build.rs");
    let target = TargetArch::try_from(env::var("CARGO_CFG_TARGET_ARCH")?.as_str())?;
    // Every supported processor, so that a call which one of them lacks is found anywhere.
    for arch in [TargetArch::x86_64, TargetArch::aarch64] {
        compile_from_json(fs::File::open(FILTERS)?, arch)?;
    }
    let filters = compile_from_json(fs::File::open(FILTERS)?, target)?;

    let mut source = String::new();
    for name in ["compile", "load", "zygote", "serve"] {
        let program =
            filters.get(name).ok_or_else(|| format!("{FILTERS} lacks filter {name:?}"))?;
        write_program(&mut source, name, program)?;
    }
    fs::write(Path::new(&env::var("OUT_DIR")?).join("filters.rs"), source)?;
    Ok(())
}

/// Writes the program as a Rust constant: instructions as `(code, jt, jf, k)`.
fn write_program(source: &mut String, name: &str, program: &BpfProgram) -> std::fmt::Result {
    writeln!(source, "pub(super) const {}: &[(u16, u8, u8, u32)] = &[", name.to_uppercase())?;
    for op in program {
        writeln!(source, "    ({}, {}, {}, {}),", op.code, op.jt, op.jf, op.k)?;
    }
    writeln!(source, "];")
}
