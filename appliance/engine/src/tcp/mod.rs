//! TCP flows: from the client's SYN to the last acknowledgment.
//!
//! ```text
//!  SYN ─▶ Connecting ──connected──▶ Live (SYN-ACK … data … FINs) ──▶ TimeWait ─▶ gone
//!             │ refused: RST or ICMP            │ reset, idle, denied
//!             └────────────▶ gone ◀─────────────┘
//! ```
//!
//! The SYN-ACK waits until the upstream is connected, so the client sees a refused or unreachable target as such. Until
//! then the flow holds what the SYN said and no socket; the client's repeated SYNs change nothing. A connected flow gets
//! a [`Stack`] of its own. Half-closes are carried both ways: the client's FIN becomes [`UpstreamCommand::CloseWrite`]
//! once all bytes before it have been read, the upstream's FIN becomes one to the client behind all bytes given.
//!
//! Segments are judged before the stack sees them:
//!
//! - One that ends beyond the receive buffer is cut there.
//! - One that acknowledges what was never sent is answered by an ACK (RFC 9293, section 3.10.7.4), as is one that
//!   acknowledges what was acknowledged long ago (RFC 5961, section 5.2).
//! - A reset counts when its sequence number is exactly the next one expected; elsewhere in the window it is answered by
//!   a challenge ACK (RFC 5961, section 3.2), outside it is dropped.
//! - A SYN on a live connection is answered by a challenge ACK (RFC 5961, section 4.2); in TIME-WAIT it makes a new flow.
//!
//! Whatever panics all the same ends its own flow only.
//!
//! Timers are the engine's: handshake, idle, half-close (from the last byte on), and how long the client may leave
//! something unacknowledged. TIME-WAIT needs no stack: the flow remembers two sequence numbers for ten seconds.

pub(crate) mod arena;
pub(crate) mod bypass;
mod delay;
mod gaps;
mod ingress;
mod receive;
pub mod recovery;
mod ring;
pub(crate) mod segment;
mod send;
mod stack;
mod turn;

