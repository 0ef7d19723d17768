//! The program in the kernel, on a network interface or run frame by frame.
//!
//! Lists are filled into fresh maps of the slot that is not in use, and taken into use by writing the generation.
//! Setting an inner map makes the kernel wait until every run of a program that could have seen the one before has
//! ended (an RCU grace period, some milliseconds); that wait also makes changes in place sound. The kernel gives the
//! memory of an element that was replaced or removed to the next one at once, while a packet may still be reading
//! it: so there is one wait after a replacement or removal, before the next write.

mod attach;
mod error;
mod sys;

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use aya::maps::{ArrayOfMaps, Map, MapData, RingBuf};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use aya_obj::generated::bpf_map_type;
use rustix::process::{Resource, Rlimit, setrlimit};
use tungate_bpf_abi::{Cell, Count, Event, Group, Key4, Key6, REASONS, Reason, SLOTS, Settings, map};

pub use self::attach::{Attached, Mode, Wanted, pinned, remove_pinned};
pub use self::error::KernelError;
use crate::backend::{Action, Backend, Outcome, Sampling};
use crate::error::Error;
use crate::object::{OBJECT, PROGRAM};
use crate::prefilter::Prefilter;
use crate::tables::{Image, Patch, Room};

/// Inner arrays may differ in size.
const BPF_F_INNER_MAP: u32 = 1 << 12;

/// Shortest frame a single run takes.
const FRAME_MIN: usize = 14;

/// Longest frame a single run takes: a page without head room and the space for an `skb_shared_info`.
const FRAME_MAX: usize = 3_400;

/// How the program is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Which packets are reported as events.
    pub sampling: Sampling,
    /// List entries, from the first on, that have a counter of their own; drops by others are counted by reason
    /// only. Each takes 32 bytes per CPU.
    pub counted_rules: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            sampling: Sampling::default(),
            counted_rules: 1 << 16,
        }
    }
}

/// The program, loaded into the kernel with its maps. Dropping it detaches it, unless it has been pinned.
pub struct Kernel {
    ebpf: Ebpf,
    maps: Maps,
    /// Inner maps by slot and [`Part`].
    slots: [[Inner; PARTS.len()]; SLOTS],
    active: u32,
    options: Options,
    link: Option<(Attached, Link)>,
    local: Vec<Key6>,
    /// Whether an element's memory may be given to another while it is read.
    is_dirty: bool,
    /// Events of single runs.
    events: VecDeque<Event>,
}

/// What keeps the program attached.
#[derive(Debug)]
enum Link {
    /// This process.
    Held(FdLink),
    /// A file.
    Pinned(PinnedLink),
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { options, link, .. } = self;
        f.debug_struct("Kernel")
            .field("options", options)
            .field("link", link)
            .finish_non_exhaustive()
    }
}

struct Maps {
    active: MapData,
    settings: MapData,
    /// What the slots hold, by [`Part`].
    parts: [ArrayOfMaps<MapData, MapData>; PARTS.len()],
    local: MapData,
    reasons: MapData,
    rules: MapData,
    events: RingBuf<MapData>,
}

/// A kind of inner map.
#[derive(Clone, Copy)]
enum Part {
    Groups4,
    Groups6,
    Cells,
}

const PARTS: [Part; 3] = [Part::Groups4, Part::Groups6, Part::Cells];

/// An inner map.
struct Inner {
    map: MapData,
    part: Part,
    /// How many elements it has room for.
    room: u32,
    /// Whether nothing has been written to it.
    is_empty: bool,
}

/// Inner maps with more room than this are not kept once their generation is over.
const KEPT_ROOM: u32 = 1 << 16;

impl Prefilter<Kernel> {
    /// Loads the committed program with empty lists; it is attached nowhere yet.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] where the kernel will not.
    pub fn load(options: Options) -> Result<Self, Error> {
        Self::new(Kernel::new(options)?)
    }
}

