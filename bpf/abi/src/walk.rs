//! The header walk: what lists may see of a packet.
//!
//! Generic over the reader, so that one source compiles to bytecode the verifier accepts and to native code. What
//! is cut, contradicts itself or goes on for too long is not understood, and passes. Bytes behind the IP total
//! length are padding and never read: what looks like a port there is none.

use crate::{Class, MAX_EXTENSION_HEADERS, MAX_VLAN_TAGS};

/// The bytes of a frame, read with bounds checks.
pub trait Frame: Copy {
    /// `N` bytes known to lie inside the frame.
    type Window<const N: usize>: Window<N>;

    /// Number of bytes in the frame.
    fn length(self) -> usize;

    /// The `N` bytes at `at`, if all of them lie inside the frame.
    fn window<const N: usize>(self, at: usize) -> Option<Self::Window<N>>;
}

/// `N` bytes of a frame. Offsets are checked when the program is compiled.
pub trait Window<const N: usize>: Copy {
    /// The byte at `AT`.
    fn byte<const AT: usize>(self) -> u8;
    /// The two bytes at `AT`, in the order of the machine.
    fn raw16<const AT: usize>(self) -> u16;
    /// The four bytes at `AT`, in the order of the machine.
    fn raw32<const AT: usize>(self) -> u32;
    /// The eight bytes at `AT`, in the order of the machine.
    fn raw64<const AT: usize>(self) -> u64;

    /// The number in the two bytes at `AT`.
    #[inline(always)]
    fn be16<const AT: usize>(self) -> u16 {
        u16::from_be(self.raw16::<AT>())
    }
}

/// What the walk found. No field is ever undefined: the verifier refuses to have such a one copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Walk {
    /// Whether there is anything for lists to look at.
    pub outcome: WalkOutcome,
    /// Source address as in the packet, IPv4 in the first four bytes; zero where there is none.
    pub source: [u64; 2],
    /// Destination address.
    pub destination: [u64; 2],
    /// Protocol and port.
    pub selectors: Selectors,
}

/// How a walk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalkOutcome {
    /// Neither IPv4 nor IPv6 behind at most two VLAN tags.
    NotIp,
    /// Cut, contradictory, or too many extension headers.
    NotUnderstood,
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Walk {
    const NOT_IP: Self = Self {
        outcome: WalkOutcome::NotIp,
        source: [0; 2],
        destination: [0; 2],
        selectors: Selectors {
            protocol: Selectors::NO_PROTOCOL,
            port: Selectors::NO_PORT,
        },
    };
    const NOT_UNDERSTOOD: Self = Self {
        outcome: WalkOutcome::NotUnderstood,
        ..Self::NOT_IP
    };
}

/// What entries tell packets apart by, besides addresses. Plain numbers, since the program holds them in registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selectors {
    /// IP protocol number behind extension headers, or [`NO_PROTOCOL`](Self::NO_PROTOCOL).
    pub protocol: u32,
    /// Destination port of TCP and UDP, or [`NO_PORT`](Self::NO_PORT).
    pub port: u32,
}

impl Selectors {
    /// The protocol could not be read.
    pub const NO_PROTOCOL: u32 = 0x100;
    /// The port could not be read, or there is none.
    pub const NO_PORT: u32 = 0x1_0000;

    /// The class by which port tables are indexed.
    #[inline(always)]
    pub const fn class(self) -> Class {
        match (self.protocol, self.port == Self::NO_PORT) {
            (1 | 58, _) => Class::Icmp,
            (6, true) => Class::Tcp,
            (6, false) => Class::TcpPort,
            (17, true) => Class::Udp,
            (17, false) => Class::UdpPort,
            _ => Class::Other,
        }
    }
}

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;
const ETHERTYPE_QINQ_OLD: u16 = 0x9100;

const HOP_BY_HOP: u8 = 0;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;

/// Walks the headers of an Ethernet frame.
#[inline(always)]
pub fn walk<F: Frame>(frame: F) -> Walk {
    let Some(ethernet) = frame.window::<14>(0) else {
        return Walk::NOT_UNDERSTOOD;
    };
    let mut ethertype = ethernet.be16::<12>();
    let mut start = 14;
    for _ in 0..MAX_VLAN_TAGS {
        if !matches!(ethertype, ETHERTYPE_VLAN | ETHERTYPE_QINQ | ETHERTYPE_QINQ_OLD) {
            break;
        }
        let Some(tag) = frame.window::<4>(start) else {
            return Walk::NOT_UNDERSTOOD;
        };
        ethertype = tag.be16::<2>();
        start += 4;
    }
    match ethertype {
        ETHERTYPE_IPV4 => walk_v4(frame, start),
        ETHERTYPE_IPV6 => walk_v6(frame, start),
        _ => Walk::NOT_IP,
    }
}

