//! The program in the kernel, on a network interface or run frame by frame.
//!
//! Lists are filled into fresh maps of the slot that is not in use, and taken into use by writing the generation.
//! Setting an inner map makes the kernel wait until every run of a program that could have seen the one before has
//! ended (an RCU grace period, some milliseconds); that wait also makes changes in place sound. The kernel gives the
//! memory of an element that was replaced or removed to the next one at once, while a packet may still be reading
//! it: so there is one wait after a replacement or removal, before the next write.

mod attach;
mod error;
mod maps;
mod sys;

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use aya_obj::programs::XdpAttachType;
use rustix::process::{Resource, Rlimit, setrlimit};
use tungate_bpf_abi::{Cell, Count, Event, Group, Key6, REASONS, Reason, SLOTS, Settings, map};

pub use self::attach::{Attached, Mode, Wanted, is_attached, remove_pinned};
pub use self::error::KernelError;
use self::error::failed;
use self::maps::{Inner, Maps, PARTS, Part};
use crate::backend::{Action, Backend, Outcome, Sampling};
use crate::error::Error;
use crate::object::{OBJECT, PROGRAM};
use crate::prefilter::Prefilter;
use crate::tables::{Image, Patch};

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
    program: Program,
    maps: Maps,
    /// Inner maps by slot and [`Part`].
    slots: [[Inner; PARTS.len()]; SLOTS],
    generation: u32,
    options: Options,
    link: Option<(Attached, Link)>,
    /// Keys of the host's own addresses.
    local: Vec<[u8; size_of::<Key6>()]>,
    /// Whether an element's memory may be given to another while it is read.
    is_dirty: bool,
    /// Events of single runs.
    events: VecDeque<Event>,
}

/// Where the program comes from.
enum Program {
    /// This process has loaded it.
    Loaded(Box<Ebpf>),
    /// Another one has.
    Pinned(Box<Xdp>),
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
        let maps = Maps::take(&mut ebpf)?;
        let mut program = Program::Loaded(Box::new(ebpf));
        program
            .xdp()
            .load()
            .map_err(|error| KernelError::program("cannot load the XDP program", error))?;
        let empty = || -> Result<_, KernelError> {
            Ok([
                Inner::empty(Part::Groups4)?,
                Inner::empty(Part::Groups6)?,
                Inner::empty(Part::Cells)?,
            ])
        };
        let slots = [empty()?, empty()?];
        let mut kernel = Self {
            program,
            maps,
            slots,
            generation: 0,
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
        let (attached, link) = attach::attach(self.program.xdp(), interface, wanted)?;
        Ok(&self.link.insert((attached, Link::Held(link))).0)
    }

