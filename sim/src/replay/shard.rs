//! One shard: an engine, the peers that are modelled for it, and their common virtual time.
//!
//! Items come in file order. Before each one everything happens that is due before its time, deadlines and timers
//! alike, the earliest first; what is due at the very time of a packet happens behind it. After each call of the
//! engine the modelled peers do what they have to do about it, and that again, until nobody has anything to do.

use std::sync::Arc;
use std::time::Duration;

use tungate_engine::io::ChecksumState;
use tungate_engine::packet::{PacketView, Transport};
use tungate_engine::{Config, DropReason, IngressId, Input, Judgement, PacketIn, Policy, ShardId, Timestamp};

use super::ahead::Ahead;
use super::card::{Card, Refused};
use super::datagram::DatagramFlow;
use super::host::Host;
use super::item::{Cause, Counts, Item, Judged, Packet, Record, Reply, Verdict, What};
use super::prefilter::Seen;
use super::repair::{self, Checksums, Soundness};
use super::roles::{Begins, Place};
use super::stage::{Flow, Stage, Wanted};
use super::tcp::TcpFlow;
use super::transcript::Line;
use super::{Midstream, SHARDS};
use crate::outcome::{Path, Side};

/// Longest that time runs on behind a capture's end.
pub(super) const SETTLE_MAX: Duration = Duration::from_secs(300);

/// How often peers may answer each other at one instant before they have to wait for the next.
const ROUNDS_MAX: u32 = 1 << 20;

/// What a shard is made of.
#[derive(Clone)]
pub(super) struct Setup {
    pub(super) config: Config,
    pub(super) seed: [u8; 32],
    /// The policy at the start, then the changes.
    pub(super) policies: Arc<[Arc<Policy>]>,
    pub(super) checksums: Checksums,
    pub(super) midstream: Midstream,
    pub(super) wanted: Wanted,
    pub(super) journal: bool,
    /// When the first packet was captured, in nanoseconds since the Unix epoch.
    pub(super) started: u64,
    /// Changes a packet that the engine sends; `true` loses it.
    #[cfg(test)]
    pub(super) tamper: Option<fn(&mut [u8]) -> bool>,
}

/// One engine with its modelled peers.
pub(super) struct Shard {
    pub(super) host: Host,
    pub(super) stage: Stage,
    pub(super) now: Timestamp,
    deadline: Option<Timestamp>,
    /// The engine has been flushed since it was called last.
    pub(super) is_flushed: bool,
    pub(super) checksums: Checksums,
    pub(super) midstream: Midstream,
    pub(super) counts: Counts,
    pub(super) scratch: Vec<u8>,
}

/// What a packet's checksums are worth to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Assessed(Soundness);

impl Assessed {
    /// Of a packet that is too damaged to have checksums.
    pub(super) const UNREAD: Self = Self(Soundness::Wrong);

    /// What to tell the engine. What was found right need not be summed up again.
    pub(super) fn state(self) -> ChecksumState {
        match self.0 {
            Soundness::Sound | Soundness::Repaired => ChecksumState::Trusted,
            Soundness::Wrong => ChecksumState::Unverified,
        }
    }

    /// Whether the packet would have arrived.
    pub(super) fn is_sound(self) -> bool {
        self.0 != Soundness::Wrong
    }
}

impl Shard {
    pub(super) fn new(shard: ShardId, setup: &Setup) -> Self {
        let config = Config {
            shard,
            shards: SHARDS,
            ..setup.config.clone()
        };
        let stage = Stage::new(shard, setup);
        let mut shard = Self {
            host: Host::new(config, setup),
            stage,
            now: Timestamp::ZERO,
            deadline: None,
            is_flushed: false,
            checksums: setup.checksums,
            midstream: setup.midstream,
            counts: Counts::default(),
            scratch: Vec::new(),
        };
        let offset = i64::try_from(setup.started).unwrap_or(i64::MAX);
        shard.call(Input::WallClock(offset));
        shard.settle();
        shard
    }

