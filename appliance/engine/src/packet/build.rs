//! Packets that the engine makes itself: datagrams for clients, and ICMP messages.
//!
//! Each knows its length first and is then written into a buffer of that length, as
//! [`World::packet_buffer`] lends it.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use super::checksum::{add, fold, nonzero, pseudo_header, sum};
use super::offload::{UDP_CHECKSUM, put};
use super::transport::Echo;
use crate::addr::{FlowId, IngressId};
use crate::event::DropReason;
use crate::io::{IcmpError, PacketOut, Unreachable, World};

/// TTL and hop limit of everything made here: the default that RFC 1700 recommends.
pub const HOP_LIMIT: u8 = 64;

/// Largest ICMP error over IPv4, in bytes: RFC 1812, section 4.3.2.3.
const ICMP_ERROR_MAX: usize = 576;
/// Largest ICMPv6 error, in bytes: the minimum MTU (RFC 4443, section 2.4 (c)).
const ICMPV6_ERROR_MAX: usize = 1280;

/// Length of the transport header of a [`Datagram`]: all its protocols have one of 8 bytes.
const HEADER_LEN: usize = 8;
const FRAGMENT_HEADER_LEN: usize = 8;

/// A UDP datagram, ICMP echo or ICMP error that is ready to be written.
#[derive(Debug, Clone, Copy)]
pub struct Datagram<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    header: [u8; HEADER_LEN],
    payload: &'a [u8],
    segment_size: Option<NonZeroU16>,
}

impl<'a> Datagram<'a> {
    /// A UDP datagram; with `segment_size`, as many datagrams of that size as `payload` holds, the last of which
    /// may be shorter. An IPv4-mapped `source` counts as IPv4.
    ///
    /// # Errors
    ///
    /// [`DropReason::TooBig`] if no IP packet, not even in fragments, holds it; [`DropReason::Filtered`] if the
    /// addresses are of different IP versions, since no client can have sent there.
    pub fn udp(
        source: SocketAddr,
        destination: SocketAddr,
        payload: &'a [u8],
        segment_size: Option<NonZeroU16>,
    ) -> Result<Self, DropReason> {
        let mut datagram = Self::new(source.ip(), destination.ip(), 17, [0; 8], payload)?;
        datagram.segment_size = segment_size.filter(|size| usize::from(size.get()) < payload.len());
        put(&mut datagram.header, 0, &source.port().to_be_bytes());
        put(&mut datagram.header, 2, &destination.port().to_be_bytes());
        datagram.set_udp_length();
        Ok(datagram)
    }

    /// An ICMP or ICMPv6 echo request.
    ///
    /// # Errors
    ///
    /// As for [`Datagram::udp`].
    pub fn echo_request(source: IpAddr, destination: IpAddr, echo: Echo<'a>) -> Result<Self, DropReason> {
        Self::echo(
            source,
            destination,
            echo,
            if destination.is_ipv6() { 128 } else { 8 },
        )
    }

    /// An ICMP or ICMPv6 echo reply.
    ///
    /// # Errors
    ///
    /// As for [`Datagram::udp`].
    pub fn echo_reply(source: IpAddr, destination: IpAddr, echo: Echo<'a>) -> Result<Self, DropReason> {
        Self::echo(
            source,
            destination,
            echo,
            if destination.is_ipv6() { 129 } else { 0 },
        )
    }

    fn echo(source: IpAddr, destination: IpAddr, echo: Echo<'a>, kind: u8) -> Result<Self, DropReason> {
        let mut header = [kind, 0, 0, 0, 0, 0, 0, 0];
        put(&mut header, 4, &echo.identifier.to_be_bytes());
        put(&mut header, 6, &echo.sequence.to_be_bytes());
        Self::icmp(source, destination, header, echo.payload)
    }

    /// An ICMP or ICMPv6 error from `source` to the client at `destination`, quoting as much of the client's
    /// packet `quoted` as RFC 1812 (576 bytes in all) and RFC 4443 (1280) want. Ask
    /// [`PacketView::may_cause_error`](super::PacketView::may_cause_error) first.
    ///
    /// # Errors
    ///
    /// [`DropReason::Filtered`] if the addresses are of different IP versions.
    pub fn icmp_error(
        source: IpAddr,
        destination: IpAddr,
        error: IcmpError,
        quoted: &'a [u8],
    ) -> Result<Self, DropReason> {
        let (kind, code, rest, max) = if destination.is_ipv6() {
            let (kind, code, rest) = icmpv6_error(error);
            (kind, code, rest, ICMPV6_ERROR_MAX)
        } else {
            let (kind, code, rest) = icmpv4_error(error);
            (kind, code, rest, ICMP_ERROR_MAX)
        };
        let mut header = [kind, code, 0, 0, 0, 0, 0, 0];
        put(&mut header, 4, &rest.to_be_bytes());
        let room = max - ip_header_len(destination) - HEADER_LEN;
        Self::icmp(source, destination, header, &quoted[..quoted.len().min(room)])
    }

