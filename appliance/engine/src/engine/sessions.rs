//! What the engine does with sessions: UDP mappings and ICMP echo, both ways, and the errors that go with them.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use super::Engine;
use crate::addr::{FlowId, IngressId, Protocol};
use crate::dns;
use crate::event::{CloseReason, DropReason, Event};
use crate::flow::{Flow, FlowKey, Route};
use crate::io::{
    Carriage, IcmpError, Judgement, Open, PacketIn, Unreachable, UpstreamCommand, UpstreamError,
    UpstreamEvent, World,
};
use crate::packet::{Datagram, Echo, IcmpMessage, IcmpView, PacketView, UdpView};
use crate::policy::{Action, Decision};
use crate::session::{ErrorReport, Session};
use crate::time::WakeReason;

impl Engine {
    // ---- from the client ---------------------------------------------------------------------------------------

    pub(super) fn handle_datagram(
        &mut self,
        packet: PacketIn<'_>,
        view: &PacketView<'_>,
        datagram: &UdpView<'_>,
        world: &mut dyn World,
    ) -> Judgement {
        let ingress = packet.ingress;
        let client = SocketAddr::new(view.source(), datagram.source_port);
        let target = SocketAddr::new(view.destination(), datagram.destination_port);
        let decision = self.policy.decide(ingress, Protocol::Udp, client, target);
        let (route, send_to) = match self.route(decision, ingress, target, view, Unreachable::Port, world) {
            Ok(route) => route,
            Err(judgement) => return judgement,
        };
        let key = FlowKey::Udp {
            ingress,
            client,
            route,
        };
        let session = (ingress, Protocol::Udp, client, target);
        let id = match self.find_session(key, session, route, decision, world) {
            Ok(id) => id,
            Err(judgement) => return judgement,
        };
        let payload = datagram.payload;
        if let Some(Flow::Session(session)) = self.flows.get_mut(id) {
            session.on_sent(target, payload.len(), &self.config, self.now);
            if target.port() == dns::PORT && packet.segment_size.is_none() {
                let questions = session.questions.get_or_insert_default();
                questions.on_message(target, payload);
            }
        }
        let segment_size = packet
            .segment_size
            .filter(|size| usize::from(size.get()) < payload.len());
        world.upstream(
            id,
            UpstreamCommand::Send {
                target: send_to,
                payload,
                segment_size,
                carriage: carriage(packet, view, send_to),
            },
        );
        Judgement {
            dropped: None,
            rule: Some(decision.rule),
            flow: Some(id),
        }
    }

