//! A small path and a receiver, for the tests beside the code.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use super::super::*;

/// SplitMix64.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

pub(super) struct Path {
    pub(super) seed: u64,
    /// Bytes a second.
    pub(super) rate: u64,
    /// One way.
    pub(super) delay: Duration,
    /// Packets.
    pub(super) queue: usize,
    /// Packets lost of 1000, and ACKs.
    pub(super) loss: u64,
    pub(super) ack_loss: u64,
    pub(super) jitter: Duration,
    pub(super) selective: bool,
    pub(super) segments_per_packet: u32,
    pub(super) bytes: u64,
    pub(super) window: u64,
    pub(super) congestion: CongestionControl,
}

#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) finished_after: Option<Duration>,
    pub(super) statistics: Statistics,
    /// Bytes that the path has lost.
    pub(super) lost: u64,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Segment(u64, u64),
    Probe,
    AckTimer(u64),
    Ack(u64, Vec<(u64, u64)>),
}

struct Receiver {
    next: u64,
    /// Out of order: start and end.
    holes: BTreeMap<u64, u64>,
    recent: Vec<u64>,
    unacknowledged: u32,
    timer: u64,
}

impl Path {
    pub(super) fn run(&self, limit: Duration) -> Outcome {
        let mut random = Random::new(self.seed);
        let start = Timestamp::from_nanos(1_000_000_000);
        let mut now = start;
        let segment = 1460_u64;
        let setup = Setup {
            segment_size: segment as u16,
            packet_limit: segment as u32 * self.segments_per_packet,
            window: self.window,
            selective: self.selective,
            handshake_rtt: Some(self.delay * 2),
            congestion: self.congestion,
        };
        let mut sender = Recovery::new(&setup, now);
        let mut receiver = Receiver {
            next: 0,
            holes: BTreeMap::new(),
            recent: Vec::new(),
            unacknowledged: 0,
            timer: 0,
        };
        let mut events: BinaryHeap<Reverse<(Timestamp, u64, Event)>> = BinaryHeap::new();
        let mut number = 0;
        let mut free_at = now;
        let mut lost = 0;
        loop {
            while let Some(transmit) = sender.next_transmit(now, self.bytes) {
                number += 1;
                let Transmit::Data { mut start, end, .. } = transmit else {
                    events.push(Reverse((now + self.delay, number, Event::Probe)));
                    continue;
                };
                while start < end {
                    let cut = end.min(start + segment);
                    let waiting = free_at.since(now).as_nanos() as u64 * self.rate / 1_000_000_000 / 1500;
                    if waiting as usize >= self.queue || random.below(1000) < self.loss {
                        lost += cut - start;
                    } else {
                        free_at = free_at.max(now) + time_for(cut - start + 40, self.rate);
                        let jitter = Duration::from_nanos(random.below(self.jitter.as_nanos() as u64 + 1));
                        number += 1;
                        events.push(Reverse((
                            free_at + self.delay + jitter,
                            number,
                            Event::Segment(start, cut),
                        )));
                    }
                    start = cut;
                }
            }
            let finished = sender.acknowledged() == self.bytes;
            if finished || now.since(start) > limit {
                return Outcome {
                    finished_after: finished.then(|| now.since(start)),
                    statistics: sender.statistics(),
                    lost,
                };
            }
            let deadline = sender.deadline();
            let next = events.peek().map(|Reverse((at, ..))| *at);
            let (Some(at), true) = (
                next,
                deadline.is_none_or(|deadline| next.is_some_and(|next| next <= deadline)),
            ) else {
                now = deadline.expect("data outstanding has a timer").max(now);
                sender.on_timer(now);
                continue;
            };
            now = at;
            let Some(Reverse((_, _, event))) = events.pop() else {
                unreachable!("peeked above")
            };
            let mut answer = |receiver: &mut Receiver, duplicate: Option<(u64, u64)>, number: u64| {
                receiver.unacknowledged = 0;
                receiver.timer += 1;
                let mut blocks = Vec::from_iter(duplicate);
                for start in receiver.recent.iter().rev() {
                    if let Some(&end) = receiver.holes.get(start)
                        && blocks.len() < 4
                    {
                        blocks.push((*start, end));
                    }
                }
                if random.below(1000) >= self.ack_loss {
                    let ack = Event::Ack(receiver.next, blocks);
                    events.push(Reverse((now + self.delay, number, ack)));
                }
            };
            number += 1;
            match event {
                Event::Probe => answer(&mut receiver, None, number),
                Event::AckTimer(timer) => {
                    if receiver.timer == timer && receiver.unacknowledged > 0 {
                        answer(&mut receiver, None, number);
                    }
                }
                Event::Segment(start, end) => {
                    let known = end <= receiver.next
                        || receiver
                            .holes
                            .range(..=start)
                            .next_back()
                            .is_some_and(|(_, &hole)| hole >= end);
                    let had_holes = !receiver.holes.is_empty();
                    if known {
                        answer(&mut receiver, Some((start, end)), number);
                        continue;
                    }
                    receiver.take(start, end);
                    receiver.unacknowledged += 1;
                    if had_holes || start > receiver.next || receiver.unacknowledged >= 2 {
                        answer(&mut receiver, None, number);
                    } else {
                        let timer = Event::AckTimer(receiver.timer);
                        events.push(Reverse((now + Duration::from_millis(40), number, timer)));
                    }
                }
                Event::Ack(acknowledged, blocks) => {
                    let blocks: Vec<_> = blocks
                        .into_iter()
                        .map(|(start, end)| Block { start, end })
                        .collect();
                    let ack = Ack {
                        acknowledged,
                        window: self.window,
                        sequence: 0,
                        carries_data: false,
                    };
                    let blocks = if self.selective { &blocks[..] } else { &[] };
                    sender.on_ack(now, &ack, blocks).expect("an honest receiver");
                }
            }
        }
    }
}

impl Receiver {
    fn take(&mut self, start: u64, end: u64) {
        let (mut from, mut to) = (start, end);
        while let Some((&other, &behind)) = self.holes.range(..=to).next_back()
            && behind >= from
        {
            (from, to) = (from.min(other), to.max(behind));
            self.holes.remove(&other);
            self.recent.retain(|recent| *recent != other);
        }
        if from <= self.next {
            self.next = self.next.max(to);
        } else {
            self.holes.insert(from, to);
            self.recent.push(from);
        }
    }
}
