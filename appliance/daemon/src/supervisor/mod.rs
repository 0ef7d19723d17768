//! The privileged process: it sets the host up, starts the worker that relays, and undoes everything at the end.
//!
//! No packet and no byte of a flow comes here. What the worker cannot do for lack of privilege is done for it: opening
//! the device, opening marked and transparent sockets ([`sockets`]), reading the configuration and password files,
//! changing rules when marks change. The two talk over the [link](crate::link).
//!
//! When the worker dies, nobody serves the device, so that the routes to it step back behind those that refuse (see
//! `host::plan`). The supervisor ends then, with the refusal in place: what starts it again removes it first. Where the
//! operator prefers traffic to go its usual way, everything is undone.

mod changes;
mod prefilter;
mod process;
mod signals;
mod sockets;

use std::collections::{BTreeSet, VecDeque};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sd_notify::NotifyState;
use tokio::time::{Interval, MissedTickBehavior, interval, timeout};
use tungate_config::{Control, Egress, Loaded, Prefilter};

use self::prefilter::Prefilters;
use self::process::Process;
use self::signals::{Request, Signals};
use self::sockets::Allowed;
use crate::bypass::Keeper;
use crate::cli;
use crate::commands::{capture_of, create_journal, explain_device};
use crate::control::{Ask, Lists, Socket};
use crate::driver::{Layer, default_shards};
use crate::egress::read_passwords;
use crate::host::{Capture, HostSetup, MARK};
use crate::link::{News, Order, Start, Ways};

/// How long open flows may go on after the request to end.
const DRAIN_TIME: Duration = Duration::from_secs(10);

/// Runs the appliance on this host to its end.
///
/// # Errors
///
/// If the host cannot be set up, or the worker fails. Then traffic that was captured is refused, unless `arguments`
/// ask for something else.
pub(crate) async fn run(arguments: &cli::Run, loaded: Loaded) -> Result<ExitCode> {
    // Signals are taken from here on, so that an early one does not leave a host half set up.
    let mut signals = Signals::listen()?;
    let mut setup = HostSetup::begin().await?;
    let result = supervise(arguments, loaded, &mut setup, &mut signals).await;
    notify(&[NotifyState::Stopping]);
    if result.is_err() && setup.captures() && !arguments.fail_open {
        // What was to be relayed must not go its usual way unseen.
        tracing::error!("traffic is refused until the next `tungate run`, or `tungate cleanup`");
        return result.map(|()| ExitCode::FAILURE);
    }
    let undone = setup.undo().await;
    result.and(undone).map(|()| ExitCode::SUCCESS)
}

/// The marks of packets that the appliance's own sockets send.
pub(crate) fn marks(egresses: &[Egress]) -> BTreeSet<u32> {
    let configured = sockets::socket_options(egresses).filter_map(|options| options.mark);
    configured.chain([MARK]).collect()
}

async fn supervise(
    arguments: &cli::Run,
    mut loaded: Loaded,
    setup: &mut HostSetup,
    signals: &mut Signals,
) -> Result<()> {
    if arguments.tap || !arguments.from.is_empty() {
        // Behind an interface there is a network, which may lose packets.
        loaded.engine.clients = tungate_engine::config::Clients::Routed;
    }
    for interface in arguments.from.iter().chain(&arguments.bridge) {
        if nix::net::if_::if_nametoindex(interface.as_str()).is_err() {
            bail!("there is no interface {interface:?}: `ip link` lists them");
        }
    }
    read_passwords(&mut loaded.egresses)?;
    let journal = arguments.journal.as_deref().map(create_journal).transpose()?;
    let (layer, queues, persistent) = if arguments.tap {
        // One shard, which knows all neighbours. Without the device they have no way at all, let alone another.
        (Layer::Ethernet, 1, false)
    } else {
        (Layer::Ip, default_shards(), !arguments.fail_open)
    };
    let device = setup
        .create_device(layer, loaded.engine.mtu, queues, persistent)
        .map_err(explain_device)
        .context("cannot create the device")?;
    let capture = capture_of(arguments, &loaded);
    let (_keeper, bypass) = match capture.bypass {
        true => {
            let (keeper, lines) = Keeper::start(&capture.device, &capture.interfaces, &capture.opened())?;
            (Some(keeper), Some(lines))
        }
        false => (None, None),
    };
    setup.make(capture.preparation()).await?;
    if capture.bypass {
        setup.make(capture.accounting()).await?;
    }
    let allowed = Allowed::by(&loaded.egresses);
    let line = sockets::serve(allowed.clone()).context("cannot serve the relaying process")?;
    let prefilters = Prefilters::attach(&loaded.prefilter, &loaded.policy, &arguments.from)?;
    let mut control = Socket::open(&loaded.control)?;
    let settings = Lasting {
        engine: loaded.engine.clone(),
        prefilter: loaded.prefilter,
        control: loaded.control,
    };
    let lists = Lists {
        entries: loaded.policy.lists.clone(),
        added: 0,
    };
    let start = Start {
        json_log: arguments.json,
        engine: loaded.engine,
        ways: Ways {
            policy: loaded.policy,
            added: 0,
            egresses: loaded.egresses,
        },
        layer,
        udp_segmentation: device.udp_segmentation,
        has_bypass: bypass.is_some(),
        has_journal: journal.is_some(),
        has_control: control.is_some(),
        mark: MARK,
    };
    let control_fd = control.as_ref().and_then(Socket::fd);
    let mut worker = Process::start(start, line, device, bypass, journal, control_fd).await?;
    if let Some(control) = &mut control {
        control.hand_over();
    }
    // The worker looks names of proxies up before queries of names are captured themselves.
    let shards = tokio::select! {
        () = signals.end() => {
            worker.end().await;
            return Ok(());
        }
        news = worker.next() => match news? {
            News::Started { shards } => shards,
            news => bail!("the relaying process has begun with {news:?}"),
        },
    };
    setup.make(capture.rules()).await?;
    tracing::info!(
        device = capture.device,
        clients = if arguments.tap {
            "the Ethernet".to_owned()
        } else if arguments.from.is_empty() {
            "this host".to_owned()
        } else {
            arguments.from.join(", ")
        },
        shards,
        ipv6 = capture.address_v6.is_some(),
        bypass = capture.bypass.then_some(true),
        control = control
            .as_ref()
            .map(|control| control.path().display().to_string()),
        "relaying"
    );
    notify(&[NotifyState::Ready]);
    let mut running = Running {
        configuration: arguments.policy.config.as_deref(),
        settings,
        allowed,
        capture,
        lists,
        prefilters,
        worker,
        asked: VecDeque::new(),
        watchdog: Watchdog::new(),
    };
    let time = running.until_told(setup, signals).await?;
    notify(&[NotifyState::Stopping]);
    running.drain(time, signals).await;
    running.worker.end().await;
    Ok(())
}

