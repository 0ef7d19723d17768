//! Cubic by bytes (RFC 9438), in integers, so that every machine computes the same.

use std::time::Duration;

use super::hystart::{HyStart, Verdict};
use super::{Congestion, Sample, initial_window};
use crate::time::Timestamp;

/// The window is multiplied by 7/10 at a loss (section 4.6).
const DECREASE: (u64, u64) = (7, 10);

/// Window growth for Reno friendliness, 3 (1 - β) / (1 + β) = 9/17 of a segment per round trip (section 4.3).
const FRIENDLY_GROWTH: (u64, u64) = (9, 17);

/// Slow start is paced from so many initial windows on: short transfers end before.
const PACED_FROM: u64 = 8;

#[derive(Debug)]
pub(super) struct Cubic {
    segment: u64,
    window: u64,
    threshold: u64,
    /// W_max: where the window was at the last loss.
    plateau: u64,
    epoch: Option<Epoch>,
    hystart: Option<HyStart>,
    before: Option<Before>,
    /// Bytes delivered that have not yet grown the window.
    credit: u64,
    rtt: Option<Duration>,
}

/// A period of growth between two losses (section 4.2).
#[derive(Debug, Clone, Copy)]
struct Epoch {
    since: Timestamp,
    /// K: when the window reaches the plateau again.
    plateau_after: Duration,
    /// Where the curve has its plateau.
    origin: u64,
    /// What Reno would have.
    friendly: u64,
    friendly_credit: u64,
}

/// The state before the latest reduction, to undo it (section 4.9).
#[derive(Debug, Clone, Copy)]
struct Before {
    window: u64,
    threshold: u64,
    plateau: u64,
    epoch: Option<Epoch>,
}

impl Cubic {
    pub(super) fn new(segment_size: u32) -> Self {
        Self {
            segment: u64::from(segment_size),
            window: initial_window(segment_size),
            threshold: u64::MAX,
            plateau: 0,
            epoch: None,
            hystart: Some(HyStart::new()),
            before: None,
            credit: 0,
            rtt: None,
        }
    }

    /// One that has left slow start with this window.
    pub(super) fn from_window(segment_size: u32, window: u64) -> Self {
        Self {
            window,
            threshold: window,
            hystart: None,
            ..Self::new(segment_size)
        }
    }

    fn reduce(&mut self) {
        self.before = Some(Before {
            window: self.window,
            threshold: self.threshold,
            plateau: self.plateau,
            epoch: self.epoch,
        });
        // Fast convergence (section 4.7): a flow that did not get back to where it was leaves room for another.
        self.plateau = if self.window < self.plateau {
            self.window / 20 * 17
        } else {
            self.window
        };
        self.threshold = (self.window / DECREASE.1 * DECREASE.0).max(2 * self.segment);
        self.epoch = None;
        self.hystart = None;
        self.credit = 0;
    }

    fn slow_start(&mut self, sample: &Sample) {
        let divisor = match self.hystart.as_mut().map(|hystart| hystart.on_ack(sample)) {
            None => 1,
            Some(Verdict::Grow(divisor)) => divisor,
            Some(Verdict::Leave) => {
                self.hystart = None;
                self.threshold = self.window;
                return;
            }
        };
        // RFC 9406, section 4.2 puts no bound on what one ACK adds where sending is paced by ACKs of super-packets.
        self.window = (self.window + sample.delivered / divisor).min(self.threshold.max(self.window));
    }

    fn avoid_congestion(&mut self, sample: &Sample) {
        let segment = self.segment;
        let rtt = sample.rtt_smoothed.unwrap_or_default();
        let (window, plateau) = (self.window, self.plateau);
        let epoch = self.epoch.get_or_insert_with(|| {
            let origin = plateau.max(window);
            Epoch {
                since: sample.now,
                plateau_after: plateau_after(
                    (origin - window) / segment,
                    (origin - window) % segment,
                    segment,
                ),
                origin,
                friendly: window,
                friendly_credit: 0,
            }
        });
        // Where Reno would be (section 4.3); its growth is Reno's own once the plateau is behind.
        epoch.friendly_credit += if epoch.friendly < epoch.origin {
            sample.delivered * FRIENDLY_GROWTH.0 / FRIENDLY_GROWTH.1
        } else {
            sample.delivered
        };
        while epoch.friendly_credit >= epoch.friendly {
            epoch.friendly_credit -= epoch.friendly;
            epoch.friendly += segment;
        }
        let target = curve(epoch, sample.now.since(epoch.since) + rtt, segment);
        let target = target.clamp(window, window + window / 2);
        // The target is reached within a round trip: target - window per window of bytes delivered (section 4.4).
        let gain = u128::from(target - window) * u128::from(sample.delivered) + u128::from(self.credit);
        self.credit = (gain % u128::from(window)) as u64;
        self.window = (window + (gain / u128::from(window)) as u64).max(epoch.friendly);
    }
}

