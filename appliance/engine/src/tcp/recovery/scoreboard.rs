//! What has been sent and not acknowledged, as contiguous records.
//!
//! A record is one transmission, whatever its size: a clean super-packet is one record, split only where the client's
//! selective acknowledgments (RFC 2018) have a border. Selectively acknowledged neighbours are one record, so that
//! there are about as many records as there are holes and packets in flight.
//!
//! A client may lie about what it has. Borders are rounded inwards to where our segments end, so a lie cannot cut
//! records smaller than a segment, and beyond [`RECORDS_MAX`] records nothing is split any more.

use std::collections::VecDeque;

/// The most records of one flow. 4 MiB in segments of 536 bytes are half as many.
pub(super) const RECORDS_MAX: usize = 16_384;

/// Records that stay allocated while nothing is in flight.
const RECORDS_KEPT: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    InFlight,
    Sacked,
    Lost,
}

#[derive(Debug, Clone, Copy)]
struct Record {
    start: u64,
    end: u64,
    /// Which transmission it was last part of.
    transmission: u64,
    /// Bytes from `start` to the first border between segments; 0 when it begins with a whole one.
    lead: u32,
    state: State,
    /// It has been sent more than once.
    retransmitted: bool,
}

impl Record {
    fn len(&self) -> u64 {
        self.end - self.start
    }
}

/// Bytes that the client has just been found to have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) end: u64,
    pub(super) len: u64,
    /// The transmission it was last part of.
    pub(super) transmission: u64,
    pub(super) retransmitted: bool,
}

#[derive(Debug)]
pub(super) struct Scoreboard {
    /// From SND.UNA to SND.NXT without a gap.
    records: VecDeque<Record>,
    next: u64,
    in_flight: u64,
    sacked: u64,
    lost: u64,
    /// No lost record begins below.
    lost_from: u64,
    /// Distance of the borders that selective acknowledgments are rounded to.
    unit: u32,
}

impl Scoreboard {
    pub(super) fn new(unit: u32) -> Self {
        Self {
            records: VecDeque::new(),
            next: 0,
            in_flight: 0,
            sacked: 0,
            lost: 0,
            lost_from: 0,
            unit,
        }
    }

    pub(super) fn set_unit(&mut self, unit: u32) {
        self.unit = unit;
        for record in &mut self.records {
            record.lead %= unit;
        }
    }

    /// The lowest offset not acknowledged: SND.UNA.
    pub(super) fn acknowledged(&self) -> u64 {
        self.records.front().map_or(self.next, |record| record.start)
    }

    /// One past the highest offset sent: SND.NXT.
    pub(super) fn sent(&self) -> u64 {
        self.next
    }

    /// Bytes believed to be in the network.
    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    pub(super) fn sacked(&self) -> u64 {
        self.sacked
    }

