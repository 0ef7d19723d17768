//! What the engine costs per packet, per connection and per idle flow.
//!
//! `cargo xtask bench engine` runs the cases and prints the table. This program measures one of them, so that each has
//! a process and a heap of its own, and prints its figures by name:
//!
//! ```text
//! receive FLOWS PAYLOAD trusted|unverified
//! transmit FLOWS PAYLOAD
//! open FLOWS
//! memory FLOWS
//! crowd FLOWS
//! ```
//!
//! *Receive* is a client's data segment, from [`Engine::handle`] to the end of the flush that acknowledges it, with the
//! driver reading all of it in between: one ACK per packet, the worst case. *Transmit* is a write by the driver, the
//! flush that sends it, and the client's ACK with its flush. Flows are visited in one pseudo-random order over and over:
//! with many of them, each visit is to a flow that has left the caches. Nobody sends more at once than the flow's buffers
//! hold. A *crowd* is so many flows that their buffers could not all be resident: each is opened, gets one small segment,
//! and stays. Segments are made by patching one in place; what that takes is measured and subtracted. Time is the
//! thread's CPU time.

use std::fs;
use std::hint::black_box;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use etherparse::{PacketBuilder, TcpHeader, TcpHeaderSlice, TcpOptionElement};
use rand_chacha::ChaCha12Rng;
use rand_core::{Rng, SeedableRng};
use rustix::time::{ClockId, clock_gettime};
use tungate_engine::dns::Learned;
use tungate_engine::io::{ChecksumState, PacketOut, UpstreamCommand, UpstreamEvent};
use tungate_engine::policy::PolicySpec;
use tungate_engine::{
    Config, Engine, Event, FlowId, IngressId, Input, Judgement, PacketIn, Policy, ShardId, Timestamp, World,
};

/// Packets to measure over, where they are small: about a second of work.
const PACKETS: usize = 1_000_000;

/// Payload bytes to measure over, where packets are large.
const BYTES: usize = 8 << 30;

/// The most payload that one IPv4 packet carries.
const PAYLOAD_MAX: usize = 65_495;

/// Offset of the TCP header.
const TCP: usize = 20;

/// What was measured, by name.
type Figures = Vec<(&'static str, f64)>;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    let Some(figures) = measure(&words) else {
        eprintln!("this measures one case at a time: run `cargo xtask bench engine`");
        return ExitCode::FAILURE;
    };
    for (name, figure) in figures {
        println!("{name} {figure}");
    }
    ExitCode::SUCCESS
}

fn measure(words: &[&str]) -> Option<Figures> {
    let number = |word: &str| word.parse::<usize>().ok().filter(|number| *number > 0);
    let figures = match *words {
        ["receive", flows, payload, "trusted"] => {
            receive(number(flows)?, number(payload)?, ChecksumState::Trusted)
        }
        ["receive", flows, payload, "unverified"] => {
            receive(number(flows)?, number(payload)?, ChecksumState::Unverified)
        }
        ["transmit", flows, payload] => transmit(number(flows)?, number(payload)?),
        ["open", flows] => open(number(flows)?),
        ["memory", flows] => memory(number(flows)?),
        ["crowd", flows] => crowd(number(flows)?),
        _ => return None,
    };
    Some(figures)
}

// ---- cases -----------------------------------------------------------------------------------------------------

