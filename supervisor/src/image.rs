//! Sealed memory files: what a worker is given to map or read can't change below it.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// `MFD_NOEXEC_SEAL` (Linux 6.3): the file can never be executed. It can still be mapped
/// executable, which is what the serving workers do.
const NOEXEC_SEAL: MFdFlags = MFdFlags::from_bits_retain(0x0008);

/// How often sealing is tried, and how long after a failure. The kernel refuses while any
/// page of the file is in other hands, which may be its own: memory being moved about, or
/// lists of new pages of a processor that is too busy to be drained of them in the 155 ms
/// that each attempt waits (`memfd_wait_for_pins`, mm/memfd.c).
const SEAL_ATTEMPTS: u32 = 20;
const SEAL_PAUSE: Duration = Duration::from_millis(50);

/// A memory file that is still being written.
#[derive(Debug)]
pub(crate) struct Draft(File);

/// A memory file that nobody can change any more.
#[derive(Debug)]
pub(crate) struct Image {
    file: OwnedFd,
    /// Length in bytes.
    pub(crate) length: u64,
}

impl Draft {
    /// An empty memory file; the name shows in `/proc` only.
    ///
    /// # Errors
    /// No memory, or no descriptor left.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = match memfd_create(c"conclave", flags | NOEXEC_SEAL) {
            Err(Errno::EINVAL) => memfd_create(c"conclave", flags)?,
            other => other?,
        };
        Ok(Self(File::from(file)))
    }

    /// A memory file of that length, which can't change, full of zeros that take no memory.
    ///
    /// # Errors
    /// See [`Draft::new`].
    pub(crate) fn of_length(bytes: u64) -> io::Result<Self> {
        let draft = Self::new()?;
        draft.0.set_len(bytes)?;
        let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
        fcntl(&draft.0, FcntlArg::F_ADD_SEALS(seals))?;
        Ok(draft)
    }

    /// Seals what was written by whoever had the descriptor; they must be gone, or have it
    /// mapped for writing no more. This can take as long as seconds on a busy machine.
    ///
    /// # Errors
    /// Somebody still has the file mapped for writing.
    pub(crate) fn seal(mut self) -> io::Result<Image> {
        let length = self.0.metadata()?.len();
        self.0.rewind()?;
        let seals = SealFlag::F_SEAL_WRITE
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_SEAL;
        let mut attempts = 1;
        while let Err(error) = fcntl(&self.0, FcntlArg::F_ADD_SEALS(seals)) {
            if error != Errno::EBUSY || attempts == SEAL_ATTEMPTS {
                return Err(error.into());
            }
            attempts += 1;
            thread::sleep(SEAL_PAUSE);
        }
        Ok(Image { file: self.0.into(), length })
    }
}

impl Write for Draft {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl AsFd for Draft {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Image {
    /// A sealed file that holds `bytes`. As slow as [`Draft::seal`].
    ///
    /// # Errors
    /// No memory, or no descriptor left.
    pub(crate) fn of(bytes: &[u8]) -> io::Result<Self> {
        let mut draft = Draft::new()?;
        draft.write_all(bytes)?;
        draft.seal()
    }

    /// A reader of its own, from the beginning.
    ///
    /// # Errors
    /// No descriptor left.
    pub(crate) fn reader(&self) -> io::Result<File> {
        let mut file = File::from(self.file.try_clone()?);
        file.rewind()?;
        Ok(file)
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_sealed_image_can_be_read_and_not_written() {
        let image = Image::of(b"code").unwrap();
        let mut text = String::new();
        image.reader().unwrap().read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), image.length), ("code", 4));
        let error = image.reader().unwrap().write(b"x").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EPERM as i32));
    }

    #[test]
    fn a_draft_of_fixed_length_can_be_filled_and_not_resized() {
        let mut draft = Draft::of_length(8).unwrap();
        draft.write_all(b"state").unwrap();
        for length in [7, 9] {
            let error = draft.0.set_len(length).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(Errno::EPERM as i32));
        }
        let mut bytes = Vec::new();
        draft.seal().unwrap().reader().unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"state\0\0\0");
    }
}
