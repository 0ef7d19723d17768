//! Real packets, mutated, into an engine with live flows: nothing panics, every packet is accounted for, and what is
//! held stays bounded.
//!
//! The packets are those of the captures that ship with the project, or of the directory that `TUNGATE_CAPTURES` names.
//! Some go in as captured, some are turned on a live flow first, and all may be bent, cut, joined, repeated or held
//! back. `MUTATED_PACKETS` says how many and `MUTATED_SEED` which; each run of two numbers is the same.

use std::collections::VecDeque;
use std::env;
use std::fs;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use tungate_engine::config::{Clients, Limits};
use tungate_engine::io::{ChecksumState, UpstreamError, UpstreamEvent};
use tungate_engine::policy::{Action, ListAction, ListEntry, ListProtocol, PolicySpec, Rule, RuleMatch};
use tungate_engine::{
    Config, DropReason, Event, FlowId, IngressId, Input, PacketIn, Policy, Protocol, Timestamp,
};
use tungate_sim::capture::Capture;
use tungate_sim::capture::link::{LinkView, ip_of};
use tungate_tests::client::TcpClient;
use tungate_tests::memory::{Counting, live_bytes};
use tungate_tests::packet::{Datagram, echo_request, fragments};
use tungate_tests::recorder::Output;
use tungate_tests::rig::{Rig, packet_in};

#[global_allocator]
static COUNTING: Counting = Counting;

/// Packets without `MUTATED_PACKETS`.
const PACKETS: u32 = 250_000;
/// No capture gives more, so that all have their share.
const PACKETS_PER_CAPTURE: usize = 300;
/// Connections that packets are turned on.
const LIVE: u16 = 24;

#[test]
fn mutated_packets_are_only_data() {
    let packets = number("MUTATED_PACKETS", PACKETS);
    let seed = number("MUTATED_SEED", 1);
    let corpus = corpus();
    for clients in [Clients::Local, Clients::Routed] {
        let mut storm = Storm::new(&corpus, clients, seed.into());
        storm.blow(packets / 8);
        let early = live_bytes();
        storm.blow(packets / 2 - packets / 8);
        let late = live_bytes();
        storm.check();
        let held = late - early;
        assert!(
            held < 4 << 20,
            "{held} bytes more are held after four times as many packets"
        );
        println!(
            "{clients:?}: {} passed, {} dropped for {} reasons, {} met a flow",
            storm.passed,
            storm.dropped,
            storm.reasons(),
            storm.on_flows
        );
        assert!(
            storm.on_flows > packets / 20,
            "only {} packets met a flow",
            storm.on_flows
        );
        assert!(
            storm.reasons() >= 25,
            "packets were dropped for {} reasons only",
            storm.reasons()
        );
    }
}

/// The number in an environment variable.
fn number(name: &str, default: u32) -> u32 {
    env::var(name).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number"))
    })
}

// ---- packets -------------------------------------------------------------------------------------------------------------

/// Real packets, or a few of our own where there are no captures.
fn corpus() -> Vec<Vec<u8>> {
    let shipped = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../captures");
    let directory = env::var_os("TUNGATE_CAPTURES").map_or_else(shipped, PathBuf::from);
    let mut packets = built_in();
    let Ok(entries) = fs::read_dir(&directory) else {
        println!("no captures in {}: built-in packets only", directory.display());
        return packets;
    };
    let mut paths: Vec<_> = entries
        .map(|entry| entry.expect("the directory can be listed").path())
        .collect();
    paths.sort();
    let mut captures = 0;
    for path in paths {
        let Ok(mut capture) = Capture::open(&path) else {
            continue; // an index, or a licence
        };
        captures += 1;
        let before = packets.len();
        while let Ok(Some(record)) = capture.next_record()
            && packets.len() < before + PACKETS_PER_CAPTURE
        {
            if let LinkView::Ip(range) = ip_of(record.link_type, record.bytes) {
                packets.push(record.bytes[range].to_vec());
            }
        }
    }
    println!(
        "{} packets, from {captures} captures in {}",
        packets.len(),
        directory.display()
    );
    packets
}

fn built_in() -> Vec<Vec<u8>> {
    let datagram = |source: &str, target: &str| Datagram {
        source: source.parse().expect("an address"),
        destination: target.parse().expect("an address"),
        payload: vec![7; 3000],
    };
    let v4 = datagram("10.0.0.2:1001", "192.0.2.7:53").packet();
    let v6 = datagram("[fd00::2]:1001", "[2001:db8::7]:53").packet();
    let ip = |text: &str| text.parse().expect("an address");
    let mut packets = fragments(&v4, 1, 1480);
    packets.extend(fragments(&v6, 1, 1400));
    packets.push(echo_request(ip("10.0.0.2"), ip("192.0.2.7"), 1, 1, &[1; 56]));
    packets.push(echo_request(ip("fd00::2"), ip("2001:db8::7"), 1, 1, &[1; 56]));
    packets.extend([v4, v6]);
    packets
}

