//! What a liar does beside talking.
#![expect(unsafe_code, reason = "reads where nothing is mapped, maps memory, and forks")]
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a script with an error, or that can't be played, ends its liar"
)]

use std::io::{IoSlice, Read, Write as _};
use std::net::Shutdown;
use std::num::NonZero;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use conclave_ipc::CHANNEL_FD;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::Liar;

/// What a compiler that never ends adds at a time, and the most that it adds.
const APPENDED_BYTES: usize = 64 << 10;
const APPENDED_BYTES_MAX: u64 = 32 << 20;

/// Says and does nothing any more.
pub(crate) fn silence() -> ! {
    loop {
        thread::park();
    }
}

/// Copies the process; gives the copy's number, or 0 in the copy.
fn fork() -> u32 {
    // SAFETY: there is one thread.
    u32::try_from(unsafe { libc::fork() }).unwrap()
}

impl Liar {
    /// Does what the word stands for, after all that was said before.
    pub(crate) fn perform(&mut self, act: &str) {
        let (word, argument) = act.split_once(':').unwrap_or((act, ""));
        let number = || argument.parse::<usize>().unwrap_or_else(|_| panic!("{act}"));
        match word {
            "half" => {
                let start = self.unsent.len();
                self.act(argument);
                self.unsent.truncate(start.midpoint(self.unsent.len()));
            }
            "output" => self.write_output(argument),
            "forever" => loop {
                argument.split('+').for_each(|act| self.act(act));
                self.send();
            },
            "trickle" => self.trickle(argument),
            "rights" => self.send_descriptors(number()),
            "append" => self.append(),
            "map" => self.keep_writable(),
            "fork" => self.fork(argument == "deep"),
            "drop" => drop(self.given.take()),
            "speak" => self.speak_for_child(argument),
            "reaped" => self.reap(),
            "seal" => {
                let seal = FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SEAL);
                fcntl(self.output.as_ref().unwrap(), seal).unwrap();
            }
            _ => {
                self.send();
                self.break_down(word, argument);
            }
        }
    }

    /// Makes the worker that is wanted, or has that one make it.
    fn fork(&mut self, deep: bool) {
        let channel = self.given.take().unwrap();
        match fork() {
            0 if deep && fork() != 0 => silence(),
            0 => self.serve_forked(channel),
            child => self.frames.child = child,
        }
    }

    /// Says that on the channel of the worker that is wanted.
    fn speak_for_child(&mut self, act: &str) {
        let channel = UnixStream::from(self.given.as_ref().unwrap().try_clone().unwrap());
        let mut frame = Vec::new();
        assert!(self.frames.put(act, &mut frame), "{act}");
        (&channel).write_all(&frame).unwrap();
    }

    /// Tells how a child has ended.
    fn reap(&mut self) {
        let (child, mut status) = (self.frames.child.cast_signed(), 0);
        // SAFETY: the status is written to an integer that outlives the call.
        let reaped = unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(reaped, child);
        self.act(&format!("reaped:{status}"));
    }

    fn break_down(&mut self, word: &str, argument: &str) {
        match word {
            "silence" | "go-on" => {}
            "pause" => thread::sleep(Duration::from_millis(argument.parse().unwrap())),
            "answer" => self.take_answer(),
            "shutdown" => {
                let how = if argument == "read" { Shutdown::Read } else { Shutdown::Write };
                self.channel.shutdown(how).unwrap();
            }
            "close" => {
                // Whoever else has a copy of the descriptor.
                let both = nix::sys::socket::Shutdown::Both;
                nix::sys::socket::shutdown(CHANNEL_FD, both).unwrap();
                silence();
            }
            "exit" => std::process::exit(argument.parse().unwrap()),
            "spin" => loop {
                std::hint::spin_loop();
            },
            "segv" => {
                // SAFETY: none; that nothing is mapped there is what it is for.
                unsafe { std::ptr::without_provenance::<u8>(16).read_volatile() };
            }
            _ => panic!("no lie is called {word}"),
        }
    }

    /// What a host call is answered, not looked at.
    fn take_answer(&mut self) {
        let (mut channel, mut length) = (self.channel, [0; 4]);
        channel.read_exact(&mut length).unwrap();
        channel.read_exact(&mut vec![0; u32::from_le_bytes(length) as usize]).unwrap();
    }

    /// One byte at a time.
    fn trickle(&mut self, act: &str) -> ! {
        self.act(act);
        for byte in std::mem::take(&mut self.unsent) {
            self.unsent.push(byte);
            self.send();
            thread::sleep(Duration::from_millis(1));
        }
        silence()
    }

    /// Sends what is unsent, or else a byte that begins no frame, with that many descriptors.
    fn send_descriptors(&mut self, count: usize) {
        if self.unsent.is_empty() {
            self.unsent.push(0);
        }
        let rights = vec![self.channel.as_raw_fd(); count];
        let (bytes, control) = ([IoSlice::new(&self.unsent)], [ControlMessage::ScmRights(&rights)]);
        let socket = self.channel.as_raw_fd();
        match sendmsg::<()>(socket, &bytes, &control, MsgFlags::empty(), None) {
            Ok(_) => self.unsent.clear(),
            // The supervisor takes no descriptors (Linux 6.16), so the rest goes alone.
            Err(Errno::EPERM) => self.send(),
            // The kernel bounds the descriptors of a user that are on their way.
            Err(_) => silence(),
        }
    }

    /// The script as the code that was compiled from it, or a hole of that length.
    fn write_output(&mut self, argument: &str) {
        let output = self.output.as_ref().unwrap();
        match argument.parse() {
            Ok(length) => output.set_len(length).unwrap(),
            Err(_) => output.write_all_at(&self.script.text, 0).unwrap(),
        }
    }

    /// Maps the file for the state so that it could be changed later.
    fn keep_writable(&self) {
        let (page, access) = (NonZero::new(4096).unwrap(), ProtFlags::PROT_WRITE);
        let output = self.output.as_ref().unwrap();
        // SAFETY: a new mapping, at an address that the kernel chooses.
        unsafe { mmap(None, page, access, MapFlags::MAP_SHARED, output, 0) }.unwrap();
    }

    /// More of the output, as long as it goes.
    fn append(&mut self) {
        let output = self.output.as_ref().unwrap();
        let end = output.metadata().unwrap().len();
        let at = if end < APPENDED_BYTES_MAX { end } else { self.frames.code_bytes };
        // Fails when the file was sealed, which is what must not happen to a living compiler.
        output.write_all_at(&[b'\n'; APPENDED_BYTES], at).unwrap();
    }
}
