//! One TCP endpoint towards a client: smoltcp for the handshake and what the client sends, [`SendHalf`] for the rest.
//!
//! smoltcp walks every socket of a set for every packet and every poll, so each flow has a set of its own, found
//! through our flow table and polled only when that flow has work. This module alone knows smoltcp's types. What it
//! works around, all of it in 0.14.0 and covered by tests of this crate:
//!
//! - As a sender it ignores selective acknowledgments, waits a second at least before it repeats anything, and can hang
//!   for ever when a window closes with data in flight. So it sends no data and no FIN.
//! - Yet it takes no segment that acknowledges what it has not sent. So before it is given one, as many bytes are counted
//!   into its send buffer as the segment acknowledges: they leave it again at once, and nobody touches the memory. Pure
//!   ACKs never reach it. It closes when the client has acknowledged our FIN.
//! - Its interface is told an MTU of 65,535, for super-packets; with that its SYN-ACK announces a segment size of 65,495.
//!   [`Link`] writes the true one over it.
//! - Its initial sequence numbers follow from the interface's seed, and its generator is predictable: the seed is a
//!   keyed hash of the 4-tuple and the time (RFC 6528).
//! - Its clock must not be near zero, which some of its timers take for "unset".

use std::net::SocketAddr;
use std::time::Duration;

use smoltcp::iface::{Config as InterfaceConfig, Interface, PollResult};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{CongestionControl as SmoltcpCongestion, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpListenEndpoint};

use super::arena::{SendRing, Sockets};
use super::recovery::{CongestionControl, Unacceptable};
use super::segment::{self, Control, Syn, TCP_CHECKSUM_OFFSET, TCP_HEADER_LEN};
use super::send::{SendHalf, Start, Told};
use crate::addr::{FlowId, IngressId};
use crate::io::{PacketOut, World};
use crate::packet::{TcpFlags, TcpView};
use crate::time::Timestamp;

/// smoltcp's clock runs this far ahead of the driver's.
const CLOCK_AHEAD: Duration = Duration::from_secs(1);

/// More than any ACK needs: IPv6 header, TCP header, options.
const ACK_LEN_MAX: usize = 40 + 60;

/// How a flow's packets leave, and what they have told the client so far.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) ingress: IngressId,
    pub(super) flow: FlowId,
    /// Payload bytes per packet on the wire towards the client.
    pub(super) segment_size: u16,
    /// The maximum segment size that our SYN-ACK announces.
    pub(super) announced_mss: u16,
    pub(super) header_len: u16,
    /// One past the highest sequence number sent: SND.NXT at its highest.
    pub(super) sent: Option<u32>,
    /// SYN-ACKs sent, and when the first was.
    syn_acks: u32,
    syn_ack_at: Timestamp,
    /// The send half has begun: smoltcp's packets are ACKs.
    is_open: bool,
    /// What its latest ACK says.
    told: Told,
    /// That ACK has not left: it goes with data, or alone at the end of the turn.
    ack_waits: bool,
}

/// One TCP endpoint towards a client.
pub(super) struct Stack {
    interface: Interface,
    sockets: Sockets,
    link: Link,
    ring: SendRing,
    send: Option<SendHalf>,
    setup: Setup,
    /// Sent bytes that smoltcp knows of.
    shadow: u64,
    /// smoltcp believes that the client's window is closed.
    shadow_is_shut: bool,
    /// smoltcp may have something to say.
    poll_wanted: bool,
    /// Our FIN left before the client's came.
    closed_first: bool,
    client_fin: bool,
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

/// What decides how a stack is set up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup {
    pub(super) congestion: CongestionControl,
    pub(super) seed: u64,
    pub(super) client: SocketAddr,
    pub(super) target: SocketAddr,
    /// The SYN to answer.
    pub(super) syn: Syn,
}

