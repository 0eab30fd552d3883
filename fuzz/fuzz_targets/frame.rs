//! A stream in pieces, as the supervisor and as a worker receive it: whatever the pieces, the
//! same frames come out, and no memory is taken that was not announced and allowed.
#![no_main]

use arbitrary::Arbitrary;
use conclave_ipc::frame::FrameBuffer;
use conclave_ipc::limits::{FRAME_BYTES_MAX, REPLY_BYTES_MAX};
use libfuzzer_sys::fuzz_target;

const HEADER_BYTES: usize = 4;

/// What a buffer always has.
const KEPT_BYTES: usize = 64 << 10;

/// Longest frame that is made whole; others are only announced.
const WHOLE_FRAME_BYTES_MAX: usize = 3 * KEPT_BYTES;

#[derive(Debug, Arbitrary)]
struct Input {
    to_the_worker: bool,
    stream: Vec<Piece>,
    readings: [Vec<Read>; 2],
}

#[derive(Debug, Arbitrary)]
enum Piece {
    Frame { length: u32, fill: u8 },
    Bytes(Vec<u8>),
}

/// One read from the socket, and whether the frames in the buffer are then taken out.
#[derive(Debug, Clone, Copy, Arbitrary)]
struct Read {
    length: u16,
    takes: bool,
}

/// What comes out of a stream.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    bodies: Vec<Vec<u8>>,
    /// Whether a frame was too long.
    refused: bool,
}

fuzz_target!(|input: Input| {
    let limit = if input.to_the_worker { FRAME_BYTES_MAX } else { REPLY_BYTES_MAX };
    let stream = input.stream.iter().fold(Vec::new(), |mut stream, piece| {
        match piece {
            Piece::Frame { length, fill } => {
                let length = *length as usize % WHOLE_FRAME_BYTES_MAX;
                stream.extend(u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
                stream.resize(stream.len() + length, *fill);
            }
            Piece::Bytes(bytes) => stream.extend_from_slice(bytes),
        }
        stream
    });
    let expected = in_one_piece(&stream, limit);
    for reads in &input.readings {
        assert_eq!(Receiver::new(&stream, limit).run(reads), expected);
    }
});

/// What has to come out.
fn in_one_piece(mut stream: &[u8], limit: usize) -> Outcome {
    let mut outcome = Outcome::default();
    while let Some((header, rest)) = stream.split_first_chunk::<HEADER_BYTES>() {
        let length = u32::from_le_bytes(*header) as usize;
        if length > limit {
            outcome.refused = true;
            break;
        }
        let Some((body, rest)) = rest.split_at_checked(length) else { break };
        outcome.bodies.push(body.to_vec());
        stream = rest;
    }
    outcome
}

/// A receiver of a stream, which knows what its buffer may hold.
struct Receiver<'a> {
    buffer: FrameBuffer,
    limit: usize,
    stream: &'a [u8],
    /// How much of the stream went into the buffer.
    read: usize,
    /// How much of that is still there.
    filled: usize,
    /// The memory of the buffer.
    held: usize,
    bodies: Vec<Vec<u8>>,
}

impl<'a> Receiver<'a> {
    fn new(stream: &'a [u8], limit: usize) -> Self {
        let buffer = FrameBuffer::new(limit);
        Self { buffer, limit, stream, read: 0, filled: 0, held: KEPT_BYTES, bodies: Vec::new() }
    }

    fn run(mut self, reads: &[Read]) -> Outcome {
        let last = Read { length: u16::MAX, takes: true };
        let mut reads = reads.iter().copied().chain(std::iter::repeat(last));
        let mut went_well = true;
        while went_well && self.read < self.stream.len() {
            let Read { length, takes } = reads.next().unwrap_or(last);
            went_well = self.read(usize::from(length).max(1))
                && (!takes && !self.buffer.space().is_empty() || self.take_frames());
        }
        went_well = went_well && self.take_frames();
        Outcome { bodies: self.bodies, refused: !went_well }
    }

    /// Reads once from the stream. Whether all went well.
    fn read(&mut self, length: usize) -> bool {
        let space = self.buffer.space();
        assert!(!space.is_empty(), "no space, although no frame is there");
        let rest = &self.stream[self.read..];
        let length = length.min(space.len()).min(rest.len());
        space[..length].copy_from_slice(&rest[..length]);
        self.read += length;
        self.filled += length;
        let advanced = self.buffer.advance(length);
        self.check_memory(self.held);
        advanced.is_ok()
    }

    /// Takes out the frames that are there. Whether all went well.
    fn take_frames(&mut self) -> bool {
        while let Some(body) = self.buffer.body() {
            self.filled -= HEADER_BYTES + body.len();
            self.bodies.push(body.to_vec());
            let consumed = self.buffer.consume();
            // What is left may need the room that a large frame had.
            self.check_memory(if self.filled > KEPT_BYTES { self.held } else { KEPT_BYTES });
            if consumed.is_err() {
                return false;
            }
        }
        assert_eq!(self.buffer.is_empty(), self.filled == 0);
        true
    }

    /// The buffer has what it may keep, or what was announced and allowed.
    fn check_memory(&mut self, kept: usize) {
        self.held = self.filled + self.buffer.space().len();
        let first = &self.stream[self.read - self.filled..self.read];
        let announced = first.first_chunk().map_or(0, |header| u32::from_le_bytes(*header));
        let announced = Some(announced as usize).filter(|length| *length <= self.limit);
        let allowed = kept.max(HEADER_BYTES + announced.unwrap_or_default());
        assert!(self.held <= allowed, "{} bytes are held, {allowed} allowed", self.held);
    }
}
