//! Packets as clients write and read them. The reading is etherparse's: another one than the engine's own.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use etherparse::{
    Icmpv6Type, IpFragOffset, IpNumber, Ipv4Header, Ipv6FragmentHeader, Ipv6Header, NetSlice, PacketBuilder,
    SlicedPacket, TcpHeader, TcpOptionElement, TransportSlice,
};

/// TTL and hop limit of all that is written here.
pub const HOP_LIMIT: u8 = 64;

/// TCP flag: no more data.
pub const FIN: u8 = 1;
/// TCP flag: synchronise sequence numbers.
pub const SYN: u8 = 2;
/// TCP flag: reset.
pub const RST: u8 = 4;
/// TCP flag: push.
pub const PSH: u8 = 8;
/// TCP flag: the acknowledgment number counts.
pub const ACK: u8 = 16;

/// A TCP segment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub struct Segment {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgment: u32,
    pub window: u16,
    pub options: Options,
    pub payload: Vec<u8>,
}

/// The options that a SYN may carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub struct Options {
    pub max_segment_size: Option<u16>,
    pub window_scale: Option<u8>,
    pub sack_permitted: bool,
}

/// A UDP datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub struct Datagram {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub payload: Vec<u8>,
}

/// An ICMP or ICMPv6 message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub struct Icmp {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub kind: u8,
    pub code: u8,
    /// The last four bytes of the header; of an echo, identifier and sequence number.
    pub rest: [u8; 4],
    pub payload: Vec<u8>,
}

/// What an IP packet carries.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "variants are named for what they hold")]
pub enum Message {
    Tcp(Segment),
    Udp(Datagram),
    Icmp(Icmp),
}

impl Segment {
    /// Whether all of `flags` are set.
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// The sequence space it takes.
    pub fn sequence_len(&self) -> u32 {
        self.payload.len() as u32 + u32::from(self.has(SYN)) + u32::from(self.has(FIN))
    }

    /// The packet.
    pub fn packet(&self) -> Vec<u8> {
        let mut header = TcpHeader::new(
            self.source.port(),
            self.destination.port(),
            self.sequence,
            self.window,
        );
        header.acknowledgment_number = self.acknowledgment;
        header.fin = self.has(FIN);
        header.syn = self.has(SYN);
        header.rst = self.has(RST);
        header.psh = self.has(PSH);
        header.ack = self.has(ACK);
        header.urg = self.has(32);
        header.ece = self.has(64);
        header.cwr = self.has(128);
        let Options {
            max_segment_size,
            window_scale,
            sack_permitted,
        } = self.options;
        let options: Vec<_> = [
            max_segment_size.map(TcpOptionElement::MaximumSegmentSize),
            window_scale.map(TcpOptionElement::WindowScale),
            sack_permitted.then_some(TcpOptionElement::SelectiveAcknowledgementPermitted),
        ]
        .into_iter()
        .flatten()
        .collect();
        header.set_options(&options).expect("the options fit");
        let mut packet = Vec::with_capacity(100 + self.payload.len());
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                PacketBuilder::ipv4(source.octets(), destination.octets(), HOP_LIMIT)
                    .tcp_header(header)
                    .write(&mut packet, &self.payload)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                PacketBuilder::ipv6(source.octets(), destination.octets(), HOP_LIMIT)
                    .tcp_header(header)
                    .write(&mut packet, &self.payload)
            }
            _ => panic!("addresses of one family"),
        }
        .expect("a segment fits into a packet");
        packet
    }
}

impl Datagram {
    /// The packet.
    pub fn packet(&self) -> Vec<u8> {
        let (from, to) = (self.source.port(), self.destination.port());
        let mut packet = Vec::with_capacity(50 + self.payload.len());
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                PacketBuilder::ipv4(source.octets(), destination.octets(), HOP_LIMIT)
                    .udp(from, to)
                    .write(&mut packet, &self.payload)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                PacketBuilder::ipv6(source.octets(), destination.octets(), HOP_LIMIT)
                    .udp(from, to)
                    .write(&mut packet, &self.payload)
            }
            _ => panic!("addresses of one family"),
        }
        .expect("a datagram fits into a packet");
        packet
    }
}

/// An echo request.
pub fn echo_request(
    source: IpAddr,
    destination: IpAddr,
    identifier: u16,
    sequence: u16,
    payload: &[u8],
) -> Vec<u8> {
    let mut packet = Vec::with_capacity(50 + payload.len());
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            PacketBuilder::ipv4(source.octets(), destination.octets(), HOP_LIMIT)
                .icmpv4_echo_request(identifier, sequence)
                .write(&mut packet, payload)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            PacketBuilder::ipv6(source.octets(), destination.octets(), HOP_LIMIT)
                .icmpv6_echo_request(identifier, sequence)
                .write(&mut packet, payload)
        }
        _ => panic!("addresses of one family"),
    }
    .expect("an echo request fits into a packet");
    packet
}

