//! The maps: names, keys, values.

use crate::REASONS;

/// Names of the maps, as in the object.
pub mod map {
    /// `ARRAY[1]` of `u32`: the generation; its lowest bit is the slot in use.
    pub const ACTIVE: &str = "ACTIVE";
    /// `ARRAY[2]` of [`Settings`](super::Settings), by slot.
    pub const SETTINGS: &str = "SETTINGS";
    /// `ARRAY_OF_MAPS[2]` of `HASH` from [`Key4`](super::Key4) to [`Group`](super::Group), by slot.
    pub const GROUPS4: &str = "GROUPS4";
    /// `ARRAY_OF_MAPS[2]` of `HASH` from [`Key6`](super::Key6) to [`Group`](super::Group), by slot.
    pub const GROUPS6: &str = "GROUPS6";
    /// `ARRAY_OF_MAPS[2]` of `ARRAY` of [`Cell`](super::Cell), by slot.
    pub const CELLS: &str = "CELLS";
    /// `HASH` of the host's own addresses, as [`Key6`](super::Key6) whose length is the IP version.
    pub const LOCAL: &str = "LOCAL";
    /// `PERCPU_ARRAY` of [`Count`](super::Count) by [`Reason`](crate::Reason).
    pub const REASONS: &str = "REASONS";
    /// `PERCPU_ARRAY` of [`Count`](super::Count) by [`Settings::rules_base`](super::Settings::rules_base) + rule.
    pub const RULES: &str = "RULES";
    /// `RINGBUF` of [`Event`](super::Event).
    pub const EVENTS: &str = "EVENTS";
}

/// Number of slots: one in use, one to be filled.
pub const SLOTS: usize = 2;

/// Most nodes of an IPv4 tree: prefix lengths 1 to 32.
pub const TREE4_NODES: usize = 32;

/// Most nodes of an IPv6 tree: prefix lengths 1 to 128.
pub const TREE6_NODES: usize = 128;

/// Stands for "no further node" in a tree.
pub const NO_NODE: u32 = u32::MAX;

/// Key of an IPv4 group. No padding: the hash is taken over all bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Key4 {
    /// Masked address, as in the packet.
    pub address: u32,
    /// Prefix length.
    pub length: u32,
}

/// Key of an IPv6 group, and of a local address of either version. No padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Key6 {
    /// Masked address, as in the packet.
    pub address: [u64; 2],
    /// Prefix length; for local addresses 4 or 6.
    pub length: u64,
}

/// What decides, in one word: 0 for nothing, else the rule's number plus 1, with the top bit set for `deny`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Ruling(pub u32);

impl Ruling {
    /// No entry fits.
    pub const NONE: Self = Self(0);
    /// Rules are numbered below this.
    pub const MAX_RULES: u32 = Self::DENY - 1;
    const DENY: u32 = 1 << 31;

    /// The ruling of rule `rule`, which is below [`Self::MAX_RULES`].
    pub const fn new(rule: u32, deny: bool) -> Self {
        Self((rule + 1) | if deny { Self::DENY } else { 0 })
    }

    /// Whether an entry decides.
    pub const fn is_some(self) -> bool {
        self.0 != 0
    }

    /// Whether the packet is to be dropped.
    pub const fn is_deny(self) -> bool {
        self.0 & Self::DENY != 0
    }

    /// The rule that decides; only where [`Self::is_some`].
    pub const fn rule(self) -> u32 {
        (self.0 & !Self::DENY).wrapping_sub(1)
    }
}

/// What holds for one prefix: one ruling for every packet, or a row of [`Cell`]s by [`Class`].
///
/// In one word, so that a reader sees either the old or the new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Group(pub u64);

impl Group {
    /// Decides nothing.
    pub const NONE: Self = Self(0);

    /// One ruling for every packet.
    pub const fn of(ruling: Ruling) -> Self {
        Self(ruling.0 as u64)
    }

    /// The ruling is in the row of cells that starts at `index`, which is not 0.
    pub const fn at(index: u32) -> Self {
        Self((index as u64) << 32)
    }

    /// The ruling, where [`Self::cells`] is 0.
    pub const fn ruling(self) -> Ruling {
        Ruling(self.0 as u32)
    }

