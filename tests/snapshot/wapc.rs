//! waPC guests: what their initialisation and a request for practice leave behind is the same
//! for all requests; what a request leaves behind is gone.

use harness::Daemon;

use crate::program::{Program, Verdict, hash, unless_bad};
use crate::scene::{Scene, play, play_calmly};
use crate::{STARTS, observed};

const READ: Verdict = Verdict::Says(|document| Ok(hash(document)));

/// Says the hash of the request.
const SAY: &str = "(call $say (local.get $request))";

#[test]
fn nothing_that_a_request_changes_is_seen_by_the_next() {
    let count = |at: u32| {
        format!("(i64.store (i32.const {at}) (i64.add (i64.load (i32.const {at})) (i64.const 1)))")
    };
    play_calmly(&[
        Program::wapc("reads", SAY, READ),
        Program::wapc_with(
            "globals",
            "(global $narrow (mut i32) (i32.const 0)) (global $wide (mut f64) (f64.const 0))",
            "(global.set $narrow (i32.const 10)) (global.set $wide (f64.const 0.5))",
            "(global.set $narrow (i32.add (global.get $narrow) (i32.const 1)))
             (global.set $wide (f64.add (global.get $wide) (f64.const 1)))
             (call $say (i64.add (i64.extend_i32_u (global.get $narrow))
               (i64.reinterpret_f64 (global.get $wide))))",
            Verdict::Same,
        ),
        Program::wapc_with(
            "memory",
            "",
            &(count(384) + &count(10_000)),
            &(count(384)
                + &count(10_000)
                + &count(60_000)
                + "(call $say (i64.add (i64.load (i32.const 384))
                     (i64.add (i64.load (i32.const 10000)) (i64.load (i32.const 60000)))))"),
            Verdict::Same,
        ),
        Program::wapc("buffer", "(call $say (i64.load (i32.const 400)))", Verdict::Same),
        Program::wapc(
            "grows",
            "(call $say (i64.extend_i32_u (memory.size)))
             (if (i32.eq (memory.grow (i32.const 10)) (i32.const -1)) (then (unreachable)))
             (i32.store (i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 4))
               (i32.const 1))",
            Verdict::Same,
        ),
        // Does its work once, and says whether it was now.
        Program::wapc_with(
            "lazy",
            "(global $is_done (mut i32) (i32.const 0))",
            "",
            "(call $say (i64.extend_i32_u (global.get $is_done)))
             (global.set $is_done (i32.const 1))",
            Verdict::Same,
        ),
    ]);
}

