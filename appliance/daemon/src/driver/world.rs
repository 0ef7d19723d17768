//! The engine's side effects, done with a device and sockets.
//!
//! Commands about a flow whose bytes have to move are only noted here, since the engine cannot lend bytes in the midst
//! of a call: the flow goes on the list of those that have something to do, and the shard gives each its turn.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use tungate_engine::bypass::{BypassOrder, Ends};
use tungate_engine::dns::Learned;
use tungate_engine::event::NameSource;
use tungate_engine::io::{IcmpError, Open, PacketOut, Unreachable, UpstreamCommand, UpstreamError};
use tungate_engine::policy::{Action, RuleRef};
use tungate_engine::{
    CloseReason, Engine, Event, FlowId, PacketIn, Policy, Protocol, ShardId, Timestamp, World,
};

use super::device::Writer;
use super::exchange::{Buffers, Mailbox, Message};
use super::gathered::{self, Gathered};
use super::questions::{FlowReport, Names};
use crate::bypass::Asking;
use crate::egress::{Dialer, Egresses, Way};
use crate::upstream::errors::connect_error;
use crate::upstream::{Associating, Dialing, Ping, Readiness, SocketSetup, Tcp, Udp, Upstream};

/// A shard's world.
pub(super) struct ShardWorld {
    pub(super) device: Writer,
    pub(super) flows: Flows,
    /// What the engine is to be told as soon as it can be called.
    pub(super) news: VecDeque<(FlowId, News)>,
    /// Flows that are TCP.
    pub(super) tcp_flows: usize,
    pub(super) policy: Arc<Policy>,
    /// What flows that open refer to.
    pub(super) names: Arc<Names>,
    pub(super) egresses: Arc<Egresses>,
    /// The time that events are noted with.
    pub(super) now: Timestamp,
    pub(super) losses: Losses,
    /// All shards' mailboxes, this one's among them.
    pub(super) mailboxes: Arc<[Arc<Mailbox>]>,
    /// Shards that have got packets and are to be woken.
    pub(super) to_wake: u64,
    pub(super) buffers: Arc<Buffers>,
    pub(super) shard: ShardId,
    pub(super) registry: Registry,
    pub(super) dialer: Dialer,
    /// Whom flows are left to; `None`: they are all terminated.
    pub(super) bypass: Option<Asking>,
    /// Flows that were left to the kernel.
    pub(super) bypassed: u64,
    /// Datagrams for upstreams that leave together.
    pub(super) gathered: Gathered,
}

/// What was lost on this side of the engine.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Losses {
    /// Packets for another shard, which was too busy.
    pub(super) handed_over: u64,
}

/// What the engine is to be told about a flow.
#[derive(Debug)]
pub(super) enum News {
    Failed(UpstreamError),
    SendError { target: SocketAddr, error: IcmpError },
}

/// The flows that the engine has told of, by their slots, and which of them have something to do.
#[derive(Default)]
pub(super) struct Flows {
    slots: Vec<Option<Entry>>,
    ready: VecDeque<FlowId>,
}

/// A flow, from its opening to its end.
pub(super) struct Entry {
    id: FlowId,
    record: Record,
    pub(super) upstream: Option<Upstream>,
    /// It is on the list of those with something to do.
    queued: bool,
}

/// What the log says of a flow.
struct Record {
    protocol: Protocol,
    client: SocketAddr,
    target: SocketAddr,
    action: Action,
    rule: RuleRef,
    /// What `rule` and `action` refer to.
    names: Arc<Names>,
    name: Option<(String, NameSource)>,
    opened: Timestamp,
    /// The kernel carries it.
    bypassed: bool,
}

impl Flows {
    /// The flow `id`, if it has not ended.
    pub(super) fn get_mut(&mut self, id: FlowId) -> Option<&mut Entry> {
        let entry = self.slots.get_mut(id.slot() as usize)?.as_mut()?;
        (entry.id == id).then_some(entry)
    }

    fn insert(&mut self, id: FlowId, record: Record) {
        let slot = id.slot() as usize;
        if slot >= self.slots.len() {
            self.slots.resize_with(slot + 1, || None);
        }
        self.slots[slot] = Some(Entry {
            id,
            record,
            upstream: None,
            queued: false,
        });
    }

    fn remove(&mut self, id: FlowId) -> Option<Entry> {
        self.get_mut(id)?;
        self.slots[id.slot() as usize].take()
    }

