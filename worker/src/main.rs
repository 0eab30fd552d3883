//! The `conclave-worker` program. See the library for what it does.
#![forbid(unsafe_code)]

use conclave_ipc::exit::WorkerExit;
use conclave_worker::BoundedAllocator;

#[global_allocator]
static ALLOCATOR: BoundedAllocator = BoundedAllocator;

fn main() {
    let exit = conclave_worker::main();
    if exit == WorkerExit::Usage {
        // Goes nowhere unless a person has started this program.
        #[expect(clippy::print_stderr, reason = "before any confinement, for a person")]
        {
            eprintln!("conclave-worker is started by conclave, not by hand");
        }
    }
    conclave_worker::end(exit)
}
