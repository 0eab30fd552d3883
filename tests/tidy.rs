//! What the source may not become. These are rules for us; the lists in them are to be
//! changed with a reason, and only then.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;

/// The only files that may say `unsafe`.
const UNSAFE_FILES: [&str; 16] = [
    "supervisor/src/allocator.rs",
    "supervisor/src/spawn.rs",
    // The lying worker takes its descriptors as the real one does, and breaks itself.
    "tests/programs/liar.rs",
    "tests/programs/liar/deeds.rs",
    // The red team is not held to what is safe.
    "tests/programs/probe/kernel.rs",
    "worker/src/allocator.rs",
    "worker/src/confine/descriptors.rs",
    "worker/src/confine/memory.rs",
    "worker/src/confine/privileges.rs",
    "worker/src/confine/speculation.rs",
    "worker/src/confine/violation.rs",
    "worker/src/confine/zygote.rs",
    "worker/src/end.rs",
    "worker/src/policy/arena.rs",
    "worker/src/policy/engine.rs",
    "worker/src/policy/stack.rs",
];

/// What the daemon may not contain: it never runs a guest.
const FORBIDDEN_IN_SUPERVISOR: [&str; 6] =
    ["wasmtime", "cranelift", "wapc", "wasmparser", "wasi", "conclave-worker"];

/// What a worker may not contain: it has no network, and one thread.
const FORBIDDEN_IN_WORKER: [&str; 12] = [
    "hyper",
    "rustls",
    "reqwest",
    "tokio",
    "openssl",
    "native-tls",
    "h2",
    "mio",
    "socket2",
    "clap",
    "rayon",
    "conclave",
];

const LINES_MAX: usize = 500;

/// Files that are longer, and why they may be.
const LONG_FILES: [(&str, &str); 2] = [
    ("tests/harness/lib.rs", "everything that the suites share, found in one place"),
    ("tests/conformance.rs", "a table of requests and answers"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every Rust file of the workspace, by its path from the root.
fn sources() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for package in ["ipc", "supervisor", "worker", "tests", "fuzz"] {
        collect(&root().join(package), &mut found);
    }
    assert!(found.len() > 40, "only {} files were found", found.len());
    found
}

fn collect(directory: &Path, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        // Workspaces of their own.
        if path.ends_with("target")
            || path.ends_with("tests/policies")
            || path.ends_with("tests/baseline")
        {
            continue;
        }
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            found.insert(name, fs::read_to_string(&path).unwrap());
        }
    }
}

/// A line without its comment, and empty if it is nothing else.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

/// Whether the code of a line has that word.
fn has_word(line: &str, word: &str) -> bool {
    code(line)
        .split(|character: char| !character.is_alphanumeric() && character != '_')
        .any(|found| found == word)
}

/// What cargo knows of the workspace; nothing if cargo is not to be used here.
fn metadata() -> Option<&'static Value> {
    static METADATA: OnceLock<Option<Value>> = OnceLock::new();
    let metadata = METADATA.get_or_init(|| {
        if std::env::var_os("CONCLAVE_TESTS_PREBUILT").is_some() {
            // Not with a macro, whose output is not shown.
            drop(writeln!(
                io::stderr(),
                "SKIPPED: dependencies are looked at where cargo can be run"
            ));
            return None;
        }
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version", "1", "--locked", "--offline"])
            // Without this the packages of all other platforms are wanted as well.
            .args(["--filter-platform", &format!("{}-unknown-linux-gnu", std::env::consts::ARCH)])
            .current_dir(root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(serde_json::from_slice(&output.stdout).unwrap())
    });
    metadata.as_ref()
}