/// Bends a packet in one way, not before byte `from`; `other` is one to take parts from.
fn mutate(packet: &mut Vec<u8>, from: usize, other: &[u8], rng: &mut ChaCha8Rng) {
    const EXTREMES: [u32; 8] = [0, 1, 0x7f, 0x80, 0xff, 0x7fff_ffff, 0x8000_0000, u32::MAX];
    let mut below = |limit: usize| rng.next_u32() as usize % limit.max(1);
    let from = from.min(packet.len());
    let [header, anywhere, end] =
        [80, 200, usize::MAX].map(|reach| from + below(packet.len().min(reach).saturating_sub(from)));
    match below(10) {
        // Headers first: that is where meaning is.
        0..4 => {
            let width = [1, 2, 4][below(3)];
            let extreme = EXTREMES[below(8)].to_be_bytes();
            for (byte, value) in packet[header..].iter_mut().zip(&extreme[4 - width..]) {
                *byte = *value;
            }
        }
        4..6 => {
            if let Some(byte) = packet.get_mut(anywhere) {
                *byte ^= 1 << below(8);
            }
        }
        6 if from == 0 && below(4) == 0 => packet.truncate(end),
        6..8 => {
            packet.truncate(end);
            mend_length(packet);
        }
        8 => {
            packet.truncate(end);
            packet.extend_from_slice(&other[below(other.len())..]);
            packet.truncate(65_535);
            mend_length(packet);
        }
        _ => {
            let more = below(100);
            packet.extend((0..more).map(|at| at as u8));
            packet.truncate(65_535);
        }
    }
}

/// Makes the IP length that of the packet.
fn mend_length(packet: &mut [u8]) {
    let len = packet.len();
    match packet.first().map(|first| first >> 4) {
        Some(4) if len >= 20 => packet[2..4].copy_from_slice(&(len as u16).to_be_bytes()),
        Some(6) if len >= 40 => packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes()),
        Some(_) | None => {}
    }
}

/// Gives a packet the addresses, ports and, near enough, the numbers of `segment`, the next of a live connection.
fn turn_on(packet: &mut [u8], segment: &[u8], rng: &mut ChaCha8Rng) {
    let version = segment[0] >> 4;
    let (addresses, transport) = if version == 4 { (12..20, 20) } else { (8..40, 40) };
    if packet.len() < transport + 16 || packet[0] >> 4 != version {
        return;
    }
    packet[addresses.clone()].copy_from_slice(&segment[addresses]);
    packet[transport..transport + 4].copy_from_slice(&segment[transport..transport + 4]);
    for (field, reach) in [(4, 70_000), (8, 3_000)] {
        let number = |bytes: &[u8]| u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let off = match rng.next_u32() % 4 {
            0..2 => 0,
            2 => rng.next_u32() % reach,
            _ => (rng.next_u32() % reach).wrapping_neg(),
        };
        let at = transport + field;
        let next = number(&segment[at..]).wrapping_add(off);
        packet[at..at + 4].copy_from_slice(&next.to_be_bytes());
    }
}

// ---- the storm -------------------------------------------------------------------------------------------------------------

struct Storm<'a> {
    corpus: &'a [Vec<u8>],
    rng: ChaCha8Rng,
    rig: Rig,
    live: Vec<TcpClient>,
    /// Flows that have been opened, the latest last.
    flows: VecDeque<(FlowId, Protocol)>,
    /// Packets that others overtake.
    late: VecDeque<Vec<u8>>,
    ports: u16,
    passed: u32,
    dropped: u32,
    /// Packets that met a flow.
    on_flows: u32,
    told: [u64; DropReason::ALL.len()],
}

impl<'a> Storm<'a> {
    fn new(corpus: &'a [Vec<u8>], clients: Clients, seed: u64) -> Self {
        let config = Config {
            clients,
            limits: Limits {
                flows: 300,
                flows_per_client: 200,
                half_open: 100,
                sessions: 200,
                reassembly_bytes: 256 << 10,
                buffer_bytes: 16 << 20,
                buffer_per_flow: 64 << 10,
                names: 50,
            },
            ..Config::default()
        };
        Self {
            corpus,
            rng: ChaCha8Rng::seed_from_u64(seed),
            rig: Rig::new(config, PolicySpec::default()),
            live: Vec::new(),
            flows: VecDeque::new(),
            late: VecDeque::new(),
            ports: 0,
            passed: 0,
            dropped: 0,
            on_flows: 0,
            told: [0; DropReason::ALL.len()],
        }
    }

