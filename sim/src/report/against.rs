//! `--against`: what would change if another policy were in force.
//!
//! The capture is replayed under both policies. A packet *changes* when its verdict does. A flow changes when its
//! verdict, egress or end does, or the bytes that either side receives; flows are the same when they begin with the
//! same packet, and one that begins under one policy only has changed, too. Where only the name of what decided is
//! another, the effect is the same: it is counted apart and makes no difference to the exit code, so that a
//! rewritten policy can be proven equal to the old one.

use std::io::{self, BufReader, Read};

use serde::Serialize;
use tempfile::SpooledTempFile;

use super::ReportError;
use super::flows::{FlowJson, FlowLine, StreamLine, seconds};
use super::packets::Verdict;
use super::rules::{RuleId, RuleNames};
use super::spool::{FlowSpool, Spool, StoredFlows};
use crate::outcome::{Emitted, FlowRecord, PacketRecord, Side, Sink};

/// How many changed packets, and how many changed flows, the terminal shows.
pub(super) const SHOWN: usize = 10;

/// Every packet's decision under the first policy.
pub(super) struct DecisionLog {
    spool: Spool,
    reasons: Vec<&'static str>,
}

/// Replays the capture once more, under the other policy, and compares as it goes.
pub struct Comparison<'a> {
    before: BufReader<&'a mut SpooledTempFile>,
    before_rules: &'a RuleNames,
    before_reasons: &'a [&'static str],
    before_flows: &'a mut StoredFlows,
    failure: Option<io::Error>,
    rules: RuleNames,
    flows: FlowSpool,
    packets: PacketCounts,
    first_packets: Vec<PacketChange>,
    changed_packets: Spool,
}

/// What changes under the other policy.
pub struct Against {
    pub(super) policy: String,
    pub(super) digest: String,
    pub(super) packets: PacketCounts,
    pub(super) flows: FlowCounts,
    pub(super) first_packets: Vec<PacketChange>,
    pub(super) first_flows: Vec<FlowChange>,
    /// JSON objects, one on a line.
    pub(super) changed_packets: Spool,
    pub(super) changed_flows: Spool,
}

/// Counts of packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct PacketCounts {
    pub(super) changed: u64,
    pub(super) pass_to_drop: u64,
    pub(super) drop_to_pass: u64,
    /// Same verdict, but another rule decided.
    pub(super) other_rule: u64,
}

/// Counts of flows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct FlowCounts {
    pub(super) changed: u64,
    /// Of these, flows that only the first policy has.
    pub(super) only_before: u64,
    /// Of these, flows that only the other policy has.
    pub(super) only_after: u64,
    /// Same in all, but another rule decided.
    pub(super) other_rule: u64,
}

/// A packet that fares differently.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct PacketChange {
    pub(super) number: u64,
    pub(super) time: f64,
    pub(super) side: Side,
    pub(super) before: Decision,
    pub(super) after: Decision,
}

/// What became of a packet under one policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Decision {
    pub(super) verdict: Option<Verdict>,
    pub(super) rule: Option<String>,
    pub(super) reason: Option<&'static str>,
}

/// A flow that fares differently.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct FlowChange {
    pub(super) first_packet: u64,
    pub(super) protocol: String,
    pub(super) client: String,
    pub(super) target: String,
    pub(super) name: Option<String>,
    pub(super) before: Option<FlowState>,
    pub(super) after: Option<FlowState>,
}

/// What became of a flow under one policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct FlowState {
    pub(super) id: u64,
    pub(super) verdict: String,
    pub(super) rule: Option<String>,
    pub(super) egress: Option<String>,
    pub(super) end: String,
    pub(super) to_target: StreamLine,
    pub(super) to_client: StreamLine,
}

/// Size of an [`Entry`] on disk.
const ENTRY_BYTES: usize = 8;

/// A packet's decision in a [`DecisionLog`].
struct Entry {
    verdict: Option<Verdict>,
    /// Index into the log's reasons.
    reason: Option<u16>,
    rule: Option<RuleId>,
}

