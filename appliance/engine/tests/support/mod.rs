//! An engine with a recording world around it, and a client that writes its packets with etherparse.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::net::{IpAddr, SocketAddr};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use etherparse::{PacketBuilder, TcpHeader, TcpOptionElement};
use tungate_engine::bypass::{BypassOrder, Ends};
use tungate_engine::dns::Learned;
use tungate_engine::io::{Carriage, ChecksumState, Open, PacketOut, UpstreamCommand, UpstreamEvent};
use tungate_engine::packet::{PacketView, TcpView, Transport, segments};
use tungate_engine::policy::PolicySpec;
use tungate_engine::{
    Config, Deadline, Engine, Event, FlowId, IngressId, Input, Judgement, PacketIn, Policy, ShardId,
    Timestamp, World,
};

pub const CLIENT: &str = "10.0.0.2:40001";
pub const TARGET: &str = "192.0.2.7:80";
pub const CLIENT6: &str = "[fd00::2]:40001";
pub const TARGET6: &str = "[2001:db8::7]:80";

/// What the engine wanted done, in a form that can be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Open(Open),
    Readable,
    Writable,
    CloseWrite,
    Send {
        target: SocketAddr,
        payload: Vec<u8>,
        carriage: Carriage,
    },
    Echo {
        sequence: u16,
        payload: Vec<u8>,
        carriage: Carriage,
    },
    Close,
    Abort,
}

/// A world that keeps everything.
#[derive(Default)]
pub struct Recorder {
    buffer: Vec<u8>,
    len: usize,
    /// Packets as they left: checksums and cutting are left to the device.
    pub packets: Vec<(PacketOut, Vec<u8>)>,
    pub commands: Vec<(FlowId, Command)>,
    pub events: Vec<Event>,
    pub orders: Vec<BypassOrder>,
    pub forwarded: Vec<(ShardId, Vec<u8>)>,
    /// Whether each of them had come in fragments.
    pub forwarded_reassembled: Vec<bool>,
    pub learned: Vec<Learned>,
    pub full: bool,
    /// How many bytes upstreams take straight from packets, and those that they have taken.
    pub appetite: usize,
    pub passed: Vec<u8>,
    /// Buffers whose memory was offered to the system.
    pub vacated: usize,
}

impl World for Recorder {
    fn has_room(&self) -> bool {
        !self.full
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.buffer.resize(self.buffer.len().max(len), 0xaa);
        self.len = len;
        &mut self.buffer[..len]
    }

    fn send_packet(&mut self, packet: PacketOut) {
        let bytes = self.buffer[..self.len].to_vec();
        self.packets.push((packet, bytes));
    }

    fn upstream(&mut self, flow: FlowId, command: UpstreamCommand<'_>) {
        let command = match command {
            UpstreamCommand::Open(open) => Command::Open(open),
            UpstreamCommand::Readable => Command::Readable,
            UpstreamCommand::Writable => Command::Writable,
            UpstreamCommand::CloseWrite => Command::CloseWrite,
            UpstreamCommand::Send {
                target,
                payload,
                carriage,
                ..
            } => Command::Send {
                target,
                payload: payload.to_vec(),
                carriage,
            },
            UpstreamCommand::Echo {
                sequence,
                payload,
                carriage,
            } => Command::Echo {
                sequence,
                payload: payload.to_vec(),
                carriage,
            },
            UpstreamCommand::Close => Command::Close,
            UpstreamCommand::Abort => Command::Abort,
        };
        self.commands.push((flow, command));
    }

    fn offer(&mut self, _: FlowId, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.appetite);
        self.appetite -= taken;
        self.passed.extend_from_slice(&bytes[..taken]);
        taken
    }

    fn bypass(&mut self, _: FlowId, _: Ends, order: BypassOrder) {
        self.orders.push(order);
    }

    fn event(&mut self, event: &Event) {
        self.events.push(event.clone());
    }

    fn forward(&mut self, shard: ShardId, packet: PacketIn<'_>) {
        self.forwarded.push((shard, packet.bytes.to_vec()));
        self.forwarded_reassembled.push(packet.reassembled);
    }

    fn learned(&mut self, learned: &Learned) {
        self.learned.push(learned.clone());
    }

    fn vacate(&mut self, memory: NonNull<[u8]>) {
        // SAFETY: the engine has lent it for the call, and nobody else refers to it.
        let memory = unsafe { &mut *memory.as_ptr() };
        memory.fill(0xaa); // whoever reads it all the same is found out
        self.vacated += 1;
    }
}

