//! Compiles the worker's system call filters once more, each time without one of their rules,
//! for the program that shows which rules are needed.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, error, fs};

use seccompiler::{TargetArch, compile_from_json};
use serde_json::{Value, json};

const FILTERS: &str = "../worker/seccomp.json";

fn main() -> Result<(), Box<dyn error::Error>> {
    println!("cargo::rerun-if-changed={FILTERS}");
    println!("cargo::rerun-if-changed=build.rs");
    let target = TargetArch::try_from(env::var("CARGO_CFG_TARGET_ARCH")?.as_str())?;
    let filters: Value = serde_json::from_str(&fs::read_to_string(FILTERS)?)?;

    let mut source = "type Program = &'static [(u16, u8, u8, u32)];\n".to_owned();
    source.push_str("const LEANER: &[(&str, usize, Program)] = &[\n");
    for (name, filter) in filters.as_object().ok_or("no filters")? {
        let rules = filter["filter"].as_array().ok_or("no rules")?;
        for left_out in 0..rules.len() {
            let mut leaner = filter.clone();
            let rules = leaner.get_mut("filter").and_then(Value::as_array_mut);
            rules.ok_or("no rules")?.remove(left_out);
            let text = json!({ "leaner": leaner }).to_string();
            let programs = compile_from_json(text.as_bytes(), target)?;
            writeln!(source, "    ({name:?}, {left_out}, &[")?;
            for op in programs.get("leaner").ok_or("not compiled")? {
                writeln!(source, "        ({}, {}, {}, {}),", op.code, op.jt, op.jf, op.k)?;
            }
            writeln!(source, "    ]),")?;
        }
    }
    source.push_str("];\n");
    fs::write(Path::new(&env::var("OUT_DIR")?).join("leaner.rs"), source)?;
    Ok(())
}
