//! Entries of one prefix, in the order in which they are tried, folded into a function of class and port.

use tungate_bpf_abi::{Cell, Class, Ruling};
use tungate_engine::policy::{ListAction, ListEntry, ListProtocol, PortRange};

/// A ruling for each class of packets, and for each port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Function {
    other: Ruling,
    icmp: Ruling,
    tcp: Ruling,
    udp: Ruling,
    tcp_ports: Segments,
    udp_ports: Segments,
}

/// Rulings by port: from each first port on, up to the next. Never empty, starts at port 0.
type Segments = Vec<(u32, Ruling)>;

impl Function {
    /// Folds `entries`, of which the first that fits decides.
    pub(crate) fn new(entries: &[(u32, &ListEntry)]) -> Self {
        let without_port = |protocols: &[ListProtocol]| {
            entries
                .iter()
                .find(|(_, entry)| entry.ports.is_none() && protocols.contains(&entry.protocol))
                .map_or(Ruling::NONE, |&(rule, entry)| ruling(rule, entry))
        };
        Self {
            other: without_port(&[ListProtocol::Any]),
            icmp: without_port(&[ListProtocol::Icmp, ListProtocol::Any]),
            tcp: without_port(&[ListProtocol::Tcp, ListProtocol::Any]),
            udp: without_port(&[ListProtocol::Udp, ListProtocol::Any]),
            tcp_ports: segments(entries, ListProtocol::Tcp),
            udp_ports: segments(entries, ListProtocol::Udp),
        }
    }

    /// The one ruling for all packets, if there is one.
    pub(crate) fn constant(&self) -> Option<Ruling> {
        let all = [(0, self.other)];
        let same = [self.icmp, self.tcp, self.udp]
            .iter()
            .all(|&ruling| ruling == self.other)
            && self.tcp_ports == all
            && self.udp_ports == all;
        same.then_some(self.other)
    }

    /// Appends the row of cells and its port tables to `cells`, whose first element has the index `base`.
    pub(crate) fn write(&self, cells: &mut Vec<Cell>, base: u32) {
        let row = cells.len();
        cells.resize(row + Class::COUNT as usize, Cell::default());
        let fixed = |ruling: Ruling| Cell { a: ruling.0, b: 0 };
        cells[row + Class::Other as usize] = fixed(self.other);
        cells[row + Class::Icmp as usize] = fixed(self.icmp);
        cells[row + Class::Tcp as usize] = fixed(self.tcp);
        cells[row + Class::Udp as usize] = fixed(self.udp);
        for (class, segments) in [
            (Class::TcpPort, &self.tcp_ports),
            (Class::UdpPort, &self.udp_ports),
        ] {
            cells[row + class as usize] = match segments[..] {
                [(_, ruling)] => fixed(ruling),
                _ => Cell {
                    a: base + cells.len() as u32,
                    b: segments.len() as u32,
                },
            };
            if segments.len() > 1 {
                cells.extend(segments.iter().map(|&(first, ruling)| Cell {
                    a: first,
                    b: ruling.0,
                }));
            }
        }
    }
}

fn ruling(rule: u32, entry: &ListEntry) -> Ruling {
    Ruling::new(rule, entry.action == ListAction::Deny)
}

/// Paints the ports, the strongest entry first, each port once.
fn segments(entries: &[(u32, &ListEntry)], protocol: ListProtocol) -> Segments {
    const PORTS: u32 = 1 << 16;
    let fitting = || {
        entries
            .iter()
            .filter(move |(_, entry)| entry.protocol == protocol || entry.protocol == ListProtocol::Any)
    };
    let range = |entry: &ListEntry| match entry.ports {
        Some(PortRange { first, last }) => (u32::from(first), u32::from(last) + 1),
        None => (0, PORTS),
    };
    let mut starts = vec![0, PORTS];
    starts.extend(fitting().flat_map(|(_, entry)| <[u32; 2]>::from(range(entry))));
    starts.sort_unstable();
    starts.dedup();

    let mut colours = vec![Ruling::NONE; starts.len() - 1];
    // For each interval the next one not painted yet, itself if it is not.
    let mut next: Vec<usize> = (0..starts.len()).collect();
    let find = |next: &mut Vec<usize>, mut at: usize| {
        while next[at] != at {
            next[at] = next[next[at]];
            at = next[at];
        }
        at
    };
    for &(rule, entry) in fitting() {
        let (first, end) = range(entry);
        let index_of = |port| starts.binary_search(&port).expect("every bound is a start");
        let (mut at, end) = (find(&mut next, index_of(first)), index_of(end));
        while at < end {
            colours[at] = ruling(rule, entry);
            next[at] = at + 1;
            at = find(&mut next, at);
        }
    }
    let mut segments: Segments = starts.into_iter().zip(colours).collect();
    segments.dedup_by_key(|&mut (_, ruling)| ruling);
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(text: &str) -> ListEntry {
        let mut words = text.split_whitespace();
        let action = match words.next().expect("an action") {
            "deny" => ListAction::Deny,
            _ => ListAction::Allow,
        };
        let protocol = match words.next().unwrap_or("any") {
            "tcp" => ListProtocol::Tcp,
            "udp" => ListProtocol::Udp,
            "icmp" => ListProtocol::Icmp,
            _ => ListProtocol::Any,
        };
        let ports = words.next().map(|ports| {
            let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
            PortRange {
                first: first.parse().expect("a port"),
                last: last.parse().expect("a port"),
            }
        });
        let network = "192.0.2.0/24".parse().expect("a network");
        ListEntry {
            action,
            network,
            protocol,
            ports,
            expires: None,
        }
    }

    #[test]
    fn a_bare_entry_is_one_ruling_for_all_packets() {
        let deny = entry("deny");
        assert_eq!(
            Function::new(&[(7, &deny)]).constant(),
            Some(Ruling::new(7, true))
        );
    }

    #[test]
    fn earlier_entries_cover_later_ones_port_by_port() {
        let (narrow, wide, rest) = (entry("allow tcp 80"), entry("deny tcp 1-1023"), entry("deny udp"));
        let function = Function::new(&[(0, &narrow), (1, &wide), (2, &rest)]);
        let (allow, deny) = (Ruling::new(0, false), Ruling::new(1, true));
        assert_eq!(
            function.tcp_ports,
            [
                (0, Ruling::NONE),
                (1, deny),
                (80, allow),
                (81, deny),
                (1024, Ruling::NONE)
            ]
        );
        assert_eq!(function.tcp, Ruling::NONE);
        assert_eq!(
            (function.udp, &function.udp_ports[..]),
            (Ruling::new(2, true), &[(0, Ruling::new(2, true))][..])
        );
        assert_eq!(function.constant(), None);
    }

    #[test]
    fn the_highest_port_is_part_of_its_range() {
        let deny = entry("deny any 65535");
        assert_eq!(
            Function::new(&[(0, &deny)]).udp_ports,
            [(0, Ruling::NONE), (65535, Ruling::new(0, true))]
        );
    }
}
