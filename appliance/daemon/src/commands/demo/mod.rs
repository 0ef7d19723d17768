//! `tungate demo`: a client, the appliance and an origin on one stage, and everything that is shown is checked.
//!
//! The process enters a network namespace of its own, in which an origin has documentation addresses on loopback and
//! the appliance's sockets reach it. Its client is a thread in a second namespace, whose only way out is the TUN device.

mod notes;
mod origin;
mod scenes;
mod stage;

use std::fs::File;
use std::net::IpAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns, unshare};
use tungate_engine::policy::{Action, ListEntry, PolicySpec, PortRange, Rule, RuleMatch};
use tungate_engine::{Config, Policy, Protocol};

use self::notes::Note;
use self::stage::{Screen, Stage};
use super::run::{raise_descriptor_limit, runtime};
use crate::driver::{Device, Driver, Layer, Message, Settings, default_shards};
use crate::egress::{Dialer, Egresses};
use crate::host::{self, DEVICE, device_addresses};

/// The rule of the policy.
const RULE: &str = "no telnet";
const TELNET: u16 = 23;

pub(super) fn run() -> Result<ExitCode> {
    let screen = Screen::new();
    let failed = perform(&screen).context("the demo cannot be shown here")?;
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Shows all scenes; returns whether anything was not as it should be.
fn perform(screen: &Screen) -> Result<bool> {
    host::check_device_node()?;
    host::enter_namespaces(CloneFlags::CLONE_NEWNET)?;
    let notes = notes::listen();
    raise_descriptor_limit();
    let runtime = runtime()?;
    let ipv6 = host::has_ipv6();
    let addresses: Vec<IpAddr> = origin::addresses()
        .into_iter()
        .filter(|address| ipv6 || address.is_ipv4())
        .collect();
    runtime.block_on(host::populate(&addresses))?;
    host::allow_pings();
    origin::start(&addresses).context("the origin cannot be started")?;
    let config = config();
    let (device, client) = std::thread::scope(|scope| scope.spawn(|| make_client(&config, ipv6)).join())
        .map_err(|_| anyhow!("the client's thread has panicked"))??;
    let egresses = Arc::new(Egresses::new(&[], None)?);
    let driver = Driver::start(Settings {
        config,
        policy: Arc::new(Policy::new(policy(Vec::new()))),
        egresses: egresses.clone(),
        dialer: Dialer::new(runtime.handle().clone()),
        device,
        bypass: None,
        journal: None,
    })
    .context("cannot start the driver")?;
    let change_list = |entries| {
        let policy = Arc::new(Policy::new(policy(entries)));
        driver.tell(|| Message::Policy(policy.clone(), egresses.clone()));
    };
    let played = std::thread::scope(|scope| {
        let client = scope.spawn(|| play(screen, &client, notes, &change_list, ipv6));
        client.join()
    });
    runtime.block_on(driver.stop());
    played.map_err(|_| anyhow!("the client's thread has panicked"))?
}

/// The engine's configuration: sessions end soon, so that their ends can be seen.
fn config() -> Config {
    let mut config = Config::default();
    config.timeouts.dns = Duration::from_secs(1);
    config.timeouts.icmp = Duration::from_secs(1);
    config
}

fn policy(lists: Vec<ListEntry>) -> PolicySpec {
    let rule = Rule {
        name: RULE.to_owned(),
        matches: RuleMatch {
            protocols: vec![Protocol::Tcp],
            ports: vec![PortRange {
                first: TELNET,
                last: TELNET,
            }],
            ..RuleMatch::default()
        },
        action: Action::Reject,
    };
    PolicySpec {
        lists,
        rules: vec![rule],
        ..PolicySpec::default()
    }
}

/// Makes the client's namespace, from a thread that is used for nothing else.
fn make_client(config: &Config, ipv6: bool) -> Result<(Device, File)> {
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a second network namespace")?;
    let device = Device::create(DEVICE, Layer::Ip, config.mtu, default_shards(), false)
        .context("cannot make a TUN device")?;
    let (v4, v6) = device_addresses(config);
    runtime()?.block_on(host::enclose(DEVICE, v4, ipv6.then_some(v6)))?;
    host::allow_pings();
    let namespace = File::open("/proc/thread-self/ns/net").context("cannot hold the client's namespace")?;
    Ok((device, namespace))
}

fn play(
    screen: &Screen,
    client: &File,
    notes: Receiver<Note>,
    change_list: &dyn Fn(Vec<ListEntry>),
    ipv6: bool,
) -> Result<bool> {
    setns(client, CloneFlags::CLONE_NEWNET).context("cannot enter the client's namespace")?;
    let mut stage = Stage::new(screen, notes, change_list);
    scenes::play(&mut stage, ipv6);
    Ok(stage.finish())
}