impl DecisionLog {
    pub(super) fn new() -> Self {
        Self {
            spool: Spool::new(),
            reasons: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, packet: &PacketRecord, rule: Option<RuleId>) {
        let reason = packet.reason.map(|reason| self.reason(reason));
        self.spool.push(
            &Entry {
                verdict: Verdict::of(packet),
                reason,
                rule,
            }
            .to_bytes(),
        );
    }

    fn reason(&mut self, reason: &'static str) -> u16 {
        let known = self.reasons.iter().position(|&known| known == reason);
        known.unwrap_or_else(|| {
            self.reasons.push(reason);
            self.reasons.len() - 1
        }) as u16
    }
}

impl Entry {
    /// One byte of verdict, one unused, two of reason, four of rule; the highest value of each means none.
    fn to_bytes(&self) -> [u8; ENTRY_BYTES] {
        let verdict = match self.verdict {
            Some(Verdict::Pass) => 0,
            Some(Verdict::Drop) => 1,
            None => u8::MAX,
        };
        let [reason_low, reason_high] = self.reason.unwrap_or(u16::MAX).to_le_bytes();
        let [a, b, c, d] = self.rule.map_or(u32::MAX, |RuleId(id)| id).to_le_bytes();
        [verdict, u8::MAX, reason_low, reason_high, a, b, c, d]
    }

    fn from_bytes([verdict, _, reason_low, reason_high, a, b, c, d]: [u8; ENTRY_BYTES]) -> Self {
        let reason = u16::from_le_bytes([reason_low, reason_high]);
        let rule = u32::from_le_bytes([a, b, c, d]);
        Self {
            verdict: match verdict {
                0 => Some(Verdict::Pass),
                1 => Some(Verdict::Drop),
                _ => None,
            },
            reason: (reason != u16::MAX).then_some(reason),
            rule: (rule != u32::MAX).then_some(RuleId(rule)),
        }
    }
}

impl<'a> Comparison<'a> {
    /// Prepares to compare with the decisions in `log`, whose rules are in `rules`, and with `flows`.
    pub(super) fn new(
        log: &'a mut DecisionLog,
        rules: &'a RuleNames,
        flows: &'a mut StoredFlows,
    ) -> io::Result<Self> {
        Ok(Self {
            before: log.spool.read()?,
            before_rules: rules,
            before_reasons: &log.reasons,
            before_flows: flows,
            failure: None,
            rules: RuleNames::default(),
            flows: FlowSpool::new(),
            packets: PacketCounts::default(),
            first_packets: Vec::new(),
            changed_packets: Spool::new(),
        })
    }

    /// Compares the flows with those of the first policy and hands over all changes.
    ///
    /// # Errors
    ///
    /// [`ReportError::Spool`] when decisions or flows could not be kept on disk.
    pub fn finish(self, policy: String, digest: String) -> Result<Against, ReportError> {
        if let Some(error) = self.failure {
            return Err(error.into());
        }
        let mut against = Against {
            policy,
            digest,
            packets: self.packets,
            flows: FlowCounts::default(),
            first_packets: self.first_packets,
            first_flows: Vec::new(),
            changed_packets: self.changed_packets,
            changed_flows: Spool::new(),
        };
        against.compare_flows(self.before_flows, &mut self.flows.finish()?)?;
        Ok(against)
    }

    /// The decision on the next packet under the first policy.
    fn next_before(&mut self) -> Entry {
        let mut bytes = [u8::MAX; ENTRY_BYTES];
        if let Err(error) = self.before.read_exact(&mut bytes) {
            self.failure.get_or_insert(error);
        }
        Entry::from_bytes(bytes)
    }
}

impl Sink for Comparison<'_> {
    fn started(&mut self, _: u64) {}

