//! RACK: loss detection by time (RFC 8985, section 6).
//!
//! Transmissions are kept in the order in which they were made. What was sent before something that has been delivered
//! is lost once it is overdue by the reordering window; as everything is in order of time, only the oldest transmission
//! is ever looked at, and each once.

use std::collections::VecDeque;
use std::time::Duration;

use super::scoreboard::{Piece, Scoreboard};
use crate::time::Timestamp;

/// Segments reported behind a hole that make it a loss at once while no reordering has been seen (RFC 8985, 6.2).
const DUPLICATE_THRESHOLD: u64 = 3;

/// Recoveries without a duplicate report until the reordering window shrinks again (RFC 8985, 6.2).
const WINDOW_PERSISTS: u8 = 16;

/// Transmissions that stay allocated while nothing is in flight.
const KEPT: usize = 32;

/// One transmission and what was known when it was made, for delivery rate samples.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transmission {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) sent_at: Timestamp,
    /// Bytes delivered in all, and when the last of them were.
    pub(super) delivered: u64,
    pub(super) delivered_at: Timestamp,
    /// When the first of the bytes then in flight were sent.
    pub(super) first_sent_at: Timestamp,
    /// Bytes lost in all.
    pub(super) lost: u64,
    /// Bytes in flight, itself included.
    pub(super) in_flight: u64,
    /// The sender had nothing to fill the path with.
    pub(super) application_limited: bool,
}

#[derive(Debug, Default)]
pub(super) struct Rack {
    transmissions: VecDeque<Transmission>,
    /// The number of the first of them.
    first: u64,
    /// The most recently sent bytes that have been delivered: transmission and offset behind them.
    latest: Option<(u64, u64)>,
    /// How long those took.
    rtt: Duration,
    /// One past the highest delivered offset.
    highest_delivered: u64,
    reordering_seen: bool,
    window_multiplier: u8,
    window_persists: u8,
    /// SND.NXT when the window last grew: once per round trip.
    grown_at: Option<u64>,
}

/// What decides about the reordering window.
pub(super) struct Tolerance {
    pub(super) minimum: Option<Duration>,
    pub(super) smoothed: Option<Duration>,
    pub(super) in_recovery: bool,
    /// Bytes selectively acknowledged, in segments.
    pub(super) sacked_segments: u64,
}

/// What [`Rack::detect`] has found.
pub(super) struct Detected {
    pub(super) lost: u64,
    /// When to look again.
    pub(super) again_at: Option<Timestamp>,
}

impl Rack {
    /// The number of the next transmission.
    pub(super) fn next_number(&self) -> u64 {
        self.first + self.transmissions.len() as u64
    }

    pub(super) fn push(&mut self, transmission: Transmission) {
        self.transmissions.push_back(transmission);
    }

    pub(super) fn get(&self, number: u64) -> Option<&Transmission> {
        let at = number.checked_sub(self.first)?;
        self.transmissions.get(usize::try_from(at).ok()?)
    }

    /// Notes that `piece` has been delivered, `rtt` after it was sent.
    pub(super) fn on_delivered(&mut self, piece: &Piece, rtt: Duration, minimum: Option<Duration>) {
        if piece.end >= self.highest_delivered {
            self.highest_delivered = piece.end;
        } else if !piece.retransmitted {
            self.reordering_seen = true;
        }
        // The ACK may be for an earlier copy (step 2).
        if piece.retransmitted && minimum.is_some_and(|minimum| rtt < minimum) {
            return;
        }
        let this = (piece.transmission, piece.end);
        if self.latest.is_none_or(|latest| this > latest) {
            self.latest = Some(this);
            self.rtt = rtt;
        }
    }

    /// A retransmission was not needed: tolerates more reordering (step 4).
    pub(super) fn on_duplicate_report(&mut self, sent: u64) {
        if self.grown_at.is_none() {
            self.grown_at = Some(sent);
            self.window_multiplier = self.window_multiplier.saturating_add(1);
            self.window_persists = WINDOW_PERSISTS;
        }
    }

