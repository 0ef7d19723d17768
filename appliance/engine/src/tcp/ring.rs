//! A ring of bytes: what a client has sent and nobody has read, or what it has not acknowledged.

use std::ptr::NonNull;

use super::arena::Buffer;

/// A ring of bytes in a buffer of the arena.
///
/// It can begin with a small part of its memory and grow with the use that is made of it, so that a slow flow touches no
/// more of it.
#[derive(Debug)]
pub(crate) struct Ring {
    buffer: Buffer,
    /// How much of the memory is in use: positions wrap there.
    limit: usize,
    start: usize,
    len: usize,
}

impl Ring {
    pub(super) fn new(buffer: Buffer) -> Self {
        Self {
            limit: buffer.len(),
            buffer,
            start: 0,
            len: 0,
        }
    }

    pub(super) fn into_buffer(self) -> Buffer {
        self.buffer
    }

    /// Uses only the first `bytes` until [`Ring::grow`].
    pub(super) fn begin_with(&mut self, bytes: usize) {
        debug_assert!(self.len == 0);
        self.limit = bytes.min(self.buffer.len());
    }

    /// Makes use of up to `bytes`, if there is so much, as soon as nothing wraps.
    pub(super) fn grow(&mut self, bytes: usize) {
        if bytes > self.limit && self.start + self.len <= self.limit {
            self.limit = bytes.min(self.buffer.len());
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// What it holds at most.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Lends contiguous room; `fill` says how many bytes it has filled.
    pub(super) fn write(&mut self, fill: impl FnOnce(&mut [u8]) -> usize) -> usize {
        let end = self.start + self.len;
        let room = if end < self.limit {
            end..self.limit
        } else {
            end - self.limit..self.start
        };
        let space = &mut self.buffer.bytes_mut()[room];
        let filled = fill(space).min(space.len());
        self.len += filled;
        filled
    }

    /// Puts `bytes` where they belong, `gap` bytes behind the last; they do not count before [`Ring::extend`].
    #[inline]
    pub(super) fn put(&mut self, gap: usize, bytes: &[u8]) {
        assert!(gap + bytes.len() <= self.limit - self.len, "there is room");
        let mut at = self.start + self.len + gap;
        if at >= self.limit {
            at -= self.limit;
        }
        let memory = self.buffer.bytes_mut();
        let (first, second) = bytes.split_at(bytes.len().min(self.limit - at));
        memory[at..at + first.len()].copy_from_slice(first);
        if !second.is_empty() {
            memory[..second.len()].copy_from_slice(second);
        }
    }

    /// Counts `bytes` more, which have been put there.
    pub(super) fn extend(&mut self, bytes: usize) {
        assert!(bytes <= self.limit - self.len, "there was room");
        self.len += bytes;
    }

    /// The first bytes, as many as are in one piece.
    pub(super) fn front(&self) -> &[u8] {
        self.get(0, self.len).0
    }

    /// The bytes `from..to`, counted from the first: in one piece or two.
    #[inline]
    pub(super) fn get(&self, from: usize, to: usize) -> (&[u8], &[u8]) {
        assert!(from <= to && to <= self.len, "asked for what it holds");
        let bytes = self.buffer.bytes();
        let (from, to) = (self.start + from, self.start + to);
        if to <= self.limit {
            (&bytes[from..to], &[])
        } else if from >= self.limit {
            (&bytes[from - self.limit..to - self.limit], &[])
        } else {
            (&bytes[from..self.limit], &bytes[..to - self.limit])
        }
    }

    /// Its pages.
    pub(super) fn pages(&self) -> NonNull<[u8]> {
        self.buffer.pages()
    }

    /// Forgets the first `bytes`.
    pub(super) fn release(&mut self, bytes: usize) {
        assert!(bytes <= self.len, "forgets what it holds");
        self.len -= bytes;
        self.start += bytes;
        if self.start >= self.limit {
            self.start -= self.limit;
        }
    }

    /// Begins again with the first pages, if it is empty; nothing may have been put behind a gap.
    pub(super) fn rewind(&mut self) {
        if self.len == 0 {
            self.start = 0;
        }
    }
}

#[cfg(test)]
impl Ring {
    pub(super) fn buffer(&self) -> &Buffer {
        &self.buffer
    }
}

#[cfg(test)]
mod tests {
    use super::super::arena::Arena;

    #[test]
    fn it_gives_back_what_it_was_given_while_it_grows() {
        let mut arena = Arena::new(1 << 40);
        let (_, mut ring) = arena.rings(16 << 10, 64 << 10).expect("in budget");
        ring.begin_with(100);
        let (mut written, mut read) = (0_u64, 0_u64);
        for step in 0..10_000_u64 {
            let wanted = (step * 7 % 90) as usize;
            ring.write(|space| {
                let fits = wanted.min(space.len());
                for byte in &mut space[..fits] {
                    *byte = written as u8;
                    written += 1;
                }
                fits
            });
            assert!(ring.len() <= ring.limit());
            if step >= 5_000 {
                ring.grow(1_000);
            }
            let taken = (step * 5 % 80) as usize % (ring.len() + 1);
            let (first, second) = ring.get(0, taken);
            for byte in first.iter().chain(second) {
                assert_eq!(*byte, read as u8);
                read += 1;
            }
            ring.release(taken);
            ring.rewind();
        }
        assert!(ring.limit() == 1_000 && read > 100_000);
    }

    #[test]
    fn what_is_put_behind_a_gap_is_found_there() {
        let mut arena = Arena::new(1 << 40);
        let (mut ring, _) = arena.rings(16 << 10, 16 << 10).expect("in budget");
        ring.begin_with(100);
        for round in 0..50_u8 {
            // 70 bytes a round: the border comes by everywhere.
            ring.put(30, &[round; 40]);
            ring.put(0, &[round ^ 0xff; 30]);
            ring.extend(70);
            let (first, second) = ring.get(0, 70);
            let bytes = [first, second].concat();
            assert_eq!(bytes[..30], [round ^ 0xff; 30]);
            assert_eq!(bytes[30..], [round; 40]);
            assert_eq!(ring.front(), first);
            ring.release(70);
        }
    }
}
