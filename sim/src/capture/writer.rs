//! Writes captures, the same bytes on every machine.

use std::io::{self, Write};

use super::{LinkType, MAX_CAPTURED_LENGTH};

/// Writes IP packets to a pcapng file with one interface: raw IP, nanoseconds, little-endian.
///
/// Every packet is one call of [`Write::write_all`], so the sink should be buffered.
pub struct PcapngWriter<W> {
    sink: W,
    block: Vec<u8>,
}

/// Writes frames of one link type to a classic pcap file: nanoseconds, little-endian.
///
/// It holds no comments, which makes it the simplest capture a scenario or test can make.
pub struct PcapWriter<W> {
    sink: W,
}

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;

const OPTION_END: u16 = 0;
const OPTION_COMMENT: u16 = 1;
const OPTION_SHB_USERAPPL: u16 = 4;
const OPTION_IF_NAME: u16 = 2;
const OPTION_IF_TSRESOL: u16 = 9;

const APPLICATION: &str = concat!("tungate ", env!("CARGO_PKG_VERSION"));

impl<W: Write> PcapngWriter<W> {
    /// Starts a file: writes the section header and the interface.
    ///
    /// # Errors
    ///
    /// What the sink reports, here and in the other methods.
    pub fn new(sink: W) -> io::Result<Self> {
        let mut writer = Self {
            sink,
            block: Vec::new(),
        };
        writer.begin(SECTION_HEADER);
        writer.put(&0x1a2b_3c4d_u32.to_le_bytes());
        writer.put(&1_u16.to_le_bytes());
        writer.put(&0_u16.to_le_bytes());
        writer.put(&u64::MAX.to_le_bytes()); // the section's length is not known yet
        writer.option(OPTION_SHB_USERAPPL, APPLICATION.as_bytes());
        writer.option(OPTION_END, &[]);
        writer.end()?;
        writer.begin(INTERFACE_DESCRIPTION);
        writer.put(&LinkType::RAW.0.to_le_bytes());
        writer.put(&[0; 2]);
        writer.put(&0_u32.to_le_bytes()); // no snap length
        writer.option(OPTION_IF_NAME, b"tungate");
        writer.option(OPTION_IF_TSRESOL, &[9]);
        writer.option(OPTION_END, &[]);
        writer.end()?;
        Ok(writer)
    }

    /// Writes an IP packet that was `original_length` bytes long, with a comment that analysers show beside it.
    ///
    /// At most [`MAX_CAPTURED_LENGTH`] bytes of the packet are written, and 65,535 of the comment; an empty comment is
    /// left out.
    ///
    /// # Errors
    ///
    /// What the sink reports.
    pub fn write(
        &mut self,
        unix_nanos: u64,
        packet: &[u8],
        original_length: u32,
        comment: &str,
    ) -> io::Result<()> {
        let packet = &packet[..packet.len().min(MAX_CAPTURED_LENGTH as usize)];
        self.begin(ENHANCED_PACKET);
        self.put(&0_u32.to_le_bytes()); // the interface
        self.put(&((unix_nanos >> 32) as u32).to_le_bytes());
        self.put(&(unix_nanos as u32).to_le_bytes());
        self.put(&(packet.len() as u32).to_le_bytes());
        self.put(&original_length.to_le_bytes());
        self.put(packet);
        self.pad();
        if !comment.is_empty() {
            let comment = &comment[..comment.floor_char_boundary(usize::from(u16::MAX))];
            self.option(OPTION_COMMENT, comment.as_bytes());
            self.option(OPTION_END, &[]);
        }
        self.end()
    }

    /// Flushes the sink and gives it back.
    ///
    /// # Errors
    ///
    /// What the sink reports.
    pub fn finish(mut self) -> io::Result<W> {
        self.sink.flush()?;
        Ok(self.sink)
    }