use std::net::{IpAddr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use self::arena::Arena;
use self::bypass::Bypass;
use self::segment::{Control, Fields, Syn, SynPacket};
use self::stack::{Setup, Stack};
use crate::addr::{FlowId, IngressId};
use crate::config::{Clients, Config};
use crate::dns::Conversation;
use crate::event::CloseReason;
use crate::flow::{FlowKey, KeyHasher};
use crate::io::{Progress, Stage, UpstreamCommand, World};
use crate::packet::{TcpFlags, TcpView, ip_header_len};
use crate::policy::RuleRef;
use crate::relay::{Inspected, NameWatcher, Relay};
use crate::time::Timestamp;
use crate::timers::Queued;

/// How long a flow that we closed first answers a client that has missed our last ACK.
const TIME_WAIT: Duration = Duration::from_secs(10);

/// How long the upstream may take to read what a client sent before it reset the connection.
const RESET_LINGER: Duration = Duration::from_secs(10);

/// Challenge ACKs are at least this far apart (RFC 5961, section 7).
const CHALLENGE_INTERVAL: Duration = Duration::from_secs(1);

/// The buffers of a flow that moves no bytes for so long keep none of their memory.
const VACATE_AFTER: Duration = Duration::from_secs(5);

/// What one flow may send before the next has its turn.
const PACKETS_PER_TURN: usize = 8;

/// Buffer sizes by how many flows there are: large while they are few, for speed; small when they are many, for memory.
const BUFFERS_BY_LOAD: [(usize, usize); 4] = [
    (200, 1 << 20),
    (2_000, 256 << 10),
    (20_000, 64 << 10),
    (usize::MAX, 16 << 10),
];

/// The largest send buffer.
const SEND_BUFFER_MAX: usize = 4 << 20;

/// A maximum segment size below this would make more headers than data; Linux's `TCP_MIN_SND_MSS`.
const SEGMENT_SIZE_MIN: u16 = 48;

/// What a SYN without the option means (RFC 9293, section 3.7.1).
const SEGMENT_SIZE_DEFAULT: u16 = 536;

/// One TCP flow.
pub(crate) struct TcpFlow {
    pub(crate) ingress: IngressId,
    pub(crate) client: SocketAddr,
    pub(crate) target: SocketAddr,
    /// What decided that it may be.
    pub(crate) rule: RuleRef,
    pub(crate) queued: Queued,
    pub(crate) dirty: bool,
    /// A timer has come up: one of the flow's limits may be passed.
    pub(crate) due: bool,
    /// It counts among the flows whose upstream is being connected; kept by the engine.
    pub(crate) half_open: bool,
    syn: Syn,
    phase: Phase,
    /// When the phase began.
    pub(crate) since: Timestamp,
    /// When the client last sent anything.
    client_heard: Timestamp,
    /// When bytes last moved, in either direction, or one side closed.
    last_byte: Timestamp,
    /// When the send buffer last was empty and got bytes or a FIN.
    outstanding_since: Timestamp,
    /// When a challenge ACK may be sent again.
    challenge_at: Timestamp,
    /// When bytes had last moved as the buffers' memory was offered to the system.
    vacated: Option<Timestamp>,
    /// Bytes put into the send buffer.
    accepted: u64,
    relay: Relay,
    /// What is asked and answered in it, if it goes to a name server.
    pub(crate) conversation: Option<Box<Conversation>>,
    upstream: Upstream,
    /// The driver knows that bytes wait.
    readable_told: bool,
    /// The driver has found no room.
    room_wanted: bool,
    established: bool,
}

enum Phase {
    /// The upstream is being connected.
    Connecting,
    Live(Box<Stack>),
    /// The kernel carries it.
    Bypassed(Box<Bypass>),
    /// The client has reset the connection; bytes it sent before are still to be read.
    Reset(Box<Stack>),
    /// Ended, but for a client that repeats its FIN.
    TimeWait {
        sequence: u32,
        acknowledgment: u32,
        window: u16,
        until: Timestamp,
    },
    /// It has ended in the midst of a call; its next turn says so.
    Ended(CloseReason),
}

/// The upstream's side of the flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Upstream {
    /// Connecting or connected; `eof`: it has sent FIN; `shut`: it was told of the client's FIN.
    Open { eof: bool, shut: bool },
    /// Told to close or abort; it hears nothing more.
    Gone,
}

/// What a flow needs of its engine for the length of a call.
pub(crate) struct Context<'a> {
    pub(crate) now: Timestamp,
    pub(crate) config: &'a Config,
    pub(crate) hasher: &'a KeyHasher,
    pub(crate) arena: &'a mut Arena,
    /// How many TCP flows are open.
    pub(crate) flows: usize,
    pub(crate) world: &'a mut dyn World,
}

/// Bytes that one direction of a flow may buffer while there are so many flows.
fn buffer_size(flows: usize, config: &Config) -> usize {
    let by_load = BUFFERS_BY_LOAD
        .iter()
        .find(|(below, _)| flows < *below)
        .expect("the last is for any number")
        .1;
    by_load.min(config.limits.buffer_per_flow as usize)
}

/// What became of a flow after its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It has nothing to send until the given time, or until something happens.
    Rest(Timestamp),
    /// It has more to send.
    More,
    /// The device is full.
    Blocked,
    /// It has finished, but lingers in TIME-WAIT until the given time.
    Lingering(Timestamp),
    /// It has ended and can go.
    Ended(CloseReason),
    /// Its TIME-WAIT is over.
    Forgotten,
}

impl TcpFlow {
    /// A flow for a SYN that the policy accepts; its upstream is being opened.
    pub(crate) fn new(
        ingress: IngressId,
        client: SocketAddr,
        target: SocketAddr,
        rule: RuleRef,
        syn: Syn,
        now: Timestamp,
    ) -> Self {
        Self {
            ingress,
            client,
            target,
            rule,
            queued: Queued::NEVER,
            dirty: false,
            due: false,
            half_open: true,
            syn,
            phase: Phase::Connecting,
            since: now,
            client_heard: now,
            last_byte: now,
            outstanding_since: now,
            challenge_at: Timestamp::ZERO,
            vacated: None,
            accepted: 0,
            relay: Relay::inspected_by(|| Inspected::by(NameWatcher::new())),
            conversation: None,
            upstream: Upstream::Open {
                eof: false,
                shut: false,
            },
            readable_told: false,
            room_wanted: true,
            established: false,
        }
    }

