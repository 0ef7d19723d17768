//! The process that relays: an ordinary user's, without capabilities and without files to read.
//!
//! Everything it needs comes from the supervisor over the [link](crate::link): the device's queues, sockets with marks,
//! the policy, the journal. It ends when it is told to, and when the supervisor is gone.

mod privilege;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigHandler, Signal, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{interval, timeout};
use tungate_config::Egress;
use tungate_engine::Policy;
use tungate_engine::policy::PolicySpec;

use crate::bypass::{Lines, Watcher};
use crate::commands::{closed, report, runtime};
use crate::control::{Asked, Current, Done, ListChange, Lists, Refused, Server};
use crate::driver::{Device, Driver, Message, Report, Settings};
use crate::egress::{Dialer, Egresses};
use crate::link::{Link, News, Order, Start, Ways, receive_descriptors};
use crate::logs;
use crate::upstream::Broker;

/// How often the wall clock is compared with ours, and what difference counts as its having been set.
const CLOCK_CHECK: Duration = Duration::from_secs(10);
const CLOCK_STEP: Duration = Duration::from_millis(500);
/// How long bypassed flows may take to end, and how often that is looked at.
const RELEASE_TIME: Duration = Duration::from_secs(3);
const RELEASE_CHECK: Duration = Duration::from_millis(20);
/// What the control socket may ask of the supervisor before it has answered.
const ASKS_MAX: usize = 32;

/// Runs the worker; the link is its standard input.
///
/// # Errors
///
/// If it cannot take its place.
pub(crate) fn run() -> Result<ExitCode> {
    rustix::thread::set_name(c"tungate worker")?;
    privilege::drop_privileges()?;
    // After the change of the user, which resets it. If the supervisor is gone already, the link is closed.
    set_pdeathsig(Signal::SIGKILL).context("cannot follow the supervisor")?;
    for ignored in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: to ignore a signal runs no code of ours.
        unsafe { signal(ignored, SigHandler::SigIgn) }.context("cannot leave signals to the supervisor")?;
    }
    // SAFETY: the supervisor has made standard input one end of the link, and nobody else uses it.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
    let descriptors = receive_descriptors(&stream).context("the supervisor has sent nothing")?;
    runtime()?.block_on(async {
        let mut link = Link::new(stream)?;
        let Some(Order::Start(start)) = link.receive().await? else {
            return Ok(ExitCode::FAILURE); // the supervisor has gone
        };
        logs::to_stderr(start.json_log);
        let _last_lines = logs::start_writer().context("cannot start a thread")?;
        match work(*start, descriptors, &mut link).await {
            Ok(()) => Ok(ExitCode::SUCCESS),
            Err(error) => {
                link.send(&News::Failed(format!("{error:#}"))).await?;
                Ok(ExitCode::FAILURE)
            }
        }
    })
}

/// Relays until told to end, or until the supervisor is gone.
async fn work(start: Start, descriptors: Vec<OwnedFd>, link: &mut Link) -> Result<()> {
    let mut descriptors = descriptors.into_iter();
    let line = descriptors.next().context("there is no line for sockets")?;
    let mut last = |is_there: bool| is_there.then(|| descriptors.next_back()).flatten();
    let control = last(start.has_control).map(UnixListener::from);
    let journal = last(start.has_journal).map(File::from);
    let log = last(start.has_bypass);
    let asked = last(start.has_bypass);
    let bypass = asked
        .zip(log)
        .map(|(line, log)| Watcher::new(Lines { line, log }));
    let device = Device {
        queues: descriptors.collect(),
        layer: start.layer,
        udp_segmentation: start.udp_segmentation,
    };
    let broker = Broker::new(line, start.mark)?;
    let egresses = prepare(&start.ways.egresses, &broker).await?;
    let policy = Arc::new(Policy::new(start.ways.policy));
    let driver = Driver::start(Settings {
        config: start.engine,
        policy: policy.clone(),
        egresses: egresses.clone(),
        dialer: Dialer::new(tokio::runtime::Handle::current()),
        device,
        bypass,
        journal,
    })
    .context("cannot start the driver")?;
    let shards = driver.shards();
    let (current, watched) = watch::channel(Current {
        policy,
        added: start.ways.added,
        egresses: start.ways.egresses.into(),
        draining: false,
    });
    let (asks, asked) = mpsc::channel(ASKS_MAX);
    if let Some(listener) = control {
        let server = Server {
            asker: driver.asker(),
            shards,
            current: watched,
            asks,
        };
        server
            .start(listener)
            .context("cannot serve the control socket")?;
    }
    link.send(&News::Started { shards }).await?;
    let mut worker = Worker {
        driver,
        broker,
        egresses,
        current,
        asked,
        waiting: BTreeMap::new(),
        next_number: 0,
        undrained: 0,
        unheard: 0,
    };
    let result = worker.obey(link).await;
    worker.end().await;
    result
}

/// Makes ways out ready to be used.
async fn prepare(configured: &[Egress], broker: &Arc<Broker>) -> Result<Arc<Egresses>> {
    let egresses = Arc::new(Egresses::new(configured, Some(broker))?);
    egresses.look_up_proxies().await;
    egresses.watch(&tokio::runtime::Handle::current());
    Ok(egresses)
}

