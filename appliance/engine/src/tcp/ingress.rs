//! What a flow does with the segments of its client, and the ACKs that answer some of them at once.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::segment::{Control, Fields};
use super::stack::Piece;
use super::{
    CHALLENGE_INTERVAL, Context, Phase, TIME_WAIT, TcpFlow, Upstream, buffer_size, distance, recovery,
};
use crate::addr::FlowId;
use crate::event::{CloseReason, DropReason};
use crate::packet::{TcpFlags, TcpView};

/// Smaller segments wait for their flow's turn, so that several leave together.
const PASSED_MIN: usize = 16 << 10;

impl TcpFlow {
    /// Takes a segment of this flow. Returns why it was dropped, if it was.
    pub(crate) fn handle_segment(
        &mut self,
        id: FlowId,
        segment: &TcpView<'_>,
        cx: &mut Context<'_>,
    ) -> Option<DropReason> {
        self.client_heard = cx.now;
        match &mut self.phase {
            Phase::Connecting => self.handle_while_connecting(segment, cx),
            Phase::TimeWait {
                sequence,
                acknowledgment,
                window,
                until,
            } => {
                // RFC 1337: a reset does not cut TIME-WAIT short. All else that takes sequence space is a client
                // that has missed our ACK.
                if segment.flags.rst() {
                    return None;
                }
                if segment.sequence_len() > 0 || segment.sequence != *acknowledgment {
                    *until = cx.now + TIME_WAIT;
                    let ack = Control {
                        source: self.target,
                        destination: self.client,
                        fields: Fields {
                            flags: TcpFlags::ACK,
                            sequence: *sequence,
                            acknowledgment: *acknowledgment,
                            window: *window,
                        },
                    };
                    ack.send(self.ingress, None, cx.world);
                }
                None
            }
            Phase::Reset(_) | Phase::Bypassed(_) | Phase::Ended(_) => Some(DropReason::NoFlow),
            Phase::Live(_) => self.handle_while_live(id, segment, cx),
        }
    }

    fn handle_while_connecting(&mut self, segment: &TcpView<'_>, cx: &mut Context<'_>) -> Option<DropReason> {
        let flags = segment.flags;
        if flags.rst() {
            // The client gives up. It has sent a SYN alone, so the number behind it is the only one that fits.
            if segment.sequence != self.syn.sequence.wrapping_add(1) {
                return Some(DropReason::TcpWindow);
            }
            self.phase = Phase::Ended(CloseReason::ClientReset);
            return None;
        }
        if flags.syn() && flags.ack() {
            Control::reset_for(self.client, self.target, segment).send(self.ingress, None, cx.world);
            return Some(DropReason::SplitHandshake);
        }
        if flags.syn() {
            return None; // repeated; the answer waits for the upstream
        }
        Some(DropReason::TcpWindow)
    }

