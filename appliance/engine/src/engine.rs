//! The engine: one way in, one ordered way out. It dispatches; the modules decide.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use rand_chacha::ChaCha12Rng;
use rand_core::{Rng, SeedableRng};

use crate::addr::{FlowId, IngressId, Protocol};
use crate::config::Config;
use crate::counters::Counters;
use crate::dns::{self, Learned, Names};
use crate::event::{CloseReason, DropReason, Event, NameSource};
use crate::flow::{ClientCounts, Flow, FlowKey, FlowTable, KeyHasher, Route};
use crate::io::{
    ChecksumState, IcmpError, Input, Judgement, Open, PacketIn, Progress, Stage, Unreachable,
    UpstreamCommand, UpstreamError, UpstreamEvent, World,
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

/// How long a flow may connect though there are as many as may: most targets answer sooner, and the others' clients ask
/// again.
const HALF_OPEN_KEPT: Duration = Duration::from_millis(100);

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
    /// They, and some that connect no longer, in the order in which they began.
    connecting: VecDeque<FlowId>,
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
    /// The packet last made whole from fragments.
    whole: Vec<u8>,
    counters: Counters,
    names: Names,
    /// What TCP flows have taught, and other shards do not know yet.
    learned: Vec<Learned>,
    /// When an entry of the lists expires next.
    policy_due: Option<Timestamp>,
    draining: bool,
}

