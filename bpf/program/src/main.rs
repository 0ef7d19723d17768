//! The XDP program: walks a frame's headers, asks the lists, counts, and ends in PASS or DROP.
//!
//! Layouts and the walk are in `tungate-bpf-abi`, which also says how lists are looked up. Rebuilt by
//! `cargo xtask bpf`; the object is committed, since loader and simulator run the very same bytecode.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

use core::arch::asm;

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::{btf_map, xdp};
use aya_ebpf::programs::XdpContext;
use tungate_bpf_abi as abi;
use tungate_bpf_abi::{
    Cell, Count, Event, Frame, Group, Key4, Key6, MAX_LOOKUPS, MAX_PORT_STEPS, NO_NODE, Reason, Ruling,
    Selectors, Settings, Walk, WalkOutcome, Window,
};

/// Inner arrays may have any number of elements.
const BPF_F_INNER_MAP: usize = 1 << 12;

type Groups4 = HashMap<Key4, Group, 1>;
type Groups6 = HashMap<Key6, Group, 1>;

#[btf_map]
static ACTIVE: Array<u32, 1> = Array::new();
#[btf_map]
static SETTINGS: Array<Settings, { abi::SLOTS }> = Array::new();
#[btf_map]
static GROUPS4: ArrayOfMaps<Groups4, { abi::SLOTS }> = ArrayOfMaps::new();
#[btf_map]
static GROUPS6: ArrayOfMaps<Groups6, { abi::SLOTS }> = ArrayOfMaps::new();
#[btf_map]
static CELLS: ArrayOfMaps<Array<Cell, 1, BPF_F_INNER_MAP>, { abi::SLOTS }> = ArrayOfMaps::new();
#[btf_map]
static LOCAL: HashMap<Key6, u32, 1024> = HashMap::new();
#[btf_map]
static REASONS: PerCpuArray<Count, { abi::REASONS }> = PerCpuArray::new();
#[btf_map]
static RULES: PerCpuArray<Count, 2> = PerCpuArray::new();
#[btf_map]
static EVENTS: RingBuf<Event, { abi::EVENTS_BYTES }> = RingBuf::new();

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 18] = *b"Apache-2.0 OR MIT\0";

/// Judges one frame.
#[xdp]
pub fn tungate(context: XdpContext) -> u32 {
    let packet = Packet {
        start: context.data(),
        end: context.data_end(),
    };
    let Some(generation) = ACTIVE.get(0) else {
        return XDP_PASS;
    };
    let generation = *generation;
    let slot = generation & 1;
    let Some(settings) = SETTINGS.get(slot) else {
        return XDP_PASS;
    };
    let walk = abi::walk(packet);
    let Walk {
        source,
        destination,
        selectors,
        ..
    } = walk;
    let (reason, ruling) = match walk.outcome {
        WalkOutcome::NotIp => (Reason::NotIp, Ruling::NONE),
        WalkOutcome::NotUnderstood => (Reason::NotUnderstood, Ruling::NONE),
        WalkOutcome::V4 => {
            let Some(groups) = GROUPS4.get(slot) else {
                return XDP_PASS;
            };
            decide(
                slot,
                selectors,
                find4(settings, groups, source[0]),
                settings.default4,
                || Key6 {
                    address: destination,
                    length: 4,
                },
                || find4(settings, groups, destination[0]),
            )
        }
        WalkOutcome::V6 => {
            let Some(groups) = GROUPS6.get(slot) else {
                return XDP_PASS;
            };
            decide(
                slot,
                selectors,
                find6(settings, groups, source[0], source[1]),
                settings.default6,
                || Key6 {
                    address: destination,
                    length: 6,
                },
                || find6(settings, groups, destination[0], destination[1]),
            )
        }
    };
    let length = packet.length() as u64;
    if ruling.is_some() && ruling.rule() < settings.rules_counted {
        if let Some(count) = RULES.get_ptr_mut(settings.rules_base.wrapping_add(ruling.rule())) {
            add(count, length);
        }
    }
    if let Some(count) = REASONS.get_ptr_mut(reason as u32) {
        let packets = add(count, length);
        if packets & settings.sample[reason as usize] == 0 {
            report(&context, generation, reason, ruling);
        }
    }
    if reason.is_drop() { XDP_DROP } else { XDP_PASS }
}

