//! Byte streams by position: what captured segments and emitted segments are put together to.
//!
//! Sequence numbers wrap after 4 GiB, positions do not. A direction's SYN stands at [`SYN`], its first byte one
//! behind, its FIN behind its last byte. [`SYN`] is far enough from zero that no number maps below it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tungate_engine::Timestamp;
use xxhash_rust::xxh64::Xxh64;

use super::timer::Timer;
use crate::outcome::Stream;

/// Where a direction's SYN stands.
pub(super) const SYN: u64 = 1 << 32;

/// An initial sequence number: what positions count from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin(pub(super) u32);

impl Origin {
    /// The position of sequence number `number`, the one nearest to the position `near`.
    pub(super) fn position(self, number: u32, near: u64) -> u64 {
        let ahead = number.wrapping_sub(self.number(near)) as i32;
        near.saturating_add_signed(i64::from(ahead))
    }

    /// The sequence number at `position`.
    pub(super) fn number(self, position: u64) -> u32 {
        self.0.wrapping_add(position.wrapping_sub(SYN) as u32)
    }
}

/// Bytes that wait for others before them. Pieces do not overlap: the byte that came first stays.
#[derive(Debug, Default)]
pub(super) struct Held {
    pieces: BTreeMap<u64, Vec<u8>>,
    len: usize,
    /// The room of the piece that was let go last: most come one after the other.
    spare: Vec<u8>,
}

impl Held {
    /// Bytes held.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// One past the last byte held.
    pub(super) fn end(&self) -> Option<u64> {
        let (at, piece) = self.pieces.last_key_value()?;
        Some(at + piece.len() as u64)
    }

    /// Takes those of `bytes`, which start at `at`, whose positions are free. Returns whether a byte that was taken
    /// before differs.
    pub(super) fn insert(&mut self, at: u64, bytes: &[u8]) -> bool {
        if self.is_empty() && !bytes.is_empty() {
            let mut piece = std::mem::take(&mut self.spare);
            piece.extend_from_slice(bytes);
            self.len = piece.len();
            self.pieces.insert(at, piece);
            return false;
        }
        let range = at..at + bytes.len() as u64;
        let slice = |part: Range<u64>| &bytes[(part.start - at) as usize..(part.end - at) as usize];
        let mut conflict = false;
        for (held, piece) in self.overlapping(range.clone()) {
            let part = held.max(range.start)..(held + piece.len() as u64).min(range.end);
            let before = &piece[(part.start - held) as usize..(part.end - held) as usize];
            conflict |= before != slice(part);
        }
        for gap in self.gaps(range.clone()) {
            let part = slice(gap.clone());
            self.len += part.len();
            match self.pieces.range_mut(..gap.start).next_back() {
                Some((held, piece)) if held + piece.len() as u64 == gap.start => {
                    piece.extend_from_slice(part)
                }
                _ => {
                    self.pieces.insert(gap.start, part.to_vec());
                }
            }
        }
        conflict
    }

    /// The bytes held from `at` on, up to the end of a piece.
    pub(super) fn from(&self, at: u64) -> &[u8] {
        if self.is_empty() {
            return &[];
        }
        match self.pieces.range(..=at).next_back() {
            Some((held, piece)) => piece.get((at - held) as usize..).unwrap_or_default(),
            None => &[],
        }
    }

    /// The first bytes held in `range`, up to the end of a piece, and where they are.
    pub(super) fn first_in(&self, range: Range<u64>) -> Option<(u64, &[u8])> {
        let (held, piece) = self.overlapping(range.clone()).next()?;
        let (start, end) = (held.max(range.start), (held + piece.len() as u64).min(range.end));
        (start < end).then(|| (start, &piece[(start - held) as usize..(end - held) as usize]))
    }

    /// The parts of `range` that are not held, in order.
    pub(super) fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for (held, piece) in self.overlapping(range.clone()) {
            if at < held {
                gaps.push(at..held);
            }
            at = held + piece.len() as u64;
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }

    /// Forgets what lies before `at`.
    pub(super) fn forget_before(&mut self, at: u64) {
        while let Some(mut first) = self.pieces.first_entry() {
            let held = *first.key();
            if held >= at {
                return;
            }
            let len = first.get().len();
            let behind = len.min((at - held) as usize);
            self.len -= behind;
            let rest = first.get_mut().split_off(behind);
            let mut piece = first.remove();
            if rest.is_empty() {
                piece.clear();
                self.spare = piece;
            } else {
                self.pieces.insert(at, rest);
            }
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &Vec<u8>)> {
        let first = match self.pieces.range(..=range.start).next_back() {
            Some((held, piece)) if held + piece.len() as u64 > range.start => *held,
            _ => range.start,
        };
        self.pieces
            .range(first..range.end.max(first))
            .map(|(held, piece)| (*held, piece))
    }
}

/// The positions where zeros stand for bytes that the capture does not hold.
#[derive(Debug, Default)]
pub(super) struct Fillers {
    /// In order, without overlap.
    ranges: Vec<Range<u64>>,
}

impl Fillers {
    /// Notes fillers behind all earlier ones or between them.
    pub(super) fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let at = self.ranges.partition_point(|earlier| earlier.start < range.start);
        match self.ranges.get_mut(at.wrapping_sub(1)) {
            Some(before) if before.end == range.start => before.end = range.end,
            _ => self.ranges.insert(at, range),
        }
    }

