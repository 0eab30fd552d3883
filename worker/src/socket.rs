//! The socket of the worker's end of the channel.
#![forbid(unsafe_code)]

use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

/// A socket that can be made to take descriptors which come with a message.
#[derive(Debug)]
pub struct Socket {
    stream: UnixStream,
    takes_descriptors: bool,
    taken: Option<OwnedFd>,
}

impl Socket {
    /// Over that stream; takes none at first.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, takes_descriptors: false, taken: None }
    }

    /// Whether descriptors are taken from now on; the kernel drops them otherwise.
    pub fn take_descriptors(&mut self, take: bool) {
        self.takes_descriptors = take;
    }

    /// The descriptor that came last, if nobody had it yet.
    pub fn descriptor(&mut self) -> Option<OwnedFd> {
        self.taken.take()
    }

    fn read_with_descriptor(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(
            self.stream.as_fd(),
            &mut [IoSliceMut::new(buffer)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        // More than one do not fit, and are dropped by the kernel.
        if message.flags.contains(ReturnFlags::CTRUNC) {
            return Err(io::Error::other("a descriptor could not be taken"));
        }
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = part {
                self.taken = descriptors.last();
            }
        }
        Ok(message.bytes)
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.takes_descriptors {
            self.read_with_descriptor(buffer)
        } else {
            self.stream.read(buffer)
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
