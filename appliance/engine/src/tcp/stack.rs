//! One TCP endpoint towards a client: the handshake, and then a [`ReceiveHalf`] and a [`SendHalf`] that share its
//! packets.
//!
//! The SYN-ACK waits for the flow's turn and is repeated until the client answers it or the flow's handshake limit is
//! passed. Our initial sequence number is a keyed hash of the 4-tuple and the time (RFC 6528).

use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::time::Duration;

use super::delay::Delay;
use super::distance;
use super::receive::{Answer, ReceiveHalf, Told};
use super::recovery::{CongestionControl, Unacceptable};
use super::ring::Ring;
use super::segment::{Fields, Headers, Syn, TCP_CHECKSUM_OFFSET};
use super::send::{SendHalf, Start};
use crate::addr::{FlowId, IngressId};
use crate::io::{PacketOut, World};
use crate::packet::{TcpFlags, TcpView};
use crate::time::Timestamp;

/// A SYN-ACK is repeated after so long, and then after twice as long each time (RFC 6298, sections 2.1 and 5.5).
const SYN_ACK_TIMEOUT: Duration = Duration::from_secs(1);

/// But at most (RFC 6298, section 2.5).
const SYN_ACK_TIMEOUT_MAX: Duration = Duration::from_secs(60);

/// What decides how a stack is set up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup {
    pub(super) ingress: IngressId,
    pub(super) flow: FlowId,
    pub(super) client: SocketAddr,
    pub(super) target: SocketAddr,
    /// The SYN to answer.
    pub(super) syn: Syn,
    /// Our initial sequence number.
    pub(super) isn: u32,
    /// Payload bytes per packet on the wire towards the client.
    pub(super) segment_size: u16,
    /// The maximum segment size that our SYN-ACK announces.
    pub(super) announced_mss: u16,
    pub(super) congestion: CongestionControl,
}

/// How a connection's packets find their client.
#[derive(Debug)]
pub(super) struct Way {
    pub(super) headers: Headers,
    ingress: IngressId,
    flow: FlowId,
}

impl Way {
    /// What is to be said of a packet with such headers.
    pub(super) fn packet(&self, segment_size: Option<NonZeroU16>) -> PacketOut {
        PacketOut {
            ingress: self.ingress,
            flow: Some(self.flow),
            header_len: self.headers.ip_len(),
            partial_checksum: Some(TCP_CHECKSUM_OFFSET),
            segment_size,
        }
    }
}

/// One TCP endpoint towards a client.
pub(super) struct Stack {
    way: Way,
    syn: Syn,
    isn: u32,
    segment_size: u16,
    announced_mss: u16,
    congestion: CongestionControl,
    receive: ReceiveHalf,
    ring: Ring,
    /// `None` until the client has answered the SYN-ACK.
    send: Option<SendHalf>,
    handshake: Handshake,
    /// One past the highest sequence number sent: SND.NXT at its highest.
    sent: Option<u32>,
    /// The receive half may have something to tell.
    news_wanted: bool,
    owed: Owed,
    delay: Delay,
    /// Our FIN left before the client's came.
    closed_first: bool,
}

/// Part of a segment's text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece<'a> {
    pub(super) sequence: u32,
    pub(super) bytes: &'a [u8],
    /// FIN follows them.
    pub(super) fin: bool,
}

/// SYN-ACKs so far.
#[derive(Debug)]
struct Handshake {
    sent: u8,
    first_at: Timestamp,
    /// When the next is due.
    due: Timestamp,
}

/// An ACK that has not left. It goes with data, or alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owed {
    Nothing,
    /// At the end of the turn.
    AtOnce,
    /// In the first turn from then on.
    Until(Timestamp),
}

impl Owed {
    fn is_overdue(self, now: Timestamp) -> bool {
        matches!(self, Self::Until(at) if at <= now)
    }
}

