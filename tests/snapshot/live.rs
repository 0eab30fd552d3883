//! Time and chance: what a program took of them before it was started is the same for all its
//! requests, and what it takes afterwards is live.

use std::collections::BTreeSet;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::STARTS;
use crate::program::{Program, Verdict};
use crate::scene::Scene;

const REQUESTS: usize = 6;

/// Whether the program is started once for all requests.
fn is_started_once(scene: &Scene, name: &str) -> bool {
    match scene.start {
        "" | "fresh" => false,
        _ => scene.how_started(name)["start"] == "snapshot",
    }
}

/// What the program says to every request.
fn numbers(scene: &Scene, name: &str) -> Vec<u64> {
    (0..REQUESTS).map(|_| scene.number(name, "a")).collect()
}

fn nanoseconds_since_the_epoch() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_nanos()).unwrap()
}

#[test]
fn chance_is_live_once_the_program_has_read() {
    let programs = [
        Program::wasi(
            "before",
            "(local.set $x (call $random)) (drop (call $read)) (call $say (local.get $x))",
            Verdict::Same,
        ),
        Program::wasi("after", "(drop (call $read)) (call $say (call $random))", Verdict::Same),
        Program::wapc_with(
            "wapc-before",
            "(global $x (mut i64) (i64.const 0))",
            "(global.set $x (call $random))",
            "(call $say (global.get $x))",
            Verdict::Same,
        ),
        Program::wapc("wapc-after", "(call $say (call $random))", Verdict::Same),
    ];
    for start in STARTS {
        let scene = Scene::new(start, &programs);
        for name in ["before", "wapc-before"] {
            let different = BTreeSet::from_iter(numbers(&scene, name)).len();
            let expected = if is_started_once(&scene, name) { 1 } else { REQUESTS };
            assert_eq!(different, expected, "{name} under {start:?}");
        }
        for name in ["after", "wapc-after"] {
            let different = BTreeSet::from_iter(numbers(&scene, name)).len();
            assert_eq!(different, REQUESTS, "{name} under {start:?}");
        }
    }
}

#[test]
fn the_time_of_day_is_live_once_the_program_has_read() {
    let programs = [
        Program::wasi(
            "wasi",
            "(drop (call $read)) (call $say (call $now (i32.const 0)))",
            Verdict::Same,
        ),
        Program::wapc("wapc", "(call $say (call $now (i32.const 0)))", Verdict::Same),
    ];
    for start in STARTS {
        let scene = Scene::new(start, &programs);
        for Program { name, .. } in &programs {
            for _ in 0..REQUESTS {
                let before = nanoseconds_since_the_epoch();
                let said = scene.number(name, "a");
                assert!(
                    (before..=nanoseconds_since_the_epoch()).contains(&said),
                    "{name} under {start:?}: {said} after {before}"
                );
            }
        }
    }
}

#[test]
fn the_monotonic_clock_goes_on_from_where_the_program_was_started() {
    let elapsed = "(i64.sub (call $now (i32.const 1)) (local.get $x))";
    let programs = [Program::wasi(
        "clock",
        &format!(
            "(local.set $x (call $now (i32.const 1)))
             (drop (call $read))
             (call $say {elapsed})"
        ),
        Verdict::Same,
    )];
    for start in STARTS {
        let scene = Scene::new(start, &programs);
        let began = Instant::now();
        let mut last = None;
        for _ in 0..REQUESTS {
            let said = scene.number("clock", "a");
            assert!(said.cast_signed() >= 0, "under {start:?} it went back: {said:x}");
            if is_started_once(&scene, "clock") {
                let (first, before) = *last.get_or_insert_with(|| (said, said.saturating_sub(1)));
                assert!(said > before, "under {start:?} it stood still");
                assert!(u128::from(said - first) <= began.elapsed().as_nanos(), "it runs fast");
                last = Some((first, said));
            }
        }
    }
}
