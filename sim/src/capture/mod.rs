//! Reads and writes packet captures as streams.
//!
//! [`Capture`] reads classic pcap (microseconds, nanoseconds, and the modified variant with longer record headers),
//! and pcapng, in either byte order, plain or inside gzip. The first bytes decide which, never the name. It goes
//! through the source once, from any [`Read`], and holds one record or block at a time, so a capture may be larger
//! than memory or come from a pipe. Records are lent from one buffer: reading allocates nothing per packet.
//!
//! [`link::ip_of`] finds the IP packet inside a captured frame. [`PcapngWriter`] writes packets with comments.
//!
//! # What is kept of a damaged capture
//!
//! Everything before the damage. [`Capture::next_record`] gives all whole records and then one [`Damage`], after which
//! the capture has ended. Damage is a record or block that is cut or contradicts itself, a captured length over
//! [`MAX_CAPTURED_LENGTH`], or a source that fails (a gzip stream that ends early, an I/O error). A captured length
//! over the file's own snap length is common in sound captures and no damage.

mod error;
mod input;
pub mod link;
mod pcap;
mod pcapng;
#[cfg(test)]
mod tests;
mod writer;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use self::error::Opening;
pub use self::error::{Damage, OpenError};
use self::input::Input;
pub use self::link::{LinkType, LinkView};
pub use self::writer::{PcapWriter, PcapngWriter};

/// Most bytes one packet may have in a capture: 262,144.
///
/// libpcap and Wireshark write and accept no more (`MAXIMUM_SNAPLEN`, `WTAP_MAX_PACKET_SIZE_STANDARD`), and it leaves
/// room for the largest super-packets that segmentation offload shows to a capture. A longer record is a damaged one:
/// its length is all that says where the next record begins.
pub const MAX_CAPTURED_LENGTH: u32 = 262_144;

/// A capture being read, from its first record to its last.
///
/// ```no_run
/// # use tungate_sim::capture::{Capture, link::{self, LinkView}};
/// let mut capture = Capture::open("capture.pcap".as_ref())?;
/// while let Some(record) = capture.next_record()? {
///     if let LinkView::Ip(range) = link::ip_of(record.link_type, record.bytes) {
///         println!("packet {}: {} bytes of IP", record.number, record.bytes[range].len());
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Capture {
    input: Input,
    size: Option<u64>,
    format: Format,
    reader: Reader,
    interfaces: Vec<Interface>,
    packets: u64,
    ended: bool,
}

/// One captured packet, lent until the next is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Counts packets from 1 in file order.
    pub number: u64,
    /// Capture time in nanoseconds since the Unix epoch, as recorded: it may go back from one packet to the next.
    ///
    /// Times before 1970 or after 2554, which only a pcapng time offset can express, become the nearest that fits.
    /// A pcapng simple packet block has no time and gets that of the packet before it (0 if it is the first).
    pub unix_nanos: u64,
    /// Index into [`Capture::interfaces`] at the time of this record; always 0 in pcap.
    pub interface: u32,
    /// What the bytes begin with.
    pub link_type: LinkType,
    /// The captured bytes, from the link header on; at most [`MAX_CAPTURED_LENGTH`].
    pub bytes: &'a [u8],
    /// Length on the wire in bytes, as recorded. More than `bytes.len()` where the snap length cut the packet.
    pub original_length: u32,
}

/// An interface packets were captured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Link type of the interface's packets.
    pub link_type: LinkType,
    /// Most bytes of a packet that were to be captured; 0 means all. Recorded packets may be longer nevertheless.
    pub snap_length: u32,
    clock: pcapng::Clock,
}

/// How a capture is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Kind of file, without regard to compression.
    pub kind: FileKind,
    /// Byte order of the headers; of the first section in pcapng, where each has its own.
    pub byte_order: ByteOrder,
    /// Whether the file is compressed with gzip.
    pub gzip: bool,
}

/// The kinds of capture file that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// Classic pcap with microseconds (magic 0xa1b2c3d4).
    Pcap,
    /// Classic pcap with nanoseconds (magic 0xa1b23c4d).
    PcapNanoseconds,
    /// Modified pcap of old Linux distributions: record headers of 24 bytes (magic 0xa1b2cd34).
    PcapModified,
    /// pcapng: sections of blocks (magic 0x0a0d0d0a).
    Pcapng,
}

/// Order of the bytes in a file's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ByteOrder {
    /// Least significant byte first.
    Little,
    /// Most significant byte first.
    Big,
}

enum Reader {
    Pcap(pcap::Reader),
    Pcapng(pcapng::Reader),
}

