//! Puts what the workers have found back into one order, and gives it to the sink.
//!
//! Every epoch's findings lie behind those of the epoch before, so each is put in order by itself: records of packets
//! by their numbers, what is shown by its moment, each packet's record before what it has caused.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use tungate_engine::Policy;

use super::Progress;
use super::item::{Batch, Cause, Counts, Output, Record, Shown, ShownKind, Verdict};
use super::stage::Wanted;
use crate::outcome::{Emitted, PacketRecord, Side, Sink};

/// What the dispatcher says about an epoch.
pub(super) struct Epoch {
    /// When the first packet was captured; in the first epoch that has one.
    pub(super) started: Option<u64>,
    /// Packets that no shard has to do with, in file order.
    pub(super) records: Vec<Record>,
    pub(super) progress: Progress,
}

pub(super) struct Merge<'a> {
    policies: &'a [Arc<Policy>],
    wanted: Wanted,
    outputs: Vec<Receiver<Box<Batch>>>,
    spent: Sender<Box<Batch>>,
}

impl<'a> Merge<'a> {
    pub(super) fn new(
        policies: &'a [Arc<Policy>],
        wanted: Wanted,
        outputs: Vec<Receiver<Box<Batch>>>,
        spent: Sender<Box<Batch>>,
    ) -> Self {
        Self {
            policies,
            wanted,
            outputs,
            spent,
        }
    }

    /// Takes epochs until there are no more.
    pub(super) fn run(
        self,
        epochs: &Receiver<Epoch>,
        mut journal: Option<&mut dyn io::Write>,
        sink: &mut dyn Sink,
        progress: &mut dyn FnMut(Progress),
    ) -> io::Result<()> {
        let mut found: Vec<Box<Batch>> = Vec::new();
        while let Ok(epoch) = epochs.recv() {
            if let Some(started) = epoch.started {
                sink.started(started);
            }
            for output in &self.outputs {
                // A worker that is gone has panicked, which its owner will notice.
                let Ok(batch) = output.recv() else { return Ok(()) };
                found.push(batch);
            }
            self.give(&epoch.records, &found, sink);
            if let Some(journal) = &mut journal {
                let mut blocks: Vec<_> = found.iter().flat_map(|batch| &batch.output.journal).collect();
                blocks.sort_by_key(|(shard, _)| *shard);
                for (_, block) in blocks {
                    journal.write_all(block)?;
                }
            }
            for mut batch in found.drain(..) {
                batch.output.flows.drain(..).for_each(|flow| sink.flow(flow));
                batch.clear();
                // The dispatcher may have finished already.
                let _ = self.spent.send(batch);
            }
            progress(epoch.progress);
        }
        Ok(())
    }

    fn give(&self, own: &[Record], found: &[Box<Batch>], sink: &mut dyn Sink) {
        let mut records = Records::new(own, found);
        if self.wanted.emitted || self.wanted.lines {
            let mut shown: Vec<(&Shown, &Output)> = found
                .iter()
                .flat_map(|batch| batch.output.shown.iter().map(|shown| (shown, &*batch.output)))
                .collect();
            shown.sort_by_key(|(shown, _)| shown.moment);
            for (shown, output) in shown {
                records.give_before(shown, |record| self.record(record, sink));
                self.show(shown, output, sink);
            }
        }
        if self.wanted.packets {
            for record in records {
                self.record(record, sink);
            }
        }
    }

    fn record(&self, record: &Record, sink: &mut dyn Sink) {
        if !self.wanted.packets {
            return;
        }
        let (reason, dropped) = match record.verdict {
            Verdict::Pass => (None, false),
            Verdict::Drop(reason) => (Some(reason.name()), true),
            Verdict::NotIp => (Some("not-ip"), false),
            Verdict::Unreadable => (Some("unreadable"), false),
        };
        let policy = &self.policies[usize::from(record.policy)];
        sink.packet(&PacketRecord {
            number: record.number,
            time: record.time,
            side: record.side,
            path: (record.side != Side::None).then_some(record.path),
            reason,
            dropped,
            rule: record.rule.map(|rule| (Arc::clone(policy), rule)),
            flow: (record.flow != 0).then_some(record.flow),
        });
    }

