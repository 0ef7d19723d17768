//! The driver: threads that carry packets between a device, engines and sockets.

mod clock;
mod denials;
mod device;
mod ethernet;
mod exchange;
mod gathered;
mod machine;
mod questions;
mod shard;
mod world;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::mpsc;
use tungate_engine::bypass::BypassNews;
use tungate_engine::journal::Header;
use tungate_engine::shard::owner_of_tcp;
use tungate_engine::{Config, Counters, Policy, ShardId};

pub(crate) use clock::{Clock, unix_time};
pub(crate) use device::{Device, Layer, TAP_MAC, TRANSMIT_QUEUE_LEN};
pub(crate) use exchange::{Mailbox, Message};
pub(crate) use machine::{Journal, Machine};
pub(crate) use questions::{Asker, FlowReport, RuleCounts};

use crate::bypass::{Asking, Watcher};
use crate::egress::{Dialer, Egresses};

/// More shards than this share a machine's memory bandwidth, not its cores.
const SHARDS_MAX: usize = 4;

/// How many shards this host should have.
pub(crate) fn default_shards() -> u8 {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().min(SHARDS_MAX)) as u8
}

/// What a driver is started with.
pub(crate) struct Settings {
    /// For the whole appliance; each shard gets its share.
    pub(crate) config: Config,
    pub(crate) policy: Arc<Policy>,
    pub(crate) egresses: Arc<Egresses>,
    pub(crate) dialer: Dialer,
    pub(crate) device: Device,
    /// What follows flows that the kernel carries, where it does.
    pub(crate) bypass: Option<(Watcher, Asking)>,
    /// An empty file to write a journal to.
    pub(crate) journal: Option<File>,
}

/// What shards report.
#[derive(Debug)]
pub(crate) enum Report {
    /// A shard that drains has no more TCP flows.
    Drained,
    /// A shard has seen [`Message::Check`].
    Alive,
    /// A shard has ended.
    Ended(Result<Box<Totals>, String>),
}

/// What a shard has counted.
#[derive(Debug)]
pub(crate) struct Totals {
    pub(crate) counters: Counters,
    /// Packets dropped by list entries and rules, also those of policies before.
    pub(crate) by_rule: RuleCounts,
    /// Flows that are open.
    pub(crate) open_flows: usize,
    /// Bytes of TCP buffers that flows have.
    pub(crate) buffer_bytes: u64,
    /// Flows that were left to the kernel.
    pub(crate) bypassed: u64,
    /// Packets that the device refused.
    pub(crate) lost_by_device: u64,
    /// Packets that found another shard too busy.
    pub(crate) lost_between_shards: u64,
}

/// The running shards.
pub(crate) struct Driver {
    threads: Vec<JoinHandle<()>>,
    mailboxes: Arc<[Arc<Mailbox>]>,
    reports: mpsc::UnboundedReceiver<Report>,
    bypass: Option<Asking>,
    journal: Option<Journal>,
    pub(crate) clock: Clock,
}