impl Engine {
    /// Builds an engine at time `now`. `seed` makes its hash keys and sequence numbers: secret when live, fixed in a
    /// replay.
    pub fn new(config: Config, policy: Arc<Policy>, seed: [u8; 32], now: Timestamp) -> Self {
        let mut rng = ChaCha12Rng::from_seed(seed);
        rng.set_stream(u64::from(config.shard.0));
        let hasher = KeyHasher::new(rng.next_u64(), (rng.next_u64(), rng.next_u64()));
        Self {
            flows: FlowTable::new(config.shard, hasher.clone()),
            clients: ClientCounts::new(hasher.clone()),
            half_open: 0,
            connecting: VecDeque::new(),
            tcp_flows: 0,
            sessions: Recency::default(),
            arena: Arena::new(config.limits.buffer_bytes),
            timers: Timers::default(),
            dirty: VecDeque::new(),
            reassembler: Reassembler::new(
                config.limits.reassembly_bytes as usize,
                config.timeouts.reassembly,
            ),
            identification: rng.next_u32(),
            scratch: Vec::new(),
            whole: Vec::new(),
            counters: Counters::default(),
            names: Names::new(config.limits.names),
            learned: Vec::new(),
            policy_due: None,
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
    #[inline] // a driver that gives a packet gets its judgement without a move of either
    pub fn handle(&mut self, now: Timestamp, input: Input<'_>, world: &mut dyn World) -> Option<Judgement> {
        self.now = self.now.max(now);
        match input {
            Input::Packet(packet) => return Some(self.handle_packet(packet, world)),
            Input::Upstream(flow, event) => self.handle_upstream(flow, event, world),
            Input::Wakeup => {}
            Input::Policy(policy) => {
                self.policy = policy;
                self.counters.on_policy();
                self.review(world);
            }
            Input::WallClock(offset) => {
                self.wall_offset = offset;
                self.review(world);
            }
            Input::Learned(learned) => self.names.learn(self.now, learned),
            Input::Drain => self.draining = true,
        }
        None
    }

    /// Does what has become due, sends what flows have to send, and says when to come back.
    pub fn flush(&mut self, now: Timestamp, world: &mut dyn World) -> Option<Deadline> {
        self.now = self.now.max(now);
        self.expire(world);
        for learned in self.learned.drain(..) {
            world.learned(&learned);
        }
        while let Some(id) = self.dirty.pop_front() {
            if self.give_turn(id, world) == Room::None {
                self.dirty.push_front(id);
                break;
            }
        }
        let Self { timers, flows, .. } = self;
        timers.prune(flows.len(), |id| match flows.get_mut(id)? {
            Flow::Tcp(flow) => Some(flow.queued),
            Flow::Session(session) => Some(session.queued),
        });
        self.next_deadline()
    }

    /// Lends the next bytes that the client of a TCP flow has sent, in order and without a gap; `take` says how
    /// many the upstream took. Returns that number, or 0 without calling `take` when nothing waits.
    ///
    /// Call [`Engine::flush`] afterwards: the window may have opened, or the flow ended.
    pub fn read(&mut self, now: Timestamp, flow: FlowId, take: impl FnOnce(&[u8]) -> usize) -> usize {
        self.now = self.now.max(now);
        let Some(Flow::Tcp(tcp)) = self.flows.get_mut(flow) else {
            return 0;
        };
        let taken = if tcp.target.port() == dns::PORT {
            let (mut conversation, server) = (tcp.conversation.take().unwrap_or_default(), tcp.target);
            let taken = tcp.read(self.now, |bytes| {
                let taken = take(bytes);
                conversation.on_client(server, &bytes[..taken.min(bytes.len())]);
                taken
            });
            tcp.conversation = Some(conversation);
            taken
        } else {
            tcp.read(self.now, take)
        };
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
        let Some(Flow::Tcp(tcp)) = self.flows.get_mut(flow) else {
            return 0;
        };
        let filled = if let Some(mut conversation) = tcp.conversation.take() {
            let client = self.config.client_of(tcp.client.ip());
            let (ingress, server) = (tcp.ingress, tcp.target);
            let filled = tcp.write(self.now, |space| {
                let filled = fill(space);
                conversation.on_server(server, &space[..filled.min(space.len())], |answer| {
                    let learned = answer.for_client(ingress, client);
                    self.names.learn(self.now, &learned);
                    self.learned.push(learned);
                });
                filled
            });
            tcp.conversation = Some(conversation);
            filled
        } else {
            tcp.write(self.now, fill)
        };
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

    /// How far a flow has come; `None` once it has ended.
    pub fn progress(&self, flow: FlowId) -> Option<Progress> {
        match self.flows.get(flow)? {
            Flow::Tcp(tcp) => tcp.progress(),
            Flow::Session(session) => Some(Progress {
                stage: Stage::Open,
                to_upstream: session.to_upstream,
                to_client: session.to_client,
            }),
        }
    }

    /// Bytes of TCP buffers handed out to flows.
    pub fn buffer_bytes(&self) -> u64 {
        self.arena.used()
    }

    // ---- packets -----------------------------------------------------------------------------------------------

    fn handle_packet(&mut self, packet: PacketIn<'_>, world: &mut dyn World) -> Judgement {
        // Views are used where they were made: a processor cannot load in one piece what it has just stored in several,
        // and waits for each move of one.
        let parsed = PacketView::parse(packet.bytes);
        let view = match &parsed {
            Ok(view) => view,
            Err(reason) => return self.drop_packet(*reason, None, None, world),
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
            return self.handle_fragment(view, packet, world);
        }
        let transport = view.transport();
        let transport = match &transport {
            Ok(transport) => transport,
            Err(reason) => return self.drop_packet(*reason, None, None, world),
        };
        if packet.checksum == ChecksumState::Unverified
            && let Err(reason) = view.verify_transport_checksum(transport)
        {
            return self.drop_packet(reason, None, None, world);
        }
        match transport {
            Transport::Tcp(segment) => self.handle_segment(packet.ingress, view, segment, world),
            Transport::Udp(datagram) => {
                self.handle_datagram(packet.ingress, view, datagram, packet.segment_size, world)
            }
            Transport::Icmp(message) => self.handle_icmp(packet.ingress, view, message, world),
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
        Judgement {
            dropped: Some(reason),
            rule,
            flow,
        }
    }

    fn handle_fragment(
        &mut self,
        view: &PacketView<'_>,
        packet: PacketIn<'_>,
        world: &mut dyn World,
    ) -> Judgement {
        let held = Judgement {
            dropped: None,
            rule: None,
            flow: None,
        };
        let mut whole = std::mem::take(&mut self.whole);
        let pushed = self
            .reassembler
            .push(self.now, packet.ingress, view, packet.checksum, &mut whole);
        while self.reassembler.evict() {
            self.drop_packet(DropReason::FragmentMemory, None, None, world);
        }
        let judgement = match pushed {
            Reassembly::Held => held,
            Reassembly::Dropped(reason) => self.drop_packet(reason, None, None, world),
            // The whole packet takes the way of any packet, to the engine that owns its flow and by whoever has to
            // know of it before.
            Reassembly::Complete(checksum) => {
                let packet = PacketIn {
                    bytes: &whole,
                    checksum,
                    segment_size: None,
                    ..packet
                };
                let owner = PacketView::parse(&whole).map(|view| shard::owner(&view, self.config.shards));
                match owner {
                    Ok(owner) if self.config.shards > 1 => {
                        world.forward(owner, packet);
                        held
                    }
                    Ok(_) | Err(_) => self.handle_packet(packet, world),
                }
            }
        };
        self.whole = whole;
        judgement
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
        let key = FlowKey::Tcp {
            ingress,
            client,
            target,
        };
        let is_first = segment.flags.syn() && !segment.flags.ack();
        let hash = self.hasher.tcp(
            ingress,
            (view.source(), segment.source_port),
            (view.destination(), segment.destination_port),
        );
        if let Some(id) = self.flows.find_hashed(hash, &key) {
            let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
                unreachable!("TCP keys name TCP flows")
            };
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
                    None => Judgement {
                        dropped: None,
                        rule: Some(rule),
                        flow: Some(id),
                    },
                    Some(reason) => self.drop_packet(reason, Some(rule), Some(id), world),
                };
            }
            self.end(id, CloseReason::Replaced, world);
        }
        if !is_first {
            if !segment.flags.rst() {
                Control::reset_for(client, target, segment).send(ingress, None, world);
            }
            return self.drop_packet(DropReason::NoFlow, None, None, world);
        }
        self.open_tcp(ingress, (client, target), segment, world)
    }

    fn open_tcp(
        &mut self,
        ingress: IngressId,
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
        } else if self.tcp_flows >= limits.flows as usize {
            Some(DropReason::FlowLimit)
        } else if self.clients.of(ingress, client.ip()) >= limits.flows_per_client {
            Some(DropReason::ClientLimit)
        } else if self.half_open >= limits.half_open as usize && !self.evict_half_open(world) {
            Some(DropReason::HalfOpenLimit)
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
        let id = self.flows.insert(Flow::Tcp(flow));
        self.clients.add(ingress, client.ip());
        self.half_open += 1;
        self.note_connecting(id);
        self.tcp_flows += 1;
        world.event(&Event::Opened {
            flow: id,
            ingress,
            protocol: Protocol::Tcp,
            client,
            target,
            action,
            rule,
        });
        self.tell_name(id, (ingress, client, target), world);
        let open = Open {
            ingress,
            protocol: Protocol::Tcp,
            client,
            target: connect_to,
            egress,
        };
        world.upstream(id, UpstreamCommand::Open(open));
        if let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) {
            mark_dirty(&mut self.dirty, id, flow);
        }
        Judgement {
            dropped: None,
            rule: Some(rule),
            flow: Some(id),
        }
    }

