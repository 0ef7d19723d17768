//! TCP segments as the engine writes them, and what it keeps of a SYN.

use std::net::{IpAddr, SocketAddr};

use crate::addr::{FlowId, IngressId};
use crate::io::{PacketOut, World};
use crate::packet::{TcpFlags, TcpView, checksum, ip_header_len, write_ip_header};

/// A TCP header without options, in bytes.
pub(super) const TCP_HEADER_LEN: usize = 20;

/// The longest headers of a segment without options.
pub(super) const HEADERS_MAX: usize = 40 + TCP_HEADER_LEN;

/// Where the checksum is in a TCP header.
pub(crate) const TCP_CHECKSUM_OFFSET: u16 = 16;

const PROTOCOL_TCP: u8 = 6;

/// Identification 0, which goes with the flag: such packets are never in pieces (RFC 6864).
const DONT_FRAGMENT: [[u8; 2]; 2] = [[0, 0], [0x40, 0]];

/// The headers of one connection's segments to its client. Each segment fills in what is its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Headers {
    bytes: [u8; HEADERS_MAX],
    ip_len: u16,
    /// Sum of the IPv4 header as it stands in `bytes`.
    ip_sum: u16,
    /// Sum of the pseudo-header without the length.
    pseudo_sum: u16,
}

/// What a segment says of its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields {
    pub(super) flags: u8,
    pub(super) sequence: u32,
    pub(super) acknowledgment: u32,
    pub(super) window: u16,
}

impl Headers {
    pub(super) fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        let mut bytes = [0; HEADERS_MAX];
        let (from, to) = (source.ip(), destination.ip());
        let ip_len = ip_header_len(from);
        let (ip, tcp) = bytes.split_at_mut(ip_len);
        write_ip_header(ip, from, to, PROTOCOL_TCP, 0, DONT_FRAGMENT);
        let ip_sum = match from {
            // Without checksum and length, which are filled in.
            IpAddr::V4(_) => {
                ip[10..12].fill(0);
                ip[2..4].fill(0);
                checksum::sum(ip)
            }
            IpAddr::V6(_) => 0,
        };
        tcp[0..2].copy_from_slice(&source.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&destination.port().to_be_bytes());
        Self {
            bytes,
            ip_len: ip_len as u16,
            ip_sum,
            pseudo_sum: checksum::pseudo_header(from, to, PROTOCOL_TCP, 0),
        }
    }

    /// Length of the IP header.
    pub(super) fn ip_len(&self) -> u16 {
        self.ip_len
    }

    /// Length of both headers, without options.
    pub(super) fn len(&self) -> usize {
        usize::from(self.ip_len) + TCP_HEADER_LEN
    }

    /// Writes the headers of a packet with `payload_len` bytes of data behind them into `headers`, which has just the
    /// length of them and `options`; the checksum field holds the pseudo-header's sum. `options` is padded to words.
    #[inline]
    pub(super) fn write(&self, headers: &mut [u8], fields: Fields, options: &[u8], payload_len: usize) {
        if self.ip_len == 20 {
            let (header, rest) = headers
                .split_first_chunk_mut::<40>()
                .expect("there is room for the headers");
            header.copy_from_slice(&self.bytes[..40]);
            let total_len = 40 + options.len() + payload_len;
            header[2..4].copy_from_slice(&(total_len as u16).to_be_bytes());
            let checksum = !checksum::add(self.ip_sum, total_len as u16);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
            let (_, tcp) = header.split_last_chunk_mut::<TCP_HEADER_LEN>().expect("40 bytes");
            self.write_tcp(tcp, fields, options, payload_len);
            rest.copy_from_slice(options);
        } else {
            let (header, rest) = headers
                .split_first_chunk_mut::<HEADERS_MAX>()
                .expect("there is room for the headers");
            *header = self.bytes;
            let tcp_len = TCP_HEADER_LEN + options.len() + payload_len;
            header[4..6].copy_from_slice(&(tcp_len as u16).to_be_bytes());
            let (_, tcp) = header.split_last_chunk_mut::<TCP_HEADER_LEN>().expect("60 bytes");
            self.write_tcp(tcp, fields, options, payload_len);
            rest.copy_from_slice(options);
        }
    }

    #[inline]
    fn write_tcp(&self, tcp: &mut [u8; TCP_HEADER_LEN], fields: Fields, options: &[u8], payload_len: usize) {
        let header_len = TCP_HEADER_LEN + options.len();
        tcp[4..8].copy_from_slice(&fields.sequence.to_be_bytes());
        tcp[8..12].copy_from_slice(&fields.acknowledgment.to_be_bytes());
        tcp[12] = ((header_len / 4) << 4) as u8;
        tcp[13] = fields.flags;
        tcp[14..16].copy_from_slice(&fields.window.to_be_bytes());
        let sum = checksum::add(self.pseudo_sum, (header_len + payload_len) as u16);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    }
}

/// A segment without data that belongs to no connection which could send it, or not any more.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Control {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) fields: Fields,
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
            fields: Fields {
                flags,
                sequence,
                acknowledgment,
                window: 0,
            },
        }
    }

    /// Sends it to the client.
    pub(crate) fn send(&self, ingress: IngressId, flow: Option<FlowId>, world: &mut dyn World) {
        let headers = Headers::new(self.source, self.destination);
        headers.write(world.packet_buffer(headers.len()), self.fields, &[], 0);
        world.send_packet(PacketOut {
            ingress,
            flow,
            header_len: headers.ip_len(),
            partial_checksum: Some(TCP_CHECKSUM_OFFSET),
            segment_size: None,
        });
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
        let fields = Fields {
            flags: TcpFlags::SYN,
            sequence: self.sequence,
            acknowledgment: 0,
            window: self.window,
        };
        let headers = Headers::new(client, target);
        let total = headers.len() + len;
        let mut packet = SynPacket {
            bytes: [0; 72],
            len: total,
        };
        headers.write(&mut packet.bytes[..total], fields, &options[..len], 0);
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
            let reset = Control::reset_for(endpoint("10.0.0.2:1"), endpoint("192.0.2.1:2"), &segment).fields;
            (reset.sequence, reset.acknowledgment, reset.flags)
        };
        let (syn, fin, rst, ack) = (TcpFlags::SYN, TcpFlags::FIN, TcpFlags::RST, TcpFlags::ACK);
        assert_eq!(answer(100, syn, b""), (0, 101, rst | ack));
        assert_eq!(answer(u32::MAX, syn, b"data"), (0, 4, rst | ack));
        assert_eq!(answer(100, ack, b"data"), (7, 0, rst));
        assert_eq!(answer(100, ack | fin, b""), (7, 0, rst));
    }
}
