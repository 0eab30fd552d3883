//! Rego policies: modules that OPA compiled, by version 1 of its WebAssembly ABI.
//!
//! An instance is made ready once: the numbers of its builtins and entrypoints are read, and
//! its data is parsed. Every question continues from there. It goes through the ABI's
//! evaluation context, which all minor versions have, and not through `opa_eval`, which keeps
//! the code to itself that an evaluation ends with.
#![forbid(unsafe_code)]

mod builtins;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use conclave_ipc::limits::{LOG_BYTES_MAX, MESSAGE_BYTES_MAX, RESPONSE_BYTES_MAX};
use conclave_ipc::message::{Contract, FaultClass, Load, LogStream};
use serde_json::Value;
use wasmtime::{
    AsContextMut, Caller, Error, Linker, Memory, Result, Store, TypedFunc, Val, WasmParams,
    WasmResults,
};

use super::arena::Arena;
use super::guest::Guest;
use super::instance::Live;
use super::memory::{self, unsigned};
use super::{Fault, Job, Outcome, Question};
use crate::session::Session;
use builtins::{Evaluation, Failure};

/// The export that makes a module an evaluator of Rego.
pub(super) const ENTRY: &str = "eval";

/// Where modules import from.
const MODULE: &str = "env";

/// Minor versions of the ABI that are known; each adds exports.
const MINOR_VERSION_MAX: i32 = 3;

/// What most evaluations allocate at most.
const ROOM_BYTES: i32 = 512 << 10;

/// The address of a value that is not there.
const UNDEFINED: i32 = 0;

/// The builtin that says something, as far as anybody listens.
const TRACE: &str = "trace";

/// Makes `serde_json` take the text of a value for the value.
const RAW_VALUE_KEY: &str = "$serde_json::private::RawValue";

/// How a policy is to be evaluated.
#[derive(Debug)]
pub(super) struct Rules {
    contract: Contract,
    entrypoint: Option<String>,
    strict_builtin_errors: bool,
}

impl Rules {
    pub(super) fn of(load: &Load<'_>) -> Self {
        Self {
            contract: load.contract,
            entrypoint: load.entrypoint.map(str::to_owned),
            strict_builtin_errors: load.strict_builtin_errors,
        }
    }
}

/// What builtins are called with.
pub(super) struct Host {
    abi: Arc<Abi>,
    builtins: BTreeMap<i32, String>,
    strict_builtin_errors: bool,
    evaluation: Evaluation,
}

/// An instance whose data is parsed.
#[derive(Debug)]
pub(super) struct Ready {
    live: Live,
    abi: Arc<Abi>,
    data: i32,
    entrypoint: i32,
}

impl Ready {
    /// Makes an instance ready.
    ///
    /// # Errors
    /// It is not what OPA compiles, needs what is not there, or breaks.
    pub(super) fn begin(
        mut live: Live,
        rules: &Rules,
        settings: &[u8],
        session: &Session,
    ) -> Result<Self, Fault> {
        require_version(&mut live)?;
        let abi = Arc::new(
            Abi::of(&mut live)
                .map_err(|error| Fault::new(FaultClass::Link, format!("{error:#}")))?,
        );
        let broken = |error: Error| Fault::of_guest(&error, session);
        let builtins = abi.numbers(&abi.builtins, &mut live.store).map_err(broken)?;
        let unknown = list(builtins.keys().filter(|name| !builtins::is_known(name)));
        if !unknown.is_empty() {
            let message = format!("the module needs builtins that are not available: {unknown}");
            return Err(Fault::new(FaultClass::Link, message));
        }
        let entrypoints = abi.numbers(&abi.entrypoints, &mut live.store).map_err(broken)?;
        let entrypoint = choose(&entrypoints, rules.entrypoint.as_deref())?;
        let data = match rules.contract {
            Contract::Opa => settings,
            Contract::Gatekeeper | Contract::Wapc | Contract::Wasi => b"{}",
        };
        let data = abi.parse(&mut live.store, data).map_err(broken)?;
        abi.make_room(&mut live.store).map_err(broken)?;
        live.store.data_mut().rego = Some(Box::new(Host {
            abi: Arc::clone(&abi),
            builtins: builtins.into_iter().map(|(name, number)| (number, name)).collect(),
            strict_builtin_errors: rules.strict_builtin_errors,
            evaluation: Evaluation::new(),
        }));
        Ok(Self { live, abi, data, entrypoint })
    }

