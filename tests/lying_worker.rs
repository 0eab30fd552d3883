//! Workers that break the protocol, in every way and at every stage.
//!
//! A program that lies stands in for the worker. Whatever it does, the request that met the
//! lie gets exactly one answer, and that one fails closed; the worker is ended; one line of
//! the log names the policy and what was wrong; an honest policy answers all the while; and
//! afterwards the supervisor holds no more memory, descriptors and processes than before.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

#[path = "lying/lies.rs"]
mod lies;
#[path = "lying/scene.rs"]
mod scene;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use lies::{AT_THE_START, BY_HEIRS, BY_STARTED, BY_ZYGOTES, End, Lie, WHILE_SERVING};
use scene::{Scene, Size};

/// Lies that are told side by side.
const LANES: usize = 8;

/// How often the workers of a policy that serves tell its lie.
const ROUNDS: usize = 2;

/// What the supervisor may be larger by when all lies were told. At one moment each worker can
/// make it hold a reply of sixteen mebibytes, and two dozen lies do, each time: one reply that
/// was not given back would be more than this. The rest is what the allocator keeps.
const GROWTH_KIB_MAX: u64 = (conclave_ipc::limits::REPLY_BYTES_MAX / 1024) as u64;

#[test]
fn every_lie_is_contained() {
    let lies = [AT_THE_START, WHILE_SERVING, BY_STARTED, BY_ZYGOTES, BY_HEIRS].concat();
    let scene = Scene::open(&lies, &["--compile-timeout", "2"]);
    let over = AtomicBool::new(false);
    let (mut failures, sizes, (answers, longest)) = thread::scope(|scope| {
        let neighbour = scope.spawn(|| scene.ask_the_honest(&over));
        let (failures, sizes) = tell_all(&scene, &lies);
        over.store(true, Ordering::Relaxed);
        (failures, sizes, neighbour.join().unwrap())
    });
    let guilty: BTreeSet<_> = failures.iter().map(|failure| failure.lie).collect();
    // Past the test runner, which would keep it from sight because the test passes.
    let score = format!(
        "lying worker: {} lies, {} contained; the supervisor has {} KiB, before {}; {answers} \
         honest answers beside them, the slowest in {} ms",
        lies.len(),
        lies.len() - guilty.len(),
        sizes[1].resident_kib,
        sizes[0].resident_kib,
        longest.as_millis()
    );
    drop(writeln!(std::io::stderr(), "{score}"));
    let lines = lies.iter().map(lines_of_the_log).sum();
    for result in [is_no_larger(&scene, sizes), scene.has_said_no_more(lines)] {
        failures.extend(result.err().map(|what| Failure { lie: "all of them", round: 0, what }));
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// What went wrong with a lie.
#[derive(Debug)]
struct Failure {
    lie: &'static str,
    #[expect(dead_code, reason = "shown when the test fails")]
    round: usize,
    #[expect(dead_code, reason = "shown when the test fails")]
    what: String,
}

/// Has every lie told, in rounds, and measures before and after.
fn tell_all(scene: &Scene, lies: &[Lie]) -> (Vec<Failure>, [Size; 2]) {
    scene.wait_until_tried();
    let before = scene.measure();
    let failures = (0..ROUNDS).flat_map(|round| tell(scene, lies, round)).collect();
    (failures, [before, scene.measure()])
}

/// One round of lies, side by side.
fn tell(scene: &Scene, lies: &[Lie], round: usize) -> Vec<Failure> {
    let failures = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let lane = || {
        while let Some(lie) = lies.get(next.fetch_add(1, Ordering::Relaxed)) {
            if round > 0 && is_told_once(lie) {
                continue;
            }
            if let Err(what) = scene.play(lie) {
                failures.lock().unwrap().push(Failure { lie: lie.name, round, what });
            }
        }
    };
    thread::scope(|scope| (0..LANES).for_each(|_| drop(scope.spawn(lane))));
    failures.into_inner().unwrap()
}

/// Whether nobody is left to tell it again.
fn is_told_once(lie: &Lie) -> bool {
    matches!(lie.end, End::NeverServes(_)) || lie.is_told_by_an_heir()
}

/// Lines of the log about a lie, in all rounds.
fn lines_of_the_log(lie: &Lie) -> usize {
    match lie.end {
        End::NeverServes(_) => 1,
        // The end of the first worker, which the test brings about, and the lie of the second.
        End::Unheard(_) if lie.is_told_by_an_heir() => 2,
        // The end of the zygote, and that of its worker.
        End::Misreported(_) => 2 * ROUNDS,
        End::Rejected(..) | End::Unheard(_) => ROUNDS,
        End::Unreadable | End::Accepted => 0,
    }
}

fn is_no_larger(scene: &Scene, [before, after]: [Size; 2]) -> scene::Verdict {
    let grown = after.resident_kib.saturating_sub(before.resident_kib);
    let is_larger = grown > GROWTH_KIB_MAX
        || after.descriptors > before.descriptors
        || after.children != scene.children_expected();
    if is_larger { Err(format!("the supervisor has grown: {before:?}, {after:?}")) } else { Ok(()) }
}

/// In the form for people a line is not quoted as a whole, so what is foreign must be.
#[test]
fn no_lie_forges_lines_of_the_log_or_reaches_a_terminal() {
    let forges = |lie: &&Lie| lie.script.ends_with("forged");
    let lies: Vec<_> = [AT_THE_START, WHILE_SERVING, BY_STARTED, BY_ZYGOTES, BY_HEIRS]
        .into_iter()
        .flatten()
        .filter(forges)
        .copied()
        .collect();
    assert!(lies.len() >= 4, "{lies:?}");
    let scene = Scene::open(&lies, &["--log-fmt", "text"]);
    scene.wait_until_tried();
    for lie in &lies {
        scene.provoke(lie);
    }
    let log = scene.wait_for_lines("innocent", lies.len());
    // And one about the worker that was ended here for its heir to come.
    assert_eq!(log.lines().count(), lies.len() + 1, "{log}");
    for line in log.lines() {
        assert!(line.starts_with("20") && !line.contains('\u{1b}'), "{log}");
    }
}
