//! How Linux receives and acknowledges: what a sender gets to see of its losses.
//!
//! An acknowledgment leaves at once for the first segments of a connection and after a duplicate (quick ACKs), when a
//! second full segment is waiting for one, when a hole was filled, and for what comes out of order; else within 40 ms.
//! Behind the third for the same hole, further ones are compressed into one per millisecond or twentieth of a round trip,
//! but none waits while a third hole comes to be: a block would be forgotten before it was told of.
//! Up to four blocks say what lies behind the hole, the latest first (RFC 2018), and a duplicate is reported in front
//! of them (RFC 2883).

use std::collections::BTreeMap;
use std::time::Duration;

use tungate_engine::Timestamp;

const DELAY: Duration = Duration::from_millis(40);
/// `TCP_MAX_QUICKACKS`.
const QUICK: u32 = 16;
/// `TCP_FASTRETRANS_THRESH`.
const DUPLICATES_AT_ONCE: u32 = 3;
/// `tcp_comp_sack_nr`, `tcp_comp_sack_delay_ns`, and its bound of a twentieth of a round trip.
const COMPRESSED_MAX: u32 = 44;
const COMPRESSED_DELAY: Duration = Duration::from_millis(1);
const COMPRESSED_SHARE: u32 = 20;
/// `TCP_SACK_BLOCKS_EXPECTED`: as many blocks may change while a report waits.
const BLOCKS_AT_ONCE: usize = 2;
/// As many as fit beside no other option.
const BLOCKS: usize = 4;
/// What a network card's driver waits for more of the same flow (GRO).
const STRETCH_DELAY: Duration = Duration::from_micros(200);

/// When what came in order is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acknowledging {
    /// As above.
    Linux,
    /// Once for up to this many segments that follow each other closely, as behind a card that puts them together.
    Stretched(u32),
}

/// How much the receiver lets come, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// Always as much.
    Fixed(u64),
    /// From 64 KiB on twice what came in a round trip, up to this.
    Autotuned(u64),
}

/// What an acknowledgment says, in offsets of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// The offset of the next byte that is missing.
    pub next: u64,
    /// How many bytes from there may come.
    pub window: u64,
    blocks: [(u64, u64); BLOCKS],
    count: usize,
}

impl Report {
    /// Start and end of what else is there; the first may be a duplicate, which lies below `next` or in the second.
    pub fn blocks(&self) -> &[(u64, u64)] {
        &self.blocks[..self.count]
    }
}

/// The receiving half of a connection.
#[derive(Debug, Clone)]
pub struct Receiver {
    segment_size: u64,
    acknowledging: Acknowledging,
    window: Window,
    space: u64,
    /// The window's right edge, which never moves left.
    edge: u64,
    reading: bool,
    next: u64,
    /// Start and end of what is beyond the hole.
    runs: BTreeMap<u64, u64>,
    /// Those of the last blocks reported, latest first.
    recent: Vec<(u64, u64)>,
    duplicate: Option<(u64, u64)>,
    duplicates: u64,
    round_trip: Duration,
    /// Where and when the window was last tuned.
    tuned: (u64, Timestamp),
    quick: u32,
    /// What `next` was when the last report was taken.
    reported: u64,
    /// Reports since the hole at this offset came to be.
    for_hole: (u64, u32),
    compressed: u32,
    due: Option<Timestamp>,
}

impl Receiver {
    /// One that has received nothing. `round_trip` is what the handshake has shown.
    pub fn new(
        segment_size: u64,
        acknowledging: Acknowledging,
        window: Window,
        round_trip: Duration,
    ) -> Self {
        let space = match window {
            Window::Fixed(bytes) => bytes,
            Window::Autotuned(most) => most.min(64 << 10),
        };
        Self {
            segment_size,
            acknowledging,
            window,
            space,
            edge: space,
            reading: true,
            next: 0,
            runs: BTreeMap::new(),
            recent: Vec::new(),
            duplicate: None,
            duplicates: 0,
            round_trip,
            tuned: (0, Timestamp::ZERO),
            quick: QUICK,
            reported: 0,
            for_hole: (0, 0),
            compressed: 0,
            due: None,
        }
    }

    /// The offset of the next byte that is missing.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Segments all of which was there already.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// When [`Receiver::report`] is to be taken and sent at the latest, if nothing else comes.
    pub fn due(&self) -> Option<Timestamp> {
        self.due
    }

    /// Stops or starts reading: while nobody reads, the window closes.
    pub fn set_reading(&mut self, reading: bool) {
        self.reading = reading;
    }

