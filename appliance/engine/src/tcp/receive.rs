//! The receive half of a flow: bytes from the client, in order and without a gap, until the driver has read them.
//!
//! Segments are acceptable by RFC 9293, section 3.10.7.4, against the window that was announced. What is out of order
//! waits in the ring, where it belongs, and is told of at once (RFC 5681, section 4.2) with a selective acknowledgment
//! (RFC 2018). All else waits for the flow's turn, so that a batch of segments has one answer, and data takes it along.

use std::ptr::NonNull;
use std::time::Duration;

use super::distance;
use super::gaps::Gaps;
use super::ring::Ring;
use crate::time::Timestamp;

/// Answers to segments without data or FIN that are not acceptable are at least this far apart (RFC 5961, section 7): two
/// ends that disagree would answer each other for ever.
const ANSWER_INTERVAL: Duration = Duration::from_secs(1);

/// An offset that no stream comes to.
const NO_FIN: u64 = u64::MAX;

/// What our segments say of what the client has sent: acknowledgment and window field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) acknowledgment: u32,
    pub(super) window: u16,
}

/// What a segment asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Nothing before the flow's turn.
    None,
    /// An acknowledgment whatever it has to say.
    Acknowledge,
}

#[derive(Debug)]
pub(super) struct ReceiveHalf {
    /// Bytes in order; those behind a gap stand there already.
    ring: Ring,
    gaps: Gaps,
    /// The sequence number of the first byte.
    first: u32,
    /// Bytes that have come in order.
    received: u64,
    /// Where FIN belongs, once it has come; before, [`NO_FIN`].
    fin: u64,
    /// Our window scale.
    shift: u8,
    told: Told,
    /// One past the last offset of the announced window; FIN counts as the byte behind the last.
    edge: u64,
    /// Where the latest acceptable segment begins.
    latest: u64,
    /// When a segment without data may be answered again.
    answer_at: Timestamp,
}

impl ReceiveHalf {
    /// Begins with the byte of sequence number `first`; `scales`: both sides' windows are scaled.
    pub(super) fn new(ring: Ring, first: u32, scales: bool) -> Self {
        let shift = if scales { window_shift(ring.limit()) } else { 0 };
        let mut new = Self {
            gaps: Gaps::default(),
            first,
            received: 0,
            fin: NO_FIN,
            shift,
            told: Told {
                acknowledgment: first,
                window: 0,
            },
            edge: 0,
            latest: 0,
            answer_at: Timestamp::ZERO,
            ring,
        };
        // The SYN-ACK cannot say more than 65,535. All of the buffer is there for whoever sends more all the same.
        new.tell();
        new
    }

    /// The sequence number expected next: RCV.NXT.
    pub(super) fn expected(&self) -> u32 {
        self.first.wrapping_add(self.next() as u32)
    }

    /// Its offset.
    fn next(&self) -> u64 {
        self.received + u64::from(self.is_finished())
    }

    /// The sequence number behind the last byte that there is room for.
    pub(super) fn limit(&self) -> u32 {
        let next = self.first.wrapping_add(self.received as u32);
        next.wrapping_add(self.window() as u32)
    }

    /// Bytes in order that have not been read.
    pub(super) fn queue(&self) -> usize {
        self.ring.len()
    }

    /// Size of the buffer.
    pub(super) fn capacity(&self) -> usize {
        self.ring.limit()
    }

    /// Room for bytes.
    pub(super) fn window(&self) -> usize {
        self.ring.limit() - self.ring.len()
    }

    /// The same as a segment carries it.
    pub(super) fn window_field(&self) -> u16 {
        u16::try_from(self.window() >> self.shift).unwrap_or(u16::MAX)
    }

    /// The window scale that the SYN-ACK announces (RFC 7323, section 2.3).
    pub(super) fn shift(&self) -> u8 {
        self.shift
    }

    pub(super) fn has_gaps(&self) -> bool {
        !self.gaps.is_empty()
    }

    /// Whether the client's FIN has come, after all its bytes.
    pub(super) fn is_finished(&self) -> bool {
        self.fin == self.received
    }

    pub(super) fn told(&self) -> Told {
        self.told
    }

    /// Whether a segment is acceptable (RFC 9293, section 3.10.7.4). FIN and ACK alone have no `len`.
    pub(super) fn accepts(&self, sequence: u32, len: usize, fin: bool) -> bool {
        let start = i64::from(distance(self.expected(), sequence));
        is_acceptable(start, len, fin, self.announced())
    }

    /// What is left of the announced window.
    fn announced(&self) -> i64 {
        self.edge as i64 - self.next() as i64
    }

