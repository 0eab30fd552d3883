//! Guests that are like what OPA compiles, and are not.

use crate::guests::{Contract, Guest};
use crate::town::{DEADLINE, DEADLINE_LOGGED, Town};

const PREFIX: &str = "internal server error: ";

const TEMPLATE: &str = include_str!("rego.wat");

/// The template with some of its text replaced.
fn altered(name: &str, from: &str, to: &str) -> Guest {
    assert!(TEMPLATE.contains(from), "{from}");
    Guest::of_text(name, Contract::Opa, &TEMPLATE.replace(from, to))
}

fn template(name: &str, code: &str) -> Guest {
    Guest::template(Contract::Opa, name, "", code)
}

#[test]
fn an_evaluation_that_breaks_is_rejected_and_ends_its_worker() {
    // Beside the guest: how it ends.
    let cases = [
        (template("traps", "(unreachable)"), "trap: wasm trap: wasm `unreachable` instruction"),
        (
            template("aborts", "(call $abort (i32.const 128))"),
            r#"trap: aborted: {"policy/main":0}"#,
        ),
        (
            template("aborts-with-a-lie", "(call $abort (i32.const -1))"),
            "trap: out-of-range pointer: 1 bytes at 0xffffffff",
        ),
        (
            template("prints-a-lie", "(call $println (i32.const 131072))"),
            "trap: text without an end at 0x20000",
        ),
        (
            template("lies-about-its-result", "(global.set $result (i32.const -1))"),
            "trap: out-of-range pointer: 1 bytes at 0xffffffff",
        ),
        (
            template(
                "has-a-result-without-end",
                "(memory.fill (i32.const 70000) (i32.const 65) (i32.const 61072))
                 (global.set $result (i32.const 70000))",
            ),
            "trap: text without an end at 0x11170",
        ),
    ];
    each_ends_a_worker(&cases);
}

#[test]
fn so_is_one_that_misuses_builtins() {
    let cases = [
        (
            template(
                "calls-a-builtin-that-it-did-not-declare",
                "(drop (call $builtin0 (i32.const 2) (i32.const 0)))",
            ),
            "trap: there is no builtin with the number 2",
        ),
        (
            template(
                "calls-a-builtin-with-a-lie",
                "(drop (call $builtin1 (i32.const 1) (i32.const 0) (i32.const -9)))",
            ),
            "trap: out-of-range pointer: 1 bytes at 0xfffffff7",
        ),
        (
            template(
                "calls-a-builtin-with-what-is-no-json",
                "(drop (call $builtin1 (i32.const 1) (i32.const 0) (i32.const 17)))",
            ),
            "trap: a builtin is called with what is no JSON: ",
        ),
        (
            template(
                "has-no-room-for-a-builtins-value",
                "(global.set $malloc (i32.const -4))
                 (drop (call $builtin0 (i32.const 0) (i32.const 0)))",
            ),
            "trap: out-of-range pointer: 19 bytes at 0xfffffffc",
        ),
        (
            template(
                "does-not-take-a-builtins-value",
                "(global.set $parsed (i32.const 0))
                 (drop (call $builtin0 (i32.const 0) (i32.const 0)))",
            ),
            "trap: the module can't parse JSON",
        ),
        (
            altered(
                "calls-a-builtin-within-a-builtin",
                r#"(func (export "opa_json_dump") (param i32) (result i32) (local.get 0))"#,
                r#"(func (export "opa_json_dump") (param i32) (result i32)
                     (if (i32.eq (local.get 0) (i32.const 256))
                       (then (drop (call $builtin1 (i32.const 1) (i32.const 0) (i32.const 12)))))
                     (if (i32.eq (local.get 0) (i32.const 12))
                       (then (drop (call $builtin0 (i32.const 0) (i32.const 0)))))
                     (local.get 0))"#,
            ),
            "trap: a builtin is called out of turn",
        ),
    ];
    each_ends_a_worker(&cases);
}

/// Serves them, and has each of them break in its way.
fn each_ends_a_worker(cases: &[(Guest, &str)]) {
    let guests: Vec<_> = cases.iter().map(|(guest, _)| guest.clone()).collect();
    let town = Town::new(&guests);
    for (guest, reason) in cases {
        let (_, message) = reason.split_once(": ").unwrap();
        town.both_end_a_worker_like(&guest.name, &format!("{PREFIX}{message}"), reason);
    }
}

#[test]
fn a_policy_that_never_comes_to_an_end_is_ended_at_its_deadline() {
    let calls = "(loop $more (drop (call $builtin0 (i32.const 0) (i32.const 0))) (br $more))";
    let town = Town::new(&[
        template("spins", "(loop $for_ever (br $for_ever))").hurried(),
        template("spins-on-builtins", calls).hurried(),
        altered(
            "spins-when-it-parses",
            "(result i32) (global.get $parsed))",
            "(result i32) (if (i32.ne (local.get 1) (i32.const 2))
               (then (loop $for_ever (br $for_ever)))) (i32.const 8))",
        )
        .hurried(),
    ]);
    for policy in ["spins", "spins-on-builtins", "spins-when-it-parses"] {
        town.both_end_a_worker(policy, DEADLINE, DEADLINE_LOGGED);
    }
}

#[test]
fn the_code_that_an_evaluation_ends_with_counts() {
    let town = Town::new(&[
        template("ends-with-a-code", "(return (i32.const 7))"),
        template("ends-with-a-negative-code", "(return (i32.const -1))"),
    ]);
    town.both_are_rejected(
        "ends-with-a-code",
        &format!("{PREFIX}the evaluation ended with code 7"),
    );
    town.both_are_rejected(
        "ends-with-a-negative-code",
        &format!("{PREFIX}the evaluation ended with code -1"),
    );
}

