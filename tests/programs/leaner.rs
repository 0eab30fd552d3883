//! The worker, but for one rule of one of its system call filters: the one that this program's
//! own file name tells, `FILTER-INDEX` after the last `without-`. A worker is given neither
//! words nor an environment that could say so.

use std::path::Path;

use conclave_ipc::exit::WorkerExit;
use conclave_worker::confine::{Filter, Ladder};
use conclave_worker::{BoundedAllocator, descend};
use seccompiler::sock_filter;

include!(concat!(env!("OUT_DIR"), "/leaner.rs"));

#[global_allocator]
static ALLOCATOR: BoundedAllocator = BoundedAllocator;

/// All steps down, with one filter's program exchanged.
struct Leaner {
    filter: String,
    left_out: usize,
}

impl Leaner {
    fn from_file_name(program: &Path) -> Option<Self> {
        let (_, rule) = program.file_name()?.to_str()?.rsplit_once("without-")?;
        let (filter, left_out) = rule.split_once('-')?;
        Some(Self { filter: filter.to_owned(), left_out: left_out.parse().ok()? })
    }
}

impl Ladder for Leaner {
    fn program(&self, filter: Filter) -> Vec<sock_filter> {
        let name = match filter {
            Filter::Compile => "compile",
            Filter::Load => "load",
            Filter::Zygote => "zygote",
            Filter::Serve => "serve",
        };
        let exchanged = LEANER
            .iter()
            .find(|(of, rule, _)| *of == name && *of == self.filter && *rule == self.left_out);
        match exchanged {
            Some((_, _, program)) => {
                program.iter().map(|&(code, jt, jf, k)| sock_filter { code, jt, jf, k }).collect()
            }
            None => filter.program(),
        }
    }
}

fn main() {
    let named = std::env::current_exe().ok();
    let leaner = named.as_deref().and_then(Leaner::from_file_name);
    conclave_worker::end(leaner.map_or(WorkerExit::Usage, |leaner| descend(&leaner)))
}
