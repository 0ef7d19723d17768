//! The digest: a hash over everything that leaves the engines.
//!
//! BLAKE3, as it is fast without help from the processor: much more is hashed here than was captured.
//!
//! Each shard hashes its engine's outputs in order (packets, commands with their bytes, events, judgements, bytes that
//! upstreams took) and the shards' hashes are hashed in order of shards. It depends on nothing but engine inputs and
//! outputs, so a journal's replay comes to the same, and neither on threads nor on names of files. Per-packet verdicts
//! and per-flow results are functions of what is hashed.

use std::net::{IpAddr, SocketAddr};

use blake3::Hasher;
use tungate_engine::event::{CloseReason, Event};
use tungate_engine::io::{Carriage, PacketOut, UpstreamCommand, UpstreamError};
use tungate_engine::policy::{Action, RuleRef};
use tungate_engine::{FlowId, Judgement, ShardId, Timestamp};

/// Enough for the widest vectors: 16 chunks of 1 KiB at a time.
const BUFFER: usize = 16 << 10;

/// One shard's part of the digest.
pub(super) struct Digest {
    hash: Hasher,
    buffer: Vec<u8>,
}

impl Digest {
    pub(super) fn new() -> Self {
        Self {
            hash: Hasher::new(),
            buffer: Vec::with_capacity(BUFFER + (1 << 16)),
        }
    }

    /// A packet that the engine sent. What cuts it up and finishes its checksum is a function of these.
    pub(super) fn packet(&mut self, at: Timestamp, out: &PacketOut, bytes: &[u8]) {
        // What comes with every packet is written at one go, here and below.
        let mut head = [1; 25];
        head[1..9].copy_from_slice(&at.as_nanos().to_le_bytes());
        head[9..17].copy_from_slice(&number_of(out.flow).to_le_bytes());
        head[17..19].copy_from_slice(&out.partial_checksum.map_or(0, |field| field + 1).to_le_bytes());
        head[19..21].copy_from_slice(&out.segment_size.map_or(0, |size| size.get()).to_le_bytes());
        head[21..25].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.buffer.extend_from_slice(&head);
        self.buffer.extend_from_slice(bytes);
        self.flush();
    }

    pub(super) fn command(&mut self, at: Timestamp, flow: FlowId, command: &UpstreamCommand<'_>) {
        let mut head = [2; 17];
        head[1..9].copy_from_slice(&at.as_nanos().to_le_bytes());
        head[9..17].copy_from_slice(&flow.as_u64().to_le_bytes());
        self.buffer.extend_from_slice(&head);
        match command {
            UpstreamCommand::Open(open) => {
                self.tag(0);
                self.tag(open.protocol as u8);
                self.address(open.client);
                self.address(open.target);
                self.short(open.egress.map_or(0, |egress| egress.0 + 1));
            }
            UpstreamCommand::Readable => self.tag(1),
            UpstreamCommand::Writable => self.tag(2),
            UpstreamCommand::CloseWrite => self.tag(3),
            UpstreamCommand::Send {
                target,
                payload,
                segment_size,
                carriage,
            } => {
                self.tag(4);
                self.address(*target);
                self.short(segment_size.map_or(0, |size| size.get()));
                self.carriage(*carriage);
                self.bytes(payload);
            }
            UpstreamCommand::Echo {
                sequence,
                payload,
                carriage,
            } => {
                self.tag(5);
                self.short(*sequence);
                self.carriage(*carriage);
                self.bytes(payload);
            }
            UpstreamCommand::Close => self.tag(6),
            UpstreamCommand::Abort => self.tag(7),
        }
        self.flush();
    }

    fn carriage(&mut self, carriage: Carriage) {
        self.tag(carriage.hop_limit);
        self.tag(carriage.dont_fragment.into());
    }

    pub(super) fn event(&mut self, at: Timestamp, event: &Event) {
        self.tag(3);
        self.number(at.as_nanos());
        match event {
            Event::Dropped { reason, rule, flow } => {
                self.tag(0);
                self.tag(*reason as u8);
                self.rule(*rule);
                self.flow(*flow);
            }
            Event::Opened {
                flow,
                ingress,
                protocol,
                client,
                target,
                action,
                rule,
            } => {
                self.tag(1);
                self.number(flow.as_u64());
                self.short(ingress.0);
                self.tag(*protocol as u8);
                self.address(*client);
                self.address(*target);
                self.action(*action);
                self.rule(Some(*rule));
            }
            Event::Established { flow } => {
                self.tag(2);
                self.number(flow.as_u64());
            }
            Event::Closed {
                flow,
                reason,
                to_upstream,
                to_client,
            } => {
                self.tag(3);
                self.number(flow.as_u64());
                self.close(*reason);
                self.number(*to_upstream);
                self.number(*to_client);
            }
            Event::Named { flow, name, source } => {
                self.tag(4);
                self.number(flow.as_u64());
                self.tag(*source as u8);
                self.bytes(name.as_bytes());
            }
        }
    }

