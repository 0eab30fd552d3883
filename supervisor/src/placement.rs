//! Which processor an evaluation runs on, as far as it pays to have a say.
//!
//! A request that is alone in the daemon is handed from the supervisor to a worker and back,
//! each sleeping while the other works. Left to itself the kernel puts the two on different
//! processors, and each hand-over wakes one up: in a virtual machine that costs more than
//! everything else the supervisor does for a request. So while requests come one at a time
//! both are kept on one processor; as soon as two are in flight the kernel decides again.
//!
//! Nothing depends on this but speed: where affinity can't be set, it is left alone.
#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Lone requests in a row before they count as the rule.
const LONE_REQUESTS_MIN: u32 = 16;

/// Input that takes longer to parse than a change of threads: about a millisecond's worth.
const LENGTHY_BYTES_MIN: usize = 256 << 10;

/// The calling thread, for the affinity calls.
const OURSELVES: Pid = Pid::from_raw(0);

/// Where a worker is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Seat {
    /// Wherever the kernel puts it.
    #[default]
    Anywhere,
    /// On this processor.
    On(usize),
}

/// Keeps account of the evaluations in flight.
#[derive(Debug)]
pub(crate) struct Placement {
    /// The processors that this process may use; `None` if there is nothing to choose.
    all: Option<CpuSet>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    in_flight: usize,
    lone_requests: u32,
    seat: Seat,
}

/// One evaluation in flight.
#[derive(Debug)]
pub(crate) struct InFlight<'a>(&'a Placement);

impl Placement {
    /// Knows the processors that the calling thread may use.
    pub(crate) fn new() -> Self {
        let all = sched_getaffinity(OURSELVES).ok().filter(|set| {
            (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).nth(1).is_some()
        });
        Self { all, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an evaluation that is about to be given to the worker `pid`, which has this
    /// seat so far, and changes the seat if that pays.
    pub(crate) fn enter(&self, pid: Pid, seat: &mut Seat) -> InFlight<'_> {
        let (wanted, changed) = self.state().enter(current_processor);
        if let Some(all) = &self.all {
            if changed {
                sit(OURSELVES, wanted, all);
            }
            if *seat != wanted {
                sit(pid, wanted, all);
                *seat = wanted;
            }
        }
        InFlight(self)
    }

    /// Runs what may take long for its `bytes` of input. All other tasks go on meanwhile,
    /// on another thread if it is much.
    pub(crate) fn at_length<T>(&self, bytes: usize, work: impl FnOnce() -> T) -> T {
        if bytes < LENGTHY_BYTES_MIN {
            return work();
        }
        // The thread that takes over the tasks starts with this one's affinity.
        if let Some(all) = &self.all {
            self.state().seat = Seat::Anywhere;
            sit(OURSELVES, Seat::Anywhere, all);
        }
        tokio::task::block_in_place(work)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.in_flight = state.in_flight.saturating_sub(1);
    }
}

impl State {
    /// Where the next evaluation belongs, and whether that is news.
    fn enter(&mut self, current: impl FnOnce() -> Option<usize>) -> (Seat, bool) {
        let before = self.seat;
        if self.in_flight > 0 {
            self.lone_requests = 0;
            self.seat = Seat::Anywhere;
        } else {
            self.lone_requests = self.lone_requests.saturating_add(1);
            if self.lone_requests >= LONE_REQUESTS_MIN && self.seat == Seat::Anywhere {
                self.seat = current().map_or(Seat::Anywhere, Seat::On);
            }
        }
        self.in_flight = self.in_flight.saturating_add(1);
        (self.seat, self.seat != before)
    }
}

fn current_processor() -> Option<usize> {
    nix::sched::sched_getcpu().ok()
}

fn sit(pid: Pid, seat: Seat, all: &CpuSet) {
    let set = match seat {
        Seat::Anywhere => *all,
        Seat::On(processor) => {
            let mut set = CpuSet::new();
            if set.set(processor).is_err() {
                return;
            }
            set
        }
    };
    if let Err(error) = sched_setaffinity(pid, &set) {
        tracing::trace!(%error, "affinity can't be set");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leave(state: &mut State) {
        state.in_flight -= 1;
    }

    #[test]
    fn requests_that_come_one_at_a_time_are_kept_on_one_processor() {
        let mut state = State::default();
        for _ in 1..LONE_REQUESTS_MIN {
            assert_eq!(state.enter(|| Some(1)), (Seat::Anywhere, false));
            leave(&mut state);
        }
        assert_eq!(state.enter(|| Some(1)), (Seat::On(1), true));
        leave(&mut state);
        assert_eq!(state.enter(|| Some(0)), (Seat::On(1), false));
    }

    #[test]
    fn a_second_request_in_flight_frees_both() {
        let mut state = State::default();
        for _ in 0..LONE_REQUESTS_MIN {
            state.enter(|| Some(1));
            leave(&mut state);
        }
        assert_eq!(state.enter(|| Some(1)), (Seat::On(1), false));
        assert_eq!(state.enter(|| Some(1)), (Seat::Anywhere, true));
        leave(&mut state);
        leave(&mut state);
        assert_eq!(state.enter(|| Some(1)), (Seat::Anywhere, false));
    }
}