    /// Reports the flows of up to `count` slots from `first` on; `None` behind the last one.
    pub(super) fn report(
        &self,
        first: usize,
        count: usize,
        engine: &Engine,
        now: Timestamp,
    ) -> Option<Vec<FlowReport>> {
        let slots = self.slots.get(first..)?;
        let report = |Entry { id, record, .. }: &Entry| {
            Some(FlowReport {
                id: *id,
                protocol: record.protocol,
                client: record.client,
                target: record.target,
                name: record.name.as_ref().map(|(name, _)| name.clone()),
                action: record.action,
                rule: record.rule,
                names: record.names.clone(),
                age: now.since(record.opened),
                bypassed: record.bypassed,
                progress: engine.progress(*id)?,
            })
        };
        (!slots.is_empty()).then(|| slots.iter().take(count).flatten().filter_map(report).collect())
    }

    /// Puts a flow on the list of those with something to do.
    pub(super) fn queue(&mut self, id: FlowId) {
        if let Some(entry) = self.get_mut(id)
            && !entry.queued
        {
            entry.queued = true;
            self.ready.push_back(id);
        }
    }

    /// How many flows are on that list.
    pub(super) fn queued(&self) -> usize {
        self.ready.len()
    }

    /// Takes the next flow off that list.
    pub(super) fn next_ready(&mut self) -> Option<FlowId> {
        let id = self.ready.pop_front()?;
        if let Some(entry) = self.get_mut(id) {
            entry.queued = false;
        }
        Some(id)
    }

    /// Takes note of what the poll says of a flow's socket.
    pub(super) fn on_ready(&mut self, id: FlowId, ready: Readiness) {
        if let Some(Entry {
            upstream: Some(upstream),
            ..
        }) = self.get_mut(id)
        {
            upstream.on_ready(ready);
            self.queue(id);
        }
    }
}

impl ShardWorld {
    /// Gives a flow its upstream, and has its socket polled.
    pub(super) fn attach(&mut self, id: FlowId, upstream: Upstream) {
        let Some(entry) = self.flows.get_mut(id) else {
            return;
        };
        for socket in upstream.sockets() {
            let fd = socket.as_raw_fd();
            let interest = Interest::READABLE | Interest::WRITABLE;
            if let Err(error) = self.registry.register(&mut SourceFd(&fd), token(id), interest) {
                tracing::warn!(%error, "cannot watch a socket");
                self.news.push_back((id, News::Failed(UpstreamError::Exhausted)));
                return;
            }
        }
        entry.upstream = Some(upstream);
    }

    /// Lets go of a flow's upstream, and returns it. The poll forgets a socket that is closed.
    pub(super) fn detach(&mut self, id: FlowId) -> Option<Upstream> {
        self.flows.get_mut(id)?.upstream.take()
    }

    fn open(&mut self, id: FlowId, open: &Open) {
        let egresses = self.egresses.clone();
        let opened = match egresses.way(open.egress, open.protocol) {
            Way::Direct(setup) => open_direct(setup, open),
            Way::Dialed(egress) => {
                let task = self.dialer.connect(egress.clone(), open, id, self.mailbox());
                Ok(Upstream::Dialing(Dialing(task)))
            }
            Way::Associated(egress) => {
                let task = self.dialer.associate(egress.clone(), open, id, self.mailbox());
                Ok(Upstream::Associating(Associating::new(task)))
            }
            Way::None => Err(UpstreamError::Unreachable(Unreachable::Prohibited)),
        };
        match opened {
            Ok(upstream) => self.attach(id, upstream),
            Err(error) => self.news.push_back((id, News::Failed(error))),
        }
    }

    fn mailbox(&self) -> Arc<Mailbox> {
        self.mailboxes[usize::from(self.shard.0)].clone()
    }

    fn tell_tcp(&mut self, id: FlowId, tell: impl FnOnce(&mut Tcp)) {
        if let Some(Entry {
            upstream: Some(Upstream::Tcp(tcp)),
            ..
        }) = self.flows.get_mut(id)
        {
            tell(tcp);
            self.flows.queue(id);
        }
    }

    /// Sends the datagrams that have been gathered.
    pub(super) fn send_gathered(&mut self) {
        let mut gathered = std::mem::take(&mut self.gathered);
        gathered.take(|way, bytes, size| self.send_datagrams(way, bytes, size));
        self.gathered = gathered;
    }

    fn send_datagrams(&mut self, way: gathered::Way, payload: &[u8], segment_size: Option<NonZeroU16>) {
        let gathered::Way {
            flow,
            target,
            carriage,
        } = way;
        self.send(flow, target, |upstream| match upstream {
            Upstream::Udp(udp) => udp.send(target, payload, segment_size, carriage),
            Upstream::Relayed(relayed) => {
                relayed.send(target, payload, segment_size);
                Ok(())
            }
            Upstream::Associating(associating) => {
                associating.send(target, payload, segment_size);
                Ok(())
            }
            Upstream::Tcp(_) | Upstream::Ping(_) | Upstream::Dialing(_) => Ok(()),
        });
    }

