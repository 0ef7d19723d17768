//! One direction of a path: a queue, a bottleneck, faults and a delay.

use std::collections::VecDeque;
use std::time::Duration;

use tungate_engine::Timestamp;

use super::fault::{Chance, Loser, Loss, Reordering};
use super::queue::{Discipline, Queue, Waiters};

/// What one direction of a path is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Bits of IP packets per second; 0: no limit, and so no queue.
    pub rate: u64,
    /// From the end of a packet's sending to its arrival.
    pub delay: Duration,
    /// What waits in front of the bottleneck.
    pub queue: Queue,
    /// What is lost behind it.
    pub loss: Loss,
    /// What is overtaken.
    pub reordering: Option<Reordering>,
    /// Part of all packets that arrive twice.
    pub duplicates: f64,
}

impl Shape {
    /// A path with no fault but its delay.
    pub fn delay(delay: Duration) -> Self {
        Self {
            rate: 0,
            delay,
            queue: Queue {
                packets: 1000,
                discipline: Discipline::TailDrop,
            },
            loss: Loss::None,
            reordering: None,
            duplicates: 0.0,
        }
    }
}

/// What has become of packets. `offered + duplicated` is the sum of all others and of what is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PipeCounts {
    /// Given to the pipe.
    pub offered: u64,
    /// Dropped for want of room, or by CoDel.
    pub queue_drops: u64,
    /// Lost behind the bottleneck.
    pub lost: u64,
    /// Arrived once more than they were sent.
    pub duplicated: u64,
    /// Arrived.
    pub delivered: u64,
    /// The most that have waited at one time.
    pub longest_queue: usize,
}

/// One direction of a path.
#[derive(Debug, Clone)]
pub struct Pipe<T> {
    shape: Shape,
    waiters: Waiters<T>,
    /// Until when the bottleneck is busy, in nanoseconds and parts of one by the rate: nothing is rounded away.
    busy_until: (u64, u64),
    /// By arrival; in the order sent where that is equal.
    under_way: VecDeque<(Timestamp, T)>,
    loser: Loser,
    reorders: Chance,
    duplicates: Chance,
    counts: PipeCounts,
}

impl<T: Clone> Pipe<T> {
    /// An empty one. Its faults are a function of `seed`.
    pub fn new(shape: Shape, seed: u64) -> Self {
        Self {
            waiters: Waiters::new(shape.queue),
            busy_until: (0, 0),
            under_way: VecDeque::new(),
            loser: Loser::new(shape.loss, Chance::new(seed, 1)),
            reorders: Chance::new(seed, 2),
            duplicates: Chance::new(seed, 3),
            counts: PipeCounts::default(),
            shape,
        }
    }

    /// Sends a packet that is `len` bytes long. Time must not go back from call to call.
    pub fn send(&mut self, now: Timestamp, len: usize, packet: T) {
        self.advance(now);
        self.counts.offered += 1;
        if self.shape.rate == 0 {
            return self.pass(now, packet);
        }
        if self.waiters.len() == 0 && self.is_idle(now) {
            // CoDel sees it as one that has not waited, and leaves it alone.
            return self.transmit((now.as_nanos(), 0), len, packet);
        }
        if !self.waiters.push(now, len, packet) {
            self.counts.queue_drops += 1;
        }
        self.counts.longest_queue = self.counts.longest_queue.max(self.waiters.len());
    }

    /// When to call [`Pipe::receive`]: the earliest time at which something may have arrived.
    pub fn next(&self) -> Option<Timestamp> {
        let arrival = self.under_way.front().map(|(at, _)| *at);
        let turn = (self.waiters.len() > 0).then(|| self.free_at());
        arrival.into_iter().chain(turn).min()
    }

    /// The next packet that has arrived by `now`, and when it was due.
    pub fn receive(&mut self, now: Timestamp) -> Option<(Timestamp, T)> {
        self.advance(now);
        if self.under_way.front()?.0 > now {
            return None;
        }
        self.counts.delivered += 1;
        self.under_way.pop_front()
    }

