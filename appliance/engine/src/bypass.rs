//! Flows that the kernel carries: what the engine orders for them, and what it hears of them.
//!
//! With [`Config::bypass`](crate::Config::bypass), a TCP flow that needs nothing but to be let through is not terminated:
//! the engine judges its SYN as any other, sends it on by the device as it came, and the kernel takes that as leave to
//! forward the connection. The engine keeps the flow, its limits and its times; it sees the segments that begin and end
//! the connection, and how much has been carried.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::addr::IngressId;
use crate::io::Unreachable;

/// The two ends of a connection, as its client knows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ends {
    /// The client.
    pub client: SocketAddr,
    /// Where it connects to.
    pub target: SocketAddr,
}

/// What the engine wants of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BypassOrder {
    /// Nothing: the flow's SYN is on its way, and the kernel carries what follows.
    Begin,
    /// Tell what has been carried: [`BypassEvent::Counted`] follows.
    Count,
    /// Forget the connection: no packet of it is forwarded any more, and [`BypassEvent::Released`] follows, after all
    /// news of what was before.
    Release,
}

/// News about a connection that the kernel carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BypassNews {
    /// Where the client is.
    pub ingress: IngressId,
    /// Which connection it is.
    pub ends: Ends,
    /// What has happened.
    pub event: BypassEvent,
}

/// What has happened to a connection that the kernel carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BypassEvent {
    /// A segment with SYN, FIN or RST has gone by.
    Segment(Seen),
    /// The client has been told that the target cannot be reached.
    Unreachable(Unreachable),
    /// The answer to [`BypassOrder::Count`]; `None`: the kernel does not know the connection.
    Counted(Option<Carried>),
    /// [`BypassOrder::Release`] has been carried out. `None`: there was nothing to forget.
    Released(Option<Carried>),
    /// The kernel has forgotten the connection by itself.
    Gone(Carried),
}

/// What is seen of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "fields are named as in RFC 9293")]
pub struct Seen {
    /// Whether the client has sent it; the target otherwise.
    pub from_client: bool,
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgment: u32,
    pub payload_len: u16,
    /// Length of its TCP header.
    pub header_len: u8,
    /// Whether it has the timestamps option (RFC 7323).
    pub timestamps: bool,
}

/// What the kernel has carried, retransmissions included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Carried {
    /// From the client.
    pub to_upstream: Volume,
    /// From the target.
    pub to_client: Volume,
}

/// Packets and their bytes, IP headers included; several segments may have been one packet with one header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named for what they count")]
pub struct Volume {
    pub packets: u64,
    pub bytes: u64,
}
