//! HyStart++ (RFC 9406): leaves slow start when round trips grow longer, before the queue overflows.

use std::time::Duration;

use super::Sample;

const RTT_THRESHOLD_MIN: Duration = Duration::from_millis(4);
const RTT_THRESHOLD_MAX: Duration = Duration::from_millis(16);
/// Samples that a round needs to be judged by.
const SAMPLES_MIN: u32 = 8;
/// Slow start grows by one part in so many in conservative slow start.
const GROWTH_DIVISOR: u64 = 4;
/// Rounds of conservative slow start.
const CONSERVATIVE_ROUNDS: u8 = 5;

/// What slow start is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Grow by the bytes delivered over this.
    Grow(u64),
    /// Leave slow start.
    Leave,
}

#[derive(Debug)]
pub(super) struct HyStart {
    /// SND.NXT when the round began: it ends when that is acknowledged.
    round_end: u64,
    last_round: Duration,
    this_round: Duration,
    samples: u32,
    /// In conservative slow start: rounds left, and the round-trip time it began with.
    conservative: Option<(u8, Duration)>,
}

impl HyStart {
    pub(super) fn new() -> Self {
        Self {
            round_end: 0,
            last_round: Duration::MAX,
            this_round: Duration::MAX,
            samples: 0,
            conservative: None,
        }
    }

    /// Takes an ACK in slow start (section 4.2).
    pub(super) fn on_ack(&mut self, sample: &Sample) -> Verdict {
        if let Some(rtt) = sample.rtt {
            self.this_round = self.this_round.min(rtt);
            self.samples += 1;
        }
        if self.samples >= SAMPLES_MIN && self.last_round < Duration::MAX {
            match self.conservative {
                None => {
                    let threshold = (self.last_round / 8).clamp(RTT_THRESHOLD_MIN, RTT_THRESHOLD_MAX);
                    if self.this_round >= self.last_round + threshold {
                        self.conservative = Some((CONSERVATIVE_ROUNDS, self.this_round));
                    }
                }
                // It was no queue after all.
                Some((_, baseline)) if self.this_round < baseline => self.conservative = None,
                Some(_) => {}
            }
        }
        if sample.acknowledged >= self.round_end {
            self.round_end = sample.sent;
            self.last_round = self.this_round;
            self.this_round = Duration::MAX;
            self.samples = 0;
            if let Some((rounds, _)) = &mut self.conservative {
                if *rounds == 0 {
                    return Verdict::Leave;
                }
                *rounds -= 1;
            }
        }
        Verdict::Grow(if self.conservative.is_some() {
            GROWTH_DIVISOR
        } else {
            1
        })
    }
}