impl Link {
    pub(super) fn new(
        (ingress, flow): (IngressId, FlowId),
        header_len: u16,
        segment_size: u16,
        announced_mss: u16,
    ) -> Self {
        Self {
            ingress,
            flow,
            segment_size,
            announced_mss,
            header_len,
            sent: None,
            syn_acks: 0,
            syn_ack_at: Timestamp::ZERO,
            is_open: false,
            told: Told {
                acknowledgment: 0,
                window: 0,
            },
            ack_waits: false,
        }
    }
}

impl Stack {
    /// Makes an endpoint that has heard the SYN of `setup`.
    pub(super) fn new(
        (mut sockets, ring): (Sockets, SendRing),
        link: Link,
        setup: &Setup,
        now: Timestamp,
        world: &mut dyn World,
    ) -> Self {
        let mut config = InterfaceConfig::new(HardwareAddress::Ip);
        config.random_seed = setup.seed;
        let mut interface = Interface::new(config, &mut Shape, instant(now));
        interface.set_any_ip(true);
        let socket = sockets.socket_mut();
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_congestion_control(SmoltcpCongestion::None);
        let endpoint = IpListenEndpoint {
            addr: Some(IpAddress::from(setup.target.ip())),
            port: setup.target.port(),
        };
        socket
            .listen(endpoint)
            .expect("a fresh socket listens on a port other than 0");
        let mut stack = Self {
            interface,
            sockets,
            link,
            ring,
            send: None,
            setup: *setup,
            shadow: 0,
            shadow_is_shut: false,
            poll_wanted: false,
            closed_first: false,
            client_fin: false,
        };
        let syn = setup.syn.packet(setup.client, setup.target);
        stack.ingress(now, syn.bytes(), world);
        stack
    }

    /// Takes what a segment acknowledges, once the send half has begun. An error asks for an ACK in return.
    pub(super) fn on_acknowledgment(
        &mut self,
        now: Timestamp,
        segment: &TcpView<'_>,
        expected: u32,
        world: &mut dyn World,
    ) -> Result<(), Unacceptable> {
        let Some(send) = &mut self.send else { return Ok(()) };
        send.on_segment(now, segment, &mut self.ring)?;
        if send.is_acknowledged() && !self.is_closing() {
            let fin = self.send.as_ref().map_or(0, SendHalf::acknowledged);
            self.synchronize(now, fin, expected, world);
            self.sockets.socket_mut().close();
            self.give_ack(now, fin + 1, expected, world);
        }
        Ok(())
    }

    /// Gives smoltcp a segment, as an IP packet without IPv6 extension headers, of which nothing lies beyond the receive
    /// buffer and whose acknowledgment has been taken. `segment` is what is in it.
    pub(super) fn on_segment(
        &mut self,
        now: Timestamp,
        segment: &TcpView<'_>,
        packet: &[u8],
        expected: u32,
        world: &mut dyn World,
    ) {
        if self.send.is_some() && segment.flags.ack() {
            let told = self.known_to_shadow(segment.acknowledgment);
            self.synchronize(now, told, expected, world);
            self.shadow_is_shut = segment.window == 0;
        }
        self.ingress(now, packet, world);
        if self.sockets.socket().send_queue() > 0 {
            self.give_ack(now, self.shadow, expected, world); // it has not taken the segment
        }
        if self.send.is_none() && self.is_synchronized() {
            self.open(now, segment);
        }
    }

    /// The acknowledgment that a segment must have for smoltcp to take it: `None` if it may be as it is.
    pub(super) fn acknowledgment_for_shadow(&self, acknowledgment: u32) -> Option<u32> {
        let isn = self.send.as_ref()?.isn();
        let known = self.shadow + u64::from(self.is_closing());
        let known = isn.wrapping_add(1).wrapping_add(known as u32);
        // An older one, which a newer segment has overtaken.
        ((acknowledgment.wrapping_sub(known) as i32) < 0).then_some(known)
    }

    /// Whether the handshake is complete and sending has begun.
    pub(super) fn is_open(&self) -> bool {
        self.send.is_some()
    }

