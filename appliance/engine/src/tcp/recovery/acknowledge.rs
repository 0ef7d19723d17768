//! What an ACK says, and what follows from it.

use super::congestion::{Delivery, Sample};
use super::prr::RateReduction;
use super::rack::Tolerance;
use super::scoreboard::{Piece, Scoreboard};
use super::{Ack, Block, Check, DUPLICATE_ACKS, Delivered, Phase, Recovery, Unacceptable, Undo, Window};
use crate::time::Timestamp;

impl Recovery {
    /// Takes an ACK with its selective acknowledgments in the order in which the segment has them. Returns how many
    /// bytes need not be kept any more.
    ///
    /// # Errors
    ///
    /// [`Unacceptable`]: nothing has changed.
    #[inline] // with its early end only, which most ACKs of a client that sends come to
    pub fn on_ack(&mut self, now: Timestamp, ack: &Ack, blocks: &[Block]) -> Result<u64, Unacceptable> {
        let before = self.board.acknowledged();
        if ack.acknowledged > self.board.sent() || ack.acknowledged + self.window.largest < before {
            return Err(Unacceptable);
        }
        let window_changed = self.update_window(ack);
        // A client that sends says so with every segment: nothing was on its way, and nothing is.
        if self.is_clear() && blocks.is_empty() && self.phase == Phase::Open && self.tail_probe.is_none() {
            return Ok(0);
        }
        Ok(self.take_ack(now, ack, blocks, before, window_changed))
    }

    /// Takes an ACK of something; the first byte that was not acknowledged was `before`. Returns how many bytes need not
    /// be kept any more.
    fn take_ack(
        &mut self,
        now: Timestamp,
        ack: &Ack,
        blocks: &[Block],
        before: u64,
        window_changed: bool,
    ) -> u64 {
        let in_flight_before = self.in_flight();
        let mut delivered = Delivered::default();
        let freed = ack.acknowledged.saturating_sub(before);
        if freed > 0 {
            self.deliver(now, &mut delivered, |board, take| {
                board.acknowledge(ack.acknowledged, take)
            });
            self.round_trip.forget_backoff();
            self.rack.on_acknowledged(ack.acknowledged);
        }
        if self.selective {
            for block in blocks {
                self.deliver(now, &mut delivered, |board, take| {
                    board.sack(block.start, block.end, take)
                });
            }
        } else {
            self.count_duplicate_ack(ack, freed, window_changed, &mut delivered);
        }
        let mut duplicates = 0;
        if self.selective
            && let [first, rest @ ..] = blocks
        {
            let is_duplicate = first.end <= ack.acknowledged.max(before)
                || rest
                    .first()
                    .is_some_and(|second| second.start <= first.start && first.end <= second.end);
            if is_duplicate {
                duplicates = self.on_duplicate(first);
            }
        }
        if let Some((_, rtt)) = delivered.rtt {
            self.round_trip.take_sample(rtt, now);
        }
        self.delivered += delivered.bytes;
        if delivered.bytes > 0 {
            self.delivered_at = now;
        }
        let lost = self.detect(now, freed);
        self.lost += lost;
        self.settle_tail_probe(now, ack, blocks, duplicates, freed);
        self.settle_phase(now, in_flight_before, lost, freed, duplicates, &delivered);
        if delivered.bytes > 0 || lost > 0 {
            self.tell_congestion(now, in_flight_before, lost, freed, &delivered);
            if let Some(target) = self.congestion.recovery_target()
                && let Some(reduction) = &mut self.reduction
            {
                let in_flight = self.board.in_flight().saturating_sub(self.assumed);
                let segment = u64::from(self.segment);
                reduction.on_ack(
                    delivered.bytes,
                    in_flight,
                    target,
                    segment,
                    freed > 0 && lost == 0,
                );
            }
        }
        self.set_timers(now, delivered.bytes > 0 || freed > 0);
        self.check();
        freed
    }

    /// Takes the window if the segment is not older than the one that it was last taken from (RFC 9293, section
    /// 3.10.7.4). Returns whether it is another one.
    fn update_window(&mut self, ack: &Ack) -> bool {
        let acknowledged = self.board.acknowledged();
        let is_newer = ack.acknowledged > acknowledged
            || ack.acknowledged == acknowledged
                && self.window.update.is_none_or(|(sequence, acknowledged)| {
                    let ahead = ack.sequence.wrapping_sub(sequence) as i32;
                    ahead > 0 || (ahead == 0 && acknowledged <= ack.acknowledged)
                });
        if !is_newer {
            return false;
        }
        let changed = self.window.size != ack.window;
        self.window = Window {
            edge: ack.acknowledged + ack.window,
            size: ack.window,
            largest: self.window.largest.max(ack.window),
            update: Some((ack.sequence, ack.acknowledged)),
        };
        if changed {
            self.window_probes_unanswered = 0;
        }
        changed
    }