/// Asks for the source address, then for entries of prefix length 0, then for the destination address.
#[inline(always)]
fn decide(
    slot: u32,
    selectors: Selectors,
    source: Group,
    default: Group,
    local: impl FnOnce() -> Key6,
    destination: impl FnOnce() -> Group,
) -> (Reason, Ruling) {
    let mut ruling = judge(slot, source, selectors);
    if !ruling.is_some() && default != Group::NONE {
        // SAFETY: the reference is used for nothing but the comparison with null.
        let is_local = unsafe { LOCAL.get(local()) }.is_some();
        if !is_local {
            ruling = judge(slot, default, selectors);
        }
    }
    if ruling.is_some() {
        let reason = if ruling.is_deny() {
            Reason::ListSource
        } else {
            Reason::Allowed
        };
        return (reason, ruling);
    }
    let ruling = judge(slot, destination(), selectors);
    let reason = match (ruling.is_some(), ruling.is_deny()) {
        (false, _) => Reason::NoMatch,
        (true, false) => Reason::Allowed,
        (true, true) => Reason::ListDestination,
    };
    (reason, ruling)
}

#[inline(always)]
fn judge(slot: u32, group: Group, selectors: Selectors) -> Ruling {
    let row = group.cells();
    if row == 0 {
        group.ruling()
    } else {
        Ruling(judge_cells(slot, row, selectors.protocol, selectors.port))
    }
}

/// Reads the ruling from the row of cells that starts at `row`.
#[inline(never)]
fn judge_cells(slot: u32, row: u32, protocol: u32, port: u32) -> u32 {
    let Some(cells) = CELLS.get(slot) else { return 0 };
    let Some(&Cell { a, b }) = cells.get(row + Selectors { protocol, port }.class() as u32) else {
        return 0;
    };
    if b == 0 {
        return a;
    }
    let mut first = a;
    let mut size = b;
    for _ in 0..MAX_PORT_STEPS {
        if size <= 1 {
            break;
        }
        let half = size >> 1;
        let Some(middle) = cells.get(first.wrapping_add(half)) else {
            return 0;
        };
        if middle.a <= port {
            first = first.wrapping_add(half);
        }
        size -= half;
    }
    cells.get(first).map_or(0, |segment| segment.b)
}

/// The group of the longest prefix that holds `address`, whose upper half is 0.
#[inline(never)]
fn find4(settings: &Settings, groups: &Groups4, address: u64) -> Group {
    let address = address | u64::from(u32::MAX) << 32;
    let mut best = Group::NONE;
    let mut at = settings.root4;
    for _ in 0..MAX_LOOKUPS {
        if at == NO_NODE {
            break;
        }
        let node = node(&settings.tree4, at);
        let key = address & node.select;
        // SAFETY: a `Key4` is the word's bytes; the value is read once, right here.
        at = match unsafe { groups.get(&*(&raw const key).cast::<Key4>()) } {
            Some(group) => {
                best = *group;
                node.on_hit
            }
            None => node.on_miss,
        };
    }
    best
}

/// The group of the longest prefix that holds the address made of `high` and `low`.
#[inline(never)]
fn find6(settings: &Settings, groups: &Groups6, high: u64, low: u64) -> Group {
    let mut best = Group::NONE;
    let mut at = settings.root6;
    for _ in 0..MAX_LOOKUPS {
        if at == NO_NODE {
            break;
        }
        let node = node(&settings.tree6, at);
        let key = Key6 {
            address: [high & node.mask[0], low & node.mask[1]],
            length: node.length,
        };
        // SAFETY: the value is read once, right here.
        at = match unsafe { groups.get(key) } {
            Some(group) => {
                best = *group;
                node.on_hit
            }
            None => node.on_miss,
        };
    }
    best
}

