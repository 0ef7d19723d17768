//! The prefixes of one address family, and what the maps hold for each.

use std::collections::{BTreeMap, BTreeSet};

use tungate_bpf_abi::{Key4, Key6};
use tungate_engine::policy::{ListAction, ListEntry, ListProtocol};

use super::PATCH_MAX_REPLACED;
use super::tree::Tree;

/// An address as a number, most significant bit first.
pub(crate) trait Address: Copy + Ord + std::fmt::Debug {
    /// The key of this family's map.
    type Key: Copy + Eq + std::fmt::Debug;

    /// The address with all but its first `length` bits cleared.
    fn masked(self, length: u8) -> Self;
    /// The address with all but its first `length` bits set.
    fn last(self, length: u8) -> Self;
    /// The map's key for this address and prefix length.
    fn key(self, length: u8) -> Self::Key;
}

impl Address for u32 {
    type Key = Key4;

    fn masked(self, length: u8) -> Self {
        self & !Self::MAX.checked_shr(u32::from(length)).unwrap_or(0)
    }

    fn last(self, length: u8) -> Self {
        self | Self::MAX.checked_shr(u32::from(length)).unwrap_or(0)
    }

    fn key(self, length: u8) -> Key4 {
        Key4 {
            address: u32::from_le_bytes(self.to_be_bytes()),
            length: u32::from(length),
        }
    }
}

impl Address for u128 {
    type Key = Key6;

    fn masked(self, length: u8) -> Self {
        self & !Self::MAX.checked_shr(u32::from(length)).unwrap_or(0)
    }

    fn last(self, length: u8) -> Self {
        self | Self::MAX.checked_shr(u32::from(length)).unwrap_or(0)
    }

    fn key(self, length: u8) -> Key6 {
        Key6 {
            address: words(self),
            length: u64::from(length),
        }
    }
}

/// The two words of an IPv6 address as they lie in the packet, read on a little-endian machine.
pub(crate) fn words(address: u128) -> [u64; 2] {
    [(address >> 64) as u64, address as u64].map(|word| u64::from_le_bytes(word.to_be_bytes()))
}

/// A prefix: address with host bits zero, and length. Sorts right before everything inside it.
pub(crate) type Prefix<A> = (A, u8);

/// The rules of one prefix, in the order in which they are tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Members {
    /// None: the prefix is there as a marker only.
    None,
    /// One, as nearly always.
    One(u32),
    /// Two or more.
    Many(Vec<u32>),
}

impl Members {
    pub(crate) fn as_slice(&self) -> &[u32] {
        match self {
            Self::None => &[],
            Self::One(rule) => std::slice::from_ref(rule),
            Self::Many(rules) => rules,
        }
    }

    fn from_vec(rules: Vec<u32>) -> Self {
        match rules[..] {
            [] => Self::None,
            [rule] => Self::One(rule),
            _ => Self::Many(rules),
        }
    }
}

/// What is known of one prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) members: Members,
    /// Number of prefixes for which this one is a marker.
    markers: u32,
}

impl Node {
    /// A prefix that has neither rules nor, so far, anyone to be a marker for.
    const MARKER: Self = Self {
        members: Members::None,
        markers: 0,
    };
}

/// What one rule more or less did to the keys.
#[derive(Debug)]
pub(crate) struct Delta<A> {
    /// Whether the tree tries the rule's prefix length.
    pub(crate) fits_tree: bool,
    /// Keys that were not there before.
    pub(crate) created: Vec<Prefix<A>>,
    /// Keys that were there, and are to get another group; not complete if more than [`PATCH_MAX_REPLACED`].
    pub(crate) changed: Vec<Prefix<A>>,
    /// Keys that are gone.
    pub(crate) removed: Vec<Prefix<A>>,
}

impl<A> Default for Delta<A> {
    fn default() -> Self {
        Self {
            fits_tree: false,
            created: Vec::new(),
            changed: Vec::new(),
            removed: Vec::new(),
        }
    }
}

/// All prefixes of a family, except for length 0.
#[derive(Debug, Clone)]
pub(crate) struct Family<A> {
    nodes: BTreeMap<Prefix<A>, Node>,
    /// Rules of prefix length 0.
    default: Vec<u32>,
    tree: Tree,
    /// Lengths that have members, or had some since the tree was built.
    lengths: BTreeSet<u8>,
}

