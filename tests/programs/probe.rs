//! Stands in for the worker and attacks, from within the confinement that ships.
//!
//! It goes down the same steps by the same functions. Its "module" is a text of words: which
//! layers are left out, and in the compile role which attempt is made; in the other roles the
//! policy's settings say which attempt is made, and when: by a worker that loads, by one that
//! serves, by a zygote, or by what was forked from one. What came of it is told as the reason
//! why the policy can't serve. Without an attempt it answers like any policy.

#[expect(dead_code, reason = "the suite uses the other part")]
#[path = "probe/attempts.rs"]
mod attempts;

use std::io::Write as _;
use std::mem::ManuallyDrop;
use std::process::ExitCode;

use conclave_ipc::channel::WorkerEnd;
use conclave_ipc::layers::{Layer, Layers};
use conclave_ipc::limits::SERVE_OVERHEAD_BYTES;
use conclave_ipc::message::{
    Confinement, FaultClass, ModuleFacts, ModuleShape, Operation, Reply, Request,
};
use conclave_ipc::{IMAGE_FD, Role};
use conclave_worker::confine::{self, Arguments, Confined, Ladder, Side, Zygote};
use conclave_worker::{BoundedAllocator, Socket};
use serde_json::Value;

use attempts::kernel;

/// What the module says.
#[derive(Debug, Default)]
struct Orders {
    /// The layers that are left out.
    without: Layers,
    /// The attempt of the compile role.
    attempt: Option<String>,
    text: String,
}

impl Orders {
    /// Reads the image, without moving in it and before anything is locked.
    fn read() -> Self {
        let mut bytes = [0_u8; 256];
        let read = kernel::call!(libc::SYS_pread64, IMAGE_FD, bytes.as_mut_ptr(), bytes.len(), 0);
        let text = read.ok().and_then(|length| bytes.get(..length)).unwrap_or_default();
        let text = String::from_utf8_lossy(text).into_owned();
        let fields = |name| text.lines().filter_map(move |line| line.strip_prefix(name));
        let named = |name: &str| Layer::ALL.into_iter().find(|layer| layer.name() == name);
        Self {
            without: fields("without: ").filter_map(named).collect(),
            attempt: fields("attempt: ").next().map(ToOwned::to_owned),
            text,
        }
    }

    /// The report of a worker that has left out nothing: a weaker one would be refused.
    fn claim(&self, report: Confinement) -> Confinement {
        Confinement { layers: report.layers.union(self.without), ..report }
    }
}

impl Ladder for Orders {
    fn has(&self, layer: Layer) -> bool {
        !self.without.contains(layer)
    }
}

#[global_allocator]
static ALLOCATOR: BoundedAllocator = BoundedAllocator;

type Channel = WorkerEnd<Socket>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            drop(writeln!(std::io::stderr(), "red-team-probe: {what}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let arguments =
        Arguments::parse(std::env::args().skip(1)).ok_or("started by conclave alone")?;
    let socket = confine::channel().map_err(|error| format!("no channel: {error}"))?;
    let mut channel = WorkerEnd::new(Socket::new(socket));
    let orders = Orders::read();
    attempts::look_around();
    // So that the same descriptors are open.
    let _engine = ManuallyDrop::new(conclave_worker::engine().map_err(|error| error.to_string())?);
    let confined = confine::lock(&arguments, &orders).map_err(|error| {
        let message = error.to_string();
        drop(channel.send(&fault(&message)));
        message
    })?;
    channel
        .send(&Reply::Confined(orders.claim(confined.report())))
        .map_err(|error| error.to_string())?;
    match arguments.role {
        Role::Compile => compile(&orders, &confined, &mut channel),
        Role::Serve | Role::Snapshot => serve(&orders, confined, &mut channel),
    }
}

fn fault(message: &str) -> Reply<'_> {
    Reply::Fault { id: None, class: FaultClass::Link, message }
}

fn compile(orders: &Orders, confined: &Confined, channel: &mut Channel) -> Result<(), String> {
    if channel.receive().map_err(|error| error.to_string())? != Request::Compile {
        return Err("not asked to compile".to_owned());
    }
    if let Some(attempt) = &orders.attempt {
        return channel.send(&fault(&outcome(attempt))).map_err(|error| error.to_string());
    }
    let mut output = ManuallyDrop::new(confined.output().map_err(|error| error.to_string())?);
    output.write_all(orders.text.as_bytes()).map_err(|error| error.to_string())?;
    let metadata = harness::metadata("kubewarden-wapc");
    let facts =
        ModuleFacts { shape: ModuleShape::Wapc, runs_at_instantiation: false, obstacle: None };
    let compiled = Reply::Compiled {
        code_bytes: orders.text.len() as u64,
        metadata: Some(metadata.as_bytes()),
        facts,
    };
    channel.send(&compiled).map_err(|error| error.to_string())
}

/// What the policy's settings say.
struct Mission {
    settings: Value,
}

