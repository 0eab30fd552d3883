//! A zygote and the workers that were forked from it.

use std::fs::{self, File};

use harness::Daemon;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::unistd::Pid;

use crate::{
    NAMESPACES, SERVING_LIMITS, assert_limits, assert_without_privileges, daemon_that_starts,
    evaluate, executable, permissions, seen, status,
};

/// The limits of a zygote that differ from those of a worker that serves: it may have itself,
/// and twice its two workers.
const ZYGOTE_LIMITS: [(&str, &str); 2] = [("Max open files", "16"), ("Max processes", "5")];

/// A daemon with two workers, and the zygote that they were forked from.
fn daemon() -> (Daemon, Pid) {
    let daemon = daemon_that_starts("snapshot");
    let [zygote] = daemon.zygotes()[..] else { panic!("{:?}", daemon.zygotes()) };
    (daemon, zygote)
}

#[test]
fn a_forked_worker_is_locked_up_as_one_that_was_not() {
    let (daemon, zygote) = daemon();
    for _ in 0..2 {
        let workers = daemon.workers();
        assert_eq!(workers.len(), 2);
        for pid in workers {
            assert_eq!(status(pid, "PPid"), zygote.to_string());
            assert_without_privileges(pid);
            assert_eq!(status(pid, "Threads"), "1");
            assert_eq!(status(pid, "Seccomp"), "2");
            // Its zygote's two, and the serving one.
            assert_eq!(status(pid, "Seccomp_filters"), "3");
            assert_limits(pid, &SERVING_LIMITS);
        }
        // It stays so.
        evaluate(&daemon);
    }
}

#[test]
fn a_zygote_has_no_privileges_one_thread_two_filters_and_room_for_its_workers() {
    let (_daemon, zygote) = daemon();
    assert_without_privileges(zygote);
    assert_eq!(status(zygote, "Threads"), "1");
    assert_eq!(status(zygote, "Seccomp"), "2");
    assert_eq!(status(zygote, "Seccomp_filters"), "2");
    let changed = |name: &str| ZYGOTE_LIMITS.iter().any(|(other, _)| *other == name);
    let same: Vec<_> = SERVING_LIMITS.into_iter().filter(|(name, _)| !changed(name)).collect();
    assert_limits(zygote, &same);
    assert_limits(zygote, &ZYGOTE_LIMITS);
}

#[test]
fn a_forked_worker_lives_in_its_zygotes_namespaces_which_are_nobody_elses() {
    let (daemon, zygote) = daemon();
    assert_eq!(status(zygote, "NSpid"), format!("{zygote}\t1"));
    for pid in daemon.workers() {
        let numbers = status(pid, "NSpid");
        let (own, within) = numbers.split_once('\t').unwrap();
        assert_eq!(own, pid.to_string());
        assert!(within.parse::<u32>().unwrap() > 1, "{numbers}");
        for name in NAMESPACES {
            let of = |process: &str| {
                let path = format!("/proc/{process}/ns/{name}");
                seen(&path, fs::read_link(&path))
            };
            let (Some(its), Some(zygotes), Some(ours)) =
                (of(&pid.to_string()), of(&zygote.to_string()), of("self"))
            else {
                continue;
            };
            assert_eq!(its, zygotes, "{name}");
            assert_ne!(its, ours, "{name}");
        }
    }
}

#[test]
fn a_zygote_and_a_forked_worker_have_channel_code_and_state_open_and_nothing_else() {
    let (daemon, zygote) = daemon();
    evaluate(&daemon);
    let mut channels = Vec::new();
    for pid in daemon.workers().into_iter().chain([zygote]) {
        let directory = format!("/proc/{pid}/fd");
        let Some(entries) = seen(&directory, fs::read_dir(&directory)) else { continue };
        let mut open: Vec<_> = entries
            .map(|entry| {
                let entry = entry.unwrap();
                let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
                (number, fs::read_link(entry.path()).unwrap().to_str().unwrap().to_owned())
            })
            .collect();
        open.sort();
        let numbers: Vec<_> = open.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [3, 4, 5], "{open:?}");
        assert!(open[0].1.starts_with("socket:"), "{open:?}");
        assert!(!channels.contains(&open[0].1), "two processes have the same channel");
        channels.push(open[0].1.clone());
        assert!(open[1..].iter().all(|(_, file)| file == "/memfd:conclave (deleted)"), "{open:?}");
    }
}

#[test]
fn the_state_that_workers_go_on_from_can_not_be_changed_by_anybody() {
    let (daemon, zygote) = daemon();
    for pid in daemon.workers().into_iter().chain([zygote]) {
        let path = format!("/proc/{pid}/fd/5");
        let Some(state) = seen(&path, File::open(&path)) else { continue };
        let seals = SealFlag::from_bits_retain(fcntl(&state, FcntlArg::F_GET_SEALS).unwrap());
        let all = SealFlag::F_SEAL_WRITE
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_SEAL;
        assert!(seals.contains(all), "{seals:?} of process {pid}");
        let path = format!("/proc/{pid}/maps");
        let Some(maps) = seen(&path, fs::read_to_string(&path)) else { continue };
        let shared = maps.lines().find(|line| permissions(line).ends_with("ws"));
        assert_eq!(shared, None, "memory of process {pid} is shared and writable");
    }
}

#[test]
fn no_memory_of_a_forked_worker_is_writable_and_executable_and_none_becomes_executable() {
    let (daemon, zygote) = daemon();
    let maps = |pid: Pid| {
        let path = format!("/proc/{pid}/maps");
        seen(&path, fs::read_to_string(&path))
    };
    evaluate(&daemon);
    let Some(of_zygote) = maps(zygote) else { return };
    for pid in daemon.workers() {
        let Some(text) = maps(pid) else { continue };
        let is_both =
            |line: &&str| permissions(line).contains('w') && permissions(line).contains('x');
        assert_eq!(text.lines().find(is_both), None);
        assert_eq!(executable(&text), executable(&of_zygote));
    }
}
