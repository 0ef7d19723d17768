//! A flow's turn: what it sends and tells, how it ends, and how long it may rest.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::receive::Told;
use super::stack::Sending;
use super::{
    Context, PACKETS_PER_TURN, Phase, RESET_LINGER, TIME_WAIT, TcpFlow, Turn, Upstream, VACATE_AFTER,
};
use crate::addr::FlowId;
use crate::config::Timeouts;
use crate::event::{CloseReason, Event, NameSource};
use crate::io::UpstreamCommand;
use crate::time::Timestamp;

impl TcpFlow {
    /// Whether a turn may do something, after a segment. Of its timers only the offer of memory can have become due by it.
    pub(crate) fn wants_turn(&self, now: Timestamp) -> bool {
        let is_at_rest = matches!(&self.phase, Phase::Live(stack) if stack.is_at_rest());
        !is_at_rest || self.last_byte + VACATE_AFTER <= now
    }

    /// When an acknowledgment is due that waits for data to go with.
    pub(crate) fn ack_due(&self) -> Option<Timestamp> {
        match &self.phase {
            Phase::Live(stack) => stack.ack_due(),
            Phase::Connecting
            | Phase::Bypassed(_)
            | Phase::TimeWait { .. }
            | Phase::Reset(_)
            | Phase::Ended(_) => None,
        }
    }

    /// Sends what there is to send, tells the driver what it has to know, and says when to come back.
    pub(crate) fn take_turn(&mut self, id: FlowId, cx: &mut Context<'_>) -> Turn {
        if std::mem::take(&mut self.due)
            && let Some(reason) = self.overdue(cx)
        {
            if self.is_time_wait() {
                return Turn::Forgotten;
            }
            let silent = matches!(reason, CloseReason::ConnectTimeout);
            self.abort(silent, cx);
            self.abort_upstream(id, cx.world);
            return Turn::Ended(reason);
        }
        self.tell(id, cx);
        match &mut self.phase {
            Phase::Connecting => Turn::Rest(self.since + cx.config.timeouts.connect),
            Phase::TimeWait { until, .. } => Turn::Rest(*until),
            Phase::Bypassed(_) => unreachable!("its turns are others"),
            &mut Phase::Ended(reason) => {
                self.abort_upstream(id, cx.world);
                Turn::Ended(reason)
            }
            Phase::Reset(stack) => {
                if stack.receive_queue() > 0 && self.upstream != Upstream::Gone {
                    return Turn::Rest(self.since + RESET_LINGER);
                }
                self.abort_upstream(id, cx.world);
                Turn::Ended(CloseReason::ClientReset)
            }
            Phase::Live(stack) => {
                let (now, world) = (cx.now, &mut *cx.world);
                match catch_unwind(AssertUnwindSafe(|| stack.send(now, PACKETS_PER_TURN, world))) {
                    Ok(Sending::More) => Turn::More,
                    Ok(Sending::Blocked) => Turn::Blocked,
                    Ok(Sending::Done { due }) => self.end_of_turn(due, cx),
                    Err(_) => {
                        self.break_down(cx);
                        self.abort_upstream(id, cx.world);
                        Turn::Ended(CloseReason::Internal)
                    }
                }
            }
        }
    }

    /// After everything has been sent: whether the flow has ended, or when to come back.
    fn end_of_turn(&mut self, due: Option<Timestamp>, cx: &mut Context<'_>) -> Turn {
        let Phase::Live(stack) = &mut self.phase else {
            unreachable!("only live flows send")
        };
        if self.upstream == Upstream::Gone && stack.is_finished() {
            if !stack.is_time_wait() {
                return Turn::Ended(CloseReason::Finished);
            }
            let sequence = stack.sent().expect("a finished connection has sent its FIN");
            let Told {
                acknowledgment,
                window,
            } = stack.now_told();
            let until = cx.now + TIME_WAIT;
            let time_wait = Phase::TimeWait {
                sequence,
                acknowledgment,
                window,
                until,
            };
            if let Phase::Live(stack) = std::mem::replace(&mut self.phase, time_wait) {
                cx.arena.give_back(stack.into_rings());
            }
            return Turn::Lingering(until);
        }
        let due = due.unwrap_or(Timestamp::MAX);
        let due = due.min(self.vacate_when_idle(cx));
        Turn::Rest(due.min(self.limit(&cx.config.timeouts).0))
    }

