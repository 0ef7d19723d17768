//! Lists as map contents: compiled as a whole, and kept up to date entry by entry.
//!
//! # Theory of operation
//!
//! Every entry gets a number, its *rule*, which counters and rulings use and which never changes while other
//! entries come and go; positions in the policy's list are mapped to rules and back. All semantics are resolved
//! here: the rules of a prefix and of the shorter ones around it are put in the order in which they are tried and
//! folded into one [`Group`], so that the program has to find one key only. Nothing is approximated: any set of
//! entries has an exact image.
//!
//! A single change is answered by a [`Patch`]: the keys whose groups it changes. Cells of a port table are never
//! written over, so that a packet which is being judged sees one table or the other; when they run out, or a
//! change touches too many keys, a whole new image takes its place.

mod family;
mod ports;
mod tree;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tungate_bpf_abi::{Cell, Group, Key4, Key6, NO_NODE, Node4, Node6, Ruling, Settings};
use tungate_engine::policy::{ListAction, ListEntry};

use self::family::{Address, Delta, Family, Prefix, fits_all};
use self::ports::Function;
use crate::error::Error;

/// More written-over keys than this make a whole swap cheaper: each one waits until no packet can still be
/// reading the element whose memory the next one takes.
const PATCH_MAX_REPLACED: usize = 4;

/// The contents of a slot.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// IPv4 groups.
    pub groups4: Vec<(Key4, Group)>,
    /// IPv6 groups.
    pub groups6: Vec<(Key6, Group)>,
    /// Port tables.
    pub cells: Vec<Cell>,
    /// Trees and defaults; the backend adds what concerns counters and events.
    pub settings: Settings,
    /// How many elements the maps are to have room for.
    pub room: Room,
}

/// Numbers of elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// IPv4 groups.
    pub groups4: u32,
    /// IPv6 groups.
    pub groups6: u32,
    /// Cells.
    pub cells: u32,
    /// Rules with counters.
    pub rules: u32,
}

impl Room {
    /// What empty lists ask for.
    pub const EMPTY: Self = match (Self::with_slack(0), Self::with_slack(1)) {
        (Some(none), Some(one)) => Self {
            groups4: none,
            groups6: none,
            cells: one,
            rules: none,
        },
        _ => panic!("small numbers have room"),
    };

    /// Room for `used` elements and for some to be added; `None` for more than the kernel takes.
    const fn with_slack(used: usize) -> Option<u32> {
        let room = used + used / 8 + 1024;
        if room < 1 << 30 { Some(room as u32) } else { None }
    }
}

/// A change to a slot in use. Applied in the order of the fields, each group at once.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Patch {
    /// Cells to write, none of which is in use, and where the first one goes.
    pub cells: Vec<Cell>,
    /// See [`Self::cells`].
    pub first_cell: u32,
    /// IPv4 groups to insert, replace, or remove.
    pub groups4: Vec<(Key4, Option<Group>)>,
    /// IPv6 groups to insert, replace, or remove.
    pub groups6: Vec<(Key6, Option<Group>)>,
}

/// The lists, and what the maps hold of them.
#[derive(Debug, Clone)]
pub(crate) struct Tables {
    /// By rule. Removed entries stay, as nothing refers to them any more.
    entries: Vec<ListEntry>,
    /// By position in the policy's list.
    rules: Vec<u32>,
    /// By rule; [`Self::REMOVED`] for entries that are gone.
    positions: Vec<u32>,
    /// Entries with a time limit that are in the maps.
    expiries: BTreeSet<(u64, u32)>,
    family4: Family<u32>,
    family6: Family<u128>,
    room: Room,
    cells_used: u32,
}

impl Tables {
    const REMOVED: u32 = u32::MAX;

    /// Compiles `lists`, without what has expired by `now`, in seconds since the Unix epoch.
    pub(crate) fn new(lists: &[ListEntry], now: u64) -> Result<Self, Error> {
        if lists.len() >= Ruling::MAX_RULES as usize {
            return Err(Error::TooManyEntries { entries: lists.len() });
        }
        let mut rules4 = Vec::new();
        let mut rules6 = Vec::new();
        let mut expiries = BTreeSet::new();
        for (rule, entry) in lists.iter().enumerate() {
            let rule = rule as u32;
            match entry.expires {
                Some(time) if time <= now => continue,
                Some(time) => _ = expiries.insert((time, rule)),
                None => {}
            }
            match entry.network {
                IpNet::V4(net) => rules4.push((prefix4(net), rule)),
                IpNet::V6(net) => rules6.push((prefix6(net), rule)),
            }
        }
        Ok(Self {
            family4: Family::new(rules4, lists),
            family6: Family::new(rules6, lists),
            entries: lists.to_vec(),
            rules: (0..lists.len() as u32).collect(),
            positions: (0..lists.len() as u32).collect(),
            expiries,
            room: Room::default(),
            cells_used: 0,
        })
    }

