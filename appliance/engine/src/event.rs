//! What is worth counting, logging or checking, and the reasons for every drop and every end.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::addr::{FlowId, IngressId, Protocol};
use crate::io::UpstreamError;
use crate::policy::{Action, RuleRef};

/// One entry of the engine's ordered event stream.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub enum Event {
    /// A packet was dropped.
    Dropped {
        reason: DropReason,
        rule: Option<RuleRef>,
        flow: Option<FlowId>,
    },
    /// A flow was accepted by the policy; its upstream is being opened. For UDP it is a mapping, which serves all
    /// targets of one client endpoint, and `target` is the first of them.
    Opened {
        flow: FlowId,
        ingress: IngressId,
        protocol: Protocol,
        client: SocketAddr,
        target: SocketAddr,
        action: Action,
        rule: RuleRef,
    },
    /// The client has completed the TCP handshake.
    Established { flow: FlowId },
    /// A flow has ended; its id names nothing any more (TCP may linger in TIME-WAIT without it).
    Closed {
        flow: FlowId,
        reason: CloseReason,
        /// Payload bytes that upstream was given.
        to_upstream: u64,
        /// Payload bytes that were sent to the client and, for TCP, acknowledged.
        to_client: u64,
    },
    /// The server's name has become known. What a client says itself comes after what it has asked for, and counts
    /// more.
    Named {
        flow: FlowId,
        name: String,
        source: NameSource,
    },
}

/// Where a server's name is known from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NameSource {
    /// The client's first bytes: TLS SNI (RFC 6066) or HTTP Host (RFC 9110).
    FirstBytes,
    /// An answer that the client got to a question of its own.
    Dns,
}

impl NameSource {
    /// The word used in logs and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FirstBytes => "first-bytes",
            Self::Dns => "dns",
        }
    }
}

macro_rules! reasons {
    ($(#[$outer:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident => $text:literal,)* }) => {
        $(#[$outer])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$doc])* $variant,)* }

        impl $name {
            /// Every reason, in the order of counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name used in counters and reports.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

reasons! {
    /// Why a packet was dropped.
    DropReason {
        /// A list entry denies its source address.
        ListSource => "list-source",
        /// A list entry denies its destination address.
        ListDestination => "list-destination",
        /// A rule drops its flow.
        RuleDrop => "rule-drop",
        /// A rule rejects its flow; the client was told.
        RuleReject => "rule-reject",
        /// Neither IPv4 nor IPv6, or shorter than their headers.
        IpHeader => "ip-header",
        /// The IP length fields contradict the bytes that are there.
        IpLength => "ip-length",
        /// Wrong IPv4 header checksum.
        IpChecksum => "ip-checksum",
        /// IPv6 extension headers are cut short, or more than six.
        ExtensionHeader => "extension-header",
        /// The TCP header is cut short or contradicts itself.
        TcpHeader => "tcp-header",
        /// No TCP sends this combination of flags: none, SYN with FIN or RST, FIN without ACK.
        TcpFlags => "tcp-flags",
        /// Wrong TCP checksum.
        TcpChecksum => "tcp-checksum",
        /// The UDP header is cut short or its length is wrong.
        UdpHeader => "udp-header",
        /// Wrong UDP checksum, or none over IPv6.
        UdpChecksum => "udp-checksum",
        /// The ICMP header is cut short.
        IcmpHeader => "icmp-header",
        /// Wrong ICMP or ICMPv6 checksum.
        IcmpChecksum => "icmp-checksum",
        /// An ICMP type the appliance does not relay.
        IcmpType => "icmp-type",
        /// Source or destination port 0.
        PortZero => "port-zero",
        /// A protocol the appliance does not terminate.
        UnsupportedProtocol => "unsupported-protocol",
        /// Unspecified, multicast or broadcast source address.
        SourceAddress => "source-address",
        /// Unspecified destination address.
        DestinationAddress => "destination-address",
        /// Multicast destination.
        Multicast => "multicast",
        /// Limited broadcast destination.
        Broadcast => "broadcast",
        /// The hop limit ran out here; the client was told.
        HopLimit => "hop-limit",
        /// A fragment overlaps another (RFC 5722); its whole datagram is discarded.
        FragmentOverlap => "fragment-overlap",
        /// A fragment's length is not a multiple of eight, or it ends behind byte 65,535.
        FragmentLength => "fragment-length",
        /// No memory in the budget for more fragments.
        FragmentMemory => "fragment-memory",
        /// The rest of the datagram did not come in time.
        FragmentTimeout => "fragment-timeout",
        /// A TCP segment that belongs to no flow and is no SYN; answered by RST.
        NoFlow => "no-flow",
        /// A TCP segment beyond the receive window, or one that acknowledges what was never sent.
        TcpWindow => "tcp-window",
        /// The client answered our SYN-ACK with a SYN-ACK of its own.
        SplitHandshake => "split-handshake",
        /// The flow table is full.
        FlowLimit => "flow-limit",
        /// This client has as many flows as one client may.
        ClientLimit => "client-limit",
        /// Too many upstream connections are being made, none of them for long.
        HalfOpenLimit => "half-open-limit",
        /// No buffer memory for another flow.
        BufferLimit => "buffer-limit",
        /// The appliance is shutting down and takes no new flows.
        Draining => "draining",
        /// The flow's stack panicked; the flow was reset. This is a bug worth a report.
        Internal => "internal",
        /// A datagram from outside that the mapping's filter does not let in.
        Filtered => "filtered",
        /// A datagram that is too big even in fragments.
        TooBig => "too-big",
    }
}

/// Why a flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CloseReason {
    /// Both sides sent FIN and all bytes were delivered.
    Finished,
    /// The client reset the connection.
    ClientReset,
    /// The upstream reset the connection.
    UpstreamReset,
    /// The upstream connection could not be made.
    ConnectFailed(UpstreamError),
    /// The upstream did not answer within the connect timeout.
    ConnectTimeout,
    /// The client did not complete the handshake.
    HandshakeTimeout,
    /// Nothing was heard for the idle time.
    IdleTimeout,
    /// One side had closed, and the other sent nothing for the half-close time.
    HalfCloseTimeout,
    /// The client acknowledged nothing for too long.
    ClientUnresponsive,
    /// A new SYN took the 4-tuple over.
    Replaced,
    /// A policy change denies the flow.
    Denied(RuleRef),
    /// It made room for a newer one at a limit.
    Evicted,
    /// No buffer memory when the upstream was connected.
    BufferLimit,
    /// The flow's stack panicked.
    Internal,
}

impl CloseReason {
    /// The name used in logs, counters and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::ClientReset => "client-reset",
            Self::UpstreamReset => "upstream-reset",
            Self::ConnectFailed(_) => "connect-failed",
            Self::ConnectTimeout => "connect-timeout",
            Self::HandshakeTimeout => "handshake-timeout",
            Self::IdleTimeout => "idle-timeout",
            Self::HalfCloseTimeout => "half-close-timeout",
            Self::ClientUnresponsive => "client-unresponsive",
            Self::Replaced => "replaced",
            Self::Denied(_) => "denied",
            Self::Evicted => "evicted",
            Self::BufferLimit => "buffer-limit",
            Self::Internal => "internal",
        }
    }
}
