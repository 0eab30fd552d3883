//! Files: reading what is the host's, writing anywhere, changing what is mounted.
#![forbid(unsafe_code)]

use std::ffi::CStr;

use libc::{
    AT_EMPTY_PATH, AT_FDCWD, MNT_DETACH, MS_BIND, MS_REMOUNT, O_CREAT, O_DIRECTORY, O_PATH,
    O_RDONLY, O_RDWR, O_WRONLY, S_IFBLK,
};

use super::kernel::{Gain, call};
use super::{Attempt, NO_DESCRIPTOR, alone, capabilities, empty_root, filtered, kernel};

const CHANGES_NOTHING: &str = "tells about, or changes, an empty directory that is the worker's";

fn open(path: &CStr, flags: i32) -> Gain {
    call!(libc::SYS_openat, AT_FDCWD, path, flags, 0o600)
}

fn handle() -> [u32; 34] {
    let mut handle = [0; 34];
    handle[0] = 128;
    handle
}

pub(super) const ATTEMPTS: &[Attempt] = &[
    filtered("file/shadow", "reads the host's password hashes", "openat", NO_DESCRIPTOR, || {
        open(c"/etc/shadow", O_RDONLY)
    }),
    filtered("file/passwd", "reads the host's users", "openat", NO_DESCRIPTOR, || {
        open(c"/etc/passwd", O_RDONLY)
    }),
    filtered("file/openat2", "reads a file by the newer call", "openat2", NO_DESCRIPTOR, || {
        call!(libc::SYS_openat2, AT_FDCWD, c"/etc/hostname", [0_u64; 3].as_ptr(), 24)
    }),
    filtered(
        "file/from-path-descriptor",
        "opens the root directory as a starting point",
        "openat",
        NO_DESCRIPTOR,
        || {
            let root = open(c"/", O_PATH)?;
            call!(libc::SYS_openat, root, c"etc/hostname", O_RDONLY)
        },
    ),
    filtered("file/list-root", "lists the root directory", "openat", NO_DESCRIPTOR, || {
        let root = open(c"/", O_RDONLY | O_DIRECTORY)?;
        let mut entries = [0_u8; 4096];
        call!(libc::SYS_getdents64, root, entries.as_mut_ptr(), entries.len())
    }),
    filtered(
        "file/stat",
        "looks whether a file is there",
        "newfstatat",
        empty_root(&["ENOENT"]),
        || call!(libc::SYS_newfstatat, AT_FDCWD, c"/etc/shadow", [0_u64; 32].as_mut_ptr(), 0),
    ),
    filtered(
        "file/statx",
        "looks at a file by the newer call",
        "statx",
        empty_root(&["ENOENT"]),
        || call!(libc::SYS_statx, AT_FDCWD, c"/etc/shadow", 0, 0x7ff, [0_u64; 32].as_mut_ptr()),
    ),
    filtered(
        "file/access",
        "looks whether it may read a file",
        "faccessat",
        empty_root(&["ENOENT"]),
        || call!(libc::SYS_faccessat, AT_FDCWD, c"/root/.ssh", 4),
    ),
    filtered(
        "file/readlink",
        "asks for the path of its program",
        "readlinkat",
        empty_root(&["ENOENT"]),
        || call!(libc::SYS_readlinkat, AT_FDCWD, c"/proc/self/exe", [0_u8; 64].as_mut_ptr(), 64),
    ),
    filtered("file/getcwd", "asks where it is", "getcwd", alone(CHANGES_NOTHING), || {
        call!(libc::SYS_getcwd, [0_u8; 64].as_mut_ptr(), 64)
    }),
    filtered("file/statfs", "asks about the file system", "statfs", alone(CHANGES_NOTHING), || {
        call!(libc::SYS_statfs, c"/", [0_u64; 32].as_mut_ptr())
    }),
    filtered(
        "file/own-memory",
        "overwrites its code through /proc/self/mem",
        "openat",
        NO_DESCRIPTOR,
        || {
            let memory = open(c"/proc/self/mem", O_RDWR)?;
            let code = open as fn(&'static CStr, i32) -> Gain as *const ();
            call!(libc::SYS_pwrite64, memory, code, 1, code)
        },
    ),
    filtered(
        "file/supervisor-environment",
        "reads the supervisor's environment",
        "openat",
        NO_DESCRIPTOR,
        || open(&super::processes::path_of_supervisor(c"environ"), O_RDONLY),
    ),
    filtered(
        "file/supervisor-memory",
        "opens the supervisor's memory",
        "openat",
        NO_DESCRIPTOR,
        || open(&super::processes::path_of_supervisor(c"mem"), O_RDWR),
    ),
    filtered(
        "file/sibling-maps",
        "reads the memory map of another worker",
        "openat",
        NO_DESCRIPTOR,
        || open(&super::processes::path_of_sibling(c"maps"), O_RDONLY),
    ),
    filtered(
        "file/sibling-descriptor",
        "opens a descriptor of another worker again",
        "openat",
        NO_DESCRIPTOR,
        || open(&super::processes::path_of_sibling(c"fd/3"), O_RDWR),
    ),
    filtered(
        "file/reopen-image",
        "opens its own code again for writing",
        "openat",
        NO_DESCRIPTOR,
        || open(c"/proc/self/fd/4", O_RDWR),
    ),
    filtered(
        "file/create-in-tmp",
        "makes a file where everybody may",
        "openat",
        NO_DESCRIPTOR,
        || open(c"/tmp/conclave-red-team", O_WRONLY | O_CREAT),
    ),
    filtered(
        "file/create-in-root",
        "makes a file in its root directory",
        "openat",
        NO_DESCRIPTOR,
        || open(c"/conclave-red-team", O_WRONLY | O_CREAT),
    ),
    filtered("file/unnamed", "makes a file without a name", "openat", NO_DESCRIPTOR, || {
        open(c"/tmp", libc::O_TMPFILE | O_RDWR)
    }),
    filtered("file/climb-out", "climbs up from where it is", "chdir", NO_DESCRIPTOR, || {
        for _ in 0..50 {
            call!(libc::SYS_chdir, c"..")?;
        }
        open(c"etc/hostname", O_RDONLY)
    }),
    filtered(
        "file/fchdir",
        "goes to a directory by its descriptor",
        "fchdir",
        kernel(&["ENOTDIR"]),
        || call!(libc::SYS_fchdir, 4),
    ),
    filtered(
        "file/chroot",
        "makes itself another root directory",
        "chroot",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_chroot, c"/"),
    ),
    filtered(
        "file/pivot-root",
        "changes its root directory",
        "pivot_root",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_pivot_root, c".", c"."),
    ),
    filtered("file/mount", "mounts a file system", "mount", capabilities(&["EPERM"]), || {
        call!(libc::SYS_mount, c"none", c"/", c"tmpfs", 0, 0)
    }),
    filtered("file/remount", "makes its root writable", "mount", capabilities(&["EPERM"]), || {
        call!(libc::SYS_mount, c"none", c"/", c"none", MS_REMOUNT | MS_BIND, 0)
    }),
    filtered(
        "file/umount",
        "uncovers what lies below its root",
        "umount2",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_umount2, c"/", MNT_DETACH),
    ),
    filtered(
        "file/fsopen",
        "makes a file system by the newer calls",
        "fsopen",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_fsopen, c"tmpfs", 0),
    ),
    filtered(
        "file/fspick",
        "takes a mounted file system to change it",
        "fspick",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_fspick, AT_FDCWD, c"/", 0),
    ),
    filtered("file/fsconfig", "configures a file system", "fsconfig", kernel(&["EINVAL"]), || {
        call!(libc::SYS_fsconfig, 3, 6, 0, 0, 0)
    }),
    filtered(
        "file/fsmount",
        "mounts what it has configured",
        "fsmount",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_fsmount, 3, 0, 0),
    ),
    filtered(
        "file/open-tree",
        "clones a tree of mounts",
        "open_tree",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_open_tree, AT_FDCWD, c"/", 1),
    ),
    filtered("file/move-mount", "moves a mount", "move_mount", capabilities(&["EPERM"]), || {
        call!(libc::SYS_move_mount, AT_FDCWD, c"/", AT_FDCWD, c"/", 0)
    }),
    filtered(
        "file/mount-setattr",
        "changes what a mount allows",
        "mount_setattr",
        capabilities(&["EPERM"]),
        || {
            let attributes = [0_u64, 1, 0, 0];
            call!(libc::SYS_mount_setattr, AT_FDCWD, c"/", 0, attributes.as_ptr(), 32)
        },
    ),
    filtered(
        "file/statmount",
        "asks about a mount by its number",
        "statmount",
        kernel(&["ENOENT", "EPERM", "EINVAL", "ENOSYS"]),
        || {
            let request = [24_u64, 1, 1];
            call!(457_i64, request.as_ptr(), [0_u64; 64].as_mut_ptr(), 512, 0)
        },
    ),
    filtered("file/listmount", "lists all mounts", "listmount", alone(CHANGES_NOTHING), || {
        let request = [24_u64, u64::MAX, 0];
        call!(458_i64, request.as_ptr(), [0_u64; 64].as_mut_ptr(), 64, 0)
    }),
    filtered(
        "file/handle",
        "asks for a handle that outlives names",
        "name_to_handle_at",
        alone(CHANGES_NOTHING),
        || {
            let (mut handle, mut mount) = (handle(), 0_i32);
            call!(
                libc::SYS_name_to_handle_at,
                AT_FDCWD,
                c"/",
                handle.as_mut_ptr(),
                &raw mut mount,
                0
            )
        },
    ),
    filtered(
        "file/open-handle",
        "opens a file by its handle, past every directory",
        "open_by_handle_at",
        capabilities(&["EPERM"]),
        || call!(libc::SYS_open_by_handle_at, AT_FDCWD, handle().as_ptr(), O_RDONLY),
    ),
    filtered(
        "file/mknod",
        "makes a device",
        "mknodat",
        empty_root(&["EROFS", "ENOENT", "EPERM"]),
        || call!(libc::SYS_mknodat, AT_FDCWD, c"/disk", S_IFBLK | 0o600, 0x800),
    ),
    filtered("file/dev-mem", "opens the machine's memory", "openat", NO_DESCRIPTOR, || {
        open(c"/dev/mem", O_RDWR)
    }),
    filtered("file/dev-kvm", "opens the hypervisor", "openat", NO_DESCRIPTOR, || {
        open(c"/dev/kvm", O_RDWR)
    }),
    filtered(
        "file/dev-null",
        "opens a device that is everybody's",
        "openat",
        NO_DESCRIPTOR,
        || open(c"/dev/null", O_RDWR),
    ),
    filtered("file/inotify", "watches files", "inotify_init1", NO_DESCRIPTOR, || {
        call!(libc::SYS_inotify_init1, 0)
    }),
    filtered("file/fanotify", "watches a file system", "fanotify_init", NO_DESCRIPTOR, || {
        call!(libc::SYS_fanotify_init, 0x200, 0)
    }),
    filtered("file/mkdir", "makes a directory", "mkdirat", empty_root(&["EROFS"]), || {
        call!(libc::SYS_mkdirat, AT_FDCWD, c"/directory", 0o700)
    }),
    filtered(
        "file/symlink",
        "makes a symbolic link",
        "symlinkat",
        empty_root(&["ENOENT", "EROFS"]),
        || call!(libc::SYS_symlinkat, c"/etc/shadow", AT_FDCWD, c"/tmp/conclave-red-team"),
    ),
    filtered(
        "file/link",
        "gives its image a name",
        "linkat",
        empty_root(&["ENOENT", "EROFS", "EXDEV"]),
        || call!(libc::SYS_linkat, 4, c"", AT_FDCWD, c"/image", AT_EMPTY_PATH),
    ),
    filtered(
        "file/rename",
        "renames a file",
        "renameat2",
        empty_root(&["ENOENT", "EROFS"]),
        || {
            call!(
                libc::SYS_renameat2,
                AT_FDCWD,
                c"/tmp/conclave-red-team",
                AT_FDCWD,
                c"/tmp/conclave-red-team-2",
                0
            )
        },
    ),
    filtered("file/unlink", "removes a file", "unlinkat", empty_root(&["ENOENT", "EROFS"]), || {
        call!(libc::SYS_unlinkat, AT_FDCWD, c"/tmp/conclave-red-team", 0)
    }),
    filtered(
        "file/chmod",
        "changes permissions",
        "fchmodat",
        empty_root(&["ENOENT", "EROFS"]),
        || call!(libc::SYS_fchmodat, AT_FDCWD, c"/tmp", 0o777),
    ),
    filtered(
        "file/chmod-root",
        "makes its root writable by its mode",
        "fchmodat",
        empty_root(&["EROFS"]),
        || call!(libc::SYS_fchmodat, AT_FDCWD, c"/", 0o777),
    ),
    filtered("file/chown", "gives a file to root", "fchownat", empty_root(&["EROFS"]), || {
        call!(libc::SYS_fchownat, AT_FDCWD, c"/", 0, 0, 0)
    }),
    filtered(
        "file/utime",
        "changes the times of a file",
        "utimensat",
        empty_root(&["EROFS"]),
        || call!(libc::SYS_utimensat, AT_FDCWD, c"/", 0, 0),
    ),
    filtered(
        "file/setxattr",
        "writes an attribute of a file",
        "setxattr",
        empty_root(&["EROFS"]),
        || call!(libc::SYS_setxattr, c"/", c"user.a", c"a", 1, 0),
    ),
    filtered("file/truncate", "empties a file", "truncate", empty_root(&["ENOENT"]), || {
        call!(libc::SYS_truncate, c"/etc/hostname", 0)
    }),
    filtered(
        "file/other-root",
        "reads a file through another process's root",
        "openat",
        NO_DESCRIPTOR,
        || open(&super::processes::path_of_supervisor(c"root/etc/hostname"), O_RDONLY),
    ),
];
