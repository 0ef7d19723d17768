//! Link layers: where in a captured frame the IP packet begins and ends.
//!
//! [`ip_of`] strips Ethernet, VLAN tags, PPPoE, PPP, MPLS, LLC/SNAP and the pseudo headers that capture tools write. It
//! reads no byte of the IP packet except, behind MPLS, the version nibble, as MPLS does not name what it carries:
//! whether there is a sound IP header is for the IP parser to say.
//!
//! The packet's end is the end of the frame, Ethernet padding included, unless a length field of the link layer (PPPoE,
//! 802.3) says less: a receiver cuts there before it looks at the IP total length (RFC 2516, section 4), so what lies
//! behind never belonged to the packet. A length that exceeds the frame counts as the frame's.
//!
//! Identifiers on the way (VLAN, PPPoE session, MPLS label) are not reported, because they may differ between the two
//! directions of one flow.

use std::fmt;
use std::ops::Range;

/// A link type of pcap and pcapng, as registered at <https://www.tcpdump.org/linktypes.html>.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkType(
    /// The registered number.
    pub u16,
);

/// What a captured frame holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkView {
    /// An IP packet ought to be at this range of the frame; as many bytes as its start precede it.
    ///
    /// The range may be empty, and lies within the frame.
    Ip(Range<usize>),
    /// The link layer is understood and carries something else.
    NotIp(Payload),
    /// The link layer cannot be read.
    Unreadable(Unreadable),
}

/// What a frame carries that is not IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Payload {
    /// A protocol with an EtherType.
    EtherType(u16),
    /// A protocol behind an LLC header, by its destination service access point.
    Llc(u8),
    /// A protocol with a PPP number.
    Ppp(u16),
    /// PPPoE that is no session data, by its code.
    PppoeCode(u8),
    /// MPLS around neither IP nor Ethernet with IP.
    Mpls,
    /// A loopback packet of an address family that is not IP.
    AddressFamily(u32),
}

/// Why a frame's link layer cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unreadable {
    /// The link type is not known.
    LinkType(LinkType),
    /// The frame ends inside a link header.
    HeaderCut,
    /// More than 8 VLAN tags, or 16 MPLS labels, one after the other.
    TooManyTags,
}

const MAX_VLAN_TAGS: usize = 8;
const MAX_MPLS_LABELS: usize = 16;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const SERVICE_VLAN: u16 = 0x88a8;
const OLD_SERVICE_VLAN: u16 = 0x9100;
const MPLS: u16 = 0x8847;
const MPLS_MULTICAST: u16 = 0x8848;
const PPPOE_SESSION: u16 = 0x8864;
/// EtherTypes up to here are lengths (IEEE 802.3, clause 3.2.6).
const MAX_802_3_LENGTH: u16 = 1_500;

impl LinkType {
    /// BSD loopback: an address family in the byte order of the capturing host.
    pub const NULL: Self = Self(0);
    /// Ethernet.
    pub const ETHERNET: Self = Self(1);
    /// PPP, with or without HDLC-like address and control.
    pub const PPP: Self = Self(9);
    /// Raw IP as most systems number it in memory (`DLT_RAW`).
    pub const RAW_DLT: Self = Self(12);
    /// Raw IP as OpenBSD numbers it in memory.
    pub const RAW_OPENBSD: Self = Self(14);
    /// PPP in HDLC-like framing (RFC 1662), or Cisco HDLC.
    pub const PPP_HDLC: Self = Self(50);
    /// PPPoE from its header on.
    pub const PPP_ETHER: Self = Self(51);
    /// Raw IP.
    pub const RAW: Self = Self(101);
    /// Cisco HDLC.
    pub const C_HDLC: Self = Self(104);
    /// OpenBSD loopback: an address family in network byte order.
    pub const LOOP: Self = Self(108);
    /// Linux cooked capture.
    pub const LINUX_SLL: Self = Self(113);
    /// Raw IPv4.
    pub const IPV4: Self = Self(228);
    /// Raw IPv6.
    pub const IPV6: Self = Self(229);
    /// Linux cooked capture, version 2.
    pub const LINUX_SLL2: Self = Self(276);
}

