//! What is compared, and how each is set up.

use std::path::PathBuf;
use std::{env, fs};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::process::Process;
use super::scenario::{Place, Scenario};
use super::stage::{DOWNLINK, Join, ROUTER_V4, SERVER_V4, SOCKS, Stage, TARGETS_V4, TARGETS_V6};

/// Ports of relays on the appliance, below those that clients take.
const RELAY: u16 = 904;
const REDSOCKS: u16 = 906;
/// The mark of packets that are not captured, and the table of those that are.
const MARK: u32 = 85;
const TABLE: u32 = 85;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Contender {
    /// Plain routing, no proxy
    Plain,
    /// Kernel TCP on both sides: nftables' tproxy and splice, two processes
    Relay,
    /// This project
    Tungate,
    /// This project with `[bypass]`, which leaves flows to the kernel
    Bypass,
    /// tun2proxy, a TUN device to SOCKS5
    Tun2proxy,
    /// shadowsocks-rust's sslocal with a TUN device, all bypassing its servers
    Sslocal,
    /// pasta, of passt
    Pasta,
    /// slirp4netns
    Slirp4netns,
    /// redsocks, kernel TCP to SOCKS5
    Redsocks,
}

impl Contender {
    pub(super) fn name(self) -> String {
        let value = self.to_possible_value().expect("none is skipped");
        value.get_name().to_owned()
    }

