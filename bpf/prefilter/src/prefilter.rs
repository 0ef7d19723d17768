//! Keeps lists and maps in step.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tungate_bpf_abi::{Count, Event, Reason, Selectors};
use tungate_engine::policy::{Action as RuleAction, ListEntry, ListProtocol, PolicySpec, RuleRef};

use crate::backend::{Action, Backend, Outcome};
use crate::error::Error;
use crate::tables::{Patch, Tables, local_key};

/// Most events kept over a change of lists until somebody asks for them.
const KEPT_EVENTS: usize = 4096;

/// The pre-filter: lists, and a backend that judges packets by them.
///
/// Whole lists go into the slot that is not in use and take effect with one write; single entries are written into
/// the slot in use where that is possible at once for every packet, and else by way of a whole swap. So at any
/// moment a packet meets the lists from before or after a change, never a mixture.
#[derive(Debug)]
pub struct Prefilter<B> {
    backend: B,
    tables: Tables,
    generation: u32,
    /// Counts from before the lists were last loaded, by rule of [`Self::tables`].
    carried: BTreeMap<u32, Count>,
    events: std::collections::VecDeque<PacketEvent>,
}

/// What the pre-filter says about a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Verdict {
    /// What becomes of it.
    pub action: Action,
    /// The list entry that decided, whether it says `deny` or `allow`.
    pub rule: Option<RuleRef>,
    /// Why.
    pub reason: Reason,
}

/// What a policy came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// List entries in the maps.
    pub entries: usize,
    /// List entries left out because their time was over.
    pub expired: usize,
    /// Parts of the policy the pre-filter does not see to; the engine does.
    pub not_exported: Vec<NotExported>,
    /// Most map lookups for one IPv4 address.
    pub lookups4: usize,
    /// Most map lookups for one IPv6 address.
    pub lookups6: usize,
}

/// A part of the policy that is left to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NotExported {
    /// Which.
    pub rule: RuleRef,
    /// Why.
    pub why: Why,
}

/// Why a part of the policy is left to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Why {
    /// A list entry no packet can fit: ICMP has no ports.
    #[error("no packet fits it: ICMP has no ports")]
    NeverFits,
    /// A `drop` rule. Rules are asked once per flow: packets of flows that were accepted under earlier rules go on,
    /// and a packet that is dropped for its checksum, or answers a flow from outside, never meets a rule. A
    /// stateless filter cannot tell these from others, and would drop more, or say another reason, than the engine.
    #[error(
        "rules are asked once per flow, which a stateless filter cannot tell; a `deny` list entry is asked per packet"
    )]
    AskedPerFlow,
}

/// Packets and bytes by reason, and by list entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counters {
    /// By reason, since the program was loaded.
    pub reasons: Vec<(Reason, Count)>,
    /// By list entry, in the order of the lists; entries that were never met are left out. Counts stay with an
    /// entry when lists are replaced by others that contain it too.
    pub rules: Vec<(RuleRef, Count)>,
}

/// A sampled packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PacketEvent {
    /// Why it was passed or dropped.
    pub reason: Reason,
    /// The list entry that decided; `None` also if it has been removed since.
    pub rule: Option<RuleRef>,
    /// Index of the interface on which it came in.
    pub interface: u32,
    /// Length of the frame in bytes.
    pub length: u32,
    /// Source and destination address, unless the headers were not understood.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// IP protocol number behind extension headers, if it could be read.
    pub protocol: Option<u8>,
    /// Destination port, if there is one and it could be read.
    pub port: Option<u16>,
}

impl<B: Backend> Prefilter<B> {
    /// Starts with empty lists: every packet passes.
    ///
    /// # Errors
    ///
    /// Those of the backend.
    pub fn new(mut backend: B) -> Result<Self, Error> {
        let mut tables = Tables::new(&[], 0)?;
        let image = tables.image()?;
        backend.fill(0, &image)?;
        backend.activate(0)?;
        Ok(Self {
            backend,
            tables,
            generation: 0,
            carried: BTreeMap::new(),
            events: Default::default(),
        })
    }

    /// Goes on where another process has left off: with what a backend that it pinned holds, with `generation`, the
    /// lists as it applied them, and counts by position in these. [`Self::apply`] is the only way to change them then.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyEntries`].
    pub fn resume(
        backend: B,
        generation: u32,
        lists: &[ListEntry],
        counts: impl IntoIterator<Item = (RuleRef, Count)>,
    ) -> Result<Self, Error> {
        let by_rule = |(rule, count)| match rule {
            RuleRef::List(position) => Some((position, count)),
            RuleRef::Rule(_) | RuleRef::Default | RuleRef::Resolver => None,
        };
        Ok(Self {
            backend,
            tables: Tables::new(lists, 0)?,
            generation,
            carried: counts.into_iter().filter_map(by_rule).collect(),
            events: Default::default(),
        })
    }

