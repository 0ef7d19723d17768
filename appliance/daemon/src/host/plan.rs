//! What has to change on the host, as plain data that prints as the commands that would do the same.
//!
//! Policy routing catches the traffic: a table of our own whose default route is the device, and rules that look it up.
//! The appliance's own packets carry a mark that skips them, which is what keeps it from talking to itself; the
//! skipped packets go on to the host's other rules. For traffic of this host the rules look at connections that this
//! host begins: a socket that has no source address yet, or has got the device's. Sockets with another address keep
//! their ways: answers to connections from outside, what is bound to an interface, and what was there before. What the
//! main table has a route for that is no default route (neighbours, bridges, other tunnels) stays there too, except
//! for DNS.
//!
//! The device outlives the process, and so does what leads there: if the appliance dies, its traffic does not go
//! another way. Over IPv4, and for routed clients, an unreachable route takes over as soon as nobody serves the device.
//! What this host sends over IPv6 is dropped by the device instead: a route that refuses would make the kernel choose a
//! source address all the same and look again, and a socket with an address keeps its way.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use tungate_engine::Config;

use super::sysctl;
use crate::bypass::Opened;

/// The mark of the appliance's own packets ("tung" on a telephone).
pub(crate) const MARK: u32 = 0x7467;
/// The routing table that leads to the device.
pub(super) const TABLE: u32 = 8400;
/// Who made routes and rules, as the kernel keeps it with them: no registered number.
pub(super) const PROTOCOL: u8 = 116;
/// The first rule; all come before those of the main table (32766), and of common tools.
pub(super) const PRIORITY: u32 = 8400;
/// Where marked packets leave ours.
const PRIORITY_END: u32 = PRIORITY + 20;
/// Worse than any route a device has.
const LAST_METRIC: u32 = 1 << 24;

pub(super) const MAIN: u32 = 254;
const DNS_PORT: u16 = 53;

/// One change of the host's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// Writes a kernel setting; `lasting` ones do not go with the device.
    Sysctl {
        key: String,
        value: String,
        lasting: bool,
    },
    /// Gives a device an address.
    Address { device: String, address: IpNet },
    /// Makes a device a port of a bridge.
    Port { device: String, bridge: String },
    /// Turns a device on.
    Up { device: String },
    /// Adds a default route.
    Route(Route),
    /// Adds a policy rule.
    Rule(Rule),
}

/// A default route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    pub(super) ipv6: bool,
    pub(super) table: u32,
    pub(super) to: RouteTo,
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RouteTo {
    /// Out of a device, from this address.
    Device { device: String, source: IpAddr },
    /// Nowhere: what nothing better takes is refused.
    Unreachable,
}

/// A policy rule. All its conditions must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(super) ipv6: bool,
    pub(super) priority: u32,
    pub(super) mark: Option<u32>,
    /// The interface that packets come in by; `lo` for what this host sends.
    pub(super) interface: Option<String>,
    pub(super) source: Option<IpNet>,
    /// Protocol number and destination port.
    pub(super) service: Option<(u8, u16)>,
    pub(super) then: Then,
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Then {
    /// Looks a table up.
    Table(u32),
    /// Looks a table up, but for its default routes.
    MoreSpecific(u32),
    /// Goes on at another rule.
    GoTo(u32),
    /// Goes on at the next.
    Nothing,
}

/// What is to be captured, and how.
#[derive(Debug, Clone)]
pub(crate) struct Capture {
    pub(crate) device: String,
    /// The device's own addresses.
    pub(crate) address_v4: Ipv4Addr,
    pub(crate) address_v6: Option<Ipv6Addr>,
    /// Whether clients plug in to the device, as to any Ethernet: then nothing is captured.
    pub(crate) tap: bool,
    /// The bridge that a TAP device is a port of.
    pub(crate) bridge: Option<String>,
    /// Interfaces whose clients are captured; with none, this host is.
    pub(crate) interfaces: Vec<String>,
    /// Marks of packets that are not captured.
    pub(crate) marks: BTreeSet<u32>,
    /// Whether traffic goes its usual way when the appliance dies.
    pub(crate) fail_open: bool,
    /// Whether the kernel carries flows of clients.
    pub(crate) bypass: bool,
}