    /// Lets so many packets loose.
    fn blow(&mut self, packets: u32) {
        let end = self.passed + self.dropped + packets;
        while self.passed + self.dropped < end {
            let packet = self.draw();
            match self.below(20) {
                0 => {
                    self.feed(&packet);
                    self.feed(&packet);
                }
                1 => self.late.push_back(packet),
                _ => self.feed(&packet),
            }
            if self.late.len() > 16 || self.below(40) == 0 {
                let index = self.below(self.late.len());
                if let Some(packet) = self.late.remove(index) {
                    self.feed(&packet);
                }
            }
            match self.below(1000) {
                0..50 => self.news(),
                50..250 => self.relay(),
                250..300 => {
                    let time = Duration::from_micros(self.rng.next_u64() % 2_000_000);
                    self.rig.pass(time);
                }
                300 => self.rig.pass(Duration::from_secs(100)),
                301..331 => self.rig.world.full = !self.rig.world.full,
                331 => self.swap_policy(),
                _ => {}
            }
            self.take_note();
        }
    }

    fn check(&mut self) {
        self.rig.world.full = false;
        self.rig.flush();
        self.take_note();
        let counters = self.rig.engine.counters();
        assert_eq!(counters.drops(DropReason::Internal), 0);
        for (reason, told) in DropReason::ALL.iter().zip(self.told) {
            assert_eq!(
                counters.drops(*reason),
                told,
                "dropped for {reason}, counted and told"
            );
        }
    }

    /// How many reasons there were to drop.
    fn reasons(&self) -> usize {
        self.told.iter().filter(|told| **told > 0).count()
    }

    fn below(&mut self, limit: usize) -> usize {
        self.rng.next_u32() as usize % limit.max(1)
    }

    /// The next packet, mutated up to three times.
    fn draw(&mut self) -> Vec<u8> {
        let index = self.below(self.corpus.len());
        let mut packet = self.corpus[index].clone();
        match self.below(10) {
            0..3 => {}
            3..7 => {
                let segment = self.live_segment();
                turn_on(&mut packet, &segment, &mut self.rng);
            }
            _ => packet = self.live_segment(),
        }
        // Half of them behind a sound IP header and the ports, which is where the stacks are.
        let from = match packet.first().map(|first| first >> 4) {
            Some(4) if self.below(2) == 0 => 24,
            Some(6) if self.below(2) == 0 => 44,
            Some(_) | None => 0,
        };
        let other = self.below(self.corpus.len());
        for _ in 0..self.below(4) {
            mutate(&mut packet, from, &self.corpus[other], &mut self.rng);
        }
        packet
    }

    /// The next segment of a live connection, which is made if need be.
    fn live_segment(&mut self) -> Vec<u8> {
        let slot = self.below(LIVE.into());
        while self.live.len() <= slot {
            self.live.push(self.rig.client("10.9.0.0:1", "192.0.2.7:80"));
        }
        if !self.live[slot].is_connected() || self.live[slot].end().is_some() || self.below(500) == 0 {
            self.connect(slot);
        }
        let len = self.below(3000) as u64;
        let client = &mut self.live[slot];
        client.send(len, self.rig.now);
        let mut outbox = client.take_outbox();
        if outbox.is_empty() {
            client.keep_alive();
            outbox = client.take_outbox();
        }
        outbox.swap_remove(0).packet()
    }

    /// Makes a connection, unless something hinders it.
    fn connect(&mut self, slot: usize) {
        self.ports = self.ports % 20_000 + 1;
        let (address, target) = if slot.is_multiple_of(2) {
            (format!("10.9.0.{slot}:{}", 1000 + self.ports), "192.0.2.7:80")
        } else {
            (
                format!("[fd00::{slot}]:{}", 1000 + self.ports),
                "[2001:db8::7]:80",
            )
        };
        self.live[slot] = self.rig.client(&address, target);
        for _ in 0..2 {
            for segment in self.live[slot].take_outbox() {
                self.rig.input(Input::Packet(packet_in(&segment.packet())));
            }
            self.take_note();
        }
    }