fn package_id(metadata: &'static Value, name: &str) -> &'static str {
    let packages = metadata["packages"].as_array().unwrap();
    let package =
        packages.iter().find(|package| package["name"] == name && package["source"].is_null());
    package.unwrap_or_else(|| panic!("no package {name}"))["id"].as_str().unwrap()
}

/// The names of the packages that are compiled into this one, itself excepted.
fn closure(metadata: &'static Value, name: &str) -> BTreeSet<&'static str> {
    let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
    let nodes: BTreeMap<&str, &Value> =
        nodes.iter().map(|node| (node["id"].as_str().unwrap(), node)).collect();
    let packages = metadata["packages"].as_array().unwrap();
    let names: BTreeMap<&str, &'static str> = packages
        .iter()
        .map(|package| (package["id"].as_str().unwrap(), package["name"].as_str().unwrap()))
        .collect();
    let start = package_id(metadata, name);
    let (mut waiting, mut seen) = (vec![start], BTreeSet::from([start]));
    while let Some(id) = waiting.pop() {
        for dependency in nodes[id]["deps"].as_array().unwrap() {
            let kinds = dependency["dep_kinds"].as_array().unwrap();
            let id = dependency["pkg"].as_str().unwrap();
            if kinds.iter().any(|kind| kind["kind"].is_null()) && seen.insert(id) {
                waiting.push(id);
            }
        }
    }
    seen.remove(start);
    seen.into_iter().map(|id| names[id]).collect()
}

fn assert_none_of(package: &str, closure: &BTreeSet<&str>, forbidden: &[&str]) {
    let found: Vec<_> = closure
        .iter()
        .filter(|name| {
            forbidden.iter().any(|word| *name == word || name.starts_with(&format!("{word}-")))
        })
        // What all of them share.
        .filter(|name| **name != "conclave-ipc")
        .collect();
    assert!(found.is_empty(), "{package} depends on {found:?}");
}

#[test]
fn the_daemon_contains_no_engine() {
    let Some(metadata) = metadata() else { return };
    let closure = closure(metadata, "conclave");
    assert!(closure.contains("hyper"), "that is not all: {closure:?}");
    assert_none_of("conclave", &closure, &FORBIDDEN_IN_SUPERVISOR);
}

#[test]
fn a_worker_contains_no_network_and_no_threads() {
    let Some(metadata) = metadata() else { return };
    let closure = closure(metadata, "conclave-worker");
    assert!(closure.contains("wasmtime"), "that is not all: {closure:?}");
    assert_none_of("conclave-worker", &closure, &FORBIDDEN_IN_WORKER);
}

#[test]
fn the_protocol_depends_on_its_encoding_and_nothing_else() {
    let Some(metadata) = metadata() else { return };
    let packages = metadata["packages"].as_array().unwrap();
    let id = package_id(metadata, "conclave-ipc");
    let ipc = packages.iter().find(|package| package["id"] == id).unwrap();
    let direct: Vec<_> = ipc["dependencies"]
        .as_array()
        .unwrap()
        .iter()
        .map(|dependency| &dependency["name"])
        .collect();
    assert_eq!(direct, ["bincode"]);
}

#[test]
fn unsafe_code_is_in_the_named_files_only() {
    let with_unsafe: Vec<_> = sources()
        .into_iter()
        .filter(|(_, text)| text.lines().any(|line| has_word(line, "unsafe")))
        .map(|(name, _)| name)
        // This file has the word in its strings.
        .filter(|name| name != "tests/tidy.rs")
        .collect();
    assert_eq!(with_unsafe, UNSAFE_FILES);
}

#[test]
fn every_file_begins_with_what_it_is_for() {
    for (name, text) in sources() {
        assert!(text.starts_with("//! "), "{name}");
    }
}

#[test]
fn no_file_is_too_long() {
    for (name, text) in sources() {
        let lines = text.lines().count();
        let may_be_long = LONG_FILES.iter().any(|(long, _)| *long == name);
        assert!(lines <= LINES_MAX || may_be_long, "{name} has {lines} lines");
    }
    for (name, _) in LONG_FILES {
        assert!(root().join(name).exists(), "{name} is gone");
    }
}

/// Processes are started by the spawner, with `clone` and `execveat`, and by nothing else.
#[test]
fn the_daemon_starts_no_processes_by_other_means() {
    for (name, text) in sources() {
        if !name.starts_with("supervisor/src/") {
            continue;
        }
        for words in
            ["process::Command", "process::{Command", "Command::new", "posix_spawn", "fork()"]
        {
            assert!(!text.lines().any(|line| code(line).contains(words)), "{name} says {words}");
        }
    }
}

/// The variants of a public enum, read from its source.
fn variants(file: &str, name: &str) -> Vec<String> {
    let text = read(file);
    let start = text.find(&format!("pub enum {name}")).unwrap_or_else(|| panic!("no {name}"));
    let body = text[start..].split("\n}").next().unwrap();
    let mut variants = Vec::new();
    for line in body.lines().skip(1) {
        let indented = line
            .strip_prefix("    ")
            .filter(|rest| rest.starts_with(|first: char| first.is_ascii_uppercase()));
        if let Some(rest) = indented {
            variants.push(rest.chars().take_while(char::is_ascii_alphanumeric).collect());
        }
    }
    variants
}

#[test]
fn every_message_is_in_the_architecture() {
    let text = read("ARCHITECTURE.md");
    let messages =
        [variants("ipc/src/message.rs", "Request"), variants("ipc/src/message.rs", "Reply")]
            .concat();
    assert!(messages.contains(&"HostCall".to_owned()) && messages.len() >= 12, "{messages:?}");
    let missing: Vec<_> =
        messages.iter().filter(|name| !text.lines().any(|line| mentions(line, name))).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md lacks {missing:?}");
}

fn mentions(line: &str, word: &str) -> bool {
    line.split(|character: char| !character.is_alphanumeric() && character != '_')
        .any(|found| found == word)
}

/// The long options that the program itself lists.
fn options(command: &str) -> BTreeSet<String> {
    let output = harness::run(&[command, "--help"], b"");
    assert!(output.status.success());
    let help = String::from_utf8(output.stdout).unwrap();
    let options = help.lines().filter_map(|line| {
        let line = line.trim_start();
        // `-s, --settings-path <FILE>`
        let line = line
            .split_once(", ")
            .filter(|(short, _)| short.len() == 2)
            .map_or(line, |(_, long)| long);
        let name = line.strip_prefix("--")?.split([' ', '[', '=']).next()?;
        Some(format!("--{name}"))
    });
    options.collect()
}

#[test]
fn every_option_is_in_the_readme() {
    let options: BTreeSet<_> = ["serve", "run", "sandbox"].into_iter().flat_map(options).collect();
    assert!(options.contains("--policies") && options.contains("--settings-json"), "{options:?}");
    let text = read("README.md");
    let words: BTreeSet<_> =
        text.split(|character: char| !character.is_alphanumeric() && character != '-').collect();
    let missing: Vec<_> = options
        .iter()
        .filter(|option| !["--help", "--version"].contains(&option.as_str()))
        .filter(|option| !words.contains(option.as_str()))
        .collect();
    assert!(missing.is_empty(), "README.md lacks {missing:?}");
}

/// Suites that nobody runs protect nothing.
#[test]
fn every_suite_is_declared() {
    let manifest = read("tests/Cargo.toml");
    let files: Vec<PathBuf> =
        fs::read_dir(root().join("tests")).unwrap().map(|entry| entry.unwrap().path()).collect();
    for path in
        files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
    {
        let name = path.file_name().unwrap().to_str().unwrap();
        if name == "build.rs" {
            continue;
        }
        assert!(manifest.contains(&format!("path = \"{name}\"")), "{name}");
    }
}

#[test]
fn no_test_is_ignored() {
    for (name, text) in sources() {
        assert!(
            !text.lines().any(|line| code(line).trim_start().starts_with("#[ignore")),
            "{name}"
        );
    }
}
