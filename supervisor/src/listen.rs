//! The Unix socket that clients connect to: made, guarded, and removed again.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};
use nix::unistd::{Group, chown};
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::net::unix::UCred;

/// Why there is no socket.
#[derive(Debug, Error)]
pub(crate) enum ListenError {
    /// Somebody answers on it.
    #[error("another process listens on {}", .0.display())]
    InUse(PathBuf),
    /// Something that is not a socket is in the way.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// There is no such group.
    #[error("there is no group {0:?} for the socket")]
    NoGroup(String),
    /// A step failed.
    #[error("can't {what} {}: {cause}", .path.display())]
    Step { what: &'static str, path: PathBuf, cause: io::Error },
}

/// A socket that we made. Dropping it removes it, unless another took its place.
#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) listener: UnixListener,
    path: PathBuf,
    identity: (u64, u64),
}

impl Socket {
    /// Listens on `path` with these permissions and group. Must run in a tokio runtime.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub(crate) fn bind(path: &Path, mode: u32, group: Option<&str>) -> Result<Self, ListenError> {
        let step = |what: &'static str| {
            move |cause: io::Error| ListenError::Step { what, path: path.to_owned(), cause }
        };
        remove_stale(path)?;
        // Nobody can connect before the permissions are the right ones.
        let old = umask(Mode::from_bits_retain(0o777));
        let bound = StdListener::bind(path);
        umask(old);
        let listener = bound.map_err(step("listen on"))?;
        listener.set_nonblocking(true).map_err(step("listen on"))?;
        // From here on the file is removed again if a step fails.
        let socket = Self {
            identity: identity_of(path).map_err(step("look at"))?,
            listener: UnixListener::from_std(listener).map_err(step("listen on"))?,
            path: path.to_owned(),
        };
        if let Some(name) = group {
            let group = Group::from_name(name)
                .map_err(io::Error::from)
                .map_err(step("find the group of"))?
                .ok_or_else(|| ListenError::NoGroup(name.to_owned()))?;
            chown(path, None, Some(group.gid))
                .map_err(io::Error::from)
                .map_err(step("give to its group"))?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(step("set permissions of"))?;
        Ok(socket)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = matches!(identity_of(&self.path), Ok(identity) if identity == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "socket can't be removed");
        }
    }
}

fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Removes a socket that a daemon left behind that did not end in order.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let step = |what: &'static str| {
        move |cause: io::Error| ListenError::Step { what, path: path.to_owned(), cause }
    };
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(step("look at"))?,
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    match is_listened_on(path, metadata.permissions()) {
        Ok(false) => fs::remove_file(path).map_err(step("remove the stale socket")),
        Ok(true) => Err(ListenError::InUse(path.to_owned())),
        Err(error) => Err(step("connect to")(error)),
    }
}

/// Whether somebody listens on a socket that may have permissions which keep out even its
/// owner; they are lifted for the question and put back.
fn is_listened_on(path: &Path, permissions: fs::Permissions) -> io::Result<bool> {
    let connect = || match StdStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(error),
        // Even a full queue means that somebody is there.
        Ok(_) | Err(_) => Ok(true),
    };
    connect().or_else(|_denied| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        let answer = connect();
        fs::set_permissions(path, permissions)?;
        answer
    })
}

/// Which clients may ask.
#[derive(Debug, Clone)]
pub(crate) struct AllowedPeers {
    pub(crate) uids: Vec<u32>,
    pub(crate) gids: Vec<u32>,
}

impl AllowedPeers {
    /// Whether a client with these credentials may. Without any list everybody may who
    /// could open the socket.
    pub(crate) fn admits(&self, peer: &UCred) -> bool {
        let open = self.uids.is_empty() && self.gids.is_empty();
        open || self.uids.contains(&peer.uid()) || self.gids.contains(&peer.gid())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_has_its_permissions_and_is_removed_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let socket = Socket::bind(&path, 0o640, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(StdListener::bind(&path).unwrap());
        let socket = Socket::bind(&path, 0o600, None).unwrap();
        assert!(matches!(Socket::bind(&path, 0o600, None), Err(ListenError::InUse(_))));
        drop(socket);
        fs::write(&path, "").unwrap();
        assert!(matches!(Socket::bind(&path, 0o600, None), Err(ListenError::NotASocket(_))));
    }

    #[tokio::test]
    async fn a_socket_that_another_has_replaced_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let socket = Socket::bind(&path, 0o600, None).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = StdListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
    }
}
