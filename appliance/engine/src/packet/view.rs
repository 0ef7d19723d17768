//! IP packets: one walk over the headers, then trust the type.
//!
//! The walk finds what lists may judge a packet by; it is the engine's own reading and must agree with the XDP
//! program's. IPv6 extension headers are walked in any order, at most six of them: hop-by-hop options, routing,
//! destination options, mobility, fragment and authentication. A fragment behind the first has no transport
//! header; a packet that is its own only fragment (RFC 6946) is whole. Bytes behind the IP length are not part of
//! the packet.
//!
//! Lists are judged between [`PacketView::parse`] and [`PacketView::transport`], so that a packet which lists
//! drop needs no sound transport header.

use std::net::{IpAddr, Ipv6Addr};

use etherparse::{
    Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6HeaderSlice, Ipv6RawExtHeaderSlice, ip_number,
};

use super::checksum::{add, pseudo_header, sum};
use super::transport::{IcmpMessage, IcmpView, TcpView, Transport, UdpView};
use crate::event::DropReason;

/// Extension headers that are walked; a packet with more is not understood.
const EXTENSION_HEADERS_MAX: usize = 6;

/// An IP packet whose headers up to the transport header have been walked.
#[derive(Debug, Clone, Copy)]
pub struct PacketView<'a> {
    bytes: &'a [u8],
    is_ipv6: bool,
    walk: Walk,
}

/// One fragment of a datagram, of either IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FragmentView<'a> {
    /// Where `payload` belongs in the datagram, in bytes; a multiple of 8.
    pub offset: u16,
    /// Whether more fragments follow behind this one.
    pub more: bool,
    /// What the fragments of one datagram have in common: 16 bits in IPv4.
    pub identification: u32,
    /// The part of the datagram that this fragment carries; for IPv6, all behind the fragment header.
    pub payload: &'a [u8],
    /// The protocol of the datagram: the header's in IPv4, the fragment header's next header in IPv6.
    pub next_header: u8,
    /// Headers that each fragment repeats: all before `payload`, without the IPv6 fragment header.
    pub headers: &'a [u8],
    /// Offset in `headers` of the byte that says what follows them: it names the fragment header in IPv6.
    pub next_header_at: u16,
}

/// What the walk over the headers found.
#[derive(Debug, Clone, Copy, Default)]
struct Walk {
    protocol: Option<u8>,
    port: Option<u16>,
    transport: u16,
    routing_header: Option<u16>,
    fragment: Option<Fragment>,
}

#[derive(Debug, Clone, Copy)]
struct Fragment {
    offset: u16,
    more: bool,
    identification: u32,
    next_header: u8,
    /// Offset of the byte that names what follows the headers before the fragment header.
    next_header_at: u16,
    /// Where the fragment header, or in IPv4 the payload, begins.
    headers: u16,
    /// Where the payload begins.
    payload: u16,
}

