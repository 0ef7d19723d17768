//! The engine: one way in, one ordered way out. It dispatches; the modules decide.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;

use rand_chacha::ChaCha12Rng;
use rand_core::{Rng, SeedableRng};

use crate::addr::{FlowId, IngressId, Protocol};
use crate::config::Config;
use crate::counters::Counters;
use crate::event::{CloseReason, DropReason, Event};
use crate::flow::{ClientCounts, Flow, FlowKey, FlowTable, KeyHasher, Route};
use crate::io::{
    ChecksumState, IcmpError, Input, Judgement, Open, PacketIn, Unreachable, UpstreamCommand, UpstreamError,
    UpstreamEvent, World,
};
use crate::packet::{Datagram, Echo, IcmpMessage, IcmpView, PacketView, TcpView, Transport, UdpView};
use crate::policy::{Action, Decision, ListAction, ListSide, Policy, RuleRef};
use crate::reassembly::{Reassembler, Reassembly};
use crate::session::{ErrorReport, Recency, Session};
use crate::shard;
use crate::tcp::arena::Arena;
use crate::tcp::segment::{Control, Syn};
use crate::tcp::{Context, TcpFlow, Turn};
use crate::time::{Deadline, Timestamp, WakeReason};
use crate::timers::Timers;

/// The appliance's whole behaviour as a state machine, for one shard.
///
/// Two engines built from the same configuration, policy and seed and fed the same inputs produce the same
/// outputs, byte for byte.
pub struct Engine {
    config: Config,
    policy: Arc<Policy>,
    /// Latest time seen; never moves back.
    now: Timestamp,
    /// Nanoseconds from the Unix epoch to the driver's epoch.
    wall_offset: i64,
    hasher: KeyHasher,
    flows: FlowTable<Flow>,
    clients: ClientCounts,
    /// TCP flows that still connect.
    half_open: usize,
    /// TCP flows that are more than a memory.
    tcp_flows: usize,
    sessions: Recency,
    arena: Arena,
    timers: Timers,
    /// Flows that may have something to send or to tell, in the order in which they got it.
    dirty: VecDeque<FlowId>,
    reassembler: Reassembler,
    /// Counts up through the identification fields of datagrams for clients.
    identification: u32,
    /// Segments rewritten for a stack.
    scratch: Vec<u8>,
    counters: Counters,
    draining: bool,
}

impl Engine {
    /// Builds an engine at time `now`. `seed` makes its hash keys and sequence numbers: secret when live, fixed in a
    /// replay.
    pub fn new(config: Config, policy: Arc<Policy>, seed: [u8; 32], now: Timestamp) -> Self {
        let mut rng = ChaCha12Rng::from_seed(seed);
        rng.set_stream(u64::from(config.shard.0));
        let hasher = KeyHasher::new((rng.next_u64(), rng.next_u64()));
        let reassembly_keys = (rng.next_u64(), rng.next_u64());
        Self {
            flows: FlowTable::new(config.shard, hasher),
            clients: ClientCounts::new(hasher),
            half_open: 0,
            tcp_flows: 0,
            sessions: Recency::default(),
            arena: Arena::new(config.limits.buffer_bytes),
            timers: Timers::default(),
            dirty: VecDeque::new(),
            reassembler: Reassembler::new(
                config.limits.reassembly_bytes as usize,
                config.timeouts.reassembly,
                reassembly_keys,
            ),
            identification: rng.next_u32(),
            scratch: Vec::new(),
            counters: Counters::default(),
            draining: false,
            wall_offset: 0,
            hasher,
            config,
            policy,
            now,
        }
    }

