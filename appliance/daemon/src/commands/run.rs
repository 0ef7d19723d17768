//! `tungate run`: the appliance on this host.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tungate_config::Loaded;
use tungate_engine::DropReason;
use tungate_engine::policy::{Action, PolicySpec, Rule, RuleMatch};

use super::configuration;
use super::prefilter::remove_leftovers;
use crate::control::remove_leftover;
use crate::driver::{TAP_MAC, TRANSMIT_QUEUE_LEN, Totals};
use crate::host::{self, Capture, DEVICE, device_addresses};
use crate::{cli, logs, supervisor};

pub(super) fn run(arguments: &cli::Run) -> Result<ExitCode> {
    let loaded = configuration(arguments.policy.config.as_deref())?;
    if loaded.engine.bypass && (arguments.tap || arguments.from.is_empty()) {
        bail!(
            "bypass.enabled is for clients behind an interface: say which by `--from INTERFACE`, or leave it out of the \
             configuration"
        );
    }
    if arguments.dry_run {
        return dry_run(arguments, &loaded);
    }
    logs::to_stderr(arguments.json);
    raise_descriptor_limit();
    runtime()?.block_on(supervisor::run(arguments, loaded))
}

pub(super) fn clean_up() -> Result<ExitCode> {
    logs::to_stderr(false);
    runtime()?.block_on(host::clean_up())?;
    remove_leftover()?;
    let prefilters = remove_leftovers()?;
    if prefilters > 0 {
        tracing::warn!(
            prefilters,
            "removed what was left of pre-filters whose interfaces are gone"
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// The runtime for everything but packets.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime> {
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
pub(crate) fn create_journal(path: &Path) -> Result<std::fs::File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .with_context(|| format!("cannot write the journal {}", path.display()))
}

fn dry_run(arguments: &cli::Run, loaded: &Loaded) -> Result<ExitCode> {
    if arguments.tap {
        let mac = TAP_MAC.map(|byte| format!("{byte:02x}")).join(":");
        println!("ip tuntap add {DEVICE} mode tap vnet_hdr multi_queue");
        println!("ip link set {DEVICE} address {mac}");
    } else {
        println!("ip tuntap add {DEVICE} mode tun vnet_hdr multi_queue");
    }
    println!(
        "ip link set {DEVICE} mtu {} txqueuelen {TRANSMIT_QUEUE_LEN}",
        loaded.engine.mtu
    );
    let capture = capture_of(arguments, loaded);
    for interface in &loaded.prefilter.interfaces {
        println!("tungate prefilter attach {interface}");
    }
    for change in capture.preparation().iter().chain(&capture.rules()) {
        println!("{change}");
    }
    if loaded.engine.bypass {
        println!("# and, for the bypass, the rules that `nft list table inet tungate` shows while it runs");
    }
    Ok(ExitCode::SUCCESS)
}

/// What is to be captured, and how.
pub(crate) fn capture_of(arguments: &cli::Run, loaded: &Loaded) -> Capture {
    let (address_v4, address_v6) = device_addresses(&loaded.engine);
    Capture {
        device: DEVICE.to_owned(),
        address_v4,
        address_v6: host::has_ipv6().then_some(address_v6),
        tap: arguments.tap,
        bridge: arguments.bridge.clone(),
        interfaces: arguments.from.clone(),
        marks: supervisor::marks(&loaded.egresses),
        fail_open: arguments.fail_open,
        bypass: loaded.engine.bypass,
    }
}

/// A policy that ends every flow in a way that both sides notice.
pub(crate) fn closed() -> PolicySpec {
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
pub(crate) fn report(totals: &[Totals]) {
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

/// Adds what can be done about it.
pub(crate) fn explain_device(error: std::io::Error) -> anyhow::Error {
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