    /// Bytes taken for lost and not sent again.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    pub(super) fn is_full(&self) -> bool {
        self.records.len() >= RECORDS_MAX
    }

    /// Whether the first record is one that the client has claimed to have: it has changed its mind (RFC 2018,
    /// section 8).
    pub(super) fn is_reneged(&self) -> bool {
        self.records
            .front()
            .is_some_and(|record| record.state == State::Sacked)
    }

    /// Bytes up to `end` have been sent for the first time.
    pub(super) fn append(&mut self, end: u64, transmission: u64) {
        debug_assert!(end > self.next);
        self.in_flight += end - self.next;
        self.records.push_back(Record {
            start: self.next,
            end,
            transmission,
            lead: 0,
            state: State::InFlight,
            retransmitted: false,
        });
        self.next = end;
    }

    /// Everything below `to`, which has been sent, is acknowledged; `delivered` hears of what was not before.
    pub(super) fn acknowledge(&mut self, to: u64, mut delivered: impl FnMut(Piece)) {
        debug_assert!(to <= self.next);
        while let Some(record) = self.records.front_mut() {
            if record.start >= to {
                break;
            }
            let end = record.end.min(to);
            let len = end - record.start;
            let piece = Piece {
                end,
                len,
                transmission: record.transmission,
                retransmitted: record.retransmitted,
            };
            let counter = match record.state {
                State::InFlight => &mut self.in_flight,
                State::Sacked => &mut self.sacked,
                State::Lost => &mut self.lost,
            };
            *counter -= len;
            if record.state != State::Sacked {
                delivered(piece);
            }
            if end == record.end {
                self.records.pop_front();
            } else {
                record.lead = lead_after(record.lead, len, self.unit);
                record.start = end;
            }
        }
        if self.records.is_empty() && self.records.capacity() > RECORDS_KEPT {
            self.records = VecDeque::new();
        }
    }

    /// The client says it has `start..end`; `delivered` hears of what it has not said before.
    pub(super) fn sack(&mut self, start: u64, end: u64, mut delivered: impl FnMut(Piece)) {
        let end = end.min(self.next);
        let start = start.max(self.acknowledged());
        if start >= end {
            return;
        }
        let mut at = self.index_of(start);
        while let Some(&record) = self.records.get(at)
            && record.start < end
        {
            if record.state == State::Sacked {
                at += 1;
                continue;
            }
            let from = if start <= record.start {
                record.start
            } else {
                border_at_or_after(&record, start, self.unit).min(record.end)
            };
            let to = if end >= record.end {
                record.end
            } else {
                border_at_or_before(&record, end, self.unit)
            };
            if from >= to {
                at += 1;
                continue;
            }
            let splits = usize::from(from > record.start) + usize::from(to < record.end);
            if self.records.len() + splits > RECORDS_MAX {
                return;
            }
            delivered(Piece {
                end: to,
                len: to - from,
                transmission: record.transmission,
                retransmitted: record.retransmitted,
            });
            match record.state {
                State::InFlight => self.in_flight -= to - from,
                State::Lost => self.lost -= to - from,
                State::Sacked => unreachable!("skipped above"),
            }
            self.sacked += to - from;
            at = self.set_sacked(at, from, to) + 1;
        }
    }

    /// Makes `from..to` of the record at `at` a selectively acknowledged one, or part of one beside it. Returns where
    /// that is.
    fn set_sacked(&mut self, at: usize, from: u64, to: u64) -> usize {
        let record = self.records[at];
        let joins_before = from == record.start && at > 0 && self.records[at - 1].state == State::Sacked;
        let joins_behind = to == record.end
            && self
                .records
                .get(at + 1)
                .is_some_and(|behind| behind.state == State::Sacked);
        let unit = self.unit;
        match (joins_before, joins_behind, from == record.start, to == record.end) {
            (true, true, ..) => {
                self.records[at - 1].end = self.records[at + 1].end;
                self.records.drain(at..=at + 1);
                at - 1
            }
            (true, false, _, whole) => {
                self.records[at - 1].end = to;
                if whole {
                    self.records.remove(at);
                } else {
                    cut_front(&mut self.records[at], to, unit);
                }
                at - 1
            }
            (false, true, whole, _) => {
                cut_front_to_earlier(&mut self.records[at + 1], from);
                if whole {
                    self.records.remove(at);
                    at
                } else {
                    self.records[at].end = from;
                    at + 1
                }
            }
            (false, false, begins, ends) => {
                let mut middle = record;
                if !begins {
                    self.records[at].end = from;
                    cut_front(&mut middle, from, unit);
                }
                middle.end = to;
                middle.state = State::Sacked;
                let here = at + usize::from(!begins);
                if begins {
                    self.records[at] = middle;
                } else {
                    self.records.insert(here, middle);
                }
                if !ends {
                    let mut rest = record;
                    cut_front(&mut rest, to, unit);
                    self.records.insert(here + 1, rest);
                }
                here
            }
        }
    }

    /// Takes what transmission `transmission`, which was `start..end`, has in flight for lost, as far as it ends at or
    /// below `limit`. Returns how many bytes, and whether some of it is still in flight.
    pub(super) fn mark_lost(&mut self, transmission: u64, start: u64, end: u64, limit: u64) -> (u64, bool) {
        let mut bytes = 0;
        let mut left = false;
        for at in self.index_of(start)..self.records.len() {
            let record = &mut self.records[at];
            if record.start >= end {
                break;
            }
            if record.transmission != transmission || record.state != State::InFlight {
                continue;
            }
            if record.end > limit {
                left = true;
                break;
            }
            record.state = State::Lost;
            bytes += record.len();
            self.lost_from = self.lost_from.min(record.start);
        }
        self.in_flight -= bytes;
        self.lost += bytes;
        (bytes, left)
    }

    /// Takes the first `len` bytes for lost, if they are in flight. Returns how many that were.
    pub(super) fn mark_head_lost(&mut self, len: u64) -> u64 {
        let Some(&record) = self.records.front() else {
            return 0;
        };
        if record.state != State::InFlight {
            return 0;
        }
        let len = len.min(record.len());
        if len < record.len() {
            let mut rest = record;
            cut_front(&mut rest, record.start + len, self.unit);
            self.records[0].end = record.start + len;
            self.records.insert(1, rest);
        }
        self.records[0].state = State::Lost;
        self.in_flight -= len;
        self.lost += len;
        self.lost_from = self.lost_from.min(record.start);
        len
    }

    /// Takes everything in flight for lost, and what was selectively acknowledged too if `all`. Returns how much of it
    /// was in flight.
    pub(super) fn mark_all_lost(&mut self, all: bool) -> u64 {
        let bytes = self.in_flight;
        for record in &mut self.records {
            match record.state {
                State::InFlight => {
                    self.in_flight -= record.len();
                    self.lost += record.len();
                    record.state = State::Lost;
                }
                State::Sacked if all => {
                    self.sacked -= record.len();
                    self.lost += record.len();
                    record.state = State::Lost;
                }
                State::Sacked | State::Lost => {}
            }
        }
        self.lost_from = 0;
        bytes
    }

    /// What was taken for lost and not sent again is in flight after all, as part of `transmission`. Returns the range
    /// that it lies in.
    pub(super) fn restore_lost(&mut self, transmission: u64) -> Option<(u64, u64)> {
        let mut range = None;
        for record in &mut self.records {
            if record.state != State::Lost {
                continue;
            }
            record.state = State::InFlight;
            record.transmission = transmission;
            let (start, _) = range.unwrap_or((record.start, 0));
            range = Some((start, record.end));
        }
        self.in_flight += self.lost;
        self.lost = 0;
        range
    }

    /// The first lost bytes.
    pub(super) fn first_lost(&mut self) -> Option<u64> {
        if self.lost == 0 {
            return None;
        }
        let from = self.index_of(self.lost_from);
        let at = (from..self.records.len()).find(|&at| self.records[at].state == State::Lost)?;
        self.lost_from = self.records[at].start;
        Some(self.lost_from)
    }

    /// Sends the first lost bytes again, at most `most` of them, as part of `transmission`. Returns the range.
    pub(super) fn retransmit(&mut self, most: u64, transmission: u64) -> Option<(u64, u64)> {
        let start = self.first_lost()?;
        let first = self.index_of(start);
        let mut last = first;
        while self.records[last].end - start < most
            && self
                .records
                .get(last + 1)
                .is_some_and(|record| record.state == State::Lost)
        {
            last += 1;
        }
        let end = self.records[last].end.min(start + most);
        if end < self.records[last].end {
            let unit = self.unit;
            let mut rest = self.records[last];
            cut_front(&mut rest, end, unit);
            self.records[last].end = end;
            self.records.insert(last + 1, rest);
        }
        if last > first {
            self.records.drain(first + 1..=last);
        }
        self.records[first] = Record {
            start,
            end,
            transmission,
            lead: 0,
            state: State::InFlight,
            retransmitted: true,
        };
        self.lost -= end - start;
        self.in_flight += end - start;
        self.lost_from = end;
        Some((start, end))
    }

    /// Sends the last bytes again, at most `most` of them, as a probe that is part of `transmission`. Returns the range;
    /// `None` if they are not in flight.
    pub(super) fn retransmit_tail(&mut self, most: u64, transmission: u64) -> Option<(u64, u64)> {
        let last = self.records.back_mut()?;
        if last.state != State::InFlight {
            return None;
        }
        let start = last.start.max(last.end.saturating_sub(most));
        let mut tail = *last;
        if start > last.start {
            last.end = start;
        } else {
            self.records.pop_back();
        }
        tail.start = start;
        tail.transmission = transmission;
        tail.lead = 0;
        tail.retransmitted = true;
        self.records.push_back(tail);
        Some((start, tail.end))
    }

    /// Whether transmission `transmission`, which was `start..end`, has something in flight that ends at or below
    /// `limit`.
    pub(super) fn has_in_flight(&self, transmission: u64, start: u64, end: u64, limit: u64) -> bool {
        self.records
            .range(self.index_of(start)..)
            .take_while(|record| record.start < end && record.end <= limit)
            .any(|record| record.transmission == transmission && record.state == State::InFlight)
    }

    /// Whether `start..end` lies in what was selectively acknowledged.
    pub(super) fn is_sacked(&self, start: u64, end: u64) -> bool {
        self.records
            .get(self.index_of(start))
            .is_some_and(|record| record.state == State::Sacked && record.start <= start && end <= record.end)
    }

    /// The record that `offset` lies in, or the first behind it.
    fn index_of(&self, offset: u64) -> usize {
        match self.records.front() {
            Some(first) if first.end <= offset => self.records.partition_point(|record| record.end <= offset),
            _ => 0,
        }
    }

    /// Whether to look through all records this time: where they are many, only now and then, as `delivered` chances.
    #[cfg(debug_assertions)]
    pub(super) fn is_worth_a_check(&self, delivered: u64) -> bool {
        let few = self.records.len() as u64 / 8 + 1;
        (delivered / u64::from(self.unit)).is_multiple_of(few)
    }

    /// Panics if the records are not contiguous or do not add up.
    #[cfg(debug_assertions)]
    pub(super) fn check(&self) {
        let mut at = self.acknowledged();
        let (mut in_flight, mut sacked, mut lost) = (0, 0, 0);
        let mut before = None;
        for record in &self.records {
            assert!(
                record.start == at && record.end > at,
                "records are contiguous: {self:?}"
            );
            at = record.end;
            match record.state {
                State::InFlight => in_flight += record.len(),
                State::Sacked => {
                    assert!(before != Some(State::Sacked), "neighbours are one");
                    sacked += record.len();
                }
                State::Lost => {
                    assert!(record.start >= self.lost_from, "no lost record is overlooked");
                    lost += record.len();
                }
            }
            before = Some(record.state);
        }
        assert_eq!(at, self.next, "records reach SND.NXT");
        assert_eq!(
            (in_flight, sacked, lost),
            (self.in_flight, self.sacked, self.lost)
        );
        assert!(self.records.len() <= RECORDS_MAX + 2);
    }
}

/// `lead` of what is left when `len` bytes are taken off the front.
fn lead_after(lead: u32, len: u64, unit: u32) -> u32 {
    let unit = u64::from(unit);
    ((u64::from(lead) + unit - len % unit) % unit) as u32
}

fn cut_front(record: &mut Record, start: u64, unit: u32) {
    record.lead = lead_after(record.lead, start - record.start, unit);
    record.start = start;
}

/// A selectively acknowledged record grows towards the front; its borders no longer matter.
fn cut_front_to_earlier(record: &mut Record, start: u64) {
    record.start = start;
    record.lead = 0;
}

fn border_at_or_after(record: &Record, offset: u64, unit: u32) -> u64 {
    let first = record.start + u64::from(record.lead);
    if offset <= first {
        return first;
    }
    first + (offset - first).next_multiple_of(u64::from(unit))
}

fn border_at_or_before(record: &Record, offset: u64, unit: u32) -> u64 {
    let first = record.start + u64::from(record.lead);
    if offset < first {
        return record.start;
    }
    first + (offset - first) / u64::from(unit) * u64::from(unit)
}
