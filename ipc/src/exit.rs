//! The exit codes of a worker: a contract that the supervisor reads and the tests assert.

/// Why a worker process ended by itself.
///
/// Deaths by signal carry no code: `SIGSYS` is a system call outside the filter,
/// `SIGKILL` is usually the supervisor's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerExit {
    /// The channel was closed, or the one compilation is done.
    Done,
    /// The arguments or descriptors are not those of a supervisor.
    Usage,
    /// A step of the confinement failed; nothing foreign was read.
    ConfineFailed,
    /// The supervisor's message was malformed or out of order.
    ProtocolViolation,
    /// The channel broke in the middle of a frame.
    ChannelLost,
    /// The policy faulted; the fault was reported before.
    Faulted,
    /// The kernel refused the worker more memory.
    OutOfMemory,
    /// The worker's own code panicked.
    Panicked,
}

impl WorkerExit {
    /// Every code, for tests and for [`WorkerExit::from_code`].
    pub const ALL: [Self; 8] = [
        Self::Done,
        Self::Usage,
        Self::ConfineFailed,
        Self::ProtocolViolation,
        Self::ChannelLost,
        Self::Faulted,
        Self::OutOfMemory,
        Self::Panicked,
    ];

    /// The process exit code. 64 and up as in `sysexits.h`, 101 as Rust's own panics.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Usage => 64,
            Self::ConfineFailed => 71,
            Self::ProtocolViolation => 76,
            Self::ChannelLost => 74,
            Self::Faulted => 70,
            Self::OutOfMemory => 75,
            Self::Panicked => 101,
        }
    }

    /// The exit with that code, if a worker ever ends so.
    #[must_use]
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|exit| i32::from(exit.code()) == code)
    }

    /// What happened, for a log line.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Done => "ended as asked",
            Self::Usage => "was started with wrong arguments or descriptors",
            Self::ConfineFailed => "could not confine itself",
            Self::ProtocolViolation => "was sent a malformed message",
            Self::ChannelLost => "lost its channel",
            Self::Faulted => "ended after a fault of its policy",
            Self::OutOfMemory => "reached its limit of memory",
            Self::Panicked => "panicked",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_unique_and_found_again() {
        for exit in WorkerExit::ALL {
            assert_eq!(WorkerExit::from_code(i32::from(exit.code())), Some(exit));
        }
        assert_eq!(WorkerExit::from_code(1), None);
    }
}
