//! Guests that want more than they may have.

use crate::guests::{Contract, Guest};
use crate::town::Town;

const CONTRACTS: [(Contract, &str); 3] =
    [(Contract::Wapc, "wapc"), (Contract::Wasi, "wasi"), (Contract::Opa, "opa")];

/// Those that have host calls.
const CALLING: [(Contract, &str); 2] = [(Contract::Wapc, "wapc"), (Contract::Wasi, "wasi")];

/// 128 MiB, in 64 KiB pages.
const MEMORY_PAGES_MAX: u32 = 2048;

/// Asks for the rest of a 32-bit address space.
const GROW_AT_ONCE: &str = "(drop (memory.grow (i32.const 65534)))";

/// Grows by a megabyte and writes to it, again and again.
const GROW_IN_A_LOOP: &str = "(loop $more
    (local.set $i (memory.grow (i32.const 16)))
    (i32.store (i32.mul (local.get $i) (i32.const 65536)) (i32.const 1))
    (br $more))";

/// Grows from two pages to the limit, and writes to every page.
const GROW_TO_THE_LIMIT: &str = "
    (if (i32.eq (memory.grow (i32.const 2046)) (i32.const -1)) (then (unreachable)))
    (local.set $i (i32.const 131072))
    (loop $more
        (i32.store (local.get $i) (i32.const 1))
        (local.set $i (i32.add (local.get $i) (i32.const 4096)))
        (br_if $more (i32.lt_u (local.get $i) (i32.const 134217728))))";

#[test]
fn memory_beyond_the_limit_ends_the_request_and_the_message_names_the_limit() {
    let guests = CONTRACTS.map(|(contract, name)| {
        [
            Guest::template(contract, &format!("{name}-grows-at-once"), "", GROW_AT_ONCE),
            Guest::template(contract, &format!("{name}-grows-in-a-loop"), "", GROW_IN_A_LOOP),
        ]
    });
    let town = Town::new(guests.as_flattened());
    for (contract, name) in CONTRACTS {
        let prefix = contract.fault_prefix();
        let text = "memory limit of 134217728 bytes exceeded: the guest asked for";
        let reason = format!("memory: {text}");
        let at_once = format!("{prefix}{text} 4294967296");
        town.both_end_a_worker(&format!("{name}-grows-at-once"), &at_once, &reason);
        let in_a_loop = format!("{prefix}{text} 134348800");
        town.both_end_a_worker(&format!("{name}-grows-in-a-loop"), &in_a_loop, &reason);
    }
}

#[test]
fn a_policy_can_have_another_limit_of_memory() {
    let keyed =
        |name: &str, keys, code| Guest { keys, ..Guest::template(Contract::Wasi, name, "", code) };
    let town = Town::new(&[
        keyed("small", "  memory: 1Mi\n", GROW_IN_A_LOOP),
        keyed("too-small", "  memory: 64Ki\n", ""),
        keyed("large", "  memory: 200Mi\n", GROW_TO_THE_LIMIT),
    ]);
    let text = "memory limit of 1048576 bytes exceeded: the guest asked for 1179648";
    town.both_end_a_worker("small", text, &format!("memory: {text}"));
    let declared = "memory limit of 65536 bytes exceeded: the module declares 131072";
    assert!(!town.serves("too-small"));
    assert!(town.daemon.log().contains(declared), "{}", town.daemon.log());
    town.accepts("large");
}

#[test]
fn all_memory_up_to_the_limit_can_be_used() {
    let guests = CONTRACTS.map(|(contract, name)| {
        [
            Guest::template(contract, &format!("{name}-grows-to-the-limit"), "", GROW_TO_THE_LIMIT),
            Guest::with_memory(
                contract,
                &format!("{name}-starts-at-the-limit"),
                MEMORY_PAGES_MAX,
                "",
            ),
        ]
    });
    let town = Town::new(guests.as_flattened());
    for (_, name) in CONTRACTS {
        town.accepts(&format!("{name}-grows-to-the-limit"));
        town.accepts(&format!("{name}-starts-at-the-limit"));
    }
}

#[test]
fn a_policy_that_declares_more_memory_than_it_may_have_does_not_serve() {
    let guests = CONTRACTS.map(|(contract, name)| {
        [
            Guest::with_memory(
                contract,
                &format!("{name}-declares-a-page-more"),
                MEMORY_PAGES_MAX + 1,
                "",
            ),
            Guest::with_memory(contract, &format!("{name}-declares-four-gibibytes"), 65536, ""),
        ]
    });
    let town = Town::new(guests.as_flattened());
    for (_, name) in CONTRACTS {
        let text = "memory limit of 134217728 bytes exceeded: the module declares";
        town.does_not_serve(&format!("{name}-declares-a-page-more"), &format!("{text} 134283264"));
        town.does_not_serve(
            &format!("{name}-declares-four-gibibytes"),
            &format!("{text} 4294967296"),
        );
    }
}