fn receive(flows: usize, payload: usize, checksum: ChecksumState) -> Figures {
    let mut driver = Driver::new();
    let mut connections = driver.open(flows);
    shuffle(&mut connections);
    let mut data = Segment::data();
    // A receive buffer is a ring whose head goes round: it has touched all its memory once it has carried its size.
    for connection in &mut connections {
        let buffer = connection.buffer;
        let mut carried = 0;
        while carried < buffer {
            let len = connection.fitting(PAYLOAD_MAX);
            driver.packet(data.patch(connection, len), checksum);
            driver.read();
            driver.flush();
            carried += len;
        }
    }
    (driver.world.packets, driver.bytes_read) = (0, 0);
    let rounds = rounds(flows, payload);
    let all = nanos_per_visit(&mut connections, rounds, |connection| {
        driver.packet(data.patch(connection, connection.fitting(payload)), checksum);
        driver.read();
        driver.flush();
    });
    let bytes: usize = connections.iter().map(|at| at.fitting(payload)).sum();
    let visits = rounds as u64 + 1;
    assert_eq!(driver.bytes_read, bytes as u64 * visits, "every byte arrived");
    assert_eq!(
        driver.world.packets,
        flows as u64 * visits,
        "every packet was acknowledged"
    );
    let patching = nanos_per_visit(&mut connections, rounds, |connection| {
        black_box(data.patch(connection, connection.fitting(payload)));
    });
    figures_per_packet(all - patching, bytes, flows)
}

fn transmit(flows: usize, payload: usize) -> Figures {
    let mut driver = Driver::new();
    let mut connections = driver.open(flows);
    shuffle(&mut connections);
    let mut ack = Segment::data();
    let source = vec![0; payload];
    driver.world.payload = 0;
    let rounds = rounds(flows, payload);
    let all = nanos_per_visit(&mut connections, rounds, |connection| {
        driver.write(connection, &source[..connection.fitting(payload)]);
        driver.flush();
        driver.packet(ack.patch(connection, 0), ChecksumState::Trusted);
        driver.flush();
    });
    let bytes: usize = connections.iter().map(|at| at.fitting(payload)).sum();
    let visits = rounds as u64 + 1;
    assert_eq!(
        driver.world.payload,
        bytes as u64 * visits,
        "every byte left, and only once"
    );
    let patching = nanos_per_visit(&mut connections, rounds, |connection| {
        black_box(ack.patch(connection, 0));
    });
    figures_per_packet(all - patching, bytes, flows)
}

fn open(flows: usize) -> Figures {
    let mut driver = Driver::new();
    let start = thread_nanos();
    let connections = driver.open(flows);
    let taken = thread_nanos() - start;
    vec![("ns_per_connection", taken as f64 / connections.len() as f64)]
}

fn memory(flows: usize) -> Figures {
    let mut driver = Driver::new();
    let mut segment = Segment::data();
    let before = resident_bytes();
    let mut connections = driver.open(flows);
    let of_the_driver = size_of_val(&connections[..]);
    let idle = resident_bytes() - before - of_the_driver;
    for _ in 0..4 {
        for connection in &mut connections {
            driver.packet(segment.patch(connection, 500), ChecksumState::Trusted);
            driver.read();
            driver.write(connection, &[0; 1400]);
            driver.flush();
            driver.packet(segment.patch(connection, 0), ChecksumState::Trusted);
            driver.flush();
        }
    }
    let used = resident_bytes() - before - of_the_driver;
    vec![
        ("idle_bytes_per_flow", idle as f64 / flows as f64),
        ("used_bytes_per_flow", used as f64 / flows as f64),
    ]
}

fn crowd(flows: usize) -> Figures {
    const PAYLOAD: usize = 60;
    let mut driver = Driver::for_flows(flows);
    let mut data = Segment::data();
    let before = resident_bytes();
    let start = thread_nanos();
    let mut connections = driver.open(flows);
    let opening = thread_nanos() - start;
    let of_the_driver = size_of_val(&connections[..]);
    let idle = resident_bytes() - before - of_the_driver;
    shuffle(&mut connections);
    let start = thread_nanos();
    for connection in &mut connections {
        driver.packet(data.patch(connection, PAYLOAD), ChecksumState::Trusted);
        driver.read();
        driver.flush();
    }
    let receiving = thread_nanos() - start;
    let expected = (flows * PAYLOAD) as u64;
    assert_eq!(driver.bytes_read, expected, "every byte arrived");
    let used = resident_bytes() - before - of_the_driver;
    vec![
        ("ns_per_connection", opening as f64 / flows as f64),
        ("ns_per_packet", receiving as f64 / flows as f64),
        ("idle_bytes_per_flow", idle as f64 / flows as f64),
        ("used_bytes_per_flow", used as f64 / flows as f64),
    ]
}

