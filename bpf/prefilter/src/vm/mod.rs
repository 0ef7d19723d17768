//! The program in a virtual machine: no kernel, no root, no unsafe code, the same on every machine.
//!
//! The committed bytecode is translated to Rust instruction by instruction when this crate is built, and runs at the
//! speed of compiled code. Addresses are made up and every access is checked, so that what the kernel's verifier
//! proves is tested here packet by packet: what it would not allow is a [`Fault`].
#![forbid(unsafe_code)]

mod bytecode;
mod memory;

use tungate_bpf_abi::{Count, Event, Key6, REASONS, Reason, Settings};

use self::memory::Memory;
use crate::backend::{Action, Backend, Outcome, Sampling};
use crate::error::Error;
use crate::object::{OBJECT, Program, index};
use crate::prefilter::Prefilter;
use crate::tables::{Image, Patch};

/// The pre-filter in the virtual machine.
pub type Vm = Prefilter<Machine>;

/// What the program must not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A read outside of everything the program may reach.
    #[error("it reads {size} bytes at {address:#x}, outside of its memory")]
    Load {
        /// Made-up address.
        address: u64,
        /// Number of bytes.
        size: usize,
    },
    /// A write outside of everything the program may change.
    #[error("it writes {size} bytes at {address:#x}, outside of its memory")]
    Store {
        /// Made-up address.
        address: u64,
        /// Number of bytes.
        size: usize,
    },
    /// A lookup in something that is no map.
    #[error("{handle:#x} is not the handle of a map")]
    NoMap {
        /// What was taken for a handle.
        handle: u64,
    },
    /// A ring buffer record of the wrong size, submitted without being reserved, or the other way round.
    #[error("it mishandles a ring buffer record")]
    Record,
    /// Too many loops.
    #[error("it does not come to an end")]
    Fuel,
    /// An action other than PASS and DROP, or one that contradicts the reason that was counted.
    #[error("it ends with action {action}, which does not go with what it counted")]
    Action {
        /// What the program returned.
        action: u64,
    },
    /// A frame too long for any network.
    #[error("a frame of {length} bytes is too long")]
    FrameLength {
        /// Bytes in the frame.
        length: usize,
    },
}

/// The program with its maps.
#[derive(Debug, Clone)]
pub struct Machine {
    memory: Memory,
    sampling: Sampling,
    /// First rule's counter and number of counters, by slot.
    counters: [(u32, u32); 2],
    /// What the program sees as the index of the interface.
    interface: u32,
}

impl Prefilter<Machine> {
    /// The committed program with empty lists; events as `sampling` says.
    ///
    /// # Errors
    ///
    /// [`Error::Object`] if the committed object cannot be used, which a build that passes its tests rules out.
    pub fn simulated(sampling: Sampling) -> Result<Self, Error> {
        Self::new(Machine::new(sampling)?)
    }
}

impl Machine {
    /// Lays out the program's maps; frames come in on interface 1.
    ///
    /// # Errors
    ///
    /// [`Error::Object`], as for [`Prefilter::simulated`].
    pub fn new(sampling: Sampling) -> Result<Self, Error> {
        let program = Program::parse(OBJECT)?;
        Ok(Self {
            memory: Memory::new(&program.maps)?,
            sampling,
            counters: [(0, 0); 2],
            interface: 1,
        })
    }

    /// Places `count` counters for `slot` where they do not touch the other slot's.
    fn place_counters(&mut self, slot: u32, count: u32) {
        let (other_first, other_count) = self.counters[slot as usize ^ 1];
        let first = if other_first >= count {
            0
        } else {
            other_first + other_count
        };
        let map = &mut self.memory.maps[index::RULES];
        let zero = [0; size_of::<Count>()];
        map.resize((first + count).max(other_first + other_count));
        for rule in first..first + count {
            map.set(rule, &zero);
        }
        self.counters[slot as usize] = (first, count);
    }

    fn count(&self, map: usize, element: u32) -> Count {
        let bytes = self.memory.maps[map].get(element);
        Count::from_bytes(bytes.try_into().expect("counters have the size of a count"))
    }
}

