//! What is sent next.

use super::rack::Transmission;
use super::{
    Check, PACING_CREDIT, PACING_QUANTUM, Phase, Recovery, TailProbe, Transmit, WINDOW_PROBE_INTERVAL_MAX,
};
use super::{bytes_in, time_for};
use crate::time::Timestamp;

impl Recovery {
    /// What to send next, where there are bytes up to `queued_end` to send. What it returns counts as sent at `now`.
    #[inline] // with its early end only, which a client's segment comes to while nothing is sent to it
    pub fn next_transmit(&mut self, now: Timestamp, queued_end: u64) -> Option<Transmit> {
        debug_assert!(queued_end >= self.board.sent());
        self.queued = queued_end;
        self.timers.pace = None;
        if queued_end == self.board.sent()
            && self.is_clear()
            && self.phase == Phase::Open
            && !self.tail_probe_due
        {
            self.rest();
            self.limit_by_application();
            return None;
        }
        self.find_transmit(now, queued_end)
    }

    fn find_transmit(&mut self, now: Timestamp, queued_end: u64) -> Option<Transmit> {
        if std::mem::take(&mut self.tail_probe_due)
            && let Some(probe) = self.probe_tail(now)
        {
            return Some(probe);
        }
        let pacing_rate = self.pacing_rate();
        if pacing_rate.is_some()
            && self.paced_until > now
            && (self.board.lost() > 0 || queued_end > self.board.sent())
        {
            self.timers.pace = Some(self.paced_until);
            return None;
        }
        let has_bytes = self.board.lost() > 0 || queued_end > self.board.sent();
        let most = if has_bytes {
            self.packet_size(pacing_rate)
        } else {
            0
        };
        let is_checking = matches!(
            self.phase,
            Phase::Timeout {
                check: Check::Second { .. },
                ..
            }
        );
        if is_checking && let Some(sent) = self.send_to_check(now) {
            return sent;
        }
        if self.board.lost() > 0 {
            return self.send_lost(now, most);
        }
        self.send_new(now, most)
    }

    /// Bytes per second, where what is sent is paced.
    fn pacing_rate(&self) -> Option<u64> {
        self.congestion.pacing_rate().filter(|_| !self.is_near())
    }

    /// What one packet may carry: whole segments.
    fn packet_size(&self, pacing_rate: Option<u64>) -> u64 {
        let segment = u64::from(self.segment);
        let limit = u64::from(self.packet_limit) / segment * segment;
        match pacing_rate {
            None => limit,
            Some(rate) => {
                let quantum = bytes_in(rate, PACING_QUANTUM) / segment * segment;
                quantum.clamp((2 * segment).min(limit), limit)
            }
        }
    }

    /// RFC 8985, section 7.3: new data if there is any that the client takes, else the last segment again.
    fn probe_tail(&mut self, now: Timestamp) -> Option<Transmit> {
        let segment = u64::from(self.segment);
        let sent = self.board.sent();
        let new = (self.queued - sent)
            .min(self.window.edge.saturating_sub(sent))
            .min(segment);
        let probe = if new > 0 && !self.board.is_full() {
            self.append(now, sent + new)
        } else {
            let number = self.rack.next_number();
            let (start, end) = self.board.retransmit_tail(segment, number)?;
            let transmission = self.transmission(now, start, end);
            self.rack.push(transmission);
            self.on_sent(now, start, end, true)
        };
        self.statistics.tail_probes += 1;
        self.tail_probe = Some(TailProbe {
            end: self.board.sent(),
            retransmission: new == 0,
        });
        self.timers.probe = None;
        Some(probe)
    }

    /// F-RTO's second step (RFC 5682, section 2.1): up to two segments of new data. `None`: there are none, so it is
    /// given up.
    fn send_to_check(&mut self, now: Timestamp) -> Option<Option<Transmit>> {
        let Phase::Timeout {
            until,
            check: Check::Second { budget },
        } = self.phase
        else {
            return None;
        };
        if budget == 0 {
            return Some(None);
        }
        let sent = self.board.sent();
        let segment = u64::from(self.segment);
        let new = (self.queued - sent)
            .min(self.window.edge.saturating_sub(sent))
            .min(segment);
        let is_first = budget == 2 * segment;
        if new == 0 || self.board.is_full() {
            if is_first {
                self.phase = Phase::Timeout {
                    until,
                    check: Check::Done,
                };
                return None;
            }
            return Some(None);
        }
        let budget = budget.saturating_sub(segment);
        self.phase = Phase::Timeout {
            until,
            check: Check::Second { budget },
        };
        Some(Some(self.append(now, sent + new)))
    }

    fn send_lost(&mut self, now: Timestamp, most: u64) -> Option<Transmit> {
        let segment = u64::from(self.segment);
        let start = self.board.first_lost()?;
        let by_timeout = std::mem::take(&mut self.timeout_due);
        let room = self.send_window().saturating_sub(self.in_flight()) / segment * segment;
        let taken = self.window.edge.saturating_sub(start);
        let allowed = if by_timeout {
            segment
        } else if room == 0 {
            self.is_window_limited = true;
            return None;
        } else if taken == 0 {
            return None;
        } else {
            room.min(most).min(taken.max(segment))
        };
        let number = self.rack.next_number();
        let (start, end) = self.board.retransmit(allowed, number)?;
        let transmission = self.transmission(now, start, end);
        self.rack.push(transmission);
        if let Some(undo) = &mut self.undo {
            undo.outstanding += end - start;
            undo.any = true;
        }
        Some(self.on_sent(now, start, end, true))
    }

