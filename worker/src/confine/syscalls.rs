//! The system call filters: `seccomp.json`, compiled by the build script.
//!
//! Lost: every call that is not listed, and listed calls with other arguments; the process
//! tells which one it was and is killed. Filters stack: a later one can only take more away.
#![forbid(unsafe_code)]

use std::io;

use seccompiler::sock_filter;

mod programs {
    include!(concat!(env!("OUT_DIR"), "/filters.rs"));
}

/// One of the filters in `seccomp.json`.
#[derive(Debug, Clone, Copy)]
pub enum Filter {
    /// Turns a module into native code.
    Compile,
    /// Maps native code; may install one of the next.
    Load,
    /// Starts a guest and forks; may install the next.
    Zygote,
    /// Evaluates requests.
    Serve,
}

impl Filter {
    /// The program that ships.
    #[must_use]
    pub fn program(self) -> Vec<sock_filter> {
        let instructions = match self {
            Self::Compile => programs::COMPILE,
            Self::Load => programs::LOAD,
            Self::Zygote => programs::ZYGOTE,
            Self::Serve => programs::SERVE,
        };
        instructions.iter().map(|&(code, jt, jf, k)| sock_filter { code, jt, jf, k }).collect()
    }
}

/// Turns a filter on for this thread, the only one there is.
///
/// # Errors
/// The kernel refused it.
pub(super) fn install(program: &[sock_filter]) -> io::Result<()> {
    seccompiler::apply_filter(program).map_err(io::Error::other)
}
