//! What the program can reach: context, packet, stacks, maps, and the ring buffer's record at hand.
//!
//! Addresses are made up. The context's pointers are 32 bits wide, so everything but map values lies below 2³²:
//! the bits from 28 on name the region. The values of map `n` start at (n + 1)·2³². Every access is checked
//! against its region.

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher};

use aya_obj::generated::bpf_map_type;
use foldhash::fast::FixedState;
use hashbrown::HashTable;
use tungate_bpf_abi::Event;

use super::Fault;
use crate::object::{MapDefinition, MapShape, ObjectError, index};

const CONTEXT: u64 = 0x1000_0000;
const PACKET: u64 = 0x2000_0000;
const STACK: u64 = 0x3000_0000;
const RECORD: u64 = 0x4000_0000;
const REGION_MASK: u64 = 0x0fff_ffff;

/// Bytes of stack for each function.
const FRAME: usize = 512;

/// Deepest nesting of calls, as in the kernel.
const MAX_FRAMES: usize = 8;

/// Marks a map's handle; the rest is the map's index.
const HANDLE: u64 = 1 << 62;

/// Most rounds of loops in one run: far more than the verifier's bounded loops can take.
const FUEL: u32 = 1 << 12;

/// Length of `struct xdp_md`.
const CONTEXT_LENGTH: usize = 24;

/// Bytes the ring buffer puts before each record.
const RECORD_HEADER: usize = 8;

/// Everything but code and registers.
#[derive(Debug, Clone)]
pub(super) struct Memory {
    context: [u8; CONTEXT_LENGTH],
    stack: [u8; FRAME * MAX_FRAMES],
    pub(super) maps: Vec<MapMemory>,
    record: Option<[u8; size_of::<Event>()]>,
    events: VecDeque<Event>,
    ring_bytes: usize,
    fuel: u32,
    /// Keys of the latest lookups in [`WATCHED`].
    pub(super) watched: [Option<u32>; 2],
}

/// One map's contents.
#[derive(Debug, Clone)]
pub(super) struct MapMemory {
    pub(super) kind: MapKind,
    value_size: usize,
    entries: u32,
    values: Vec<u8>,
    /// Places of values whose keys were removed.
    free: Vec<u32>,
}

/// How a map finds its values.
#[derive(Debug, Clone)]
pub(super) enum MapKind {
    /// By index; the per-CPU kind is the same on one CPU.
    Array,
    /// By a key of 8 bytes.
    Hash8(HashTable<(u64, u32)>),
    /// By a key of 24 bytes.
    Hash24(HashTable<([u64; 3], u32)>),
    /// By index, another map's handle.
    Maps(Vec<Option<u32>>),
    /// Not at all.
    Ring,
}

impl MapMemory {
    /// An empty map.
    pub(super) fn new(name: &str, shape: &MapShape) -> Result<Self, ObjectError> {
        let unknown = || ObjectError::MapKind {
            name: name.to_owned(),
        };
        let kind = bpf_map_type::try_from(shape.kind).map_err(|_| unknown())?;
        let kind = match (kind, shape.key_size) {
            (bpf_map_type::BPF_MAP_TYPE_ARRAY | bpf_map_type::BPF_MAP_TYPE_PERCPU_ARRAY, 4) => MapKind::Array,
            (bpf_map_type::BPF_MAP_TYPE_HASH, 8) => MapKind::Hash8(HashTable::new()),
            (bpf_map_type::BPF_MAP_TYPE_HASH, 24) => MapKind::Hash24(HashTable::new()),
            (bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS, 4) => {
                MapKind::Maps(vec![None; shape.max_entries as usize])
            }
            (bpf_map_type::BPF_MAP_TYPE_RINGBUF, _) => MapKind::Ring,
            _ => return Err(unknown()),
        };
        let mut map = Self {
            kind,
            value_size: shape.value_size as usize,
            entries: shape.max_entries,
            values: Vec::new(),
            free: Vec::new(),
        };
        if matches!(map.kind, MapKind::Array) {
            map.resize(shape.max_entries);
        }
        Ok(map)
    }

