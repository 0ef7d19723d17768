//! `tungate run`: the appliance on this host.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, interval, sleep_until};
use tungate_config::{EgressKind, Loaded, SocketOptions};
use tungate_engine::policy::{Action, PolicySpec, Rule, RuleMatch};
use tungate_engine::{DropReason, Policy};

use super::configuration;
use crate::driver::{Driver, Message, Report, Settings, TRANSMIT_QUEUE_LEN, Totals, default_shards};
use crate::egress::{Dialer, Egresses};
use crate::host::{self, Capture, DEVICE, HostSetup, MARK, device_addresses};
use crate::{cli, logs};

/// How long open flows may go on after the request to end.
const DRAIN_TIME: Duration = Duration::from_secs(10);
/// How often the wall clock is compared with ours, and what difference counts as its having been set.
const CLOCK_CHECK: Duration = Duration::from_secs(10);
const CLOCK_STEP: Duration = Duration::from_millis(500);

pub(super) fn run(arguments: &cli::Run) -> Result<ExitCode> {
    let loaded = configuration(arguments.policy.config.as_deref())?;
    if arguments.dry_run {
        return dry_run(arguments, &loaded);
    }
    logs::to_stderr(arguments.json);
    raise_descriptor_limit();
    runtime()?.block_on(async {
        // Signals are taken from here on, so that an early one does not leave a host half set up.
        let signals = Signals::listen()?;
        let mut setup = HostSetup::begin().await?;
        let result = serve(arguments, loaded, &mut setup, signals).await;
        if result.is_err() && setup.captures() && !arguments.fail_open {
            // What was to be relayed must not go its usual way unseen.
            tracing::error!("traffic is refused until the next `tungate run`, or `tungate cleanup`");
            return result;
        }
        let undone = setup.undo().await;
        result.and_then(|code| undone.map(|()| code))
    })
}

pub(super) fn clean_up() -> Result<ExitCode> {
    logs::to_stderr(false);
    runtime()?.block_on(host::clean_up())?;
    Ok(ExitCode::SUCCESS)
}

/// The runtime for everything but packets.
pub(super) fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")
}

/// Allows as many descriptors as the system does: each flow has a socket.
pub(super) fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Opens a journal that must not exist yet or be empty.
pub(super) fn create_journal(path: &Path) -> Result<std::fs::File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .with_context(|| format!("cannot write the journal {}", path.display()))
}

fn dry_run(arguments: &cli::Run, loaded: &Loaded) -> Result<ExitCode> {
    println!("ip tuntap add {DEVICE} mode tun vnet_hdr multi_queue");
    println!(
        "ip link set {DEVICE} mtu {} txqueuelen {TRANSMIT_QUEUE_LEN}",
        loaded.engine.mtu
    );
    let capture = capture(arguments, loaded);
    for change in capture.preparation().iter().chain(&capture.rules()) {
        println!("{change}");
    }
    Ok(ExitCode::SUCCESS)
}

fn capture(arguments: &cli::Run, loaded: &Loaded) -> Capture {
    let (address_v4, address_v6) = device_addresses(&loaded.engine);
    Capture {
        device: DEVICE.to_owned(),
        address_v4,
        address_v6: host::has_ipv6().then_some(address_v6),
        interfaces: arguments.from.clone(),
        marks: marks(loaded),
        fail_open: arguments.fail_open,
    }
}

/// The marks of the appliance's own packets.
fn marks(loaded: &Loaded) -> BTreeSet<u32> {
    let mark = |socket: &SocketOptions| socket.mark;
    let configured = loaded.egresses.iter().filter_map(|egress| match &egress.kind {
        EgressKind::Direct { socket } => mark(socket),
        EgressKind::Socks5(proxy) | EgressKind::Http(proxy) => mark(&proxy.socket),
        EgressKind::Group(_) => None,
    });
    configured.chain([MARK]).collect()
}