    /// Begins a block; its length is filled in at the end.
    fn begin(&mut self, kind: u32) {
        self.block.clear();
        self.put(&kind.to_le_bytes());
        self.put(&[0; 4]);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.block.extend_from_slice(bytes);
    }

    fn pad(&mut self) {
        self.block.resize(self.block.len().next_multiple_of(4), 0);
    }

    fn option(&mut self, code: u16, value: &[u8]) {
        self.put(&code.to_le_bytes());
        self.put(&(value.len() as u16).to_le_bytes());
        self.put(value);
        self.pad();
    }

    fn end(&mut self) -> io::Result<()> {
        let length = (self.block.len() as u32 + 4).to_le_bytes();
        self.block[4..8].copy_from_slice(&length);
        self.put(&length);
        self.sink.write_all(&self.block)
    }
}

impl<W: Write> PcapWriter<W> {
    /// Starts a file: writes its header.
    ///
    /// # Errors
    ///
    /// What the sink reports, here and in the other methods.
    pub fn new(mut sink: W, link_type: LinkType) -> io::Result<Self> {
        sink.write_all(&0xa1b2_3c4d_u32.to_le_bytes())?;
        sink.write_all(&[2, 0, 4, 0])?;
        sink.write_all(&[0; 8])?;
        sink.write_all(&MAX_CAPTURED_LENGTH.to_le_bytes())?;
        sink.write_all(&u32::from(link_type.0).to_le_bytes())?;
        Ok(Self { sink })
    }

    /// Writes a whole frame, which may have [`MAX_CAPTURED_LENGTH`] bytes and be captured until February 2106.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] for a longer or later one, else what the sink reports.
    pub fn write(&mut self, unix_nanos: u64, frame: &[u8]) -> io::Result<()> {
        let seconds = u32::try_from(unix_nanos / 1_000_000_000);
        let length = u32::try_from(frame.len())
            .ok()
            .filter(|&length| length <= MAX_CAPTURED_LENGTH);
        let (Ok(seconds), Some(length)) = (seconds, length) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        self.sink.write_all(&seconds.to_le_bytes())?;
        self.sink
            .write_all(&((unix_nanos % 1_000_000_000) as u32).to_le_bytes())?;
        self.sink.write_all(&length.to_le_bytes())?;
        self.sink.write_all(&length.to_le_bytes())?;
        self.sink.write_all(frame)
    }

