//! An engine, the world around it and its time, for tests that tell a short story.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tungate_engine::io::{ChecksumState, UpstreamEvent};
use tungate_engine::packet::segments;
use tungate_engine::policy::PolicySpec;
use tungate_engine::{
    Config, Deadline, Engine, Event, FlowId, IngressId, Input, Judgement, PacketIn, Policy, Timestamp,
};

use crate::client::{Manner, Shape, TcpClient};
use crate::packet::{Message, Options, Reader};
use crate::pattern::Pattern;
use crate::recorder::{Command, Output, Recorder};

/// An engine, the world around it and its time.
pub struct Rig {
    /// The engine.
    pub engine: Engine,
    /// What it wanted done.
    pub world: Recorder,
    /// The time.
    pub now: Timestamp,
    /// When the engine wants to be woken.
    pub deadline: Option<Deadline>,
    reader: Reader,
}

impl Rig {
    /// Makes one at time zero.
    pub fn new(config: Config, policy: PolicySpec) -> Self {
        let now = Timestamp::ZERO;
        Self {
            engine: Engine::new(config, Arc::new(Policy::new(policy)), [7; 32], now),
            world: Recorder::default(),
            now,
            deadline: None,
            reader: Reader::default(),
        }
    }

    /// Gives the engine an input, and its turn.
    pub fn input(&mut self, input: Input<'_>) -> Option<Judgement> {
        let judgement = self.engine.handle(self.now, input, &mut self.world);
        self.flush();
        judgement
    }

    /// Gives the engine its turn.
    pub fn flush(&mut self) {
        self.deadline = self.engine.flush(self.now, &mut self.world);
    }

    /// Gives the engine a packet from a client.
    pub fn packet(&mut self, bytes: &[u8]) -> Judgement {
        self.input(Input::Packet(packet_in(bytes)))
            .expect("a packet is judged")
    }

    /// Gives the engine news about an upstream.
    pub fn upstream(&mut self, flow: FlowId, event: UpstreamEvent<'_>) {
        self.input(Input::Upstream(flow, event));
    }

    /// Lets time pass, waking the engine at each of its deadlines.
    pub fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(deadline) = self.deadline
            && deadline.at <= end
        {
            assert!(deadline.at > self.now, "{deadline:?} at {}", self.now);
            self.now = deadline.at;
            self.input(Input::Wakeup);
        }
        self.now = end;
    }

    /// Starts a client's connection; its SYN is in its outbox.
    pub fn client(&self, address: &str, target: &str) -> TcpClient {
        let address: SocketAddr = address.parse().expect("a socket address");
        let target = target.parse().expect("a socket address");
        let pattern = |key| Pattern { key, head: &[] };
        TcpClient::connect(
            (address, target),
            SHAPE,
            (pattern(1), pattern(2)),
            u32::from(address.port()) << 16,
            self.now,
        )
    }

    /// Starts a connection and completes it, with an upstream that connects at once.
    pub fn open(&mut self, address: &str, target: &str) -> (TcpClient, FlowId) {
        let mut client = self.client(address, target);
        let syn = client.take_outbox().remove(0).packet();
        let flow = self.packet(&syn).flow.expect("the SYN is accepted");
        self.upstream(flow, UpstreamEvent::Connected);
        self.converse(&mut client);
        assert!(client.is_connected());
        (client, flow)
    }

    /// Carries segments between `client` and the engine until neither has one. Packets for others are lost.
    pub fn converse(&mut self, client: &mut TcpClient) {
        for _ in 0..10_000 {
            for segment in client.take_outbox() {
                self.packet(&segment.packet());
            }
            let messages = self.messages();
            if messages.is_empty() {
                return;
            }
            for message in messages {
                if let Message::Tcp(segment) = message {
                    client.handle_segment(&segment, self.now);
                }
            }
        }
        panic!("they talk for ever");
    }

    /// Takes all that waits for the upstream of `flow`; returns how many bytes.
    pub fn read_all(&mut self, flow: FlowId) -> usize {
        let mut total = 0;
        loop {
            let taken = self.engine.read(self.now, flow, <[u8]>::len);
            if taken == 0 {
                break;
            }
            total += taken;
        }
        self.flush();
        total
    }

    /// Gives up to `len` bytes from the upstream, the first of which has this `offset`; returns how many were taken.
    pub fn write(&mut self, flow: FlowId, offset: u64, len: usize) -> usize {
        let pattern = Pattern { key: 2, head: &[] };
        let mut total = 0;
        while total < len {
            let filled = self.engine.write(self.now, flow, |space| {
                let filled = space.len().min(len - total);
                pattern.fill(offset + total as u64, &mut space[..filled]);
                filled
            });
            if filled == 0 {
                break;
            }
            total += filled;
        }
        self.flush();
        total
    }

    /// Messages to clients since the last call of this or one of the next; other outputs stay.
    pub fn messages(&mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        let (packets, others) = self
            .world
            .take()
            .into_iter()
            .partition(|output| matches!(output, Output::Packet(..)));
        self.world.outputs = others;
        for output in packets {
            let Output::Packet(out, mut bytes) = output else {
                unreachable!("partitioned above")
            };
            segments(&mut bytes, &out, |packet| {
                messages.extend(self.reader.read(packet))
            });
        }
        messages
    }

    /// Commands to upstreams since the last call; other outputs stay.
    pub fn commands(&mut self) -> Vec<Command> {
        let (commands, others) = self
            .world
            .take()
            .into_iter()
            .partition(|output| matches!(output, Output::Command(..)));
        self.world.outputs = others;
        let command = |output| match output {
            Output::Command(_, command) => Some(command),
            Output::Packet(..) | Output::Event(_) | Output::Forward(..) => None,
        };
        Vec::into_iter(commands).filter_map(command).collect()
    }

    /// Events since the last call; other outputs stay.
    pub fn events(&mut self) -> Vec<Event> {
        let (events, others) = self
            .world
            .take()
            .into_iter()
            .partition(|output| matches!(output, Output::Event(_)));
        self.world.outputs = others;
        let event = |output| match output {
            Output::Event(event) => Some(event),
            Output::Packet(..) | Output::Command(..) | Output::Forward(..) => None,
        };
        Vec::into_iter(events).filter_map(event).collect()
    }
}

/// A client that is like most.
pub const SHAPE: Shape = Shape {
    options: Options {
        max_segment_size: Some(1460),
        window_scale: Some(7),
        sack_permitted: true,
    },
    buffer: 1 << 20,
    largest: 1460,
    manner: Manner::Linux,
};

/// A packet as a plain device gives it.
pub fn packet_in(bytes: &[u8]) -> PacketIn<'_> {
    PacketIn {
        ingress: IngressId(0),
        bytes,
        checksum: ChecksumState::Unverified,
        segment_size: None,
        reassembled: false,
    }
}
