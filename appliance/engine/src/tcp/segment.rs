//! TCP segments that the engine writes itself: RST, ACK, and the SYN as it is fed to a flow's stack.

use std::net::{IpAddr, SocketAddr};

use crate::addr::{FlowId, IngressId};
use crate::io::{PacketOut, World};
use crate::packet::{TcpFlags, TcpView, checksum};

/// A TCP header without options, in bytes.
pub(super) const TCP_HEADER_LEN: usize = 20;

/// Where the checksum is in a TCP header.
pub(super) const TCP_CHECKSUM_OFFSET: u16 = 16;

const IPV4_HEADER_LEN: usize = 20;
const IPV6_HEADER_LEN: usize = 40;
const PROTOCOL_TCP: u8 = 6;
const HOP_LIMIT: u8 = 64;

/// Length of the IP header that the engine and smoltcp write for this family.
pub(super) fn ip_header_len(address: IpAddr) -> usize {
    match address {
        IpAddr::V4(_) => IPV4_HEADER_LEN,
        IpAddr::V6(_) => IPV6_HEADER_LEN,
    }
}

/// A segment without data.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Control {
    pub(crate) source: SocketAddr,
    pub(crate) destination: SocketAddr,
    pub(crate) flags: u8,
    pub(crate) sequence: u32,
    pub(crate) acknowledgment: u32,
    pub(crate) window: u16,
}

impl Control {
    /// The RST that answers a segment which belongs to no connection (RFC 9293, section 3.10.7.1).
    pub(crate) fn reset_for(client: SocketAddr, target: SocketAddr, segment: &TcpView<'_>) -> Self {
        let (flags, sequence, acknowledgment) = if segment.flags.ack() {
            (TcpFlags::RST, segment.acknowledgment, 0)
        } else {
            let end = segment.sequence.wrapping_add(segment.sequence_len());
            (TcpFlags::RST | TcpFlags::ACK, 0, end)
        };
        Self {
            source: target,
            destination: client,
            flags,
            sequence,
            acknowledgment,
            window: 0,
        }
    }

    /// Sends it to the client.
    pub(crate) fn send(&self, ingress: IngressId, flow: Option<FlowId>, world: &mut dyn World) {
        let header_len = ip_header_len(self.source.ip());
        let packet = world.packet_buffer(header_len + TCP_HEADER_LEN);
        self.write(packet, &[]);
        world.send_packet(PacketOut {
            ingress,
            flow,
            header_len: header_len as u16,
            partial_checksum: Some(TCP_CHECKSUM_OFFSET),
            segment_size: None,
        });
    }

    /// The packet, written into `into`.
    pub(super) fn packet<'a>(&self, into: &'a mut Vec<u8>) -> &'a [u8] {
        into.clear();
        into.resize(ip_header_len(self.source.ip()) + TCP_HEADER_LEN, 0);
        self.write(into, &[]);
        into
    }

    /// Writes the packet; the checksum field holds the pseudo-header's sum. `options` is padded to words.
    fn write(&self, packet: &mut [u8], options: &[u8]) {
        let tcp = write_ip_header(packet, self.source.ip(), self.destination.ip());
        let tcp_len = tcp.len();
        tcp[0..2].copy_from_slice(&self.source.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&self.destination.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.acknowledgment.to_be_bytes());
        tcp[12] = (((TCP_HEADER_LEN + options.len()) / 4) << 4) as u8;
        tcp[13] = self.flags;
        tcp[14..16].copy_from_slice(&self.window.to_be_bytes());
        let sum = checksum::pseudo_header(self.source.ip(), self.destination.ip(), PROTOCOL_TCP, tcp_len);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp[18..20].fill(0);
        tcp[TCP_HEADER_LEN..].copy_from_slice(options);
    }
}

/// Writes the IP header of a packet that fills `packet`, and returns what follows it.
fn write_ip_header(packet: &mut [u8], source: IpAddr, destination: IpAddr) -> &mut [u8] {
    let len = packet.len();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let (ip, rest) = packet.split_at_mut(IPV4_HEADER_LEN);
            ip.fill(0);
            ip[0] = 0x45;
            ip[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            ip[6] = 0x40; // don't fragment
            ip[8] = HOP_LIMIT;
            ip[9] = PROTOCOL_TCP;
            ip[12..16].copy_from_slice(&source.octets());
            ip[16..20].copy_from_slice(&destination.octets());
            let sum = !checksum::sum(ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            rest
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let (ip, rest) = packet.split_at_mut(IPV6_HEADER_LEN);
            ip[..4].copy_from_slice(&[0x60, 0, 0, 0]);
            ip[4..6].copy_from_slice(&((len - IPV6_HEADER_LEN) as u16).to_be_bytes());
            ip[6] = PROTOCOL_TCP;
            ip[7] = HOP_LIMIT;
            ip[8..24].copy_from_slice(&source.octets());
            ip[24..40].copy_from_slice(&destination.octets());
            rest
        }
        _ => unreachable!("a flow's client and target are of one family"),
    }
}

