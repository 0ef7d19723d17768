//! Ways out: direct, by a proxy, or by one of several.
//!
//! Shards open direct upstreams themselves. What takes a conversation first (a proxy's handshake, a name to look up,
//! members of a group to try) is a task of the [`Dialer`], which hands over a connected socket.

mod dialer;
mod group;
mod http;
mod proxy;
mod socks5;

use std::sync::Arc;

use anyhow::Result;
use tungate_config::{EgressKind, SocketOptions};
use tungate_engine::Protocol;
use tungate_engine::policy::EgressId;

pub(crate) use dialer::{Association, Dialer};
pub(crate) use proxy::read_passwords;
pub(crate) use socks5::{DATAGRAM_HEADER_MAX, parse_datagram, write_datagram_header};

use self::group::Group;
use self::proxy::Proxy;
use crate::upstream::{Broker, SocketSetup};

/// The ways out of one configuration.
#[derive(Debug)]
pub(crate) struct Egresses {
    /// For flows that name none.
    direct: SocketSetup,
    /// By [`EgressId`].
    named: Vec<Arc<Egress>>,
}

/// A named way out.
#[derive(Debug)]
pub(crate) struct Egress {
    name: String,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Direct(SocketSetup),
    Socks5(Proxy),
    Http(Proxy),
    Group(Group),
}

/// How to open an upstream.
#[derive(Debug)]
pub(crate) enum Way<'a> {
    /// By a socket of one's own.
    Direct(&'a SocketSetup),
    /// By [`Dialer::connect`].
    Dialed(&'a Arc<Egress>),
    /// By [`Dialer::associate`].
    Associated(&'a Arc<Egress>),
    /// The egress cannot carry the protocol.
    None,
}

impl Egresses {
    /// The ways out that are configured. Sockets come from `broker`; without one they are opened here, with no mark but
    /// what is asked for.
    ///
    /// # Errors
    ///
    /// If a password file cannot be read.
    pub(crate) fn new(configured: &[tungate_config::Egress], broker: Option<&Arc<Broker>>) -> Result<Self> {
        let mut named: Vec<Option<Arc<Egress>>> = vec![None; configured.len()];
        // Groups come second: their members are no groups.
        for groups in [false, true] {
            for (index, egress) in configured.iter().enumerate() {
                let kind = match &egress.kind {
                    EgressKind::Group(group) if groups => {
                        let member = |id: &EgressId| named[usize::from(id.0)].clone();
                        Kind::Group(Group::new(group, group.members.iter().filter_map(member)))
                    }
                    EgressKind::Direct { socket } if !groups => Kind::Direct(SocketSetup::of(socket, broker)),
                    EgressKind::Socks5(proxy) if !groups => Kind::Socks5(Proxy::new(proxy, broker)?),
                    EgressKind::Http(proxy) if !groups => Kind::Http(Proxy::new(proxy, broker)?),
                    EgressKind::Group(_)
                    | EgressKind::Direct { .. }
                    | EgressKind::Socks5(_)
                    | EgressKind::Http(_) => continue,
                };
                named[index] = Some(Arc::new(Egress {
                    name: egress.name.clone(),
                    kind,
                }));
            }
        }
        Ok(Self {
            direct: SocketSetup::of(&SocketOptions::default(), broker),
            named: named.into_iter().flatten().collect(),
        })
    }

    /// How a flow of `protocol` leaves by `egress`.
    pub(crate) fn way(&self, egress: Option<EgressId>, protocol: Protocol) -> Way<'_> {
        match egress {
            None => Way::Direct(&self.direct),
            Some(id) => way(&self.named[usize::from(id.0)], protocol),
        }
    }

    /// Looks up the names of proxies, so that it need not be done when the first flow waits for it.
    pub(crate) async fn look_up_proxies(&self) {
        for egress in &self.named {
            if let Kind::Socks5(proxy) | Kind::Http(proxy) = &egress.kind
                && let Err(error) = proxy.look_up().await
            {
                tracing::warn!(
                    egress = egress.name,
                    error = format_args!("{error:#}"),
                    "cannot look up a proxy"
                );
            }
        }
    }

    /// Starts the health checks of groups, which go on as long as `self` is used.
    pub(crate) fn watch(self: &Arc<Self>, runtime: &tokio::runtime::Handle) {
        for egress in &self.named {
            if let Kind::Group(_) = &egress.kind {
                runtime.spawn(group::watch(Arc::downgrade(egress)));
            }
        }
    }
}

fn way(egress: &Arc<Egress>, protocol: Protocol) -> Way<'_> {
    match (&egress.kind, protocol) {
        (Kind::Direct(setup), _) => Way::Direct(setup),
        (Kind::Socks5(_) | Kind::Http(_) | Kind::Group(_), Protocol::Tcp) => Way::Dialed(egress),
        (Kind::Socks5(_), Protocol::Udp) => Way::Associated(egress),
        (Kind::Socks5(_) | Kind::Http(_), _) => Way::None,
        // Sessions stay with the member that is best at their beginning.
        (Kind::Group(group), _) => group
            .in_order()
            .map(|member| way(member, protocol))
            .find(|way| !matches!(way, Way::None))
            .unwrap_or(Way::None),
    }
}