impl Kernel {
    /// Loads the committed program.
    ///
    /// # Errors
    ///
    /// [`KernelError`] where the kernel will not.
    pub fn new(options: Options) -> Result<Self, KernelError> {
        lift_memory_lock();
        let counters = options.counted_rules.max(1).saturating_mul(SLOTS as u32);
        let mut ebpf = EbpfLoader::new()
            .btf(None)
            .verifier_log_level(error::VERIFIER_LOG)
            .map_max_entries(map::RULES, counters)
            .load(OBJECT)
            .map_err(KernelError::loading)?;
        let program = program(&mut ebpf);
        program
            .load()
            .map_err(|error| KernelError::program("cannot load the XDP program", error))?;
        let maps = Maps::take(&mut ebpf)?;
        let empty = || -> Result<_, KernelError> {
            Ok([
                Inner::empty(Part::Groups4)?,
                Inner::empty(Part::Groups6)?,
                Inner::empty(Part::Cells)?,
            ])
        };
        let slots = [empty()?, empty()?];
        let mut kernel = Self {
            ebpf,
            maps,
            slots,
            active: 0,
            options,
            link: None,
            local: Vec::new(),
            is_dirty: false,
            events: VecDeque::new(),
        };
        for slot in 0..SLOTS as u32 {
            kernel.settings(slot, &Settings::EMPTY)?;
            for part in PARTS {
                kernel.install(slot, Inner::empty(part)?)?;
            }
        }
        Ok(kernel)
    }

    /// Attaches the program to an interface of this thread's network namespace; it is taken from where it was.
    ///
    /// # Errors
    ///
    /// [`KernelError`] with the reason of each mode that was tried.
    pub fn attach(&mut self, interface: &str, wanted: Wanted) -> Result<&Attached, KernelError> {
        self.link = None;
        let (attached, link) = attach::attach(program(&mut self.ebpf), interface, wanted)?;
        Ok(&self.link.insert((attached, Link::Held(link))).0)
    }

    /// Takes the place of the program on a link that an earlier loader has pinned in `folder`, without a moment in
    /// which packets go unfiltered. `None` if there is no such link, or if its interface is gone.
    ///
    /// # Errors
    ///
    /// [`KernelError`] where the kernel will not.
    pub fn take_over(&mut self, interface: &str, folder: &Path) -> Result<Option<&Attached>, KernelError> {
        let found = attach::take_over(program(&mut self.ebpf), interface, folder)?;
        let Some((attached, link)) = found else {
            return Ok(None);
        };
        Ok(Some(&self.link.insert((attached, Link::Pinned(link))).0))
    }

    /// Pins the link in `folder`, so that the program stays attached when this process ends. A BPF file system is
    /// mounted there if it is not in one.
    ///
    /// # Errors
    ///
    /// [`KernelError::NoBpfFs`] and others; then, and where nothing is attached, nothing is pinned.
    pub fn pin(&mut self, folder: &Path) -> Result<(), KernelError> {
        self.link = match self.link.take() {
            Some((attached, Link::Held(link))) => {
                let pinned = attach::pin(link, &attached, folder)?;
                Some((attached, Link::Pinned(pinned)))
            }
            other => other,
        };
        Ok(())
    }

    /// Undoes [`Self::pin`]: the program is attached as long as this process holds it.
    ///
    /// # Errors
    ///
    /// [`KernelError::Io`] if the file cannot be removed.
    pub fn unpin(&mut self) -> Result<(), KernelError> {
        self.link = match self.link.take() {
            Some((attached, Link::Pinned(link))) => {
                let link = link
                    .unpin()
                    .map_err(|error| KernelError::new("cannot unpin the program", error))?;
                Some((attached, Link::Held(link)))
            }
            other => other,
        };
        Ok(())
    }

    /// Detaches the program from its interface, also if it was pinned.
    ///
    /// # Errors
    ///
    /// [`KernelError::Io`] if a pinned link's file cannot be removed.
    pub fn detach(&mut self) -> Result<(), KernelError> {
        self.unpin()?;
        self.link = None;
        Ok(())
    }

    /// Where the program is attached.
    pub fn attached(&self) -> Option<&Attached> {
        self.link.as_ref().map(|(attached, _)| attached)
    }

