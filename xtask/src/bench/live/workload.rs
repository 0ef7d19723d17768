//! What is measured, and how.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::process::{Process, check_interrupt, pause};
use super::stage::Stage;
use super::usage::{Moment, processor_seconds, resident_bytes};

/// What a tool may take beyond its time.
const PATIENCE: Duration = Duration::from_secs(30);
/// Connections of `hold`.
const HELD: usize = 10_000;
/// From the last byte of a held connection to the look at memory.
const HELD_FOR: Duration = Duration::from_secs(30);
/// Datagrams per second of `udp-loss`.
const LOSS_RATE: u32 = 50_000;
/// Load runs this long before anything is measured under it.
const LEAD: Duration = Duration::from_millis(300);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Up,
    Down,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Bulk(Way, usize),
    Connect,
    /// Whether connections are kept.
    Http(bool),
    /// With a transfer beside it.
    Latency(Option<Way>),
    /// Payload bytes.
    Datagrams(Way, usize),
    DatagramLoss,
    Hold,
}

pub(super) struct Workload {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
}

const fn workload(name: &'static str, kind: Kind) -> Workload {
    Workload { name, kind }
}

pub(super) const WORKLOADS: &[Workload] = &[
    workload("tcp-up-1", Kind::Bulk(Way::Up, 1)),
    workload("tcp-down-1", Kind::Bulk(Way::Down, 1)),
    workload("tcp-up-8", Kind::Bulk(Way::Up, 8)),
    workload("tcp-down-8", Kind::Bulk(Way::Down, 8)),
    workload("tcp-up-64", Kind::Bulk(Way::Up, 64)),
    workload("tcp-down-64", Kind::Bulk(Way::Down, 64)),
    workload("tcp-up-512", Kind::Bulk(Way::Up, 512)),
    workload("tcp-down-512", Kind::Bulk(Way::Down, 512)),
    workload("connect", Kind::Connect),
    workload("http-keep", Kind::Http(true)),
    workload("http-close", Kind::Http(false)),
    workload("latency-idle", Kind::Latency(None)),
    workload("latency-up", Kind::Latency(Some(Way::Up))),
    workload("latency-down", Kind::Latency(Some(Way::Down))),
    workload("udp-64-up", Kind::Datagrams(Way::Up, 64)),
    workload("udp-64-down", Kind::Datagrams(Way::Down, 64)),
    workload("udp-1400-up", Kind::Datagrams(Way::Up, 1400)),
    workload("udp-1400-down", Kind::Datagrams(Way::Down, 1400)),
    workload("udp-loss", Kind::DatagramLoss),
    workload("hold", Kind::Hold),
];

/// What a run has shown, by name.
pub(super) type Figures = Vec<(&'static str, f64)>;

/// A contender at work.
pub(super) struct Run<'a> {
    pub(super) stage: &'a Stage<'a>,
    /// The contender's processes; without any, nobody's time is counted as its.
    pub(super) processes: &'a [u32],
    pub(super) seconds: f64,
}

#[derive(Deserialize)]
struct Transferred {
    seconds: f64,
    bytes: Vec<u64>,
    failed: usize,
}

#[derive(Deserialize)]
struct Connected {
    seconds: f64,
    completed: u64,
    failed: u64,
}

#[derive(Deserialize)]
struct Delays {
    exchanges: usize,
    p50_us: f64,
    p99_us: f64,
}

#[derive(Deserialize)]
struct Datagrams {
    datagrams: u64,
    seconds: f64,
}

#[derive(Deserialize)]
struct Answers {
    answered: usize,
}

impl Kind {
    pub(super) fn is_datagrams(self) -> bool {
        matches!(self, Self::Datagrams(..) | Self::DatagramLoss)
    }

    pub(super) fn needs_http(self) -> bool {
        matches!(self, Self::Http(_))
    }

    /// Whether so many connections end with it that what is left of them (TIME-WAIT, resets, full buffers) would slow
    /// down what comes next.
    pub(super) fn leaves_traces(self) -> bool {
        matches!(self, Self::Bulk(_, 64..) | Self::Connect | Self::Http(false))
    }
}