    /// Does what `item` says, behind everything that is due before it. `ahead` is what was found out about it.
    pub(super) fn play(&mut self, item: &Item, bytes: &mut [u8], ahead: &Ahead) -> Option<Reply> {
        self.advance(item.time);
        self.now = item.time;
        match &item.what {
            What::Begin(place, number, begins) => {
                self.begin_flow(place, *number, begins);
                None
            }
            What::Packet(side, place, packet) => {
                self.play_packet(*side, place, packet, &mut bytes[packet.ip()], ahead);
                None
            }
            What::Answer(place, packet) => {
                self.play_packet(Side::Target, place, packet, &mut bytes[packet.ip()], ahead);
                Some(Reply::Learned(std::mem::take(&mut self.stage.learned)))
            }
            What::Learned(learned) => {
                // Nothing follows from it yet.
                self.host
                    .handle(self.now, Input::Learned(learned), &mut self.stage);
                None
            }
            What::ClientFragment(packet) => {
                let ip = &bytes[packet.ip()];
                Some(Reply::Fragment(self.fragment_from_client(packet, ip, ahead.seen)))
            }
            What::TargetFragment(place, packet) => {
                if let Some(card) = self.stage.card(place.slot) {
                    card.on_packet(self.now);
                }
                self.record_target(place, packet);
                None
            }
            What::Forget(slot) => {
                self.close(*slot, true);
                None
            }
            &What::Policy(index) => {
                self.stage.begin(self.now, Cause::Policy(self.stage.shard), None);
                self.stage.policy = index;
                let policy = Arc::clone(&self.stage.policies[usize::from(index)]);
                self.stage.line(Line::Policy(index));
                self.call(Input::Policy(policy));
                self.settle();
                None
            }
        }
    }

    fn play_packet(&mut self, side: Side, place: &Place, packet: &Packet, ip: &mut [u8], ahead: &Ahead) {
        self.stage
            .begin(self.now, Cause::Packet(packet.number), Some(place.slot));
        if let Some(card) = self.stage.card(place.slot) {
            card.on_packet(self.now);
        }
        match side {
            Side::Client => self.play_client(place, packet, ip, ahead),
            Side::Target => self.play_target(place, packet, ip, ahead),
            Side::None => unreachable!("only what somebody sent belongs to a conversation"),
        }
        self.stage.attend(place.slot);
        self.settle();
    }

    /// Lets everything happen that is due before `until`.
    pub(super) fn advance(&mut self, until: Timestamp) {
        loop {
            let timer = self.stage.next_timer();
            let due = match (timer, self.deadline) {
                (Some(timer), Some(deadline)) => timer.min(deadline),
                (Some(at), None) | (None, Some(at)) => at,
                (None, None) => return,
            };
            if due >= until {
                return;
            }
            self.now = self.now.max(due);
            self.stage
                .begin(self.now, Cause::Deadline(self.stage.shard), None);
            while let Some(slot) = self.stage.pop_timer(due) {
                self.on_tcp_timer(slot);
                self.stage.attend(slot);
            }
            self.settle();
            // An engine that wants to come back at once would keep time from moving.
            let later = self.now + Duration::from_micros(1);
            self.deadline = self.deadline.map(|deadline| deadline.max(later));
            self.is_flushed = false;
        }
    }

    /// Has everybody do what there is to do at this instant.
    pub(super) fn settle(&mut self) {
        for _ in 0..ROUNDS_MAX {
            while let Some(slot) = self.stage.waiting.pop_front() {
                self.stage.current = Some(slot);
                self.react(slot);
            }
            if self.is_flushed && self.deadline.is_none_or(|deadline| deadline > self.now) {
                return; // there is nothing that it could do
            }
            let deadline = self.host.flush(self.now, &mut self.stage);
            self.deadline = deadline.map(|deadline| deadline.at);
            self.is_flushed = true;
            if self.stage.waiting.is_empty() {
                return;
            }
        }
    }

    /// The capture has ended at `end`: nobody waits for what it might still have held. Returns when all has settled.
    pub(super) fn end_capture(&mut self, end: Timestamp) -> Timestamp {
        self.advance(end);
        self.now = end;
        self.stage.begin(end, Cause::Deadline(self.stage.shard), None);
        for slot in 0..self.stage.flows.len() as u32 {
            self.end_tcp_capture(slot);
            self.stage.attend(slot);
            self.settle();
        }
        while let Some(timer) = self.stage.next_live_timer()
            && timer <= end + SETTLE_MAX
        {
            self.advance(timer + Duration::from_nanos(1));
        }
        self.now
    }

    /// Runs on until `until`, and closes the books.
    pub(super) fn close_books(&mut self, until: Timestamp) {
        self.advance(until + Duration::from_nanos(1));
        for slot in 0..self.stage.flows.len() as u32 {
            self.close(slot, false);
        }
    }

    // ---- packets -----------------------------------------------------------------------------------------------

    fn begin_flow(&mut self, place: &Place, number: u64, begins: &Begins) {
        let slot = place.slot as usize;
        if self.stage.flows.len() <= slot {
            self.stage.flows.resize_with(slot + 1, || None);
        }
        let card = |protocol| Card::new(place.flow, begins, protocol, number, self.now);
        self.stage.flows[slot] = Some(match begins {
            Begins {
                protocol: Some(tungate_engine::Protocol::Tcp),
                ..
            } => Flow::Tcp(Box::new(TcpFlow::new(card(tungate_engine::Protocol::Tcp)))),
            Begins {
                protocol: Some(protocol),
                ..
            } => Flow::Datagram(Box::new(DatagramFlow::new(card(*protocol)))),
            Begins { protocol: None, .. } => Flow::Other(Box::new(card(tungate_engine::Protocol::Icmp))),
        });
        if let Some(before) = begins.replaces
            && let Some(flow) = self.stage.tcp(before)
        {
            flow.make_room_for(place.slot);
        }
    }

