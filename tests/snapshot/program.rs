//! Small programs in WebAssembly text, each with what its requests are to be answered.

use harness::{metadata, metadata_section};

const WASI: &str = include_str!("wasi.wat");
const WAPC: &str = include_str!("wapc.wat");

/// How the templates import `proc_exit`.
const EXIT: &str = r#"(import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))"#;

/// A program to be served as a policy.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) module: Vec<u8>,
    pub(crate) verdict: Verdict,
    pub(crate) kept: Kept,
    pub(crate) timeout_seconds: f32,
    /// How many requests it is asked.
    pub(crate) requests: usize,
}

/// What the requests to a program are answered.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verdict {
    /// They are accepted with that number about the document that the program reads, or
    /// rejected with a message that has this text.
    Says(fn(&[u8]) -> Result<u64, &'static str>),
    /// They are accepted with one and the same number, whatever it is.
    Same,
}

/// Whether a program can be started once for all requests.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kept {
    Yes,
    /// It can't, and this is in the reason.
    No(&'static str),
    /// Both are sound.
    Either,
}

impl Program {
    /// A WASI command with that code before its answer.
    pub(crate) fn wasi(name: &'static str, code: &str, verdict: Verdict) -> Self {
        Self::wasi_with(name, "", code, verdict)
    }

    /// The same with further fields of the module.
    pub(crate) fn wasi_with(
        name: &'static str,
        fields: &str,
        code: &str,
        verdict: Verdict,
    ) -> Self {
        Self::of_text(name, "wasi", &fill(WASI, &[("FIELDS", fields), ("CODE", code)]), verdict)
    }

    /// A WASI command that ends by returning, and can't do it otherwise.
    pub(crate) fn wasi_without_exit(name: &'static str, code: &str, verdict: Verdict) -> Self {
        let text = fill(WASI, &[("FIELDS", ""), ("CODE", code)]);
        let import = "\n  ".to_owned() + EXIT;
        assert!(text.contains(&import));
        let text = text.replace(&import, "").replace("(call $proc_exit (i32.const 0))", "(return)");
        Self::of_text(name, "wasi", &text, verdict)
    }

    /// A waPC guest with that code before its answer, when its request is there.
    pub(crate) fn wapc(name: &'static str, code: &str, verdict: Verdict) -> Self {
        Self::wapc_with(name, "", "", code, verdict)
    }

    /// The same with code for its initialisation and further fields of the module.
    pub(crate) fn wapc_with(
        name: &'static str,
        fields: &str,
        init: &str,
        code: &str,
        verdict: Verdict,
    ) -> Self {
        let text = fill(WAPC, &[("FIELDS", fields), ("INIT", init), ("CODE", code)]);
        Self::of_text(name, "kubewarden-wapc", &text, verdict)
    }

    fn of_text(name: &'static str, mode: &str, text: &str, verdict: Verdict) -> Self {
        let mut module = wat::parse_str(text).unwrap_or_else(|error| panic!("{name}: {error}"));
        module.extend(metadata_section(&metadata(mode)));
        // Long enough for a busy machine: what waits for a deadline sets a shorter one.
        Self { name, module, verdict, kept: Kept::Yes, timeout_seconds: 20.0, requests: usize::MAX }
    }

    /// The same program, which can't be started once for all requests.
    pub(crate) fn not_kept(mut self, why: &'static str) -> Self {
        self.kept = Kept::No(why);
        self
    }

    /// The same program, for which either is sound.
    pub(crate) fn perhaps_kept(mut self) -> Self {
        self.kept = Kept::Either;
        self
    }

    /// The same program, which is asked twice: each time costs a worker, and those that never
    /// do anything else are replaced more and more slowly.
    pub(crate) fn briefly(mut self) -> Self {
        self.requests = 2;
        self
    }

    /// Whether the daemon refuses to serve it when it is to be started like this.
    pub(crate) fn is_refused_under(&self, start: &str) -> bool {
        start == "snapshot" && matches!(self.kept, Kept::No(_))
    }

    /// The same program with a deadline that a test can wait for.
    pub(crate) fn hurried(mut self) -> Self {
        self.timeout_seconds = 0.5;
        self
    }
}

fn fill(template: &str, places: &[(&str, &str)]) -> String {
    places.iter().fold(template.to_owned(), |text, (place, filling)| {
        let place = format!(";; {place}\n");
        assert_eq!(text.matches(&place).count(), 1, "{place}");
        text.replace(&place, &format!("{filling}\n"))
    })
}

/// What the templates say about bytes: FNV-1a.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// What the templates say about a request, and this text if it asks for trouble.
pub(crate) fn unless_bad(document: &[u8], text: &'static str) -> Result<u64, &'static str> {
    if document.get(12) == Some(&b'!') { Err(text) } else { Ok(hash(document)) }
}
