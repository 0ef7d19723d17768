//! UDP and ICMP, checked where they enter and leave the engine: every one intact, once, and to whom it belongs.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use tungate_engine::config::Filtering;
use tungate_engine::io::UpstreamEvent;
use tungate_engine::{DropReason, FlowId, Judgement, Protocol};

use super::ledger::Record;
use super::link::{Delivery, Parcel};
use super::scenario::{Denial, TARGETS, Target, endpoint_address, ping_identifier, target_address};
use super::{SESSIONS, World};
use crate::packet::{Datagram, Icmp, Message, echo_request, fragments};
use crate::pattern::Pattern;

/// A datagram or echo request on its way to a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sent {
    Datagram {
        client: SocketAddr,
        target: SocketAddr,
        payload: Vec<u8>,
    },
    Ping {
        /// With the identifier for its port.
        client: SocketAddr,
        target: IpAddr,
        sequence: u16,
        payload: Vec<u8>,
    },
}

/// Whether a message to a client is an error about a TCP segment.
pub(super) fn is_about_tcp(message: &Message) -> bool {
    match message {
        Message::Icmp(icmp) => icmp.payload.first().is_some_and(|first| {
            let at = match first >> 4 {
                4 => 9,
                _ => 6,
            };
            matches!(icmp.kind, 1 | 3) && icmp.payload.get(at) == Some(&6)
        }),
        Message::Tcp(_) | Message::Udp(_) => false,
    }
}

impl World {
    pub(super) fn send_datagram(&mut self, endpoint: u8, target: u8, bytes: u16) {
        let (client, target) = (endpoint_address(endpoint), target_address(endpoint, target));
        let payload = self.payload(bytes);
        let packet = Datagram {
            source: client,
            destination: target,
            payload: payload.clone(),
        }
        .packet();
        let sent = Sent::Datagram {
            client,
            target,
            payload,
        };
        self.send_packet(packet, sent);
    }

    pub(super) fn send_ping(&mut self, endpoint: u8, target: u8, bytes: u16) {
        let client = SocketAddr::new(endpoint_address(endpoint).ip(), ping_identifier(endpoint));
        let target = target_address(endpoint, target).ip();
        let payload = self.payload(bytes);
        let sequence = self.serial as u16;
        let packet = echo_request(client.ip(), target, client.port(), sequence, &payload);
        let sent = Sent::Ping {
            client,
            target,
            sequence,
            payload,
        };
        self.send_packet(packet, sent);
    }

    /// Bytes that no other datagram has, if there are enough of them.
    fn payload(&mut self, bytes: u16) -> Vec<u8> {
        let key = self.next_serial();
        let mut payload = vec![0; bytes.into()];
        Pattern { key, head: &[] }.fill(0, &mut payload);
        payload
    }

    /// Hands a packet to the link, in fragments if need be.
    fn send_packet(&mut self, packet: Vec<u8>, sent: Sent) {
        let sent = Rc::new(sent);
        let room = (usize::from(self.setup.mtu) - 48) & !7;
        let pieces = if packet.len() > usize::from(self.setup.mtu) {
            fragments(&packet, self.serial, room)
        } else {
            vec![packet]
        };
        let is_fragment = pieces.len() > 1;
        for packet in pieces {
            let parcel = Parcel {
                packet,
                attempt: None,
                is_syn: false,
                is_reset: false,
                sent: Some(Rc::clone(&sent)),
                is_fragment,
            };
            self.link.send(self.now, Delivery::ToEngine(parcel));
        }
    }

    /// Checks what the engine has made of a packet with a datagram or echo request.
    pub(super) fn check_datagrams(&mut self, parcel: &Parcel, judgement: &Judgement) {
        let sends = std::mem::take(&mut self.handling.to_upstream);
        let Some(sent) = &parcel.sent else {
            assert!(sends.is_empty(), "datagrams from nothing: {sends:?}");
            return;
        };
        let (client, target) = match **sent {
            Sent::Datagram { client, target, .. } => (client, target),
            Sent::Ping { client, target, .. } => (client, SocketAddr::new(target, 0)),
        };
        let number = (0..TARGETS)
            .find(|number| {
                [0, 1]
                    .iter()
                    .any(|endpoint| target_address(*endpoint, *number).ip() == target.ip())
            })
            .expect("it went to one of the targets");
        let denial = self.denied.get(&Target::OfEndpoints(number)).copied();
        if parcel.is_fragment {
            // It may be the last that was missing, or not.
            if denial == Some(Denial::List) {
                assert_eq!(judgement.dropped, Some(DropReason::ListDestination));
            }
            assert!(sends.len() <= 1 && (sends.is_empty() || judgement.dropped.is_none()));
        } else {
            let expected = match denial {
                Some(Denial::List) => Some(DropReason::ListDestination),
                Some(Denial::Drop) => Some(DropReason::RuleDrop),
                Some(Denial::Reject) => Some(DropReason::RuleReject),
                // Only what has a session is served still.
                None if self.draining && judgement.flow.is_none() => Some(DropReason::Draining),
                None => None,
            };
            assert_eq!(
                judgement.dropped, expected,
                "a datagram from {client} to {target}"
            );
            assert_eq!(
                sends.len(),
                usize::from(expected.is_none()),
                "a datagram from {client} to {target}"
            );
            let is_told = self.handling.to_clients.iter().any(is_error);
            assert_eq!(
                is_told,
                denial == Some(Denial::Reject),
                "whether the client is told of a rejection"
            );
        }
        for (id, what) in sends {
            assert_eq!(what, **sent, "what comes out is what went in");
            assert_eq!(judgement.flow, Some(id));
            let used = self.next_serial();
            let now = self.now;
            let record = self.ledger.record(id);
            let len = match &**sent {
                Sent::Datagram { payload, .. } | Sent::Ping { payload, .. } => payload.len(),
            };
            record.taken += len as u64;
            record.moved = now;
            record.used = used;
            record.contacts.insert(target.ip());
            record.dns_only &= target.port() == 53;
        }
    }