    pub(crate) fn key(&self) -> FlowKey {
        FlowKey::Tcp {
            ingress: self.ingress,
            client: self.client,
            target: self.target,
        }
    }

    /// Whether it is the connection between these, as [`TcpFlow::key`] has it.
    #[inline(always)]
    pub(crate) fn is_between(
        &self,
        ingress: IngressId,
        client: (IpAddr, u16),
        target: (IpAddr, u16),
    ) -> bool {
        is_endpoint(&self.client, client) && is_endpoint(&self.target, target) && self.ingress == ingress
    }

    /// Whether its upstream is still being connected.
    pub(crate) fn is_connecting(&self) -> bool {
        match &self.phase {
            Phase::Connecting => true,
            Phase::Bypassed(bypass) => bypass.stage == bypass::Stage::Connecting,
            Phase::Live(_) | Phase::Reset(_) | Phase::TimeWait { .. } | Phase::Ended(_) => false,
        }
    }

    /// Leaves the flow, which has just begun, to the kernel.
    pub(crate) fn bypass(&mut self, syn_len: u8, now: Timestamp) {
        self.phase = Phase::Bypassed(Box::new(Bypass::new(syn_len, now)));
        self.upstream = Upstream::Gone;
    }

    /// Whether the kernel carries it.
    #[inline]
    pub(crate) fn is_bypassed(&self) -> bool {
        matches!(self.phase, Phase::Bypassed(_))
    }

    /// What is known of it if the kernel carries it.
    pub(crate) fn bypass_mut(&mut self) -> Option<&mut Bypass> {
        match &mut self.phase {
            Phase::Bypassed(bypass) => Some(bypass),
            _ => None,
        }
    }

    /// The number of the client's SYN.
    pub(crate) fn initial_sequence(&self) -> u32 {
        self.syn.sequence
    }

    /// Whether only the memory of it is left.
    pub(crate) fn is_time_wait(&self) -> bool {
        match &self.phase {
            Phase::TimeWait { .. } => true,
            Phase::Bypassed(bypass) => bypass.has_ended(),
            Phase::Connecting | Phase::Live(_) | Phase::Reset(_) | Phase::Ended(_) => false,
        }
    }

    /// Whether this SYN asks for another connection than the one this flow stands for, so that this flow has to go. Its
    /// own SYN does not, however late the network repeats it.
    pub(crate) fn is_replaced_by(&self, segment: &TcpView<'_>) -> bool {
        match self.phase {
            Phase::Connecting | Phase::TimeWait { .. } | Phase::Reset(_) | Phase::Ended(_) => {
                segment.sequence != self.syn.sequence
            }
            Phase::Live(_) | Phase::Bypassed(_) => false,
        }
    }

    /// How far it has come; `None` when it has ended, but for its TIME-WAIT.
    pub(crate) fn progress(&self) -> Option<Progress> {
        let stage = match (&self.phase, self.upstream) {
            (Phase::Bypassed(bypass), _) => bypass.progressed()?,
            (Phase::TimeWait { .. } | Phase::Ended(_), _) => return None,
            (Phase::Connecting, _) => Stage::Connecting,
            (Phase::Live(_), _) if !self.established => Stage::Handshake,
            (
                Phase::Live(_),
                Upstream::Open {
                    eof: false,
                    shut: false,
                },
            ) => Stage::Open,
            (
                Phase::Live(_),
                Upstream::Open {
                    eof: false,
                    shut: true,
                },
            ) => Stage::ClientClosed,
            (
                Phase::Live(_),
                Upstream::Open {
                    eof: true,
                    shut: false,
                },
            ) => Stage::UpstreamClosed,
            (
                Phase::Live(_),
                Upstream::Open {
                    eof: true,
                    shut: true,
                }
                | Upstream::Gone,
            )
            | (Phase::Reset(_), _) => Stage::Closing,
        };
        let (to_upstream, to_client) = self.delivered();
        Some(Progress {
            stage,
            to_upstream,
            to_client,
        })
    }