    fn play_client(&mut self, place: &Place, packet: &Packet, ip: &mut [u8], ahead: &Ahead) {
        let verdict = match &self.stage.flows[place.slot as usize] {
            Some(Flow::Tcp(_)) => self.tcp_from_client(place.slot, packet, ip, ahead.segment.as_ref()),
            Some(Flow::Datagram(_)) => self.datagram_from_client(place.slot, packet, ip),
            Some(Flow::Other(_)) | None => self.other_from_client(place.slot, packet, ip),
        };
        let path = self.counts.compare(ahead.seen, verdict);
        if let Some(card) = self.stage.card(place.slot)
            && card.refused.is_some()
        {
            card.path = path;
        }
        let (verdict, rule) = verdict;
        self.record(Record {
            number: packet.number,
            time: self.now,
            side: Side::Client,
            verdict,
            path,
            rule,
            policy: self.stage.policy,
            flow: place.flow,
        });
    }

    fn other_from_client(&mut self, slot: u32, packet: &Packet, ip: &mut [u8]) -> Judged {
        let assessed = match PacketView::parse(ip) {
            Ok(view) => self.assess(packet, &view, &view.transport()),
            Err(_) => Assessed::UNREAD,
        };
        let judgement = self.judge(ip, assessed.state());
        self.note_judgement(slot, &judgement)
    }

    fn play_target(&mut self, place: &Place, packet: &Packet, ip: &mut [u8], ahead: &Ahead) {
        let is_refused = self.record_target(place, packet);
        if is_refused {
            return;
        }
        match &self.stage.flows[place.slot as usize] {
            Some(Flow::Tcp(_)) => self.tcp_from_target(place.slot, packet, ip, ahead.segment.as_ref()),
            Some(Flow::Datagram(_)) => self.datagram_from_target(place.slot, packet, ip),
            Some(Flow::Other(_)) | None => {}
        }
    }

    /// Records a packet from a target, which has no verdict but its flow's. Returns whether that is refused.
    fn record_target(&mut self, place: &Place, packet: &Packet) -> bool {
        let card = self.stage.card(place.slot);
        let refused = card.as_ref().and_then(|card| card.refused);
        let path = card
            .as_ref()
            .filter(|card| card.refused.is_some())
            .map_or(Path::Engine, |card| card.path);
        let decided = card.and_then(|card| card.decided);
        let (verdict, rule, policy) = match (refused, decided) {
            (Some(refused), _) => (Verdict::Drop(refused.reason), refused.rule, refused.policy),
            (None, Some(decided)) => (Verdict::Pass, Some(decided.rule), decided.policy),
            (None, None) => (Verdict::Pass, None, self.stage.policy),
        };
        self.record(Record {
            number: packet.number,
            time: self.now,
            side: Side::Target,
            verdict,
            path,
            rule,
            policy,
            flow: place.flow,
        });
        refused.is_some()
    }

    /// Has the engine put a client's fragment together with others. Returns the whole packet, whose record is that
    /// of its last fragment, if this was the last one missing.
    fn fragment_from_client(&mut self, packet: &Packet, ip: &[u8], seen: Option<Seen>) -> Option<Vec<u8>> {
        self.stage.begin(self.now, Cause::Packet(packet.number), None);
        let state = match PacketView::parse(ip) {
            Ok(view) => {
                let soundness = repair::ip_header(&view, self.checksums);
                self.count_repair(soundness);
                Assessed(soundness).state()
            }
            Err(_) => ChecksumState::Unverified,
        };
        self.stage.whole = None;
        let judgement = self.judge(ip, state);
        let verdict = judgement.dropped.map_or(Verdict::Pass, Verdict::Drop);
        let path = self.counts.compare(seen, (verdict, judgement.rule));
        self.settle();
        if let Some(whole) = self.stage.whole.take() {
            return Some(whole);
        }
        self.record(Record {
            number: packet.number,
            time: self.now,
            side: Side::Client,
            verdict,
            path,
            rule: judgement.rule,
            policy: self.stage.policy,
            flow: 0,
        });
        None
    }

    /// Gives a packet to the engine.
    pub(super) fn judge(&mut self, ip: &[u8], checksum: ChecksumState) -> Judgement {
        self.judge_whole(ip, checksum, false)
    }

