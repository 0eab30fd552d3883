//! Adds to a module what it takes to set its instances back: names for its mutable globals,
//! a command that never returns, and a memory of its own in place of one that it imports.
//!
//! Nothing that is there changes its index, and every section but five is copied as it is.
#![forbid(unsafe_code)]

use wasm_encoder::{Encode, ExportKind, Function, MemoryType, SectionId};
use wasmparser::{BinaryReader, BinaryReaderError, Export, Import, Parser, TypeRef};

/// Names that begin like this are ours; a module with one of its own is left alone.
pub(super) const RESERVED: &str = "conclave:";

/// The mutable globals are exported as this and a number, from 0 and in the module's order.
pub(crate) const GLOBAL_EXPORTS: &str = "conclave:global/";

/// The name that the module's own `_start` is moved to. It stays exported, since code may
/// refer only to functions that are mentioned outside of it.
pub(crate) const MOVED_START: &str = "conclave:start";

/// What a command is started by.
pub(super) const START: &str = "_start";

/// What the host finds linear memory by.
pub(super) const MEMORY_EXPORT: &str = "memory";

/// Magic number and version.
const HEADER_BYTES: usize = 8;

/// A section's kind, length and count.
const HEADING_BYTES_MAX: usize = 1 + 5 + 5;

/// The order that sections have in a module; custom ones stand anywhere.
const ORDER: [SectionId; 13] = [
    SectionId::Type,
    SectionId::Import,
    SectionId::Function,
    SectionId::Table,
    SectionId::Memory,
    SectionId::Tag,
    SectionId::Global,
    SectionId::Export,
    SectionId::Start,
    SectionId::Element,
    SectionId::DataCount,
    SectionId::Code,
    SectionId::Data,
];

/// What is to be added to a module.
#[derive(Debug)]
pub(super) struct Additions {
    /// The globals to be exported.
    pub(super) globals: Vec<u32>,
    /// For a command: the function that becomes its `_start`.
    pub(super) ending: Option<Ending>,
    /// The memory that the module is to have instead of importing it.
    pub(super) memory: Option<OwnMemory>,
}

/// A memory that a module defines where it imported one: with the same index, since it is the
/// only one, and the same limits.
#[derive(Debug)]
pub(super) struct OwnMemory {
    pub(super) limits: wasmparser::MemoryType,
    /// Whether the module exports it already.
    pub(super) is_exported: bool,
}

/// A function that calls the module's own `_start` and then `proc_exit(0)`, which is what
/// returning from `_start` means.
#[derive(Debug)]
pub(super) struct Ending {
    /// The module's own `_start`.
    pub(super) start: u32,
    /// Its type, which is the new function's, too.
    pub(super) start_type: u32,
    pub(super) proc_exit: u32,
    /// The index that the new function will have: the next one.
    pub(super) function: u32,
}

/// The module with these additions.
pub(super) fn instrument(
    module: &[u8],
    additions: &Additions,
) -> Result<Vec<u8>, BinaryReaderError> {
    let new = additions.sections();
    let growth = new.iter().map(|new| new.items.len().saturating_add(HEADING_BYTES_MAX)).sum();
    let mut out = Vec::with_capacity(module.len().saturating_add(growth));
    let mut missing = new.into_iter().filter(Addition::is_needed).peekable();
    out.extend_from_slice(module.get(..HEADER_BYTES).unwrap_or_default());
    for payload in Parser::new(0).parse_all(module) {
        let Some((id, range)) = payload?.as_section() else { continue };
        let content = module.get(range).unwrap_or_default();
        while let Some(new) = missing.next_if(|new| new.comes_before(id)) {
            new.append(&mut out);
        }
        match missing.next_if(|new| new.id as u8 == id) {
            Some(new) => new.append_with(content, &mut out)?,
            None => {
                out.push(id);
                content.encode(&mut out);
            }
        }
    }
    for new in missing {
        new.append(&mut out);
    }
    Ok(out)
}

