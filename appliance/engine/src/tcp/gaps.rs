//! What has come out of order: ranges of the stream behind a gap.

use std::ops::Range;

/// So many ranges are remembered; what would make one more is dropped, and comes again.
const RANGES_MAX: usize = 32;

/// Ranges of stream offsets, in order, none of which touch.
#[derive(Debug, Default)]
pub(super) struct Gaps {
    ranges: Vec<Range<u64>>,
}

impl Gaps {
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Notes that `range`, which is not empty, has come. Returns whether there was room for it.
    pub(super) fn insert(&mut self, mut range: Range<u64>) -> bool {
        let first = self.ranges.partition_point(|known| known.end < range.start);
        let behind = self.ranges.partition_point(|known| known.start <= range.end);
        if first == behind {
            if self.ranges.len() == RANGES_MAX {
                return false;
            }
            self.ranges.insert(first, range);
            return true;
        }
        range.start = range.start.min(self.ranges[first].start);
        range.end = range.end.max(self.ranges[behind - 1].end);
        self.ranges[first] = range;
        self.ranges.drain(first + 1..behind);
        true
    }

    /// Everything below `to` has come in order: takes out what begins there. Returns up to where there is no gap now.
    pub(super) fn close(&mut self, to: u64) -> u64 {
        let behind = self.ranges.partition_point(|known| known.start <= to);
        let end = self
            .ranges
            .drain(..behind)
            .next_back()
            .map_or(to, |last| last.end.max(to));
        if self.ranges.is_empty() {
            self.ranges = Vec::new(); // most flows never need any again
        }
        end
    }

    /// The range that `offset` lies in or ends, or the first (RFC 2018, section 4).
    pub(super) fn block(&self, offset: u64) -> Option<Range<u64>> {
        let has = |range: &&Range<u64>| range.start <= offset && offset <= range.end;
        self.ranges.iter().find(has).or(self.ranges.first()).cloned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Beside the plainest model there is: a flag for every byte.
        #[test]
        fn ranges_are_what_has_come(steps in prop::collection::vec((0_u64..200, 1_u64..30), 1..100)) {
            let mut gaps = Gaps::default();
            let (mut come, mut front) = ([false; 256], 0_u64);
            for (start, len) in steps {
                let (start, end) = (start.max(front), (start + len).max(front));
                if start == end {
                    continue;
                }
                if start == front {
                    front = gaps.close(end);
                    come[start as usize..end as usize].fill(true);
                } else if gaps.insert(start..end) {
                    come[start as usize..end as usize].fill(true);
                } else {
                    prop_assert_eq!(gaps.ranges.len(), RANGES_MAX);
                }
                let contiguous = come.iter().take_while(|come| **come).count() as u64;
                prop_assert_eq!(front, contiguous);
                let mut from_ranges = [false; 256];
                from_ranges[..front as usize].fill(true);
                for range in &gaps.ranges {
                    prop_assert!(range.start > front);
                    from_ranges[range.start as usize..range.end as usize].fill(true);
                }
                prop_assert_eq!(from_ranges, come);
                prop_assert!(gaps.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }

    #[test]
    fn there_is_a_bound() {
        let mut gaps = Gaps::default();
        for at in 0..RANGES_MAX as u64 {
            assert!(gaps.insert(10 * at + 5..10 * at + 6));
        }
        assert!(!gaps.insert(8..9), "one more");
        assert!(gaps.insert(6..7), "one that grows");
        assert_eq!(gaps.close(5), 7);
        assert!(gaps.insert(8..9), "there is room again");
        assert_eq!(gaps.block(9), Some(8..9));
        assert_eq!(gaps.block(1000), Some(8..9));
    }
}