/// Cuts a packet without IP options or extension headers into fragments whose data is `size` bytes long, a multiple
/// of 8; the last may be shorter.
pub fn fragments(packet: &[u8], identification: u32, size: usize) -> Vec<Vec<u8>> {
    assert!(
        size > 0 && size.is_multiple_of(8),
        "fragments are cut at multiples of 8"
    );
    let is_v6 = packet[0] >> 4 == 6;
    let (header, data) = packet.split_at(if is_v6 { 40 } else { 20 });
    let cut = |(index, part): (usize, &[u8])| {
        let offset = IpFragOffset::try_new((index * size / 8) as u16).expect("within 64 KiB");
        let more = index * size + part.len() < data.len();
        let mut fragment = Vec::with_capacity(48 + part.len());
        if is_v6 {
            let (mut ip, _) = Ipv6Header::from_slice(header).expect("an IPv6 header");
            let extension = Ipv6FragmentHeader::new(ip.next_header, offset, more, identification);
            ip.next_header = IpNumber::IPV6_FRAGMENTATION_HEADER;
            ip.payload_length = (8 + part.len()) as u16;
            fragment.extend_from_slice(&ip.to_bytes());
            fragment.extend_from_slice(&extension.to_bytes());
        } else {
            let (mut ip, _) = Ipv4Header::from_slice(header).expect("an IPv4 header");
            ip.identification = identification as u16;
            ip.dont_fragment = false;
            ip.more_fragments = more;
            ip.fragment_offset = offset;
            ip.set_payload_len(part.len()).expect("shorter than the whole");
            ip.header_checksum = ip.calc_header_checksum();
            fragment.extend_from_slice(&ip.to_bytes());
        }
        fragment.extend_from_slice(part);
        fragment
    };
    data.chunks(size).enumerate().map(cut).collect()
}

/// What a client's host makes of packets: messages, with fragments put together.
#[derive(Debug, Default)]
pub struct Reader {
    /// By source, destination and identification: the parts by offset, and where the data ends.
    partial: BTreeMap<(IpAddr, IpAddr, u32), Parts>,
}

#[derive(Debug, Default)]
struct Parts {
    data: BTreeMap<usize, Vec<u8>>,
    end: Option<usize>,
}

impl Reader {
    /// Reads a packet. `None` is a fragment that others are missing for.
    ///
    /// # Panics
    ///
    /// If anything about the packet is unsound, checksums included.
    pub fn read(&mut self, packet: &[u8]) -> Option<Message> {
        let sliced = SlicedPacket::from_ip(packet).expect("the packet is sound");
        let (source, destination) = addresses(&sliced);
        if let Some(transport) = &sliced.transport {
            return Some(message(source, destination, transport));
        }
        let (identification, offset, more, protocol) = fragment(&sliced, packet);
        let data = sliced.ip_payload().expect("an IP packet").payload;
        let key = (source, destination, identification);
        let parts = self.partial.entry(key).or_default();
        parts.data.insert(offset, data.to_vec());
        if !more {
            parts.end = Some(offset + data.len());
        }
        let mut whole = Vec::new();
        for (offset, data) in &parts.data {
            if *offset != whole.len() {
                return None;
            }
            whole.extend_from_slice(data);
        }
        if parts.end != Some(whole.len()) {
            return None;
        }
        self.partial.remove(&key);
        let transport = match protocol {
            IpNumber::UDP => {
                TransportSlice::Udp(etherparse::UdpSlice::from_slice(&whole).expect("a datagram"))
            }
            IpNumber::ICMP => {
                TransportSlice::Icmpv4(etherparse::Icmpv4Slice::from_slice(&whole).expect("an ICMP message"))
            }
            IpNumber::IPV6_ICMP => TransportSlice::Icmpv6(
                etherparse::Icmpv6Slice::from_slice(&whole).expect("an ICMPv6 message"),
            ),
            other => panic!("fragments of {other:?}"),
        };
        Some(message(source, destination, &transport))
    }
}

fn addresses(packet: &SlicedPacket<'_>) -> (IpAddr, IpAddr) {
    match packet.net.as_ref().expect("an IP packet") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(
                header.header_checksum,
                header.calc_header_checksum(),
                "the IPv4 header checksum"
            );
            (header.source.into(), header.destination.into())
        }
        NetSlice::Ipv6(ip) => (
            ip.header().source_addr().into(),
            ip.header().destination_addr().into(),
        ),
        NetSlice::Arp(_) => panic!("no ARP on a TUN"),
    }
}

