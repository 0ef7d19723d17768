//! Transport headers: checked once, then plain fields.

use super::view::QuotedPacket;
use crate::event::DropReason;
use crate::io::{IcmpError, Unreachable};

/// Largest shift that a window scale option may ask for (RFC 7323, section 2.3).
const WINDOW_SCALE_MAX: u8 = 14;

/// What an IP packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport<'a> {
    /// A TCP segment.
    Tcp(TcpView<'a>),
    /// A UDP datagram.
    Udp(UdpView<'a>),
    /// An ICMP message in IPv4, an ICMPv6 message in IPv6.
    Icmp(IcmpView<'a>),
}

/// A TCP segment with a sound header, flags that make sense, and ports other than 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpView<'a> {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Sequence number of the first byte, or of the SYN.
    pub sequence: u32,
    /// Acknowledgment number; means something with [`TcpFlags::ACK`] only.
    pub acknowledgment: u32,
    /// Control bits.
    pub flags: TcpFlags,
    /// The window as sent, not scaled.
    pub window: u16,
    /// The options.
    pub options: TcpOptions<'a>,
    /// Length of the header with options, in bytes.
    pub header_len: u8,
    /// The data.
    pub payload: &'a [u8],
}

/// Control bits of a TCP segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

/// The options of a TCP segment that mean something here; others are passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpOptions<'a> {
    /// Maximum segment size, in bytes.
    pub max_segment_size: Option<u16>,
    /// Window scale shift, at most 14 whatever was sent (RFC 7323, section 2.3).
    pub window_scale: Option<u8>,
    /// Selective acknowledgments are welcome (RFC 2018).
    pub sack_permitted: bool,
    /// Blocks received out of order, in the order sent: left and right edge, four bytes each.
    pub sack: &'a [[u8; 8]],
    /// TSval and TSecr (RFC 7323).
    pub timestamps: Option<(u32, u32)>,
}

/// A UDP datagram with a sound header and ports other than 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpView<'a> {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// The checksum field; 0 for none.
    pub checksum: u16,
    /// The data, cut to the UDP length.
    pub payload: &'a [u8],
}

/// An ICMP or ICMPv6 message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IcmpView<'a> {
    /// What it says.
    pub message: IcmpMessage<'a>,
    /// The message with its header.
    pub bytes: &'a [u8],
}

/// What an ICMP or ICMPv6 message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "fields are named for what they hold")]
pub enum IcmpMessage<'a> {
    /// Echo request.
    EchoRequest(Echo<'a>),
    /// Echo reply.
    EchoReply(Echo<'a>),
    /// An error about a packet; `quoted` is what can be read of it.
    Error {
        error: IcmpError,
        quoted: Option<QuotedPacket>,
    },
    /// Anything else: the type that is not relayed.
    Other { kind: u8, code: u8 },
}

/// An echo request or reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Echo<'a> {
    /// Names the sender's session.
    pub identifier: u16,
    /// Names the request within the session.
    pub sequence: u16,
    /// The data.
    pub payload: &'a [u8],
}

impl<'a> TcpView<'a> {
    /// Reads the segment that fills `bytes`.
    #[inline(always)] // into its one caller: to move the result there would cost as much as to make it
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, DropReason> {
        let header: &[u8; 20] = bytes.first_chunk().ok_or(DropReason::TcpHeader)?;
        let header_len = usize::from(header[12] >> 4) * 4;
        let (Some(options), Some(payload)) = (bytes.get(20..header_len), bytes.get(header_len..)) else {
            return Err(DropReason::TcpHeader);
        };
        let mut view = Self {
            source_port: word(header, 0),
            destination_port: word(header, 2),
            sequence: long(header, 4),
            acknowledgment: long(header, 8),
            flags: TcpFlags(header[13]),
            window: word(header, 14),
            options: TcpOptions::default(),
            header_len: header_len as u8,
            payload,
        };
        view.options.read(options).ok_or(DropReason::TcpHeader)?;
        if !view.flags.are_sound() {
            return Err(DropReason::TcpFlags);
        }
        if view.source_port == 0 || view.destination_port == 0 {
            return Err(DropReason::PortZero);
        }
        Ok(view)
    }

    /// The sequence space it takes: data, and one each for SYN and FIN.
    pub fn sequence_len(&self) -> u32 {
        self.payload.len() as u32 + u32::from(self.flags.syn()) + u32::from(self.flags.fin())
    }
}

impl TcpFlags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// Push.
    pub const PSH: u8 = 0x08;
    /// The acknowledgment number is significant.
    pub const ACK: u8 = 0x10;
    /// The urgent pointer is significant.
    pub const URG: u8 = 0x20;
    /// ECN echo (RFC 3168).
    pub const ECE: u8 = 0x40;
    /// Congestion window reduced (RFC 3168).
    pub const CWR: u8 = 0x80;

    /// Whether SYN is set.
    pub const fn syn(self) -> bool {
        self.0 & Self::SYN != 0
    }

    /// Whether FIN is set.
    pub const fn fin(self) -> bool {
        self.0 & Self::FIN != 0
    }

    /// Whether RST is set.
    pub const fn rst(self) -> bool {
        self.0 & Self::RST != 0
    }

    /// Whether PSH is set.
    pub const fn psh(self) -> bool {
        self.0 & Self::PSH != 0
    }

    /// Whether ACK is set.
    pub const fn ack(self) -> bool {
        self.0 & Self::ACK != 0
    }

    /// Whether some TCP might send them; see [`DropReason::TcpFlags`].
    const fn are_sound(self) -> bool {
        match self.0 & (Self::SYN | Self::FIN | Self::RST | Self::ACK) {
            0 | Self::FIN => false,
            control => !(control & Self::SYN != 0 && control & (Self::FIN | Self::RST) != 0),
        }
    }
}

