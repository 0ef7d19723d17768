//! What has been dropped and ended, by reason and by rule.

use std::collections::BTreeMap;

use crate::event::{CloseReason, DropReason};
use crate::policy::RuleRef;

/// Counts since the engine was made.
#[derive(Debug, Clone)]
pub struct Counters {
    drops: [u64; DropReason::ALL.len()],
    ends: BTreeMap<&'static str, u64>,
    by_rule: BTreeMap<RuleRef, u64>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            drops: [0; DropReason::ALL.len()],
            ends: BTreeMap::new(),
            by_rule: BTreeMap::new(),
        }
    }
}

impl Counters {
    /// Packets dropped for `reason`.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }

    /// Flows that ended, by [`CloseReason::name`].
    pub fn ends(&self) -> &BTreeMap<&'static str, u64> {
        &self.ends
    }

    /// Packets dropped by each list entry or rule of the present policy.
    pub fn by_rule(&self) -> &BTreeMap<RuleRef, u64> {
        &self.by_rule
    }

    pub(crate) fn on_drop(&mut self, reason: DropReason, rule: Option<RuleRef>) {
        self.drops[reason as usize] += 1;
        if let Some(rule) = rule {
            *self.by_rule.entry(rule).or_default() += 1;
        }
    }

    pub(crate) fn on_close(&mut self, reason: CloseReason) {
        *self.ends.entry(reason.name()).or_default() += 1;
    }

    /// A new policy has other rules under the same numbers.
    pub(crate) fn on_policy(&mut self) {
        self.by_rule.clear();
    }
}
