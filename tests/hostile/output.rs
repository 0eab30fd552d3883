//! Guests that would fill the disk with their words.

use std::thread;
use std::time::Instant;

use harness::PATIENCE;

use crate::guests::{Contract, Guest};
use crate::town::{DEADLINE, DEADLINE_LOGGED, Town, rejection};

/// What two requests may add to the log, whatever the guest does: the output that is kept,
/// escaped in the worst way, and the lines around it.
const LOG_BYTES_MAX: usize = 2 << 20;

/// How much two requests to the policy add to the log.
fn log_growth(town: &Town, policy: &str) -> usize {
    let verdicts = |town: &Town| {
        let lines = town.daemon.log_lines();
        lines.iter().filter(|line| line["policy"] == policy && line["message"] == "verdict").count()
    };
    // The good policy, which is asked all the while, writes as well.
    let written = |town: &Town| -> usize {
        let log = town.daemon.log();
        let name = format!("\"policy\":\"{policy}\"");
        log.lines().filter(|line| line.contains(&name)).map(str::len).sum()
    };
    let (before, known) = (written(town), verdicts(town));
    town.ask_twice(policy);
    let start = Instant::now();
    // The log is written by a thread of its own.
    while verdicts(town) < known + 2 {
        assert!(start.elapsed() < PATIENCE, "{policy}: no verdict in the log");
        thread::yield_now();
    }
    written(town) - before
}

fn assert_quiet(town: &Town, policy: &str) {
    let growth = log_growth(town, policy);
    assert!(growth < LOG_BYTES_MAX, "{policy}: two requests wrote {growth} bytes to the log");
}

#[test]
fn endless_output_is_cut_in_the_log_and_ends_at_the_deadline() {
    let endless = |call: &str| format!("(loop $for_ever {call} (br $for_ever))");
    let print = |stream: u8| {
        endless(&format!("(call $print (i32.const {stream}) (i32.const 1024) (i32.const 65536))"))
    };
    let letters = "(memory.fill (i32.const 1024) (i32.const 65) (i32.const 65536))";
    let town = Town::new(&[
        Guest::wapc(
            "console",
            &(letters.to_owned()
                + &endless("(call $console_log (i32.const 1024) (i32.const 65536))")),
        )
        .hurried(),
        Guest::wapc(
            "control-characters",
            &endless("(call $console_log (i32.const 1024) (i32.const 65536))"),
        )
        .hurried(),
        Guest::wapc("stdout", &(letters.to_owned() + &print(1))).hurried(),
        Guest::wapc("stderr", &(letters.to_owned() + &print(2))).hurried(),
        Guest::wasi("wasi-stderr", &(letters.to_owned() + &print(2))).hurried(),
    ]);
    for policy in ["console", "control-characters", "stdout", "stderr", "wasi-stderr"] {
        town.both_end_a_worker(policy, DEADLINE, DEADLINE_LOGGED);
    }
    let log = town.daemon.log().len();
    assert!(log < 5 * LOG_BYTES_MAX, "{log} bytes of log");
}

#[test]
fn endless_standard_output_of_a_wasi_guest_ends_the_request() {
    let code = "(loop $for_ever (call $print (i32.const 1) (i32.const 1024) (i32.const 65536)) (br $for_ever))";
    let town = Town::new(&[Guest::wasi("stdout", code)]);
    let text = "output limit of 16777216 bytes exceeded on stdout";
    town.both_end_a_worker("stdout", text, &format!("output: {text}"));
    assert_quiet(&town, "stdout");
}

#[test]
fn a_wasi_guest_may_be_noisy_on_standard_error_and_give_its_verdict() {
    let code = "(loop $more
            (call $print (i32.const 2) (i32.const 1024) (i32.const 65536))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $more (i32.lt_u (local.get $i) (i32.const 1000))))";
    let town = Town::new(&[Guest::wasi("noisy", code)]);
    town.accepts("noisy");
    assert_quiet(&town, "noisy");
}

#[test]
fn output_in_tiny_lines_does_not_swell_the_log() {
    let line = r#"(data (i32.const 2048) "x\nx\nx\nx\nx\nx\nx\nx\nx\nx\nx\nx\nx\nx\nx\nx\n")"#;
    let endless =
        "(loop $for_ever (call $console_log (i32.const 2048) (i32.const 32)) (br $for_ever))";
    // Until the guest's part of the log is used up.
    let finite = "(loop $more
            (call $console_log (i32.const 2048) (i32.const 32))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $more (i32.lt_u (local.get $i) (i32.const 5000))))";
    let town = Town::new(&[
        Guest::wapc_with("endless", line, endless).hurried(),
        Guest::wapc_with("finite", line, finite),
    ]);
    assert_quiet(&town, "endless");
    assert_quiet(&town, "finite");
    town.accepts("finite");
}