/// The device's own addresses: those behind the router's, by which the appliance reports errors.
pub(crate) fn device_addresses(config: &Config) -> (Ipv4Addr, Ipv6Addr) {
    config.device_addresses()
}

impl Capture {
    /// What makes the device ready; nothing is captured yet.
    pub(crate) fn preparation(&self) -> Vec<Change> {
        if self.tap {
            return self.plug();
        }
        let mut changes = quiet(&self.device, self.address_v6.is_some());
        if !self.fail_open {
            changes.extend(self.refusal());
        }
        changes.extend(self.forwarding());
        changes.extend(addresses(&self.device, self.address_v4, self.address_v6));
        for source in self.addresses() {
            let ipv6 = source.is_ipv6();
            let route = |to| {
                Change::Route(Route {
                    ipv6,
                    table: TABLE,
                    to,
                })
            };
            if !self.fail_open {
                changes.push(route(RouteTo::Unreachable));
            }
            changes.push(route(RouteTo::Device {
                device: self.device.clone(),
                source,
            }));
        }
        changes
    }

    /// What makes a TAP device ready. All of it goes with the device.
    fn plug(&self) -> Vec<Change> {
        let device = || self.device.clone();
        let mut changes = quiet(&self.device, self.address_v6.is_some());
        changes.extend(self.bridge.clone().map(|bridge| Change::Port {
            device: device(),
            bridge,
        }));
        changes.push(Change::Up { device: device() });
        changes
    }

    /// The rules that capture, the exceptions first.
    pub(crate) fn rules(&self) -> Vec<Change> {
        if self.tap {
            return Vec::new();
        }
        let mut rules = Vec::new();
        for source in self.addresses() {
            let rule = |offset, then| Rule {
                ipv6: source.is_ipv6(),
                priority: PRIORITY + offset,
                mark: None,
                interface: None,
                source: None,
                service: None,
                then,
            };
            rules.push(rule(PRIORITY_END - PRIORITY, Then::Nothing));
            for &mark in &self.marks {
                let mark = Some(mark);
                rules.push(Rule {
                    mark,
                    ..rule(0, Then::GoTo(PRIORITY_END))
                });
            }
            if self.interfaces.is_empty() {
                rules.extend(local_rules(source, &rule));
            }
            for interface in &self.interfaces {
                let interface = Some(interface.clone());
                rules.push(Rule {
                    interface,
                    ..rule(10, Then::Table(TABLE))
                });
            }
        }
        rules.into_iter().map(Change::Rule).collect()
    }

    /// The rules for marks that `other` lets pass and `self` does not.
    pub(crate) fn rules_of_marks(&self, other: &BTreeSet<u32>) -> Vec<Change> {
        let marks: BTreeSet<_> = other.difference(&self.marks).copied().collect();
        let only = Self {
            marks,
            ..self.clone()
        };
        let has_mark = |change: &Change| matches!(change, Change::Rule(rule) if rule.mark.is_some());
        only.rules().into_iter().filter(has_mark).collect()
    }

    fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        [Some(IpAddr::V4(self.address_v4)), self.address_v6.map(IpAddr::V6)]
            .into_iter()
            .flatten()
    }

    /// What makes the routes to the device step back when nobody serves it.
    fn refusal(&self) -> Vec<Change> {
        let versions: &[_] = if self.address_v6.is_some() && !self.interfaces.is_empty() {
            &["ipv4", "ipv6"]
        } else {
            &["ipv4"]
        };
        let setting = |version| Change::Sysctl {
            key: format!("net/{version}/conf/{}/ignore_routes_with_linkdown", self.device),
            value: "1".to_owned(),
            lasting: false,
        };
        versions.iter().map(setting).collect()
    }

    /// The interfaces that bypassed flows may leave by.
    fn others(&self, version: &str) -> Vec<String> {
        if !self.bypass {
            return Vec::new();
        }
        let mut names = sysctl::interfaces(&format!("net/{version}/conf"));
        names.retain(|name| name != "lo" && *name != self.device && !self.interfaces.contains(name));
        names
    }

    /// The interfaces that do not forward, and will because of the bypass alone. To be asked before
    /// [`Capture::preparation`] is made.
    pub(crate) fn opened(&self) -> Vec<Opened> {
        let is_on = |key: &str| sysctl::read(key).is_some_and(|value| value != "0");
        let mut opened = Vec::new();
        for interface in self.others("ipv4") {
            if !is_on(&format!("net/ipv4/conf/{interface}/forwarding")) {
                let ipv6 = false;
                opened.push(Opened { interface, ipv6 });
            }
        }
        if self.address_v6.is_some() && !is_on("net/ipv6/conf/all/forwarding") {
            for interface in self.others("ipv6") {
                if !is_on(&format!("net/ipv6/conf/{interface}/force_forwarding")) {
                    let ipv6 = true;
                    opened.push(Opened { interface, ipv6 });
                }
            }
        }
        opened
    }

    /// What has connections counted and told of. To be made when the kernel tracks them.
    pub(crate) fn accounting(&self) -> Vec<Change> {
        let set = |name: &str, wanted: fn(&str) -> bool| {
            let key = format!("net/netfilter/{name}");
            let present = sysctl::read(&key)?;
            (!wanted(&present)).then(|| Change::Sysctl {
                key,
                value: "1".to_owned(),
                lasting: true,
            })
        };
        let counts = set("nf_conntrack_acct", |value| value == "1");
        let tells = set("nf_conntrack_events", |value| value != "0");
        counts.into_iter().chain(tells).collect()
    }

    /// What lets packets pass between clients' interfaces and the device.
    fn forwarding(&self) -> Vec<Change> {
        if self.interfaces.is_empty() {
            return Vec::new();
        }
        let mut changes = Vec::new();
        let mut set = |key: String, value: &str, lasting| {
            if sysctl::read(&key).is_none_or(|present| present != value) {
                let value = value.to_owned();
                changes.push(Change::Sysctl { key, value, lasting });
            }
        };
        for interface in self.interfaces.iter().chain(&self.others("ipv4")) {
            set(format!("net/ipv4/conf/{interface}/forwarding"), "1", true);
        }
        set(format!("net/ipv4/conf/{}/forwarding", self.device), "1", false);
        if self.address_v6.is_some() {
            if sysctl::read("net/ipv6/conf/default/force_forwarding").is_some() {
                let others = self.others("ipv6");
                for name in self.interfaces.iter().chain([&self.device]).chain(&others) {
                    let lasting = *name != self.device;
                    set(format!("net/ipv6/conf/{name}/force_forwarding"), "1", lasting);
                }
            } else if sysctl::read("net/ipv6/conf/all/forwarding").is_none_or(|value| value == "0") {
                // Forwarding turns router advertisements off where they are only just on, and with them the
                // host's own way out.
                for interface in sysctl::interfaces("net/ipv6/conf") {
                    let key = format!("net/ipv6/conf/{interface}/accept_ra");
                    if sysctl::read(&key).as_deref() == Some("1") {
                        set(key, "2", true);
                    }
                }
                set("net/ipv6/conf/all/forwarding".to_owned(), "1", true);
            }
        }
        changes
    }
}

/// What keeps the kernel from talking on the device by itself, and from doubting what comes from it: sources are
/// hosts all over the world, whose packets would never be expected from there.
fn quiet(device: &str, ipv6: bool) -> Vec<Change> {
    let set = |key: String, value: &str| Change::Sysctl {
        key,
        value: value.to_owned(),
        lasting: false,
    };
    // The stricter of "all" and the device's own holds, and loose (2) counts for more than strict (1).
    let reverse_path = match sysctl::read("net/ipv4/conf/all/rp_filter").as_deref() {
        Some("0") | None => "0",
        Some(_) => "2",
    };
    let mut changes = vec![set(format!("net/ipv4/conf/{device}/rp_filter"), reverse_path)];
    if ipv6 {
        changes.push(set(format!("net/ipv6/conf/{device}/addr_gen_mode"), "1"));
        changes.push(set(format!("net/ipv6/conf/{device}/accept_ra"), "0"));
    }
    changes
}

