//! Who the daemon runs as: never root.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::io;

use caps::CapSet;
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, User, geteuid, initgroups, setgroups, setresgid, setresuid};
use thiserror::Error;

/// The account that a package makes for the daemon.
const OWN_ACCOUNT: &str = "conclave";

/// The account of last resort, which every system has.
const LAST_RESORT: &str = "nobody";

/// Why the process can't give up root.
#[derive(Debug, Error)]
pub(crate) enum IdentityError {
    /// There is no such account.
    #[error("there is no user {0:?}")]
    NoAccount(String),
    /// The account is root's.
    #[error("user {0:?} is root; no process of Conclave runs as root")]
    StillRoot(String),
    /// A user was named, but only root can become another user.
    #[error("--user {0}: only root can become another user")]
    NotRoot(String),
    /// A step failed.
    #[error("can't give up root: {0}: {1}")]
    Step(&'static str, io::Error),
}

/// Gives up root for good if the process has it, and from then on can't gain a privilege
/// and can't be looked into by other processes of its user. Returns the account's name if
/// it changed.
///
/// # Errors
/// Root can't be given up: the process must not go on.
pub(crate) fn give_up_root(wanted: Option<&str>) -> Result<Option<String>, IdentityError> {
    let step =
        |name: &'static str| move |error: nix::Error| IdentityError::Step(name, error.into());
    let changed = match (geteuid().is_root(), wanted) {
        (true, wanted) => Some(become_user(&account(wanted)?)?),
        (false, Some(name)) if !is_current(name) => {
            return Err(IdentityError::NotRoot(name.to_owned()));
        }
        (false, _) => None,
    };
    prctl::set_no_new_privs().map_err(step("no_new_privs"))?;
    prctl::set_dumpable(false).map_err(step("dumpable"))?;
    Ok(changed)
}

fn is_current(name: &str) -> bool {
    matches!(User::from_name(name), Ok(Some(user)) if user.uid == geteuid())
}

fn account(wanted: Option<&str>) -> Result<User, IdentityError> {
    let find = |name: &str| {
        User::from_name(name).map_err(|error| IdentityError::Step("look up the user", error.into()))
    };
    let (name, user) = match wanted {
        Some(name) => (name, find(name)?),
        None => match find(OWN_ACCOUNT)? {
            Some(user) => (OWN_ACCOUNT, Some(user)),
            None => (LAST_RESORT, find(LAST_RESORT)?),
        },
    };
    match user {
        None => Err(IdentityError::NoAccount(name.to_owned())),
        Some(user) if user.uid.is_root() => Err(IdentityError::StillRoot(name.to_owned())),
        Some(user) => Ok(user),
    }
}

/// Becomes the owner of another process for good, if this one is root.
///
/// # Errors
/// That is root, or a step failed: the process must not go on.
pub(crate) fn become_owner(uid: Uid, gid: Gid) -> Result<(), IdentityError> {
    if !geteuid().is_root() {
        return Ok(());
    }
    if uid.is_root() {
        return Err(IdentityError::StillRoot(uid.to_string()));
    }
    become_ids(&uid.to_string(), uid, gid, || setgroups(&[]))
}

fn become_user(user: &User) -> Result<String, IdentityError> {
    let name = CString::new(user.name.as_str())
        .map_err(|error| IdentityError::Step("name of the user", error.into()))?;
    become_ids(&user.name, user.uid, user.gid, || initgroups(&name, user.gid))?;
    Ok(user.name.clone())
}

fn become_ids(
    name: &str,
    uid: Uid,
    gid: Gid,
    set_groups: impl FnOnce() -> nix::Result<()>,
) -> Result<(), IdentityError> {
    let step =
        |name: &'static str| move |error: nix::Error| IdentityError::Step(name, error.into());
    // While CAP_SETPCAP is still there; afterwards no executed file can bring one back.
    caps::clear(None, CapSet::Bounding)
        .map_err(|error| IdentityError::Step("bounding set", io::Error::other(error)))?;
    set_groups().map_err(step("groups"))?;
    setresgid(gid, gid, gid).map_err(step("group"))?;
    setresuid(uid, uid, uid).map_err(step("user"))?;
    if setresuid(nix::unistd::ROOT, nix::unistd::ROOT, nix::unistd::ROOT).is_ok() {
        return Err(IdentityError::StillRoot(name.to_owned()));
    }
    Ok(())
}
