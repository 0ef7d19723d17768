//! Changes carried out over netlink.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder, new_connection};
use tokio::task::JoinHandle;

use super::plan::{Change, PRIORITY, PROTOCOL, Route, RouteTo, Rule, TABLE, Then};
use super::sysctl;

/// An IPv6 address that is not usable by then has to wait for something else, such as a link without carrier.
const SETTLED_WITHIN: Duration = Duration::from_secs(2);

/// A connection to the kernel's routing, of the network namespace it was made in.
pub(super) struct Netlink {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Netlink {
    pub(super) fn connect() -> io::Result<Self> {
        let (connection, handle, _) = new_connection()?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// Makes a change.
    pub(super) async fn make(&self, change: &Change) -> Result<()> {
        let made = match change {
            Change::Sysctl { key, value, .. } => match sysctl::write(key, value) {
                // A setting that this kernel does not have needs no change.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result.map_err(anyhow::Error::from),
            },
            Change::Address { device, address } => self.add_address(device, *address).await,
            Change::Port { device, bridge } => self.plug_in(device, bridge).await,
            Change::Up { device } => self.turn_on(device).await,
            Change::Route(route) => self.add_route(route).await,
            Change::Rule(rule) => self.add_rule(rule).await,
        };
        made.with_context(|| format!("this change of the host cannot be made: {change}"))
    }

    /// Takes a rule back, or a route in our table. Other changes go with the device or are written back by hand.
    pub(super) async fn take_back(&self, change: &Change) -> Result<()> {
        let taken = match change {
            Change::Rule(rule) => {
                let message = rule_message(rule);
                self.handle.rule().del(message).execute().await.map_err(plain)
            }
            Change::Route(Route {
                to: RouteTo::Unreachable,
                ipv6,
                ..
            }) => self.delete_routes(*ipv6).await.map(drop),
            Change::Route(_)
            | Change::Sysctl { .. }
            | Change::Address { .. }
            | Change::Port { .. }
            | Change::Up { .. } => Ok(()),
        };
        taken.with_context(|| format!("this change of the host cannot be taken back: {change}"))
    }

    /// Removes all rules and routes of ours and the TUN device `device`, whoever made them, and returns how many
    /// there were.
    pub(super) async fn remove_all(&self, device: &str) -> Result<usize> {
        let mut removed = 0;
        // The rules come first: without the device its routes are gone, and with them the reason to refuse.
        for (ipv6, version) in [(false, IpVersion::V4), (true, IpVersion::V6)] {
            let rules: Vec<_> = self
                .handle
                .rule()
                .get(version)
                .execute()
                .try_collect()
                .await
                .map_err(plain)?;
            for rule in rules.into_iter().filter(is_ours) {
                self.handle.rule().del(rule).execute().await.map_err(plain)?;
                removed += 1;
            }
            removed += self.delete_routes(ipv6).await?;
        }
        removed += usize::from(self.delete_device(device).await?);
        Ok(removed)
    }

    /// Removes a TUN device, and returns whether there was one.
    pub(super) async fn delete_device(&self, name: &str) -> Result<bool> {
        let links = self.handle.link().get().match_name(name.to_owned()).execute();
        let Ok(links) = links.try_collect::<Vec<_>>().await else {
            return Ok(false);
        };
        let is_tun = |link: &&LinkMessage| {
            link.attributes.iter().any(|attribute| {
                matches!(attribute, LinkAttribute::LinkInfo(info) if info.contains(&LinkInfo::Kind(InfoKind::Tun)))
            })
        };
        let Some(link) = links.iter().find(is_tun) else {
            return Ok(false);
        };
        self.handle
            .link()
            .del(link.header.index)
            .execute()
            .await
            .map_err(plain)?;
        Ok(true)
    }

    async fn delete_routes(&self, ipv6: bool) -> Result<usize> {
        let mut request = RouteMessage::default();
        request.header.address_family = if ipv6 {
            AddressFamily::Inet6
        } else {
            AddressFamily::Inet
        };
        let routes: Vec<_> = self
            .handle
            .route()
            .get(request)
            .execute()
            .try_collect()
            .await
            .map_err(plain)?;
        let mut removed = 0;
        let is_ours = |route: &RouteMessage| {
            route.header.protocol == RouteProtocol::Other(PROTOCOL)
                && route.attributes.contains(&RouteAttribute::Table(TABLE))
        };
        for route in routes.into_iter().filter(is_ours) {
            self.handle.route().del(route).execute().await.map_err(plain)?;
            removed += 1;
        }
        Ok(removed)
    }

    async fn index(&self, device: &str) -> Result<u32> {
        let links = self.handle.link().get().match_name(device.to_owned()).execute();
        match links.try_collect::<Vec<_>>().await {
            Ok(links) => links.first().map(|link| link.header.index),
            Err(_) => None,
        }
        .with_context(|| format!("there is no interface {device:?}"))
    }

    async fn add_address(&self, device: &str, address: IpNet) -> Result<()> {
        let index = self.index(device).await?;
        let mut request = self
            .handle
            .address()
            .add(index, address.addr(), address.prefix_len());
        // Nobody else can have it: there is nobody else on the device.
        request
            .message_mut()
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
        request.execute().await.map_err(plain)
    }

    async fn plug_in(&self, device: &str, bridge: &str) -> Result<()> {
        let index = self.index(device).await?;
        let port = LinkUnspec::new_with_index(index)
            .controller(self.index(bridge).await?)
            .build();
        self.handle.link().set(port).execute().await.map_err(plain)
    }

    async fn turn_on(&self, device: &str) -> Result<()> {
        let index = self.index(device).await?;
        let link = LinkUnspec::new_with_index(index).up().build();
        self.handle.link().set(link).execute().await.map_err(plain)
    }

    /// How many packets may wait for whoever serves a device.
    pub(super) async fn set_transmit_queue_len(&self, device: &str, len: u32) -> Result<()> {
        let index = self.index(device).await?;
        let link = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::TxQueueLen(len))
            .build();
        self.handle.link().set(link).execute().await.map_err(plain)
    }