struct Worker {
    driver: Driver,
    broker: Arc<Broker>,
    egresses: Arc<Egresses>,
    current: watch::Sender<Current>,
    /// What the control socket asks of the supervisor; closed if there is none.
    asked: mpsc::Receiver<Asked>,
    /// Who waits for the supervisor's answer with a number.
    waiting: BTreeMap<u64, oneshot::Sender<Result<Done, Refused>>>,
    next_number: u64,
    /// Shards that have open flows, once they are to finish them.
    undrained: usize,
    /// Shards that have not been heard of since the last check.
    unheard: usize,
}

impl Worker {
    /// Does as it is told.
    ///
    /// # Errors
    ///
    /// If a shard ends by itself, or the supervisor cannot be understood.
    async fn obey(&mut self, link: &mut Link) -> Result<()> {
        let mut clock_checks = interval(CLOCK_CHECK);
        let mut offset = self.driver.clock.wall_offset();
        loop {
            tokio::select! {
                order = link.receive() => match order? {
                    None | Some(Order::End) => return Ok(()),
                    Some(Order::Start(_)) => bail!("there is no starting twice"),
                    Some(Order::Replace(ways)) => {
                        self.replace(ways).await?;
                        link.send(&News::Replaced).await?;
                    }
                    Some(Order::Change(change)) => {
                        self.change(&change).await?;
                        link.send(&News::Replaced).await?;
                    }
                    Some(Order::Answer(number, answer)) => {
                        if let Some(waiting) = self.waiting.remove(&number) {
                            let _ = waiting.send(answer); // nobody waits any more
                        }
                    }
                    Some(Order::Check) => {
                        self.unheard = self.driver.shards();
                        self.driver.tell(|| Message::Check);
                    }
                    Some(Order::Drain) => {
                        self.undrained = self.driver.shards();
                        self.driver.tell(|| Message::Drain);
                        self.current.send_modify(|current| current.draining = true);
                    }
                },
                Some((ask, waiting)) = self.asked.recv() => {
                    self.waiting.insert(self.next_number, waiting);
                    link.send(&News::Asked(self.next_number, ask)).await?;
                    self.next_number += 1;
                }
                _ = clock_checks.tick() => {
                    let now = self.driver.clock.wall_offset();
                    if now.abs_diff(offset) > CLOCK_STEP.as_nanos() as u64 {
                        offset = now;
                        self.driver.tell(|| Message::WallClock(now));
                    }
                }
                report = self.driver.report() => match report {
                    Report::Drained => {
                        self.undrained -= 1;
                        if self.undrained == 0 {
                            link.send(&News::Drained).await?;
                        }
                    }
                    Report::Alive => {
                        self.unheard -= 1;
                        if self.unheard == 0 {
                            link.send(&News::Alive).await?;
                        }
                    }
                    Report::Ended(Err(error)) => bail!("a shard has failed: {error}"),
                    Report::Ended(Ok(_)) => bail!("a shard has ended"),
                },
            }
        }
    }

    /// Puts another policy into force.
    async fn replace(&mut self, ways: Ways) -> Result<()> {
        self.egresses = prepare(&ways.egresses, &self.broker).await?;
        self.put_into_force(ways.policy, ways.added).await;
        self.current
            .send_modify(|current| current.egresses = ways.egresses.into());
        Ok(())
    }

    /// Puts other lists into force.
    ///
    /// # Errors
    ///
    /// If the supervisor's lists are others than ours, which is a bug.
    async fn change(&mut self, change: &ListChange) -> Result<()> {
        let Current { policy, added, .. } = self.current.borrow().clone();
        let mut spec = policy.spec().clone();
        let mut lists = Lists {
            entries: std::mem::take(&mut spec.lists),
            added,
        };
        if let Err(missing) = lists.change(change) {
            bail!("the lists have no {missing:?}, though the supervisor's have");
        }
        spec.lists = lists.entries;
        self.put_into_force(spec, lists.added).await;
        Ok(())
    }

    /// Returns when all shards act by the policy.
    async fn put_into_force(&mut self, spec: PolicySpec, added: usize) {
        let policy = Arc::new(Policy::new(spec));
        self.driver
            .tell(|| Message::Policy(policy.clone(), self.egresses.clone()));
        self.driver.asker().totals().await; // they answer in the order in which they are told and asked
        self.current.send_modify(|current| {
            current.policy = policy;
            current.added = added;
        });
    }

    /// Waits, but not for long, until no flow is open: the kernel forgets bypassed ones in its own time.
    async fn until_released(&self) {
        let released = async {
            let mut checks = interval(RELEASE_CHECK);
            loop {
                checks.tick().await;
                let totals = self.driver.asker().totals().await;
                if totals.iter().all(|totals| totals.open_flows == 0) {
                    return;
                }
            }
        };
        if timeout(RELEASE_TIME, released).await.is_err() {
            tracing::warn!("the kernel has not told the ends of all flows that it carried");
        }
    }

    /// Resets what is still open, and ends.
    async fn end(self) {
        let policy = Arc::new(Policy::new(closed()));
        if let Ok(egresses) = Egresses::new(&[], None).map(Arc::new) {
            self.driver
                .tell(|| Message::Policy(policy.clone(), egresses.clone()));
        }
        if self.driver.has_bypass() {
            self.until_released().await;
        }
        report(&self.driver.stop().await);
    }
}