    /// Whether it is this project.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Tungate | Self::Bypass)
    }

    /// Whether it is neither this project nor one of the references.
    pub(super) fn is_rival(self) -> bool {
        !self.is_ours() && !matches!(self, Self::Plain | Self::Relay)
    }

    /// The program of a rival.
    fn program_name(self) -> Option<&'static str> {
        match self {
            Self::Plain | Self::Relay | Self::Tungate | Self::Bypass => None,
            Self::Tun2proxy => Some("tun2proxy-bin"),
            Self::Sslocal => Some("sslocal"),
            Self::Pasta => Some("pasta"),
            Self::Slirp4netns => Some("slirp4netns"),
            Self::Redsocks => Some("redsocks"),
        }
    }

    /// Whether all it needs is installed.
    pub(super) fn is_there(self, programs: &Programs) -> bool {
        self.program_name()
            .is_none_or(|name| programs.find(name).is_some())
    }

    /// Whether it can do this at all.
    pub(super) fn takes_part(self, scenario: Scenario) -> bool {
        match self {
            Self::Tungate => true,
            Self::Plain => !scenario.is_socks(),
            Self::Relay | Self::Bypass => !scenario.is_socks() && scenario.place() == Place::Router,
            Self::Tun2proxy => scenario.is_socks(),
            Self::Sslocal => !scenario.is_socks() && !scenario.is_ipv6(),
            Self::Pasta => matches!(scenario, Scenario::Local | Scenario::LocalIpv6),
            Self::Slirp4netns => scenario == Scenario::Local,
            Self::Redsocks => scenario == Scenario::RouterSocks,
        }
    }

    pub(super) fn carries_datagrams(self) -> bool {
        !matches!(self, Self::Relay | Self::Redsocks)
    }

    pub(super) fn join(self, scenario: Scenario) -> Join {
        match (self, scenario.place()) {
            (Self::Pasta | Self::Slirp4netns, _) => Join::Attached,
            (_, Place::Router) => Join::Routed,
            (_, Place::Local) => Join::Local,
        }
    }

    /// Starts it; when a client gets answers is for the caller to see.
    pub(super) fn start(self, stage: &Stage<'_>) -> Result<Vec<Process>> {
        match self {
            Self::Plain => Ok(Vec::new()),
            Self::Relay => relay(stage),
            Self::Tungate => tungate(stage, false),
            Self::Bypass => tungate(stage, true),
            Self::Tun2proxy => self.tun2proxy(stage),
            Self::Sslocal => self.sslocal(stage),
            Self::Pasta => self.pasta(stage),
            Self::Slirp4netns => self.slirp4netns(stage),
            Self::Redsocks => self.redsocks(stage),
        }
    }

    fn program(self, stage: &Stage<'_>) -> Result<PathBuf> {
        let name = self.program_name().context("it is no program of its own")?;
        stage
            .tools
            .programs
            .find(name)
            .with_context(|| format!("{name} is not installed"))
    }

    fn tun2proxy(self, stage: &Stage<'_>) -> Result<Vec<Process>> {
        make_tun(stage)?;
        let mut command = stage.appliance.command(self.program(stage)?);
        command
            .arg("--proxy")
            .arg(format!("socks5://{SERVER_V4}:{SOCKS}"))
            .args(["--tun", "tun0", "--max-sessions", "20000", "--verbosity", "off"]);
        let process = Process::start(command, &stage.tools.scratch)?;
        lead_to_tun(stage)?;
        Ok(vec![process])
    }

    fn sslocal(self, stage: &Stage<'_>) -> Result<Vec<Process>> {
        make_tun(stage)?;
        let scratch = &stage.tools.scratch;
        let (acl, configuration) = (scratch.join("sslocal.acl"), scratch.join("sslocal.json"));
        fs::write(&acl, "[bypass_all]\n").context("cannot write sslocal's ACL")?;
        let text = serde_json::json!({
            "locals": [{
                "protocol": "tun",
                "mode": "tcp_and_udp",
                "tun_interface_name": "tun0",
                "tun_interface_address": "10.83.0.1/24",
            }],
            "servers": [{
                "server": SERVER_V4,
                "server_port": 8388,
                "method": "aes-128-gcm",
                "password": "unused",
            }],
            "outbound_fwmark": MARK,
            "acl": acl,
        });
        fs::write(&configuration, text.to_string()).context("cannot write sslocal's configuration")?;
        let mut command = stage.appliance.command(self.program(stage)?);
        command.arg("--config").arg(configuration);
        let process = Process::start(command, scratch)?;
        lead_to_tun(stage)?;
        Ok(vec![process])
    }

    fn pasta(self, stage: &Stage<'_>) -> Result<Vec<Process>> {
        let mut command = stage.appliance.command(self.program(stage)?);
        command
            .args(["--foreground", "--config-net", "--runas", "0", "--netns"])
            .arg(stage.client().path());
        // No forwarding of ports, either way.
        command.args(["-t", "none", "-u", "none", "-T", "none", "-U", "none"]);
        Ok(vec![Process::start(command, &stage.tools.scratch)?])
    }

    fn slirp4netns(self, stage: &Stage<'_>) -> Result<Vec<Process>> {
        let mut command = stage.appliance.command(self.program(stage)?);
        command
            .args(["--configure", "--mtu=65520", "--netns-type=path"])
            .arg(stage.client().path())
            .arg("tap0");
        Ok(vec![Process::start(command, &stage.tools.scratch)?])
    }

    fn redsocks(self, stage: &Stage<'_>) -> Result<Vec<Process>> {
        let configuration = stage.tools.scratch.join("redsocks.conf");
        let text = format!(
            "base {{ log_debug = off; log_info = off; daemon = off; redirector = iptables; rlimit_nofile = 20000; }}
redsocks {{ local_ip = {ROUTER_V4}; local_port = {REDSOCKS}; ip = {SERVER_V4}; port = {SOCKS}; type = socks5;
    listenq = 4096; }}
"
        );
        fs::write(&configuration, text).context("cannot write redsocks' configuration")?;
        stage.appliance.nft(&format!(
            "table ip bench {{ chain divert {{ type nat hook prerouting priority dstnat;
            iifname \"{DOWNLINK}\" meta l4proto tcp redirect to :{REDSOCKS}\n}}\n}}\n"
        ))?;
        let mut command = stage.appliance.command(self.program(stage)?);
        command.arg("-c").arg(configuration);
        Ok(vec![Process::start(command, &stage.tools.scratch)?])
    }
}

