//! Files that are no policies, and policies that can't be had.

use std::fmt::Write as _;
use std::fs::File;

use harness::{Daemon, Place, metadata_section, request, status_field};

use crate::guests::{Contract, Guest};
use crate::town::{Town, rejection};

/// The sentence about a file of another kind.
const NOT_WASM: &str =
    "bootstrap failure: bad module: not a WebAssembly module: it does not start with \\0asm";

const BAD_MODULE: &str = "bootstrap failure: bad module: ";

fn assembled(text: &str) -> Vec<u8> {
    wat::parse_str(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// The good policy's module.
fn good_module() -> Vec<u8> {
    std::fs::read(harness::policies().join("pod-guard.wasm")).unwrap()
}

fn each_does_not_serve(cases: Vec<(Guest, &str)>) {
    let (guests, reasons): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
    let town = Town::new(&guests);
    for (Guest { name, .. }, reason) in guests.iter().zip(reasons) {
        town.does_not_serve(name, reason);
    }
}

#[test]
fn a_file_that_is_no_module_is_refused() {
    let file =
        |name: &str, content: &[u8]| Guest::of_file(name, Contract::Wapc, content.to_owned());
    let good = good_module();
    let component = assembled("(component)");
    let mut future = assembled("(module)");
    future[4] = 2;
    each_does_not_serve(vec![
        (file("empty", b""), NOT_WASM),
        (file("text", b"This is not a policy.\n"), NOT_WASM),
        (file("webassembly-text", b"(module (func (export \"__guest_call\")))"), NOT_WASM),
        (file("elf", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0\x01\0\0\0"), NOT_WASM),
        (file("magic-alone", b"\0asm"), BAD_MODULE),
        (file("half", &good[..good.len() / 2]), BAD_MODULE),
        (file("all-but-a-byte", &good[..good.len() - 1]), BAD_MODULE),
        (file("followed-by-rubbish", &[good.as_slice(), b"\xff\xff\xff\xff"].concat()), BAD_MODULE),
        (file("of-version-2", &future), BAD_MODULE),
        (file("component", &component), BAD_MODULE),
        (file("rubbish", &[b"\0asm\x01\0\0\0".as_slice(), &[0xa5; 4096]].concat()), BAD_MODULE),
    ]);
}

/// What the cache and the engine would take for their own.
#[test]
fn native_code_that_is_given_as_a_module_is_refused() {
    let place = Place::new();
    let good = place.copy_policy("pod-guard.wasm");
    let text = format!("neighbour:\n  module: file://{}\n", good.display());
    let daemon = Daemon::start_ready(place, &text, &[]);
    let mut cached: Vec<_> = std::fs::read_dir(daemon.place.path("cache"))
        .unwrap()
        .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
        .collect();
    let entry = cached.pop().expect("compiled code is kept");
    let elf = entry
        .windows(4)
        .position(|window| window == b"\x7fELF")
        .expect("an entry holds native code");
    each_does_not_serve(vec![
        (Guest::of_file("entry-of-the-cache", Contract::Wapc, entry.clone()), NOT_WASM),
        (Guest::of_file("native-code", Contract::Wapc, entry[elf..].to_owned()), NOT_WASM),
    ]);
}

/// A waPC policy that would answer, with one import.
fn importing(name: &str, import: &str) -> Guest {
    let entry = r#"(func (export "__guest_call") (param i32 i32) (result i32) (i32.const 1))"#;
    Guest::of_text(name, Contract::Wapc, &format!("(module {import} {entry})"))
}

#[test]
fn a_module_with_wrong_imports_is_refused() {
    let link = "bootstrap failure: link: ";
    let of_wasi = Guest::of_text(
        "wapc-import-in-wasi",
        Contract::Wasi,
        r#"(module
            (import "wapc" "__console_log" (func (param i32 i32)))
            (func (export "_start")))"#,
    );
    each_does_not_serve(vec![
        (
            importing("unknown-import", r#"(import "env" "open" (func))"#),
            "unknown import: `env::open`",
        ),
        (importing("unknown-wapc-import", r#"(import "wapc" "__open" (func))"#), link),
        (
            importing("another-type", r#"(import "wapc" "__console_log" (func (param i64)))"#),
            "incompatible import type for `wapc::__console_log`",
        ),
        (importing("imported-memory", r#"(import "env" "memory" (memory 1))"#), link),
        (importing("imported-table", r#"(import "env" "table" (table 1 funcref))"#), link),
        (importing("host-call-of-the-other-contract", r#"(import "host" "call" (func))"#), link),
        (importing("preview-2", r#"(import "wasi:cli/environment@0.2.0" "get" (func))"#), link),
        (of_wasi, "unknown import: `wapc::__console_log`"),
    ]);
}

#[test]
fn a_module_with_wrong_exports_is_refused() {
    let wapc = |name: &str, text: &str| Guest::of_text(name, Contract::Wapc, text);
    let wasi = |name: &str, text: &str| Guest::of_text(name, Contract::Wasi, text);
    let link = "link: the module does not export the function";
    let settings = "settings are invalid: ";
    let global = r#"(module (global (export "__guest_call") i32 (i32.const 0)))"#;
    let answering = |memory: &str| {
        format!(
            r#"(module
                (import "wapc" "__guest_response" (func $response (param i32 i32)))
                {memory}
                (func (export "__guest_call") (param i32 i32) (result i32)
                    (call $response (i32.const 0) (i32.const 0)) (i32.const 1)))"#
        )
    };
    let elsewhere = answering(r#"(memory (export "mem") 1)"#);
    let no_memory = "the module does not export a memory";
    each_does_not_serve(vec![
        (wapc("no-entry", "(module)"), "does not export the function __guest_call"),
        (wapc("entry-that-is-no-function", global), link),
        (wapc("entry-of-another-type", r#"(module (func (export "__guest_call")))"#), settings),
        (wasi("wasi-no-entry", "(module)"), "does not export the function _start"),
        (
            wasi("wasi-entry-of-another-type", r#"(module (func (export "_start") (param i32)))"#),
            settings,
        ),
        (wapc("no-memory", &answering("")), no_memory),
        (wapc("memory-under-another-name", &elsewhere), no_memory),
    ]);
}

#[test]
fn features_of_webassembly_that_policies_have_no_use_for_are_refused() {
    let wapc = |name: &str, fields: &str| (Guest::wapc_with(name, fields, ""), BAD_MODULE);
    let memory64 = Guest::of_text(
        "memory64",
        Contract::Wasi,
        r#"(module (memory (export "memory") i64 1) (func (export "_start")))"#,
    );
    let shared = Guest::of_text(
        "threads",
        Contract::Wasi,
        r#"(module (memory (export "memory") 1 1 shared) (func (export "_start")))"#,
    );
    each_does_not_serve(vec![
        (memory64, BAD_MODULE),
        (shared, BAD_MODULE),
        (
            Guest::wapc_with("host-references", "(table 1 externref)", ""),
            "references to host objects are not available",
        ),
        wapc("several-memories", "(memory $other 1)"),
        wapc("exceptions", "(tag $thrown) (func (throw $thrown))"),
        wapc(
            "garbage-collection",
            "(type $pair (struct (field i32))) (func (drop (struct.new $pair (i32.const 1))))",
        ),
        wapc(
            "relaxed-simd",
            "(func (param v128) (result v128) (i32x4.relaxed_trunc_f32x4_s (local.get 0)))",
        ),
    ]);
}

#[test]
fn a_module_with_bad_metadata_is_refused() {
    let policy = assembled(
        r#"(module (func (export "__guest_call") (param i32 i32) (result i32) (i32.const 1)))"#,
    );
    let with = |name: &str, json: &str| {
        let module = [policy.as_slice(), &metadata_section(json)].concat();
        Guest::of_file(name, Contract::Wapc, module)
    };
    let deep = format!(
        r#"{{"rules":[],"mutating":false,"x":{}{}}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    let malformed = "bootstrap failure: metadata of the policy is malformed: ";
    each_does_not_serve(vec![
        (
            Guest::of_file("none", Contract::Wapc, policy.clone()),
            "Policy is missing protocol version",
        ),
        (with("no-json", "yes"), malformed),
        (with("empty", ""), malformed),
        (with("wrong-shape", r#"{"rules":"all","mutating":false}"#), malformed),
        (with("deeply-nested", &deep), "Policy is missing protocol version"),
        (
            with("cel", r#"{"rules":[],"mutating":false,"executionMode":"ferricel"}"#),
            "unsupported execution mode",
        ),
        (with("two-mebibytes", &" ".repeat(2 << 20)), "metadata section larger than 1048576 bytes"),
        (
            with("version-2", r#"{"rules":[],"mutating":false,"protocolVersion":"v2"}"#),
            "Policy uses protocol version \"v2\" but only V1 is supported",
        ),
    ]);
}

#[test]
fn a_policy_that_does_not_find_its_settings_valid_does_not_serve() {
    let wapc = |name: &str, fields: &str, code: &str| {
        let text = format!(
            r#"(module
                (import "wapc" "__guest_response" (func $guest_response (param i32 i32)))
                (import "wapc" "__guest_error" (func $guest_error (param i32 i32)))
                (memory (export "memory") 2)
                {fields}
                (func (export "__guest_call") (param i32 i32) (result i32) {code}))"#
        );
        Guest::of_text(name, Contract::Wapc, &text)
    };
    let words = r#"(data (i32.const 16) "out of cheese") (data (i32.const 64) "{\"valid\":false,\"message\":\"too small\"}")"#;
    let callback = "Policy settings are invalid: Error invoking settings validation callback: ";
    let exits = |name: &str, code: u8| {
        let text = format!(
            r#"(module
                (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
                (memory (export "memory") 1)
                (func (export "_start") (call $proc_exit (i32.const {code}))))"#
        );
        Guest::of_text(name, Contract::Wasi, &text)
    };
    let error = format!("{callback}out of cheese");
    let trap = format!("{callback}wasm trap: wasm `unreachable` instruction executed");
    let start = format!("{callback}_start failed: exited with code 3");
    let start_exit = Guest::of_text(
        "initialiser-exits",
        Contract::Wapc,
        r#"(module
            (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
            (memory (export "memory") 1)
            (func (export "_start") (call $proc_exit (i32.const 3)))
            (func (export "__guest_call") (param i32 i32) (result i32) (i32.const 1)))"#,
    );
    each_does_not_serve(vec![
        (
            wapc("error", words, "(call $guest_error (i32.const 16) (i32.const 13)) (i32.const 0)"),
            &error,
        ),
        (
            wapc(
                "invalid",
                words,
                "(call $guest_response (i32.const 64) (i32.const 37)) (i32.const 1)",
            ),
            "Policy settings are invalid: too small",
        ),
        (wapc("trap", words, "(unreachable)"), &trap),
        (
            wapc(
                "not-json",
                words,
                "(call $guest_response (i32.const 16) (i32.const 13)) (i32.const 1)",
            ),
            "settings are invalid: error: ",
        ),
        (wapc("silent", words, "(i32.const 1)"), callback),
        (start_exit, &start),
        (exits("wasi-exits-with-1", 1), "Policy settings are invalid: "),
        (exits("wasi-prints-nothing", 0), "Cannot deserialize settings validation response: "),
    ]);
}

/// Modules that are valid and a burden to compile. Either they serve or they are refused;
/// meanwhile the others serve.
#[test]
fn a_huge_module_is_compiled_in_time_or_refused_while_others_serve() {
    let guests = [
        Guest::wapc_with("many-functions", &many_functions(100_000), ""),
        Guest::wapc_with("long-function", &long_function(400_000), ""),
        Guest::wapc_with("huge-br-table", &huge_br_table(50_000), ""),
        Guest::wapc_with("deep-blocks", &deep_blocks(20_000), ""),
        Guest::wapc_with(
            "many-locals",
            "(func (local LOCALS))".replace("LOCALS", &"i64 ".repeat(49_000)).as_str(),
            "",
        ),
        Guest::wapc_with("many-globals", &"(global (mut i64) (i64.const 1))".repeat(100_000), ""),
        Guest::wapc_with("many-escaping-functions", &escaping_functions(90_000), ""),
    ];
    let mut town = Town::founded(&guests, &["--compile-timeout", "10"]);
    town.daemon.wait_for("the neighbour", |daemon| {
        let readiness = daemon.get("/readiness");
        readiness.status == 200 || readiness.json()["policies"].get("neighbour").is_none()
    });
    let everything_was_tried = |town: &Town| town.daemon.log().contains("all policies were tried");
    let mut asked = 0;
    while !everything_was_tried(&town) {
        town.neighbour_answers();
        asked += 1;
        assert!(asked < 1_000_000, "the modules are never done");
    }
    for Guest { name, .. } in &guests {
        if town.serves(name) {
            town.accepts(name);
        } else {
            for answer in town.ask_twice(name) {
                let message = rejection(name, &answer);
                let known = [
                    "compilation took longer than its limit",
                    "bad module: ",
                    "bad code: ",
                    "link: ",
                ];
                assert!(
                    known
                        .iter()
                        .any(|reason| message.starts_with(&format!("bootstrap failure: {reason}"))),
                    "{name}: {message}"
                );
            }
        }
    }
}

#[test]
fn a_compilation_that_takes_too_long_is_ended() {
    let place = Place::new();
    let small = Guest::wapc("small", "");
    let small = place.write("small.wasm", small.module);
    let large = Guest::wapc_with("large", &many_functions(100_000), "");
    let large = place.write("large.wasm", large.module);
    let policies = format!(
        "small:\n  module: file://{}\nlarge:\n  module: file://{}\n",
        small.display(),
        large.display()
    );
    // The small one was compiled before and comes out of the cache.
    let alone = format!("small:\n  module: file://{}\n", small.display());
    let first = Daemon::start_ready(place, &alone, &[]);
    let cache = first.place.path("cache");
    let second = Place::new();
    harness::give_to_daemon(&cache);
    let mut daemon = Daemon::start(
        second,
        &policies,
        &["--compile-timeout", "0.2", "--cache-dir", cache.to_str().unwrap()],
    );
    daemon.wait_until_tried();
    let answer = daemon.post("/validate/large", request("pod-ok.json")).response();
    assert_eq!(
        rejection("large", &answer),
        "bootstrap failure: compilation took longer than its limit"
    );
    let answer = daemon.post("/validate/small", request("pod-ok.json")).response();
    assert_eq!(answer["allowed"], true, "{answer}");
}

#[test]
fn a_file_that_is_too_large_is_refused_without_being_kept_in_memory() {
    let place = Place::new();
    let good = place.copy_policy("pod-guard.wasm");
    let mut policies = format!("neighbour:\n  module: file://{}\n", good.display());
    for (name, bytes) in [("a-byte-too-large", (128 << 20) + 1), ("a-tebibyte", 1_u64 << 40)] {
        let path = place.write(&format!("{name}.wasm"), "\0asm\x01\0\0\0");
        // Sparse: it takes no room on the disk.
        File::options().write(true).open(&path).unwrap().set_len(bytes).unwrap();
        writeln!(policies, "{name}:\n  module: file://{}", path.display()).unwrap();
    }
    let mut daemon = Daemon::start(place, &policies, &[]);
    daemon.wait_until_tried();
    for name in ["a-byte-too-large", "a-tebibyte"] {
        let answer = daemon.post(&format!("/validate/{name}"), request("pod-ok.json")).response();
        assert!(
            rejection(name, &answer).contains("larger than the limit of 134217728 bytes"),
            "{answer}"
        );
    }
    let answer = daemon.post("/validate/neighbour", request("pod-ok.json")).response();
    assert_eq!(answer["allowed"], true, "{answer}");
    let kilobytes = |field: &str| -> u64 {
        status_field(daemon.pid(), field).unwrap().trim_end_matches(" kB").parse().unwrap()
    };
    // Nobody needs to read a file to see that it is too large.
    assert!(kilobytes("VmHWM") < 100 << 10, "{} KiB at its peak", kilobytes("VmHWM"));
}

fn many_functions(count: u32) -> String {
    let mut text = String::new();
    for number in 0..count {
        write!(
            text,
            "(func (param i32) (result i32) (i32.add (local.get 0) (i32.const {number})))"
        )
        .unwrap();
    }
    text
}

/// Functions in a table: each one takes a place in the engine's data of an instance.
fn escaping_functions(count: u32) -> String {
    let mut text = format!("(table {count} funcref) (elem (i32.const 0)");
    for number in 0..count {
        write!(text, " $f{number}").unwrap();
    }
    text.push(')');
    for number in 0..count {
        write!(text, "(func $f{number})").unwrap();
    }
    text
}

fn long_function(steps: u32) -> String {
    let step = "(local.set 0 (i32.xor (i32.mul (local.get 0) (i32.const 31)) (local.get 1)))";
    format!("(func (param i32 i32) (result i32) {} (local.get 0))", step.repeat(steps as usize))
}

fn huge_br_table(targets: usize) -> String {
    format!(
        "(func (param i32) (block $a (block $b (br_table {} $a (local.get 0)))))",
        "$a $b ".repeat(targets / 2)
    )
}

fn deep_blocks(depth: usize) -> String {
    format!("(func {} {})", "block ".repeat(depth), "end ".repeat(depth))
}
