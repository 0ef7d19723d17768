//! The stage of one shard: the modelled peers, and what they see of the engine.
//!
//! It is the engine's [`World`]: packets go to the modelled clients and commands to the modelled upstreams, at once but
//! without an answer. Who has something to do is put on a list; the shard works it off after the call
//! ([`Shard::settle`](super::shard::Shard)).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use tungate_engine::dns::Learned;
use tungate_engine::io::{PacketOut, UpstreamCommand};
use tungate_engine::packet::segments;
use tungate_engine::policy::Action;
use tungate_engine::{CloseReason, Event, FlowId, PacketIn, Policy, Protocol, ShardId, Timestamp, World};

use super::card::{Card, Decided};
use super::datagram::DatagramFlow;
use super::digest::Digest;
use super::item::{Cause, Moment, Output, Shown, ShownKind};
use super::shard::Setup;
use super::tcp::TcpFlow;
use super::transcript::Line;

/// One conversation's play.
pub(super) enum Flow {
    Tcp(Box<TcpFlow>),
    /// UDP and ICMP echo.
    Datagram(Box<DatagramFlow>),
    /// No flow, but packets that have something in common.
    Other(Box<Card>),
}

/// What is known of one of the engine's flows.
#[derive(Debug, Clone, Copy)]
pub(super) struct EngineFlow {
    generation: u32,
    /// Where it is played. A UDP mapping is played in many places: where it was opened.
    slot: u32,
    client: SocketAddr,
    pub(super) decided: Decided,
    pub(super) closed: Option<CloseReason>,
}

/// What the sink wants shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) packets: bool,
    pub(super) emitted: bool,
    pub(super) lines: bool,
}

pub(super) struct Stage {
    pub(super) shard: ShardId,
    pub(super) flows: Vec<Option<Flow>>,
    engine_flows: Vec<Option<EngineFlow>>,
    /// The mappings of UDP clients that serve any target.
    pub(super) mappings: BTreeMap<SocketAddr, FlowId>,
    pub(super) digest: Digest,
    pub(super) now: Timestamp,
    pub(super) cause: Cause,
    sequence: u32,
    /// The flow whose packet or timer is being handled.
    pub(super) current: Option<u32>,
    /// Flows that have something to do.
    pub(super) waiting: VecDeque<u32>,
    timers: BinaryHeap<Reverse<(Timestamp, u32)>>,
    /// The packet that the engine has put together from fragments.
    pub(super) whole: Option<Vec<u8>>,
    /// What clients have learned, and other shards do not know yet.
    pub(super) learned: Vec<Learned>,
    pub(super) policies: Arc<[Arc<Policy>]>,
    pub(super) policy: u16,
    pub(super) wanted: Wanted,
    /// Boxed, as it changes hands with every item.
    pub(super) output: Box<Output>,
    buffer: Vec<u8>,
    lent: usize,
    #[cfg(test)]
    tamper: Option<fn(&mut [u8]) -> bool>,
}

impl Stage {
    pub(super) fn new(shard: ShardId, setup: &Setup) -> Self {
        Self {
            shard,
            flows: Vec::new(),
            engine_flows: Vec::new(),
            mappings: BTreeMap::new(),
            digest: Digest::new(),
            now: Timestamp::ZERO,
            cause: Cause::Deadline(shard),
            sequence: 0,
            current: None,
            waiting: VecDeque::new(),
            timers: BinaryHeap::new(),
            whole: None,
            learned: Vec::new(),
            policies: Arc::clone(&setup.policies),
            policy: 0,
            wanted: setup.wanted,
            output: Box::default(),
            buffer: vec![0; 1 << 16],
            lent: 0,
            #[cfg(test)]
            tamper: setup.tamper,
        }
    }

    /// What happens from now on has this cause.
    pub(super) fn begin(&mut self, now: Timestamp, cause: Cause, current: Option<u32>) {
        if (now, cause) != (self.now, self.cause) {
            self.sequence = 0;
        }
        self.now = now;
        self.cause = cause;
        self.current = current;
    }

    pub(super) fn tcp(&mut self, slot: u32) -> Option<&mut TcpFlow> {
        match self.flows.get_mut(slot as usize)? {
            Some(Flow::Tcp(flow)) => Some(flow),
            Some(Flow::Datagram(_) | Flow::Other(_)) | None => None,
        }
    }

    pub(super) fn card(&mut self, slot: u32) -> Option<&mut Card> {
        match self.flows.get_mut(slot as usize)? {
            Some(Flow::Tcp(flow)) => Some(&mut flow.card),
            Some(Flow::Datagram(flow)) => Some(&mut flow.card),
            Some(Flow::Other(card)) => Some(card),
            None => None,
        }
    }

