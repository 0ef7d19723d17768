//! The pre-filter in a replay: the XDP program's bytecode looks at every packet from a client before the engine does.
//!
//! The engine judges each of them too: a list drop touches no state of it, so nothing depends on who is asked first,
//! and both verdicts can be compared. What the program drops, the engine must drop by the same list entry.

use std::sync::Arc;

use tungate_engine::policy::RuleRef;
use tungate_engine::{DropReason, Policy, Timestamp};
#[cfg(feature = "kernel")]
use tungate_prefilter::kernel::{Kernel, KernelError, Options};
use tungate_prefilter::{Action, Backend, Error, Prefilter, Sampling, Vm};

use super::item::{Counts, Item, Judged, Verdict, What};
use crate::outcome::{Path, Side};

/// Who runs the pre-filter's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Prefiltering {
    /// A virtual machine: the committed bytecode, checked, without the kernel
    #[default]
    Vm,
    /// This kernel, as root, packet by packet: the same bytecode, attached nowhere. Packets longer than a page, which
    /// it cannot be given, are left to the engine
    #[cfg(feature = "kernel")]
    Kernel,
    /// Nobody: the engine alone judges
    Off,
}

impl Prefiltering {
    /// Tells whether the program can be run that way here.
    ///
    /// # Errors
    ///
    /// What the kernel has against it, with the way out.
    pub fn check(self) -> Result<(), Error> {
        Program::new(self).map(drop)
    }
}

/// A worker's pre-filter. Its shards share it: they meet packets and changes of policy in one order.
pub(super) struct Filter {
    program: Program,
    policies: Arc<[Arc<Policy>]>,
    /// Index of the policy whose lists it holds; `None` before the first packet.
    policy: Option<u16>,
    /// Index of the policy in force.
    in_force: u16,
    /// When the capture started, in nanoseconds since the Unix epoch.
    pub(super) started: u64,
}

/// The program, where it runs.
enum Program {
    Vm(Box<Vm>),
    #[cfg(feature = "kernel")]
    Kernel(Box<Prefilter<Kernel>>),
    Off,
}

/// What the pre-filter made of a packet.
#[derive(Debug, Clone, Copy)]
pub(super) enum Seen {
    Passed,
    /// By a list entry.
    Dropped(Option<RuleRef>),
    /// The program did what the kernel would not have let it do, or the kernel did not run it.
    Failed,
}

impl Program {
    fn new(kind: Prefiltering) -> Result<Self, Error> {
        match kind {
            Prefiltering::Vm => Ok(Self::Vm(Box::new(Vm::simulated(Sampling::default())?))),
            #[cfg(feature = "kernel")]
            Prefiltering::Kernel => {
                // Of a run by itself, events alone tell the rule.
                let options = Options {
                    sampling: Sampling::ALL,
                    ..Options::default()
                };
                Ok(Self::Kernel(Box::new(Prefilter::load(options)?)))
            }
            Prefiltering::Off => Ok(Self::Off),
        }
    }
}

impl Filter {
    pub(super) fn new(kind: Prefiltering, policies: &Arc<[Arc<Policy>]>) -> Result<Self, Error> {
        Ok(Self {
            program: Program::new(kind)?,
            policies: Arc::clone(policies),
            policy: None,
            in_force: 0,
            started: 0,
        })
    }

    /// Has the program look at an item's frame, if it is one of a client's, or changes the policy. Items come in order.
    pub(super) fn look_at(&mut self, item: &Item, bytes: &[u8]) -> Option<Seen> {
        let packet = match &item.what {
            What::Packet(Side::Client, _, packet) if !packet.is_reassembled => packet,
            What::ClientFragment(packet) => packet,
            What::Policy(index) => {
                self.in_force = *index;
                return None;
            }
            _ => return None,
        };
        let frame = packet.frame as usize..packet.ip().end;
        self.look(item.time, &bytes[frame])
    }

    /// Has the program look at a frame, with the lists of the policy in force as they stand at `now`. `None` where it
    /// cannot be asked.
    fn look(&mut self, now: Timestamp, frame: &[u8]) -> Option<Seen> {
        let policy = self.in_force;
        let unix_seconds = self.started.saturating_add(now.as_nanos()) / 1_000_000_000;
        let is_new = self.policy.replace(policy) != Some(policy);
        let lists = is_new.then(|| &*self.policies[usize::from(policy)]);
        let judged = match &mut self.program {
            Program::Vm(vm) => judge(vm, lists, unix_seconds, frame),
            #[cfg(feature = "kernel")]
            Program::Kernel(kernel) => judge(kernel, lists, unix_seconds, frame),
            Program::Off => return None,
        };
        match judged {
            Ok(seen) => Some(seen),
            #[cfg(feature = "kernel")]
            Err(Error::Kernel(KernelError::FrameLength { .. })) => None,
            Err(_) => Some(Seen::Failed),
        }
    }
}

/// Brings lists up to date, and runs the program.
fn judge<B: Backend>(
    prefilter: &mut Prefilter<B>,
    lists: Option<&Policy>,
    unix_seconds: u64,
    frame: &[u8],
) -> Result<Seen, Error> {
    if let Some(policy) = lists {
        prefilter.apply(policy.spec(), unix_seconds)?;
    } else if prefilter.next_expiry().is_some_and(|due| due <= unix_seconds) {
        prefilter.expire(unix_seconds)?;
    }
    let verdict = prefilter.run(frame)?;
    Ok(match verdict.action {
        Action::Pass => Seen::Passed,
        Action::Drop => Seen::Dropped(verdict.rule),
    })
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