/// Finds the IP packet in a frame of the given link type.
///
/// Never panics, and its work is bounded by [`Unreadable::TooManyTags`], whatever the bytes are.
#[inline]
pub fn ip_of(link_type: LinkType, frame: &[u8]) -> LinkView {
    let walk = match link_type {
        LinkType::ETHERNET => Frame { bytes: frame }.ethernet(0, Pseudowires::Follow),
        LinkType::RAW_DLT | LinkType::RAW_OPENBSD | LinkType::RAW | LinkType::IPV4 | LinkType::IPV6 => {
            Ok(LinkView::Ip(0..frame.len()))
        }
        other => Frame { bytes: frame }.less_common(other),
    };
    walk.unwrap_or_else(LinkView::Unreadable)
}

/// A frame, from its first byte to where a length field says that it ends.
#[derive(Clone, Copy)]
struct Frame<'a> {
    bytes: &'a [u8],
}

/// Whether Ethernet inside MPLS is looked into. It is not inside another pseudowire, which bounds the walk.
#[derive(Clone, Copy, PartialEq)]
enum Pseudowires {
    Follow,
    Ignore,
}

type Walk = Result<LinkView, Unreadable>;

impl<'a> Frame<'a> {
    fn less_common(self, link_type: LinkType) -> Walk {
        match link_type {
            LinkType::NULL | LinkType::LOOP => self.loopback(),
            LinkType::LINUX_SLL => self.cooked(14, 16),
            LinkType::LINUX_SLL2 => self.cooked(0, 20),
            LinkType::PPP => self.ppp(self.after_address_and_control()),
            LinkType::PPP_HDLC => match self.u8(0)? {
                // Unicast and multicast addresses of Cisco HDLC; PPP has 0xff there, or a protocol number.
                0x0f | 0x8f => self.payload(self.u16(2)?, 4, Pseudowires::Follow),
                _ => self.ppp(self.after_address_and_control()),
            },
            LinkType::PPP_ETHER => self.pppoe(0),
            LinkType::C_HDLC => self.payload(self.u16(2)?, 4, Pseudowires::Follow),
            unknown => Err(Unreadable::LinkType(unknown)),
        }
    }

    /// Walks an Ethernet frame whose destination address begins at `at`.
    #[inline]
    fn ethernet(self, at: usize, pseudowires: Pseudowires) -> Walk {
        self.payload(self.u16(at + 12)?, at + 14, pseudowires)
    }

    /// Walks what begins at `at` and is announced by an EtherType, or a length of 802.3.
    #[inline]
    fn payload(self, ether_type: u16, at: usize, pseudowires: Pseudowires) -> Walk {
        let (ether_type, at) = self.untag(ether_type, at)?;
        match ether_type {
            IPV4 | IPV6 => Ok(self.ip(at)),
            0..=MAX_802_3_LENGTH => self.until(at, usize::from(ether_type)).llc(at, pseudowires),
            _ => self.other_payload(ether_type, at, pseudowires),
        }
    }

    /// Passes over VLAN tags; gives the EtherType behind them and where its payload begins.
    #[inline]
    fn untag(self, mut ether_type: u16, mut at: usize) -> Result<(u16, usize), Unreadable> {
        for _ in 0..=MAX_VLAN_TAGS {
            if !matches!(ether_type, VLAN | SERVICE_VLAN | OLD_SERVICE_VLAN) {
                return Ok((ether_type, at));
            }
            ether_type = self.u16(at + 2)?;
            at += 4;
        }
        Err(Unreadable::TooManyTags)
    }