impl<A: Address> Family<A> {
    /// Takes rules of one family with their prefixes, in any order.
    pub(crate) fn new(mut rules: Vec<(Prefix<A>, u32)>, entries: &[ListEntry]) -> Self {
        rules.sort_unstable();
        let mut default = Vec::new();
        let mut lengths = BTreeSet::new();
        let mut prefixes: Vec<(Prefix<A>, Node)> = Vec::with_capacity(rules.len());
        for same in rules.chunk_by(|(one, _), (other, _)| one == other) {
            let prefix = same[0].0;
            let members = match *same {
                [(_, rule)] => Members::One(rule),
                _ => Members::Many(in_order(same.iter().map(|&(_, rule)| rule).collect(), entries)),
            };
            if prefix.1 == 0 {
                default = members.as_slice().to_vec();
            } else {
                lengths.insert(prefix.1);
                prefixes.push((prefix, Node { members, markers: 0 }));
            }
        }
        let mut family = Self {
            nodes: BTreeMap::new(),
            default,
            tree: Tree::default(),
            lengths,
        };
        family.plant(prefixes);
        family
    }

    /// Builds the tree, and the markers it needs, anew if other lengths are in use than it was built for.
    pub(crate) fn replant(&mut self) {
        let in_use = self
            .nodes
            .iter()
            .filter(|(_, node)| node.members != Members::None);
        self.lengths = in_use.map(|(&(_, length), _)| length).collect();
        if self.tree.nodes().len() == self.lengths.len()
            && self.lengths.iter().all(|&length| self.tree.has(length))
        {
            return;
        }
        let prefixes = std::mem::take(&mut self.nodes)
            .into_iter()
            .filter(|(_, node)| node.members != Members::None)
            .map(|(prefix, node)| (prefix, Node { markers: 0, ..node }))
            .collect();
        self.plant(prefixes);
    }

    fn plant(&mut self, prefixes: Vec<(Prefix<A>, Node)>) {
        self.tree = Tree::new(&self.lengths.iter().copied().collect::<Vec<_>>());
        let mut markers: Vec<Prefix<A>> = prefixes
            .iter()
            .flat_map(|&((address, length), _)| {
                self.tree
                    .markers(length)
                    .map(move |shorter| (address.masked(shorter), shorter))
            })
            .collect();
        markers.sort_unstable();
        self.nodes = prefixes.into_iter().collect();
        for same in markers.chunk_by(|one, other| one == other) {
            self.nodes.entry(same[0]).or_insert(Node::MARKER).markers += same.len() as u32;
        }
    }

    /// Adds a rule of a prefix whose length is not 0.
    pub(crate) fn add(&mut self, prefix: Prefix<A>, rule: u32, entries: &[ListEntry]) -> Delta<A> {
        let (address, length) = prefix;
        let mut delta = Delta {
            fits_tree: self.tree.has(length),
            ..Delta::default()
        };
        self.lengths.insert(length);
        let node = self.nodes.entry(prefix).or_insert_with(|| {
            delta.created.push(prefix);
            Node::MARKER
        });
        let mut rules = node.members.as_slice().to_vec();
        rules.push(rule);
        let had_members = node.members != Members::None;
        node.members = Members::from_vec(in_order(rules, entries));
        if !had_members {
            for shorter in self.tree.markers(length) {
                let marker = (address.masked(shorter), shorter);
                let node = self.nodes.entry(marker).or_insert_with(|| {
                    delta.created.push(marker);
                    Node::MARKER
                });
                node.markers += 1;
            }
        }
        delta.changed = self.decided_by(rule, prefix, entries);
        delta.changed.retain(|prefix| !delta.created.contains(prefix));
        delta
    }

