//! Packets that try to slip past a list: what the pre-filter passes goes on to an engine with the same lists, and
//! nothing that the lists deny may get through both.
//!
//! The packets are all combinations of what evaders do with tags, lengths, options, extension headers and fragments.
//! The same packets without lists have to get through in their thousands: what no list stops is not stopped by luck.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;

use common::model::ip_packet;
use tungate_engine::io::{ChecksumState, PacketOut, UpstreamCommand};
use tungate_engine::policy::{ListAction, ListEntry, ListProtocol, PolicySpec, PortRange};
use tungate_engine::{
    Config, Engine, Event, FlowId, IngressId, Input, PacketIn, Policy, ShardId, Timestamp, World, step,
};
use tungate_prefilter::{Action, Sampling, Vm};

const FIRST_FRAGMENT: u16 = 0x2000;
const DONT_FRAGMENT: u16 = 0x4000;

/// The port that lists deny.
const DENIED_PORT: u16 = 443;

/// Where a packet comes from, and where it goes to.
#[derive(Clone, Copy)]
struct Ends {
    source: u16,
    port: u16,
}

/// From a denied source, or to a denied port: the two ways in which lists deny here.
const DENIED: [Ends; 2] = [
    Ends {
        source: 0xbad,
        port: 80,
    },
    Ends {
        source: 0x600d,
        port: DENIED_PORT,
    },
];

fn lists() -> Vec<ListEntry> {
    let deny = |network: &str, protocol, port: Option<u16>| ListEntry {
        action: ListAction::Deny,
        network: network.parse().expect("a network"),
        protocol,
        ports: port.map(|port| PortRange {
            first: port,
            last: port,
        }),
        expires: None,
    };
    vec![
        deny("10.11.173.0/24", ListProtocol::Any, None),
        deny("2001:db8:bad::/48", ListProtocol::Any, None),
        deny("203.0.113.0/24", ListProtocol::Any, Some(DENIED_PORT)),
        deny("2001:db8:7::/48", ListProtocol::Tcp, Some(DENIED_PORT)),
        deny("2001:db8:7::/48", ListProtocol::Udp, Some(DENIED_PORT)),
    ]
}

/// The outside world: notes to where something would have been opened or sent.
#[derive(Default)]
struct Outside {
    opened: Option<SocketAddr>,
    buffer: Vec<u8>,
}

impl World for Outside {
    fn has_room(&self) -> bool {
        true
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.buffer.resize(len, 0);
        &mut self.buffer
    }

    fn send_packet(&mut self, _: PacketOut) {}

    fn upstream(&mut self, _: FlowId, command: UpstreamCommand<'_>) {
        match command {
            UpstreamCommand::Open(open) => self.opened = Some(open.target),
            UpstreamCommand::Send { target, .. } => self.opened = Some(target),
            UpstreamCommand::Readable
            | UpstreamCommand::Writable
            | UpstreamCommand::CloseWrite
            | UpstreamCommand::Echo { .. }
            | UpstreamCommand::Close
            | UpstreamCommand::Abort => {}
        }
    }

    fn event(&mut self, _: &Event) {}

    fn forward(&mut self, _: ShardId, _: PacketIn<'_>) {}
}

/// Both paths, one behind the other.
struct Paths {
    vm: Vm,
    engine: Engine,
    policy: Arc<Policy>,
    outside: Outside,
    frames: usize,
}

impl Paths {
    fn new(lists: Vec<ListEntry>) -> Self {
        let spec = PolicySpec {
            lists,
            ..PolicySpec::default()
        };
        let mut vm = Vm::simulated(Sampling::default()).expect("the object is sound");
        vm.apply(&spec, 0).expect("lists fit");
        let policy = Arc::new(Policy::new(spec));
        Self {
            vm,
            engine: engine(&policy),
            policy,
            outside: Outside::default(),
            frames: 0,
        }
    }

