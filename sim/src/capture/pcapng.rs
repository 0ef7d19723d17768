//! pcapng: sections of blocks, each section with its own byte order and interfaces.
//!
//! Enhanced, simple and obsolete packet blocks are packets; section headers and interface descriptions are read; every
//! other block, known or not, is passed over without being held (draft-ietf-opsawg-pcapng, section 3.1).

use std::ops::Range;

use super::input::{Consumed, Input};
use super::{ByteOrder, Interface, LinkType, MAX_CAPTURED_LENGTH, Packet};

pub(super) const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const OBSOLETE_PACKET: u32 = 2;
const SIMPLE_PACKET: u32 = 3;
const ENHANCED_PACKET: u32 = 6;

/// Reads 0x1a2b3c4d in the section's byte order.
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;

const OPTION_END: u16 = 0;
const OPTION_IF_TSRESOL: u16 = 9;
const OPTION_IF_TSOFFSET: u16 = 14;

/// Longest block that is held in memory (packets and interfaces, with their options), as in Wireshark.
const MAX_BLOCK_BYTES: u32 = 16 * 1024 * 1024;

/// Most interfaces in a section; they are all that a long capture may pile up.
const MAX_INTERFACES: usize = 65_536;

const NANOS_PER_SECOND: u64 = 1_000_000_000;

pub(super) struct Reader {
    byte_order: ByteOrder,
    /// Time of the latest packet, for packets without one.
    latest_nanos: u64,
}

/// Turns an interface's ticks into nanoseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Clock {
    tick: Tick,
    /// Seconds to add (`if_tsoffset`).
    offset_seconds: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tick {
    Nanos(u64),
    PerNano(u64),
    /// 2 to the minus this many seconds.
    PowerOfTwo(u8),
}