    fn send(
        &mut self,
        id: FlowId,
        target: SocketAddr,
        send: impl FnOnce(&mut Upstream) -> Result<(), IcmpError>,
    ) {
        let Some(entry) = self.flows.get_mut(id) else {
            return;
        };
        let Some(upstream) = &mut entry.upstream else {
            return; // it could not be opened, which the engine is about to hear
        };
        if let Err(error) = send(upstream) {
            self.news.push_back((id, News::SendError { target, error }));
        }
        let has_error = match upstream {
            Upstream::Udp(udp) => udp.error,
            Upstream::Ping(ping) => ping.error,
            Upstream::Tcp(_) | Upstream::Relayed(_) | Upstream::Dialing(_) | Upstream::Associating(_) => {
                false
            }
        };
        if has_error {
            self.flows.queue(id);
        }
    }

    fn on_opened(&mut self, id: FlowId, record: Record) {
        self.tcp_flows += usize::from(record.protocol == Protocol::Tcp);
        self.flows.insert(id, record);
    }
}

/// The token of a flow's socket.
pub(super) fn token(id: FlowId) -> Token {
    Token(id.as_u64() as usize)
}

/// The flow of a token.
pub(super) fn flow_of(token: Token) -> FlowId {
    let id = token.0 as u64;
    FlowId::new(ShardId((id >> 56) as u8), (id >> 32) as u32, id as u32)
}

fn open_direct(setup: &SocketSetup, open: &Open) -> Result<Upstream, UpstreamError> {
    let (client, target) = (open.client.ip(), open.target.ip());
    let opened = match open.protocol {
        Protocol::Tcp => Tcp::connect(setup, client, open.target).map(Upstream::Tcp),
        Protocol::Udp => Udp::open(setup, client, target).map(Upstream::Udp),
        Protocol::Icmp => Ping::open(setup, client, target).map(Upstream::Ping),
    };
    opened.map_err(|error| {
        tracing::debug!(%error, protocol = %open.protocol, target = %open.target, "cannot open an upstream");
        connect_error(&error)
    })
}

impl World for ShardWorld {
    fn has_room(&self) -> bool {
        self.device.has_room()
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.device.packet_buffer(len)
    }

    fn send_packet(&mut self, packet: PacketOut) {
        self.device.send(&packet);
    }

    fn send_parts(&mut self, packet: PacketOut, headers: &[u8], payload: (&[u8], &[u8])) {
        self.device.send_parts(&packet, headers, payload);
    }

    fn upstream(&mut self, id: FlowId, command: UpstreamCommand<'_>) {
        let is_send = matches!(command, UpstreamCommand::Send { .. });
        if !is_send && self.gathered.flow() == Some(id) {
            self.send_gathered();
        }
        match command {
            UpstreamCommand::Open(open) => self.open(id, &open),
            UpstreamCommand::Readable => self.tell_tcp(id, Tcp::on_bytes),
            UpstreamCommand::Writable => self.tell_tcp(id, Tcp::on_room),
            UpstreamCommand::CloseWrite => self.tell_tcp(id, Tcp::close_write),
            UpstreamCommand::Send {
                target,
                payload,
                segment_size,
                carriage,
            } => {
                let way = gathered::Way {
                    flow: id,
                    target,
                    carriage,
                };
                if segment_size.is_some() {
                    self.send_gathered();
                    self.send_datagrams(way, payload, segment_size);
                } else if !self.gathered.push(way, payload) {
                    self.send_gathered();
                    self.gathered.push(way, payload);
                }
            }
            UpstreamCommand::Echo {
                sequence,
                payload,
                carriage,
            } => {
                let Some(target) = self.flows.get_mut(id).map(|entry| entry.record.target) else {
                    return;
                };
                self.send(id, target, |upstream| match upstream {
                    Upstream::Ping(ping) => ping.send(sequence, payload, carriage),
                    Upstream::Tcp(_)
                    | Upstream::Udp(_)
                    | Upstream::Relayed(_)
                    | Upstream::Dialing(_)
                    | Upstream::Associating(_) => Ok(()),
                });
            }
            UpstreamCommand::Close => drop(self.detach(id)),
            UpstreamCommand::Abort => match self.detach(id) {
                Some(Upstream::Tcp(tcp)) => tcp.abort(),
                Some(
                    Upstream::Udp(_)
                    | Upstream::Ping(_)
                    | Upstream::Relayed(_)
                    | Upstream::Dialing(_)
                    | Upstream::Associating(_),
                )
                | None => {}
            },
        }
    }

    fn offer(&mut self, id: FlowId, bytes: &[u8]) -> usize {
        let Some(Entry {
            upstream: Some(Upstream::Tcp(tcp)),
            ..
        }) = self.flows.get_mut(id)
        else {
            return 0;
        };
        let taken = tcp.take(bytes);
        if tcp.is_broken() {
            self.flows.queue(id);
        }
        taken
    }

