//! Bytes that tell where in which stream they stand.

use std::sync::OnceLock;

/// The bytes of one direction of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern {
    /// Tells streams apart.
    pub key: u32,
    /// What the stream begins with.
    pub head: &'static [u8],
}

/// Prime, so that no power of two and no segment size fits into it.
const PATTERN_PERIOD: usize = 131_071;

impl Pattern {
    /// Fills `bytes` with what stands at `offset`.
    pub fn fill(&self, offset: u64, mut bytes: &mut [u8]) {
        let mut offset = offset;
        while !bytes.is_empty() {
            let run = self.run(offset);
            let len = run.len().min(bytes.len());
            let (now, rest) = bytes.split_at_mut(len);
            now.copy_from_slice(&run[..len]);
            bytes = rest;
            offset += len as u64;
        }
    }

    /// Where `bytes` first differ from what stands at `offset`, if they do.
    pub fn mismatch(&self, offset: u64, mut bytes: &[u8]) -> Option<u64> {
        let mut offset = offset;
        while !bytes.is_empty() {
            let run = self.run(offset);
            let len = run.len().min(bytes.len());
            if bytes[..len] != run[..len] {
                let first = (0..len).find(|&at| bytes[at] != run[at]).expect("they differ");
                return Some(offset + first as u64);
            }
            bytes = &bytes[len..];
            offset += len as u64;
        }
        None
    }

    /// Some of the bytes from `offset` on, at least one.
    fn run(&self, offset: u64) -> &'static [u8] {
        static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
        let table = TABLE.get_or_init(|| {
            let mix = |at: usize| (at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (0..PATTERN_PERIOD)
                .map(|at| (mix(at) ^ mix(at) >> 29 ^ mix(at) >> 43) as u8)
                .collect()
        });
        match self.head.get(offset as usize..) {
            Some(head) if !head.is_empty() => head,
            Some(_) | None => &table[(offset as usize + self.key as usize * 40_503) % PATTERN_PERIOD..],
        }
    }
}