impl<'a> PacketView<'a> {
    /// Walks the headers of the packet that starts at `bytes` and ends at its IP length.
    ///
    /// # Errors
    ///
    /// [`DropReason::IpHeader`], [`DropReason::IpLength`] or [`DropReason::ExtensionHeader`]: lists do not judge
    /// such a packet either. The IPv4 header checksum is not looked at.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Result<Self, DropReason> {
        match bytes.first().map(|byte| byte >> 4) {
            Some(4) => Self::parse_v4(bytes),
            Some(6) => Self::parse_v6(bytes),
            _ => Err(DropReason::IpHeader),
        }
    }

    fn parse_v4(bytes: &'a [u8]) -> Result<Self, DropReason> {
        let header = Ipv4HeaderSlice::from_slice(bytes).map_err(|_| DropReason::IpHeader)?;
        let total = usize::from(header.total_len());
        if total < header.slice().len() {
            return Err(DropReason::IpLength);
        }
        let bytes = bytes.get(..total).ok_or(DropReason::IpLength)?;
        Ok(Self {
            bytes,
            is_ipv6: false,
            walk: walk_v4(&header, bytes),
        })
    }

    fn parse_v6(bytes: &'a [u8]) -> Result<Self, DropReason> {
        let header = Ipv6HeaderSlice::from_slice(bytes).map_err(|_| DropReason::IpHeader)?;
        let payload = usize::from(header.payload_length());
        if payload == 0 && header.next_header() == ip_number::IPV6_HEADER_HOP_BY_HOP {
            return Err(DropReason::IpLength); // a jumbogram, RFC 2675
        }
        let bytes = bytes
            .get(..header.slice().len() + payload)
            .ok_or(DropReason::IpLength)?;
        Ok(Self {
            bytes,
            is_ipv6: true,
            walk: walk_v6(&header, bytes)?,
        })
    }

    /// The packet up to its IP length.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The source address.
    #[inline]
    pub fn source(&self) -> IpAddr {
        self.address(12, 8)
    }

    /// The destination address in the IP header.
    #[inline]
    pub fn destination(&self) -> IpAddr {
        self.address(16, 24)
    }

    /// The address at one of these offsets.
    #[inline]
    fn address(&self, in_v4: usize, in_v6: usize) -> IpAddr {
        const CHECKED: &str = "the fixed header is there";
        if self.is_ipv6 {
            IpAddr::from(*self.bytes[in_v6..].first_chunk::<16>().expect(CHECKED))
        } else {
            IpAddr::from(*self.bytes[in_v4..].first_chunk::<4>().expect(CHECKED))
        }
    }

    /// Whether it is an IPv6 packet.
    pub fn is_ipv6(&self) -> bool {
        self.is_ipv6
    }

    /// TTL or hop limit.
    pub fn hop_limit(&self) -> u8 {
        self.bytes[if self.is_ipv6() { 7 } else { 8 }]
    }

    /// Type of service or traffic class: six bits DSCP, two bits ECN.
    pub fn traffic_class(&self) -> u8 {
        if self.is_ipv6 {
            self.bytes[0] << 4 | self.bytes[1] >> 4
        } else {
            self.bytes[1]
        }
    }

    /// Whether routers may not fragment it: always so in IPv6.
    pub fn dont_fragment(&self) -> bool {
        self.is_ipv6() || self.bytes[6] & 0x40 != 0
    }

    /// The IP protocol number behind extension headers, for lists; `None` where it cannot be read, which is in a
    /// later IPv6 fragment that begins inside the extension headers.
    pub fn protocol(&self) -> Option<u8> {
        self.walk.protocol
    }

    /// The destination port, for lists; `None` where there is none, or it lies in another fragment.
    pub fn port(&self) -> Option<u16> {
        self.walk.port
    }

    /// Source and destination port of a TCP or UDP packet, before its header has been checked; `None` where there
    /// are none, and for every fragment.
    pub fn ports(&self) -> Option<(u16, u16)> {
        if self.walk.fragment.is_some() || !matches!(self.walk.protocol, Some(6 | 17)) {
            return None;
        }
        let &[a, b, c, d] = self.bytes[self.transport_offset()..].first_chunk()?;
        Some((word([a, b]), word([c, d])))
    }

    /// The packet that an ICMP error quotes; `None` for other packets.
    pub fn quoted(&self) -> Option<QuotedPacket> {
        if self.walk.fragment.is_some() {
            return None;
        }
        let bytes = &self.bytes[self.transport_offset()..];
        let icmp = match (self.walk.protocol, self.is_ipv6()) {
            (Some(1), false) => IcmpView::parse_v4(bytes),
            (Some(58), true) => IcmpView::parse_v6(bytes),
            _ => return None,
        };
        match icmp {
            Ok(IcmpView {
                message: IcmpMessage::Error { quoted, .. },
                ..
            }) => quoted,
            Ok(_) | Err(_) => None,
        }
    }

    /// Where the transport header begins, in bytes.
    pub fn transport_offset(&self) -> usize {
        usize::from(self.walk.transport)
    }

    /// The fragment that this packet is; `None` for a whole packet.
    pub fn fragment(&self) -> Option<FragmentView<'a>> {
        let fragment = self.walk.fragment?;
        Some(FragmentView {
            offset: fragment.offset,
            more: fragment.more,
            identification: fragment.identification,
            payload: &self.bytes[usize::from(fragment.payload)..],
            next_header: fragment.next_header,
            headers: &self.bytes[..usize::from(fragment.headers)],
            next_header_at: fragment.next_header_at,
        })
    }

    /// What is wrong with the addresses for a packet that a socket is to answer: an unspecified, multicast or
    /// broadcast source, or such a destination.
    pub fn address_check(&self) -> Option<DropReason> {
        match (self.source(), self.destination()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                if source.is_unspecified() || source.is_multicast() || source.is_broadcast() {
                    Some(DropReason::SourceAddress)
                } else if destination.is_unspecified() {
                    Some(DropReason::DestinationAddress)
                } else if destination.is_multicast() {
                    Some(DropReason::Multicast)
                } else if destination.is_broadcast() {
                    Some(DropReason::Broadcast)
                } else {
                    None
                }
            }
            (source, destination) => {
                if source.is_unspecified() || source.is_multicast() {
                    Some(DropReason::SourceAddress)
                } else if destination.is_unspecified() {
                    Some(DropReason::DestinationAddress)
                } else if destination.is_multicast() {
                    Some(DropReason::Multicast)
                } else {
                    None
                }
            }
        }
    }

    /// Checks the transport header and reads it.
    ///
    /// # Errors
    ///
    /// [`DropReason::UnsupportedProtocol`]; the header, flags, type and port reasons of each protocol; and
    /// [`DropReason::ExtensionHeader`] for a fragment, which is to be reassembled first and cannot be a fragment
    /// any more then.
    #[inline]
    pub fn transport(&self) -> Result<Transport<'a>, DropReason> {
        if self.walk.fragment.is_some() {
            return Err(DropReason::ExtensionHeader);
        }
        let bytes = &self.bytes[self.transport_offset()..];
        match (self.walk.protocol, self.is_ipv6()) {
            (Some(6), _) => TcpView::parse(bytes).map(Transport::Tcp),
            (Some(17), _) => UdpView::parse(bytes).map(Transport::Udp),
            (Some(1), false) => IcmpView::parse_v4(bytes).map(Transport::Icmp),
            (Some(58), true) => IcmpView::parse_v6(bytes).map(Transport::Icmp),
            _ => Err(DropReason::UnsupportedProtocol),
        }
    }

    /// Verifies the IPv4 header checksum.
    ///
    /// # Errors
    ///
    /// [`DropReason::IpChecksum`]; never for IPv6, which has none.
    pub fn verify_ip_checksum(&self) -> Result<(), DropReason> {
        if self.is_ipv6() || sum(&self.bytes[..usize::from(self.bytes[0] & 0xf) * 4]) == 0xffff {
            Ok(())
        } else {
            Err(DropReason::IpChecksum)
        }
    }

    /// Verifies the checksum of `transport`, which [`PacketView::transport`] read from this packet. A UDP datagram
    /// over IPv4 may go without.
    ///
    /// # Errors
    ///
    /// The protocol's checksum reason.
    pub fn verify_transport_checksum(&self, transport: &Transport<'_>) -> Result<(), DropReason> {
        let bytes = &self.bytes[self.transport_offset()..];
        let pseudo = |protocol, len| pseudo_header(self.source(), self.final_destination(), protocol, len);
        let (covered, pseudo, reason) = match transport {
            Transport::Tcp(_) => (bytes, pseudo(6, bytes.len()), DropReason::TcpChecksum),
            Transport::Udp(udp) => {
                if udp.checksum == 0 {
                    return if self.is_ipv6() {
                        Err(DropReason::UdpChecksum)
                    } else {
                        Ok(())
                    };
                }
                let len = 8 + udp.payload.len();
                (&bytes[..len], pseudo(17, len), DropReason::UdpChecksum)
            }
            Transport::Icmp(_) => {
                let pseudo = if self.is_ipv6() {
                    pseudo(58, bytes.len())
                } else {
                    0
                };
                (bytes, pseudo, DropReason::IcmpChecksum)
            }
        };
        if add(sum(covered), pseudo) == 0xffff {
            Ok(())
        } else {
            Err(reason)
        }
    }

    /// Whether an ICMP error may answer it (RFC 1122, section 3.2.2; RFC 4443, section 2.4 (e)): not if it is an
    /// ICMP error or redirect itself, not the first fragment, or not from one host to one host.
    pub fn may_cause_error(&self) -> bool {
        let first = self.walk.fragment.is_none_or(|fragment| fragment.offset == 0);
        let kind = self.bytes.get(self.transport_offset());
        let error = match (self.walk.protocol, self.is_ipv6()) {
            (Some(1), false) => matches!(kind, None | Some(3 | 4 | 5 | 11 | 12)),
            (Some(58), true) => matches!(kind, None | Some(0..128 | 137)),
            _ => false,
        };
        first && !error && self.address_check().is_none()
    }

    /// The destination that transport checksums cover: under an IPv6 routing header with segments left, the last
    /// address of its list (RFC 8200, section 8.1).
    pub fn final_destination(&self) -> IpAddr {
        self.walk
            .routing_header
            .and_then(|at| final_segment(&self.bytes[usize::from(at)..]))
            .map_or_else(|| self.destination(), IpAddr::V6)
    }
}

