//! The boundary to smoltcp: one interface with one socket per flow.
//!
//! smoltcp walks every socket of a set for every packet and every poll, so each flow has a set of its own, found
//! through our flow table and polled only when that flow has work. This module alone knows smoltcp's types. What it
//! works around, all of it in 0.14.0 and covered by tests of this crate:
//!
//! - The IPv6 branch of its segmentation offload drops what exceeds the MTU while the socket believes it sent. So the
//!   interface is told an MTU of 65,535, and [`Link`] says how the device is to cut the packets up.
//! - With that MTU its SYN-ACK announces a segment size of 65,495; [`Link`] writes the true one over it.
//! - Its initial sequence numbers follow from the interface's seed, and its generator is predictable: the seed is a
//!   keyed hash of the 4-tuple and the time (RFC 6528).
//! - Its clock must not be near zero, which some of its timers take for "unset".

use std::num::NonZeroU16;
use std::time::Duration;

use smoltcp::iface::{Config as InterfaceConfig, Interface, PollResult};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{CongestionControl, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpListenEndpoint};

use super::arena::Sockets;
use super::segment::{self, TCP_CHECKSUM_OFFSET};
use crate::addr::{FlowId, IngressId};
use crate::config::Clients;
use crate::io::{PacketOut, World};
use crate::time::Timestamp;

/// smoltcp's clock runs this far ahead of the driver's.
const CLOCK_AHEAD: Duration = Duration::from_secs(1);

/// The kernel splits a super-packet again when its IP length and an Ethernet header exceed 65,535 bytes.
const LARGEST_PACKET: usize = 65_535 - 14;

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
}

/// One TCP endpoint towards a client.
pub(super) struct Stack {
    interface: Interface,
    sockets: Sockets,
    link: Link,
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
pub(super) struct Setup {
    pub(super) clients: Clients,
    pub(super) seed: u64,
    /// The SYN to answer, in the form of [`segment::Syn::packet`].
    pub(super) target: std::net::SocketAddr,
}

impl Stack {
    /// Makes a listening endpoint for `setup.target`; feed it the SYN next.
    pub(super) fn new(mut sockets: Sockets, link: Link, setup: &Setup, now: Timestamp) -> Self {
        let mut config = InterfaceConfig::new(HardwareAddress::Ip);
        config.random_seed = setup.seed;
        let mut interface = Interface::new(config, &mut Shape(&link), instant(now));
        interface.set_any_ip(true);
        let socket = sockets.socket_mut();
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_congestion_control(match setup.clients {
            Clients::Local => CongestionControl::None,
            Clients::Routed => CongestionControl::Cubic,
        });
        let endpoint = IpListenEndpoint {
            addr: Some(IpAddress::from(setup.target.ip())),
            port: setup.target.port(),
        };
        socket
            .listen(endpoint)
            .expect("a fresh socket listens on a port other than 0");
        Self {
            interface,
            sockets,
            link,
            client_fin: false,
        }
    }

    /// Gives it a segment, as an IP packet without IPv6 extension headers, of which nothing lies beyond the buffer.
    pub(super) fn ingress(&mut self, now: Timestamp, packet: &[u8], world: &mut dyn World) {
        let mut port = Port {
            packet: Some(packet),
            link: &mut self.link,
            world,
            forced: true,
        };
        self.interface
            .poll_ingress_single(instant(now), &mut port, self.sockets.set());
        // Kept, since the state forgets it when the connection is over.
        self.client_fin |= match self.sockets.socket().state() {
            State::CloseWait | State::Closing | State::LastAck | State::TimeWait => true,
            State::Closed
            | State::Listen
            | State::SynSent
            | State::SynReceived
            | State::Established
            | State::FinWait1
            | State::FinWait2 => false,
        };
    }

    /// Lets it send one packet, if it has one and the device has room or `forced`. Returns whether it sent.
    pub(super) fn egress(&mut self, now: Timestamp, forced: bool, world: &mut dyn World) -> bool {
        let mut port = Port {
            packet: None,
            link: &mut self.link,
            world,
            forced,
        };
        self.interface
            .poll_egress(instant(now), &mut port, self.sockets.set())
            != PollResult::None
    }

