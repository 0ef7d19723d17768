//! `--out`: the packets that the appliance would have sent to its clients, with the decisions as comments.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::output::{Output, OutputError};
use super::packets::Verdict;
use super::rules::{RuleId, RuleNames};
use crate::capture::PcapngWriter;
use crate::outcome::{Emitted, PacketRecord};

/// Writes a pcapng file. A captured packet's decision is told before what the engine emitted because of it.
pub(super) struct EmittedPackets {
    writer: PcapngWriter<Output>,
    /// When the capture began, in nanoseconds since the Unix epoch.
    started: u64,
    latest: Option<Decided>,
    /// What decided about each open flow.
    flows: HashMap<u64, RuleId>,
    comment: String,
}

/// The captured packet decided last.
struct Decided {
    number: u64,
    dropped: bool,
    reason: Option<&'static str>,
    rule: Option<RuleId>,
}

impl EmittedPackets {
    pub(super) fn new(output: Output) -> Self {
        Self {
            writer: PcapngWriter::new(output).expect("an output keeps its failures"),
            started: 0,
            latest: None,
            flows: HashMap::new(),
            comment: String::new(),
        }
    }

    pub(super) fn started(&mut self, unix_nanos: u64) {
        self.started = unix_nanos;
    }

    /// Notes what became of a captured packet.
    pub(super) fn decided(&mut self, packet: &PacketRecord, rule: Option<RuleId>) {
        if let (Some(flow), Some(rule)) = (packet.flow, rule) {
            self.flows.insert(flow, rule);
        }
        self.latest = Some(Decided {
            number: packet.number,
            dropped: Verdict::of(packet) == Some(Verdict::Drop),
            reason: packet.reason,
            rule,
        });
    }

    /// Forgets a flow that has ended.
    pub(super) fn ended(&mut self, flow: u64) {
        self.flows.remove(&flow);
    }

    pub(super) fn add(&mut self, packet: &Emitted<'_>, rules: &RuleNames) {
        self.comment.clear();
        self.describe(packet, rules).expect("strings take everything");
        let time = self.started.saturating_add(packet.time.as_nanos());
        let written = self
            .writer
            .write(time, packet.bytes, packet.bytes.len() as u32, &self.comment);
        written.expect("an output keeps its failures");
    }

    /// Such as `flow 3 by "default", for packet 17`, or `for packet 17: drop, rule-reject by "ads"`.
    fn describe(&mut self, packet: &Emitted<'_>, rules: &RuleNames) -> std::fmt::Result {
        let comment = &mut self.comment;
        let decided = self
            .latest
            .as_ref()
            .filter(|decided| packet.cause == Some(decided.number));
        if let Some(flow) = packet.flow {
            write!(comment, "flow {flow}")?;
            if let Some(&rule) = self.flows.get(&flow) {
                write!(comment, " by \"{}\"", rules.name(rule))?;
            }
        }
        let Some(cause) = packet.cause else { return Ok(()) };
        let separator = if comment.is_empty() { "" } else { ", " };
        write!(comment, "{separator}for packet {cause}")?;
        match decided {
            Some(Decided {
                dropped: true,
                reason,
                rule,
                ..
            }) => {
                write!(comment, ": drop, {}", reason.unwrap_or("unknown"))?;
                match rule {
                    Some(rule) => write!(comment, " by \"{}\"", rules.name(*rule)),
                    None => Ok(()),
                }
            }
            Some(Decided { dropped: false, .. }) | None => Ok(()),
        }
    }

    pub(super) fn finish(self) -> Result<(), OutputError> {
        self.writer
            .finish()
            .expect("an output keeps its failures")
            .finish()
    }
}
