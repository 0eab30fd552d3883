//! Guests whose answer is none.

use crate::guests::{Contract, Guest};
use crate::town::{Town, rejection};

const CONTRACTS: [(Contract, &str); 2] = [(Contract::Wapc, "wapc"), (Contract::Wasi, "wasi")];

/// The longest message about a fault, as limits.rs has it.
const MESSAGE_BYTES_MAX: usize = conclave_ipc::limits::MESSAGE_BYTES_MAX;

#[test]
fn an_answer_that_is_not_a_verdict_is_a_rejection() {
    let nested = format!(
        "{{\"accepted\":true,\"mutated_object\":{}{}}}",
        "[".repeat(1 << 20),
        "]".repeat(1 << 20)
    );
    let answers: &[(&str, &[u8])] = &[
        ("text", b"certainly"),
        ("html", b"<html>accepted</html>"),
        ("half", br#"{"accepted":tr"#),
        ("wrong-shape", br#"{"allowed":true}"#),
        ("array", b"[true]"),
        ("bare-true", b"true"),
        ("true-as-text", br#"{"accepted":"true"}"#),
        ("one", br#"{"accepted":1}"#),
        ("null", br#"{"accepted":null}"#),
        ("twice", br#"{"accepted":false,"accepted":true}"#),
        ("two-documents", br#"{"accepted":true}{"accepted":true}"#),
        ("trailing-nulls", b"{\"accepted\":true}\0\0\0"),
        ("not-utf-8", b"{\"accepted\":true,\"message\":\"\xff\xfe\"}"),
        ("byte-order-mark", b"\xef\xbb\xbf{\"accepted\":true}"),
        ("half-a-surrogate", br#"{"accepted":true,"message":"\ud800"}"#),
        ("huge-code", br#"{"accepted":true,"code":100000}"#),
        ("endless-number", br#"{"accepted":true,"mutated_object":1e999999}"#),
        ("duplicate-key", br#"{"accepted":true,"mutated_object":{"a":1,"a":2}}"#),
        ("deeply-nested", nested.as_bytes()),
        ("empty", b""),
        ("blank", b" \n\t "),
    ];
    // One contract a town: each policy has processes of its own.
    for (contract, prefix) in CONTRACTS {
        let guests: Vec<_> = answers
            .iter()
            .map(|(name, answer)| Guest::answering(contract, &format!("{prefix}-{name}"), answer))
            .collect();
        let town = Town::new(&guests);
        for guest in &guests {
            town.both_are_rejected(&guest.name, contract.unreadable_prefix());
        }
    }
}

#[test]
fn what_an_answer_says_beside_the_verdict_is_ignored_however_deep() {
    let deep =
        format!("{{\"accepted\":true,\"x\":{}{}}}", "[".repeat(1 << 20), "]".repeat(1 << 20));
    let town = Town::new(&[Guest::answering(Contract::Wapc, "deep", deep.as_bytes())]);
    town.accepts("deep");
}

#[test]
fn a_guest_that_claims_success_without_an_answer_is_rejected() {
    let failure = "internal server error: Guest call failure: ";
    let error = r#"(data (i32.const 2048) "out of cheese") "#;
    let town = Town::new(&[
        Guest::wapc("sets-nothing", "(return (i32.const 1))"),
        Guest::wapc_with(
            "sets-an-error",
            error,
            "(call $guest_error (i32.const 2048) (i32.const 13)) (return (i32.const 1))",
        ),
        Guest::wapc("fails-without-a-word", "(return (i32.const 0))"),
        Guest::wapc("fails-after-its-answer", "(drop (call $accept)) (return (i32.const 0))"),
        Guest::wasi("prints-nothing", "(return)"),
        Guest::wasi("exits-with-nothing", "(call $proc_exit (i32.const 0))"),
    ]);
    town.both_are_rejected(
        "sets-nothing",
        &format!("{failure}No error message OR response set for call success"),
    );
    town.both_are_rejected("sets-an-error", &format!("{failure}out of cheese"));
    town.both_are_rejected(
        "fails-without-a-word",
        &format!("{failure}No error message set for call failure"),
    );
    town.both_are_rejected(
        "fails-after-its-answer",
        &format!("{failure}No error message set for call failure"),
    );
    for policy in ["prints-nothing", "exits-with-nothing"] {
        town.both_are_rejected(policy, Contract::Wasi.unreadable_prefix());
    }
}

#[test]
fn an_answer_does_not_count_if_the_guest_breaks_after_it() {
    let trap = "wasm trap: wasm `unreachable` instruction executed";
    let town = Town::new(&[
        Guest::wapc("answers-and-traps", "(drop (call $accept)) (unreachable)"),
        Guest::wapc("answers-and-exits", "(drop (call $accept)) (call $proc_exit (i32.const 0))"),
        Guest::wasi("wasi-answers-and-traps", "(call $accept) (unreachable)"),
        Guest::wasi("wasi-answers-and-fails", "(call $accept) (call $proc_exit (i32.const 1))"),
    ]);
    let prefix = Contract::Wapc.fault_prefix();
    town.both_end_a_worker(
        "answers-and-traps",
        &format!("{prefix}{trap}"),
        &format!("trap: {trap}"),
    );
    town.both_end_a_worker(
        "answers-and-exits",
        &format!("{prefix}exited with code 0"),
        "trap: exited with code 0",
    );
    town.both_end_a_worker("wasi-answers-and-traps", trap, &format!("trap: {trap}"));
    town.both_are_rejected("wasi-answers-and-fails", "");
}

#[test]
fn a_wasi_guest_is_heard_if_it_exits_with_0_and_rejected_if_it_exits_otherwise() {
    let words = r#"(data (i32.const 2048) " out of cheese \n") "#;
    let exit = |code: &str| {
        format!(
            "(call $print (i32.const 2) (i32.const 2048) (i32.const 16)) (call $proc_exit (i32.const {code}))"
        )
    };
    let town = Town::new(&[
        Guest::wasi("exits-with-0", "(call $accept) (call $proc_exit (i32.const 0))"),
        Guest::wasi_with("exits-with-1", words, &exit("1")),
        Guest::wasi_with("exits-with-256", words, &exit("256")),
        Guest::wasi_with("exits-with-minus-1", words, &exit("-1")),
    ]);
    town.accepts("exits-with-0");
    for policy in ["exits-with-1", "exits-with-256", "exits-with-minus-1"] {
        for answer in town.ask_twice(policy) {
            assert_eq!(rejection(policy, &answer), "out of cheese", "{policy}");
        }
    }
}

#[test]
fn an_answer_may_have_sixteen_mebibytes_and_not_a_byte_more() {
    let padded = |bytes: u32| {
        format!(
            "(memory.fill (i32.const 65536) (i32.const 32) (i32.const {bytes}))
            (memory.copy (i32.const 65536) (i32.const 32) (i32.const 17))"
        )
    };
    let wapc = |bytes: u32| {
        let respond = format!(
            "(call $guest_response (i32.const 65536) (i32.const {bytes})) (return (i32.const 1))"
        );
        padded(bytes) + &respond
    };
    let wasi = |bytes: u32| {
        let print =
            format!("(call $print (i32.const 1) (i32.const 65536) (i32.const {bytes})) (return)");
        padded(bytes) + &print
    };
    let limit = 16 << 20;
    let town = Town::new(&[
        Guest::with_memory(Contract::Wapc, "wapc-at-the-limit", 260, &wapc(limit)),
        Guest::with_memory(Contract::Wapc, "wapc-beyond", 260, &wapc(limit + 1)),
        Guest::with_memory(Contract::Wasi, "wasi-at-the-limit", 260, &wasi(limit)),
        Guest::with_memory(Contract::Wasi, "wasi-beyond", 260, &wasi(limit + 1)),
    ]);
    town.accepts("wapc-at-the-limit");
    town.accepts("wasi-at-the-limit");
    let text = "response limit of 16777216 bytes exceeded";
    town.both_end_a_worker(
        "wapc-beyond",
        &format!("{}{text}", Contract::Wapc.fault_prefix()),
        &format!("output: {text}"),
    );
    let text = "output limit of 16777216 bytes exceeded on stdout";
    town.both_end_a_worker("wasi-beyond", text, &format!("output: {text}"));
}

#[test]
fn an_enormous_error_text_is_cut() {
    let filled = |byte: &str, say: &str| {
        format!("(memory.fill (i32.const 65536) (i32.const {byte}) (i32.const 104857600)) {say}")
    };
    let error =
        "(call $guest_error (i32.const 65536) (i32.const 104857600)) (return (i32.const 0))";
    let stderr = "(call $print (i32.const 2) (i32.const 65536) (i32.const 104857600)) (call $proc_exit (i32.const 1))";
    let town = Town::new(&[
        Guest::with_memory(Contract::Wapc, "wapc-letters", 1700, &filled("65", error)),
        Guest::with_memory(Contract::Wapc, "wapc-not-utf-8", 1700, &filled("255", error)),
        Guest::with_memory(Contract::Wasi, "wasi-letters", 1700, &filled("65", stderr)),
        Guest::with_memory(Contract::Wasi, "wasi-not-utf-8", 1700, &filled("255", stderr)),
    ]);
    for policy in ["wapc-letters", "wapc-not-utf-8", "wasi-letters", "wasi-not-utf-8"] {
        for answer in town.ask_twice(policy) {
            let message = rejection(policy, &answer);
            let said = message.trim_start_matches(Contract::Wapc.fault_prefix());
            assert!(
                said.chars().all(|character| character == 'A' || character == '\u{fffd}'),
                "{policy}"
            );
            assert!(
                (1000..=MESSAGE_BYTES_MAX).contains(&said.len()),
                "{policy}: {} bytes",
                said.len()
            );
        }
    }
}