/// An engine, its world and its time.
pub struct Rig {
    pub engine: Engine,
    pub world: Recorder,
    pub now: Timestamp,
    pub deadline: Option<Deadline>,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(Config::default(), PolicySpec::default())
    }

    pub fn with(mut config: Config, policy: PolicySpec) -> Self {
        config.limits.buffer_bytes = config.limits.buffer_bytes.min(1 << 30);
        let now = Timestamp::ZERO;
        let engine = Engine::new(config, Arc::new(Policy::new(policy)), [7; 32], now);
        Self {
            engine,
            world: Recorder::default(),
            now,
            deadline: None,
        }
    }

    pub fn handle(&mut self, input: Input<'_>) -> Option<Judgement> {
        let judgement = self.engine.handle(self.now, input, &mut self.world);
        self.deadline = self.engine.flush(self.now, &mut self.world);
        judgement
    }

    pub fn packet(&mut self, bytes: &[u8]) -> Judgement {
        let packet = PacketIn {
            ingress: IngressId(0),
            bytes,
            checksum: ChecksumState::Unverified,
            segment_size: None,
            reassembled: false,
        };
        self.handle(Input::Packet(packet)).expect("packets are judged")
    }

    pub fn upstream(&mut self, flow: FlowId, event: UpstreamEvent<'_>) {
        self.handle(Input::Upstream(flow, event));
    }

    pub fn flush(&mut self) {
        self.deadline = self.engine.flush(self.now, &mut self.world);
    }

    /// Lets `time` pass, waking the engine at each of its deadlines.
    pub fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(deadline) = self.deadline
            && deadline.at <= end
        {
            assert!(
                deadline.at > self.now,
                "a busy loop: {deadline:?} at {}",
                self.now
            );
            self.now = deadline.at;
            self.handle(Input::Wakeup);
        }
        self.now = end;
        self.handle(Input::Wakeup);
    }

    /// Everything that waits for the upstream of `flow`.
    pub fn read_all(&mut self, flow: FlowId) -> Vec<u8> {
        let mut all = Vec::new();
        while self.engine.read(self.now, flow, |bytes| {
            all.extend_from_slice(bytes);
            bytes.len()
        }) > 0
        {}
        self.flush();
        all
    }

    /// Gives as much of `bytes` to the client of `flow` as there is room for.
    pub fn write(&mut self, flow: FlowId, mut bytes: &[u8]) -> usize {
        let before = bytes.len();
        loop {
            let filled = self.engine.write(self.now, flow, |space| {
                let filled = space.len().min(bytes.len());
                space[..filled].copy_from_slice(&bytes[..filled]);
                filled
            });
            bytes = &bytes[filled..];
            if filled == 0 || bytes.is_empty() {
                break;
            }
        }
        self.flush();
        before - bytes.len()
    }

    /// Packets since the last call.
    pub fn sent(&mut self) -> Vec<(PacketOut, Vec<u8>)> {
        std::mem::take(&mut self.world.packets)
    }

    /// Segments since the last call, super-packets cut up.
    pub fn segments(&mut self) -> Vec<Segment> {
        let mut all = Vec::new();
        for (out, mut bytes) in self.sent() {
            segments(&mut bytes, &out, |packet| all.extend(Segment::parse(packet)));
        }
        all
    }

    /// The only segment since the last call.
    pub fn segment(&mut self) -> Segment {
        let mut all = self.segments();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    /// Commands since the last call, of whatever flow.
    pub fn commands(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.world.commands)
            .into_iter()
            .map(|(_, command)| command)
            .collect()
    }

    /// Events since the last call.
    pub fn events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.world.events)
    }
}

/// A segment that the engine sent to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgment: u32,
    pub window: u16,
    pub max_segment_size: Option<u16>,
    pub window_scale: Option<u8>,
    pub payload: Vec<u8>,
}

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const PSH: u8 = 8;
pub const ACK: u8 = 16;

impl Segment {
    /// Reads a packet; `None` if it holds no TCP segment.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let view = PacketView::parse(packet).expect("the engine sends sound packets");
        let transport = view.transport().expect("and sound segments");
        view.verify_ip_checksum().expect("with sound checksums");
        view.verify_transport_checksum(&transport)
            .expect("with sound checksums");
        let Transport::Tcp(TcpView {
            source_port,
            destination_port,
            sequence,
            acknowledgment,
            flags,
            window,
            options,
            payload,
            ..
        }) = transport
        else {
            return None;
        };
        Some(Self {
            source: SocketAddr::new(view.source(), source_port),
            destination: SocketAddr::new(view.destination(), destination_port),
            flags: flags.0,
            sequence,
            acknowledgment,
            window,
            max_segment_size: options.max_segment_size,
            window_scale: options.window_scale,
            payload: payload.to_vec(),
        })
    }
}

/// A client's end of one connection, which only does what it is told.
#[derive(Debug, Clone)]
pub struct Client {
    pub address: SocketAddr,
    pub target: SocketAddr,
    /// Next sequence number to send.
    pub sequence: u32,
    /// Next sequence number expected.
    pub expected: u32,
    pub window: u16,
}