    /// Becomes readable when there are events; see [`Prefilter::next_event`].
    pub fn events_fd(&self) -> BorrowedFd<'_> {
        self.maps.events.as_fd()
    }

    fn settings(&mut self, slot: u32, settings: &Settings) -> Result<(), KernelError> {
        let (rules_base, rules_counted) = self.counters(slot);
        let settings = Settings {
            sample: self.options.sampling.masks(),
            rules_base,
            rules_counted,
            ..*settings
        };
        let map = self.maps.settings.fd().as_fd();
        sys::update(map, &slot.to_le_bytes(), &settings.to_bytes()).map_err(failed("cannot write settings"))
    }

    /// First rule's counter of `slot`, and number of counters.
    fn counters(&self, slot: u32) -> (u32, u32) {
        (slot * self.options.counted_rules, self.options.counted_rules)
    }

    /// Puts an inner map into place, and returns when nothing can read the one before.
    fn install(&mut self, slot: u32, inner: Inner) -> Result<(), KernelError> {
        let part = inner.part as usize;
        self.maps.parts[part]
            .set(slot, &inner.map, 0)
            .map_err(|error| KernelError::map("cannot put a map into place", error))?;
        self.slots[slot as usize][part] = inner;
        self.is_dirty = false;
        Ok(())
    }

    /// Waits until no packet can be reading what was there before.
    fn wait(&mut self) -> Result<(), KernelError> {
        let idle = self.active ^ 1;
        let [.., cells] = &self.slots[idle as usize];
        self.maps.parts[Part::Cells as usize]
            .set(idle, &cells.map, 0)
            .map_err(|error| KernelError::map("cannot wait for packets", error))?;
        self.is_dirty = false;
        Ok(())
    }

    /// Puts a map with these elements into the slot that is not in use.
    fn load<const K: usize, const V: usize>(
        &mut self,
        slot: u32,
        part: Part,
        room: u32,
        elements: impl ExactSizeIterator<Item = ([u8; K], [u8; V])>,
    ) -> Result<(), KernelError> {
        let before = &self.slots[slot as usize][part as usize];
        if elements.len() == 0 && before.is_empty && before.room == room {
            return Ok(());
        }
        let mut inner = Inner::new(part, room)?;
        inner.is_empty = elements.len() == 0;
        let mut keys = Vec::with_capacity(elements.len() * K);
        let mut values = Vec::with_capacity(elements.len() * V);
        for (key, value) in elements {
            keys.extend(key);
            values.extend(value);
        }
        sys::update_batch(inner.map.fd().as_fd(), &keys, K, &values, V)
            .map_err(|error| KernelError::new(format!("cannot load {}", part.what()), error))?;
        self.install(slot, inner)
    }

    /// Inserts, replaces or removes a group of the slot in use.
    fn write_group(
        &mut self,
        slot: u32,
        part: Part,
        key: &[u8],
        group: Option<Group>,
    ) -> Result<(), KernelError> {
        if self.is_dirty && group.is_some() {
            self.wait()?;
        }
        let inner = &mut self.slots[slot as usize][part as usize];
        let map = inner.map.fd().as_fd();
        let Some(group) = group else {
            self.is_dirty |= sys::delete(map, key).map_err(failed("cannot remove a prefix"))?;
            return Ok(());
        };
        inner.is_empty = false;
        self.is_dirty |= sys::lookup(map, key, &mut [0; size_of::<Group>()]).is_ok();
        sys::update(map, key, &group.to_bytes()).map_err(failed("cannot add a prefix"))
    }

    fn next_in_ring(&mut self) -> Option<Event> {
        loop {
            let record = self.maps.events.next()?;
            // Nothing else is written there.
            if let Some(record) = record.first_chunk() {
                return Some(Event::from_bytes(record));
            }
        }
    }
}

impl Backend for Kernel {
    fn fill(&mut self, slot: u32, image: &Image) -> Result<(), Error> {
        let Image {
            groups4,
            groups6,
            cells,
            settings,
            room,
        } = image;
        let groups4 = groups4
            .iter()
            .map(|(key, group)| (key.to_bytes(), group.to_bytes()));
        self.load(slot, Part::Groups4, room.groups4, groups4)?;
        let groups6 = groups6
            .iter()
            .map(|(key, group)| (key.to_bytes(), group.to_bytes()));
        self.load(slot, Part::Groups6, room.groups6, groups6)?;
        // The first cell stands for none, and is zero as it is.
        let cells = cells.iter().enumerate().skip(1);
        let cells = cells.map(|(index, cell)| ((index as u32).to_le_bytes(), cell.to_bytes()));
        self.load(slot, Part::Cells, room.cells, cells)?;
        self.settings(slot, settings)?;
        let (first, count) = self.counters(slot);
        let count = count.min(room.rules);
        let keys: Vec<u8> = (first..first + count).flat_map(u32::to_le_bytes).collect();
        let value_size = per_cpu_count_size()?;
        let zeros = vec![0; count as usize * value_size];
        let rules = self.maps.rules.fd().as_fd();
        sys::update_batch(rules, &keys, size_of::<u32>(), &zeros, value_size)
            .map_err(failed("cannot reset counters"))?;
        Ok(())
    }