/// How a flow's turn to send went.
pub(super) enum Sending {
    /// It has more to send.
    More,
    /// It has more to send and the device is full.
    Blocked,
    /// It has sent everything that may be sent, and has a timer that is `due` then.
    Done { due: Option<Timestamp> },
}

impl Stack {
    /// Makes an endpoint that has heard the SYN of `setup`.
    pub(super) fn new((receive, send): (Ring, Ring), setup: Setup, now: Timestamp) -> Self {
        let first = setup.syn.sequence.wrapping_add(1);
        Self {
            receive: ReceiveHalf::new(receive, first, setup.syn.window_scale.is_some()),
            way: Way {
                headers: Headers::new(setup.target, setup.client),
                ingress: setup.ingress,
                flow: setup.flow,
            },
            syn: setup.syn,
            isn: setup.isn,
            segment_size: setup.segment_size,
            announced_mss: setup.announced_mss,
            congestion: setup.congestion,
            ring: send,
            send: None,
            handshake: Handshake {
                sent: 0,
                first_at: now,
                due: now,
            },
            sent: None,
            news_wanted: false,
            owed: Owed::Nothing,
            delay: Delay::new(),
            closed_first: false,
        }
    }

    // ---- from the client ---------------------------------------------------------------------------------------

    /// Takes what a segment acknowledges, once the handshake is complete; `buffer` as in [`SendHalf::on_segment`]. An
    /// error asks for an ACK in return.
    pub(super) fn on_acknowledgment(
        &mut self,
        now: Timestamp,
        segment: &TcpView<'_>,
        buffer: impl FnOnce() -> usize,
    ) -> Result<(), Unacceptable> {
        match &mut self.send {
            Some(send) => send.on_segment(now, segment, &mut self.ring, buffer),
            None => Ok(()),
        }
    }

    /// Whether `segment` answers the SYN-ACK.
    pub(super) fn is_answered_by(&self, segment: &TcpView<'_>) -> bool {
        segment.acknowledgment == self.isn.wrapping_add(1)
    }

    /// Lends the bytes of a segment from where they are, if they are the next and nothing waits before them. Returns how
    /// many have been taken, which are not to be taken again.
    pub(super) fn pass(&mut self, piece: &Piece<'_>, take: impl FnOnce(&[u8]) -> usize) -> usize {
        if !self.is_open() || !self.receive.is_next(piece.sequence, piece.bytes.len()) {
            return 0;
        }
        let taken = take(piece.bytes).min(piece.bytes.len());
        self.receive.skip(taken);
        taken
    }

    /// Takes a segment, of which `piece` is what there is room for and what has not been passed on, and whose
    /// acknowledgment has been taken. It is neither a SYN nor a reset, and acknowledges nothing that was not sent, and the SYN-ACK at least.
    pub(super) fn on_segment(
        &mut self,
        now: Timestamp,
        segment: &TcpView<'_>,
        Piece { sequence, bytes, fin }: Piece<'_>,
        world: &mut dyn World,
    ) {
        if !segment.flags.ack() {
            return; // all but the first do (RFC 9293, section 3.10.7.4)
        }
        if self.send.is_none() {
            debug_assert!(self.is_answered_by(segment));
            if self.receive.accepts(sequence, bytes.len(), fin) {
                self.open(now, segment);
            }
        }
        self.news_wanted = true;
        let had_fin = self.has_client_fin();
        if self.receive.take(now, sequence, bytes, fin) == Answer::Acknowledge {
            self.answer(world);
        }
        if self.has_client_fin() && !had_fin {
            self.closed_first = self.send.as_ref().is_some_and(SendHalf::has_sent_fin);
        }
    }

    /// The handshake is complete: sending begins.
    fn open(&mut self, now: Timestamp, first: &TcpView<'_>) {
        let handshake = &self.handshake;
        let start = Start {
            headers_len: self.way.headers.len(),
            segment_size: self.segment_size,
            isn: self.isn,
            shift: self.syn.window_scale.unwrap_or(0),
            selective: self.syn.sack_permitted,
            handshake_rtt: (handshake.sent == 1).then(|| now.since(handshake.first_at)),
            congestion: self.congestion,
        };
        self.send = Some(SendHalf::new(start, first, &mut self.ring, now));
    }

