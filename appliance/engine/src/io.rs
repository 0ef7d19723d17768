//! What comes in and goes out: inputs, commands, events, and the world that carries them out.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::addr::{FlowId, IngressId, Protocol, ShardId};
use crate::bypass::{BypassNews, BypassOrder, Ends};
use crate::dns::Learned;
use crate::engine::Engine;
use crate::event::{DropReason, Event};
use crate::policy::{EgressId, Policy, RuleRef};
use crate::time::{Deadline, Timestamp};

/// What the outside world can tell the engine.
#[derive(Debug)]
pub enum Input<'a> {
    /// A packet from a client.
    Packet(PacketIn<'a>),
    /// News about an upstream that the engine asked for. News about a flow that has ended is ignored.
    Upstream(FlowId, UpstreamEvent<'a>),
    /// News about a connection that the kernel carries. If the engine knows none of it, it is ignored.
    Bypass(BypassNews),
    /// Only time has passed; harmless when early.
    Wakeup,
    /// The policy from now on. Flows it denies end with its reason.
    Policy(Arc<Policy>),
    /// Nanoseconds from the Unix epoch to the driver's epoch ([`Timestamp::ZERO`]): the time of day.
    WallClock(i64),
    /// What a client has learned by way of another shard.
    Learned(&'a Learned),
    /// Accept no new flows, let the open ones finish.
    Drain,
}

/// A packet from a client, starting at its IP header.
#[derive(Debug, Clone, Copy)]
pub struct PacketIn<'a> {
    /// Where it came in.
    pub ingress: IngressId,
    /// The packet; what lies behind the IP total length is ignored. TCP super-packets of up to 65,535 bytes are
    /// taken as they are.
    pub bytes: &'a [u8],
    /// What the device knows of the transport checksum.
    pub checksum: ChecksumState,
    /// Payload bytes per datagram where `bytes` is a UDP super-packet (USO); `None` otherwise.
    pub segment_size: Option<NonZeroU16>,
    /// Whether it came in fragments, and a shard has put it together: its sender lets it be fragmented.
    pub reassembled: bool,
}

/// What the device knows of a packet's transport checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum ChecksumState {
    /// It is right, or was never filled in by a sender on this host.
    Trusted,
    /// Nobody has looked: the engine verifies it.
    Unverified,
}

/// News about an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub enum UpstreamEvent<'a> {
    /// The TCP connection is established.
    Connected,
    /// The attempt failed, before [`UpstreamEvent::Connected`].
    Failed(UpstreamError),
    /// The upstream has sent FIN; all bytes before it have been given to [`Engine::write`].
    ReadClosed,
    /// The upstream has reset the connection, or it was lost, after [`UpstreamEvent::Connected`].
    Reset,
    /// A UDP datagram from `source`, or several of `segment_size` bytes each (the last may be shorter).
    Datagram {
        source: SocketAddr,
        #[serde(borrow, with = "serde_bytes")]
        payload: &'a [u8],
        segment_size: Option<NonZeroU16>,
    },
    /// An echo reply from the flow's target.
    EchoReply {
        sequence: u16,
        #[serde(borrow, with = "serde_bytes")]
        payload: &'a [u8],
    },
    /// An ICMP error about something that a UDP or ICMP flow sent to `target`; for ICMP the port is the sequence
    /// number of the echo request. `reporter` is the router or host that says so, where known.
    Error {
        target: SocketAddr,
        reporter: Option<IpAddr>,
        error: IcmpError,
    },
}

/// Why an upstream connection could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum UpstreamError {
    /// The target answered with RST.
    Refused,
    /// A router or this host said that the target cannot be reached.
    Unreachable(Unreachable),
    /// Nothing was heard in time.
    TimedOut,
    /// The egress in between (a proxy) failed or declined.
    Egress,
    /// This host has no more sockets, ports or memory for it.
    Exhausted,
}

