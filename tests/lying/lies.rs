//! The lies: what each is called, when it is told, how, and what has to come of it.
//!
//! How a lie is told is a script for the lying worker, see `programs/liar.rs`.

use End::{Accepted, Misreported, NeverServes, Rejected, Unheard, Unreadable};

/// What has to come of a lie.
#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    /// The policy does not serve, for this reason.
    NeverServes(&'static str),
    /// The request that met the lie is rejected with the first text; the worker is ended, and
    /// the log says the second.
    Rejected(&'static str, &'static str),
    /// No request meets the lie: the worker is ended before the next one, and the log says so.
    Unheard(&'static str),
    /// The worker is ended by the test, and the log says this of its zygote, which is ended
    /// for what it says of it.
    Misreported(&'static str),
    /// The protocol permits it, but it is no verdict: the request is rejected.
    Unreadable,
    /// It has no effect at all.
    Accepted,
}

/// One lie.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lie {
    pub(crate) name: &'static str,
    pub(crate) stage: &'static str,
    pub(crate) script: &'static str,
    pub(crate) end: End,
}

const fn lie(name: &'static str, stage: &'static str, script: &'static str, end: End) -> Lie {
    Lie { name, stage, script, end }
}

/// A lie about a request, after which the client learns no more than that.
const fn lost(name: &'static str, script: &'static str, log: &'static str) -> Lie {
    lie(name, "validate", script, Rejected(LOST, log))
}

/// A lie about a request that costs it its deadline.
const fn late(name: &'static str, stage: &'static str, script: &'static str) -> Lie {
    lie(name, stage, script, Rejected(DEADLINE, LATE))
}

/// A lie told by the second worker of a policy, before it serves.
const fn heir(
    name: &'static str,
    stage: &'static str,
    script: &'static str,
    log: &'static str,
) -> Lie {
    lie(name, stage, script, Unheard(log))
}

/// What clients are told about a worker that broke the protocol or died.
const LOST: &str = "internal server error: the policy's worker was lost";

/// What clients are told about a deadline.
pub(crate) const DEADLINE: &str =
    "Policy execution interrupted because it exceeded the allowed execution time";

/// What the log says about one.
const LATE: &str = "worker missed its deadline";
const COMPILED_LATE: &str = "compilation took longer than its limit";

// What else the log says.
const MORE: &str = "worker broke the protocol: more after its last word";
const UNASKED: &str = "worker broke the protocol: spoke without being asked";
const NO_MESSAGE: &str = "worker broke the protocol: frame does not encode a message";
const TRAILING: &str = "worker broke the protocol: frame has 1 bytes after its message";
const TOO_LONG: &str = "worker broke the protocol: frame of 4294967295 bytes exceeds the limit";
const OVER: &str =
    "worker broke the protocol: frame of 16859137 bytes exceeds the limit of 16859136";
const OUTPUT: &str = "worker broke the protocol: output beyond the limit";
const CALLS: &str = "worker broke the protocol: host calls beyond the limit";
const LARGE_CALL: &str = "worker broke the protocol: host call beyond the limit";
const ABSURD: &str = "worker broke the protocol: absurd report of a start";
const UNSEALED: &str = "memory file for the guest can't be made or sealed";
const NOT_FORKED: &str = "worker broke the protocol: a process that was not forked from it";
const CHANNEL: &str = "channel to the worker failed";
const WEAK: &str = "worker lacks layers of the sandbox: ";
const OTHER_LENGTH: &str = "compiler announced code of another length";
const DONE: &str = "ended as asked";
const PANICKED: &str = "panicked";
const CODE_255: &str = "exited with code 255";
const SEGV: &str = "was killed by SIGSEGV";
const FORGED: &str = "trap: innocent\n{";

/// Told before a policy serves, which it then never does.
pub(crate) const AT_THE_START: &[Lie] = &[
    // The slow ones first, so that they wait side by side.
    lie("confined-silence", "confined", "silence", NeverServes(LATE)),
    lie("confined-trickle", "confined", "trickle:fault:65536", NeverServes(LATE)),
    lie("load-silence", "load", "silence", NeverServes(LATE)),
    lie("load-half-a-frame", "load", "half:loaded", NeverServes(LATE)),
    lie("load-spins", "load", "spin", NeverServes(LATE)),
    lie("compile-confined-silence", "compile-confined", "silence", NeverServes(COMPILED_LATE)),
    lie("compile-silence", "compile", "silence", NeverServes(COMPILED_LATE)),
    lie("compile-half-a-frame", "compile", "output half:compiled", NeverServes(COMPILED_LATE)),
    lie("compile-trickle", "compile", "trickle:compiled:1/1048576", NeverServes(COMPILED_LATE)),
    // With settings that no socket's buffer holds.
    lie("settings-never-read", "confined", "confined silence", NeverServes(LATE)),
    // Instead of Confined.
    lie("confined-twice", "confined", "confined confined", NeverServes(MORE)),
    lie("confined-and-loaded", "confined", "confined loaded", NeverServes(MORE)),
    lie("confined-and-half-a-frame", "confined", "confined half:loaded", NeverServes(MORE)),
    lie("confined-and-verdict", "confined", "confined verdict:next", NeverServes(MORE)),
    lie("loaded-first", "confined", "loaded", NeverServes("unexpected Loaded")),
    lie("verdict-first", "confined", "verdict", NeverServes("unexpected Verdict")),
    lie("confined-weak", "confined", "confined:weak", NeverServes(WEAK)),
    lie("confined-too-long", "confined", "announce:4294967295", NeverServes(TOO_LONG)),
    lie("confined-garbage", "confined", "body:7,255,255,1,2,3", NeverServes(NO_MESSAGE)),
    lie("confined-close", "confined", "close", NeverServes(CHANNEL)),
    lie("confined-exit-0", "confined", "exit:0", NeverServes(DONE)),
    lie("confined-exit-101", "confined", "exit:101", NeverServes(PANICKED)),
    lie("confined-exit-255", "confined", "exit:255", NeverServes(CODE_255)),
    lie("confined-segv", "confined", "segv", NeverServes(SEGV)),
    // Instead of Loaded.
    lie("loaded-twice", "load", "loaded loaded", NeverServes(MORE)),
    lie("loaded-and-verdict", "load", "loaded verdict:next", NeverServes(MORE)),
    lie("loaded-weak", "load", "loaded:weak", NeverServes(WEAK)),
    lie("confined-late", "load", "confined", NeverServes("unexpected Confined")),
    lie("compiled-by-a-server", "load", "compiled", NeverServes("unexpected Compiled")),
    lie("verdict-for-load", "load", "verdict", NeverServes("unexpected Verdict")),
    lie("log-for-load", "load", "log", NeverServes("unexpected Log")),
    lie("trace-for-load", "load", "trace", NeverServes("unexpected Trace")),
    lie("call-for-load", "load", "call", NeverServes("unexpected HostCall")),
    lie("load-empty-frame", "load", "announce:0", NeverServes(NO_MESSAGE)),
    lie("load-fault-forged", "load", "fault:forged", NeverServes(FORGED)),
    lie("load-fault-16-mib", "load", "fault:16777216", NeverServes("trap: xxxx")),
    lie("load-bad-code", "load", "bad-code", NeverServes("bad code: innocent")),
    lie("load-close", "load", "close", NeverServes(CHANNEL)),
    lie("load-exit-0", "load", "exit:0", NeverServes(DONE)),
    lie("load-exit-101", "load", "exit:101", NeverServes(PANICKED)),
    lie("load-exit-255", "load", "exit:255", NeverServes(CODE_255)),
    lie("load-segv", "load", "segv", NeverServes(SEGV)),
    // Instead of judging the settings.
    lie("settings-silence", "settings", "silence", NeverServes(DEADLINE)),
    lie("settings-twice", "settings", "verdict verdict", NeverServes(MORE)),
    lie("settings-of-another", "settings", "verdict:never", NeverServes("unexpected Verdict")),
    lie("settings-log-flood", "settings", "forever:log:4096", NeverServes(OUTPUT)),
    lie("settings-garbage", "settings", "body:255", NeverServes(NO_MESSAGE)),
    lie("settings-fault", "settings", "fault:forged", NeverServes("innocent\n{")),
    lie("settings-close", "settings", "close", NeverServes(CHANNEL)),
    lie("settings-exit-0", "settings", "exit:0", NeverServes(DONE)),
    lie("settings-exit-101", "settings", "exit:101", NeverServes(PANICKED)),
    lie("settings-exit-255", "settings", "exit:255", NeverServes(CODE_255)),
    lie("settings-segv", "settings", "segv", NeverServes(SEGV)),
    // Instead of compiling.
    lie("compile-confined-weak", "compile-confined", "confined:weak", NeverServes(WEAK)),
    lie("compile-confined-twice", "compile-confined", "confined confined", NeverServes(MORE)),
    lie("compiled-unasked", "compile-confined", "confined compiled", NeverServes(MORE)),
    lie("compiled-twice", "compile", "output compiled compiled", NeverServes(MORE)),
    lie("loaded-by-a-compiler", "compile", "loaded", NeverServes("unexpected Loaded")),
    lie("verdict-by-a-compiler", "compile", "verdict", NeverServes("unexpected Verdict")),
    lie("log-by-a-compiler", "compile", "log", NeverServes("unexpected Log")),
    lie("compile-of-no-length", "compile", "output compiled:0", NeverServes(OTHER_LENGTH)),
    lie("compile-of-greater-length", "compile", "output compiled:4096", NeverServes(OTHER_LENGTH)),
    lie(
        "compile-of-endless-length",
        "compile",
        "output compiled:18446744073709551615",
        NeverServes(OTHER_LENGTH),
    ),
    lie(
        "compile-of-2-tib",
        "compile",
        "output:2199023255552 compiled:2199023255552",
        NeverServes(OTHER_LENGTH),
    ),
    lie(
        "compile-goes-on",
        "compile",
        "output append compiled forever:append",
        NeverServes(OTHER_LENGTH),
    ),
    lie(
        "compile-sealed",
        "compile",
        "output seal compiled",
        NeverServes("made or sealed: Operation not permitted"),
    ),
    lie(
        "metadata-over-the-limit",
        "compile",
        "output compiled:/1048577",
        NeverServes("worker broke the protocol: metadata beyond the limit"),
    ),
    lie(
        "metadata-of-16-mib",
        "compile",
        "output compiled:/16777216",
        NeverServes("worker broke the protocol: metadata beyond the limit"),
    ),
    lie(
        "metadata-malformed",
        "compile",
        "output compiled:/malformed",
        NeverServes("metadata of the policy is malformed"),
    ),
    lie(
        "metadata-surprise",
        "compile",
        "output compiled:/surprise",
        NeverServes("metadata of the policy is malformed: unknown variant `CCCC"),
    ),
    lie("compile-fault-forged", "compile", "fault:forged", NeverServes(FORGED)),
    lie("compile-fault-16-mib", "compile", "fault:16777216", NeverServes("trap: xxxx")),
    lie(
        "compile-rights",
        "compile",
        "announce:65536 forever:rights:253",
        NeverServes(COMPILED_LATE),
    ),
    lie("compile-close", "compile", "close", NeverServes(CHANNEL)),
    lie("compile-exit-0", "compile", "exit:0", NeverServes(DONE)),
    lie("compile-exit-101", "compile", "exit:101", NeverServes(PANICKED)),
    lie("compile-exit-255", "compile", "exit:255", NeverServes(CODE_255)),
    lie("compile-segv", "compile", "segv", NeverServes(SEGV)),
];

/// Told by workers of policies that serve.
pub(crate) const WHILE_SERVING: &[Lie] = &[
    // Nothing, or nothing whole.
    late("silence", "validate", "silence"),
    late("spins", "validate", "spin"),
    late("stopped", "stopped", ""),
    late("never-reads", "unread", "silence"),
    late("floods-without-reading", "unread", "forever:log:4096"),
    late("half-a-frame", "validate", "half:verdict"),
    late("half-of-16-mib", "validate", "half:verdict-of:16777216"),
    late("announces-16-mib", "validate", "announce:16777216"),
    late("half-a-length", "validate", "half:announce:1"),
    late("trickle", "validate", "trickle:verdict-of:16777216"),
    late("one-call-and-silence", "validate", "call silence"),
    // The wrong message.
    lost("confined-for-verdict", "confined", "unexpected Confined"),
    lost("loaded-for-verdict", "loaded", "unexpected Loaded"),
    lost("compiled-for-verdict", "compiled", "unexpected Compiled"),
    lost("verdict-twice", "verdict verdict", MORE),
    lost("verdict-and-failure", "verdict failure", MORE),
    lost("verdict-and-log", "verdict log", MORE),
    lost("verdict-and-call", "verdict call", MORE),
    lost("verdict-and-half-a-length", "verdict half:announce:1", MORE),
    lost("verdict-and-too-long", "verdict announce:4294967295", TOO_LONG),
    lost("failure-and-verdict", "failure verdict", MORE),
    // About another evaluation.
    lost("verdict-for-the-last", "verdict:earlier", "unexpected Verdict"),
    lost("verdict-for-the-next", "verdict:next", "unexpected Verdict"),
    lost("verdict-for-nobody", "verdict:never", "unexpected Verdict"),
    // Bytes that are no message.
    lost("too-long", "announce:4294967295", TOO_LONG),
    lost("one-too-long", "announce:over", OVER),
    lost("no-length", "announce:0", NO_MESSAGE),
    lost("garbage", "body:222,173,190,239,0,255", NO_MESSAGE),
    lost("unknown-message", "body:13", NO_MESSAGE),
    lost("message-of-64-bits", "body:253,255,255,255,255,255,255,255,255", NO_MESSAGE),
    lost("trailed", "trailed:verdict", TRAILING),
    lost("vector-of-4-gib", "body:6,1,252,255,255,255,255", NO_MESSAGE),
    lost("vector-of-16-eib", "body:6,1,253,255,255,255,255,255,255,255,255", NO_MESSAGE),
    lost("failure-not-utf-8", "spoilt:failure", NO_MESSAGE),
    lost("fault-not-utf-8", "spoilt:fault", NO_MESSAGE),
    lost("half-a-frame-and-shutdown", "half:verdict shutdown:write", CHANNEL),
    lost("half-a-frame-and-exit", "half:verdict exit:0", DONE),
    // Too much.
    lost("verdict-over-the-limit", "verdict-of:16777217", "answer beyond the limit"),
    lost("diagnostics-of-64-kib-and-1", "diagnostics:65537", "answer beyond the limit"),
    lost("failure-of-16-mib", "failure:16777216", "answer beyond the limit"),
    lost("endless-verdicts", "forever:verdict", MORE),
    lost("endless-lines", "forever:log:4096", OUTPUT),
    lost("endless-empty-lines", "forever:log:0", OUTPUT),
    lost("line-of-4-kib-and-1", "log:4097 verdict", OUTPUT),
    lost("line-of-16-mib", "log:16777216 verdict", OUTPUT),
    lost("endless-records", "forever:trace:4096", OUTPUT),
    lost("record-of-16-mib", "trace:16777000 verdict", OUTPUT),
    lost("endless-calls", "forever:call+answer", CALLS),
    late("endless-calls-without-reading", "validate", "forever:call"),
    lost("call-of-4-mib-and-1", "call-of:4194305", LARGE_CALL),
    lost("call-of-16-mib", "call-of:16777216", LARGE_CALL),
    lost("call-with-a-name-of-16-mib", "call-by-name:16777216", LARGE_CALL),
    late("one-descriptor", "validate", "rights:1"),
    late("descriptors", "validate", "rights:253"),
    late("endless-descriptors", "validate", "announce:65536 forever:rights:253"),
    // Ends.
    lost("shutdown", "shutdown:write", CHANNEL),
    lost("deaf", "shutdown:read call", CHANNEL),
    lost("close", "close", CHANNEL),
    lost("exit-0", "exit:0", DONE),
    lost("exit-101", "exit:101", PANICKED),
    lost("exit-255", "exit:255", CODE_255),
    lost("segv", "segv", SEGV),
    // Faults.
    lie(
        "fault-forged",
        "validate",
        "fault:forged",
        Rejected("internal server error: Guest call failure: innocent\n{", FORGED),
    ),
    lie(
        "fault-of-16-mib",
        "validate",
        "fault:16777216",
        Rejected("internal server error: Guest call failure: xxxx", "trap: xxxx"),
    ),
    // While nobody has asked.
    lie("idle-log", "idle", "log", Unheard(UNASKED)),
    lie("idle-trace", "idle", "trace", Unheard(UNASKED)),
    lie("idle-call", "idle", "call", Unheard(UNASKED)),
    lie("idle-verdict-again", "idle", "verdict", Unheard(UNASKED)),
    lie("idle-verdict-ahead", "idle", "verdict:next", Unheard(UNASKED)),
    lie("idle-half-a-length", "idle", "half:announce:1", Unheard(UNASKED)),
    lie("idle-too-long", "idle", "announce:4294967295", Unheard(UNASKED)),
    lie("idle-garbage", "idle", "body:255", Unheard(UNASKED)),
    lie("idle-flood", "idle", "forever:log:4096", Unheard(UNASKED)),
    lie("idle-descriptors", "idle", "forever:rights:253", Unheard(UNASKED)),
    lie("idle-shutdown", "idle", "shutdown:write", Unheard(CHANNEL)),
    lie("idle-close", "idle", "close", Unheard(CHANNEL)),
    lie("idle-exit-0", "idle", "exit:0", Unheard("idle worker (role serve) ended as asked")),
    lie("idle-exit-101", "idle", "exit:101", Unheard("idle worker (role serve) panicked")),
    lie(
        "idle-exit-255",
        "idle",
        "exit:255",
        Unheard("idle worker (role serve) exited with code 255"),
    ),
    lie("idle-segv", "idle", "segv", Unheard("idle worker (role serve) was killed by SIGSEGV")),
    lie("verdicts-of-1-gib", "validate", "forever:verdict-of:16777216", Unheard(UNASKED)),
    // What the protocol permits.
    lie("some-output", "validate", "log:4096 trace:4096 call answer log verdict go-on", Accepted),
    lie("verdict-of-16-mib", "validate", "verdict-of:16777216 go-on", Accepted),
    lie("verdict-with-descriptors", "validate", "verdict rights:253 go-on", Accepted),
    lie("verdict-not-json", "validate", "verdict-text:certainly go-on", Unreadable),
    lie("verdict-empty", "validate", "verdict-text: go-on", Unreadable),
    lie("verdict-nested", "validate", "verdict-nested:1000000 go-on", Unreadable),
];

/// Told by a worker that starts its guest once, of a policy that is to be started so.
pub(crate) const BY_STARTED: &[Lie] = &[
    // Keeps the supervisor trying for some seconds.
    lie("started-writable", "start", "map started", NeverServes(UNSEALED)),
    // Instead of Started.
    lie("started-twice", "start", "started started", NeverServes(MORE)),
    lie("started-and-verdict", "start", "started verdict:next", NeverServes(MORE)),
    lie("started-and-fault", "start", "started fault", NeverServes(MORE)),
    lie("started-with-too-much", "start", "started:0/134217729", NeverServes(ABSURD)),
    lie("started-for-ages", "start", "started:4294967295/65536", NeverServes(ABSURD)),
    lie("loaded-for-start", "start", "loaded", NeverServes("unexpected Loaded")),
    lie("verdict-for-start", "start", "verdict", NeverServes("unexpected Verdict")),
    lie("log-for-start", "start", "log", NeverServes("unexpected Log")),
    lie("call-for-start", "start", "call", NeverServes("unexpected HostCall")),
    lie("start-garbage", "start", "body:255", NeverServes(NO_MESSAGE)),
    lie("start-forges", "start", "fault:forged", NeverServes(FORGED)),
    lie("start-close", "start", "close", NeverServes(CHANNEL)),
    lie("start-exit-101", "start", "exit:101", NeverServes(PANICKED)),
    lie("start-segv", "start", "segv", NeverServes(SEGV)),
    // Instead of an answer.
    lie("start-again", "continue", "started", Rejected(LOST, "unexpected Started")),
    lie("continue-twice", "continue", "verdict verdict", Rejected(LOST, MORE)),
    lie("continue-of-another", "continue", "verdict:next", Rejected(LOST, "unexpected Verdict")),
    lie("continue-late", "continue", "silence", Rejected(DEADLINE, LATE)),
];

/// Told by a zygote, or by the first of the workers that are forked from it.
pub(crate) const BY_ZYGOTES: &[Lie] = &[
    // The slow ones first.
    lie("fork-silence", "fork", "silence", NeverServes(LATE)),
    lie("fork-half-a-frame", "fork", "half:forked", NeverServes(LATE)),
    lie("forked-without-forking", "fork", "forked:7", NeverServes(LATE)),
    lie("child-silence", "child", "silence", NeverServes(LATE)),
    // Instead of Forked.
    lie("forked-twice", "fork", "fork forked forked", NeverServes(MORE)),
    lie("forked-and-reaped", "fork", "fork forked reaped:0", NeverServes(MORE)),
    lie("forked-and-verdict", "fork", "fork forked verdict:next", NeverServes(MORE)),
    lie("reaped-for-fork", "fork", "fork reaped:0", NeverServes("unexpected Reaped")),
    lie("loaded-for-fork", "fork", "fork loaded", NeverServes("unexpected Loaded")),
    lie("fork-refused", "fork", "fault:forged", NeverServes(FORGED)),
    lie("fork-exit-255", "fork", "fork exit:255", NeverServes(CODE_255)),
    lie("fork-close", "fork", "close", NeverServes(CHANNEL)),
    lie("forked-child-4294967295", "fork", "fork forked:4294967295 go-on", Accepted),
    // Somebody else in the place of a child.
    lie("zygote-for-child", "fork", "speak:loaded forked:2", NeverServes(NOT_FORKED)),
    lie("grandchild-for-child", "fork", "fork:deep forked", NeverServes(NOT_FORKED)),
    // What a new worker says first.
    lie("child-weak", "child", "loaded:weak", NeverServes(WEAK)),
    lie("child-twice", "child", "loaded loaded", NeverServes(MORE)),
    lie("child-confined", "child", "confined", NeverServes("unexpected Confined")),
    lie("child-verdict", "child", "verdict", NeverServes("unexpected Verdict")),
    lie("child-garbage", "child", "body:255", NeverServes(NO_MESSAGE)),
    lie("child-too-long", "child", "announce:4294967295", NeverServes(TOO_LONG)),
    lie("child-forges", "child", "fault:forged", NeverServes(FORGED)),
    lie("child-exit-101", "child", "exit:101", NeverServes(PANICKED)),
    lie("child-segv", "child", "segv", NeverServes(SEGV)),
    // And later; its end is told by the zygote.
    lie("continue-exit-101", "continue", "exit:101", Rejected(LOST, PANICKED)),
    lie("continue-segv", "continue", "segv", Rejected(LOST, SEGV)),
    // How a worker has ended.
    lie("reap-silence", "reap", "silence", Misreported(LATE)),
    lie("reaped-twice", "reap", "reaped reaped:9", Misreported(MORE)),
    lie("verdict-for-reap", "reap", "verdict", Misreported("unexpected Verdict")),
    lie("reap-garbage", "reap", "body:255", Misreported(NO_MESSAGE)),
    lie("reap-exit-101", "reap", "exit:101", Misreported(PANICKED)),
];

/// Told by the worker that replaces another.
pub(crate) const BY_HEIRS: &[Lie] = &[
    heir("heir-confined-twice", "confined", "confined confined", MORE),
    heir("heir-weak", "confined", "confined:weak", WEAK),
    heir("heir-loaded-weak", "load", "loaded:weak", WEAK),
    heir("heir-garbage", "load", "body:255", NO_MESSAGE),
    heir("heir-forges", "load", "fault:forged", FORGED),
    heir("heir-fault-16-mib", "load", "fault:16777216", "trap: xxxx"),
    heir("heir-exit-101", "load", "exit:101", PANICKED),
];