    /// Acknowledges: at once where bytes are missing, else with data or at the end of the turn.
    fn answer(&mut self, world: &mut dyn World) {
        self.receive.tell();
        if !self.is_open() {
            return self.send_ack(world); // turns are for SYN-ACKs
        }
        self.owed = Owed::AtOnce;
        let block = self.receive.block().filter(|_| self.syn.sack_permitted);
        if let Some((start, end)) = block {
            let mut options = [0; 12];
            options[..2].copy_from_slice(&[5, 10]);
            options[2..6].copy_from_slice(&start.to_be_bytes());
            options[6..10].copy_from_slice(&end.to_be_bytes());
            let ack = self.fields(TcpFlags::ACK, self.receive.told());
            self.send_control(ack, &options, world);
            self.owed = Owed::Nothing;
        }
    }

    // ---- to the client -----------------------------------------------------------------------------------------

    /// Lets it send up to `most` packets, as long as the device has room.
    pub(super) fn send(&mut self, now: Timestamp, most: usize, world: &mut dyn World) -> Sending {
        if self.send.is_none() {
            return self.shake_hands(now, world);
        }
        if self.is_finished() {
            return Sending::Done { due: None };
        }
        if std::mem::take(&mut self.news_wanted) && self.receive.has_news() {
            self.owed = self.owe_ack(now);
            self.receive.tell();
        } else if self.owed.is_overdue(now) {
            self.delay.on_silence();
            self.owed = Owed::AtOnce;
        }
        let Some(send) = &mut self.send else {
            unreachable!("looked above")
        };
        if send.deadline().is_some_and(|due| due <= now) {
            // What it would lead to could not leave, and would be counted as tried.
            if !world.has_room() {
                return Sending::Blocked;
            }
            send.on_timer(now);
        }
        for _ in 0..most {
            if !world.has_room() && (self.owed == Owed::AtOnce || send.may_send()) {
                return Sending::Blocked;
            }
            if !send.send(now, &self.ring, self.receive.told(), &self.way, world) {
                let due = send.deadline();
                if self.owed == Owed::AtOnce {
                    self.owed = Owed::Nothing;
                    let ack = self.fields(TcpFlags::ACK, self.receive.told());
                    self.send_control(ack, &[], world);
                }
                return Sending::Done { due };
            }
            self.owed = Owed::Nothing;
            self.delay.on_answer(now);
            self.sent = Some(send.sequence());
        }
        Sending::More
    }

    /// Until when an ACK of what has come may wait. One small segment's may; that of a second, or of as much as a whole one,
    /// goes (RFC 5681, section 4.2).
    fn owe_ack(&mut self, now: Timestamp) -> Owed {
        let fresh = distance(self.receive.told().acknowledgment, self.receive.expected());
        if fresh == 0 {
            return Owed::AtOnce;
        }
        match self.delay.on_request(now) {
            Some(until)
                if self.owed == Owed::Nothing
                    && fresh < i32::from(self.segment_size)
                    && !self.has_client_fin() =>
            {
                Owed::Until(until)
            }
            Some(_) | None => Owed::AtOnce,
        }
    }

    /// SYN-ACKs, until the client answers one.
    fn shake_hands(&mut self, now: Timestamp, world: &mut dyn World) -> Sending {
        if self.handshake.due <= now {
            if !world.has_room() {
                return Sending::Blocked;
            }
            self.send_syn_ack(world);
            let handshake = &mut self.handshake;
            if handshake.sent == 0 {
                handshake.first_at = now;
            }
            let timeout = SYN_ACK_TIMEOUT * (1 << handshake.sent.min(6));
            handshake.due = now + timeout.min(SYN_ACK_TIMEOUT_MAX);
            handshake.sent = handshake.sent.saturating_add(1);
        }
        Sending::Done {
            due: Some(self.handshake.due),
        }
    }

