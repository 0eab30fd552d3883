//! The system call filters: `seccomp.json`, compiled by the build script.
//!
//! Lost: every call that is not listed, and listed calls with other arguments; the
//! process is killed. Filters stack: a later one can only take more away.
#![forbid(unsafe_code)]

use std::io;

use seccompiler::sock_filter;

mod programs {
    include!(concat!(env!("OUT_DIR"), "/filters.rs"));
}

/// One of the filters in `seccomp.json`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Filter {
    /// Turns a module into native code.
    Compile,
    /// Maps native code; may install one more filter.
    Load,
    /// Evaluates requests.
    Serve,
}

/// Turns the filter on for this thread, the only one there is.
///
/// # Errors
/// The kernel refused it.
pub(super) fn install(filter: Filter) -> io::Result<()> {
    let instructions = match filter {
        Filter::Compile => programs::COMPILE,
        Filter::Load => programs::LOAD,
        Filter::Serve => programs::SERVE,
    };
    let program: Vec<sock_filter> =
        instructions.iter().map(|&(code, jt, jf, k)| sock_filter { code, jt, jf, k }).collect();
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}