    /// Gives an array `entries` elements; new ones are zero.
    pub(super) fn resize(&mut self, entries: u32) {
        self.entries = entries;
        self.values.resize(entries as usize * self.value_size, 0);
    }

    /// Empties a hash and gives it room for `entries` elements.
    pub(super) fn clear(&mut self, entries: u32) {
        self.entries = entries;
        self.values.clear();
        self.free.clear();
        match &mut self.kind {
            MapKind::Hash8(table) => *table = HashTable::with_capacity(entries as usize),
            MapKind::Hash24(table) => *table = HashTable::with_capacity(entries as usize),
            MapKind::Array | MapKind::Maps(_) | MapKind::Ring => {}
        }
    }

    /// Writes an array's element.
    pub(super) fn set(&mut self, index: u32, value: &[u8]) {
        let at = index as usize * self.value_size;
        self.values[at..at + self.value_size].copy_from_slice(value);
    }

    /// An array's element.
    pub(super) fn get(&self, index: u32) -> &[u8] {
        let at = index as usize * self.value_size;
        &self.values[at..at + self.value_size]
    }

    /// Inserts or replaces a hash's element.
    pub(super) fn insert(&mut self, key: &[u8], value: &[u8]) {
        let end = (self.values.len() / self.value_size) as u32;
        let next = self.free.last().copied().unwrap_or(end);
        let index = match &mut self.kind {
            MapKind::Hash8(table) => upsert(table, key8(key), hash8, next),
            MapKind::Hash24(table) => upsert(table, key24(key), hash24, next),
            MapKind::Array | MapKind::Maps(_) | MapKind::Ring => return,
        };
        if index == next {
            self.free.pop();
        }
        if index == end {
            self.values.extend_from_slice(value);
        } else {
            self.set(index, value);
        }
    }

    /// Removes a hash's element.
    pub(super) fn remove(&mut self, key: &[u8]) {
        self.free.extend(match &mut self.kind {
            MapKind::Hash8(table) => delete(table, key8(key), hash8),
            MapKind::Hash24(table) => delete(table, key24(key), hash24),
            MapKind::Array | MapKind::Maps(_) | MapKind::Ring => None,
        });
    }
}

fn upsert<K: Copy + Eq>(table: &mut HashTable<(K, u32)>, key: K, hash: fn(&K) -> u64, next: u32) -> u32 {
    table
        .entry(hash(&key), |(other, _)| *other == key, |(key, _)| hash(key))
        .or_insert((key, next))
        .get()
        .1
}

fn delete<K: Copy + Eq>(table: &mut HashTable<(K, u32)>, key: K, hash: fn(&K) -> u64) -> Option<u32> {
    let entry = table.find_entry(hash(&key), |(other, _)| *other == key).ok()?;
    Some(entry.remove().0.1)
}

#[inline]
fn key8(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("the map's keys have 8 bytes"))
}

#[inline]
fn key24(bytes: &[u8]) -> [u64; 3] {
    let word = |at: usize| key8(&bytes[at..at + 8]);
    [word(0), word(8), word(16)]
}

/// Not keyed: packets look keys up, but only the operator puts them in.
const HASHER: FixedState = FixedState::with_seed(0);

#[inline]
fn hash8(key: &u64) -> u64 {
    HASHER.hash_one(key)
}

#[inline]
fn hash24(key: &[u64; 3]) -> u64 {
    let mut hasher = HASHER.build_hasher();
    key.iter().for_each(|&word| hasher.write_u64(word));
    hasher.finish()
}

