//! What there is to say about a module, and whether its instances can be set back.
//!
//! An instance is set back by restoring its linear memory and the values of its mutable
//! globals. This is the closed list of what else an instance of a module can keep, with the
//! features that `policy/engine.rs` leaves on:
//!
//! - elements and sizes of its tables: `table.set`, `table.grow`, `table.fill`, `table.copy`
//!   and `table.init` change them, and the host never does;
//! - segments that were dropped: by `elem.drop` and `data.drop`, beside instantiation;
//! - memories, tables and globals of others: they would have to be imported. (What OPA compiles
//!   imports its memory; it is made to define it.)
//!
//! A module that can do any of this is told from its sections and instructions, before it
//! has run. Modules with other memories, shared or collected objects, exceptions or stacks
//! of their own are not valid here.
#![forbid(unsafe_code)]

use conclave_ipc::limits::{GLOBALS_MAX, METADATA_BYTES_MAX};
use conclave_ipc::message::{ModuleFacts, ModuleShape, Obstacle};
use wasmparser::{
    CompositeInnerType, Export, ExternalKind, FunctionBody, GlobalSectionReader,
    ImportSectionReader, MemoryType, Operator, Parser, Payload, SubType, TypeRef, ValType,
};

use super::BadModule;
use super::instrument::{Additions, Ending, MEMORY_EXPORT, OwnMemory, RESERVED, START};

/// The custom section that holds a policy's metadata; the first one counts.
const METADATA_SECTION: &str = "io.kubewarden.metadata";

const WASI: &str = "wasi_snapshot_preview1";

/// Where what OPA compiles imports its memory from.
const OPA: &str = "env";

/// What a look at a module yields.
#[derive(Debug)]
pub(super) struct Survey<'a> {
    pub(super) metadata: Option<&'a [u8]>,
    pub(super) facts: ModuleFacts,
    /// What is to be added to the module; if there is an obstacle, at most a memory.
    pub(super) additions: Option<Additions>,
}

/// Looks at a valid module; of any other it says something, or an error.
pub(super) fn survey(module: &[u8]) -> Result<Survey<'_>, BadModule> {
    let mut findings = Findings::default();
    for payload in Parser::new(0).parse_all(module) {
        findings.note(payload?)?;
    }
    findings.conclude()
}

/// The signatures that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signature {
    /// No parameter, no result: a command's.
    Command,
    /// One i32, no result: that of `proc_exit`.
    Exit,
    Other,
}

impl Signature {
    fn of(ty: &SubType) -> Self {
        match &ty.composite_type.inner {
            CompositeInnerType::Func(function) => match (function.params(), function.results()) {
                ([], []) => Self::Command,
                ([ValType::I32], []) => Self::Exit,
                _ => Self::Other,
            },
            _ => Self::Other,
        }
    }
}

/// What the sections have said so far.
#[derive(Debug, Default)]
struct Findings<'a> {
    metadata: Option<&'a [u8]>,
    runs_at_instantiation: bool,
    wapc: bool,
    rego: bool,
    start: bool,
    types: Vec<Signature>,
    /// The type of every function, imported ones first.
    functions: Vec<u32>,
    global_count: u32,
    mutable_globals: Vec<u32>,
    memory_is_defined: bool,
    imported_memory: Option<MemoryType>,
    /// What is exported by the name of a memory.
    memory_export: Option<ExternalKind>,
    start_function: Option<u32>,
    proc_exit: Option<u32>,
    obstacle: Option<Obstacle>,
}