#[inline(always)]
fn walk_v4<F: Frame>(frame: F, start: usize) -> Walk {
    let Some(fixed) = frame.window::<20>(start) else {
        return Walk::NOT_UNDERSTOOD;
    };
    let first = fixed.byte::<0>();
    let header_length = usize::from(first & 0x0f) * 4;
    let total_length = usize::from(fixed.be16::<2>());
    if first >> 4 != 4 || header_length < 20 || total_length < header_length {
        return Walk::NOT_UNDERSTOOD;
    }
    let end = start + total_length;
    if end > frame.length() {
        return Walk::NOT_UNDERSTOOD;
    }
    let protocol = fixed.byte::<9>();
    let is_later_fragment = fixed.be16::<6>() & 0x1fff != 0;
    let port = if is_later_fragment {
        Selectors::NO_PORT
    } else {
        port(frame, start + header_length, end, protocol)
    };
    Walk {
        outcome: WalkOutcome::V4,
        source: [u64::from(fixed.raw32::<12>()), 0],
        destination: [u64::from(fixed.raw32::<16>()), 0],
        selectors: Selectors {
            protocol: u32::from(protocol),
            port,
        },
    }
}

#[inline(always)]
fn walk_v6<F: Frame>(frame: F, start: usize) -> Walk {
    let Some(fixed) = frame.window::<40>(start) else {
        return Walk::NOT_UNDERSTOOD;
    };
    if fixed.byte::<0>() >> 4 != 6 {
        return Walk::NOT_UNDERSTOOD;
    }
    // A jumbogram says 0 here and has a hop-by-hop header, which then lies behind `end`.
    let end = start + 40 + usize::from(fixed.be16::<4>());
    if end > frame.length() {
        return Walk::NOT_UNDERSTOOD;
    }
    let found = |selectors| Walk {
        outcome: WalkOutcome::V6,
        source: [fixed.raw64::<8>(), fixed.raw64::<16>()],
        destination: [fixed.raw64::<24>(), fixed.raw64::<32>()],
        selectors,
    };
    let mut next = fixed.byte::<6>();
    let mut at = start + 40;
    for walked in 0..=MAX_EXTENSION_HEADERS {
        if !is_extension(next) {
            return found(Selectors {
                protocol: u32::from(next),
                port: port(frame, at, end, next),
            });
        }
        // Every extension header is at least 8 bytes long.
        if walked == MAX_EXTENSION_HEADERS || at + 8 > end {
            return Walk::NOT_UNDERSTOOD;
        }
        let Some(header) = frame.window::<8>(at) else {
            return Walk::NOT_UNDERSTOOD;
        };
        let kind = next;
        next = header.byte::<0>();
        let length = usize::from(header.byte::<1>());
        match kind {
            FRAGMENT => {
                if header.be16::<2>() & 0xfff8 != 0 {
                    // What follows is the middle of something: its first bytes are no headers.
                    let protocol = if is_extension(next) {
                        Selectors::NO_PROTOCOL
                    } else {
                        u32::from(next)
                    };
                    return found(Selectors {
                        protocol,
                        port: Selectors::NO_PORT,
                    });
                }
                at += 8;
            }
            AUTHENTICATION => at += (length + 2) * 4,
            _ => at += (length + 1) * 8,
        }
        if at > end {
            return Walk::NOT_UNDERSTOOD;
        }
    }
    Walk::NOT_UNDERSTOOD
}

#[inline(always)]
fn is_extension(number: u8) -> bool {
    matches!(
        number,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS | MOBILITY
    )
}

/// The destination port of the transport header at `at`.
#[inline(always)]
fn port<F: Frame>(frame: F, at: usize, end: usize, protocol: u8) -> u32 {
    if !matches!(protocol, TCP | UDP) || at + 4 > end {
        return Selectors::NO_PORT;
    }
    frame
        .window::<4>(at)
        .map_or(Selectors::NO_PORT, |header| u32::from(header.be16::<2>()))
}
