//! Send and receive buffers from lazily touched memory.
//!
//! Buffers are cut from regions of 64 MiB that the allocator maps from the kernel as zero pages, so a buffer costs
//! memory only where bytes have been: an idle flow has two untouched or one-page buffers, whatever their size.
//! (Smaller allocations would not do: the C allocator hands out dirty memory and clears it, 20 to 110 µs a flow.)
//! Freed buffers are used again last in, first out, so resident memory follows the peak of bytes in flight.
//!
//! The only `unsafe` code of the engine is here: smoltcp's sockets want `&'static mut` buffers.

use std::ptr::NonNull;
use std::sync::Arc;

use smoltcp::iface::{SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::tcp::{Socket, SocketBuffer};

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
    fn len(&self) -> usize {
        CLASSES[usize::from(self.class)]
    }

    /// The pages it lies in, which are its own.
    fn pages(&self) -> NonNull<[u8]> {
        let place = (self.offset - self.region.first_page()) / PAGE * PAGE + self.region.first_page();
        // SAFETY: `Arena::take` has cut the place of this buffer, from a page's boundary on, out of the region.
        let start = unsafe { NonNull::new_unchecked(self.region.0.cast::<u8>().add(place)) };
        NonNull::slice_from_raw_parts(start, self.len() + PAGE)
    }

    /// The memory.
    fn bytes(&self) -> &[u8] {
        // SAFETY: `Arena::take` cut `offset..offset + len` out of the region for this buffer alone, and the region
        // lives as long as the buffer holds it.
        unsafe {
            let start = self.region.0.cast::<u8>().add(self.offset);
            std::slice::from_raw_parts(start, self.len())
        }
    }

    /// The memory, to write to.
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; nobody else has the buffer.
        unsafe { self.lend() }
    }

    /// Lends the memory for as long as nobody else may.
    ///
    /// # Safety
    ///
    /// The slice must be gone before the buffer is dropped, given back or asked again.
    unsafe fn lend(&mut self) -> &'static mut [u8] {
        // SAFETY: `Arena::take` cut `offset..offset + len` out of the region for this buffer alone, the region lives
        // as long as the buffer holds it, and the caller keeps the slice from outliving the buffer.
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

    /// Takes buffers of the largest classes that are neither above the bytes wanted for each direction nor above what
    /// the budget has left, and builds a socket on one and a ring on the other. `None` when not even the smallest fit.
    pub(crate) fn buffers(&mut self, receive: usize, send: usize) -> Option<(Sockets, SendRing)> {
        let left = self.budget - self.used;
        let largest = |wanted: usize, left: u64| {
            let fits = |&class: &usize| CLASSES[class] <= wanted && CLASSES[class] as u64 <= left;
            (0..CLASSES.len()).rev().find(fits)
        };
        let receive = largest(receive, left / 2)?;
        let send = largest(send, left - CLASSES[receive] as u64)?;
        self.used += (CLASSES[receive] + CLASSES[send]) as u64;
        let sockets = Sockets::new(self.take(receive), self.take(receive));
        Some((sockets, SendRing::new(self.take(send))))
    }

    /// Takes a flow's buffers back.
    pub(crate) fn give_back(&mut self, (sockets, ring): (Sockets, SendRing)) {
        let Sockets {
            set,
            handle: _,
            receive,
            shadow,
        } = sockets;
        drop(set);
        self.used -= (receive.len() + ring.buffer.len()) as u64;
        for buffer in [receive, shadow, ring.buffer] {
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

/// A set of exactly one TCP socket, and the buffers that it stands on.
///
/// The socket sends no data: what stands in for its send buffer is counted in and never touched, so it is address space
/// alone, and in no budget.
#[derive(Debug)]
pub(crate) struct Sockets {
    // Dropped before the buffers: fields are dropped in order.
    set: SocketSet<'static>,
    handle: SocketHandle,
    receive: Buffer,
    shadow: Buffer,
}

impl Sockets {
    fn new(mut receive: Buffer, mut shadow: Buffer) -> Self {
        // SAFETY: the slices live in the socket, the socket in `set`, and `set` is dropped before the buffers, both
        // here (field order) and in `Arena::give_back`. Neither the socket nor its buffers ever leave the set.
        let (receive_bytes, shadow_bytes) = unsafe { (receive.lend(), shadow.lend()) };
        let socket = Socket::new(SocketBuffer::new(receive_bytes), SocketBuffer::new(shadow_bytes));
        let mut set = SocketSet::new(vec![SocketStorage::EMPTY]);
        let handle = set.add(socket);
        Self {
            set,
            handle,
            receive,
            shadow,
        }
    }

    pub(crate) fn set(&mut self) -> &mut SocketSet<'static> {
        &mut self.set
    }

    pub(crate) fn socket(&self) -> &Socket<'static> {
        self.set.get(self.handle)
    }

    pub(crate) fn socket_mut(&mut self) -> &mut Socket<'static> {
        self.set.get_mut(self.handle)
    }

    /// The pages of the receive buffer; what stands in for the other has none.
    pub(crate) fn pages(&self) -> NonNull<[u8]> {
        self.receive.pages()
    }

    /// Capacity of the receive buffer in bytes.
    pub(crate) fn capacity(&self) -> usize {
        self.receive.len()
    }
}

/// Bytes on their way to a client: from the first not acknowledged to the last given.
///
/// It begins with a small part of its memory and grows with the window that is made use of, so that a slow flow touches
/// no more of it.
#[derive(Debug)]
pub(crate) struct SendRing {
    buffer: Buffer,
    /// How much of the memory is in use: positions wrap there.
    limit: usize,
    start: usize,
    len: usize,
}

impl SendRing {
    fn new(buffer: Buffer) -> Self {
        Self {
            limit: buffer.len(),
            buffer,
            start: 0,
            len: 0,
        }
    }

    /// Uses only the first `bytes` until [`SendRing::grow`].
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

    /// The bytes `from..to`, counted from the first: in one piece or two.
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
        if self.len == 0 {
            self.start = 0; // the first pages serve again
        }
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
                .map(|_| arena.buffers(16 << 10, 64 << 10).expect("in budget"))
                .collect()
        };
        let ranges_of = |flows: &[(Sockets, SendRing)]| {
            let buffers = flows
                .iter()
                .flat_map(|(sockets, ring)| [&sockets.receive, &sockets.shadow, &ring.buffer]);
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
            .flat_map(|(sockets, ring)| [&sockets.receive, &sockets.shadow, &ring.buffer])
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
    fn a_tight_budget_gives_smaller_buffers_and_then_none() {
        let mut arena = Arena::new(2 * (64 << 10) + 2 * (16 << 10));
        let first = arena.buffers(1 << 20, 64 << 10).expect("in budget");
        assert_eq!((first.0.capacity(), first.1.limit()), (64 << 10, 64 << 10));
        let second = arena.buffers(1 << 20, 1 << 20).expect("in budget");
        assert_eq!((second.0.capacity(), second.1.limit()), (16 << 10, 16 << 10));
        assert!(arena.buffers(1 << 20, 1 << 20).is_none());
        arena.give_back(first);
        assert!(arena.buffers(1 << 20, 1 << 20).is_some());
    }

    #[test]
    fn a_ring_gives_back_what_it_was_given_while_it_grows() {
        let mut arena = Arena::new(1 << 40);
        let (_, mut ring) = arena.buffers(16 << 10, 64 << 10).expect("in budget");
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
        }
        assert!(ring.limit() == 1_000 && read > 100_000);
    }
}