    pub(super) fn keep(&mut self, arena: &Arena) -> Result<()> {
        self.live.keep(arena)
    }

    pub(super) fn set_back(&mut self, arena: &Arena) -> Result<()> {
        self.live.set_back(arena)
    }

    /// Asks it.
    pub(super) fn ask(&mut self, job: &Job, session: &Session) -> Outcome {
        let verdict = |response| Outcome::Verdict { response, diagnostics: Vec::new() };
        if matches!(job.question, Question::ValidateSettings) {
            return verdict(br#"{"valid":true}"#.to_vec());
        }
        if let Some(host) = &mut self.live.store.data_mut().rego {
            host.evaluation = Evaluation::new();
        }
        match self.evaluate(&job.payload) {
            Ok(Ok(response)) => verdict(response),
            Ok(Err(code)) => Outcome::Failure(format!("the evaluation ended with code {code}")),
            Err(error) => match error.downcast_ref::<BuiltinError>() {
                Some(error) => Outcome::Failure(error.to_string()),
                None => Outcome::Fault(Fault::of_guest(&error, session)),
            },
        }
    }

    /// The set of results as JSON, or the code that the evaluation ended with instead.
    fn evaluate(&mut self, input: &[u8]) -> Result<Result<Vec<u8>, i32>> {
        let Self { live: Live { store, .. }, abi, data, entrypoint } = self;
        let input = abi.parse(&mut *store, input)?;
        let context = abi.context.call(&mut *store, ())?;
        abi.set_input.call(&mut *store, (context, input))?;
        abi.set_data.call(&mut *store, (context, *data))?;
        abi.set_entrypoint.call(&mut *store, (context, *entrypoint))?;
        let code = abi.eval.call(&mut *store, context)?;
        if code != 0 {
            return Ok(Err(code));
        }
        let results = abi.result.call(&mut *store, context)?;
        Ok(Ok(abi.dump(&mut *store, results)?.to_vec()))
    }
}

fn require_version(live: &mut Live) -> Result<(), Fault> {
    let mut version = |name| match live.instance.get_global(&mut live.store, name) {
        Some(global) => match global.get(&mut live.store) {
            Val::I32(version) => Some(version),
            _ => None,
        },
        None => None,
    };
    let (major, minor) =
        (version("opa_wasm_abi_version"), version("opa_wasm_abi_minor_version").unwrap_or(0));
    match major {
        Some(1) if (0..=MINOR_VERSION_MAX).contains(&minor) => Ok(()),
        Some(major) => Err(Fault::new(
            FaultClass::Link,
            format!(
                "the module is for version {major}.{minor} of OPA's ABI; 1.0 to 1.{MINOR_VERSION_MAX} are known"
            ),
        )),
        None => {
            Err(Fault::new(FaultClass::Link, "the module does not export opa_wasm_abi_version"))
        }
    }
}

/// The number of the entrypoint with that name, or the first one.
fn choose(entrypoints: &BTreeMap<String, i32>, name: Option<&str>) -> Result<i32, Fault> {
    let chosen = match name {
        Some(name) => entrypoints.get(name).copied(),
        None => entrypoints.values().copied().find(|number| *number == 0),
    };
    chosen.ok_or_else(|| {
        let (wanted, there) = (name.unwrap_or("with the number 0"), list(entrypoints.keys()));
        let message = format!("the module has no entrypoint {wanted}; there are: {there}");
        Fault::new(FaultClass::Link, message)
    })
}

fn list<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// What the host uses of a module.
struct Abi {
    memory: Memory,
    builtins: TypedFunc<(), i32>,
    entrypoints: TypedFunc<(), i32>,
    heap: TypedFunc<(), i32>,
    set_heap: TypedFunc<i32, ()>,
    malloc: TypedFunc<i32, i32>,
    json_parse: TypedFunc<(i32, i32), i32>,
    json_dump: TypedFunc<i32, i32>,
    context: TypedFunc<(), i32>,
    set_input: TypedFunc<(i32, i32), ()>,
    set_data: TypedFunc<(i32, i32), ()>,
    set_entrypoint: TypedFunc<(i32, i32), ()>,
    eval: TypedFunc<i32, i32>,
    result: TypedFunc<i32, i32>,
}

impl fmt::Debug for Abi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Abi").finish_non_exhaustive()
    }
}