impl<'a> TcpOptions<'a> {
    /// Reads the options into what has none yet; `None` if one is cut or of a length that its kind cannot have.
    #[inline(always)] // as above
    fn read(&mut self, bytes: &'a [u8]) -> Option<()> {
        match *bytes {
            [] => {}
            // What almost every segment has (RFC 7323, appendix A).
            [1, 1, 8, 10, a, b, c, d, e, f, g, h] => {
                let timestamps = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]));
                self.timestamps = Some(timestamps);
            }
            _ => self.read_list(bytes)?,
        }
        Some(())
    }

    fn read_list(&mut self, mut rest: &'a [u8]) -> Option<()> {
        while let Some((&kind, behind)) = rest.split_first() {
            match kind {
                0 => break,
                1 => {
                    rest = behind;
                    continue;
                }
                _ => {}
            }
            let len = usize::from(*behind.first()?);
            let data = rest.get(2..len)?;
            rest = &rest[len..];
            match kind {
                2 => self.max_segment_size = Some(u16::from_be_bytes(data.try_into().ok()?)),
                3 => {
                    let &[shift] = data else { return None };
                    self.window_scale = Some(shift.min(WINDOW_SCALE_MAX));
                }
                4 => {
                    if !data.is_empty() {
                        return None;
                    }
                    self.sack_permitted = true;
                }
                5 => {
                    let (blocks, []) = data.as_chunks::<8>() else {
                        return None;
                    };
                    if blocks.is_empty() {
                        return None;
                    }
                    self.sack = blocks;
                }
                8 if data.len() == 8 => self.timestamps = Some((long(data, 0), long(data, 4))),
                _ => {}
            }
        }
        Some(())
    }
}

impl<'a> UdpView<'a> {
    /// Reads the datagram that `bytes` starts with.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, DropReason> {
        let header: &[u8; 8] = bytes.first_chunk().ok_or(DropReason::UdpHeader)?;
        let payload = bytes
            .get(8..usize::from(word(header, 4)))
            .ok_or(DropReason::UdpHeader)?;
        let view = Self {
            source_port: word(header, 0),
            destination_port: word(header, 2),
            checksum: word(header, 6),
            payload,
        };
        if view.source_port == 0 || view.destination_port == 0 {
            return Err(DropReason::PortZero);
        }
        Ok(view)
    }
}

impl<'a> IcmpView<'a> {
    /// Reads the ICMP message that fills `bytes`.
    pub(super) fn parse_v4(bytes: &'a [u8]) -> Result<Self, DropReason> {
        let (header, body) = bytes.split_first_chunk::<8>().ok_or(DropReason::IcmpHeader)?;
        let error = |error| IcmpMessage::Error {
            error,
            quoted: QuotedPacket::parse(body),
        };
        let unreachable = |why| error(IcmpError::Unreachable(why));
        let message = match (header[0], header[1]) {
            (8, 0) => IcmpMessage::EchoRequest(echo(header, body)),
            (0, 0) => IcmpMessage::EchoReply(echo(header, body)),
            // The codes of RFC 1122, 3.2.2.1 and RFC 1812, 5.2.7.1.
            (3, 0 | 5 | 6 | 11) => unreachable(Unreachable::Network),
            (3, 1 | 7 | 8 | 12) => unreachable(Unreachable::Host),
            (3, 2) => unreachable(Unreachable::Protocol),
            (3, 3) => unreachable(Unreachable::Port),
            (3, 4) => error(IcmpError::PacketTooBig { mtu: word(header, 6) }),
            (3, 9 | 10 | 13 | 14 | 15) => unreachable(Unreachable::Prohibited),
            (11, 0) => error(IcmpError::TimeExceeded),
            (kind, code) => IcmpMessage::Other { kind, code },
        };
        Ok(Self { message, bytes })
    }

    /// Reads the ICMPv6 message that fills `bytes`.
    pub(super) fn parse_v6(bytes: &'a [u8]) -> Result<Self, DropReason> {
        let (header, body) = bytes.split_first_chunk::<8>().ok_or(DropReason::IcmpHeader)?;
        let error = |error| IcmpMessage::Error {
            error,
            quoted: QuotedPacket::parse(body),
        };
        let unreachable = |why| error(IcmpError::Unreachable(why));
        let message = match (header[0], header[1]) {
            (128, 0) => IcmpMessage::EchoRequest(echo(header, body)),
            (129, 0) => IcmpMessage::EchoReply(echo(header, body)),
            // The codes of RFC 4443, 3.1; code 2 is "beyond scope of source address".
            (1, 0) => unreachable(Unreachable::Network),
            (1, 2 | 3) => unreachable(Unreachable::Host),
            (1, 4) => unreachable(Unreachable::Port),
            (1, 1 | 5 | 6) => unreachable(Unreachable::Prohibited),
            (2, _) => error(IcmpError::PacketTooBig {
                mtu: u16::try_from(long(header, 4)).unwrap_or(u16::MAX),
            }),
            (3, 0) => error(IcmpError::TimeExceeded),
            (4, 1) => unreachable(Unreachable::Protocol), // unrecognised next header
            (kind, code) => IcmpMessage::Other { kind, code },
        };
        Ok(Self { message, bytes })
    }
}

fn echo<'a>(header: &[u8; 8], payload: &'a [u8]) -> Echo<'a> {
    Echo {
        identifier: word(header, 4),
        sequence: word(header, 6),
        payload,
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests;