impl Reader {
    /// Reads the first section header.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(super) fn open(input: &mut Input) -> Result<Self, String> {
        let mut reader = Self {
            byte_order: ByteOrder::Little,
            latest_nanos: 0,
        };
        let length = reader.block_header(input)?.1;
        reader.section_header(input, length)?;
        Ok(reader)
    }

    /// Byte order of the section being read.
    pub(super) fn byte_order(&self) -> ByteOrder {
        self.byte_order
    }

    /// Consumes blocks up to and with the next packet, if there is one.
    ///
    /// # Errors
    ///
    /// What is wrong with a block.
    pub(super) fn next(
        &mut self,
        input: &mut Input,
        interfaces: &mut Vec<Interface>,
    ) -> Result<Option<Packet>, String> {
        loop {
            if input.available().is_empty() && input.is_finished() {
                return Ok(None);
            }
            let (kind, length) = self.block_header(input)?;
            match kind {
                ENHANCED_PACKET | OBSOLETE_PACKET => {
                    let packet = self.timed_packet(input, length, interfaces, kind)?;
                    self.latest_nanos = packet.unix_nanos;
                    return Ok(Some(packet));
                }
                SIMPLE_PACKET => return self.simple_packet(input, length, interfaces).map(Some),
                SECTION_HEADER => {
                    self.section_header(input, length)?;
                    interfaces.clear();
                }
                INTERFACE_DESCRIPTION => {
                    let interface = self.interface_description(input, length)?;
                    if interfaces.len() == MAX_INTERFACES {
                        return Err(format!("a section has more than {MAX_INTERFACES} interfaces"));
                    }
                    interfaces.push(interface);
                }
                _ => self.pass_over(input, kind, length)?,
            }
        }
    }

    /// Reads type and total length of the block that comes next, without consuming it.
    #[inline]
    fn block_header(&mut self, input: &mut Input) -> Result<(u32, u32), String> {
        if !input.fill(12) {
            return Err(cut(input, 12));
        }
        let header = input.available();
        let kind = self.byte_order.u32(header, 0);
        if kind == SECTION_HEADER {
            self.byte_order = match BYTE_ORDER_MAGIC {
                magic if ByteOrder::Little.u32(header, 8) == magic => ByteOrder::Little,
                magic if ByteOrder::Big.u32(header, 8) == magic => ByteOrder::Big,
                _ => return Err(bad(input, "has no byte-order magic")),
            };
        }
        let length = self.byte_order.u32(header, 4);
        if length < 12 || !length.is_multiple_of(4) {
            return Err(bad(
                input,
                &format!("of type {kind:#x} claims a length of {length} bytes"),
            ));
        }
        Ok((kind, length))
    }

    /// Makes a whole block available, at least `least` bytes long, and compares its two length fields.
    #[inline]
    fn hold<'a>(&self, input: &'a mut Input, length: u32, least: u32) -> Result<&'a [u8], String> {
        if length < least || length > MAX_BLOCK_BYTES {
            return Err(bad(input, &format!("claims a length of {length} bytes")));
        }
        if !input.fill(length as usize) {
            return Err(cut(input, length));
        }
        self.compare_lengths(
            input,
            length,
            self.byte_order.u32(input.available(), length as usize - 4),
        )?;
        Ok(&input.available()[..length as usize])
    }

    #[inline]
    fn compare_lengths(&self, input: &Input, first: u32, second: u32) -> Result<(), String> {
        if first == second {
            return Ok(());
        }
        Err(bad(
            input,
            &format!("has two lengths, {first} in front and {second} at its end"),
        ))
    }

    fn pass_over(&self, input: &mut Input, kind: u32, length: u32) -> Result<(), String> {
        let start = input.offset();
        if !input.skip(u64::from(length) - 4) || !input.fill(4) {
            let cause = input.end_in_words();
            return Err(format!(
                "{cause} in the block of type {kind:#x} and {length} bytes at byte {start}"
            ));
        }
        self.compare_lengths(input, length, self.byte_order.u32(input.available(), 0))?;
        input.consume(4, 0..0);
        Ok(())
    }

    fn section_header(&self, input: &mut Input, length: u32) -> Result<(), String> {
        let block = self.hold(input, length, 28)?;
        let (major, minor) = (self.byte_order.u16(block, 12), self.byte_order.u16(block, 14));
        if major != 1 {
            return Err(bad(
                input,
                &format!("is a section of pcapng version {major}.{minor}; only 1 is known"),
            ));
        }
        input.consume(length as usize, 0..0);
        Ok(())
    }

    fn interface_description(&self, input: &mut Input, length: u32) -> Result<Interface, String> {
        let block = self.hold(input, length, 20)?;
        let interface = Interface {
            link_type: LinkType(self.byte_order.u16(block, 8)),
            snap_length: self.byte_order.u32(block, 12),
            clock: self.clock(&block[16..block.len() - 4]),
        };
        input.consume(length as usize, 0..0);
        Ok(interface)
    }

    /// Reads resolution and offset of an interface's time from its options; those cut or of wrong length do not count.
    fn clock(&self, mut options: &[u8]) -> Clock {
        let mut clock = Clock::default();
        while let Some((header, rest)) = options.split_at_checked(4) {
            let (code, length) = (
                self.byte_order.u16(header, 0),
                usize::from(self.byte_order.u16(header, 2)),
            );
            let Some(value) = rest.get(..length).filter(|_| code != OPTION_END) else {
                break;
            };
            match (code, length) {
                (OPTION_IF_TSRESOL, 1) => clock.tick = Tick::from_option(value[0]),
                (OPTION_IF_TSOFFSET, 8) => {
                    let (first, second) = (self.byte_order.u32(value, 0), self.byte_order.u32(value, 4));
                    let (high, low) = match self.byte_order {
                        ByteOrder::Little => (second, first),
                        ByteOrder::Big => (first, second),
                    };
                    clock.offset_seconds = (u64::from(high) << 32 | u64::from(low)).cast_signed();
                }
                _ => {}
            }
            options = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        clock
    }

    /// Consumes an enhanced packet block, or an obsolete packet block, which differs in how it names the interface.
    #[inline]
    fn timed_packet(
        &self,
        input: &mut Input,
        length: u32,
        interfaces: &[Interface],
        kind: u32,
    ) -> Result<Packet, String> {
        let block = self.hold(input, length, 32)?;
        let index = match kind {
            OBSOLETE_PACKET => u32::from(self.byte_order.u16(block, 8)),
            _ => self.byte_order.u32(block, 8),
        };
        let ticks =
            u64::from(self.byte_order.u32(block, 12)) << 32 | u64::from(self.byte_order.u32(block, 16));
        let captured_length = self.byte_order.u32(block, 20);
        let original_length = self.byte_order.u32(block, 24);
        let Some(interface) = interfaces.get(index as usize) else {
            return Err(no_interface(input, index));
        };
        if captured_length > length - 32 {
            return Err(bad(
                input,
                &format!("of {length} bytes claims to hold a packet of {captured_length}"),
            ));
        }
        Ok(Packet {
            unix_nanos: interface.clock.unix_nanos(ticks),
            interface: index,
            bytes: take(input, length, 28, captured_length)?,
            original_length,
        })
    }

    /// Consumes a simple packet block: no time, no captured length, always the section's first interface.
    fn simple_packet(
        &self,
        input: &mut Input,
        length: u32,
        interfaces: &[Interface],
    ) -> Result<Packet, String> {
        let block = self.hold(input, length, 16)?;
        let original_length = self.byte_order.u32(block, 8);
        let Some(interface) = interfaces.first() else {
            return Err(no_interface(input, 0));
        };
        let snapped = match interface.snap_length {
            0 => original_length,
            limit => original_length.min(limit),
        };
        Ok(Packet {
            unix_nanos: self.latest_nanos,
            interface: 0,
            bytes: take(input, length, 12, snapped.min(length - 16))?,
            original_length,
        })
    }
}

