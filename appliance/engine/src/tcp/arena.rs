//! Send and receive buffers from lazily touched memory.
//!
//! Buffers are cut from regions of 64 MiB that the allocator maps from the kernel as zero pages, so a buffer costs
//! memory only where bytes have been: an idle flow has two untouched or one-page buffers, whatever their size.
//! (Smaller allocations would not do: the C allocator hands out dirty memory and clears it, 20 to 110 µs a flow.)
//! Freed buffers are used again last in, first out, so resident memory follows the peak of bytes in flight.
//!
//! The only `unsafe` code of the engine is here.

use std::ptr::NonNull;
use std::sync::Arc;

use super::ring::Ring;

/// Sizes of buffers, in bytes.
pub(crate) const CLASSES: [usize; 5] = [16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];

/// Above every threshold at which glibc's `calloc` maps fresh pages (32 MiB at most).
const REGION: usize = 64 << 20;

/// A buffer has its pages to itself, so that they can be given back while the flow is idle.
const PAGE: usize = 4096;

/// Buffers start at different cache sets: at one page alignment, the heads of all flows' buffers would compete for
/// the same few. So they begin somewhere in the first page of their place.
const COLOUR: usize = 3 * 64;

/// Hands out buffers by size class, within a budget of bytes.
#[derive(Debug)]
pub(crate) struct Arena {
    budget: u64,
    used: u64,
    classes: [Class; CLASSES.len()],
}

#[derive(Debug, Default)]
struct Class {
    free: Vec<Buffer>,
    /// The region that new buffers are cut from, and how far it is used up, at a page's boundary.
    current: Option<(Arc<Region>, usize)>,
    colour: usize,
}

/// Memory that buffers are cut from; freed with its last buffer.
#[derive(Debug)]
struct Region(*mut [u8]);

// SAFETY: a region is plain memory. All access goes through buffers, each of which owns a disjoint range.
unsafe impl Send for Region {}
// SAFETY: as above; a shared region offers no access at all.
unsafe impl Sync for Region {}

impl Region {
    fn new() -> Self {
        Self(Box::into_raw(vec![0_u8; REGION].into_boxed_slice()))
    }

    /// Where its first whole page begins.
    fn first_page(&self) -> usize {
        self.0.cast::<u8>().addr().wrapping_neg() % PAGE
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `Box::into_raw` in `new` and is given back once.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// One buffer: the sole owner of its range of a region.
#[derive(Debug)]
pub(crate) struct Buffer {
    region: Arc<Region>,
    offset: usize,
    class: u8,
}

impl Buffer {
    pub(super) fn len(&self) -> usize {
        CLASSES[usize::from(self.class)]
    }

    /// The pages it lies in, which are its own.
    pub(super) fn pages(&self) -> NonNull<[u8]> {
        let place = (self.offset - self.region.first_page()) / PAGE * PAGE + self.region.first_page();
        // SAFETY: `Arena::take` has cut the place of this buffer, from a page's boundary on, out of the region.
        let start = unsafe { NonNull::new_unchecked(self.region.0.cast::<u8>().add(place)) };
        NonNull::slice_from_raw_parts(start, self.len() + PAGE)
    }

    /// The memory.
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `Arena::take` cut `offset..offset + len` out of the region for this buffer alone, and the region
        // lives as long as the buffer holds it.
        unsafe {
            let start = self.region.0.cast::<u8>().add(self.offset);
            std::slice::from_raw_parts(start, self.len())
        }
    }

    /// The memory, to write to.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; nobody else has the buffer.
        unsafe {
            let start = self.region.0.cast::<u8>().add(self.offset);
            std::slice::from_raw_parts_mut(start, self.len())
        }
    }
}

impl Arena {
    pub(crate) fn new(budget: u64) -> Self {
        Self {
            budget,
            used: 0,
            classes: Default::default(),
        }
    }

    /// Whether so little of the budget is in use that a flow may have more than its share.
    pub(crate) fn is_roomy(&self) -> bool {
        self.used < self.budget / 4
    }

    /// Takes buffers of the largest classes that are neither above the bytes wanted for each direction nor above what
    /// the budget has left, and builds rings on them: to receive into and to send from. Of the last quarter of the budget
    /// everybody gets the smallest, so that it is enough for many. `None` when not even those fit.
    pub(crate) fn rings(&mut self, receive: usize, send: usize) -> Option<(Ring, Ring)> {
        let left = self.budget - self.used;
        let (receive, send) = if left <= self.budget / 4 {
            (receive.min(CLASSES[0]), send.min(CLASSES[0]))
        } else {
            (receive, send)
        };
        let largest = |wanted: usize, left: u64| {
            let fits = |&class: &usize| CLASSES[class] <= wanted && CLASSES[class] as u64 <= left;
            (0..CLASSES.len()).rev().find(fits)
        };
        let receive = largest(receive, left / 2)?;
        let send = largest(send, left - CLASSES[receive] as u64)?;
        self.used += (CLASSES[receive] + CLASSES[send]) as u64;
        Some((Ring::new(self.take(receive)), Ring::new(self.take(send))))
    }