    /// Removes a rule that is there, of a prefix whose length is not 0.
    pub(crate) fn remove(&mut self, prefix: Prefix<A>, rule: u32, entries: &[ListEntry]) -> Delta<A> {
        let (address, length) = prefix;
        let changed = self.decided_by(rule, prefix, entries);
        let mut delta = Delta {
            fits_tree: true,
            changed,
            ..Delta::default()
        };
        let node = self
            .nodes
            .get_mut(&prefix)
            .expect("a rule that was added has a node");
        let mut rules = node.members.as_slice().to_vec();
        rules.retain(|&other| other != rule);
        node.members = Members::from_vec(rules);
        if node.members == Members::None {
            let markers = self
                .tree
                .markers(length)
                .map(|shorter| (address.masked(shorter), shorter));
            for marker in markers {
                let node = self.nodes.get_mut(&marker).expect("every prefix has its markers");
                node.markers -= 1;
                delta.removed.push(marker);
            }
            delta.removed.push(prefix);
            delta.removed.retain(|prefix| self.nodes[prefix] == Node::MARKER);
            for prefix in &delta.removed {
                self.nodes.remove(prefix);
            }
            delta.changed.retain(|prefix| !delta.removed.contains(prefix));
        }
        delta
    }

    /// Changes the rules of prefix length 0.
    pub(crate) fn set_default(&mut self, rules: Vec<u32>, entries: &[ListEntry]) {
        self.default = in_order(rules, entries);
    }

    /// Keys whose rulings `rule`, of `prefix`, takes part in. Stops after a number that is too large for a patch, also
    /// without `prefix` itself.
    fn decided_by(&self, rule: u32, prefix: Prefix<A>, entries: &[ListEntry]) -> Vec<Prefix<A>> {
        let mut chain = Vec::new();
        let (address, length) = prefix;
        self.nodes
            .range(prefix..=(address.last(length), u8::MAX))
            .filter(|&(&inner, node)| {
                // Most prefixes have an entry for all packets: those around them have no say.
                let is_closed = node
                    .members
                    .as_slice()
                    .last()
                    .is_some_and(|&last| fits_all(&entries[last as usize]));
                if is_closed && inner != prefix {
                    return false;
                }
                self.chain(inner, entries, &mut chain);
                chain.contains(&rule)
            })
            .map(|(&inner, _)| inner)
            .take(PATCH_MAX_REPLACED + 2)
            .collect()
    }

    /// The rules of a prefix, in the order in which they are tried.
    pub(crate) fn members(&self, prefix: Prefix<A>) -> &[u32] {
        if prefix.1 == 0 {
            return &self.default;
        }
        self.nodes
            .get(&prefix)
            .map_or(&[], |node| node.members.as_slice())
    }

    /// Number of keys the map holds.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// All keys the map holds, with the rules of the prefix itself.
    pub(crate) fn prefixes(&self) -> impl Iterator<Item = (Prefix<A>, &[u32])> {
        self.nodes
            .iter()
            .map(|(&prefix, node)| (prefix, node.members.as_slice()))
    }

    /// The rules that decide about addresses whose longest key is `prefix`: its own, then those of ever shorter
    /// prefixes, up to the first that fits every packet.
    pub(crate) fn chain(&self, (address, length): Prefix<A>, entries: &[ListEntry], rules: &mut Vec<u32>) {
        rules.clear();
        for &shorter in self.lengths.range(..=length).rev() {
            let Some(node) = self.nodes.get(&(address.masked(shorter), shorter)) else {
                continue;
            };
            for &rule in node.members.as_slice() {
                rules.push(rule);
                if fits_all(&entries[rule as usize]) {
                    return;
                }
            }
        }
    }
}

/// Whether every packet to or from the entry's network fits.
pub(crate) fn fits_all(entry: &ListEntry) -> bool {
    entry.protocol == ListProtocol::Any && entry.ports.is_none()
}

/// Sorts rules of one prefix: the more specific first, then deny before allow, then the earlier line.
fn in_order(mut rules: Vec<u32>, entries: &[ListEntry]) -> Vec<u32> {
    rules.sort_unstable_by_key(|&rule| {
        let entry = &entries[rule as usize];
        let specificity = match (entry.ports.is_some(), entry.protocol != ListProtocol::Any) {
            (true, true) => 0u8,
            (true, false) => 1,
            (false, true) => 2,
            (false, false) => 3,
        };
        (specificity, entry.action != ListAction::Deny, rule)
    });
    rules
}