    fn feed(&mut self, bytes: &[u8]) {
        let packet = PacketIn {
            ingress: IngressId(u16::from(self.below(50) == 0)),
            bytes,
            // What a device vouches for gets further.
            checksum: if self.below(4) == 0 {
                ChecksumState::Unverified
            } else {
                ChecksumState::Trusted
            },
            segment_size: if self.below(10) == 0 {
                NonZeroU16::new(self.rng.next_u32() as u16)
            } else {
                None
            },
            reassembled: self.below(10) == 0,
        };
        let judgement = if self.below(3) == 0 {
            self.rig
                .engine
                .handle(self.rig.now, Input::Packet(packet), &mut self.rig.world)
        } else {
            self.rig.input(Input::Packet(packet))
        };
        let judgement = judgement.expect("a packet is judged");
        self.on_flows += u32::from(judgement.flow.is_some());
        match judgement.dropped {
            Some(_) => self.dropped += 1,
            None => self.passed += 1,
        }
    }

    /// Tells the engine something about a flow that was opened lately, true or not.
    fn news(&mut self) {
        let back = self.below(self.flows.len().min(50));
        let Some(&(flow, protocol)) = self.flows.iter().rev().nth(back) else {
            return;
        };
        let payload = vec![3; self.below(2000)];
        let event = match (protocol, self.below(12)) {
            (Protocol::Tcp, 0..7) => UpstreamEvent::Connected,
            (Protocol::Tcp, 7) => UpstreamEvent::Failed(UpstreamError::Refused),
            (Protocol::Tcp, 8) => UpstreamEvent::Reset,
            (Protocol::Tcp, 9..11) => UpstreamEvent::ReadClosed,
            (_, 0..6) => UpstreamEvent::Datagram {
                source: "192.0.2.7:53".parse().expect("an address"),
                payload: &payload,
                segment_size: None,
            },
            _ => UpstreamEvent::EchoReply {
                sequence: 1,
                payload: &payload,
            },
        };
        self.rig.upstream(flow, event);
    }

    /// Reads from a flow and writes to it.
    fn relay(&mut self) {
        let back = self.below(self.flows.len().min(50));
        let Some(&(flow, _)) = self.flows.iter().rev().nth(back) else {
            return;
        };
        self.rig.read_all(flow);
        let len = self.below(20_000);
        self.rig.write(flow, 0, len);
    }

    fn swap_policy(&mut self) {
        let spec = match self.below(4) {
            0 => PolicySpec {
                lists: vec![ListEntry {
                    action: ListAction::Deny,
                    network: "10.9.0.0/28".parse().expect("a network"),
                    protocol: ListProtocol::Any,
                    ports: None,
                    expires: None,
                }],
                ..PolicySpec::default()
            },
            1 => PolicySpec {
                rules: vec![Rule {
                    name: "no udp".to_owned(),
                    matches: RuleMatch {
                        protocols: vec![Protocol::Udp],
                        ..RuleMatch::default()
                    },
                    action: Action::Reject,
                }],
                ..PolicySpec::default()
            },
            _ => PolicySpec::default(),
        };
        self.rig.input(Input::Policy(Arc::new(Policy::new(spec))));
    }

    /// Hands segments to live connections, and counts what was told.
    fn take_note(&mut self) {
        let mut connected = Vec::new();
        for output in self.rig.world.take() {
            match output {
                Output::Event(Event::Dropped { reason, .. }) => self.told[reason as usize] += 1,
                Output::Event(Event::Opened {
                    flow,
                    protocol,
                    client,
                    ..
                }) => {
                    self.flows.push_back((flow, protocol));
                    if self.flows.len() > 1000 {
                        self.flows.pop_front();
                    }
                    if self.live.iter().any(|live| live.address() == client) {
                        connected.push(flow);
                    }
                }
                Output::Event(Event::Established { .. } | Event::Closed { .. } | Event::Named { .. })
                | Output::Command(_, _)
                | Output::Forward(..) => {}
                Output::Packet(out, mut bytes) => {
                    let (live, now) = (&mut self.live, self.rig.now);
                    tungate_engine::packet::segments(&mut bytes, &out, |packet| hear(live, packet, now));
                }
            }
        }
        for flow in connected {
            self.rig.upstream(flow, UpstreamEvent::Connected);
        }
    }
}

/// Gives a SYN-ACK, a pure ACK or a reset to the live connection that it is for. Not data: its bytes may be anything.
fn hear(live: &mut [TcpClient], packet: &[u8], now: Timestamp) {
    use tungate_tests::packet::{FIN, Message, Reader};
    let Some(Message::Tcp(segment)) = Reader::default().read(packet) else {
        return;
    };
    for client in live {
        if client.is_for(&segment) && segment.payload.is_empty() && !segment.has(FIN) {
            client.handle_segment(&segment, now);
        }
    }
}