impl Memory {
    /// Lays out the maps of `definitions`, and behind them the two slots' inner maps of each map of maps.
    pub(super) fn new(definitions: &[MapDefinition]) -> Result<Self, ObjectError> {
        let mut maps = Vec::new();
        for definition in definitions {
            maps.push(MapMemory::new(&definition.name, &definition.shape)?);
        }
        for (index, definition) in definitions.iter().enumerate() {
            let Some(inner) = &definition.inner else { continue };
            for slot in 0..definition.shape.max_entries as usize {
                let inner_index = maps.len() as u32;
                maps.push(MapMemory::new(&definition.name, inner)?);
                if let MapKind::Maps(slots) = &mut maps[index].kind {
                    slots[slot] = Some(inner_index);
                }
            }
        }
        Ok(Self {
            context: [0; CONTEXT_LENGTH],
            stack: [0; FRAME * MAX_FRAMES],
            maps,
            record: None,
            events: VecDeque::new(),
            ring_bytes: 0,
            fuel: 0,
            watched: [None; 2],
        })
    }

    /// The inner map in `slot` of the map of maps `index`.
    pub(super) fn inner(&mut self, index: usize, slot: u32) -> &mut MapMemory {
        let inner = match &self.maps[index].kind {
            MapKind::Maps(slots) => slots[slot as usize].expect("every slot was given a map"),
            MapKind::Array | MapKind::Hash8(_) | MapKind::Hash24(_) | MapKind::Ring => index as u32,
        };
        &mut self.maps[inner as usize]
    }

    /// What the program takes for the address of a map.
    pub(super) const fn handle(map: u32) -> u64 {
        HANDLE | map as u64
    }

    /// Pays for one round of a loop.
    pub(super) fn spend(&mut self) -> Result<(), Fault> {
        self.fuel = self.fuel.checked_sub(1).ok_or(Fault::Fuel)?;
        Ok(())
    }

    /// Gets ready for a frame that came in on `interface`; returns the context's address.
    pub(super) fn enter(&mut self, frame: &[u8], interface: u32) -> u64 {
        let start = PACKET as u32;
        let end = start + frame.len() as u32;
        for (word, value) in [start, end, start, interface, 0, 0].into_iter().enumerate() {
            self.context[word * 4..word * 4 + 4].copy_from_slice(&value.to_le_bytes());
        }
        self.record = None;
        self.fuel = FUEL;
        self.watched = [None; 2];
        CONTEXT
    }

    /// Longest frame that fits its region.
    pub(super) const MAX_FRAME: usize = REGION_MASK as usize;

    /// Address of the byte behind the stack frame `depth`.
    pub(super) const fn frame_pointer(depth: usize) -> u64 {
        STACK + ((depth + 1) * FRAME) as u64
    }

    #[inline(always)]
    pub(super) fn load<const N: usize>(&self, packet: &[u8], address: u64) -> Result<[u8; N], Fault> {
        let bytes = if address >> 28 == PACKET >> 28 {
            part(packet, address)
        } else if address >> 32 != 0 {
            let map = self.maps.get((address >> 32) as usize - 1);
            map.and_then(|map| map.values.get(address as u32 as usize..))
                .and_then(|values| values.first_chunk())
                .copied()
        } else {
            match address & !REGION_MASK {
                CONTEXT => part(&self.context, address),
                STACK => part(&self.stack[..], address),
                RECORD => self.record.as_ref().and_then(|record| part(record, address)),
                _ => None,
            }
        };
        bytes.ok_or(Fault::Load { address, size: N })
    }

    #[inline(always)]
    pub(super) fn store<const N: usize>(&mut self, address: u64, value: [u8; N]) -> Result<(), Fault> {
        let at = (address & REGION_MASK) as usize;
        let place = if address >> 32 != 0 {
            let map = self.maps.get_mut((address >> 32) as usize - 1);
            map.and_then(|map| map.values.get_mut(address as u32 as usize..))
                .and_then(|values| values.get_mut(..N))
        } else {
            match address & !REGION_MASK {
                STACK => self.stack.get_mut(at..at + N),
                RECORD => self.record.as_mut().and_then(|record| record.get_mut(at..at + N)),
                _ => None,
            }
        };
        place
            .ok_or(Fault::Store { address, size: N })?
            .copy_from_slice(&value);
        Ok(())
    }