    /// Takes one input observed at `now`; an older `now` counts as the latest one seen. Never fails: what the
    /// network sends is data. Returns what became of a packet.
    pub fn handle(&mut self, now: Timestamp, input: Input<'_>, world: &mut dyn World) -> Option<Judgement> {
        self.now = self.now.max(now);
        match input {
            Input::Packet(packet) => return Some(self.handle_packet(packet, world)),
            Input::Upstream(flow, event) => self.handle_upstream(flow, event, world),
            Input::Wakeup => {}
            Input::Policy(policy) => self.handle_policy(policy, world),
            Input::WallClock(offset) => self.wall_offset = offset,
            Input::Drain => self.draining = true,
        }
        None
    }

    /// Does what has become due, sends what flows have to send, and says when to come back.
    pub fn flush(&mut self, now: Timestamp, world: &mut dyn World) -> Option<Deadline> {
        self.now = self.now.max(now);
        self.expire(world);
        while let Some(id) = self.dirty.pop_front() {
            if self.give_turn(id, world) == Room::None {
                self.dirty.push_front(id);
                break;
            }
        }
        self.next_deadline()
    }

    /// Lends the next bytes that the client of a TCP flow has sent, in order and without a gap; `take` says how
    /// many the upstream took. Returns that number, or 0 without calling `take` when nothing waits.
    ///
    /// Call [`Engine::flush`] afterwards: the window may have opened, or the flow ended.
    pub fn read(&mut self, now: Timestamp, flow: FlowId, take: impl FnOnce(&[u8]) -> usize) -> usize {
        self.now = self.now.max(now);
        let Some(Flow::Tcp(tcp)) = self.flows.get_mut(flow) else { return 0 };
        let taken = tcp.read(self.now, take);
        mark_dirty(&mut self.dirty, flow, tcp);
        taken
    }

    /// Lends room in a TCP flow's send buffer; `fill` says how many bytes from the upstream it put there. Returns
    /// that number, or 0 without calling `fill` when there is no room: then [`UpstreamCommand::Writable`]
    /// follows as soon as there is.
    ///
    /// Call [`Engine::flush`] afterwards: it sends them.
    pub fn write(&mut self, now: Timestamp, flow: FlowId, fill: impl FnOnce(&mut [u8]) -> usize) -> usize {
        self.now = self.now.max(now);
        let Some(Flow::Tcp(tcp)) = self.flows.get_mut(flow) else { return 0 };
        let filled = tcp.write(self.now, fill);
        mark_dirty(&mut self.dirty, flow, tcp);
        filled
    }

    /// What has been dropped and ended so far, by reason and by rule.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Flows that are open: TCP without TIME-WAIT, UDP mappings and echo sessions.
    pub fn open_flows(&self) -> usize {
        self.tcp_flows + self.sessions.len()
    }

    /// Bytes of TCP buffers handed out to flows.
    pub fn buffer_bytes(&self) -> u64 {
        self.arena.used()
    }

    // ---- packets -----------------------------------------------------------------------------------------------

    fn handle_packet(&mut self, packet: PacketIn<'_>, world: &mut dyn World) -> Judgement {
        let view = match PacketView::parse(packet.bytes) {
            Ok(view) => view,
            Err(reason) => return self.drop_packet(reason, None, None, world),
        };
        // Lists come before everything else, and a drop by list touches no state but counters: the pre-filter, which
        // keeps such packets from getting here, must make no difference.
        if let Some((reason, rule)) =
            self.judge(view.source(), view.destination(), view.protocol(), view.port())
        {
            return self.drop_packet(reason, Some(rule), None, world);
        }
        let sound = match packet.checksum {
            ChecksumState::Trusted => Ok(()),
            ChecksumState::Unverified => view.verify_ip_checksum(),
        };
        if let Some(reason) = sound.err().or_else(|| view.address_check()) {
            return self.drop_packet(reason, None, None, world);
        }
        if view.fragment().is_some() {
            return self.handle_fragment(&view, packet.ingress, world);
        }
        let transport = match view.transport() {
            Ok(transport) => transport,
            Err(reason) => return self.drop_packet(reason, None, None, world),
        };
        if packet.checksum == ChecksumState::Unverified
            && let Err(reason) = view.verify_transport_checksum(&transport)
        {
            return self.drop_packet(reason, None, None, world);
        }
        match transport {
            Transport::Tcp(segment) => self.handle_segment(packet.ingress, &view, &segment, world),
            Transport::Udp(datagram) => {
                self.handle_datagram(packet.ingress, &view, &datagram, packet.segment_size, world)
            }
            Transport::Icmp(message) => self.handle_icmp(packet.ingress, &view, &message, world),
        }
    }

