//! Stories: what may happen to an engine, and how they are drawn.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use tungate_engine::Policy;
use tungate_engine::config::{Clients, Filtering};
use tungate_engine::io::{IcmpError, Unreachable, UpstreamError};
use tungate_engine::policy::{
    Action, ListAction, ListEntry, ListProtocol, PolicySpec, PortRange, Rule, RuleMatch,
};

pub(super) const PEERS: u8 = 5;
pub(super) const DATAGRAMS: u8 = 5;
const POLICIES: u8 = 5;

/// What engines are made from.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub(super) clients: Clients,
    pub(super) filtering: Filtering,
    pub(super) mtu: u16,
    pub(super) buffer_per_flow: u32,
}

/// One thing that happens. Peers, targets, flows and datagrams are counted around.
#[derive(Debug, Clone)]
pub(super) enum Act {
    /// A SYN, an upstream that connects, an ACK.
    Handshake {
        peer: u8,
    },
    Syn {
        peer: u8,
    },
    /// The next bytes of a connection, which may exist or not.
    Data {
        peer: u8,
        len: u16,
        fin: bool,
    },
    /// An acknowledgment of all that was sent.
    Ack {
        peer: u8,
        window: u16,
    },
    Reset {
        peer: u8,
    },
    /// Any segment at all: numbers count from the connection's present ones.
    Nonsense {
        peer: u8,
        flags: u8,
        ahead: i32,
        acknowledges: i32,
        window: u16,
        len: u16,
    },
    /// A sound segment with one bit flipped.
    Damaged {
        peer: u8,
        bit: u16,
    },
    Garbage {
        bytes: Vec<u8>,
    },
    Datagram {
        peer: u8,
        target: u8,
        len: u16,
    },
    Ping {
        peer: u8,
        target: u8,
        len: u16,
    },
    /// A piece of one of a few datagrams, two of which overlap each other.
    Fragment {
        datagram: u8,
        piece: u8,
    },
    News {
        flow: Pick,
        news: News,
    },
    Read {
        flow: Pick,
        most: u32,
    },
    Write {
        flow: Pick,
        len: u32,
    },
    Policy {
        number: u8,
    },
    WallClock {
        hours: i16,
    },
    Drain,
    DeviceFills,
    DeviceDrains,
    /// The engine gets no turn for the next so many acts.
    Batch {
        acts: u8,
    },
    Pass {
        micros: u64,
    },
}

/// Which flow: the one opened so many before the last, or one that never was.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pick {
    Recent(u8),
    Never { generation: u32, slot: u32 },
}

#[derive(Debug, Clone)]
pub(super) enum News {
    Connected,
    Failed(UpstreamError),
    ReadClosed,
    Reset,
    Datagram { target: u8, len: u16, segment_size: u16 },
    EchoReply { sequence: u16, len: u16 },
    Error { target: u8, error: IcmpError },
}

pub(super) fn setups() -> impl Strategy<Value = Setup> {
    let clients = select(vec![Clients::Local, Clients::Routed]);
    let filtering = select(vec![Filtering::EndpointIndependent, Filtering::AddressDependent]);
    (
        clients,
        filtering,
        select(vec![1500, 1280u16]),
        select(vec![64 << 10, 16 << 10u32]),
    )
        .prop_map(|(clients, filtering, mtu, buffer_per_flow)| Setup {
            clients,
            filtering,
            mtu,
            buffer_per_flow,
        })
}

pub(super) fn stories() -> impl Strategy<Value = Vec<Act>> {
    vec(acts(), 1..120)
}