/// The addresses, protocol and ports of a packet that an ICMP error quotes, which may be cut anywhere behind its
/// IP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotedPacket {
    /// Who had sent it.
    pub source: IpAddr,
    /// Where to.
    pub destination: IpAddr,
    /// IP protocol number behind extension headers.
    pub protocol: u8,
    /// Source and destination port; for ICMP echo the identifier and sequence number. `None` if cut off, or in a
    /// later fragment.
    pub ports: Option<(u16, u16)>,
}

impl QuotedPacket {
    /// Reads the packet quoted in `bytes`; `None` if no protocol can be read.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (source, destination, walk) = if bytes.first()? >> 4 == 4 {
            let header = Ipv4HeaderSlice::from_slice(bytes).ok()?;
            let walk = walk_v4(&header, bytes);
            (
                IpAddr::V4(header.source_addr()),
                IpAddr::V4(header.destination_addr()),
                walk,
            )
        } else {
            let header = Ipv6HeaderSlice::from_slice(bytes).ok()?;
            let walk = walk_v6(&header, bytes).ok()?;
            (
                IpAddr::V6(header.source_addr()),
                IpAddr::V6(header.destination_addr()),
                walk,
            )
        };
        let protocol = walk.protocol?;
        let transport = bytes.get(usize::from(walk.transport)..).unwrap_or_default();
        let ports = match (protocol, walk.fragment) {
            (_, Some(Fragment { offset: 1.., .. })) => None,
            (6 | 17, _) => transport
                .first_chunk()
                .map(|&[a, b, c, d]| (word([a, b]), word([c, d]))),
            (1 | 58, _) => transport
                .first_chunk()
                .map(|&[_, _, _, _, a, b, c, d]| (word([a, b]), word([c, d]))),
            _ => None,
        };
        Some(Self {
            source,
            destination,
            protocol,
            ports,
        })
    }
}