    /// Walks what has an EtherType but is not plain IP.
    fn other_payload(self, ether_type: u16, at: usize, pseudowires: Pseudowires) -> Walk {
        match ether_type {
            IPV4 | IPV6 => Ok(self.ip(at)),
            PPPOE_SESSION => self.pppoe(at),
            MPLS | MPLS_MULTICAST => self.mpls(at, pseudowires),
            other => Ok(LinkView::NotIp(Payload::EtherType(other))),
        }
    }

    /// Walks an LLC header (IEEE 802.2), and SNAP behind it (RFC 1042).
    fn llc(self, at: usize, pseudowires: Pseudowires) -> Walk {
        const SNAP: [u8; 6] = [0xaa, 0xaa, 0x03, 0, 0, 0];
        const IP: [u8; 3] = [0x06, 0x06, 0x03];
        let header = self.bytes.get(at..).unwrap_or_default();
        if header.starts_with(&SNAP) {
            let (ether_type, at) = self.untag(self.u16(at + 6)?, at + 8)?;
            return self.other_payload(ether_type, at, pseudowires);
        }
        if header.starts_with(&IP) {
            return Ok(self.ip(at + 3));
        }
        Ok(LinkView::NotIp(Payload::Llc(self.u8(at)?)))
    }

    /// Walks a PPPoE header (RFC 2516, section 4) and the PPP packet in it.
    fn pppoe(self, at: usize) -> Walk {
        let code = self.u8(at + 1)?;
        let length = usize::from(self.u16(at + 4)?);
        match code {
            0 => self.until(at + 6, length).ppp(at + 6),
            other => Ok(LinkView::NotIp(Payload::PppoeCode(other))),
        }
    }

    /// Where PPP's protocol field begins: behind address and control, unless they are compressed away.
    fn after_address_and_control(self) -> usize {
        if self.bytes.starts_with(&[0xff, 0x03]) {
            2
        } else {
            0
        }
    }

    /// Walks a PPP packet from its protocol field on, which is one byte where that is odd (RFC 1661, section 2).
    fn ppp(self, at: usize) -> Walk {
        let first = self.u8(at)?;
        let (protocol, at) = match first & 1 {
            1 => (u16::from(first), at + 1),
            _ => (self.u16(at)?, at + 2),
        };
        match protocol {
            0x0021 | 0x0057 => Ok(self.ip(at)),
            0x0281 | 0x0283 => self.mpls(at, Pseudowires::Follow),
            other => Ok(LinkView::NotIp(Payload::Ppp(other))),
        }
    }

    /// Walks an MPLS label stack (RFC 3032) and guesses from the first nibble what it carries (RFC 4928).
    ///
    /// A nibble of 0 is a pseudowire's control word (RFC 4385); what follows it is looked at as Ethernet (RFC 4448).
    fn mpls(self, mut at: usize, pseudowires: Pseudowires) -> Walk {
        for _ in 0..MAX_MPLS_LABELS {
            let bottom = self.u8(at + 2)? & 1 == 1;
            at += 4;
            if bottom {
                return match self.u8(at)? >> 4 {
                    4 | 6 => Ok(self.ip(at)),
                    0 if pseudowires == Pseudowires::Follow => {
                        match self.ethernet(at + 4, Pseudowires::Ignore) {
                            Ok(LinkView::Ip(range)) => Ok(LinkView::Ip(range)),
                            Ok(LinkView::NotIp(_) | LinkView::Unreadable(_)) | Err(_) => {
                                Ok(LinkView::NotIp(Payload::Mpls))
                            }
                        }
                    }
                    _ => Ok(LinkView::NotIp(Payload::Mpls)),
                };
            }
        }
        Err(Unreadable::TooManyTags)
    }

    /// Walks the four bytes of address family before a loopback packet, in either byte order.
    fn loopback(self) -> Walk {
        let raw = *self.bytes.first_chunk().ok_or(Unreadable::HeaderCut)?;
        // Families are small numbers: the order that gives the smaller one is the right one.
        let family = u32::from_le_bytes(raw).min(u32::from_be_bytes(raw));
        match family {
            // AF_INET everywhere; AF_INET6 on Linux, NetBSD and OpenBSD, FreeBSD, macOS.
            2 | 10 | 24 | 28 | 30 => Ok(self.ip(4)),
            other => Ok(LinkView::NotIp(Payload::AddressFamily(other))),
        }
    }

