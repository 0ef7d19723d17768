//! What devices do for the engine where they can, done in software where they cannot.

use super::TcpFlags;
use super::checksum::{add, nonzero, pseudo_len, sum};
use crate::io::PacketOut;

/// Offset of the checksum field in a TCP header.
pub(super) const TCP_CHECKSUM: u16 = 16;
/// Offset of the checksum field in a UDP header.
pub(super) const UDP_CHECKSUM: u16 = 6;

/// Finishes a checksum that the engine left to the device; other packets stay as they are.
///
/// # Panics
///
/// If `out` does not belong to `packet`.
pub fn complete_checksum(packet: &mut [u8], out: &PacketOut) {
    if let Some(field) = out.partial_checksum {
        finish(&mut packet[usize::from(out.header_len)..], usize::from(field));
    }
}

/// Cuts a super-packet into the packets that go on the wire, each with its own lengths, numbers and checksum, and
/// hands them to `each` in order. A packet that is no super-packet is completed and handed on.
///
/// The packets are made in place, each header over data of the packet before: `packet` is used up.
///
/// # Panics
///
/// If `out` does not belong to `packet`.
pub fn segments(packet: &mut [u8], out: &PacketOut, mut each: impl FnMut(&[u8])) {
    let (Some(size), Some(field)) = (out.segment_size, out.partial_checksum) else {
        complete_checksum(packet, out);
        return each(packet);
    };
    let size = usize::from(size.get());
    let transport = usize::from(out.header_len);
    let first = First::read(packet, transport, field == TCP_CHECKSUM);
    let mut start = 0;
    for index in 0.. {
        let end = packet.len().min(start + first.headers + size);
        let last = end == packet.len();
        let segment = &mut packet[start..end];
        set_ip(segment, transport, first.identification.wrapping_add(index));
        let len = segment.len() - transport;
        let protocol = if first.tcp {
            let sequence = first.sequence.wrapping_add(u32::from(index) * size as u32);
            put(segment, transport + 4, &sequence.to_be_bytes());
            // RFC 3168, 6.1.2: CWR tells of one reduction. The others belong to the end of the data.
            segment[transport + 13] = first.flags
                & !(if index == 0 { 0 } else { TcpFlags::CWR })
                & !(if last { 0 } else { TcpFlags::FIN | TcpFlags::PSH });
            6
        } else {
            put(segment, transport + 4, &(len as u16).to_be_bytes());
            17
        };
        let pseudo = add(first.addresses, pseudo_len(protocol, len));
        put(segment, transport + usize::from(field), &pseudo.to_be_bytes());
        finish(&mut segment[transport..], usize::from(field));
        each(segment);
        if last {
            break;
        }
        packet.copy_within(start..start + first.headers, start + size);
        start += size;
    }
}

/// What the super-packet's headers say and its segments count on from.
struct First {
    tcp: bool,
    /// Length of all headers.
    headers: usize,
    /// Sum of the addresses.
    addresses: u16,
    identification: u16,
    sequence: u32,
    flags: u8,
}

impl First {
    fn read(packet: &[u8], transport: usize, tcp: bool) -> Self {
        let (addresses, identification) = if packet[0] >> 4 == 4 {
            (sum(&packet[12..20]), u16::from_be_bytes([packet[4], packet[5]]))
        } else {
            (sum(&packet[8..40]), 0)
        };
        let header = &packet[transport..];
        let (len, sequence, flags) = if tcp {
            let sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
            (usize::from(header[12] >> 4) * 4, sequence, header[13])
        } else {
            (8, 0, 0)
        };
        Self {
            tcp,
            headers: transport + len,
            addresses,
            identification,
            sequence,
            flags,
        }
    }
}

/// Sets what differs between the IP headers of segments; `identification` counts in IPv4 only.
fn set_ip(packet: &mut [u8], header_len: usize, identification: u16) {
    if packet[0] >> 4 == 4 {
        let total = packet.len() as u16;
        put(packet, 2, &total.to_be_bytes());
        put(packet, 4, &identification.to_be_bytes());
        put(packet, 10, &[0, 0]);
        let checksum = !sum(&packet[..header_len]);
        put(packet, 10, &checksum.to_be_bytes());
    } else {
        let payload = (packet.len() - 40) as u16;
        put(packet, 4, &payload.to_be_bytes());
    }
}