    /// Cuts `bytes`, which start at `at`, into captured bytes and fillers, in order.
    pub(super) fn split<'a>(&self, at: u64, bytes: &'a [u8], mut each: impl FnMut(&'a [u8], Kind)) {
        let end = at + bytes.len() as u64;
        let mut from = at;
        let first = self.ranges.partition_point(|range| range.end <= at);
        let mut give = |until: u64, kind| {
            if until > from {
                each(&bytes[(from - at) as usize..(until - at) as usize], kind);
                from = until;
            }
        };
        for range in self.ranges[first..].iter().take_while(|range| range.start < end) {
            give(range.start, Kind::Captured);
            give(range.end.min(end), Kind::Filler);
        }
        give(end, Kind::Captured);
    }

    /// Forgets those that end before `at`.
    pub(super) fn forget_before(&mut self, at: u64) {
        let first = self.ranges.partition_point(|range| range.end <= at);
        self.ranges.drain(..first);
    }
}

/// How long bytes are waited for that their receiver has acknowledged: captures may put packets of the two directions
/// in the wrong order.
const ACKNOWLEDGED_PATIENCE: Duration = Duration::from_millis(200);

/// How long bytes before a FIN are waited for: six retransmissions, each after twice the time (RFC 6298, section 5.5).
const FIN_PATIENCE: Duration = Duration::from_secs(64);

/// Missing bytes of a stream, which are waited for before they are filled in.
#[derive(Debug, Default)]
pub(super) struct Gaps {
    /// On while something that the receiver has acknowledged is missing before `end`.
    acknowledged: Timer,
    end: u64,
    /// On while something before a FIN is missing.
    fin: Timer,
}

impl Gaps {
    /// The receiver has acknowledged everything before `end`.
    pub(super) fn on_acknowledged(&mut self, now: Timestamp, end: u64) {
        if self.acknowledged.is_on() {
            self.end = self.end.max(end);
        } else {
            self.acknowledged = Timer::at(now + ACKNOWLEDGED_PATIENCE);
            self.end = end;
        }
    }

    /// There is a FIN.
    pub(super) fn on_fin(&mut self, now: Timestamp) {
        if !self.fin.is_on() {
            self.fin = Timer::at(now + FIN_PATIENCE);
        }
    }

    /// Everything before `next` has come.
    pub(super) fn on_filled(&mut self, next: u64, fin: Option<u64>) {
        if self.end <= next {
            self.acknowledged = Timer::OFF;
        }
        if fin.is_some_and(|fin| fin <= next) {
            self.fin = Timer::OFF;
        }
    }

    /// When the next gap is to be filled in.
    pub(super) fn due(&self) -> Timestamp {
        self.acknowledged.min(self.fin).due()
    }

    /// Up to where to fill at `now`, where `end` is all that was captured.
    pub(super) fn take_due(&mut self, now: Timestamp, end: u64) -> Option<u64> {
        if self.fin.is_due(now) {
            *self = Self::default();
            return Some(end);
        }
        self.acknowledged
            .is_due(now)
            .then(|| self.take_acknowledged())
            .flatten()
    }

    /// Up to where to fill if nothing more will come.
    pub(super) fn take_acknowledged(&mut self) -> Option<u64> {
        std::mem::take(&mut self.acknowledged).is_on().then_some(self.end)
    }
}

/// What a stretch of a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Bytes of the capture.
    Captured,
    /// Zeros in the place of bytes it does not hold.
    Filler,
}

/// Tells whether two streams are equal without keeping them.
#[derive(Default)]
pub(super) struct Fingerprint {
    hash: Option<Xxh64>,
    bytes: u64,
}

impl Fingerprint {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.hash.get_or_insert_with(|| Xxh64::new(0)).update(bytes);
            self.bytes += bytes.len() as u64;
        }
    }
}

impl PartialEq for Fingerprint {
    fn eq(&self, other: &Self) -> bool {
        let digest = |of: &Self| of.hash.as_ref().map(Xxh64::digest);
        self.bytes == other.bytes && digest(self) == digest(other)
    }
}

/// One direction's bytes as they leave the engine.
#[derive(Default)]
pub(super) struct Delivered {
    hash: Option<Sha256>,
    fingerprint: Fingerprint,
    missing: u64,
}

impl Delivered {
    /// Takes the next bytes of the stream, which stand at `at`.
    pub(super) fn take(&mut self, at: u64, bytes: &[u8], fillers: &Fillers) {
        fillers.split(at, bytes, |part, kind| match kind {
            Kind::Captured => self.take_all(part),
            Kind::Filler => self.missing += part.len() as u64,
        });
    }