fn figures_per_packet(nanos: f64, bytes: usize, flows: usize) -> Figures {
    vec![
        ("ns_per_packet", nanos),
        ("payload_bytes_per_packet", bytes as f64 / flows as f64),
    ]
}

// ---- measuring -------------------------------------------------------------------------------------------------

/// How often to visit every flow.
fn rounds(flows: usize, payload: usize) -> usize {
    (PACKETS.min(BYTES / payload) / flows).max(3)
}

/// Visits every connection once to warm up, then `rounds` times; returns the time a visit takes.
fn nanos_per_visit(
    connections: &mut [Connection],
    rounds: usize,
    mut visit: impl FnMut(&mut Connection),
) -> f64 {
    connections.iter_mut().for_each(&mut visit);
    let start = thread_nanos();
    for _ in 0..rounds {
        connections.iter_mut().for_each(&mut visit);
    }
    (thread_nanos() - start) as f64 / (rounds * connections.len()) as f64
}

fn thread_nanos() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What this process holds in memory.
fn resident_bytes() -> usize {
    let text = fs::read_to_string("/proc/self/smaps_rollup").expect("Linux tells");
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:"));
    let kilobytes = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
    let kilobytes: usize = kilobytes.and_then(|number| number.parse().ok()).expect("in kB");
    kilobytes << 10
}

// ---- clients ---------------------------------------------------------------------------------------------------

/// A client's end of a connection.
struct Connection {
    client: [u8; 4],
    port: u16,
    /// Size of the engine's receive buffer, in bytes.
    buffer: usize,
    flow: FlowId,
    /// Next sequence number to send.
    sequence: u32,
    /// Next sequence number expected.
    expected: u32,
}

impl Connection {
    /// As much of `payload` as the engine has room for, on either side.
    fn fitting(&self, payload: usize) -> usize {
        payload.min(self.buffer)
    }

    /// Takes the answer to the SYN.
    fn accept(&mut self, syn_ack: &TcpHeaderSlice<'_>) {
        let shift = syn_ack.options_iterator().find_map(|option| match option {
            Ok(TcpOptionElement::WindowScale(shift)) => Some(shift),
            _ => None,
        });
        // The window of a SYN-ACK is not scaled; the shift is the least that lets it be announced whole.
        self.buffer = match shift {
            None | Some(0) => usize::from(syn_ack.window_size()),
            Some(shift) => 1 << (15 + shift),
        };
        self.sequence = syn_ack.acknowledgment_number();
        self.expected = syn_ack.sequence_number().wrapping_add(1);
    }
}

/// A packet from a client, made for many by patching it.
struct Segment {
    packet: Vec<u8>,
    headers_len: usize,
    /// Sums for the checksums, without the patched fields.
    ip_sum: u32,
    tcp_sum: u32,
}

impl Segment {
    /// The SYN that every stack sends.
    fn syn() -> Self {
        let mut header = TcpHeader::new(0, 443, 0, 65_535);
        header.syn = true;
        let options = [
            TcpOptionElement::MaximumSegmentSize(1460),
            TcpOptionElement::SelectiveAcknowledgementPermitted,
            TcpOptionElement::WindowScale(7),
        ];
        header.set_options(&options).expect("they fit");
        Self::new(header, 0)
    }

    /// Data, or with none an ACK.
    fn data() -> Self {
        let mut header = TcpHeader::new(0, 443, 0, 65_535);
        header.ack = true;
        Self::new(header, PAYLOAD_MAX)
    }