    /// Asks the lists; `Some` is a drop.
    fn judge(
        &self,
        source: IpAddr,
        destination: IpAddr,
        protocol: Option<u8>,
        port: Option<u16>,
    ) -> Option<(DropReason, RuleRef)> {
        let lists = self.policy.lists();
        if lists.is_empty() {
            return None;
        }
        let found = lists.judge(source, destination, protocol, port, self.unix_time())?;
        match found.action {
            ListAction::Allow => None,
            ListAction::Deny => {
                let reason = match found.side {
                    ListSide::Source => DropReason::ListSource,
                    ListSide::Destination => DropReason::ListDestination,
                };
                Some((reason, RuleRef::List(found.entry)))
            }
        }
    }

    /// Seconds since the Unix epoch.
    fn unix_time(&self) -> u64 {
        let nanos = i128::from(self.now.as_nanos()) + i128::from(self.wall_offset);
        u64::try_from(nanos / 1_000_000_000).unwrap_or(0)
    }

    fn drop_packet(
        &mut self,
        reason: DropReason,
        rule: Option<RuleRef>,
        flow: Option<FlowId>,
        world: &mut dyn World,
    ) -> Judgement {
        self.counters.on_drop(reason, rule);
        world.event(&Event::Dropped { reason, rule, flow });
        Judgement { dropped: Some(reason), rule, flow }
    }

    fn handle_fragment(&mut self, view: &PacketView<'_>, ingress: IngressId, world: &mut dyn World) -> Judgement {
        let mut whole = Vec::new();
        match self.reassembler.push(self.now, ingress, view, &mut whole) {
            Reassembly::Held => Judgement { dropped: None, rule: None, flow: None },
            Reassembly::Dropped(reason) => self.drop_packet(reason, None, None, world),
            Reassembly::Complete => {
                let packet = PacketIn {
                    ingress,
                    bytes: &whole,
                    checksum: ChecksumState::Unverified,
                    segment_size: None,
                };
                let owner = PacketView::parse(&whole).map(|view| shard::owner(&view, self.config.shards));
                match owner {
                    Ok(owner) if owner != self.config.shard => {
                        world.forward(owner, packet);
                        Judgement { dropped: None, rule: None, flow: None }
                    }
                    Ok(_) => self.handle_packet(packet, world),
                    Err(reason) => self.drop_packet(reason, None, None, world),
                }
            }
        }
    }

    // ---- TCP ---------------------------------------------------------------------------------------------------

    fn handle_segment(
        &mut self,
        ingress: IngressId,
        view: &PacketView<'_>,
        segment: &TcpView<'_>,
        world: &mut dyn World,
    ) -> Judgement {
        let client = SocketAddr::new(view.source(), segment.source_port);
        let target = SocketAddr::new(view.destination(), segment.destination_port);
        let key = FlowKey::Tcp { ingress, client, target };
        let is_first = segment.flags.syn() && !segment.flags.ack();
        if let Some(id) = self.flows.find(&key) {
            let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else { unreachable!("TCP keys name TCP flows") };
            if !is_first || !flow.is_replaced_by(segment) {
                let rule = flow.rule;
                let mut cx = Context {
                    now: self.now,
                    config: &self.config,
                    hasher: &self.hasher,
                    arena: &mut self.arena,
                    scratch: &mut self.scratch,
                    world,
                };
                let dropped = flow.handle_segment(id, view, segment, &mut cx);
                mark_dirty(&mut self.dirty, id, flow);
                return match dropped {
                    None => Judgement { dropped: None, rule: Some(rule), flow: Some(id) },
                    Some(reason) => self.drop_packet(reason, Some(rule), Some(id), world),
                };
            }
            self.end_tcp(id, CloseReason::Replaced, world);
        }
        if !is_first {
            if !segment.flags.rst() {
                Control::reset_for(client, target, segment).send(ingress, None, world);
            }
            return self.drop_packet(DropReason::NoFlow, None, None, world);
        }
        self.open_tcp(ingress, key, (client, target), segment, world)
    }

