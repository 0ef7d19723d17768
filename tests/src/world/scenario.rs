//! Scenarios: what the people and machines around an appliance do, as plain data.
//!
//! The `Debug` form of a scenario is Rust: paste it into a test and hand it to [`play`](super::play).

use std::net::SocketAddr;

use tungate_engine::config::{Clients, Filtering};
use tungate_engine::io::{Unreachable, UpstreamError};

use crate::client::Manner;

/// How many TCP clients there are; each has one connection at a time, over IPv4 where its number is even.
pub const CLIENTS: u8 = 4;
/// How many UDP endpoints there are; the second is over IPv6.
pub const ENDPOINTS: u8 = 2;
/// How many targets UDP endpoints send to; the first is a DNS server.
pub const TARGETS: u8 = 3;

/// What holds throughout a scenario.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub struct Setup {
    /// Decides which packets a faulty link loses, repeats and delays.
    pub seed: u8,
    pub clients: Clients,
    pub filtering: Filtering,
    pub mtu: u16,
    /// As [`Limits::buffer_per_flow`](tungate_engine::config::Limits::buffer_per_flow).
    pub buffer_per_flow: u32,
    /// Packets that the driver reads from the device before it gives the engine its turn.
    pub batch: u8,
    /// Most bytes that an upstream socket takes or gives at once.
    pub chunk: u32,
    pub max_segment_size: Option<u16>,
    pub window_scale: Option<u8>,
    /// The clients' receive buffers.
    pub client_buffer: u32,
    /// Largest payload of the clients' packets, where their device segments for them.
    pub client_largest: u32,
    pub client_manner: Manner,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            seed: 0,
            clients: Clients::Local,
            filtering: Filtering::EndpointIndependent,
            mtu: 1500,
            buffer_per_flow: 1 << 20,
            batch: 1,
            chunk: 1 << 20,
            max_segment_size: Some(1460),
            window_scale: Some(7),
            client_buffer: 256 << 10,
            client_largest: 1460,
            client_manner: Manner::Linux,
        }
    }
}

/// One thing that happens.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub enum Step {
    /// A client starts a connection to its target. One it still has is forgotten as by a restart.
    ClientConnects {
        client: u8,
    },
    /// The target of a client's SYN answers, or will as soon as it is asked.
    UpstreamAnswers {
        client: u8,
        answer: Answer,
    },
    ClientSends {
        client: u8,
        bytes: u32,
    },
    UpstreamSends {
        client: u8,
        bytes: u32,
    },
    /// Sends FIN behind all bytes.
    ClientCloses {
        client: u8,
    },
    /// Sends FIN behind all bytes.
    UpstreamCloses {
        client: u8,
    },
    ClientResets {
        client: u8,
    },
    UpstreamResets {
        client: u8,
    },
    /// The application reads no more: its window closes when its buffer is full.
    ClientStalls {
        client: u8,
    },
    ClientResumes {
        client: u8,
    },
    /// The upstream's socket takes no more bytes.
    UpstreamStalls {
        client: u8,
    },
    UpstreamResumes {
        client: u8,
    },
    DatagramSent {
        endpoint: u8,
        target: u8,
        bytes: u16,
    },
    /// A datagram comes back to an endpoint, if it has a mapping; `source` beyond the targets is a stranger.
    DatagramAnswered {
        endpoint: u8,
        source: u8,
        bytes: u16,
    },
    PingSent {
        endpoint: u8,
        target: u8,
        bytes: u16,
    },
    PingAnswered {
        endpoint: u8,
        target: u8,
        bytes: u16,
    },
    /// The link to the clients loses and repeats that many packets in a hundred, and delays each by a base and a
    /// random part, which reorders them.
    LinkBecomes {
        loss: u8,
        repeats: u8,
        delay_millis: u16,
        jitter_millis: u16,
    },
    /// The device takes no more bulk packets.
    DeviceFills,
    DeviceDrains,
    /// A new policy denies a target besides those denied already.
    TargetDenied {
        target: Target,
        how: Denial,
    },
    /// A new policy denies nothing.
    AllAllowed,
    /// The appliance takes no new flows.
    EngineDrains,
    TimePasses {
        millis: u32,
    },
}

/// What a target does with a connection attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "variants are named for what they mean")]
pub enum Answer {
    Accepts,
    Refuses,
    IsUnreachable,
    TimesOut,
}

impl Answer {
    /// What the driver reports, if it is no success.
    pub fn error(self) -> Option<UpstreamError> {
        match self {
            Self::Accepts => None,
            Self::Refuses => Some(UpstreamError::Refused),
            Self::IsUnreachable => Some(UpstreamError::Unreachable(Unreachable::Host)),
            Self::TimesOut => Some(UpstreamError::TimedOut),
        }
    }
}

/// Someone whom a policy may deny.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// The target of a TCP client.
    OfClient(u8),
    /// A target of UDP endpoints and pings.
    OfEndpoints(u8),
}

/// How a policy denies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denial {
    /// By a list entry.
    List,
    /// By a rule that says nothing.
    Drop,
    /// By a rule that tells the client.
    Reject,
}

/// A client and its target.
pub fn tcp_addresses(client: u8) -> (SocketAddr, SocketAddr) {
    let (address, target) = if client.is_multiple_of(2) {
        (
            format!("10.0.0.2:{}", 40_000 + u16::from(client)),
            format!("192.0.2.{}:443", 10 + client),
        )
    } else {
        (
            format!("[fd00::2]:{}", 40_000 + u16::from(client)),
            format!("[2001:db8::{}]:443", 10 + client),
        )
    };
    (parse(&address), parse(&target))
}

/// A UDP endpoint.
pub fn endpoint_address(endpoint: u8) -> SocketAddr {
    parse(if endpoint == 0 {
        "10.0.0.3:5000"
    } else {
        "[fd00::3]:5000"
    })
}

/// A target as seen from an endpoint, or a stranger.
pub fn target_address(endpoint: u8, target: u8) -> SocketAddr {
    let port = if target == 0 { 53 } else { 7000 + u16::from(target) };
    parse(&if endpoint == 0 {
        format!("198.51.100.{}:{port}", 1 + target)
    } else {
        format!("[2001:db8:1::{}]:{port}", 1 + target)
    })
}

/// The identifier of an endpoint's pings.
pub fn ping_identifier(endpoint: u8) -> u16 {
    100 + u16::from(endpoint)
}

fn parse(text: &str) -> SocketAddr {
    text.parse().expect("a socket address")
}