    /// Flushes the sink and gives it back.
    ///
    /// # Errors
    ///
    /// What the sink reports.
    pub fn finish(mut self) -> io::Result<W> {
        self.sink.flush()?;
        Ok(self.sink)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::process::Command;

    use super::*;
    use crate::capture::{Capture, FileKind};

    /// IPv4, UDP from 192.0.2.1 port 1000 to 192.0.2.2 port 2000 without payload.
    const PACKET: [u8; 28] = [
        0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0xf6, 0xcc, 192, 0, 2, 1, 192, 0, 2, 2, // IPv4
        0x03, 0xe8, 0x07, 0xd0, 0, 8, 0, 0, // UDP
    ];
    const TIME: u64 = 1_700_000_000_123_456_789;

    fn written_pcapng() -> Vec<u8> {
        let mut writer = PcapngWriter::new(Vec::new()).unwrap();
        writer
            .write(TIME, &PACKET, 28, "dropped: rule \"no-dns\" (zürich)")
            .unwrap();
        writer.write(TIME + 1, &PACKET[..21], 28, "").unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn a_written_pcapng_is_read_back() {
        let mut capture = Capture::from_reader("memory", Cursor::new(written_pcapng())).unwrap();
        assert_eq!(capture.format().kind, FileKind::Pcapng);
        let first = capture.next_record().unwrap().unwrap();
        assert_eq!(
            (first.unix_nanos, first.link_type, first.bytes),
            (TIME, LinkType::RAW, &PACKET[..])
        );
        let second = capture.next_record().unwrap().unwrap();
        assert_eq!(
            (second.unix_nanos, second.bytes, second.original_length),
            (TIME + 1, &PACKET[..21], 28)
        );
        assert_eq!(capture.next_record(), Ok(None));
    }

    #[test]
    fn a_written_pcap_is_read_back() {
        let mut writer = PcapWriter::new(Vec::new(), LinkType::ETHERNET).unwrap();
        writer.write(TIME, b"a frame").unwrap();
        let mut capture = Capture::from_reader("memory", Cursor::new(writer.finish().unwrap())).unwrap();
        assert_eq!(capture.format().kind, FileKind::PcapNanoseconds);
        let record = capture.next_record().unwrap().unwrap();
        assert_eq!(
            (record.unix_nanos, record.link_type, record.bytes),
            (TIME, LinkType::ETHERNET, &b"a frame"[..])
        );
        assert_eq!(record.original_length, 7);
        assert_eq!(capture.next_record(), Ok(None));
    }

    #[test]
    fn what_a_pcap_record_cannot_hold_is_refused() {
        let mut writer = PcapWriter::new(Vec::new(), LinkType::RAW).unwrap();
        let too_late = (u64::from(u32::MAX) + 1) * 1_000_000_000;
        assert_eq!(
            writer.write(too_late, &PACKET).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        let too_long = vec![0; MAX_CAPTURED_LENGTH as usize + 1];
        assert_eq!(
            writer.write(TIME, &too_long).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        assert_eq!(
            writer.finish().unwrap().len(),
            24,
            "only the file header is written"
        );
    }

    #[test]
    fn an_overlong_comment_or_packet_is_cut_and_the_file_stays_sound() {
        let mut writer = PcapngWriter::new(Vec::new()).unwrap();
        // 65,535 is inside a character of two bytes.
        writer
            .write(TIME, &vec![0x45; 300_000], 300_000, &"ü".repeat(40_000))
            .unwrap();
        writer.write(TIME, &PACKET, 28, "after it").unwrap();
        let mut capture = Capture::from_reader("memory", Cursor::new(writer.finish().unwrap())).unwrap();
        let long = capture.next_record().unwrap().unwrap();
        assert_eq!((long.bytes.len(), long.original_length), (262_144, 300_000));
        assert_eq!(capture.next_record().unwrap().unwrap().bytes, PACKET);
        assert_eq!(capture.next_record(), Ok(None));
    }

    /// Wireshark's reader is the judge of what others can read; without it there is nothing to ask.
    #[test]
    fn wireshark_reads_what_is_written() {
        let mut pcap = PcapWriter::new(Vec::new(), LinkType::RAW).unwrap();
        pcap.write(TIME, &PACKET).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let fields = |name: &str, bytes: &[u8]| {
            let path = directory.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let output = Command::new("tshark")
                .args([
                    "-n",
                    "-T",
                    "fields",
                    "-e",
                    "frame.time_epoch",
                    "-e",
                    "frame.len",
                    "-e",
                    "frame.cap_len",
                ])
                .args(["-e", "ip.dst", "-e", "udp.dstport", "-e", "frame.comment", "-r"])
                .arg(&path)
                .output();
            let output = match output {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
                other => other.unwrap(),
            };
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            Some(String::from_utf8(output.stdout).unwrap())
        };
        let Some(pcapng_fields) = fields("out.pcapng", &written_pcapng()) else {
            println!("skipped: tshark is not installed");
            return;
        };
        assert_eq!(
            pcapng_fields.lines().collect::<Vec<_>>(),
            [
                "1700000000.123456789\t28\t28\t192.0.2.2\t2000\tdropped: rule \"no-dns\" (zürich)",
                "1700000000.123456790\t28\t21\t192.0.2.2\t\t",
            ]
        );
        let pcap_fields = fields("out.pcap", &pcap.finish().unwrap()).expect("tshark was there a moment ago");
        assert_eq!(
            pcap_fields.trim_end(),
            "1700000000.123456789\t28\t28\t192.0.2.2\t2000"
        );
    }
}