    /// Tells the name that a new flow's client knows its target by, if it has learned one.
    fn tell_name(
        &self,
        flow: FlowId,
        (ingress, client, target): (IngressId, SocketAddr, SocketAddr),
        world: &mut dyn World,
    ) {
        if let Some(name) =
            self.names
                .find(self.now, ingress, self.config.client_of(client.ip()), target.ip())
        {
            world.event(&Event::Named {
                flow,
                name: name.to_owned(),
                source: NameSource::Dns,
            });
        }
    }

    /// Puts a new flow at the end of those that connect.
    fn note_connecting(&mut self, id: FlowId) {
        // What connects no longer is taken out when it has become the larger part.
        if self.connecting.len() > 2 * self.half_open {
            let flows = &mut self.flows;
            self.connecting
                .retain(|&id| matches!(flows.get_mut(id), Some(Flow::Tcp(flow)) if flow.half_open));
        }
        self.connecting.push_back(id);
    }

    /// Gives up the flow that has connected for longest, if that is long enough; says whether there was one. Whoever
    /// floods targets that do not answer holds places for that long, and honest clients find others. Nothing is said to
    /// its client, who will ask again.
    fn evict_half_open(&mut self, world: &mut dyn World) -> bool {
        while let Some(&oldest) = self.connecting.front() {
            let since = match self.flows.get_mut(oldest) {
                Some(Flow::Tcp(flow)) if flow.half_open => flow.since,
                Some(Flow::Tcp(_) | Flow::Session(_)) | None => {
                    self.connecting.pop_front();
                    continue;
                }
            };
            if self.now.since(since) < HALF_OPEN_KEPT {
                return false;
            }
            self.connecting.pop_front();
            self.end(oldest, CloseReason::Evicted, world);
            return true;
        }
        false
    }

    // ---- policy ------------------------------------------------------------------------------------------------

