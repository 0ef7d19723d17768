//! Ordered rules: the first that fits decides.

use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::lists::PortRange;
use super::{Decision, RuleRef};
use crate::addr::Protocol;

/// Index of a named egress in [`PolicySpec::egresses`](super::PolicySpec::egresses).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EgressId(pub u16);

/// A named way out. How to use it is the driver's business; the engine only names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressSpec {
    /// Unique name, as rules and reports use it.
    pub name: String,
}

/// What is to be done with a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Relays to the target itself.
    Direct,
    /// Relays by way of a named egress.
    Egress(EgressId),
    /// Relays to this address in the target's place; the client still sees its target.
    Redirect(SocketAddr),
    /// Refuses so that the client notices: RST for TCP, ICMP port unreachable for the rest.
    Reject,
    /// Refuses in silence.
    Drop,
}

impl Action {
    /// The word used in configurations and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Egress(_) => "egress",
            Self::Redirect(_) => "redirect",
            Self::Reject => "reject",
            Self::Drop => "drop",
        }
    }
}

/// Conditions of a rule; all must hold, and an empty list holds always.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RuleMatch {
    /// Client addresses, any of which fits.
    pub clients: Vec<IpNet>,
    /// Target addresses, any of which fits.
    pub targets: Vec<IpNet>,
    /// Protocols, any of which fits.
    pub protocols: Vec<Protocol>,
    /// Target ports, any of which fits. ICMP has no port and fits no rule that names ports.
    pub ports: Vec<PortRange>,
}

/// One ordered rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Unique name, as reports and counters use it.
    pub name: String,
    /// When it applies.
    pub matches: RuleMatch,
    /// What it does.
    pub action: Action,
}

/// Finds the first of `rules` that fits.
pub(super) fn decide(rules: &[Rule], protocol: Protocol, client: SocketAddr, target: SocketAddr) -> Decision {
    for (index, rule) in rules.iter().enumerate() {
        if fits(&rule.matches, protocol, client, target) {
            return Decision {
                action: rule.action,
                rule: RuleRef::Rule(index as u32),
            };
        }
    }
    Decision {
        action: Action::Direct,
        rule: RuleRef::Default,
    }
}

fn fits(matches: &RuleMatch, protocol: Protocol, client: SocketAddr, target: SocketAddr) -> bool {
    let any_of = |networks: &[IpNet], address: SocketAddr| {
        networks.is_empty() || networks.iter().any(|network| network.contains(&address.ip()))
    };
    let port_fits = matches.ports.is_empty()
        || (protocol != Protocol::Icmp
            && matches
                .ports
                .iter()
                .any(|range| (range.first..=range.last).contains(&target.port())));
    (matches.protocols.is_empty() || matches.protocols.contains(&protocol))
        && port_fits
        && any_of(&matches.clients, client)
        && any_of(&matches.targets, target)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: &str = "10.0.0.2:4000";
    const TARGET: &str = "192.0.2.7:443";

    #[test]
    fn no_rule_means_direct() {
        assert_eq!(
            asked(&[], Protocol::Tcp, CLIENT, TARGET),
            (Action::Direct, RuleRef::Default)
        );
    }

    #[test]
    fn first_rule_that_fits_decides() {
        let rules = [
            rule(Action::Drop, |matches| {
                matches.targets = vec![net("198.51.100.0/24")]
            }),
            rule(Action::Reject, |matches| {
                matches.targets = vec![net("192.0.2.0/24")]
            }),
            rule(Action::Drop, |_| {}),
        ];
        assert_eq!(
            asked(&rules, Protocol::Tcp, CLIENT, TARGET),
            (Action::Reject, RuleRef::Rule(1))
        );
        assert_eq!(
            asked(&rules, Protocol::Tcp, CLIENT, "203.0.113.1:443"),
            (Action::Drop, RuleRef::Rule(2))
        );
    }

    #[test]
    fn all_conditions_must_hold_and_any_of_a_list_will_do() {
        let rules = [rule(Action::Drop, |matches| {
            matches.clients = vec![net("10.1.0.0/16"), net("10.0.0.0/16")];
            matches.targets = vec![net("192.0.2.7/32")];
            matches.protocols = vec![Protocol::Udp, Protocol::Tcp];
            matches.ports = vec![
                PortRange { first: 80, last: 80 },
                PortRange {
                    first: 440,
                    last: 443,
                },
            ];
        })];
        let is_dropped = |protocol, client, target| asked(&rules, protocol, client, target).0 == Action::Drop;
        assert!(is_dropped(Protocol::Tcp, CLIENT, TARGET));
        assert!(is_dropped(Protocol::Udp, CLIENT, "192.0.2.7:440"));
        assert!(!is_dropped(Protocol::Tcp, "10.2.0.2:4000", TARGET));
        assert!(!is_dropped(Protocol::Tcp, CLIENT, "192.0.2.8:443"));
        assert!(!is_dropped(Protocol::Tcp, CLIENT, "192.0.2.7:444"));
        assert!(!is_dropped(Protocol::Icmp, CLIENT, TARGET));
    }

    #[test]
    fn icmp_fits_no_rule_with_ports() {
        let rules = [rule(Action::Drop, |matches| {
            matches.ports = vec![PortRange {
                first: 0,
                last: u16::MAX,
            }]
        })];
        assert_eq!(
            asked(&rules, Protocol::Icmp, "10.0.0.2:0", "192.0.2.7:0").0,
            Action::Direct
        );
        assert_eq!(
            asked(&rules, Protocol::Udp, "10.0.0.2:1", "192.0.2.7:1").0,
            Action::Drop
        );
    }

    #[test]
    fn network_of_one_ip_version_fits_no_address_of_the_other() {
        let rules = [rule(Action::Drop, |matches| {
            matches.targets = vec![net("0.0.0.0/0")]
        })];
        assert_eq!(
            asked(&rules, Protocol::Tcp, "[fd00::2]:4000", "[2001:db8::7]:443").0,
            Action::Direct
        );
        assert_eq!(
            asked(&rules, Protocol::Tcp, "[fd00::2]:4000", "[::ffff:192.0.2.7]:443").0,
            Action::Direct
        );
    }

    fn asked(rules: &[Rule], protocol: Protocol, client: &str, target: &str) -> (Action, RuleRef) {
        let decision = decide(rules, protocol, client.parse().unwrap(), target.parse().unwrap());
        (decision.action, decision.rule)
    }

    fn rule(action: Action, fill: impl FnOnce(&mut RuleMatch)) -> Rule {
        let mut matches = RuleMatch::default();
        fill(&mut matches);
        Rule {
            name: "rule".into(),
            matches,
            action,
        }
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }
}
