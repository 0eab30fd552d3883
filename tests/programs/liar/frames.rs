//! What a liar says: honest frames at the wrong time, and frames that are none.
#![expect(clippy::panic, reason = "a script with an error ends its liar")]

use std::io::Write;

use conclave_ipc::frame;
use conclave_ipc::layers::{Layer, Layers};
use conclave_ipc::limits::{FRAME_BYTES_MAX, REPLY_BYTES_MAX};
use conclave_ipc::message::{
    Confinement, EvaluationId, FaultClass, LogStream, ModuleFacts, ModuleShape, Reply,
};

/// What an honest policy answers to both questions.
const ACCEPTED: &[u8] = br#"{"accepted":true,"valid":true}"#;

/// A message that would like to be two lines of the log, and to clear a screen.
const FORGED: &str = "innocent\n{\"level\":\"ERROR\",\"policy\":\"honest\",\"message\":\"forged\"}\r\n\u{1b}[2Jforged\n";

/// What frames have to fit.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    /// Of the evaluation that goes on.
    pub(crate) id: u64,
    /// The worker that was forked last, or is asked about.
    pub(crate) child: u32,
    /// Of the code that was compiled.
    pub(crate) code_bytes: u64,
}

impl Frames {
    /// Appends the frame that the word stands for; whether it stands for one.
    pub(crate) fn put(&self, act: &str, out: &mut Vec<u8>) -> bool {
        let (word, argument) = act.split_once(':').unwrap_or((act, ""));
        let length = || argument.parse().unwrap_or_else(|_| panic!("{act}"));
        let long = || "x".repeat(if argument.is_empty() { 1 } else { length() });
        let id = EvaluationId(self.id);
        match word {
            "confined" => push(out, &Reply::Confined(report(argument))),
            "loaded" => push(out, &Reply::Loaded(report(argument))),
            "started" => push_started(argument, out),
            "forked" => {
                let child = if argument.is_empty() { self.child } else { number(argument) };
                push(out, &Reply::Forked { child });
            }
            // Without an argument it has to look.
            "reaped" if !argument.is_empty() => {
                push(out, &Reply::Reaped { status: number(argument).cast_signed() });
            }
            "compiled" => self.push_compiled(argument, out),
            "verdict" => push_verdict(out, self.meant(argument), ACCEPTED, ""),
            "verdict-of" => push_verdict(out, id, &padded(length()), ""),
            "verdict-text" => push_verdict(out, id, argument.as_bytes(), ""),
            "verdict-nested" => push_verdict(out, id, &nested(length()), ""),
            "diagnostics" => push_verdict(out, id, ACCEPTED, &long()),
            "failure" => push(out, &Reply::Failure { id, message: &long() }),
            "fault" => {
                let message = if argument == "forged" { FORGED.to_owned() } else { long() };
                push(
                    out,
                    &Reply::Fault { id: Some(id), class: FaultClass::Trap, message: &message },
                );
            }
            "bad-code" => {
                let class = FaultClass::BadCode;
                push(out, &Reply::Fault { id: None, class, message: FORGED });
            }
            "no-snapshot" => {
                let class = FaultClass::Snapshot;
                push(out, &Reply::Fault { id: None, class, message: "it spoke too early" });
            }
            "log" => {
                let (stream, text) = (LogStream::Console, long());
                push(out, &Reply::Log { id, stream, text: text.as_bytes() });
            }
            "trace" => push(out, &Reply::Trace { id, record: &record(&long()) }),
            "call" => push_call(out, id, "tracing", &[]),
            "call-of" => push_call(out, id, "tracing", &padded(length())),
            "call-by-name" => push_call(out, id, &long(), &[]),
            "trailed" => {
                let start = out.len();
                self.put(argument, out);
                out.push(0);
                relabel(out, start);
            }
            "spoilt" => {
                self.put(argument, out);
                out.pop();
                // In no text, and no number of a message.
                out.push(0xff);
            }
            "announce" => {
                let limit = REPLY_BYTES_MAX + 1;
                let announced = if argument == "over" { limit } else { length() };
                out.extend(u32::try_from(announced).unwrap_or(u32::MAX).to_le_bytes());
            }
            "body" => {
                let start = out.len();
                out.extend([0; 4]);
                out.extend(argument.split(',').map(|byte| byte.parse::<u8>().unwrap_or(0xff)));
                relabel(out, start);
            }
            _ => return false,
        }
        true
    }