    /// Has the next turn send the SYN-ACK again, as long as the client has not answered it.
    pub(super) fn repeat_syn_ack(&mut self, now: Timestamp) {
        self.handshake.due = now;
    }

    fn send_syn_ack(&mut self, world: &mut dyn World) {
        let Self {
            syn,
            isn,
            announced_mss,
            ..
        } = *self;
        let mut options = [0; 12];
        let mut len = 0;
        let mut put = |bytes: &[u8]| {
            options[len..len + bytes.len()].copy_from_slice(bytes);
            len += bytes.len();
        };
        let [high, low] = announced_mss.to_be_bytes();
        put(&[2, 4, high, low]);
        if syn.window_scale.is_some() {
            put(&[3, 3, self.receive.shift()]);
        }
        if syn.sack_permitted {
            put(&[4, 2]);
        }
        let syn_ack = Fields {
            sequence: isn,
            // It is not scaled (RFC 7323, section 2.2).
            window: u16::try_from(self.receive.window()).unwrap_or(u16::MAX),
            ..self.fields(TcpFlags::SYN | TcpFlags::ACK, self.receive.told())
        };
        self.send_control(syn_ack, &options[..len.next_multiple_of(4)], world);
        self.sent = Some(isn.wrapping_add(1));
    }

    /// Sends what may be sent as long as the device has room, and RST behind it.
    pub(super) fn abort(&mut self, now: Timestamp, world: &mut dyn World) {
        while self.send.is_some() && world.has_room() && matches!(self.send(now, 1, world), Sending::More) {}
        if self.sent.is_some() {
            let told = self.now_told();
            self.send_control(self.fields(TcpFlags::RST | TcpFlags::ACK, told), &[], world);
        }
    }

    /// Sends an ACK that says how things are, outside its turn.
    pub(super) fn send_ack(&self, world: &mut dyn World) {
        if self.sent.is_some() {
            self.send_control(self.fields(TcpFlags::ACK, self.now_told()), &[], world);
        }
    }

    /// How things are, which is not what the client has been told last.
    pub(super) fn now_told(&self) -> Told {
        Told {
            acknowledgment: self.receive.expected(),
            window: self.receive.window_field(),
        }
    }

    fn fields(&self, flags: u8, told: Told) -> Fields {
        Fields {
            flags,
            sequence: self.sent.unwrap_or(self.isn),
            acknowledgment: told.acknowledgment,
            window: told.window,
        }
    }

    fn send_control(&self, fields: Fields, options: &[u8], world: &mut dyn World) {
        let headers = &self.way.headers;
        headers.write(
            world.packet_buffer(headers.len() + options.len()),
            fields,
            options,
            0,
        );
        world.send_packet(self.way.packet(None));
    }

    /// A router towards the client carries segments of at most `size` bytes of payload.
    pub(super) fn limit_segment_size(&mut self, size_of: impl FnOnce(u16) -> u16) {
        let size = size_of(self.way.headers.ip_len()).min(self.segment_size);
        self.segment_size = size;
        if let Some(send) = &mut self.send {
            send.set_segment_size(size);
        }
    }

    // ---- lent bytes --------------------------------------------------------------------------------------------

    /// Lends the first contiguous bytes received; `take` says how many to forget.
    pub(super) fn read(&mut self, take: impl FnOnce(&[u8]) -> usize) -> usize {
        self.news_wanted = true; // the window may open
        self.receive.read(take)
    }

