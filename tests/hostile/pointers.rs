//! Guests that hand pointers to the host that point nowhere: every import, every pointer.
//!
//! One policy for each contract knows all attacks. The length of the request chooses one:
//! 0 is the honest answer. Every attack comes after an honest answer, and is followed by one.

use std::fmt::Write as _;
use std::thread;
use std::time::Instant;

use harness::PATIENCE;
use serde_json::Value;

use crate::guests::{Contract, Guest};
use crate::town::Town;

/// Where memory ends: two pages.
const END: i64 = 2 * 65536;

/// Zeroed memory that nothing else uses.
const SOMEWHERE: i64 = 8192;

/// An import and its parameters: `P` and `l` are a pointer and the length of what is there,
/// `p` is a pointer to something of a fixed size or to a list, a digit is that number, `I` is
/// a 64-bit 0.
struct Import {
    module: &'static str,
    name: &'static str,
    parameters: &'static str,
    returns: bool,
    /// Whether the host looks at the pointers at all.
    looks: bool,
}

const fn import(
    module: &'static str,
    name: &'static str,
    parameters: &'static str,
    looks: bool,
) -> Import {
    Import { module, name, parameters, returns: true, looks }
}

const fn silent(name: &'static str, parameters: &'static str) -> Import {
    Import { module: "wapc", name, parameters, returns: false, looks: true }
}

const WASI: &str = "wasi_snapshot_preview1";

const WAPC_IMPORTS: [Import; 6] = [
    silent("__guest_request", "pp"),
    silent("__guest_response", "Pl"),
    silent("__guest_error", "Pl"),
    import("wapc", "__host_call", "PlPlPlPl", true),
    // After a host call that failed, so that there is a text to be copied.
    silent("__host_error", "p"),
    silent("__console_log", "Pl"),
];

#[rustfmt::skip]
const WASI_IMPORTS: [Import; 36] = [
    import(WASI, "args_get", "pp", true),
    import(WASI, "args_sizes_get", "pp", true),
    import(WASI, "environ_sizes_get", "pp", true),
    import(WASI, "clock_res_get", "1p", true),
    import(WASI, "clock_time_get", "1Ip", true),
    import(WASI, "fd_fdstat_get", "0p", true),
    import(WASI, "fd_filestat_get", "0p", true),
    import(WASI, "fd_read", "0p1p", true),
    import(WASI, "fd_write", "2p1p", true),
    import(WASI, "poll_oneoff", "pp1p", true),
    import(WASI, "random_get", "Pl", true),
    import("host", "call", "PlPlPlPl", true),
    // There is no environment and there are no files: nothing to be read or written.
    import(WASI, "environ_get", "pp", false),
    import(WASI, "fd_seek", "0I0p", false),
    import(WASI, "fd_tell", "0p", false),
    import(WASI, "fd_pread", "3p1Ip", false),
    import(WASI, "fd_prestat_get", "3p", false),
    import(WASI, "fd_prestat_dir_name", "3Pl", false),
    import(WASI, "fd_pwrite", "3p1Ip", false),
    import(WASI, "fd_readdir", "3PlIp", false),
    import(WASI, "path_create_directory", "3Pl", false),
    import(WASI, "path_filestat_get", "30Plp", false),
    import(WASI, "path_filestat_set_times", "30PlII0", false),
    import(WASI, "path_link", "30Pl3Pl", false),
    import(WASI, "path_open", "30Pl0II0p", false),
    import(WASI, "path_readlink", "3PlPlp", false),
    import(WASI, "path_remove_directory", "3Pl", false),
    import(WASI, "path_rename", "3Pl3Pl", false),
    import(WASI, "path_symlink", "Pl3Pl", false),
    import(WASI, "path_unlink_file", "3Pl", false),
    import(WASI, "sock_accept", "30p", false),
    import(WASI, "sock_recv", "3p10pp", false),
    import(WASI, "sock_send", "3p10p", false),
    // The same functions once more, for descriptors that are not open.
    import(WASI, "fd_read", "9p1p", false),
    import(WASI, "fd_write", "9p1p", false),
    import(WASI, "fd_fdstat_get", "9p", false),
];