    /// Walks a Linux cooked header of the given length.
    ///
    /// Its protocol is an EtherType or one of Linux's own numbers below 1,536, where 4 means LLC.
    fn cooked(self, protocol_at: usize, length: usize) -> Walk {
        if self.bytes.len() < length {
            return Err(Unreadable::HeaderCut);
        }
        match self.u16(protocol_at)? {
            4 => self.llc(length, Pseudowires::Follow),
            own @ 0..0x0600 => Ok(LinkView::NotIp(Payload::EtherType(own))),
            ether_type => self.payload(ether_type, length, Pseudowires::Follow),
        }
    }

    /// The IP packet that takes the rest of the frame.
    #[inline]
    fn ip(self, at: usize) -> LinkView {
        LinkView::Ip(at.min(self.bytes.len())..self.bytes.len())
    }

    /// The frame as it is when only `length` bytes from `at` on belong to it.
    fn until(self, at: usize, length: usize) -> Self {
        Self {
            bytes: &self.bytes[..self.bytes.len().min(at + length)],
        }
    }

    #[inline]
    fn u8(self, at: usize) -> Result<u8, Unreadable> {
        self.bytes.get(at).copied().ok_or(Unreadable::HeaderCut)
    }

    #[inline]
    fn u16(self, at: usize) -> Result<u16, Unreadable> {
        match self.bytes.get(at..at + 2) {
            Some(&[high, low]) => Ok(u16::from_be_bytes([high, low])),
            _ => Err(Unreadable::HeaderCut),
        }
    }
}