impl Mission {
    /// The attempt that is made by a worker with this role.
    fn at(&self, role: &str) -> Option<&str> {
        let word = |name: &str| self.settings.get(name).and_then(Value::as_str);
        word("attempt").filter(|_| word("role") == Some(role))
    }
}

fn serve(orders: &Orders, confined: Confined, channel: &mut Channel) -> Result<(), String> {
    let Request::Load(load) = channel.receive().map_err(|error| error.to_string())? else {
        return Err("not asked to load".to_owned());
    };
    let mission = Mission { settings: serde_json::from_slice(load.settings).unwrap_or_default() };
    let data_bytes_max = load.memory_bytes_max.saturating_add(SERVE_OVERHEAD_BYTES);
    let processes_max = load.processes_max;
    if let Some(attempt) = mission.at("load") {
        return channel.send(&fault(&outcome(attempt))).map_err(|error| error.to_string());
    }
    let code = Some(kernel::spare_code_page());
    if processes_max > 0 {
        let zygote = confined.seal_zygote(data_bytes_max, processes_max, code, orders);
        let zygote = zygote.map_err(|error| error.to_string())?;
        channel
            .send(&Reply::Loaded(orders.claim(zygote.report())))
            .map_err(|error| error.to_string())?;
        return start(orders, &mission, &zygote, channel);
    }
    let sealed = confined.seal(data_bytes_max, code, orders).map_err(|error| error.to_string())?;
    channel
        .send(&Reply::Loaded(orders.claim(sealed.report())))
        .map_err(|error| error.to_string())?;
    evaluate(&mission, channel)
}

fn evaluate(mission: &Mission, channel: &mut Channel) -> Result<(), String> {
    loop {
        let (id, operation) = match channel.receive().map_err(|error| error.to_string())? {
            Request::Evaluate { id, operation: Operation::ValidateSettings } => (id, true),
            Request::Evaluate { id, operation: Operation::Validate(_) } => (id, false),
            _ => return Err("not asked to evaluate".to_owned()),
        };
        let response = match (mission.at("serve"), operation) {
            (Some(attempt), true) => {
                format!(r#"{{"valid":false,"message":"{}"}}"#, outcome(attempt))
            }
            (None, true) => r#"{"valid":true}"#.to_owned(),
            (_, false) => r#"{"accepted":true}"#.to_owned(),
        };
        let verdict =
            Reply::Verdict { id, response: response.as_bytes(), diagnostics: b"", guest_micros: 0 };
        channel.send(&verdict).map_err(|error| error.to_string())?;
    }
}

/// Does as a zygote does, whose guest is the attacker, or else what was forked from it.
fn start(
    orders: &Orders,
    mission: &Mission,
    zygote: &Zygote,
    channel: &mut Channel,
) -> Result<(), String> {
    let Request::Start { .. } = channel.receive().map_err(|error| error.to_string())? else {
        return Err("not asked to start".to_owned());
    };
    if let Some(attempt) = mission.at("zygote") {
        return channel.send(&fault(&outcome(attempt))).map_err(|error| error.to_string());
    }
    let started = Reply::Started { start_micros: 0, memory_bytes: 0 };
    channel.send(&started).map_err(|error| error.to_string())?;
    channel.stream_mut().take_descriptors(true);
    loop {
        let reap = match channel.receive().map_err(|error| error.to_string())? {
            Request::Fork => None,
            Request::Reap { child } => Some(child),
            _ => return Err("not asked to fork".to_owned()),
        };
        let reply = if let Some(child) = reap {
            // As a zygote does: what lives is not reaped, and nothing is lost.
            match confine::reap(child) {
                Ok(status) => Reply::Reaped { status },
                Err(_) => fault("it lives"),
            }
        } else {
            let theirs = channel.stream_mut().descriptor().ok_or("no channel to fork with")?;
            match zygote.fork(theirs, orders).map_err(|error| error.to_string())? {
                Side::Zygote { child } => Reply::Forked { child },
                Side::Worker(sealed) => {
                    let sealed = sealed.map_err(|error| error.to_string())?;
                    channel.stream_mut().take_descriptors(false);
                    let told = mission.at("forked").map(outcome);
                    let first = told
                        .as_deref()
                        .map_or_else(|| Reply::Loaded(orders.claim(sealed.report())), fault);
                    channel.send(&first).map_err(|error| error.to_string())?;
                    return evaluate(mission, channel);
                }
            }
        };
        channel.send(&reply).map_err(|error| error.to_string())?;
    }
}

/// Makes an attempt and says what came of it. `call/NUMBER` is a system call without arguments.
fn outcome(id: &str) -> String {
    let number = id.strip_prefix("call/").and_then(|number| number.parse().ok());
    let gain = match (number, attempts::all().find(|attempt| attempt.id == id)) {
        (Some(number), _) => kernel::make_call(number, &[]),
        (None, Some(attempt)) => (attempt.run)(),
        (None, None) => return format!("outcome: no attempt {id}"),
    };
    match gain {
        Ok(_) => "outcome: succeeded".to_owned(),
        Err(error) => format!("outcome: {error:?}"),
    }
}
