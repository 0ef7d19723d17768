//! What an engine is told once, at its start: sizes, limits and times, each with its default.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::addr::ShardId;
use crate::recovery::CongestionControl;

/// Everything an engine is configured with. Limits are this shard's share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Which shard this engine is.
    pub shard: ShardId,
    /// How many shards there are, from 1.
    pub shards: u8,
    /// Largest IP packet the device carries towards clients, in bytes; at least 1280.
    pub mtu: u16,
    /// Where the clients are.
    pub clients: Clients,
    /// The congestion control towards them; `None`: the one that suits where they are, [`Clients::congestion`].
    pub congestion: Option<CongestionControl>,
    /// The appliance's own address as a router, for the errors it reports itself.
    pub router_v4: Ipv4Addr,
    /// The same for IPv6.
    pub router_v6: Ipv6Addr,
    /// Bounds on what it holds.
    pub limits: Limits,
    /// Bounds on how long.
    pub timeouts: Timeouts,
    /// Which datagrams from outside a UDP mapping lets in.
    pub udp_filtering: Filtering,
    /// Whether TCP flows that need nothing but to be let through are left to the kernel ([`bypass`](crate::bypass)).
    pub bypass: bool,
}

/// Where the clients are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clients {
    /// On this host: the path to them loses nothing, and only their window limits what is sent.
    Local,
    /// Behind a network, which delays and loses: larger send buffers, and a congestion control.
    Routed,
}

impl Clients {
    /// The congestion control that suits them.
    pub fn congestion(self) -> CongestionControl {
        match self {
            Self::Local => CongestionControl::None,
            Self::Routed => CongestionControl::Bbr,
        }
    }
}

/// Which datagrams from outside a UDP mapping lets in (RFC 4787, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filtering {
    /// From anyone, once the client has sent to someone.
    EndpointIndependent,
    /// Only from addresses that the client has sent to.
    AddressDependent,
}

/// Bounds on what one shard holds. At a bound, new work is refused by a typed reason; what is there goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// TCP flows in all.
    pub flows: u32,
    /// TCP flows of one client address.
    pub flows_per_client: u32,
    /// TCP flows whose upstream is not yet connected. At the limit, one that has waited for 100 ms makes room.
    pub half_open: u32,
    /// UDP mappings and ICMP sessions; at the limit the least recently used goes.
    pub sessions: u32,
    /// Bytes of fragments that wait for the rest of their datagrams.
    pub reassembly_bytes: u32,
    /// Bytes of TCP buffers in all; both directions of a flow count.
    pub buffer_bytes: u64,
    /// Largest buffer of one flow and direction, in bytes; a power of two from 16,384 to 4,194,304. The one towards a
    /// routed client may be four times as large, within the same bounds.
    pub buffer_per_flow: u32,
    /// Addresses whose names are known by DNS, of all clients; every shard knows all of them.
    pub names: u32,
}

/// Bounds on how long things may take. All have a place in RFCs or in Linux, named at each default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeouts {
    /// Upstream connect. Linux gives up near 127 s; 130 s lets its own error come first.
    pub connect: Duration,
    /// From our SYN-ACK to the client's ACK: 15 s.
    pub handshake: Duration,
    /// Established TCP without a packet: 7,440 s, the floor of RFC 5382, REQ-5.
    pub tcp_idle: Duration,
    /// After a FIN from one side, from the last byte on: 240 s, as RFC 5382, REQ-5 asks for transitory connections.
    pub half_close: Duration,
    /// Data or a probe that the client does not acknowledge: 300 s (RFC 9293, 3.8.3 wants at least 100 s).
    pub unacknowledged: Duration,
    /// UDP without a datagram: 300 s, the recommendation of RFC 4787, REQ-5.
    pub udp: Duration,
    /// UDP to port 53, one question and answer: 20 s.
    pub dns: Duration,
    /// ICMP echo without a packet: 60 s, the floor of RFC 5508, REQ-2.
    pub icmp: Duration,
    /// A datagram's first fragment to its last: 30 s (RFC 1122 3.3.2 recommends 60 to 120; Linux takes 30).
    pub reassembly: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            shard: ShardId(0),
            shards: 1,
            mtu: 1500,
            clients: Clients::Local,
            congestion: None,
            router_v4: Ipv4Addr::new(198, 18, 0, 1), // RFC 2544's range: on no real network
            router_v6: Ipv6Addr::new(0xfd74, 0x756e, 0, 0, 0, 0, 0, 1),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            udp_filtering: Filtering::EndpointIndependent,
            bypass: false,
        }
    }
}

impl Config {
    /// The addresses of this host on the device, which its own connections come from: those behind the router's.
    pub fn device_addresses(&self) -> (Ipv4Addr, Ipv6Addr) {
        (
            Ipv4Addr::from_bits(self.router_v4.to_bits().wrapping_add(1)),
            Ipv6Addr::from_bits(self.router_v6.to_bits().wrapping_add(1)),
        )
    }

    /// Who has this address, as far as can be told: this host has two.
    pub(crate) fn client_of(&self, address: IpAddr) -> IpAddr {
        let (v4, v6) = self.device_addresses();
        if address == v6 { v4.into() } else { address }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows: 262_144,
            flows_per_client: 65_536,
            half_open: 16_384,
            sessions: 65_536,
            reassembly_bytes: 4 << 20,
            buffer_bytes: 8 << 30,
            buffer_per_flow: 1 << 20,
            names: 32_768,
        }
    }
}

impl Limits {
    /// The share of one of `shards` engines, at least 1 of everything; `buffer_per_flow` and `names` are not divided.
    pub fn share(&self, shards: u8) -> Self {
        let shards = u32::from(shards.max(1));
        let part = |whole: u32| whole.div_ceil(shards).max(1);
        Self {
            flows: part(self.flows),
            flows_per_client: part(self.flows_per_client),
            half_open: part(self.half_open),
            sessions: part(self.sessions),
            reassembly_bytes: part(self.reassembly_bytes),
            buffer_bytes: self.buffer_bytes.div_ceil(u64::from(shards)),
            buffer_per_flow: self.buffer_per_flow,
            names: self.names,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(130),
            handshake: Duration::from_secs(15),
            tcp_idle: Duration::from_secs(7440),
            half_close: Duration::from_secs(240),
            unacknowledged: Duration::from_secs(300),
            udp: Duration::from_secs(300),
            dns: Duration::from_secs(20),
            icmp: Duration::from_secs(60),
            reassembly: Duration::from_secs(30),
        }
    }
}
