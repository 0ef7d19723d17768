//! Allow and deny lists: longest prefix wins.

use std::fmt;
use std::net::IpAddr;

use hashbrown::HashTable;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// What a list entry does with the packets it decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ListAction {
    /// Drops the packet.
    Deny,
    /// Lets it go on to the rules.
    Allow,
}

/// The protocols a list entry is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ListProtocol {
    /// TCP only.
    Tcp,
    /// UDP only.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
    /// Every protocol, also those that cannot be read.
    Any,
}

/// An inclusive range of destination ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortRange {
    /// Lowest port that fits.
    pub first: u16,
    /// Highest port that fits; not below `first`.
    pub last: u16,
}

/// One line of a list: `deny|allow CIDR [tcp|udp|icmp|any] [PORT|LO-HI|any]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ListEntry {
    /// What happens to packets that this entry decides.
    pub action: ListAction,
    /// Addresses the entry is about, with host bits zero.
    pub network: IpNet,
    /// Protocol it is about.
    pub protocol: ListProtocol,
    /// Destination ports it is about; `None` for all, and for packets whose port cannot be read.
    pub ports: Option<PortRange>,
    /// Seconds since the Unix epoch from which on the entry no longer counts.
    pub expires: Option<u64>,
}

/// Which of a packet's addresses an entry fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ListSide {
    /// The source address.
    Source,
    /// The destination address.
    Destination,
}

/// The entry that decided, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListMatch {
    /// What the entry says.
    pub action: ListAction,
    /// Which address it fitted.
    pub side: ListSide,
    /// Index of the entry in [`PolicySpec::lists`](super::PolicySpec::lists).
    pub entry: u32,
}

/// The entries of a policy, indexed by address.
///
/// The entries of one CIDR form a group, in order of precedence. Groups are found by hashing prefix length and
/// masked address, once for each prefix length in use from the longest down: a lookup costs the same however many
/// entries there are.
#[derive(Debug, Default)]
pub struct Lists {
    v4: Index<u32>,
    v6: Index<u128>,
    records: Vec<Record>,
    /// Times at which entries expire, in order.
    expiries: Vec<u64>,
}

/// The groups of one IP version.
#[derive(Debug, Default)]
struct Index<A> {
    groups: HashTable<Group<A>>,
    /// Prefix lengths in use, the longest first.
    lengths: Vec<u8>,
}

/// The entries of one CIDR: records from `start` to the next one that is [`Record::last`].
#[derive(Debug)]
struct Group<A> {
    network: A,
    length: u8,
    start: u32,
}

/// What an entry asks of a packet with its address.
#[derive(Debug)]
struct Record {
    /// When it expires; `u64::MAX` for never.
    expires: u64,
    /// Index in [`PolicySpec::lists`](super::PolicySpec::lists).
    entry: u32,
    ports: Option<PortRange>,
    protocol: ListProtocol,
    action: ListAction,
    /// Whether it is the last of its group.
    last: bool,
}

impl Lists {
    /// Indexes `entries`, in time that grows as sorting them does.
    ///
    /// # Panics
    ///
    /// With more than 2³² entries.
    pub fn new(entries: &[ListEntry]) -> Self {
        let mut order: Vec<_> = entries
            .iter()
            .zip(0u32..)
            .map(|(entry, index)| Key::new(entry, index))
            .collect();
        assert_eq!(order.len(), entries.len(), "entries are numbered in 32 bits");
        order.sort_unstable();

        let mut lists = Self {
            records: Vec::with_capacity(entries.len()),
            ..Self::default()
        };
        let group_count = |v6| {
            order
                .chunk_by(Key::same_group)
                .filter(|group| group[0].v6 == v6)
                .count()
        };
        lists.v4.groups.reserve(group_count(false), Group::hash);
        lists.v6.groups.reserve(group_count(true), Group::hash);
        for group in order.chunk_by(Key::same_group) {
            let Key {
                v6, network, length, ..
            } = group[0];
            let start = lists.records.len() as u32;
            if v6 {
                lists.v6.insert(network, length, start);
            } else {
                lists.v4.insert(network as u32, length, start);
            }
            lists.records.extend(
                group
                    .iter()
                    .map(|key| Record::new(&entries[key.index as usize], key.index)),
            );
            lists
                .records
                .last_mut()
                .expect("a group has at least one entry")
                .last = true;
        }
        lists.v4.order_lengths();
        lists.v6.order_lengths();
        lists.expiries = entries.iter().filter_map(|entry| entry.expires).collect();
        lists.expiries.sort_unstable();
        lists.expiries.dedup();
        lists
    }