/// What a SYN says that matters, kept until the upstream is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Syn {
    pub(crate) sequence: u32,
    pub(crate) window: u16,
    pub(crate) max_segment_size: Option<u16>,
    pub(crate) window_scale: Option<u8>,
    pub(crate) sack_permitted: bool,
}

impl Syn {
    pub(crate) fn of(segment: &TcpView<'_>) -> Self {
        Self {
            sequence: segment.sequence,
            window: segment.window,
            max_segment_size: segment.options.max_segment_size,
            window_scale: segment.options.window_scale,
            sack_permitted: segment.options.sack_permitted,
        }
    }

    /// The SYN written out again, for a stack; without data, which the client repeats (RFC 7413, section 4.2.1
    /// allows a server not to take it).
    pub(super) fn packet(&self, client: SocketAddr, target: SocketAddr) -> SynPacket {
        let mut options = [0; 12];
        let mut len = 0;
        let mut put = |bytes: &[u8]| {
            options[len..len + bytes.len()].copy_from_slice(bytes);
            len += bytes.len();
        };
        if let Some(size) = self.max_segment_size {
            let [high, low] = size.to_be_bytes();
            put(&[2, 4, high, low]);
        }
        if let Some(shift) = self.window_scale {
            put(&[1, 3, 3, shift]);
        }
        if self.sack_permitted {
            put(&[1, 1, 4, 2]);
        }
        let control = Control {
            source: client,
            destination: target,
            flags: TcpFlags::SYN,
            sequence: self.sequence,
            acknowledgment: 0,
            window: self.window,
        };
        let total = ip_header_len(client.ip()) + TCP_HEADER_LEN + len;
        let mut packet = SynPacket {
            bytes: [0; 72],
            len: total,
        };
        control.write(&mut packet.bytes[..total], &options[..len]);
        packet
    }
}

/// A SYN as an IP packet.
pub(crate) struct SynPacket {
    bytes: [u8; 72],
    len: usize,
}

impl SynPacket {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// What a finished segment carries.
pub(super) struct Sent {
    /// One past its last sequence number.
    pub(super) end: u32,
    pub(super) payload_len: usize,
}

/// Finishes a packet that smoltcp wrote: the true segment size on SYN-ACKs, and the pseudo-header's sum in the
/// checksum field.
pub(super) fn finish(packet: &mut [u8], header_len: u16, announced_mss: u16) -> Sent {
    let (ip, tcp) = packet.split_at_mut(usize::from(header_len));
    let tcp_len = tcp.len();
    let tcp_header_len = usize::from(tcp[12] >> 4) * 4;
    let flags = TcpFlags(tcp[13]);
    if flags.syn() {
        write_max_segment_size(&mut tcp[TCP_HEADER_LEN..tcp_header_len], announced_mss);
    }
    let addresses = match ip.len() {
        IPV4_HEADER_LEN => &ip[12..20],
        _ => &ip[8..40],
    };
    let sum = checksum::add(
        checksum::sum(addresses),
        checksum::pseudo_len(PROTOCOL_TCP, tcp_len),
    );
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    let payload_len = tcp_len - tcp_header_len;
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let controls = u32::from(flags.syn()) + u32::from(flags.fin());
    Sent {
        end: sequence.wrapping_add(payload_len as u32).wrapping_add(controls),
        payload_len,
    }
}

/// Writes over the maximum segment size in a SYN's options.
fn write_max_segment_size(mut options: &mut [u8], size: u16) {
    while let [kind, rest @ ..] = options {
        options = match *kind {
            0 => return,
            1 => rest,
            2 => {
                rest[1..3].copy_from_slice(&size.to_be_bytes());
                return;
            }
            _ => {
                let len = usize::from(rest[0]);
                &mut rest[len - 1..]
            }
        };
    }
}

/// `packet` with its TCP data cut after `keep` bytes, without FIN and PSH, and without IPv6 extension headers: what a
/// stack is fed where the packet itself will not do. `transport` is where the TCP header begins.
pub(super) fn rewrite(packet: &[u8], transport: usize, keep: Option<usize>, into: &mut Vec<u8>) {
    into.clear();
    let tcp = &packet[transport..];
    let tcp_header_len = usize::from(tcp[12] >> 4) * 4;
    let tcp_len = keep.map_or(tcp.len(), |keep| tcp_header_len + keep);
    let is_v4 = packet[0] >> 4 == 4;
    if is_v4 {
        into.extend_from_slice(&packet[..transport]);
    } else {
        into.extend_from_slice(&packet[..IPV6_HEADER_LEN]);
    }
    let headers = into.len();
    into.extend_from_slice(&tcp[..tcp_len]);
    if keep.is_some() {
        into[headers + 13] &= !(TcpFlags::FIN | TcpFlags::PSH);
    }
    if is_v4 {
        let total = into.len() as u16;
        into[2..4].copy_from_slice(&total.to_be_bytes());
    } else {
        into[4..6].copy_from_slice(&(tcp_len as u16).to_be_bytes());
        into[6] = PROTOCOL_TCP;
    }
}