fn acts() -> impl Strategy<Value = Act> {
    let peer = || 0..PEERS;
    let len = || prop_oneof![0..3u16, 3..2_000u16, 2_000..9_000u16];
    let segments = prop_oneof![
        6 => peer().prop_map(|peer| Act::Handshake { peer }),
        2 => peer().prop_map(|peer| Act::Syn { peer }),
        8 => (peer(), len(), prop::bool::weighted(0.1)).prop_map(|(peer, len, fin)| Act::Data { peer, len, fin }),
        6 => (peer(), select(vec![65_535, 0, 1, 100, 8_000u16])).prop_map(|(peer, window)| Act::Ack { peer, window }),
        1 => peer().prop_map(|peer| Act::Reset { peer }),
        3 => (peer(), any::<u8>(), offsets(), offsets(), any::<u16>(), len()).prop_map(
            |(peer, flags, ahead, acknowledges, window, len)| Act::Nonsense { peer, flags, ahead, acknowledges, window, len }
        ),
        1 => (peer(), any::<u16>()).prop_map(|(peer, bit)| Act::Damaged { peer, bit }),
        1 => vec(any::<u8>(), 0..80).prop_map(|bytes| Act::Garbage { bytes }),
    ];
    let datagrams = prop_oneof![
        2 => (peer(), 0..3u8, len()).prop_map(|(peer, target, len)| Act::Datagram { peer, target, len }),
        1 => (peer(), 0..3u8, len()).prop_map(|(peer, target, len)| Act::Ping { peer, target, len }),
        2 => (0..DATAGRAMS, 0..4u8).prop_map(|(datagram, piece)| Act::Fragment { datagram, piece }),
    ];
    let upstreams = prop_oneof![
        3 => (picks(), news()).prop_map(|(flow, news)| Act::News { flow, news }),
        3 => (picks(), select(vec![100_000, 1, 1_000, 0u32])).prop_map(|(flow, most)| Act::Read { flow, most }),
        4 => (picks(), select(vec![1, 1_000, 100_000, 0u32])).prop_map(|(flow, len)| Act::Write { flow, len }),
    ];
    let surroundings = prop_oneof![
        2 => (0..POLICIES).prop_map(|number| Act::Policy { number }),
        1 => any::<i16>().prop_map(|hours| Act::WallClock { hours }),
        3 => Just(Act::DeviceFills),
        4 => Just(Act::DeviceDrains),
        4 => (1..6u8).prop_map(|acts| Act::Batch { acts }),
        1 => Just(Act::Drain),
    ];
    let time = prop_oneof![
        3 => 0..2_000u64,
        3 => 2_000..3_000_000u64,
        2 => 3_000_000..100_000_000u64,
        1 => 100_000_000..10_000_000_000u64,
    ];
    prop_oneof![
        12 => segments,
        3 => datagrams,
        6 => upstreams,
        2 => surroundings,
        6 => time.prop_map(|micros| Act::Pass { micros }),
    ]
}

/// Distances in sequence space: near, at its edges, anywhere.
fn offsets() -> impl Strategy<Value = i32> {
    prop_oneof![
        -3..4,
        -70_000..70_000,
        select(vec![i32::MIN, i32::MAX, 65_535, 65_536]),
        any::<i32>()
    ]
}

fn picks() -> impl Strategy<Value = Pick> {
    prop_oneof![
        12 => (0..6u8).prop_map(Pick::Recent),
        1 => (any::<u32>(), 0..8u32).prop_map(|(generation, slot)| Pick::Never { generation, slot }),
    ]
}

fn news() -> impl Strategy<Value = News> {
    let errors = vec![
        UpstreamError::Refused,
        UpstreamError::Unreachable(Unreachable::Network),
        UpstreamError::TimedOut,
        UpstreamError::Egress,
        UpstreamError::Exhausted,
    ];
    let reports = vec![
        IcmpError::Unreachable(Unreachable::Port),
        IcmpError::PacketTooBig { mtu: 1280 },
        IcmpError::TimeExceeded,
    ];
    prop_oneof![
        4 => Just(News::Connected),
        1 => select(errors).prop_map(News::Failed),
        2 => Just(News::ReadClosed),
        1 => Just(News::Reset),
        3 => (0..4u8, 0..9_000u16, select(vec![0, 100, 1_200, 5_000u16])).prop_map(
            |(target, len, segment_size)| News::Datagram { target, len, segment_size }
        ),
        1 => (any::<u16>(), 0..2_000u16).prop_map(|(sequence, len)| News::EchoReply { sequence, len }),
        1 => (0..4u8, select(reports)).prop_map(|(target, error)| News::Error { target, error }),
    ]
}

/// One of a few policies.
pub(super) fn policy(number: u8) -> Arc<Policy> {
    let network = |text: &str| text.parse().expect("a network");
    let deny = |text: &str, expires| ListEntry {
        action: ListAction::Deny,
        network: network(text),
        protocol: ListProtocol::Any,
        ports: None,
        expires,
    };
    let rule = |name: &str, first, action| Rule {
        name: name.to_owned(),
        matches: RuleMatch {
            ports: vec![PortRange { first, last: first }],
            ..RuleMatch::default()
        },
        action,
    };
    let elsewhere = "192.0.2.99:8080".parse().expect("an address");
    let spec = match number {
        0 => PolicySpec::default(),
        1 => PolicySpec {
            lists: vec![deny("10.0.0.3/32", None), deny("2001:db8:1::/64", None)],
            ..PolicySpec::default()
        },
        2 => PolicySpec {
            rules: vec![
                rule("no web", 80, Action::Drop),
                rule("no dns", 53, Action::Reject),
            ],
            ..PolicySpec::default()
        },
        3 => PolicySpec {
            rules: vec![rule("elsewhere", 443, Action::Redirect(elsewhere))],
            ..PolicySpec::default()
        },
        // For an hour from the start on, or for what the wall clock makes of it.
        _ => PolicySpec {
            lists: vec![
                ListEntry {
                    action: ListAction::Allow,
                    ..deny("192.0.2.7/32", Some(3_600))
                },
                deny("192.0.2.0/24", None),
            ],
            ..PolicySpec::default()
        },
    };
    Arc::new(Policy::new(spec))
}
