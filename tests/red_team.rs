//! The red team: native code attacks from within the confinement that ships, in each role, and
//! with each layer of the sandbox left out.
//!
//! The attempts are a table that the probe has as well: `tests/programs/probe/attempts.rs`. Each
//! is made by a worker of its own, and looked at from outside: what the daemon says about it.
//! The table of what came of all of them is printed to standard output
//! (`cargo test --test red_team -- --nocapture`), the score past the test runner.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a test fails by panicking and shows what it saw"
)]

#[expect(dead_code, reason = "the probe uses the other part")]
#[path = "programs/probe/attempts.rs"]
mod attempts;
#[path = "red_team/campaign.rs"]
mod campaign;
#[path = "red_team/depth.rs"]
mod depth;
#[path = "red_team/expectations.rs"]
mod expectations;
#[path = "red_team/score.rs"]
mod score;
#[path = "red_team/sweep.rs"]
mod sweep;

use std::collections::BTreeSet;

use conclave_ipc::Phase;
use conclave_ipc::layers::{Layer, Layers};

use campaign::{Campaign, Host, Trial};
use score::Score;

/// The steps of the ladder that the probe can leave out. Without the one that sets
/// `no_new_privs`, Landlock and the filters set it still.
const STEPS: [Layer; 11] = [
    Layer::EmptyRoot,
    Layer::NoNewPrivileges,
    Layer::NoCapabilities,
    Layer::ResourceLimits,
    Layer::Landlock,
    Layer::NotDumpable,
    Layer::ParentDeathSignal,
    Layer::SyscallFilter,
    Layer::WriteExecuteDenied,
    Layer::CodeSealed,
    Layer::BranchBarrier,
];

/// Namespaces that a host can lack one at a time, as `/proc/sys/user` names them. Without user
/// or mount namespaces there are none at all.
const NAMESPACES: [(Layer, &str); 6] = [
    (Layer::UserNamespace, "user"),
    (Layer::PidNamespace, "pid"),
    (Layer::NetworkNamespace, "net"),
    (Layer::IpcNamespace, "ipc"),
    (Layer::UtsNamespace, "uts"),
    (Layer::CgroupNamespace, "cgroup"),
];

/// The steps that can be left out here, since they are taken here; and the others.
fn steps() -> (Vec<Layer>, Vec<Layer>) {
    let offered = Campaign::run(Host::Complete, &[]).offered;
    STEPS.into_iter().partition(|layer| offered.contains(*layer))
}

/// Every attempt in every role with all layers, also by a worker that was forked, and in the
/// serve role with each step left out.
fn trials() -> Vec<Trial> {
    let (steps, lacking) = steps();
    for layer in lacking {
        harness::skipped(&format!("this host does not give {}", layer.name()));
    }
    let complete = Phase::ALL.into_iter().map(|phase| (phase, false, None));
    let forked = [(Phase::Serve, true, None)];
    let incomplete = steps.into_iter().map(|layer| (Phase::Serve, false, Some(layer)));
    complete
        .chain(forked)
        .chain(incomplete)
        .flat_map(|(phase, forked, without)| {
            attempts::all().map(move |attempt| Trial { attempt, phase, forked, without })
        })
        .filter(Trial::is_made)
        .collect()
}

#[test]
fn no_attempt_succeeds_with_all_layers_nor_with_any_one_left_out() {
    let mut score = Score::default();
    let campaign = Campaign::run(Host::Complete, &trials());
    score.count(&campaign);
    for (layer, kind) in NAMESPACES {
        if !harness::can_do_without(&[kind]) {
            continue;
        }
        let trials: Vec<_> = attempts::all()
            .map(|attempt| Trial {
                attempt,
                phase: Phase::Serve,
                forked: false,
                without: Some(layer),
            })
            .filter(Trial::is_made)
            .collect();
        score.count(&Campaign::run(Host::Without(kind), &trials));
    }
    score.print();
    score.assert_right();
}

#[test]
fn every_attempt_has_a_name_of_its_own_and_a_purpose() {
    let ids: BTreeSet<_> = attempts::all().map(|attempt| attempt.id).collect();
    assert_eq!(ids.len(), attempts::all().count());
    assert!(ids.len() >= 220, "only {} attempts", ids.len());
    for attempt in attempts::all() {
        assert!(attempt.id.contains('/') && attempt.tries.len() > 10, "{}", attempt.id);
    }
}

/// The layers that a host gives its workers, from what the daemon logs about them.
fn offered(missing: &str) -> Layers {
    let missing: BTreeSet<_> = missing.split(", ").collect();
    Layer::ALL.into_iter().filter(|layer| !missing.contains(layer.name())).collect()
}