    /// Counts by position from before the lists were last replaced, which the backend does not hold; for
    /// [`Self::resume`].
    pub fn carried(&self) -> impl Iterator<Item = (RuleRef, Count)> {
        let position = |&rule: &u32| self.tables.position(rule).map(RuleRef::List);
        self.carried
            .iter()
            .filter_map(move |(rule, &count)| Some((position(rule)?, count)))
    }

    /// Replaces all lists by those of `policy`, leaving out entries that have expired by `now`, in seconds since
    /// the Unix epoch. Packets meet either the old lists or the new ones.
    ///
    /// # Errors
    ///
    /// Those of the backend, and [`Error::TooManyEntries`]; the lists in use stay as they were.
    pub fn apply(&mut self, policy: &PolicySpec, now: u64) -> Result<Applied, Error> {
        let tables = Tables::new(&policy.lists, now)?;
        let is_expired = |entry: &&ListEntry| entry.expires.is_some_and(|time| time <= now);
        let expired = policy.lists.iter().filter(is_expired).count();
        self.swap(tables, |old, new, rule| new.find(old.entry(rule)))?;
        let (lookups4, lookups6) = self.tables.lookups();
        Ok(Applied {
            entries: policy.lists.len() - expired,
            expired,
            not_exported: not_exported(policy),
            lookups4,
            lookups6,
        })
    }

    /// Appends an entry to the lists.
    ///
    /// # Errors
    ///
    /// As for [`Self::apply`].
    pub fn add(&mut self, entry: ListEntry, now: u64) -> Result<RuleRef, Error> {
        let position = self.tables.entries().len() as u32;
        let patch = self.tables.add(entry, now)?;
        self.change(patch.map(|patch| vec![patch]))?;
        Ok(RuleRef::List(position))
    }

    /// Removes the entry at `position` in the lists, counted from 0; later ones move up.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchEntry`], and those of the backend.
    pub fn remove(&mut self, position: u32) -> Result<ListEntry, Error> {
        let (entry, patch) = self.tables.remove(position)?;
        self.change(patch.map(|patch| vec![patch]))?;
        Ok(entry)
    }

    /// Puts entries out of force whose time is over at `now`, in seconds since the Unix epoch, and returns how
    /// many they were. They keep their positions in the lists.
    ///
    /// # Errors
    ///
    /// Those of the backend.
    pub fn expire(&mut self, now: u64) -> Result<usize, Error> {
        let (count, patches) = self.tables.expire(now);
        if count > 0 {
            self.change(patches)?;
        }
        Ok(count)
    }

    /// When [`Self::expire`] has something to do next, in seconds since the Unix epoch.
    pub fn next_expiry(&self) -> Option<u64> {
        self.tables.next_expiry()
    }

    /// Replaces the set of the host's own addresses: packets to these are not judged by entries of prefix length 0.
    ///
    /// # Errors
    ///
    /// Those of the backend.
    pub fn set_local(&mut self, addresses: &[IpAddr]) -> Result<(), Error> {
        let keys: Vec<_> = addresses.iter().copied().map(local_key).collect();
        self.backend.set_local(&keys)
    }

