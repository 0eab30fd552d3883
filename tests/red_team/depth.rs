//! What is left when two layers fail together: the filter, and the layer that would be next.

use conclave_ipc::Phase;
use conclave_ipc::layers::Layer;

use crate::attempts::{self, Attempt, First, Next};
use crate::campaign::{Host, Order, attack, end_of};
use crate::{score, steps};

/// The step that would stop an attempt if the filter did not.
fn next_step(attempt: &Attempt, steps: &[Layer]) -> Option<Layer> {
    match (attempt.first, attempt.next) {
        (First::Filter(_), Next::Layer(layer, _)) if steps.contains(&layer) => Some(layer),
        _ => None,
    }
}

#[test]
fn the_daemon_outlives_attempts_that_two_layers_together_would_stop() {
    let (steps, _) = steps();
    let orders: Vec<_> = attempts::all()
        .filter_map(|attempt| {
            let next = next_step(attempt, &steps)?;
            let (filter, next) = (Layer::SyscallFilter.name(), next.name());
            Some(Order {
                policy: attempt.id.replace('/', " "),
                module: format!("red team\nwithout: {filter}\nwithout: {next}\n"),
                attempt: attempt.id.to_owned(),
                phase: Phase::Serve,
                forked: false,
            })
        })
        .collect();
    assert!(orders.len() > 100, "only {} attempts", orders.len());
    let log = attack(Host::Complete, &orders);
    let (mut stopped, mut succeeded) = (0, 0);
    for order in &orders {
        let end = end_of(&log, &order.policy, order.phase);
        assert_ne!(end, "unseen", "{}", order.attempt);
        println!("{:34} {end}", order.attempt);
        *(if end == "succeeded" { &mut succeeded } else { &mut stopped }) += 1;
    }
    score::tell(&format!(
        "red team: the filter and the next layer off: {} attempts: {stopped} stopped by a third, \
         {succeeded} succeeded",
        orders.len()
    ));
}
