//! Every bound that the two processes share, with its reason.
//!
//! Sizes are in bytes unless the name says otherwise.

/// The largest request body a supervisor may be configured to accept. etcd refuses
/// objects above 1.5 MiB and an update carries two, so this leaves ample room.
pub const REQUEST_BYTES_CEILING: usize = 64 << 20;

/// The largest answer a policy may give: a mutated object, annotations and warnings.
pub const RESPONSE_BYTES_MAX: usize = 16 << 20;

/// The largest settings document of one policy; also bounds `policies.yml` itself.
pub const SETTINGS_BYTES_MAX: usize = 16 << 20;

/// What a guest may hand over in one host call, and get back.
pub const HOST_CALL_BYTES_MAX: usize = 4 << 20;

/// Host calls in one evaluation. A policy that lists a cluster page by page needs dozens.
pub const HOST_CALLS_MAX: u32 = 1_000;

/// One line of guest output; longer lines are cut into pieces of this size.
pub const LOG_LINE_BYTES_MAX: usize = 4 << 10;

/// Guest output that reaches the log in one evaluation, as [`log_cost`] counts it.
pub const LOG_BYTES_MAX: usize = 64 << 10;

/// What a line of guest output costs beside its own length: about what the log adds to it.
pub const LOG_LINE_OVERHEAD: usize = 256;

/// What a line or record of this length takes of [`LOG_BYTES_MAX`].
#[must_use]
pub const fn log_cost(length: usize) -> usize {
    length.saturating_add(LOG_LINE_OVERHEAD)
}

/// A fault's or failure's message; longer texts are cut.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// The metadata section of a module.
pub const METADATA_BYTES_MAX: usize = 1 << 20;

/// Room in a frame for everything that is not the one large field.
pub const FRAME_OVERHEAD_MAX: usize = 16 << 10;

/// The largest frame body in either direction.
pub const FRAME_BYTES_MAX: usize = REQUEST_BYTES_CEILING + FRAME_OVERHEAD_MAX;

/// The largest frame body that a worker may send: an answer and its diagnostics.
pub const REPLY_BYTES_MAX: usize = RESPONSE_BYTES_MAX + MESSAGE_BYTES_MAX + FRAME_OVERHEAD_MAX;

/// A WebAssembly module, before compilation. The largest known policy (a CEL engine
/// built with Go) has 38 MB.
pub const MODULE_BYTES_MAX: usize = 128 << 20;

/// Native code of one module; Cranelift's output is two to four times the module.
pub const CODE_BYTES_MAX: u64 = 1 << 30;

/// Linear memory of a guest unless configured otherwise.
pub const GUEST_MEMORY_BYTES_DEFAULT: u64 = 128 << 20;

/// The most linear memory that can be configured: a 32-bit address space.
pub const GUEST_MEMORY_BYTES_CEILING: u64 = 4 << 30;

/// Stack of a guest. Wasmtime's own default; deep recursion traps there.
pub const GUEST_STACK_BYTES: usize = 512 << 10;

/// Tables of one module. Toolchains emit one.
pub const TABLES_MAX: usize = 16;

/// Elements of one table. Go and Rust modules have a few thousand.
pub const TABLE_ELEMENTS_MAX: usize = 1 << 20;

/// Mutable globals of a module whose instances are set back. Go has 8, Rust and C have 1 to 3.
pub const GLOBALS_MAX: usize = 256;

/// Processes of a zygote's namespace, itself included, until it is told how many workers its
/// policy has. Its guest has not run by then.
pub const ZYGOTE_PROCESSES_MAX: u16 = 1024;

/// Private writable memory of a serving worker beyond its guest's linear memory: the
/// engine's own data, and a request and a response that are copied in and out.
pub const SERVE_OVERHEAD_BYTES: u64 = 512 << 20;

/// Private writable memory of a compiling worker. Compiling 38 MB needs about 1.5 GiB.
pub const COMPILE_MEMORY_BYTES: u64 = 4 << 30;

/// Address space of a serving worker beyond its private writable memory: what the engine
/// reserves for the largest guest, the code, the program itself.
pub const SERVE_ADDRESS_BYTES: u64 = GUEST_MEMORY_BYTES_CEILING + CODE_BYTES_MAX + (1 << 30);

/// Address space of a worker that compiles or loads.
pub const ADDRESS_BYTES: u64 = 16 << 30;

const _: () = assert!(
    SERVE_ADDRESS_BYTES + GUEST_MEMORY_BYTES_CEILING + SERVE_OVERHEAD_BYTES < ADDRESS_BYTES
);
const _: () = assert!(RESPONSE_BYTES_MAX + MESSAGE_BYTES_MAX < REPLY_BYTES_MAX);
const _: () = assert!(HOST_CALL_BYTES_MAX < REPLY_BYTES_MAX);
const _: () = assert!(SETTINGS_BYTES_MAX < FRAME_BYTES_MAX);
const _: () = assert!(REPLY_BYTES_MAX <= FRAME_BYTES_MAX);
const _: () = assert!(LOG_LINE_BYTES_MAX < FRAME_OVERHEAD_MAX);
const _: () = assert!(FRAME_BYTES_MAX < u32::MAX as usize);
