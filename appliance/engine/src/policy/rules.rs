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
