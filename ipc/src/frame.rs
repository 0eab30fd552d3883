//! Bytes to messages and back, without I/O.

use std::fmt;

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bincode::{BorrowDecode, Encode};

use crate::limits::FRAME_BYTES_MAX;

/// Bytes of the length in front of every body.
const HEADER_BYTES: usize = 4;

/// What a receive buffer starts with and returns to: more than most requests need.
const BUFFER_BYTES_KEPT: usize = 64 << 10;

const CONFIG: Configuration<LittleEndian, Varint, Limit<FRAME_BYTES_MAX>> =
    bincode::config::standard().with_limit::<FRAME_BYTES_MAX>();

/// Why bytes are not a frame, or a message not sendable.
#[derive(Debug)]
pub enum FrameError {
    /// The body is longer than the channel allows.
    TooLong {
        /// Length announced or encoded, in bytes.
        length: usize,
        /// The channel's limit, in bytes.
        limit: usize,
    },
    /// The body does not encode a message of this direction.
    Malformed(bincode::error::DecodeError),
    /// The body goes on after the message.
    Trailing {
        /// Bytes left over.
        extra: usize,
    },
    /// The message can't be encoded.
    Encode(bincode::error::EncodeError),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong { length, limit } => {
                write!(f, "frame of {length} bytes exceeds the limit of {limit}")
            }
            Self::Malformed(_) => f.write_str("frame does not encode a message"),
            Self::Trailing { extra } => write!(f, "frame has {extra} bytes after its message"),
            Self::Encode(_) => f.write_str("message can't be encoded"),
        }
    }
}

impl std::error::Error for FrameError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Malformed(source) => Some(source),
            Self::Encode(source) => Some(source),
            Self::TooLong { .. } | Self::Trailing { .. } => None,
        }
    }
}

/// Replaces the content of `out` by one frame that holds `message`.
///
/// # Errors
/// [`FrameError::TooLong`] if the body exceeds `limit` bytes; bincode's own limit binds
/// decoders only, so both sides check.
pub fn encode<M: Encode>(message: &M, limit: usize, out: &mut Vec<u8>) -> Result<(), FrameError> {
    out.clear();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    bincode::encode_into_std_write(message, out, CONFIG).map_err(FrameError::Encode)?;
    let length = out.len().saturating_sub(HEADER_BYTES);
    let header = u32::try_from(length)
        .ok()
        .filter(|_| length <= limit)
        .ok_or(FrameError::TooLong { length, limit })?;
    if let Some(place) = out.first_chunk_mut::<HEADER_BYTES>() {
        *place = header.to_le_bytes();
    }
    Ok(())
}

/// Writes one frame that holds `message` to the front of `out` and gives its length. Takes
/// no lock and no memory, so that a signal handler may call it.
///
/// # Errors
/// There is no room, or the body is longer than [`FRAME_BYTES_MAX`].
pub fn encode_in_place<M: Encode>(message: &M, out: &mut [u8]) -> Result<usize, FrameError> {
    let room = out.len();
    let too_long = |length| FrameError::TooLong { length, limit: room };
    let (header, body) = out.split_first_chunk_mut::<HEADER_BYTES>().ok_or_else(|| too_long(0))?;
    let length = bincode::encode_into_slice(message, body, CONFIG).map_err(FrameError::Encode)?;
    *header = u32::try_from(length).map_err(|_over| too_long(length))?.to_le_bytes();
    Ok(length.saturating_add(HEADER_BYTES))
}

/// Gives back a send buffer's memory if a large message made it grow.
pub fn shrink(out: &mut Vec<u8>) {
    if out.capacity() > BUFFER_BYTES_KEPT {
        *out = Vec::new();
    }
}

/// The message in a frame's body.
///
/// # Errors
/// Malformed bodies and bytes after the message (which bincode itself would accept).
pub fn decode<'a, M: BorrowDecode<'a, ()>>(body: &'a [u8]) -> Result<M, FrameError> {
    let (message, used) =
        bincode::borrow_decode_from_slice(body, CONFIG).map_err(FrameError::Malformed)?;
    match body.len().saturating_sub(used) {
        0 => Ok(message),
        extra => Err(FrameError::Trailing { extra }),
    }
}

/// A receive buffer that grows only to a length that was announced and checked.
///
/// Read into [`FrameBuffer::space`], report with [`FrameBuffer::advance`], look with
/// [`FrameBuffer::body`], drop the frame with [`FrameBuffer::consume`].
#[derive(Debug)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    filled: usize,
    limit: usize,
}