/// One way to call an import.
struct Attack {
    label: String,
    code: String,
    /// Whether it ends the guest; otherwise it is answered with an error number.
    ends: bool,
}

fn call(import: &Import, number: usize, arguments: &[i64]) -> String {
    let mut code = format!("(call $import{number}");
    for (parameter, argument) in import.parameters.chars().zip(arguments) {
        let kind = if parameter == 'I' { "i64" } else { "i32" };
        write!(code, " ({kind}.const {argument})").unwrap();
    }
    code.push(')');
    if import.returns { format!("(drop {code})") } else { code }
}

/// Every pointer and length of the import gone wrong, one at a time.
fn attacks_on(number: usize, import: &Import) -> Vec<Attack> {
    let harmless: Vec<i64> = import
        .parameters
        .chars()
        .map(|parameter| match parameter {
            'P' | 'p' => SOMEWHERE,
            'l' => 1,
            'I' => 0,
            digit => i64::from(digit.to_digit(10).unwrap()),
        })
        .collect();
    let mut attacks = Vec::new();
    for (index, parameter) in import.parameters.chars().enumerate() {
        let wrong: &[&[i64]] = match parameter {
            'P' => &[
                &[-1],
                &[END],
                &[END - 1, 2],
                &[SOMEWHERE, -1],
                &[-1, -1],
                &[-1, 0],
                &[i64::from(i32::MIN), 1],
            ],
            'p' => &[&[-1], &[END], &[END - 1], &[i64::from(i32::MIN)]],
            _ => &[],
        };
        for values in wrong {
            let mut arguments = harmless.clone();
            arguments[index..index + values.len()].copy_from_slice(values);
            attacks.push(Attack {
                label: format!("{}.{} with {arguments:?}", import.module, import.name),
                code: call(import, number, &arguments),
                ends: import.looks,
            });
        }
    }
    attacks
}

/// Lists of buffers, and what is in them.
fn vector_attacks() -> Vec<Attack> {
    let mut attacks = Vec::new();
    for (function, descriptor) in [("fd_read", 0), ("fd_write", 2)] {
        let number = WASI_IMPORTS.iter().position(|import| import.name == function).unwrap();
        let mut attack = |label: &str, setup: &str, list: i64, count: i64, ends: bool| {
            let arguments = [descriptor, list, count, SOMEWHERE];
            attacks.push(Attack {
                label: format!("{function}: {label}"),
                code: setup.to_owned() + &call(&WASI_IMPORTS[number], number, &arguments),
                ends,
            });
        };
        for (pointer, length) in [(-1, 1), (END, 1), (0, -1), (-1, -1), (END - 1, 2)] {
            let setup = format!(
                "(i32.store (i32.const 16384) (i32.const {pointer})) (i32.store (i32.const 16388) (i32.const {length}))"
            );
            attack(&format!("a buffer of {length} at {pointer}"), &setup, 16384, 1, true);
        }
        attack("a list that goes beyond the end", "", END - 16, 3, true);
        attack("a list that is as long as it may be, beyond the end", "", END - 8, 1024, true);
        attack("a list that is too long", "", SOMEWHERE, 1025, false);
        attack("a list without end", "", SOMEWHERE, -1, false);
    }
    let number = WASI_IMPORTS.iter().position(|import| import.name == "poll_oneoff").unwrap();
    for (input, output, count, ends) in [
        (END - 48, SOMEWHERE, 2, true),
        (SOMEWHERE, END - 32, 2, true),
        (SOMEWHERE, SOMEWHERE, 0, false),
        (SOMEWHERE, SOMEWHERE, 1025, false),
        (SOMEWHERE, SOMEWHERE, -1, false),
    ] {
        attacks.push(Attack {
            label: format!("poll_oneoff with {count} subscriptions at {input}, events at {output}"),
            code: call(&WASI_IMPORTS[number], number, &[input, output, count, 32768]),
            ends,
        });
    }
    attacks
}