async fn serve(
    arguments: &cli::Run,
    mut loaded: Loaded,
    setup: &mut HostSetup,
    mut signals: Signals,
) -> Result<ExitCode> {
    if !arguments.from.is_empty() {
        // Behind an interface there is a network, which may lose packets.
        loaded.engine.clients = tungate_engine::config::Clients::Routed;
    }
    for interface in &arguments.from {
        if nix::net::if_::if_nametoindex(interface.as_str()).is_err() {
            bail!("there is no interface {interface:?}: `ip link` lists them");
        }
    }
    let runtime = tokio::runtime::Handle::current();
    let egresses = Arc::new(Egresses::new(&loaded, Some(MARK))?);
    // Before queries of names are captured themselves.
    egresses.look_up_proxies().await;
    egresses.watch(&runtime);
    let device = setup
        .create_device(loaded.engine.mtu, default_shards(), !arguments.fail_open)
        .map_err(explain_device)
        .context("cannot create the TUN device")?;
    let mut capture = capture(arguments, &loaded);
    let journal = arguments.journal.as_deref().map(create_journal).transpose()?;
    setup.make(capture.preparation()).await?;
    let policy = Arc::new(Policy::new(loaded.policy.clone()));
    let driver = Driver::start(Settings {
        config: loaded.engine.clone(),
        policy,
        egresses,
        dialer: Dialer::new(runtime),
        device,
        journal,
    })
    .context("cannot start the driver")?;
    setup.make(capture.rules()).await?;
    tracing::info!(
        device = capture.device,
        clients = if arguments.from.is_empty() {
            "this host".to_owned()
        } else {
            arguments.from.join(", ")
        },
        shards = driver.shards(),
        ipv6 = capture.address_v6.is_some(),
        "relaying"
    );
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    let mut running = Running {
        arguments,
        loaded,
        driver,
    };
    let result = running.until_told(setup, &mut capture, &mut signals).await;
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    if result.is_ok() {
        running.drain(&mut signals).await;
    }
    running.end().await;
    result.map(|()| ExitCode::SUCCESS)
}

struct Running<'a> {
    arguments: &'a cli::Run,
    loaded: Loaded,
    driver: Driver,
}

impl Running<'_> {
    /// Serves until a signal asks for the end.
    ///
    /// # Errors
    ///
    /// If a shard ends by itself.
    async fn until_told(
        &mut self,
        setup: &mut HostSetup,
        capture: &mut Capture,
        signals: &mut Signals,
    ) -> Result<()> {
        let mut clock_checks = interval(CLOCK_CHECK);
        let mut offset = self.driver.clock.wall_offset();
        loop {
            tokio::select! {
                request = signals.next() => match request {
                    Request::End => return Ok(()),
                    Request::Reload => self.reload(setup, capture).await,
                },
                _ = clock_checks.tick() => {
                    let now = self.driver.clock.wall_offset();
                    if now.abs_diff(offset) > CLOCK_STEP.as_nanos() as u64 {
                        offset = now;
                        self.driver.tell(|| Message::WallClock(now));
                    }
                }
                report = self.driver.report() => match report {
                    Report::Drained => {}
                    Report::Ended(Err(error)) => bail!("a shard has failed: {error}"),
                    Report::Ended(Ok(_)) => bail!("a shard has ended"),
                },
            }
        }
    }

    /// Reads the configuration again. If anything is wrong with it, the old policy stays.
    async fn reload(&mut self, setup: &mut HostSetup, capture: &mut Capture) {
        let _ = sd_notify::notify(&[NotifyState::Reloading, monotonic()]);
        match self.try_reload(setup, capture).await {
            Ok(()) => {
                let policy = &self.loaded.policy;
                tracing::info!(
                    lists = policy.lists.len(),
                    rules = policy.rules.len(),
                    "the policy has been replaced"
                );
            }
            Err(error) => {
                tracing::error!("the configuration is not used, and the policy stays as it was:\n{error:#}");
            }
        }
        let _ = sd_notify::notify(&[NotifyState::Ready]);
    }

    async fn try_reload(&mut self, setup: &mut HostSetup, capture: &mut Capture) -> Result<()> {
        let Some(path) = &self.arguments.policy.config else {
            bail!("this appliance runs without a configuration file: start it with --config");
        };
        let mut loaded = configuration(Some(path))?;
        loaded.engine.clients = self.loaded.engine.clients;
        let egresses = Arc::new(Egresses::new(&loaded, Some(MARK))?);
        egresses.look_up_proxies().await;
        let new = marks(&loaded);
        setup.make(capture.rules_of_marks(&new)).await?;
        if loaded.engine != self.loaded.engine {
            tracing::warn!("limits, timeouts and other settings of the engine take effect at the next start");
        }
        egresses.watch(&tokio::runtime::Handle::current());
        let policy = Arc::new(Policy::new(loaded.policy.clone()));
        self.driver
            .tell(|| Message::Policy(policy.clone(), egresses.clone()));
        let old = std::mem::replace(&mut capture.marks, new);
        setup.take_back(&capture.rules_of_marks(&old)).await?;
        self.loaded = loaded;
        Ok(())
    }

    /// Lets open flows finish, for a while or until another signal.
    async fn drain(&mut self, signals: &mut Signals) {
        tracing::info!(
            seconds = DRAIN_TIME.as_secs(),
            "ending: open flows may finish, new ones are refused"
        );
        self.driver.tell(|| Message::Drain);
        let deadline = Instant::now() + DRAIN_TIME;
        let mut left = self.driver.shards();
        while left > 0 {
            tokio::select! {
                Request::End = signals.next() => return,
                () = sleep_until(deadline) => return,
                report = self.driver.report() => match report {
                    Report::Drained => left -= 1,
                    Report::Ended(_) => return,
                },
            }
        }
    }

    /// Resets what is still open, and ends.
    async fn end(self) {
        let policy = Arc::new(Policy::new(closed()));
        let egresses = Egresses::new(&Loaded::default(), None).map(Arc::new);
        if let Ok(egresses) = egresses {
            self.driver
                .tell(|| Message::Policy(policy.clone(), egresses.clone()));
        }
        report(&self.driver.stop().await);
    }
}