    /// Whether `len` bytes from `sequence` on are the next for a reader who has read everything before them.
    pub(super) fn is_next(&self, sequence: u32, len: usize) -> bool {
        self.ring.len() == 0
            && self.gaps.is_empty()
            && self.fin == NO_FIN
            && sequence == self.expected()
            && len as i64 <= self.announced()
    }

    /// Bytes that [are next](Self::is_next) have been read without having been taken.
    pub(super) fn skip(&mut self, bytes: usize) {
        self.received += bytes as u64;
    }

    /// Takes a segment's bytes, of which none lies beyond [`ReceiveHalf::limit`], and its FIN.
    pub(super) fn take(&mut self, now: Timestamp, sequence: u32, bytes: &[u8], fin: bool) -> Answer {
        let start = i64::from(distance(self.expected(), sequence));
        let window = self.announced();
        if !is_acceptable(start, bytes.len(), fin, window) {
            // Bytes and FIN are repeated because our ACK was lost, or probe the window: their sender has to hear.
            if bytes.is_empty() && !fin {
                if now < self.answer_at {
                    return Answer::None;
                }
                self.answer_at = now + ANSWER_INTERVAL;
            }
            return Answer::Acknowledge;
        }
        let end = start + bytes.len() as i64;
        if self.is_finished() {
            return Answer::None; // nothing comes behind FIN
        }
        self.latest = self.received.saturating_add_signed(start);
        let had_gaps = self.has_gaps();
        let old = usize::try_from(-start).unwrap_or(0);
        let gap = usize::try_from(start).unwrap_or(0);
        let taken = bytes.len().min((window - start).max(0) as usize);
        let fresh = &bytes[old.min(taken)..taken];
        if fin && taken == bytes.len() {
            self.fin = self.received.saturating_add_signed(end);
        }
        if fresh.is_empty() {
            return Answer::None;
        }
        if gap == 0 {
            self.ring.put(0, fresh);
            self.advance(fresh.len());
        } else {
            let from = self.received + gap as u64;
            if !self.gaps.insert(from..from + fresh.len() as u64) {
                return Answer::None;
            }
            self.ring.put(gap, fresh);
        }
        if had_gaps || self.has_gaps() {
            Answer::Acknowledge
        } else {
            Answer::None
        }
    }

    /// `bytes` more are in order, and what was waiting for them.
    fn advance(&mut self, bytes: usize) {
        let mut received = self.received + bytes as u64;
        if !self.gaps.is_empty() {
            received = self.gaps.close(received);
        }
        self.ring.extend((received - self.received) as usize);
        self.received = received;
    }

    /// Whether there is something to tell without being asked: bytes have come, or the window has doubled, which is
    /// worth an ACK of its own as long as the client may send.
    pub(super) fn has_news(&self) -> bool {
        if self.expected() != self.told.acknowledgment {
            return true;
        }
        let before = self.announced().max(0) as u64 >> self.shift;
        let window = u64::from(self.window_field());
        !self.is_finished() && window > 0 && window / 2 >= before
    }

    /// The client is being told how far things are.
    pub(super) fn tell(&mut self) {
        self.told = Told {
            acknowledgment: self.expected(),
            window: self.window_field(),
        };
        self.edge = self.next() + (u64::from(self.told.window) << self.shift);
    }

    /// The selective acknowledgment that goes with what is told, as sequence numbers: the range of the latest segment,
    /// or the first.
    pub(super) fn block(&self) -> Option<(u32, u32)> {
        let range = self.gaps.block(self.latest)?;
        let sequence = |offset: u64| self.first.wrapping_add(offset as u32);
        Some((sequence(range.start), sequence(range.end)))
    }

    /// Lends the first contiguous bytes; `take` says how many to forget.
    pub(super) fn read(&mut self, take: impl FnOnce(&[u8]) -> usize) -> usize {
        let bytes = self.ring.front();
        let taken = take(bytes).min(bytes.len());
        self.ring.release(taken);
        if self.gaps.is_empty() {
            self.ring.rewind();
        }
        taken
    }

    /// The pages of the buffer.
    pub(super) fn pages(&self) -> NonNull<[u8]> {
        self.ring.pages()
    }

    pub(super) fn into_ring(self) -> Ring {
        self.ring
    }
}

/// Whether a segment that begins `start` bytes behind what is expected is acceptable to a window of `window` bytes.
fn is_acceptable(start: i64, len: usize, fin: bool, window: i64) -> bool {
    let end = start + len as i64;
    if len == 0 {
        return start == 0 || (0 < start && start < window);
    }
    let has_bytes = window > 0 && ((0 <= start && start < window) || (0 < end && end <= window));
    has_bytes || (fin && end == 0)
}

