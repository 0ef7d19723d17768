//! Flows that carried no byte, by who began them: floods and scans are a line each, instead of one for each flow.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use indicatif::HumanCount;
use unicode_width::UnicodeWidthStr;

use super::text::by;
use crate::outcome::FlowRecord;

/// So many flows of a kind make a group.
const GROUP_MIN: u64 = 8;

/// Most kinds that are kept apart, and most addresses and ports in all that are told apart: bounds on memory.
const KINDS_MAX: usize = 1 << 12;
const DISTINCT_MAX: usize = 1 << 18;

/// What flows of a group have in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kind {
    pub(super) client: IpAddr,
    pub(super) protocol: &'static str,
    pub(super) verdict: &'static str,
    pub(super) rule: Option<String>,
    /// How they ended, or `unanswered`.
    pub(super) end: &'static str,
}

/// Flows of one kind.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) flows: u64,
    pub(super) targets: Distinct<IpAddr>,
    pub(super) ports: Distinct<u16>,
}

/// Different values.
#[derive(Debug)]
pub(super) struct Distinct<T> {
    pub(super) values: BTreeSet<T>,
    /// There may be others.
    pub(super) is_more: bool,
}

/// Takes flows as they end.
#[derive(Debug, Default)]
pub(super) struct Attempts {
    groups: BTreeMap<Kind, Group>,
    distinct: usize,
}

impl<T> Default for Distinct<T> {
    fn default() -> Self {
        Self {
            values: BTreeSet::new(),
            is_more: false,
        }
    }
}

impl<T: Ord> Distinct<T> {
    fn insert(&mut self, value: T, room: &mut usize) {
        if self.values.contains(&value) {
            return;
        }
        if *room < DISTINCT_MAX {
            *room += 1;
            self.values.insert(value);
        } else {
            self.is_more = true;
        }
    }

    /// The value, if there is one only.
    fn only(&self) -> Option<&T> {
        self.values
            .first()
            .filter(|_| self.values.len() == 1 && !self.is_more)
    }

    fn count(&self, what: &str) -> String {
        let more = if self.is_more { "more than " } else { "" };
        format!("{more}{} {what}", HumanCount(self.values.len() as u64))
    }
}

impl Kind {
    /// The kind of a flow; `None` if it carried something.
    fn of(flow: &FlowRecord) -> Option<Self> {
        let carried = [&flow.to_target, &flow.to_client]
            .iter()
            .any(|stream| stream.bytes + stream.missing > 0);
        let is_unanswered = flow.anomalies.contains(&"unanswered");
        (!carried).then(|| Self {
            client: flow.client.ip(),
            protocol: flow.protocol.name(),
            verdict: flow.verdict,
            rule: flow.rule.clone(),
            end: if is_unanswered { "unanswered" } else { flow.end },
        })
    }
}

impl Attempts {
    pub(super) fn add(&mut self, flow: &FlowRecord) {
        let Some(kind) = Kind::of(flow) else { return };
        if self.groups.len() >= KINDS_MAX && !self.groups.contains_key(&kind) {
            return;
        }
        let group = self.groups.entry(kind).or_default();
        group.flows += 1;
        group.targets.insert(flow.target.ip(), &mut self.distinct);
        group.ports.insert(flow.target.port(), &mut self.distinct);
    }

    /// The groups that are large enough to be one, the largest first.
    pub(super) fn finish(self) -> Vec<(Kind, Group)> {
        let mut groups: Vec<_> = self
            .groups
            .into_iter()
            .filter(|(_, group)| group.flows >= GROUP_MIN)
            .collect();
        groups.sort_by_key(|(_, group)| std::cmp::Reverse(group.flows));
        groups
    }
}

/// Whether a flow is one of these groups'.
pub(super) fn holds(groups: &[(Kind, Group)], flow: &FlowRecord) -> bool {
    Kind::of(flow).is_some_and(|kind| groups.iter().any(|(known, _)| *known == kind))
}

