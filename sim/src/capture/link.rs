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
