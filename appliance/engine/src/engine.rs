//! The engine: one way in, one ordered way out. It dispatches; the modules decide.

mod bypass;
mod sessions;
mod tcp;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand_chacha::ChaCha12Rng;
use rand_core::{Rng, SeedableRng};

use crate::addr::{FlowId, IngressId, Protocol};
use crate::config::Config;
use crate::counters::Counters;
use crate::dns::{self, Learned, Names};
use crate::event::{CloseReason, DropReason, Event, NameSource};
use crate::flow::{ClientCounts, Flow, FlowTable, KeyHasher};
use crate::io::{
    ChecksumState, Input, Judgement, PacketIn, Progress, Stage, UpstreamCommand, UpstreamEvent, World,
};
use crate::packet::{PacketView, Transport};
use crate::policy::{Action, ListAction, ListSide, Policy, RuleRef};
use crate::reassembly::{Reassembler, Reassembly};
use crate::session::Recency;
use crate::shard;
use crate::tcp::TcpFlow;
use crate::tcp::arena::Arena;
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
    /// They, and some that connect no longer, in the order in which they began.
    connecting: VecDeque<FlowId>,
    /// TCP flows that are more than a memory.
    tcp_flows: usize,
    sessions: Recency,
    arena: Arena,
    timers: Timers,
    /// Flows that may have something to send or to tell, in the order in which they got it.
    dirty: VecDeque<FlowId>,
    /// Flows whose acknowledgments wait, all equally long, and some whose have left. Timers of theirs would be started and
    /// stopped for each request.
    owing: VecDeque<(Timestamp, FlowId)>,
    reassembler: Reassembler,
    /// Counts up through the identification fields of datagrams for clients.
    identification: u32,
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
            owing: VecDeque::new(),
            reassembler: Reassembler::new(
                config.limits.reassembly_bytes as usize,
                config.timeouts.reassembly,
            ),
            identification: rng.next_u32(),
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
            Input::Packet(packet) => return Some(self.handle_packet(&packet, world)),
            Input::Upstream(flow, event) => self.handle_upstream(flow, event, world),
            Input::Bypass(news) => self.handle_bypass_news(&news, world),
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

    #[inline] // of its two callers one has every packet
    fn handle_packet(&mut self, packet: &PacketIn<'_>, world: &mut dyn World) -> Judgement {
        // Views are used where they were made: a processor cannot load in one piece what it has just stored in several,
        // and waits for each move of one.
        let parsed = PacketView::parse(packet.bytes);
        let view = match &parsed {
            Ok(view) => view,
            Err(reason) => return self.drop_packet(*reason, None, None, world),
        };
        // Lists come before everything else, and a drop by list touches no state but counters: the pre-filter, which
        // keeps such packets from getting here, must make no difference.
        if !self.policy.lists().is_empty()
            && let Some((reason, rule)) =
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
            return self.handle_fragment(view, *packet, world);
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
            Transport::Udp(datagram) => self.handle_datagram(*packet, view, datagram, world),
            Transport::Icmp(message) => self.handle_icmp(*packet, view, message, world),
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
        let found = self
            .policy
            .lists()
            .judge(source, destination, protocol, port, self.unix_time())?;
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
                    reassembled: true,
                    ..packet
                };
                let owner = PacketView::parse(&whole).map(|view| shard::owner(&view, self.config.shards));
                match owner {
                    Ok(owner) if self.config.shards > 1 => {
                        world.forward(owner, packet);
                        held
                    }
                    Ok(_) | Err(_) => self.handle_packet(&packet, world),
                }
            }
        };
        self.whole = whole;
        judgement
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

    /// The name that a client knows `target` by, if it has asked for it by DNS.
    pub fn name_of(&self, ingress: IngressId, client: IpAddr, target: IpAddr) -> Option<&str> {
        self.names
            .find(self.now, ingress, self.config.client_of(client), target)
    }

    /// Tells the name that a new flow's client knows its target by, if it has learned one.
    fn tell_name(
        &self,
        flow: FlowId,
        (ingress, client, target): (IngressId, SocketAddr, SocketAddr),
        world: &mut dyn World,
    ) {
        if let Some(name) = self.name_of(ingress, client.ip(), target.ip()) {
            world.event(&Event::Named {
                flow,
                name: name.to_owned(),
                source: NameSource::Dns,
            });
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
        while let Some(due) = self.ack_due()
            && due <= self.now
        {
            if let Some((_, id)) = self.owing.pop_front()
                && let Some(Flow::Tcp(flow)) = self.flows.get_mut(id)
            {
                mark_dirty(&mut self.dirty, id, flow);
            }
        }
        while self.reassembler.expire(self.now) {
            self.drop_packet(DropReason::FragmentTimeout, None, None, world);
        }
        if self.policy_due.is_some_and(|due| due <= self.now) {
            self.review(world);
        }
    }

    /// When the first acknowledgment is due that waits.
    fn ack_due(&mut self) -> Option<Timestamp> {
        loop {
            let &(at, id) = self.owing.front()?;
            if let Some(Flow::Tcp(flow)) = self.flows.get_mut(id)
                && flow.ack_due() == Some(at)
            {
                return Some(at);
            }
            self.owing.pop_front();
        }
    }

    fn next_deadline(&mut self) -> Option<Deadline> {
        let mut next = self.timers.next();
        let others = [
            (self.ack_due(), WakeReason::Tcp),
            (self.reassembler.next_deadline(), WakeReason::Reassembly),
            (self.policy_due, WakeReason::Policy),
        ];
        for (at, reason) in others {
            if let Some(at) = at
                && next.is_none_or(|next| at < next.at)
            {
                next = Some(Deadline { at, reason });
            }
        }
        next
    }

    /// Ends a flow: tells the upstream, accounts for it, and lets go of it.
    fn end(&mut self, id: FlowId, reason: CloseReason, world: &mut dyn World) {
        match self.flows.get_mut(id) {
            Some(Flow::Tcp(flow)) => {
                if flow.is_bypassed() {
                    if !flow.is_time_wait() {
                        self.release(id, Some(reason), world);
                    }
                    return;
                }
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