    pub(super) fn answer_datagram(&mut self, endpoint: u8, source: u8, bytes: u16) {
        let client = endpoint_address(endpoint);
        let source_address = target_address(endpoint, source);
        let Some(id) = self.session(|record| record.protocol == Protocol::Udp && record.client == client)
        else {
            return;
        };
        let payload = self.payload(bytes);
        let is_contact = self.ledger.record(id).contacts.contains(&source_address.ip());
        let expected = if self.setup.filtering == Filtering::AddressDependent && !is_contact {
            Some(DropReason::Filtered)
        } else if self.denied.get(&Target::OfEndpoints(source)) == Some(&Denial::List) {
            Some(DropReason::ListSource)
        } else {
            None
        };
        let event = UpstreamEvent::Datagram {
            source: source_address,
            payload: &payload,
            segment_size: None,
        };
        self.tell(id, event);
        let message = Message::Udp(Datagram {
            source: source_address,
            destination: client,
            payload: payload.clone(),
        });
        self.check_answer(id, message, payload.len(), expected);
    }

    pub(super) fn answer_ping(&mut self, endpoint: u8, target: u8, bytes: u16) {
        let client = SocketAddr::new(endpoint_address(endpoint).ip(), ping_identifier(endpoint));
        let source = target_address(endpoint, target).ip();
        let is_it = |record: &Record| {
            (record.protocol, record.client, record.target.ip()) == (Protocol::Icmp, client, source)
        };
        let Some(id) = self.session(is_it) else {
            return;
        };
        let payload = self.payload(bytes);
        let sequence = self.serial as u16;
        self.tell(
            id,
            UpstreamEvent::EchoReply {
                sequence,
                payload: &payload,
            },
        );
        let [a, b] = client.port().to_be_bytes();
        let [c, d] = sequence.to_be_bytes();
        let message = Message::Icmp(Icmp {
            source,
            destination: client.ip(),
            kind: if source.is_ipv6() { 129 } else { 0 },
            code: 0,
            rest: [a, b, c, d],
            payload: payload.clone(),
        });
        self.check_answer(id, message, payload.len(), None);
    }

    fn session(&self, is_it: impl Fn(&Record) -> bool) -> Option<FlowId> {
        self.ledger
            .open_flows()
            .find(|(_, record)| is_it(record))
            .map(|(id, _)| id)
    }

    /// Checks that the client got exactly `message`, or that it was dropped as expected.
    fn check_answer(&mut self, id: FlowId, message: Message, len: usize, expected: Option<DropReason>) {
        let got = std::mem::take(&mut self.handling.to_clients);
        let dropped = std::mem::take(&mut self.handling.dropped);
        assert_eq!(dropped, expected.as_slice(), "an answer to flow {id}");
        if expected.is_some() {
            assert_eq!(got, [], "an answer that was dropped");
            return;
        }
        assert_eq!(got, [message], "what comes out is what went in");
        let used = self.next_serial();
        let now = self.now;
        let record = self.ledger.record(id);
        record.given += len as u64;
        record.moved = now;
        record.used = used;
    }

    /// The session that goes for the next one: the least recently used, if there are as many as may be.
    pub(super) fn least_recent_of_all(&self) -> Option<FlowId> {
        let sessions = self
            .ledger
            .open_flows()
            .filter(|(_, record)| record.protocol != Protocol::Tcp);
        let sessions: Vec<_> = sessions.map(|(id, record)| (record.used, id)).collect();
        if sessions.len() < SESSIONS as usize {
            return None;
        }
        sessions.into_iter().min().map(|(_, id)| id)
    }
}

/// Destination unreachable, of either version.
fn is_error(message: &Message) -> bool {
    match message {
        Message::Icmp(icmp) if icmp.source.is_ipv6() => icmp.kind == 1,
        Message::Icmp(icmp) => icmp.kind == 3,
        Message::Tcp(_) | Message::Udp(_) => false,
    }
}
