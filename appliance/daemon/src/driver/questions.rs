//! What may be asked of running shards: which flows are open, and what has been counted.
//!
//! Questions are messages, so whatever a shard was told before it is asked is in force in its answer. A listing of flows
//! is made in parts, a few hundred slots in a turn, and keeps no packet waiting.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tungate_engine::io::Progress;
use tungate_engine::policy::{Action, RuleRef};
use tungate_engine::{Counters, Engine, FlowId, Policy, Protocol, Timestamp};

use super::Totals;
use super::exchange::{Mailbox, Message};
use super::world::Flows;
use crate::bypass::Asking;

/// Slots of the flow table that are looked at in a turn.
const SLOTS_PER_TURN: usize = 256;
/// How long shards may take to answer; one that has failed does not.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Names that drops are counted under, in one shard; what other rules of earlier policies drop is counted together.
const NAMES_MAX: usize = 16_384;

/// An open flow.
#[derive(Debug)]
pub(crate) struct FlowReport {
    pub(crate) id: FlowId,
    pub(crate) protocol: Protocol,
    pub(crate) client: SocketAddr,
    pub(crate) target: SocketAddr,
    pub(crate) name: Option<String>,
    pub(super) action: Action,
    pub(super) rule: RuleRef,
    pub(super) names: Arc<Names>,
    pub(crate) age: Duration,
    /// The kernel carries it.
    pub(crate) bypassed: bool,
    pub(crate) progress: Progress,
}

/// The names in a policy that open flows refer to. They outlive the policy, which may be large.
#[derive(Debug)]
pub(super) struct Names {
    rules: Vec<String>,
    egresses: Vec<String>,
}

/// Packets that were dropped, by the name of the list entry or rule.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RuleCounts {
    by_name: BTreeMap<String, u64>,
    others: u64,
}

/// Asks the shards of a driver.
#[derive(Clone)]
pub(crate) struct Asker {
    mailboxes: Arc<[Arc<Mailbox>]>,
    bypass: Option<Asking>,
}

/// A listing that a shard is about.
pub(super) struct Listing {
    answer: mpsc::UnboundedSender<Vec<FlowReport>>,
    next: usize,
}

impl FlowReport {
    /// The rule that let it open.
    pub(crate) fn rule(&self) -> &str {
        self.names.rule(self.rule)
    }

    /// The way out.
    pub(crate) fn egress(&self) -> &str {
        self.names.egress(self.action)
    }
}

impl Names {
    pub(super) fn of(policy: &Policy) -> Arc<Self> {
        let spec = policy.spec();
        Arc::new(Self {
            rules: spec.rules.iter().map(|rule| rule.name.clone()).collect(),
            egresses: spec.egresses.iter().map(|egress| egress.name.clone()).collect(),
        })
    }

    /// What let a flow open: a rule or the default, as no list entry does.
    pub(super) fn rule(&self, rule: RuleRef) -> &str {
        match rule {
            RuleRef::Rule(index) => &self.rules[index as usize],
            RuleRef::Resolver => "resolver",
            RuleRef::List(_) | RuleRef::Default => "default",
        }
    }

    pub(super) fn egress(&self, action: Action) -> &str {
        match action {
            Action::Egress(egress) => &self.egresses[usize::from(egress.0)],
            Action::Direct | Action::Redirect(_) | Action::Reject | Action::Drop => action.name(),
        }
    }
}

impl RuleCounts {
    /// Adds what `counters` has by the rules of `policy`.
    pub(super) fn add_all(&mut self, counters: &Counters, policy: &Policy) {
        for (&rule, &packets) in counters.by_rule() {
            self.add(policy.name(rule).to_string(), packets);
        }
    }

    /// Adds all of `other`.
    pub(crate) fn merge(&mut self, other: Self) {
        for (name, packets) in other.by_name {
            self.add(name, packets);
        }
        self.others += other.others;
    }

    pub(crate) fn add(&mut self, name: String, packets: u64) {
        let is_full = self.by_name.len() >= NAMES_MAX;
        match self.by_name.get_mut(&name) {
            Some(count) => *count += packets,
            None if is_full => self.others += packets,
            None => drop(self.by_name.insert(name, packets)),
        }
    }

    /// By name, and those of rules that have no count of their own.
    pub(crate) fn into_parts(self) -> (BTreeMap<String, u64>, u64) {
        (self.by_name, self.others)
    }
}

impl Asker {
    pub(super) fn new(mailboxes: Arc<[Arc<Mailbox>]>, bypass: Option<Asking>) -> Self {
        Self { mailboxes, bypass }
    }

    /// All open flows.
    pub(crate) async fn flows(&self) -> Vec<FlowReport> {
        if let Some(bypass) = &self.bypass {
            bypass.refresh().await;
        }
        let (sender, mut receiver) = mpsc::unbounded_channel();
        for mailbox in self.mailboxes.iter() {
            mailbox.send(Message::Flows(sender.clone()));
        }
        drop(sender);
        let mut flows = Vec::new();
        let listed = async {
            while let Some(part) = receiver.recv().await {
                flows.extend(part);
            }
        };
        let _ = timeout(ANSWER_TIME, listed).await;
        flows
    }

    /// What each shard has counted.
    pub(crate) async fn totals(&self) -> Vec<Totals> {
        let answers = self.mailboxes.iter().map(|mailbox| {
            let (sender, receiver) = oneshot::channel();
            mailbox.send(Message::Count(sender));
            receiver
        });
        let answers: Vec<_> = answers.collect(); // all are asked before the first is heard
        let mut totals = Vec::new();
        let told = async {
            for answer in answers {
                totals.extend(answer.await);
            }
        };
        let _ = timeout(ANSWER_TIME, told).await;
        totals
    }
}

impl Listing {
    pub(super) fn new(answer: mpsc::UnboundedSender<Vec<FlowReport>>) -> Self {
        Self { answer, next: 0 }
    }

    /// Tells of the next flows; returns whether there are more.
    pub(super) fn go_on(&mut self, flows: &Flows, engine: &Engine, now: Timestamp) -> bool {
        let part = flows.report(self.next, SLOTS_PER_TURN, engine, now);
        self.next += SLOTS_PER_TURN;
        part.is_some_and(|part| self.answer.send(part).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_more_rules_than_are_kept_add_up() {
        let mut counts = RuleCounts::default();
        for number in 0..NAMES_MAX + 10 {
            counts.add(format!("rule {number}"), 1);
        }
        counts.add("rule 7".to_owned(), 5);
        let (by_name, others) = counts.into_parts();
        assert_eq!((by_name.len(), by_name["rule 7"], others), (NAMES_MAX, 6, 10));
    }
}