    /// What is known of an engine's flow, unless its place has been used again.
    pub(super) fn engine_flow(&self, id: FlowId) -> Option<&EngineFlow> {
        let flow = self.engine_flows.get(id.slot() as usize)?.as_ref()?;
        (flow.generation == id.generation()).then_some(flow)
    }

    /// Puts a TCP flow on the list of those that have something to do.
    pub(super) fn call(&mut self, slot: u32) {
        if let Some(flow) = self.tcp(slot)
            && !flow.waits
        {
            flow.waits = true;
            self.waiting.push_back(slot);
        }
    }

    /// Puts a TCP flow on the list if it has something to do, and sees to its timers.
    pub(super) fn attend(&mut self, slot: u32) {
        let Some(flow) = self.tcp(slot) else { return };
        let due = flow.due();
        let is_earlier = due < flow.queued;
        if is_earlier {
            flow.queued = due;
        }
        let calls = !flow.waits && flow.has_work();
        flow.waits |= calls;
        if is_earlier {
            self.timers.push(Reverse((due, slot)));
        }
        if calls {
            self.waiting.push_back(slot);
        }
    }

    /// When the models' earliest timer may be due.
    pub(super) fn next_timer(&self) -> Option<Timestamp> {
        self.timers.peek().map(|Reverse((at, _))| *at)
    }

    /// When the models' earliest timer is due that has not been stopped.
    pub(super) fn next_live_timer(&mut self) -> Option<Timestamp> {
        loop {
            let Reverse((at, slot)) = *self.timers.peek()?;
            let due = match self.tcp(slot) {
                Some(flow) if flow.queued == at => flow.due(),
                Some(_) | None => {
                    self.timers.pop();
                    continue;
                }
            };
            if due <= at {
                return Some(at);
            }
            self.timers.pop();
            if let Some(flow) = self.tcp(slot) {
                flow.queued = Timestamp::MAX;
            }
            self.attend(slot);
        }
    }

    /// Takes the next flow whose timers may be due at `now`.
    pub(super) fn pop_timer(&mut self, now: Timestamp) -> Option<u32> {
        loop {
            let Reverse((at, slot)) = *self.timers.peek()?;
            if at > now {
                return None;
            }
            self.timers.pop();
            if let Some(flow) = self.tcp(slot)
                && flow.queued == at
            {
                flow.queued = Timestamp::MAX;
                return Some(slot);
            }
        }
    }

    /// Adds a line to the transcript, if it is wanted.
    #[inline]
    pub(super) fn line(&mut self, line: Line<'_>) {
        if self.wanted.lines {
            self.add_line(&line);
        }
    }

    #[cold]
    fn add_line(&mut self, line: &Line<'_>) {
        use std::fmt::Write;
        let mut text = String::new();
        write!(text, "{line}").expect("a string takes any text");
        self.show(ShownKind::Line, text.as_bytes(), None);
    }

    fn show(&mut self, kind: ShownKind, bytes: &[u8], slot: Option<u32>) {
        let flow = slot
            .and_then(|slot| self.card(slot))
            .map_or(0, |card| card.number);
        let output = &mut self.output;
        let start = output.bytes.len() as u32;
        output.bytes.extend_from_slice(bytes);
        output.shown.push(Shown {
            moment: Moment {
                time: self.now,
                cause: self.cause,
                sequence: self.sequence,
            },
            kind,
            start,
            len: bytes.len() as u32,
            flow,
        });
        self.sequence += 1;
    }

    /// Where the packets and commands of an engine's flow go: where it is played, or for want of that to the current.
    fn slot_of(&self, id: Option<FlowId>) -> Option<u32> {
        match id {
            Some(id) => match self.engine_flow(id) {
                Some(flow) if self.is_tcp(flow.slot) => Some(flow.slot),
                Some(_) | None => self.current,
            },
            None => self.current,
        }
    }

    fn is_tcp(&self, slot: u32) -> bool {
        matches!(self.flows.get(slot as usize), Some(Some(Flow::Tcp(_))))
    }

    fn on_packet(&mut self, out: &PacketOut) {
        let bytes = &self.buffer[..self.lent];
        self.digest.packet(self.now, out, bytes);
        let Some(slot) = self.slot_of(out.flow) else {
            return;
        };
        let now = self.now;
        let Some(Some(flow)) = self.flows.get_mut(slot as usize) else {
            return;
        };
        match flow {
            Flow::Tcp(flow) => match flow.successor() {
                Some(successor) => self.on_stray(slot, successor),
                None => {
                    flow.on_packet(now, bytes, usize::from(out.header_len));
                    self.attend(slot);
                }
            },
            Flow::Datagram(flow) => flow.on_packet(now, bytes),
            Flow::Other(_) => {}
        }
    }