const fn word(bytes: [u8; 2]) -> u16 {
    u16::from_be_bytes(bytes)
}

/// Walks an IPv4 packet; `bytes` ends where the packet does.
fn walk_v4(header: &Ipv4HeaderSlice<'_>, bytes: &[u8]) -> Walk {
    let transport = header.slice().len() as u16;
    let protocol = header.protocol().0;
    let fragment = header.is_fragmenting_payload().then(|| Fragment {
        offset: header.fragments_offset().byte_offset(),
        more: header.more_fragments(),
        identification: u32::from(header.identification()),
        next_header: protocol,
        next_header_at: 9,
        headers: transport,
        payload: transport,
    });
    let first = fragment.is_none_or(|fragment| fragment.offset == 0);
    let port = if first {
        destination_port(protocol, bytes, transport)
    } else {
        None
    };
    Walk {
        protocol: Some(protocol),
        port,
        transport,
        routing_header: None,
        fragment,
    }
}

/// Walks an IPv6 packet; `bytes` ends where the packet does.
fn walk_v6(header: &Ipv6HeaderSlice<'_>, bytes: &[u8]) -> Result<Walk, DropReason> {
    let mut walk = Walk::default();
    let mut at = header.slice().len();
    let mut next_header = header.next_header();
    let mut next_header_at = 6;
    let mut count = 0;
    while is_extension(next_header) {
        count += 1;
        if count > EXTENSION_HEADERS_MAX {
            return Err(DropReason::ExtensionHeader);
        }
        let rest = &bytes[at..];
        let (following, len) = match next_header {
            ip_number::IPV6_FRAGMENTATION_HEADER => {
                let fragment =
                    Ipv6FragmentHeaderSlice::from_slice(rest).map_err(|_| DropReason::ExtensionHeader)?;
                let following = fragment.next_header();
                let offset = fragment.fragment_offset().byte_offset();
                if fragment.is_fragmenting_payload() && walk.fragment.is_none() {
                    walk.fragment = Some(Fragment {
                        offset,
                        more: fragment.more_fragments(),
                        identification: fragment.identification(),
                        next_header: following.0,
                        next_header_at: next_header_at as u16,
                        headers: at as u16,
                        payload: (at + 8) as u16,
                    });
                }
                if offset != 0 {
                    walk.protocol = (!is_extension(following)).then_some(following.0);
                    walk.transport = (at + 8) as u16;
                    return Ok(walk);
                }
                (following, 8)
            }
            // RFC 4302 counts in units of four bytes; etherparse refuses the shortest lengths, which lists must
            // still see past.
            ip_number::AUTHENTICATION_HEADER => {
                let &[following, units] = rest.first_chunk().ok_or(DropReason::ExtensionHeader)?;
                (following.into(), (usize::from(units) + 2) * 4)
            }
            _ => {
                let extension =
                    Ipv6RawExtHeaderSlice::from_slice(rest).map_err(|_| DropReason::ExtensionHeader)?;
                if next_header == ip_number::IPV6_ROUTE_HEADER {
                    walk.routing_header = Some(at as u16);
                }
                (extension.next_header(), extension.slice().len())
            }
        };
        if rest.len() < len {
            return Err(DropReason::ExtensionHeader);
        }
        next_header_at = at;
        at += len;
        next_header = following;
    }
    walk.protocol = Some(next_header.0);
    walk.transport = at as u16;
    walk.port = destination_port(next_header.0, bytes, walk.transport);
    Ok(walk)
}

