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

    /// Takes two buffers of the largest class that is neither above `wanted` bytes nor above what the budget has
    /// left, and builds a socket on them. `None` when not even the smallest fits.
    pub(crate) fn socket(&mut self, wanted: usize) -> Option<Sockets> {
        let left = (self.budget - self.used) / 2;
        let fits = |&class: &usize| CLASSES[class] <= wanted && CLASSES[class] as u64 <= left;
        let class = (0..CLASSES.len()).rev().find(fits)?;
        let (receive, send) = (self.take(class), self.take(class));
        Some(Sockets::new(receive, send))
    }

    /// Takes a socket's buffers back.
    pub(crate) fn give_back(&mut self, sockets: Sockets) {
        let Sockets {
            set,
            handle: _,
            buffers,
        } = sockets;
        drop(set);
        for buffer in buffers {
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
        self.used += size as u64;
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
#[derive(Debug)]
pub(crate) struct Sockets {
    // Dropped before the buffers: fields are dropped in order.
    set: SocketSet<'static>,
    handle: SocketHandle,
    buffers: [Buffer; 2],
}

impl Sockets {
    fn new(mut receive: Buffer, mut send: Buffer) -> Self {
        // SAFETY: the slices live in the socket, the socket in `set`, and `set` is dropped before the buffers, both
        // here (field order) and in `Arena::give_back`. Neither the socket nor its buffers ever leave the set.
        let (receive_bytes, send_bytes) = unsafe { (receive.lend(), send.lend()) };
        let socket = Socket::new(SocketBuffer::new(receive_bytes), SocketBuffer::new(send_bytes));
        let mut set = SocketSet::new(vec![SocketStorage::EMPTY]);
        let handle = set.add(socket);
        Self {
            set,
            handle,
            buffers: [receive, send],
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

    /// The pages of both buffers.
    pub(crate) fn pages(&self) -> [NonNull<[u8]>; 2] {
        [self.buffers[0].pages(), self.buffers[1].pages()]
    }

    /// Capacity of each direction in bytes.
    pub(crate) fn capacity(&self) -> usize {
        self.buffers[0].len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_never_overlap_and_come_back() {
        let mut arena = Arena::new(1 << 40);
        let sockets: Vec<_> = (0..5000)
            .map(|_| arena.socket(16 << 10).expect("in budget"))
            .collect();
        let mut ranges: Vec<_> = sockets
            .iter()
            .flat_map(|sockets| &sockets.buffers)
            .map(|buffer| (buffer.region.0.cast::<u8>().addr() + buffer.offset, buffer.len()))
            .collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        let mut pages: Vec<_> = sockets
            .iter()
            .flat_map(|sockets| &sockets.buffers)
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
        let first = ranges[0].0;
        for sockets in sockets {
            arena.give_back(sockets);
        }
        assert_eq!(arena.used(), 0);
        let again: Vec<_> = (0..5000)
            .map(|_| arena.socket(16 << 10).expect("in budget"))
            .collect();
        let lowest = again.iter().flat_map(|sockets| &sockets.buffers);
        let lowest = lowest
            .map(|buffer| buffer.region.0.cast::<u8>().addr() + buffer.offset)
            .min();
        assert_eq!(lowest, Some(first), "the same memory serves again");
    }

    #[test]
    fn a_tight_budget_gives_smaller_buffers_and_then_none() {
        let mut arena = Arena::new(2 * (64 << 10) + 2 * (16 << 10));
        let first = arena.socket(1 << 20).expect("in budget");
        assert_eq!(first.capacity(), 64 << 10);
        let second = arena.socket(1 << 20).expect("in budget");
        assert_eq!(second.capacity(), 16 << 10);
        assert!(arena.socket(1 << 20).is_none());
        arena.give_back(first);
        assert!(arena.socket(1 << 20).is_some());
    }
}
