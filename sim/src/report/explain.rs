//! What the names in a report mean, in a phrase each.

use tungate_engine::DropReason;

/// The phrase for a drop reason's name; empty for a name that is none.
pub(super) fn reason(name: &str) -> &'static str {
    match DropReason::ALL.iter().find(|reason| reason.name() == name) {
        Some(&reason) => drop_reason(reason),
        None => "",
    }
}

fn drop_reason(reason: DropReason) -> &'static str {
    match reason {
        DropReason::ListSource => "its source address is denied by a list",
        DropReason::ListDestination => "its destination address is denied by a list",
        DropReason::RuleDrop => "a rule drops its flow",
        DropReason::RuleReject => "a rule rejects its flow; the client is told",
        DropReason::IpHeader => "neither IPv4 nor IPv6, or shorter than their headers",
        DropReason::IpLength => "IP length fields contradict the bytes that are there",
        DropReason::IpChecksum => "wrong IPv4 header checksum",
        DropReason::ExtensionHeader => "IPv6 extension headers cut short, or more than six",
        DropReason::TcpHeader => "TCP header cut short or contradicting itself",
        DropReason::TcpFlags => "a combination of flags that no TCP sends",
        DropReason::TcpChecksum => "wrong TCP checksum",
        DropReason::UdpHeader => "UDP header cut short, or its length wrong",
        DropReason::UdpChecksum => "wrong UDP checksum, or none over IPv6",
        DropReason::IcmpHeader => "ICMP header cut short",
        DropReason::IcmpChecksum => "wrong ICMP checksum",
        DropReason::IcmpType => "an ICMP type that is not relayed",
        DropReason::PortZero => "source or destination port 0",
        DropReason::UnsupportedProtocol => "neither TCP, UDP nor ICMP",
        DropReason::SourceAddress => "unspecified, multicast or broadcast source address",
        DropReason::DestinationAddress => "unspecified destination address",
        DropReason::Multicast => "multicast is not relayed",
        DropReason::Broadcast => "broadcast is not relayed",
        DropReason::HopLimit => "the hop limit ran out; the client is told",
        DropReason::FragmentOverlap => "overlapping fragments; the whole datagram is discarded",
        DropReason::FragmentLength => "a fragment of impossible length",
        DropReason::FragmentMemory => "no memory left for fragments",
        DropReason::FragmentTimeout => "the other fragments did not come in time",
        DropReason::NoFlow => "belongs to no flow and is no SYN; answered by RST",
        DropReason::TcpWindow => "outside the window, or acknowledges what was never sent",
        DropReason::SplitHandshake => "the client answered SYN-ACK with SYN-ACK",
        DropReason::FlowLimit => "the flow table is full",
        DropReason::ClientLimit => "the client has as many flows as one may have",
        DropReason::HalfOpenLimit => "too many connections are being opened",
        DropReason::BufferLimit => "no buffer memory for another flow",
        DropReason::Draining => "shutting down: no new flows",
        DropReason::Internal => "the flow's stack panicked: a bug worth a report",
        DropReason::Filtered => "from outside, and not let in by the mapping's filter",
        DropReason::TooBig => "too big even in fragments",
    }
}

/// The phrase for an anomaly's name; empty for a name that is none.
pub(super) fn anomaly(name: &str) -> &'static str {
    let known = ANOMALIES.iter().find(|&&(known, _)| known == name);
    known.map_or("", |&(_, phrase)| phrase)
}

/// In the order of their names.
const ANOMALIES: [(&str, &str); 19] = [
    (
        "authentication-option",
        "signed segments; the option had to be taken off",
    ),
    ("data-after-fin", "bytes behind the sender's own FIN"),
    (
        "data-after-reset",
        "bytes from the target after the client's reset",
    ),
    (
        "hole",
        "bytes that were acknowledged but not captured; zeros stood for them",
    ),
    ("keep-alive", "probes below the next sequence number"),
    ("no-syn", "the beginning was not captured"),
    ("no-syn-ack", "answered, but the answer was not captured"),
    ("out-of-order", "segments after others that they precede"),
    ("outside-window", "bytes outside the receiver's window"),
    ("overlap", "different bytes for one place; the first count"),
    ("reset-data", "a reset that carries data"),
    ("retransmission", "segments sent again"),
    ("snap-cut", "packets cut by the snap length"),
    ("split-handshake", "both sides sent a SYN"),
    ("syn-data", "data on the SYN"),
    ("syn-retransmit", "the SYN was sent again"),
    ("unanswered", "nobody answered"),
    ("urgent", "an urgent pointer"),
    ("zero-window", "the window was closed"),
];
