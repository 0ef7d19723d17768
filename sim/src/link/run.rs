//! Clients, a path and an engine on virtual time.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tungate_engine::dns::Learned;
use tungate_engine::io::{ChecksumState, PacketOut, UpstreamCommand, UpstreamEvent, World};
use tungate_engine::packet::TcpFlags;
use tungate_engine::policy::PolicySpec;
use tungate_engine::{
    CloseReason, Config, Engine, Event, FlowId, IngressId, Input, PacketIn, Policy, ShardId, Timestamp,
};

use super::client::{Client, Manner, Stage};
use super::fault::Chance;
use super::lateness::{Lateness, Waker};
use super::pipe::{Pipe, PipeCounts, Shape};
use super::wire::{Header, stream};

const FIRST_PORT: u16 = 40_000;
/// The live driver's timers are as exact as the kernel's default for a thread, and long ones no more than its poll.
const SLEEP: u64 = 50_000;
const LONG: u64 = 20_000_000;
const LONG_SLEEP: u64 = 1_000_000;

/// One connection: when it begins, and what is sent to the client.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Traffic {
    /// From the start of the run to the SYN.
    pub start: Duration,
    /// What the upstream sends before it closes; `u64::MAX`: it always has more.
    pub bytes: u64,
    /// What the client is like.
    pub manner: Manner,
}

/// What one connection has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowOutcome {
    /// How far the client is.
    pub stage: Stage,
    /// Bytes that the client has received in order, each of them compared.
    pub received: u64,
    /// From the SYN until everything had been received, FIN included.
    pub finished_after: Option<Duration>,
    /// Bytes that the upstream has got, each of them compared.
    pub uploaded: u64,
    /// How the engine says it ended.
    pub closed: Option<CloseReason>,
    /// Data segments that the engine has sent.
    pub segments: u64,
    /// Those of them that had been sent before.
    pub retransmitted: u64,
    /// Segments that came to the client and brought nothing new.
    pub duplicates: u64,
}

/// What a run has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The connections, in the order given.
    pub flows: Vec<FlowOutcome>,
    /// The path to the clients.
    pub to_client: PipeCounts,
    /// The path from them.
    pub to_engine: PipeCounts,
}

/// Clients, a path and an engine whose upstreams are at hand, at some point of virtual time.
pub struct Run {
    now: Timestamp,
    to_client: Pipe<Header>,
    to_engine: Pipe<Header>,
    /// What engines and clients have sent, and the path has not taken yet.
    from_engines: Device,
    from_clients: Device,
    /// Moves what is on the path.
    forwarder: Waker,
    clients: Vec<Option<Client>>,
    traffic: Vec<Traffic>,
    /// In the order of their clients.
    senders: Vec<Sender>,
    seed: u64,
    is_v6: bool,
    packet: Vec<u8>,
}

/// Packets that wait until they are taken, and since when; the first has come first.
type Device = VecDeque<(Timestamp, Header)>;

/// An engine, and what is around it.
struct Sender {
    engine: Engine,
    origin: Origin,
    /// What has arrived for it.
    arrived: Device,
    deadline: Option<Timestamp>,
    waker: Waker,
    /// The first of its clients.
    first: usize,
}

impl Run {
    /// Starts one: paths to and from the clients, what the engine is configured with, and what is transferred.
    pub fn new(
        seed: u64,
        (to_client, to_engine): (Shape, Shape),
        config: Config,
        traffic: Vec<Traffic>,
    ) -> Self {
        let run = Self {
            now: Timestamp::ZERO,
            to_client: Pipe::new(to_client, seed),
            to_engine: Pipe::new(to_engine, !seed),
            from_engines: Device::new(),
            from_clients: Device::new(),
            forwarder: Waker::new(None, Chance::new(seed, 0)),
            clients: Vec::new(),
            traffic: Vec::new(),
            senders: Vec::new(),
            seed,
            is_v6: false,
            packet: Vec::new(),
        };
        run.beside(config, traffic)
    }