impl fmt::Display for LinkType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            0 => "NULL",
            1 => "Ethernet",
            9 => "PPP",
            50 => "PPP-HDLC",
            51 => "PPPoE",
            104 => "C-HDLC",
            105 => "IEEE 802.11",
            108 => "LOOP",
            113 => "SLL",
            127 => "IEEE 802.11 radiotap",
            228 => "IPv4",
            229 => "IPv6",
            239 => "NFLOG",
            276 => "SLL2",
            raw @ (12 | 14 | 101) => return write!(f, "RAW({raw})"),
            other => return write!(f, "link type {other}"),
        };
        f.write_str(name)
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::EtherType(ether_type) => match ether_type {
                0x0806 => f.write_str("ARP"),
                0x8035 => f.write_str("RARP"),
                0x8863 => f.write_str("PPPoE discovery"),
                0x888e => f.write_str("EAPOL"),
                0x88cc => f.write_str("LLDP"),
                0x88e5 => f.write_str("MACsec"),
                0x9000 => f.write_str("loopback test"),
                other => write!(f, "EtherType {other:#06x}"),
            },
            Self::Llc(access_point) => match access_point {
                0x42 => f.write_str("STP"),
                0xfe => f.write_str("ISO routing"),
                other => write!(f, "LLC {other:#04x}"),
            },
            Self::Ppp(protocol) => match protocol {
                0x002d | 0x002f => f.write_str("PPP with compressed TCP headers"),
                0xc021 => f.write_str("PPP LCP"),
                other => write!(f, "PPP {other:#06x}"),
            },
            Self::PppoeCode(code) => write!(f, "PPPoE code {code:#04x}"),
            Self::Mpls => f.write_str("MPLS without IP"),
            Self::AddressFamily(family) => write!(f, "address family {family}"),
        }
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LinkType(link_type) => write!(f, "unknown link type: {link_type}"),
            Self::HeaderCut => f.write_str("the link header is cut"),
            Self::TooManyTags => write!(
                f,
                "more than {MAX_VLAN_TAGS} VLAN tags or {MAX_MPLS_LABELS} MPLS labels"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACS: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    /// Stands for an IP packet: the walk must not look further than the first nibble.
    const IP: [u8; 6] = [0x45, 1, 2, 3, 4, 5];

    fn frame(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    /// Asserts that the IP packet is what follows `header`, and that no shorter part of the header will do.
    fn assert_ip_follows(link_type: LinkType, header: &[&[u8]]) {
        let header = frame(header);
        let whole = frame(&[&header, &IP]);
        assert_eq!(
            ip_of(link_type, &whole),
            LinkView::Ip(header.len()..whole.len()),
            "{link_type} {header:02x?}"
        );
        for cut in 0..header.len() {
            let cut_view = ip_of(link_type, &header[..cut]);
            assert_eq!(
                cut_view,
                LinkView::Unreadable(Unreadable::HeaderCut),
                "{link_type} {:02x?}",
                &header[..cut]
            );
        }
    }

    fn assert_not_ip(link_type: LinkType, parts: &[&[u8]], payload: Payload, name: &str) {
        assert_eq!(ip_of(link_type, &frame(parts)), LinkView::NotIp(payload));
        assert_eq!(payload.to_string(), name);
    }

    #[test]
    fn ethernet_carries_ip_of_both_versions() {
        assert_ip_follows(LinkType::ETHERNET, &[&MACS, &[0x08, 0x00]]);
        assert_ip_follows(LinkType::ETHERNET, &[&MACS, &[0x86, 0xdd]]);
    }

    #[test]
    fn vlan_tags_of_any_kind_are_passed_over_up_to_eight() {
        let customer = [0x81, 0, 0, 5];
        let service = [0x88, 0xa8, 0x20, 6];
        let old = [0x91, 0, 0, 7];
        assert_ip_follows(LinkType::ETHERNET, &[&MACS, &customer, &[0x08, 0x00]]);
        assert_ip_follows(
            LinkType::ETHERNET,
            &[&MACS, &service, &old, &customer, &[0x86, 0xdd]],
        );
        assert_ip_follows(LinkType::ETHERNET, &[&MACS, &customer.repeat(8), &[0x08, 0x00]]);
        let nine = frame(&[&MACS, &customer.repeat(9), &[0x08, 0x00], &IP]);
        assert_eq!(
            ip_of(LinkType::ETHERNET, &nine),
            LinkView::Unreadable(Unreadable::TooManyTags)
        );
    }

    #[test]
    fn other_ethernet_payloads_are_named() {
        for (ether_type, name) in [
            (0x0806_u16, "ARP"),
            (0x88cc, "LLDP"),
            (0x888e, "EAPOL"),
            (0x8863, "PPPoE discovery"),
            (0x88a2, "EtherType 0x88a2"),
        ] {
            let payload = Payload::EtherType(ether_type);
            assert_not_ip(
                LinkType::ETHERNET,
                &[&MACS, &ether_type.to_be_bytes(), &IP],
                payload,
                name,
            );
        }
    }

    #[test]
    fn ip_in_llc_and_snap_ends_where_the_802_3_length_says() {
        let snap = [0xaa, 0xaa, 3, 0, 0, 0, 0x08, 0x00];
        for (llc, tag) in [(&snap[..], &[][..]), (&[6, 6, 3], &[]), (&snap, &[0x81, 0, 0, 9])] {
            let length = [0, (llc.len() + IP.len()) as u8];
            let padded = frame(&[&MACS, tag, &length, llc, &IP, &[0; 20]]);
            let start = 14 + tag.len() + llc.len();
            assert_eq!(
                ip_of(LinkType::ETHERNET, &padded),
                LinkView::Ip(start..start + IP.len())
            );
        }
    }

    #[test]
    fn llc_without_ip_is_named() {
        assert_not_ip(
            LinkType::ETHERNET,
            &[&MACS, &[0, 38, 0x42, 0x42, 3], &[0; 43]],
            Payload::Llc(0x42),
            "STP",
        );
        assert_not_ip(
            LinkType::ETHERNET,
            &[&MACS, &[5, 0xdc, 0xfe, 0xfe, 3]],
            Payload::Llc(0xfe),
            "ISO routing",
        );
        let cdp = [0, 20, 0xaa, 0xaa, 3, 0, 0, 0x0c, 0x20, 0];
        assert_not_ip(
            LinkType::ETHERNET,
            &[&MACS, &cdp, &IP],
            Payload::Llc(0xaa),
            "LLC 0xaa",
        );
    }

    #[test]
    fn pppoe_data_ends_where_its_length_says() {
        let session = |length: u8| [0x88, 0x64, 0x11, 0, 0, 1, 0, length, 0, 0x21];
        let view = |length| {
            ip_of(
                LinkType::ETHERNET,
                &frame(&[&MACS, &session(length), &IP, &[0; 9]]),
            )
        };
        assert_eq!(view(2 + 6), LinkView::Ip(22..28));
        // Shorter than the IP packet: the rest is not part of it, whatever its header says.
        assert_eq!(view(2 + 4), LinkView::Ip(22..26));
        assert_eq!(view(2), LinkView::Ip(22..22));
        assert_eq!(view(1), LinkView::Unreadable(Unreadable::HeaderCut));
        // Longer than the frame.
        assert_eq!(view(255), LinkView::Ip(22..37));
    }

    #[test]
    fn pppoe_is_read_behind_tags_and_as_a_link_type_of_its_own() {
        let session = [0x11, 0, 0, 1, 0, 8, 0, 0x57];
        assert_ip_follows(
            LinkType::ETHERNET,
            &[&MACS, &[0x91, 0, 0, 1, 0x81, 0, 0, 2, 0x88, 0x64], &session],
        );
        assert_ip_follows(LinkType::PPP_ETHER, &[&session]);
        let lcp = [0x11, 0, 0, 1, 0, 4, 0xc0, 0x21, 9, 0];
        assert_not_ip(LinkType::PPP_ETHER, &[&lcp], Payload::Ppp(0xc021), "PPP LCP");
        let offer = [0x11, 7, 0, 0, 0, 0];
        assert_not_ip(
            LinkType::PPP_ETHER,
            &[&offer],
            Payload::PppoeCode(7),
            "PPPoE code 0x07",
        );
    }

    #[test]
    fn ppp_is_read_with_every_part_of_its_header_compressed_or_not() {
        for link_type in [LinkType::PPP, LinkType::PPP_HDLC] {
            assert_ip_follows(link_type, &[&[0, 0x57]]);
            assert_ip_follows(link_type, &[&[0x21]]);
            for protocol in [&[0, 0x21][..], &[0x21]] {
                let header = frame(&[&[0xff, 3], protocol]);
                let whole = frame(&[&header, &IP]);
                assert_eq!(ip_of(link_type, &whole), LinkView::Ip(header.len()..whole.len()));
            }
            let compressed = Payload::Ppp(0x2d);
            assert_not_ip(
                link_type,
                &[&[0xff, 3, 0x2d], &IP],
                compressed,
                "PPP with compressed TCP headers",
            );
        }
    }

    #[test]
    fn cisco_hdlc_is_read_by_its_own_link_type_and_as_ppp_hdlc() {
        for address in [0x0f, 0x8f] {
            assert_ip_follows(LinkType::C_HDLC, &[&[address, 0, 0x08, 0]]);
            assert_ip_follows(LinkType::PPP_HDLC, &[&[address, 0, 0x86, 0xdd]]);
        }
        assert_not_ip(
            LinkType::C_HDLC,
            &[&[0x8f, 0, 0x80, 0x35], &IP],
            Payload::EtherType(0x8035),
            "RARP",
        );
    }

    #[test]
    fn mpls_labels_are_passed_over_up_to_sixteen() {
        let (label, bottom) = ([0, 1, 0x20, 64], [0, 1, 0x21, 64]);
        for labels in [0, 1, 15] {
            let header = frame(&[&MACS, &[0x88, 0x47], &label.repeat(labels), &bottom]);
            assert_ip_follows(LinkType::ETHERNET, &[&header]);
        }
        let seventeen = frame(&[&MACS, &[0x88, 0x48], &label.repeat(16), &bottom, &IP]);
        assert_eq!(
            ip_of(LinkType::ETHERNET, &seventeen),
            LinkView::Unreadable(Unreadable::TooManyTags)
        );
        assert_not_ip(
            LinkType::ETHERNET,
            &[&MACS, &[0x88, 0x47], &bottom, &[0x10; 8]],
            Payload::Mpls,
            "MPLS without IP",
        );
    }

    #[test]
    fn ethernet_in_an_mpls_pseudowire_is_looked_into_once() {
        let pseudowire = frame(&[&MACS, &[0x88, 0x47, 0, 1, 0x21, 64, 0, 0, 0, 0]]);
        let inner = frame(&[&pseudowire, &MACS, &[0x81, 0, 0, 1, 0x08, 0]]);
        let whole = frame(&[&inner, &IP]);
        assert_eq!(
            ip_of(LinkType::ETHERNET, &whole),
            LinkView::Ip(inner.len()..whole.len())
        );
        let twice = frame(&[&pseudowire, &pseudowire, &MACS, &[0x08, 0], &IP]);
        assert_eq!(ip_of(LinkType::ETHERNET, &twice), LinkView::NotIp(Payload::Mpls));
        let arp = frame(&[&pseudowire, &MACS, &[0x08, 6], &IP]);
        assert_eq!(ip_of(LinkType::ETHERNET, &arp), LinkView::NotIp(Payload::Mpls));
    }

    #[test]
    fn loopback_families_of_all_systems_are_read_in_both_byte_orders() {
        for family in [2_u32, 10, 24, 28, 30] {
            for link_type in [LinkType::NULL, LinkType::LOOP] {
                assert_ip_follows(link_type, &[&family.to_le_bytes()]);
                assert_ip_follows(link_type, &[&family.to_be_bytes()]);
            }
        }
        assert_not_ip(
            LinkType::NULL,
            &[&[0, 0, 0, 7], &IP],
            Payload::AddressFamily(7),
            "address family 7",
        );
    }

    #[test]
    fn linux_cooked_captures_are_read_in_both_versions() {
        let first = [0, 0, 0, 1, 0, 6, 2, 0, 0, 0, 0, 1, 0, 0, 0x08, 0x00];
        let second = [0x86, 0xdd, 0, 0, 0, 0, 0, 2, 0, 1, 0, 6, 2, 0, 0, 0, 0, 1, 0, 0];
        assert_ip_follows(LinkType::LINUX_SLL, &[&first]);
        assert_ip_follows(LinkType::LINUX_SLL2, &[&second]);
        assert_ip_follows(LinkType::LINUX_SLL, &[&first[..14], &[0x81, 0, 0, 3, 0x08, 0]]);
        assert_not_ip(
            LinkType::LINUX_SLL,
            &[&first[..14], &[8, 6], &IP],
            Payload::EtherType(0x0806),
            "ARP",
        );
        assert_not_ip(
            LinkType::LINUX_SLL,
            &[&first[..14], &[0, 4, 0x42, 0x42, 3]],
            Payload::Llc(0x42),
            "STP",
        );
    }

    #[test]
    fn raw_link_types_are_ip_from_the_first_byte() {
        for link_type in [12, 14, 101, 228, 229].map(LinkType) {
            assert_eq!(ip_of(link_type, &IP), LinkView::Ip(0..6));
        }
    }

    #[test]
    fn an_unknown_link_type_is_unreadable_and_named() {
        let view = ip_of(LinkType(127), &IP);
        assert_eq!(view, LinkView::Unreadable(Unreadable::LinkType(LinkType(127))));
        let name = Unreadable::LinkType(LinkType(127)).to_string();
        assert_eq!(name, "unknown link type: IEEE 802.11 radiotap");
    }
}