/// A policy that ends every flow in a way that both sides notice.
pub(super) fn closed() -> PolicySpec {
    PolicySpec {
        rules: vec![Rule {
            name: "shutdown".to_owned(),
            matches: RuleMatch::default(),
            action: Action::Reject,
        }],
        ..PolicySpec::default()
    }
}

/// Logs what was counted.
pub(super) fn report(totals: &[Totals]) {
    let mut dropped = String::new();
    for &reason in DropReason::ALL {
        let count: u64 = totals.iter().map(|totals| totals.counters.drops(reason)).sum();
        if count > 0 {
            dropped.push_str(&format!(
                "{}{reason}={count}",
                if dropped.is_empty() { "" } else { " " }
            ));
        }
    }
    let flows: u64 = totals
        .iter()
        .flat_map(|totals| totals.counters.ends().values())
        .sum();
    tracing::info!(
        flows,
        dropped,
        lost_by_device = totals.iter().map(|totals| totals.lost_by_device).sum::<u64>(),
        lost_between_shards = totals
            .iter()
            .map(|totals| totals.lost_between_shards)
            .sum::<u64>(),
        "ended"
    );
}

fn monotonic() -> NotifyState<'static> {
    NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Status("reloading"))
}

/// Adds what can be done about it.
pub(super) fn explain_device(error: std::io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        std::io::ErrorKind::NotFound => {
            "the kernel has no TUN support: try `modprobe tun`, or give the container /dev/net/tun"
        }
        std::io::ErrorKind::PermissionDenied => {
            "it needs read and write access to /dev/net/tun (most systems ship it with mode 0666) and CAP_NET_ADMIN"
        }
        _ => return error.into(),
    };
    anyhow::Error::from(error).context(hint)
}

/// What a signal asks for.
enum Request {
    End,
    Reload,
}

/// The signals that mean something to a service.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot handle signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Request {
        tokio::select! {
            _ = self.terminate.recv() => Request::End,
            _ = self.interrupt.recv() => Request::End,
            _ = self.hangup.recv() => Request::Reload,
        }
    }
}