    fn handle_while_live(
        &mut self,
        id: FlowId,
        segment: &TcpView<'_>,
        cx: &mut Context<'_>,
    ) -> Option<DropReason> {
        let Phase::Live(stack) = &mut self.phase else {
            unreachable!("asked of a live flow")
        };
        let (expected, limit) = (stack.expected(), stack.limit());
        let flags = segment.flags;
        if stack.is_finished() && !flags.syn() {
            // As in TIME-WAIT: a reset changes nothing any more (RFC 1337), and what is repeated has missed our ACK.
            if segment.sequence_len() > 0 && !flags.rst() {
                stack.send_ack(cx.world);
            }
            return None;
        }
        if flags.rst() {
            if segment.sequence == expected {
                self.handle_reset(cx);
                return None;
            }
            let in_window = distance(expected, segment.sequence) > 0 && distance(segment.sequence, limit) > 0;
            if in_window {
                self.send_challenge_ack(cx);
            }
            return Some(DropReason::TcpWindow);
        }
        if flags.syn() {
            if flags.ack() && !self.established {
                Control::reset_for(self.client, self.target, segment).send(self.ingress, None, cx.world);
                return Some(DropReason::SplitHandshake);
            }
            if !self.established && segment.sequence == self.syn.sequence {
                stack.repeat_syn_ack(cx.now); // it has not arrived, or not in time
            } else {
                self.send_challenge_ack(cx);
            }
            return None;
        }
        let Some(sent) = stack.sent() else {
            return Some(DropReason::TcpWindow); // the SYN-ACK has not left yet: nothing can answer it
        };
        if flags.ack() && distance(sent, segment.acknowledgment) > 0 {
            if self.established {
                self.send_challenge_ack(cx);
            } else {
                Control::reset_for(self.client, self.target, segment).send(self.ingress, None, cx.world);
            }
            return Some(DropReason::TcpWindow);
        }
        let end = segment.sequence.wrapping_add(segment.payload.len() as u32);
        let excess = distance(limit, end);
        let keep = if excess > 0 && !segment.payload.is_empty() {
            let Some(keep) = segment
                .payload
                .len()
                .checked_sub(excess as usize)
                .filter(|keep| *keep > 0)
            else {
                // Wholly beyond the buffer: a window probe, or a peer that ignores the window.
                stack.send_ack(cx.world);
                return Some(DropReason::TcpWindow);
            };
            Some(keep)
        } else {
            None
        };
        // What is far from the window says nothing reliable about what we have sent (RFC 9293, section 3.10.7.4).
        let is_near =
            distance(segment.sequence, limit) >= 0 && distance(expected, end) >= -(stack.capacity() as i32);
        if !stack.is_open() && flags.ack() && !stack.is_answered_by(segment) {
            let reset = Control::reset_for(self.client, self.target, segment);
            reset.send(self.ingress, Some(id), cx.world);
            return keep.map(|_| DropReason::TcpWindow);
        }
        let may_pass = self.established
            && self.conversation.is_none()
            && matches!(self.upstream, Upstream::Open { .. })
            && self.relay.is_open();
        let relay = &mut self.relay;
        let (flows, config) = (cx.flows, cx.config);
        let (now, world) = (cx.now, &mut *cx.world);
        let taking = catch_unwind(AssertUnwindSafe(|| {
            if is_near && flags.ack() {
                stack.on_acknowledgment(now, segment, || buffer_size(flows, config))?;
            }
            // A pure ACK in its place has nothing more to say.
            if !stack.is_open() || segment.sequence_len() > 0 || segment.sequence != expected {
                let mut piece = Piece {
                    sequence: segment.sequence,
                    bytes: &segment.payload[..keep.unwrap_or(segment.payload.len())],
                    fin: flags.fin() && keep.is_none(),
                };
                if may_pass && piece.bytes.len() >= PASSED_MIN {
                    let passed = stack.pass(&piece, |bytes| world.offer(id, bytes));
                    relay.count(passed);
                    piece.sequence = piece.sequence.wrapping_add(passed as u32);
                    piece.bytes = &piece.bytes[passed..];
                }
                stack.on_segment(now, segment, piece, world);
            }
            Ok(())
        }));
        match taking {
            Ok(Ok(())) => {}
            Ok(Err(recovery::Unacceptable)) => {
                self.send_challenge_ack(cx);
                return Some(DropReason::TcpWindow);
            }
            Err(_) => {
                self.break_down(cx);
                return Some(DropReason::Internal);
            }
        }
        if stack.expected() != expected {
            self.last_byte = cx.now;
        }
        if stack.is_finished() && stack.owes_ack() {
            // It would go in the flow's turn, but the flow gets none any more.
            stack.send_ack(cx.world);
        }
        self.tell(id, cx);
        keep.map(|_| DropReason::TcpWindow)
    }

    /// The client has reset the connection. What it sent before is still delivered.
    fn handle_reset(&mut self, cx: &mut Context<'_>) {
        if let Phase::Live(stack) = self.take_phase() {
            self.phase = Phase::Reset(stack);
            self.since = cx.now;
        }
    }

    /// The stack has panicked: nothing of it is used again but its buffers.
    pub(super) fn break_down(&mut self, cx: &mut Context<'_>) {
        if let Phase::Live(stack) = self.take_phase() {
            cx.arena.give_back(stack.into_rings());
        }
    }

    /// Takes the phase out; what is left says that the flow broke down.
    fn take_phase(&mut self) -> Phase {
        std::mem::replace(&mut self.phase, Phase::Ended(CloseReason::Internal))
    }

    // ---- segments of our own -----------------------------------------------------------------------------------

    fn send_challenge_ack(&mut self, cx: &mut Context<'_>) {
        let Phase::Live(stack) = &self.phase else { return };
        if stack.sent().is_none() || cx.now < self.challenge_at {
            return;
        }
        self.challenge_at = cx.now + CHALLENGE_INTERVAL;
        stack.send_ack(cx.world);
    }
}