    /// Index of the row of cells, one for each [`Class`]; 0 for none.
    pub const fn cells(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// What lists can tell packets apart by, besides addresses and the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Class {
    /// A protocol that entries cannot name, or one that could not be read.
    Other = 0,
    /// ICMP or ICMPv6.
    Icmp = 1,
    /// TCP whose port could not be read.
    Tcp = 2,
    /// UDP whose port could not be read.
    Udp = 3,
    /// TCP with a port.
    TcpPort = 4,
    /// UDP with a port.
    UdpPort = 5,
}

impl Class {
    /// Number of classes: the cells in a row.
    pub const COUNT: u32 = 6;
}

/// One word pair of the port tables.
///
/// In a row, by class: with `b` = 0 the ruling is `a`; else ports `a..a + b` are segments. A segment: ports from
/// `a` on, up to the next segment's, have the ruling `b`. The first segment of a table starts at port 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(C)]
pub struct Cell {
    /// Ruling, index of the first segment, or first port.
    pub a: u32,
    /// 0, number of segments, or ruling.
    pub b: u32,
}

/// One IPv4 prefix length to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Node4 {
    /// Makes a [`Key4`], as one word, of an address above which all bits are set: the low half holds the bits of
    /// the address to keep, the high half the prefix length.
    pub select: u64,
    /// Where the node to try next after a hit starts, in bytes from the tree's start, or [`NO_NODE`].
    pub on_hit: u32,
    /// The same after a miss.
    pub on_miss: u32,
}

/// One IPv6 prefix length to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Node6 {
    /// Bits of the address to keep, as in the packet.
    pub mask: [u64; 2],
    /// Prefix length.
    pub length: u64,
    /// Where the node to try next after a hit starts, in bytes from the tree's start, or [`NO_NODE`].
    pub on_hit: u32,
    /// The same after a miss.
    pub on_miss: u32,
}

/// What a slot holds besides its maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Settings {
    /// By [`Reason`](crate::Reason): a packet makes an event when its number in the reason's count on its CPU,
    /// ANDed with this, is 0. All ones for no events, 0 for every packet.
    pub sample: [u64; REASONS],
    /// IPv4 entries of prefix length 0.
    pub default4: Group,
    /// IPv6 entries of prefix length 0.
    pub default6: Group,
    /// Index of rule 0 in [`map::RULES`].
    pub rules_base: u32,
    /// Number of rules that have a counter of their own.
    pub rules_counted: u32,
    /// 0, or [`NO_NODE`] for an empty IPv4 tree.
    pub root4: u32,
    /// 0, or [`NO_NODE`] for an empty IPv6 tree.
    pub root6: u32,
    /// Prefix lengths of IPv4 groups.
    pub tree4: [Node4; TREE4_NODES],
    /// Prefix lengths of IPv6 groups.
    pub tree6: [Node6; TREE6_NODES],
}

/// Packets and their bytes, from the first byte of the Ethernet header on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Count {
    /// Number of packets.
    pub packets: u64,
    /// Their lengths in all.
    pub bytes: u64,
}

/// A sampled packet, as it lies in the ring buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// Source address, as in the packet; IPv4 in the first 4 bytes.
    pub source: [u64; 2],
    /// Destination address.
    pub destination: [u64; 2],
    /// Number of the [`Reason`](crate::Reason).
    pub reason: u32,
    /// What decided.
    pub ruling: Ruling,
    /// Index of the interface on which the packet came in.
    pub interface: u32,
    /// Length of the frame.
    pub length: u32,
    /// 4, 6, or 0 where the headers were not understood.
    pub version: u32,
    /// IP protocol number or [`Selectors::NO_PROTOCOL`](crate::Selectors::NO_PROTOCOL).
    pub protocol: u32,
    /// Destination port or [`Selectors::NO_PORT`](crate::Selectors::NO_PORT).
    pub port: u32,
    /// Generation of the lists that were asked.
    pub generation: u32,
}