impl Run<'_> {
    pub(super) fn measure(&self, kind: Kind) -> Result<Figures> {
        check_interrupt()?;
        match kind {
            Kind::Bulk(way, streams) => self.bulk(way, streams),
            Kind::Connect => self.connect(),
            Kind::Http(keep) => self.http(keep),
            Kind::Latency(load) => self.latency(load),
            Kind::Datagrams(way, size) => self.datagrams(way, size),
            Kind::DatagramLoss => self.datagram_loss(),
            Kind::Hold => self.hold(),
        }
    }

    /// A tool that runs where clients do.
    fn tool(&self, name: &str, targets: &[SocketAddr]) -> Command {
        let mut command = self.stage.client().command(&self.stage.tools.load);
        command.arg(name).args(targets.iter().map(SocketAddr::to_string));
        command
    }

    fn start(&self, command: Command) -> Result<Process> {
        Process::start(command, &self.stage.tools.scratch)
    }

    fn time(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    fn start_bulk(&self, way: Way, streams: usize, seconds: f64) -> Result<Process> {
        let mut command = self.tool("bulk", &self.stage.bulk_targets());
        let way = match way {
            Way::Up => "up",
            Way::Down => "down",
        };
        command.args(["--direction", way, "--streams", &streams.to_string()]);
        command.args(["--seconds", &seconds.to_string()]);
        self.start(command)
    }

    fn bulk(&self, way: Way, streams: usize) -> Result<Figures> {
        let (proxy, machine) = (processor_seconds(self.processes), Moment::now()?);
        let bulk = self.start_bulk(way, streams, self.seconds)?;
        let transferred: Transferred = bulk.result(self.time() + PATIENCE)?;
        let proxy = processor_seconds(self.processes) - proxy;
        let machine = machine.until(&Moment::now()?);
        let bytes: u64 = transferred.bytes.iter().sum();
        ensure!(bytes > 0, "nothing came through");
        let gigabytes = bytes as f64 / 1e9;
        let mut figures = vec![
            ("gbit_per_s", gigabytes * 8.0 / transferred.seconds),
            ("machine_s_per_gb", machine.busy / gigabytes),
            ("failed", transferred.failed as f64),
        ];
        if !self.processes.is_empty() {
            figures.push(("proxy_s_per_gb", proxy / gigabytes));
        }
        if streams > 1 {
            figures.push(("jain", jain(&transferred.bytes)));
        }
        Ok(figures)
    }

    fn connect(&self) -> Result<Figures> {
        let proxy = processor_seconds(self.processes);
        let mut command = self.tool("connect", &self.stage.echo_targets());
        command.args(["--seconds", &self.seconds.to_string()]);
        let connected: Connected = self.start(command)?.result(self.time() + PATIENCE)?;
        let proxy = processor_seconds(self.processes) - proxy;
        ensure!(connected.completed > 0, "no connection came through");
        let mut figures = vec![
            ("per_s", connected.completed as f64 / connected.seconds),
            ("failed", connected.failed as f64),
        ];
        if !self.processes.is_empty() {
            figures.push(("proxy_us_each", proxy * 1e6 / connected.completed as f64));
        }
        Ok(figures)
    }

    fn http(&self, keep: bool) -> Result<Figures> {
        let wrk = self.stage.tools.wrk.as_ref().context("wrk is not installed")?;
        let mut command = self.stage.client().command(wrk);
        let seconds = self.seconds.ceil();
        command.args(["-t1", "-c32", &format!("-d{seconds}s")]);
        if !keep {
            command.args(["-H", "Connection: close"]);
        }
        command.arg(format!("http://{}/", self.stage.http_target()));
        let output = command.stderr(Stdio::null()).output().context("cannot run wrk")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let per_second = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("Requests/sec:")?.trim().parse().ok())
            .with_context(|| format!("wrk printed {text:?}"))?;
        // Socket errors: connect 0, read 0, write 0, timeout 0
        let failed: f64 = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("Socket errors:"))
            .map_or(0.0, |line| {
                let numbers = line.split(|letter: char| !letter.is_ascii_digit());
                numbers.filter_map(|number| number.parse::<f64>().ok()).sum()
            });
        Ok(vec![("per_s", per_second), ("failed", failed)])
    }

    fn latency(&self, load: Option<Way>) -> Result<Figures> {
        let lead = LEAD.as_secs_f64();
        let load = match load {
            Some(way) => Some(self.start_bulk(way, 1, self.seconds + 2.0 * lead)?),
            None => None,
        };
        if load.is_some() {
            pause(LEAD)?;
        }
        let target = self.stage.echo_targets()[1];
        let mut command = self.tool("latency", &[target]);
        command.args(["--seconds", &self.seconds.to_string()]);
        let delays: Delays = self.start(command)?.result(self.time() + PATIENCE)?;
        let mut figures = vec![
            ("p50_us", delays.p50_us),
            ("p99_us", delays.p99_us),
            ("exchanges", delays.exchanges as f64),
        ];
        if let Some(load) = load {
            let transferred: Transferred = load.result(self.time() + PATIENCE)?;
            let bytes: u64 = transferred.bytes.iter().sum();
            figures.push(("load_gbit_per_s", bytes as f64 * 8e-9 / transferred.seconds));
        }
        Ok(figures)
    }

    fn datagrams(&self, way: Way, size: usize) -> Result<Figures> {
        let proxy = processor_seconds(self.processes);
        let (sent, received) = self.send_datagrams(way, size, None)?;
        let proxy = processor_seconds(self.processes) - proxy;
        ensure!(received.datagrams > 0, "no datagram came through");
        let count = received.datagrams as f64;
        let mut figures = vec![
            ("per_s", count / received.seconds.max(self.seconds)),
            ("sent_per_s", sent.datagrams as f64 / sent.seconds),
        ];
        if !self.processes.is_empty() {
            figures.push(("proxy_us_each", proxy * 1e6 / count));
        }
        Ok(figures)
    }

    fn datagram_loss(&self) -> Result<Figures> {
        let (sent, received) = self.send_datagrams(Way::Up, 64, Some(LOSS_RATE))?;
        let lost = sent.datagrams.saturating_sub(received.datagrams);
        Ok(vec![
            ("lost_percent", 100.0 * lost as f64 / sent.datagrams.max(1) as f64),
            ("sent_per_s", sent.datagrams as f64 / sent.seconds),
        ])
    }

    /// Has datagrams sent, and returns what was sent and what was received.
    fn send_datagrams(&self, way: Way, size: usize, rate: Option<u32>) -> Result<(Datagrams, Datagrams)> {
        let target = self.stage.datagram_target().to_string();
        let server = || self.stage.server.command(&self.stage.tools.load);
        let client = || self.stage.client().command(&self.stage.tools.load);
        let (mut send, mut receive) = match way {
            Way::Up => (client(), server()),
            Way::Down => (server(), client()),
        };
        let (to, from) = match way {
            Way::Up => ("--to", "--listen"),
            Way::Down => ("--listen", "--greet"),
        };
        receive.args(["udp-receive", from, &target]);
        send.args(["udp-send", to, &target, "--size", &size.to_string()]);
        send.args(["--seconds", &self.seconds.to_string()]);
        if let Some(rate) = rate {
            send.args(["--rate", &rate.to_string()]);
        }
        let (sender, receiver) = match way {
            Way::Up => {
                let receiver = self.start(receive)?;
                pause(LEAD / 3)?;
                (self.start(send)?, receiver)
            }
            Way::Down => {
                let sender = self.start(send)?;
                pause(LEAD / 3)?;
                (sender, self.start(receive)?)
            }
        };
        let sent = sender.result(self.time() + PATIENCE)?;
        let received = receiver.result(PATIENCE)?;
        Ok((sent, received))
    }

    fn hold(&self) -> Result<Figures> {
        let before = resident_bytes(self.processes);
        let mut command = self.tool("hold", &self.stage.echo_targets());
        command
            .args(["--connections", &HELD.to_string()])
            .stdin(Stdio::piped());
        let mut holder = self.start(command)?;
        let mut output = BufReader::new(holder.take_output().context("it has no output")?);
        let mut answers = || -> Result<usize> {
            let mut line = String::new();
            output
                .read_line(&mut line)
                .context("cannot read from the holder")?;
            let answers: Answers =
                serde_json::from_str(&line).with_context(|| format!("the holder printed {line:?}"))?;
            Ok(answers.answered)
        };
        let first = answers()?;
        ensure!(first > 0, "no connection came through");
        pause(HELD_FOR)?;
        let after = resident_bytes(self.processes);
        holder.tell("again")?;
        let again = answers()?;
        let mut figures = vec![("answered", first as f64), ("answered_again", again as f64)];
        if !self.processes.is_empty() {
            let bytes = after.saturating_sub(before) as f64;
            figures.push(("kb_each", bytes / 1024.0 / first as f64));
            figures.push(("mb_before", before as f64 / 1e6));
        }
        Ok(figures)
    }
}

/// Jain's index of fairness: 1 if all have the same share, 1/n if one has everything.
fn jain(shares: &[u64]) -> f64 {
    let sum: f64 = shares.iter().map(|&share| share as f64).sum();
    let squares: f64 = shares.iter().map(|&share| (share as f64).powi(2)).sum();
    sum.powi(2) / (shares.len() as f64 * squares)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fairness_is_one_for_equal_shares_and_a_fraction_for_one_taker() {
        assert!((jain(&[5, 5, 5, 5]) - 1.0).abs() < 1e-9);
        assert!((jain(&[7, 0, 0, 0]) - 0.25).abs() < 1e-9);
    }

    #[test]
    fn workloads_have_different_names() {
        for (at, workload) in WORKLOADS.iter().enumerate() {
            assert!(WORKLOADS[..at].iter().all(|other| other.name != workload.name));
        }
    }
}
