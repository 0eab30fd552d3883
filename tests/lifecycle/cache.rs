//! Compiled code that outlives the daemon.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use harness::{Daemon, Place, give_to_daemon, policy, request};

use serde_json::Value;

use super::{ACCEPTING, accepting, assert_allowed, stop};

/// How often the daemon has compiled a module, and what it warned of.
fn compilations(daemon: &Daemon) -> (usize, Vec<String>) {
    let lines = daemon.log_lines();
    let compiled = lines.iter().filter(|line| line["message"] == "compiled").count();
    let warnings = lines.iter().filter(|line| line["level"] == "WARN").map(Value::to_string);
    (compiled, warnings.collect())
}

/// The one entry of the cache.
fn entry(place: &Place) -> PathBuf {
    let entries: Vec<_> = fs::read_dir(place.path("cache")).unwrap().map(Result::unwrap).collect();
    assert_eq!(entries.len(), 1, "{entries:?}");
    entries.first().unwrap().path()
}

#[test]
fn many_policies_of_one_module_start_with_one_compilation() {
    let place = Place::new();
    place.copy_policy("pod-guard.wasm");
    let policies: String =
        (0..150).map(|number| format!("guard-{number}: {{module: pod-guard.wasm}}\n")).collect();
    let mut daemon = Daemon::start_ready(place, &policies, &["--workers", "1"]);
    daemon.wait_until_tried();
    assert_eq!(compilations(&daemon), (1, Vec::new()));
    assert_eq!(daemon.workers().len(), 150);
    assert_allowed(&daemon.post("/validate/guard-149", request("pod-ok.json")));
}

#[test]
fn a_second_start_takes_the_code_from_the_cache() {
    let daemon = accepting(Place::new(), &[]);
    let (compiled, warnings) = compilations(&daemon);
    assert_eq!((compiled, warnings.as_slice()), (1, [].as_slice()));
    let place = stop(daemon);
    let cache = fs::metadata(place.path("cache")).unwrap();
    assert_eq!(cache.mode() & 0o777, 0o700);
    let before = fs::read(entry(&place)).unwrap();

    let daemon = accepting(place, &[]);
    assert_allowed(&daemon.post("/validate/yes", request("pod-ok.json")));
    assert_eq!(compilations(&daemon), (0, Vec::new()));
    let place = stop(daemon);
    assert_eq!(fs::read(entry(&place)).unwrap(), before);

    // Another module under the same name is not mistaken for it.
    place.write("yes.wasm", policy("wasi", ACCEPTING, "(call $print (i32.const 1))"));
    let mut daemon = Daemon::start_ready(place, "yes: {module: yes.wasm}\n", &[]);
    daemon.wait_until_tried();
    assert_allowed(&daemon.post("/validate/yes", request("pod-ok.json")));
    assert_eq!(compilations(&daemon), (1, Vec::new()));
}

#[test]
fn a_damaged_cache_entry_costs_a_warning_and_a_compilation() {
    let mut place = stop(accepting(Place::new(), &[]));
    let good = fs::read(entry(&place)).unwrap();
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    let half = good.get(..good.len() / 2).unwrap().to_vec();
    for bad in [flipped(0), flipped(20), flipped(good.len() - 1), half, Vec::new()] {
        fs::write(entry(&place), bad).unwrap();
        let daemon = accepting(place, &[]);
        assert_allowed(&daemon.post("/validate/yes", request("pod-ok.json")));
        let (compiled, warnings) = compilations(&daemon);
        assert_eq!((compiled, warnings.len()), (1, 1), "{warnings:?}");
        assert!(
            warnings.iter().all(|warning| warning.contains("cache entry is damaged")),
            "{warnings:?}"
        );
        place = stop(daemon);
    }
    let daemon = accepting(place, &[]);
    assert_eq!(compilations(&daemon), (0, Vec::new()), "the last compilation was kept");
}

#[test]
fn a_cache_that_is_not_the_daemons_alone_is_not_used() {
    let place = Place::new();
    let cache = place.path("cache");
    fs::create_dir(&cache).unwrap();
    give_to_daemon(&cache);
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o755)).unwrap();
    let place = {
        let daemon = accepting(place, &[]);
        assert_allowed(&daemon.post("/validate/yes", request("pod-ok.json")));
        let (compiled, warnings) = compilations(&daemon);
        assert_eq!((compiled, warnings.len()), (1, 1), "{warnings:?}");
        assert!(
            warnings.iter().all(|warning| warning.contains("its mode is 755, not 700")),
            "{warnings:?}"
        );
        stop(daemon)
    };
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);

    let daemon = accepting(place, &["--cache-dir", "/"]);
    let (_, warnings) = compilations(&daemon);
    assert!(
        warnings.iter().any(|warning| warning.contains("it belongs to user 0, not to")),
        "{warnings:?}"
    );
    let daemon = accepting(stop(daemon), &["--no-cache"]);
    assert_eq!(compilations(&daemon), (1, Vec::new()), "not wanted, so nothing to warn of");
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);
}
