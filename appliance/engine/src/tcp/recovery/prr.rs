//! Proportional rate reduction (RFC 6937): what may be sent in a recovery, so that it ends with the window that
//! congestion control wants.

/// The count of one recovery, in bytes.
#[derive(Debug)]
pub(super) struct RateReduction {
    /// In flight when it began: RecoverFS.
    flight: u64,
    delivered: u64,
    sent: u64,
    /// What may be in flight.
    window: u64,
}

impl RateReduction {
    pub(super) fn new(flight: u64) -> Self {
        Self {
            flight: flight.max(1),
            delivered: 0,
            sent: 0,
            window: 0,
        }
    }

    /// Takes an ACK that delivered `delivered` bytes and left `in_flight`. `target` is where the window is to end;
    /// `is_progress`: it acknowledged new data in order and no more has been lost.
    pub(super) fn on_ack(
        &mut self,
        delivered: u64,
        in_flight: u64,
        target: u64,
        segment: u64,
        is_progress: bool,
    ) {
        self.delivered += delivered;
        let allowed = if in_flight > target {
            let share = u128::from(self.delivered) * u128::from(target);
            let share = share.div_ceil(u128::from(self.flight)) as u64;
            share.saturating_sub(self.sent)
        } else {
            // The bound of the slow start variant, where ACKs show that the path takes it (RFC 6937, section 3).
            let mut limit = self.delivered.saturating_sub(self.sent).max(delivered);
            if is_progress {
                limit += segment;
            }
            (target - in_flight).min(limit)
        };
        // The fast retransmission itself.
        let allowed = if self.sent == 0 {
            allowed.max(segment)
        } else {
            allowed
        };
        self.window = in_flight + allowed;
    }

    pub(super) fn on_sent(&mut self, bytes: u64) {
        self.sent += bytes;
    }

    pub(super) fn window(&self) -> u64 {
        self.window
    }
}
