//! The three namespaces and what runs in them: client, appliance and server, joined by veth.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::contender::Programs;
use super::namespace::Namespace;
use super::process::{Process, check_interrupt};
use super::scenario::{Place, Scenario};

/// The appliance's interface to clients.
pub(super) const DOWNLINK: &str = "down0";
/// The appliance's interface to servers.
const UPLINK: &str = "up0";

/// Where the server is when it is not a target: here SOCKS5 proxies listen.
pub(super) const SERVER_V4: &str = "10.82.0.2";
/// The appliance, for clients.
pub(super) const ROUTER_V4: &str = "10.81.0.1";
/// Addresses that connections are spread over, and the networks they are in.
const TARGETS: u8 = 16;
pub(super) const TARGETS_V4: &str = "192.0.2.0/24";
pub(super) const TARGETS_V6: &str = "2001:db8::/64";

/// Ports of the server, below those that clients take.
const BULK: u16 = 901;
const ECHO: u16 = 902;
const DATAGRAMS: u16 = 903;
pub(super) const SOCKS: u16 = 905;
const HTTP: u16 = 80;

/// Where programs are, and where files may go.
pub(super) struct Tools {
    pub(super) load: PathBuf,
    pub(super) tungate: PathBuf,
    pub(super) nginx: Option<PathBuf>,
    pub(super) wrk: Option<PathBuf>,
    pub(super) programs: Programs,
    pub(super) scratch: PathBuf,
}

pub(super) struct Stage<'a> {
    pub(super) tools: &'a Tools,
    pub(super) scenario: Scenario,
    /// Where clients run, unless that is the appliance's namespace.
    client: Option<Namespace>,
    pub(super) appliance: Namespace,
    pub(super) server: Namespace,
    /// Stopped before the namespaces go.
    _servers: Vec<Process>,
}

/// How clients are joined to the appliance.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Join {
    /// By veth and routes.
    Routed,
    /// By what the contender plugs into their namespace.
    Attached,
    /// They run where the appliance does.
    Local,
}

