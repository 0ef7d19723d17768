//! Round-trip time and retransmission timeout (RFC 6298).

use std::time::Duration;

use crate::time::Timestamp;

/// The variance term of the timeout is at least this: RFC 6298's clock granularity G. So the timeout stays clear of
/// what a receiver may delay an ACK by. RFC 6298 recommends a floor of 1 s for the whole; Linux has taken 200 ms for
/// this term since before it was written.
const VARIANCE_MIN: Duration = Duration::from_millis(200);

/// Before the first sample (RFC 6298, section 2.1).
const TIMEOUT_INITIAL: Duration = Duration::from_secs(1);

/// When the handshake had to be repeated (RFC 6298, section 5.7).
const TIMEOUT_AFTER_LOST_SYN: Duration = Duration::from_secs(3);

/// RFC 6298, section 2.5.
const TIMEOUT_MAX: Duration = Duration::from_secs(60);

/// The minimum is that of the last one to two of these.
const MINIMUM_WINDOW: Duration = Duration::from_secs(150);

#[derive(Debug)]
pub(super) struct RoundTrip {
    smoothed: Option<Duration>,
    variance: Duration,
    initial: Duration,
    /// Lowest samples: of the current window and of the one before.
    lowest: (Duration, Duration),
    window_since: Timestamp,
    /// Timeouts in a row.
    backoff: u32,
}

impl RoundTrip {
    pub(super) fn new(handshake: Option<Duration>, now: Timestamp) -> Self {
        let mut new = Self {
            smoothed: None,
            variance: Duration::ZERO,
            initial: TIMEOUT_AFTER_LOST_SYN,
            lowest: (Duration::MAX, Duration::MAX),
            window_since: now,
            backoff: 0,
        };
        if let Some(sample) = handshake {
            new.initial = TIMEOUT_INITIAL;
            new.take_sample(sample, now);
        }
        new
    }

    /// Takes a sample of a segment that was sent once (Karn's rule).
    pub(super) fn take_sample(&mut self, sample: Duration, now: Timestamp) {
        let sample = sample.max(Duration::from_micros(1));
        match self.smoothed {
            None => {
                self.smoothed = Some(sample);
                self.variance = sample / 2;
            }
            Some(smoothed) => {
                self.variance = (self.variance * 3 + smoothed.abs_diff(sample)) / 4;
                self.smoothed = Some((smoothed * 7 + sample) / 8);
            }
        }
        if now.since(self.window_since) >= MINIMUM_WINDOW {
            self.window_since = now;
            self.lowest = (sample, self.lowest.0);
        }
        self.lowest.0 = self.lowest.0.min(sample);
        self.backoff = 0;
    }

    pub(super) fn smoothed(&self) -> Option<Duration> {
        self.smoothed
    }

    /// The lowest sample of the last minutes.
    pub(super) fn minimum(&self) -> Option<Duration> {
        let lowest = self.lowest.0.min(self.lowest.1);
        (lowest < Duration::MAX).then_some(lowest)
    }

    /// RTO, with back-off (section 5.5).
    pub(super) fn timeout(&self) -> Duration {
        let base = match self.smoothed {
            None => self.initial,
            Some(smoothed) => smoothed + (self.variance * 4).max(VARIANCE_MIN),
        };
        let backed_off = base.saturating_mul(1 << self.backoff.min(16));
        backed_off.min(TIMEOUT_MAX).max(VARIANCE_MIN)
    }

    pub(super) fn back_off(&mut self) {
        self.backoff += 1;
    }

    /// The path answers again.
    pub(super) fn forget_backoff(&mut self) {
        self.backoff = 0;
    }
}