/// The least window scale that lets a whole buffer be announced.
fn window_shift(capacity: usize) -> u8 {
    (usize::BITS - capacity.leading_zeros()).saturating_sub(16) as u8
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::arena::Arena;
    use super::*;

    const CAPACITY: usize = 16 << 10;

    fn byte(offset: u64) -> u8 {
        (offset * 7 + (offset >> 8) * 13) as u8
    }

    fn receiver(first: u32) -> ReceiveHalf {
        let (ring, _) = Arena::new(1 << 40).rings(CAPACITY, CAPACITY).expect("in budget");
        ReceiveHalf::new(ring, first, true)
    }

    proptest! {
        /// Segments come in any order, cut anyhow, repeated, some beyond the window; now and then somebody reads.
        #[test]
        fn every_byte_comes_out_once_and_in_order(
            first: u32,
            len in 0_u64..40_000,
            steps in prop::collection::vec((-3_000_i64..20_000, 0_usize..3_000, 0_usize..5_000), 1..200),
        ) {
            let mut receive = receiver(first);
            let mut read = 0_u64;
            let mut read_up_to = |receive: &mut ReceiveHalf, most: usize| {
                receive.read(|bytes| {
                    let taken = bytes.len().min(most);
                    for got in &bytes[..taken] {
                        assert_eq!(*got, byte(read), "byte {read}");
                        read += 1;
                    }
                    taken
                })
            };
            // At last everything is sent in order, again and again, as a client would.
            let rest = (0..200).map(|_| (0, 3_000, CAPACITY));
            for (ahead, size, reads) in steps.into_iter().chain(rest) {
                let next = u64::from(receive.expected().wrapping_sub(first)).min(len);
                let room = u64::from(receive.limit().wrapping_sub(first));
                let start = next.saturating_add_signed(ahead).min(len);
                let end = (start + size as u64).min(len).min(room);
                if start <= end {
                    let bytes: Vec<u8> = (start..end).map(byte).collect();
                    receive.take(Timestamp::ZERO, first.wrapping_add(start as u32), &bytes, end == len);
                }
                read_up_to(&mut receive, reads);
                if receive.has_news() {
                    receive.tell();
                }
                prop_assert!(receive.queue() + receive.window() == CAPACITY);
                prop_assert_eq!(receive.told().acknowledgment, receive.expected());
            }
            while read_up_to(&mut receive, CAPACITY) > 0 {}
            prop_assert_eq!(read, len);
            prop_assert!(receive.is_finished() && !receive.has_gaps());
            prop_assert_eq!(receive.expected(), first.wrapping_add(len as u32 + 1));
        }
    }

    #[test]
    fn the_range_of_the_latest_segment_is_reported_first() {
        // RFC 2018, section 4: the first block is that of the segment which triggered the ACK.
        let mut receive = receiver(1_000);
        let mut take = |sequence, len| {
            let answer = receive.take(Timestamp::ZERO, sequence, &vec![0; len], false);
            (answer, receive.block())
        };
        assert_eq!(take(2_000, 100), (Answer::Acknowledge, Some((2_000, 2_100))));
        assert_eq!(take(3_000, 100), (Answer::Acknowledge, Some((3_000, 3_100))));
        assert_eq!(take(2_100, 100), (Answer::Acknowledge, Some((2_000, 2_200))));
        // It has closed a gap, so the sender hears at once; what is left is the other one.
        assert_eq!(take(1_000, 1_000), (Answer::Acknowledge, Some((3_000, 3_100))));
        assert_eq!(take(2_200, 800), (Answer::Acknowledge, None));
        assert_eq!(take(3_100, 10), (Answer::None, None));
    }

    #[test]
    fn what_has_come_before_is_acknowledged_each_time_and_probes_once_a_second() {
        let mut receive = receiver(1_000);
        let now = Timestamp::from_nanos(5_000_000_000);
        receive.take(now, 1_000, &[1; 10], false);
        assert_eq!(receive.take(now, 1_000, &[1; 10], false), Answer::Acknowledge);
        assert_eq!(receive.take(now, 1_000, &[1; 10], false), Answer::Acknowledge);
        assert_eq!(receive.take(now, 1_009, &[], false), Answer::Acknowledge);
        assert_eq!(receive.take(now, 1_009, &[], false), Answer::None);
        let later = now + ANSWER_INTERVAL;
        assert_eq!(receive.take(later, 1_009, &[], false), Answer::Acknowledge);
        assert_eq!(receive.take(later, 1_010, &[], true), Answer::None);
        assert_eq!(receive.take(later, 1_010, &[], true), Answer::Acknowledge);
        assert_eq!(receive.take(later, 1_010, &[], true), Answer::Acknowledge);
    }
}