    /// Takes a flow's buffers back.
    pub(crate) fn give_back(&mut self, (receive, send): (Ring, Ring)) {
        for buffer in [receive, send].map(Ring::into_buffer) {
            self.used -= buffer.len() as u64;
            self.classes[usize::from(buffer.class)].free.push(buffer);
        }
    }

    /// Bytes of all buffers handed out.
    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    fn take(&mut self, class: usize) -> Buffer {
        let size = CLASSES[class];
        let Class {
            free,
            current,
            colour,
        } = &mut self.classes[class];
        if let Some(buffer) = free.pop() {
            return buffer;
        }
        let stride = size + PAGE;
        let fresh = || {
            let region = Region::new();
            let first = region.first_page();
            (Arc::new(region), first)
        };
        let (region, next) = current.get_or_insert_with(fresh);
        if *next + stride > REGION {
            (*region, *next) = fresh();
        }
        let buffer = Buffer {
            region: Arc::clone(region),
            offset: *next + *colour,
            class: class as u8,
        };
        *next += stride;
        *colour = (*colour + COLOUR) % PAGE;
        buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_never_overlap_and_come_back() {
        let mut arena = Arena::new(1 << 40);
        let take = |arena: &mut Arena| -> Vec<_> {
            (0..5000)
                .map(|_| arena.rings(16 << 10, 64 << 10).expect("in budget"))
                .collect()
        };
        let ranges_of = |flows: &[(Ring, Ring)]| {
            let buffers = flows
                .iter()
                .flat_map(|(receive, send)| [receive.buffer(), send.buffer()]);
            let mut ranges: Vec<_> = buffers
                .map(|buffer| (buffer.region.0.cast::<u8>().addr() + buffer.offset, buffer.len()))
                .collect();
            ranges.sort_unstable();
            ranges
        };
        let flows = take(&mut arena);
        let ranges = ranges_of(&flows);
        assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        let mut pages: Vec<_> = flows
            .iter()
            .flat_map(|(receive, send)| [receive.buffer(), send.buffer()])
            .map(|buffer| {
                let pages = buffer.pages();
                let (start, end) = (pages.addr().get(), pages.addr().get() + pages.len());
                let first = buffer.region.0.cast::<u8>().addr() + buffer.offset;
                assert!(start % PAGE == 0 && start <= first && first + buffer.len() <= end);
                (start, end)
            })
            .collect();
        pages.sort_unstable();
        assert!(
            pages.windows(2).all(|pair| pair[0].1 <= pair[1].0),
            "pages are one buffer's"
        );
        for flow in flows {
            arena.give_back(flow);
        }
        assert_eq!(arena.used(), 0);
        assert_eq!(
            ranges_of(&take(&mut arena)),
            ranges,
            "the same memory serves again"
        );
    }

    #[test]
    fn early_flows_leave_room_for_many_late_ones() {
        let mut arena = Arena::new(64 << 20);
        let mut taken = Vec::new();
        while let Some(rings) = arena.rings(1 << 20, 1 << 20) {
            taken.push(rings);
        }
        let large = taken.iter().filter(|(receive, _)| receive.limit() == 1 << 20);
        assert_eq!(large.count(), 48 / 2);
        assert_eq!(taken.len(), 48 / 2 + (16 << 20) / (32 << 10));
    }

    #[test]
    fn a_tight_budget_gives_smaller_buffers_and_then_none() {
        let mut arena = Arena::new(2 * (64 << 10) + 2 * (16 << 10));
        let first = arena.rings(1 << 20, 64 << 10).expect("in budget");
        assert_eq!((first.0.limit(), first.1.limit()), (64 << 10, 64 << 10));
        let second = arena.rings(1 << 20, 1 << 20).expect("in budget");
        assert_eq!((second.0.limit(), second.1.limit()), (16 << 10, 16 << 10));
        assert!(arena.rings(1 << 20, 1 << 20).is_none());
        arena.give_back(first);
        assert!(arena.rings(1 << 20, 1 << 20).is_some());
    }
}
