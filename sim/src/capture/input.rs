//! The bytes of a capture, unpacked, in one buffer that grows to the longest record.

use std::io::{self, Chain, Cursor, Read};
use std::ops::Range;

use flate2::read::MultiGzDecoder;

/// What a gzip stream with the deflate method begins with (RFC 1952, section 2.3.1).
pub(super) const GZIP_MAGIC: [u8; 3] = [0x1f, 0x8b, 8];

const INITIAL_BUFFER_BYTES: usize = 256 * 1024;

/// A buffered source that tells apart its end and its failure.
pub(super) struct Input {
    source: Source,
    buffer: Vec<u8>,
    unread: Range<usize>,
    /// Bytes consumed since the first, after unpacking.
    offset: u64,
    end: Option<End>,
}

/// Bytes that were consumed last and are in the buffer until the next [`Input::fill`].
pub(super) struct Consumed(Range<usize>);

enum Source {
    Plain(Counted),
    Gzip(Box<MultiGzDecoder<Chain<Cursor<Vec<u8>>, Counted>>>),
}

struct Counted {
    source: Box<dyn Read + Send>,
    bytes: u64,
}

enum End {
    Regular,
    Failure(io::Error),
}

impl Input {
    pub(super) fn new(source: Box<dyn Read + Send>) -> Self {
        Self::over(Source::Plain(Counted { source, bytes: 0 }))
    }

    fn over(source: Source) -> Self {
        Self {
            source,
            buffer: vec![0; INITIAL_BUFFER_BYTES],
            unread: 0..0,
            offset: 0,
            end: None,
        }
    }

    /// Unpacks what is unread as gzip, members one after the other.
    pub(super) fn gunzip(self) -> Self {
        let head = Cursor::new(self.available().to_vec());
        match self.source {
            Source::Plain(rest) => Self::over(Source::Gzip(Box::new(MultiGzDecoder::new(head.chain(rest))))),
            Source::Gzip(_) => unreachable!("an input is unpacked once"),
        }
    }

    #[inline]
    pub(super) fn available(&self) -> &[u8] {
        &self.buffer[self.unread.clone()]
    }

    /// Makes at least `wanted` bytes available, or all that are left; says whether it could.
    #[inline]
    pub(super) fn fill(&mut self, wanted: usize) -> bool {
        self.unread.len() >= wanted || self.refill(wanted)
    }

    #[cold]
    fn refill(&mut self, wanted: usize) -> bool {
        self.buffer.copy_within(self.unread.clone(), 0);
        self.unread = 0..self.unread.len();
        while self.unread.len() < wanted && self.end.is_none() {
            if self.unread.end == self.buffer.len() {
                // Doubling follows the bytes that came, not the length a damaged header claims.
                self.buffer.resize(self.buffer.len() * 2, 0);
            }
            match self.source.read(&mut self.buffer[self.unread.end..]) {
                Ok(0) => self.end = Some(End::Regular),
                Ok(count) => self.unread.end += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => self.end = Some(End::Failure(error)),
            }
        }
        self.unread.len() >= wanted
    }

    /// Takes `count` available bytes; hands back the part of them that `keep` names.
    #[inline]
    pub(super) fn consume(&mut self, count: usize, keep: Range<usize>) -> Consumed {
        let start = self.unread.start;
        debug_assert!(count <= self.unread.len() && keep.end <= count);
        self.unread.start += count;
        self.offset += count as u64;
        Consumed(start + keep.start..start + keep.end)
    }

    #[inline]
    pub(super) fn consumed(&self, bytes: Consumed) -> &[u8] {
        &self.buffer[bytes.0]
    }

    /// Passes over `count` bytes without holding them; says whether there were so many.
    pub(super) fn skip(&mut self, mut count: u64) -> bool {
        while count > 0 && self.fill(1) {
            let step = count.min(self.unread.len() as u64);
            self.consume(step as usize, 0..0);
            count -= step;
        }
        count == 0
    }

    /// Bytes consumed so far, after unpacking: where in the capture the next one lies.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Says whether all bytes were consumed and the source ended without a failure.
    pub(super) fn is_finished(&mut self) -> bool {
        !self.fill(1) && self.failure().is_none()
    }

    /// The error that ended the source, unless it simply ended.
    pub(super) fn failure(&self) -> Option<&io::Error> {
        match &self.end {
            Some(End::Failure(error)) => Some(error),
            Some(End::Regular) | None => None,
        }
    }

    /// Says why there are no more bytes.
    pub(super) fn end_in_words(&self) -> String {
        match self.failure() {
            Some(error) => error.to_string(),
            None => "the file ends".to_owned(),
        }
    }

    #[cfg(test)]
    pub(super) fn buffer_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// Bytes of the underlying source that have been got through.
    pub(super) fn position(&self) -> u64 {
        match &self.source {
            Source::Plain(counted) => counted.bytes - self.unread.len() as u64,
            Source::Gzip(decoder) => {
                let (head, rest) = decoder.get_ref().get_ref();
                rest.bytes - (head.get_ref().len() as u64 - head.position())
            }
        }
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(counted) => counted.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer).map_err(unpacking_failed),
        }
    }
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.bytes += count as u64;
        Ok(count)
    }
}

/// Says what a failure to unpack means; errors of the file beneath are handed on as they are.
fn unpacking_failed(error: io::Error) -> io::Error {
    match error.kind() {
        kind if error.raw_os_error().is_some() || kind == io::ErrorKind::Interrupted => error,
        kind @ io::ErrorKind::UnexpectedEof => io::Error::new(kind, "the gzip stream ends early"),
        kind => io::Error::new(kind, format!("the gzip stream cannot be unpacked: {error}")),
    }
}
