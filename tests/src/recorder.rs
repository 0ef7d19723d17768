//! A world around an engine that keeps everything, in order.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::ptr::NonNull;

use tungate_engine::dns::Learned;
use tungate_engine::io::{Carriage, Open, PacketOut, UpstreamCommand};
use tungate_engine::packet::segments;
use tungate_engine::{Event, FlowId, PacketIn, ShardId, World};

use crate::packet::{ACK, FIN, Message, RST, Reader, SYN};

/// One thing that an engine wanted done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// A packet, as it left: checksums and cutting are left to the device.
    Packet(PacketOut, Vec<u8>),
    /// A command to an upstream.
    Command(FlowId, Command),
    /// An event.
    Event(Event),
    /// A packet handed to another shard.
    Forward(ShardId, Vec<u8>),
}

/// An [`UpstreamCommand`] that can be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "as in the engine")]
pub enum Command {
    Open(Open),
    Readable,
    Writable,
    CloseWrite,
    Send {
        target: SocketAddr,
        payload: Vec<u8>,
        segment_size: Option<NonZeroU16>,
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
#[derive(Debug, Default)]
pub struct Recorder {
    buffer: Vec<u8>,
    len: usize,
    /// What the engine wanted done, in order.
    pub outputs: Vec<Output>,
    /// Whether the device takes no more bulk packets.
    pub full: bool,
}

impl Recorder {
    /// What the engine wanted done since the last call.
    pub fn take(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }
}

impl World for Recorder {
    fn has_room(&self) -> bool {
        !self.full
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= 65_535, "a packet of {len} bytes");
        // What was there before is neither zero nor the packet before.
        self.buffer.resize(self.buffer.len().max(len), 0xaa);
        self.len = len;
        &mut self.buffer[..len]
    }

    fn send_packet(&mut self, packet: PacketOut) {
        let bytes = self.buffer[..self.len].to_vec();
        self.buffer[..self.len].fill(0xaa);
        self.outputs.push(Output::Packet(packet, bytes));
    }

    fn upstream(&mut self, flow: FlowId, command: UpstreamCommand<'_>) {
        self.outputs.push(Output::Command(flow, command.into()));
    }

    fn event(&mut self, event: &Event) {
        self.outputs.push(Output::Event(event.clone()));
    }

    fn forward(&mut self, shard: ShardId, packet: PacketIn<'_>) {
        self.outputs.push(Output::Forward(shard, packet.bytes.to_vec()));
    }

    // One engine has no others to tell.
    fn learned(&mut self, _: &Learned) {}

    fn vacate(&mut self, memory: NonNull<[u8]>) {
        // SAFETY: the engine has lent it for the call, and nobody else refers to it.
        let memory = unsafe { &mut *memory.as_ptr() };
        memory.fill(0xaa); // whoever reads it all the same is found out
    }
}

impl From<UpstreamCommand<'_>> for Command {
    fn from(command: UpstreamCommand<'_>) -> Self {
        match command {
            UpstreamCommand::Open(open) => Self::Open(open),
            UpstreamCommand::Readable => Self::Readable,
            UpstreamCommand::Writable => Self::Writable,
            UpstreamCommand::CloseWrite => Self::CloseWrite,
            UpstreamCommand::Send {
                target,
                payload,
                segment_size,
                carriage,
            } => Self::Send {
                target,
                payload: payload.to_vec(),
                segment_size,
                carriage,
            },
            UpstreamCommand::Echo {
                sequence,
                payload,
                carriage,
            } => Self::Echo {
                sequence,
                payload: payload.to_vec(),
                carriage,
            },
            UpstreamCommand::Close => Self::Close,
            UpstreamCommand::Abort => Self::Abort,
        }
    }
}

/// One line of a transcript.
impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Packet(out, bytes) => {
                let mut cut = Vec::new();
                let mut bytes = bytes.clone();
                segments(&mut bytes, out, |packet| cut.push(packet.to_vec()));
                write!(f, "out  packet    {}", Line(&cut[0]))?;
                if cut.len() > 1 {
                    write!(f, " and {} more segments", cut.len() - 1)?;
                }
                Ok(())
            }
            Self::Command(flow, command) => {
                write!(f, "out  upstream  #{flow} ")?;
                match command {
                    Command::Open(open) => write!(f, "open {} {}", open.protocol, open.target),
                    Command::Readable => f.write_str("readable"),
                    Command::Writable => f.write_str("writable"),
                    Command::CloseWrite => f.write_str("close-write"),
                    Command::Send { target, payload, .. } => {
                        write!(f, "send {} bytes to {target}", payload.len())
                    }
                    Command::Echo {
                        sequence, payload, ..
                    } => write!(f, "echo {sequence}, {} bytes", payload.len()),
                    Command::Close => f.write_str("close"),
                    Command::Abort => f.write_str("abort"),
                }
            }
            Self::Event(event) => write!(f, "out  event     {event:?}"),
            Self::Forward(shard, packet) => write!(f, "out  forward   to {}: {}", shard.0, Line(packet)),
        }
    }
}

/// Prints a sound packet in one line.
pub struct Line<'a>(pub &'a [u8]);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Reader::default().read(self.0) {
            None => write!(f, "fragment of {} bytes", self.0.len()),
            Some(Message::Tcp(segment)) => {
                write!(f, "{} > {} ", segment.source, segment.destination)?;
                for (flag, name) in [(SYN, "SYN "), (FIN, "FIN "), (RST, "RST "), (ACK, "ACK ")] {
                    if segment.has(flag) {
                        f.write_str(name)?;
                    }
                }
                write!(
                    f,
                    "seq {} ack {} win {} len {}",
                    segment.sequence,
                    segment.acknowledgment,
                    segment.window,
                    segment.payload.len()
                )
            }
            Some(Message::Udp(datagram)) => write!(
                f,
                "{} > {} UDP len {}",
                datagram.source,
                datagram.destination,
                datagram.payload.len()
            ),
            Some(Message::Icmp(icmp)) => write!(
                f,
                "{} > {} ICMP {}/{} {:?} len {}",
                icmp.source,
                icmp.destination,
                icmp.kind,
                icmp.code,
                icmp.rest,
                icmp.payload.len()
            ),
        }
    }
}