    /// Ends the flows that the policy denies now, and notes the rule that lets each of the others go on.
    fn review(&mut self, world: &mut dyn World) {
        self.policy_due = self.next_expiry();
        for id in self.flows.ids() {
            let (ingress, protocol, client, target) = match self.flows.get_mut(id) {
                Some(Flow::Tcp(flow)) if flow.is_time_wait() => continue,
                Some(Flow::Tcp(flow)) => (flow.ingress, Protocol::Tcp, flow.client, flow.target),
                Some(Flow::Session(session)) => {
                    (session.ingress, session.protocol, session.client, session.target)
                }
                None => continue,
            };
            let (number, port) = match protocol {
                Protocol::Tcp => (6, Some(target.port())),
                Protocol::Udp => (17, Some(target.port())),
                Protocol::Icmp => (1, None),
            };
            let denied = self.judge(client.ip(), target.ip(), Some(number), port);
            let decision = self.policy.decide(ingress, protocol, client, target);
            let (rule, silent) = match (denied, decision.action) {
                (Some((_, rule)), _) => (rule, true),
                (None, Action::Drop) => (decision.rule, true),
                (None, Action::Reject) => (decision.rule, false),
                (None, Action::Direct | Action::Egress(_) | Action::Redirect(_)) => {
                    match self.flows.get_mut(id) {
                        Some(Flow::Tcp(flow)) => flow.rule = decision.rule,
                        Some(Flow::Session(session)) => session.rule = decision.rule,
                        None => {}
                    }
                    continue;
                }
            };
            self.abort_tcp(id, silent, world);
            self.end(id, CloseReason::Denied(rule), world);
        }
    }

    /// When a list entry expires next.
    fn next_expiry(&self) -> Option<Timestamp> {
        let unix_seconds = self.policy.lists().next_expiry(self.unix_time())?;
        let nanos = i128::from(unix_seconds) * 1_000_000_000 - i128::from(self.wall_offset);
        Some(u64::try_from(nanos).map_or(Timestamp::MAX, Timestamp::from_nanos))
    }

    // ---- UDP ---------------------------------------------------------------------------------------------------

    fn handle_datagram(
        &mut self,
        ingress: IngressId,
        view: &PacketView<'_>,
        datagram: &UdpView<'_>,
        segment_size: Option<NonZeroU16>,
        world: &mut dyn World,
    ) -> Judgement {
        let client = SocketAddr::new(view.source(), datagram.source_port);
        let target = SocketAddr::new(view.destination(), datagram.destination_port);
        let decision = self.policy.decide(ingress, Protocol::Udp, client, target);
        let (route, send_to) = match self.route(decision, ingress, target, view, Unreachable::Port, world) {
            Ok(route) => route,
            Err(judgement) => return judgement,
        };
        let key = FlowKey::Udp {
            ingress,
            client,
            route,
        };
        let session = (ingress, Protocol::Udp, client, target);
        let id = match self.find_session(key, session, route, decision, world) {
            Ok(id) => id,
            Err(judgement) => return judgement,
        };
        let payload = datagram.payload;
        if let Some(Flow::Session(session)) = self.flows.get_mut(id) {
            session.on_sent(target, payload.len(), &self.config, self.now);
            if target.port() == dns::PORT && segment_size.is_none() {
                let questions = session.questions.get_or_insert_default();
                questions.on_message(target, payload);
            }
        }
        let segment_size = segment_size.filter(|size| usize::from(size.get()) < payload.len());
        let hop_limit = view.hop_limit() - 1;
        world.upstream(
            id,
            UpstreamCommand::Send {
                target: send_to,
                payload,
                segment_size,
                hop_limit,
            },
        );
        Judgement {
            dropped: None,
            rule: Some(decision.rule),
            flow: Some(id),
        }
    }

    /// The way out for a datagram or echo request that the policy lets pass, and where to send it; otherwise its end.
    fn route(
        &mut self,
        decision: Decision,
        ingress: IngressId,
        target: SocketAddr,
        view: &PacketView<'_>,
        rejection: Unreachable,
        world: &mut dyn World,
    ) -> Result<(Route, SocketAddr), Judgement> {
        let (route, send_to) = match decision.action {
            Action::Direct => (Route::Direct, target),
            Action::Egress(egress) => (Route::Egress(egress), target),
            Action::Redirect(to) => (Route::Redirect { to, target }, to),
            Action::Drop => {
                return Err(self.drop_packet(DropReason::RuleDrop, Some(decision.rule), None, world));
            }
            Action::Reject => {
                self.report(
                    target.ip(),
                    IcmpError::Unreachable(rejection),
                    ingress,
                    view,
                    world,
                );
                return Err(self.drop_packet(DropReason::RuleReject, Some(decision.rule), None, world));
            }
        };
        if view.hop_limit() <= 1 {
            let router = self.router(view);
            self.report(router, IcmpError::TimeExceeded, ingress, view, world);
            return Err(self.drop_packet(DropReason::HopLimit, Some(decision.rule), None, world));
        }
        Ok((route, send_to))
    }

    /// The appliance's own address, of the packet's IP version.
    fn router(&self, view: &PacketView<'_>) -> IpAddr {
        if view.is_ipv6() {
            self.config.router_v6.into()
        } else {
            self.config.router_v4.into()
        }
    }

