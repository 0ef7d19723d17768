//! What the engine does with flows that the kernel carries: lets them begin, follows them, and ends them.

use super::{Engine, mark_dirty};
use crate::addr::{FlowId, IngressId};
use crate::bypass::{BypassEvent, BypassNews, BypassOrder, Carried, Ends};
use crate::event::{CloseReason, DropReason, Event};
use crate::flow::Flow;
use crate::io::{ChecksumState, Judgement, PacketIn, PacketOut, UpstreamError, World};
use crate::packet::{PacketView, TcpView, checksum};
use crate::tcp::TcpFlow;
use crate::tcp::bypass::{Bypass, Stage, Step};
use crate::tcp::segment::{Control, TCP_CHECKSUM_OFFSET};
use crate::time::WakeReason;

impl Engine {
    // ---- from the client ---------------------------------------------------------------------------------------

    /// Takes a segment of a bypassed flow that came to us all the same: a SYN, which always does, or one that the kernel
    /// does not carry any more.
    pub(super) fn handle_bypassed(
        &mut self,
        id: FlowId,
        view: &PacketView<'_>,
        segment: &TcpView<'_>,
        world: &mut dyn World,
    ) -> Judgement {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            unreachable!("asked of a TCP flow")
        };
        let (ingress, client, target, rule) = (flow.ingress, flow.client, flow.target, flow.rule);
        let is_first = segment.flags.syn() && !segment.flags.ack();
        let is_same = segment.sequence == flow.initial_sequence();
        let passed = Judgement {
            dropped: None,
            rule: Some(rule),
            flow: Some(id),
        };
        let Some(bypass) = flow.bypass_mut() else {
            unreachable!("asked of a bypassed flow")
        };
        match bypass.stage {
            Stage::Connecting | Stage::Open if is_first => send_on(view, ingress, id, world),
            Stage::Lingering(_) if is_first => {
                if !is_same || !bypass.was_open() {
                    bypass.successor = Some(view.bytes().into());
                    self.release(id, None, world);
                }
            }
            Stage::Releasing(_) if is_first => bypass.successor = Some(view.bytes().into()),
            Stage::Probing(reason, _) if !is_first => {
                if segment.flags.ack() {
                    bypass.on_answer(segment.sequence, segment.acknowledgment);
                }
                if !segment.flags.rst() {
                    Control::reset_for(client, target, segment).send(ingress, Some(id), world);
                }
                self.forget_bypassed(id, Some(reason), world);
                return self.drop_packet(DropReason::NoFlow, Some(rule), Some(id), world);
            }
            Stage::Counting(_) | Stage::Probing(..) if is_first => {} // the client will repeat it
            Stage::Connecting
            | Stage::Open
            | Stage::Lingering(_)
            | Stage::Releasing(_)
            | Stage::Counting(_)
            | Stage::Probing(..) => {
                return self.drop_packet(DropReason::NoFlow, Some(rule), Some(id), world);
            }
        }
        passed
    }

    /// Lets the kernel have a new flow.
    pub(super) fn begin_bypass(
        &mut self,
        id: FlowId,
        (view, segment): (&PacketView<'_>, &TcpView<'_>),
        world: &mut dyn World,
    ) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        flow.bypass(segment.header_len, self.now);
        world.bypass(id, flow.ends(), BypassOrder::Begin);
        send_on(view, flow.ingress, id, world);
    }

    // ---- from the kernel ---------------------------------------------------------------------------------------

    pub(super) fn handle_bypass_news(&mut self, news: &BypassNews, world: &mut dyn World) {
        let Ends { client, target } = news.ends;
        let (client, target) = ((client.ip(), client.port()), (target.ip(), target.port()));
        let hash = self.hasher.tcp(news.ingress, client, target);
        let is_its_flow =
            |flow: &Flow| matches!(flow, Flow::Tcp(flow) if flow.is_between(news.ingress, client, target));
        let Some(id) = self.flows.find_hashed(hash, is_its_flow) else {
            return;
        };
        let now = self.now;
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        if flow.bypass_mut().is_none() {
            return;
        }
        match news.event {
            BypassEvent::Segment(seen) => {
                let step = flow.on_bypassed_segment(&seen, now);
                self.follow(id, step, world);
            }
            BypassEvent::Unreachable(unreachable) => {
                if flow.is_connecting() {
                    let error = UpstreamError::Unreachable(unreachable);
                    self.follow(id, Step::End(CloseReason::ConnectFailed(error)), world);
                }
            }
            BypassEvent::Counted(carried) => self.on_counted(id, carried, world),
            BypassEvent::Released(carried) => self.on_released(id, carried, world),
            BypassEvent::Gone(carried) => self.on_gone(id, carried, world),
        }
    }

    fn follow(&mut self, id: FlowId, step: Step, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        let ends = flow.ends();
        match step {
            Step::Nothing => {}
            Step::Established | Step::HalfClosed => {
                if step == Step::Established {
                    flow.half_open = false;
                    self.half_open -= 1;
                    world.event(&Event::Established { flow: id });
                }
                if let Some(bypass) = flow.bypass_mut() {
                    bypass.look_later(&self.config.timeouts, self.now);
                }
                mark_dirty(&mut self.dirty, id, flow);
            }
            Step::Count => world.bypass(id, ends, BypassOrder::Count),
            Step::End(reason) => self.linger(id, reason, world),
        }
    }

    fn on_counted(&mut self, id: FlowId, carried: Option<Carried>, world: &mut dyn World) {
        let now = self.now;
        let Some(bypass) = self.bypass_of(id) else { return };
        if let Some(carried) = carried {
            bypass.on_carried(carried, now);
        }
        match bypass.stage {
            Stage::Counting(reason) => self.linger(id, reason, world),
            Stage::Open => {
                let timeouts = self.config.timeouts.clone();
                let Some(bypass) = self.bypass_of(id) else { return };
                if let Some(reason) = bypass.overdue(&timeouts, now) {
                    bypass.silent = false;
                    self.release(id, Some(reason), world);
                }
            }
            Stage::Connecting | Stage::Lingering(_) | Stage::Releasing(_) | Stage::Probing(..) => {}
        }
    }

    /// Tells of the end of a flow whose last segments may still be repeated.
    fn linger(&mut self, id: FlowId, reason: CloseReason, world: &mut dyn World) {
        self.account_end(id, reason, world);
        let now = self.now;
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        let Some(bypass) = flow.bypass_mut() else { return };
        let until = bypass.linger(now);
        self.timers.schedule(&mut flow.queued, id, until, WakeReason::Tcp);
        if self.is_crowded() {
            self.release(id, None, world);
        }
    }

    fn on_released(&mut self, id: FlowId, carried: Option<Carried>, world: &mut dyn World) {
        let now = self.now;
        let Some(bypass) = self.bypass_of(id) else { return };
        if let Some(carried) = carried {
            bypass.on_carried(carried, now);
        }
        let Stage::Releasing(reason) = bypass.stage else {
            return;
        };
        let silent = bypass.silent;
        if let (Some(reason), false) = (reason, silent)
            && let Some(Flow::Tcp(flow)) = self.flows.get_mut(id)
        {
            if let Some((probe, until)) = flow.probe(reason, now) {
                probe.send(flow.ingress, Some(id), world);
                self.timers.schedule(&mut flow.queued, id, until, WakeReason::Tcp);
                return;
            }
            flow.refusal().send(flow.ingress, Some(id), world);
        }
        self.forget_bypassed(id, reason, world);
    }

    fn on_gone(&mut self, id: FlowId, carried: Carried, world: &mut dyn World) {
        let now = self.now;
        let Some(bypass) = self.bypass_of(id) else { return };
        bypass.on_carried(carried, now);
        match bypass.stage {
            Stage::Connecting | Stage::Open | Stage::Counting(_) => {
                let reason = bypass.unseen_end();
                self.forget_bypassed(id, Some(reason), world);
            }
            Stage::Lingering(_) => self.forget_bypassed(id, None, world),
            // What was ordered follows.
            Stage::Releasing(_) | Stage::Probing(..) => {}
        }
    }

    // ---- turns and ends ----------------------------------------------------------------------------------------

    /// Does what has become due for a bypassed flow.
    pub(super) fn turn_bypassed(&mut self, id: FlowId, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        (flow.dirty, flow.due) = (false, false);
        let (since, ends, now) = (flow.since, flow.ends(), self.now);
        let timeouts = &self.config.timeouts;
        let Some(bypass) = flow.bypass_mut() else { return };
        if bypass.due(since, timeouts) <= now {
            match bypass.stage {
                Stage::Connecting => return self.release(id, Some(CloseReason::ConnectTimeout), world),
                Stage::Open => {
                    bypass.look_later(timeouts, now);
                    world.bypass(id, ends, BypassOrder::Count);
                }
                Stage::Lingering(_) => return self.release(id, None, world),
                Stage::Probing(reason, _) => return self.forget_bypassed(id, Some(reason), world),
                Stage::Counting(_) | Stage::Releasing(_) => {}
            }
        }
        let due = bypass.due(since, timeouts);
        self.timers.schedule(&mut flow.queued, id, due, WakeReason::Tcp);
    }

    /// Has the kernel forget a flow. With a `reason`, that is its end.
    pub(super) fn release(&mut self, id: FlowId, reason: Option<CloseReason>, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        let ends = flow.ends();
        if std::mem::take(&mut flow.half_open) {
            self.half_open -= 1;
        }
        if let Some(bypass) = flow.bypass_mut() {
            bypass.stage = Stage::Releasing(reason);
            world.bypass(id, ends, BypassOrder::Release);
        }
    }

    /// Lets go of a flow that the kernel has forgotten, and goes on with the one that has waited for that.
    fn forget_bypassed(&mut self, id: FlowId, reason: Option<CloseReason>, world: &mut dyn World) {
        if let Some(reason) = reason {
            self.account_end(id, reason, world);
        }
        let Some(Flow::Tcp(mut flow)) = self.flows.remove(id) else {
            return;
        };
        let successor = flow.bypass_mut().and_then(|bypass| bypass.successor.take());
        if let Some(bytes) = successor {
            // Its sums were looked at when it came.
            let packet = PacketIn {
                ingress: flow.ingress,
                bytes: &bytes,
                checksum: ChecksumState::Trusted,
                segment_size: None,
                reassembled: false,
            };
            self.handle_packet(&packet, world);
        }
    }

    fn bypass_of(&mut self, id: FlowId) -> Option<&mut Bypass> {
        match self.flows.get_mut(id) {
            Some(Flow::Tcp(flow)) => flow.bypass_mut(),
            Some(Flow::Session(_)) | None => None,
        }
    }
}

impl TcpFlow {
    fn ends(&self) -> Ends {
        Ends {
            client: self.client,
            target: self.target,
        }
    }
}

/// Sends a client's packet on by the device, as it came but for the checksum, which the device finishes.
fn send_on(view: &PacketView<'_>, ingress: IngressId, id: FlowId, world: &mut dyn World) {
    let (bytes, header_len) = (view.bytes(), view.transport_offset());
    let sum = checksum::pseudo_header(
        view.source(),
        view.final_destination(),
        6,
        bytes.len() - header_len,
    );
    let buffer = world.packet_buffer(bytes.len());
    buffer.copy_from_slice(bytes);
    let field = header_len + usize::from(TCP_CHECKSUM_OFFSET);
    buffer[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    world.send_packet(PacketOut {
        ingress,
        flow: Some(id),
        header_len: header_len as u16,
        partial_checksum: Some(TCP_CHECKSUM_OFFSET),
        segment_size: None,
    });
}