    fn open_tcp(
        &mut self,
        ingress: IngressId,
        key: FlowKey,
        (client, target): (SocketAddr, SocketAddr),
        segment: &TcpView<'_>,
        world: &mut dyn World,
    ) -> Judgement {
        let Decision { action, rule } = self.policy.decide(ingress, Protocol::Tcp, client, target);
        let (egress, connect_to) = match action {
            Action::Direct => (None, target),
            Action::Egress(egress) => (Some(egress), target),
            Action::Redirect(to) => (None, to),
            Action::Drop => return self.drop_packet(DropReason::RuleDrop, Some(rule), None, world),
            Action::Reject => {
                Control::reset_for(client, target, segment).send(ingress, None, world);
                return self.drop_packet(DropReason::RuleReject, Some(rule), None, world);
            }
        };
        let limits = &self.config.limits;
        let refusal = if self.draining {
            Some(DropReason::Draining)
        } else if self.flows.len() - self.sessions.len() >= limits.flows as usize {
            Some(DropReason::FlowLimit)
        } else if self.half_open >= limits.half_open as usize {
            Some(DropReason::HalfOpenLimit)
        } else if self.clients.of(ingress, client.ip()) >= limits.flows_per_client {
            Some(DropReason::ClientLimit)
        } else {
            None
        };
        if let Some(reason) = refusal {
            if reason == DropReason::Draining {
                // Whoever could serve it will not be here: better to know at once.
                Control::reset_for(client, target, segment).send(ingress, None, world);
            }
            return self.drop_packet(reason, Some(rule), None, world);
        }
        let flow = TcpFlow::new(ingress, client, target, rule, Syn::of(segment), self.now);
        let id = self.flows.insert(key, Flow::Tcp(flow));
        self.clients.add(ingress, client.ip());
        self.half_open += 1;
        self.tcp_flows += 1;
        world.event(&Event::Opened { flow: id, ingress, protocol: Protocol::Tcp, client, target, action, rule });
        let open = Open { ingress, protocol: Protocol::Tcp, client, target: connect_to, egress };
        world.upstream(id, UpstreamCommand::Open(open));
        if let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) {
            mark_dirty(&mut self.dirty, id, flow);
        }
        Judgement { dropped: None, rule: Some(rule), flow: Some(id) }
    }

    /// Ends a TCP flow at once, telling the upstream but not the client.
    fn end_tcp(&mut self, id: FlowId, reason: CloseReason, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else { return };
        flow.abort_upstream(id, world);
        self.close_tcp(id, Some(reason), world);
    }

    /// Lets a TCP flow go. `reason` is `None` where it has been told before.
    fn close_tcp(&mut self, id: FlowId, reason: Option<CloseReason>, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.remove(id) else { return };
        if flow.is_connecting() {
            self.half_open -= 1;
        }
        if !flow.is_time_wait() {
            self.account_end(id, &flow, reason.unwrap_or(CloseReason::Finished), world);
        }
        self.clients.subtract(flow.ingress, flow.client.ip());
        flow.release(&mut self.arena);
    }

    fn account_end(&mut self, id: FlowId, flow: &TcpFlow, reason: CloseReason, world: &mut dyn World) {
        let _ = (id, flow, reason, world);
    }
}