    /// The entries, in the order of the policy's list.
    pub(crate) fn entries(&self) -> impl ExactSizeIterator<Item = &ListEntry> {
        self.rules.iter().map(|&rule| &self.entries[rule as usize])
    }

    /// The position of a rule's entry in the policy's list.
    pub(crate) fn position(&self, rule: u32) -> Option<u32> {
        self.positions
            .get(rule as usize)
            .copied()
            .filter(|&position| position != Self::REMOVED)
    }

    /// The rule of an entry that says the same as `entry`, if there is one; times of expiry may differ.
    pub(crate) fn find(&self, entry: &ListEntry) -> Option<u32> {
        let same = |&&rule: &&u32| {
            let other = &self.entries[rule as usize];
            (other.action, other.network, other.protocol, other.ports)
                == (entry.action, entry.network, entry.protocol, entry.ports)
        };
        match entry.network {
            IpNet::V4(net) => self.family4.members(prefix4(net)).iter().find(same).copied(),
            IpNet::V6(net) => self.family6.members(prefix6(net)).iter().find(same).copied(),
        }
    }

    /// The entry of a rule, also of one that was removed.
    pub(crate) fn entry(&self, rule: u32) -> &ListEntry {
        &self.entries[rule as usize]
    }

    /// The lists' whole contents, for an empty slot.
    pub(crate) fn image(&mut self) -> Result<Image, Error> {
        self.family4.replant();
        self.family6.replant();
        // Index 0 stands for "no cells".
        let mut cells = Cells {
            first: 0,
            cells: vec![Cell::default()],
        };
        let groups4 = self.family4.all_groups(&self.entries, &mut cells);
        let groups6 = self.family6.all_groups(&self.entries, &mut cells);
        let mut settings = Settings {
            default4: cells.group(self.family4.members((0, 0)), &self.entries),
            default6: cells.group(self.family6.members((0, 0)), &self.entries),
            ..Settings::EMPTY
        };
        let link = |to: u8, size: usize| {
            if to == tree::NONE {
                NO_NODE
            } else {
                u32::from(to) * size as u32
            }
        };
        let (tree4, tree6) = (self.family4.tree(), self.family6.tree());
        settings.root4 = link(tree4.root(), size_of::<Node4>());
        settings.root6 = link(tree6.root(), size_of::<Node6>());
        for (node, from) in settings.tree4.iter_mut().zip(tree4.nodes()) {
            let Key4 {
                address: mask,
                length,
            } = u32::MAX.masked(from.length).key(from.length);
            *node = Node4 {
                select: u64::from(mask) | u64::from(length) << 32,
                on_hit: link(from.on_hit, size_of::<Node4>()),
                on_miss: link(from.on_miss, size_of::<Node4>()),
            };
        }
        for (node, from) in settings.tree6.iter_mut().zip(tree6.nodes()) {
            let Key6 {
                address: mask,
                length,
            } = u128::MAX.masked(from.length).key(from.length);
            *node = Node6 {
                mask,
                length,
                on_hit: link(from.on_hit, size_of::<Node6>()),
                on_miss: link(from.on_miss, size_of::<Node6>()),
            };
        }
        let cells = cells.cells;
        let entries = self.entries.len();
        let room = |used: usize| Room::with_slack(used).ok_or(Error::TooManyEntries { entries });
        self.room = Room {
            groups4: room(groups4.len())?,
            groups6: room(groups6.len())?,
            cells: room(cells.len())?,
            rules: room(entries)?,
        };
        self.cells_used = cells.len() as u32;
        Ok(Image {
            groups4,
            groups6,
            cells,
            settings,
            room: self.room,
        })
    }

