//! Guests that never come back.

use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::guests::Guest;
use crate::town::{DEADLINE, DEADLINE_LOGGED, Town, rejection};

const SPIN: &str = "(loop $for_ever (br $for_ever))";

/// Each call moves 4 MiB twice, so that even the permitted number takes longer than the
/// deadline.
const ENDLESS_HOST_CALLS: &str =
    "(loop $for_ever (drop (call $call (i32.const 0) (i32.const 4194304))) (br $for_ever))";

#[test]
fn a_policy_that_never_answers_is_ended_at_its_deadline() {
    let town = Town::new(&[
        Guest::wapc("spins-in-guest-call", SPIN).hurried(),
        Guest::wasi("spins-in-start", SPIN).hurried(),
        Guest::wapc("sleeps-for-an-hour", "(call $sleep_for_an_hour)").hurried(),
        Guest::wasi("wasi-sleeps-for-an-hour", "(call $sleep_for_an_hour)").hurried(),
    ]);
    for policy in
        ["spins-in-guest-call", "spins-in-start", "sleeps-for-an-hour", "wasi-sleeps-for-an-hour"]
    {
        town.both_end_a_worker(policy, DEADLINE, DEADLINE_LOGGED);
    }
}

#[test]
fn a_policy_that_is_busy_with_host_calls_is_ended_at_its_deadline() {
    use crate::guests::Contract::{Wapc, Wasi};
    let town = Town::new(&[
        Guest::with_memory(Wapc, "wapc-calls-the-host", 65, ENDLESS_HOST_CALLS).hurried(),
        Guest::with_memory(Wasi, "wasi-calls-the-host", 65, ENDLESS_HOST_CALLS).hurried(),
    ]);
    for policy in ["wapc-calls-the-host", "wasi-calls-the-host"] {
        town.both_end_a_worker(policy, DEADLINE, DEADLINE_LOGGED);
    }
}

#[test]
fn a_policy_that_spins_before_it_is_asked_about_its_settings_does_not_serve() {
    let spinning = format!("(func $spin {SPIN})");
    let export = |name: &str| format!(r#"(func (export "{name}") {SPIN})"#);
    let settings = r#"(func (export "__guest_call") (param i32 i32) (result i32)
        (loop $for_ever (br $for_ever)) (i32.const 1))"#;
    let town = Town::new(&[
        Guest::wapc_with("spins-in-start", &export("_start"), "").hurried(),
        Guest::wapc_with("spins-in-wapc-init", &export("wapc_init"), "").hurried(),
        Guest::wapc_with("spins-in-the-start-section", &format!("{spinning} (start $spin)"), "")
            .hurried(),
        Guest::wasi_with(
            "wasi-spins-in-the-start-section",
            &format!("{spinning} (start $spin)"),
            "",
        )
        .hurried(),
        Guest::of_text(
            "spins-in-validate-settings",
            crate::guests::Contract::Wapc,
            &format!("(module {settings})"),
        )
        .hurried(),
        Guest::of_text(
            "wasi-spins-in-validate-settings",
            crate::guests::Contract::Wasi,
            &format!("(module {})", export("_start")),
        )
        .hurried(),
    ]);
    for policy in [
        "spins-in-start",
        "spins-in-wapc-init",
        "spins-in-the-start-section",
        "wasi-spins-in-the-start-section",
        "spins-in-validate-settings",
        "wasi-spins-in-validate-settings",
    ] {
        town.does_not_serve(policy, &format!("Policy settings are invalid: {DEADLINE}"));
    }
}

/// Initialisers don't know what they run for. These wait for a time that comes after their
/// settings were found valid.
#[test]
fn a_policy_that_turns_hostile_in_its_initialisers_is_ended_at_its_deadline() {
    for seconds_to_be_ready in [6, 20, 50] {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let zero_hour = now + Duration::from_secs(seconds_to_be_ready);
        let town = Town::new(
            &["_start", "wapc_init", "start section"]
                .map(|place| time_bomb(place, zero_hour).fresh()),
        );
        let policies = ["bomb-in-_start", "bomb-in-wapc_init", "bomb-in-start-section"];
        let in_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() < zero_hour;
        if !in_time {
            // The machine was too slow to have them ready; again with more time.
            continue;
        }
        for policy in policies {
            assert!(town.serves(policy), "{policy}");
            // Whichever side of the zero hour this is, a policy is never just lost.
            let early = town.ask(policy);
            assert!(early["allowed"] == true || rejection(policy, &early) == DEADLINE, "{early}");
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        thread::sleep(zero_hour.saturating_sub(now));
        for policy in policies {
            for answer in town.ask_twice(policy) {
                assert_eq!(rejection(policy, &answer), DEADLINE, "{policy}");
            }
        }
        return;
    }
    panic!("the policies were never ready in time");
}

fn time_bomb(place: &str, zero_hour: Duration) -> Guest {
    let export = match place {
        "start section" => String::new(),
        name => format!(r#"(export "{name}")"#),
    };
    let start = if place == "start section" { "(start $bomb)" } else { "" };
    let fields = format!(
        "(func $bomb {export}
            (drop (call $clock_time_get (i32.const 0) (i64.const 0) (i32.const 512)))
            (if (i64.gt_u (i64.load (i32.const 512)) (i64.const {})) (then {SPIN})))
        {start}",
        zero_hour.as_nanos()
    );
    Guest::wapc_with(&format!("bomb-in-{}", place.replace(' ', "-")), &fields, "").hurried()
}