    /// A flow whose client has begun another connection on the same 4-tuple sends something.
    fn on_stray(&mut self, slot: u32, successor: u32) {
        let transport = usize::from(self.buffer[0] & 0xf) * 4;
        let transport = if self.buffer[0] >> 4 == 4 { transport } else { 40 };
        let Some(acknowledgment) = super::tcp::stray_acknowledgment(&self.buffer[transport..self.lent])
        else {
            return;
        };
        let waits = self.tcp(successor).is_some_and(|flow| flow.card.engine.is_none());
        if waits && let Some(flow) = self.tcp(slot) {
            flow.refuse_stray(acknowledgment);
            self.call(slot);
            if let Some(flow) = self.tcp(successor) {
                flow.repeat_syn();
            }
            self.call(successor);
        }
    }
}

impl World for Stage {
    fn has_room(&self) -> bool {
        true
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.lent = len;
        &mut self.buffer[..len]
    }

    fn send_packet(&mut self, packet: PacketOut) {
        #[cfg(test)]
        if self
            .tamper
            .is_some_and(|tamper| tamper(&mut self.buffer[..self.lent]))
        {
            return;
        }
        if self.wanted.lines {
            let bytes = self.buffer[..self.lent].to_vec();
            self.line(Line::PacketOut(&bytes));
        }
        self.on_packet(&packet);
        if self.wanted.emitted {
            let slot = self.slot_of(packet.flow);
            let mut buffer = std::mem::take(&mut self.buffer);
            segments(&mut buffer[..self.lent], &packet, |bytes| {
                self.show(ShownKind::Emitted, bytes, slot);
            });
            self.buffer = buffer;
        }
    }

    fn upstream(&mut self, id: FlowId, command: UpstreamCommand<'_>) {
        self.digest.command(self.now, id, &command);
        self.line(Line::Command(id, &command));
        let Some(slot) = self.slot_of(Some(id)) else {
            return;
        };
        match self.flows.get_mut(slot as usize) {
            Some(Some(Flow::Tcp(flow))) => {
                flow.on_command(&command);
                self.attend(slot);
            }
            Some(Some(Flow::Datagram(flow))) => flow.on_command(&command),
            Some(Some(Flow::Other(_)) | None) | None => {}
        }
    }

    fn event(&mut self, event: &Event) {
        self.digest.event(self.now, event);
        self.line(Line::Event(event));
        match event {
            Event::Dropped { .. } | Event::Established { .. } => {}
            &Event::Opened {
                flow,
                protocol,
                client,
                action,
                rule,
                ..
            } => {
                let Some(slot) = self.current else { return };
                let decided = Decided {
                    action,
                    rule,
                    policy: self.policy,
                };
                let index = flow.slot() as usize;
                if self.engine_flows.len() <= index {
                    self.engine_flows.resize(index + 1, None);
                }
                self.engine_flows[index] = Some(EngineFlow {
                    generation: flow.generation(),
                    slot,
                    client,
                    decided,
                    closed: None,
                });
                match action {
                    Action::Direct | Action::Egress(_) if protocol == Protocol::Udp => {
                        self.mappings.insert(client, flow);
                    }
                    Action::Direct
                    | Action::Egress(_)
                    | Action::Redirect(_)
                    | Action::Reject
                    | Action::Drop => {}
                }
                if let Some(card) = self.card(slot) {
                    card.engine = Some(flow);
                    card.decided = Some(decided);
                    card.refused = None;
                    card.closed = None;
                }
            }
            &Event::Closed { flow, reason, .. } => {
                let now = self.now;
                let Some(known) = self.engine_flows.get_mut(flow.slot() as usize) else {
                    return;
                };
                let Some(known) = known
                    .as_mut()
                    .filter(|known| known.generation == flow.generation())
                else {
                    return;
                };
                known.closed = Some(reason);
                let (slot, client) = (known.slot, known.client);
                if self.mappings.get(&client) == Some(&flow) {
                    self.mappings.remove(&client);
                }
                if let Some(tcp) = self.tcp(slot)
                    && tcp.card.engine == Some(flow)
                {
                    tcp.card.on_event(now);
                    tcp.on_closed(reason);
                }
            }
            Event::Named { flow, name, source } => {
                if let Some(slot) = self.slot_of(Some(*flow))
                    && let Some(card) = self.card(slot)
                {
                    card.name = Some((name.clone(), *source));
                }
            }
        }
    }

    fn forward(&mut self, shard: ShardId, packet: PacketIn<'_>) {
        self.digest.forward(shard, packet.bytes);
        self.whole = Some(packet.bytes.to_vec());
    }

    fn learned(&mut self, learned: &Learned) {
        self.learned.push(learned.clone());
    }
}