#[test]
fn a_result_that_is_no_set_of_results_is_rejected() {
    let unreadable = Contract::Opa.unreadable_prefix();
    let answers: [(&str, &[u8]); 5] = [
        ("empty", b""),
        ("no-json", b"yes"),
        ("no-list", br#"{"result":{"response":{"uid":"","allowed":true}}}"#),
        ("not-utf-8", b"[{\"result\":{\"response\":{\"uid\":\"\xff\",\"allowed\":true}}}]"),
        ("of-another-protocol", br#"{"accepted":true}"#),
    ];
    let guests = answers.map(|(name, answer)| Guest::answering(Contract::Opa, name, answer));
    let town = Town::new(&guests);
    for (name, _) in answers {
        town.both_are_rejected(name, unreadable);
    }
}

#[test]
fn nothing_of_a_request_is_there_for_the_next_one() {
    // Accepts only while no trace of an earlier evaluation is in memory, globals or its size.
    let code = "
        (if (i32.or (i32.ne (memory.size) (i32.const 2)) (i32.load (i32.const 120000)))
          (then (unreachable)))
        (if (i32.ne (global.get $result) (i32.const 256)) (then (unreachable)))
        (i32.store (i32.const 120000) (i32.const 1))
        (i32.store (i32.mul (memory.grow (i32.const 1)) (i32.const 65536)) (i32.const 1))
        (memory.copy (i32.const 121000) (i32.const 256) (i32.const 100))
        (global.set $result (i32.const 121000))";
    let table = "(table $t 2 funcref) (func $changes (table.set $t (i32.const 0) (ref.null func)))";
    let town = Town::new(&[
        template("set-back", code),
        template("set-back-in-each-worker", code).fresh(),
        Guest::template(Contract::Opa, "made-anew", table, code),
    ]);
    for policy in ["set-back", "set-back-in-each-worker", "made-anew"] {
        town.accepts(policy);
        town.accepts(policy);
    }
}

#[test]
fn a_module_that_is_not_like_opas_does_not_serve_for_a_reason_that_is_said() {
    let version = r#"(global (export "opa_wasm_abi_version") i32 (i32.const 1))"#;
    let minor = r#""opa_wasm_abi_minor_version") i32 (i32.const 3)"#;
    let cases = [
        (altered("has-no-version", version, ""), "does not export opa_wasm_abi_version"),
        (
            altered("is-of-version-2", version, &version.replace("const 1", "const 2")),
            "the module is for version 2.3 of OPA's ABI; 1.0 to 1.3 are known",
        ),
        (
            altered("is-of-version-1-4", minor, &minor.replace("const 3", "const 4")),
            "the module is for version 1.4 of OPA's ABI; 1.0 to 1.3 are known",
        ),
        (
            altered("has-no-malloc", r#"(func (export "opa_malloc")"#, "(func"),
            "the module is not like OPA's: opa_malloc",
        ),
        (
            altered(
                "has-another-heap",
                r#"(func (export "opa_heap_ptr_set") (param i32))"#,
                r#"(func (export "opa_heap_ptr_set"))"#,
            ),
            "the module is not like OPA's: opa_heap_ptr_set",
        ),
        (
            altered("has-no-eval", r#"(func (export "eval")"#, "(func"),
            "the module does not export the function eval",
        ),
    ];
    none_serves(&cases);
}

#[test]
fn nor_does_one_that_can_not_be_made_ready() {
    let cases = [
        (
            altered("has-no-entrypoints", r#""{\"policy/main\":0}\00""#, r#""{}\00""#),
            "the module has no entrypoint with the number 0; there are: ",
        ),
        (
            altered("has-other-entrypoints", r#"main\":0}"#, r#"main\":5}"#),
            "the module has no entrypoint with the number 0; there are: policy/main",
        ),
        (
            altered("has-a-list-of-entrypoints", r#""{\"policy/main\":0}\00""#, r#""[1]\00""#),
            "builtins or entrypoints are not names with numbers: ",
        ),
        (
            altered("needs-the-network", r#"\"trace\":1"#, r#"\"http.send\":1,\"x\":2"#),
            "the module needs builtins that are not available: http.send, x",
        ),
        (
            altered(
                "aborts-at-once",
                r#"(result i32) (i32.const 16))"#,
                "(result i32) (call $abort (i32.const 128)) (i32.const 16))",
            ),
            r#"aborted: {"policy/main":0}"#,
        ),
        (
            altered(
                "calls-a-builtin-at-once",
                r#"(result i32) (i32.const 16))"#,
                "(result i32) (call $builtin0 (i32.const 0) (i32.const 0)))",
            ),
            "a builtin is called out of turn",
        ),
        (
            altered(
                "spins-at-once",
                r#"(result i32) (i32.const 16))"#,
                "(result i32) (loop $for_ever (br $for_ever)) (unreachable))",
            )
            .hurried(),
            "worker missed its deadline",
        ),
        (
            altered(
                "has-another-memory",
                r#"(memory (export "memory") 2)"#,
                r#"(memory 2) (global (export "memory") i32 (i32.const 1))"#,
            ),
            "the module exports no memory",
        ),
    ];
    none_serves(&cases);
}

/// Each of them is said why.
fn none_serves(cases: &[(Guest, &str)]) {
    let guests: Vec<_> = cases.iter().map(|(guest, _)| guest.clone()).collect();
    let town = Town::new(&guests);
    for (guest, reason) in cases {
        town.does_not_serve(&guest.name, reason);
    }
}