    /// Pins the program, its maps and the link in `folder`, so that it stays attached when this process ends, and
    /// [`Self::open`] finds it. The folder, which is this interface's alone, is made; a BPF file system is mounted on
    /// its parent where there is none. Dots in names are not for BPF file systems.
    ///
    /// # Errors
    ///
    /// [`KernelError::NoBpfFs`] and others; then, and where nothing is attached, nothing is pinned.
    pub fn pin(&mut self, folder: &Path) -> Result<(), KernelError> {
        let Some((attached, Link::Held(link))) = self.link.take_if(|(_, link)| matches!(link, Link::Held(_)))
        else {
            return Ok(());
        };
        let pinned = (|| {
            attach::make_folder(folder)?;
            let pin = |name: &str, object: BorrowedFd<'_>| {
                let path = folder.join(name);
                sys::pin(object, &path)
                    .map_err(|error| KernelError::new(format!("cannot pin {}", path.display()), error))
            };
            for (name, map) in self.maps.by_name() {
                pin(name, map)?;
            }
            let program = self.program.xdp();
            let program = program
                .fd()
                .map_err(|error| KernelError::program("cannot pin the program", error))?;
            pin(PROGRAM, program.as_fd())?;
            attach::pin(link, attached.mode, folder)
        })();
        match pinned {
            Ok(link) => {
                self.link = Some((attached, Link::Pinned(link)));
                Ok(())
            }
            Err(error) => {
                let _ = remove_pinned(folder); // what is wrong has been said
                Err(error)
            }
        }
    }

    /// Opens what [`Self::pin`] has put into `folder`. `None` if there is nothing, or its interface is gone.
    /// `interface` is its name.
    ///
    /// # Errors
    ///
    /// [`KernelError`] where the kernel will not.
    pub fn open(interface: &str, folder: &Path) -> Result<Option<Self>, KernelError> {
        let Some((mode, _, link)) = attach::open(folder)? else {
            return Ok(None);
        };
        let program = Xdp::from_pin(folder.join(PROGRAM), XdpAttachType::Interface)
            .map_err(|error| KernelError::program("cannot open the pinned program", error))?;
        let maps = Maps::open(folder)?;
        let counters = maps
            .rules
            .info()
            .map_err(|error| KernelError::map("cannot ask for a map", error))?
            .max_entries();
        let mut active = [0; 4];
        sys::lookup(maps.active.fd().as_fd(), &0u32.to_le_bytes(), &mut active)
            .map_err(failed("cannot read the generation"))?;
        let slot = |slot: u32| -> Result<_, KernelError> {
            Ok([
                Inner::of_slot(&maps, slot, Part::Groups4)?,
                Inner::of_slot(&maps, slot, Part::Groups6)?,
                Inner::of_slot(&maps, slot, Part::Cells)?,
            ])
        };
        let slots = [slot(0)?, slot(1)?];
        let local =
            sys::keys(maps.local.fd().as_fd()).map_err(failed("cannot read this host's addresses"))?;
        let why = Some("it was so when the program was attached".to_owned());
        let attached = Attached {
            interface: interface.to_owned(),
            mode,
            why: why.filter(|_| mode == Mode::Generic),
        };
        Ok(Some(Self {
            program: Program::Pinned(Box::new(program)),
            maps,
            slots,
            generation: u32::from_le_bytes(active),
            options: Options {
                sampling: Sampling::default(),
                counted_rules: counters / SLOTS as u32,
            },
            link: Some((attached, Link::Pinned(link))),
            local,
            is_dirty: true,
            events: VecDeque::new(),
        }))
    }

    /// The generation of the lists in use.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Undoes [`Self::pin`] of the link: the program is attached as long as this process holds it.
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
        self.maps
            .set(slot, &inner)
            .map_err(failed("cannot put a map into place"))?;
        self.slots[slot as usize][part] = inner;
        self.is_dirty = false;
        Ok(())
    }

    /// Waits until no packet can be reading what was there before.
    fn wait(&mut self) -> Result<(), KernelError> {
        let idle = (self.generation ^ 1) & 1;
        let [.., cells] = &self.slots[idle as usize];
        self.maps
            .set(idle, cells)
            .map_err(failed("cannot wait for packets"))?;
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
        self.generation = generation;
        let idle = (generation ^ 1) & 1;
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
        let addresses: Vec<_> = addresses.iter().map(|key| key.to_bytes()).collect();
        for key in &addresses {
            sys::update(map, key, &1u32.to_le_bytes())
                .map_err(failed("cannot note an address of this host"))?;
        }
        for key in self.local.iter().filter(|key| !addresses.contains(key)) {
            sys::delete(map, key).map_err(failed("cannot forget an address of this host"))?;
        }
        self.local = addresses;
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
        let result = self.program.xdp().test_run(options);
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

impl Program {
    fn xdp(&mut self) -> &mut Xdp {
        match self {
            Self::Loaded(ebpf) => {
                let program = ebpf
                    .program_mut(PROGRAM)
                    .expect("the object's program is checked by a test");
                program.try_into().expect("it is in the section `xdp`")
            }
            Self::Pinned(program) => program,
        }
    }
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