    fn activate(&mut self, generation: u32) -> Result<(), Error> {
        let map = self.maps.active.fd().as_fd();
        sys::update(map, &0u32.to_le_bytes(), &generation.to_le_bytes())
            .map_err(failed("cannot write the generation"))?;
        self.active = generation & 1;
        let idle = self.active ^ 1;
        self.wait()?;
        for part in PARTS {
            if self.slots[idle as usize][part as usize].room > KEPT_ROOM {
                self.install(idle, Inner::empty(part)?)?;
            }
        }
        Ok(())
    }

    fn patch(&mut self, slot: u32, patch: &Patch) -> Result<(), Error> {
        if !patch.cells.is_empty() {
            let keys = (patch.first_cell..)
                .take(patch.cells.len())
                .flat_map(u32::to_le_bytes);
            let values = patch.cells.iter().flat_map(|cell| cell.to_bytes());
            let (keys, values): (Vec<u8>, Vec<u8>) = (keys.collect(), values.collect());
            let [.., cells] = &mut self.slots[slot as usize];
            cells.is_empty = false;
            sys::update_batch(
                cells.map.fd().as_fd(),
                &keys,
                size_of::<u32>(),
                &values,
                size_of::<Cell>(),
            )
            .map_err(failed("cannot write port tables"))?;
        }
        for &(key, group) in &patch.groups4 {
            self.write_group(slot, Part::Groups4, &key.to_bytes(), group)?;
        }
        for &(key, group) in &patch.groups6 {
            self.write_group(slot, Part::Groups6, &key.to_bytes(), group)?;
        }
        Ok(())
    }

    fn set_local(&mut self, addresses: &[Key6]) -> Result<(), Error> {
        let map = self.maps.local.fd().as_fd();
        for key in addresses {
            sys::update(map, &key.to_bytes(), &1u32.to_le_bytes())
                .map_err(failed("cannot note an address of this host"))?;
        }
        for key in self.local.iter().filter(|key| !addresses.contains(key)) {
            sys::delete(map, &key.to_bytes()).map_err(failed("cannot forget an address of this host"))?;
        }
        self.local = addresses.to_vec();
        Ok(())
    }

    fn reason_counts(&mut self) -> Result<[Count; REASONS], Error> {
        let value_size = per_cpu_count_size()?;
        let map = self.maps.reasons.fd().as_fd();
        let values =
            sys::lookup_array(map, 0, REASONS as u32, value_size).map_err(failed("cannot read counters"))?;
        let mut counts = [Count::default(); REASONS];
        for (count, values) in counts.iter_mut().zip(values.chunks_exact(value_size)) {
            *count = sum(values);
        }
        Ok(counts)
    }

    fn rule_counts(&mut self, slot: u32) -> Result<Vec<(u32, Count)>, Error> {
        let (first, count) = self.counters(slot);
        let value_size = per_cpu_count_size()?;
        let map = self.maps.rules.fd().as_fd();
        let values =
            sys::lookup_array(map, first, count, value_size).map_err(failed("cannot read counters"))?;
        let counts = (0..).zip(values.chunks_exact(value_size).map(sum));
        Ok(counts.filter(|&(_, count)| count != Count::default()).collect())
    }

    fn next_event(&mut self) -> Result<Option<Event>, Error> {
        Ok(self.events.pop_front().or_else(|| self.next_in_ring()))
    }

    fn run(&mut self, frame: &[u8]) -> Result<Outcome, Error> {
        let wrong_length = KernelError::FrameLength {
            length: frame.len(),
            least: FRAME_MIN,
            most: FRAME_MAX,
        };
        if frame.len() < FRAME_MIN {
            return Err(wrong_length.into());
        }
        // Events of real packets come first.
        while let Some(event) = self.next_in_ring() {
            self.events.push_back(event);
        }
        let options = TestRunOptions {
            data_in: Some(frame),
            repeat: 1,
            ..TestRunOptions::default()
        };
        let result = program(&mut self.ebpf).test_run(options);
        let result =
            result.map_err(
                |error| match KernelError::program("cannot run the XDP program", error) {
                    KernelError::Io { error, .. } if error.raw_os_error() == Some(libc::EINVAL) => {
                        wrong_length
                    }
                    other => other,
                },
            )?;
        let event = self.next_in_ring().ok_or(KernelError::NotSampled)?;
        if self.events.len() < RING_EVENTS {
            self.events.push_back(event);
        }
        let action = if result.return_value == XDP_DROP {
            Action::Drop
        } else {
            Action::Pass
        };
        let reason = Reason::from_number(event.reason).unwrap_or(Reason::NotUnderstood);
        Ok(Outcome {
            action,
            reason,
            rule: Some(event.ruling)
                .filter(|ruling| ruling.is_some())
                .map(|ruling| ruling.rule()),
        })
    }
}

