//! The program's maps: fixed ones, and the inner ones that slots hold.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use aya::Ebpf;
use aya::maps::{Map, MapData, MapError, RingBuf};
use aya_obj::generated::bpf_map_type;
use tungate_bpf_abi::{Cell, Group, Key4, Key6, map};

use super::error::{KernelError, failed};
use super::sys;
use crate::tables::Room;

/// Inner arrays may differ in size.
const BPF_F_INNER_MAP: u32 = 1 << 12;

/// The maps by which the program is told what to do, and tells what it has done.
pub(super) struct Maps {
    pub(super) active: MapData,
    pub(super) settings: MapData,
    /// What the slots hold, by [`Part`]: arrays of maps.
    pub(super) parts: [MapData; PARTS.len()],
    pub(super) local: MapData,
    pub(super) reasons: MapData,
    pub(super) rules: MapData,
    pub(super) events: RingBuf<MapData>,
}

/// A kind of inner map.
#[derive(Clone, Copy)]
pub(super) enum Part {
    Groups4,
    Groups6,
    Cells,
}

pub(super) const PARTS: [Part; 3] = [Part::Groups4, Part::Groups6, Part::Cells];

/// An inner map.
pub(super) struct Inner {
    pub(super) map: MapData,
    pub(super) part: Part,
    /// How many elements it has room for.
    pub(super) room: u32,
    /// Whether nothing has been written to it.
    pub(super) is_empty: bool,
}

impl Maps {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, KernelError> {
        Self::from(|name| {
            Ok(ebpf
                .take_map(name)
                .expect("the object's maps are checked by a test"))
        })
    }

    /// Opens maps that are pinned by their names.
    pub(super) fn open(folder: &Path) -> Result<Self, KernelError> {
        Self::from(|name| MapData::from_pin(folder.join(name)).and_then(Map::from_map_data))
    }

    fn from(mut map: impl FnMut(&str) -> Result<Map, MapError>) -> Result<Self, KernelError> {
        let failed = |error| KernelError::map("cannot open a map", error);
        let mut plain = |name: &str| match map(name).map_err(failed)? {
            Map::Array(map) | Map::HashMap(map) | Map::PerCpuArray(map) | Map::ArrayOfMaps(map) => Ok(map),
            other => unreachable!("the object's maps are checked by a test, and {other:?} is not among them"),
        };
        Ok(Self {
            active: plain(map::ACTIVE)?,
            settings: plain(map::SETTINGS)?,
            parts: [plain(map::GROUPS4)?, plain(map::GROUPS6)?, plain(map::CELLS)?],
            local: plain(map::LOCAL)?,
            reasons: plain(map::REASONS)?,
            rules: plain(map::RULES)?,
            events: map(map::EVENTS).and_then(RingBuf::try_from).map_err(failed)?,
        })
    }

    pub(super) fn by_name(&self) -> [(&'static str, BorrowedFd<'_>); 9] {
        let [groups4, groups6, cells] = &self.parts;
        let plain = [
            (map::ACTIVE, &self.active),
            (map::SETTINGS, &self.settings),
            (map::GROUPS4, groups4),
            (map::GROUPS6, groups6),
            (map::CELLS, cells),
            (map::LOCAL, &self.local),
            (map::REASONS, &self.reasons),
            (map::RULES, &self.rules),
        ];
        let mut all = [(map::EVENTS, self.events.as_fd()); 9];
        for (named, (name, map)) in all.iter_mut().zip(plain) {
            *named = (name, map.fd().as_fd());
        }
        all
    }

    /// Puts an inner map into its slot.
    pub(super) fn set(&self, slot: u32, inner: &Inner) -> std::io::Result<()> {
        let outer = self.parts[inner.part as usize].fd().as_fd();
        let descriptor = inner.map.fd().as_fd().as_raw_fd();
        sys::update(outer, &slot.to_le_bytes(), &descriptor.to_le_bytes())
    }
}

impl Part {
    /// What its elements are, for messages.
    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Groups4 => "IPv4 prefixes",
            Self::Groups6 => "IPv6 prefixes",
            Self::Cells => "port tables",
        }
    }
}

impl Inner {
    /// A map with as much room as empty lists ask for.
    pub(super) fn empty(part: Part) -> Result<Self, KernelError> {
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

    /// The map that is in `slot`, whatever it holds.
    pub(super) fn of_slot(maps: &Maps, slot: u32, part: Part) -> Result<Self, KernelError> {
        let mut id = [0; 4];
        sys::lookup(
            maps.parts[part as usize].fd().as_fd(),
            &slot.to_le_bytes(),
            &mut id,
        )
        .map_err(failed("cannot read a slot"))?;
        let opened =
            MapData::from_id(u32::from_le_bytes(id)).and_then(|map| Ok((map.info()?.max_entries(), map)));
        let (room, map) = opened.map_err(|error| KernelError::map("cannot open a slot's map", error))?;
        Ok(Self {
            map,
            part,
            room,
            is_empty: false,
        })
    }

    pub(super) fn new(part: Part, room: u32) -> Result<Self, KernelError> {
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