/// Turns the sum in the checksum field at `field` into the checksum, the way UDP needs it and others allow.
fn finish(transport: &mut [u8], field: usize) {
    let checksum = nonzero(sum(transport));
    put(transport, field, &checksum.to_be_bytes());
}

/// Writes `value` at `at`.
pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use etherparse::{IpNumber, Ipv4Header, Ipv6Header, TcpHeader, TcpOptionElement, UdpHeader};
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::addr::IngressId;
    use crate::packet::checksum::pseudo_header;

    proptest! {
        #[test]
        fn tcp_super_packet_is_cut_into_the_segments_a_sender_would_have_made(
            v6: bool, with_timestamps: bool, flags: u8, sequence: u32, identification: u16,
            payload in vec(any::<u8>(), 0..5000), size in 1..3000u16,
        ) {
            let mut tcp = TcpHeader::new(80, 4000, sequence, 500);
            tcp.acknowledgment_number = 77;
            set_flags(&mut tcp, flags);
            if with_timestamps {
                tcp.set_options(&[TcpOptionElement::Timestamp(1, 2)]).unwrap();
            }
            let (mut packet, out) = unfinished(v6, identification, 6, TCP_CHECKSUM, &tcp.to_bytes(), &payload, size);
            let mut sent = Vec::new();
            segments(&mut packet, &out, |packet| sent.push(packet.to_vec()));

            let chunks: Vec<&[u8]> = if payload.is_empty() { vec![&[]] } else { payload.chunks(size.into()).collect() };
            prop_assert_eq!(sent.len(), chunks.len());
            for (index, (packet, chunk)) in sent.iter().zip(&chunks).enumerate() {
                let mut tcp = tcp.clone();
                tcp.sequence_number = sequence.wrapping_add(index as u32 * u32::from(size));
                tcp.cwr &= index == 0;
                if index + 1 < chunks.len() {
                    (tcp.fin, tcp.psh) = (false, false);
                }
                let ip = ip_header(v6, identification.wrapping_add(index as u16), 6, tcp.header_len() + chunk.len());
                tcp.checksum = match &ip {
                    Ip::V4(ip) => tcp.calc_checksum_ipv4(ip, chunk).unwrap(),
                    Ip::V6(ip) => tcp.calc_checksum_ipv6(ip, chunk).unwrap(),
                };
                if tcp.checksum == 0 {
                    tcp.checksum = 0xffff;
                }
                prop_assert_eq!(packet, &[&ip.bytes()[..], &tcp.to_bytes(), chunk].concat());
            }
        }

        #[test]
        fn udp_super_packet_is_cut_into_datagrams(
            v6: bool, identification: u16, payload in vec(any::<u8>(), 1..5000), size in 1..3000u16,
        ) {
            let udp = UdpHeader { source_port: 53, destination_port: 4000, length: 8 + payload.len() as u16, checksum: 0 };
            let (mut packet, out) = unfinished(v6, identification, 17, UDP_CHECKSUM, &udp.to_bytes(), &payload, size);
            let mut sent = Vec::new();
            segments(&mut packet, &out, |packet| sent.push(packet.to_vec()));

            prop_assert_eq!(sent.len(), payload.len().div_ceil(size.into()));
            for (index, (packet, chunk)) in sent.iter().zip(payload.chunks(size.into())).enumerate() {
                let ip = ip_header(v6, identification.wrapping_add(index as u16), 17, 8 + chunk.len());
                let udp = match &ip {
                    Ip::V4(ip) => UdpHeader::with_ipv4_checksum(53, 4000, ip, chunk),
                    Ip::V6(ip) => UdpHeader::with_ipv6_checksum(53, 4000, ip, chunk),
                };
                prop_assert_eq!(packet, &[&ip.bytes()[..], &udp.unwrap().to_bytes(), chunk].concat());
            }
        }
    }

    #[test]
    fn checksum_of_zero_is_sent_as_all_ones() {
        // The two bytes of data bring the sum to all ones, whose complement means "no checksum".
        let udp = UdpHeader {
            source_port: 53,
            destination_port: 4000,
            length: 10,
            checksum: 0,
        };
        let (packet, mut out) = unfinished(false, 0, 17, UDP_CHECKSUM, &udp.to_bytes(), &[0, 0], 2);
        out.segment_size = None;
        let data = !sum(&packet[20..]);
        let (mut packet, _) = unfinished(
            false,
            0,
            17,
            UDP_CHECKSUM,
            &udp.to_bytes(),
            &data.to_be_bytes(),
            2,
        );
        complete_checksum(&mut packet, &out);
        assert_eq!(packet[26..28], [0xff, 0xff]);
    }

    #[test]
    fn complete_packet_stays_as_it_is() {
        let (packet, out) = unfinished(true, 0, 17, UDP_CHECKSUM, &[7; 8], b"data", 4);
        let out = PacketOut {
            partial_checksum: None,
            segment_size: None,
            ..out
        };
        let mut sent = Vec::new();
        segments(&mut packet.clone(), &out, |packet| sent.push(packet.to_vec()));
        assert_eq!(sent, [packet]);
    }

    enum Ip {
        V4(Ipv4Header),
        V6(Ipv6Header),
    }

    impl Ip {
        fn bytes(&self) -> Vec<u8> {
            match self {
                Self::V4(ip) => ip.to_bytes().to_vec(),
                Self::V6(ip) => ip.to_bytes().to_vec(),
            }
        }
    }

    fn ip_header(v6: bool, identification: u16, protocol: u8, payload_len: usize) -> Ip {
        let payload_len = payload_len as u16;
        if v6 {
            Ip::V6(Ipv6Header {
                payload_length: payload_len,
                next_header: IpNumber(protocol),
                hop_limit: 64,
                source: [0x20; 16],
                destination: [0xfd; 16],
                ..Ipv6Header::default()
            })
        } else {
            let mut ip =
                Ipv4Header::new(payload_len, 64, IpNumber(protocol), [192, 0, 2, 7], [10, 0, 0, 2]).unwrap();
            ip.identification = identification;
            ip.header_checksum = ip.calc_header_checksum();
            Ip::V4(ip)
        }
    }

    /// A super-packet as the engine leaves it: the checksum field holds the sum of the pseudo-header.
    fn unfinished(
        v6: bool,
        identification: u16,
        protocol: u8,
        field: u16,
        header: &[u8],
        payload: &[u8],
        size: u16,
    ) -> (Vec<u8>, PacketOut) {
        let len = header.len() + payload.len();
        let ip = ip_header(v6, identification, protocol, len);
        let pseudo = match &ip {
            Ip::V4(ip) => pseudo_header(ip.source.into(), ip.destination.into(), protocol, len),
            Ip::V6(ip) => pseudo_header(ip.source.into(), ip.destination.into(), protocol, len),
        };
        let ip = ip.bytes();
        let out = PacketOut {
            ingress: IngressId(0),
            flow: None,
            header_len: ip.len() as u16,
            partial_checksum: Some(field),
            segment_size: NonZeroU16::new(size),
        };
        let mut packet = [&ip, header, payload].concat();
        put(&mut packet, ip.len() + usize::from(field), &pseudo.to_be_bytes());
        (packet, out)
    }

    fn set_flags(tcp: &mut TcpHeader, flags: u8) {
        tcp.fin = flags & TcpFlags::FIN != 0;
        tcp.syn = flags & TcpFlags::SYN != 0;
        tcp.rst = flags & TcpFlags::RST != 0;
        tcp.psh = flags & TcpFlags::PSH != 0;
        tcp.ack = flags & TcpFlags::ACK != 0;
        tcp.urg = flags & TcpFlags::URG != 0;
        tcp.ece = flags & TcpFlags::ECE != 0;
        tcp.cwr = flags & TcpFlags::CWR != 0;
    }
}