    /// Whether there is no entry at all, so that no packet needs a lookup.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Looks a packet up; `None` when no entry fits. `protocol` is the IP protocol number behind extension
    /// headers, or `None` if it could not be read; `port` the destination port, or `None`. `wall` is the time of
    /// day in seconds since the Unix epoch, for entries that expire.
    pub fn judge(
        &self,
        source: IpAddr,
        destination: IpAddr,
        protocol: Option<u8>,
        port: Option<u16>,
        wall: u64,
    ) -> Option<ListMatch> {
        let found = |address, side| {
            let Record { action, entry, .. } = *self.find(address, protocol, port, wall)?;
            Some(ListMatch { action, side, entry })
        };
        found(source, ListSide::Source).or_else(|| found(destination, ListSide::Destination))
    }

    /// The earliest time later than `wall` at which an entry expires, in seconds since the Unix epoch.
    pub fn next_expiry(&self, wall: u64) -> Option<u64> {
        self.expiries
            .get(self.expiries.partition_point(|&expiry| expiry <= wall))
            .copied()
    }

    fn find(&self, address: IpAddr, protocol: Option<u8>, port: Option<u16>, wall: u64) -> Option<&Record> {
        let fitting = |start: u32| {
            for record in &self.records[start as usize..] {
                if record.fits(protocol, port) && wall < record.expires {
                    return Some(record);
                }
                if record.last {
                    break;
                }
            }
            None
        };
        match address {
            IpAddr::V4(address) => self.v4.groups_around(address.to_bits()).find_map(fitting),
            IpAddr::V6(address) => self.v6.groups_around(address.to_bits()).find_map(fitting),
        }
    }
}

impl<A: Address> Index<A> {
    fn insert(&mut self, network: A, length: u8, start: u32) {
        let group = Group {
            network,
            length,
            start,
        };
        self.groups.insert_unique(group.hash(), group, Group::hash);
        if self.lengths.last() != Some(&length) {
            self.lengths.push(length);
        }
    }

    fn order_lengths(&mut self) {
        self.lengths.sort_unstable_by(|a, b| b.cmp(a));
        self.lengths.dedup();
    }

    /// Where the groups whose CIDR holds `address` start, the longest prefix first.
    fn groups_around(&self, address: A) -> impl Iterator<Item = u32> {
        self.lengths.iter().filter_map(move |&length| {
            let network = address.mask(length);
            let same = |group: &Group<A>| group.network == network && group.length == length;
            self.groups
                .find(network.hash(length), same)
                .map(|group| group.start)
        })
    }
}

impl<A: Address> Group<A> {
    fn hash(&self) -> u64 {
        self.network.hash(self.length)
    }
}

impl Record {
    fn new(entry: &ListEntry, index: u32) -> Self {
        Self {
            expires: entry.expires.unwrap_or(u64::MAX),
            entry: index,
            ports: entry.ports,
            protocol: entry.protocol,
            action: entry.action,
            last: false,
        }
    }

    fn fits(&self, protocol: Option<u8>, port: Option<u16>) -> bool {
        let protocol_fits = match self.protocol {
            ListProtocol::Any => true,
            ListProtocol::Tcp => protocol == Some(6),
            ListProtocol::Udp => protocol == Some(17),
            ListProtocol::Icmp => matches!(protocol, Some(1 | 58)),
        };
        protocol_fits
            && self
                .ports
                .is_none_or(|range| port.is_some_and(|port| (range.first..=range.last).contains(&port)))
    }
}

/// An entry's place in the index: fields compare in order of precedence.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    v6: bool,
    length: u8,
    network: u128,
    specificity: u8,
    action: ListAction,
    index: u32,
}

impl Key {
    fn new(entry: &ListEntry, index: u32) -> Self {
        let length = entry.network.prefix_len();
        let (v6, network) = match entry.network.network() {
            IpAddr::V4(address) => (false, address.to_bits().into()),
            IpAddr::V6(address) => (true, address.to_bits()),
        };
        let specificity = match (entry.ports, entry.protocol) {
            (Some(_), ListProtocol::Tcp | ListProtocol::Udp | ListProtocol::Icmp) => 0,
            (Some(_), ListProtocol::Any) => 1,
            (None, ListProtocol::Tcp | ListProtocol::Udp | ListProtocol::Icmp) => 2,
            (None, ListProtocol::Any) => 3,
        };
        Self {
            v6,
            length,
            network,
            specificity,
            action: entry.action,
            index,
        }
    }

    fn same_group(&self, other: &Self) -> bool {
        (self.v6, self.length, self.network) == (other.v6, other.length, other.network)
    }
}

