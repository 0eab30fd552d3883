//! What makes a random module a policy: the imports and exports of its contract, and an entry
//! that accepts settings and hands requests to the random part.

use std::convert::Infallible;

use wasm_encoder::reencode::{Error, Reencode, utils};
use wasm_encoder::{
    BlockType, CodeSection, ExportKind, ExportSection, Function, FunctionSection, ImportSection,
    InstructionSink, MemArg, Module, TypeSection, ValType,
};
use wasmparser::{
    CodeSectionReader, Export, ExportSectionReader, FunctionSectionReader, ImportSectionReader,
    Parser, TypeRef, TypeSectionReader,
};

/// What settings are answered with.
const VALID: &str = r#"{"valid":true}"#;

/// The two answers to a request.
pub(crate) const YES: &str = r#"{"accepted":true}"#;
pub(crate) const NO: &str = r#"{"accepted":false,"message":"generated","code":403}"#;

/// Where texts are put, and what WASI writes to and reads from.
const TEXT: i32 = 64;
const VECTOR: i32 = 16;
const SIZES: i32 = 0;

const BYTE: MemArg = MemArg { offset: 0, align: 0, memory_index: 0 };
const WORD: MemArg = MemArg { align: 2, ..BYTE };

/// What a contract asks of a module.
#[derive(Debug)]
pub(crate) struct Shape {
    pub(crate) execution_mode: &'static str,
    imports: &'static str,
    /// The function that the host calls.
    entry: &'static str,
    /// The import that answers.
    answers: &'static str,
}

