//! The whole space of system calls, one number after another, each without arguments and by a
//! serving worker of its own.

use std::collections::BTreeMap;
use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

use conclave_ipc::Phase;
use serde_json::Value;
use syscalls::Sysno;

use crate::campaign::{Host, Order, attack, end_of};

/// Beyond every number that a kernel knows.
const NUMBERS: RangeInclusive<u32> = 0..=512;

/// The bit that marks the calls of x32 programs.
const X32: u32 = 0x4000_0000;

/// Recent kernels let these past every filter: the traps of their own probes. What they do
/// elsewhere is to fail.
const PROBES: [u32; 2] = [335, 336];

/// The numbers that the serving filter lets pass when every argument is 0.
fn let_pass() -> BTreeMap<u32, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker/seccomp.json");
    let filters: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let rules = filters["serve"]["filter"].as_array().unwrap();
    // 0 matches whatever mask is laid over it.
    let takes_zeros = |rule: &&Value| {
        rule["args"].as_array().is_none_or(|arguments| arguments.iter().all(|one| one["val"] == 0))
    };
    let names = rules.iter().filter(takes_zeros).map(|rule| rule["syscall"].as_str().unwrap());
    names
        .map(|name| {
            let number: Sysno = name.parse().unwrap();
            (u32::try_from(number.id()).unwrap(), name.to_owned())
        })
        .collect()
}

#[test]
fn a_serving_worker_is_killed_for_every_system_call_but_those_of_its_filter() {
    let x32 = cfg!(target_arch = "x86_64").then_some(X32);
    let numbers: Vec<_> = [Some(0), x32]
        .into_iter()
        .flatten()
        .flat_map(|bit| NUMBERS.map(move |n| n | bit))
        .collect();
    let orders: Vec<_> = numbers
        .iter()
        .map(|number| Order {
            policy: format!("call {number}"),
            module: "red team\n".to_owned(),
            attempt: format!("call/{number}"),
            phase: Phase::Serve,
            forked: false,
        })
        .collect();
    let log = attack(Host::Complete, &orders);
    let let_pass = let_pass();
    let mut killed = 0;
    for number in numbers {
        let end = end_of(&log, &format!("call {number}"), Phase::Serve);
        let is_killed = end == format!("forbidden {}", name(number));
        if cfg!(target_arch = "x86_64") && PROBES.contains(&number) {
            assert_ne!(end, "succeeded", "{number}");
        } else {
            let listed = let_pass.get(&number);
            assert_eq!(is_killed, listed.is_none(), "{number} ({listed:?}): {end}");
        }
        killed += u32::from(is_killed);
    }
    assert!(killed > 490, "{killed}");
    crate::score::tell(&format!(
        "red team: every number of a system call: {killed} killed, {} of the filter let pass",
        let_pass.len()
    ));
}

/// How the daemon names a call.
fn name(number: u32) -> String {
    let known = usize::try_from(number).ok().and_then(Sysno::new);
    known.map_or_else(|| format!("number {number:#x}"), |call| call.name().to_owned())
}