    /// Whether the client has closed, or all of it is over, without having been told so.
    pub(super) fn owes_ack(&self, expected: u32) -> bool {
        self.link.ack_waits || self.link.told.acknowledgment != expected
    }

    /// The handshake is complete: sending begins.
    fn open(&mut self, now: Timestamp, first: &TcpView<'_>) {
        let link = &self.link;
        let Some(sent) = link.sent else { return };
        let start = Start {
            source: self.setup.target,
            destination: self.setup.client,
            ingress: link.ingress,
            flow: link.flow,
            header_len: link.header_len,
            segment_size: link.segment_size,
            isn: sent.wrapping_sub(1),
            shift: self.setup.syn.window_scale.unwrap_or(0),
            selective: self.setup.syn.sack_permitted,
            handshake_rtt: (link.syn_acks == 1).then(|| now.since(link.syn_ack_at)),
            congestion: self.setup.congestion,
        };
        self.send = Some(SendHalf::new(start, first, &mut self.ring, now));
        self.shadow_is_shut = first.window == 0;
        self.link.is_open = true;
        self.link.told = Told {
            acknowledgment: self.setup.syn.sequence.wrapping_add(1),
            window: self.window_field(),
        };
    }

    /// The bytes up to `acknowledgment`, which has been sent, counted from the first.
    fn known_to_shadow(&self, acknowledgment: u32) -> u64 {
        let Some(send) = &self.send else { return 0 };
        let known = send.isn().wrapping_add(1).wrapping_add(self.shadow as u32);
        let more = acknowledgment.wrapping_sub(known) as i32;
        (self.shadow + u64::try_from(more).unwrap_or(0)).min(send.acknowledged())
    }

    /// Lets smoltcp know that `bytes` of data have been sent, and that all but what its send buffer holds have been
    /// acknowledged.
    fn synchronize(&mut self, now: Timestamp, bytes: u64, expected: u32, world: &mut dyn World) {
        while self.shadow < bytes {
            if self.shadow_is_shut {
                // It would start to probe.
                self.give_ack(now, self.shadow, expected, world);
            }
            let more = bytes - self.shadow;
            let fill = |space: &mut [u8]| {
                let more = space.len().min(usize::try_from(more).unwrap_or(usize::MAX));
                (more, more as u64)
            };
            let Ok(counted) = self.sockets.socket_mut().send(fill) else {
                return;
            };
            self.shadow += counted;
            if self.shadow < bytes {
                self.give_ack(now, self.shadow, expected, world);
            }
        }
    }

    /// Gives smoltcp an ACK of our making, for `bytes` and an open window.
    fn give_ack(&mut self, now: Timestamp, bytes: u64, expected: u32, world: &mut dyn World) {
        let Some(send) = &self.send else { return };
        let ack = Control {
            source: self.setup.client,
            destination: self.setup.target,
            flags: TcpFlags::ACK,
            sequence: expected,
            acknowledgment: send.isn().wrapping_add(1).wrapping_add(bytes as u32),
            window: u16::MAX,
        };
        let mut packet = [0; ACK_LEN_MAX];
        let packet = &mut packet[..usize::from(self.link.header_len) + TCP_HEADER_LEN];
        ack.write(packet, &[], (&[], &[]));
        self.shadow_is_shut = false;
        self.ingress(now, packet, world);
    }

    /// Gives smoltcp a packet.
    fn ingress(&mut self, now: Timestamp, packet: &[u8], world: &mut dyn World) {
        self.poll_wanted = true;
        let had_fin = self.client_fin;
        let mut port = Port {
            packet: Some(packet),
            link: &mut self.link,
            now,
            world,
            forced: true,
        };
        self.interface
            .poll_ingress_single(instant(now), &mut port, self.sockets.set());
        // Kept, since the state forgets it when the connection is over.
        self.client_fin |= match self.state() {
            State::CloseWait | State::Closing | State::LastAck | State::TimeWait => true,
            State::Closed
            | State::Listen
            | State::SynSent
            | State::SynReceived
            | State::Established
            | State::FinWait1
            | State::FinWait2 => false,
        };
        if self.client_fin && !had_fin {
            self.closed_first = self.send.as_ref().is_some_and(SendHalf::has_sent_fin);
        }
    }