struct Running<'a> {
    configuration: Option<&'a Path>,
    settings: Lasting,
    allowed: Allowed,
    capture: Capture,
    lists: Lists,
    prefilters: Prefilters,
    worker: Process,
    /// What the worker has asked while it was waited for something else.
    asked: VecDeque<(u64, Ask)>,
    watchdog: Watchdog,
}

/// Settings that last as long as the process.
#[derive(Debug, PartialEq)]
struct Lasting {
    engine: tungate_engine::Config,
    prefilter: Prefilter,
    control: Control,
}

impl Running<'_> {
    /// Serves until somebody asks for the end; returns how long open flows may go on then.
    ///
    /// # Errors
    ///
    /// If the worker fails.
    async fn until_told(&mut self, setup: &mut HostSetup, signals: &mut Signals) -> Result<Duration> {
        loop {
            while let Some((number, ask)) = self.asked.pop_front() {
                if let Some(time) = self.answer(number, ask, setup).await? {
                    return Ok(time);
                }
            }
            tokio::select! {
                request = signals.next() => match request {
                    Request::End => return Ok(DRAIN_TIME),
                    Request::Reload => self.reload_by_signal(setup).await,
                },
                () = self.watchdog.due() => self.worker.tell(&Order::Check).await?,
                () = self.prefilters.due() => self.prefilters.tick(),
                news = self.worker.next() => self.take_note(news?),
            }
        }
    }

    /// Takes note of news that nobody waits for.
    fn take_note(&mut self, news: News) {
        match news {
            News::Asked(number, ask) => self.asked.push_back((number, ask)),
            news => self.watchdog.note(&news),
        }
    }

    /// Lets open flows finish, for a while or until another signal.
    async fn drain(&mut self, time: Duration, signals: &mut Signals) {
        tracing::info!(
            seconds = time.as_secs(),
            "ending: open flows may finish, new ones are refused"
        );
        if self.worker.tell(&Order::Drain).await.is_err() {
            return; // it has died, and there is nothing to wait for
        }
        tokio::select! {
            () = signals.end() => {}
            _ = timeout(time, self.drained()) => {}
        }
    }

    /// Waits until no flow is left, or the worker has died.
    async fn drained(&mut self) {
        loop {
            while let Some((number, ask)) = self.asked.pop_front() {
                if self.answer_while_draining(number, ask).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                () = self.prefilters.due() => self.prefilters.tick(),
                news = self.worker.next() => match news {
                    Ok(News::Drained) | Err(_) => return,
                    Ok(news) => self.take_note(news),
                },
            }
        }
    }
}

/// Tells the service manager that everything goes on, as often as it wants to hear it, after each shard has said so.
struct Watchdog {
    checks: Option<Interval>,
    /// A check has not been answered yet.
    waiting: bool,
}

impl Watchdog {
    fn new() -> Self {
        let checks = sd_notify::watchdog_enabled().map(|period| {
            let mut checks = interval(period / 3);
            checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            checks
        });
        Self {
            checks,
            waiting: false,
        }
    }

    /// Waits until the worker is to be checked.
    async fn due(&mut self) {
        match &mut self.checks {
            Some(checks) if !self.waiting => {
                checks.tick().await;
                self.waiting = true;
            }
            Some(_) | None => std::future::pending().await,
        }
    }

    fn note(&mut self, news: &News) {
        if let News::Alive = news {
            self.waiting = false;
            notify(&[NotifyState::Watchdog]);
        }
    }
}

/// Tells the service manager, if there is one.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}

fn monotonic() -> NotifyState<'static> {
    NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Status("reloading"))
}