    /// Appends an entry. `None` if the slot cannot take it in place: then a new [`Self::image`] has to be loaded.
    pub(crate) fn add(&mut self, entry: ListEntry, now: u64) -> Result<Option<Patch>, Error> {
        let rule = self.entries.len() as u32;
        if rule >= Ruling::MAX_RULES {
            return Err(Error::TooManyEntries {
                entries: self.entries.len(),
            });
        }
        self.positions.push(self.rules.len() as u32);
        self.rules.push(rule);
        let ListEntry { network, expires, .. } = entry;
        self.entries.push(entry);
        match expires {
            Some(time) if time <= now => return Ok(Some(Patch::default())),
            Some(time) => _ = self.expiries.insert((time, rule)),
            None => {}
        }
        if network.prefix_len() == 0 {
            self.set_default(network, |rules| rules.push(rule));
            return Ok(None);
        }
        let mut patch = Patch {
            first_cell: self.cells_used,
            ..Patch::default()
        };
        let mut cells = Cells {
            first: self.cells_used,
            cells: Vec::new(),
        };
        let fits = match network {
            IpNet::V4(net) => {
                let delta = self.family4.add(prefix4(net), rule, &self.entries);
                self.family4.patch(
                    &delta,
                    &self.entries,
                    &mut cells,
                    self.room.groups4,
                    &mut patch.groups4,
                )
            }
            IpNet::V6(net) => {
                let delta = self.family6.add(prefix6(net), rule, &self.entries);
                self.family6.patch(
                    &delta,
                    &self.entries,
                    &mut cells,
                    self.room.groups6,
                    &mut patch.groups6,
                )
            }
        };
        Ok(self
            .finish(patch, cells)
            .filter(|_| fits && rule < self.room.rules))
    }

    /// Removes the entry at `position`, so that later ones move up. Otherwise like [`Self::add`].
    pub(crate) fn remove(&mut self, position: u32) -> Result<(ListEntry, Option<Patch>), Error> {
        let entries = self.rules.len();
        if position as usize >= entries {
            return Err(Error::NoSuchEntry { position, entries });
        }
        let rule = self.rules.remove(position as usize);
        self.positions[rule as usize] = Self::REMOVED;
        for &later in &self.rules[position as usize..] {
            self.positions[later as usize] -= 1;
        }
        Ok((self.entry(rule).clone(), self.withdraw(rule)))
    }

    /// Takes entries out of the maps whose time has come by `now`; they keep their positions. Returns their
    /// number, and patches to apply one after the other, or `None` for a new image.
    pub(crate) fn expire(&mut self, now: u64) -> (usize, Option<Vec<Patch>>) {
        let later = self.expiries.split_off(&(now.saturating_add(1), 0));
        let due: Vec<u32> = std::mem::replace(&mut self.expiries, later)
            .into_iter()
            .map(|(_, rule)| rule)
            .collect();
        let count = due.len();
        // Every one is to be taken out, also when a patch will not do.
        let patches: Vec<Option<Patch>> = due.into_iter().map(|rule| self.withdraw(rule)).collect();
        (count, patches.into_iter().collect())
    }

    /// Most lookups for an IPv4 and an IPv6 address, as of the latest image.
    pub(crate) fn lookups(&self) -> (usize, usize) {
        (self.family4.tree().depth(), self.family6.tree().depth())
    }

    /// When the next entry expires, in seconds since the Unix epoch.
    pub(crate) fn next_expiry(&self) -> Option<u64> {
        self.expiries.first().map(|&(time, _)| time)
    }

    /// Takes a rule out of the maps' contents.
    fn withdraw(&mut self, rule: u32) -> Option<Patch> {
        let ListEntry { network, expires, .. } = self.entries[rule as usize];
        self.expiries.remove(&(expires.unwrap_or(0), rule));
        if network.prefix_len() == 0 {
            self.set_default(network, |rules| rules.retain(|&other| other != rule));
            return None;
        }
        let mut patch = Patch {
            first_cell: self.cells_used,
            ..Patch::default()
        };
        let mut cells = Cells {
            first: self.cells_used,
            cells: Vec::new(),
        };
        let fits = match network {
            IpNet::V4(net) => {
                if !self.family4.members(prefix4(net)).contains(&rule) {
                    return Some(patch);
                }
                let delta = self.family4.remove(prefix4(net), rule, &self.entries);
                self.family4.patch(
                    &delta,
                    &self.entries,
                    &mut cells,
                    self.room.groups4,
                    &mut patch.groups4,
                )
            }
            IpNet::V6(net) => {
                if !self.family6.members(prefix6(net)).contains(&rule) {
                    return Some(patch);
                }
                let delta = self.family6.remove(prefix6(net), rule, &self.entries);
                self.family6.patch(
                    &delta,
                    &self.entries,
                    &mut cells,
                    self.room.groups6,
                    &mut patch.groups6,
                )
            }
        };
        self.finish(patch, cells).filter(|_| fits)
    }