    fn packet(&mut self, packet: &PacketRecord) {
        let before = self.next_before();
        let before_rule = before.rule.map(|id| self.before_rules.name(id));
        let rule = packet
            .rule
            .as_ref()
            .map(|(policy, rule)| self.rules.id(policy, *rule));
        let rule = rule.map(|id| self.rules.name(id));
        let verdict = Verdict::of(packet);
        if before.verdict == verdict {
            self.packets.other_rule += u64::from(before_rule != rule);
            return;
        }
        self.packets.changed += 1;
        match verdict {
            Some(Verdict::Drop) => self.packets.pass_to_drop += 1,
            Some(Verdict::Pass) => self.packets.drop_to_pass += 1,
            None => {}
        }
        let change = PacketChange {
            number: packet.number,
            time: seconds(packet.time),
            side: packet.side,
            before: Decision {
                verdict: before.verdict,
                rule: before_rule.map(str::to_owned),
                reason: before
                    .reason
                    .and_then(|index| self.before_reasons.get(usize::from(index)).copied()),
            },
            after: Decision {
                verdict,
                rule: rule.map(str::to_owned),
                reason: packet.reason,
            },
        };
        self.changed_packets.push_json(&change);
        if self.first_packets.len() < SHOWN {
            self.first_packets.push(change);
        }
    }

    fn flow(&mut self, record: FlowRecord) {
        self.flows.push(record.id, &FlowJson::from(&record));
    }

    fn emitted(&mut self, _: &Emitted<'_>) {}

    fn line(&mut self, _: tungate_engine::Timestamp, _: std::fmt::Arguments<'_>) {}

    fn wants_emitted(&self) -> bool {
        false
    }

    fn wants_lines(&self) -> bool {
        false
    }

    fn wants_packets(&self) -> bool {
        true
    }
}

impl Against {
    /// Whether the other policy has another effect.
    pub(super) fn differs(&self) -> bool {
        self.packets.changed + self.flows.changed > 0
    }

    /// Walks both lists side by side: ids, and so first packets, ascend in both.
    fn compare_flows(&mut self, before: &mut StoredFlows, after: &mut StoredFlows) -> io::Result<()> {
        let (mut all_before, mut all_after) = (before.read()?, after.read()?);
        let mut next_before: Option<FlowLine> = all_before.next_value()?;
        let mut next_after: Option<FlowLine> = all_after.next_value()?;
        loop {
            let first = |flow: &Option<FlowLine>| flow.as_ref().map_or(u64::MAX, |flow| flow.first_packet);
            let (take_before, take_after) = (
                first(&next_before) <= first(&next_after),
                first(&next_after) <= first(&next_before),
            );
            let before = if take_before { next_before.take() } else { None };
            let after = if take_after { next_after.take() } else { None };
            if before.is_none() && after.is_none() {
                return Ok(());
            }
            if take_before {
                next_before = all_before.next_value()?;
            }
            if take_after {
                next_after = all_after.next_value()?;
            }
            self.compare_flow(before, after);
        }
    }

    fn compare_flow(&mut self, before: Option<FlowLine>, after: Option<FlowLine>) {
        match (&before, &after) {
            (Some(before), Some(after)) if before.has_the_effect_of(after) => {
                self.flows.other_rule += u64::from(before.rule != after.rule);
                return;
            }
            (Some(_), None) => self.flows.only_before += 1,
            (None, Some(_)) => self.flows.only_after += 1,
            (Some(_), Some(_)) | (None, None) => {}
        }
        self.flows.changed += 1;
        let Some(flow) = after.as_ref().or(before.as_ref()).cloned() else {
            return;
        };
        let change = FlowChange {
            first_packet: flow.first_packet,
            protocol: flow.protocol,
            client: flow.client,
            target: flow.target,
            name: flow.name,
            before: before.map(FlowState::from),
            after: after.map(FlowState::from),
        };
        self.changed_flows.push_json(&change);
        if self.first_flows.len() < SHOWN {
            self.first_flows.push(change);
        }
    }
}

impl FlowLine {
    fn has_the_effect_of(&self, other: &Self) -> bool {
        (
            &self.verdict,
            &self.egress,
            &self.end,
            &self.to_target,
            &self.to_client,
        ) == (
            &other.verdict,
            &other.egress,
            &other.end,
            &other.to_target,
            &other.to_client,
        )
    }
}

impl From<FlowLine> for FlowState {
    fn from(flow: FlowLine) -> Self {
        Self {
            id: flow.id,
            verdict: flow.verdict,
            rule: flow.rule,
            egress: flow.egress,
            end: flow.end,
            to_target: flow.to_target,
            to_client: flow.to_client,
        }
    }
}