    /// Helper 1: the address of the value, the handle of the inner map, or 0.
    #[inline(always)] // the handle and mostly the key are known where it is called
    pub(super) fn lookup(&mut self, packet: &[u8], handle: u64, key: u64) -> Result<u64, Fault> {
        let index = handle ^ HANDLE;
        let map = usize::try_from(index).ok().and_then(|index| self.maps.get(index));
        let map = map.ok_or(Fault::NoMap { handle })?;
        let at = match &map.kind {
            MapKind::Array => {
                let key = u32::from_le_bytes(self.load(packet, key)?);
                if key >= map.entries {
                    return Ok(0);
                }
                if index == WATCHED[0] {
                    self.watched[0] = Some(key);
                } else if index == WATCHED[1] {
                    self.watched[1] = Some(key);
                }
                key
            }
            MapKind::Hash8(table) => {
                let key = u64::from_le_bytes(self.load(packet, key)?);
                match table.find(hash8(&key), |(other, _)| *other == key) {
                    Some(&(_, at)) => at,
                    None => return Ok(0),
                }
            }
            MapKind::Hash24(table) => {
                let key = key24(&self.load::<24>(packet, key)?);
                match table.find(hash24(&key), |(other, _)| *other == key) {
                    Some(&(_, at)) => at,
                    None => return Ok(0),
                }
            }
            MapKind::Maps(slots) => {
                let key = u32::from_le_bytes(self.load(packet, key)?);
                let inner = slots.get(key as usize).copied().flatten();
                return Ok(inner.map_or(0, |inner| HANDLE | u64::from(inner)));
            }
            MapKind::Ring => return Err(Fault::NoMap { handle }),
        };
        Ok(((index + 1) << 32) + at as u64 * self.maps[index as usize].value_size as u64)
    }

    /// Helper 131: the address of a new record, or 0 when the ring buffer is full.
    pub(super) fn reserve(&mut self, handle: u64, size: u64) -> Result<u64, Fault> {
        let map = self
            .maps
            .get((handle ^ HANDLE) as usize)
            .ok_or(Fault::NoMap { handle })?;
        if !matches!(map.kind, MapKind::Ring) || size != size_of::<Event>() as u64 || self.record.is_some() {
            return Err(Fault::Record);
        }
        // As the kernel does: a full ring would look like an empty one.
        if self.ring_bytes + RECORD_HEADER + size_of::<Event>() >= map.entries as usize {
            return Ok(0);
        }
        self.record = Some([0; size_of::<Event>()]);
        Ok(RECORD)
    }

    /// Helper 132: hands the record to the reader.
    pub(super) fn submit(&mut self, address: u64) -> Result<u64, Fault> {
        let record = self
            .record
            .take()
            .filter(|_| address == RECORD)
            .ok_or(Fault::Record)?;
        self.ring_bytes += RECORD_HEADER + record.len();
        self.events.push_back(Event::from_bytes(&record));
        Ok(0)
    }

    /// Takes the oldest event.
    pub(super) fn pop_event(&mut self) -> Option<Event> {
        let event = self.events.pop_front()?;
        self.ring_bytes -= RECORD_HEADER + size_of::<Event>();
        Some(event)
    }

    /// Whether a record was reserved and not submitted, which the verifier would not have allowed.
    pub(super) fn has_open_record(&self) -> bool {
        self.record.is_some()
    }
}

/// Maps whose latest key is kept: counters by reason, and by rule.
const WATCHED: [u64; 2] = [index::REASONS as u64, index::RULES as u64];

