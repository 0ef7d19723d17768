//! An interpreter, rbpf, runs the same bytecode on the same contents to the same verdicts, counts and events.
//!
//! rbpf has real addresses, of which the context holds 32 bits: the packet lies in memory that is mapped low, which
//! only x86-64 offers.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};

use common::frames::{frame, lists};
use proptest::collection::vec;
use proptest::prelude::*;
use tungate_bpf_abi::{Count, Event, Key6, REASONS, Reason, SLOTS, Settings};
use tungate_engine::policy::PolicySpec;
use tungate_prefilter::{
    Action, Backend, Error, Image, MAPS, OBJECT, Outcome, PacketEvent, Patch, Prefilter, Program, Sampling,
    Vm,
};

const NOW: u64 = 5;

proptest! {
    #[test]
    fn an_interpreter_comes_to_the_same(lists in lists(), more in lists(), frames in vec(frame(), 1..80)) {
        let mut vm = Vm::simulated(Sampling::ALL).expect("the object is sound");
        let mut other = Prefilter::new(Rbpf::new()).expect("lists fit");
        for lists in [lists, more] {
            let policy = PolicySpec { lists, ..PolicySpec::default() };
            vm.apply(&policy, NOW).expect("lists fit");
            other.apply(&policy, NOW).expect("lists fit");
            for frame in &frames {
                let (verdict, opinion) = (vm.run(frame), other.run(frame));
                prop_assert_eq!(verdict.expect("it runs"), opinion.expect("it runs"), "frame {:02x?}", frame);
            }
            prop_assert_eq!(vm.counters().expect("it counts"), other.counters().expect("it counts"));
            prop_assert_eq!(events(&mut vm), events(&mut other));
        }
    }
}

fn events<B: Backend>(prefilter: &mut Prefilter<B>) -> Vec<PacketEvent> {
    std::iter::from_fn(|| prefilter.next_event().expect("events can be read")).collect()
}

/// The maps as plain collections; what the program writes to are cells.
#[derive(Default)]
struct Maps {
    active: [u8; 4],
    settings: [Vec<u8>; SLOTS],
    groups4: [HashMap<[u8; 8], [u8; 8]>; SLOTS],
    groups6: [HashMap<[u8; 24], [u8; 8]>; SLOTS],
    cells: [Vec<[u8; 8]>; SLOTS],
    local: HashMap<[u8; 24], [u8; 4]>,
    reasons: [[Cell<u64>; 2]; REASONS],
    rules: Vec<[Cell<u64>; 2]>,
    record: [[Cell<u64>; 4]; 2],
    events: VecDeque<Event>,
}

thread_local! {
    /// rbpf's helpers are plain functions.
    static MAPS_IN_USE: RefCell<Maps> = RefCell::default();
}

/// Counters of rules per slot.
const RULES: u32 = 4096;

/// Marks what the program takes for a map's address.
const HANDLE: u64 = 1 << 62;

/// Inner maps are numbered behind the others.
const INNER: u64 = 16;

struct Rbpf {
    code: Vec<u8>,
    packet: LowMemory,
}

impl Rbpf {
    fn new() -> Self {
        let program = Program::parse(OBJECT).expect("the object is sound");
        let mut code = Vec::new();
        let mut is_upper_half = false;
        for instruction in program.code {
            let (mut registers, mut imm) = (
                instruction.dst_reg() | instruction.src_reg() << 4,
                instruction.imm,
            );
            let is_map = instruction.code == 0x18 && instruction.src_reg() == 1;
            if is_map {
                registers &= 0x0f;
            }
            if is_upper_half {
                imm = (HANDLE >> 32) as i32;
            }
            is_upper_half = is_map;
            code.extend([instruction.code, registers]);
            code.extend(instruction.off.to_le_bytes());
            code.extend(imm.to_le_bytes());
        }
        MAPS_IN_USE.set(Maps {
            rules: vec![Default::default(); RULES as usize * SLOTS],
            ..Maps::default()
        });
        Self {
            code,
            packet: LowMemory::new(),
        }
    }
}

/// Helper 1.
fn lookup(map: u64, key: u64, _: u64, _: u64, _: u64) -> u64 {
    fn read<const N: usize>(address: u64) -> [u8; N] {
        // SAFETY: keys have the sizes of their maps, which the machine under test checks.
        unsafe { std::ptr::read_unaligned(address as *const [u8; N]) }
    }
    fn place<T>(found: Option<&T>) -> u64 {
        found.map_or(0, |value| std::ptr::from_ref(value) as u64)
    }
    let (index, key4) = (map ^ HANDLE, u32::from_le_bytes(read(key)) as usize);
    MAPS_IN_USE.with_borrow(|maps| match index {
        0 => place(Some(&maps.active).filter(|_| key4 == 0)),
        1 => maps
            .settings
            .get(key4)
            .map_or(0, |settings| settings.as_ptr() as u64),
        2..=4 if key4 < SLOTS => HANDLE | (INNER + index * SLOTS as u64 + key4 as u64),
        5 => place(maps.local.get(&read(key))),
        6 => place(maps.reasons.get(key4)),
        7 => place(maps.rules.get(key4)),
        20 | 21 => place(maps.groups4[(index % 2) as usize].get(&read(key))),
        22 | 23 => place(maps.groups6[(index % 2) as usize].get(&read(key))),
        24 | 25 => place(maps.cells[(index % 2) as usize].get(key4)),
        _ => 0,
    })
}

/// Helper 131.
fn reserve(_: u64, size: u64, _: u64, _: u64, _: u64) -> u64 {
    assert_eq!(size, size_of::<Event>() as u64);
    MAPS_IN_USE.with_borrow(|maps| {
        let is_full = (maps.events.len() + 1) * (size as usize + 8) >= tungate_bpf_abi::EVENTS_BYTES;
        if is_full { 0 } else { maps.record.as_ptr() as u64 }
    })
}