/// Writes fields one after another, as `repr(C)` does without padding.
struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    const fn new() -> Self {
        Self { bytes: [0; N], at: 0 }
    }

    fn put(&mut self, field: &[u8]) -> &mut Self {
        self.bytes[self.at..self.at + field.len()].copy_from_slice(field);
        self.at += field.len();
        self
    }

    fn put32(&mut self, value: u32) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    fn put64(&mut self, value: u64) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    fn finish(&self) -> [u8; N] {
        assert!(self.at == N, "every byte of the layout is written");
        self.bytes
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Key4 {
    /// The key as the map holds it.
    pub fn to_bytes(self) -> [u8; size_of::<Self>()] {
        Writer::new().put32(self.address).put32(self.length).finish()
    }
}

impl Key6 {
    /// The key as the map holds it.
    pub fn to_bytes(self) -> [u8; size_of::<Self>()] {
        Writer::new()
            .put64(self.address[0])
            .put64(self.address[1])
            .put64(self.length)
            .finish()
    }
}

impl Group {
    /// The group as the map holds it.
    pub fn to_bytes(self) -> [u8; size_of::<Self>()] {
        self.0.to_le_bytes()
    }
}

impl Cell {
    /// The cell as the map holds it.
    pub fn to_bytes(self) -> [u8; size_of::<Self>()] {
        Writer::new().put32(self.a).put32(self.b).finish()
    }
}

impl Settings {
    /// Settings of a slot without lists: no tree, no events.
    pub const EMPTY: Self = Self {
        sample: [u64::MAX; REASONS],
        default4: Group::NONE,
        default6: Group::NONE,
        rules_base: 0,
        rules_counted: 0,
        root4: NO_NODE,
        root6: NO_NODE,
        tree4: [Node4 {
            select: 0,
            on_hit: NO_NODE,
            on_miss: NO_NODE,
        }; TREE4_NODES],
        tree6: [Node6 {
            mask: [0; 2],
            length: 0,
            on_hit: NO_NODE,
            on_miss: NO_NODE,
        }; TREE6_NODES],
    };

    /// The settings as the map holds them.
    pub fn to_bytes(&self) -> [u8; size_of::<Self>()] {
        let mut writer = Writer::new();
        for mask in self.sample {
            writer.put64(mask);
        }
        writer.put64(self.default4.0).put64(self.default6.0);
        writer
            .put32(self.rules_base)
            .put32(self.rules_counted)
            .put32(self.root4)
            .put32(self.root6);
        for node in &self.tree4 {
            writer.put64(node.select).put32(node.on_hit).put32(node.on_miss);
        }
        for node in &self.tree6 {
            writer
                .put64(node.mask[0])
                .put64(node.mask[1])
                .put64(node.length)
                .put32(node.on_hit)
                .put32(node.on_miss);
        }
        writer.finish()
    }
}

impl Count {
    /// Reads a count as the map holds it.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        Self {
            packets: u64_at(bytes, 0),
            bytes: u64_at(bytes, 8),
        }
    }
}

impl Event {
    /// Reads an event as it lies in the ring buffer.
    pub fn from_bytes(bytes: &[u8; size_of::<Self>()]) -> Self {
        Self {
            source: [u64_at(bytes, 0), u64_at(bytes, 8)],
            destination: [u64_at(bytes, 16), u64_at(bytes, 24)],
            reason: u32_at(bytes, 32),
            ruling: Ruling(u32_at(bytes, 36)),
            interface: u32_at(bytes, 40),
            length: u32_at(bytes, 44),
            version: u32_at(bytes, 48),
            protocol: u32_at(bytes, 52),
            port: u32_at(bytes, 56),
            generation: u32_at(bytes, 60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_have_no_padding() {
        assert_eq!(size_of::<Key4>(), 8);
        assert_eq!(size_of::<Key6>(), 24);
        assert_eq!(
            size_of::<Settings>(),
            REASONS * 8 + 2 * 8 + 4 * 4 + TREE4_NODES * 16 + TREE6_NODES * 32
        );
        assert_eq!(size_of::<Event>(), 64);
        // `to_bytes` asserts that it fills the type's whole size, so padding would show here.
        Settings::EMPTY.to_bytes();
    }

    #[test]
    fn rulings_hold_rule_and_action() {
        for rule in [0, 1, Ruling::MAX_RULES - 1] {
            for deny in [false, true] {
                let ruling = Ruling::new(rule, deny);
                assert!(ruling.is_some());
                assert_eq!((ruling.rule(), ruling.is_deny()), (rule, deny));
            }
        }
        assert!(!Ruling::NONE.is_some());
    }
}