    /// Gives a packet to the engine that may have been put together from fragments.
    pub(super) fn judge_whole(&mut self, ip: &[u8], checksum: ChecksumState, reassembled: bool) -> Judgement {
        let packet = PacketIn {
            ingress: IngressId(0),
            bytes: ip,
            checksum,
            segment_size: None,
            reassembled,
        };
        self.stage.line(Line::PacketIn(ip));
        self.is_flushed = false;
        let judgement = self.host.handle(self.now, Input::Packet(packet), &mut self.stage);
        judgement.expect("every packet is judged")
    }

    /// Gives the engine an input other than a packet.
    pub(super) fn call(&mut self, input: Input<'_>) {
        if let Input::Upstream(flow, event) = &input {
            self.stage.line(Line::Upstream(*flow, event));
        }
        self.is_flushed = false;
        self.host.handle(self.now, input, &mut self.stage);
    }

    /// Notes what became of a client's packet for the packets of its flow that have no verdict of their own.
    pub(super) fn note_judgement(&mut self, slot: u32, judgement: &Judgement) -> Judged {
        let policy = self.stage.policy;
        let Some(reason) = judgement.dropped else {
            return (Verdict::Pass, judgement.rule);
        };
        if let Some(card) = self.stage.card(slot)
            && (card.decided.is_none() || matches!(card.closed, Some(tungate_engine::CloseReason::Denied(_))))
        {
            card.refused.get_or_insert(Refused {
                reason,
                rule: judgement.rule,
                policy,
            });
        }
        (Verdict::Drop(reason), judgement.rule)
    }

    /// Judges a packet's checksums, as far as they are there.
    pub(super) fn assess(
        &mut self,
        packet: &Packet,
        view: &PacketView<'_>,
        transport: &Result<Transport<'_>, DropReason>,
    ) -> Assessed {
        self.note_soundness(repair::soundness(packet, view, transport, self.checksums))
    }

    /// Whether a packet from a target has been lost on the way for its checksum.
    pub(super) fn is_lost(
        &self,
        packet: &Packet,
        view: &PacketView<'_>,
        transport: &Result<Transport<'_>, DropReason>,
    ) -> bool {
        self.checksums == Checksums::Strict
            && repair::soundness(packet, view, transport, self.checksums) == Soundness::Wrong
    }

    /// Counts what a packet's checksums were found to be worth.
    pub(super) fn note_soundness(&mut self, soundness: Soundness) -> Assessed {
        self.count_repair(soundness);
        Assessed(soundness)
    }

    fn count_repair(&mut self, soundness: Soundness) {
        if soundness == Soundness::Repaired {
            self.counts.totals.repaired_checksums += 1;
        }
    }

    fn record(&mut self, record: Record) {
        self.counts.add(&record);
        if self.stage.wanted.packets {
            self.stage.output.records.push(record);
        }
    }

    /// Ends a conversation: `is_over` if it has been silent for long, else the capture is.
    fn close(&mut self, slot: u32, is_over: bool) {
        let Some(flow) = self.stage.flows.get_mut(slot as usize).and_then(Option::take) else {
            return;
        };
        let policies = Arc::clone(&self.stage.policies);
        let record = match flow {
            Flow::Tcp(flow) => flow.record(&policies),
            Flow::Datagram(flow) => {
                let engine = flow.card.engine.and_then(|id| self.stage.engine_flow(id));
                let closed = engine.and_then(|known| known.closed);
                flow.record(closed, is_over, &policies)
            }
            Flow::Other(_) => return,
        };
        let totals = &mut self.counts.totals;
        if let Some(exact) = record.exact {
            totals.fidelity_flows += 1;
            totals.fidelity_exact += u64::from(exact);
        }
        self.stage.output.flows.push(record);
    }
}

impl Counts {
    /// Counts a packet.
    pub(super) fn add(&mut self, record: &Record) {
        let totals = &mut self.totals;
        match record.verdict {
            Verdict::NotIp => {
                totals.not_ip += 1;
                return;
            }
            Verdict::Unreadable => {
                totals.unreadable += 1;
                return;
            }
            Verdict::Pass => totals.pass += 1,
            Verdict::Drop(reason) => {
                totals.drop += 1;
                *self.by_reason.entry(reason).or_default() += 1;
            }
        }
        totals.judged += 1;
        match record.side {
            Side::Client => totals.from_client += 1,
            Side::Target | Side::None => totals.from_target += 1,
        }
        if let Some(rule) = record.rule {
            match &mut self.in_a_row {
                Some((same, count)) if *same == (record.policy, rule) => *count += 1,
                Some(_) | None => {
                    self.end_row();
                    self.in_a_row = Some(((record.policy, rule), 1));
                }
            }
        }
    }

    /// Brings `by_rule` up to date.
    pub(super) fn end_row(&mut self) {
        if let Some((rule, count)) = self.in_a_row.take() {
            *self.by_rule.entry(rule).or_default() += count;
        }
    }
}