#[inline(always)]
fn part<const N: usize>(bytes: &[u8], address: u64) -> Option<[u8; N]> {
    let at = (address & REGION_MASK) as usize;
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{OBJECT, Program};

    fn memory() -> Memory {
        Memory::new(&Program::parse(OBJECT).expect("the object is sound").maps).expect("its maps are known")
    }

    #[test]
    fn nothing_outside_of_the_packet_can_be_read_and_nothing_in_it_written() {
        let mut memory = memory();
        let packet = [7; 60];
        memory.enter(&packet, 1);
        assert_eq!(memory.load(&packet, PACKET + 56), Ok([7; 4]));
        for address in [PACKET - 1, PACKET + 57, PACKET + 60, u64::MAX] {
            assert_eq!(
                memory.load::<4>(&packet, address),
                Err(Fault::Load { address, size: 4 })
            );
        }
        assert_eq!(
            memory.store(PACKET, [0]),
            Err(Fault::Store {
                address: PACKET,
                size: 1
            })
        );
        assert_eq!(
            memory.store(CONTEXT, [0]),
            Err(Fault::Store {
                address: CONTEXT,
                size: 1
            })
        );
    }

    #[test]
    fn stack_and_map_values_end_where_they_end() {
        let mut memory = memory();
        let bottom = Memory::frame_pointer(MAX_FRAMES - 1);
        assert_eq!(memory.store(bottom - 8, [1; 8]), Ok(()));
        assert_eq!(memory.load(&[], bottom - 8), Ok([1; 8]));
        assert_eq!(
            memory.store(bottom - 4, [1; 8]),
            Err(Fault::Store {
                address: bottom - 4,
                size: 8
            })
        );
        assert_eq!(memory.store(STACK, [0; 4]), Ok(()), "key 0");
        let value = memory
            .lookup(&[], Memory::handle(index::ACTIVE as u32), STACK)
            .expect("it has a key 0");
        assert_eq!(memory.load(&[], value), Ok([0; 4]));
        assert_eq!(
            memory.load::<8>(&[], value),
            Err(Fault::Load {
                address: value,
                size: 8
            })
        );
    }

    #[test]
    fn only_maps_are_looked_up_in() {
        let mut memory = memory();
        for handle in [0, 5, Memory::handle(999), HANDLE | 1 << 32, u64::MAX] {
            assert_eq!(memory.lookup(&[], handle, STACK), Err(Fault::NoMap { handle }));
        }
        let key = 3;
        let reasons = Memory::handle(index::REASONS as u32);
        assert_eq!(
            memory.lookup(&[], reasons, key),
            Err(Fault::Load {
                address: key,
                size: 4
            })
        );
    }

    #[test]
    fn a_record_is_reserved_once_and_submitted_once() {
        let mut memory = memory();
        let (ring, size) = (Memory::handle(8), size_of::<Event>() as u64);
        assert_eq!(memory.reserve(ring, size + 8), Err(Fault::Record));
        assert_eq!(memory.reserve(Memory::handle(0), size), Err(Fault::Record));
        assert_eq!(memory.submit(RECORD), Err(Fault::Record));
        assert_eq!(memory.reserve(ring, size), Ok(RECORD));
        assert_eq!(memory.reserve(ring, size), Err(Fault::Record));
        assert!(memory.has_open_record());
        assert_eq!(
            memory.store(RECORD + size - 4, [0; 8]),
            Err(Fault::Store {
                address: RECORD + size - 4,
                size: 8
            })
        );
        assert_eq!(memory.submit(RECORD), Ok(0));
        assert_eq!(
            memory.load::<4>(&[], RECORD),
            Err(Fault::Load {
                address: RECORD,
                size: 4
            })
        );
        assert!(memory.pop_event().is_some());
    }

    #[test]
    fn loops_come_to_an_end() {
        let mut memory = memory();
        memory.enter(&[], 1);
        let rounds = std::iter::repeat_with(|| memory.spend())
            .take_while(Result::is_ok)
            .count();
        assert_eq!(rounds, FUEL as usize);
    }
}
