//! The root directory becomes an empty, read-only file system of one page.
//!
//! Lost: every path. What was open stays open.
#![forbid(unsafe_code)]

use std::io;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

/// Any directory that exists on every system; it is only covered, never used.
const COVERED: &str = "/tmp";

/// Needs a mount namespace of its own and the capabilities of its user namespace.
///
/// # Errors
/// The first of the calls below that fails.
pub(super) fn enter_empty_root() -> io::Result<()> {
    let none = None::<&str>;
    // What happens here must not spread to the host's mounts.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(
        Some("none"),
        COVERED,
        Some("tmpfs"),
        MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("size=4k,nr_inodes=1,mode=0555"),
    )?;
    chdir(COVERED)?;
    // The new root covers the old one at the same place, so no directory to put the old
    // one in is needed (pivot_root(2), "pivot_root(".", ".")").
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    Ok(())
}