fn is_extension(number: etherparse::IpNumber) -> bool {
    matches!(
        number,
        ip_number::IPV6_HEADER_HOP_BY_HOP
            | ip_number::IPV6_ROUTE_HEADER
            | ip_number::IPV6_FRAGMENTATION_HEADER
            | ip_number::AUTHENTICATION_HEADER
            | ip_number::IPV6_DESTINATION_OPTIONS
            | ip_number::MOBILITY_HEADER
    )
}

fn destination_port(protocol: u8, bytes: &[u8], transport: u16) -> Option<u16> {
    if !matches!(protocol, 6 | 17) {
        return None;
    }
    let &[_, _, high, low] = bytes.get(usize::from(transport)..)?.first_chunk()?;
    Some(word([high, low]))
}

/// The last address of the routing header that `bytes` starts with; `None` if it has been reached, or if the
/// header's type does not list whole addresses.
fn final_segment(bytes: &[u8]) -> Option<Ipv6Addr> {
    let &[_, units, kind, segments_left] = bytes.first_chunk()?;
    let addresses = usize::from(units) / 2;
    if segments_left == 0 || addresses == 0 {
        return None;
    }
    let index = match kind {
        0 | 2 => addresses - 1, // source route and mobility (RFC 6275): in order of travel
        4 => 0,                 // segment routing (RFC 8754): in reverse
        _ => return None,
    };
    let address: [u8; 16] = *bytes.get(8 + index * 16..)?.first_chunk()?;
    Some(address.into())
}

#[cfg(test)]
mod tests;
