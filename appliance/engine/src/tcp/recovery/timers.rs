//! What is waited for, and what becomes due.

use super::{
    ACK_DELAY_MAX, Check, Delivered, PROBE_TIMEOUT_INITIAL, PROBE_TIMEOUT_MIN, Phase, Recovery, Undo,
};
use crate::time::Timestamp;

impl Recovery {
    /// After an ACK or a timer: what is waited for. `progress`: the client has told something new.
    pub(super) fn set_timers(&mut self, now: Timestamp, progress: bool) {
        if self.is_clear() {
            self.timers.timeout = None;
            self.timers.probe = None;
            self.timers.reorder = None;
            self.tail_probe_due = false;
            return;
        }
        if progress {
            self.timers.timeout = Some(now + self.round_trip.timeout());
        }
        if !self.may_probe_tail() {
            self.timers.probe = None;
            self.tail_probe_due = false;
        } else if progress {
            self.set_probe_timer(now);
        }
    }

    /// RFC 8985, section 7.2.
    pub(super) fn may_probe_tail(&self) -> bool {
        self.selective
            && self.probes_tail
            && self.phase == Phase::Open
            && self.tail_probe.is_none()
            && self.board.sacked() == 0
            && self.board.in_flight() > 0
    }

    pub(super) fn set_probe_timer(&mut self, now: Timestamp) {
        let after = match self.round_trip.smoothed() {
            None => PROBE_TIMEOUT_INITIAL,
            Some(smoothed) if self.board.in_flight() <= u64::from(self.segment) => {
                2 * smoothed + ACK_DELAY_MAX
            }
            Some(smoothed) => 2 * smoothed + PROBE_TIMEOUT_MIN,
        };
        let at = now + after;
        self.timers.probe = Some(self.timers.timeout.map_or(at, |timeout| at.min(timeout)));
    }

    /// Does what has become due; harmless when early. [`Recovery::next_transmit`] may have something afterwards.
    pub fn on_timer(&mut self, now: Timestamp) {
        let is_due = |at: Option<Timestamp>| at.is_some_and(|at| at <= now);
        if is_due(self.timers.reorder) {
            self.timers.reorder = None;
            let in_flight_before = self.in_flight();
            let lost = self.detect(now, 0);
            self.lost += lost;
            if lost > 0 {
                let delivered = Delivered::default();
                self.settle_phase(now, in_flight_before, lost, 0, 0, &delivered);
                self.tell_congestion(now, in_flight_before, lost, 0, &delivered);
                if let Some(target) = self.congestion.recovery_target()
                    && let Some(reduction) = &mut self.reduction
                {
                    reduction.on_ack(0, self.board.in_flight(), target, u64::from(self.segment), false);
                }
                self.set_timers(now, false);
            }
        }
        if is_due(self.timers.probe) {
            self.timers.probe = None;
            if self.may_probe_tail() {
                self.tail_probe_due = true;
                self.timers.timeout = Some(now + self.round_trip.timeout());
            }
        }
        if is_due(self.timers.persist) {
            self.timers.persist = None;
            self.window_probe_due = true;
        }
        if is_due(self.timers.timeout) {
            self.on_timeout(now);
        }
        self.check();
    }

    /// RFC 6298, section 5.
    fn on_timeout(&mut self, now: Timestamp) {
        self.statistics.timeouts += 1;
        let outstanding = self.in_flight();
        let mut lost;
        if self.board.is_reneged() {
            // RFC 2018, section 8: what was said of this data is not true any more.
            lost = self.board.mark_all_lost(true);
            self.rack.forget_all();
        } else if self.selective {
            let tolerance = self.tolerance();
            lost = self.rack.mark_overdue(now, &mut self.board, &tolerance);
            lost += self.board.mark_head_lost(u64::from(self.segment));
        } else {
            lost = self.board.mark_all_lost(false);
            self.rack.forget_all();
            self.duplicate_acks = 0;
            self.assumed = 0;
        }
        self.lost += lost;
        let until = self.board.sent();
        let (check, repeated) = match self.phase {
            Phase::Open => (Check::First, false),
            Phase::Recovery { .. } => (Check::Done, false),
            Phase::Timeout {
                check: Check::Done, ..
            } => (Check::Done, true),
            Phase::Timeout { .. } => (Check::First, true),
        };
        if !repeated {
            self.timeout_transmission = self.rack.next_number();
            self.undo = Some(Undo {
                from: self.board.acknowledged(),
                outstanding: 0,
                any: false,
            });
        }
        self.congestion
            .on_timeout(now, outstanding, self.board.in_flight(), repeated);
        self.phase = Phase::Timeout { until, check };
        self.reduction = None;
        self.tail_probe = None;
        self.tail_probe_due = false;
        self.round_trip.back_off();
        self.timeout_due = true;
        self.paced_until = now;
        self.timers.probe = None;
        self.timers.reorder = None;
        self.timers.timeout = Some(now + self.round_trip.timeout());
    }
}