/// The codes of destination unreachable that mean the same for ICMP (RFC 792, RFC 1812) and ICMPv6 (RFC 4443).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Unreachable {
    /// No route: ICMP code 0, ICMPv6 code 0.
    Network,
    /// Host or address unreachable: ICMP code 1, ICMPv6 code 3.
    Host,
    /// Protocol unreachable: ICMP code 2; ICMPv6 says parameter problem, code 1.
    Protocol,
    /// Port unreachable: ICMP code 3, ICMPv6 code 4.
    Port,
    /// Administratively prohibited: ICMP code 13, ICMPv6 code 1.
    Prohibited,
}

/// An ICMP error, of either version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub enum IcmpError {
    /// Destination unreachable.
    Unreachable(Unreachable),
    /// Fragmentation needed (RFC 1191) or packet too big (RFC 8201), with the next hop's MTU in bytes.
    PacketTooBig { mtu: u16 },
    /// The hop limit ran out on the way.
    TimeExceeded,
}

/// What the engine wants done with an upstream. After [`UpstreamCommand::Close`] or [`UpstreamCommand::Abort`]
/// the flow has none, and no more commands follow for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub enum UpstreamCommand<'a> {
    /// Open one: connect for TCP (answer with `Connected` or `Failed`), a socket for UDP and ICMP (no answer).
    Open(Open),
    /// Bytes from the client wait: call [`Engine::read`] until it lends nothing, or until the socket blocks and
    /// again when it can be written. Not repeated before the driver has found the flow empty.
    Readable,
    /// There is room again for bytes to the client: call [`Engine::write`]. Given once after connecting, and then
    /// each time after the driver was lent no room.
    Writable,
    /// The client has sent FIN and all its bytes have been read: shut the upstream's write side down.
    CloseWrite,
    /// Send a UDP datagram to `target`, or several of `segment_size` bytes each, like this.
    Send {
        target: SocketAddr,
        payload: &'a [u8],
        segment_size: Option<NonZeroU16>,
        carriage: Carriage,
    },
    /// Send an ICMP echo request to the flow's target, like this.
    Echo {
        sequence: u16,
        payload: &'a [u8],
        carriage: Carriage,
    },
    /// Both directions have ended in order: let the socket go.
    Close,
    /// Reset the connection, or give up connecting.
    Abort,
}

/// What the IP header of a client's packet asks of the one that is sent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carriage {
    /// What the client's packet had left, less one.
    pub hop_limit: u8,
    /// Whether it may only leave whole, by this host and all routers behind it. Where it is too big, the client is to
    /// hear [`IcmpError::PacketTooBig`] (RFC 1191, RFC 8201).
    pub dont_fragment: bool,
}

/// An upstream to open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// Where the client is.
    pub ingress: IngressId,
    /// What to speak.
    pub protocol: Protocol,
    /// The client's address; for ICMP the port is the echo identifier.
    pub client: SocketAddr,
    /// Where to connect: the address the client asked for, or the redirect's. For UDP it is the first datagram's;
    /// a session sends to many. For ICMP the port is 0.
    pub target: SocketAddr,
    /// The named way out; `None` is direct.
    pub egress: Option<EgressId>,
}

/// What became of one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judgement {
    /// Why it was dropped; `None` if it passed: it was understood and acted upon or held.
    pub dropped: Option<DropReason>,
    /// The list entry or rule that decided about this packet or its flow. `None` where neither was asked.
    pub rule: Option<RuleRef>,
    /// The flow it belongs to, if there is one.
    pub flow: Option<FlowId>,
}

/// How far an open flow has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What it does.
    pub stage: Stage,
    /// Payload bytes that upstream was given.
    pub to_upstream: u64,
    /// Payload bytes that were sent to the client and, for TCP, acknowledged.
    pub to_client: u64,
}

/// What an open flow does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Its upstream is being connected.
    Connecting,
    /// The client has been answered, and has not answered yet.
    Handshake,
    /// Bytes may go both ways; sessions always may.
    Open,
    /// The client has closed its side.
    ClientClosed,
    /// The upstream has closed its side.
    UpstreamClosed,
    /// Both have closed, or one has reset it; bytes are still on their way.
    Closing,
}