    /// Sends a frame; returns the target if it has got a connection or session opened.
    fn opened_by(&mut self, frame: &[u8]) -> Option<SocketAddr> {
        self.frames += 1;
        if self.frames.is_multiple_of(1000) {
            // Flows of other packets are not to be in the way, and neither are limits.
            self.engine = engine(&self.policy);
        }
        if self
            .vm
            .run(frame)
            .expect("no frame makes the program fail")
            .action
            == Action::Drop
        {
            return None;
        }
        // A card that takes all tags off: whoever reads behind more of them than the program does.
        let mut untagged = frame.to_vec();
        while untagged.len() > 16 && matches!(untagged[12..14], [0x81, 0x00] | [0x88, 0xa8] | [0x91, 0x00]) {
            untagged.drain(12..16);
        }
        let (_, packet) = ip_packet(&untagged)?;
        self.outside.opened = None;
        let packet = PacketIn {
            ingress: IngressId(0),
            bytes: packet,
            checksum: ChecksumState::Trusted,
            segment_size: None,
            reassembled: false,
        };
        step(
            &mut self.engine,
            &mut self.outside,
            Timestamp::ZERO,
            Input::Packet(packet),
        );
        self.outside.opened
    }
}

fn engine(policy: &Arc<Policy>) -> Engine {
    Engine::new(Config::default(), Arc::clone(policy), [7; 32], Timestamp::ZERO)
}

/// Transport segments: protocol number and bytes.
fn segments(port: u16, number: u32) -> [(u8, Vec<u8>); 3] {
    let from = (1024 + number % 60_000) as u16;
    let mut syn = [from.to_be_bytes(), port.to_be_bytes()].concat();
    syn.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    let mut with_data = syn.clone();
    with_data.extend([7; 25]);
    let mut datagram = [from.to_be_bytes(), port.to_be_bytes()].concat();
    datagram.extend([0, 33, 0, 0]);
    datagram.extend([7; 25]);
    [(6, syn), (6, with_data), (17, datagram)]
}

fn tags() -> Vec<Vec<u8>> {
    let tag = |kind: u16| [kind.to_be_bytes(), 7u16.to_be_bytes()].concat();
    vec![
        vec![],
        tag(0x8100),
        tag(0x9100),
        [tag(0x88a8), tag(0x8100)].concat(),
        [tag(0x88a8), tag(0x8100), tag(0x8100)].concat(),
    ]
}

/// What a length field says of what is there.
#[derive(Clone, Copy, PartialEq)]
enum Length {
    Right,
    Padded(usize),
    Less(u16),
    More(u16),
    Zero,
}

const LENGTHS: [Length; 10] = [
    Length::Right,
    Length::Padded(1),
    Length::Padded(46),
    Length::Less(1),
    Length::Less(17),
    Length::Less(1000),
    Length::More(1),
    Length::More(8),
    Length::More(40_000),
    Length::Zero,
];

impl Length {
    fn said(self, right: usize) -> u16 {
        let right = right as u16;
        match self {
            Self::Right | Self::Padded(_) => right,
            Self::Less(bytes) => right.saturating_sub(bytes),
            Self::More(bytes) => right.saturating_add(bytes),
            Self::Zero => 0,
        }
    }
}

fn frame(tags: &[u8], kind: u16, packet: &[u8], length: Length) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend(tags);
    frame.extend(kind.to_be_bytes());
    frame.extend(packet);
    if let Length::Padded(bytes) = length {
        // Padding that looks like another port.
        frame.extend([0, 80].iter().cycle().take(bytes));
    }
    frame
}

struct V4 {
    options: usize,
    /// Words that the header length says, more or less than there are.
    header_lie: i8,
    fragment: u16,
    length: Length,
}

