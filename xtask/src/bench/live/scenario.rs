//! Where clients are, how targets are reached, and by which version of IP.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Scenario {
    /// The client is in another namespace and routed; targets are reached directly, over IPv4
    Router,
    /// As router, over IPv6
    RouterIpv6,
    /// As router, through a SOCKS5 proxy at the server's
    RouterSocks,
    /// The client runs where the appliance does, or is plugged in to it; directly, over IPv4
    Local,
    /// As local, over IPv6
    LocalIpv6,
    /// As local, through a SOCKS5 proxy
    LocalSocks,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Router,
    Local,
}

impl Scenario {
    pub(super) fn name(self) -> String {
        let value = self.to_possible_value().expect("none is skipped");
        value.get_name().to_owned()
    }

    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Router => "Router: clients in a namespace of their own, MSS 1460, direct, IPv4",
            Self::RouterIpv6 => "Router over IPv6",
            Self::RouterSocks => "Router through a SOCKS5 proxy",
            Self::Local => "Local: clients on the appliance's host, or plugged in to it, direct, IPv4",
            Self::LocalIpv6 => "Local over IPv6",
            Self::LocalSocks => "Local through a SOCKS5 proxy",
        }
    }

    pub(super) fn place(self) -> Place {
        match self {
            Self::Router | Self::RouterIpv6 | Self::RouterSocks => Place::Router,
            Self::Local | Self::LocalIpv6 | Self::LocalSocks => Place::Local,
        }
    }

    pub(super) fn is_ipv6(self) -> bool {
        matches!(self, Self::RouterIpv6 | Self::LocalIpv6)
    }

    pub(super) fn is_socks(self) -> bool {
        matches!(self, Self::RouterSocks | Self::LocalSocks)
    }
}
