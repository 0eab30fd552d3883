//! What the rules of the system call filters say.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{filters, read};

/// System calls that a worker may not make once it has loaded its policy.
const FORBIDDEN_CALLS: [&str; 72] = [
    // Files.
    "open",
    "openat",
    "openat2",
    "creat",
    "read",
    "pread64",
    "readv",
    "write",
    "pwrite64",
    "writev",
    "unlink",
    "unlinkat",
    "rename",
    "renameat2",
    "link",
    "symlink",
    "mkdir",
    "rmdir",
    "chdir",
    "chroot",
    "mount",
    "umount2",
    "pivot_root",
    "fsopen",
    "open_tree",
    "getdents64",
    "stat",
    "statx",
    "readlink",
    "sendfile",
    "splice",
    "copy_file_range",
    "memfd_create",
    "memfd_secret",
    // Network, and descriptors that come through it.
    "socket",
    "socketpair",
    "connect",
    "bind",
    "listen",
    "accept4",
    "sendmsg",
    "recvmsg",
    "sendmmsg",
    "setsockopt",
    "dup",
    "dup2",
    "dup3",
    // Processes.
    "fork",
    "vfork",
    "clone",
    "clone3",
    "execve",
    "execveat",
    "kill",
    "tgkill",
    "pidfd_open",
    "pidfd_getfd",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "unshare",
    "setns",
    // Privileges and limits.
    "setuid",
    "setgid",
    "capset",
    "prctl",
    "prlimit64",
    "seccomp",
    "rt_sigaction",
    // The kernel at large.
    "io_uring_setup",
    "bpf",
    "userfaultfd",
];

fn rules<'a>(filters: &'a Value, filter: &str) -> &'a [Value] {
    filters[filter]["filter"].as_array().unwrap_or_else(|| panic!("no filter {filter}"))
}

#[test]
fn every_rule_of_a_system_call_filter_says_what_it_is_for() {
    let filters = filters();
    assert_eq!(
        filters.as_object().unwrap().keys().collect::<Vec<_>>(),
        ["compile", "load", "serve", "zygote"]
    );
    for name in ["compile", "load", "serve", "zygote"] {
        // The handler tells which call it was and is killed, see worker/src/confine/violation.rs.
        assert_eq!(filters[name]["mismatch_action"], "trap", "{name}");
        assert_eq!(filters[name]["match_action"], "allow", "{name}");
        for rule in rules(&filters, name) {
            let comment = rule["comment"].as_str().unwrap_or_default();
            assert!(comment.len() >= 7, "{name}: {rule}");
            for argument in rule["args"].as_array().unwrap_or(&Vec::new()) {
                assert!(
                    !argument["comment"].as_str().unwrap_or_default().is_empty(),
                    "{name}: {rule}"
                );
            }
        }
    }
}

#[test]
fn a_serving_worker_can_open_nothing_start_nothing_and_reach_nobody() {
    let filters = filters();
    let allowed: Vec<_> =
        rules(&filters, "serve").iter().map(|rule| rule["syscall"].as_str().unwrap()).collect();
    assert!(allowed.contains(&"recvfrom"), "{allowed:?}");
    for call in FORBIDDEN_CALLS {
        assert!(!allowed.contains(&call), "{call}");
    }
}

/// What a zygote may call and a serving worker may not: all of it is for a fork, and for what is
/// forked to become a worker.
#[test]
fn a_zygote_can_fork_and_nothing_else_that_a_serving_worker_can_not() {
    let filters = filters();
    let calls = |filter| {
        let rules = rules(&filters, filter).iter();
        rules.map(|rule| rule["syscall"].as_str().unwrap()).collect::<BTreeSet<_>>()
    };
    let more: Vec<_> = calls("zygote").difference(&calls("serve")).copied().collect();
    let for_forks =
        ["clone", "close", "dup3", "fcntl", "prctl", "prlimit64", "recvmsg", "seccomp", "wait4"];
    assert_eq!(more, for_forks);
    assert!(calls("serve").is_subset(&calls("zygote")));
    assert!(calls("zygote").is_subset(&calls("load")));
    // The one kind of process that it can make shares nothing with it.
    let rules = rules(&filters, "zygote");
    let clone = rules.iter().find(|rule| rule["syscall"] == "clone").unwrap();
    assert_eq!(clone["args"][0]["op"], "eq");
    assert_eq!(clone["args"][0]["val"], libc::SIGCHLD);
}

#[test]
fn the_rules_of_the_filters_are_counted_right() {
    let (filters, text) = (filters(), read("SECURITY.md"));
    let count = |filter| rules(&filters, filter).len();
    let row = format!(
        "| {} rules | {} rules, after {} while it maps its code | {} rules |",
        count("compile"),
        count("serve"),
        count("load"),
        count("zygote")
    );
    assert!(text.contains(&row), "SECURITY.md lacks {row:?}");
}

/// Neither a serving nor a compiling worker may make memory executable: each rule about
/// memory masks PROT_EXEC.
#[test]
fn no_worker_that_has_seen_foreign_bytes_can_make_memory_executable() {
    let filters = filters();
    for name in ["compile", "zygote", "serve"] {
        let rules = rules(&filters, name);
        for call in ["mmap", "mprotect"] {
            // A compiling worker never calls mprotect.
            assert!(rules.iter().any(|rule| rule["syscall"] == call) || name == "compile");
            for rule in rules.iter().filter(|rule| rule["syscall"] == call) {
                let masked = |argument: &Value| {
                    argument["index"] == 2
                        && argument["op"]["masked_eq"].as_u64().is_some_and(|mask| mask & 4 == 4)
                        && argument["val"] == 0
                };
                let arguments = rule["args"].as_array().unwrap();
                assert!(arguments.iter().any(masked), "{name}: {call} may take PROT_EXEC");
            }
        }
        for call in ["pkey_mprotect", "remap_file_pages", "shmat", "personality"] {
            assert!(!rules.iter().any(|rule| rule["syscall"] == call), "{name}: {call}");
        }
    }
}
