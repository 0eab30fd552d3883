//! The worker's end of the channel: blocking, and typed by direction.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};

use crate::frame::{self, FrameBuffer, FrameError};
use crate::limits::{FRAME_BYTES_MAX, REPLY_BYTES_MAX};
use crate::message::{Reply, Request};

/// Why the channel can't be used any more.
#[derive(Debug)]
pub enum ChannelError {
    /// The peer closed the channel between two frames.
    Closed,
    /// The peer closed the channel within a frame.
    Truncated,
    /// A frame is wrong.
    Frame(FrameError),
    /// Reading or writing failed.
    Io(io::Error),
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Closed => "channel closed",
            Self::Truncated => "channel closed within a frame",
            Self::Frame(_) => "bad frame",
            Self::Io(_) => "channel failed",
        })
    }
}

impl std::error::Error for ChannelError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Frame(source) => Some(source),
            Self::Io(source) => Some(source),
            Self::Closed | Self::Truncated => None,
        }
    }
}

impl From<FrameError> for ChannelError {
    fn from(error: FrameError) -> Self {
        Self::Frame(error)
    }
}

/// Sends [`Reply`], receives [`Request`], over anything that reads and writes.
#[derive(Debug)]
pub struct WorkerEnd<S> {
    stream: S,
    incoming: FrameBuffer,
    outgoing: Vec<u8>,
    /// Whether the frame at the front of `incoming` was already handed out.
    handed_out: bool,
}

impl<S: Read + Write> WorkerEnd<S> {
    /// The worker's end over a connected stream.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            incoming: FrameBuffer::new(FRAME_BYTES_MAX),
            outgoing: Vec::new(),
            handed_out: false,
        }
    }

    /// The stream.
    pub fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    /// Lets go of the last message, and of memory that only a large one needed.
    ///
    /// # Errors
    /// What follows it is no frame.
    pub fn release(&mut self) -> Result<(), ChannelError> {
        if self.handed_out {
            self.handed_out = false;
            self.incoming.consume()?;
        }
        frame::shrink(&mut self.outgoing);
        Ok(())
    }

    /// Waits for the next message; the previous one is gone.
    ///
    /// # Errors
    /// [`ChannelError::Closed`] is the orderly end.
    pub fn receive(&mut self) -> Result<Request<'_>, ChannelError> {
        self.release()?;
        while self.incoming.body().is_none() {
            match self.stream.read(self.incoming.space()) {
                Ok(0) if self.incoming.is_empty() => return Err(ChannelError::Closed),
                Ok(0) => return Err(ChannelError::Truncated),
                Ok(read) => self.incoming.advance(read)?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(ChannelError::Io(error)),
            }
        }
        self.handed_out = true;
        Ok(frame::decode(self.incoming.body().unwrap_or_default())?)
    }

    /// Sends one message.
    ///
    /// # Errors
    /// A message beyond [`REPLY_BYTES_MAX`], or a broken channel.
    pub fn send(&mut self, reply: &Reply<'_>) -> Result<(), ChannelError> {
        frame::encode(reply, REPLY_BYTES_MAX, &mut self.outgoing)?;
        self.stream.write_all(&self.outgoing).map_err(ChannelError::Io)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    /// Reads from a script, writes to nowhere.
    struct Script(Cursor<Vec<u8>>);

    impl Read for Script {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.0.read(buf)
        }
    }

    impl Write for Script {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn compile_frame() -> Vec<u8> {
        let mut out = Vec::new();
        frame::encode(&Request::Compile, FRAME_BYTES_MAX, &mut out).unwrap();
        out
    }

    #[test]
    fn messages_are_received_one_by_one_until_the_orderly_end() {
        let mut script = compile_frame();
        script.extend(compile_frame());
        let mut end = WorkerEnd::new(Script(Cursor::new(script)));
        assert_eq!(end.receive().unwrap(), Request::Compile);
        assert_eq!(end.receive().unwrap(), Request::Compile);
        assert!(matches!(end.receive(), Err(ChannelError::Closed)));
    }

    #[test]
    fn a_channel_that_ends_within_a_frame_is_not_an_orderly_end() {
        let mut script = compile_frame();
        script.pop();
        let mut end = WorkerEnd::new(Script(Cursor::new(script)));
        assert!(matches!(end.receive(), Err(ChannelError::Truncated)));
    }
}