    fn show(&self, shown: &Shown, output: &Output, sink: &mut dyn Sink) {
        let bytes = &output.bytes[shown.start as usize..][..shown.len as usize];
        match shown.kind {
            ShownKind::Emitted => sink.emitted(&Emitted {
                time: shown.moment.time,
                bytes,
                flow: (shown.flow != 0).then_some(shown.flow),
                cause: match shown.moment.cause {
                    Cause::Packet(number) => Some(number),
                    Cause::Policy(_) | Cause::Deadline(_) => None,
                },
            }),
            ShownKind::Line => {
                let text = std::str::from_utf8(bytes).expect("lines are text");
                sink.line(shown.moment.time, format_args!("{text}"));
            }
        }
    }
}

/// The records of one epoch, in file order.
struct Records<'a> {
    rest: Vec<&'a [Record]>,
}

impl<'a> Records<'a> {
    fn new(own: &'a [Record], found: &'a [Box<Batch>]) -> Self {
        let rest = found.iter().map(|batch| batch.output.records.as_slice());
        Self {
            rest: rest.chain([own]).filter(|records| !records.is_empty()).collect(),
        }
    }

    /// Gives the records that come before what is shown, or have caused it.
    fn give_before(&mut self, shown: &Shown, mut each: impl FnMut(&Record)) {
        while let Some(record) = self.peek() {
            let is_before = match shown.moment.cause {
                Cause::Packet(number) => record.number <= number,
                Cause::Policy(_) => record.time < shown.moment.time,
                Cause::Deadline(_) => record.time <= shown.moment.time,
            };
            if !is_before {
                return;
            }
            each(record);
            self.next();
        }
    }

    fn peek(&self) -> Option<&'a Record> {
        let first = self.rest.iter().min_by_key(|records| records[0].number);
        first.map(|records| &records[0])
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = &'a Record;

    fn next(&mut self) -> Option<&'a Record> {
        let index = (0..self.rest.len()).min_by_key(|index| self.rest[*index][0].number)?;
        let (first, rest) = self.rest[index].split_first().expect("empty ones are taken out");
        if rest.is_empty() {
            self.rest.swap_remove(index);
        } else {
            self.rest[index] = rest;
        }
        Some(first)
    }
}

impl Counts {
    /// Adds those of another part of the run.
    pub(super) fn merge(&mut self, mut other: Self) {
        other.end_row();
        let (totals, others) = (&mut self.totals, other.totals);
        totals.read += others.read;
        totals.judged += others.judged;
        totals.unreadable += others.unreadable;
        totals.not_ip += others.not_ip;
        totals.from_client += others.from_client;
        totals.from_target += others.from_target;
        totals.pass += others.pass;
        totals.drop += others.drop;
        totals.parity_checked += others.parity_checked;
        totals.parity_disagreements += others.parity_disagreements;
        totals.fidelity_flows += others.fidelity_flows;
        totals.fidelity_exact += others.fidelity_exact;
        totals.repaired_checksums += others.repaired_checksums;
        totals.discarded_after_reset += others.discarded_after_reset;
        totals.captured_bytes += others.captured_bytes;
        totals.started = totals.started.max(others.started);
        totals.duration = totals.duration.max(others.duration);
        for (rule, count) in other.by_rule {
            *self.by_rule.entry(rule).or_default() += count;
        }
        for (reason, count) in other.by_reason {
            *self.by_reason.entry(reason).or_default() += count;
        }
    }

    /// What the run comes to.
    pub(super) fn outcome(
        mut self,
        policies: &[Arc<Policy>],
        digest: String,
        damaged: Option<crate::capture::Damage>,
    ) -> super::Outcome {
        self.end_row();
        let mut by_rule = std::collections::BTreeMap::new();
        for ((policy, rule), count) in self.by_rule {
            let name = policies[usize::from(policy)].name(rule).to_string();
            *by_rule.entry(name).or_default() += count;
        }
        let by_reason = self.by_reason.into_iter();
        super::Outcome {
            totals: self.totals,
            by_rule,
            by_reason: by_reason.map(|(reason, count)| (reason.name(), count)).collect(),
            digest,
            damaged,
        }
    }
}
