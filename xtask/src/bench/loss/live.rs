//! A running `tungate run` between the path and an origin.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};
use tempfile::NamedTempFile;

use super::cell::Control;
use super::namespace::{Namespace, ip};
use super::priority::{Priority, raise};

/// Where the origin is, behind the appliance.
pub(super) const ORIGIN: &str = "203.0.113.2";

/// The appliance, in the namespace at the sender's end of the path.
pub(super) struct Appliance {
    process: Child,
    /// The origin's namespace, behind it.
    pub(super) origin: Namespace,
    _configuration: NamedTempFile,
}

impl Appliance {
    /// Starts it and waits until it relays what comes over the device `from`.
    pub(super) fn start(program: &Path, host: &Namespace, from: &str, control: Control) -> Result<Self> {
        let origin = Namespace::new()?;
        let peer = origin.path();
        host.run(|| {
            ip(&format!(
                "link add uplink type veth peer name uplink netns {peer}"
            ))?;
            ip("address add 203.0.113.1/24 dev uplink")?;
            ip("link set uplink up")?;
            ip("route add default via 203.0.113.2")
        })?;
        origin.run(|| {
            ip(&format!("address add {ORIGIN}/24 dev uplink"))?;
            ip("link set uplink up")
        })?;
        let mut configuration = NamedTempFile::new().context("cannot make a file")?;
        let name = control.name();
        write!(
            configuration,
            "[tcp]\nclients = \"routed\"\ncongestion = \"{name}\"\n[limits]\nbuffer_per_flow = \"4 MiB\"\n"
        )
        .context("cannot write a file")?;
        let mut process = host.run(|| {
            raise(Priority::Appliance);
            Command::new(program)
                .args(["run", "--json", "--from", from, "-c"])
                .arg(configuration.path())
                .stdin(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .with_context(|| format!("cannot run {}", program.display()))
        })?;
        let log = BufReader::new(process.stderr.take().expect("it is piped"));
        let mut lines = log.lines();
        let mut said = String::new();
        for line in lines.by_ref() {
            let line = line.context("cannot read the appliance's log")?;
            if line.contains("\"relaying\"") {
                // Nobody may find its pipe full.
                thread::spawn(move || lines.for_each(drop));
                return Ok(Self {
                    process,
                    origin,
                    _configuration: configuration,
                });
            }
            said += &line;
        }
        bail!("the appliance has ended: {said}")
    }
}

impl Drop for Appliance {
    fn drop(&mut self) {
        // SAFETY: the call takes numbers; the process has not been waited for, so the number is still its own.
        unsafe { libc::kill(self.process.id() as libc::pid_t, libc::SIGTERM) };
        let _ = self.process.wait();
    }
}