    pub(super) fn handle_icmp(
        &mut self,
        packet: PacketIn<'_>,
        view: &PacketView<'_>,
        message: &IcmpView<'_>,
        world: &mut dyn World,
    ) -> Judgement {
        match message.message {
            IcmpMessage::EchoRequest(echo) => self.handle_echo(packet, view, echo, world),
            IcmpMessage::Error {
                error: IcmpError::PacketTooBig { mtu },
                quoted: Some(quoted),
            } => {
                // The quoted packet is one of ours, from the target to the client.
                let flow = quoted
                    .ports
                    .filter(|_| quoted.protocol == 6)
                    .and_then(|(source, destination)| {
                        let target = SocketAddr::new(quoted.source, source);
                        let client = SocketAddr::new(quoted.destination, destination);
                        self.flows.find(&FlowKey::Tcp {
                            ingress: packet.ingress,
                            client,
                            target,
                        })
                    });
                let Some(id) = flow else {
                    return self.drop_packet(DropReason::IcmpType, None, None, world);
                };
                if let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) {
                    flow.handle_path_mtu(mtu);
                }
                Judgement {
                    dropped: None,
                    rule: None,
                    flow: Some(id),
                }
            }
            IcmpMessage::Error { .. } | IcmpMessage::EchoReply(_) | IcmpMessage::Other { .. } => {
                self.drop_packet(DropReason::IcmpType, None, None, world)
            }
        }
    }

    fn handle_echo(
        &mut self,
        packet: PacketIn<'_>,
        view: &PacketView<'_>,
        echo: Echo<'_>,
        world: &mut dyn World,
    ) -> Judgement {
        let ingress = packet.ingress;
        let client = SocketAddr::new(view.source(), echo.identifier);
        let target = SocketAddr::new(view.destination(), 0);
        let decision = self.policy.decide(ingress, Protocol::Icmp, client, target);
        let (route, _) = match self.route(decision, ingress, target, view, Unreachable::Prohibited, world) {
            Ok(route) => route,
            Err(judgement) => return judgement,
        };
        let key = FlowKey::Icmp {
            ingress,
            client: client.ip(),
            identifier: echo.identifier,
            target: target.ip(),
            route,
        };
        let id = match self.find_session(
            key,
            (ingress, Protocol::Icmp, client, target),
            route,
            decision,
            world,
        ) {
            Ok(id) => id,
            Err(judgement) => return judgement,
        };
        if let Some(Flow::Session(session)) = self.flows.get_mut(id) {
            session.on_sent(target, echo.payload.len(), &self.config, self.now);
        }
        world.upstream(
            id,
            UpstreamCommand::Echo {
                sequence: echo.sequence,
                payload: echo.payload,
                carriage: carriage(packet, view, target),
            },
        );
        Judgement {
            dropped: None,
            rule: Some(decision.rule),
            flow: Some(id),
        }
    }

    /// The way out for a datagram or echo request that the policy lets pass, and where to send it; otherwise its end.
    fn route(
        &mut self,
        decision: Decision,
        ingress: IngressId,
        target: SocketAddr,
        view: &PacketView<'_>,
        rejection: Unreachable,
        world: &mut dyn World,
    ) -> Result<(Route, SocketAddr), Judgement> {
        let (route, send_to) = match decision.action {
            Action::Direct => (Route::Direct, target),
            Action::Egress(egress) => (Route::Egress(egress), target),
            Action::Redirect(to) => (Route::Redirect { to, target }, to),
            Action::Drop => {
                return Err(self.drop_packet(DropReason::RuleDrop, Some(decision.rule), None, world));
            }
            Action::Reject => {
                self.report(
                    target.ip(),
                    IcmpError::Unreachable(rejection),
                    ingress,
                    view,
                    world,
                );
                return Err(self.drop_packet(DropReason::RuleReject, Some(decision.rule), None, world));
            }
        };
        if view.hop_limit() <= 1 {
            let router = self.router(view);
            self.report(router, IcmpError::TimeExceeded, ingress, view, world);
            return Err(self.drop_packet(DropReason::HopLimit, Some(decision.rule), None, world));
        }
        Ok((route, send_to))
    }

    /// The appliance's own address, of the packet's IP version.
    fn router(&self, view: &PacketView<'_>) -> IpAddr {
        if view.is_ipv6() {
            self.config.router_v6.into()
        } else {
            self.config.router_v4.into()
        }
    }

    /// Answers a packet by an ICMP error, if it may be answered so.
    fn report(
        &mut self,
        reporter: IpAddr,
        error: IcmpError,
        ingress: IngressId,
        view: &PacketView<'_>,
        world: &mut dyn World,
    ) {
        if view.may_cause_error()
            && let Ok(message) = Datagram::icmp_error(reporter, view.source(), error, view.bytes())
        {
            message.send(world, self.config.mtu, ingress, None, &mut self.identification);
        }
    }

    /// The session with this key, made if there is none. At the limit, the least recently used one goes.
    fn find_session(
        &mut self,
        key: FlowKey,
        (ingress, protocol, client, target): (IngressId, Protocol, SocketAddr, SocketAddr),
        route: Route,
        Decision { action, rule }: Decision,
        world: &mut dyn World,
    ) -> Result<FlowId, Judgement> {
        if let Some(id) = self.flows.find(&key) {
            self.sessions.touch(&mut self.flows, id);
            return Ok(id);
        }
        if self.draining {
            return Err(self.drop_packet(DropReason::Draining, Some(rule), None, world));
        }
        if self.sessions.len() >= self.config.limits.sessions as usize
            && let Some(oldest) = self.sessions.oldest()
        {
            self.end(oldest, CloseReason::Evicted, world);
        }
        let session = Session::new(
            ingress,
            protocol,
            (client, target),
            route,
            rule,
            &self.config,
            self.now,
        );
        let expires = session.expires();
        let id = self.flows.insert(Flow::Session(session));
        self.sessions.insert(&mut self.flows, id);
        if let Some(Flow::Session(session)) = self.flows.get_mut(id) {
            self.timers
                .schedule(&mut session.queued, id, expires, WakeReason::Session);
        }
        world.event(&Event::Opened {
            flow: id,
            ingress,
            protocol,
            client,
            target,
            action,
            rule,
        });
        self.tell_name(id, (ingress, client, target), world);
        let (egress, target) = match route {
            Route::Direct => (None, target),
            Route::Egress(egress) => (Some(egress), target),
            Route::Redirect { to, .. } => (None, to),
        };
        world.upstream(
            id,
            UpstreamCommand::Open(Open {
                ingress,
                protocol,
                client,
                target,
                egress,
            }),
        );
        Ok(id)
    }

    // ---- from the upstream -------------------------------------------------------------------------------------

    pub(super) fn handle_session_upstream(
        &mut self,
        id: FlowId,
        event: UpstreamEvent<'_>,
        world: &mut dyn World,
    ) {
        match event {
            UpstreamEvent::Datagram {
                source,
                payload,
                segment_size,
            } => {
                self.deliver_datagram(id, source, payload, segment_size, world);
            }
            UpstreamEvent::EchoReply { sequence, payload } => self.deliver_echo(id, sequence, payload, world),
            UpstreamEvent::Error {
                target,
                reporter,
                error,
            } => {
                self.deliver_error(id, target, reporter, error, world);
            }
            UpstreamEvent::Failed(error) => {
                if let Some(Flow::Session(session)) = self.flows.get_mut(id) {
                    let target = session.target;
                    let unreachable = IcmpError::Unreachable(match error {
                        UpstreamError::Unreachable(unreachable) => unreachable,
                        UpstreamError::Refused => Unreachable::Port,
                        UpstreamError::TimedOut | UpstreamError::Egress | UpstreamError::Exhausted => {
                            Unreachable::Host
                        }
                    });
                    self.deliver_error(id, target, None, unreachable, world);
                    self.end(id, CloseReason::ConnectFailed(error), world);
                }
            }
            UpstreamEvent::Connected | UpstreamEvent::ReadClosed | UpstreamEvent::Reset => {}
        }
    }

    /// Sends a datagram from outside to the session's client, if lists and filter let it in.
    fn deliver_datagram(
        &mut self,
        id: FlowId,
        source: SocketAddr,
        payload: &[u8],
        segment_size: Option<NonZeroU16>,
        world: &mut dyn World,
    ) {
        let Some(Flow::Session(session)) = self.flows.get_mut(id) else {
            return;
        };
        if session.protocol != Protocol::Udp {
            return;
        }
        let (ingress, client) = (session.ingress, session.client);
        let admitted = session.admit(source, &self.config);
        let answer = match (admitted, &mut session.questions) {
            (Ok(server), Some(questions)) if server.port() == dns::PORT => {
                questions.on_answer(server, payload)
            }
            _ => None,
        };
        let built = admitted.and_then(|seen| {
            if let Some((reason, rule)) = self.judge(source.ip(), client.ip(), Some(17), Some(client.port()))
            {
                self.drop_packet(reason, Some(rule), Some(id), world);
                return Ok(None);
            }
            Datagram::udp(seen, client, payload, segment_size).map(Some)
        });
        match built {
            Ok(Some(datagram)) => {
                // Before the client gets it: what it does next may come in by another shard.
                if let Some(answer) = answer {
                    let learned = answer.for_client(ingress, self.config.client_of(client.ip()));
                    self.names.learn(self.now, &learned);
                    world.learned(&learned);
                }
                datagram.send(
                    world,
                    self.config.mtu,
                    ingress,
                    Some(id),
                    &mut self.identification,
                );
                self.note_delivery(id, payload.len());
            }
            Ok(None) => {}
            Err(reason) => {
                self.drop_packet(reason, None, Some(id), world);
            }
        }
    }

    fn deliver_echo(&mut self, id: FlowId, sequence: u16, payload: &[u8], world: &mut dyn World) {
        let Some(Flow::Session(session)) = self.flows.get_mut(id) else {
            return;
        };
        if session.protocol != Protocol::Icmp {
            return;
        }
        let (ingress, client, target) = (session.ingress, session.client, session.target);
        if let Some((reason, rule)) = self.judge(target.ip(), client.ip(), Some(1), None) {
            self.drop_packet(reason, Some(rule), Some(id), world);
            return;
        }
        let echo = Echo {
            identifier: client.port(),
            sequence,
            payload,
        };
        match Datagram::echo_reply(target.ip(), client.ip(), echo) {
            Ok(reply) => {
                reply.send(
                    world,
                    self.config.mtu,
                    ingress,
                    Some(id),
                    &mut self.identification,
                );
                self.note_delivery(id, payload.len());
            }
            Err(reason) => {
                self.drop_packet(reason, None, Some(id), world);
            }
        }
    }

    fn note_delivery(&mut self, id: FlowId, len: usize) {
        if let Some(Flow::Session(session)) = self.flows.get_mut(id) {
            session.on_received(len, self.now);
        }
        self.sessions.touch(&mut self.flows, id);
    }

    fn deliver_error(
        &mut self,
        id: FlowId,
        target: SocketAddr,
        reporter: Option<IpAddr>,
        error: IcmpError,
        world: &mut dyn World,
    ) {
        let Some(Flow::Session(session)) = self.flows.get_mut(id) else {
            return;
        };
        let target = match session.route {
            Route::Redirect { target, .. } => target,
            Route::Direct | Route::Egress(_) => target,
        };
        let reporter = reporter.unwrap_or(target.ip());
        let report = ErrorReport {
            session,
            target,
            reporter,
            error,
        };
        report.send(id, self.config.mtu, &mut self.identification, world);
    }
}

/// How a client's packet is to be sent on to `send_to`; its hop limit has been found to be more than 1.
fn carriage(packet: PacketIn<'_>, view: &PacketView<'_>, send_to: SocketAddr) -> Carriage {
    Carriage {
        hop_limit: view.hop_limit() - 1,
        // A redirect to the other IP version has another path, with headers of other lengths: what its MTU is would
        // mean nothing to the client.
        dont_fragment: view.dont_fragment() && !packet.reassembled && view.is_ipv6() == send_to.is_ipv6(),
    }
}