#[test]
fn every_way_to_initialise_is_there_once_and_in_order() {
    let global = "(global $count (mut i64) (i64.const 1))
        (func $begin (global.set $count (i64.add (global.get $count) (i64.const 2))))
        (start $begin)
        (func (export \"_start\")
          (global.set $count (i64.mul (global.get $count) (i64.const 10)))
          EXIT)";
    let add = "(global.set $count (i64.add (global.get $count) (i64.const 4)))";
    let say = "(call $say (global.get $count))";
    let program = |name, exit| {
        let fields = global.replace("EXIT", exit);
        Program::wapc_with(name, &fields, add, say, Verdict::Says(|_| Ok(34)))
    };
    play_calmly(&[
        program("returns", ""),
        program("exits", "(call $proc_exit (i32.const 0))").perhaps_kept(),
    ]);
}

#[test]
fn errors_and_host_calls_of_a_request_are_gone_with_it() {
    let bad = |code: &str| format!("{SAY} (if (call $is_bad) (then {code}))");
    play_calmly(&[
        Program::wapc(
            "error",
            &bad("(call $guest_error (i32.const 112) (i32.const 10)) (return (i32.const 0))"),
            Verdict::Says(|document| unless_bad(document, "kubewarden")),
        ),
        Program::wapc(
            "no-error",
            &bad("(return (i32.const 0))"),
            Verdict::Says(|document| unless_bad(document, "No error message set for call failure")),
        ),
        // The answer to the last request is none to this one.
        Program::wapc(
            "no-answer",
            &bad("(return (i32.const 1))"),
            Verdict::Says(|document| {
                unless_bad(document, "No error message OR response set for call success")
            }),
        ),
        Program::wapc(
            "asks",
            "(local.set $i (i32.add (call $host_response_len) (call $host_error_len)))
             (if (call $ask_host) (then (unreachable)))
             (call $say (i64.add (i64.mul (i64.extend_i32_u (local.get $i)) (i64.const 1000))
               (i64.extend_i32_u (call $host_error_len))))",
            Verdict::Says(|_| Ok(u64::try_from("unknown operation: none".len()).unwrap())),
        ),
    ]);
}

#[test]
fn a_request_for_practice_may_go_wrong() {
    let practice = |name, code: &str| {
        Program::wapc(name, &format!("(if (i32.eqz (call $is_text)) (then {code})) {SAY}"), READ)
    };
    play_calmly(&[
        practice("trap", "(unreachable)"),
        practice("failure", "(return (i32.const 0))"),
        practice("silence", "(return (i32.const 1))"),
        practice("host-call", "(drop (call $ask_host))"),
        practice("output", "(call $print (i32.const 1) (i32.const 112) (i32.const 10))"),
        practice("exit", "(call $proc_exit (i32.const 0))"),
        practice("memory", "(drop (memory.grow (i32.const 65000)))"),
    ]);
}

#[test]
fn what_a_guest_does_when_it_is_initialised_is_done_for_every_request() {
    let initialised = |name, init| Program::wapc_with(name, "", init, SAY, READ);
    play_calmly(&[
        initialised("console", "(call $console_log (i32.const 112) (i32.const 10))")
            .not_kept(observed::OUTPUT),
        initialised("stdout", "(call $print (i32.const 1) (i32.const 112) (i32.const 10))")
            .not_kept(observed::OUTPUT),
        initialised("stderr", "(call $print (i32.const 2) (i32.const 112) (i32.const 10))")
            .not_kept(observed::OUTPUT),
        initialised("host-call", "(if (call $ask_host) (then (unreachable)))")
            .not_kept(observed::HOST_CALL),
        initialised("exits", "(call $proc_exit (i32.const 0))").perhaps_kept(),
    ]);
}

#[test]
fn what_breaks_costs_its_own_request_only() {
    let breaking = |name, code: &str, verdict| {
        Program::wapc(
            name,
            &format!("{SAY} (if (call $is_bad) (then {code}))"),
            Verdict::Says(verdict),
        )
    };
    play(&[
        breaking("traps", "(unreachable)", |document| unless_bad(document, "unreachable")),
        breaking("grows", "(drop (memory.grow (i32.const 65000)))", |document| {
            unless_bad(document, "memory limit of 134217728 bytes exceeded")
        }),
        breaking("exits", "(call $proc_exit (i32.const 0))", |document| {
            unless_bad(document, "exited with code 0")
        }),
        breaking("spins", "(loop $forever (br $forever))", |document| {
            unless_bad(document, "it exceeded the allowed execution time")
        })
        .hurried(),
    ]);
}

#[test]
fn what_is_neither_memory_nor_a_number_is_not_kept_but_made_anew() {
    let fields = "(table $table 2 10 funcref) (elem declare func $print)
        (data $words \"\\01\\00\\00\\00\\00\\00\\00\\00\")";
    play_calmly(&[
        Program::wapc_with(
            "table-set",
            fields,
            "",
            "(call $say (i64.extend_i32_u (ref.is_null (table.get $table (i32.const 0)))))
             (table.set $table (i32.const 0) (ref.func $print))",
            Verdict::Says(|_| Ok(1)),
        )
        .not_kept("change a table"),
        Program::wapc_with(
            "data-drop",
            fields,
            "",
            "(memory.init $words (i32.const 10000) (i32.const 0) (i32.const 8))
             (data.drop $words)
             (call $say (i64.load (i32.const 10000)))",
            Verdict::Says(|_| Ok(1)),
        )
        .not_kept("drop a segment"),
    ]);
}

#[test]
fn the_log_has_what_clients_caused_and_nothing_else() {
    const REQUESTS: usize = 5;
    let program = Program::wapc(
        "talks",
        &format!("(call $console_log (i32.const 112) (i32.const 10)) {SAY}"),
        READ,
    );
    let count = |daemon: &Daemon, message: &str| {
        let lines = daemon.log_lines();
        lines.iter().filter(|line| line["message"] == message).count()
    };
    for start in STARTS {
        let mut scene = Scene::new(start, std::slice::from_ref(&program));
        assert_eq!(count(&scene.daemon, "guest output"), 0, "before any request: {start:?}");
        for _ in 0..REQUESTS {
            scene.number("talks", "a");
        }
        // Each comes after the output of its request.
        let verdicts = |daemon: &mut Daemon| count(daemon, "verdict") == REQUESTS;
        scene.daemon.wait_for("the verdicts", verdicts);
        assert_eq!(count(&scene.daemon, "guest output"), REQUESTS, "under {start:?}");
    }
}
