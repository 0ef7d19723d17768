//! The queue in front of a bottleneck: tail drop, or CoDel (RFC 8289).

use std::collections::VecDeque;
use std::time::Duration;

use tungate_engine::Timestamp;

/// How much may wait, and what is done about a queue that stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Packets that may wait, besides the one being sent; the next one is dropped.
    pub packets: usize,
    /// When it drops before that.
    pub discipline: Discipline,
}

/// When a queue drops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discipline {
    /// Only when it is full.
    TailDrop,
    /// Also when packets have waited too long for too long: target 5 ms, interval 100 ms (RFC 8289, section 4).
    CoDel,
}

const TARGET: Duration = Duration::from_millis(5);
const INTERVAL: Duration = Duration::from_millis(100);
/// A queue of no more than this is not a standing one (RFC 8289, section 5.3: `maxpacket`).
const LARGEST_PACKET: usize = 1514;

#[derive(Debug, Clone)]
struct Waiting<T> {
    since: Timestamp,
    len: usize,
    packet: T,
}

/// Packets that wait for the bottleneck.
#[derive(Debug, Clone)]
pub(super) struct Waiters<T> {
    queue: Queue,
    waiting: VecDeque<Waiting<T>>,
    bytes: usize,
    codel: CoDel,
}

/// The state of RFC 8289, section 5.
#[derive(Debug, Clone, Default)]
struct CoDel {
    /// When the time above target will have lasted an interval.
    first_above: Option<Timestamp>,
    drop_next: Timestamp,
    count: u32,
    last_count: u32,
    is_dropping: bool,
}

impl<T> Waiters<T> {
    pub(super) fn new(queue: Queue) -> Self {
        Self {
            queue,
            waiting: VecDeque::new(),
            bytes: 0,
            codel: CoDel::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Takes a packet; `false` if there is no room.
    pub(super) fn push(&mut self, now: Timestamp, len: usize, packet: T) -> bool {
        if self.waiting.len() >= self.queue.packets {
            return false;
        }
        self.bytes += len;
        self.waiting.push_back(Waiting {
            since: now,
            len,
            packet,
        });
        true
    }

    /// The next packet to send at `now`, with its length, and how many were dropped before it.
    pub(super) fn pop(&mut self, now: Timestamp) -> (Option<(usize, T)>, u64) {
        match self.queue.discipline {
            Discipline::TailDrop => (self.take().map(|waiting| (waiting.len, waiting.packet)), 0),
            Discipline::CoDel => self.pop_codel(now),
        }
    }

    fn take(&mut self) -> Option<Waiting<T>> {
        let waiting = self.waiting.pop_front()?;
        self.bytes -= waiting.len;
        Some(waiting)
    }

    /// RFC 8289, section 5.5: `dequeue`.
    fn pop_codel(&mut self, now: Timestamp) -> (Option<(usize, T)>, u64) {
        let mut dropped = 0;
        let (mut waiting, mut may_drop) = self.take_judged(now);
        if self.codel.is_dropping {
            if !may_drop {
                self.codel.is_dropping = false;
            }
            while self.codel.is_dropping && now >= self.codel.drop_next {
                dropped += 1;
                self.codel.count += 1;
                (waiting, may_drop) = self.take_judged(now);
                if may_drop {
                    self.codel.drop_next = control_law(self.codel.drop_next, self.codel.count);
                } else {
                    self.codel.is_dropping = false;
                }
            }
        } else if may_drop {
            dropped += 1;
            (waiting, _) = self.take_judged(now);
            let codel = &mut self.codel;
            codel.is_dropping = true;
            let delta = codel.count - codel.last_count;
            let is_recent = now.since(codel.drop_next) < 16 * INTERVAL;
            codel.count = if delta > 1 && is_recent { delta } else { 1 };
            codel.drop_next = control_law(now, codel.count);
            codel.last_count = codel.count;
        }
        (waiting.map(|waiting| (waiting.len, waiting.packet)), dropped)
    }

    /// RFC 8289, section 5.6: `dodequeue`.
    fn take_judged(&mut self, now: Timestamp) -> (Option<Waiting<T>>, bool) {
        let Some(waiting) = self.take() else {
            self.codel.first_above = None;
            return (None, false);
        };
        if now.since(waiting.since) < TARGET || self.bytes <= LARGEST_PACKET {
            self.codel.first_above = None;
            return (Some(waiting), false);
        }
        let may_drop = match self.codel.first_above {
            None => {
                self.codel.first_above = Some(now + INTERVAL);
                false
            }
            Some(at) => now >= at,
        };
        (Some(waiting), may_drop)
    }
}

/// RFC 8289, section 5.4.
fn control_law(at: Timestamp, count: u32) -> Timestamp {
    at + INTERVAL.div_f64(f64::from(count).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(millis: u64) -> Timestamp {
        Timestamp::from_nanos(millis * 1_000_000)
    }

    fn codel() -> Waiters<u64> {
        Waiters::new(Queue {
            packets: 1000,
            discipline: Discipline::CoDel,
        })
    }

    #[test]
    fn a_full_queue_drops_its_tail() {
        let mut waiters = Waiters::new(Queue {
            packets: 2,
            discipline: Discipline::TailDrop,
        });
        let taken: Vec<_> = (0..3)
            .map(|packet| waiters.push(millis(0), 1500, packet))
            .collect();
        assert_eq!(taken, [true, true, false]);
        assert_eq!(waiters.pop(millis(1)), (Some((1500, 0)), 0));
    }

    /// The figures of RFC 8289, section 3: with a standing queue of 50 ms, the first packet is dropped one interval
    /// after the target is exceeded, the second another interval later, the third after 100 / sqrt(2) more.
    #[test]
    fn codel_drops_a_standing_queue_by_its_square_root_law() {
        let mut waiters = codel();
        let mut drops = Vec::new();
        for at in 0..450 {
            assert!(waiters.push(millis(at), 1500, at));
            if at >= 50 {
                let (_, dropped) = waiters.pop(millis(at));
                drops.extend((0..dropped).map(|_| at));
            }
        }
        // 50: above the target for the first time; then 100, 100, 71, 58 ms.
        assert_eq!(drops, [150, 250, 321, 379, 429]);
    }

    #[test]
    fn codel_leaves_a_burst_alone_that_drains() {
        let mut waiters = codel();
        for packet in 0..90 {
            assert!(waiters.push(millis(0), 1500, packet));
        }
        let dropped: u64 = (1..=90).map(|at| waiters.pop(millis(at)).1).sum();
        assert_eq!(dropped, 0);
    }

    #[test]
    fn codel_leaves_a_queue_of_one_packet_alone_however_long_it_waits() {
        let mut waiters = codel();
        for at in 0..20 {
            assert!(waiters.push(millis(at * 100), 1500, at));
            assert_eq!(waiters.pop(millis(at * 100 + 50)), (Some((1500, at)), 0));
        }
    }
}