    /// The evaluation that a word means; the present one unless it says otherwise.
    fn meant(&self, argument: &str) -> EvaluationId {
        EvaluationId(match argument {
            "earlier" => self.id.wrapping_sub(1),
            "next" => self.id.wrapping_add(1),
            "never" => u64::MAX,
            _ => self.id,
        })
    }

    fn push_compiled(&self, argument: &str, out: &mut Vec<u8>) {
        let honest = harness::metadata("kubewarden-wapc");
        let (length, metadata) = argument.split_once('/').unwrap_or((argument, ""));
        let metadata = match metadata {
            "" => honest.into_bytes(),
            "malformed" => b"{\"rules\":[{]".to_vec(),
            "surprise" => honest.replace("CREATE", &"C".repeat(1 << 19)).into_bytes(),
            bytes => vec![b' '; bytes.parse().unwrap_or_else(|_| panic!("{argument}"))],
        };
        let code_bytes = length.parse().unwrap_or(self.code_bytes);
        let facts =
            ModuleFacts { shape: ModuleShape::Wapc, runs_at_instantiation: false, obstacle: None };
        push(out, &Reply::Compiled { code_bytes, metadata: Some(&metadata), facts });
    }
}

/// So many microseconds and bytes, if it says so.
fn push_started(argument: &str, out: &mut Vec<u8>) {
    let (micros, bytes) = argument.split_once('/').unwrap_or(("0", "65536"));
    let number = |word: &str| word.parse().unwrap_or(u64::MAX);
    let start_micros = u32::try_from(number(micros)).unwrap_or(u32::MAX);
    push(out, &Reply::Started { start_micros, memory_bytes: number(bytes) });
}

fn number(argument: &str) -> u32 {
    argument.parse().unwrap_or_else(|_| panic!("{argument}"))
}

fn push(out: &mut Vec<u8>, reply: &Reply<'_>) {
    let mut bytes = Vec::new();
    frame::encode(reply, FRAME_BYTES_MAX, &mut bytes).unwrap_or_else(|error| panic!("{error}"));
    out.extend(bytes);
}

fn push_verdict(out: &mut Vec<u8>, id: EvaluationId, response: &[u8], diagnostics: &str) {
    let diagnostics = diagnostics.as_bytes();
    push(out, &Reply::Verdict { id, response, diagnostics, guest_micros: u32::MAX });
}

/// A host call that needs no grant, and that no host knows.
fn push_call(out: &mut Vec<u8>, id: EvaluationId, namespace: &str, payload: &[u8]) {
    let (binding, operation) = ("kubewarden", "lie");
    push(out, &Reply::HostCall { id, binding, namespace, operation, payload });
}

/// Corrects the length of the last frame, which begins at `start`.
fn relabel(out: &mut [u8], start: usize) {
    let body = out.len().saturating_sub(start).saturating_sub(4);
    let length = u32::try_from(body).unwrap_or(u32::MAX).to_le_bytes();
    if let Some(mut place) = out.get_mut(start..) {
        drop(place.write_all(&length));
    }
}

/// All layers, unless the word is to be weaker.
fn report(argument: &str) -> Confinement {
    let layers = if argument == "weak" { Layers::NONE } else { Layer::ALL.into_iter().collect() };
    Confinement { layers, landlock_abi: 1 }
}

/// An acceptance of exactly that many bytes.
fn padded(length: usize) -> Vec<u8> {
    let mut bytes = ACCEPTED.to_vec();
    bytes.resize(length, b' ');
    bytes
}

fn nested(depth: usize) -> Vec<u8> {
    let (open, close) = ("[".repeat(depth), "]".repeat(depth));
    format!("{{\"accepted\":true,\"mutated_object\":{open}{close}}}").into_bytes()
}

/// A log record of the right form that nobody needs to read.
fn record(message: &str) -> Vec<u8> {
    format!(r#"{{"level":"TRACE","message":"{message}"}}"#).into_bytes()
}
