//! The command's resolver file, and how its name servers are reached.
//!
//! Name servers keep their addresses, and the policy decides about them like about any other target. Those that only
//! this host can reach (a stub on a loopback address, one behind a link) get an address to stand in for them, which a
//! rule redirects.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6};

use ipnet::IpNet;
use tungate_engine::policy::{Action, PortRange, Rule, RuleMatch};
use tungate_engine::{Config, Protocol};

const FILE: &str = "/etc/resolv.conf";
const DNS_PORT: u16 = 53;
/// As many as the C library uses (MAXNS).
const SERVERS_MAX: usize = 3;

/// A resolver file, and rules that come before all others.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Resolver {
    pub(super) content: String,
    pub(super) rules: Vec<Rule>,
}

impl Resolver {
    /// One for `configured`, or for the name servers of this host.
    pub(super) fn find(configured: Option<SocketAddr>, config: &Config) -> Self {
        let host = std::fs::read_to_string(FILE).unwrap_or_default();
        Self::new(&host, configured, config.router_v4)
    }

    /// `stand_in` is the first of the addresses that may stand in for others; the one behind it is the device's.
    fn new(host: &str, configured: Option<SocketAddr>, stand_in: Ipv4Addr) -> Self {
        let servers = match configured {
            Some(server) => vec![server],
            None => host_servers(host),
        };
        let mut resolver = Self {
            content: String::new(),
            rules: Vec::new(),
        };
        for (index, server) in servers.into_iter().take(SERVERS_MAX).enumerate() {
            let address = if server.port() == DNS_PORT && is_reachable(server) {
                server.ip()
            } else {
                let offset = if index == 0 { 0 } else { index as u32 + 1 };
                let address = Ipv4Addr::from_bits(stand_in.to_bits().wrapping_add(offset)).into();
                resolver.rules.push(redirect(address, server));
                address
            };
            let _ = writeln!(resolver.content, "nameserver {address}"); // strings take everything
        }
        for line in host.lines() {
            if ["search", "domain", "options"].contains(&keyword(line)) {
                resolver.content.push_str(line);
                resolver.content.push('\n');
            }
        }
        resolver
    }
}

/// The name servers of a resolver file; the C library's default without any.
fn host_servers(text: &str) -> Vec<SocketAddr> {
    let servers: Vec<_> = text
        .lines()
        .filter(|line| keyword(line) == "nameserver")
        .filter_map(|line| server(line.split_whitespace().nth(1)?))
        .collect();
    if servers.is_empty() {
        return vec![SocketAddr::from((Ipv4Addr::LOCALHOST, DNS_PORT))];
    }
    servers
}

fn keyword(line: &str) -> &str {
    line.split_whitespace().next().unwrap_or_default()
}

/// Reads an address that may name an interface, as in `fe80::1%eth0`.
fn server(text: &str) -> Option<SocketAddr> {
    let Some((address, interface)) = text.split_once('%') else {
        return Some(SocketAddr::new(text.parse().ok()?, DNS_PORT));
    };
    let index = match interface.parse() {
        Ok(index) => index,
        Err(_) => nix::net::if_::if_nametoindex(interface).ok()?,
    };
    Some(SocketAddrV6::new(address.parse().ok()?, DNS_PORT, 0, index).into())
}

/// Whether an address means the same inside.
fn is_reachable(server: SocketAddr) -> bool {
    let local = match server.ip() {
        IpAddr::V4(address) => address.is_loopback() || address.is_unspecified() || address.is_link_local(),
        IpAddr::V6(address) => {
            address.is_loopback() || address.is_unspecified() || address.is_unicast_link_local()
        }
    };
    !local
}

fn redirect(from: IpAddr, to: SocketAddr) -> Rule {
    Rule {
        name: format!("resolver {to}"),
        matches: RuleMatch {
            targets: vec![IpNet::from(from)],
            protocols: vec![Protocol::Udp, Protocol::Tcp],
            ports: vec![PortRange {
                first: DNS_PORT,
                last: DNS_PORT,
            }],
            ..RuleMatch::default()
        },
        action: Action::Redirect(to),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAND_IN: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

    fn redirects(resolver: &Resolver) -> Vec<(String, Action)> {
        let pair = |rule: &Rule| (rule.matches.targets[0].to_string(), rule.action);
        resolver.rules.iter().map(pair).collect()
    }

    #[test]
    fn servers_that_are_reached_from_anywhere_keep_their_addresses() {
        let host = "# by hand\nnameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch example.org\noptions ndots:2\nsortlist 10.0.0.0\n";
        let resolver = Resolver::new(host, None, STAND_IN);
        assert_eq!(
            resolver.content,
            "nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch example.org\noptions ndots:2\n"
        );
        assert_eq!(resolver.rules, []);
    }

    #[test]
    fn servers_of_this_host_only_are_stood_in_for() {
        let host = "nameserver 127.0.0.53\nnameserver 192.0.2.53\nnameserver ::1\nnameserver 192.0.2.54\n";
        let resolver = Resolver::new(host, None, STAND_IN);
        assert_eq!(
            resolver.content,
            "nameserver 198.18.0.1\nnameserver 192.0.2.53\nnameserver 198.18.0.4\n"
        );
        let to = |text: &str| Action::Redirect(text.parse().unwrap());
        assert_eq!(
            redirects(&resolver),
            [
                ("198.18.0.1/32".to_owned(), to("127.0.0.53:53")),
                ("198.18.0.4/32".to_owned(), to("[::1]:53")),
            ]
        );
    }

    #[test]
    fn a_configured_server_takes_the_place_of_the_hosts() {
        let resolver = Resolver::new(
            "nameserver 192.0.2.53\nsearch a.example\n",
            "127.0.0.1:5353".parse().ok(),
            STAND_IN,
        );
        assert_eq!(resolver.content, "nameserver 198.18.0.1\nsearch a.example\n");
        let to = Action::Redirect("127.0.0.1:5353".parse().unwrap());
        assert_eq!(redirects(&resolver), [("198.18.0.1/32".to_owned(), to)]);
    }

    #[test]
    fn without_a_resolver_file_this_host_is_asked() {
        let resolver = Resolver::new("", None, STAND_IN);
        let to = Action::Redirect("127.0.0.1:53".parse().unwrap());
        assert_eq!(redirects(&resolver), [("198.18.0.1/32".to_owned(), to)]);
    }
}