const XDP_DROP: u32 = 1;

/// Events of single runs that are kept: as many as the ring buffer would.
const RING_EVENTS: usize = (tungate_bpf_abi::EVENTS_BYTES - 1) / (8 + size_of::<Event>());

impl Maps {
    fn take(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        let mut take = |name: &str| {
            ebpf.take_map(name)
                .expect("the object's maps are checked by a test")
        };
        let plain = |map: Map| match map {
            Map::Array(map) | Map::HashMap(map) | Map::PerCpuArray(map) => map,
            other => unreachable!("the object's maps are checked by a test, and {other:?} is not among them"),
        };
        let failed = |error| KernelError::map("cannot open a map", error);
        Ok(Self {
            active: plain(take(map::ACTIVE)),
            settings: plain(take(map::SETTINGS)),
            parts: [
                take(map::GROUPS4).try_into().map_err(failed)?,
                take(map::GROUPS6).try_into().map_err(failed)?,
                take(map::CELLS).try_into().map_err(failed)?,
            ],
            local: plain(take(map::LOCAL)),
            reasons: plain(take(map::REASONS)),
            rules: plain(take(map::RULES)),
            events: take(map::EVENTS).try_into().map_err(failed)?,
        })
    }
}

impl Part {
    /// What its elements are, for messages.
    fn what(self) -> &'static str {
        match self {
            Self::Groups4 => "IPv4 prefixes",
            Self::Groups6 => "IPv6 prefixes",
            Self::Cells => "port tables",
        }
    }
}

impl Inner {
    /// A map with as much room as empty lists ask for.
    fn empty(part: Part) -> Result<Self, KernelError> {
        let Room {
            groups4,
            groups6,
            cells,
            ..
        } = Room::EMPTY;
        match part {
            Part::Groups4 => Self::new(part, groups4),
            Part::Groups6 => Self::new(part, groups6),
            Part::Cells => Self::new(part, cells),
        }
    }

    fn new(part: Part, room: u32) -> Result<Self, KernelError> {
        use bpf_map_type::{BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH};
        let (kind, key, value, flags) = match part {
            Part::Groups4 => (BPF_MAP_TYPE_HASH, size_of::<Key4>(), size_of::<Group>(), 0),
            Part::Groups6 => (BPF_MAP_TYPE_HASH, size_of::<Key6>(), size_of::<Group>(), 0),
            Part::Cells => (
                BPF_MAP_TYPE_ARRAY,
                size_of::<u32>(),
                size_of::<Cell>(),
                BPF_F_INNER_MAP,
            ),
        };
        let what = part.what();
        let definition = aya_obj::Map::new_from_params(kind as u32, key as u32, value as u32, room, flags);
        let map = MapData::create(definition, "tungate", None).map_err(|error| {
            match KernelError::map(&format!("cannot create the map of {what}"), error) {
                KernelError::Io { error, .. } if error.raw_os_error() == Some(libc::ENOMEM) => {
                    KernelError::NoMemory { what, elements: room }
                }
                other => other,
            }
        })?;
        Ok(Self {
            map,
            part,
            room,
            is_empty: true,
        })
    }
}

fn program(ebpf: &mut Ebpf) -> &mut Xdp {
    let program = ebpf
        .program_mut(PROGRAM)
        .expect("the object's program is checked by a test");
    program.try_into().expect("it is in the section `xdp`")
}

fn failed(action: &'static str) -> impl Fn(std::io::Error) -> KernelError {
    move |error| KernelError::new(action, error)
}

/// Bytes of a [`Count`] for every CPU.
fn per_cpu_count_size() -> Result<usize, KernelError> {
    Ok(sys::possible_cpus().map_err(failed("cannot tell the number of CPUs"))? * size_of::<Count>())
}

fn sum(values: &[u8]) -> Count {
    let counts = values
        .as_chunks::<{ size_of::<Count>() }>()
        .0
        .iter()
        .map(Count::from_bytes);
    counts.fold(Count::default(), |sum, count| Count {
        packets: sum.packets + count.packets,
        bytes: sum.bytes + count.bytes,
    })
}

/// Before 5.11 maps counted as locked memory, of which the default limit is too small for any list. Where it may
/// not be raised, creating a map says so.
fn lift_memory_lock() {
    let _ = setrlimit(
        Resource::Memlock,
        Rlimit {
            current: None,
            maximum: None,
        },
    );
}