    /// Offers the buffers' memory to the system once the flow is idle and nothing is in them. Returns when to look at
    /// it again.
    fn vacate_when_idle(&mut self, cx: &mut Context<'_>) -> Timestamp {
        let Phase::Live(stack) = &self.phase else {
            return Timestamp::MAX;
        };
        let at = self.last_byte + VACATE_AFTER;
        if at > cx.now {
            return at;
        }
        let is_empty = stack.receive_queue() == 0 && stack.send_queue() == 0 && !stack.has_gaps();
        if self.vacated != Some(self.last_byte) && is_empty {
            self.vacated = Some(self.last_byte);
            stack.vacate(cx.world);
        }
        Timestamp::MAX
    }

    /// Tells the driver, once each: established, bytes wait, there is room, the client has closed, it is over.
    #[inline]
    pub(super) fn tell(&mut self, id: FlowId, cx: &mut Context<'_>) {
        if let Some(name) = self.relay.take_name() {
            cx.world.event(&Event::Named {
                flow: id,
                name,
                source: NameSource::FirstBytes,
            });
        }
        let (Phase::Live(stack) | Phase::Reset(stack)) = &mut self.phase else {
            return;
        };
        if !self.established && stack.is_open() {
            self.established = true;
            cx.world.event(&Event::Established { flow: id });
        }
        let Upstream::Open { eof, shut } = &mut self.upstream else {
            if self.established {
                stack.finish();
            }
            return;
        };
        if *eof && self.established {
            stack.finish();
        }
        if stack.receive_queue() > 0 || self.relay.has_bytes_before() {
            if !self.readable_told {
                self.readable_told = true;
                cx.world.upstream(id, UpstreamCommand::Readable);
            }
        } else if !*shut && stack.has_client_fin() {
            *shut = true;
            cx.world.upstream(id, UpstreamCommand::CloseWrite);
        }
        if self.room_wanted && !*eof && self.established && stack.room() * 4 >= stack.send_limit() {
            self.room_wanted = false;
            cx.world.upstream(id, UpstreamCommand::Writable);
        }
        if *eof && *shut {
            self.upstream = Upstream::Gone;
            cx.world.upstream(id, UpstreamCommand::Close);
        }
    }

    /// The earliest of the flow's own limits, and what it is called when it is passed.
    fn limit(&self, timeouts: &Timeouts) -> (Timestamp, CloseReason) {
        match &self.phase {
            Phase::Connecting => (self.since + timeouts.connect, CloseReason::ConnectTimeout),
            Phase::TimeWait { until, .. } => (*until, CloseReason::Finished),
            Phase::Reset(_) => (self.since + RESET_LINGER, CloseReason::ClientReset),
            Phase::Ended(reason) => (Timestamp::MAX, *reason),
            Phase::Bypassed(_) => unreachable!("it has its own limits"),
            Phase::Live(_) if !self.established => {
                (self.since + timeouts.handshake, CloseReason::HandshakeTimeout)
            }
            Phase::Live(stack) => {
                let is_half_closed =
                    stack.has_client_fin() || !matches!(self.upstream, Upstream::Open { eof: false, .. });
                let silence = if is_half_closed {
                    (
                        self.last_byte + timeouts.half_close,
                        CloseReason::HalfCloseTimeout,
                    )
                } else {
                    (
                        self.last_byte.max(self.client_heard) + timeouts.tcp_idle,
                        CloseReason::IdleTimeout,
                    )
                };
                let unanswered = if stack.has_unacknowledged() {
                    (
                        self.client_heard.max(self.outstanding_since) + timeouts.unacknowledged,
                        CloseReason::ClientUnresponsive,
                    )
                } else {
                    (Timestamp::MAX, CloseReason::ClientUnresponsive)
                };
                if unanswered.0 < silence.0 {
                    unanswered
                } else {
                    silence
                }
            }
        }
    }

    fn overdue(&self, cx: &Context<'_>) -> Option<CloseReason> {
        let (at, reason) = self.limit(&cx.config.timeouts);
        (at <= cx.now).then_some(reason)
    }
}
