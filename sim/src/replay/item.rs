//! What the dispatcher hands to the shards, and what they hand on.

use std::sync::Arc;

use tungate_engine::dns::Learned;
use tungate_engine::policy::RuleRef;
use tungate_engine::{DropReason, ShardId, Timestamp};

use super::roles::{Begins, Place};
use crate::outcome::{FlowRecord, Path, Side, Totals};

/// One thing for a shard to do, at its time. Items come in file order.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) time: Timestamp,
    pub(super) shard: ShardId,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    /// A conversation begins with the packet of this number, which follows.
    Begin(Place, u64, Box<Begins>),
    /// A packet of a conversation.
    Packet(Side, Place, Packet),
    /// A packet from a name server. The dispatcher waits for what clients have learned.
    Answer(Place, Packet),
    /// What a client has learned by way of another shard.
    Learned(Arc<Learned>),
    /// A client's fragment, for the engine to put together. The dispatcher waits for the answer.
    ClientFragment(Packet),
    /// A fragment of something on its way to a client, of which nothing is known but where it belongs.
    TargetFragment(Place, Packet),
    /// This slot's conversation is over.
    Forget(u32),
    /// The policy with this index is in force.
    Policy(u16),
}

/// Where a packet is in its batch's bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packet {
    /// Counted from 1 in file order.
    pub(super) number: u64,
    /// Where its Ethernet frame starts, captured or made.
    pub(super) frame: u32,
    /// Where in the frame the IP packet starts.
    pub(super) link_len: u16,
    /// Length of the IP packet.
    pub(super) len: u32,
    /// How much of it was captured; zeros stand for the rest.
    pub(super) captured: u32,
    /// It was put together from fragments, which a pre-filter has seen one by one.
    pub(super) is_reassembled: bool,
}

impl Packet {
    /// Where its IP packet is in its batch's bytes.
    pub(super) fn ip(&self) -> std::ops::Range<usize> {
        let start = self.frame as usize + usize::from(self.link_len);
        start..start + self.len as usize
    }
}

/// Items for one worker, with their bytes. Batches go round and round.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) items: Vec<Item>,
    pub(super) bytes: Vec<u8>,
    /// Everything before this time may happen.
    pub(super) until: Timestamp,
    pub(super) end: End,
    /// What the worker has found, on the way back.
    pub(super) output: Box<Output>,
}

impl Batch {
    /// Makes it ready to be used again.
    pub(super) fn clear(&mut self) {
        self.items.clear();
        self.bytes.clear();
        self.output.clear();
    }
}

/// What follows a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum End {
    /// The dispatcher waits for what became of its last item; the epoch goes on.
    Reply,
    /// An epoch is over.
    #[default]
    Epoch,
    /// The capture is over: say when everything will have settled.
    Capture,
    /// Let time run to [`Batch::until`], and close the books.
    Books,
}

/// What a worker says to the dispatcher.
#[derive(Debug)]
pub(super) enum Reply {
    /// What became of a fragment: the whole packet, if it was the last one missing.
    Fragment(Option<Vec<u8>>),
    /// What clients have learned since the last time.
    Learned(Vec<Learned>),
    /// When this worker's shards have settled.
    Settled(Timestamp),
}

/// What became of a packet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record {
    pub(super) number: u64,
    pub(super) time: Timestamp,
    pub(super) side: Side,
    pub(super) verdict: Verdict,
    /// Which path decided.
    pub(super) path: Path,
    pub(super) rule: Option<RuleRef>,
    /// Index of the policy in force.
    pub(super) policy: u16,
    pub(super) flow: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Pass,
    Drop(DropReason),
    NotIp,
    Unreadable,
}

/// What became of a client's packet, and what decided about it or its flow.
pub(super) type Judged = (Verdict, Option<RuleRef>);

/// The order of what happens: by time; at one time packets in file order, then deadlines by shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment {
    pub(super) time: Timestamp,
    pub(super) cause: Cause,
    /// Counts within one cause.
    pub(super) sequence: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cause {
    /// A change of policy, in each shard.
    Policy(ShardId),
    /// The packet with this number.
    Packet(u64),
    /// A deadline or timer.
    Deadline(ShardId),
}

/// Something to be shown in order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown {
    pub(super) moment: Moment,
    pub(super) kind: ShownKind,
    /// Where it is in [`Output::bytes`].
    pub(super) start: u32,
    pub(super) len: u32,
    pub(super) flow: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ShownKind {
    /// A packet that the engine emitted.
    Emitted,
    /// A line of the transcript.
    Line,
}

/// What a worker has found in one epoch.
#[derive(Debug, Default)]
pub(super) struct Output {
    /// In file order.
    pub(super) records: Vec<Record>,
    pub(super) flows: Vec<FlowRecord>,
    pub(super) shown: Vec<Shown>,
    pub(super) bytes: Vec<u8>,
    /// Journal blocks, of each shard in order.
    pub(super) journal: Vec<(ShardId, Vec<u8>)>,
}

/// Counts of one worker.
#[derive(Debug, Default, Clone)]
pub(super) struct Counts {
    pub(super) totals: Totals,
    pub(super) by_rule: std::collections::BTreeMap<(u16, RuleRef), u64>,
    /// Packets in a row that one rule has decided, which `by_rule` does not count yet.
    pub(super) in_a_row: Option<((u16, RuleRef), u64)>,
    pub(super) by_reason: std::collections::BTreeMap<DropReason, u64>,
}

impl Output {
    pub(super) fn clear(&mut self) {
        self.records.clear();
        self.flows.clear();
        self.shown.clear();
        self.bytes.clear();
        self.journal.clear();
    }
}