/// Consumes a block and keeps the packet in it.
#[inline]
fn take(input: &mut Input, length: u32, start: usize, captured_length: u32) -> Result<Consumed, String> {
    if captured_length > MAX_CAPTURED_LENGTH {
        return Err(bad(
            input,
            &format!("holds {captured_length} captured bytes; the most is {MAX_CAPTURED_LENGTH}"),
        ));
    }
    let packet: Range<usize> = start..start + captured_length as usize;
    Ok(input.consume(length as usize, packet))
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            tick: Tick::Nanos(1_000),
            offset_seconds: 0,
        }
    }
}

impl Clock {
    #[inline]
    fn unix_nanos(self, ticks: u64) -> u64 {
        let nanos = self.tick.to_nanos(ticks);
        if self.offset_seconds == 0 {
            return nanos;
        }
        let shifted = i128::from(nanos) + i128::from(self.offset_seconds) * i128::from(NANOS_PER_SECOND);
        u64::try_from(shifted).unwrap_or(if shifted < 0 { 0 } else { u64::MAX })
    }
}

impl Tick {
    /// Reads `if_tsresol`: a negative power of ten, or of two when the top bit is set.
    fn from_option(value: u8) -> Self {
        match (value & 0x80 != 0, value & 0x7f) {
            (true, exponent) => Self::PowerOfTwo(exponent),
            (false, exponent @ 0..=9) => Self::Nanos(10u64.pow(9 - u32::from(exponent))),
            // With more than 28 digits, all a 64-bit count can tell lies within the first nanosecond.
            (false, exponent) => 10_u64
                .checked_pow(u32::from(exponent) - 9)
                .map_or(Self::Nanos(0), Self::PerNano),
        }
    }

    #[inline]
    fn to_nanos(self, ticks: u64) -> u64 {
        match self {
            Self::Nanos(nanos) => ticks.saturating_mul(nanos),
            Self::PerNano(count) => ticks / count,
            Self::PowerOfTwo(exponent) => {
                let nanos = (u128::from(ticks) * u128::from(NANOS_PER_SECOND)) >> exponent;
                u64::try_from(nanos).unwrap_or(u64::MAX)
            }
        }
    }
}

#[cold]
fn cut(input: &Input, block_bytes: u32) -> String {
    let (at, got) = (input.offset(), input.available().len());
    let cause = input.end_in_words();
    if got == 0 {
        return format!("{cause} at byte {at}, behind a whole block");
    }
    format!("{cause} in the block at byte {at}: {got} of {block_bytes} bytes are there")
}

#[cold]
fn bad(input: &Input, what: &str) -> String {
    format!("the block at byte {} {what}", input.offset())
}

#[cold]
fn no_interface(input: &Input, index: u32) -> String {
    bad(
        input,
        &format!("is a packet of interface {index}, which the section has not declared"),
    )
}
