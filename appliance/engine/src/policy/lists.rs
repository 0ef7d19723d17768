//! Allow and deny lists: longest prefix wins.

use std::fmt;
use std::net::IpAddr;

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
#[derive(Debug)]
pub struct Lists {
    entries: Vec<ListEntry>,
}

impl Lists {
    /// Indexes `entries`.
    pub fn new(entries: &[ListEntry]) -> Self {
        Self {
            entries: entries.to_vec(),
        }
    }

    /// Whether there is no entry at all, so that no packet needs a lookup.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
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
        let _ = (source, destination, protocol, port, wall);
        None
    }
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