    /// Another engine sends over the same path.
    #[must_use]
    pub fn beside(mut self, config: Config, traffic: Vec<Traffic>) -> Self {
        let policy = Arc::new(Policy::new(PolicySpec::default()));
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        let first = self.traffic.len();
        self.senders.push(Sender {
            engine: Engine::new(config, policy, key, Timestamp::ZERO),
            origin: Origin::new(first, &traffic),
            arrived: Device::new(),
            deadline: None,
            waker: Waker::new(None, Chance::new(self.seed, 0)),
            first,
        });
        self.clients.extend(traffic.iter().map(|_| None));
        self.traffic.extend(traffic);
        self
    }

    /// Nobody is punctual: what moves the packets of the path, nor the engines given so far.
    #[must_use]
    pub fn late(mut self, forwarder: Lateness, engine: Lateness) -> Self {
        self.forwarder = Waker::new(Some(forwarder), Chance::new(self.seed, 4));
        for (stream, sender) in (5..).zip(&mut self.senders) {
            sender.waker = Waker::new(Some(engine), Chance::new(self.seed, stream));
        }
        self
    }

    /// All connections are IPv6.
    #[must_use]
    pub fn over_ipv6(mut self) -> Self {
        self.is_v6 = true;
        self
    }

    /// Lets time pass until `until` after the start.
    ///
    /// # Panics
    ///
    /// If a byte arrives that is not the one sent at its place.
    pub fn advance(&mut self, until: Duration) {
        let until = Timestamp::ZERO + until;
        while let Some(next) = self.next().filter(|next| *next <= until) {
            self.now = next;
            self.step();
        }
        self.now = until;
    }

    /// Lets time pass until every connection has ended on both sides, or until `limit` after the start.
    pub fn finish(&mut self, limit: Duration) {
        let limit = Timestamp::ZERO + limit;
        while !self.is_over()
            && let Some(next) = self.next().filter(|next| *next <= limit)
        {
            self.now = next;
            self.step();
        }
    }

    /// What it has come to so far.
    pub fn outcome(&self) -> Outcome {
        let flow = |(index, client): (usize, &Option<Client>)| {
            let upstream = self.upstreams().nth(index).expect("one for each client");
            let client = client.as_ref();
            let start = Timestamp::ZERO + self.traffic[index].start;
            FlowOutcome {
                stage: client.map_or(Stage::Connecting, Client::stage),
                received: client.map_or(0, Client::received),
                finished_after: client
                    .and_then(Client::finished_receiving)
                    .map(|at| at.since(start)),
                uploaded: upstream.received,
                closed: upstream.closed,
                segments: upstream.segments,
                retransmitted: upstream.retransmitted,
                duplicates: client.map_or(0, Client::duplicates),
            }
        };
        Outcome {
            flows: self.clients.iter().enumerate().map(flow).collect(),
            to_client: self.to_client.counts(),
            to_engine: self.to_engine.counts(),
        }
    }

    fn upstreams(&self) -> impl Iterator<Item = &Upstream> {
        self.senders.iter().flat_map(|sender| &sender.origin.upstreams)
    }

    fn is_over(&self) -> bool {
        let has_ended = |client: &Client| matches!(client.stage(), Stage::Finished | Stage::Reset);
        self.clients
            .iter()
            .all(|client| client.as_ref().is_some_and(has_ended))
            && self.upstreams().all(|upstream| upstream.closed.is_some())
    }

    fn next(&self) -> Option<Timestamp> {
        let clients = self.clients.iter().zip(&self.traffic);
        let clients = clients.filter_map(|(client, traffic)| match client {
            Some(client) => client.next(),
            None => Some(Timestamp::ZERO + traffic.start),
        });
        let forwarder = self.forwarder_next().into_iter();
        forwarder
            .chain(self.senders.iter().filter_map(Sender::next))
            .chain(clients)
            .min()
    }