    fn send_new(&mut self, now: Timestamp, most: u64) -> Option<Transmit> {
        self.timeout_due = false;
        let segment = u64::from(self.segment);
        let sent = self.board.sent();
        let is_clear = self.is_clear();
        let available = self.queued - sent;
        if available == 0 {
            self.rest();
            if self.in_flight() < self.send_window() {
                self.limit_by_application();
            }
            return None;
        }
        if self.board.is_full() {
            return None;
        }
        if is_clear && sent > 0 && now.since(self.last_sent) > self.round_trip.timeout() {
            self.congestion.on_idle(now);
            self.last_sent = now;
        }
        let mut size = available.min(most);
        let taken = self.window.edge.saturating_sub(sent);
        if size > taken {
            size = taken / segment * segment;
            if size == 0 {
                self.is_window_limited = false;
                size = self.bytes_for_small_window(now, taken, is_clear)?;
                if size == 0 {
                    self.statistics.window_probes += 1;
                    return Some(Transmit::WindowProbe {
                        at: sent.wrapping_sub(1),
                    });
                }
            }
        }
        let room = self.send_window().saturating_sub(self.in_flight());
        if size > room {
            size = room / segment * segment;
            if size == 0 {
                if !is_clear {
                    self.is_window_limited = true;
                    return None;
                }
                size = available.min(taken).min(segment);
            }
        }
        self.timers.persist = None;
        self.window_probe_due = false;
        Some(self.append(now, sent + size))
    }

    /// Nothing waits to be sent.
    fn rest(&mut self) {
        self.timeout_due = false;
        self.timers.persist = None;
        self.window_probe_due = false;
        self.is_window_limited = false;
    }

    /// More could be sent than there is.
    fn limit_by_application(&mut self) {
        self.application_limited_until = (self.delivered + self.board.in_flight()).max(1);
    }

    /// What to send into a window smaller than a segment: nothing before what is outstanding is acknowledged, then at
    /// least half of the largest window seen, or what there is when the probe timer comes up (RFC 9293, sections
    /// 3.8.6.1 and 3.8.6.2.1). `Some(0)` is a probe.
    fn bytes_for_small_window(&mut self, now: Timestamp, taken: u64, is_clear: bool) -> Option<u64> {
        if !is_clear {
            self.timers.persist = None;
            return None;
        }
        if taken > 0 && taken >= self.window.largest / 2 {
            return Some(taken);
        }
        let is_due = std::mem::take(&mut self.window_probe_due);
        if is_due {
            self.window_probes_unanswered += 1;
        }
        if is_due || self.timers.persist.is_none() {
            let interval = self
                .round_trip
                .timeout()
                .saturating_mul(1 << self.window_probes_unanswered.min(16));
            self.timers.persist = Some(now + interval.min(WINDOW_PROBE_INTERVAL_MAX));
        }
        is_due.then_some(taken)
    }

    /// Sends new data up to `end`.
    fn append(&mut self, now: Timestamp, end: u64) -> Transmit {
        let start = self.board.sent();
        let number = self.rack.next_number();
        let mut transmission = self.transmission(now, start, end);
        transmission.in_flight += end - start;
        self.rack.push(transmission);
        self.board.append(end, number);
        self.on_sent(now, start, end, false)
    }

    /// A transmission of bytes that the scoreboard has in flight already, except new ones.
    pub(super) fn transmission(&mut self, now: Timestamp, start: u64, end: u64) -> Transmission {
        let is_alone =
            self.board.in_flight() == 0 || self.board.in_flight() == end - start && start < self.board.sent();
        if is_alone {
            self.first_sent_at = now;
            self.delivered_at = now;
        }
        Transmission {
            start,
            end,
            sent_at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            first_sent_at: self.first_sent_at,
            lost: self.lost,
            in_flight: self.board.in_flight(),
            application_limited: self.application_limited_until > 0,
        }
    }

    fn on_sent(&mut self, now: Timestamp, start: u64, end: u64, retransmission: bool) -> Transmit {
        let len = end - start;
        self.last_sent = now;
        if let Some(reduction) = &mut self.reduction {
            reduction.on_sent(len);
        }
        if let Some(rate) = self.pacing_rate() {
            self.paced_until = self.paced_until.max(now - PACING_CREDIT) + time_for(len, rate);
        }
        if retransmission {
            self.statistics.retransmitted += len;
            self.statistics.retransmissions += 1;
        }
        if self.timers.timeout.is_none() {
            self.timers.timeout = Some(now + self.round_trip.timeout());
        }
        if !retransmission && self.may_probe_tail() {
            self.set_probe_timer(now);
        }
        Transmit::Data {
            start,
            end,
            retransmission,
        }
    }
}