/// Identification, offset in bytes, whether more follow, and the protocol.
fn fragment(packet: &SlicedPacket<'_>, bytes: &[u8]) -> (u32, usize, bool, IpNumber) {
    match packet.net.as_ref().expect("an IP packet") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert!(header.is_fragmenting_payload(), "neither transport nor fragment");
            (
                header.identification().into(),
                header.fragments_offset().byte_offset().into(),
                header.more_fragments(),
                header.protocol(),
            )
        }
        NetSlice::Ipv6(ip) => {
            assert_eq!(
                ip.header().next_header(),
                IpNumber::IPV6_FRAGMENTATION_HEADER,
                "neither transport nor fragment"
            );
            let (header, _) = Ipv6FragmentHeader::from_slice(&bytes[40..]).expect("a fragment header");
            (
                header.identification,
                header.fragment_offset.byte_offset().into(),
                header.more_fragments,
                header.next_header,
            )
        }
        NetSlice::Arp(_) => panic!("no ARP on a TUN"),
    }
}

fn message(source: IpAddr, destination: IpAddr, transport: &TransportSlice<'_>) -> Message {
    match transport {
        TransportSlice::Tcp(tcp) => {
            let expected = match (source, destination) {
                (IpAddr::V4(from), IpAddr::V4(to)) => tcp.calc_checksum_ipv4(from.octets(), to.octets()),
                (IpAddr::V6(from), IpAddr::V6(to)) => tcp.calc_checksum_ipv6(from.octets(), to.octets()),
                _ => panic!("addresses of one family"),
            };
            // Zero may be sent as all ones (RFC 1624).
            let expected = expected.expect("short enough");
            assert!(
                tcp.checksum() == expected || (expected == 0 && tcp.checksum() == 0xffff),
                "the TCP checksum"
            );
            let mut options = Options::default();
            for option in tcp.options_iterator() {
                match option.expect("sound options") {
                    TcpOptionElement::MaximumSegmentSize(size) => options.max_segment_size = Some(size),
                    TcpOptionElement::WindowScale(shift) => options.window_scale = Some(shift),
                    TcpOptionElement::SelectiveAcknowledgementPermitted => options.sack_permitted = true,
                    TcpOptionElement::Noop
                    | TcpOptionElement::SelectiveAcknowledgement(..)
                    | TcpOptionElement::Timestamp(..) => {}
                }
            }
            Message::Tcp(Segment {
                source: SocketAddr::new(source, tcp.source_port()),
                destination: SocketAddr::new(destination, tcp.destination_port()),
                flags: tcp.header_slice()[13],
                sequence: tcp.sequence_number(),
                acknowledgment: tcp.acknowledgment_number(),
                window: tcp.window_size(),
                options,
                payload: tcp.payload().to_vec(),
            })
        }
        TransportSlice::Udp(udp) => {
            let header = udp.to_header();
            let expected = match (source, destination) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    header.calc_checksum_ipv4_raw(from.octets(), to.octets(), udp.payload())
                }
                (IpAddr::V6(from), IpAddr::V6(to)) => {
                    header.calc_checksum_ipv6_raw(from.octets(), to.octets(), udp.payload())
                }
                _ => panic!("addresses of one family"),
            };
            assert_eq!(Ok(header.checksum), expected, "the UDP checksum");
            Message::Udp(Datagram {
                source: SocketAddr::new(source, udp.source_port()),
                destination: SocketAddr::new(destination, udp.destination_port()),
                payload: udp.payload().to_vec(),
            })
        }
        TransportSlice::Icmpv4(icmp) => {
            assert_eq!(
                icmp.checksum(),
                icmp.icmp_type().calc_checksum(icmp.payload()),
                "the ICMP checksum"
            );
            Message::Icmp(Icmp {
                source,
                destination,
                kind: icmp.type_u8(),
                code: icmp.code_u8(),
                rest: icmp.bytes5to8(),
                payload: icmp.payload().to_vec(),
            })
        }
        TransportSlice::Icmpv6(icmp) => {
            let (IpAddr::V6(from), IpAddr::V6(to)) = (source, destination) else {
                panic!("ICMPv6 over IPv4")
            };
            let kind: Icmpv6Type = icmp.icmp_type();
            assert_eq!(
                Ok(icmp.checksum()),
                kind.calc_checksum(from.octets(), to.octets(), icmp.payload()),
                "the ICMPv6 checksum"
            );
            Message::Icmp(Icmp {
                source,
                destination,
                kind: icmp.type_u8(),
                code: icmp.code_u8(),
                rest: icmp.bytes5to8(),
                payload: icmp.payload().to_vec(),
            })
        }
        TransportSlice::Igmp(_) => panic!("the engine speaks no IGMP"),
    }
}
