//! What captures do to packets that the wire did not, undone: cut ends, and checksums and lengths that were left to
//! the network card.
//!
//! A sender's own capture sees packets before the card finishes them: super-packets whose IPv4 total length is 0, and
//! checksum fields that are 0 or hold only the folded sum of the pseudo-header (with its length, or without where the
//! card fills in the length of each segment). Judged as the wire would never have seen them, whole captures would be
//! dropped. A snap length cuts packets off behind their headers; they are padded to their length with zeros, and
//! nothing can be said about their transport checksum.

use tungate_engine::DropReason;
use tungate_engine::packet::{PacketView, Transport, checksum};

use super::item::Packet;

/// How wrong checksums are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Checksums {
    /// Repairs what offload left unfinished, and judges all others
    #[default]
    Auto,
    /// Judges all, as the appliance would
    Strict,
    /// Repairs all
    Ignore,
}

/// A larger IP packet is a super-packet, whose checksum its sender never computed, in bytes.
const LARGEST_ON_WIRE: usize = 1_514;

/// What a packet's checksums are worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Soundness {
    /// All are right, or cannot be known.
    Sound,
    /// At least one is wrong and counts as right.
    Repaired,
    /// At least one is wrong and stays so.
    Wrong,
}

/// What can be told about a captured packet before it is parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// Length of the IP packet, of which less may have been captured, in bytes.
    pub(super) len: usize,
    /// Whether its IPv4 total length is 0 and stands for `len`.
    pub(super) length_is_missing: bool,
}

/// Finds out how long the IP packet is of which `captured` is there and which had `on_wire` bytes on the wire.
/// `None` if it has no usable IP header.
pub(super) fn extent(captured: &[u8], on_wire: usize) -> Option<Extent> {
    let is_cut = captured.len() < on_wire;
    let (said, length_is_missing) = match captured.first()? >> 4 {
        4 => {
            let header_len = usize::from(captured[0] & 0xf) * 4;
            if header_len < 20 || captured.len() < header_len {
                return None;
            }
            let total = usize::from(u16::from_be_bytes([captured[2], captured[3]]));
            let whole = if is_cut { on_wire } else { captured.len() };
            let is_missing = total == 0 && whole <= usize::from(u16::MAX);
            (if is_missing { whole } else { total }, is_missing)
        }
        6 => {
            if captured.len() < 40 {
                return None;
            }
            (
                40 + usize::from(u16::from_be_bytes([captured[4], captured[5]])),
                false,
            )
        }
        _ => return None,
    };
    let len = if is_cut {
        said.min(on_wire).max(captured.len())
    } else {
        captured.len()
    };
    Some(Extent {
        len,
        length_is_missing,
    })
}

/// Writes an IPv4 total length, adjusting the header checksum.
pub(super) fn write_total_length(packet: &mut [u8]) {
    let len = packet.len() as u16;
    let old = u16::from_be_bytes([packet[2], packet[3]]);
    let sum = u16::from_be_bytes([packet[10], packet[11]]);
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    if sum != 0 {
        packet[10..12].copy_from_slice(&checksum::update(sum, old, len).to_be_bytes());
    }
}

/// Judges the IPv4 header checksum.
pub(super) fn ip_header(view: &PacketView<'_>, checksums: Checksums) -> Soundness {
    if view.verify_ip_checksum().is_ok() {
        return Soundness::Sound;
    }
    match checksums {
        Checksums::Strict => Soundness::Wrong,
        Checksums::Ignore => Soundness::Repaired,
        Checksums::Auto if view.bytes()[10..12] == [0, 0] => Soundness::Repaired,
        Checksums::Auto => Soundness::Wrong,
    }
}

/// Judges the checksum of a whole packet's transport header.
pub(super) fn transport(view: &PacketView<'_>, transport: &Transport<'_>, checksums: Checksums) -> Soundness {
    if view.verify_transport_checksum(transport).is_ok() {
        return Soundness::Sound;
    }
    match checksums {
        Checksums::Strict => Soundness::Wrong,
        Checksums::Ignore => Soundness::Repaired,
        Checksums::Auto if is_unfinished(view, transport) => Soundness::Repaired,
        Checksums::Auto => Soundness::Wrong,
    }
}

fn is_unfinished(view: &PacketView<'_>, transport: &Transport<'_>) -> bool {
    let bytes = &view.bytes()[view.transport_offset()..];
    let (protocol, len, field) = match transport {
        Transport::Tcp(_) => (6, bytes.len(), 16),
        Transport::Udp(udp) => (17, 8 + udp.payload.len(), 6),
        Transport::Icmp(_) => return false,
    };
    let checksum = u16::from_be_bytes([bytes[field], bytes[field + 1]]);
    let pseudo = |len| checksum::pseudo_header(view.source(), view.final_destination(), protocol, len);
    checksum == 0 || checksum == pseudo(len) || checksum == pseudo(0) || view.bytes().len() > LARGEST_ON_WIRE
}