impl Abi {
    fn of(live: &mut Live) -> Result<Self> {
        let memory = live
            .instance
            .get_memory(&mut live.store, "memory")
            .ok_or_else(|| Error::msg("the module exports no memory"))?;
        Ok(Self {
            memory,
            builtins: function(live, "builtins")?,
            entrypoints: function(live, "entrypoints")?,
            heap: function(live, "opa_heap_ptr_get")?,
            set_heap: function(live, "opa_heap_ptr_set")?,
            malloc: function(live, "opa_malloc")?,
            json_parse: function(live, "opa_json_parse")?,
            json_dump: function(live, "opa_json_dump")?,
            context: function(live, "opa_eval_ctx_new")?,
            set_input: function(live, "opa_eval_ctx_set_input")?,
            set_data: function(live, "opa_eval_ctx_set_data")?,
            set_entrypoint: function(live, "opa_eval_ctx_set_entrypoint")?,
            eval: function(live, ENTRY)?,
            result: function(live, "opa_eval_ctx_get_result")?,
        })
    }

    /// The names and numbers in the object that one of these functions gives.
    fn numbers(
        &self,
        function: &TypedFunc<(), i32>,
        store: &mut Store<Guest>,
    ) -> Result<BTreeMap<String, i32>> {
        let object = function.call(&mut *store, ())?;
        let text = self.dump(store, object)?;
        serde_json::from_slice(text).map_err(|error| {
            Error::msg(format!("builtins or entrypoints are not names with numbers: {error}"))
        })
    }

    /// Has the module's memory grow for what an evaluation will allocate: memory that is there
    /// when its state is kept costs less in each request than memory that is gained.
    fn make_room(&self, store: &mut Store<Guest>) -> Result<()> {
        let heap = self.heap.call(&mut *store, ())?;
        // Forgets what was freed below, which would be taken for the room.
        self.set_heap.call(&mut *store, heap)?;
        self.malloc.call(&mut *store, ROOM_BYTES)?;
        self.set_heap.call(&mut *store, heap)
    }

    /// The address of the value that this JSON is the text of.
    fn parse(&self, mut store: impl AsContextMut<Data = Guest>, text: &[u8]) -> Result<i32> {
        let length = i32::try_from(text.len())?;
        // Not freed: all of it is gone after the request, and data is parsed once.
        let address = self.malloc.call(&mut store, length)?;
        memory::write(self.memory.data_mut(&mut store), unsigned(address), text)?;
        let value = self.json_parse.call(&mut store, (address, length))?;
        if value == UNDEFINED {
            return Err(Error::msg("the module can't parse JSON"));
        }
        Ok(value)
    }

    /// The text of the value at this address, as JSON.
    fn dump<'a, S>(&self, store: &'a mut S, value: i32) -> Result<&'a [u8]>
    where
        S: AsContextMut<Data = Guest>,
    {
        let address = self.json_dump.call(&mut *store, value)?;
        let (data, guest) = self.memory.data_and_store_mut(store.as_context_mut());
        memory::until_zero(data, unsigned(address), RESPONSE_BYTES_MAX)?.ok_or_else(|| {
            let message = format!("response limit of {RESPONSE_BYTES_MAX} bytes exceeded");
            Error::new(guest.session.breach(FaultClass::Output, message))
        })
    }

    /// The value at this address.
    fn value(&self, caller: &mut Caller<'_, Guest>, address: i32) -> Result<Value> {
        let unreadable = |error: &dyn fmt::Display| {
            Error::msg(format!("a builtin is called with what is no JSON: {error}"))
        };
        let text =
            str::from_utf8(self.dump(caller, address)?).map_err(|error| unreadable(&error))?;
        // The guest's idea of it would be another one. Nobody has a use for such a key.
        if text.contains(RAW_VALUE_KEY) {
            return Err(Error::msg("a builtin is called with a key that is reserved"));
        }
        serde_json::from_str(text).map_err(|error| unreadable(&error))
    }
}

fn function<P: WasmParams, R: WasmResults>(live: &mut Live, name: &str) -> Result<TypedFunc<P, R>> {
    live.instance
        .get_typed_func(&mut live.store, name)
        .map_err(|error| error.context(format!("the module is not like OPA's: {name}")))
}