    fn bypass(&mut self, id: FlowId, ends: Ends, order: BypassOrder) {
        if order == BypassOrder::Begin
            && let Some(entry) = self.flows.get_mut(id)
        {
            entry.record.bypassed = true;
            self.bypassed += 1;
        }
        if let Some(bypass) = &self.bypass {
            bypass.order(ends, order);
        }
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Dropped { reason, rule, flow } => {
                tracing::trace!(%reason, ?rule, ?flow, "packet dropped");
            }
            &Event::Opened {
                flow,
                ingress: _,
                protocol,
                client,
                target,
                action,
                rule,
            } => {
                let record = Record {
                    protocol,
                    client,
                    target,
                    action,
                    rule,
                    names: self.names.clone(),
                    name: None,
                    opened: self.now,
                    bypassed: false,
                };
                tracing::debug!(
                    target: "tungate::flow",
                    %flow,
                    %protocol,
                    %client,
                    %target,
                    rule = record.rule(),
                    egress = record.egress(),
                    "flow opened"
                );
                self.on_opened(flow, record);
            }
            Event::Established { flow: _ } => {}
            Event::Named { flow, name, source } => {
                if let Some(entry) = self.flows.get_mut(*flow) {
                    entry.record.name = Some((name.clone(), *source));
                }
            }
            &Event::Closed {
                flow,
                reason,
                to_upstream,
                to_client,
            } => {
                let Some(Entry { record, .. }) = self.flows.remove(flow) else {
                    return;
                };
                self.tcp_flows -= usize::from(record.protocol == Protocol::Tcp);
                record.log(flow, self.now, (to_upstream, to_client), reason, &self.policy);
            }
        }
    }

    fn forward(&mut self, shard: ShardId, packet: PacketIn<'_>) {
        let parcel = self.buffers.wrap(&packet);
        match self.mailboxes[usize::from(shard.0)].packets.push(parcel) {
            Ok(()) => self.to_wake |= 1 << shard.0,
            Err(parcel) => {
                self.losses.handed_over += 1;
                self.buffers.give_back(parcel);
            }
        }
    }

    fn learned(&mut self, learned: &Learned) {
        if self.mailboxes.len() == 1 {
            return;
        }
        let learned = Arc::new(learned.clone());
        for (index, mailbox) in self.mailboxes.iter().enumerate() {
            if index != usize::from(self.shard.0) {
                mailbox.send(Message::Learned(Arc::clone(&learned)));
            }
        }
    }

    fn vacate(&mut self, memory: NonNull<[u8]>) {
        // SAFETY: these are whole pages of a mapping of the allocator's, lent for this call, and read by nobody before
        // they are written: that they come back as zeros is seen by nobody.
        unsafe { libc::madvise(memory.as_ptr().cast(), memory.len(), libc::MADV_DONTNEED) };
    }
}

impl Record {
    fn rule(&self) -> &str {
        self.names.rule(self.rule)
    }

    fn egress(&self) -> &str {
        self.names.egress(self.action)
    }

    /// Writes the line that every flow gets at its end; `policy` is the present one, which `reason` may refer to.
    fn log(
        &self,
        flow: FlowId,
        now: Timestamp,
        (to_upstream, to_client): (u64, u64),
        reason: CloseReason,
        policy: &Policy,
    ) {
        let detail = match reason {
            CloseReason::ConnectFailed(error) => Some(format!("{error:?}").to_lowercase()),
            CloseReason::Denied(rule) => Some(policy.name(rule).to_string()),
            CloseReason::Finished
            | CloseReason::ClientReset
            | CloseReason::UpstreamReset
            | CloseReason::ConnectTimeout
            | CloseReason::HandshakeTimeout
            | CloseReason::IdleTimeout
            | CloseReason::HalfCloseTimeout
            | CloseReason::ClientUnresponsive
            | CloseReason::Replaced
            | CloseReason::Evicted
            | CloseReason::BufferLimit
            | CloseReason::Internal => None,
        };
        tracing::info!(
            target: "tungate::flow",
            %flow,
            protocol = %self.protocol,
            client = %self.client,
            target = %self.target,
            name = self.name.as_ref().map(|(name, _)| name),
            name_source = self.name.as_ref().map(|(_, source)| source.name()),
            rule = %self.rule(),
            egress = self.egress(),
            way = self.bypassed.then_some("bypassed"),
            to_upstream,
            to_client,
            seconds = format_args!("{:.3}", now.since(self.opened).as_secs_f64()),
            end = reason.name(),
            detail,
            "flow ended"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_name_flows() {
        for id in [
            FlowId::new(ShardId(0), 0, 0),
            FlowId::new(ShardId(3), 0x00ab_cdef, 0x1234_5678),
            FlowId::new(ShardId(254), 0x00ff_ffff, u32::MAX),
        ] {
            assert_eq!(flow_of(token(id)), id);
        }
    }
}