    fn state(&self) -> State {
        self.sockets.socket().state()
    }

    fn is_closing(&self) -> bool {
        !matches!(self.state(), State::Established | State::CloseWait)
    }

    /// Lets smoltcp send one packet, if it has one and the device has room or `forced`. Returns whether it sent.
    fn egress(&mut self, now: Timestamp, forced: bool, world: &mut dyn World) -> bool {
        let mut port = Port {
            packet: None,
            link: &mut self.link,
            now,
            world,
            forced,
        };
        self.interface
            .poll_egress(instant(now), &mut port, self.sockets.set())
            != PollResult::None
    }

    /// Lets it send up to `most` packets, as long as the device has room.
    pub(super) fn send(&mut self, now: Timestamp, most: usize, world: &mut dyn World) -> Sending {
        if self.send.is_none() {
            return self.shake_hands(now, most, world);
        }
        if self.is_finished() {
            return Sending::Done { due: None };
        }
        if std::mem::take(&mut self.poll_wanted) {
            self.egress(now, true, world);
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
            if !world.has_room() && (self.link.ack_waits || send.may_send()) {
                return Sending::Blocked;
            }
            if !send.send(now, &self.ring, self.link.told, world) {
                self.link.send_waiting_ack(&self.setup, world);
                let due = send.deadline();
                return Sending::Done { due };
            }
            self.link.ack_waits = false;
            self.link.sent = Some(send.sequence());
        }
        Sending::More
    }

    /// SYN-ACKs: their timer is smoltcp's.
    fn shake_hands(&mut self, now: Timestamp, most: usize, world: &mut dyn World) -> Sending {
        for _ in 0..most {
            let sent = self.egress(now, false, world);
            let due = self.poll_at(now);
            let at_once = due.is_some_and(|due| due <= now);
            if at_once && !world.has_room() {
                return Sending::Blocked;
            }
            if !sent || !at_once {
                // Where nothing was sent, "at once" is a timer that cannot do what it is for.
                let due = due.map(|due| due.max(now + Duration::from_millis(1)));
                return Sending::Done { due };
            }
        }
        Sending::More
    }

    /// Sends what may be sent as long as the device has room, and RST behind it.
    pub(super) fn abort(&mut self, now: Timestamp, expected: u32, world: &mut dyn World) {
        while self.send.is_some() && world.has_room() && matches!(self.send(now, 1, world), Sending::More) {}
        let Some(sequence) = self.link.sent else { return };
        Control {
            source: self.setup.target,
            destination: self.setup.client,
            flags: TcpFlags::RST | TcpFlags::ACK,
            sequence,
            acknowledgment: expected,
            window: self.window_field(),
        }
        .send(self.link.ingress, Some(self.link.flow), world);
    }

    /// When its timers want it polled; a time not after `now` means at once.
    fn poll_at(&mut self, now: Timestamp) -> Option<Timestamp> {
        let at = self.interface.poll_at(instant(now), self.sockets.set())?;
        let micros = u64::try_from(at.total_micros()).unwrap_or(0);
        Some(Timestamp::from_nanos(micros.saturating_mul(1000)) - CLOCK_AHEAD)
    }

    /// A router towards the client carries segments of at most `size` bytes of payload.
    pub(super) fn limit_segment_size(&mut self, size_of: impl FnOnce(u16) -> u16) {
        let size = size_of(self.link.header_len).min(self.link.segment_size);
        self.link.segment_size = size;
        if let Some(send) = &mut self.send {
            send.set_segment_size(size);
        }
    }

    /// One past the highest sequence number sent; `None` before the SYN-ACK.
    pub(super) fn sent(&self) -> Option<u32> {
        self.link.sent
    }