    /// What has become of packets so far.
    pub fn counts(&self) -> PipeCounts {
        self.counts
    }

    /// Packets that wait or travel.
    pub fn under_way(&self) -> usize {
        self.waiters.len() + self.under_way.len()
    }

    fn free_at(&self) -> Timestamp {
        Timestamp::from_nanos(self.busy_until.0 + u64::from(self.busy_until.1 > 0))
    }

    fn is_idle(&self, now: Timestamp) -> bool {
        self.free_at() <= now
    }

    /// Gives the bottleneck to those that wait, one after the other.
    fn advance(&mut self, now: Timestamp) {
        while self.waiters.len() > 0 && self.is_idle(now) {
            let (next, dropped) = self.waiters.pop(self.free_at());
            self.counts.queue_drops += dropped;
            if let Some((len, packet)) = next {
                self.transmit(self.busy_until, len, packet);
            }
        }
    }

    fn transmit(&mut self, (nanos, parts): (u64, u64), len: usize, packet: T) {
        let total = parts + len as u64 * 8 * 1_000_000_000;
        self.busy_until = (nanos + total / self.shape.rate, total % self.shape.rate);
        self.pass(self.free_at(), packet);
    }

    /// Behind the bottleneck.
    fn pass(&mut self, at: Timestamp, packet: T) {
        if self.loser.loses() {
            self.counts.lost += 1;
            return;
        }
        let mut arrival = at + self.shape.delay;
        if let Some(Reordering { share, most }) = self.shape.reordering
            && self.reorders.comes(share)
        {
            arrival = arrival + self.reorders.up_to(most);
        }
        if self.duplicates.comes(self.shape.duplicates) {
            self.counts.duplicated += 1;
            self.arrive(arrival, packet.clone());
        }
        self.arrive(arrival, packet);
    }

