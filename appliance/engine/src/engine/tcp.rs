//! What the engine does with TCP flows: opens and refuses them, feeds them, gives them their turn, ends them.

use std::net::SocketAddr;
use std::time::Duration;

use super::{Engine, Room, mark_dirty};
use crate::addr::{FlowId, IngressId, Protocol};
use crate::dns;
use crate::event::{CloseReason, DropReason, Event};
use crate::flow::Flow;
use crate::io::{IcmpError, Judgement, Open, UpstreamCommand, UpstreamError, UpstreamEvent, World};
use crate::packet::{Datagram, PacketView, TcpView};
use crate::policy::{Action, Decision};
use crate::tcp::segment::{Control, Syn};
use crate::tcp::{Context, TcpFlow, Turn};
use crate::time::WakeReason;

/// How long a flow may connect though there are as many as may: most targets answer sooner, and the others' clients ask
/// again.
const HALF_OPEN_KEPT: Duration = Duration::from_millis(100);

impl Engine {
    // ---- from the client ---------------------------------------------------------------------------------------

    pub(super) fn handle_segment(
        &mut self,
        ingress: IngressId,
        view: &PacketView<'_>,
        segment: &TcpView<'_>,
        world: &mut dyn World,
    ) -> Judgement {
        let client = (view.source(), segment.source_port);
        let target = (view.destination(), segment.destination_port);
        let is_first = segment.flags.syn() && !segment.flags.ack();
        let hash = self.hasher.tcp(ingress, client, target);
        let is_its_flow =
            |flow: &Flow| matches!(flow, Flow::Tcp(flow) if flow.is_between(ingress, client, target));
        if let Some(id) = self.flows.find_hashed(hash, is_its_flow) {
            let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
                unreachable!("TCP keys name TCP flows")
            };
            if flow.is_bypassed() {
                return self.handle_bypassed(id, view, segment, world);
            }
            if !is_first || !flow.is_replaced_by(segment) {
                let rule = flow.rule;
                let mut cx = Context {
                    now: self.now,
                    config: &self.config,
                    hasher: &self.hasher,
                    arena: &mut self.arena,
                    flows: self.tcp_flows,
                    world,
                };
                let dropped = flow.handle_segment(id, segment, &mut cx);
                if flow.wants_turn(self.now) {
                    mark_dirty(&mut self.dirty, id, flow);
                }
                return match dropped {
                    None => Judgement {
                        dropped: None,
                        rule: Some(rule),
                        flow: Some(id),
                    },
                    Some(reason) => self.drop_packet(reason, Some(rule), Some(id), world),
                };
            }
            self.end(id, CloseReason::Replaced, world);
        }
        let (client, target) = (SocketAddr::from(client), SocketAddr::from(target));
        if !is_first {
            if !segment.flags.rst() {
                Control::reset_for(client, target, segment).send(ingress, None, world);
            }
            return self.drop_packet(DropReason::NoFlow, None, None, world);
        }
        self.open_tcp(ingress, (client, target), (view, segment), world)
    }

    fn open_tcp(
        &mut self,
        ingress: IngressId,
        (client, target): (SocketAddr, SocketAddr),
        (view, segment): (&PacketView<'_>, &TcpView<'_>),
        world: &mut dyn World,
    ) -> Judgement {
        let Decision { action, rule } = self.policy.decide(ingress, Protocol::Tcp, client, target);
        let (egress, connect_to) = match action {
            Action::Direct => (None, target),
            Action::Egress(egress) => (Some(egress), target),
            Action::Redirect(to) => (None, to),
            Action::Drop => return self.drop_packet(DropReason::RuleDrop, Some(rule), None, world),
            Action::Reject => {
                Control::reset_for(client, target, segment).send(ingress, None, world);
                return self.drop_packet(DropReason::RuleReject, Some(rule), None, world);
            }
        };
        let limits = &self.config.limits;
        let refusal = if self.draining {
            Some(DropReason::Draining)
        } else if self.tcp_flows >= limits.flows as usize {
            Some(DropReason::FlowLimit)
        } else if self.clients.of(ingress, client.ip()) >= limits.flows_per_client {
            Some(DropReason::ClientLimit)
        } else if self.half_open >= limits.half_open as usize && !self.evict_half_open(world) {
            Some(DropReason::HalfOpenLimit)
        } else {
            None
        };
        if let Some(reason) = refusal {
            if reason == DropReason::Draining {
                // Whoever could serve it will not be here: better to know at once.
                Control::reset_for(client, target, segment).send(ingress, None, world);
            }
            return self.drop_packet(reason, Some(rule), None, world);
        }
        let flow = TcpFlow::new(ingress, client, target, rule, Syn::of(segment), self.now);
        let id = self.flows.insert(Flow::Tcp(flow));
        self.clients.add(ingress, client.ip());
        self.half_open += 1;
        self.note_connecting(id);
        self.tcp_flows += 1;
        world.event(&Event::Opened {
            flow: id,
            ingress,
            protocol: Protocol::Tcp,
            client,
            target,
            action,
            rule,
        });
        self.tell_name(id, (ingress, client, target), world);
        // What is asked of a name server is listened to.
        if self.config.bypass && action == Action::Direct && target.port() != dns::PORT {
            self.begin_bypass(id, (view, segment), world);
        } else {
            let open = Open {
                ingress,
                protocol: Protocol::Tcp,
                client,
                target: connect_to,
                egress,
            };
            world.upstream(id, UpstreamCommand::Open(open));
        }
        if let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) {
            mark_dirty(&mut self.dirty, id, flow);
        }
        Judgement {
            dropped: None,
            rule: Some(rule),
            flow: Some(id),
        }
    }

    /// Puts a new flow at the end of those that connect.
    fn note_connecting(&mut self, id: FlowId) {
        // What connects no longer is taken out when it has become the larger part.
        if self.connecting.len() > 2 * self.half_open {
            let flows = &mut self.flows;
            self.connecting
                .retain(|&id| matches!(flows.get_mut(id), Some(Flow::Tcp(flow)) if flow.half_open));
        }
        self.connecting.push_back(id);
    }

    /// Gives up the flow that has connected for longest, if that is long enough; says whether there was one. Whoever
    /// floods targets that do not answer holds places for that long, and honest clients find others. Nothing is said to
    /// its client, who will ask again.
    fn evict_half_open(&mut self, world: &mut dyn World) -> bool {
        while let Some(&oldest) = self.connecting.front() {
            let since = match self.flows.get_mut(oldest) {
                Some(Flow::Tcp(flow)) if flow.half_open => flow.since,
                Some(Flow::Tcp(_) | Flow::Session(_)) | None => {
                    self.connecting.pop_front();
                    continue;
                }
            };
            if self.now.since(since) < HALF_OPEN_KEPT {
                return false;
            }
            self.connecting.pop_front();
            self.end(oldest, CloseReason::Evicted, world);
            return true;
        }
        false
    }

    // ---- from the upstream -------------------------------------------------------------------------------------

    pub(super) fn handle_tcp_upstream(
        &mut self,
        id: FlowId,
        event: UpstreamEvent<'_>,
        world: &mut dyn World,
    ) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        if flow.is_bypassed() {
            return; // it has no upstream
        }
        let is_connecting = flow.is_connecting();
        match event {
            UpstreamEvent::Connected if is_connecting => {
                let mut cx = Context {
                    now: self.now,
                    config: &self.config,
                    hasher: &self.hasher,
                    arena: &mut self.arena,
                    flows: self.tcp_flows,
                    world,
                };
                if flow.handle_connected(id, &mut cx) {
                    flow.half_open = false;
                    self.half_open -= 1;
                    mark_dirty(&mut self.dirty, id, flow);
                } else {
                    flow.refusal().send(flow.ingress, Some(id), world);
                    self.end(id, CloseReason::BufferLimit, world);
                }
            }
            UpstreamEvent::Failed(error) if is_connecting => self.refuse_tcp(id, error, world),
            UpstreamEvent::Reset if is_connecting => self.refuse_tcp(id, UpstreamError::Refused, world),
            UpstreamEvent::Reset | UpstreamEvent::Failed(_) => {
                flow.forget_upstream();
                self.abort_tcp(id, false, world);
                self.end(id, CloseReason::UpstreamReset, world);
            }
            UpstreamEvent::ReadClosed => {
                flow.handle_read_closed(self.now);
                mark_dirty(&mut self.dirty, id, flow);
            }
            UpstreamEvent::Connected
            | UpstreamEvent::Datagram { .. }
            | UpstreamEvent::EchoReply { .. }
            | UpstreamEvent::Error { .. } => {}
        }
    }

    /// Tells the client what became of its SYN, in the way the target or a router would have.
    fn refuse_tcp(&mut self, id: FlowId, error: UpstreamError, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        flow.forget_upstream();
        match error {
            UpstreamError::Refused | UpstreamError::Egress | UpstreamError::Exhausted => {
                flow.refusal().send(flow.ingress, Some(id), world);
            }
            UpstreamError::Unreachable(unreachable) => {
                let error = IcmpError::Unreachable(unreachable);
                let router = match flow.client {
                    SocketAddr::V4(_) => self.config.router_v4.into(),
                    SocketAddr::V6(_) => self.config.router_v6.into(),
                };
                let (ingress, client) = (flow.ingress, flow.client.ip());
                let syn = flow.syn_packet();
                if let Ok(message) = Datagram::icmp_error(router, client, error, syn.bytes()) {
                    message.send(
                        world,
                        self.config.mtu,
                        ingress,
                        Some(id),
                        &mut self.identification,
                    );
                }
            }
            // Silence is what the client would have met.
            UpstreamError::TimedOut => {}
        }
        self.end(id, CloseReason::ConnectFailed(error), world);
    }

    // ---- turns and ends ----------------------------------------------------------------------------------------

    pub(super) fn give_turn(&mut self, id: FlowId, world: &mut dyn World) -> Room {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return Room::Some;
        };
        if flow.is_bypassed() {
            self.turn_bypassed(id, world);
            return Room::Some;
        }
        flow.dirty = false;
        let mut cx = Context {
            now: self.now,
            config: &self.config,
            hasher: &self.hasher,
            arena: &mut self.arena,
            flows: self.tcp_flows,
            world,
        };
        let turn = flow.take_turn(id, &mut cx);
        if let Some(at) = flow.ack_due()
            && self.owing.back() != Some(&(at, id))
        {
            self.owing.push_back((at, id));
        }
        match turn {
            // One of its limits was passed while it waited for the device.
            Turn::Rest(until) if until <= self.now => {
                flow.due = true;
                mark_dirty(&mut self.dirty, id, flow);
            }
            Turn::Rest(until) => self.timers.schedule(&mut flow.queued, id, until, WakeReason::Tcp),
            Turn::More => mark_dirty(&mut self.dirty, id, flow),
            Turn::Blocked => {
                flow.dirty = true;
                return Room::None;
            }
            Turn::Lingering(until) => {
                self.timers.schedule(&mut flow.queued, id, until, WakeReason::Tcp);
                self.account_end(id, CloseReason::Finished, world);
                if self.is_crowded() {
                    self.flows.remove(id);
                }
            }
            Turn::Forgotten => {
                self.flows.remove(id);
            }
            Turn::Ended(reason) => self.end(id, reason, world),
        }
        Room::Some
    }

    /// Whether more flows linger behind their ends than may be open.
    pub(super) fn is_crowded(&self) -> bool {
        let lingering = self.flows.len() - self.sessions.len() - self.tcp_flows;
        lingering > self.config.limits.flows as usize
    }

    /// Sends a TCP flow's client what its window takes and an RST, or nothing if `silent`. For other flows, nothing.
    pub(super) fn abort_tcp(&mut self, id: FlowId, silent: bool, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        if let Some(bypass) = flow.bypass_mut() {
            bypass.silent = silent; // its client is told when the kernel has forgotten it
            return;
        }
        if flow.is_connecting() && !silent {
            flow.refusal().send(flow.ingress, Some(id), world);
        }
        let mut cx = Context {
            now: self.now,
            config: &self.config,
            hasher: &self.hasher,
            arena: &mut self.arena,
            flows: self.tcp_flows,
            world,
        };
        flow.abort(silent, &mut cx);
    }

    /// Notes the end of a TCP flow, which may linger in TIME-WAIT.
    pub(super) fn account_end(&mut self, id: FlowId, reason: CloseReason, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        if flow.half_open {
            self.half_open -= 1;
        }
        self.tcp_flows -= 1;
        self.clients.subtract(flow.ingress, flow.client.ip());
        self.counters.on_close(reason);
        let (to_upstream, to_client) = flow.delivered();
        world.event(&Event::Closed {
            flow: id,
            reason,
            to_upstream,
            to_client,
        });
    }
}
