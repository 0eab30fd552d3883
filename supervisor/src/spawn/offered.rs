//! What this host gives a worker at its birth, found out by trying.
#![forbid(unsafe_code)]

use conclave_ipc::layers::{Layer, Layers};
use nix::mount::{MsFlags, mount};
use nix::sys::wait::{WaitStatus, waitpid};

use super::{
    Identity, NAMESPACES, NESTING, Step, clone_child, clone_flags, failed, put, seal_nothing,
};

/// The layers of a worker's birth that work here for this user, tried one by one.
pub(super) fn offered_layers() -> Layers {
    let user = Layers::NONE.with(Layer::UserNamespace);
    let mount = user.with(Layer::MountNamespace);
    // Some hosts give out user namespaces whose privileges are void. Without an empty
    // root the others are worth little, so it is both or nothing.
    if !works(mount) {
        return Layers::NONE;
    }
    NAMESPACES
        .into_iter()
        .map(|(layer, _)| layer)
        .chain([Layer::NoNestedNamespaces])
        .filter(|layer| works(user.with(*layer)))
        .fold(mount, Layers::with)
}

fn works(layers: Layers) -> bool {
    let Ok(identity) = Identity::current() else { return false };
    let mut child = || match try_layers(&identity, layers) {
        Ok(()) => 0,
        Err(step) => step as i32,
    };
    succeeds(layers, &mut child)
}

/// Whether mapped code can be sealed here. Asked in a child, for a filter of the service
/// manager's that does not know the call may kill for it.
pub(super) fn sealing() -> bool {
    succeeds(Layers::NONE, &mut seal_nothing)
}

fn succeeds(layers: Layers, child: &mut dyn FnMut() -> i32) -> bool {
    match clone_child(clone_flags(layers), None, child) {
        Ok((pid, _)) => matches!(waitpid(pid, None), Ok(WaitStatus::Exited(_, 0))),
        Err(_) => false,
    }
}

/// Runs in the child.
fn try_layers(identity: &Identity, layers: Layers) -> Result<(), Step> {
    identity.apply().map_err(failed(Step::Identity))?;
    if layers.contains(Layer::MountNamespace) {
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
            .map_err(failed(Step::Privileges))?;
    }
    if layers.contains(Layer::NoNestedNamespaces) {
        put(NESTING, c"0").map_err(failed(Step::Privileges))?;
    }
    Ok(())
}