/// A line for each of the first `most` groups, such as `200 tcp  192.0.2.10 to 198.51.100.5:443  unanswered`.
pub(super) fn lines(groups: &[(Kind, Group)], most: usize) -> Vec<String> {
    let cells: Vec<[String; 4]> = groups
        .iter()
        .take(most)
        .map(|(kind, group)| cells(kind, group))
        .collect();
    let width = |column: usize| cells.iter().map(|row| row[column].width()).max().unwrap_or(0);
    let [count, protocol, way] = [width(0), width(1), width(2)];
    let line = |[flows, name, ends, outcome]: &[String; 4]| {
        let padding = " ".repeat(way - ends.width());
        format!("{flows:>count$} {name:protocol$}  {ends}{padding}  {outcome}")
    };
    cells.iter().map(line).collect()
}

fn cells(kind: &Kind, group: &Group) -> [String; 4] {
    let outcome = match kind.verdict {
        "direct" | "none" => kind.end.to_owned(),
        verdict => format!("{}, {verdict}{}", kind.end, by(kind.rule.as_deref())),
    };
    [
        HumanCount(group.flows).to_string(),
        kind.protocol.to_owned(),
        format!("{} to {}", kind.client, targets(kind, group)),
        outcome,
    ]
}

/// Such as `198.51.100.5:443`, `192.0.2.10, 1,994 ports`, `254 addresses, port 22`.
fn targets(kind: &Kind, group: &Group) -> String {
    let has_ports = kind.protocol != "icmp";
    match (group.targets.only(), group.ports.only().filter(|_| has_ports)) {
        (Some(&target), Some(&port)) => SocketAddr::new(target, port).to_string(),
        (Some(target), None) if has_ports => format!("{target}, {}", group.ports.count("ports")),
        (Some(target), None) => target.to_string(),
        (None, Some(port)) => format!("{}, port {port}", group.targets.count("addresses")),
        (None, None) if has_ports => {
            format!(
                "{}, {}",
                group.targets.count("addresses"),
                group.ports.count("ports")
            )
        }
        (None, None) => group.targets.count("addresses"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::flow;
    use super::*;

    fn attempt(client: &str, target: &str, end: &'static str) -> FlowRecord {
        let mut flow = FlowRecord {
            client: client.parse().unwrap(),
            target: target.parse().unwrap(),
            end,
            ..flow(1)
        };
        for stream in [&mut flow.to_target, &mut flow.to_client] {
            (stream.bytes, stream.missing) = (0, 0);
        }
        flow
    }

    fn told(flows: impl IntoIterator<Item = FlowRecord>) -> Vec<String> {
        let mut attempts = Attempts::default();
        flows.into_iter().for_each(|flow| attempts.add(&flow));
        lines(&attempts.finish(), 10)
    }

    #[test]
    fn a_flood_and_two_scans_are_a_line_each() {
        let flood =
            (0..200).map(|port| attempt(&format!("192.0.2.1:{}", 1000 + port), "192.0.2.9:443", "timeout"));
        let ports = (1..=30).map(|port| attempt("192.0.2.2:99", &format!("192.0.2.9:{port}"), "refused"));
        let hosts =
            (1..=20).map(|host| attempt("[2001:db8::1]:99", &format!("[2001:db8:1::{host}]:22"), "refused"));
        assert_eq!(
            told(flood.chain(ports).chain(hosts)),
            [
                "200 tcp  192.0.2.1 to 192.0.2.9:443            timeout",
                " 30 tcp  192.0.2.2 to 192.0.2.9, 30 ports      refused",
                " 20 tcp  2001:db8::1 to 20 addresses, port 22  refused",
            ]
            .map(str::to_owned)
        );
    }

    #[test]
    fn a_few_attempts_and_flows_with_bytes_are_no_group() {
        let few = (1..=7).map(|port| attempt("192.0.2.2:99", &format!("192.0.2.9:{port}"), "refused"));
        assert_eq!(told(few.chain((1..50).map(flow))), [""; 0]);
    }

    #[test]
    fn memory_is_bounded_and_the_numbers_say_so() {
        let mut room = DISTINCT_MAX - 2;
        let mut distinct = Distinct::default();
        (0..5).for_each(|value| distinct.insert(value, &mut room));
        assert_eq!(distinct.count("ports"), "more than 2 ports");
        assert_eq!(distinct.only(), None);
    }
}