/// Helper 132.
fn submit(_: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    MAPS_IN_USE.with_borrow_mut(|maps| {
        let bytes: Vec<u8> = maps
            .record
            .as_flattened()
            .iter()
            .flat_map(|word| word.get().to_le_bytes())
            .collect();
        maps.events
            .push_back(Event::from_bytes(bytes.first_chunk().expect("a whole record")));
    });
    0
}

impl Backend for Rbpf {
    fn fill(&mut self, slot: u32, image: &Image) -> Result<(), Error> {
        MAPS_IN_USE.with_borrow_mut(|maps| {
            let settings = Settings {
                sample: [0; REASONS],
                rules_base: slot * RULES,
                rules_counted: RULES,
                ..image.settings
            };
            let (first, slot) = ((slot * RULES) as usize, slot as usize);
            maps.settings[slot] = settings.to_bytes().to_vec();
            let groups4 = image
                .groups4
                .iter()
                .map(|(key, group)| (key.to_bytes(), group.to_bytes()));
            maps.groups4[slot] = groups4.collect();
            let groups6 = image
                .groups6
                .iter()
                .map(|(key, group)| (key.to_bytes(), group.to_bytes()));
            maps.groups6[slot] = groups6.collect();
            maps.cells[slot] = image.cells.iter().map(|cell| cell.to_bytes()).collect();
            maps.rules[first..first + RULES as usize].fill(Default::default());
        });
        Ok(())
    }

    fn activate(&mut self, generation: u32) -> Result<(), Error> {
        MAPS_IN_USE.with_borrow_mut(|maps| maps.active = generation.to_le_bytes());
        Ok(())
    }

    fn patch(&mut self, _: u32, _: &Patch) -> Result<(), Error> {
        unreachable!("this test changes whole lists only")
    }

    fn set_local(&mut self, addresses: &[Key6]) -> Result<(), Error> {
        let local = addresses.iter().map(|key| (key.to_bytes(), [1; 4])).collect();
        MAPS_IN_USE.with_borrow_mut(|maps| maps.local = local);
        Ok(())
    }

    fn reason_counts(&mut self) -> Result<[Count; REASONS], Error> {
        Ok(MAPS_IN_USE.with_borrow(|maps| maps.reasons.each_ref().map(count)))
    }

    fn rule_counts(&mut self, slot: u32) -> Result<Vec<(u32, Count)>, Error> {
        MAPS_IN_USE.with_borrow(|maps| {
            let counts = maps
                .rules
                .chunks_exact(RULES as usize)
                .nth(slot as usize)
                .expect("two slots");
            let counts = (0..).zip(counts.iter().map(count));
            Ok(counts.filter(|&(_, count)| count != Count::default()).collect())
        })
    }

    fn next_event(&mut self) -> Result<Option<Event>, Error> {
        Ok(MAPS_IN_USE.with_borrow_mut(|maps| maps.events.pop_front()))
    }

    fn run(&mut self, frame: &[u8]) -> Result<Outcome, Error> {
        let packet = self.packet.fill(frame);
        let start = packet.as_ptr() as u32;
        let context = [start, start + frame.len() as u32, start, 1, 0, 0];
        let context: Vec<u8> = context.into_iter().flat_map(u32::to_le_bytes).collect();
        let events = MAPS_IN_USE.with_borrow(|maps| maps.events.len());
        let mut machine = rbpf::EbpfVmMbuff::new(Some(&self.code)).expect("rbpf takes the program");
        machine.register_helper(1, lookup).expect("a helper");
        machine.register_helper(131, reserve).expect("a helper");
        machine.register_helper(132, submit).expect("a helper");
        // It looks at the first byte of an access only; the machine under test is the strict one.
        machine.register_allowed_memory(0..u64::MAX);
        let action = machine
            .execute_program(packet, &context)
            .expect("rbpf runs the program");
        let event = MAPS_IN_USE
            .with_borrow(|maps| maps.events.get(events).copied())
            .expect("an event per packet");
        Ok(Outcome {
            action: if action == 1 { Action::Drop } else { Action::Pass },
            reason: Reason::from_number(event.reason).expect("a reason"),
            rule: event.ruling.is_some().then(|| event.ruling.rule()),
        })
    }
}

fn count([packets, bytes]: &[Cell<u64>; 2]) -> Count {
    Count {
        packets: packets.get(),
        bytes: bytes.get(),
    }
}

/// Memory whose addresses fit 32 bits.
struct LowMemory(*mut libc::c_void);

impl LowMemory {
    const LENGTH: usize = 1 << 16;

    fn new() -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
        // SAFETY: asks for memory of its own.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), Self::LENGTH, protection, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self(start)
    }

    fn fill(&mut self, bytes: &[u8]) -> &[u8] {
        assert!(bytes.len() <= Self::LENGTH);
        // SAFETY: the memory is this long, and nobody else's.
        let memory = unsafe { std::slice::from_raw_parts_mut(self.0.cast::<u8>(), bytes.len()) };
        memory.copy_from_slice(bytes);
        memory
    }
}

impl Drop for LowMemory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and no longer borrowed.
        unsafe { libc::munmap(self.0, Self::LENGTH) };
    }
}

#[test]
fn maps_are_numbered_as_this_test_has_them() {
    use tungate_bpf_abi::map::{ACTIVE, CELLS, EVENTS, GROUPS4, GROUPS6, LOCAL, REASONS, RULES, SETTINGS};
    assert_eq!(
        MAPS,
        [
            ACTIVE, SETTINGS, GROUPS4, GROUPS6, CELLS, LOCAL, REASONS, RULES, EVENTS
        ]
    );
}