#[test]
fn a_table_that_grows_without_end_ends_the_request() {
    let table = "(table $growing 1 funcref)";
    let step = |elements: &str| {
        format!(
            "(loop $more (drop (table.grow $growing (ref.null func) (i32.const {elements}))) (br $more))"
        )
    };
    let guests = CONTRACTS.map(|(contract, name)| {
        [
            Guest::template(contract, &format!("{name}-table-in-a-loop"), table, &step("100000")),
            Guest::template(contract, &format!("{name}-table-at-once"), table, &step("-2")),
        ]
    });
    let town = Town::new(guests.as_flattened());
    for (contract, name) in CONTRACTS {
        let text = "table limit of 1048576 elements exceeded: the guest asked for";
        for (policy, desired) in [("table-in-a-loop", 1_100_001_u32), ("table-at-once", u32::MAX)] {
            let expected = format!("{}{text} {desired}", contract.fault_prefix());
            town.both_end_a_worker(
                &format!("{name}-{policy}"),
                &expected,
                &format!("memory: {text}"),
            );
        }
    }
}

#[test]
fn a_table_that_is_too_large_from_the_start_is_refused() {
    let many_tables = "(table 1 funcref)".repeat(17);
    let town = Town::new(&[
        Guest::wapc_with("declares-a-huge-table", "(table 1048577 funcref)", ""),
        Guest::wapc_with("declares-many-tables", &many_tables, ""),
    ]);
    town.does_not_serve("declares-a-huge-table", "bootstrap failure: ");
    town.does_not_serve("declares-many-tables", "bootstrap failure: ");
}

#[test]
fn endless_recursion_ends_the_request_and_is_told_from_a_trap() {
    let code = "(drop (call $recurse (i32.const 0)))";
    let guests = CONTRACTS
        .map(|(contract, name)| Guest::template(contract, &format!("{name}-recurses"), "", code));
    let town = Town::new(&guests);
    for (contract, name) in CONTRACTS {
        let text = format!("{}wasm trap: call stack exhausted", contract.fault_prefix());
        town.both_end_a_worker(
            &format!("{name}-recurses"),
            &text,
            "stack: wasm trap: call stack exhausted",
        );
    }
}

#[test]
fn a_trap_ends_the_request() {
    let division = "(drop (i32.div_u (i32.const 1) (local.get $i)))";
    let outside = "(i32.store (i32.const -4) (i32.const 1))";
    let guests = CONTRACTS.map(|(contract, name)| {
        [
            Guest::template(contract, &format!("{name}-unreachable"), "", "(unreachable)"),
            Guest::template(contract, &format!("{name}-divides-by-zero"), "", division),
            Guest::template(contract, &format!("{name}-writes-outside"), "", outside),
        ]
    });
    let town = Town::new(guests.as_flattened());
    for (contract, name) in CONTRACTS {
        for (policy, trap) in [
            ("unreachable", "wasm trap: wasm `unreachable` instruction executed"),
            ("divides-by-zero", "wasm trap: integer divide by zero"),
            ("writes-outside", "wasm trap: out of bounds memory access"),
        ] {
            let text = format!("{}{trap}", contract.fault_prefix());
            town.both_end_a_worker(&format!("{name}-{policy}"), &text, &format!("trap: {trap}"));
        }
    }
}

#[test]
fn a_thousand_host_calls_are_permitted_and_one_more_ends_the_request() {
    let calls = |count: u32| {
        format!(
            "(loop $more
                (drop (call $call (i32.const 0) (i32.const 0)))
                (local.set $i (i32.add (local.get $i) (i32.const 1)))
                (br_if $more (i32.lt_u (local.get $i) (i32.const {count}))))"
        )
    };
    let guests = CALLING.map(|(contract, name)| {
        [
            Guest::template(contract, &format!("{name}-calls-a-thousand-times"), "", &calls(1000)),
            Guest::template(contract, &format!("{name}-calls-once-more"), "", &calls(1001)),
        ]
    });
    let town = Town::new(guests.as_flattened());
    for (contract, name) in CALLING {
        town.accepts(&format!("{name}-calls-a-thousand-times"));
        let text = "more than 1000 host calls in one evaluation";
        let expected = format!("{}{text}", contract.fault_prefix());
        town.both_end_a_worker(
            &format!("{name}-calls-once-more"),
            &expected,
            &format!("host calls: {text}"),
        );
    }
}

#[test]
fn a_host_call_that_is_too_large_ends_the_request() {
    let payload = |bytes: u32| format!("(drop (call $call (i32.const 0) (i32.const {bytes})))");
    let long_name =
        "(drop (call $host_call (i32.const 64) (i32.const 10) (i32.const 1024) (i32.const 8192)
        (i32.const 96) (i32.const 3) (i32.const 0) (i32.const 0)))";
    let guests = CALLING.map(|(contract, name)| {
        [
            Guest::with_memory(
                contract,
                &format!("{name}-largest-payload"),
                128,
                &payload(4 << 20),
            ),
            Guest::with_memory(
                contract,
                &format!("{name}-larger-payload"),
                128,
                &payload((4 << 20) + 1),
            ),
            Guest::with_memory(contract, &format!("{name}-long-name"), 128, long_name),
        ]
    });
    let town = Town::new(guests.as_flattened());
    for (contract, name) in CALLING {
        town.accepts(&format!("{name}-largest-payload"));
        for (policy, text) in [
            ("larger-payload", "host call with a payload of more than 4194304 bytes"),
            ("long-name", "host call with names of more than 4096 bytes"),
        ] {
            town.both_end_a_worker(
                &format!("{name}-{policy}"),
                &format!("{}{text}", contract.fault_prefix()),
                &format!("host calls: {text}"),
            );
        }
    }
}
