//! The slots of one policy as a pure state machine: no clock, no I/O, no process.
//!
//! ```text
//!            Started              Submit, or a queued job
//! Starting ----------> Idle ------------------------------> Busy
//!   ^  |                ^  |                                |  |
//!   |  | StartFailed    |  | Died                  Finished |  | Died
//!   |  v                |  v                                |  v
//!  Waiting <------------|--+--------------------------------|--+
//!   RestartDue          +-----------------------------------+
//! ```
//!
//! A worker that died is replaced at once, unless it died before it had finished a single
//! job or could not even start: then the wait doubles each time, so that a policy that
//! can't live costs little.
#![forbid(unsafe_code)]
#![warn(clippy::wildcard_enum_match_arm)]

use std::collections::VecDeque;
use std::time::Duration;

/// Wait after the first failure; a start costs a few milliseconds.
const RESTART_DELAY_MIN: Duration = Duration::from_millis(100);

/// No failing policy waits longer for its next try.
const RESTART_DELAY_MAX: Duration = Duration::from_secs(30);

/// One worker's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SlotId(pub(crate) usize);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlotState {
    Starting,
    Idle,
    Busy,
    Waiting,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    state: SlotState,
    /// Jobs that the present worker has finished.
    finished: u64,
    /// Failures in a row, without a finished job between them.
    failures: u32,
}

/// All that can happen.
#[derive(Debug)]
pub(crate) enum Event<J> {
    /// Somebody wants a job done.
    Submit(J),
    /// The slot's worker is loaded.
    Started(SlotId),
    /// The slot's worker could not be started.
    StartFailed(SlotId),
    /// The slot's worker has done its job and is as good as new.
    Finished(SlotId),
    /// The slot's worker is gone, with its job if it had one.
    Died(SlotId),
    /// The wait that [`Action::StartAfter`] asked for is over.
    RestartDue(SlotId),
}

/// All that can be decided.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action<J> {
    /// Start a worker in the slot.
    Start(SlotId),
    /// Report [`Event::RestartDue`] after the delay.
    StartAfter(SlotId, Duration),
    /// Give the job to the slot's worker.
    Dispatch(SlotId, J),
    /// The queue is full.
    Refuse(J),
}

/// The slots and the queue before them.
#[derive(Debug)]
pub(crate) struct Pool<J> {
    slots: Vec<Slot>,
    queue: VecDeque<J>,
    queue_max: usize,
}

impl<J> Pool<J> {
    /// A pool of `size` slots that are all starting.
    pub(crate) fn new(size: usize, queue_max: usize) -> Self {
        let slot = Slot { state: SlotState::Starting, finished: 0, failures: 0 };
        Self { slots: vec![slot; size], queue: VecDeque::new(), queue_max }
    }

    /// Every slot's number.
    pub(crate) fn slots(&self) -> impl Iterator<Item = SlotId> + use<J> {
        (0..self.slots.len()).map(SlotId)
    }

    /// Workers that are loaded, idle or busy.
    pub(crate) fn loaded(&self) -> usize {
        self.slots
            .iter()
            .filter(|slot| matches!(slot.state, SlotState::Idle | SlotState::Busy))
            .count()
    }

    /// Gives up all jobs that wait.
    pub(crate) fn drain(&mut self) -> VecDeque<J> {
        std::mem::take(&mut self.queue)
    }

    /// Takes an event, says what to do. An event that does not fit the slot's state (a
    /// message that crossed another on its way) changes nothing.
    pub(crate) fn handle(&mut self, event: Event<J>) -> Option<Action<J>> {
        match event {
            Event::Submit(job) => self.submit(job),
            Event::Started(id) => {
                let slot = self.slot_in(id, SlotState::Starting)?;
                slot.finished = 0;
                self.offer(id)
            }
            Event::Finished(id) => {
                let slot = self.slot_in(id, SlotState::Busy)?;
                slot.finished = slot.finished.saturating_add(1);
                slot.failures = 0;
                self.offer(id)
            }
            Event::StartFailed(id) => {
                let slot = self.slot_in(id, SlotState::Starting)?;
                Some(Action::StartAfter(id, slot.back_off()))
            }
            Event::Died(id) => {
                let slot = self.slots.get_mut(id.0)?;
                match slot.state {
                    SlotState::Idle | SlotState::Busy if slot.finished > 0 => {
                        slot.state = SlotState::Starting;
                        Some(Action::Start(id))
                    }
                    SlotState::Idle | SlotState::Busy => {
                        Some(Action::StartAfter(id, slot.back_off()))
                    }
                    SlotState::Starting | SlotState::Waiting => None,
                }
            }
            Event::RestartDue(id) => {
                self.slot_in(id, SlotState::Waiting)?.state = SlotState::Starting;
                Some(Action::Start(id))
            }
        }
    }

    fn slot_in(&mut self, id: SlotId, state: SlotState) -> Option<&mut Slot> {
        self.slots.get_mut(id.0).filter(|slot| slot.state == state)
    }