/// How a packet leaves the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PacketOut {
    /// The ingress of the client it is for.
    pub ingress: IngressId,
    /// The flow it belongs to, if there is one.
    pub flow: Option<FlowId>,
    /// Length of the IP header with extension headers: where the transport header starts.
    pub header_len: u16,
    /// Offset of the checksum field from `header_len` where the field holds only the folded pseudo-header sum and
    /// the device or [`packet::complete_checksum`](crate::packet::complete_checksum) is to finish it. `None`: the
    /// packet is complete.
    pub partial_checksum: Option<u16>,
    /// Transport payload bytes per packet where this is a super-packet for the device or
    /// [`packet::segments`](crate::packet::segments) to cut up; `None`: one packet.
    pub segment_size: Option<NonZeroU16>,
}

/// The engine's side effects: once with sockets, once with queues. Nothing here waits; drivers flush after a step.
pub trait World {
    /// Whether the device takes another bulk packet. While it does not, the engine keeps data in its send buffers
    /// and goes on at a later [`Engine::flush`]. Control packets may still come; room for them is the world's duty.
    fn has_room(&self) -> bool;
    /// Lends a buffer of exactly `len` bytes (at most 65,535) with any content; [`World::send_packet`] follows.
    fn packet_buffer(&mut self, len: usize) -> &mut [u8];
    /// Sends what the engine has written into the buffer just lent.
    fn send_packet(&mut self, packet: PacketOut);
    /// Sends a packet whose parts lie apart: its headers, and its payload in a buffer that may wrap. A world that can
    /// gather them saves the copy.
    fn send_parts(&mut self, packet: PacketOut, headers: &[u8], payload: (&[u8], &[u8])) {
        let (first, second) = payload;
        let buffer = self.packet_buffer(headers.len() + first.len() + second.len());
        let (start, rest) = buffer.split_at_mut(headers.len());
        start.copy_from_slice(headers);
        rest[..first.len()].copy_from_slice(first);
        rest[first.len()..].copy_from_slice(second);
        self.send_packet(packet);
    }
    /// Carries out a command. [`Engine::read`] and [`Engine::write`] are called after the step, not from here.
    fn upstream(&mut self, flow: FlowId, command: UpstreamCommand<'_>);
    /// Offers bytes that a TCP flow's client has sent, the next in order, in the packet that brought them. Returns how
    /// many of them the upstream took, as the caller of [`Engine::read`] does; the engine keeps the others and tells of
    /// them by [`UpstreamCommand::Readable`]. A world that can take them saves a copy.
    fn offer(&mut self, flow: FlowId, bytes: &[u8]) -> usize {
        let _ = (flow, bytes); // they are lent later
        0
    }
    /// Carries out an order about a flow that the kernel carries. Worlds whose engines have no
    /// [`Config::bypass`](crate::Config::bypass) get none.
    fn bypass(&mut self, flow: FlowId, ends: Ends, order: BypassOrder) {
        let _ = (flow, ends, order); // nobody answers
    }
    /// Takes note of something worth counting, logging or checking.
    fn event(&mut self, event: &Event);
    /// Hands a whole packet, reassembled here from fragments, to the shard that owns its flow; this one may be it. A
    /// single shard keeps them.
    fn forward(&mut self, shard: ShardId, packet: PacketIn<'_>);
    /// Hands what a client has just learned to all other shards, as [`Input::Learned`]. A single shard has none to tell.
    fn learned(&mut self, _learned: &Learned) {}
    /// Offers `memory` of an idle flow, whole pages that nobody refers to for the length of the call: what they hold
    /// will not be read before it is written, so the system may have them until then.
    fn vacate(&mut self, memory: NonNull<[u8]>) {
        let _ = memory; // to keep them does no harm
    }
}

/// Feeds one input, carries out all that follows from it, and returns what became of a packet and when to come
/// back. A driver that has several inputs at hand calls [`Engine::handle`] for each and [`Engine::flush`] once.
pub fn step(
    engine: &mut Engine,
    world: &mut dyn World,
    now: Timestamp,
    input: Input<'_>,
) -> (Option<Judgement>, Option<Deadline>) {
    let judgement = engine.handle(now, input, world);
    (judgement, engine.flush(now, world))
}