    /// The payload is zeros, which no checksum sees.
    fn new(header: TcpHeader, room: usize) -> Self {
        let target = Ipv4Addr::new(192, 0, 2, 7);
        let headers_len = TCP + header.header_len();
        let mut packet = Vec::with_capacity(headers_len + room);
        PacketBuilder::ipv4([0; 4], target.octets(), 64)
            .tcp_header(header)
            .write(&mut packet, &[])
            .expect("memory takes it");
        for patched in [2..4, 10..12, TCP + 16..TCP + 18] {
            packet[patched].fill(0);
        }
        let ip_sum = sum(&packet[..TCP]);
        let tcp_sum = sum(&packet[TCP..]) + sum(&target.octets()) + 6;
        packet.resize(headers_len + room, 0);
        Self {
            packet,
            headers_len,
            ip_sum,
            tcp_sum,
        }
    }

    /// Makes it the next segment of `connection`, with `payload` bytes.
    fn patch(&mut self, connection: &mut Connection, payload: usize) -> &[u8] {
        let Self {
            packet,
            ip_sum,
            tcp_sum,
            ..
        } = self;
        let len = self.headers_len + payload;
        packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        packet[12..16].copy_from_slice(&connection.client);
        packet[TCP..TCP + 2].copy_from_slice(&connection.port.to_be_bytes());
        packet[TCP + 4..TCP + 8].copy_from_slice(&connection.sequence.to_be_bytes());
        packet[TCP + 8..TCP + 12].copy_from_slice(&connection.expected.to_be_bytes());
        let client = sum(&connection.client);
        let ip_sum = *ip_sum + len as u32 + client;
        let ports_and_numbers = u32::from(connection.port)
            + sum(&connection.sequence.to_be_bytes())
            + sum(&connection.expected.to_be_bytes());
        let tcp_sum = *tcp_sum + (len - TCP) as u32 + client + ports_and_numbers;
        packet[10..12].copy_from_slice(&folded(ip_sum).to_be_bytes());
        packet[TCP + 16..TCP + 18].copy_from_slice(&folded(tcp_sum).to_be_bytes());
        connection.sequence = connection.sequence.wrapping_add(payload as u32);
        &packet[..len]
    }
}

/// The sum of the bytes as big-endian words (RFC 1071).
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks_exact(2);
    words
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum()
}

/// The checksum of what has that sum.
fn folded(sum: u32) -> u16 {
    let once = (sum >> 16) + (sum & 0xffff);
    !(((once >> 16) + once) as u16)
}

fn shuffle(connections: &mut [Connection]) {
    let mut rng = ChaCha12Rng::from_seed([1; 32]);
    for last in (1..connections.len()).rev() {
        let other = rng.next_u64() % (last as u64 + 1);
        connections.swap(last, other as usize);
    }
}

// ---- driver ----------------------------------------------------------------------------------------------------

/// An engine, and what a driver does around it.
struct Driver {
    engine: Engine,
    world: Sink,
    now: Timestamp,
    bytes_read: u64,
}

impl Driver {
    fn new() -> Self {
        Self::with(Config::default())
    }

    /// With limits for so many flows, should the default ones not be enough.
    fn for_flows(flows: usize) -> Self {
        const SMALLEST_BUFFERS: usize = 2 * (16 << 10);
        let mut config = Config::default();
        let limits = &mut config.limits;
        limits.flows = limits.flows.max(flows as u32);
        limits.buffer_bytes = limits.buffer_bytes.max(2 * (flows * SMALLEST_BUFFERS) as u64);
        Self::with(config)
    }

    fn with(config: Config) -> Self {
        let policy = Arc::new(Policy::new(PolicySpec::default()));
        let now = Timestamp::ZERO;
        Self {
            engine: Engine::new(config, policy, [7; 32], now),
            world: Sink {
                buffer: vec![0; 65_535],
                len: 0,
                packets: 0,
                payload: 0,
                readable: Vec::with_capacity(16),
            },
            now,
            bytes_read: 0,
        }
    }

