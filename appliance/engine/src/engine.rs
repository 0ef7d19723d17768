//! The engine: one way in, one ordered way out.

use std::sync::Arc;

use crate::addr::FlowId;
use crate::config::Config;
use crate::io::{Input, Judgement, World};
use crate::policy::Policy;
use crate::time::{Deadline, Timestamp};

/// The appliance's whole behaviour as a state machine, for one shard.
///
/// Two engines built from the same configuration, policy and seed and fed the same inputs produce the same
/// outputs, byte for byte.
pub struct Engine {
    now: Timestamp,
}

impl Engine {
    /// Builds an engine at time `now`.
    pub fn new(config: Config, policy: Arc<Policy>, seed: [u8; 32], now: Timestamp) -> Self {
        let _ = (config, policy, seed);
        Self { now }
    }

    /// Takes one input observed at `now`; an older `now` counts as the latest one seen. Never fails: what the
    /// network sends is data. Returns what became of a packet.
    pub fn handle(&mut self, now: Timestamp, input: Input<'_>, world: &mut dyn World) -> Option<Judgement> {
        self.now = self.now.max(now);
        let _ = (input, world);
        None
    }

    /// Does what has become due, sends what flows have to send, and says when to come back.
    pub fn flush(&mut self, now: Timestamp, world: &mut dyn World) -> Option<Deadline> {
        let _ = (now, world);
        None
    }

    /// Lends the next bytes that the client of a TCP flow has sent, in order and without a gap; `take` says how
    /// many the upstream took. Returns that number, or 0 without calling `take` when nothing waits.
    pub fn read(&mut self, now: Timestamp, flow: FlowId, take: impl FnOnce(&[u8]) -> usize) -> usize {
        let _ = (now, flow, take);
        0
    }

    /// Lends room in a TCP flow's send buffer; `fill` says how many bytes from the upstream it put there. Returns
    /// that number, or 0 without calling `fill` when there is no room: then [`UpstreamCommand::Writable`]
    /// follows as soon as there is.
    ///
    /// [`UpstreamCommand::Writable`]: crate::io::UpstreamCommand::Writable
    pub fn write(&mut self, now: Timestamp, flow: FlowId, fill: impl FnOnce(&mut [u8]) -> usize) -> usize {
        let _ = (now, flow, fill);
        0
    }
}
