//! The link between clients and engine: in order and without fail, until told otherwise.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use tungate_engine::Timestamp;

use super::datagrams::Sent;
use super::ledger::Attempt;
use crate::packet::{RST, SYN, Segment};

/// A packet under way.
#[derive(Debug, Clone)]
pub(super) enum Delivery {
    ToClient(Vec<u8>),
    ToEngine(Parcel),
}

/// A packet from a client, and what is known of it.
#[derive(Debug, Clone)]
pub(super) struct Parcel {
    pub(super) packet: Vec<u8>,
    /// The connection whose segment it is.
    pub(super) attempt: Option<Attempt>,
    pub(super) is_syn: bool,
    pub(super) is_reset: bool,
    /// The datagram or echo request that it carries, or a part of it.
    pub(super) sent: Option<Rc<Sent>>,
    pub(super) is_fragment: bool,
}

impl Parcel {
    pub(super) fn segment(segment: &Segment, attempt: Attempt) -> Self {
        Self {
            packet: segment.packet(),
            attempt: Some(attempt),
            is_syn: segment.has(SYN),
            is_reset: segment.has(RST),
            sent: None,
            is_fragment: false,
        }
    }
}

pub(super) struct Link {
    rng: ChaCha8Rng,
    loss: u8,
    repeats: u8,
    delay: Duration,
    jitter_millis: u16,
    serial: u64,
    /// By arrival, then in the order sent.
    under_way: BTreeMap<(Timestamp, u64), Delivery>,
}

impl Link {
    pub(super) fn new(seed: u8) -> Self {
        Self {
            rng: ChaCha8Rng::from_seed([seed; 32]),
            loss: 0,
            repeats: 0,
            delay: Duration::ZERO,
            jitter_millis: 0,
            serial: 0,
            under_way: BTreeMap::new(),
        }
    }

    /// Loses and repeats that many packets in a hundred from now on, and delays each.
    pub(super) fn become_faulty(&mut self, loss: u8, repeats: u8, delay_millis: u16, jitter_millis: u16) {
        self.loss = loss;
        self.repeats = repeats;
        self.delay = Duration::from_millis(delay_millis.into());
        self.jitter_millis = jitter_millis;
    }

    pub(super) fn send(&mut self, now: Timestamp, delivery: Delivery) {
        if self.chance(self.loss) {
            return;
        }
        if self.chance(self.repeats) {
            self.put(now, delivery.clone());
        }
        self.put(now, delivery);
    }

    /// When the next packet arrives.
    pub(super) fn next(&self) -> Option<Timestamp> {
        self.under_way.first_key_value().map(|((at, _), _)| *at)
    }

    /// The next packet that has arrived by `now`.
    pub(super) fn pop(&mut self, now: Timestamp) -> Option<Delivery> {
        let first = self.under_way.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    fn put(&mut self, now: Timestamp, delivery: Delivery) {
        let jitter = match self.jitter_millis {
            0 => Duration::ZERO,
            most => Duration::from_millis(u64::from(self.rng.next_u32() % u32::from(most))),
        };
        self.serial += 1;
        self.under_way
            .insert((now + self.delay + jitter, self.serial), delivery);
    }

    fn chance(&mut self, percent: u8) -> bool {
        percent > 0 && self.rng.next_u32() % 100 < u32::from(percent)
    }
}