    /// Bytes received in order and not yet read.
    pub(super) fn receive_queue(&self) -> usize {
        self.sockets.socket().recv_queue()
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

    /// Size of the receive buffer.
    pub(super) fn capacity(&self) -> usize {
        self.sockets.capacity()
    }

    /// The window that the client may send into now, in bytes.
    pub(super) fn window(&self) -> usize {
        self.capacity() - self.receive_queue()
    }

    /// The same as a segment of ours carries it, by the scale that the SYN-ACK announced.
    pub(super) fn window_field(&self) -> u16 {
        let shift = if self.setup.syn.window_scale.is_some() {
            window_shift(self.capacity())
        } else {
            0
        };
        u16::try_from(self.window() >> shift).unwrap_or(u16::MAX)
    }

    /// Lends the first contiguous bytes received; `take` says how many to forget.
    pub(super) fn read(&mut self, take: impl FnOnce(&[u8]) -> usize) -> usize {
        self.poll_wanted = true; // the window may open
        let taken = |bytes: &mut [u8]| {
            let taken = take(bytes).min(bytes.len());
            (taken, taken)
        };
        self.sockets.socket_mut().recv(taken).unwrap_or(0)
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
        debug_assert!(self.receive_queue() == 0 && self.send_queue() == 0);
        for pages in [self.sockets.pages(), self.ring.pages()] {
            world.vacate(pages);
        }
    }

    /// Gives the buffers back.
    pub(super) fn into_buffers(self) -> (Sockets, SendRing) {
        (self.sockets, self.ring)
    }

    /// Whether the handshake is complete.
    pub(super) fn is_synchronized(&self) -> bool {
        match self.state() {
            State::Listen | State::SynSent | State::SynReceived | State::Closed => false,
            State::Established
            | State::FinWait1
            | State::FinWait2
            | State::CloseWait
            | State::Closing
            | State::LastAck
            | State::TimeWait => true,
        }
    }

    /// Whether the client's FIN has arrived, after all its bytes.
    pub(super) fn has_client_fin(&self) -> bool {
        self.client_fin
    }

    /// Whether both sides have closed and each has acknowledged the other's FIN. Then nothing is left but bytes to read,
    /// and segments and time are to be kept from it: it would answer by RST, or throw the bytes away after TIME-WAIT.
    pub(super) fn is_finished(&self) -> bool {
        matches!(self.state(), State::TimeWait | State::Closed)
    }

    /// Whether it is we who have to linger: we closed first, and the client may not have our last ACK.
    pub(super) fn is_time_wait(&self) -> bool {
        match self.state() {
            State::TimeWait => true,
            State::Closed => self.closed_first,
            State::Listen
            | State::SynSent
            | State::SynReceived
            | State::Established
            | State::FinWait1
            | State::FinWait2
            | State::CloseWait
            | State::Closing
            | State::LastAck => false,
        }
    }

    /// Whether something we sent is not acknowledged yet: bytes, SYN or FIN.
    pub(super) fn has_unacknowledged(&self) -> bool {
        match &self.send {
            Some(send) => send.is_outstanding(),
            None => self.state() == State::SynReceived,
        }
    }
}

/// smoltcp's time for ours.
fn instant(now: Timestamp) -> Instant {
    let micros = (now + CLOCK_AHEAD).as_nanos() / 1000;
    Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
}

/// The device that smoltcp sees for the length of one poll.
struct Port<'a> {
    packet: Option<&'a [u8]>,
    link: &'a mut Link,
    now: Timestamp,
    world: &'a mut dyn World,
    forced: bool,
}

struct Receive<'a>(&'a [u8]);

struct Transmit<'a> {
    link: &'a mut Link,
    now: Timestamp,
    world: &'a mut dyn World,
}

