//! WASI preview 1 for a guest that has nothing but its standard streams, clocks, random
//! numbers and arguments.
//!
//! Written here, and not taken from wasmtime-wasi, because a worker is single-threaded
//! (that crate starts threads even when used synchronously), because its stdin refills
//! after host calls, and because a guest without files needs no code for files. Formats:
//! WASI's `wasi_snapshot_preview1.witx`.
#![forbid(unsafe_code)]

mod poll;

use std::collections::VecDeque;
use std::fmt;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use conclave_ipc::limits::{MESSAGE_BYTES_MAX, RESPONSE_BYTES_MAX};
use conclave_ipc::message::{FaultClass, LogStream};
use wasmtime::{Caller, Error, Linker, Result};

use super::guest::Guest;
use super::memory::{self, unsigned};
use super::wasi;
use crate::session::Session;

const MODULE: &str = "wasi_snapshot_preview1";

// WASI's `errno`.
const SUCCESS: i32 = 0;
const BADF: i32 = 8;
const INVAL: i32 = 28;
const NOSYS: i32 = 52;
const NOTSOCK: i32 = 57;
const SPIPE: i32 = 70;

const STDIN: u32 = 0;
const STDOUT: u32 = 1;
const STDERR: u32 = 2;

/// Buffers in one vectored read or write, as Linux's `UIO_MAXIOV`.
const VECTORS_MAX: u32 = 1024;

/// The guest called `proc_exit`.
#[derive(Debug)]
pub(super) struct ProcExit(u32);

impl ProcExit {
    /// Whether the guest says that all is well.
    pub(super) const fn is_success(&self) -> bool {
        self.0 == 0
    }

    /// Whether the guest ended by `proc_exit(0)`.
    pub(super) fn is_success_of(error: &Error) -> bool {
        error.downcast_ref().is_some_and(Self::is_success)
    }
}

impl fmt::Display for ProcExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exited with code {}", self.0)
    }
}

impl std::error::Error for ProcExit {}

/// Where an output stream goes.
#[derive(Debug)]
enum Sink {
    /// Line by line to the supervisor's log.
    Log(LogStream),
    /// Nowhere: the guest is ended.
    Refused,
    /// Kept, up to a limit beyond which the guest is ended.
    Answer(Vec<u8>),
    /// Kept up to a limit beyond which it is cut.
    Diagnostics(Vec<u8>),
}

impl Sink {
    fn write(&mut self, session: &Session, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Log(stream) => session.log(*stream, bytes),
            Self::Refused => return Err(Error::new(session.premature("it writes output"))),
            Self::Answer(kept) => {
                if kept.len().saturating_add(bytes.len()) > RESPONSE_BYTES_MAX {
                    let message =
                        format!("output limit of {RESPONSE_BYTES_MAX} bytes exceeded on stdout");
                    return Err(Error::new(session.breach(FaultClass::Output, message)));
                }
                kept.extend_from_slice(bytes);
            }
            Self::Diagnostics(kept) => {
                let room = MESSAGE_BYTES_MAX.saturating_sub(kept.len());
                kept.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
            }
        }
        Ok(())
    }

    fn take(&mut self) -> Vec<u8> {
        match self {
            Self::Log(_) | Self::Refused => Vec::new(),
            Self::Answer(kept) | Self::Diagnostics(kept) => std::mem::take(kept),
        }
    }
}

/// All that a guest has of an operating system.
#[derive(Debug)]
pub(super) struct Wasi {
    arguments: &'static [&'static str],
    stdin: VecDeque<u8>,
    stdout: Sink,
    stderr: Sink,
    started: Instant,
}

impl Wasi {
    /// For a guest whose answer travels otherwise: no arguments, empty stdin, output to
    /// the log.
    pub(super) fn logged() -> Self {
        Self {
            arguments: &[],
            stdin: VecDeque::new(),
            stdout: Sink::Log(LogStream::Stdout),
            stderr: Sink::Log(LogStream::Stderr),
            started: Instant::now(),
        }
    }

    /// For a command: the question on stdin, the answer on stdout.
    pub(super) fn command(arguments: &'static [&'static str], stdin: &[u8]) -> Self {
        Self {
            arguments,
            stdin: VecDeque::from(stdin.to_vec()),
            stdout: Sink::Answer(Vec::new()),
            stderr: Sink::Diagnostics(Vec::new()),
            started: Instant::now(),
        }
    }

    /// The same command, put its question only now. Its clocks go on.
    pub(super) fn ask(&mut self, stdin: Vec<u8>) {
        self.stdin = VecDeque::from(stdin);
        self.stdout = Sink::Answer(Vec::new());
        self.stderr = Sink::Diagnostics(Vec::new());
    }

    /// For a command that is to be stopped at its first read; its output is refused.
    pub(super) fn starting(arguments: &'static [&'static str]) -> Self {
        Self {
            arguments,
            stdin: VecDeque::new(),
            stdout: Sink::Refused,
            stderr: Sink::Refused,
            started: Instant::now(),
        }
    }

    /// Makes more to read; an empty stdin reads as its end until then.
    pub(super) fn append_stdin(&mut self, bytes: &[u8]) {
        self.stdin.extend(bytes);
    }

    /// What a command wrote to stdout and stderr.
    pub(super) fn take_captured(&mut self) -> (Vec<u8>, Vec<u8>) {
        (self.stdout.take(), self.stderr.take())
    }
}