/// An IP address as a number.
trait Address: Copy + Eq {
    /// The address with all but the first `length` bits zero.
    fn mask(self, length: u8) -> Self;
    /// A hash of the network; not keyed, since the groups are the operator's choice, not a client's.
    fn hash(self, length: u8) -> u64;
}

impl Address for u32 {
    fn mask(self, length: u8) -> Self {
        self & u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0)
    }

    fn hash(self, length: u8) -> u64 {
        mix(u64::from(self) << 8 | u64::from(length))
    }
}

impl Address for u128 {
    fn mask(self, length: u8) -> Self {
        self & u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)
    }

    fn hash(self, length: u8) -> u64 {
        mix(mix((self >> 64) as u64 ^ u64::from(length)) ^ self as u64)
    }
}

/// Multiplies and folds: every bit of `value` reaches the top and the bottom of the result, where hash tables look.
const fn mix(value: u64) -> u64 {
    let product = value as u128 * 0x9e37_79b9_7f4a_7c15;
    (product >> 64) as u64 ^ product as u64
}

impl fmt::Display for ListEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let action = match self.action {
            ListAction::Deny => "deny",
            ListAction::Allow => "allow",
        };
        write!(f, "{action} {}", self.network)?;
        match (self.protocol, self.ports) {
            (ListProtocol::Any, None) => return Ok(()),
            (ListProtocol::Tcp, _) => f.write_str(" tcp")?,
            (ListProtocol::Udp, _) => f.write_str(" udp")?,
            (ListProtocol::Icmp, _) => f.write_str(" icmp")?,
            (ListProtocol::Any, Some(_)) => f.write_str(" any")?,
        }
        match self.ports {
            None => Ok(()),
            Some(PortRange { first, last }) if first == last => write!(f, " {first}"),
            Some(PortRange { first, last }) => write!(f, " {first}-{last}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    proptest! {
        #[test]
        fn lookup_agrees_with_reading_all_entries(
            entries in vec(entry(), 0..40),
            packets in vec((address(), address(), option::of(protocol()), option::of(0..6u16), 0..4u64), 1..40),
        ) {
            let lists = Lists::new(&entries);
            for (source, destination, protocol, port, wall) in packets {
                let found = lists.judge(source, destination, protocol, port, wall);
                let expected = decided_by(&entries, source, protocol, port, wall)
                    .map(|entry| (ListSide::Source, entry))
                    .or_else(|| {
                        decided_by(&entries, destination, protocol, port, wall)
                            .map(|entry| (ListSide::Destination, entry))
                    })
                    .map(|(side, entry)| ListMatch { action: entries[entry as usize].action, side, entry });
                prop_assert_eq!(found, expected);
            }
        }

        #[test]
        fn next_expiry_is_the_earliest_that_is_still_to_come(entries in vec(entry(), 0..20), wall in 0..5u64) {
            let expected = entries.iter().filter_map(|entry| entry.expires).filter(|&expiry| expiry > wall).min();
            prop_assert_eq!(Lists::new(&entries).next_expiry(wall), expected);
        }
    }

    #[test]
    fn longest_prefix_wins_over_deny() {
        let lists = lists(&["deny 10.0.0.0/8", "allow 10.1.0.0/16"]);
        assert_eq!(
            decision(&lists, "192.0.2.1", "10.1.2.3", None),
            Some((ListAction::Allow, ListSide::Destination, 1))
        );
        assert_eq!(
            decision(&lists, "192.0.2.1", "10.2.2.3", None),
            Some((ListAction::Deny, ListSide::Destination, 0))
        );
    }

    #[test]
    fn source_decides_before_the_destination() {
        let lists = lists(&["allow 192.0.2.0/24", "deny 10.0.0.0/32"]);
        assert_eq!(
            decision(&lists, "192.0.2.1", "10.0.0.0", None),
            Some((ListAction::Allow, ListSide::Source, 0))
        );
    }

    #[test]
    fn entry_with_a_port_does_not_fit_a_packet_whose_port_cannot_be_read() {
        let lists = lists(&["deny 10.0.0.0/8 any 53", "allow 10.0.0.0/7"]);
        assert_eq!(
            decision(&lists, "192.0.2.1", "10.0.0.1", Some(53)).map(|found| found.2),
            Some(0)
        );
        assert_eq!(
            decision(&lists, "192.0.2.1", "10.0.0.1", None).map(|found| found.2),
            Some(1)
        );
    }

    #[test]
    fn ipv4_mapped_address_is_an_ipv6_address() {
        let lists = lists(&["deny 10.0.0.0/8", "deny ::ffff:10.1.0.0/112"]);
        assert_eq!(decision(&lists, "2001:db8::1", "::ffff:10.2.0.0", None), None);
        assert_eq!(
            decision(&lists, "2001:db8::1", "::ffff:10.1.0.9", None).map(|found| found.2),
            Some(1)
        );
    }

    #[test]
    fn expired_entry_makes_room_for_the_next() {
        let mut entries = vec![parse("deny 10.0.0.1/32"), parse("allow 10.0.0.0/8")];
        entries[0].expires = Some(1000);
        let lists = Lists::new(&entries);
        let at = |wall| {
            lists
                .judge(ip("10.0.0.1"), ip("192.0.2.1"), Some(6), Some(80), wall)
                .map(|found| found.entry)
        };
        assert_eq!(at(999), Some(0));
        assert_eq!(at(1000), Some(1));
    }

    /// The rule of the module documentation, by reading every entry.
    fn decided_by(
        entries: &[ListEntry],
        address: IpAddr,
        protocol: Option<u8>,
        port: Option<u16>,
        wall: u64,
    ) -> Option<u32> {
        let fits = |entry: &ListEntry| {
            entry.network.contains(&address)
                && entry.expires.is_none_or(|expires| expires > wall)
                && match entry.protocol {
                    ListProtocol::Any => true,
                    ListProtocol::Tcp => protocol == Some(6),
                    ListProtocol::Udp => protocol == Some(17),
                    ListProtocol::Icmp => protocol == Some(1) || protocol == Some(58),
                }
                && match (entry.ports, port) {
                    (None, _) => true,
                    (Some(range), Some(port)) => range.first <= port && port <= range.last,
                    (Some(_), None) => false,
                }
        };
        (0u32..)
            .zip(entries)
            .filter(|(_, entry)| fits(entry))
            .min_by_key(|(index, entry)| {
                let names_protocol = entry.protocol != ListProtocol::Any;
                let denies = entry.action == ListAction::Deny;
                let length = entry.network.prefix_len();
                (
                    Reverse((length, entry.ports.is_some(), names_protocol, denies)),
                    *index,
                )
            })
            .map(|(index, _)| index)
    }

    /// Few enough addresses for entries and packets to meet often.
    fn address() -> impl Strategy<Value = IpAddr> {
        let v4 = select(vec![
            "10.0.0.1",
            "10.0.0.2",
            "10.0.1.1",
            "10.128.0.1",
            "0.0.0.0",
            "255.255.255.255",
        ]);
        let v6 = select(vec![
            "2001:db8::1",
            "2001:db8::2",
            "2001:db8:1::1",
            "::ffff:10.0.0.1",
            "::",
        ]);
        prop_oneof![v4, v6].prop_map(ip)
    }

    fn protocol() -> impl Strategy<Value = u8> {
        select(vec![1, 6, 17, 47, 58])
    }

    fn entry() -> impl Strategy<Value = ListEntry> {
        let protocols = vec![
            ListProtocol::Tcp,
            ListProtocol::Udp,
            ListProtocol::Icmp,
            ListProtocol::Any,
        ];
        let ports = (0..6u16, 0..6u16).prop_map(|(a, b)| PortRange {
            first: a.min(b),
            last: a.max(b),
        });
        let action = select(vec![ListAction::Deny, ListAction::Allow]);
        (
            action,
            address(),
            0..=128u8,
            select(protocols),
            option::of(ports),
            option::of(0..5u64),
        )
            .prop_map(|(action, address, length, protocol, ports, expires)| {
                let length = if address.is_ipv4() { length % 33 } else { length };
                let network = IpNet::new(address, length).expect("the length fits").trunc();
                ListEntry {
                    action,
                    network,
                    protocol,
                    ports,
                    expires,
                }
            })
    }

    fn decision(
        lists: &Lists,
        source: &str,
        destination: &str,
        port: Option<u16>,
    ) -> Option<(ListAction, ListSide, u32)> {
        let found = lists.judge(ip(source), ip(destination), Some(6), port, 0)?;
        Some((found.action, found.side, found.entry))
    }

    fn lists(lines: &[&str]) -> Lists {
        Lists::new(&lines.iter().map(|line| parse(line)).collect::<Vec<_>>())
    }

    /// Reads `deny|allow CIDR [any PORT]`.
    fn parse(line: &str) -> ListEntry {
        let mut words = line.split(' ');
        let action = if words.next() == Some("deny") {
            ListAction::Deny
        } else {
            ListAction::Allow
        };
        let network = words.next().unwrap().parse().unwrap();
        let ports = words
            .nth(1)
            .map(|port| port.parse().unwrap())
            .map(|port| PortRange {
                first: port,
                last: port,
            });
        ListEntry {
            action,
            network,
            protocol: ListProtocol::Any,
            ports,
            expires: None,
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }
}