    /// Opens connections from as many endpoints, with upstreams that connect at once.
    fn open(&mut self, flows: usize) -> Vec<Connection> {
        let (mut syn, mut ack) = (Segment::syn(), Segment::data());
        let mut connections = Vec::with_capacity(flows);
        for index in 0..flows {
            // 64 connections of each client.
            let [_, high, middle, low] = (index as u32 / 64 + 2).to_be_bytes();
            let mut connection = Connection {
                client: [10, high, middle, low],
                port: 40_000 + (index % 64) as u16,
                buffer: 0,
                flow: FlowId::new(ShardId(0), 0, 0),
                sequence: 1000,
                expected: 0,
            };
            let judgement = self.packet(syn.patch(&mut connection, 0), ChecksumState::Trusted);
            connection.flow = judgement.flow.expect("the SYN is accepted");
            self.flush();
            let connected = Input::Upstream(connection.flow, UpstreamEvent::Connected);
            self.engine.handle(self.now, connected, &mut self.world);
            self.flush();
            let syn_ack = TcpHeaderSlice::from_slice(&self.world.buffer[TCP..self.world.len]);
            connection.accept(&syn_ack.expect("a SYN-ACK"));
            self.packet(ack.patch(&mut connection, 0), ChecksumState::Trusted);
            self.flush();
            connections.push(connection);
        }
        connections
    }

    fn packet(&mut self, bytes: &[u8], checksum: ChecksumState) -> Judgement {
        let packet = PacketIn {
            ingress: IngressId(0),
            bytes,
            checksum,
            segment_size: None,
            reassembled: false,
        };
        let judgement = self
            .engine
            .handle(self.now, Input::Packet(packet), &mut self.world);
        judgement.expect("packets are judged")
    }

    /// Reads what waits, as the engine asks: until it lends nothing.
    fn read(&mut self) {
        while let Some(flow) = self.world.readable.pop() {
            loop {
                let read = self.engine.read(self.now, flow, |bytes| bytes.len());
                if read == 0 {
                    break;
                }
                self.bytes_read += read as u64;
            }
        }
    }

    fn write(&mut self, connection: &mut Connection, mut bytes: &[u8]) {
        connection.expected = connection.expected.wrapping_add(bytes.len() as u32);
        while !bytes.is_empty() {
            let written = self.engine.write(self.now, connection.flow, |space| {
                let len = space.len().min(bytes.len());
                space[..len].copy_from_slice(&bytes[..len]);
                len
            });
            assert!(written > 0, "there is room");
            bytes = &bytes[written..];
        }
    }

    fn flush(&mut self) {
        self.now = self.now + Duration::from_micros(1);
        self.engine.flush(self.now, &mut self.world);
    }
}

/// A device that takes everything and keeps the last packet.
struct Sink {
    buffer: Vec<u8>,
    len: usize,
    packets: u64,
    /// TCP payload bytes.
    payload: u64,
    readable: Vec<FlowId>,
}

impl World for Sink {
    fn has_room(&self) -> bool {
        true
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.len = len;
        &mut self.buffer[..len]
    }

    fn send_packet(&mut self, packet: PacketOut) {
        let tcp = usize::from(packet.header_len);
        let tcp_header_len = usize::from(self.buffer[tcp + 12] >> 4) * 4;
        self.packets += 1;
        self.payload += (self.len - tcp - tcp_header_len) as u64;
    }

    fn upstream(&mut self, flow: FlowId, command: UpstreamCommand<'_>) {
        match command {
            UpstreamCommand::Readable => self.readable.push(flow),
            UpstreamCommand::Open(_) | UpstreamCommand::Writable => {}
            UpstreamCommand::CloseWrite
            | UpstreamCommand::Send { .. }
            | UpstreamCommand::Echo { .. }
            | UpstreamCommand::Close
            | UpstreamCommand::Abort => unreachable!("no connection ends here: {command:?}"),
        }
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Opened { .. } | Event::Established { .. } => {}
            Event::Dropped { .. } | Event::Closed { .. } | Event::Named { .. } => {
                unreachable!("nothing is lost here: {event:?}")
            }
        }
    }

    fn forward(&mut self, shard: ShardId, _: PacketIn<'_>) {
        unreachable!("there is one shard, not {shard:?}")
    }

    fn learned(&mut self, _: &Learned) {
        unreachable!("nobody asks for names")
    }
}