    /// Lends contiguous room; `fill` says how many bytes it has filled.
    pub(super) fn write(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> usize {
        let Some(send) = &mut self.send else { return 0 };
        let filled = self.ring.write(fill);
        send.give(filled);
        filled
    }

    /// Sends FIN after all bytes given.
    pub(super) fn finish(&mut self) {
        if let Some(send) = &mut self.send {
            send.finish();
        }
    }

    /// Offers the pages of the buffers to the system. To be called when nothing is in them, not even out of order.
    pub(super) fn vacate(&self, world: &mut dyn World) {
        debug_assert!(self.receive_queue() == 0 && self.send_queue() == 0 && !self.has_gaps());
        for pages in [self.receive.pages(), self.ring.pages()] {
            world.vacate(pages);
        }
    }

    /// Gives the buffers back.
    pub(super) fn into_rings(self) -> (Ring, Ring) {
        (self.receive.into_ring(), self.ring)
    }

    // ---- how things are ----------------------------------------------------------------------------------------

    /// The sequence number expected next from the client: RCV.NXT.
    pub(super) fn expected(&self) -> u32 {
        self.receive.expected()
    }

    /// The sequence number behind the last byte from the client that there is room for.
    pub(super) fn limit(&self) -> u32 {
        self.receive.limit()
    }

    /// One past the highest sequence number sent; `None` before the SYN-ACK.
    pub(super) fn sent(&self) -> Option<u32> {
        self.sent
    }

    /// Bytes received in order and not yet read.
    pub(super) fn receive_queue(&self) -> usize {
        self.receive.queue()
    }

    /// Whether bytes wait behind others that have not come.
    pub(super) fn has_gaps(&self) -> bool {
        self.receive.has_gaps()
    }

    /// Size of the receive buffer.
    pub(super) fn capacity(&self) -> usize {
        self.receive.capacity()
    }

    /// Whether the client may send no more before something is read.
    pub(super) fn is_full(&self) -> bool {
        self.receive.window() == 0
    }

    /// Bytes given to it that the client has not acknowledged.
    pub(super) fn send_queue(&self) -> usize {
        self.ring.len()
    }

    /// What the send buffer holds at most.
    pub(super) fn send_limit(&self) -> usize {
        self.ring.limit()
    }

    /// Room for bytes to the client.
    pub(super) fn room(&self) -> usize {
        match &self.send {
            Some(send) if !send.is_finished() => self.ring.limit() - self.ring.len(),
            Some(_) | None => 0,
        }
    }

    /// Whether the handshake is complete.
    pub(super) fn is_open(&self) -> bool {
        self.send.is_some()
    }

    /// When an ACK is due that waits for data to go with.
    pub(super) fn ack_due(&self) -> Option<Timestamp> {
        match self.owed {
            Owed::Until(at) => Some(at),
            Owed::Nothing | Owed::AtOnce => None,
        }
    }

    /// Whether the client does not know yet how far its bytes have come.
    pub(super) fn owes_ack(&self) -> bool {
        self.owed != Owed::Nothing || self.receive.told().acknowledgment != self.receive.expected()
    }

    /// Whether the client's FIN has arrived, after all its bytes.
    pub(super) fn has_client_fin(&self) -> bool {
        self.receive.is_finished()
    }

    /// Whether both sides have closed and each has acknowledged the other's FIN. Then nothing is left but bytes to read.
    pub(super) fn is_finished(&self) -> bool {
        self.has_client_fin() && self.send.as_ref().is_some_and(SendHalf::is_acknowledged)
    }

    /// Whether it is we who have to linger: we closed first, and the client may not have our last ACK.
    pub(super) fn is_time_wait(&self) -> bool {
        self.closed_first
    }

    /// Whether it is open and has neither something to send or to tell nor anything on its way.
    pub(super) fn is_at_rest(&self) -> bool {
        let is_idle = self
            .send
            .as_ref()
            .is_some_and(|send| !send.is_finished() && !send.is_outstanding());
        is_idle && !self.news_wanted && self.owed == Owed::Nothing
    }

    /// Whether something we sent is not acknowledged yet: bytes, SYN or FIN.
    pub(super) fn has_unacknowledged(&self) -> bool {
        self.send.as_ref().is_none_or(SendHalf::is_outstanding)
    }
}