    /// The entries in force or expired, in the order of the lists.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = &ListEntry> {
        self.tables.entries()
    }

    /// Runs the program over one frame, starting at its Ethernet header.
    ///
    /// # Errors
    ///
    /// Those of the backend.
    pub fn run(&mut self, frame: &[u8]) -> Result<Verdict, Error> {
        let Outcome { action, reason, rule } = self.backend.run(frame)?;
        let rule = rule
            .and_then(|rule| self.tables.position(rule))
            .map(RuleRef::List);
        Ok(Verdict { action, rule, reason })
    }

    /// What was counted.
    ///
    /// # Errors
    ///
    /// Those of the backend.
    pub fn counters(&mut self) -> Result<Counters, Error> {
        let reasons = Reason::ALL
            .into_iter()
            .zip(self.backend.reason_counts()?)
            .collect();
        let mut by_rule = self.carried.clone();
        for (rule, count) in self.backend.rule_counts(self.slot())? {
            add(by_rule.entry(rule).or_default(), count);
        }
        let mut rules: Vec<_> = by_rule
            .into_iter()
            .filter_map(|(rule, count)| Some((RuleRef::List(self.tables.position(rule)?), count)))
            .collect();
        rules.sort_unstable_by_key(|&(rule, _)| rule);
        Ok(Counters { reasons, rules })
    }

    /// Takes the oldest event.
    ///
    /// # Errors
    ///
    /// Those of the backend.
    pub fn next_event(&mut self) -> Result<Option<PacketEvent>, Error> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        Ok(self
            .backend
            .next_event()?
            .map(|event| translate(&event, &self.tables)))
    }

    /// What carries the maps.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// What carries the maps.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    fn slot(&self) -> u32 {
        self.generation & 1
    }

    /// Writes patches into the slot in use, or the whole of the tables into the other one.
    fn change(&mut self, patches: Option<Vec<Patch>>) -> Result<(), Error> {
        match patches {
            Some(patches) => patches
                .iter()
                .try_for_each(|patch| self.backend.patch(self.slot(), patch)),
            None => {
                let tables = self.tables.clone();
                self.swap(tables, |_, _, rule| Some(rule))
            }
        }
    }

    /// Fills the slot that is not in use with `tables` and takes it into use. `renumber` tells, of old tables, new
    /// tables and a rule of the old ones, which rule of the new ones its counts go to.
    fn swap(
        &mut self,
        mut tables: Tables,
        renumber: impl Fn(&Tables, &Tables, u32) -> Option<u32>,
    ) -> Result<(), Error> {
        let image = tables.image()?;
        let next = self.generation.wrapping_add(1);
        self.backend.fill(next & 1, &image)?;
        self.backend.activate(next)?;
        // What the old lists still had to say, told in their own terms.
        let old_counts = self.backend.rule_counts(self.slot())?;
        while let Some(event) = self.backend.next_event()? {
            let told_by = if event.generation == next {
                &tables
            } else {
                &self.tables
            };
            if self.events.len() < KEPT_EVENTS {
                self.events.push_back(translate(&event, told_by));
            }
        }
        let mut carried = BTreeMap::new();
        let old_counts = std::mem::take(&mut self.carried).into_iter().chain(old_counts);
        for (rule, count) in old_counts {
            if let Some(rule) = renumber(&self.tables, &tables, rule) {
                add(carried.entry(rule).or_default(), count);
            }
        }
        self.carried = carried;
        self.tables = tables;
        self.generation = next;
        Ok(())
    }
}

fn add(sum: &mut Count, count: Count) {
    sum.packets += count.packets;
    sum.bytes += count.bytes;
}

fn not_exported(policy: &PolicySpec) -> Vec<NotExported> {
    let entries = policy.lists.iter().enumerate().filter_map(|(index, entry)| {
        let never = entry.protocol == ListProtocol::Icmp && entry.ports.is_some();
        never.then_some(NotExported {
            rule: RuleRef::List(index as u32),
            why: Why::NeverFits,
        })
    });
    let rules = policy
        .rules
        .iter()
        .enumerate()
        .filter_map(|(index, rule)| match rule.action {
            RuleAction::Drop => Some(NotExported {
                rule: RuleRef::Rule(index as u32),
                why: Why::AskedPerFlow,
            }),
            RuleAction::Direct | RuleAction::Egress(_) | RuleAction::Redirect(_) | RuleAction::Reject => None,
        });
    entries.chain(rules).collect()
}

fn translate(event: &Event, tables: &Tables) -> PacketEvent {
    let address = |words: [u64; 2]| {
        let bytes: [u8; 16] = std::array::from_fn(|at| words[at / 8].to_le_bytes()[at % 8]);
        match event.version {
            4 => IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
            _ => IpAddr::V6(Ipv6Addr::from(bytes)),
        }
    };
    let is_understood = event.version != 0;
    PacketEvent {
        reason: Reason::from_number(event.reason).unwrap_or(Reason::NotUnderstood),
        rule: Some(event.ruling)
            .filter(|ruling| ruling.is_some())
            .and_then(|ruling| tables.position(ruling.rule()))
            .map(RuleRef::List),
        interface: event.interface,
        length: event.length,
        addresses: is_understood.then(|| (address(event.source), address(event.destination))),
        protocol: (event.protocol != Selectors::NO_PROTOCOL).then_some(event.protocol as u8),
        port: (event.port != Selectors::NO_PORT).then_some(event.port as u16),
    }
}
