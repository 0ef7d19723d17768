//! TCP segments as the engine writes them, and what it keeps of a SYN.

use std::net::SocketAddr;

use crate::addr::{FlowId, IngressId};
use crate::io::{PacketOut, World};
use crate::packet::{TcpFlags, TcpView, checksum, ip_header_len, write_ip_header};

/// A TCP header without options, in bytes.
pub(super) const TCP_HEADER_LEN: usize = 20;

/// The longest headers of a segment without options.
pub(super) const HEADERS_MAX: usize = 40 + TCP_HEADER_LEN;

/// Where the checksum is in a TCP header.
pub(super) const TCP_CHECKSUM_OFFSET: u16 = 16;

const PROTOCOL_TCP: u8 = 6;

/// Identification 0, which goes with the flag: such packets are never in pieces (RFC 6864).
const DONT_FRAGMENT: [[u8; 2]; 2] = [[0, 0], [0x40, 0]];

/// A segment's header; most that the engine writes have no data.
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
        self.write(packet, &[], 0);
        world.send_packet(PacketOut {
            ingress,
            flow,
            header_len: header_len as u16,
            partial_checksum: Some(TCP_CHECKSUM_OFFSET),
            segment_size: None,
        });
    }

    /// Writes the headers of a packet with `payload_len` bytes of data; the checksum field holds the pseudo-header's
    /// sum. `options` is padded to words.
    pub(super) fn write(&self, headers: &mut [u8], options: &[u8], payload_len: usize) {
        let (source, destination) = (self.source.ip(), self.destination.ip());
        let (ip, tcp) = headers.split_at_mut(ip_header_len(source));
        let tcp_len = tcp.len() + payload_len;
        write_ip_header(ip, source, destination, PROTOCOL_TCP, tcp_len, DONT_FRAGMENT);
        let (header, rest) = tcp
            .split_first_chunk_mut::<TCP_HEADER_LEN>()
            .expect("there is room for a header");
        header[0..2].copy_from_slice(&self.source.port().to_be_bytes());
        header[2..4].copy_from_slice(&self.destination.port().to_be_bytes());
        header[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        header[8..12].copy_from_slice(&self.acknowledgment.to_be_bytes());
        header[12] = (((TCP_HEADER_LEN + options.len()) / 4) << 4) as u8;
        header[13] = self.flags;
        header[14..16].copy_from_slice(&self.window.to_be_bytes());
        let sum = checksum::pseudo_header(source, destination, PROTOCOL_TCP, tcp_len);
        header[16..18].copy_from_slice(&sum.to_be_bytes());
        header[18..20].fill(0);
        rest.copy_from_slice(options);
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

    /// The SYN written out again, without data.
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
        control.write(&mut packet.bytes[..total], &options[..len], 0);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::TcpOptions;

    #[test]
    fn a_reset_answers_as_rfc_9293_says() {
        // Section 3.10.7.1: SEQ=SEG.ACK with ACK set, SEQ=0 and ACK=SEG.SEQ+SEG.LEN without.
        let endpoint = |text: &str| text.parse().expect("a socket address");
        let answer = |sequence, flags: u8, payload: &[u8]| {
            let segment = TcpView {
                source_port: 1,
                destination_port: 2,
                sequence,
                acknowledgment: 7,
                flags: TcpFlags(flags),
                window: 0,
                options: TcpOptions::default(),
                header_len: 20,
                payload,
            };
            let reset = Control::reset_for(endpoint("10.0.0.2:1"), endpoint("192.0.2.1:2"), &segment);
            (reset.sequence, reset.acknowledgment, reset.flags)
        };
        let (syn, fin, rst, ack) = (TcpFlags::SYN, TcpFlags::FIN, TcpFlags::RST, TcpFlags::ACK);
        assert_eq!(answer(100, syn, b""), (0, 101, rst | ack));
        assert_eq!(answer(u32::MAX, syn, b"data"), (0, 4, rst | ack));
        assert_eq!(answer(100, ack, b"data"), (7, 0, rst));
        assert_eq!(answer(100, ack | fin, b""), (7, 0, rst));
    }
}