impl Capture {
    /// Opens the capture at `path` and reads its file header.
    ///
    /// # Errors
    ///
    /// [`OpenError`] when there is no such file, it may not be read, is empty, or is no capture of a kind this reads.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let opening = Opening {
            name: path.display().to_string(),
        };
        let file = File::open(path).map_err(|error| opening.io(error))?;
        let metadata = file.metadata().map_err(|error| opening.io(error))?;
        if metadata.is_dir() {
            return Err(opening.directory());
        }
        let size = metadata.is_file().then_some(metadata.len());
        Self::start(opening, Box::new(file), size)
    }

    /// Reads a capture from `source`, which `name` stands for in error messages ("standard input").
    ///
    /// # Errors
    ///
    /// As [`Capture::open`].
    pub fn from_reader(
        name: impl Into<String>,
        source: impl Read + Send + 'static,
    ) -> Result<Self, OpenError> {
        Self::start(Opening { name: name.into() }, Box::new(source), None)
    }

    fn start(opening: Opening, source: Box<dyn Read + Send>, size: Option<u64>) -> Result<Self, OpenError> {
        let mut input = Input::new(source);
        input.fill(input::GZIP_MAGIC.len());
        let gzip = input.available().starts_with(&input::GZIP_MAGIC);
        if gzip {
            input = input.gunzip();
        }
        let mut interfaces = Vec::new();
        let (kind, byte_order, reader) = match opening.identify(&mut input)? {
            (FileKind::Pcapng, _) => {
                let reader = pcapng::Reader::open(&mut input).map_err(|what| opening.unusable(what))?;
                (FileKind::Pcapng, reader.byte_order(), Reader::Pcapng(reader))
            }
            (kind @ (FileKind::Pcap | FileKind::PcapNanoseconds | FileKind::PcapModified), order) => {
                let (reader, interface) =
                    pcap::Reader::open(&mut input, kind, order).map_err(|what| opening.unusable(what))?;
                interfaces.push(interface);
                (kind, order, Reader::Pcap(reader))
            }
        };
        let format = Format {
            kind,
            byte_order,
            gzip,
        };
        Ok(Self {
            input,
            size,
            format,
            reader,
            interfaces,
            packets: 0,
            ended: false,
        })
    }

    /// Reads the next packet; `None` at the end of the capture, and after damage.
    ///
    /// # Errors
    ///
    /// [`Damage`], once, where the capture cannot be read on. All packets before it have been given.
    #[inline]
    pub fn next_record(&mut self) -> Result<Option<Record<'_>>, Damage> {
        if self.ended {
            return Ok(None);
        }
        let found = match &mut self.reader {
            Reader::Pcap(reader) => reader.next(&mut self.input),
            Reader::Pcapng(reader) => reader.next(&mut self.input, &mut self.interfaces),
        };
        match found {
            Ok(Some(packet)) => {
                self.packets += 1;
                Ok(Some(Record {
                    number: self.packets,
                    unix_nanos: packet.unix_nanos,
                    interface: packet.interface,
                    link_type: self.interfaces[packet.interface as usize].link_type,
                    bytes: self.input.consumed(packet.bytes),
                    original_length: packet.original_length,
                }))
            }
            Ok(None) => {
                self.ended = true;
                Ok(None)
            }
            Err(what) => {
                self.ended = true;
                Err(Damage {
                    after_packet: self.packets,
                    what,
                })
            }
        }
    }

    /// How the capture is written down.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The interfaces declared so far; in pcapng those of the section being read, as each section counts anew.
    pub fn interfaces(&self) -> &[Interface] {
        &self.interfaces
    }

    /// Bytes of the file (compressed, if it is) that reading has got through.
    pub fn position(&self) -> u64 {
        self.input.position()
    }

    /// Size of the file in bytes, on the scale of [`Capture::position`]; `None` for a pipe or other source.
    pub fn size(&self) -> Option<u64> {
        self.size
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture")
            .field("format", &self.format)
            .field("packets", &self.packets)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {}{}",
            self.kind,
            self.byte_order,
            if self.gzip { ", gzip" } else { "" }
        )
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pcap => "pcap",
            Self::PcapNanoseconds => "nanosecond pcap",
            Self::PcapModified => "modified pcap",
            Self::Pcapng => "pcapng",
        })
    }
}

impl fmt::Display for ByteOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Little => "little-endian",
            Self::Big => "big-endian",
        })
    }
}

impl ByteOrder {
    /// Reads the 16-bit number at `at`; the caller has made sure that it is there.
    #[inline]
    fn u16(self, bytes: &[u8], at: usize) -> u16 {
        let raw = [bytes[at], bytes[at + 1]];
        match self {
            Self::Little => u16::from_le_bytes(raw),
            Self::Big => u16::from_be_bytes(raw),
        }
    }

    /// Reads the 32-bit number at `at`; the caller has made sure that it is there.
    #[inline]
    fn u32(self, bytes: &[u8], at: usize) -> u32 {
        let raw = *bytes[at..]
            .first_chunk()
            .expect("the caller made sure of four bytes");
        match self {
            Self::Little => u32::from_le_bytes(raw),
            Self::Big => u32::from_be_bytes(raw),
        }
    }
}

/// A packet that a format's reader has found and consumed.
struct Packet {
    unix_nanos: u64,
    interface: u32,
    bytes: input::Consumed,
    original_length: u32,
}
