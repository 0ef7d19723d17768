//! What can be wrong with a capture, and the recognition of files that are none.

use std::fmt;
use std::io;

use serde::Serialize;

use super::input::Input;
use super::{ByteOrder, FileKind, pcapng};

/// A capture that cannot be used at all: not one packet could be read from it.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be opened or read.
    #[error("cannot read capture \"{name}\": {error}{}", io_hint(.error))]
    Io {
        /// What was to be opened.
        name: String,
        /// Why not.
        error: io::Error,
    },
    /// There is not one byte in it.
    #[error(
        "capture \"{name}\" is empty\nhint: a capture has a file header even without packets; was it written to its end?"
    )]
    Empty {
        /// What was opened.
        name: String,
    },
    /// The first bytes are those of no capture.
    #[error(
        "\"{name}\" is not a capture: {found}\nhint: pcap and pcapng are read, plain or compressed with gzip"
    )]
    NotACapture {
        /// What was opened.
        name: String,
        /// What was found in it.
        found: String,
    },
    /// A known format that is not read here.
    #[error("\"{name}\" is {found}, which is not supported\nhint: {hint}")]
    Unsupported {
        /// What was opened.
        name: String,
        /// Name of the format.
        found: &'static str,
        /// How to turn it into a capture that is read.
        hint: &'static str,
    },
    /// A capture by its first bytes, but its file header cannot be used.
    #[error(
        "capture \"{name}\" cannot be used: {what}\nhint: its very beginning is damaged; capture or copy it again"
    )]
    Unusable {
        /// What was opened.
        name: String,
        /// What is wrong with the header.
        what: String,
    },
}

/// The place from which on a capture could not be read, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("damaged after packet {after_packet}: {what}")]
pub struct Damage {
    /// Number of the last packet that was read; 0 when there was none.
    pub after_packet: u64,
    /// What is wrong there, with its place in the file.
    pub what: String,
}

/// A capture that is being opened, by its name.
pub(super) struct Opening {
    pub(super) name: String,
}

const UNPACK: &str = "unpack it first; of compressed captures only gzip is read";
const CONVERT: &str = "convert it with: editcap -F pcapng OLD NEW";

/// Beginnings of files that people take for captures and that are not read.
const UNSUPPORTED: &[(&[u8], &str, &str)] = &[
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", UNPACK),
    (b"\x04\x22\x4d\x18", "an LZ4 file", UNPACK),
    (b"\xfd7zXZ\0", "an xz file", UNPACK),
    (b"BZh", "a bzip2 file", UNPACK),
    (b"PK\x03\x04", "a ZIP archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", UNPACK),
    (b"\x1f\x8b", "gzip inside gzip", "unpack it once"),
    (b"snoop\0\0\0", "a Solaris snoop capture", CONVERT),
    (
        b"btsnoop\0",
        "a Bluetooth capture (btsnoop)",
        "it holds no IP packets as such",
    ),
    (b"GMBU", "a Microsoft Network Monitor capture", CONVERT),
    (b"RTSS", "a Microsoft Network Monitor 1 capture", CONVERT),
    (b"TRSNIFF data    \x1a", "a Sniffer capture", CONVERT),
    (b"XCP\0", "a NetXray or Windows Sniffer capture", CONVERT),
    (b"\x1c\x00\x01\xac", "an Ixia pcap", CONVERT),
    (b"\xac\x01\x00\x1c", "an Ixia pcap", CONVERT),
    (b"\x1c\x00\x01\xab", "an Ixia pcap", CONVERT),
    (b"\xab\x01\x00\x1c", "an Ixia pcap", CONVERT),
];

/// As many of the first bytes as tell the formats apart.
const MAGIC_BYTES: usize = 17;

impl Opening {
    /// Tells from the first bytes, without consuming them, what `input` is.
    ///
    /// The byte order is that of the magic number; a pcapng section tells its own later.
    pub(super) fn identify(&self, input: &mut Input) -> Result<(FileKind, ByteOrder), OpenError> {
        input.fill(MAGIC_BYTES);
        if input.available().len() < 4
            && let Some(error) = input.failure()
        {
            return Err(self.io(io::Error::new(error.kind(), error.to_string())));
        }
        let start = input.available();
        let start = &start[..start.len().min(MAGIC_BYTES)];
        if start.is_empty() {
            return Err(OpenError::Empty {
                name: self.name.clone(),
            });
        }
        if let Some(magic) = start.first_chunk() {
            let numbers = [
                (u32::from_le_bytes(*magic), ByteOrder::Little),
                (u32::from_be_bytes(*magic), ByteOrder::Big),
            ];
            for (number, byte_order) in numbers {
                match number {
                    0xa1b2_c3d4 => return Ok((FileKind::Pcap, byte_order)),
                    0xa1b2_3c4d => return Ok((FileKind::PcapNanoseconds, byte_order)),
                    0xa1b2_cd34 => return Ok((FileKind::PcapModified, byte_order)),
                    pcapng::SECTION_HEADER => return Ok((FileKind::Pcapng, byte_order)),
                    _ => {}
                }
            }
        }
        for &(beginning, found, hint) in UNSUPPORTED {
            if start.starts_with(beginning) {
                return Err(OpenError::Unsupported {
                    name: self.name.clone(),
                    found,
                    hint,
                });
            }
        }
        Err(OpenError::NotACapture {
            name: self.name.clone(),
            found: Found(start).to_string(),
        })
    }

    pub(super) fn io(&self, error: io::Error) -> OpenError {
        OpenError::Io {
            name: self.name.clone(),
            error,
        }
    }

    pub(super) fn directory(&self) -> OpenError {
        self.io(io::ErrorKind::IsADirectory.into())
    }

    pub(super) fn unusable(&self, what: String) -> OpenError {
        OpenError::Unusable {
            name: self.name.clone(),
            what,
        }
    }
}

/// The way out, where there is one that the error does not say itself.
fn io_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "\nhint: capture files often belong to root; change owner or mode, or copy it"
        }
        io::ErrorKind::IsADirectory => "\nhint: name the capture files inside it",
        io::ErrorKind::NotFound => "\nhint: check the name, and the folder it is looked for in",
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => {
            "\nhint: its very beginning is damaged; capture or copy it again"
        }
        _ => "",
    }
}

/// Describes the first bytes of a file that is no capture.
struct Found<'a>(&'a [u8]);

impl fmt::Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self
            .0
            .iter()
            .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
        if text {
            return write!(f, "it begins with the text {:?}", String::from_utf8_lossy(self.0));
        }
        f.write_str("it begins with the bytes")?;
        self.0
            .iter()
            .take(8)
            .try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}
