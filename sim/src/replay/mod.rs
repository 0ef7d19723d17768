//! Replays a capture through the engine, on the capture's own clock.
//!
//! ```text
//!              ┌─ dispatcher ─┐        ┌─ worker ──────────────────┐        ┌─ caller ─┐
//!  capture ──▶ │ who, where   │ items  │ shard: peers ⇄ engine     │ output │ in order │ ──▶ sink
//!              │ to which one │ ─────▶ │ shard: peers ⇄ engine   … │ ─────▶ │          │
//!              └──────────────┘        └───────────────────────────┘        └──────────┘
//! ```
//!
//! The dispatcher reads the capture in file order, finds out which side sent each packet (`roles`), mends what
//! capturing has done to it (`repair`), and hands it to the shard that owns its conversation. A shard is an engine
//! with modelled peers around it (`shard`, `tcp`, `datagram`): packets from clients go into the engine, packets
//! from targets are the script for modelled upstreams. There are always 16 shards, spread over as many threads as are
//! wanted, and a shard's play depends on nothing but its own items: so does the result.
//!
//! Work goes round in *epochs*, some hundreds of packets each: the dispatcher sends every worker its batch, the workers
//! hand back what they have found, and the caller puts that in order (`merge`). An epoch's end is a point in time that
//! every shard has reached, so order needs no look ahead, and memory is bounded by the few epochs under way and the
//! flows that are open.
//!
//! At one instant a change of policy comes first, then packets in file order (captured from either side), then what is
//! due: the models' timers and the engine's deadlines.

mod ahead;
mod card;
mod datagram;
mod digest;
mod dispatch;
mod fragments;
mod host;
mod item;
mod journal;
mod merge;
mod prefilter;
mod repair;
mod roles;
mod shard;
mod stage;
mod stream;
mod tcp;
#[cfg(test)]
mod tests;
mod timer;
mod transcript;
mod worker;

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::sync::mpsc::{channel, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;

use ipnet::IpNet;
use tungate_engine::config::Clients;
use tungate_engine::recovery::CongestionControl;
use tungate_engine::{Config, Policy, Timestamp};

use self::dispatch::Dispatcher;
pub use self::journal::{Repeated, repeat};
use self::merge::Merge;
use self::prefilter::Filter;
pub use self::prefilter::Prefiltering;
pub use self::repair::Checksums;
use self::shard::Setup;
use self::stage::Wanted;
use self::worker::Worker;
use crate::capture::{Capture, Damage};
use crate::outcome::{Sink, Totals};

/// How many shards there are, whatever the number of threads.
pub const SHARDS: u8 = 16;

/// The seed of every replay's engines.
pub const SEED: [u8; 32] = *b"tungate replays are reproducible";

/// Batches on their way to one worker, and outputs on their way back. More of them would be more memory to begin with.
const DEPTH: usize = 2;

/// What to do about TCP whose SYN was not captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Midstream {
    /// Shakes hands for it just before its first packet
    #[default]
    Adopt,
    /// Gives its packets to the engine as they are, which knows no such connection
    Refuse,
}

/// Congestion control towards clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Congestion {
    /// Only the client's window limits what is sent
    #[default]
    None,
    /// As towards clients behind a network: by losses
    Cubic,
    /// As towards clients behind a network: by a model of the path
    Bbr,
}

/// How to replay.
#[derive(Debug, Clone)]
pub struct Options {
    /// The policy at the start.
    pub policy: Arc<Policy>,
    /// Policies that take over, each at its time on the capture's clock, before the packets of that time.
    pub changes: Vec<(Timestamp, Arc<Policy>)>,
    /// Sizes, limits and times for the whole appliance; each shard gets its share. Its shard numbers do not matter.
    pub config: Config,
    /// Networks whose addresses count as clients; all do if it is empty.
    pub clients: Vec<IpNet>,
    /// What to do about TCP whose SYN was not captured.
    pub midstream: Midstream,
    /// How wrong checksums are judged.
    pub checksums: Checksums,
    /// Congestion control towards clients.
    pub congestion: Congestion,
    /// Who runs the pre-filter's program. The digest does not depend on it.
    pub prefilter: Prefiltering,
    /// Threads for the shards; one per processor by default. The result does not depend on it.
    pub jobs: Option<NonZeroUsize>,
    /// What the engines' hash keys and sequence numbers are made from.
    pub seed: [u8; 32],
}

impl Default for Options {
    fn default() -> Self {
        Self {
            policy: Arc::new(Policy::new(tungate_engine::policy::PolicySpec::default())),
            changes: Vec::new(),
            config: Config::default(),
            clients: Vec::new(),
            midstream: Midstream::default(),
            checksums: Checksums::default(),
            congestion: Congestion::default(),
            prefilter: Prefiltering::default(),
            jobs: None,
            seed: SEED,
        }
    }
}