    fn arrive(&mut self, at: Timestamp, packet: T) {
        let place = self.under_way.partition_point(|(other, _)| *other <= at);
        self.under_way.insert(place, (at, packet));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Pauses before packets in microseconds, and their lengths.
    fn packets() -> impl Strategy<Value = Vec<(u64, usize)>> {
        prop::collection::vec((prop_oneof![Just(0), 0..300_u64], 20..1500_usize), 1..400)
    }

    fn shapes() -> impl Strategy<Value = Shape> {
        let loss = prop_oneof![
            Just(Loss::None),
            (0.0..0.5).prop_map(Loss::Random),
            (0.0..0.3, 1.0..5.0).prop_map(|(share, length)| Loss::Burst { share, length }),
        ];
        let reordering = prop::option::of((0.0..1.0, 0..5000_u64).prop_map(|(share, most)| Reordering {
            share,
            most: Duration::from_micros(most),
        }));
        let discipline = prop_oneof![Just(Discipline::TailDrop), Just(Discipline::CoDel)];
        (
            prop_oneof![Just(0), 100_000..2_000_000_000_u64],
            0..50_000_u64,
            (1..50_usize, discipline),
            loss,
            reordering,
            prop_oneof![Just(0.0), 0.0..0.5],
        )
            .prop_map(
                |(rate, delay, (packets, discipline), loss, reordering, duplicates)| Shape {
                    rate,
                    delay: Duration::from_micros(delay),
                    queue: Queue { packets, discipline },
                    loss,
                    reordering,
                    duplicates,
                },
            )
    }

    /// Runs packets through, waking at each announced time; the serial number is the packet.
    fn deliver(shape: Shape, packets: &[(u64, usize)], seed: u64) -> (Vec<(Timestamp, usize)>, Pipe<usize>) {
        let mut pipe = Pipe::new(shape, seed);
        let mut delivered = Vec::new();
        let mut now = Timestamp::ZERO;
        let mut collect = |pipe: &mut Pipe<usize>, until: Timestamp| {
            while let Some(at) = pipe.next().filter(|at| *at <= until) {
                while let Some((due, packet)) = pipe.receive(at) {
                    assert_eq!(due, at, "announced at its time");
                    delivered.push((due, packet));
                }
            }
        };
        for (serial, &(pause, len)) in packets.iter().enumerate() {
            now = now + Duration::from_micros(pause);
            collect(&mut pipe, now);
            pipe.send(now, len, serial);
        }
        collect(&mut pipe, Timestamp::MAX);
        (delivered, pipe)
    }

    proptest! {
        #[test]
        fn packets_are_conserved(shape in shapes(), packets in packets(), seed: u64) {
            let (delivered, pipe) = deliver(shape, &packets, seed);
            let counts = pipe.counts();
            prop_assert_eq!(pipe.under_way(), 0);
            prop_assert_eq!(counts.offered, packets.len() as u64);
            prop_assert_eq!(counts.delivered, delivered.len() as u64);
            prop_assert_eq!(
                counts.offered + counts.duplicated,
                counts.queue_drops + counts.lost + counts.delivered
            );
            prop_assert!(counts.longest_queue <= shape.queue.packets);
            let mut serials: Vec<_> = delivered.iter().map(|(_, serial)| *serial).collect();
            serials.sort_unstable();
            let more = serials.chunk_by(|one, next| one == next).map(<[_]>::len).max();
            prop_assert!(more.is_none_or(|more| more <= 1 + usize::from(shape.duplicates > 0.0)));
        }

        #[test]
        fn the_rate_is_never_exceeded_and_always_used(
            rate in 100_000..2_000_000_000_u64,
            packets in packets(),
            delay in 0..50_000_u64,
        ) {
            let delay = Duration::from_micros(delay);
            let queue = Queue { packets: 400, discipline: Discipline::TailDrop };
            let shape = Shape { rate, queue, ..Shape::delay(delay) };
            let (delivered, _) = deliver(shape, &packets, 0);
            prop_assert_eq!(delivered.len(), packets.len());
            // The finish of each by the textbook: max(arrival, finish of the one before) + length / rate.
            let (mut sent, mut finish) = (0.0_f64, 0.0_f64);
            for (serial, &(pause, len)) in packets.iter().enumerate() {
                sent += pause as f64 * 1e3;
                finish = finish.max(sent) + len as f64 * 8e9 / rate as f64;
                let (at, what) = delivered[serial];
                prop_assert_eq!(what, serial);
                let expected = finish + delay.as_nanos() as f64;
                let error = at.as_nanos() as f64 - expected;
                prop_assert!((-1.0..=2.0).contains(&error), "{serial}: {error} ns late");
            }
        }

        #[test]
        fn without_reordering_nothing_is_overtaken(shape in shapes(), packets in packets(), seed: u64) {
            let (delivered, _) = deliver(Shape { reordering: None, ..shape }, &packets, seed);
            prop_assert!(delivered.is_sorted());
        }

        #[test]
        fn what_is_reordered_is_late_by_no_more_than_said(packets in packets(), seed: u64, most in 1..5000_u64) {
            let most = Duration::from_micros(most);
            let shape = Shape::delay(Duration::from_millis(3));
            let reordering = Some(Reordering { share: 0.5, most });
            let (mut delivered, _) = deliver(Shape { reordering, ..shape }, &packets, seed);
            delivered.sort_by_key(|(_, serial)| *serial);
            let mut sent = Timestamp::ZERO;
            for (&(pause, _), (at, _)) in packets.iter().zip(delivered) {
                sent = sent + Duration::from_micros(pause);
                let due = sent + shape.delay;
                prop_assert!(due <= at && at <= due + most);
            }
        }

        #[test]
        fn a_seed_decides_everything(shape in shapes(), packets in packets(), seed: u64) {
            prop_assert_eq!(deliver(shape, &packets, seed).0, deliver(shape, &packets, seed).0);
        }
    }

    #[test]
    fn another_seed_loses_others() {
        let shape = Shape {
            loss: Loss::Random(0.5),
            ..Shape::delay(Duration::ZERO)
        };
        let packets = [(1, 100); 200];
        assert_ne!(deliver(shape, &packets, 1).0, deliver(shape, &packets, 2).0);
    }
}