fn packet4(ends: Ends, protocol: u8, payload: &[u8], id: u16, shape: &V4) -> Vec<u8> {
    let header = 20 + shape.options * 4;
    let words = (header / 4) as i8 + shape.header_lie;
    let mut packet = vec![0x40 | (words as u8 & 0x0f), 0];
    packet.extend(shape.length.said(header + payload.len()).to_be_bytes());
    packet.extend(id.to_be_bytes());
    packet.extend(shape.fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    let [high, low] = ends.source.to_be_bytes();
    packet.extend([10, high, low, 1, 203, 0, 113, 7]);
    packet.extend([1].iter().cycle().take(shape.options * 4));
    packet.extend(payload);
    packet
}

fn packet6(ends: Ends, chain: &[(u8, Vec<u8>)], protocol: u8, payload: &[u8], length: Length) -> Vec<u8> {
    let mut kinds: Vec<u8> = chain.iter().map(|&(kind, _)| kind).collect();
    kinds.push(protocol);
    let mut body = Vec::new();
    for ((_, bytes), next) in chain.iter().zip(&kinds[1..]) {
        body.push(*next);
        body.extend(bytes);
    }
    body.extend(payload);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.said(body.len()).to_be_bytes());
    packet.extend([kinds[0], 64, 0x20, 0x01, 0x0d, 0xb8]);
    packet.extend(ends.source.to_be_bytes());
    packet.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([0x20, 0x01, 0x0d, 0xb8, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
    packet.extend(body);
    packet
}

/// Extension headers, without the next header field.
fn extension(kind: u8, fragment: u16) -> (u8, Vec<u8>) {
    match kind {
        44 => {
            let [high, low] = fragment.to_be_bytes();
            (44, vec![0, high, low, 0, 0, 0, 9])
        }
        // Authentication counts in other units.
        51 => (51, [vec![4], vec![0; 22]].concat()),
        _ => (kind, vec![0, 1, 4, 0, 0, 0, 0]),
    }
}

/// All chains of up to two headers, and longer ones.
fn chains() -> Vec<Vec<(u8, Vec<u8>)>> {
    let mut single = vec![vec![]];
    for kind in [0, 43, 51, 60, 135] {
        single.push(vec![extension(kind, 0)]);
    }
    // Whole in one fragment, the first, one in the middle, and one with a reserved bit.
    for fragment in [0, 1, 0x10, 0x11, 2] {
        single.push(vec![extension(44, fragment)]);
    }
    // One that is longer than the packet.
    single.push(vec![(60, vec![200, 1, 4, 0, 0, 0, 0])]);
    let mut chains = single.clone();
    for first in &single[1..] {
        chains.extend(single[1..].iter().map(|second| [&first[..], second].concat()));
    }
    for count in 3..9 {
        chains.push(vec![extension(60, 0); count]);
    }
    chains
}

/// Every single packet from and to these ends.
fn each(ends: Ends, mut take: impl FnMut(Vec<u8>)) {
    let mut number = 0;
    for tags in tags() {
        for length in LENGTHS {
            for which in 0..3 {
                for options in [0, 1, 2, 10] {
                    for header_lie in [0, -1, 1, 5] {
                        for fragment in [
                            0,
                            DONT_FRAGMENT,
                            0x8000,
                            FIRST_FRAGMENT,
                            FIRST_FRAGMENT | 1,
                            1,
                            185,
                        ] {
                            number += 1;
                            let (protocol, payload) = &segments(ends.port, number)[which];
                            for cut in [payload.len(), 8, 3] {
                                let shape = V4 {
                                    options,
                                    header_lie,
                                    fragment,
                                    length,
                                };
                                let payload = &payload[..cut];
                                let packet = packet4(ends, *protocol, payload, number as u16, &shape);
                                take(frame(&tags, 0x0800, &packet, length));
                                if header_lie == 0 && fragment == 0 {
                                    take(frame(&tags, 0x86dd, &packet, length));
                                }
                            }
                        }
                    }
                }
                for chain in chains() {
                    number += 1;
                    let (protocol, payload) = &segments(ends.port, number)[which];
                    for cut in [payload.len(), 8, 3] {
                        let packet = packet6(ends, &chain, *protocol, &payload[..cut], length);
                        take(frame(&tags, 0x86dd, &packet, length));
                    }
                }
            }
        }
    }
}

/// Trains of fragments that come to a whole packet: in order, backwards, twice, and with one laid over another.
fn trains(ends: Ends, mut take: impl FnMut(Vec<Vec<u8>>)) {
    let mut number = 0;
    for which in 0..3 {
        for size in [8, 16, 24] {
            for order in 0..4 {
                for is_v6 in [false, true] {
                    number += 1;
                    let (protocol, payload) = &segments(ends.port, number)[which];
                    let piece = |at: usize, bytes: &[u8]| {
                        let more = at + bytes.len() < payload.len();
                        if is_v6 {
                            let chain = [extension(44, at as u16 | u16::from(more))];
                            let packet = packet6(ends, &chain, *protocol, bytes, Length::Right);
                            frame(&[], 0x86dd, &packet, Length::Right)
                        } else {
                            let shape = V4 {
                                options: 0,
                                header_lie: 0,
                                fragment: (at / 8) as u16 | if more { FIRST_FRAGMENT } else { 0 },
                                length: Length::Right,
                            };
                            let packet = packet4(ends, *protocol, bytes, number as u16, &shape);
                            frame(&[], 0x0800, &packet, Length::Right)
                        }
                    };
                    let mut train: Vec<_> = payload
                        .chunks(size)
                        .enumerate()
                        .map(|(index, bytes)| piece(index * size, bytes))
                        .collect();
                    match order {
                        0 => {}
                        1 => train.reverse(),
                        2 => train.extend(train.clone()),
                        _ => {
                            // A first fragment with a port that nobody denies, before or behind the true one.
                            let harmless = [&payload[..2], &80u16.to_be_bytes(), &payload[4..8]].concat();
                            train.insert(0, piece(0, &harmless));
                            train.push(piece(0, &harmless));
                        }
                    }
                    take(train);
                }
            }
        }
    }
}

#[test]
fn nothing_that_lists_deny_gets_through_both_paths() {
    let mut tried = 0;
    for ends in DENIED {
        let mut paths = Paths::new(lists());
        each(ends, |frame| {
            tried += 1;
            assert_eq!(paths.opened_by(&frame), None, "{frame:02x?}");
        });
        trains(ends, |train| {
            for frame in &train {
                tried += 1;
                // A port that another fragment wrote over is nobody's any more.
                let opened = paths.opened_by(frame).filter(|target| target.port() == ends.port);
                assert_eq!(opened, None, "{train:02x?}");
            }
        });
    }
    assert!(tried > 200_000, "only {tried} packets");
}

#[test]
fn the_same_packets_get_through_where_no_list_denies_them() {
    for ends in DENIED {
        let mut paths = Paths::new(Vec::new());
        let (mut through, mut whole) = (0, 0);
        each(ends, |frame| {
            through += usize::from(paths.opened_by(&frame).is_some())
        });
        trains(ends, |train| {
            whole += usize::from(train.iter().any(|frame| paths.opened_by(frame).is_some()));
        });
        assert!(through > 3_000, "only {through} packets got through");
        assert!(whole > 40, "only {whole} of 72 trains got through");
    }
}