    fn finish(&mut self, patch: Patch, cells: Cells) -> Option<Patch> {
        let used = u64::from(self.cells_used) + cells.cells.len() as u64;
        if used > u64::from(self.room.cells) {
            return None;
        }
        self.cells_used = used as u32;
        Some(Patch {
            cells: cells.cells,
            ..patch
        })
    }

    fn set_default(&mut self, network: IpNet, change: impl FnOnce(&mut Vec<u32>)) {
        match network {
            IpNet::V4(_) => {
                let mut rules = self.family4.members((0, 0)).to_vec();
                change(&mut rules);
                self.family4.set_default(rules, &self.entries);
            }
            IpNet::V6(_) => {
                let mut rules = self.family6.members((0, 0)).to_vec();
                change(&mut rules);
                self.family6.set_default(rules, &self.entries);
            }
        }
    }
}

/// Cells to be written, of which the first has the index `first`.
#[derive(Debug)]
struct Cells {
    first: u32,
    cells: Vec<Cell>,
}

impl Cells {
    /// The group for `rules`, of which the first that fits decides.
    fn group(&mut self, rules: &[u32], entries: &[ListEntry]) -> Group {
        let entry = |rule: u32| &entries[rule as usize];
        match *rules {
            [] => return Group::NONE,
            [rule, ..] if fits_all(entry(rule)) => {
                return Group::of(Ruling::new(rule, entry(rule).action == ListAction::Deny));
            }
            _ => {}
        }
        let function = Function::new(&rules.iter().map(|&rule| (rule, entry(rule))).collect::<Vec<_>>());
        if let Some(ruling) = function.constant() {
            return Group::of(ruling);
        }
        let row = self.first + self.cells.len() as u32;
        function.write(&mut self.cells, self.first);
        Group::at(row)
    }
}

impl<A: Address> Family<A> {
    /// All keys and groups.
    fn all_groups(&self, entries: &[ListEntry], cells: &mut Cells) -> Vec<(A::Key, Group)> {
        let mut chain = Vec::new();
        let mut groups = Vec::with_capacity(self.len());
        for (prefix, members) in self.prefixes() {
            // Most prefixes have one entry, for all packets: no need to look for others around them.
            let group = match *members {
                [rule] if fits_all(&entries[rule as usize]) => cells.group(members, entries),
                _ => {
                    self.chain(prefix, entries, &mut chain);
                    cells.group(&chain, entries)
                }
            };
            groups.push((prefix.0.key(prefix.1), group));
        }
        groups
    }

    /// Keys and groups of `prefixes`.
    fn groups(
        &self,
        prefixes: impl IntoIterator<Item = Prefix<A>>,
        entries: &[ListEntry],
        cells: &mut Cells,
    ) -> impl Iterator<Item = (A::Key, Group)> {
        let mut chain = Vec::new();
        prefixes.into_iter().map(move |prefix| {
            self.chain(prefix, entries, &mut chain);
            (prefix.0.key(prefix.1), cells.group(&chain, entries))
        })
    }

    /// Writes what `delta` says to `groups`; returns whether that can be done in place.
    fn patch(
        &self,
        delta: &Delta<A>,
        entries: &[ListEntry],
        cells: &mut Cells,
        room: u32,
        groups: &mut Vec<(A::Key, Option<Group>)>,
    ) -> bool {
        if !delta.fits_tree || delta.changed.len() > PATCH_MAX_REPLACED || self.len() > room as usize {
            return false;
        }
        let written = delta.created.iter().chain(&delta.changed).copied();
        groups.extend(
            self.groups(written, entries, cells)
                .map(|(key, group)| (key, Some(group))),
        );
        groups.extend(
            delta
                .removed
                .iter()
                .map(|&(address, length)| (address.key(length), None)),
        );
        true
    }
}

fn prefix4(network: Ipv4Net) -> Prefix<u32> {
    (network.network().to_bits(), network.prefix_len())
}

fn prefix6(network: Ipv6Net) -> Prefix<u128> {
    (network.network().to_bits(), network.prefix_len())
}

/// The key under which the map of local addresses holds `address`.
pub(crate) fn local_key(address: IpAddr) -> Key6 {
    match address {
        IpAddr::V4(address) => {
            let Key4 { address, .. } = address.to_bits().key(32);
            Key6 {
                address: [u64::from(address), 0],
                length: 4,
            }
        }
        IpAddr::V6(address) => Key6 {
            length: 6,
            ..address.to_bits().key(128)
        },
    }
}