/// The node of `tree` that starts `at` bytes from its start.
#[inline(always)]
fn node<T, const N: usize>(tree: &[T; N], at: u32) -> &T {
    const { assert!((N * size_of::<T>()).is_power_of_two() && size_of::<T>().is_power_of_two()) }
    let at = at as usize & (N * size_of::<T>() - size_of::<T>());
    // SAFETY: whatever `at` was, it is the start of a node inside the tree after masking.
    unsafe { &*tree.as_ptr().byte_add(at) }
}

/// Counts a packet of `length` bytes and returns its number.
#[inline(always)]
fn add(count: *mut Count, length: u64) -> u64 {
    // SAFETY: an element of a per-CPU array, which only this program on this CPU writes.
    let count = unsafe { &mut *count };
    count.bytes += length;
    count.packets += 1;
    count.packets
}

/// Writes an event; where the ring buffer is full, the sample is lost. Walks the packet again, so that packets
/// that are not reported need not keep what was found.
#[inline(never)]
fn report(context: &XdpContext, generation: u32, reason: Reason, ruling: Ruling) {
    let packet = Packet {
        start: context.data(),
        end: context.data_end(),
    };
    let Walk {
        outcome,
        source,
        destination,
        selectors,
    } = abi::walk(packet);
    let Some(mut entry) = EVENTS.reserve(0) else {
        return;
    };
    entry.write(Event {
        source,
        destination,
        reason: reason as u32,
        ruling,
        interface: context.ingress_ifindex() as u32,
        length: packet.length() as u32,
        version: match outcome {
            WalkOutcome::NotIp | WalkOutcome::NotUnderstood => 0,
            WalkOutcome::V4 => 4,
            WalkOutcome::V6 => 6,
        },
        protocol: selectors.protocol,
        port: selectors.port,
        generation,
    });
    entry.submit(0);
}

/// The frame between the context's two pointers.
#[derive(Clone, Copy)]
struct Packet {
    start: usize,
    end: usize,
}

impl Frame for Packet {
    type Window<const N: usize> = Bytes<N>;

    #[inline(always)]
    fn length(self) -> usize {
        self.end - self.start
    }

    #[inline(always)]
    fn window<const N: usize>(self, at: usize) -> Option<Bytes<N>> {
        let mut first = self.start + at;
        // Hides where the pointer comes from: checks that follow from checks of lengths would be left out as
        // redundant, but the verifier wants each pointer compared with the end of the packet.
        // SAFETY: does nothing.
        unsafe { asm!("/* {0} */", inout(reg) first, options(pure, nomem, nostack, preserves_flags)) };
        if first + N > self.end {
            None
        } else {
            Some(Bytes(first as *const u8))
        }
    }
}

/// `N` readable bytes. BPF loads need no alignment; the verifier holds every one of them to the bounds.
#[derive(Clone, Copy)]
struct Bytes<const N: usize>(*const u8);

impl<const N: usize> Bytes<N> {
    #[inline(always)]
    fn read<T: Copy, const AT: usize>(self) -> T {
        const { assert!(AT + size_of::<T>() <= N) }
        // SAFETY: inside the window, as asserted, and a `Window` is made only of bytes in the frame.
        unsafe { *self.0.add(AT).cast::<T>() }
    }
}

impl<const N: usize> Window<N> for Bytes<N> {
    #[inline(always)]
    fn byte<const AT: usize>(self) -> u8 {
        self.read::<u8, AT>()
    }

    #[inline(always)]
    fn raw16<const AT: usize>(self) -> u16 {
        self.read::<u16, AT>()
    }

    #[inline(always)]
    fn raw32<const AT: usize>(self) -> u32 {
        self.read::<u32, AT>()
    }

    #[inline(always)]
    fn raw64<const AT: usize>(self) -> u64 {
        self.read::<u64, AT>()
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