impl<'a> Stage<'a> {
    /// Builds everything. Only if `is_plain` the server knows a way back to routed clients: what bypasses a contender
    /// gets no answer.
    pub(super) fn build(tools: &'a Tools, scenario: Scenario, join: Join, is_plain: bool) -> Result<Self> {
        let (appliance, server) = (Namespace::new()?, Namespace::new()?);
        connect(&appliance, UPLINK, 82, 1, &server, "s0", 82, 2)?;
        for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            appliance.sysctl(key, "1")?;
        }
        appliance.ip(&format!("-4 route add default via {SERVER_V4}"))?;
        appliance.ip("-6 route add default via fd82::2")?;
        for number in 1..=TARGETS {
            server.ip(&format!("address add 192.0.2.{number}/32 dev lo"))?;
            server.ip(&format!("address add 2001:db8::{number:x}/128 dev lo nodad"))?;
        }
        let client = match join {
            Join::Local => None,
            Join::Attached => Some(Namespace::mounted(tools.scratch.join("client.netns"))?),
            Join::Routed => {
                let client = Namespace::new()?;
                connect(&appliance, DOWNLINK, 81, 1, &client, "c0", 81, 2)?;
                client.ip(&format!("-4 route add default via {ROUTER_V4}"))?;
                client.ip("-6 route add default via fd81::1")?;
                if is_plain {
                    server.ip("-4 route add 10.81.0.0/24 via 10.82.0.1")?;
                    server.ip("-6 route add fd81::/64 via fd82::1")?;
                }
                Some(client)
            }
        };
        let servers = serve(tools, &server)?;
        let stage = Self {
            tools,
            scenario,
            client,
            appliance,
            server,
            _servers: servers,
        };
        for address in stage.echo_targets().into_iter().take(1) {
            stage.server.wait_for_echo(address, super::PATIENCE)?;
        }
        Ok(stage)
    }

    /// Waits until what clients on the appliance's host send to targets no longer leaves by the uplink: until then they
    /// get answers without any contender.
    pub(super) fn wait_for_capture(&self, patience: Duration) -> Result<()> {
        let end = Instant::now() + patience;
        let target = self.echo_targets()[0].ip();
        while self.client.is_none() {
            let mut command = self.appliance.command("ip");
            let output = command.args(["route", "get", &target.to_string()]).output();
            let route = output.context("cannot run ip")?.stdout;
            if !String::from_utf8_lossy(&route).contains(UPLINK) {
                break;
            }
            check_interrupt()?;
            ensure!(
                Instant::now() < end,
                "traffic to {target} still leaves by {UPLINK}"
            );
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Where clients run.
    pub(super) fn client(&self) -> &Namespace {
        self.client.as_ref().unwrap_or(&self.appliance)
    }

    fn targets(&self, port: u16) -> Vec<SocketAddr> {
        let address = |number: u8| -> IpAddr {
            if self.scenario.is_ipv6() {
                [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(number)].into()
            } else {
                [192, 0, 2, number].into()
            }
        };
        (1..=TARGETS)
            .map(|number| SocketAddr::new(address(number), port))
            .collect()
    }

    pub(super) fn bulk_targets(&self) -> Vec<SocketAddr> {
        self.targets(BULK)
    }

    pub(super) fn echo_targets(&self) -> Vec<SocketAddr> {
        self.targets(ECHO)
    }

    pub(super) fn datagram_target(&self) -> SocketAddr {
        self.targets(DATAGRAMS)[0]
    }

    pub(super) fn http_target(&self) -> SocketAddr {
        self.targets(HTTP)[0]
    }

    /// Whether clients come by way of a router.
    pub(super) fn is_routed(&self) -> bool {
        self.scenario.place() == Place::Router
    }
}

#[expect(clippy::too_many_arguments, reason = "two ends of four each")]
fn connect(
    near: &Namespace,
    near_name: &str,
    near_net: u8,
    near_host: u8,
    far: &Namespace,
    far_name: &str,
    far_net: u8,
    far_host: u8,
) -> Result<()> {
    near.ip(&format!(
        "link add {near_name} type veth peer name {far_name} netns {}",
        far.path()
    ))?;
    for (namespace, name, net, host) in [
        (near, near_name, near_net, near_host),
        (far, far_name, far_net, far_host),
    ] {
        namespace.ip(&format!("address add 10.{net}.0.{host}/24 dev {name}"))?;
        namespace.ip(&format!("address add fd{net}::{host}/64 dev {name} nodad"))?;
        namespace.ip(&format!("link set {name} up"))?;
    }
    Ok(())
}

/// Starts the servers.
fn serve(tools: &Tools, server: &Namespace) -> Result<Vec<Process>> {
    let mut servers = Vec::new();
    for (tool, port) in [("bulk-server", BULK), ("echo-server", ECHO), ("socks", SOCKS)] {
        let mut command = server.command(&tools.load);
        command.args([tool, &format!("[::]:{port}")]);
        servers.push(Process::start(command, &tools.scratch)?);
    }
    if let Some(nginx) = &tools.nginx {
        let mut command = server.command(nginx);
        command
            .arg("-c")
            .arg(nginx_configuration(&tools.scratch)?)
            .arg("-e")
            .arg(tools.scratch.join("nginx-error.log"));
        servers.push(Process::start(command, &tools.scratch)?);
    }
    Ok(servers)
}

fn nginx_configuration(scratch: &Path) -> Result<PathBuf> {
    let path = scratch.join("nginx.conf");
    let folder = scratch.display();
    let text = format!(
        "daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log;
events {{ worker_connections 20000; }}
http {{
    access_log off; keepalive_requests 100000000;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    server {{ listen [::]:{HTTP} ipv6only=off backlog=8192; location / {{ return 200 \"hello\\n\"; }} }}
}}
"
    );
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
