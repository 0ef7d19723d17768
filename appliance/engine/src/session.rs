//! UDP mappings and ICMP echo sessions.
//!
//! A UDP mapping is made by a client's first datagram and serves every target that the client's endpoint sends to
//! (endpoint-independent mapping, RFC 4787, REQ-1), as far as they share a way out: a redirected target has a mapping
//! of its own, so that its replies can be told apart and given their original source. What comes from outside passes the
//! lists with the outside address as its source, and the configured filter. A mapping lives while datagrams pass in
//! either direction; at the limit the least recently used one goes.
//!
//! An echo session is one identifier of one client towards one target. The engine answers no echo itself: the reply is
//! the target's.
//!
//! Errors from outside (ICMP, or what the kernel says of a socket) are translated back for the client, quoting a packet
//! that looks like the one it sent.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::addr::{FlowId, IngressId, Protocol};
use crate::config::{Config, Filtering};
use crate::dns::{self, Questions};
use crate::event::DropReason;
use crate::flow::{Flow, FlowKey, FlowTable, Route};
use crate::io::{IcmpError, World};
use crate::packet::{Datagram, Echo};
use crate::policy::RuleRef;
use crate::time::Timestamp;
use crate::timers::Queued;

/// Contacts that an address-dependent filter remembers per mapping; the oldest is forgotten first.
const CONTACTS: usize = 64;

/// A UDP mapping or an echo session.
pub(crate) struct Session {
    pub(crate) ingress: IngressId,
    pub(crate) protocol: Protocol,
    /// For ICMP the port is the identifier.
    pub(crate) client: SocketAddr,
    /// The first target; for ICMP the only one, with port 0.
    pub(crate) target: SocketAddr,
    pub(crate) route: Route,
    pub(crate) rule: RuleRef,
    pub(crate) queued: Queued,
    pub(crate) to_upstream: u64,
    pub(crate) to_client: u64,
    last_used: Timestamp,
    idle: Duration,
    /// Addresses sent to, where the filter asks.
    contacts: VecDeque<IpAddr>,
    /// What the client has asked by DNS, once it has.
    pub(crate) questions: Option<Box<Questions>>,
    /// Neighbours in the order of use, kept by [`Recency`].
    links: Links,
}

/// A session's place in the order of use.
#[derive(Debug, Clone, Copy, Default)]
struct Links {
    newer: Option<FlowId>,
    older: Option<FlowId>,
}

impl Session {
    pub(crate) fn key(&self) -> FlowKey {
        let Self {
            ingress,
            client,
            target,
            route,
            ..
        } = *self;
        match self.protocol {
            Protocol::Icmp => FlowKey::Icmp {
                ingress,
                client: client.ip(),
                identifier: client.port(),
                target: target.ip(),
                route,
            },
            Protocol::Udp | Protocol::Tcp => FlowKey::Udp {
                ingress,
                client,
                route,
            },
        }
    }

    pub(crate) fn new(
        ingress: IngressId,
        protocol: Protocol,
        (client, target): (SocketAddr, SocketAddr),
        route: Route,
        rule: RuleRef,
        config: &Config,
        now: Timestamp,
    ) -> Self {
        let timeouts = &config.timeouts;
        let idle = match protocol {
            Protocol::Icmp => timeouts.icmp,
            Protocol::Udp | Protocol::Tcp if target.port() == dns::PORT => timeouts.dns,
            Protocol::Udp | Protocol::Tcp => timeouts.udp,
        };
        Self {
            ingress,
            protocol,
            client,
            target,
            route,
            rule,
            queued: Queued::NEVER,
            to_upstream: 0,
            to_client: 0,
            last_used: now,
            idle,
            contacts: VecDeque::new(),
            questions: None,
            links: Links::default(),
        }
    }

    /// When the session ends if nothing more passes.
    pub(crate) fn expires(&self) -> Timestamp {
        self.last_used + self.idle
    }

    /// Notes that the client has sent `len` bytes to `target`.
    pub(crate) fn on_sent(&mut self, target: SocketAddr, len: usize, config: &Config, now: Timestamp) {
        self.last_used = now;
        self.to_upstream += len as u64;
        if target.port() != dns::PORT && self.protocol == Protocol::Udp {
            // More than a question and its answer.
            self.idle = config.timeouts.udp;
        }
        match config.udp_filtering {
            Filtering::EndpointIndependent => {}
            Filtering::AddressDependent if self.contacts.contains(&target.ip()) => {}
            Filtering::AddressDependent => {
                if self.contacts.len() == CONTACTS {
                    self.contacts.pop_front();
                }
                self.contacts.push_back(target.ip());
            }
        }
    }