pub(super) fn addresses(device: &str, v4: Ipv4Addr, v6: Option<Ipv6Addr>) -> Vec<Change> {
    let mut changes: Vec<_> = [
        Some(IpNet::from(IpAddr::V4(v4))),
        v6.map(|v6| IpNet::from(IpAddr::V6(v6))),
    ]
    .into_iter()
    .flatten()
    .map(|address| Change::Address {
        device: device.to_owned(),
        address,
    })
    .collect();
    changes.push(Change::Up {
        device: device.to_owned(),
    });
    changes
}

/// The rules for what this host sends; `address` is the device's.
fn local_rules(address: IpAddr, rule: &dyn Fn(u32, Then) -> Rule) -> Vec<Rule> {
    let local = |offset, source, then| Rule {
        interface: Some("lo".to_owned()),
        source,
        ..rule(offset, then)
    };
    let mut rules = vec![local(10, Some(address.into()), Then::Table(TABLE))];
    // IPv4 looks up routes from 0.0.0.0 while a socket has no address. For IPv6 a rule with a source does not fit
    // then, so sockets with an address are sent past ours instead.
    let unbound = match address {
        IpAddr::V4(_) => Some(IpNet::from(IpAddr::V4(Ipv4Addr::UNSPECIFIED))),
        IpAddr::V6(_) => {
            for (offset, half) in [(11, Ipv6Addr::UNSPECIFIED), (12, Ipv6Addr::from_bits(1 << 127))] {
                let half = Ipv6Net::new_assert(half, 1).into();
                rules.push(local(offset, Some(half), Then::GoTo(PRIORITY_END)));
            }
            None
        }
    };
    for (offset, protocol) in [(13, 17), (14, 6)] {
        rules.push(Rule {
            service: Some((protocol, DNS_PORT)),
            ..local(offset, unbound, Then::Table(TABLE))
        });
    }
    rules.push(local(15, unbound, Then::MoreSpecific(MAIN)));
    rules.push(local(16, unbound, Then::Table(TABLE)));
    rules
}

impl fmt::Display for Change {
    /// The command that makes the change.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl { key, value, .. } => write!(f, "sysctl -w {key}={value}"),
            Self::Address { device, address } => write!(f, "ip address add {address} dev {device}"),
            Self::Port { device, bridge } => write!(f, "ip link set {device} master {bridge}"),
            Self::Up { device } => write!(f, "ip link set {device} up"),
            Self::Route(route) => route.fmt(f),
            Self::Rule(rule) => rule.fmt(f),
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = if self.ipv6 { 6 } else { 4 };
        write!(f, "ip -{version} route add ")?;
        match &self.to {
            RouteTo::Device { device, source } => write!(f, "default dev {device} src {source}")?,
            RouteTo::Unreachable => write!(f, "unreachable default metric {LAST_METRIC}")?,
        }
        write!(f, " table {} proto {PROTOCOL}", self.table)
    }
}