    /// Bytes that the upstream was given, and bytes that the client has acknowledged.
    pub(crate) fn delivered(&self) -> (u64, u64) {
        let queued = match &self.phase {
            Phase::Bypassed(bypass) => return bypass.delivered(self.syn.sequence),
            Phase::Live(stack) | Phase::Reset(stack) => stack.send_queue() as u64,
            Phase::Connecting | Phase::TimeWait { .. } | Phase::Ended(_) => 0,
        };
        (self.relay.given(), self.accepted - queued)
    }

    /// Gives the stack's buffers back, if there are any.
    pub(crate) fn release(self, arena: &mut Arena) {
        match self.phase {
            Phase::Live(stack) | Phase::Reset(stack) => arena.give_back(stack.into_rings()),
            Phase::Connecting | Phase::Bypassed(_) | Phase::TimeWait { .. } | Phase::Ended(_) => {}
        }
    }

    // ---- from the upstream -------------------------------------------------------------------------------------

    /// The upstream is connected: answers the SYN. `false` if there is no memory for it.
    pub(crate) fn handle_connected(&mut self, id: FlowId, cx: &mut Context<'_>) -> bool {
        if !matches!(self.phase, Phase::Connecting) {
            return true;
        }
        let receive = buffer_size(cx.flows, cx.config);
        let send = match cx.config.clients {
            // A path that is long or loses keeps more on its way; what is not needed is not touched.
            Clients::Routed if cx.arena.is_roomy() => (4 * receive).min(SEND_BUFFER_MAX),
            Clients::Routed | Clients::Local => receive,
        };
        let Some(rings) = cx.arena.rings(receive, send) else {
            return false;
        };
        let header_len = ip_header_len(self.client.ip()) as u16;
        let largest = cx.config.mtu - header_len - segment::TCP_HEADER_LEN as u16;
        let client_mss = self
            .syn
            .max_segment_size
            .unwrap_or(SEGMENT_SIZE_DEFAULT)
            .max(SEGMENT_SIZE_MIN);
        let setup = Setup {
            ingress: self.ingress,
            flow: id,
            client: self.client,
            target: self.target,
            syn: self.syn,
            isn: cx
                .hasher
                .initial_sequence(self.client, self.target, cx.now.as_nanos()),
            segment_size: client_mss.min(largest),
            announced_mss: largest,
            congestion: cx.config.congestion.unwrap_or(cx.config.clients.congestion()),
        };
        let stack = Stack::new(rings, setup, cx.now);
        self.phase = Phase::Live(Box::new(stack));
        self.since = cx.now;
        self.last_byte = cx.now;
        true
    }

    /// The upstream has sent FIN.
    pub(crate) fn handle_read_closed(&mut self, now: Timestamp) {
        if let (Upstream::Open { eof, .. }, Phase::Live(stack)) = (&mut self.upstream, &mut self.phase)
            && !*eof
        {
            *eof = true;
            self.last_byte = now;
            if stack.send_queue() == 0 {
                self.outstanding_since = now;
            }
        }
    }

    /// Ends the connection towards the client: sends what its window takes, then RST; or nothing at all if `silent`.
    pub(crate) fn abort(&mut self, silent: bool, cx: &mut Context<'_>) {
        let Phase::Live(stack) = &mut self.phase else {
            return;
        };
        if silent || stack.is_finished() {
            return;
        }
        let (now, world) = (cx.now, &mut *cx.world);
        let sending = catch_unwind(AssertUnwindSafe(|| stack.abort(now, world)));
        if sending.is_err() {
            self.break_down(cx);
        }
    }

