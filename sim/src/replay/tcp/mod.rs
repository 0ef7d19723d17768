//! TCP flows: a client and an upstream, each modelled on what was captured of it, with the engine between them.

mod captured;
mod client;
mod drive;
mod rewrite;
mod upstream;

use std::time::Duration;

use tungate_engine::packet::TcpFlags;
use tungate_engine::{CloseReason, Timestamp};

pub(super) use self::captured::CapturedSegment;
use self::client::{Client, Segment};
use self::upstream::{State, Upstream};
use super::card::{Anomaly, Card, Result};
use super::stream::SYN;
use crate::outcome::FlowRecord;

/// How long an answer waits for its SYN.
const SYN_PATIENCE: Duration = Duration::from_secs(3);

/// One TCP flow.
pub(super) struct TcpFlow {
    pub(super) card: Card,
    client: Client,
    upstream: Upstream,
    /// It waits in the list of flows that have something to do.
    pub(super) waits: bool,
    /// When its timers are queued.
    pub(super) queued: Timestamp,
    /// The flow on the same 4-tuple that this one makes room for.
    successor: Option<u32>,
    /// Its first packet held no byte: it may have been a keep-alive.
    began_empty: bool,
    /// The target has opened the connection: there is nothing here for the client's side to relay.
    inbound: bool,
    /// Both SYNs were captured.
    handshake: bool,
    /// It was connected.
    relayed: bool,
}

impl TcpFlow {
    pub(super) fn new(card: Card) -> Self {
        Self {
            card,
            client: Client::default(),
            upstream: Upstream::default(),
            waits: false,
            queued: Timestamp::MAX,
            successor: None,
            began_empty: false,
            inbound: false,
            handshake: false,
            relayed: false,
        }
    }

    /// Takes a packet that the engine sent to the client, whose transport header starts at `transport`.
    pub(super) fn on_packet(&mut self, now: Timestamp, packet: &[u8], transport: usize) {
        let protocol = if packet[0] >> 4 == 4 { packet[9] } else { packet[6] };
        if protocol != 6 {
            return; // an ICMP error: the flow's end tells the same
        }
        let tcp = &packet[transport..];
        let word = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        let long = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let header_len = usize::from(tcp[12] >> 4) * 4;
        let flags = TcpFlags(tcp[13]);
        let segment = Segment {
            sequence: long(4),
            acknowledgment: long(8),
            flags,
            window: word(14),
            window_scale: if flags.syn() {
                window_scale(&tcp[20..header_len])
            } else {
                None
            },
            payload: &tcp[header_len..],
        };
        self.client.on_segment(now, &segment, &self.upstream.fillers);
    }

    /// The RST with which a client that opens another connection answers a segment of this one, and the flow that
    /// the other connection is: only while that has not been answered.
    pub(super) fn successor(&self) -> Option<u32> {
        self.successor
    }

    /// Whether it has something to do beyond what timers say.
    pub(super) fn has_work(&self) -> bool {
        let upstream = &self.upstream;
        self.client.wants.any()
            || upstream.readable
            || match upstream.state {
                State::Connected => upstream.writable || upstream.has_reset,
                State::Opening => upstream.answer.is_some(),
                State::Idle | State::Gone => false,
            }
    }

    /// When its timers want it; [`Timestamp::MAX`] is never.
    pub(super) fn due(&self) -> Timestamp {
        let (client, upstream) = (&self.client, &self.upstream);
        let gaps = client.gaps.due().min(upstream.gaps.due());
        let timers = client
            .resend_at
            .min(client.acknowledge_at)
            .min(upstream.wait_for_syn);
        gaps.min(timers.due())
    }

    /// The engine has let go of the flow.
    pub(super) fn on_closed(&mut self, reason: CloseReason) {
        self.card.closed = Some(reason);
        self.upstream.end();
        // In TIME-WAIT the client may still be heard, but nothing of it is missing.
        self.client.end();
    }

    /// The flow's record, at the end of its conversation.
    pub(super) fn record(mut self, policies: &[std::sync::Arc<tungate_engine::Policy>]) -> FlowRecord {
        if self.card.decided.is_some() && self.card.closed.is_none() && !self.relayed {
            self.card.anomalies.add(Anomaly::Unanswered);
        }
        self.upstream.delivered.excuse(self.upstream.excused);
        let exact = self.relayed.then(|| {
            !self.client.lost_output
                && self.upstream.delivered.equals(&self.client.captured)
                && self.client.delivered.equals(&self.upstream.captured)
        });
        let result = Result {
            to_target: &self.upstream.delivered,
            to_client: &self.client.delivered,
            alive: "open",
            exact,
        };
        self.card.record(policies, &result)
    }
}

/// The window scale among the options of a SYN-ACK, which the engine wrote soundly.
fn window_scale(mut options: &[u8]) -> Option<u8> {
    while let [kind, rest @ ..] = options {
        options = match *kind {
            0 => return None,
            1 => rest,
            3 => return rest.get(1).copied(),
            _ => rest.get(usize::from(*rest.first()?).checked_sub(1)?..)?,
        };
    }
    None
}

/// Where a client's bytes start.
const FIRST: u64 = SYN + 1;

/// What a segment acknowledges that the engine sends on a connection which its client has given up.
pub(super) fn stray_acknowledgment(tcp: &[u8]) -> Option<u32> {
    let flags = TcpFlags(*tcp.get(13)?);
    let number = tcp[8..12].try_into().expect("four bytes");
    (flags.ack() && !flags.rst()).then_some(u32::from_be_bytes(number))
}