    /// Whether a report that waits is to be sent before this segment is taken; see `tcp_sack_compress_send_ack`.
    pub fn reports_before(&self, start: u64, end: u64) -> bool {
        let touches = |&(from, to): &(u64, u64)| start <= to && from <= end;
        let place = self.recent.iter().position(touches).unwrap_or(self.recent.len());
        self.compressed > 0 && start > self.next && !self.holds(start, end) && place >= BLOCKS_AT_ONCE
    }

    /// Takes a segment; `true` if a report is to be sent at once.
    pub fn take(&mut self, now: Timestamp, start: u64, end: u64) -> bool {
        if start >= end {
            return start != self.next; // a probe of some kind
        }
        if end <= self.next || self.holds(start, end) {
            self.duplicates += 1;
            self.duplicate = Some((start, end));
            self.quick = QUICK;
            return true;
        }
        if end > self.edge {
            return true;
        }
        if start > self.next {
            self.keep(start, end);
            return self.reports_hole(now);
        }
        let fills_hole = !self.runs.is_empty();
        if start < self.next {
            self.duplicate = Some((start, self.next));
        }
        self.next = end;
        while let Some(run) = self.runs.first_entry()
            && *run.key() <= self.next
        {
            self.next = self.next.max(run.remove());
        }
        let next = self.next;
        self.recent.retain(|(start, _)| *start > next);
        self.tune(now);
        if fills_hole || self.duplicate.is_some() {
            return true;
        }
        self.reports_progress(now)
    }

    /// What there is to say now.
    pub fn report(&mut self) -> Report {
        if self.reading {
            self.edge = self.edge.max(self.next + self.space);
        }
        let mut report = Report {
            next: self.next,
            window: self.edge - self.next,
            ..Report::default()
        };
        let duplicate = self.duplicate.take();
        for block in duplicate
            .into_iter()
            .chain(self.recent.iter().copied())
            .take(BLOCKS)
        {
            report.blocks[report.count] = block;
            report.count += 1;
        }
        self.reported = self.next;
        if self.next > 0 || !self.runs.is_empty() {
            self.quick = self.quick.saturating_sub(1); // they are counted from the first data on
        }
        self.compressed = 0;
        self.due = None;
        report
    }

    fn holds(&self, start: u64, end: u64) -> bool {
        let run = self.runs.range(..=start).next_back();
        run.is_some_and(|(_, run_end)| *run_end >= end)
    }

    /// Puts a piece beyond the hole, and its run in front of the blocks.
    fn keep(&mut self, start: u64, end: u64) {
        let mut run = (start, end);
        while let Some((&other, &other_end)) = self.runs.range(..=run.1).next_back()
            && other_end >= run.0
        {
            self.runs.remove(&other);
            run = (run.0.min(other), run.1.max(other_end));
        }
        self.runs.insert(run.0, run.1);
        self.recent.retain(|&(start, end)| end < run.0 || run.1 < start);
        self.recent.insert(0, run);
        self.recent.truncate(BLOCKS);
    }

    /// Whether the report of something out of order cannot wait; see `__tcp_ack_snd_check`.
    fn reports_hole(&mut self, now: Timestamp) -> bool {
        if self.for_hole.0 != self.next {
            self.for_hole = (self.next, 0);
        }
        if self.for_hole.1 < DUPLICATES_AT_ONCE {
            self.for_hole.1 += 1;
            return true;
        }
        self.compressed += 1;
        let within = COMPRESSED_DELAY.min(self.round_trip / COMPRESSED_SHARE);
        self.wait(now + within);
        self.compressed > COMPRESSED_MAX
    }

    fn reports_progress(&mut self, now: Timestamp) -> bool {
        let waiting = self.next - self.reported;
        match self.acknowledging {
            Acknowledging::Linux if waiting > self.segment_size || self.quick > 0 => true,
            Acknowledging::Linux => {
                self.wait(now + DELAY);
                false
            }
            Acknowledging::Stretched(segments) if waiting >= u64::from(segments) * self.segment_size => true,
            Acknowledging::Stretched(_) => {
                let is_lone = waiting <= self.segment_size && self.quick == 0;
                self.due = Some(now + if is_lone { DELAY } else { STRETCH_DELAY });
                false
            }
        }
    }

    fn wait(&mut self, until: Timestamp) {
        self.due = Some(self.due.map_or(until, |due| due.min(until)));
    }