impl Additions {
    /// In the order of a module.
    fn sections(&self) -> [Addition; 5] {
        let [mut imports, mut functions, mut memories, mut exports, mut code] = [
            SectionId::Import,
            SectionId::Function,
            SectionId::Memory,
            SectionId::Export,
            SectionId::Code,
        ]
        .map(Addition::to);
        if let Some(OwnMemory { limits, is_exported }) = &self.memory {
            imports.without = Some(Loss::MemoryImport);
            memories.item(&MemoryType {
                minimum: limits.initial,
                maximum: limits.maximum,
                memory64: limits.memory64,
                shared: limits.shared,
                page_size_log2: limits.page_size_log2,
            });
            if !is_exported {
                exports.export(MEMORY_EXPORT, ExportKind::Memory, 0);
            }
        }
        for (number, global) in self.globals.iter().enumerate() {
            exports.export(&format!("{GLOBAL_EXPORTS}{number}"), ExportKind::Global, *global);
        }
        if let Some(ending) = &self.ending {
            functions.item(&ending.start_type);
            exports.export(MOVED_START, ExportKind::Func, ending.start);
            exports.export(START, ExportKind::Func, ending.function);
            exports.without = Some(Loss::Export(START));
            let mut function = Function::new([]);
            let mut body = function.instructions();
            body.call(ending.start).i32_const(0).call(ending.proc_exit).unreachable().end();
            code.item(&function);
        }
        [imports, functions, memories, exports, code]
    }
}

/// Items that a section gets more.
#[derive(Debug)]
struct Addition {
    id: SectionId,
    count: u32,
    items: Vec<u8>,
    /// The item that the section loses.
    without: Option<Loss>,
}

/// An item that a section loses: the first such one.
#[derive(Debug, Clone, Copy)]
enum Loss {
    Export(&'static str),
    MemoryImport,
}

impl Loss {
    /// Reads the next item of the section, and says whether it is the one.
    fn is_next(self, reader: &mut BinaryReader<'_>) -> Result<bool, BinaryReaderError> {
        Ok(match self {
            Self::Export(name) => reader.read::<Export<'_>>()?.name == name,
            Self::MemoryImport => matches!(reader.read::<Import<'_>>()?.ty, TypeRef::Memory(_)),
        })
    }
}

impl Addition {
    fn to(id: SectionId) -> Self {
        Self { id, count: 0, items: Vec::new(), without: None }
    }

    fn is_needed(&self) -> bool {
        self.count > 0 || self.without.is_some()
    }

    fn item(&mut self, item: &impl Encode) {
        self.count = self.count.saturating_add(1);
        item.encode(&mut self.items);
    }

    fn export(&mut self, name: &str, kind: ExportKind, index: u32) {
        name.encode(&mut self.items);
        kind.encode(&mut self.items);
        self.item(&index);
    }

    /// Whether this has its place before the section of that kind.
    fn comes_before(&self, id: u8) -> bool {
        ORDER.iter().skip_while(|kind| **kind != self.id).skip(1).any(|kind| *kind as u8 == id)
    }

    /// As a section of its own.
    fn append(&self, out: &mut Vec<u8>) {
        self.append_after(0, &[], out);
    }

    /// As the end of a section that is there.
    fn append_with(&self, content: &[u8], out: &mut Vec<u8>) -> Result<(), BinaryReaderError> {
        let mut reader = BinaryReader::new(content, 0);
        let mut count = reader.read_var_u32()?;
        let items = reader.original_position();
        let mut gap = items..items;
        if let Some(loss) = self.without {
            for _ in 0..count {
                let from = reader.original_position();
                if loss.is_next(&mut reader)? {
                    gap = from..reader.original_position();
                    count = count.saturating_sub(1);
                    break;
                }
            }
        }
        let before = content.get(items..gap.start).unwrap_or_default();
        let after = content.get(gap.end..).unwrap_or_default();
        self.append_after(count, &[before, after], out);
        Ok(())
    }