    pub(super) fn on_acknowledged(&mut self, to: u64) {
        if self.grown_at.is_some_and(|sent| to >= sent) {
            self.grown_at = None;
        }
    }

    pub(super) fn on_recovered(&mut self) {
        self.window_persists = self.window_persists.saturating_sub(1);
        if self.window_persists == 0 {
            self.window_multiplier = 0;
        }
    }

    fn reordering_window(&self, tolerance: &Tolerance) -> Duration {
        if !self.reordering_seen
            && (tolerance.in_recovery || tolerance.sacked_segments >= DUPLICATE_THRESHOLD)
        {
            return Duration::ZERO;
        }
        let quarter = tolerance.minimum.unwrap_or_default() / 4;
        let window = quarter * (u32::from(self.window_multiplier) + 1);
        window.min(tolerance.smoothed.unwrap_or(Duration::MAX))
    }

    /// Takes for lost what is overdue (step 5), and forgets transmissions that have nothing in flight.
    pub(super) fn detect(
        &mut self,
        now: Timestamp,
        board: &mut Scoreboard,
        tolerance: &Tolerance,
    ) -> Detected {
        let mut found = Detected {
            lost: 0,
            again_at: None,
        };
        let window = self.reordering_window(tolerance);
        while let Some(&oldest) = self.transmissions.front() {
            let (latest, limit) = self.latest.unwrap_or((0, 0));
            let is_before = self.latest.is_some() && self.first <= latest;
            if oldest.end > board.acknowledged() && is_before {
                let limit = if self.first == latest { limit } else { u64::MAX };
                let due = oldest.sent_at + self.rtt + window;
                if now >= due {
                    let (lost, left) = board.mark_lost(self.first, oldest.start, oldest.end, limit);
                    found.lost += lost;
                    if left {
                        break;
                    }
                } else if board.has_in_flight(self.first, oldest.start, oldest.end, limit) {
                    found.again_at = Some(due);
                    break;
                } else if board.has_in_flight(self.first, oldest.start, oldest.end, u64::MAX) {
                    break;
                }
            } else if board.has_in_flight(self.first, oldest.start, oldest.end, u64::MAX) {
                break;
            }
            self.forget_oldest();
        }
        found
    }

    /// Forgets the oldest transmissions that have nothing in flight.
    pub(super) fn retire(&mut self, board: &Scoreboard) {
        while let Some(oldest) = self.transmissions.front() {
            if oldest.end > board.acknowledged()
                && board.has_in_flight(self.first, oldest.start, oldest.end, u64::MAX)
            {
                break;
            }
            self.forget_oldest();
        }
    }

    /// Takes for lost what was sent so long ago that its ACK is overdue, and the first segment in any case (section
    /// 6.3, on a timeout). Returns how many bytes.
    pub(super) fn mark_overdue(
        &mut self,
        now: Timestamp,
        board: &mut Scoreboard,
        tolerance: &Tolerance,
    ) -> u64 {
        let window = self.reordering_window(tolerance);
        let rtt = if self.latest.is_some() {
            self.rtt
        } else {
            tolerance.smoothed.unwrap_or_default()
        };
        let mut lost = 0;
        while let Some(&oldest) = self.transmissions.front() {
            if oldest.sent_at + rtt + window > now {
                break;
            }
            lost += board.mark_lost(self.first, oldest.start, oldest.end, u64::MAX).0;
            self.forget_oldest();
        }
        lost
    }

    /// Forgets all transmissions: nothing is in flight.
    pub(super) fn forget_all(&mut self) {
        while !self.transmissions.is_empty() {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        self.transmissions.pop_front();
        self.first += 1;
        if self.transmissions.is_empty() && self.transmissions.capacity() > KEPT {
            self.transmissions = VecDeque::new();
        }
    }
}
