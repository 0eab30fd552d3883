//! Programs that break, before they read and after it.

use crate::program::{Program, Verdict, hash, unless_bad};
use crate::scene::{Scene, play};
use crate::{STARTS, observed};

const SPIN: &str = "(loop $forever (br $forever))";
/// A poll of the monotonic clock, for one hour.
const SLEEP: &str =
    "(i64.store (i32.const 184) (i64.const 3600000000000)) (call $poll (i32.const 160))";
const RECURSE: &str = "(drop (call $dive (i64.const -1)))";
const GROW: &str = "(drop (memory.grow (i32.const 65000)))";
const GROW_IN_A_LOOP: &str = "(loop $more
    (local.set $i (memory.grow (i32.const 16)))
    (i32.store (i32.mul (local.get $i) (i32.const 65536)) (i32.const 1))
    (br $more))";
const WRITE: &str =
    "(loop $more (call $print (i32.const 1) (i32.const 65536) (i32.const 65536)) (br $more))";
const ASK: &str = "(loop $more (drop (call $ask_host)) (br $more))";

const OUT_OF_TIME: &str = "it exceeded the allowed execution time";
const OUT_OF_STACK: &str = "call stack exhausted";
const OUT_OF_MEMORY: &str = "memory limit of 134217728 bytes exceeded";

#[test]
fn what_breaks_after_the_read_costs_its_own_request_only() {
    let breaking = |name, code: &str, verdict| {
        let code = format!("(call $say (call $read)) (if (call $is_bad) (then {code}))");
        Program::wasi(name, &code, Verdict::Says(verdict))
    };
    play(&[
        breaking("traps", "(unreachable)", |document| unless_bad(document, "unreachable")),
        breaking("recurses", RECURSE, |document| unless_bad(document, OUT_OF_STACK)),
        breaking("grows", GROW, |document| unless_bad(document, OUT_OF_MEMORY)),
        breaking("grows-in-a-loop", GROW_IN_A_LOOP, |document| unless_bad(document, OUT_OF_MEMORY)),
        breaking("writes", WRITE, |document| unless_bad(document, "output limit of")),
        breaking("asks", ASK, |document| unless_bad(document, "more than 1000 host calls")),
        breaking("reaches-out", "(drop (i32.load (i32.const -8)))", |document| {
            unless_bad(document, "out of bounds memory access")
        }),
        breaking(
            "points-out",
            "(call $print (i32.const 1) (i32.const -8) (i32.const 4))",
            |document| unless_bad(document, "out-of-range pointer"),
        ),
        breaking("spins", SPIN, |document| unless_bad(document, OUT_OF_TIME)).hurried(),
        breaking("sleeps", SLEEP, |document| unless_bad(document, OUT_OF_TIME)).hurried(),
    ]);
}

#[test]
fn what_breaks_before_the_read_breaks_every_request_and_nothing_else() {
    let breaking = |name, code: &str, verdict, why| {
        Program::wasi(name, &format!("{code} (call $say (call $read))"), Verdict::Says(verdict))
            .not_kept(why)
            .briefly()
    };
    play(&[
        breaking("traps", "(unreachable)", |_| Err("unreachable"), "unreachable"),
        breaking("recurses", RECURSE, |_| Err(OUT_OF_STACK), OUT_OF_STACK),
        breaking("grows", GROW, |_| Err(OUT_OF_MEMORY), OUT_OF_MEMORY),
        breaking("grows-in-a-loop", GROW_IN_A_LOOP, |_| Err(OUT_OF_MEMORY), OUT_OF_MEMORY),
        breaking("writes", WRITE, |_| Err("output limit of"), observed::OUTPUT),
        breaking("asks", ASK, |_| Err("more than 1000 host calls"), observed::HOST_CALL),
        // Ordinary, between all of them.
        Program::wasi(
            "good",
            "(call $say (call $read))",
            Verdict::Says(|document| Ok(hash(document))),
        ),
    ]);
}

/// A start that never ends has a deadline of its own, which is longer than a test waits for
/// anything: so this is only for guests that are started anew.
#[test]
fn what_never_reads_misses_the_deadline_of_every_request() {
    let never = |name, code| {
        Program::wasi(name, code, Verdict::Says(|_| Err(OUT_OF_TIME))).briefly().hurried()
    };
    let programs = [never("spins", SPIN), never("sleeps", SLEEP)];
    let scene = Scene::new(STARTS[0], &programs);
    for program in &programs {
        scene.ask_all(program);
    }
}