/// Where programs are looked for.
pub(super) struct Programs(Vec<PathBuf>);

impl Programs {
    /// In `first`, and then where the system looks.
    pub(super) fn new(first: PathBuf) -> Self {
        let path = env::var_os("PATH").unwrap_or_default();
        let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
        Self(
            [first]
                .into_iter()
                .chain(env::split_paths(&path))
                .chain(system)
                .collect(),
        )
    }

    /// A program's file.
    pub(super) fn find(&self, program: &str) -> Option<PathBuf> {
        self.0
            .iter()
            .map(|folder| folder.join(program))
            .find(|file| file.is_file())
    }
}

fn tungate(stage: &Stage<'_>, bypass: bool) -> Result<Vec<Process>> {
    let mut command = stage.appliance.command(&stage.tools.tungate);
    command.arg("run");
    if stage.is_routed() {
        command.args(["--from", DOWNLINK]);
    }
    let text = if stage.scenario.is_socks() {
        Some(format!(
            "[[egress]]\nname = \"proxy\"\nkind = \"socks5\"\naddress = \"{SERVER_V4}:{SOCKS}\"\n
[[rule]]\naction = \"egress\"\negress = \"proxy\"\n"
        ))
    } else {
        bypass.then(|| "[bypass]\nenabled = true\n".to_owned())
    };
    if let Some(text) = text {
        let configuration = stage.tools.scratch.join("tungate.toml");
        fs::write(&configuration, text).context("cannot write a configuration")?;
        command.arg("--config").arg(configuration);
    }
    Ok(vec![Process::start(command, &stage.tools.scratch)?])
}

/// Two relays share the port; each has a thread, and descriptors enough for half of the connections.
fn relay(stage: &Stage<'_>) -> Result<Vec<Process>> {
    let (family, listen) = if stage.scenario.is_ipv6() {
        ("ip6", "[::]")
    } else {
        ("ip", "0.0.0.0")
    };
    stage.appliance.nft(&format!(
        "table {family} bench {{ chain divert {{ type filter hook prerouting priority mangle;
        iifname \"{DOWNLINK}\" meta l4proto tcp tproxy to :{RELAY} meta mark set {MARK} accept\n}}\n}}\n"
    ))?;
    let version = if stage.scenario.is_ipv6() { "-6" } else { "-4" };
    stage
        .appliance
        .ip(&format!("{version} rule add fwmark {MARK} lookup {TABLE}"))?;
    stage
        .appliance
        .ip(&format!("{version} route add local default dev lo table {TABLE}"))?;
    let start = |_| {
        let mut command = stage.appliance.command(&stage.tools.load);
        command.args(["relay", &format!("{listen}:{RELAY}")]);
        Process::start(command, &stage.tools.scratch)
    };
    (0..2).map(start).collect()
}

/// Makes a TUN device for a rival to open.
fn make_tun(stage: &Stage<'_>) -> Result<()> {
    stage.appliance.ip("tuntap add name tun0 mode tun")?;
    stage.appliance.ip("link set tun0 up mtu 1500 txqueuelen 5000")
}

/// Leads what goes to targets to a rival's TUN device.
fn lead_to_tun(stage: &Stage<'_>) -> Result<()> {
    for (version, targets) in [("-4", TARGETS_V4), ("-6", TARGETS_V6)] {
        let selector = if stage.is_routed() {
            format!("iif {DOWNLINK}")
        } else {
            format!("not fwmark {MARK}")
        };
        stage
            .appliance
            .ip(&format!("{version} route add {targets} dev tun0 table {TABLE}"))?;
        stage
            .appliance
            .ip(&format!("{version} rule add {selector} lookup {TABLE}"))?;
    }
    Ok(())
}