/// Adds every function of preview 1. Those about files, directories and sockets answer as
/// for a descriptor that is not open.
///
/// # Errors
/// A name is defined twice, which would be a mistake here.
pub(super) fn link(linker: &mut Linker<Guest>) -> Result<()> {
    linker
        .func_wrap(MODULE, "args_get", args_get)?
        .func_wrap(MODULE, "args_sizes_get", args_sizes_get)?
        .func_wrap(MODULE, "environ_get", |_: i32, _: i32| SUCCESS)?
        .func_wrap(MODULE, "environ_sizes_get", environ_sizes_get)?
        .func_wrap(MODULE, "clock_res_get", clock_res_get)?
        .func_wrap(MODULE, "clock_time_get", clock_time_get)?
        .func_wrap(MODULE, "fd_close", |fd: i32| stream_or_badf(fd))?
        .func_wrap(MODULE, "fd_fdstat_get", fd_fdstat_get)?
        .func_wrap(MODULE, "fd_fdstat_set_flags", |fd: i32, _: i32| stream_or_badf(fd))?
        .func_wrap(MODULE, "fd_filestat_get", fd_filestat_get)?
        .func_wrap(MODULE, "fd_read", fd_read)?
        .func_wrap(MODULE, "fd_seek", |fd: i32, _: i64, _: i32, _: i32| spipe_or_badf(fd))?
        .func_wrap(MODULE, "fd_tell", |fd: i32, _: i32| spipe_or_badf(fd))?
        .func_wrap(MODULE, "fd_write", fd_write)?
        .func_wrap(MODULE, "poll_oneoff", poll::poll_oneoff)?
        .func_wrap(MODULE, "proc_exit", proc_exit)?
        .func_wrap(MODULE, "proc_raise", |_: i32| NOSYS)?
        .func_wrap(MODULE, "random_get", random_get)?
        .func_wrap(MODULE, "sched_yield", || SUCCESS)?;
    link_absent_files(linker)?;
    link_absent_sockets(linker)
}

#[rustfmt::skip]
fn link_absent_files(linker: &mut Linker<Guest>) -> Result<()> {
    linker
        .func_wrap(MODULE, "fd_advise", |_: i32, _: i64, _: i64, _: i32| BADF)?
        .func_wrap(MODULE, "fd_allocate", |_: i32, _: i64, _: i64| BADF)?
        .func_wrap(MODULE, "fd_datasync", |_: i32| BADF)?
        .func_wrap(MODULE, "fd_fdstat_set_rights", |_: i32, _: i64, _: i64| BADF)?
        .func_wrap(MODULE, "fd_filestat_set_size", |_: i32, _: i64| BADF)?
        .func_wrap(MODULE, "fd_filestat_set_times", |_: i32, _: i64, _: i64, _: i32| BADF)?
        .func_wrap(MODULE, "fd_pread", |_: i32, _: i32, _: i32, _: i64, _: i32| BADF)?
        .func_wrap(MODULE, "fd_prestat_get", |_: i32, _: i32| BADF)?
        .func_wrap(MODULE, "fd_prestat_dir_name", |_: i32, _: i32, _: i32| BADF)?
        .func_wrap(MODULE, "fd_pwrite", |_: i32, _: i32, _: i32, _: i64, _: i32| BADF)?
        .func_wrap(MODULE, "fd_readdir", |_: i32, _: i32, _: i32, _: i64, _: i32| BADF)?
        .func_wrap(MODULE, "fd_renumber", |_: i32, _: i32| BADF)?
        .func_wrap(MODULE, "fd_sync", |_: i32| BADF)?
        .func_wrap(MODULE, "path_create_directory", |_: i32, _: i32, _: i32| BADF)?
        .func_wrap(MODULE, "path_filestat_get", |_: i32, _: i32, _: i32, _: i32, _: i32| BADF)?
        .func_wrap(MODULE, "path_filestat_set_times", |_: i32, _: i32, _: i32, _: i32, _: i64, _: i64, _: i32| BADF)?
        .func_wrap(MODULE, "path_link", |_: i32, _: i32, _: i32, _: i32, _: i32, _: i32, _: i32| BADF)?
        .func_wrap(MODULE, "path_open", |_: i32, _: i32, _: i32, _: i32, _: i32, _: i64, _: i64, _: i32, _: i32| BADF)?
        .func_wrap(MODULE, "path_readlink", |_: i32, _: i32, _: i32, _: i32, _: i32, _: i32| BADF)?
        .func_wrap(MODULE, "path_remove_directory", |_: i32, _: i32, _: i32| BADF)?
        .func_wrap(MODULE, "path_rename", |_: i32, _: i32, _: i32, _: i32, _: i32, _: i32| BADF)?
        .func_wrap(MODULE, "path_symlink", |_: i32, _: i32, _: i32, _: i32, _: i32| BADF)?
        .func_wrap(MODULE, "path_unlink_file", |_: i32, _: i32, _: i32| BADF)?;
    Ok(())
}