    /// Takes the next bytes of a stream that has no fillers.
    pub(super) fn take_all(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.hash.get_or_insert_default().update(bytes);
            self.fingerprint.add(bytes);
        }
    }

    /// Counts bytes out that were delivered as missing but have never been part of the stream.
    pub(super) fn excuse(&mut self, bytes: u64) {
        self.missing = self.missing.saturating_sub(bytes);
    }

    /// Whether these are the bytes that `captured` has seen.
    pub(super) fn equals(&self, captured: &Fingerprint) -> bool {
        self.fingerprint == *captured
    }

    pub(super) fn stream(&self) -> Stream {
        Stream {
            bytes: self.fingerprint.bytes,
            sha256: hex(&self.hash.clone().unwrap_or_default().finalize()),
            missing: self.missing,
        }
    }
}

/// Lower-case hexadecimal digits of `bytes`.
pub(super) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let nibbles = bytes.iter().flat_map(|byte| [byte >> 4, byte & 0xf]);
    nibbles
        .map(|nibble| char::from(DIGITS[usize::from(nibble)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_map_to_positions_and_back_across_wraps(
            origin: u32, near in SYN..SYN << 4, ahead in -(1_i64 << 31)..1 << 31,
        ) {
            let origin = Origin(origin);
            let position = near.checked_add_signed(ahead).unwrap();
            prop_assume!(position >= SYN);
            prop_assert_eq!(origin.position(origin.number(position), near), position);
        }

        #[test]
        fn the_first_byte_at_a_position_stays(
            segments in proptest::collection::vec((0_u64..40, proptest::collection::vec(any::<u8>(), 1..12)), 1..12),
        ) {
            let mut model = [None; 64];
            let mut held = Held::default();
            for (at, bytes) in &segments {
                let mut conflict = false;
                for (place, byte) in model[*at as usize..].iter_mut().zip(bytes) {
                    conflict |= place.is_some_and(|before| before != *byte);
                    place.get_or_insert(*byte);
                }
                prop_assert_eq!(held.insert(*at, bytes), conflict);
            }
            prop_assert_eq!(held.len(), model.iter().flatten().count());
            for (at, place) in model.iter().enumerate() {
                prop_assert_eq!(held.from(at as u64).first(), place.as_ref());
            }
            let gaps = held.gaps(0..64);
            let free: Vec<u64> = gaps.into_iter().flatten().collect();
            let expected: Vec<u64> = (0..64).filter(|at| model[*at as usize].is_none()).collect();
            prop_assert_eq!(free, expected);
            held.forget_before(20);
            prop_assert_eq!(held.len(), model[20..].iter().flatten().count());
            prop_assert_eq!(held.from(20).first(), model[20].as_ref());
        }

        #[test]
        fn fillers_split_a_stream_wherever_it_is_cut(
            ranges in proptest::collection::vec((0_u64..50, 1_u64..8), 0..5), cuts in proptest::collection::vec(0_usize..60, 0..6),
        ) {
            let bytes: Vec<u8> = (0..60).collect();
            let mut fillers = Fillers::default();
            let mut taken = [false; 64];
            for (start, len) in ranges {
                if !taken[start as usize..(start + len) as usize].contains(&true) {
                    taken[start as usize..(start + len) as usize].fill(true);
                    fillers.add(start..start + len);
                }
            }
            let expected: Vec<u8> = bytes.iter().copied().filter(|byte| !taken[usize::from(*byte)]).collect();
            let mut cuts = cuts;
            cuts.extend([0, 60]);
            cuts.sort_unstable();
            let mut seen = Vec::new();
            for cut in cuts.windows(2) {
                fillers.split(cut[0] as u64, &bytes[cut[0]..cut[1]], |part, kind| {
                    if kind == Kind::Captured {
                        seen.extend_from_slice(part);
                    }
                });
            }
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn an_empty_stream_has_the_hash_of_nothing() {
        let stream = Delivered::default().stream();
        // FIPS 180-4 example values: SHA-256 of the empty message.
        assert_eq!(
            stream.sha256,
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert_eq!((stream.bytes, stream.missing), (0, 0));
    }

    #[test]
    fn what_was_filled_is_neither_counted_nor_hashed() {
        let mut fillers = Fillers::default();
        fillers.add(SYN + 3..SYN + 6);
        let mut delivered = Delivered::default();
        delivered.take(SYN + 1, b"ab\0", &fillers);
        delivered.take(SYN + 4, b"\0\0c", &fillers);
        let mut captured = Fingerprint::default();
        captured.add(b"abc");
        assert!(delivered.equals(&captured));
        let stream = delivered.stream();
        // FIPS 180-4 example values: SHA-256 of "abc".
        assert_eq!(
            stream.sha256,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!((stream.bytes, stream.missing), (3, 3));
    }
}
