//! `poll_oneoff`: a guest that waits, for a time or for something to read.
#![forbid(unsafe_code)]

use std::thread;
use std::time::Duration;

use wasmtime::{Caller, Result};

use super::{INVAL, STDIN, SUCCESS, clock, stream_or_badf};
use crate::policy::guest::Guest;
use crate::policy::memory::{self, unsigned};
use crate::policy::wasi;

/// Subscriptions in one `poll_oneoff`.
const SUBSCRIPTIONS_MAX: u32 = 1024;

/// One subscription of `poll_oneoff`.
struct Subscription {
    user_data: u64,
    kind: u8,
    /// `None` for a stream, which is always ready; how long to wait for a clock.
    wait: Option<Duration>,
    error: i32,
}

impl Subscription {
    const BYTES: u32 = 48;
    const CLOCK: u8 = 0;
    const READ: u8 = 1;

    fn read(data: &[u8], guest: &Guest, at: u32) -> Result<Self> {
        const ABSOLUTE: u8 = 1;
        let user_data = memory::read_u64(data, at)?;
        let kind =
            memory::slice(data, at.saturating_add(8), 1)?.first().copied().unwrap_or_default();
        let word = memory::read_u32(data, at.saturating_add(16))?.cast_signed();
        if kind != Self::CLOCK {
            return Ok(Self { user_data, kind, wait: None, error: stream_or_badf(word) });
        }
        let timeout = memory::read_u64(data, at.saturating_add(24))?;
        let flags =
            memory::slice(data, at.saturating_add(40), 1)?.first().copied().unwrap_or_default();
        let Some(now) = clock(guest, word) else {
            return Ok(Self { user_data, kind, wait: None, error: INVAL });
        };
        let nanoseconds = if flags & ABSOLUTE == 0 { timeout } else { timeout.saturating_sub(now) };
        Ok(Self { user_data, kind, wait: Some(Duration::from_nanos(nanoseconds)), error: SUCCESS })
    }

    /// WASI's `event`, 32 bytes.
    fn event(&self, stdin_bytes: usize) -> [u8; 32] {
        let mut event = [0; 32];
        let ready = if self.kind == Self::READ { stdin_bytes as u64 } else { 0 };
        let error = u16::try_from(self.error).unwrap_or_default();
        event[..8].copy_from_slice(&self.user_data.to_le_bytes());
        event[8..10].copy_from_slice(&error.to_le_bytes());
        event[10] = self.kind;
        event[16..24].copy_from_slice(&ready.to_le_bytes());
        event
    }
}

/// Whether a subscription is for more to read, so that its event tells how much there is.
fn asks_for_stdin(data: &[u8], input: i32, count: u32) -> Result<bool> {
    for index in 0..count {
        let at = unsigned(input).saturating_add(index.saturating_mul(Subscription::BYTES));
        let kind = memory::slice(data, at.saturating_add(8), 1)?;
        if kind == [Subscription::READ] && memory::read_u32(data, at.saturating_add(16))? == STDIN {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Sleeps for the shortest clock if nothing is ready at once. However long a guest wants
/// to sleep, it is ended at its deadline from outside.
pub(super) fn poll_oneoff(
    mut caller: Caller<'_, Guest>,
    input: i32,
    output: i32,
    count: i32,
    stored: i32,
) -> Result<i32> {
    if !(1..=SUBSCRIPTIONS_MAX).contains(&unsigned(count)) {
        return Ok(INVAL);
    }
    if asks_for_stdin(memory::split(&mut caller)?.0, input, unsigned(count))? {
        wasi::await_question(&mut caller)?;
    }
    let (data, guest) = memory::split(&mut caller)?;
    let subscriptions = (0..unsigned(count))
        .map(|index| {
            let offset = index.saturating_mul(Subscription::BYTES);
            Subscription::read(data, guest, unsigned(input).saturating_add(offset))
        })
        .collect::<Result<Vec<_>>>()?;
    // `None` sorts first: something is ready at once.
    let wait = subscriptions.iter().map(|subscription| subscription.wait).min().flatten();
    if let Some(wait) = wait {
        thread::sleep(wait);
    }
    let mut written = 0_u32;
    for subscription in subscriptions.iter().filter(|subscription| subscription.wait <= wait) {
        let at = unsigned(output).saturating_add(written.saturating_mul(32));
        memory::write(data, at, &subscription.event(guest.wasi.stdin.len()))?;
        written = written.saturating_add(1);
    }
    memory::write(data, unsigned(stored), &written.to_le_bytes())?;
    Ok(SUCCESS)
}