/// Judges all checksums of a packet, as far as they are there.
pub(super) fn soundness(
    packet: &Packet,
    view: &PacketView<'_>,
    found: &Result<Transport<'_>, DropReason>,
    checksums: Checksums,
) -> Soundness {
    let header = ip_header(view, checksums);
    let is_whole = packet.captured as usize >= view.bytes().len();
    match found {
        Ok(found) if is_whole => worse(header, transport(view, found, checksums)),
        Ok(_) | Err(_) => header,
    }
}

/// The worse of two findings about one packet.
pub(super) fn worse(a: Soundness, b: Soundness) -> Soundness {
    match (a, b) {
        (Soundness::Wrong, _) | (_, Soundness::Wrong) => Soundness::Wrong,
        (Soundness::Repaired, _) | (_, Soundness::Repaired) => Soundness::Repaired,
        (Soundness::Sound, Soundness::Sound) => Soundness::Sound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A UDP datagram from 192.0.2.1:1000 to 192.0.2.2:2000 with a right header checksum.
    fn datagram(payload: &[u8]) -> Vec<u8> {
        let len = (28 + payload.len()) as u16;
        let mut packet = vec![
            0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2, // IP
            0x03, 0xe8, 0x07, 0xd0, 0, 0, 0, 0, // UDP
        ];
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet[24..26].copy_from_slice(&(len - 20).to_be_bytes());
        let sum = !checksum::sum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend_from_slice(payload);
        packet
    }

    fn with_checksum(mut packet: Vec<u8>, checksum: u16) -> Vec<u8> {
        packet[26..28].copy_from_slice(&checksum.to_be_bytes());
        packet
    }

    fn judged(packet: &[u8], checksums: Checksums) -> Soundness {
        let view = PacketView::parse(packet).unwrap();
        let found = view.transport().unwrap();
        worse(ip_header(&view, checksums), transport(&view, &found, checksums))
    }

    /// The sum of the pseudo-header by hand: addresses, protocol 17 and, where it counts, the length.
    fn pseudo(len: u16) -> u16 {
        let words: [u32; 6] = [0xc000, 0x0201, 0xc000, 0x0202, 17, u32::from(len)];
        let sum: u32 = words.iter().sum();
        (sum % 0xffff) as u16
    }

    #[test]
    fn unfinished_checksums_are_repaired_and_wrong_ones_judged() {
        let packet = datagram(b"data");
        for unfinished in [pseudo(12), pseudo(0)] {
            let packet = with_checksum(packet.clone(), unfinished);
            assert_eq!(judged(&packet, Checksums::Auto), Soundness::Repaired);
            assert_eq!(judged(&packet, Checksums::Strict), Soundness::Wrong);
        }
        let wrong = with_checksum(packet.clone(), 0x1234);
        assert_eq!(judged(&wrong, Checksums::Auto), Soundness::Wrong);
        assert_eq!(judged(&wrong, Checksums::Ignore), Soundness::Repaired);
        assert_eq!(
            judged(&packet, Checksums::Auto),
            Soundness::Sound,
            "IPv4 UDP may go without"
        );
    }

    #[test]
    fn a_super_packet_was_never_summed() {
        let packet = with_checksum(datagram(&[0; 1_500]), 0x1234);
        assert_eq!(judged(&packet, Checksums::Auto), Soundness::Repaired);
        let packet = with_checksum(datagram(&[0; 1_486]), 0x1234);
        assert_eq!(judged(&packet, Checksums::Auto), Soundness::Wrong);
    }

    #[test]
    fn an_ip_checksum_of_zero_is_repaired_and_another_wrong_one_judged() {
        let mut packet = datagram(b"data");
        packet[10..12].fill(0);
        assert_eq!(judged(&packet, Checksums::Auto), Soundness::Repaired);
        assert_eq!(judged(&packet, Checksums::Strict), Soundness::Wrong);
        packet[11] = 1;
        assert_eq!(judged(&packet, Checksums::Auto), Soundness::Wrong);
    }

    #[test]
    fn a_cut_packet_gets_its_length_back_and_no_more() {
        let packet = datagram(&[7; 100]);
        let found = |captured: usize, on_wire| extent(&packet[..captured], on_wire).map(|extent| extent.len);
        assert_eq!(found(40, 128), Some(128));
        assert_eq!(found(128, 128), Some(128));
        // The wire carried less than the header says: that is the sender's fault, and judged.
        assert_eq!(found(40, 60), Some(60));
        assert_eq!(found(40, 40), Some(40));
        // More on the wire than the packet is long: Ethernet padding.
        assert_eq!(found(40, 200), Some(128));
        assert_eq!(found(19, 128), None);
    }

    #[test]
    fn a_missing_total_length_is_the_captured_one() {
        let mut packet = datagram(&[7; 100]);
        packet[2..4].fill(0);
        let sum = checksum::update(u16::from_be_bytes([packet[10], packet[11]]), 128, 0);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        let found = extent(&packet, 128).unwrap();
        assert_eq!((found.len, found.length_is_missing), (128, true));
        write_total_length(&mut packet);
        assert_eq!(PacketView::parse(&packet).unwrap().verify_ip_checksum(), Ok(()));
    }
}