/// The module that knows the attacks; `own` are the imports that it needs itself.
fn module(imports: &[Import], attacks: &[Attack], own: &str, entry: &str) -> String {
    let mut text = format!("(module {own}\n");
    for (number, Import { module, name, parameters, returns, .. }) in imports.iter().enumerate() {
        let types: Vec<_> = parameters
            .chars()
            .map(|parameter| if parameter == 'I' { "i64" } else { "i32" })
            .collect();
        let result = if *returns { "(result i32)" } else { "" };
        let types = types.join(" ");
        writeln!(
            text,
            r#"(import "{module}" "{name}" (func $import{number} (param {types}) {result}))"#
        )
        .unwrap();
    }
    text += r#"(memory (export "memory") 2)
        (data (i32.const 16) "{\"valid\":true}")
        (data (i32.const 32) "{\"accepted\":true}")
        (data (i32.const 64) "kubewarden")
        (data (i32.const 80) "tracing")
        (data (i32.const 96) "log")
        (func $attack (param $number i32)
    "#;
    for (number, Attack { code, .. }) in (1..).zip(attacks) {
        writeln!(
            text,
            "(if (i32.eq (local.get $number) (i32.const {number})) (then {code} (return)))"
        )
        .unwrap();
    }
    text + ")" + entry + ")"
}

/// Length of what the guest gets around a request.
fn surroundings() -> usize {
    r#"{"request":"","settings":{}}"#.len()
}

fn wapc_guest(attacks: &[Attack]) -> Guest {
    let entry = format!(
        r#"(func (export "__guest_call") (param $operation i32) (param $payload i32) (result i32)
            (if (i32.eq (local.get $operation) (i32.const 17))
                (then (call $import1 (i32.const 16) (i32.const 14)) (return (i32.const 1))))
            ;; Fails, for there is no such binding: now there is an error to be fetched.
            (drop (call $import3 (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 1)
                (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 0)))
            (call $attack (i32.sub (local.get $payload) (i32.const {})))
            (call $import1 (i32.const 32) (i32.const 17))
            (i32.const 1))"#,
        surroundings()
    );
    let own = r#"(import "wapc" "__host_response" (func $host_response (param i32)))"#;
    Guest::of_text("points", Contract::Wapc, &module(&WAPC_IMPORTS, attacks, own, &entry))
}