impl FrameBuffer {
    /// An empty buffer for bodies of at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { bytes: vec![0; BUFFER_BYTES_KEPT], filled: 0, limit }
    }

    /// Where to read to next; never empty while [`FrameBuffer::body`] is `None`.
    pub fn space(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.filled..).unwrap_or_default()
    }

    /// Counts `read` more bytes as filled and makes room for the announced frame.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] before any memory is taken for such a frame.
    pub fn advance(&mut self, read: usize) -> Result<(), FrameError> {
        self.filled = self.filled.saturating_add(read).min(self.bytes.len());
        self.make_room()
    }

    /// The body of the first frame, once all of it is here.
    #[must_use]
    pub fn body(&self) -> Option<&[u8]> {
        let length = self.announced()?;
        self.bytes.get(..self.filled)?.get(HEADER_BYTES..HEADER_BYTES.checked_add(length)?)
    }

    /// Drops the first frame; what follows it moves to the front.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] if the next frame announces too much.
    pub fn consume(&mut self) -> Result<(), FrameError> {
        let Some(end) = self.announced().map(|length| length.saturating_add(HEADER_BYTES)) else {
            return Ok(());
        };
        let end = end.min(self.filled);
        self.bytes.copy_within(end..self.filled, 0);
        self.filled = self.filled.saturating_sub(end);
        if self.bytes.len() > BUFFER_BYTES_KEPT && self.filled <= BUFFER_BYTES_KEPT {
            self.bytes.truncate(BUFFER_BYTES_KEPT);
            self.bytes.shrink_to_fit();
        }
        self.make_room()
    }

    /// Whether bytes of an unfinished or unread frame are waiting.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.filled == 0
    }

    fn announced(&self) -> Option<usize> {
        let header = self.bytes.get(..self.filled)?.first_chunk::<HEADER_BYTES>()?;
        usize::try_from(u32::from_le_bytes(*header)).ok()
    }

    fn make_room(&mut self) -> Result<(), FrameError> {
        let Some(length) = self.announced() else {
            return Ok(());
        };
        if length > self.limit {
            return Err(FrameError::TooLong { length, limit: self.limit });
        }
        let needed = length.saturating_add(HEADER_BYTES);
        if needed > self.bytes.len() {
            self.bytes.resize(needed, 0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{EvaluationId, FaultClass, Operation, Reply, Request};

    fn feed(buffer: &mut FrameBuffer, mut bytes: &[u8]) -> Result<(), FrameError> {
        while !bytes.is_empty() {
            let space = buffer.space();
            let count = space.len().min(bytes.len());
            assert!(count > 0, "no space although no frame is complete");
            space[..count].copy_from_slice(&bytes[..count]);
            buffer.advance(count)?;
            bytes = &bytes[count..];
            if buffer.body().is_some() {
                assert!(bytes.is_empty(), "the test feeds one frame at a time");
            }
        }
        Ok(())
    }

    fn encoded(message: &Reply<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        encode(message, FRAME_BYTES_MAX, &mut out).unwrap();
        out
    }

    #[test]
    fn a_message_survives_the_way() {
        let request =
            Request::Evaluate { id: EvaluationId(7), operation: Operation::Validate(b"{}") };
        let mut out = Vec::new();
        encode(&request, FRAME_BYTES_MAX, &mut out).unwrap();
        let mut buffer = FrameBuffer::new(FRAME_BYTES_MAX);
        feed(&mut buffer, &out).unwrap();
        assert_eq!(decode::<Request<'_>>(buffer.body().unwrap()).unwrap(), request);
        buffer.consume().unwrap();
        assert!(buffer.is_empty() && buffer.body().is_none());
    }

    #[test]
    fn a_frame_made_in_place_is_the_same_frame() {
        let last = Reply::Forbidden { syscall: 257 };
        let mut place = [0; 32];
        let length = encode_in_place(&last, &mut place).unwrap();
        assert_eq!(place[..length], encoded(&last));
        encode_in_place(&last, &mut [0; 4]).unwrap_err();
        encode_in_place(&last, &mut [0; 3]).unwrap_err();
    }

    #[test]
    fn a_frame_larger_than_the_buffer_arrives_in_pieces_and_the_buffer_shrinks_again() {
        let response = vec![b'x'; 3 * BUFFER_BYTES_KEPT];
        let out = encoded(&Reply::Verdict {
            id: EvaluationId(1),
            response: &response,
            diagnostics: b"",
            guest_micros: 1,
        });
        let mut buffer = FrameBuffer::new(FRAME_BYTES_MAX);
        feed(&mut buffer, &out).unwrap();
        assert!(matches!(
            decode::<Reply<'_>>(buffer.body().unwrap()).unwrap(),
            Reply::Verdict { response: got, .. } if got == response
        ));
        buffer.consume().unwrap();
        assert_eq!(buffer.bytes.len(), BUFFER_BYTES_KEPT);
    }

    #[test]
    fn two_frames_in_one_read_come_out_one_by_one() {
        let fault = Reply::Fault { id: None, class: FaultClass::Trap, message: "m" };
        let mut two = encoded(&fault);
        two.extend(encoded(&fault));
        let mut buffer = FrameBuffer::new(FRAME_BYTES_MAX);
        buffer.space()[..two.len()].copy_from_slice(&two);
        buffer.advance(two.len()).unwrap();
        for _ in 0..2 {
            assert_eq!(decode::<Reply<'_>>(buffer.body().unwrap()).unwrap(), fault);
            buffer.consume().unwrap();
        }
        assert!(buffer.is_empty());
    }

    #[test]
    fn an_announced_length_beyond_the_limit_takes_no_memory() {
        let mut buffer = FrameBuffer::new(1000);
        buffer.space()[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = buffer.advance(4).unwrap_err();
        assert!(matches!(error, FrameError::TooLong { limit: 1000, .. }));
        assert_eq!(buffer.bytes.len(), BUFFER_BYTES_KEPT);
    }

    #[test]
    fn bytes_after_the_message_are_refused() {
        let mut out = encoded(&Reply::Fault { id: None, class: FaultClass::Trap, message: "m" });
        out.push(0);
        assert!(matches!(decode::<Reply<'_>>(&out[4..]), Err(FrameError::Trailing { extra: 1 })));
    }

    #[test]
    fn a_length_inside_the_body_that_lies_is_malformed() {
        // Variant 6 (Verdict), id 0, then a response that claims 4 GiB.
        let body = [6, 0, 252, 0xff, 0xff, 0xff, 0xff];
        assert!(matches!(decode::<Reply<'_>>(&body), Err(FrameError::Malformed(_))));
    }

    #[test]
    fn a_message_beyond_the_limit_is_not_sent() {
        let reply = Reply::Failure { id: EvaluationId(1), message: "0123456789" };
        assert!(matches!(
            encode(&reply, 8, &mut Vec::new()),
            Err(FrameError::TooLong { limit: 8, .. })
        ));
    }
}