    fn submit(&mut self, job: J) -> Option<Action<J>> {
        let idle = self.slots.iter().position(|slot| slot.state == SlotState::Idle);
        match idle {
            Some(index) => {
                self.slots.get_mut(index)?.state = SlotState::Busy;
                Some(Action::Dispatch(SlotId(index), job))
            }
            None if self.queue.len() >= self.queue_max => Some(Action::Refuse(job)),
            None => {
                self.queue.push_back(job);
                None
            }
        }
    }

    /// The slot is free: it takes the oldest job, or idles.
    fn offer(&mut self, id: SlotId) -> Option<Action<J>> {
        let next = self.queue.pop_front();
        let slot = self.slots.get_mut(id.0)?;
        slot.state = if next.is_some() { SlotState::Busy } else { SlotState::Idle };
        next.map(|job| Action::Dispatch(id, job))
    }
}

impl Slot {
    fn back_off(&mut self) -> Duration {
        let doubled =
            RESTART_DELAY_MIN.saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX));
        self.failures = self.failures.saturating_add(1);
        self.state = SlotState::Waiting;
        doubled.min(RESTART_DELAY_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SlotId = SlotId(0);
    const B: SlotId = SlotId(1);

    fn pool(size: usize, queue_max: usize) -> Pool<&'static str> {
        let mut pool = Pool::new(size, queue_max);
        for id in pool.slots() {
            assert_eq!(pool.handle(Event::Started(id)), None);
        }
        pool
    }

    #[test]
    fn a_job_goes_to_an_idle_worker_at_once() {
        let mut pool = pool(1, 1);
        assert_eq!(pool.handle(Event::Submit("job")), Some(Action::Dispatch(A, "job")));
        assert_eq!(pool.loaded(), 1);
    }

    #[test]
    fn jobs_wait_in_order_while_all_workers_are_busy() {
        let mut pool = pool(2, 2);
        pool.handle(Event::Submit("1"));
        pool.handle(Event::Submit("2"));
        assert_eq!(pool.handle(Event::Submit("3")), None);
        assert_eq!(pool.handle(Event::Submit("4")), None);
        assert_eq!(pool.handle(Event::Finished(B)), Some(Action::Dispatch(B, "3")));
        assert_eq!(pool.handle(Event::Finished(A)), Some(Action::Dispatch(A, "4")));
        assert_eq!(pool.handle(Event::Finished(A)), None);
    }

    #[test]
    fn a_full_queue_refuses() {
        let mut pool = pool(1, 1);
        pool.handle(Event::Submit("1"));
        pool.handle(Event::Submit("2"));
        assert_eq!(pool.handle(Event::Submit("3")), Some(Action::Refuse("3")));
    }

    #[test]
    fn a_job_submitted_before_the_first_start_is_done_after_it() {
        let mut pool = Pool::new(1, 1);
        assert_eq!(pool.handle(Event::Submit("early")), None);
        assert_eq!(pool.handle(Event::Started(A)), Some(Action::Dispatch(A, "early")));
    }

    #[test]
    fn a_worker_that_had_worked_is_replaced_at_once() {
        let mut pool = pool(1, 1);
        pool.handle(Event::Submit("1"));
        pool.handle(Event::Finished(A));
        pool.handle(Event::Submit("2"));
        assert_eq!(pool.handle(Event::Died(A)), Some(Action::Start(A)));
        assert_eq!(pool.loaded(), 0);
        assert_eq!(pool.handle(Event::Submit("3")), None);
        assert_eq!(pool.handle(Event::Started(A)), Some(Action::Dispatch(A, "3")));
    }

    #[test]
    fn a_worker_that_never_worked_waits_longer_each_time() {
        let mut pool = pool(1, 1);
        let mut delays = Vec::new();
        for _ in 0..12 {
            match pool.handle(Event::Died(A)) {
                Some(Action::StartAfter(A, delay)) => delays.push(delay),
                other => panic!("{other:?}"),
            }
            assert_eq!(pool.handle(Event::RestartDue(A)), Some(Action::Start(A)));
            pool.handle(Event::Started(A));
        }
        assert_eq!(delays[0], RESTART_DELAY_MIN);
        assert!(delays.is_sorted());
        assert_eq!(delays[11], RESTART_DELAY_MAX);
    }

    #[test]
    fn a_finished_job_forgives_earlier_failures() {
        let mut pool = pool(1, 1);
        for _ in 0..3 {
            pool.handle(Event::Died(A));
            pool.handle(Event::RestartDue(A));
            pool.handle(Event::Started(A));
        }
        pool.handle(Event::Submit("1"));
        pool.handle(Event::Finished(A));
        pool.handle(Event::Died(A));
        assert_eq!(
            pool.handle(Event::StartFailed(A)),
            Some(Action::StartAfter(A, RESTART_DELAY_MIN))
        );
    }

    #[test]
    fn an_event_that_does_not_fit_changes_nothing() {
        let mut pool = pool(1, 1);
        assert_eq!(pool.handle(Event::Finished(A)), None);
        assert_eq!(pool.handle(Event::Started(A)), None);
        assert_eq!(pool.handle(Event::RestartDue(A)), None);
        assert_eq!(pool.handle(Event::Died(SlotId(9))), None);
        assert_eq!(pool.handle(Event::Submit("job")), Some(Action::Dispatch(A, "job")));
    }
}
