//! Programs of all kinds, started anew for every request and started once for all of them:
//! the verdicts are the same, nothing of one request is seen by the next, and what can't be
//! started once is started anew, with the reason in the log.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "snapshot/hostile.rs"]
mod hostile;
#[path = "snapshot/live.rs"]
mod live;
#[path = "snapshot/observed.rs"]
mod observed;
#[path = "snapshot/policies.rs"]
mod policies;
#[path = "snapshot/program.rs"]
mod program;
#[path = "snapshot/reading.rs"]
mod reading;
#[path = "snapshot/scene.rs"]
mod scene;
#[path = "snapshot/state.rs"]
mod state;
#[path = "snapshot/wapc.rs"]
mod wapc;

/// The ways to start guests, as the key `start` of a policy has them.
const STARTS: [&str; 3] = ["fresh", "snapshot", "auto"];