    /// Lets it send up to `most` packets, as long as the device has room.
    pub(super) fn send(&mut self, now: Timestamp, most: usize, world: &mut dyn World) -> Sending {
        if self.is_finished() {
            return Sending::Done { due: None };
        }
        for _ in 0..most {
            let sent = self.egress(now, false, world);
            // The most frequent case by far: an ACK has left, or there was none to send.
            if self.is_receiving_only() && (sent || world.has_room()) {
                return Sending::Done { due: None };
            }
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

    /// Whether all there may be to send is one ACK: the connection is open, the client has acknowledged everything,
    /// and so no timer runs.
    fn is_receiving_only(&self) -> bool {
        let socket = self.sockets.socket();
        matches!(socket.state(), State::Established | State::CloseWait) && socket.send_queue() == 0
    }

    /// When its timers want it polled; a time not after `now` means at once.
    fn poll_at(&mut self, now: Timestamp) -> Option<Timestamp> {
        let at = self.interface.poll_at(instant(now), self.sockets.set())?;
        let micros = u64::try_from(at.total_micros()).unwrap_or(0);
        Some(Timestamp::from_nanos(micros.saturating_mul(1000)) - CLOCK_AHEAD)
    }

    pub(super) fn link(&mut self) -> &mut Link {
        &mut self.link
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
        self.sockets.socket().send_queue()
    }

    /// Room for bytes to the client.
    pub(super) fn room(&self) -> usize {
        let socket = self.sockets.socket();
        if socket.may_send() {
            socket.send_capacity() - socket.send_queue()
        } else {
            0
        }
    }

    /// Size of each buffer.
    pub(super) fn capacity(&self) -> usize {
        self.sockets.capacity()
    }

    /// The window that the client may send into now, in bytes.
    pub(super) fn window(&self) -> usize {
        self.capacity() - self.receive_queue()
    }

    /// Lends the first contiguous bytes received; `take` says how many to forget.
    pub(super) fn read(&mut self, take: impl FnOnce(&[u8]) -> usize) -> usize {
        let taken = |bytes: &mut [u8]| {
            let taken = take(bytes).min(bytes.len());
            (taken, taken)
        };
        self.sockets.socket_mut().recv(taken).unwrap_or(0)
    }

    /// Lends contiguous room; `fill` says how many bytes it has filled.
    pub(super) fn write(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> usize {
        let filled = |space: &mut [u8]| {
            let filled = fill(space).min(space.len());
            (filled, filled)
        };
        self.sockets.socket_mut().send(filled).unwrap_or(0)
    }

    /// Sends FIN after all bytes given.
    pub(super) fn close(&mut self) {
        self.sockets.socket_mut().close();
    }

    /// Forgets everything but an RST, which the next [`Stack::egress`] sends.
    pub(super) fn abort(&mut self) {
        self.sockets.socket_mut().abort();
    }

    /// Offers the pages of the buffers to the system. To be called when nothing is in them, not even out of order.
    pub(super) fn vacate(&self, world: &mut dyn World) {
        debug_assert!(self.receive_queue() == 0 && self.send_queue() == 0);
        for pages in self.sockets.pages() {
            world.vacate(pages);
        }
    }

    /// Gives the buffers back.
    pub(super) fn into_sockets(self) -> Sockets {
        self.sockets
    }

    /// Whether the handshake is complete.
    pub(super) fn is_synchronized(&self) -> bool {
        match self.sockets.socket().state() {
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
        matches!(self.sockets.socket().state(), State::TimeWait | State::Closed)
    }

    /// Whether it is we who have to linger: we closed first, and the client may not have our last ACK.
    pub(super) fn is_time_wait(&self) -> bool {
        self.sockets.socket().state() == State::TimeWait
    }

    /// Whether something we sent is not acknowledged yet: bytes, SYN or FIN.
    pub(super) fn has_unacknowledged(&self) -> bool {
        match self.sockets.socket().state() {
            State::SynReceived | State::FinWait1 | State::Closing | State::LastAck => true,
            State::Established | State::CloseWait => self.send_queue() > 0,
            State::Closed | State::Listen | State::SynSent | State::FinWait2 | State::TimeWait => false,
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
    world: &'a mut dyn World,
    forced: bool,
}

struct Receive<'a>(&'a [u8]);

struct Transmit<'a> {
    link: &'a mut Link,
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
                world: self.world,
            },
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<Transmit<'_>> {
        (self.forced || self.world.has_room()).then_some(Transmit {
            link: self.link,
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
        let packet = self.world.packet_buffer(len);
        let result = f(packet);
        let out = self.link.finish(packet);
        self.world.send_packet(out);
        result
    }
}

/// A device that only has a shape, for the interface to be made from.
struct Shape<'a>(&'a Link);

/// Stands for the tokens of a device that is never polled.
enum Never {}

impl Device for Shape<'_> {
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
        self.0.capabilities()
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
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 65_535;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::None;
        capabilities.checksum.udp = Checksum::None;
        // Whole segments only: a short one in the middle would become a packet of its own.
        let headers = usize::from(self.header_len) + segment::TCP_HEADER_LEN;
        let size = usize::from(self.segment_size);
        let largest = headers + (LARGEST_PACKET - headers) / size * size;
        let largest = Some(largest.try_into().expect("headers alone are more than 0"));
        capabilities.segmentation.tcpv4 = largest;
        capabilities.segmentation.tcpv6 = largest;
        capabilities
    }

    /// Makes what smoltcp wrote ready to leave.
    fn finish(&mut self, packet: &mut [u8]) -> PacketOut {
        let sent = segment::finish(packet, self.header_len, self.announced_mss);
        // The highest, by serial number arithmetic: a retransmission ends below it.
        let is_higher = self
            .sent
            .is_none_or(|highest| sent.end.wrapping_sub(highest) as i32 > 0);
        if is_higher {
            self.sent = Some(sent.end);
        }
        let is_super = sent.payload_len > usize::from(self.segment_size);
        PacketOut {
            ingress: self.ingress,
            flow: Some(self.flow),
            header_len: self.header_len,
            partial_checksum: Some(TCP_CHECKSUM_OFFSET),
            segment_size: if is_super {
                NonZeroU16::new(self.segment_size)
            } else {
                None
            },
        }
    }
}