    /// What became of a packet; also where the engine forwards it.
    pub(super) fn judgement(&mut self, judgement: &Judgement) {
        let (kind, index) = parts(judgement.rule);
        let mut all = [4; 15];
        all[1] = judgement.dropped.map_or(0, |reason| reason as u8 + 1);
        all[2] = kind;
        all[3..7].copy_from_slice(&index.to_le_bytes());
        all[7..15].copy_from_slice(&number_of(judgement.flow).to_le_bytes());
        self.buffer.extend_from_slice(&all);
    }

    pub(super) fn forward(&mut self, shard: ShardId, bytes: &[u8]) {
        self.tag(5);
        self.tag(shard.0);
        self.bytes(bytes);
        self.flush();
    }

    /// Bytes that an upstream took.
    pub(super) fn read(&mut self, flow: FlowId, bytes: &[u8]) {
        let mut head = [6; 13];
        head[1..9].copy_from_slice(&flow.as_u64().to_le_bytes());
        head[9..13].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.buffer.extend_from_slice(&head);
        self.buffer.extend_from_slice(bytes);
        self.flush();
    }

    /// The hash of all this.
    pub(super) fn finish(mut self) -> [u8; 32] {
        self.hash.update(&self.buffer);
        *self.hash.finalize().as_bytes()
    }

    fn tag(&mut self, tag: u8) {
        self.buffer.push(tag);
    }

    fn short(&mut self, number: u16) {
        self.buffer.extend_from_slice(&number.to_le_bytes());
    }

    fn number(&mut self, number: u64) {
        self.buffer.extend_from_slice(&number.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.buffer.extend_from_slice(bytes);
    }

    fn flow(&mut self, flow: Option<FlowId>) {
        self.number(number_of(flow));
    }

    fn address(&mut self, address: SocketAddr) {
        match address.ip() {
            IpAddr::V4(ip) => self.bytes(&ip.octets()),
            IpAddr::V6(ip) => self.bytes(&ip.octets()),
        }
        self.short(address.port());
    }

    fn rule(&mut self, rule: Option<RuleRef>) {
        let (kind, index) = parts(rule);
        self.tag(kind);
        self.buffer.extend_from_slice(&index.to_le_bytes());
    }

    fn action(&mut self, action: Action) {
        match action {
            Action::Direct => self.tag(0),
            Action::Egress(egress) => {
                self.tag(1);
                self.short(egress.0);
            }
            Action::Redirect(to) => {
                self.tag(2);
                self.address(to);
            }
            Action::Reject => self.tag(3),
            Action::Drop => self.tag(4),
        }
    }

    fn close(&mut self, reason: CloseReason) {
        self.bytes(reason.name().as_bytes());
        match reason {
            CloseReason::Denied(rule) => self.rule(Some(rule)),
            CloseReason::ConnectFailed(error) => self.error(error),
            CloseReason::Finished
            | CloseReason::ClientReset
            | CloseReason::UpstreamReset
            | CloseReason::ConnectTimeout
            | CloseReason::HandshakeTimeout
            | CloseReason::IdleTimeout
            | CloseReason::HalfCloseTimeout
            | CloseReason::ClientUnresponsive
            | CloseReason::Replaced
            | CloseReason::Evicted
            | CloseReason::BufferLimit
            | CloseReason::Internal => {}
        }
    }

    fn error(&mut self, error: UpstreamError) {
        match error {
            UpstreamError::Refused => self.tag(0),
            UpstreamError::Unreachable(why) => {
                self.tag(1);
                self.tag(why as u8);
            }
            UpstreamError::TimedOut => self.tag(2),
            UpstreamError::Egress => self.tag(3),
            UpstreamError::Exhausted => self.tag(4),
        }
    }

    /// Hashes what is there of whole buffers: at these lengths nothing is left over between two calls.
    fn flush(&mut self) {
        if self.buffer.len() >= BUFFER {
            let whole = self.buffer.len() / BUFFER * BUFFER;
            self.hash.update(&self.buffer[..whole]);
            self.buffer.drain(..whole);
        }
    }
}

fn number_of(flow: Option<FlowId>) -> u64 {
    flow.map_or(u64::MAX, FlowId::as_u64)
}

/// What a rule is hashed as.
fn parts(rule: Option<RuleRef>) -> (u8, u32) {
    match rule {
        None => (0, 0),
        Some(RuleRef::List(index)) => (1, index),
        Some(RuleRef::Rule(index)) => (2, index),
        Some(RuleRef::Default) => (3, 0),
        Some(RuleRef::Resolver) => (4, 0),
    }
}

/// The digest of a run: the hashes of its shards, in their order.
pub(super) fn combine(shards: &[[u8; 32]]) -> String {
    let mut hash = Hasher::new();
    for shard in shards {
        hash.update(shard);
    }
    hash.finalize().to_hex().to_string()
}