    /// Lets `apply` change the scoreboard and notes what it finds delivered.
    fn deliver(
        &mut self,
        now: Timestamp,
        delivered: &mut Delivered,
        apply: impl FnOnce(&mut Scoreboard, &mut dyn FnMut(Piece)),
    ) {
        let Self {
            board,
            rack,
            round_trip,
            timeout_transmission,
            ..
        } = self;
        let minimum = round_trip.minimum();
        apply(board, &mut |piece| {
            delivered.bytes += piece.len;
            delivered.is_original |= !piece.retransmitted && piece.transmission < *timeout_transmission;
            let Some(&transmission) = rack.get(piece.transmission) else {
                return;
            };
            let rtt = now.since(transmission.sent_at);
            rack.on_delivered(&piece, rtt, minimum);
            if !piece.retransmitted
                && delivered
                    .rtt
                    .is_none_or(|(newest, _)| newest <= piece.transmission)
            {
                delivered.rtt = Some((piece.transmission, rtt));
            }
            if delivered
                .newest
                .is_none_or(|(newest, _)| newest < piece.transmission)
            {
                delivered.newest = Some((piece.transmission, transmission));
            }
        });
    }

    /// The client has got bytes twice (RFC 2883). Returns how many.
    fn on_duplicate(&mut self, block: &Block) -> u64 {
        let len = block.end.saturating_sub(block.start);
        let is_sound = len > 0
            && block.end <= self.board.sent()
            && len <= self.window.largest
            && (block.end <= self.board.acknowledged() || self.board.is_sacked(block.start, block.end));
        if !is_sound {
            return 0;
        }
        self.statistics.duplicates += len;
        let is_of_probe = self
            .tail_probe
            .is_some_and(|probe| probe.retransmission && probe.end == block.end);
        if !is_of_probe {
            self.rack.on_duplicate_report(self.board.sent());
        }
        if let Some(undo) = &mut self.undo
            && block.start >= undo.from
        {
            undo.outstanding = undo.outstanding.saturating_sub(len);
        }
        len
    }

    /// Without selective acknowledgments, each duplicate ACK stands for a segment that has left the network (RFC 5681,
    /// section 3.2).
    fn count_duplicate_ack(
        &mut self,
        ack: &Ack,
        freed: u64,
        window_changed: bool,
        delivered: &mut Delivered,
    ) {
        let segment = u64::from(self.segment);
        if freed > 0 {
            self.duplicate_acks = 0;
            let known = self.assumed.min(freed.saturating_sub(segment));
            self.assumed -= known;
            delivered.bytes -= known.min(delivered.bytes);
            if self.phase == Phase::Open {
                self.assumed = 0;
            }
            return;
        }
        let is_duplicate = ack.acknowledged == self.board.acknowledged()
            && !ack.carries_data
            && !window_changed
            && self.board.in_flight() > 0;
        if is_duplicate {
            self.duplicate_acks += 1;
            if self.assumed + segment <= self.board.in_flight() {
                self.assumed += segment;
                delivered.bytes += segment;
            }
        }
    }

    /// Finds losses. Returns how many bytes.
    pub(super) fn detect(&mut self, now: Timestamp, freed: u64) -> u64 {
        if self.selective {
            let tolerance = self.tolerance();
            let found = self.rack.detect(now, &mut self.board, &tolerance);
            self.timers.reorder = found.again_at;
            return found.lost;
        }
        self.rack.retire(&self.board);
        let is_hole = match self.phase {
            Phase::Open => self.duplicate_acks == DUPLICATE_ACKS,
            // A partial ACK shows the next hole (RFC 6582, section 3.2).
            Phase::Recovery { until } => freed > 0 && self.board.acknowledged() < until,
            Phase::Timeout { .. } => false,
        };
        let lost = if is_hole {
            self.board.mark_head_lost(u64::from(self.segment))
        } else {
            0
        };
        self.assumed = self.assumed.min(self.board.in_flight());
        lost
    }

    pub(super) fn tolerance(&self) -> Tolerance {
        Tolerance {
            minimum: self.round_trip.minimum(),
            smoothed: self.round_trip.smoothed(),
            in_recovery: self.phase != Phase::Open,
            sacked_segments: self.board.sacked() / u64::from(self.segment),
        }
    }

    /// Finds out what the latest tail loss probe has done (RFC 8985, section 7.4.2).
    fn settle_tail_probe(
        &mut self,
        now: Timestamp,
        ack: &Ack,
        blocks: &[Block],
        duplicates: u64,
        freed: u64,
    ) {
        let Some(probe) = self.tail_probe else { return };
        if ack.acknowledged < probe.end {
            return;
        }
        let was_needless = !probe.retransmission
            || (duplicates > 0 && blocks[0].end == probe.end)
            || (ack.acknowledged == probe.end && freed == 0 && blocks.is_empty());
        if was_needless {
            self.tail_probe = None;
        } else if ack.acknowledged > probe.end {
            // It has repaired a loss that nothing else has told of.
            self.tail_probe = None;
            if self.phase == Phase::Open {
                self.congestion.on_congestion(now, self.board.in_flight());
                self.congestion.on_recovered(now, false);
            }
        }
    }

