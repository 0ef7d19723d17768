//! UDP conversations and ICMP echo sessions.
//!
//! The engine has one mapping for all targets of a client; the report has a flow for each pair of client and target.
//! What the client sends comes out of the engine as a command and is the target's; what was captured from the target
//! goes in as news from the mapping's upstream, and what the engine makes of it is the client's. Both happen within
//! the packet's own moment, so whose datagram it is needs no search. Under a redirect the engine talks to another
//! address, which stands for the client's target in everything captured.

use std::net::SocketAddr;
use std::time::Duration;

use tungate_engine::io::{ChecksumState, UpstreamCommand, UpstreamEvent};
use tungate_engine::packet::{IcmpMessage, PacketView, Transport};
use tungate_engine::reassembly::{Reassembler, Reassembly};
use tungate_engine::{CloseReason, FlowId, IngressId, Input, Policy, Protocol, Timestamp};

use super::card::{Card, Result};
use super::item::{Judged, Packet};
use super::shard::{Assessed, Shard};
use super::stage::Flow;
use super::stream::Delivered;
use crate::outcome::FlowRecord;

/// One UDP conversation or echo session.
pub(super) struct DatagramFlow {
    pub(super) card: Card,
    /// Where the engine sends what is for the target.
    sent_to: Option<SocketAddr>,
    to_target: Delivered,
    to_client: Delivered,
    /// Puts together what the engine had to send in fragments.
    fragments: Option<Box<Reassembler>>,
}

impl DatagramFlow {
    pub(super) fn new(card: Card) -> Self {
        Self {
            card,
            sent_to: None,
            to_target: Delivered::default(),
            to_client: Delivered::default(),
            fragments: None,
        }
    }

    /// Takes what the engine sends to the target.
    pub(super) fn on_command(&mut self, command: &UpstreamCommand<'_>) {
        match command {
            UpstreamCommand::Send { target, payload, .. } => {
                self.sent_to = Some(*target);
                self.to_target.take_all(payload);
            }
            UpstreamCommand::Echo { payload, .. } => self.to_target.take_all(payload),
            UpstreamCommand::Open(_)
            | UpstreamCommand::Readable
            | UpstreamCommand::Writable
            | UpstreamCommand::CloseWrite
            | UpstreamCommand::Close
            | UpstreamCommand::Abort => {}
        }
    }

    /// Takes a packet that the engine sends to the client.
    pub(super) fn on_packet(&mut self, now: Timestamp, packet: &[u8]) {
        let Ok(view) = PacketView::parse(packet) else {
            return;
        };
        if view.fragment().is_none() {
            return self.on_whole(&view);
        }
        let reassembler = self
            .fragments
            .get_or_insert_with(|| Box::new(Reassembler::new(1 << 18, Duration::from_secs(30))));
        let mut whole = Vec::new();
        let pushed = reassembler.push(now, IngressId(0), &view, ChecksumState::Trusted, &mut whole);
        if let Reassembly::Complete(_) = pushed
            && let Ok(view) = PacketView::parse(&whole)
        {
            self.on_whole(&view);
        }
    }

    fn on_whole(&mut self, view: &PacketView<'_>) {
        match view.transport() {
            Ok(Transport::Udp(datagram)) => self.to_client.take_all(datagram.payload),
            Ok(Transport::Icmp(icmp)) => match icmp.message {
                IcmpMessage::EchoReply(echo) => self.to_client.take_all(echo.payload),
                IcmpMessage::EchoRequest(_) | IcmpMessage::Error { .. } | IcmpMessage::Other { .. } => {}
            },
            Ok(Transport::Tcp(_)) | Err(_) => {}
        }
    }

    /// The flow's record: `closed` is how the engine's session ended, if it has.
    pub(super) fn record(
        mut self,
        closed: Option<CloseReason>,
        is_over: bool,
        policies: &[std::sync::Arc<Policy>],
    ) -> FlowRecord {
        self.card.closed = closed;
        let result = Result {
            to_target: &self.to_target,
            to_client: &self.to_client,
            alive: if is_over { "idle" } else { "open" },
            exact: None,
        };
        self.card.record(policies, &result)
    }
}

impl Shard {
    /// Plays a client's datagram or echo request.
    pub(super) fn datagram_from_client(&mut self, slot: u32, packet: &Packet, ip: &[u8]) -> Judged {
        let assessed = match PacketView::parse(ip) {
            Ok(view) => self.assess(packet, &view, &view.transport()),
            Err(_) => Assessed::UNREAD,
        };
        let judgement = self.judge_whole(ip, assessed.state(), packet.is_reassembled);
        if let Some(id) = judgement.flow
            && let Some(known) = self.stage.engine_flow(id)
        {
            let mut decided = known.decided;
            decided.rule = judgement.rule.unwrap_or(decided.rule);
            if let Some(card) = self.stage.card(slot) {
                card.engine = Some(id);
                card.decided.get_or_insert(decided);
                card.refused = None;
            }
        }
        self.note_judgement(slot, &judgement)
    }

    /// Plays a datagram, echo reply or ICMP error that was captured on its way to the client.
    pub(super) fn datagram_from_target(&mut self, slot: u32, packet: &Packet, ip: &[u8]) {
        let Ok(view) = PacketView::parse(ip) else { return };
        let transport = view.transport();
        if self.is_lost(packet, &view, &transport) {
            return;
        }
        let Some(Flow::Datagram(flow)) = &self.stage.flows[slot as usize] else {
            return;
        };
        let (card, sent_to) = (&flow.card, flow.sent_to.unwrap_or(flow.card.target));
        // An upstream nobody asked for by this name may have been asked for by another.
        let id = self
            .live(card.engine)
            .or_else(|| self.live(self.stage.mappings.get(&card.client).copied()));
        let Some(id) = id else { return };
        let event = match transport {
            Ok(Transport::Udp(datagram)) => UpstreamEvent::Datagram {
                source: sent_to,
                payload: datagram.payload,
                segment_size: None,
            },
            Ok(Transport::Icmp(icmp)) => match icmp.message {
                IcmpMessage::EchoReply(echo) if card.protocol == Protocol::Icmp => UpstreamEvent::EchoReply {
                    sequence: echo.sequence,
                    payload: echo.payload,
                },
                IcmpMessage::Error { error, .. } => UpstreamEvent::Error {
                    target: sent_to,
                    reporter: Some(view.source()),
                    error,
                },
                IcmpMessage::EchoReply(_) | IcmpMessage::EchoRequest(_) | IcmpMessage::Other { .. } => return,
            },
            Ok(Transport::Tcp(_)) | Err(_) => return,
        };
        if let Some(card) = self.stage.card(slot) {
            card.engine = Some(id);
        }
        self.call(Input::Upstream(id, event));
    }

    /// An engine's session, unless it has ended.
    fn live(&self, id: Option<FlowId>) -> Option<FlowId> {
        let known = self.stage.engine_flow(id?)?;
        id.filter(|_| known.closed.is_none())
    }
}