    /// When the path's packets are moved on.
    fn forwarder_next(&self) -> Option<Timestamp> {
        let taken = [&self.from_engines, &self.from_clients].map(|device| Some(device.front()?.0));
        let due = [self.to_client.next(), self.to_engine.next()];
        let due = due.into_iter().chain(taken).flatten().min();
        due.map(|due| self.forwarder.wakes(due))
    }

    /// Does all that is due now.
    fn step(&mut self) {
        let now = self.now;
        for index in 0..self.clients.len() {
            self.attend(index);
        }
        if self.forwarder_next().is_some_and(|at| at <= now) {
            self.forward();
        }
        for sender in &mut self.senders {
            if sender.next().is_some_and(|at| at <= now) {
                sender.run(now, &self.clients, &mut self.packet);
                let sent = sender.origin.sent.drain(..);
                self.from_engines.extend(sent.map(|segment| (now, segment)));
            }
        }
    }

    /// Puts what was sent on the path, and hands over what has arrived.
    fn forward(&mut self) {
        let now = self.now;
        self.forwarder.wake(now);
        let header = if self.is_v6 { 40 } else { 20 };
        for (_, segment) in self.from_engines.drain(..) {
            let len = header + 20 + usize::from(segment.len) + if segment.offer.is_some() { 12 } else { 0 };
            self.to_client.send(now, len, segment);
        }
        while let Some((_, segment)) = self.to_client.receive(now) {
            let index = segment.client;
            if let Some(client) = &mut self.clients[index] {
                client.handle(now, &segment);
            }
            self.collect(index);
        }
        for (_, segment) in self.from_clients.drain(..) {
            let client = self.clients[segment.client]
                .as_ref()
                .expect("it has sent something");
            let len = segment.packet_len(client.addresses().0.ip());
            self.to_engine.send(now, len, segment);
        }
        while let Some((_, segment)) = self.to_engine.receive(now) {
            let behind = self
                .senders
                .partition_point(|sender| sender.first <= segment.client);
            self.senders[behind - 1].arrived.push_back((now, segment));
        }
    }

    /// Starts a client whose time has come, or lets it do what is due.
    fn attend(&mut self, index: usize) {
        let now = self.now;
        match &mut self.clients[index] {
            Some(client) if client.next().is_none_or(|at| at > now) => return,
            Some(client) => client.handle_time(now),
            None if Timestamp::ZERO + self.traffic[index].start > now => return,
            none => {
                let port = FIRST_PORT + index as u16;
                let (address, target): (&str, &str) = if self.is_v6 {
                    ("fd00::2", "2001:db8::7")
                } else {
                    ("10.0.0.2", "192.0.2.7")
                };
                let address = SocketAddr::new(address.parse().expect("an address"), port);
                let target = SocketAddr::new(target.parse().expect("an address"), 80);
                // Near the end of the number space every other time.
                let initial = (self.seed as u32).wrapping_mul(0x9e37_79b1) ^ (index as u32) << 31;
                let manner = self.traffic[index].manner;
                *none = Some(Client::connect(index, (address, target), manner, initial, now));
            }
        }
        self.collect(index);
    }

    /// Puts what a client sends on its way.
    fn collect(&mut self, index: usize) {
        let Some(client) = &mut self.clients[index] else {
            return;
        };
        let sent = client.outbox().map(|segment| (self.now, segment));
        self.from_clients.extend(sent);
    }
}

impl Sender {
    /// When the engine has its next turn.
    fn next(&self) -> Option<Timestamp> {
        let arrived = self.arrived.front().map(|(at, _)| *at);
        let due = arrived.into_iter().chain(self.deadline).min();
        due.map(|due| self.waker.wakes(due))
    }