impl<'a> Findings<'a> {
    fn note(&mut self, payload: Payload<'a>) -> Result<(), BadModule> {
        match payload {
            Payload::CustomSection(section)
                if section.name() == METADATA_SECTION && self.metadata.is_none() =>
            {
                self.metadata = Some(section.data());
            }
            Payload::TypeSection(groups) => {
                for group in groups {
                    self.types.extend(group?.types().map(Signature::of));
                }
            }
            Payload::ImportSection(imports) => self.note_imports(imports)?,
            Payload::FunctionSection(functions) => {
                for ty in functions {
                    self.functions.push(ty?);
                }
            }
            Payload::MemorySection(memories) => self.memory_is_defined = memories.count() > 0,
            Payload::GlobalSection(globals) => self.note_globals(globals)?,
            Payload::ExportSection(exports) => {
                for export in exports {
                    self.note_export(export?);
                }
            }
            Payload::StartSection { .. } => self.runs_at_instantiation = true,
            Payload::CodeSectionEntry(body) if self.obstacle.is_none() => {
                self.obstacle = obstacle_in(&body)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn note_imports(&mut self, imports: ImportSectionReader<'a>) -> Result<(), BadModule> {
        for import in imports.into_imports() {
            let import = import?;
            match import.ty {
                TypeRef::Func(ty) => {
                    if (import.module, import.name) == (WASI, "proc_exit")
                        && self.signature(ty) == Some(Signature::Exit)
                        && self.proc_exit.is_none()
                    {
                        self.proc_exit = u32::try_from(self.functions.len()).ok();
                    }
                    self.functions.push(ty);
                }
                TypeRef::Memory(ty) if (import.module, import.name) == (OPA, MEMORY_EXPORT) => {
                    self.imported_memory = Some(ty);
                }
                TypeRef::Global(ty) => {
                    self.global_count = self.global_count.saturating_add(1);
                    if ty.mutable {
                        self.hinders(Obstacle::Global);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn note_globals(&mut self, globals: GlobalSectionReader<'a>) -> Result<(), BadModule> {
        for global in globals {
            let ty = global?.ty;
            if ty.mutable {
                if ty.content_type.is_reference_type() || self.mutable_globals.len() >= GLOBALS_MAX
                {
                    self.hinders(Obstacle::Global);
                    return Ok(());
                }
                self.mutable_globals.push(self.global_count);
            }
            self.global_count = self.global_count.saturating_add(1);
        }
        Ok(())
    }

    fn note_export(&mut self, export: Export<'a>) {
        match export.name {
            "__guest_call" => self.wapc = true,
            START => {
                self.start = true;
                self.start_function = (export.kind == ExternalKind::Func).then_some(export.index);
            }
            // A valid module has one memory at most.
            MEMORY_EXPORT => self.memory_export = Some(export.kind),
            name if name.starts_with(RESERVED) => self.hinders(Obstacle::Name),
            name => self.rego |= name.starts_with("opa_"),
        }
    }

    /// The first obstacle is told.
    fn hinders(&mut self, obstacle: Obstacle) {
        self.obstacle.get_or_insert(obstacle);
    }

    fn signature(&self, ty: u32) -> Option<Signature> {
        self.types.get(usize::try_from(ty).ok()?).copied()
    }

    /// How a command is to be made to end.
    fn ending(&self) -> Option<Ending> {
        let start = self.start_function?;
        let start_type = *self.functions.get(usize::try_from(start).ok()?)?;
        let function = u32::try_from(self.functions.len()).ok()?;
        (self.signature(start_type)? == Signature::Command).then_some(Ending {
            start,
            start_type,
            proc_exit: self.proc_exit?,
            function,
        })
    }

    /// The memory that a module for OPA is to define, if it imports one and the name is free.
    fn own_memory(&self, shape: ModuleShape) -> Option<OwnMemory> {
        let limits = self.imported_memory.filter(|_| shape == ModuleShape::Rego)?;
        let is_exported = match self.memory_export {
            None => false,
            Some(ExternalKind::Memory) => true,
            Some(_) => return None,
        };
        Some(OwnMemory { limits, is_exported })
    }

    fn conclude(mut self) -> Result<Survey<'a>, BadModule> {
        if self.metadata.is_some_and(|bytes| bytes.len() > METADATA_BYTES_MAX) {
            return Err(BadModule(format!(
                "metadata section larger than {METADATA_BYTES_MAX} bytes"
            )));
        }
        let shape = match (self.wapc, self.rego, self.start) {
            (true, _, _) => ModuleShape::Wapc,
            (false, true, _) => ModuleShape::Rego,
            (false, false, true) => ModuleShape::Wasi,
            (false, false, false) => ModuleShape::Unknown,
        };
        let memory = self.own_memory(shape);
        let has_memory = self.memory_is_defined && self.memory_export == Some(ExternalKind::Memory);
        if !has_memory && memory.is_none() {
            self.hinders(Obstacle::Memory);
        }
        // waPC's `_start` is an initialiser, and returns.
        let is_command = self.start && !self.wapc;
        let ending = if is_command { self.ending() } else { None };
        if is_command && ending.is_none() {
            self.hinders(Obstacle::Exit);
        }
        let Self { metadata, runs_at_instantiation, obstacle, mutable_globals, .. } = self;
        let additions = match (obstacle, memory) {
            (None, memory) => Some(Additions { globals: mutable_globals, ending, memory }),
            // Without it there is nothing to link.
            (Some(_), Some(memory)) => {
                Some(Additions { globals: Vec::new(), ending: None, memory: Some(memory) })
            }
            (Some(_), None) => None,
        };
        let facts = ModuleFacts { shape, runs_at_instantiation, obstacle };
        Ok(Survey { metadata, facts, additions })
    }
}

fn obstacle_in(body: &FunctionBody<'_>) -> Result<Option<Obstacle>, BadModule> {
    let mut operators = body.get_operators_reader()?;
    while !operators.eof() {
        match operators.read()? {
            Operator::TableSet { .. }
            | Operator::TableGrow { .. }
            | Operator::TableFill { .. }
            | Operator::TableCopy { .. }
            | Operator::TableInit { .. } => return Ok(Some(Obstacle::Table)),
            Operator::ElemDrop { .. } | Operator::DataDrop { .. } => {
                return Ok(Some(Obstacle::Segment));
            }
            _ => {}
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use wasmtime::Module;

    use super::*;
    use crate::compile::prepare;
    use crate::compile::tests::{PROC_EXIT, assembled};

    /// What keeps a module with these fields and a memory from being set back.
    fn obstacle(fields: &str) -> Option<Obstacle> {
        obstacle_of(&format!(r#"(module {fields} (memory (export "memory") 1))"#))
    }

    fn obstacle_of(module: &str) -> Option<Obstacle> {
        let facts = prepare(&crate::engine().unwrap(), &assembled(module)).unwrap().1.facts;
        facts.obstacle
    }

    #[test]
    fn a_memory_that_is_not_the_modules_own_or_not_exported_is_an_obstacle() {
        for module in [
            "(module)",
            "(module (memory 1))",
            r#"(module (memory (export "mem") 1))"#,
            r#"(module (import "m" "m" (memory 1)) (export "memory" (memory 0)))"#,
            r#"(module (memory 1) (func (export "memory")))"#,
        ] {
            assert_eq!(obstacle_of(module), Some(Obstacle::Memory), "{module}");
        }
        assert_eq!(obstacle(""), None);
        assert_eq!(obstacle_of(r#"(module (memory (export "a") (export "memory") 1))"#), None);
    }

    #[test]
    fn a_memory_that_a_rego_module_imports_becomes_its_own() {
        let eval = r#"(func (export "opa_eval"))"#;
        let import = r#"(import "env" "memory" (memory 2))"#;
        for (module, hinders) in [
            (format!("(module {import} {eval})"), false),
            (format!(r#"(module {import} {eval} (export "memory" (memory 0)))"#), false),
            (format!(r#"(module {import} (func (export "opa_eval") (export "memory")))"#), true),
            (format!(r#"(module (import "env" "mem" (memory 2)) {eval})"#), true),
            (format!("(module {import})"), true),
            (format!(r#"(module {import} {eval} (func (export "__guest_call")))"#), true),
        ] {
            assert_eq!(obstacle_of(&module), hinders.then_some(Obstacle::Memory), "{module}");
        }
    }

    #[test]
    fn a_table_that_can_change_is_an_obstacle() {
        for body in [
            "(table.set $t (i32.const 0) (ref.null func))",
            "(drop (table.grow $t (ref.null func) (i32.const 1)))",
            "(table.fill $t (i32.const 0) (ref.null func) (i32.const 1))",
            "(table.copy $t $u (i32.const 0) (i32.const 0) (i32.const 1))",
            "(table.init $t $e (i32.const 0) (i32.const 0) (i32.const 1))",
            // However deep, and behind what has no effect.
            "(block (loop (if (i32.const 0) (then (table.set $t (i32.const 0) (ref.null func))))))",
        ] {
            let fields = format!(
                "(table $t 2 funcref) (table $u 2 funcref) (elem $e func $f) (func) (func $f {body})"
            );
            assert_eq!(obstacle(&fields), Some(Obstacle::Table), "{body}");
        }
    }

    #[test]
    fn tables_that_are_only_read_are_none() {
        let fields = "(type $t (func)) (table $a 2 funcref) (table $b 3 funcref)
            (elem (table $a) (i32.const 0) func $f) (elem (table $b) (i32.const 1) func $f)
            (elem $passive func $f)
            (func $f (drop (table.get $a (i32.const 0))) (drop (table.size $b))
              (call_indirect $b (type $t) (i32.const 1))
              (return_call_indirect $a (type $t) (i32.const 0)))";
        assert_eq!(obstacle(fields), None);
    }

    #[test]
    fn a_segment_that_can_be_dropped_is_an_obstacle() {
        for body in ["(data.drop $d)", "(elem.drop $e)"] {
            let fields = format!(r#"(data $d "text") (elem $e func $f) (func $f {body})"#);
            assert_eq!(obstacle(&fields), Some(Obstacle::Segment), "{body}");
        }
    }

    #[test]
    fn memory_may_change_in_any_way() {
        let fields = r#"(data $d "text") (func (local i32)
            (memory.init $d (i32.const 0) (i32.const 0) (i32.const 4))
            (memory.fill (i32.const 0) (i32.const 0) (i32.const 4))
            (memory.copy (i32.const 0) (i32.const 8) (i32.const 4))
            (i32.store (i32.const 0) (memory.grow (i32.const 1))))"#;
        assert_eq!(obstacle(fields), None);
    }

    #[test]
    fn a_global_that_can_keep_a_reference_is_an_obstacle() {
        for (global, hinders) in [
            ("(global (mut funcref) (ref.null func))", true),
            ("(global (mut externref) (ref.null extern))", true),
            ("(type $t (func)) (global (mut (ref null $t)) (ref.null $t))", true),
            (r#"(import "m" "g" (global (mut i32)))"#, true),
            (r#"(import "m" "g" (global i32))"#, false),
            ("(global funcref (ref.null func))", false),
            ("(global (mut v128) (v128.const i64x2 0 0))", false),
            ("(global (mut f64) (f64.const 0))", false),
        ] {
            assert_eq!(obstacle(global), hinders.then_some(Obstacle::Global), "{global}");
        }
    }

    #[test]
    fn so_are_too_many_globals() {
        let mutable = |count: usize| "(global (mut i32) (i32.const 0))".repeat(count);
        let constant = "(global i32 (i32.const 0))".repeat(9);
        assert_eq!(obstacle(&[mutable(GLOBALS_MAX), constant].concat()), None);
        assert_eq!(obstacle(&mutable(GLOBALS_MAX + 1)), Some(Obstacle::Global));
    }

    #[test]
    fn a_name_of_ours_is_an_obstacle() {
        let named = |name: &str| obstacle(&format!(r#"(func (export "{name}"))"#));
        for name in ["conclave:", "conclave:global/0", "conclave:start", "conclave:anything"] {
            assert_eq!(named(name), Some(Obstacle::Name), "{name}");
        }
        assert_eq!(named("conclave"), None);
        assert_eq!(named(" conclave:global/0"), None);
    }

    #[test]
    fn a_command_that_can_not_exit_is_an_obstacle() {
        let start = r#"(func (export "_start"))"#;
        for fields in [
            start,
            &format!(r#"(import "env" "proc_exit" (func (param i32))) {start}"#),
            &format!(r#"(import "wasi_snapshot_preview1" "proc_exit" (func)) {start}"#),
            &format!(r#"(import "wasi_snapshot_preview1" "proc_exit" (global i32)) {start}"#),
            // No function that could be called as a command.
            &format!(r#"{PROC_EXIT} (func (export "_start") (param i32))"#),
            &format!(r#"{PROC_EXIT} (func (export "_start") (result i32) (i32.const 0))"#),
            &format!(r#"{PROC_EXIT} (global (export "_start") i32 (i32.const 0))"#),
        ] {
            assert_eq!(obstacle(fields), Some(Obstacle::Exit), "{fields}");
        }
        assert_eq!(obstacle(&format!("{PROC_EXIT} {start}")), None);
        // An initialiser may return.
        assert_eq!(obstacle(&format!(r#"{start} (func (export "__guest_call"))"#)), None);
    }

    #[test]
    fn code_at_instantiation_is_none() {
        let module = assembled(r#"(module (memory (export "memory") 1) (start $f) (func $f))"#);
        let facts = prepare(&crate::engine().unwrap(), &module).unwrap().1.facts;
        assert_eq!((facts.runs_at_instantiation, facts.obstacle), (true, None));
    }

    #[test]
    fn the_policies_here_can_be_set_back() {
        let engine = crate::engine().unwrap();
        for (module, shape) in [
            (
                include_bytes!("../../../tests/policies/built/go-labels.wasm").as_slice(),
                ModuleShape::Wasi,
            ),
            (include_bytes!("../../../tests/policies/built/label-adder.wasm"), ModuleShape::Wapc),
            (include_bytes!("../../../tests/policies/built/pod-guard.wasm"), ModuleShape::Wapc),
            (include_bytes!("../../../tests/policies/built/raw-gate.wasm"), ModuleShape::Wapc),
        ] {
            let facts = prepare(&engine, module).unwrap().1.facts;
            assert_eq!((facts.shape, facts.obstacle), (shape, None));
        }
    }

    /// The list at the top is closed because of this.
    #[test]
    fn the_engine_understands_nothing_else_that_keeps_state() {
        let engine = crate::engine().unwrap();
        for module in [
            "(module (memory 1) (memory 1))",
            "(module (memory i64 1))",
            "(module (memory 1 1 shared))",
            "(module (memory 1) (func (drop (i32.atomic.load (i32.const 0)))))",
            "(module (global (shared mut i32) (i32.const 0)))",
            "(module (table i64 1 funcref))",
            "(module (tag))",
            "(module (tag $e) (func (throw $e)))",
            "(module (type (struct (field (mut i32)))))",
            "(module (type (array (mut i32))))",
            "(module (global (mut i31ref) (ref.i31 (i32.const 0))))",
            "(module (type $f (func)) (type (cont $f)))",
            "(module (memory 1 (pagesize 1)))",
        ] {
            assert!(Module::validate(&engine, &assembled(module)).is_err(), "{module}");
        }
    }
}