    /// Answers a packet by an ICMP error, if it may be answered so.
    fn report(
        &mut self,
        reporter: IpAddr,
        error: IcmpError,
        ingress: IngressId,
        view: &PacketView<'_>,
        world: &mut dyn World,
    ) {
        if view.may_cause_error()
            && let Ok(message) = Datagram::icmp_error(reporter, view.source(), error, view.bytes())
        {
            message.send(world, self.config.mtu, ingress, None, &mut self.identification);
        }
    }

    /// The session with this key, made if there is none. At the limit, the least recently used one goes.
    fn find_session(
        &mut self,
        key: FlowKey,
        (ingress, protocol, client, target): (IngressId, Protocol, SocketAddr, SocketAddr),
        route: Route,
        Decision { action, rule }: Decision,
        world: &mut dyn World,
    ) -> Result<FlowId, Judgement> {
        if let Some(id) = self.flows.find(&key) {
            self.sessions.touch(&mut self.flows, id);
            return Ok(id);
        }
        if self.draining {
            return Err(self.drop_packet(DropReason::Draining, Some(rule), None, world));
        }
        if self.sessions.len() >= self.config.limits.sessions as usize
            && let Some(oldest) = self.sessions.oldest()
        {
            self.end(oldest, CloseReason::Evicted, world);
        }
        let session = Session::new(
            ingress,
            protocol,
            (client, target),
            route,
            rule,
            &self.config,
            self.now,
        );
        let expires = session.expires();
        let id = self.flows.insert(Flow::Session(session));
        self.sessions.insert(&mut self.flows, id);
        if let Some(Flow::Session(session)) = self.flows.get_mut(id) {
            self.timers
                .schedule(&mut session.queued, id, expires, WakeReason::Session);
        }
        world.event(&Event::Opened {
            flow: id,
            ingress,
            protocol,
            client,
            target,
            action,
            rule,
        });
        self.tell_name(id, (ingress, client, target), world);
        let (egress, target) = match route {
            Route::Direct => (None, target),
            Route::Egress(egress) => (Some(egress), target),
            Route::Redirect { to, .. } => (None, to),
        };
        world.upstream(
            id,
            UpstreamCommand::Open(Open {
                ingress,
                protocol,
                client,
                target,
                egress,
            }),
        );
        Ok(id)
    }

    // ---- ICMP --------------------------------------------------------------------------------------------------

