//! Whether one rule takes every flow that another one would.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tungate_engine::Protocol;
use tungate_engine::policy::{PortRange, RuleMatch};

/// What a rule takes, prepared for comparison with other rules.
pub(crate) struct Coverage {
    protocols: Vec<Protocol>,
    clients: Vec<IpNet>,
    targets: Vec<IpNet>,
    ports: Vec<PortRange>,
}

impl Coverage {
    pub(crate) fn of(matches: &RuleMatch) -> Self {
        Self {
            protocols: protocols(matches),
            clients: networks(&matches.clients),
            targets: networks(&matches.targets),
            ports: ports(&matches.ports),
        }
    }

    /// Whether every flow that fits the rule `other` fits this one too.
    ///
    /// What holds only because a flow's two addresses are of one IP version is not seen.
    pub(crate) fn includes(&self, other: &Self) -> bool {
        let all_within = |inner: &[IpNet], outer: &[IpNet]| {
            inner
                .iter()
                .all(|network| outer.iter().any(|covering| covering.contains(network)))
        };
        let ports_within = |range: &PortRange| {
            self.ports
                .iter()
                .any(|covering| covering.first <= range.first && range.last <= covering.last)
        };
        other
            .protocols
            .iter()
            .all(|protocol| self.protocols.contains(protocol))
            && all_within(&other.clients, &self.clients)
            && all_within(&other.targets, &self.targets)
            && other.ports.iter().all(ports_within)
    }
}

/// The protocols that can fit; ICMP fits no rule with ports.
fn protocols(matches: &RuleMatch) -> Vec<Protocol> {
    [Protocol::Tcp, Protocol::Udp, Protocol::Icmp]
        .into_iter()
        .filter(|protocol| matches.protocols.is_empty() || matches.protocols.contains(protocol))
        .filter(|protocol| matches.ports.is_empty() || *protocol != Protocol::Icmp)
        .collect()
}

/// The fewest networks for the same addresses.
fn networks(written: &[IpNet]) -> Vec<IpNet> {
    if written.is_empty() {
        return vec![Ipv4Net::default().into(), Ipv6Net::default().into()];
    }
    IpNet::aggregate(&written.to_vec())
}

/// The fewest ranges for the same ports.
fn ports(written: &[PortRange]) -> Vec<PortRange> {
    if written.is_empty() {
        return vec![PortRange {
            first: 0,
            last: u16::MAX,
        }];
    }
    let mut sorted = written.to_vec();
    sorted.sort();
    let mut merged: Vec<PortRange> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.first <= last.last.saturating_add(1) => last.last = last.last.max(range.last),
            Some(_) | None => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use proptest::prelude::*;
    use proptest::sample::subsequence;
    use tungate_engine::IngressId;
    use tungate_engine::policy::{Action, Policy, PolicySpec, Rule, RuleRef};

    use super::*;

    fn covers(earlier: &RuleMatch, later: &RuleMatch) -> bool {
        Coverage::of(earlier).includes(&Coverage::of(later))
    }

    fn rule(clients: &[&str], protocols: &[Protocol], ports: &[(u16, u16)]) -> RuleMatch {
        RuleMatch {
            clients: clients.iter().map(|network| network.parse().unwrap()).collect(),
            targets: Vec::new(),
            protocols: protocols.to_vec(),
            ports: ports
                .iter()
                .map(|&(first, last)| PortRange { first, last })
                .collect(),
        }
    }

    #[test]
    fn a_rule_without_conditions_covers_every_other() {
        let all = RuleMatch::default();
        assert!(covers(&all, &rule(&["10.0.0.0/8"], &[Protocol::Icmp], &[])));
        assert!(covers(&all, &all));
        assert!(!covers(&rule(&["10.0.0.0/8"], &[], &[]), &all));
    }

    #[test]
    fn networks_that_add_up_cover_their_sum() {
        let halves = rule(&["10.0.0.0/9", "10.128.0.0/9"], &[], &[]);
        assert!(covers(&halves, &rule(&["10.0.0.0/8"], &[], &[])));
        assert!(!covers(&halves, &rule(&["10.0.0.0/7"], &[], &[])));
        let both_versions = rule(&["0.0.0.0/0", "::/0"], &[], &[]);
        assert!(covers(&both_versions, &RuleMatch::default()));
        assert!(!covers(&rule(&["0.0.0.0/0"], &[], &[]), &RuleMatch::default()));
    }

    #[test]
    fn port_ranges_that_meet_cover_what_crosses_them() {
        let meeting = rule(&[], &[], &[(90, 100), (80, 89)]);
        assert!(covers(&meeting, &rule(&[], &[], &[(85, 95)])));
        assert!(!covers(
            &rule(&[], &[], &[(80, 88), (90, 100)]),
            &rule(&[], &[], &[(85, 95)])
        ));
        assert!(!covers(&meeting, &RuleMatch::default()));
    }

    #[test]
    fn all_ports_do_not_cover_icmp() {
        let every_port = rule(&[], &[], &[(0, 65535)]);
        assert!(!covers(&every_port, &RuleMatch::default()));
        assert!(covers(
            &every_port,
            &rule(&[], &[Protocol::Tcp, Protocol::Udp], &[])
        ));
    }

    fn matches() -> impl Strategy<Value = RuleMatch> {
        let networks = || {
            let all = [
                "10.0.0.0/8",
                "10.0.0.0/9",
                "10.128.0.0/9",
                "10.1.0.0/16",
                "0.0.0.0/0",
                "::/0",
                "fd00::/8",
            ];
            subsequence(
                all.map(|network| network.parse::<IpNet>().unwrap()).to_vec(),
                0..4,
            )
        };
        let protocols = subsequence(vec![Protocol::Tcp, Protocol::Udp, Protocol::Icmp], 0..3);
        let ports = [(0, 65535), (1, 79), (80, 80), (81, 90), (80, 90)];
        let ports = subsequence(
            ports.map(|(first, last)| PortRange { first, last }).to_vec(),
            0..3,
        );
        (networks(), networks(), protocols, ports).prop_map(|(clients, targets, protocols, ports)| {
            RuleMatch {
                clients,
                targets,
                protocols,
                ports,
            }
        })
    }

    fn decides(matches: &RuleMatch, protocol: Protocol, client: SocketAddr, target: SocketAddr) -> bool {
        let rule = Rule {
            name: "rule".to_owned(),
            matches: matches.clone(),
            action: Action::Drop,
        };
        let policy = Policy::new(PolicySpec {
            rules: vec![rule],
            ..PolicySpec::default()
        });
        policy.decide(IngressId(0), protocol, client, target).rule == RuleRef::Rule(0)
    }

    proptest! {
        // One pair in sixteen is such that one covers the other.
        #![proptest_config(ProptestConfig { max_global_rejects: 50_000, ..ProptestConfig::default() })]
        #[test]
        fn what_fits_a_covered_rule_fits_the_covering_one(earlier in matches(), later in matches()) {
            prop_assume!(covers(&earlier, &later));
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Icmp] {
                for (client, target) in [("10.1.0.1", "10.200.0.1"), ("10.200.0.1", "192.0.2.1"), ("fd00::1", "2001:db8::1")] {
                    for port in [0, 1, 80, 85, 90, 91] {
                        let client = SocketAddr::new(client.parse().unwrap(), 1024);
                        let target = SocketAddr::new(target.parse().unwrap(), port);
                        let reached = decides(&later, protocol, client, target);
                        prop_assert!(!reached || decides(&earlier, protocol, client, target));
                    }
                }
            }
        }
    }
}
