//! Time, stack, the log and the channel: using up what is bounded, or holding others up.
#![forbid(unsafe_code)]

use conclave_ipc::frame;
use conclave_ipc::layers::Layer;
use conclave_ipc::limits::FRAME_BYTES_MAX;
use conclave_ipc::message::{EvaluationId, LogStream, Reply};
use nix::errno::Errno;

use super::kernel::{Gain, call, illegal, poke, recurse, shellcode};
use super::memory::{ANONYMOUS, PAGE, RW, map};
use super::{Attempt, CONTROL_GROUP, First, layered, refused};

/// The first evaluation of a worker's life.
const FIRST: EvaluationId = EvaluationId(1);

fn send(bytes: &[u8]) -> Gain {
    let mut left = bytes;
    while !left.is_empty() {
        let sent = call!(libc::SYS_sendto, 3, left.as_ptr(), left.len(), libc::MSG_NOSIGNAL, 0, 0)?;
        left = left.get(sent..).unwrap_or_default();
    }
    Ok(bytes.len())
}

fn frame(reply: &Reply<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    drop(frame::encode(reply, FRAME_BYTES_MAX, &mut bytes));
    bytes
}

/// A line for the log.
pub(super) fn log(text: &[u8]) -> Vec<u8> {
    frame(&Reply::Log { id: FIRST, stream: LogStream::Stdout, text })
}

/// Sleeps for this time.
fn sleep(seconds: i64, nanoseconds: i64) -> Gain {
    call!(libc::SYS_clock_nanosleep, 1, 0, [seconds, nanoseconds].as_ptr(), 0)
}

const DEADLINE: First = First::Supervisor(&["deadline"]);
const PROTOCOL: First = First::Supervisor(&["protocol"]);

pub(super) const ATTEMPTS: &[Attempt] = &[
    refused("resource/spin", "computes for ever", DEADLINE, || {
        let mut turns = 0_usize;
        while std::hint::black_box(turns) < usize::MAX {
            turns = turns.wrapping_add(1);
        }
        Ok(turns)
    }),
    refused("resource/sleep", "sleeps for a hundred years", DEADLINE, || sleep(3_000_000_000, 0)),
    refused("resource/sleep-again", "sleeps a little, for ever", DEADLINE, || {
        loop {
            sleep(0, 1_000_000)?;
        }
    }),
    refused("resource/wait-for-word", "waits for a message that does not come", DEADLINE, || {
        call!(libc::SYS_recvfrom, 3, [0_u8; 16].as_mut_ptr(), 16, 0, 0, 0)
    }),
    refused(
        "resource/byte-by-byte",
        "answers, a byte at a time, slower than it may",
        DEADLINE,
        || {
            for byte in log(&[b'x'; 4000]) {
                send(&[byte])?;
                sleep(0, 5_000_000)?;
            }
            Ok(0)
        },
    ),
    refused("resource/half-a-frame", "sends half a message and stops", DEADLINE, || {
        let bytes = log(b"half");
        send(bytes.get(..6).unwrap_or_default())?;
        sleep(3_000_000_000, 0)
    }),
    refused("resource/flood-log", "fills the supervisor's log", PROTOCOL, || {
        let line = log(&[b'x'; 4000]);
        for _ in 0..1000 {
            send(&line)?;
        }
        Err(Errno::EAGAIN)
    }),
    refused(
        "resource/flood-log-with-nothing",
        "fills the supervisor's log with empty lines",
        PROTOCOL,
        || {
            let line = log(b"");
            for _ in 0..100_000 {
                send(&line)?;
            }
            Err(Errno::EAGAIN)
        },
    ),
    refused("resource/announce-everything", "announces a message of 4 GiB", PROTOCOL, || {
        send(&[0xff; 64])?;
        sleep(3_000_000_000, 0)
    }),
    refused("resource/flood-channel", "sends garbage without end", PROTOCOL, || {
        loop {
            send(&[0; 4096])?;
        }
    }),
    refused("resource/stack", "recurses for ever", First::Kernel(&["SIGSEGV"]), || Ok(recurse(1))),
    refused(
        "resource/fill-memory",
        "fills memory until there is no more",
        First::Supervisor(&["ENOMEM", "SIGKILL"]),
        || {
            for _ in 0..32 {
                let area = map(0, 32 << 20, RW, ANONYMOUS)?;
                for page in (area..area.saturating_add(32 << 20)).step_by(PAGE) {
                    poke(page, shellcode());
                }
            }
            Ok(0)
        },
    ),
    layered(
        "resource/allocate",
        "asks its allocator for more than it may have",
        (Layer::ResourceLimits, &["exit 75"]),
        CONTROL_GROUP,
        || {
            for _ in 0..96 {
                let block = Vec::<u8>::with_capacity(64 << 20);
                std::mem::forget(std::hint::black_box(block));
            }
            Ok(0)
        },
    ),
    refused("resource/exit", "ends in the midst of it", First::Supervisor(&["exit 0"]), || {
        call!(libc::SYS_exit_group, 0)
    }),
    refused(
        "resource/crash",
        "crashes, for a dump of its memory",
        First::Kernel(&["SIGILL", "SIGSEGV"]),
        || Ok(illegal()),
    ),
];