    fn icmp(
        source: IpAddr,
        destination: IpAddr,
        header: [u8; HEADER_LEN],
        payload: &'a [u8],
    ) -> Result<Self, DropReason> {
        let protocol = if destination.is_ipv6() { 58 } else { 1 };
        let mut datagram = Self::new(source, destination, protocol, header, payload)?;
        let pseudo = if destination.is_ipv6() {
            datagram.pseudo_header()
        } else {
            0
        };
        let checksum = !add(pseudo, add(sum(&header), sum(payload)));
        put(&mut datagram.header, 2, &checksum.to_be_bytes());
        Ok(datagram)
    }

    fn new(
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
        header: [u8; HEADER_LEN],
        payload: &'a [u8],
    ) -> Result<Self, DropReason> {
        let source = if destination.is_ipv4() {
            source.to_canonical()
        } else {
            source
        };
        if source.is_ipv6() != destination.is_ipv6() {
            return Err(DropReason::Filtered);
        }
        // The IPv4 total length counts the IP header, the IPv6 payload length does not.
        let overhead = if destination.is_ipv4() { 20 } else { 0 } + HEADER_LEN;
        if payload.len() + overhead > usize::from(u16::MAX) {
            return Err(DropReason::TooBig);
        }
        Ok(Self {
            source,
            destination,
            protocol,
            header,
            payload,
            segment_size: None,
        })
    }

    /// Length as one packet, in bytes.
    pub fn packet_len(&self) -> usize {
        ip_header_len(self.destination) + self.message_len()
    }

    /// Writes it as one packet into `buffer`, which is [`Datagram::packet_len`] long, and says how it is to leave:
    /// a UDP checksum is left to the device. `identification` is for IPv4; a super-packet takes one number for
    /// each datagram.
    ///
    /// # Panics
    ///
    /// If `buffer` has another length.
    pub fn write(
        &self,
        buffer: &mut [u8],
        identification: u16,
        ingress: IngressId,
        flow: Option<FlowId>,
    ) -> PacketOut {
        let (ip, message) = buffer.split_at_mut(ip_header_len(self.destination));
        let fragment = [identification.to_be_bytes(), [0, 0]];
        write_ip_header(
            ip,
            self.source,
            self.destination,
            self.protocol,
            message.len(),
            fragment,
        );
        let (header, payload) = message.split_at_mut(HEADER_LEN);
        header.copy_from_slice(&self.header);
        payload.copy_from_slice(self.payload);
        let partial_checksum = (self.protocol == 17).then_some(UDP_CHECKSUM);
        if let Some(field) = partial_checksum {
            put(header, usize::from(field), &self.pseudo_header().to_be_bytes());
        }
        let header_len = ip.len() as u16;
        PacketOut {
            ingress,
            flow,
            header_len,
            partial_checksum,
            segment_size: self.segment_size,
        }
    }

    /// Sends it: as it is if it fits into packets of `mtu` bytes, else in fragments. Takes as many numbers from
    /// the counter `identification` as it needs.
    pub fn send(
        &self,
        world: &mut dyn World,
        mtu: u16,
        ingress: IngressId,
        flow: Option<FlowId>,
        identification: &mut u32,
    ) {
        let mtu = usize::from(mtu);
        let overhead = ip_header_len(self.destination) + HEADER_LEN;
        let segment = self
            .segment_size
            .map_or(self.payload.len(), |size| usize::from(size.get()));
        if overhead + segment <= mtu && self.packet_len() <= usize::from(u16::MAX) {
            let first = *identification;
            *identification = first.wrapping_add(self.payload.len().div_ceil(segment.max(1)).max(1) as u32);
            let buffer = world.packet_buffer(self.packet_len());
            let packet = self.write(buffer, first as u16, ingress, flow);
            world.send_packet(packet);
        } else if self.segment_size.is_some() {
            for payload in self.payload.chunks(segment) {
                let mut single = Self {
                    payload,
                    segment_size: None,
                    ..*self
                };
                single.set_udp_length();
                single.send(world, mtu as u16, ingress, flow, identification);
            }
        } else {
            self.send_fragments(world, mtu, ingress, flow, *identification);
            *identification = identification.wrapping_add(1);
        }
    }