impl Client {
    pub fn new(address: &str, target: &str) -> Self {
        let parse = |text: &str| text.parse().expect("a socket address");
        Self {
            address: parse(address),
            target: parse(target),
            sequence: 1000,
            expected: 0,
            window: 65535,
        }
    }

    /// The packet of a segment with these flags and this payload at the present sequence number.
    pub fn segment(&self, flags: u8, payload: &[u8]) -> Vec<u8> {
        self.segment_at(self.sequence, flags, payload)
    }

    pub fn segment_at(&self, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        self.with_options(sequence, flags, &[], payload)
    }

    /// A SYN with the options that every stack sends.
    pub fn syn(&self) -> Vec<u8> {
        self.syn_with(&[
            TcpOptionElement::MaximumSegmentSize(1460),
            TcpOptionElement::SelectiveAcknowledgementPermitted,
            TcpOptionElement::WindowScale(7),
        ])
    }

    pub fn syn_with(&self, options: &[TcpOptionElement]) -> Vec<u8> {
        self.with_options(self.sequence, SYN, options, &[])
    }

    pub fn with_options(
        &self,
        sequence: u32,
        flags: u8,
        options: &[TcpOptionElement],
        payload: &[u8],
    ) -> Vec<u8> {
        let mut header = TcpHeader::new(self.address.port(), self.target.port(), sequence, self.window);
        header.acknowledgment_number = if flags & ACK != 0 { self.expected } else { 0 };
        header.fin = flags & FIN != 0;
        header.syn = flags & SYN != 0;
        header.rst = flags & RST != 0;
        header.psh = flags & PSH != 0;
        header.ack = flags & ACK != 0;
        header.set_options(options).expect("options fit");
        let mut packet = Vec::new();
        match (self.address.ip(), self.target.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let builder = PacketBuilder::ipv4(source.octets(), destination.octets(), 64);
                builder
                    .tcp_header(header)
                    .write(&mut packet, payload)
                    .expect("fits");
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let builder = PacketBuilder::ipv6(source.octets(), destination.octets(), 64);
                builder
                    .tcp_header(header)
                    .write(&mut packet, payload)
                    .expect("fits");
            }
            _ => panic!("one family"),
        }
        packet
    }

    /// Opens a connection through `rig` with an upstream that connects at once.
    pub fn open(address: &str, target: &str, rig: &mut Rig) -> (Self, FlowId) {
        let mut client = Self::new(address, target);
        let flow = client.connect(rig);
        (client, flow)
    }

    /// SYN, upstream connected, SYN-ACK, ACK.
    pub fn connect(&mut self, rig: &mut Rig) -> FlowId {
        let flow = rig.packet(&self.syn()).flow.expect("accepted");
        rig.upstream(flow, UpstreamEvent::Connected);
        self.finish_handshake(rig);
        flow
    }

    /// Takes the SYN-ACK and answers it.
    pub fn finish_handshake(&mut self, rig: &mut Rig) {
        let syn_ack = rig.segment();
        assert_eq!(syn_ack.flags, SYN | ACK);
        assert_eq!(syn_ack.acknowledgment, self.sequence.wrapping_add(1));
        self.sequence = self.sequence.wrapping_add(1);
        self.expected = syn_ack.sequence.wrapping_add(1);
        rig.packet(&self.segment(ACK, &[]));
        rig.commands();
        rig.events();
    }

    /// Sends data.
    pub fn send(&mut self, rig: &mut Rig, payload: &[u8]) -> Judgement {
        let packet = self.segment(ACK | PSH, payload);
        self.sequence = self.sequence.wrapping_add(payload.len() as u32);
        rig.packet(&packet)
    }

    /// Sends FIN.
    pub fn finish(&mut self, rig: &mut Rig) -> Judgement {
        let packet = self.segment(ACK | FIN, &[]);
        self.sequence = self.sequence.wrapping_add(1);
        rig.packet(&packet)
    }

    /// Takes what has arrived in order, acknowledging it all once; says whether FIN has come.
    pub fn receive(&mut self, rig: &mut Rig) -> (Vec<u8>, bool) {
        let mut bytes = Vec::new();
        let mut finished = false;
        let mut any = false;
        for segment in rig.segments() {
            assert_eq!(segment.flags & RST, 0, "unexpected reset: {segment:?}");
            if segment.sequence == self.expected {
                self.expected = self.expected.wrapping_add(segment.payload.len() as u32);
                any |= !segment.payload.is_empty();
                bytes.extend_from_slice(&segment.payload);
                if segment.flags & FIN != 0 {
                    self.expected = self.expected.wrapping_add(1);
                    finished = true;
                    any = true;
                }
            }
        }
        if any {
            rig.packet(&self.segment(ACK, &[]));
        }
        (bytes, finished)
    }
}

/// Bytes that differ from place to place.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 7) as u8)
        .collect()
}
