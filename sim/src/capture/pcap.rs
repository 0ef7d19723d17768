//! Classic pcap and its modified variant: a file header, then records of a header and the bytes.

use super::input::Input;
use super::pcapng::Clock;
use super::{ByteOrder, FileKind, Interface, LinkType, MAX_CAPTURED_LENGTH, Packet};

pub(super) const FILE_HEADER_BYTES: usize = 24;

const VERSION_MAJOR: u16 = 2;

pub(super) struct Reader {
    byte_order: ByteOrder,
    magic: u32,
    header_bytes: usize,
    nanos_per_tick: u64,
}

impl Reader {
    /// Reads the file header.
    ///
    /// # Errors
    ///
    /// What is wrong with the header.
    pub(super) fn open(
        input: &mut Input,
        kind: FileKind,
        byte_order: ByteOrder,
    ) -> Result<(Self, Interface), String> {
        if !input.fill(FILE_HEADER_BYTES) {
            let got = input.available().len();
            return Err(format!(
                "the pcap file header is cut: {got} of its {FILE_HEADER_BYTES} bytes are there"
            ));
        }
        let header = input.available();
        let (major, minor) = (byte_order.u16(header, 4), byte_order.u16(header, 6));
        if major != VERSION_MAJOR {
            return Err(format!(
                "pcap version {major}.{minor}; only version {VERSION_MAJOR} is known"
            ));
        }
        let interface = Interface {
            // The upper half holds the length of the frame check sequence and reserved bits.
            link_type: LinkType(byte_order.u32(header, 20) as u16),
            snap_length: byte_order.u32(header, 16),
            clock: Clock::default(),
        };
        let reader = Self {
            byte_order,
            magic: byte_order.u32(header, 0),
            header_bytes: if kind == FileKind::PcapModified { 24 } else { 16 },
            nanos_per_tick: if kind == FileKind::PcapNanoseconds {
                1
            } else {
                1_000
            },
        };
        input.consume(FILE_HEADER_BYTES, 0..0);
        Ok((reader, interface))
    }

    /// Consumes the next record, if there is one.
    ///
    /// # Errors
    ///
    /// What is wrong with the record.
    #[inline]
    pub(super) fn next(&mut self, input: &mut Input) -> Result<Option<Packet>, String> {
        if !input.fill(self.header_bytes) {
            return if input.is_finished() {
                Ok(None)
            } else {
                Err(cut(input, "header", self.header_bytes))
            };
        }
        let header = input.available();
        let seconds = self.byte_order.u32(header, 0);
        let fraction = self.byte_order.u32(header, 4);
        let captured_length = self.byte_order.u32(header, 8);
        let original_length = self.byte_order.u32(header, 12);
        if seconds == self.magic && self.byte_order.u16(header, 4) == VERSION_MAJOR {
            return Err(joined(input));
        }
        if captured_length > MAX_CAPTURED_LENGTH {
            return Err(too_long(input, captured_length));
        }
        let record = self.header_bytes..self.header_bytes + captured_length as usize;
        if !input.fill(record.end) {
            return Err(cut(input, "data", record.end));
        }
        Ok(Some(Packet {
            unix_nanos: u64::from(seconds) * 1_000_000_000 + u64::from(fraction) * self.nanos_per_tick,
            interface: 0,
            bytes: input.consume(record.end, record),
            original_length,
        }))
    }
}

#[cold]
fn cut(input: &Input, part: &str, record_bytes: usize) -> String {
    let (at, got) = (input.offset(), input.available().len());
    let cause = input.end_in_words();
    if got == 0 {
        return format!("{cause} at byte {at}, behind a whole record");
    }
    format!("{cause} in the {part} of the record at byte {at}: {got} of {record_bytes} bytes are there")
}

#[cold]
fn too_long(input: &Input, captured_length: u32) -> String {
    let at = input.offset();
    format!(
        "the record at byte {at} claims {captured_length} captured bytes; the most is {MAX_CAPTURED_LENGTH}"
    )
}

#[cold]
fn joined(input: &Input) -> String {
    let at = input.offset();
    format!(
        "a second pcap file header at byte {at}: files were joined byte by byte (mergecap joins captures)"
    )
}