    /// Gives the engine what has arrived, and its turn.
    fn run(&mut self, now: Timestamp, clients: &[Option<Client>], packet: &mut Vec<u8>) {
        self.waker.wake(now);
        for (_, segment) in self.arrived.drain(..) {
            let client = clients[segment.client].as_ref().expect("it has sent something");
            let (from, to) = client.addresses();
            let payload = if segment.len > 0 {
                client.payload(&segment)
            } else {
                &[]
            };
            segment.write(from, to, payload, packet);
            let packet = PacketIn {
                ingress: IngressId(0),
                bytes: packet,
                checksum: ChecksumState::Trusted,
                segment_size: None,
                reassembled: false,
            };
            self.engine.handle(now, Input::Packet(packet), &mut self.origin);
        }
        self.flush(now);
    }

    /// Gives the engine its turn until it has no more to say.
    fn flush(&mut self, now: Timestamp) {
        let mut deadline;
        loop {
            deadline = self.engine.flush(now, &mut self.origin);
            if self.origin.commands.is_empty() {
                break;
            }
            for (flow, command) in std::mem::take(&mut self.origin.commands) {
                self.carry_out(now, flow, command);
            }
        }
        self.deadline = deadline.map(|deadline| {
            let pause = deadline.at.as_nanos().saturating_sub(now.as_nanos());
            let unit = if pause < LONG { SLEEP } else { LONG_SLEEP };
            let pause = pause.div_ceil(unit).saturating_mul(unit);
            Timestamp::from_nanos(now.as_nanos().saturating_add(pause))
        });
    }

    fn carry_out(&mut self, now: Timestamp, flow: FlowId, command: Command) {
        let Self { engine, origin, .. } = self;
        match command {
            Command::Open => {
                engine.handle(now, Input::Upstream(flow, UpstreamEvent::Connected), origin);
            }
            Command::Readable => {
                let upstream = origin.upstream(flow);
                while engine.read(now, flow, |bytes| upstream.take(bytes)) > 0 {}
            }
            Command::Writable => {
                let upstream = origin.upstream(flow);
                while upstream.given < upstream.bytes
                    && engine.write(now, flow, |space| upstream.give(space)) > 0
                {}
                if upstream.given == upstream.bytes {
                    engine.handle(now, Input::Upstream(flow, UpstreamEvent::ReadClosed), origin);
                }
            }
        }
    }
}

enum Command {
    Open,
    Readable,
    Writable,
}

/// The engine's surroundings: upstreams, and what is sent to clients.
struct Origin {
    /// The number of the first of its clients.
    first: usize,
    buffer: Vec<u8>,
    len: usize,
    flows: BTreeMap<FlowId, usize>,
    upstreams: Vec<Upstream>,
    commands: Vec<(FlowId, Command)>,
    sent: Vec<Header>,
}

/// An upstream, and what the engine has sent of its bytes.
struct Upstream {
    index: usize,
    bytes: u64,
    given: u64,
    received: u64,
    closed: Option<CloseReason>,
    initial: u32,
    /// The highest offset sent.
    highest: u64,
    segments: u64,
    retransmitted: u64,
}

impl Origin {
    fn new(first: usize, traffic: &[Traffic]) -> Self {
        let upstream = |(index, traffic): (usize, &Traffic)| Upstream {
            index: first + index,
            bytes: traffic.bytes,
            given: 0,
            received: 0,
            closed: None,
            initial: 0,
            highest: 0,
            segments: 0,
            retransmitted: 0,
        };
        Self {
            first,
            buffer: vec![0; 65_536],
            len: 0,
            flows: BTreeMap::new(),
            upstreams: traffic.iter().enumerate().map(upstream).collect(),
            commands: Vec::new(),
            sent: Vec::new(),
        }
    }

    fn upstream(&mut self, flow: FlowId) -> &mut Upstream {
        &mut self.upstreams[self.flows[&flow] - self.first]
    }
}

