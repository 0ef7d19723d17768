//! Capture files built byte by byte, after the format descriptions, so that reader and writer cannot share an error.

use std::io::{self, Cursor, Read, Write};

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::capture::{ByteOrder, Capture, Damage, LinkType, OpenError};

pub(super) const MICROSECONDS: u32 = 0xa1b2_c3d4;
pub(super) const NANOSECONDS: u32 = 0xa1b2_3c4d;
pub(super) const MODIFIED: u32 = 0xa1b2_cd34;

/// A record that outlives the reading of the next.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Kept {
    pub(super) number: u64,
    pub(super) unix_nanos: u64,
    pub(super) interface: u32,
    pub(super) link_type: LinkType,
    pub(super) bytes: Vec<u8>,
    pub(super) original_length: u32,
}

pub(super) fn read_all(mut capture: Capture) -> (Vec<Kept>, Option<Damage>) {
    read_rest(&mut capture)
}

pub(super) fn read_rest(capture: &mut Capture) -> (Vec<Kept>, Option<Damage>) {
    let mut packets = Vec::new();
    loop {
        match capture.next_record() {
            Ok(Some(record)) => packets.push(Kept {
                number: record.number,
                unix_nanos: record.unix_nanos,
                interface: record.interface,
                link_type: record.link_type,
                bytes: record.bytes.to_vec(),
                original_length: record.original_length,
            }),
            Ok(None) => return (packets, None),
            Err(damage) => return (packets, Some(damage)),
        }
    }
}

pub(super) fn open_bytes(bytes: Vec<u8>) -> Result<Capture, OpenError> {
    Capture::from_reader("memory", Cursor::new(bytes))
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A capture file under construction.
#[derive(Clone, Debug)]
pub(super) struct File {
    order: ByteOrder,
    pub(super) bytes: Vec<u8>,
    /// Bytes a record header has behind the four numbers that all variants of pcap have.
    record_tail: usize,
}

impl File {
    pub(super) fn pcap(order: ByteOrder, magic: u32, network: u32) -> Self {
        let mut file = Self {
            order,
            bytes: Vec::new(),
            record_tail: if magic == MODIFIED { 8 } else { 0 },
        };
        file.u32(magic)
            .u16(2)
            .u16(4)
            .u32(0)
            .u32(0)
            .u32(65_535)
            .u32(network);
        file
    }

    pub(super) fn record(
        &mut self,
        seconds: u32,
        fraction: u32,
        bytes: &[u8],
        original_length: u32,
    ) -> &mut Self {
        self.u32(seconds)
            .u32(fraction)
            .u32(bytes.len() as u32)
            .u32(original_length);
        self.bytes.extend(vec![0xee; self.record_tail]);
        self.bytes.extend(bytes);
        self
    }

    pub(super) fn pcapng(order: ByteOrder) -> Self {
        let mut body = Self {
            order,
            bytes: Vec::new(),
            record_tail: 0,
        };
        body.u32(0x1a2b_3c4d).u16(1).u16(0).u32(u32::MAX).u32(u32::MAX);
        let mut file = Self {
            order,
            bytes: Vec::new(),
            record_tail: 0,
        };
        file.block(0x0a0d_0d0a, &body.bytes);
        file
    }

    pub(super) fn block(&mut self, kind: u32, body: &[u8]) -> &mut Self {
        let padding = body.len().next_multiple_of(4) - body.len();
        let length = (12 + body.len() + padding) as u32;
        self.u32(kind).u32(length);
        self.bytes.extend(body);
        self.bytes.extend(vec![0; padding]);
        self.u32(length)
    }

    pub(super) fn interface(
        &mut self,
        link_type: u16,
        snap_length: u32,
        options: &[(u16, Vec<u8>)],
    ) -> &mut Self {
        let mut body = self.body();
        body.u16(link_type).u16(0).u32(snap_length);
        for (code, value) in options {
            body.u16(*code).u16(value.len() as u16).bytes.extend(value);
            body.bytes.resize(body.bytes.len().next_multiple_of(4), 0);
        }
        self.block(1, &body.bytes)
    }

    pub(super) fn enhanced(
        &mut self,
        interface: u32,
        ticks: u64,
        bytes: &[u8],
        original_length: u32,
    ) -> &mut Self {
        let mut body = self.body();
        body.u32(interface).u32((ticks >> 32) as u32).u32(ticks as u32);
        body.u32(bytes.len() as u32)
            .u32(original_length)
            .bytes
            .extend(bytes);
        self.block(6, &body.bytes)
    }

    pub(super) fn simple(&mut self, original_length: u32, bytes: &[u8]) -> &mut Self {
        let mut body = self.body();
        body.u32(original_length).bytes.extend(bytes);
        self.block(3, &body.bytes)
    }

    pub(super) fn obsolete(
        &mut self,
        interface: u16,
        ticks: u64,
        bytes: &[u8],
        original_length: u32,
    ) -> &mut Self {
        let mut body = self.body();
        body.u16(interface)
            .u16(0xffff)
            .u32((ticks >> 32) as u32)
            .u32(ticks as u32);
        body.u32(bytes.len() as u32)
            .u32(original_length)
            .bytes
            .extend(bytes);
        self.block(2, &body.bytes)
    }

    pub(super) fn body(&self) -> Self {
        Self {
            order: self.order,
            bytes: Vec::new(),
            record_tail: 0,
        }
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes.extend(match self.order {
            ByteOrder::Little => value.to_le_bytes(),
            ByteOrder::Big => value.to_be_bytes(),
        });
        self
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend(Self::u32_in(self.order, value));
        self
    }

    pub(super) fn patch_u32(&mut self, at: usize, value: u32) -> &mut Self {
        self.bytes[at..at + 4].copy_from_slice(&Self::u32_in(self.order, value));
        self
    }

    pub(super) fn u32_in(order: ByteOrder, value: u32) -> [u8; 4] {
        match order {
            ByteOrder::Little => value.to_le_bytes(),
            ByteOrder::Big => value.to_be_bytes(),
        }
    }

    pub(super) fn u64_in(order: ByteOrder, value: u64) -> Vec<u8> {
        match order {
            ByteOrder::Little => value.to_le_bytes().to_vec(),
            ByteOrder::Big => value.to_be_bytes().to_vec(),
        }
    }

    pub(super) fn open(&self) -> Capture {
        open_bytes(self.bytes.clone()).expect("the file header is sound")
    }
}

/// A source that gives one byte at a time, with an interruption before each, and may fail where it ends.
pub(super) struct Dribble {
    pub(super) bytes: Cursor<Vec<u8>>,
    pub(super) interrupt: bool,
    pub(super) failure: Option<&'static str>,
}

impl Read for Dribble {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.interrupt = !self.interrupt;
        if self.interrupt {
            return Err(io::ErrorKind::Interrupted.into());
        }
        match (self.bytes.read(&mut buffer[..1])?, self.failure) {
            (0, Some(failure)) => Err(io::Error::other(failure)),
            (count, _) => Ok(count),
        }
    }
}