    fn handle_icmp(
        &mut self,
        ingress: IngressId,
        view: &PacketView<'_>,
        message: &IcmpView<'_>,
        world: &mut dyn World,
    ) -> Judgement {
        match message.message {
            IcmpMessage::EchoRequest(echo) => self.handle_echo(ingress, view, echo, world),
            IcmpMessage::Error {
                error: IcmpError::PacketTooBig { mtu },
                quoted: Some(quoted),
            } => {
                // The quoted packet is one of ours, from the target to the client.
                let flow = quoted
                    .ports
                    .filter(|_| quoted.protocol == 6)
                    .and_then(|(source, destination)| {
                        let target = SocketAddr::new(quoted.source, source);
                        let client = SocketAddr::new(quoted.destination, destination);
                        self.flows.find(&FlowKey::Tcp {
                            ingress,
                            client,
                            target,
                        })
                    });
                let Some(id) = flow else {
                    return self.drop_packet(DropReason::IcmpType, None, None, world);
                };
                if let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) {
                    flow.handle_path_mtu(mtu);
                }
                Judgement {
                    dropped: None,
                    rule: None,
                    flow: Some(id),
                }
            }
            IcmpMessage::Error { .. } | IcmpMessage::EchoReply(_) | IcmpMessage::Other { .. } => {
                self.drop_packet(DropReason::IcmpType, None, None, world)
            }
        }
    }

    fn handle_echo(
        &mut self,
        ingress: IngressId,
        view: &PacketView<'_>,
        echo: Echo<'_>,
        world: &mut dyn World,
    ) -> Judgement {
        let client = SocketAddr::new(view.source(), echo.identifier);
        let target = SocketAddr::new(view.destination(), 0);
        let decision = self.policy.decide(ingress, Protocol::Icmp, client, target);
        let (route, _) = match self.route(decision, ingress, target, view, Unreachable::Prohibited, world) {
            Ok(route) => route,
            Err(judgement) => return judgement,
        };
        let key = FlowKey::Icmp {
            ingress,
            client: client.ip(),
            identifier: echo.identifier,
            target: target.ip(),
            route,
        };
        let id = match self.find_session(
            key,
            (ingress, Protocol::Icmp, client, target),
            route,
            decision,
            world,
        ) {
            Ok(id) => id,
            Err(judgement) => return judgement,
        };
        if let Some(Flow::Session(session)) = self.flows.get_mut(id) {
            session.on_sent(target, echo.payload.len(), &self.config, self.now);
        }
        let hop_limit = view.hop_limit() - 1;
        world.upstream(
            id,
            UpstreamCommand::Echo {
                sequence: echo.sequence,
                payload: echo.payload,
                hop_limit,
            },
        );
        Judgement {
            dropped: None,
            rule: Some(decision.rule),
            flow: Some(id),
        }
    }

    // ---- upstream ----------------------------------------------------------------------------------------------

    fn handle_upstream(&mut self, id: FlowId, event: UpstreamEvent<'_>, world: &mut dyn World) {
        match self.flows.get_mut(id) {
            Some(Flow::Tcp(_)) => self.handle_tcp_upstream(id, event, world),
            Some(Flow::Session(_)) => self.handle_session_upstream(id, event, world),
            None => {}
        }
    }

    fn handle_tcp_upstream(&mut self, id: FlowId, event: UpstreamEvent<'_>, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        let is_connecting = flow.is_connecting();
        match event {
            UpstreamEvent::Connected if is_connecting => {
                let mut cx = Context {
                    now: self.now,
                    config: &self.config,
                    hasher: &self.hasher,
                    arena: &mut self.arena,
                    scratch: &mut self.scratch,
                    world,
                };
                if flow.handle_connected(id, self.tcp_flows, &mut cx) {
                    flow.half_open = false;
                    self.half_open -= 1;
                    mark_dirty(&mut self.dirty, id, flow);
                } else {
                    flow.refusal().send(flow.ingress, Some(id), world);
                    self.end(id, CloseReason::BufferLimit, world);
                }
            }
            UpstreamEvent::Failed(error) if is_connecting => self.refuse_tcp(id, error, world),
            UpstreamEvent::Reset if is_connecting => self.refuse_tcp(id, UpstreamError::Refused, world),
            UpstreamEvent::Reset | UpstreamEvent::Failed(_) => {
                flow.forget_upstream();
                self.abort_tcp(id, false, world);
                self.end(id, CloseReason::UpstreamReset, world);
            }
            UpstreamEvent::ReadClosed => {
                flow.handle_read_closed(self.now);
                mark_dirty(&mut self.dirty, id, flow);
            }
            UpstreamEvent::Connected
            | UpstreamEvent::Datagram { .. }
            | UpstreamEvent::EchoReply { .. }
            | UpstreamEvent::Error { .. } => {}
        }
    }

    /// Tells the client what became of its SYN, in the way the target or a router would have.
    fn refuse_tcp(&mut self, id: FlowId, error: UpstreamError, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        flow.forget_upstream();
        match error {
            UpstreamError::Refused | UpstreamError::Egress | UpstreamError::Exhausted => {
                flow.refusal().send(flow.ingress, Some(id), world);
            }
            UpstreamError::Unreachable(unreachable) => {
                let error = IcmpError::Unreachable(unreachable);
                let router = match flow.client {
                    SocketAddr::V4(_) => self.config.router_v4.into(),
                    SocketAddr::V6(_) => self.config.router_v6.into(),
                };
                let (ingress, client) = (flow.ingress, flow.client.ip());
                let syn = flow.syn_packet();
                if let Ok(message) = Datagram::icmp_error(router, client, error, syn.bytes()) {
                    message.send(
                        world,
                        self.config.mtu,
                        ingress,
                        Some(id),
                        &mut self.identification,
                    );
                }
            }
            // Silence is what the client would have met.
            UpstreamError::TimedOut => {}
        }
        self.end(id, CloseReason::ConnectFailed(error), world);
    }

    fn handle_session_upstream(&mut self, id: FlowId, event: UpstreamEvent<'_>, world: &mut dyn World) {
        match event {
            UpstreamEvent::Datagram {
                source,
                payload,
                segment_size,
            } => {
                self.deliver_datagram(id, source, payload, segment_size, world);
            }
            UpstreamEvent::EchoReply { sequence, payload } => self.deliver_echo(id, sequence, payload, world),
            UpstreamEvent::Error {
                target,
                reporter,
                error,
            } => {
                self.deliver_error(id, target, reporter, error, world);
            }
            UpstreamEvent::Failed(error) => {
                if let Some(Flow::Session(session)) = self.flows.get_mut(id) {
                    let target = session.target;
                    let unreachable = IcmpError::Unreachable(match error {
                        UpstreamError::Unreachable(unreachable) => unreachable,
                        UpstreamError::Refused => Unreachable::Port,
                        UpstreamError::TimedOut | UpstreamError::Egress | UpstreamError::Exhausted => {
                            Unreachable::Host
                        }
                    });
                    self.deliver_error(id, target, None, unreachable, world);
                    self.end(id, CloseReason::ConnectFailed(error), world);
                }
            }
            UpstreamEvent::Connected | UpstreamEvent::ReadClosed | UpstreamEvent::Reset => {}
        }
    }

    /// Sends a datagram from outside to the session's client, if lists and filter let it in.
    fn deliver_datagram(
        &mut self,
        id: FlowId,
        source: SocketAddr,
        payload: &[u8],
        segment_size: Option<NonZeroU16>,
        world: &mut dyn World,
    ) {
        let Some(Flow::Session(session)) = self.flows.get_mut(id) else {
            return;
        };
        if session.protocol != Protocol::Udp {
            return;
        }
        let (ingress, client) = (session.ingress, session.client);
        let admitted = session.admit(source, &self.config);
        let answer = match (admitted, &mut session.questions) {
            (Ok(server), Some(questions)) if server.port() == dns::PORT => {
                questions.on_answer(server, payload)
            }
            _ => None,
        };
        let built = admitted.and_then(|seen| {
            if let Some((reason, rule)) = self.judge(source.ip(), client.ip(), Some(17), Some(client.port()))
            {
                self.drop_packet(reason, Some(rule), Some(id), world);
                return Ok(None);
            }
            Datagram::udp(seen, client, payload, segment_size).map(Some)
        });
        match built {
            Ok(Some(datagram)) => {
                // Before the client gets it: what it does next may come in by another shard.
                if let Some(answer) = answer {
                    let learned = answer.for_client(ingress, self.config.client_of(client.ip()));
                    self.names.learn(self.now, &learned);
                    world.learned(&learned);
                }
                datagram.send(
                    world,
                    self.config.mtu,
                    ingress,
                    Some(id),
                    &mut self.identification,
                );
                self.note_delivery(id, payload.len());
            }
            Ok(None) => {}
            Err(reason) => {
                self.drop_packet(reason, None, Some(id), world);
            }
        }
    }

    fn deliver_echo(&mut self, id: FlowId, sequence: u16, payload: &[u8], world: &mut dyn World) {
        let Some(Flow::Session(session)) = self.flows.get_mut(id) else {
            return;
        };
        if session.protocol != Protocol::Icmp {
            return;
        }
        let (ingress, client, target) = (session.ingress, session.client, session.target);
        if let Some((reason, rule)) = self.judge(target.ip(), client.ip(), Some(1), None) {
            self.drop_packet(reason, Some(rule), Some(id), world);
            return;
        }
        let echo = Echo {
            identifier: client.port(),
            sequence,
            payload,
        };
        match Datagram::echo_reply(target.ip(), client.ip(), echo) {
            Ok(reply) => {
                reply.send(
                    world,
                    self.config.mtu,
                    ingress,
                    Some(id),
                    &mut self.identification,
                );
                self.note_delivery(id, payload.len());
            }
            Err(reason) => {
                self.drop_packet(reason, None, Some(id), world);
            }
        }
    }

    fn note_delivery(&mut self, id: FlowId, len: usize) {
        if let Some(Flow::Session(session)) = self.flows.get_mut(id) {
            session.on_received(len, self.now);
        }
        self.sessions.touch(&mut self.flows, id);
    }

    fn deliver_error(
        &mut self,
        id: FlowId,
        target: SocketAddr,
        reporter: Option<IpAddr>,
        error: IcmpError,
        world: &mut dyn World,
    ) {
        let Some(Flow::Session(session)) = self.flows.get_mut(id) else {
            return;
        };
        let target = match session.route {
            Route::Redirect { target, .. } => target,
            Route::Direct | Route::Egress(_) => target,
        };
        let reporter = reporter.unwrap_or(target.ip());
        let report = ErrorReport {
            session,
            target,
            reporter,
            error,
        };
        report.send(id, self.config.mtu, &mut self.identification, world);
    }

    // ---- turns and ends ----------------------------------------------------------------------------------------

    fn expire(&mut self, world: &mut dyn World) {
        while let Some((at, id)) = self.timers.pop(self.now) {
            match self.flows.get_mut(id) {
                Some(Flow::Tcp(flow)) => {
                    let is_current = Timers::is_current(&mut flow.queued, at);
                    if is_current {
                        flow.due = true;
                        mark_dirty(&mut self.dirty, id, flow);
                    }
                }
                Some(Flow::Session(session)) => {
                    let is_current = Timers::is_current(&mut session.queued, at);
                    let expires = session.expires();
                    if expires <= self.now {
                        self.end(id, CloseReason::IdleTimeout, world);
                    } else if is_current {
                        self.timers
                            .schedule(&mut session.queued, id, expires, WakeReason::Session);
                    }
                }
                None => {}
            }
        }
        while self.reassembler.expire(self.now) {
            self.drop_packet(DropReason::FragmentTimeout, None, None, world);
        }
        if self.policy_due.is_some_and(|due| due <= self.now) {
            self.review(world);
        }
    }

    fn next_deadline(&self) -> Option<Deadline> {
        let reassembly = self.reassembler.next_deadline().map(|at| Deadline {
            at,
            reason: WakeReason::Reassembly,
        });
        let policy = self.policy_due.map(|at| Deadline {
            at,
            reason: WakeReason::Policy,
        });
        [self.timers.next(), reassembly, policy]
            .into_iter()
            .flatten()
            .min_by_key(|deadline| deadline.at)
    }

    fn give_turn(&mut self, id: FlowId, world: &mut dyn World) -> Room {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return Room::Some;
        };
        flow.dirty = false;
        let mut cx = Context {
            now: self.now,
            config: &self.config,
            hasher: &self.hasher,
            arena: &mut self.arena,
            scratch: &mut self.scratch,
            world,
        };
        match flow.take_turn(id, &mut cx) {
            // One of its limits was passed while it waited for the device.
            Turn::Rest(until) if until <= self.now => {
                flow.due = true;
                mark_dirty(&mut self.dirty, id, flow);
            }
            Turn::Rest(until) => self.timers.schedule(&mut flow.queued, id, until, WakeReason::Tcp),
            Turn::More => mark_dirty(&mut self.dirty, id, flow),
            Turn::Blocked => {
                flow.dirty = true;
                return Room::None;
            }
            Turn::Lingering(until) => {
                self.timers.schedule(&mut flow.queued, id, until, WakeReason::Tcp);
                self.account_end(id, CloseReason::Finished, world);
                let lingering = self.flows.len() - self.sessions.len() - self.tcp_flows;
                if lingering > self.config.limits.flows as usize {
                    self.flows.remove(id);
                }
            }
            Turn::Forgotten => {
                self.flows.remove(id);
            }
            Turn::Ended(reason) => self.end(id, reason, world),
        }
        Room::Some
    }

    /// Sends a TCP flow's client what its window takes and an RST, or nothing if `silent`. For other flows, nothing.
    fn abort_tcp(&mut self, id: FlowId, silent: bool, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        if flow.is_connecting() && !silent {
            flow.refusal().send(flow.ingress, Some(id), world);
        }
        let mut cx = Context {
            now: self.now,
            config: &self.config,
            hasher: &self.hasher,
            arena: &mut self.arena,
            scratch: &mut self.scratch,
            world,
        };
        flow.abort(silent, &mut cx);
    }

    /// Ends a flow: tells the upstream, accounts for it, and lets go of it.
    fn end(&mut self, id: FlowId, reason: CloseReason, world: &mut dyn World) {
        match self.flows.get_mut(id) {
            Some(Flow::Tcp(flow)) => {
                if !flow.is_time_wait() {
                    flow.abort_upstream(id, world);
                    self.account_end(id, reason, world);
                }
                if let Some(Flow::Tcp(flow)) = self.flows.remove(id) {
                    flow.release(&mut self.arena);
                }
            }
            Some(Flow::Session(session)) => {
                let (to_upstream, to_client) = (session.to_upstream, session.to_client);
                world.upstream(id, UpstreamCommand::Close);
                self.counters.on_close(reason);
                world.event(&Event::Closed {
                    flow: id,
                    reason,
                    to_upstream,
                    to_client,
                });
                self.sessions.remove(&mut self.flows, id);
                self.flows.remove(id);
            }
            None => {}
        }
    }

    /// Notes the end of a TCP flow, which may linger in TIME-WAIT.
    fn account_end(&mut self, id: FlowId, reason: CloseReason, world: &mut dyn World) {
        let Some(Flow::Tcp(flow)) = self.flows.get_mut(id) else {
            return;
        };
        if flow.half_open {
            self.half_open -= 1;
        }
        self.tcp_flows -= 1;
        self.clients.subtract(flow.ingress, flow.client.ip());
        self.counters.on_close(reason);
        let (to_upstream, to_client) = flow.delivered();
        world.event(&Event::Closed {
            flow: id,
            reason,
            to_upstream,
            to_client,
        });
    }
}

/// Whether the device takes more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    Some,
    None,
}

fn mark_dirty(dirty: &mut VecDeque<FlowId>, id: FlowId, flow: &mut TcpFlow) {
    if !flow.dirty {
        flow.dirty = true;
        dirty.push_back(id);
    }
}