impl Route {
    pub(super) fn metric(&self) -> Option<u32> {
        match self.to {
            RouteTo::Device { .. } => None,
            RouteTo::Unreachable => Some(LAST_METRIC),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let version = if self.ipv6 { 6 } else { 4 };
        write!(f, "ip -{version} rule add pref {}", self.priority)?;
        if let Some(source) = self.source {
            write!(f, " from {source}")?;
        }
        if let Some(interface) = &self.interface {
            write!(f, " iif {interface}")?;
        }
        if let Some(mark) = self.mark {
            write!(f, " fwmark {mark:#x}")?;
        }
        if let Some((protocol, port)) = self.service {
            let protocol = if protocol == 17 { "udp" } else { "tcp" };
            write!(f, " ipproto {protocol} dport {port}")?;
        }
        match self.then {
            Then::Table(table) => write!(f, " lookup {table}")?,
            Then::MoreSpecific(table) => write!(f, " lookup {table} suppress_prefixlength 0")?,
            Then::GoTo(priority) => write!(f, " goto {priority}")?,
            Then::Nothing => f.write_str(" nop")?,
        }
        write!(f, " protocol {PROTOCOL}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(interfaces: &[&str], marks: &[u32]) -> Capture {
        Capture {
            device: "tungate0".to_owned(),
            address_v4: "198.18.0.2".parse().unwrap(),
            address_v6: Some("fd74:756e::2".parse().unwrap()),
            tap: false,
            bridge: None,
            interfaces: interfaces.iter().map(|&name| name.to_owned()).collect(),
            marks: marks.iter().copied().collect(),
            fail_open: false,
            bypass: false,
        }
    }

    fn printed(changes: &[Change]) -> Vec<String> {
        changes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn traffic_of_this_host_is_captured_where_it_begins() {
        assert_eq!(
            printed(&capture(&[], &[MARK]).rules()),
            [
                "ip -4 rule add pref 8420 nop protocol 116",
                "ip -4 rule add pref 8400 fwmark 0x7467 goto 8420 protocol 116",
                "ip -4 rule add pref 8410 from 198.18.0.2/32 iif lo lookup 8400 protocol 116",
                "ip -4 rule add pref 8413 from 0.0.0.0/32 iif lo ipproto udp dport 53 lookup 8400 protocol 116",
                "ip -4 rule add pref 8414 from 0.0.0.0/32 iif lo ipproto tcp dport 53 lookup 8400 protocol 116",
                "ip -4 rule add pref 8415 from 0.0.0.0/32 iif lo lookup 254 suppress_prefixlength 0 protocol 116",
                "ip -4 rule add pref 8416 from 0.0.0.0/32 iif lo lookup 8400 protocol 116",
                "ip -6 rule add pref 8420 nop protocol 116",
                "ip -6 rule add pref 8400 fwmark 0x7467 goto 8420 protocol 116",
                "ip -6 rule add pref 8410 from fd74:756e::2/128 iif lo lookup 8400 protocol 116",
                "ip -6 rule add pref 8411 from ::/1 iif lo goto 8420 protocol 116",
                "ip -6 rule add pref 8412 from 8000::/1 iif lo goto 8420 protocol 116",
                "ip -6 rule add pref 8413 iif lo ipproto udp dport 53 lookup 8400 protocol 116",
                "ip -6 rule add pref 8414 iif lo ipproto tcp dport 53 lookup 8400 protocol 116",
                "ip -6 rule add pref 8415 iif lo lookup 254 suppress_prefixlength 0 protocol 116",
                "ip -6 rule add pref 8416 iif lo lookup 8400 protocol 116",
            ]
        );
    }

    #[test]
    fn routed_clients_are_captured_by_their_interface() {
        let capture = Capture {
            address_v6: None,
            ..capture(&["eth1", "wg0"], &[MARK, 0x10])
        };
        assert_eq!(
            printed(&capture.rules()),
            [
                "ip -4 rule add pref 8420 nop protocol 116",
                "ip -4 rule add pref 8400 fwmark 0x10 goto 8420 protocol 116",
                "ip -4 rule add pref 8400 fwmark 0x7467 goto 8420 protocol 116",
                "ip -4 rule add pref 8410 iif eth1 lookup 8400 protocol 116",
                "ip -4 rule add pref 8410 iif wg0 lookup 8400 protocol 116",
            ]
        );
    }

    #[test]
    fn the_kill_switch_is_there_before_the_way_through_the_device() {
        let routes = |capture: &Capture| {
            let mut changes = capture.preparation();
            changes.retain(|change| matches!(change, Change::Route(route) if !route.ipv6));
            printed(&changes)
        };
        let device = "ip -4 route add default dev tungate0 src 198.18.0.2 table 8400 proto 116";
        let unreachable = "ip -4 route add unreachable default metric 16777216 table 8400 proto 116";
        let closed = capture(&[], &[]);
        assert_eq!(routes(&closed), [unreachable, device]);
        assert_eq!(
            routes(&Capture {
                fail_open: true,
                ..closed
            }),
            [device]
        );
    }

    #[test]
    fn new_marks_get_rules_of_their_own() {
        let marks = [MARK, 7].into();
        let changes = capture(&[], &[MARK]).rules_of_marks(&marks);
        assert_eq!(
            printed(&changes),
            [
                "ip -4 rule add pref 8400 fwmark 0x7 goto 8420 protocol 116",
                "ip -6 rule add pref 8400 fwmark 0x7 goto 8420 protocol 116",
            ]
        );
        assert!(capture(&[], &[MARK, 7]).rules_of_marks(&marks).is_empty());
    }
}