    fn tune(&mut self, now: Timestamp) {
        let Window::Autotuned(most) = self.window else {
            return;
        };
        let (from, since) = self.tuned;
        if now.since(since) >= self.round_trip {
            let came = self.next - from;
            self.space = self.space.max(2 * came + 16 * self.segment_size).min(most);
            self.tuned = (self.next, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 10;
    const ROUND_TRIP: Duration = Duration::from_millis(20);

    fn receiver(acknowledging: Acknowledging) -> Receiver {
        Receiver::new(SIZE, acknowledging, Window::Fixed(100_000), ROUND_TRIP)
    }

    fn micros(micros: u64) -> Timestamp {
        Timestamp::from_nanos(micros * 1000)
    }

    /// Takes segments by number, a microsecond apart, and says after which of them a report is to be sent at once.
    fn reports(receiver: &mut Receiver, segments: impl IntoIterator<Item = u64>) -> Vec<bool> {
        let take = |(at, segment): (usize, u64)| {
            let now = receiver.take(micros(at as u64), segment * SIZE, (segment + 1) * SIZE);
            if now {
                receiver.report();
            }
            now
        };
        segments.into_iter().enumerate().map(take).collect()
    }

    /// What a receiver should say, told by a bit per byte and a list of what came, newest first.
    #[derive(Default)]
    struct Naive {
        there: Vec<bool>,
        arrivals: Vec<u64>,
    }

    impl Naive {
        fn take(&mut self, start: u64, end: u64) {
            self.there.resize(self.there.len().max(end as usize + 1), false);
            self.there[start as usize..end as usize].fill(true);
            self.arrivals.insert(0, start);
        }

        fn next(&self) -> u64 {
            self.there.iter().position(|there| !there).unwrap_or(0) as u64
        }

        fn run_around(&self, byte: u64) -> (u64, u64) {
            let is_missing = |at: &u64| !self.there[*at as usize];
            let start = (0..byte).rev().find(is_missing).map_or(0, |missing| missing + 1);
            let end = (byte..).find(is_missing).expect("there is an end");
            (start, end)
        }

        /// All runs beyond the hole, by their latest arrival.
        fn runs(&self) -> Vec<(u64, u64)> {
            let mut runs: Vec<(u64, u64)> = Vec::new();
            for arrival in self.arrivals.iter().filter(|arrival| **arrival >= self.next()) {
                let run = self.run_around(*arrival);
                if !runs.contains(&run) {
                    runs.push(run);
                }
            }
            runs
        }
    }

    proptest! {
        /// RFC 2018, section 4: the first block holds the segment that made the receiver report, each is all of a run,
        /// and as many as fit repeat those reported last. RFC 2883: a duplicate comes before them.
        #[test]
        fn blocks_agree_with_a_naive_model(segments in prop::collection::vec((0..60_u64, 1..4_u64), 1..80)) {
            let mut receiver = receiver(Acknowledging::Linux);
            let mut naive = Naive::default();
            for (at, (start, len)) in segments.into_iter().enumerate() {
                let (start, end) = (start * SIZE, (start + len) * SIZE);
                let known = end <= naive.there.len() as u64
                    && naive.there[start as usize..end as usize].iter().all(|there| *there);
                let next_before = naive.next();
                if !known {
                    naive.take(start, end);
                }
                receiver.take(micros(at as u64), start, end);
                let report = receiver.report();
                prop_assert_eq!(report.next, naive.next());
                let mut blocks = report.blocks();
                let overlaps_old = start < next_before;
                if known || overlaps_old {
                    let duplicate = (start, if known { end } else { next_before });
                    prop_assert_eq!(blocks[0], duplicate);
                    blocks = &blocks[1..];
                }
                let runs = naive.runs();
                prop_assert!(blocks.len() <= 4);
                // Linux remembers four: a run that fell off comes back only when it grows.
                prop_assert!(blocks.iter().all(|block| runs.contains(block)), "{:?} of {:?}", blocks, runs);
                if !known && start > next_before {
                    prop_assert_eq!(blocks[0], naive.run_around(start));
                }
                let places: Vec<_> = blocks.iter().map(|block| runs.iter().position(|run| run == block)).collect();
                prop_assert!(places.is_sorted(), "{:?} of {:?}", blocks, runs);
            }
        }

        #[test]
        fn every_byte_is_acknowledged_once_all_have_come(order in Just((0..40_u64).collect::<Vec<_>>()).prop_shuffle()) {
            let mut receiver = receiver(Acknowledging::Linux);
            reports(&mut receiver, order);
            let report = receiver.report();
            prop_assert_eq!((report.next, report.blocks()), (40 * SIZE, &[][..]));
        }
    }

    #[test]
    fn the_first_segments_are_acknowledged_each_and_then_every_second() {
        let now = reports(&mut receiver(Acknowledging::Linux), 0..22);
        let expected: Vec<_> = (0..22).map(|at| at < 16 || at % 2 == 1).collect();
        assert_eq!(now, expected);
    }

    /// So that slow start doubles twice from ten segments, and 70 of them take three round trips.
    #[test]
    fn the_end_of_the_handshake_is_no_quick_acknowledgment() {
        let mut receiver = receiver(Acknowledging::Linux);
        receiver.report();
        assert_eq!(reports(&mut receiver, 0..17)[14..], [true, true, false]);
    }

    #[test]
    fn a_lone_segment_is_acknowledged_within_40_ms() {
        let mut receiver = receiver(Acknowledging::Linux);
        reports(&mut receiver, 0..16);
        assert!(!receiver.take(micros(1000), 160, 170));
        assert_eq!(receiver.due(), Some(micros(41_000)));
    }

    #[test]
    fn what_fills_a_hole_is_acknowledged_at_once() {
        let mut receiver = receiver(Acknowledging::Linux);
        reports(&mut receiver, 0..16);
        assert_eq!(reports(&mut receiver, [17, 16]), [true, true]);
    }

    #[test]
    fn behind_three_reports_of_a_hole_they_are_compressed() {
        let mut receiver = receiver(Acknowledging::Linux);
        let now = reports(&mut receiver, 1..60);
        assert_eq!(now[..4], [true, true, true, false]);
        assert_eq!(
            now.iter().filter(|now| **now).count(),
            4,
            "the 45th is reported with those that wait"
        );
        let last = receiver.take(micros(100), 700, 710);
        assert!(!last);
        assert_eq!(
            receiver.due(),
            Some(micros(1048)),
            "a millisecond from the first that waits"
        );
    }

    /// Every other segment is lost: five blocks come to be within a millisecond, and a report has room for four.
    #[test]
    fn each_of_many_blocks_is_reported() {
        let mut receiver = receiver(Acknowledging::Linux);
        let mut told = Vec::new();
        for segment in (1..40_u64).step_by(2) {
            let (start, end) = (segment * SIZE, (segment + 1) * SIZE);
            if receiver.reports_before(start, end) {
                told.extend_from_slice(receiver.report().blocks());
            }
            if receiver.take(micros(segment), start, end) {
                told.extend_from_slice(receiver.report().blocks());
            }
        }
        told.extend_from_slice(receiver.report().blocks());
        for segment in (1..40_u64).step_by(2) {
            assert!(
                told.contains(&(segment * SIZE, (segment + 1) * SIZE)),
                "{segment} of {told:?}"
            );
        }
    }

    #[test]
    fn what_a_card_has_put_together_is_acknowledged_once() {
        let mut receiver = receiver(Acknowledging::Stretched(8));
        let now = reports(&mut receiver, 0..20);
        let at_once: Vec<_> = (0..20).filter(|at| now[*at]).collect();
        assert_eq!(at_once, [7, 15]);
        assert_eq!(receiver.due(), Some(micros(219)));
    }

    #[test]
    fn nothing_beyond_the_window_is_taken() {
        let mut receiver = Receiver::new(SIZE, Acknowledging::Linux, Window::Fixed(20), ROUND_TRIP);
        receiver.set_reading(false);
        assert!(receiver.take(micros(0), 0, 20));
        assert_eq!(receiver.report().window, 0);
        assert!(receiver.take(micros(1), 20, 21), "a probe is answered");
        assert_eq!(receiver.report().next, 20);
        receiver.set_reading(true);
        assert_eq!(receiver.report().window, 20);
    }

    #[test]
    fn an_autotuned_window_follows_what_comes_in_a_round_trip() {
        let mut receiver = Receiver::new(1000, Acknowledging::Linux, Window::Autotuned(1 << 20), ROUND_TRIP);
        let mut windows = Vec::new();
        for round in 0..12_u64 {
            let window = receiver.report().window;
            windows.push(window);
            let start = receiver.next();
            for segment in 0..window / 1000 {
                let start = start + segment * 1000;
                receiver.take(micros(round * 20_000 + 20_000), start, start + 1000);
                receiver.report();
            }
        }
        assert_eq!(windows[0], 64 << 10);
        assert!(windows.is_sorted());
        assert_eq!(windows.last(), Some(&(1 << 20)));
    }
}