impl Driver {
    /// Starts a thread for each queue of the device.
    ///
    /// # Errors
    ///
    /// If the system has no more descriptors or threads, or the journal cannot be written.
    pub(crate) fn start(settings: Settings) -> io::Result<Self> {
        let Settings {
            config,
            policy,
            egresses,
            dialer,
            device,
            bypass,
            journal,
        } = settings;
        let (watcher, asking) = bypass.unzip();
        let clock = Clock::start();
        let start = clock.now();
        let shards = device.queues.len() as u8;
        let config = Config {
            shards,
            shard: ShardId(0),
            limits: config.limits.share(shards),
            ..config
        };
        let mut seed = [0; 32];
        getrandom::fill(&mut seed)?;
        let journal = match journal {
            None => None,
            Some(file) => {
                let header = Header {
                    config: config.clone(),
                    policy: policy.spec().clone(),
                    seed,
                    start,
                };
                Some(Journal::start(file, &header)?)
            }
        };
        let mut polls = Vec::new();
        let mut mailboxes = Vec::new();
        for _ in 0..shards {
            let (poll, mailbox) = shard::prepare()?;
            polls.push(poll);
            mailboxes.push(Arc::new(mailbox));
        }
        let mailboxes: Arc<[_]> = mailboxes.into();
        let buffers = Arc::new(exchange::Buffers::new());
        let (sender, reports) = mpsc::unbounded_channel();
        let mut threads = Vec::new();
        for (index, (queue, poll)) in device.queues.into_iter().zip(polls).enumerate() {
            let parts = shard::Parts {
                config: Config {
                    shard: ShardId(index as u8),
                    ..config.clone()
                },
                policy: policy.clone(),
                egresses: egresses.clone(),
                seed,
                start,
                clock,
                journal: journal.clone(),
                queue,
                layer: device.layer,
                udp_segmentation: device.udp_segmentation,
                poll,
                mailboxes: mailboxes.clone(),
                buffers: buffers.clone(),
                dialer: dialer.clone(),
                bypass: asking.clone(),
                reports: sender.clone(),
            };
            let end = EndReport::new(sender.clone());
            let run = move || end.finish(shard::run(parts));
            threads.push(
                std::thread::Builder::new()
                    .name(format!("shard {index}"))
                    .spawn(run)?,
            );
        }
        if let Some(watcher) = watcher {
            let mailboxes = mailboxes.clone();
            let tell = move |news: BypassNews| {
                let owner = owner_of_tcp(news.ends.client, news.ends.target, shards);
                mailboxes[usize::from(owner.0)].send(Message::Bypass(news));
            };
            // Reports end with the shards, whatever this thread does.
            let reports = sender.downgrade();
            let fail = move |why| {
                if let Some(reports) = reports.upgrade() {
                    let _ = reports.send(Report::Ended(Err(why)));
                }
            };
            watcher.start(shard::INGRESS, tell, fail)?;
        }
        Ok(Self {
            threads,
            mailboxes,
            reports,
            bypass: asking,
            journal,
            clock,
        })
    }

    /// Tells all shards something.
    pub(crate) fn tell(&self, message: impl Fn() -> Message) {
        for mailbox in self.mailboxes.iter() {
            mailbox.send(message());
        }
    }

    /// Asks the shards.
    pub(crate) fn asker(&self) -> Asker {
        Asker::new(self.mailboxes.clone(), self.bypass.clone())
    }

    /// Whether the kernel carries flows.
    pub(crate) fn has_bypass(&self) -> bool {
        self.bypass.is_some()
    }

    /// How many shards there are.
    pub(crate) fn shards(&self) -> usize {
        self.mailboxes.len()
    }

    /// The next report of any shard.
    pub(crate) async fn report(&mut self) -> Report {
        match self.reports.recv().await {
            Some(report) => report,
            None => std::future::pending().await, // each shard's end has been reported
        }
    }

    /// Ends all shards and returns what they have counted. Nothing of their flows is left.
    pub(crate) async fn stop(mut self) -> Vec<Totals> {
        self.tell(|| Message::Stop);
        let mut totals = Vec::new();
        // The shards' senders go with them.
        while let Some(report) = self.reports.recv().await {
            match report {
                Report::Ended(Ok(counted)) => totals.push(*counted),
                Report::Ended(Err(error)) => tracing::error!(error, "a shard has failed"),
                Report::Drained | Report::Alive => {}
            }
        }
        for thread in self.threads {
            let _ = thread.join(); // a panic has been reported
        }
        if let Some(Err(error)) = self.journal.map(|journal| journal.finish()) {
            tracing::error!(%error, "the journal cannot be written to its end");
        }
        totals
    }
}

/// Reports a shard's end, also when it panics.
struct EndReport {
    reports: mpsc::UnboundedSender<Report>,
    result: Result<Box<Totals>, String>,
}

impl EndReport {
    fn new(reports: mpsc::UnboundedSender<Report>) -> Self {
        Self {
            reports,
            result: Err("it panicked, which is a bug worth a report".to_owned()),
        }
    }

    fn finish(mut self, result: io::Result<Totals>) {
        self.result = result.map(Box::new).map_err(|error| error.to_string());
    }
}

impl Drop for EndReport {
    fn drop(&mut self) {
        let result = std::mem::replace(&mut self.result, Err(String::new()));
        let _ = self.reports.send(Report::Ended(result));
    }
}