pub(crate) const WAPC: Shape = Shape {
    execution_mode: "kubewarden-wapc",
    imports: r#"
        (import "wapc" "__guest_request" (func (param i32 i32)))
        (import "wapc" "__guest_response" (func (param i32 i32)))
        (import "wapc" "__guest_error" (func (param i32 i32)))
        (import "wapc" "__host_call" (func (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
        (import "wapc" "__host_response_len" (func (result i32)))
        (import "wapc" "__host_response" (func (param i32)))
        (import "wapc" "__host_error_len" (func (result i32)))
        (import "wapc" "__host_error" (func (param i32)))
        (import "wapc" "__console_log" (func (param i32 i32)))"#,
    entry: "__guest_call",
    answers: "__guest_response",
};

pub(crate) const WASI: Shape = Shape {
    execution_mode: "wasi",
    imports: r#"
        (import "host" "call" (func (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))"#,
    entry: "_start",
    answers: "fd_write",
};

const WASI_IMPORTS: &str = r#"
    (import "wasi_snapshot_preview1" "args_sizes_get" (func (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "args_get" (func (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "environ_get" (func (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "clock_time_get" (func (param i32 i64 i32) (result i32)))
    (import "wasi_snapshot_preview1" "random_get" (func (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_read" (func (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_fdstat_get" (func (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "poll_oneoff" (func (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "proc_exit" (func (param i32)))"#;

impl Shape {
    /// Parameters and results of the entry: waPC hands over two lengths, WASI nothing.
    fn signature(&self) -> (&'static [ValType], &'static [ValType]) {
        match self.entry {
            "__guest_call" => (&[ValType::I32; 2], &[ValType::I32]),
            _ => (&[], &[]),
        }
    }

    /// A module whose random part is the entry itself.
    pub(crate) fn linked(&self) -> String {
        let entry = self.entry;
        let signature =
            if self.signature().0.is_empty() { "" } else { "(param i32 i32) (result i32)" };
        self.module(&format!(r#"(func (export "{entry}") {signature} unreachable)"#))
    }

    /// A module with a random part for an entry to call.
    pub(crate) fn serving(&self) -> String {
        self.module(r#"(func (export "generated") unreachable)"#)
    }

    fn module(&self, exported: &str) -> String {
        let imports = self.imports;
        format!(r#"(module {imports} {WASI_IMPORTS} (memory (export "memory") 1) {exported})"#)
    }
}

/// Adds the entry to a module of the shape [`Shape::serving`].
pub(crate) fn add(module: &[u8], shape: &Shape, answer: &str) -> Vec<u8> {
    let mut addition = Addition { shape, answer, found: Found::default() };
    let mut whole = Module::new();
    addition.parse_core_module(&mut whole, Parser::new(0), module).unwrap();
    whole.finish()
}

/// Copies a module and adds to its sections.
struct Addition<'a> {
    shape: &'a Shape,
    answer: &'a str,
    found: Found,
}

/// Indices in the module.
#[derive(Default)]
struct Found {
    types: u32,
    functions: u32,
    answers: u32,
    args_sizes_get: u32,
    generated: u32,
}

type Result = std::result::Result<(), Error<Infallible>>;

impl Reencode for Addition<'_> {
    type Error = Infallible;

    fn parse_type_section(
        &mut self,
        types: &mut TypeSection,
        section: TypeSectionReader<'_>,
    ) -> Result {
        utils::parse_type_section(self, types, section)?;
        self.found.types = types.len();
        let (parameters, results) = self.shape.signature();
        types.ty().function(parameters.iter().copied(), results.iter().copied());
        Ok(())
    }

    fn parse_import_section(
        &mut self,
        imports: &mut ImportSection,
        section: ImportSectionReader<'_>,
    ) -> Result {
        for import in section.clone().into_imports() {
            let import = import?;
            if matches!(import.ty, TypeRef::Func(_)) {
                if import.name == self.shape.answers {
                    self.found.answers = self.found.functions;
                }
                if import.name == "args_sizes_get" {
                    self.found.args_sizes_get = self.found.functions;
                }
                self.found.functions += 1;
            }
        }
        utils::parse_import_section(self, imports, section)
    }

    fn parse_function_section(
        &mut self,
        functions: &mut FunctionSection,
        section: FunctionSectionReader<'_>,
    ) -> Result {
        utils::parse_function_section(self, functions, section)?;
        self.found.functions += functions.len();
        functions.function(self.found.types);
        Ok(())
    }

    fn parse_export_section(
        &mut self,
        exports: &mut ExportSection,
        section: ExportSectionReader<'_>,
    ) -> Result {
        utils::parse_export_section(self, exports, section)?;
        exports.export(self.shape.entry, ExportKind::Func, self.found.functions);
        Ok(())
    }

    fn parse_export(&mut self, exports: &mut ExportSection, export: Export<'_>) -> Result {
        if export.name == "generated" {
            self.found.generated = export.index;
        }
        utils::parse_export(self, exports, export)
    }

    fn parse_code_section(
        &mut self,
        code: &mut CodeSection,
        section: CodeSectionReader<'_>,
    ) -> Result {
        utils::parse_code_section(self, code, section)?;
        let mut entry = Function::new([]);
        let mut sink = entry.instructions();
        self.is_about_settings(&mut sink);
        sink.if_(BlockType::Empty);
        self.give(&mut sink, VALID);
        sink.else_().call(self.found.generated);
        self.give(&mut sink, self.answer);
        sink.end();
        if !self.shape.signature().1.is_empty() {
            sink.i32_const(1);
        }
        sink.end();
        code.function(&entry);
        Ok(())
    }
}

impl Addition<'_> {
    /// `validate_settings` and `validate-settings` are longer words than `validate`.
    fn is_about_settings(&self, sink: &mut InstructionSink<'_>) {
        if self.shape.signature().0.is_empty() {
            sink.i32_const(SIZES).i32_const(SIZES + 4).call(self.found.args_sizes_get).drop();
            sink.i32_const(SIZES + 4).i32_load(WORD).i32_const(21).i32_gt_u();
        } else {
            sink.local_get(0).i32_const(8).i32_gt_u();
        }
    }

    /// Answers with this text, whatever the memory holds.
    fn give(&self, sink: &mut InstructionSink<'_>, text: &str) {
        for (at, byte) in (TEXT..).zip(text.bytes()) {
            sink.i32_const(at).i32_const(byte.into()).i32_store8(BYTE);
        }
        let length = i32::try_from(text.len()).unwrap();
        if self.shape.signature().0.is_empty() {
            sink.i32_const(VECTOR).i32_const(TEXT).i32_store(WORD);
            sink.i32_const(VECTOR + 4).i32_const(length).i32_store(WORD);
            sink.i32_const(1).i32_const(VECTOR).i32_const(1).i32_const(SIZES);
            sink.call(self.found.answers).drop();
        } else {
            sink.i32_const(TEXT).i32_const(length).call(self.found.answers);
        }
    }
}