    async fn add_route(&self, route: &Route) -> Result<()> {
        let mut message = RouteMessageBuilder::<std::net::IpAddr>::new()
            .table_id(route.table)
            .protocol(RouteProtocol::Other(PROTOCOL))
            .build();
        message.header.address_family = family(route.ipv6);
        match &route.to {
            RouteTo::Device { device, source } => {
                if let IpAddr::V6(address) = source {
                    self.settle(*address).await;
                }
                let index = self.index(device).await?;
                message.header.kind = RouteType::Unicast;
                message.header.scope = if route.ipv6 {
                    RouteScope::Universe
                } else {
                    RouteScope::Link
                };
                message.attributes.push(RouteAttribute::Oif(index));
                message
                    .attributes
                    .push(RouteAttribute::PrefSource((*source).into()));
            }
            RouteTo::Unreachable => {
                message.header.kind = RouteType::Unreachable;
                message
                    .attributes
                    .extend(route.metric().map(RouteAttribute::Priority));
            }
        }
        self.handle.route().add(message).execute().await.map_err(plain)
    }

    /// Waits until packets for an IPv6 address of ours are taken. The kernel sees to that by itself, a moment after the
    /// address has been added and its device turned on; answers that come before would be lost.
    async fn settle(&self, address: Ipv6Addr) {
        let route = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(address, 128)
            .build();
        let since = Instant::now();
        while since.elapsed() < SETTLED_WITHIN {
            let found = self.handle.route().get(route.clone()).execute();
            let found: Vec<_> = found.try_collect().await.unwrap_or_default();
            if found.iter().any(|route| route.header.kind == RouteType::Local) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tracing::debug!(%address, "the kernel does not take packets for an address of ours yet");
    }

    async fn add_rule(&self, rule: &Rule) -> Result<()> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = rule_message(rule);
        request.execute().await.map_err(plain)
    }
}

fn family(ipv6: bool) -> AddressFamily {
    if ipv6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    }
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.ipv6);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
    if let Some(mark) = rule.mark {
        attributes.push(RuleAttribute::FwMark(mark));
    }
    if let Some(interface) = &rule.interface {
        attributes.push(RuleAttribute::Iifname(interface.clone()));
    }
    if let Some(source) = rule.source {
        message.header.src_len = source.prefix_len();
        attributes.push(RuleAttribute::Source(source.addr()));
    }
    if let Some((protocol, port)) = rule.service {
        attributes.push(RuleAttribute::IpProtocol(protocol.into()));
        let range = RulePortRange {
            start: port,
            end: port,
        };
        attributes.push(RuleAttribute::DestinationPortRange(range));
    }
    message.header.action = match rule.then {
        Then::Table(table) | Then::MoreSpecific(table) => {
            attributes.push(RuleAttribute::Table(table));
            RuleAction::ToTable
        }
        Then::GoTo(priority) => {
            attributes.push(RuleAttribute::Goto(priority));
            RuleAction::Goto
        }
        Then::Nothing => RuleAction::Nop,
    };
    if let Then::MoreSpecific(_) = rule.then {
        attributes.push(RuleAttribute::SuppressPrefixLen(0));
    }
    message
}

fn is_ours(rule: &RuleMessage) -> bool {
    let has = |attribute| rule.attributes.contains(&attribute);
    let in_range = rule.attributes.iter().any(
        |attribute| matches!(attribute, RuleAttribute::Priority(priority) if (PRIORITY..PRIORITY + 100).contains(priority)),
    );
    in_range && has(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)))
}

/// The kernel's error without netlink's envelope.
fn plain(error: rtnetlink::Error) -> anyhow::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().into(),
        other => anyhow!(other),
    }
}