impl Upstream {
    /// Where this flow's bytes are in the common stream: no two flows have the same.
    fn place(&self, offset: u64) -> u64 {
        offset + 997 * self.index as u64
    }

    fn give(&mut self, space: &mut [u8]) -> usize {
        let len = (space.len() as u64).min(self.bytes - self.given).min(1 << 15) as usize;
        space[..len].copy_from_slice(stream(self.place(self.given), len));
        self.given += len as u64;
        len
    }

    fn take(&mut self, bytes: &[u8]) -> usize {
        let len = bytes.len().min(1 << 15);
        let expected = stream(self.place(self.received), len);
        assert!(
            bytes[..len] == *expected,
            "bytes from the client at {}",
            self.received
        );
        self.received += len as u64;
        len
    }

    /// Notes what a packet brings, and that its bytes are those of its place.
    fn note(&mut self, segment: &Header, payload: &[u8], size: u64) {
        if segment.flags.syn() {
            self.initial = segment.sequence;
        }
        if payload.is_empty() {
            return;
        }
        let expected = self.initial.wrapping_add(1).wrapping_add(self.highest as u32);
        let ahead = segment.sequence.wrapping_sub(expected) as i32;
        let start = self
            .highest
            .checked_add_signed(ahead.into())
            .expect("a place in the stream");
        let expected = stream(self.place(start), payload.len());
        assert!(payload == expected, "bytes to the client at {start}");
        let end = start + payload.len() as u64;
        let old = end.min(self.highest).saturating_sub(start);
        self.segments += (end - start).div_ceil(size);
        self.retransmitted += old.div_ceil(size);
        self.highest = self.highest.max(end);
    }
}

impl World for Origin {
    fn has_room(&self) -> bool {
        true
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.len = len;
        &mut self.buffer[..len]
    }

    fn send_packet(&mut self, out: PacketOut) {
        let packet = &self.buffer[..self.len];
        let port = usize::from(out.header_len) + 2;
        let port = u16::from_be_bytes([packet[port], packet[port + 1]]);
        let index = usize::from(port - FIRST_PORT);
        let segment = Header::read(packet, index);
        let payload = &packet[packet.len() - usize::from(segment.len)..];
        let size = out
            .segment_size
            .map_or(segment.len.max(1), std::num::NonZeroU16::get);
        self.upstreams[index - self.first].note(&segment, payload, size.into());
        if segment.len <= size {
            return self.sent.push(segment);
        }
        let mut at = 0;
        while at < segment.len {
            let len = size.min(segment.len - at);
            let is_last = at + len == segment.len;
            let only_last = if is_last { 0 } else { TcpFlags::FIN | TcpFlags::PSH };
            self.sent.push(Header {
                sequence: segment.sequence.wrapping_add(at.into()),
                len,
                flags: TcpFlags(segment.flags.0 & !only_last),
                ..segment
            });
            at += len;
        }
    }

    fn upstream(&mut self, flow: FlowId, command: UpstreamCommand<'_>) {
        let command = match command {
            UpstreamCommand::Open(open) => {
                self.flows
                    .insert(flow, usize::from(open.client.port() - FIRST_PORT));
                Command::Open
            }
            UpstreamCommand::Readable => Command::Readable,
            UpstreamCommand::Writable => Command::Writable,
            UpstreamCommand::CloseWrite | UpstreamCommand::Close | UpstreamCommand::Abort => return,
            UpstreamCommand::Send { .. } | UpstreamCommand::Echo { .. } => panic!("there is only TCP"),
        };
        self.commands.push((flow, command));
    }

    fn event(&mut self, event: &Event) {
        if let Event::Closed { flow, reason, .. } = event {
            self.upstream(*flow).closed = Some(*reason);
        }
    }

    fn forward(&mut self, _: ShardId, _: PacketIn<'_>) {
        panic!("there is one shard");
    }

    fn learned(&mut self, _: &Learned) {
        panic!("nobody asks for names");
    }
}
