//! What may pass and where it goes: allow/deny lists first, then ordered rules.
//!
//! A [`Policy`] is an immutable snapshot built from a [`PolicySpec`] (by `tungate-config`, or by a test), shared
//! between shards and replaced as a whole while flows go on.
//!
//! **Lists.** An address is looked up among the entries whose CIDR, protocol and port all fit: the longest prefix
//! wins; then protocol and port before port before protocol before bare; then deny before allow; then the earlier
//! line. The source is looked up first; if an entry fits, it decides, else the destination's, else the packet
//! passes. Ports are destination ports. An `icmp` entry means ICMP and ICMPv6, the protocol is the one behind
//! IPv6 extension headers, and an IPv4-mapped address is an IPv6 address. Where a packet's port cannot be read,
//! no entry with a port fits; where its protocol cannot be read, no entry with a protocol fits. Lists come before
//! rules, and `allow` does not skip rules.
//!
//! **Rules.** The first rule that fits decides; with none, a DNS query goes to the resolver, if there is one, and
//! everything else takes [`Action::Direct`].

mod lists;
mod rules;

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

pub use lists::{ListAction, ListEntry, ListMatch, ListProtocol, ListSide, Lists, PortRange};
pub use rules::{Action, EgressId, EgressSpec, Rule, RuleMatch};

use crate::addr::{IngressId, Protocol};
use crate::dns;

/// Everything a policy is made of, as plain data: what configurations parse to and journals hold.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PolicySpec {
    /// List entries in the order in which they were written.
    pub lists: Vec<ListEntry>,
    /// Rules in the order in which they are tried.
    pub rules: Vec<Rule>,
    /// Named ways out that rules refer to by [`EgressId`], an index into this list.
    pub egresses: Vec<EgressSpec>,
    /// Who answers DNS queries that no rule decides about, instead of whom clients ask.
    pub resolver: Option<SocketAddr>,
}

/// An immutable policy, ready for lookups.
#[derive(Debug)]
pub struct Policy {
    spec: PolicySpec,
    lists: Lists,
}

/// What decided: names a list entry or a rule of one [`Policy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RuleRef {
    /// An entry of [`PolicySpec::lists`], by index.
    List(u32),
    /// One of [`PolicySpec::rules`], by index.
    Rule(u32),
    /// No entry and no rule fitted: the default, direct.
    Default,
    /// No entry and no rule fitted a DNS query: [`PolicySpec::resolver`] answers it.
    Resolver,
}

/// What the rules want done with a flow, and which of them said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// What to do.
    pub action: Action,
    /// Who decided.
    pub rule: RuleRef,
}

impl Policy {
    /// Builds the lookup structures for `spec`; takes time and memory linear in the number of entries.
    pub fn new(spec: PolicySpec) -> Self {
        let lists = Lists::new(&spec.lists);
        Self { spec, lists }
    }

    /// The plain data this policy was built from.
    pub fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    /// The allow and deny entries, indexed.
    pub fn lists(&self) -> &Lists {
        &self.lists
    }

    /// Asks the rules, and the resolver where they say nothing, about a new flow; `ingress` is matched by later kinds of rules only.
    ///
    /// For ICMP the ports are 0, and no rule with ports fits.
    pub fn decide(
        &self,
        _ingress: IngressId,
        protocol: Protocol,
        client: SocketAddr,
        target: SocketAddr,
    ) -> Decision {
        let decision = rules::decide(&self.spec.rules, protocol, client, target);
        match self.spec.resolver {
            Some(resolver)
                if decision.rule == RuleRef::Default
                    && protocol != Protocol::Icmp
                    && target.port() == dns::PORT =>
            {
                Decision {
                    action: Action::Redirect(resolver),
                    rule: RuleRef::Resolver,
                }
            }
            Some(_) | None => decision,
        }
    }

    /// The name of `rule` in reports and counters: the rule's own name, the entry as it would be written in a
    /// list file, or `default`.
    pub fn name(&self, rule: RuleRef) -> RuleName<'_> {
        RuleName { policy: self, rule }
    }

    /// The name of an egress, as configured.
    pub fn egress_name(&self, egress: EgressId) -> &str {
        &self.spec.egresses[usize::from(egress.0)].name
    }
}

/// Prints as the rule's name; see [`Policy::name`].
pub struct RuleName<'a> {
    policy: &'a Policy,
    rule: RuleRef,
}

impl fmt::Display for RuleName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rule {
            RuleRef::List(index) => self.policy.spec.lists[index as usize].fmt(f),
            RuleRef::Rule(index) => f.write_str(&self.policy.spec.rules[index as usize].name),
            RuleRef::Default => f.write_str("default"),
            RuleRef::Resolver => f.write_str("resolver"),
        }
    }
}