    /// The RST that refuses the SYN.
    pub(crate) fn refusal(&self) -> Control {
        Control {
            source: self.target,
            destination: self.client,
            fields: Fields {
                flags: TcpFlags::RST | TcpFlags::ACK,
                sequence: 0,
                acknowledgment: self.syn.sequence.wrapping_add(1),
                window: 0,
            },
        }
    }

    /// The SYN that made the flow, as a packet.
    pub(crate) fn syn_packet(&self) -> SynPacket {
        self.syn.packet(self.client, self.target)
    }

    /// The upstream has ended by itself and needs to be told nothing.
    pub(crate) fn forget_upstream(&mut self) {
        self.upstream = Upstream::Gone;
    }

    /// Tells the upstream to forget the flow, unless it has been told before.
    pub(crate) fn abort_upstream(&mut self, id: FlowId, world: &mut dyn World) {
        if self.upstream != Upstream::Gone {
            self.upstream = Upstream::Gone;
            world.upstream(id, UpstreamCommand::Abort);
        }
    }

    /// A router towards the client carries packets of at most `mtu` bytes (RFC 1191, RFC 8201).
    pub(crate) fn handle_path_mtu(&mut self, mtu: u16) {
        if let Phase::Live(stack) = &mut self.phase {
            stack.limit_segment_size(|header_len| {
                // Below the minimum MTU of the family, someone is playing games (RFC 8201, section 4).
                let floor = if header_len == 20 { 576 } else { 1280 };
                mtu.max(floor) - header_len - segment::TCP_HEADER_LEN as u16
            });
        }
    }

    // ---- lent bytes --------------------------------------------------------------------------------------------

    /// Lends bytes from the client; see [`Engine::read`](crate::Engine::read).
    pub(crate) fn read(&mut self, now: Timestamp, take: impl FnOnce(&[u8]) -> usize) -> usize {
        let (Phase::Live(stack) | Phase::Reset(stack)) = &mut self.phase else {
            return 0;
        };
        if stack.receive_queue() == 0 && !self.relay.has_bytes_before() {
            self.readable_told = false;
            return 0;
        }
        let is_last = stack.has_client_fin() || stack.is_full();
        let relay = &mut self.relay;
        let queue = stack.receive_queue();
        let mut taken = 0;
        if queue == 0 {
            taken = relay.lend(&[], is_last, take).1;
        } else {
            stack.read(|bytes| {
                let (done, given) = relay.lend(bytes, is_last || bytes.len() < queue, take);
                taken = given;
                done
            });
        }
        if taken > 0 {
            self.last_byte = now;
        }
        if stack.receive_queue() == 0 && !self.relay.has_bytes_before() {
            self.readable_told = false;
        }
        taken
    }

    /// Lends room for bytes to the client; see [`Engine::write`](crate::Engine::write).
    pub(crate) fn write(&mut self, now: Timestamp, fill: impl FnOnce(&mut [u8]) -> usize) -> usize {
        let Phase::Live(stack) = &mut self.phase else {
            return 0;
        };
        if stack.room() == 0 {
            self.room_wanted = true;
            return 0;
        }
        if stack.send_queue() == 0 {
            self.outstanding_since = now;
        }
        let filled = stack.write(fill);
        self.accepted += filled as u64;
        if filled > 0 {
            self.last_byte = now;
        }
        filled
    }
}

#[inline(always)]
fn is_endpoint(endpoint: &SocketAddr, (address, port): (IpAddr, u16)) -> bool {
    match (endpoint, address) {
        (SocketAddr::V4(endpoint), IpAddr::V4(address)) => {
            endpoint.port() == port && *endpoint.ip() == address
        }
        (SocketAddr::V6(endpoint), IpAddr::V6(address)) => {
            endpoint.port() == port && *endpoint.ip() == address
        }
        (SocketAddr::V4(_), IpAddr::V6(_)) | (SocketAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

/// How far `to` lies ahead of `from` (RFC 1982); negative if behind.
fn distance(from: u32, to: u32) -> i32 {
    to.wrapping_sub(from) as i32
}
