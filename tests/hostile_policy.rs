//! Policies that spin, sleep, grow, lie and crash, each of them beside a good one.
//!
//! Whatever a policy does, its request is answered exactly once and never with a yes that
//! it did not give in time and in form; its next request is answered as well; the good
//! policy does not notice; the daemon lives on and its log says what happened.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "hostile/answers.rs"]
mod answers;
#[path = "hostile/bounds.rs"]
mod bounds;
#[path = "hostile/deadlines.rs"]
mod deadlines;
#[path = "hostile/guests.rs"]
mod guests;
#[path = "hostile/modules.rs"]
mod modules;
#[path = "hostile/output.rs"]
mod output;
#[path = "hostile/pointers.rs"]
mod pointers;
#[path = "hostile/rego.rs"]
mod rego;
#[path = "hostile/town.rs"]
mod town;