/// K, as the time in which 0.4 t³ segments make up `segments` and `rest` bytes (section 4.2).
fn plateau_after(segments: u64, rest: u64, segment: u64) -> Duration {
    // t³ in µs³ is (segments / 0.4) · 10^18.
    let thousandths = u128::from(segments) * 1000 + u128::from(rest) * 1000 / u128::from(segment);
    let cube = thousandths * 25 / 10 * 1_000_000_000_000_000;
    Duration::from_micros(cube_root(cube))
}

/// The window on the curve at `after` its start (section 4.2).
fn curve(epoch: &Epoch, after: Duration, segment: u64) -> u64 {
    let (after, plateau) = (after.as_micros() as i128, epoch.plateau_after.as_micros() as i128);
    // Beyond this the curve is above any window there may be.
    let t = (after - plateau).min(10_000_000_000);
    let offset = t * t * t / 1_000_000_000_000 * 4 * i128::from(segment) / 10 / 1_000_000;
    u64::try_from(i128::from(epoch.origin) + offset).unwrap_or(0)
}

/// The integer cube root, rounded down.
fn cube_root(of: u128) -> u64 {
    let (mut low, mut high) = (0_u64, 1 << 40);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if u128::from(middle).pow(3) <= of {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

impl Congestion for Cubic {
    fn on_ack(&mut self, sample: &Sample) {
        self.rtt = sample.rtt_smoothed;
        // A window that is not made use of says nothing about the path (RFC 9438, section 5.8). In slow start, half of
        // it is use enough: it doubles in the time that its use needs to show.
        let is_starting = self.window < self.threshold;
        let is_used = sample.is_window_limited || (is_starting && sample.in_flight_before >= self.window / 2);
        if sample.in_recovery || !is_used || !sample.is_cumulative {
            return;
        }
        if is_starting {
            self.slow_start(sample);
        } else {
            self.avoid_congestion(sample);
        }
    }

    fn on_congestion(&mut self, _: Timestamp, _: u64) {
        self.reduce();
    }

    fn on_recovered(&mut self, _: Timestamp, after_timeout: bool) {
        if !after_timeout {
            self.window = self.threshold;
        }
    }

    fn on_timeout(&mut self, _: Timestamp, _: u64, in_flight: u64, repeated: bool) {
        if !repeated {
            self.reduce();
        }
        self.window = in_flight + self.segment;
    }

    fn undo(&mut self, _: Timestamp) {
        if let Some(before) = self.before.take() {
            self.window = self.window.max(before.window);
            self.threshold = before.threshold;
            self.plateau = before.plateau;
            self.epoch = before.epoch;
        }
    }

    fn on_idle(&mut self, _: Timestamp) {
        // What was found out about the path still bounds slow start (RFC 5681, section 4.1).
        self.threshold = self.threshold.max(self.window / 4 * 3);
        self.window = self.window.min(initial_window(self.segment as u32));
        self.epoch = None;
    }

    fn set_segment_size(&mut self, bytes: u32) {
        self.segment = u64::from(bytes);
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn recovery_target(&self) -> Option<u64> {
        Some(self.threshold)
    }

    /// In slow start, a window that is large is spread over half a round trip: as it doubles, ACKs let two segments out
    /// at a time, and half a window at once is more than many a queue holds.
    fn pacing_rate(&self) -> Option<u64> {
        if self.window >= self.threshold || self.window < PACED_FROM * initial_window(self.segment as u32) {
            return None;
        }
        let rtt = self.rtt?.as_nanos().max(1);
        u64::try_from(2 * u128::from(self.window) * 1_000_000_000 / rtt).ok()
    }
}