    fn append_after(&self, count: u32, kept: &[&[u8]], out: &mut Vec<u8>) {
        let mut total = Vec::new();
        count.saturating_add(self.count).encode(&mut total);
        let parts = || {
            [total.as_slice()]
                .into_iter()
                .chain(kept.iter().copied())
                .chain([self.items.as_slice()])
        };
        out.push(self.id as u8);
        parts().map(<[u8]>::len).sum::<usize>().encode(out);
        parts().for_each(|part| out.extend_from_slice(part));
    }
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use wasm_encoder::RawSection;
    use wasmtime::{Engine, Error, Instance, Linker, Module, Store, Val};

    use super::*;
    use crate::compile::prepare;
    use crate::compile::tests::{MEMORY, PROC_EXIT, assembled};

    /// As it is compiled; there must be no obstacle.
    fn prepared(engine: &Engine, module: &[u8]) -> Vec<u8> {
        let (prepared, survey) = prepare(engine, module).unwrap();
        assert_eq!(survey.facts.obstacle, None);
        Module::validate(engine, &prepared).unwrap();
        prepared.into_owned()
    }

    #[derive(Debug)]
    struct Exit(i32);

    impl fmt::Display for Exit {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "exit {}", self.0)
        }
    }

    impl std::error::Error for Exit {}

    fn instance(engine: &Engine, module: &[u8]) -> (Store<()>, Instance) {
        let (mut store, mut linker) = (Store::new(engine, ()), Linker::new(engine));
        linker
            .func_wrap("wasi_snapshot_preview1", "proc_exit", |code: i32| -> Result<(), Error> {
                Err(Error::new(Exit(code)))
            })
            .unwrap();
        let module = Module::new(engine, prepared(engine, module)).unwrap();
        let instance = linker.instantiate(&mut store, &module).unwrap();
        (store, instance)
    }

    /// Calls `_start`: the code that it exits with, if it does, and the number that it left at
    /// the start of memory.
    fn run(text: &str) -> (Option<i32>, u8) {
        let (mut store, instance) = instance(&crate::engine().unwrap(), &assembled(text));
        let start = instance.get_typed_func::<(), ()>(&mut store, START).unwrap();
        let code = start.call(&mut store, ()).map_err(|error| error.downcast::<Exit>().unwrap().0);
        let memory = instance.get_memory(&mut store, "memory").unwrap();
        (code.err(), memory.data(&store)[0])
    }