#[rustfmt::skip]
fn link_absent_sockets(linker: &mut Linker<Guest>) -> Result<()> {
    linker
        .func_wrap(MODULE, "sock_accept", |_: i32, _: i32, _: i32| NOTSOCK)?
        .func_wrap(MODULE, "sock_recv", |_: i32, _: i32, _: i32, _: i32, _: i32, _: i32| NOTSOCK)?
        .func_wrap(MODULE, "sock_send", |_: i32, _: i32, _: i32, _: i32, _: i32| NOTSOCK)?
        .func_wrap(MODULE, "sock_shutdown", |_: i32, _: i32| NOTSOCK)?;
    Ok(())
}

const fn is_stream(fd: i32) -> bool {
    matches!(unsigned(fd), STDIN | STDOUT | STDERR)
}

const fn stream_or_badf(fd: i32) -> i32 {
    if is_stream(fd) { SUCCESS } else { BADF }
}

const fn spipe_or_badf(fd: i32) -> i32 {
    if is_stream(fd) { SPIPE } else { BADF }
}

fn args_sizes_get(mut caller: Caller<'_, Guest>, count: i32, size: i32) -> Result<i32> {
    let (data, guest) = memory::split(&mut caller)?;
    let arguments = guest.wasi.arguments;
    let bytes: usize = arguments.iter().map(|word| word.len().saturating_add(1)).sum();
    memory::write(data, unsigned(count), &u32::try_from(arguments.len())?.to_le_bytes())?;
    memory::write(data, unsigned(size), &u32::try_from(bytes)?.to_le_bytes())?;
    Ok(SUCCESS)
}

fn args_get(mut caller: Caller<'_, Guest>, pointers: i32, buffer: i32) -> Result<i32> {
    let (data, guest) = memory::split(&mut caller)?;
    let (mut pointer, mut place) = (unsigned(pointers), unsigned(buffer));
    for word in guest.wasi.arguments {
        memory::write(data, pointer, &place.to_le_bytes())?;
        memory::write(data, place, word.as_bytes())?;
        place = place.saturating_add(u32::try_from(word.len())?);
        memory::write(data, place, &[0])?;
        place = place.saturating_add(1);
        pointer = pointer.saturating_add(4);
    }
    Ok(SUCCESS)
}

fn environ_sizes_get(mut caller: Caller<'_, Guest>, count: i32, size: i32) -> Result<i32> {
    let (data, _) = memory::split(&mut caller)?;
    memory::write(data, unsigned(count), &0_u32.to_le_bytes())?;
    memory::write(data, unsigned(size), &0_u32.to_le_bytes())?;
    Ok(SUCCESS)
}

/// Time of one of WASI's four clocks in nanoseconds: 0 is the time of day, 1 is
/// monotonic, 2 and 3 are processor time, for which the instance's age stands in.
fn clock(guest: &Guest, id: i32) -> Option<u64> {
    let elapsed = match id {
        0 => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        1..=3 => guest.wasi.started.elapsed(),
        _ => return None,
    };
    u64::try_from(elapsed.as_nanos()).ok()
}

fn clock_res_get(mut caller: Caller<'_, Guest>, id: i32, pointer: i32) -> Result<i32> {
    let (data, _) = memory::split(&mut caller)?;
    if !(0..=3).contains(&id) {
        return Ok(INVAL);
    }
    memory::write(data, unsigned(pointer), &1_u64.to_le_bytes())?;
    Ok(SUCCESS)
}

fn clock_time_get(
    mut caller: Caller<'_, Guest>,
    id: i32,
    _precision: i64,
    pointer: i32,
) -> Result<i32> {
    let (data, guest) = memory::split(&mut caller)?;
    let Some(now) = clock(guest, id) else { return Ok(INVAL) };
    memory::write(data, unsigned(pointer), &now.to_le_bytes())?;
    Ok(SUCCESS)
}