/// A builtin that failed where that ends the evaluation.
#[derive(Debug)]
struct BuiltinError(String);

impl fmt::Display for BuiltinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BuiltinError {}

/// Adds what modules import.
///
/// # Errors
/// A name is defined twice, which would be a mistake here.
pub(super) fn link(linker: &mut Linker<Guest>) -> Result<()> {
    linker
        .func_wrap(MODULE, "opa_abort", abort)?
        .func_wrap(MODULE, "opa_println", print)?
        .func_wrap(MODULE, "opa_builtin0", |caller: Caller<'_, Guest>, number: i32, _: i32| {
            builtin(caller, number, &[])
        })?
        .func_wrap(
            MODULE,
            "opa_builtin1",
            |caller: Caller<'_, Guest>, number: i32, _: i32, a: i32| builtin(caller, number, &[a]),
        )?
        .func_wrap(
            MODULE,
            "opa_builtin2",
            |caller: Caller<'_, Guest>, number: i32, _: i32, a: i32, b: i32| {
                builtin(caller, number, &[a, b])
            },
        )?
        .func_wrap(
            MODULE,
            "opa_builtin3",
            |caller: Caller<'_, Guest>, number: i32, _: i32, a: i32, b: i32, c: i32| {
                builtin(caller, number, &[a, b, c])
            },
        )?
        .func_wrap(
            MODULE,
            "opa_builtin4",
            |caller: Caller<'_, Guest>, number: i32, _: i32, a: i32, b: i32, c: i32, d: i32| {
                builtin(caller, number, &[a, b, c, d])
            },
        )?;
    Ok(())
}

/// The text at this address, as far as it is of use.
fn said(caller: &mut Caller<'_, Guest>, address: i32, bytes_max: usize) -> Result<Vec<u8>> {
    let (data, _) = memory::split(caller)?;
    let pointer = unsigned(address);
    match memory::until_zero(data, pointer, bytes_max)? {
        Some(text) => Ok(text.to_vec()),
        None => memory::slice(data, pointer, u32::try_from(bytes_max)?).map(<[u8]>::to_vec),
    }
}

fn abort(mut caller: Caller<'_, Guest>, address: i32) -> Result<()> {
    let message = said(&mut caller, address, MESSAGE_BYTES_MAX)?;
    Err(Error::msg(format!("aborted: {}", String::from_utf8_lossy(&message))))
}

fn print(mut caller: Caller<'_, Guest>, address: i32) -> Result<()> {
    let text = said(&mut caller, address, LOG_BYTES_MAX)?;
    caller.data().session.log(LogStream::Console, &text);
    Ok(())
}

fn builtin(mut caller: Caller<'_, Guest>, number: i32, arguments: &[i32]) -> Result<i32> {
    // Gone while one is under way: what the module does for it calls none.
    let Some(mut host) = caller.data_mut().rego.take() else {
        return Err(Error::msg("a builtin is called out of turn"));
    };
    let value = host.call(&mut caller, number, arguments);
    caller.data_mut().rego = Some(host);
    value
}

impl Host {
    fn call(
        &mut self,
        caller: &mut Caller<'_, Guest>,
        number: i32,
        arguments: &[i32],
    ) -> Result<i32> {
        let Some(name) = self.builtins.get(&number) else {
            return Err(Error::msg(format!("there is no builtin with the number {number}")));
        };
        let arguments = arguments
            .iter()
            .map(|address| self.abi.value(caller, *address))
            .collect::<Result<Vec<_>>>()?;
        if let (TRACE, [Value::String(note)]) = (name.as_str(), arguments.as_slice()) {
            caller.data().session.log(LogStream::Console, note.as_bytes());
        }
        match builtins::call(&mut self.evaluation, name, &arguments) {
            Ok(Some(value)) => self.abi.parse(caller, &serde_json::to_vec(&value)?),
            Ok(None) => Ok(UNDEFINED),
            Err(Failure::Error(_)) if !self.strict_builtin_errors => Ok(UNDEFINED),
            Err(Failure::Error(message) | Failure::Unsupported(message)) => {
                Err(Error::new(BuiltinError(format!("{name}: {message}"))))
            }
        }
    }
}