    /// Sends it in fragments of at most `mtu` bytes (RFC 791, section 3.2 and RFC 8200, section 4.5).
    fn send_fragments(
        &self,
        world: &mut dyn World,
        mtu: usize,
        ingress: IngressId,
        flow: Option<FlowId>,
        identification: u32,
    ) {
        let v6 = self.destination.is_ipv6();
        let headers = ip_header_len(self.destination) + if v6 { FRAGMENT_HEADER_LEN } else { 0 };
        let room = (mtu - headers) & !7;
        let mut header = self.header;
        if self.protocol == 17 {
            let checksum = nonzero(add(self.pseudo_header(), add(sum(&header), sum(self.payload))));
            put(&mut header, usize::from(UDP_CHECKSUM), &checksum.to_be_bytes());
        }
        let mut offset = 0;
        while offset < self.message_len() {
            let end = self.message_len().min(offset + room);
            let more = end < self.message_len();
            let buffer = world.packet_buffer(headers + end - offset);
            let (ip, part) = buffer.split_at_mut(headers);
            if v6 {
                let (ip, fragment) = ip.split_at_mut(headers - FRAGMENT_HEADER_LEN);
                let len = FRAGMENT_HEADER_LEN + part.len();
                write_ip_header(ip, self.source, self.destination, 44, len, [[0; 2]; 2]);
                fragment[..2].copy_from_slice(&[self.protocol, 0]);
                put(fragment, 2, &(offset as u16 | u16::from(more)).to_be_bytes());
                put(fragment, 4, &identification.to_be_bytes());
            } else {
                let flags_and_offset = u16::from(more) << 13 | (offset / 8) as u16;
                let fragment = [
                    (identification as u16).to_be_bytes(),
                    flags_and_offset.to_be_bytes(),
                ];
                write_ip_header(
                    ip,
                    self.source,
                    self.destination,
                    self.protocol,
                    part.len(),
                    fragment,
                );
            }
            let (start, part) = if offset == 0 {
                part[..HEADER_LEN].copy_from_slice(&header);
                (0, &mut part[HEADER_LEN..])
            } else {
                (offset - HEADER_LEN, part)
            };
            part.copy_from_slice(&self.payload[start..end - HEADER_LEN]);
            world.send_packet(PacketOut {
                ingress,
                flow,
                header_len: headers as u16,
                partial_checksum: None,
                segment_size: None,
            });
            offset = end;
        }
    }

    fn set_udp_length(&mut self) {
        let len = self.message_len() as u16;
        put(&mut self.header, 4, &len.to_be_bytes());
    }

    fn message_len(&self) -> usize {
        HEADER_LEN + self.payload.len()
    }

    fn pseudo_header(&self) -> u16 {
        pseudo_header(self.source, self.destination, self.protocol, self.message_len())
    }
}

/// Length of an IP header without options or extension headers.
pub(crate) const fn ip_header_len(address: IpAddr) -> usize {
    match address {
        IpAddr::V4(_) => 20,
        IpAddr::V6(_) => 40,
    }
}

/// Fills `header` for `payload_len` bytes behind it. `fragment` is what IPv4 says of fragments: identification,
/// then flags and offset.
pub(crate) fn write_ip_header(
    header: &mut [u8],
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    payload_len: usize,
    fragment: [[u8; 2]; 2],
) {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let [[a, b], [c, d]] = fragment;
            let total_len = (20 + payload_len) as u16;
            let words = [
                0x4500_0000 | u32::from(total_len),
                u32::from_be_bytes([a, b, c, d]),
                u32::from_be_bytes([HOP_LIMIT, protocol, 0, 0]),
                source.to_bits(),
                destination.to_bits(),
            ];
            let checksum = !fold(words.iter().map(|word| u64::from(*word)).sum());
            let (words_of_header, _) = header.as_chunks_mut::<4>();
            for (place, word) in words_of_header.iter_mut().zip(words) {
                *place = word.to_be_bytes();
            }
            put(header, 10, &checksum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            header.fill(0);
            header[0] = 0x60;
            put(header, 4, &(payload_len as u16).to_be_bytes());
            put(header, 6, &[protocol, HOP_LIMIT]);
            put(header, 8, &source.octets());
            put(header, 24, &destination.octets());
        }
        _ => panic!("a packet has addresses of one version"),
    }
}

/// Type, code and the last four header bytes of an ICMP error.
fn icmpv4_error(error: IcmpError) -> (u8, u8, u32) {
    match error {
        IcmpError::Unreachable(Unreachable::Network) => (3, 0, 0),
        IcmpError::Unreachable(Unreachable::Host) => (3, 1, 0),
        IcmpError::Unreachable(Unreachable::Protocol) => (3, 2, 0),
        IcmpError::Unreachable(Unreachable::Port) => (3, 3, 0),
        IcmpError::Unreachable(Unreachable::Prohibited) => (3, 13, 0),
        IcmpError::PacketTooBig { mtu } => (3, 4, mtu.into()),
        IcmpError::TimeExceeded => (11, 0, 0),
    }
}

/// Type, code and the last four header bytes of an ICMPv6 error.
fn icmpv6_error(error: IcmpError) -> (u8, u8, u32) {
    /// Where the next header field is in the quoted packet.
    const NEXT_HEADER: u32 = 6;
    match error {
        IcmpError::Unreachable(Unreachable::Network) => (1, 0, 0),
        IcmpError::Unreachable(Unreachable::Host) => (1, 3, 0),
        IcmpError::Unreachable(Unreachable::Protocol) => (4, 1, NEXT_HEADER),
        IcmpError::Unreachable(Unreachable::Port) => (1, 4, 0),
        IcmpError::Unreachable(Unreachable::Prohibited) => (1, 1, 0),
        IcmpError::PacketTooBig { mtu } => (2, 0, mtu.into()),
        IcmpError::TimeExceeded => (3, 0, 0),
    }
}

#[cfg(test)]
mod tests;
