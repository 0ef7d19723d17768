//! The timer queue: lazily kept, so that a busy flow costs it nothing.
//!
//! A flow's deadline moves away with every packet. It is put into the queue only when it is earlier than what is
//! queued for that flow already; when the queued time comes, the flow is asked what it is really waiting for and
//! queued again. So the queue may wake the engine early, never late. An entry that an earlier one has superseded, or
//! whose flow is gone, stays until its time, or until such entries are the most: then all of them are thrown out.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::addr::FlowId;
use crate::time::{Deadline, Timestamp, WakeReason};

/// So few entries are not worth looking through.
const ENTRIES_MIN: usize = 256;

/// When a flow is queued; every flow holds one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Queued(Timestamp);

impl Queued {
    /// Not in the queue.
    pub(crate) const NEVER: Self = Self(Timestamp::MAX);
}

#[derive(Debug, Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Timestamp, FlowId, WakeReason)>>,
}

impl Timers {
    /// Makes sure that `flow` comes up at `at` or before.
    pub(crate) fn schedule(&mut self, queued: &mut Queued, flow: FlowId, at: Timestamp, reason: WakeReason) {
        if at < queued.0 {
            *queued = Queued(at);
            self.heap.push(Reverse((at, flow, reason)));
        }
    }

    /// Takes the earliest entry that is due at `now`. The caller tells it apart from a stale one by
    /// [`Timers::is_current`].
    pub(crate) fn pop(&mut self, now: Timestamp) -> Option<(Timestamp, FlowId)> {
        let Reverse((at, ..)) = *self.heap.peek()?;
        if at > now {
            return None;
        }
        self.heap.pop().map(|Reverse((at, flow, _))| (at, flow))
    }

    /// Whether an entry popped with time `at` is the flow's own, not one that an earlier one has superseded;
    /// takes the flow out of the queue if so.
    pub(crate) fn is_current(queued: &mut Queued, at: Timestamp) -> bool {
        let current = queued.0 == at;
        if current {
            *queued = Queued::NEVER;
        }
        current
    }

    /// Throws out stale entries if they are more than `flows`, the number of flows there are. `queued` finds a flow's.
    /// Shared among the entries that were added since the last time, it costs what adding them did.
    pub(crate) fn prune(&mut self, flows: usize, mut queued: impl FnMut(FlowId) -> Option<Queued>) {
        if self.heap.len() > 2 * flows + ENTRIES_MIN {
            let mut entries = std::mem::take(&mut self.heap).into_vec();
            entries.retain(|&Reverse((at, flow, _))| queued(flow) == Some(Queued(at)));
            entries.sort_unstable();
            entries.dedup(); // a time that was superseded may have come to be the flow's again
            self.heap = entries.into();
        }
    }

    /// The earliest entry.
    pub(crate) fn next(&self) -> Option<Deadline> {
        self.heap
            .peek()
            .map(|&Reverse((at, _, reason))| Deadline { at, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::ShardId;

    fn at(nanos: u64) -> Timestamp {
        Timestamp::from_nanos(nanos)
    }

    #[test]
    fn a_deadline_that_moves_away_is_not_queued_again() {
        let mut timers = Timers::default();
        let mut queued = Queued::NEVER;
        let flow = FlowId::new(ShardId(0), 0, 1);
        timers.schedule(&mut queued, flow, at(10), WakeReason::Tcp);
        for later in 11..1000 {
            timers.schedule(&mut queued, flow, at(later), WakeReason::Tcp);
        }
        assert_eq!(timers.heap.len(), 1);
        assert_eq!(timers.next().map(|deadline| deadline.at), Some(at(10)));
    }

    #[test]
    fn an_earlier_deadline_supersedes_the_queued_one() {
        let mut timers = Timers::default();
        let mut queued = Queued::NEVER;
        let flow = FlowId::new(ShardId(0), 0, 1);
        timers.schedule(&mut queued, flow, at(10), WakeReason::Tcp);
        timers.schedule(&mut queued, flow, at(5), WakeReason::Tcp);
        assert_eq!(timers.pop(at(4)), None);
        assert_eq!(timers.pop(at(5)), Some((at(5), flow)));
        assert!(Timers::is_current(&mut queued, at(5)));
        assert_eq!(timers.pop(at(10)), Some((at(10), flow)));
        assert!(
            !Timers::is_current(&mut queued, at(10)),
            "the superseded entry is stale"
        );
    }

    #[test]
    fn superseded_entries_do_not_pile_up() {
        let mut timers = Timers::default();
        let mut queued = Queued::NEVER;
        let flow = FlowId::new(ShardId(0), 0, 1);
        for round in 0..100_000 {
            timers.schedule(&mut queued, flow, at(1_000_000 + round), WakeReason::Tcp);
            timers.schedule(&mut queued, flow, at(round), WakeReason::Tcp);
            timers.prune(1, |_| Some(queued));
            assert!(timers.heap.len() <= 2 + ENTRIES_MIN);
            assert_eq!(timers.pop(at(round)), Some((at(round), flow)));
            assert!(Timers::is_current(&mut queued, at(round)));
        }
    }
}