impl Backend for Machine {
    fn fill(&mut self, slot: u32, image: &Image) -> Result<(), Error> {
        self.place_counters(slot, image.room.rules);
        let (rules_base, rules_counted) = self.counters[slot as usize];
        let settings = Settings {
            sample: self.sampling.masks(),
            rules_base,
            rules_counted,
            ..image.settings
        };
        self.memory.maps[index::SETTINGS].set(slot, &settings.to_bytes());

        let groups4 = self.memory.inner(index::GROUPS4, slot);
        groups4.clear(image.room.groups4);
        for (key, group) in &image.groups4 {
            groups4.insert(&key.to_bytes(), &group.to_bytes());
        }
        let groups6 = self.memory.inner(index::GROUPS6, slot);
        groups6.clear(image.room.groups6);
        for (key, group) in &image.groups6 {
            groups6.insert(&key.to_bytes(), &group.to_bytes());
        }
        let cells = self.memory.inner(index::CELLS, slot);
        cells.resize(image.room.cells);
        for (at, cell) in image.cells.iter().enumerate() {
            cells.set(at as u32, &cell.to_bytes());
        }
        Ok(())
    }

    fn activate(&mut self, generation: u32) -> Result<(), Error> {
        self.memory.maps[index::ACTIVE].set(0, &generation.to_le_bytes());
        Ok(())
    }

    fn patch(&mut self, slot: u32, patch: &Patch) -> Result<(), Error> {
        let cells = self.memory.inner(index::CELLS, slot);
        for (at, cell) in patch.cells.iter().enumerate() {
            cells.set(patch.first_cell + at as u32, &cell.to_bytes());
        }
        let groups4 = self.memory.inner(index::GROUPS4, slot);
        for (key, group) in &patch.groups4 {
            match group {
                Some(group) => groups4.insert(&key.to_bytes(), &group.to_bytes()),
                None => groups4.remove(&key.to_bytes()),
            }
        }
        let groups6 = self.memory.inner(index::GROUPS6, slot);
        for (key, group) in &patch.groups6 {
            match group {
                Some(group) => groups6.insert(&key.to_bytes(), &group.to_bytes()),
                None => groups6.remove(&key.to_bytes()),
            }
        }
        Ok(())
    }

    fn set_local(&mut self, addresses: &[Key6]) -> Result<(), Error> {
        let local = &mut self.memory.maps[index::LOCAL];
        local.clear(addresses.len() as u32);
        for key in addresses {
            local.insert(&key.to_bytes(), &1u32.to_le_bytes());
        }
        Ok(())
    }

    fn reason_counts(&mut self) -> Result<[Count; REASONS], Error> {
        Ok(Reason::ALL.map(|reason| self.count(index::REASONS, reason as u32)))
    }

    fn rule_counts(&mut self, slot: u32) -> Result<Vec<(u32, Count)>, Error> {
        let (first, count) = self.counters[slot as usize];
        let counts = (0..count).map(|rule| (rule, self.count(index::RULES, first + rule)));
        Ok(counts.filter(|&(_, count)| count != Count::default()).collect())
    }

    fn next_event(&mut self) -> Result<Option<Event>, Error> {
        Ok(self.memory.pop_event())
    }

    fn run(&mut self, frame: &[u8]) -> Result<Outcome, Error> {
        if frame.len() > Memory::MAX_FRAME {
            return Err(Fault::FrameLength { length: frame.len() }.into());
        }
        let context = self.memory.enter(frame, self.interface);
        let action = bytecode::run(&mut self.memory, frame, context)?;
        if self.memory.has_open_record() {
            return Err(Fault::Record.into());
        }
        let [reason, rule] = self.memory.watched;
        let contradiction = Error::Fault(Fault::Action { action });
        let Some(reason) = reason.and_then(Reason::from_number) else {
            return Err(contradiction);
        };
        let action = match (action, reason.is_drop()) {
            (XDP_PASS, false) => Action::Pass,
            (XDP_DROP, true) => Action::Drop,
            _ => return Err(contradiction),
        };
        let active = self.memory.maps[index::ACTIVE].get(0)[0] & 1;
        let (first, _) = self.counters[usize::from(active)];
        Ok(Outcome {
            action,
            reason,
            rule: rule.map(|rule| rule - first),
        })
    }
}

const XDP_DROP: u64 = 1;
const XDP_PASS: u64 = 2;