fn wasi_guest(attacks: &[Attack]) -> Guest {
    let own = r#"
        (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))"#;
    let entry = format!(
        r#"(func $print (param $pointer i32) (param $length i32)
            (i32.store (i32.const 0) (local.get $pointer))
            (i32.store (i32.const 4) (local.get $length))
            (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
        (func (export "_start")
            (drop (call $args_sizes_get (i32.const 0) (i32.const 4)))
            (if (i32.eq (i32.load (i32.const 4)) (i32.const 30))
                (then (call $print (i32.const 16) (i32.const 14)) (return)))
            (i32.store (i32.const 0) (i32.const 65536))
            (i32.store (i32.const 4) (i32.const 4096))
            (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
            (call $attack (i32.sub (i32.load (i32.const 8)) (i32.const {})))
            (call $print (i32.const 32) (i32.const 17)))"#,
        surroundings()
    );
    Guest::of_text("points", Contract::Wasi, &module(&WASI_IMPORTS, attacks, own, &entry))
}

fn ask(town: &Town, number: usize) -> Value {
    let body = serde_json::json!({ "request": "x".repeat(number) }).to_string();
    town.daemon.post("/validate_raw/points", body).response()
}

fn defends(guest: Guest, attacks: &[Attack]) {
    let contract = guest.contract;
    // With a single worker, an honest answer is certainly given by the one that is attacked
    // next; the pool replaces a worker at once if it had worked.
    let mut town = Town::founded(&[guest], &["--workers", "1"]);
    town.daemon.wait_until_ready();
    for (number, Attack { label, ends, .. }) in (1..).zip(attacks) {
        assert_eq!(ask(&town, 0)["allowed"], true, "before {label}");
        let answer = ask(&town, number);
        assert_eq!(answer["allowed"], !ends, "{label}: {answer}");
        if *ends {
            assert_eq!(answer["status"]["code"], 500, "{label}: {answer}");
            let message = answer["status"]["message"].as_str().unwrap();
            let expected = format!("{}out-of-range pointer: ", contract.fault_prefix());
            assert!(message.starts_with(&expected), "{label}: {message}");
        }
    }
    town.neighbour_answers();
    let expected = attacks.iter().filter(|attack| attack.ends).count();
    let start = Instant::now();
    loop {
        let lines = town.daemon.log_lines();
        let ended: Vec<_> =
            lines.iter().filter(|line| line["message"] == "worker is ended").collect();
        for line in &ended {
            assert!(
                line["error"].as_str().unwrap().starts_with("trap: out-of-range pointer: "),
                "{line}"
            );
        }
        if ended.len() == expected {
            break;
        }
        assert!(
            start.elapsed() < PATIENCE && ended.len() < expected,
            "{} instead of {expected}",
            ended.len()
        );
        thread::yield_now();
    }
}

#[test]
fn a_wapc_guest_that_points_outside_its_memory_is_ended() {
    let mut attacks: Vec<_> = WAPC_IMPORTS
        .iter()
        .enumerate()
        .flat_map(|(number, import)| attacks_on(number, import))
        .collect();
    let log = "(drop (call $import3 (i32.const 64) (i32.const 10) (i32.const 80) (i32.const 7)
        (i32.const 96) (i32.const 3) (i32.const 0) (i32.const 0)))";
    // The only response that there is to copy is empty: it fits at the very end, not beyond.
    for (pointer, ends) in [(END, false), (END + 1, true), (-1, true)] {
        attacks.push(Attack {
            label: format!("__host_response to {pointer}"),
            code: format!("{log} (call $host_response (i32.const {pointer}))"),
            ends,
        });
    }
    assert!(attacks.len() > 50, "{}", attacks.len());
    defends(wapc_guest(&attacks), &attacks);
}

#[test]
fn a_wasi_guest_that_points_outside_its_memory_is_ended() {
    let mut attacks: Vec<_> = WASI_IMPORTS
        .iter()
        .enumerate()
        .flat_map(|(number, import)| attacks_on(number, import))
        .collect();
    attacks.extend(vector_attacks());
    assert!(attacks.len() > 150, "{}", attacks.len());
    defends(wasi_guest(&attacks), &attacks);
}

#[test]
fn a_guest_whose_words_are_not_text_is_ended() {
    let bytes = r#"(data (i32.const 2048) "\ff\fe")"#;
    // Binding, namespace and operation, one of them not UTF-8.
    let calls = [[2048, 64, 64], [64, 2048, 64], [64, 64, 2048]].map(|[binding, namespace, operation]| {
        format!(
            "(drop (call $host_call (i32.const {binding}) (i32.const 2) (i32.const {namespace}) (i32.const 2)
                (i32.const {operation}) (i32.const 2) (i32.const 0) (i32.const 0)))"
        )
    });
    for contract in [Contract::Wapc, Contract::Wasi] {
        let guests: Vec<_> = (0..)
            .zip(&calls)
            .map(|(number, call)| {
                Guest::template(contract, &format!("garbles-{number}"), bytes, call)
            })
            .collect();
        let town = Town::new(&guests);
        for Guest { name, .. } in &guests {
            let text = "text at 0x800 is not UTF-8: invalid utf-8 sequence of 1 bytes from index 0";
            town.both_end_a_worker(
                name,
                &format!("{}{text}", contract.fault_prefix()),
                &format!("trap: {text}"),
            );
        }
    }
}
