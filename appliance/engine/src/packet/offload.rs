//! What devices do for the engine where they can, done in software where they cannot.

use super::TcpFlags;
use super::checksum::{add, pseudo_len, sum};
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

/// Turns the sum in the checksum field at `field` into the checksum. A result of zero is sent as all ones, as UDP
/// needs (RFC 768) and others allow.
fn finish(transport: &mut [u8], field: usize) {
    let checksum = match !sum(transport) {
        0 => 0xffff,
        checksum => checksum,
    };
    put(transport, field, &checksum.to_be_bytes());
}

/// Writes `value` at `at`.
pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}