/// `fdstat`: a character device without flags that may be read or written.
fn fd_fdstat_get(mut caller: Caller<'_, Guest>, fd: i32, pointer: i32) -> Result<i32> {
    const CHARACTER_DEVICE: u8 = 2;
    const RIGHT_FD_READ: u64 = 1 << 1;
    const RIGHT_FD_WRITE: u64 = 1 << 6;
    let (data, _) = memory::split(&mut caller)?;
    let rights = match unsigned(fd) {
        STDIN => RIGHT_FD_READ,
        STDOUT | STDERR => RIGHT_FD_WRITE,
        _ => return Ok(BADF),
    };
    let stat = memory::slice_mut(data, unsigned(pointer), 24)?;
    stat.fill(0);
    memory::write(stat, 0, &[CHARACTER_DEVICE])?;
    memory::write(stat, 8, &rights.to_le_bytes())?;
    Ok(SUCCESS)
}

/// `filestat`: a character device, everything else 0.
fn fd_filestat_get(mut caller: Caller<'_, Guest>, fd: i32, pointer: i32) -> Result<i32> {
    let (data, _) = memory::split(&mut caller)?;
    if !is_stream(fd) {
        return Ok(BADF);
    }
    let stat = memory::slice_mut(data, unsigned(pointer), 64)?;
    stat.fill(0);
    memory::write(stat, 16, &[2])?;
    Ok(SUCCESS)
}

fn proc_exit(mut caller: Caller<'_, Guest>, code: i32) -> Result<()> {
    let exit = ProcExit(unsigned(code));
    if let Some(desk) = caller.data().desk {
        desk.end(caller.data_mut(), &exit);
    }
    Err(Error::new(exit))
}

/// The `index`th pointer and length of a vectored read or write.
fn vector(data: &[u8], vectors: i32, index: u32) -> Result<(u32, u32)> {
    let at = unsigned(vectors).saturating_add(index.saturating_mul(8));
    Ok((memory::read_u32(data, at)?, memory::read_u32(data, at.saturating_add(4))?))
}

fn fd_read(
    mut caller: Caller<'_, Guest>,
    fd: i32,
    vectors: i32,
    count: i32,
    read: i32,
) -> Result<i32> {
    match (unsigned(fd), unsigned(count)) {
        (STDIN, ..=VECTORS_MAX) => {}
        (STDIN, _) => return Ok(INVAL),
        _ => return Ok(BADF),
    }
    wasi::await_question(&mut caller)?;
    let (data, guest) = memory::split(&mut caller)?;
    let mut total = 0_u32;
    for index in 0..unsigned(count) {
        let (pointer, length) = vector(data, vectors, index)?;
        let place = memory::slice_mut(data, pointer, length)?;
        let taken = std::io::Read::read(&mut guest.wasi.stdin, place)?;
        total = total.saturating_add(u32::try_from(taken)?);
    }
    memory::write(data, unsigned(read), &total.to_le_bytes())?;
    Ok(SUCCESS)
}

fn fd_write(
    mut caller: Caller<'_, Guest>,
    fd: i32,
    vectors: i32,
    count: i32,
    written: i32,
) -> Result<i32> {
    let (data, guest) = memory::split(&mut caller)?;
    let Guest { session, wasi, .. } = guest;
    let sink = match (unsigned(fd), unsigned(count)) {
        (STDOUT, ..=VECTORS_MAX) => &mut wasi.stdout,
        (STDERR, ..=VECTORS_MAX) => &mut wasi.stderr,
        (STDOUT | STDERR, _) => return Ok(INVAL),
        _ => return Ok(BADF),
    };
    let mut total = 0_u32;
    for index in 0..unsigned(count) {
        let (pointer, length) = vector(data, vectors, index)?;
        sink.write(session, memory::slice(data, pointer, length)?)?;
        total = total.saturating_add(length);
    }
    memory::write(data, unsigned(written), &total.to_le_bytes())?;
    Ok(SUCCESS)
}

fn random_get(mut caller: Caller<'_, Guest>, pointer: i32, length: i32) -> Result<i32> {
    let (data, _) = memory::split(&mut caller)?;
    let place = memory::slice_mut(data, unsigned(pointer), unsigned(length))?;
    // By way of a buffer: the kernel itself would fail at a page whose first write is noted.
    let mut buffer = [0; 256];
    let mut filled = 0;
    while filled < place.len() {
        let part = place.len().saturating_sub(filled).min(buffer.len());
        let buffer = buffer.get_mut(..part).unwrap_or_default();
        let random = rustix::rand::getrandom(&mut *buffer, rustix::rand::GetRandomFlags::empty())?;
        let place = place.get_mut(filled..).unwrap_or_default();
        place.iter_mut().zip(&buffer[..]).take(random).for_each(|(place, byte)| *place = *byte);
        filled = filled.saturating_add(random);
    }
    Ok(SUCCESS)
}
