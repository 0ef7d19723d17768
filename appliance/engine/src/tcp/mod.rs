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
//! Segments that would hurt the stack never reach it:
//!
//! - One that ends beyond the receive buffer is cut there. The stack checks segments against the window it announced,
//!   shifted by its scale, but the window of a SYN-ACK is not scaled: until its first later ACK it believes it has
//!   announced up to 2^14 times as much, and panics when that much arrives (smoltcp 0.14.0, `enqueue_unallocated`).
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
pub mod recovery;
pub(crate) mod segment;
mod send;
mod stack;

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use self::arena::Arena;
use self::segment::{Control, Syn, SynPacket};
use self::stack::{Link, Sending, Setup, Stack};
use crate::addr::{FlowId, IngressId};
use crate::config::{Clients, Config, Timeouts};
use crate::dns::Conversation;
use crate::event::{CloseReason, DropReason, Event, NameSource};
use crate::flow::{FlowKey, KeyHasher};
use crate::io::{Progress, Stage, UpstreamCommand, World};
use crate::packet::{PacketView, TcpFlags, TcpView, ip_header_len};
use crate::policy::RuleRef;
use crate::relay::{NameWatcher, Relay};
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
    /// One past the highest sequence number of the client's bytes that the stack was given.
    client_end: u32,
    /// When bytes had last moved as the buffers' memory was offered to the system.
    vacated: Option<Timestamp>,
    /// Bytes of the client that have left the receive buffer.
    consumed: u64,
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
    pub(crate) scratch: &'a mut Vec<u8>,
    pub(crate) world: &'a mut dyn World,
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
            client_end: syn.sequence.wrapping_add(1),
            vacated: None,
            consumed: 0,
            accepted: 0,
            relay: Relay::inspected_by(|| Box::new(NameWatcher::new())),
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

    /// Whether its upstream is still being connected.
    pub(crate) fn is_connecting(&self) -> bool {
        matches!(self.phase, Phase::Connecting)
    }

    /// Whether only the memory of it is left.
    pub(crate) fn is_time_wait(&self) -> bool {
        matches!(self.phase, Phase::TimeWait { .. })
    }

    /// Whether this SYN asks for another connection than the one this flow stands for, so that this flow has to go. Its
    /// own SYN does not, however late the network repeats it.
    pub(crate) fn is_replaced_by(&self, segment: &TcpView<'_>) -> bool {
        match self.phase {
            Phase::Connecting | Phase::TimeWait { .. } | Phase::Reset(_) | Phase::Ended(_) => {
                segment.sequence != self.syn.sequence
            }
            Phase::Live(_) => false,
        }
    }

    /// How far it has come; `None` when it has ended, but for its TIME-WAIT.
    pub(crate) fn progress(&self) -> Option<Progress> {
        let stage = match (&self.phase, self.upstream) {
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
            Phase::Live(stack) | Phase::Reset(stack) => stack.send_queue() as u64,
            Phase::Connecting | Phase::TimeWait { .. } | Phase::Ended(_) => 0,
        };
        (self.relay.given(), self.accepted - queued)
    }

    /// Gives the stack's buffers back, if there are any.
    pub(crate) fn release(self, arena: &mut Arena) {
        match self.phase {
            Phase::Live(stack) | Phase::Reset(stack) => arena.give_back(stack.into_buffers()),
            Phase::Connecting | Phase::TimeWait { .. } | Phase::Ended(_) => {}
        }
    }

    // ---- from the client ---------------------------------------------------------------------------------------

    /// Takes a segment of this flow. Returns why it was dropped, if it was.
    pub(crate) fn handle_segment(
        &mut self,
        id: FlowId,
        packet: &PacketView<'_>,
        segment: &TcpView<'_>,
        cx: &mut Context<'_>,
    ) -> Option<DropReason> {
        self.client_heard = cx.now;
        match &mut self.phase {
            Phase::Connecting => self.handle_while_connecting(segment, cx),
            Phase::TimeWait {
                sequence,
                acknowledgment,
                window,
                until,
            } => {
                // RFC 1337: a reset does not cut TIME-WAIT short. All else that takes sequence space is a client
                // that has missed our ACK.
                if segment.flags.rst() {
                    return None;
                }
                if segment.sequence_len() > 0 || segment.sequence != *acknowledgment {
                    *until = cx.now + TIME_WAIT;
                    let ack = (*sequence, *acknowledgment, *window);
                    self.send_ack(ack, None, cx);
                }
                None
            }
            Phase::Reset(_) | Phase::Ended(_) => Some(DropReason::NoFlow),
            Phase::Live(_) => self.handle_while_live(id, packet, segment, cx),
        }
    }

    fn handle_while_connecting(&mut self, segment: &TcpView<'_>, cx: &mut Context<'_>) -> Option<DropReason> {
        let flags = segment.flags;
        if flags.rst() {
            // The client gives up. It has sent a SYN alone, so the number behind it is the only one that fits.
            if segment.sequence != self.syn.sequence.wrapping_add(1) {
                return Some(DropReason::TcpWindow);
            }
            self.phase = Phase::Ended(CloseReason::ClientReset);
            return None;
        }
        if flags.syn() && flags.ack() {
            Control::reset_for(self.client, self.target, segment).send(self.ingress, None, cx.world);
            return Some(DropReason::SplitHandshake);
        }
        if flags.syn() {
            return None; // repeated; the answer waits for the upstream
        }
        Some(DropReason::TcpWindow)
    }

    fn handle_while_live(
        &mut self,
        id: FlowId,
        packet: &PacketView<'_>,
        segment: &TcpView<'_>,
        cx: &mut Context<'_>,
    ) -> Option<DropReason> {
        let Phase::Live(stack) = &mut self.phase else {
            unreachable!("asked of a live flow")
        };
        let expected = next_expected(&self.syn, self.consumed, stack);
        let limit = self
            .syn
            .sequence
            .wrapping_add(1)
            .wrapping_add((self.consumed + stack.capacity() as u64) as u32);
        let flags = segment.flags;
        if let Some(sent) = stack.sent()
            && stack.is_finished()
            && !flags.syn()
        {
            // As in TIME-WAIT: a reset changes nothing any more (RFC 1337), and what is repeated has missed our ACK.
            if segment.sequence_len() > 0 && !flags.rst() {
                let ack = (sent, expected, stack.window_field());
                self.send_ack(ack, Some(id), cx);
            }
            return None;
        }
        if flags.rst() {
            if segment.sequence == expected {
                self.handle_reset(cx);
                return None;
            }
            let in_window = distance(expected, segment.sequence) > 0 && distance(segment.sequence, limit) > 0;
            if in_window {
                self.send_challenge_ack(id, cx);
            }
            return Some(DropReason::TcpWindow);
        }
        if flags.syn() {
            if flags.ack() && !self.established {
                Control::reset_for(self.client, self.target, segment).send(self.ingress, None, cx.world);
                return Some(DropReason::SplitHandshake);
            }
            self.send_challenge_ack(id, cx);
            return None;
        }
        let Some(sent) = stack.sent() else {
            return Some(DropReason::TcpWindow); // the SYN-ACK has not left yet: nothing can answer it
        };
        if flags.ack() && distance(sent, segment.acknowledgment) > 0 {
            if self.established {
                self.send_challenge_ack(id, cx);
            } else {
                Control::reset_for(self.client, self.target, segment).send(self.ingress, None, cx.world);
            }
            return Some(DropReason::TcpWindow);
        }
        let end = segment.sequence.wrapping_add(segment.payload.len() as u32);
        let excess = distance(limit, end);
        let keep = if excess > 0 && !segment.payload.is_empty() {
            let Some(keep) = segment
                .payload
                .len()
                .checked_sub(excess as usize)
                .filter(|keep| *keep > 0)
            else {
                // Wholly beyond the buffer: a window probe, or a peer that ignores the window.
                let ack = (sent, expected, stack.window_field());
                self.send_ack(ack, Some(id), cx);
                return Some(DropReason::TcpWindow);
            };
            Some(keep)
        } else {
            None
        };
        if distance(self.client_end, end) > 0 {
            self.client_end = end;
        }
        // What is far from the window says nothing reliable about what we have sent (RFC 9293, section 3.10.7.4).
        let is_near =
            distance(segment.sequence, limit) >= 0 && distance(expected, end) >= -(stack.capacity() as i32);
        let received = stack.receive_queue();
        let had_fin = stack.has_client_fin();
        let was_finished = stack.is_finished();
        let (now, world, scratch) = (cx.now, &mut *cx.world, &mut *cx.scratch);
        let taking = catch_unwind(AssertUnwindSafe(|| {
            if is_near && flags.ack() {
                stack.on_acknowledgment(now, segment, expected, world)?;
            }
            // A pure ACK in its place has nothing to say to smoltcp.
            if stack.is_open() && segment.sequence_len() == 0 && segment.sequence == expected {
                return Ok(());
            }
            let acknowledgment = stack.acknowledgment_for_shadow(segment.acknowledgment);
            let has_extension_headers = packet.is_ipv6() && packet.transport_offset() != 40;
            let bytes = if keep.is_some() || has_extension_headers || acknowledgment.is_some() {
                let transport = packet.transport_offset();
                segment::rewrite(packet.bytes(), transport, keep, acknowledgment, scratch);
                scratch.as_slice()
            } else {
                packet.bytes()
            };
            stack.on_segment(now, segment, bytes, expected, world);
            Ok(())
        }));
        match taking {
            Ok(Ok(())) => {}
            Ok(Err(recovery::Unacceptable)) => {
                self.send_challenge_ack(id, cx);
                return Some(DropReason::TcpWindow);
            }
            Err(_) => {
                self.break_down(cx);
                return Some(DropReason::Internal);
            }
        }
        if stack.receive_queue() != received || stack.has_client_fin() != had_fin {
            self.last_byte = cx.now;
        }
        if stack.is_finished() && !was_finished {
            let expected = next_expected(&self.syn, self.consumed, stack);
            let sent = stack.sent().unwrap_or(sent);
            if stack.owes_ack(expected) {
                // The stack would send it in its turn, but it gets none any more.
                let ack = (sent, expected, stack.window_field());
                self.send_ack(ack, Some(id), cx);
            }
        }
        self.tell(id, cx);
        keep.map(|_| DropReason::TcpWindow)
    }

    /// The client has reset the connection. What it sent before is still delivered.
    fn handle_reset(&mut self, cx: &mut Context<'_>) {
        if let Phase::Live(stack) = self.take_phase() {
            self.phase = Phase::Reset(stack);
            self.since = cx.now;
        }
    }

    /// The stack has panicked: nothing of it is used again but its buffers.
    fn break_down(&mut self, cx: &mut Context<'_>) {
        if let Phase::Live(stack) = self.take_phase() {
            cx.arena.give_back(stack.into_buffers());
        }
    }

    /// Takes the phase out; what is left says that the flow broke down.
    fn take_phase(&mut self) -> Phase {
        std::mem::replace(&mut self.phase, Phase::Ended(CloseReason::Internal))
    }

    // ---- from the upstream -------------------------------------------------------------------------------------

    /// The upstream is connected: answers the SYN. `false` if there is no memory for it.
    pub(crate) fn handle_connected(&mut self, id: FlowId, flows: usize, cx: &mut Context<'_>) -> bool {
        if !self.is_connecting() {
            return true;
        }
        let by_load = BUFFERS_BY_LOAD
            .iter()
            .find(|(below, _)| flows < *below)
            .expect("the last is for any number")
            .1;
        let receive = by_load.min(cx.config.limits.buffer_per_flow as usize);
        let send = match cx.config.clients {
            Clients::Local => receive,
            // A path that is long or loses keeps more on its way; what is not needed is not touched.
            Clients::Routed => (4 * receive).min(SEND_BUFFER_MAX),
        };
        let Some(buffers) = cx.arena.buffers(receive, send) else {
            return false;
        };
        let header_len = ip_header_len(self.client.ip()) as u16;
        let largest = cx.config.mtu - header_len - segment::TCP_HEADER_LEN as u16;
        let client_mss = self
            .syn
            .max_segment_size
            .unwrap_or(SEGMENT_SIZE_DEFAULT)
            .max(SEGMENT_SIZE_MIN);
        let segment_size = client_mss.min(largest);
        let link = Link::new((self.ingress, id), header_len, segment_size, largest);
        let setup = Setup {
            congestion: cx.config.congestion.unwrap_or(cx.config.clients.congestion()),
            seed: cx
                .hasher
                .sequence_seed(self.client, self.target, cx.now.as_nanos()),
            client: self.client,
            target: self.target,
            syn: Syn {
                max_segment_size: Some(segment_size),
                ..self.syn
            },
        };
        let stack = Stack::new(buffers, link, &setup, cx.now, cx.world);
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
        let expected = next_expected(&self.syn, self.consumed, stack);
        let sending = catch_unwind(AssertUnwindSafe(|| stack.abort(now, expected, world)));
        if sending.is_err() {
            self.break_down(cx);
        }
    }

    /// The RST that refuses the SYN.
    pub(crate) fn refusal(&self) -> Control {
        Control {
            source: self.target,
            destination: self.client,
            flags: TcpFlags::RST | TcpFlags::ACK,
            sequence: 0,
            acknowledgment: self.syn.sequence.wrapping_add(1),
            window: 0,
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
        let is_last = stack.has_client_fin() || stack.window() == 0;
        let relay = &mut self.relay;
        let queue = stack.receive_queue();
        let mut taken = 0;
        if queue == 0 {
            taken = relay.lend(&[], is_last, take).1;
        } else {
            let done = stack.read(|bytes| {
                let (done, given) = relay.lend(bytes, is_last || bytes.len() < queue, take);
                taken = given;
                done
            });
            self.consumed += done as u64;
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

    // ---- its turn ----------------------------------------------------------------------------------------------

    /// Sends what there is to send, tells the driver what it has to know, and says when to come back.
    pub(crate) fn take_turn(&mut self, id: FlowId, cx: &mut Context<'_>) -> Turn {
        if std::mem::take(&mut self.due)
            && let Some(reason) = self.overdue(cx)
        {
            if self.is_time_wait() {
                return Turn::Forgotten;
            }
            let silent = matches!(reason, CloseReason::ConnectTimeout);
            self.abort(silent, cx);
            self.abort_upstream(id, cx.world);
            return Turn::Ended(reason);
        }
        self.tell(id, cx);
        match &mut self.phase {
            Phase::Connecting => Turn::Rest(self.since + cx.config.timeouts.connect),
            Phase::TimeWait { until, .. } => Turn::Rest(*until),
            &mut Phase::Ended(reason) => {
                self.abort_upstream(id, cx.world);
                Turn::Ended(reason)
            }
            Phase::Reset(stack) => {
                if stack.receive_queue() > 0 && self.upstream != Upstream::Gone {
                    return Turn::Rest(self.since + RESET_LINGER);
                }
                self.abort_upstream(id, cx.world);
                Turn::Ended(CloseReason::ClientReset)
            }
            Phase::Live(stack) => {
                let (now, world) = (cx.now, &mut *cx.world);
                match catch_unwind(AssertUnwindSafe(|| stack.send(now, PACKETS_PER_TURN, world))) {
                    Ok(Sending::More) => Turn::More,
                    Ok(Sending::Blocked) => Turn::Blocked,
                    Ok(Sending::Done { due }) => self.end_of_turn(due, cx),
                    Err(_) => {
                        self.break_down(cx);
                        self.abort_upstream(id, cx.world);
                        Turn::Ended(CloseReason::Internal)
                    }
                }
            }
        }
    }

    /// After everything has been sent: whether the flow has ended, or when to come back.
    fn end_of_turn(&mut self, due: Option<Timestamp>, cx: &mut Context<'_>) -> Turn {
        let Phase::Live(stack) = &mut self.phase else {
            unreachable!("only live flows send")
        };
        if self.upstream == Upstream::Gone && stack.is_finished() {
            if !stack.is_time_wait() {
                return Turn::Ended(CloseReason::Finished);
            }
            let acknowledgment = next_expected(&self.syn, self.consumed, stack);
            let sequence = stack.sent().expect("a finished connection has sent its FIN");
            let window = stack.window_field();
            let until = cx.now + TIME_WAIT;
            let time_wait = Phase::TimeWait {
                sequence,
                acknowledgment,
                window,
                until,
            };
            if let Phase::Live(stack) = std::mem::replace(&mut self.phase, time_wait) {
                cx.arena.give_back(stack.into_buffers());
            }
            return Turn::Lingering(until);
        }
        let due = due.unwrap_or(Timestamp::MAX);
        let due = due.min(self.vacate_when_idle(cx));
        Turn::Rest(due.min(self.limit(&cx.config.timeouts).0))
    }

    /// Offers the buffers' memory to the system once the flow is idle and nothing is in them. Returns when to look at
    /// it again.
    fn vacate_when_idle(&mut self, cx: &mut Context<'_>) -> Timestamp {
        let Phase::Live(stack) = &self.phase else {
            return Timestamp::MAX;
        };
        let at = self.last_byte + VACATE_AFTER;
        if at > cx.now {
            return at;
        }
        let expected = next_expected(&self.syn, self.consumed, stack);
        let has_gaps = distance(expected, self.client_end) > 0;
        let is_empty = stack.receive_queue() == 0 && stack.send_queue() == 0 && !has_gaps;
        if self.vacated != Some(self.last_byte) && is_empty {
            self.vacated = Some(self.last_byte);
            stack.vacate(cx.world);
        }
        Timestamp::MAX
    }

    /// Tells the driver, once each: established, bytes wait, there is room, the client has closed, it is over.
    fn tell(&mut self, id: FlowId, cx: &mut Context<'_>) {
        if let Some(name) = self.relay.take_name() {
            cx.world.event(&Event::Named {
                flow: id,
                name,
                source: NameSource::FirstBytes,
            });
        }
        let (Phase::Live(stack) | Phase::Reset(stack)) = &mut self.phase else {
            return;
        };
        if !self.established && stack.is_synchronized() {
            self.established = true;
            cx.world.event(&Event::Established { flow: id });
        }
        if self.established && !matches!(self.upstream, Upstream::Open { eof: false, .. }) {
            stack.finish();
        }
        let Upstream::Open { eof, shut } = &mut self.upstream else {
            return;
        };
        let waits = stack.receive_queue() > 0 || self.relay.has_bytes_before();
        if waits && !self.readable_told {
            self.readable_told = true;
            cx.world.upstream(id, UpstreamCommand::Readable);
        }
        if !waits && !*shut && stack.has_client_fin() {
            *shut = true;
            cx.world.upstream(id, UpstreamCommand::CloseWrite);
        }
        if self.room_wanted && !*eof && self.established && stack.room() * 4 >= stack.send_limit() {
            self.room_wanted = false;
            cx.world.upstream(id, UpstreamCommand::Writable);
        }
        if *eof && *shut {
            self.upstream = Upstream::Gone;
            cx.world.upstream(id, UpstreamCommand::Close);
        }
    }

    /// The earliest of the flow's own limits, and what it is called when it is passed.
    fn limit(&self, timeouts: &Timeouts) -> (Timestamp, CloseReason) {
        match &self.phase {
            Phase::Connecting => (self.since + timeouts.connect, CloseReason::ConnectTimeout),
            Phase::TimeWait { until, .. } => (*until, CloseReason::Finished),
            Phase::Reset(_) => (self.since + RESET_LINGER, CloseReason::ClientReset),
            Phase::Ended(reason) => (Timestamp::MAX, *reason),
            Phase::Live(_) if !self.established => {
                (self.since + timeouts.handshake, CloseReason::HandshakeTimeout)
            }
            Phase::Live(stack) => {
                let is_half_closed =
                    stack.has_client_fin() || !matches!(self.upstream, Upstream::Open { eof: false, .. });
                let silence = if is_half_closed {
                    (
                        self.last_byte + timeouts.half_close,
                        CloseReason::HalfCloseTimeout,
                    )
                } else {
                    (
                        self.last_byte.max(self.client_heard) + timeouts.tcp_idle,
                        CloseReason::IdleTimeout,
                    )
                };
                let unanswered = if stack.has_unacknowledged() {
                    (
                        self.client_heard.max(self.outstanding_since) + timeouts.unacknowledged,
                        CloseReason::ClientUnresponsive,
                    )
                } else {
                    (Timestamp::MAX, CloseReason::ClientUnresponsive)
                };
                if unanswered.0 < silence.0 {
                    unanswered
                } else {
                    silence
                }
            }
        }
    }

    fn overdue(&self, cx: &Context<'_>) -> Option<CloseReason> {
        let (at, reason) = self.limit(&cx.config.timeouts);
        (at <= cx.now).then_some(reason)
    }

    // ---- segments of our own -----------------------------------------------------------------------------------

    fn send_challenge_ack(&mut self, id: FlowId, cx: &mut Context<'_>) {
        let Phase::Live(stack) = &self.phase else { return };
        let Some(sent) = stack.sent() else { return };
        if cx.now < self.challenge_at {
            return;
        }
        self.challenge_at = cx.now + CHALLENGE_INTERVAL;
        let ack = (
            sent,
            next_expected(&self.syn, self.consumed, stack),
            stack.window_field(),
        );
        self.send_ack(ack, Some(id), cx);
    }

    fn send_ack(
        &self,
        (sequence, acknowledgment, window): (u32, u32, u16),
        flow: Option<FlowId>,
        cx: &mut Context<'_>,
    ) {
        Control {
            source: self.target,
            destination: self.client,
            flags: TcpFlags::ACK,
            sequence,
            acknowledgment,
            window,
        }
        .send(self.ingress, flow, cx.world);
    }
}

/// How far `to` lies ahead of `from` (RFC 1982); negative if behind.
fn distance(from: u32, to: u32) -> i32 {
    to.wrapping_sub(from) as i32
}

/// The sequence number expected next from the client: RCV.NXT.
fn next_expected(syn: &Syn, consumed: u64, stack: &Stack) -> u32 {
    let received = consumed + stack.receive_queue() as u64 + u64::from(stack.has_client_fin());
    syn.sequence.wrapping_add(1).wrapping_add(received as u32)
}