    /// The source that the client is to see of something that came from `source`; or why it may not see it.
    pub(crate) fn admit(&self, source: SocketAddr, config: &Config) -> Result<SocketAddr, DropReason> {
        if let Route::Redirect { to, target } = self.route {
            return if source == to {
                Ok(target)
            } else {
                Err(DropReason::Filtered)
            };
        }
        match config.udp_filtering {
            Filtering::EndpointIndependent => Ok(source),
            Filtering::AddressDependent if self.contacts.contains(&source.ip()) => Ok(source),
            Filtering::AddressDependent => Err(DropReason::Filtered),
        }
    }

    /// Notes that the client was sent `len` bytes.
    pub(crate) fn on_received(&mut self, len: usize, now: Timestamp) {
        self.last_used = now;
        self.to_client += len as u64;
    }
}

/// Where an error is reported to, and from.
pub(crate) struct ErrorReport<'a> {
    pub(crate) session: &'a Session,
    /// What the client believed to send to; for ICMP the port is the request's sequence number.
    pub(crate) target: SocketAddr,
    /// Who reports it.
    pub(crate) reporter: IpAddr,
    pub(crate) error: IcmpError,
}

impl ErrorReport<'_> {
    /// Tells the client, quoting the header of a packet like the one it sent.
    pub(crate) fn send(&self, id: FlowId, mtu: u16, identification: &mut u32, world: &mut dyn World) {
        let Session {
            ingress,
            protocol,
            client,
            ..
        } = *self.session;
        let (source, target) = (client.ip(), self.target);
        let quoted = match protocol {
            Protocol::Icmp => {
                let echo = Echo {
                    identifier: client.port(),
                    sequence: self.target.port(),
                    payload: &[],
                };
                Datagram::echo_request(source, target.ip(), echo)
            }
            Protocol::Udp | Protocol::Tcp => Datagram::udp(client, target, &[], None),
        };
        let Ok(quoted) = quoted else { return };
        let mut packet = [0; 48];
        let packet = &mut packet[..quoted.packet_len()];
        quoted.write(packet, 0, ingress, None);
        let error = Datagram::icmp_error(self.reporter, source, self.error, packet);
        // A reporter of the other family (a proxy's address, say) would mean nothing to the client.
        let error = error.or_else(|_| Datagram::icmp_error(target.ip(), source, self.error, packet));
        if let Ok(error) = error {
            error.send(world, mtu, ingress, Some(id), identification);
        }
    }
}

/// The order in which sessions were used last: a doubly linked list through the flow table.
#[derive(Debug, Default)]
pub(crate) struct Recency {
    newest: Option<FlowId>,
    oldest: Option<FlowId>,
    len: usize,
}

impl Recency {
    /// How many sessions there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The session that has not been used for longest.
    pub(crate) fn oldest(&self) -> Option<FlowId> {
        self.oldest
    }

    /// Takes in a session that has just been made.
    pub(crate) fn insert(&mut self, flows: &mut FlowTable<Flow>, id: FlowId) {
        let older = self.newest.replace(id);
        links(flows, id).older = older;
        match older {
            Some(older) => links(flows, older).newer = Some(id),
            None => self.oldest = Some(id),
        }
        self.len += 1;
    }

    /// Takes out a session that is about to go.
    pub(crate) fn remove(&mut self, flows: &mut FlowTable<Flow>, id: FlowId) {
        let Links { newer, older } = std::mem::take(links(flows, id));
        match newer {
            Some(newer) => links(flows, newer).older = older,
            None => self.newest = older,
        }
        match older {
            Some(older) => links(flows, older).newer = newer,
            None => self.oldest = newer,
        }
        self.len -= 1;
    }

    /// Notes that a session was used.
    pub(crate) fn touch(&mut self, flows: &mut FlowTable<Flow>, id: FlowId) {
        if self.newest != Some(id) {
            self.remove(flows, id);
            self.insert(flows, id);
        }
    }
}

fn links(flows: &mut FlowTable<Flow>, id: FlowId) -> &mut Links {
    match flows.get_mut(id) {
        Some(Flow::Session(session)) => &mut session.links,
        Some(Flow::Tcp(_)) | None => unreachable!("the list holds living sessions only"),
    }
}