/// How far a replay has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Packets read.
    pub packets: u64,
    /// Bytes of the capture's file that reading has got through; see [`Capture::position`].
    pub bytes: u64,
}

/// What a replay comes to, besides what the sink was given.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Counts of the whole capture.
    pub totals: Totals,
    /// Judged packets by what decided about them or their flow.
    pub by_rule: BTreeMap<String, u64>,
    /// Dropped packets by reason.
    pub by_reason: BTreeMap<&'static str, u64>,
    /// BLAKE3, in hex, over everything that left the engines.
    pub digest: String,
    /// Where the capture could not be read on, and why.
    pub damaged: Option<Damage>,
}

/// Replays `capture`, and writes all that enters the engines to `journal`, if there is one.
///
/// Memory is bounded by the flows that are open at one time on the capture's clock.
///
/// # Errors
///
/// When the journal cannot be written, or the kernel does not take the pre-filter. What is wrong with packets or the
/// capture is part of the outcome.
pub fn run(
    capture: &mut Capture,
    options: &Options,
    journal: Option<&mut dyn io::Write>,
    sink: &mut dyn Sink,
    progress: &mut dyn FnMut(Progress),
) -> io::Result<Outcome> {
    run_with(capture, options, journal, sink, progress, |setup| setup)
}

/// Replays with shards that are set up in a particular way.
fn run_with(
    capture: &mut Capture,
    options: &Options,
    mut journal: Option<&mut dyn io::Write>,
    sink: &mut dyn Sink,
    progress: &mut dyn FnMut(Progress),
    adapt: impl FnOnce(Setup) -> Setup,
) -> io::Result<Outcome> {
    let config = engine_config(options);
    if let Some(journal) = &mut journal {
        journal::write_header(&config, options, *journal)?;
    }
    let policies: Arc<[_]> = std::iter::once(&options.policy)
        .chain(options.changes.iter().map(|(_, policy)| policy))
        .map(Arc::clone)
        .collect();
    let started = OnceLock::new();
    let setup = adapt(Setup {
        config,
        seed: options.seed,
        policies: Arc::clone(&policies),
        checksums: options.checksums,
        midstream: options.midstream,
        wanted: Wanted {
            packets: sink.wants_packets(),
            emitted: sink.wants_emitted(),
            lines: sink.wants_lines(),
        },
        journal: journal.is_some(),
        started: 0,
        #[cfg(test)]
        tamper: None,
    });
    let jobs = options
        .jobs
        .or_else(|| thread::available_parallelism().ok())
        .map_or(1, NonZeroUsize::get)
        .min(usize::from(SHARDS));
    let filters = (0..jobs).map(|_| Filter::new(options.prefilter, &policies));
    let filters: Vec<Filter> = filters.collect::<Result<_, _>>().map_err(io::Error::other)?;
    thread::scope(|scope| {
        let (mut to_workers, mut outputs, mut workers) = (Vec::new(), Vec::new(), Vec::new());
        let mut replies = Vec::new();
        for (index, filter) in filters.into_iter().enumerate() {
            let (batches, work) = sync_channel(DEPTH);
            let (found, output) = sync_channel(DEPTH);
            let (reply, answers) = sync_channel(1);
            let worker = Worker {
                index,
                jobs,
                setup: &setup,
                filter,
                started: &started,
                work,
                found,
                reply,
            };
            workers.push(scope.spawn(move || worker.run()));
            to_workers.push(batches);
            outputs.push(output);
            replies.push(answers);
        }
        let (epochs, seen) = sync_channel(DEPTH);
        let (spend, spent) = channel();
        let dispatcher = Dispatcher::new(options, to_workers, replies, epochs, spent, &started);
        let dispatching = scope.spawn(move || dispatcher.run(capture));
        let merged = Merge::new(&policies, setup.wanted, outputs, spend).run(&seen, journal, sink, progress);
        drop(seen);
        let (mut counts, damaged) = join(dispatching);
        let mut hashes = vec![[0; 32]; usize::from(SHARDS)];
        for worker in workers {
            let done = join(worker);
            counts.merge(done.counts);
            for (shard, hash) in done.hashes {
                hashes[usize::from(shard.0)] = hash;
            }
        }
        merged?;
        Ok(counts.outcome(&policies, digest::combine(&hashes), damaged))
    })
}

/// Waits for a thread; its panic is ours.
fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What each shard's engine is told, but for its number.
fn engine_config(options: &Options) -> Config {
    Config {
        shards: SHARDS,
        clients: match options.congestion {
            Congestion::None => Clients::Local,
            Congestion::Cubic | Congestion::Bbr => Clients::Routed,
        },
        congestion: Some(match options.congestion {
            Congestion::None => CongestionControl::None,
            Congestion::Cubic => CongestionControl::Cubic,
            Congestion::Bbr => CongestionControl::Bbr,
        }),
        limits: options.config.limits.share(SHARDS),
        ..options.config.clone()
    }
}
