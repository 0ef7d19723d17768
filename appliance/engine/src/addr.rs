//! Names of things: ingresses, shards, flows and protocols.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The device or tunnel a packet came in by.
///
/// Part of every flow's key, since two ingresses may use the same addresses for different clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct IngressId(pub u16);

/// One of the engines that share the work, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ShardId(pub u8);

/// Names one flow for as long as the engine lives; ids are never used twice.
///
/// From the top: 8 bits shard, 24 bits generation of the slot, 32 bits slot in the shard's flow table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FlowId(u64);

impl FlowId {
    /// Puts an id together; `generation` uses 24 bits.
    pub const fn new(shard: ShardId, generation: u32, slot: u32) -> Self {
        Self((shard.0 as u64) << 56 | ((generation & 0x00ff_ffff) as u64) << 32 | slot as u64)
    }

    /// The shard whose engine owns the flow.
    pub const fn shard(self) -> ShardId {
        ShardId((self.0 >> 56) as u8)
    }

    /// How often the slot had been used before.
    pub const fn generation(self) -> u32 {
        (self.0 >> 32) as u32 & 0x00ff_ffff
    }

    /// The flow's place in its shard's table.
    pub const fn slot(self) -> u32 {
        self.0 as u32
    }

    /// The id as a number.
    pub const fn as_u64(self) -> u64 {
        self.0
    }
}

impl fmt::Display for FlowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.shard().0, self.slot(), self.generation())
    }
}

/// What a flow speaks; ICMP stands for ICMP and ICMPv6 alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Transmission Control Protocol, RFC 9293.
    Tcp,
    /// User Datagram Protocol, RFC 768.
    Udp,
    /// Internet Control Message Protocol, RFC 792 and RFC 4443.
    Icmp,
}

impl Protocol {
    /// Reads an IP protocol number; `None` for what the engine does not terminate.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 | 58 => Some(Self::Icmp),
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }

    /// The name as written in configurations and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