#[test]
fn empty_lines_after_the_limit_are_no_breach_of_the_protocol() {
    let code = "(memory.fill (i32.const 1024) (i32.const 65) (i32.const 65536))
        (call $console_log (i32.const 1024) (i32.const 65536))
        (loop $more
            (call $console_log (i32.const 0) (i32.const 0))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $more (i32.lt_u (local.get $i) (i32.const 5000))))";
    let town = Town::new(&[Guest::wapc("says-nothing-often", code)]);
    town.accepts("says-nothing-often");
    assert_quiet(&town, "says-nothing-often");
}

#[test]
fn denied_host_calls_with_long_names_do_not_swell_the_log() {
    let call =
        "(drop (call $host_call (i32.const 64) (i32.const 10) (i32.const 2048) (i32.const 2000)
        (i32.const 2048) (i32.const 2000) (i32.const 0) (i32.const 0)))";
    let code = format!(
        "(memory.fill (i32.const 2048) (i32.const 65) (i32.const 2000))
        (loop $more
            {call}
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $more (i32.lt_u (local.get $i) (i32.const 1000))))"
    );
    let town = Town::new(&[
        Guest::wapc("wapc-asks-in-vain", &code),
        Guest::wasi("wasi-asks-in-vain", &code),
    ]);
    for policy in ["wapc-asks-in-vain", "wasi-asks-in-vain"] {
        town.accepts(policy);
        assert_quiet(&town, policy);
    }
}

#[test]
fn log_records_of_a_policy_are_cut() {
    let record = format!(r#"{{"level":"ERROR","message":"{}"}}"#, "x".repeat(30_000));
    let fields = crate::guests::data(2048, record.as_bytes());
    let code = format!(
        "(loop $more
            (drop (call $log (i32.const 2048) (i32.const {})))
            (local.set $i (i32.add (local.get $i) (i32.const 1)))
            (br_if $more (i32.lt_u (local.get $i) (i32.const 1000))))",
        record.len()
    );
    let town = Town::new(&[
        Guest::wapc_with("wapc-logs", &fields, &code),
        Guest::wasi_with("wasi-logs", &fields, &code),
    ]);
    for policy in ["wapc-logs", "wasi-logs"] {
        town.accepts(policy);
        assert_quiet(&town, policy);
    }
}

#[test]
fn tiny_log_records_do_not_swell_the_log() {
    let records = |bytes: u32| {
        format!(
            "(loop $more
                (drop (call $log (i32.const 16) (i32.const {bytes})))
                (local.set $i (i32.add (local.get $i) (i32.const 1)))
                (br_if $more (i32.lt_u (local.get $i) (i32.const 200000))))"
        )
    };
    let town = Town::new(&[
        Guest::wapc("wapc-empty-records", &records(0)),
        Guest::wasi("wasi-empty-records", &records(0)),
        Guest::wapc("wapc-tiny-records", &records(1)),
    ]);
    for policy in ["wapc-empty-records", "wasi-empty-records", "wapc-tiny-records"] {
        assert_quiet(&town, policy);
        // Log records always succeed, and never cost a policy its verdict.
        town.accepts(policy);
    }
}

#[test]
fn a_rejection_with_an_enormous_message_does_not_swell_the_log() {
    let answer = format!(r#"{{"accepted":false,"message":"{}"}}"#, "no".repeat(4 << 20));
    let town = Town::new(&[Guest::answering(Contract::Wapc, "verbose", answer.as_bytes())]);
    assert_eq!(town.ask("verbose")["status"]["message"].as_str().unwrap().len(), 8 << 20);
    assert_quiet(&town, "verbose");
}

#[test]
fn an_enormous_answer_of_the_wrong_shape_is_not_repeated() {
    let answer = format!(r#"{{"accepted":"{}"}}"#, "no".repeat(4 << 20));
    let guests = [(Contract::Wapc, "wapc"), (Contract::Wasi, "wasi")]
        .map(|(contract, name)| Guest::answering(contract, name, answer.as_bytes()));
    let town = Town::new(&guests);
    for Guest { name, .. } in &guests {
        let answer = town.ask(name);
        let bytes = rejection(name, &answer).len();
        assert!(
            bytes < 2 * conclave_ipc::limits::MESSAGE_BYTES_MAX,
            "{name}: a message of {bytes} bytes"
        );
        assert_quiet(&town, name);
    }
}

#[test]
fn a_guest_can_not_forge_lines_of_the_log() {
    let forged = "innocent\n{\"level\":\"ERROR\",\"policy\":\"neighbour\",\"message\":\"forged\"}\r\u{1b}[2J\0";
    let answer = serde_json::json!({ "accepted": false, "message": forged }).to_string();
    let fields = crate::guests::data(2048, forged.as_bytes());
    let code = format!("(call $console_log (i32.const 2048) (i32.const {}))", forged.len());
    let town = Town::new(&[
        Guest::wapc_with("forges-output", &fields, &code),
        Guest::answering(Contract::Wapc, "forges-a-reason", answer.as_bytes()),
    ]);
    town.accepts("forges-output");
    assert_eq!(town.ask("forges-a-reason")["status"]["message"], forged);
    let lines = town.daemon.log_lines();
    assert!(!lines.iter().any(|line| line["message"] == "forged"));
    assert!(!town.daemon.log().contains('\u{1b}'));
}