impl Device for Port<'_> {
    type RxToken<'b>
        = Receive<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Transmit<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Receive<'_>, Transmit<'_>)> {
        let packet = self.packet.take()?;
        Some((
            Receive(packet),
            Transmit {
                link: self.link,
                now: self.now,
                world: self.world,
            },
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<Transmit<'_>> {
        (self.forced || self.world.has_room()).then_some(Transmit {
            link: self.link,
            now: self.now,
            world: self.world,
        })
    }

    /// The interface has taken those of [`Shape`] when it was made and goes by them.
    fn capabilities(&self) -> DeviceCapabilities {
        DeviceCapabilities::default()
    }
}

impl RxToken for Receive<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        if self.link.is_open {
            let mut packet = [0; ACK_LEN_MAX];
            let packet = &mut packet[..len];
            let result = f(packet);
            self.link.take_ack(packet, self.world);
            return result;
        }
        let packet = self.world.packet_buffer(len);
        let result = f(packet);
        let out = self.link.finish(packet, self.now);
        self.world.send_packet(out);
        result
    }
}

/// A device that only has a shape, for the interface to be made from.
struct Shape;

/// Stands for the tokens of a device that is never polled.
enum Never {}

impl Device for Shape {
    type RxToken<'b>
        = Never
    where
        Self: 'b;
    type TxToken<'b>
        = Never
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Never, Never)> {
        None
    }

    fn transmit(&mut self, _: Instant) -> Option<Never> {
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 65_535;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::None;
        capabilities.checksum.udp = Checksum::None;
        capabilities
    }
}

impl RxToken for Never {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, _: F) -> R {
        match self {}
    }
}

impl TxToken for Never {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, _: usize, _: F) -> R {
        match self {}
    }
}

impl Link {
    /// Makes a SYN-ACK, or what goes before the handshake is complete, ready to leave.
    fn finish(&mut self, packet: &mut [u8], now: Timestamp) -> PacketOut {
        let sent = segment::finish(packet, self.header_len, self.announced_mss);
        // The highest, by serial number arithmetic.
        let is_higher = self
            .sent
            .is_none_or(|highest| sent.wrapping_sub(highest) as i32 > 0);
        if is_higher {
            self.sent = Some(sent);
        }
        if self.syn_acks == 0 {
            self.syn_ack_at = now;
        }
        self.syn_acks += 1;
        self.packet_out()
    }

    /// Takes an ACK that smoltcp has written: it waits for data to go with, unless it has selective acknowledgments.
    fn take_ack(&mut self, ack: &mut [u8], world: &mut dyn World) {
        let tcp = &mut ack[usize::from(self.header_len)..];
        let sequence = self.sent.expect("it has answered the SYN");
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        self.told = Told {
            acknowledgment: u32::from_be_bytes([tcp[8], tcp[9], tcp[10], tcp[11]]),
            window: u16::from_be_bytes([tcp[14], tcp[15]]),
        };
        self.ack_waits = tcp.len() == TCP_HEADER_LEN;
        if !self.ack_waits {
            segment::finish(ack, self.header_len, self.announced_mss);
            world.packet_buffer(ack.len()).copy_from_slice(ack);
            world.send_packet(self.packet_out());
        }
    }

    fn packet_out(&self) -> PacketOut {
        PacketOut {
            ingress: self.ingress,
            flow: Some(self.flow),
            header_len: self.header_len,
            partial_checksum: Some(TCP_CHECKSUM_OFFSET),
            segment_size: None,
        }
    }

    /// Sends the ACK that waits, if one does.
    fn send_waiting_ack(&mut self, setup: &Setup, world: &mut dyn World) {
        if !std::mem::take(&mut self.ack_waits) {
            return;
        }
        Control {
            source: setup.target,
            destination: setup.client,
            flags: TcpFlags::ACK,
            sequence: self.sent.expect("it has answered the SYN"),
            acknowledgment: self.told.acknowledgment,
            window: self.told.window,
        }
        .send(self.ingress, Some(self.flow), world);
    }
}

/// The window scale that goes with a buffer (RFC 7323, section 2.3), as smoltcp chooses it.
fn window_shift(capacity: usize) -> u32 {
    (usize::BITS - capacity.leading_zeros()).saturating_sub(16)
}