    #[test]
    fn every_mutable_global_can_be_read_and_set() {
        let module = assembled(
            r#"(module (memory (export "memory") 1)
                 (global i32 (i32.const 1))
                 (global $a (mut i32) (i32.const 2))
                 (global $b (export "b") (mut i64) (i64.const 3))
                 (global $c (mut f32) (f32.const 4))
                 (global funcref (ref.null func))
                 (global $d (mut f64) (f64.const 5))
                 (global $e (mut v128) (v128.const i64x2 6 7))
                 (func (export "all") (result i32 i64 f32 f64 v128)
                   (global.get $a) (global.get $b) (global.get $c) (global.get $d)
                   (global.get $e)))"#,
        );
        let (mut store, instance) = instance(&crate::engine().unwrap(), &module);
        let mut globals = Vec::new();
        while let Some(global) =
            instance.get_global(&mut store, &format!("{GLOBAL_EXPORTS}{}", globals.len()))
        {
            globals.push(global);
        }
        // Floats with payloads that arithmetic would not keep.
        let values = [
            Val::I32(-1),
            Val::I64(i64::MIN),
            Val::F32(0x7fa0_0001),
            Val::F64(0xfff4_0000_0000_0001),
            Val::V128((u128::MAX - 9).into()),
        ];
        assert_eq!(globals.len(), values.len());
        for (global, value) in globals.iter().zip(&values) {
            global.set(&mut store, *value).unwrap();
        }
        let mut results = [Val::I32(0); 5];
        let all = instance.get_func(&mut store, "all").unwrap();
        all.call(&mut store, &[], &mut results).unwrap();
        for ((global, value), result) in globals.iter().zip(values).zip(results) {
            let bits = |value: Val| match value {
                Val::I32(bits) => u128::from(bits.cast_unsigned()),
                Val::I64(bits) => u128::from(bits.cast_unsigned()),
                Val::F32(bits) => u128::from(bits),
                Val::F64(bits) => u128::from(bits),
                Val::V128(bits) => bits.into(),
                other => panic!("{other:?}"),
            };
            assert_eq!((bits(result), bits(global.get(&mut store))), (bits(value), bits(value)));
        }
    }

    #[test]
    fn a_command_ends_in_proc_exit_however_it_ends() {
        let ending = |body: &str| {
            run(&format!(
                r#"(module {PROC_EXIT} {MEMORY} (type $command (func))
                     (func $start (export "_start")
                       (i32.store8 (i32.const 0) (i32.const 7)) {body}))"#
            ))
        };
        assert_eq!(ending(""), (Some(0), 7));
        assert_eq!(ending("(return)"), (Some(0), 7));
        assert_eq!(ending("(call $proc_exit (i32.const 3))"), (Some(3), 7));
        assert_eq!(ending("(return_call $proc_exit (i32.const 4))"), (Some(4), 7));
    }

    #[test]
    fn a_function_of_another_module_as_command_is_made_to_end() {
        let module = assembled(&format!(
            r#"(module {PROC_EXIT} (import "m" "f" (func $f)) (export "_start" (func $f)) {MEMORY})"#
        ));
        let engine = crate::engine().unwrap();
        let module = Module::new(&engine, prepared(&engine, &module)).unwrap();
        assert!(module.get_export(START).unwrap().func().is_some());
    }

    /// What is mentioned nowhere but among the exports may still be referred to in the code.
    #[test]
    fn a_command_can_refer_to_itself() {
        let text = format!(
            r#"(module {PROC_EXIT} {MEMORY}
                 (func $start (export "_start") (drop (ref.func $start))))"#
        );
        assert_eq!(run(&text), (Some(0), 0));
    }

    #[test]
    fn wapcs_start_returns() {
        let text = format!(
            r#"(module {PROC_EXIT} {MEMORY} (func (export "_start"))
                 (func (export "__guest_call") (param i32 i32) (result i32) (i32.const 1)))"#
        );
        assert_eq!(run(&text), (None, 0));
    }

    #[test]
    fn a_memory_that_was_imported_is_defined_with_the_same_limits() {
        let engine = crate::engine().unwrap();
        for export in ["", r#"(export "memory" (memory 0))"#] {
            let original = assembled(&format!(
                r#"(module {PROC_EXIT} (import "env" "memory" (memory 2 9))
                     (import "wasi_snapshot_preview1" "proc_exit" (func $again (param i32)))
                     {export} (global (mut i32) (i32.const 1)) (data (i32.const 0) "x")
                     (func (export "opa_eval") (call $again (i32.const 5))))"#
            ));
            let (mut store, instance) = instance(&engine, &original);
            let memory = instance.get_memory(&mut store, MEMORY_EXPORT).unwrap();
            let limits = memory.ty(&store);
            assert_eq!((limits.minimum(), limits.maximum()), (2, Some(9)));
            assert_eq!(memory.data(&store)[0], b'x');
            let eval = instance.get_typed_func::<(), ()>(&mut store, "opa_eval").unwrap();
            let error = eval.call(&mut store, ()).unwrap_err();
            assert_eq!(error.downcast::<Exit>().unwrap().0, 5);
        }
    }

    /// Without a memory there is nothing to link.
    #[test]
    fn it_is_defined_even_if_instances_can_not_be_set_back() {
        let engine = crate::engine().unwrap();
        let module = assembled(
            r#"(module (import "env" "memory" (memory 2)) (table 1 funcref)
                 (func (export "opa_eval") (table.set (i32.const 0) (ref.null func))))"#,
        );
        let (prepared, survey) = prepare(&engine, &module).unwrap();
        assert!(survey.facts.obstacle.is_some());
        let module = Module::new(&engine, &*prepared).unwrap();
        assert_eq!(module.imports().count(), 0);
        assert!(module.get_export(MEMORY_EXPORT).unwrap().memory().is_some());
    }

    fn sections(module: &[u8]) -> Vec<(u8, &[u8])> {
        let payloads = Parser::new(0).parse_all(module);
        payloads
            .filter_map(|payload| payload.unwrap().as_section())
            .map(|(id, range)| (id, &module[range]))
            .collect()
    }

    #[test]
    fn everything_else_is_copied_as_it_is() {
        let engine = crate::engine().unwrap();
        let original = assembled(&format!(
            r#"(module (@custom "first" (before first) "1") {PROC_EXIT} {MEMORY}
                 (@custom "middle" (before code) "22") (table 1 funcref) (elem (i32.const 0) $f)
                 (global (mut i32) (i32.const 1)) (data $d "text") (start $f) (func $f)
                 (func (export "_start")
                   (memory.init $d (i32.const 0) (i32.const 0) (i32.const 4)))
                 (@custom "last" (after last) "333"))"#
        ));
        let prepared = prepared(&engine, &original);
        let changed = [SectionId::Function, SectionId::Export, SectionId::Code].map(|id| id as u8);
        let (before, after) = (sections(&original), sections(&prepared));
        assert_eq!(before.len(), after.len());
        for ((id, before), (same_id, after)) in before.into_iter().zip(after) {
            assert_eq!(id, same_id);
            assert_eq!(before != after, changed.contains(&id), "section {id}");
        }
    }

    /// Counts and indices in more bytes than they need, as linkers write them.
    #[test]
    fn padded_numbers_are_read() {
        let mut module = wasm_encoder::Module::new();
        for (id, data) in [
            (SectionId::Memory, [0x81, 0x80, 0, 0, 1].as_slice()),
            (SectionId::Global, [0x81, 0x80, 0, 0x7f, 1, 0x41, 0, 0x0b].as_slice()),
            (SectionId::Export, b"\x81\x80\0\x86\x80\0memory\x02\x80\x80\0".as_slice()),
        ] {
            module.section(&RawSection { id: id as u8, data });
        }
        let (mut store, instance) = instance(&crate::engine().unwrap(), &module.finish());
        assert!(instance.get_memory(&mut store, "memory").is_some());
        assert!(instance.get_global(&mut store, "conclave:global/0").is_some());
    }

    #[test]
    fn a_module_without_sections_gets_them_in_their_order() {
        let engine = crate::engine().unwrap();
        let type_of_nothing = RawSection { id: SectionId::Type as u8, data: b"\x01\x60\0\0" };
        let global = RawSection { id: SectionId::Global as u8, data: b"\x01\x7f\x01\x41\0\x0b" };
        let data = RawSection { id: SectionId::Data as u8, data: b"\x01\x01\0" };
        let mut module = wasm_encoder::Module::new();
        module.section(&type_of_nothing).section(&global).section(&data);
        let additions = Additions { globals: vec![0], ending: None, memory: None };
        let with_export = instrument(&module.finish(), &additions).unwrap();
        Module::validate(&engine, &with_export).unwrap();
        let ids: Vec<_> = sections(&with_export).into_iter().map(|(id, _)| id).collect();
        assert_eq!(ids, [1, 6, 7, 11]);

        let ending = Ending { start: 0, start_type: 0, proc_exit: 1, function: 2 };
        let additions = Additions { globals: vec![0], ending: Some(ending), memory: None };
        let with_all = instrument(&with_export, &additions).unwrap();
        let ids: Vec<_> = sections(&with_all).into_iter().map(|(id, _)| id).collect();
        assert_eq!(ids, [1, 3, 6, 7, 10, 11]);
    }
}
