//! What a replay finds out: the records that reports, files and checks are made of.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;
use tungate_engine::event::NameSource;
use tungate_engine::{Policy, Protocol, Timestamp, policy::RuleRef};

/// Who sent a captured packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The client: the packet went into the engine.
    Client,
    /// The target: the packet is script for the modelled upstream.
    Target,
    /// Nobody: not IP, or unreadable.
    None,
}

/// Which path decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Path {
    /// The pre-filter's bytecode.
    Prefilter,
    /// The engine.
    Engine,
}

/// What became of one captured packet. Records come in file order.
#[derive(Debug, Clone)]
pub struct PacketRecord {
    /// Counted from 1 in file order.
    pub number: u64,
    /// On the capture's clock: nanoseconds since its first packet, never going back.
    pub time: Timestamp,
    /// Who sent it.
    pub side: Side,
    /// Which path decided; `None` where nobody judged.
    pub path: Option<Path>,
    /// Why it was dropped (a [`DropReason`](tungate_engine::DropReason)'s name), or why it could not be judged
    /// (`not-ip`, `unreadable`); `None` if it passed.
    pub reason: Option<&'static str>,
    /// Whether it was judged and dropped. With `reason` set and this false the packet was not judged.
    pub dropped: bool,
    /// What decided about it or its flow, with the policy that was in force.
    pub rule: Option<(Arc<Policy>, RuleRef)>,
    /// The report's number of the flow it belongs to.
    pub flow: Option<u64>,
}

/// One direction of a flow's bytes, as they left the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stream {
    /// Bytes delivered, without fillers for holes.
    pub bytes: u64,
    /// SHA-256 of them, in hex.
    pub sha256: String,
    /// Bytes that the capture does not hold and zeros stood for.
    pub missing: u64,
}

/// What became of one flow.
#[derive(Debug, Clone)]
pub struct FlowRecord {
    /// Counted from 1 in the order of `first_packet`.
    pub id: u64,
    /// TCP, UDP or ICMP.
    pub protocol: Protocol,
    /// The client; for ICMP the port is the identifier.
    pub client: SocketAddr,
    /// The target; for ICMP the port is 0 and not printed.
    pub target: SocketAddr,
    /// Number of its first captured packet.
    pub first_packet: u64,
    /// Time of its first captured packet.
    pub first_time: Timestamp,
    /// Time of its last captured packet or event.
    pub last_time: Timestamp,
    /// Captured packets that belong to it.
    pub packets: u64,
    /// `direct`, `redirect`, `egress`, `reject`, `drop`, or `none` where nothing decided.
    pub verdict: &'static str,
    /// What decided, by name.
    pub rule: Option<String>,
    /// Which path decided.
    pub path: Path,
    /// The named egress, if one was used.
    pub egress: Option<String>,
    /// The server's name, where it is known.
    pub name: Option<String>,
    /// Where it is known from.
    pub name_source: Option<NameSource>,
    /// What the modelled upstream received.
    pub to_target: Stream,
    /// What the modelled client received.
    pub to_client: Stream,
    /// `fin`, `rst`, `refused`, `unreachable`, `timeout`, `open`, `idle`, `dropped`, `rejected`, …
    pub end: &'static str,
    /// Why it was dropped or ended, where `end` needs a word more (a drop or close reason's name).
    pub reason: Option<&'static str>,
    /// Peculiarities, each once, sorted: `no-syn`, `syn-retransmit`, `hole`, `overlap`, `data-after-fin`, ….
    pub anomalies: Vec<&'static str>,
    /// For relayed TCP flows: whether both streams equal the capture's own. `None` for others.
    pub exact: Option<bool>,
}

/// A packet that the engine emitted, finished and cut to wire size.
#[derive(Debug)]
pub struct Emitted<'a> {
    /// When.
    pub time: Timestamp,
    /// The IP packet, checksums complete.
    pub bytes: &'a [u8],
    /// The report's number of its flow.
    pub flow: Option<u64>,
    /// Number of the captured packet that was being handled, if one was.
    pub cause: Option<u64>,
}

/// Totals of one capture.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// Whole records read.
    pub read: u64,
    /// Of these, judged.
    pub judged: u64,
    /// Of these, with an unknown link type or no usable IP header.
    pub unreadable: u64,
    /// Of these, with a payload other than IP.
    pub not_ip: u64,
    /// Judged packets from clients.
    pub from_client: u64,
    /// Judged packets from targets.
    pub from_target: u64,
    /// Judged packets that passed.
    pub pass: u64,
    /// Judged packets that were dropped.
    pub drop: u64,
    /// Client packets that went through pre-filter and engine both.
    pub parity_checked: u64,
    /// Of these, with contradicting verdicts.
    pub parity_disagreements: u64,
    /// Relayed TCP flows.
    pub fidelity_flows: u64,
    /// Of these, with streams equal to the capture's.
    pub fidelity_exact: u64,
    /// Packets whose checksum was repaired as offload's work.
    pub repaired_checksums: u64,
    /// Bytes sent by peers after their partner had reset the connection, discarded.
    pub discarded_after_reset: u64,
    /// Captured bytes of all records, as many as the capture holds of each.
    pub captured_bytes: u64,
    /// When the first packet was captured: nanoseconds since the Unix epoch, 0 without packets.
    pub started: u64,
    /// Time of the last captured packet.
    pub duration: Timestamp,
}

/// Takes a replay's records as they become final; every method may be called any number of times.
pub trait Sink {
    /// When the first packet was captured, in nanoseconds since the Unix epoch; once, before all else, if there is a
    /// packet at all.
    fn started(&mut self, unix_nanos: u64);
    /// A captured packet's record, in file order.
    fn packet(&mut self, record: &PacketRecord);
    /// A flow's record, when it has ended; in no particular order.
    fn flow(&mut self, record: FlowRecord);
    /// A packet that the engine emitted, in order of time.
    fn emitted(&mut self, packet: &Emitted<'_>);
    /// A line for the transcript: what went into or came out of the engine.
    fn line(&mut self, time: Timestamp, text: std::fmt::Arguments<'_>);
    /// Whether [`Sink::emitted`] wants to be called.
    fn wants_emitted(&self) -> bool;
    /// Whether [`Sink::line`] wants to be called.
    fn wants_lines(&self) -> bool;
    /// Whether [`Sink::packet`] wants to be called for every packet.
    fn wants_packets(&self) -> bool;
}

/// An address without its port, or with: as reports print it (RFC 5952, brackets before a port).
pub fn endpoint(protocol: Protocol, address: SocketAddr) -> String {
    match (protocol, address.ip()) {
        (Protocol::Icmp, IpAddr::V6(ip)) => format!("[{ip}]:{}", address.port()),
        _ => address.to_string(),
    }
}