    pub(super) fn settle_phase(
        &mut self,
        now: Timestamp,
        in_flight_before: u64,
        losses: u64,
        freed: u64,
        duplicates: u64,
        delivered: &Delivered,
    ) {
        if duplicates > 0 && self.undo.is_some_and(|undo| undo.any && undo.outstanding == 0) {
            self.undo_reduction(now);
        }
        let acknowledged = self.board.acknowledged();
        match self.phase {
            Phase::Open => {}
            Phase::Recovery { until } => {
                if acknowledged >= until {
                    self.leave_recovery(now, false);
                }
            }
            Phase::Timeout { until, .. } if acknowledged >= until => self.leave_recovery(now, true),
            Phase::Timeout { until, check } => {
                let check = match check {
                    Check::First if freed > 0 => Check::Second {
                        budget: 2 * u64::from(self.segment),
                    },
                    // Selective ones may still be of what was sent before; else it is the end of it (section 2.1).
                    Check::First if self.selective => Check::First,
                    Check::Second { .. } if delivered.is_original => {
                        self.undo_reduction(now);
                        return;
                    }
                    Check::Second { budget } if freed == 0 && delivered.bytes == 0 => {
                        Check::Second { budget }
                    }
                    Check::First | Check::Second { .. } | Check::Done => Check::Done,
                };
                self.phase = Phase::Timeout { until, check };
            }
        }
        if self.phase == Phase::Open && (losses > 0 || self.board.lost() > 0) {
            self.enter_recovery(now, in_flight_before);
        }
    }

    /// Begins to repair, with `flight` bytes in flight before anything was found lost.
    fn enter_recovery(&mut self, now: Timestamp, flight: u64) {
        self.phase = Phase::Recovery {
            until: self.board.sent(),
        };
        self.congestion.on_congestion(now, flight);
        self.reduction = self
            .congestion
            .recovery_target()
            .map(|_| RateReduction::new(flight));
        self.undo = Some(Undo {
            from: self.board.acknowledged(),
            outstanding: 0,
            any: false,
        });
        self.tail_probe = None;
        self.tail_probe_due = false;
        self.timers.probe = None;
    }

    fn leave_recovery(&mut self, now: Timestamp, after_timeout: bool) {
        self.phase = Phase::Open;
        self.reduction = None;
        self.duplicate_acks = 0;
        self.assumed = 0;
        self.rack.on_recovered();
        self.congestion.on_recovered(now, after_timeout);
    }

    /// What the sender reacted to was no loss: everything is as before.
    fn undo_reduction(&mut self, now: Timestamp) {
        self.statistics.undone += 1;
        self.phase = Phase::Open;
        self.reduction = None;
        self.undo = None;
        self.congestion.undo(now);
        let number = self.rack.next_number();
        if let Some((start, end)) = self.board.restore_lost(number) {
            let transmission = self.transmission(now, start, end);
            self.rack.push(transmission);
        }
    }

    pub(super) fn tell_congestion(
        &mut self,
        now: Timestamp,
        in_flight_before: u64,
        lost: u64,
        freed: u64,
        delivered: &Delivered,
    ) {
        if self.application_limited_until < self.delivered {
            self.application_limited_until = 0;
        }
        let delivery = delivered.newest.and_then(|(_, transmission)| {
            self.first_sent_at = transmission.sent_at;
            let sending = transmission.sent_at.since(transmission.first_sent_at);
            let interval = sending.max(now.since(transmission.delivered_at));
            let is_plausible = self
                .round_trip
                .minimum()
                .is_some_and(|minimum| interval >= minimum);
            is_plausible.then_some(Delivery {
                delivered: self.delivered - transmission.delivered,
                interval,
                prior_delivered: transmission.delivered,
                lost: self.lost - transmission.lost,
                in_flight: transmission.in_flight,
                is_application_limited: transmission.application_limited,
            })
        });
        self.congestion.on_ack(&Sample {
            now,
            rtt: delivered.rtt.map(|(_, rtt)| rtt),
            rtt_minimum: self.round_trip.minimum(),
            rtt_smoothed: self.round_trip.smoothed(),
            delivered: delivered.bytes,
            is_cumulative: freed > 0,
            lost,
            in_flight_before,
            in_flight: self.in_flight(),
            acknowledged: self.board.acknowledged(),
            sent: self.board.sent(),
            delivered_total: self.delivered,
            is_window_limited: self.is_window_limited,
            in_recovery: matches!(self.phase, Phase::Recovery { .. }),
            delivery,
        });
    }
}
