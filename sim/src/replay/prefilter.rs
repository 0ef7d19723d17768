//! The pre-filter in a replay: the XDP program's bytecode looks at every packet from a client before the engine does.
//!
//! The engine judges each of them too: a list drop touches no state of it, so nothing depends on who is asked first,
//! and both verdicts can be compared. What the program drops, the engine must drop by the same list entry.

use std::sync::Arc;

use tungate_engine::policy::RuleRef;
use tungate_engine::{DropReason, Policy, Timestamp};
use tungate_prefilter::vm::{Machine, Vm};
use tungate_prefilter::{Action, Prefilter, Sampling};

use super::item::{Counts, Judged, Verdict};
use crate::outcome::Path;

/// Who runs the pre-filter's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Prefiltering {
    /// A virtual machine: the committed bytecode, checked, without the kernel
    #[default]
    Vm,
    /// Nobody: the engine alone judges
    Off,
}

/// A worker's pre-filter. Its shards share it: they meet packets and changes of policy in one order.
pub(super) struct Filter {
    vm: Option<Vm>,
    policies: Arc<[Arc<Policy>]>,
    /// Index of the policy whose lists it holds; `None` before the first packet.
    policy: Option<u16>,
    /// When the capture started, in nanoseconds since the Unix epoch.
    started: u64,
}

/// What the pre-filter made of a packet.
#[derive(Debug, Clone, Copy)]
pub(super) enum Seen {
    Passed,
    /// By a list entry.
    Dropped(Option<RuleRef>),
    /// The program did what the kernel would not have let it do.
    Failed,
}

impl Filter {
    pub(super) fn new(kind: Prefiltering, policies: Arc<[Arc<Policy>]>, started: u64) -> Self {
        let vm = match kind {
            Prefiltering::Vm => {
                let vm = Prefilter::<Machine>::simulated(Sampling::default());
                Some(vm.expect("the committed object is a build of this program"))
            }
            Prefiltering::Off => None,
        };
        Self {
            vm,
            policies,
            policy: None,
            started,
        }
    }

    /// Has the program look at a frame, with the lists of `policy` as they stand at `now`.
    pub(super) fn look(&mut self, policy: u16, now: Timestamp, frame: &[u8]) -> Option<Seen> {
        let unix_seconds = self.started.saturating_add(now.as_nanos()) / 1_000_000_000;
        let vm = self.vm.as_mut()?;
        let mut ready = Ok(());
        if self.policy != Some(policy) {
            self.policy = Some(policy);
            ready = vm
                .apply(self.policies[usize::from(policy)].spec(), unix_seconds)
                .map(drop);
        } else if vm.next_expiry().is_some_and(|due| due <= unix_seconds) {
            ready = vm.expire(unix_seconds).map(drop);
        }
        Some(match ready.and_then(|()| vm.run(frame)) {
            Err(_) => Seen::Failed,
            Ok(verdict) => match verdict.action {
                Action::Pass => Seen::Passed,
                Action::Drop => Seen::Dropped(verdict.rule),
            },
        })
    }
}

impl Counts {
    /// Compares what both paths made of a packet from a client, and says which one decided.
    pub(super) fn compare(&mut self, seen: Option<Seen>, (verdict, rule): Judged) -> Path {
        let Some(seen) = seen else { return Path::Engine };
        self.totals.parity_checked += 1;
        let by_list = matches!(
            verdict,
            Verdict::Drop(DropReason::ListSource | DropReason::ListDestination)
        );
        let (path, agree) = match seen {
            Seen::Passed => (Path::Engine, true),
            Seen::Dropped(by) => (Path::Prefilter, by_list && by == rule),
            Seen::Failed => (Path::Engine, false),
        };
        self.totals.parity_disagreements += u64::from(!agree);
        path
    }
}
