//! `cargo xtask bench`: measurements on this machine, as Markdown on standard output and JSON in `target/bench/`.
//!
//! Every case runs several times, in rounds over all cases, so that what disturbs the machine for a while disturbs
//! all of them alike; the tables show medians.

mod child;
mod engine;
mod live;
pub(crate) mod loss;
mod prefilter;
mod replay;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use crate::workspace::Workspace;

#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Nanoseconds per packet and connection, and resident bytes per flow, of the engine alone
    Engine(Options),
    /// Nanoseconds per packet of the pre-filter beside nftables and ipset, loads and changes of lists, and the virtual
    /// machine; as root, all of it
    Prefilter(prefilter::Options),
    /// Packets per second and peak memory of `replay`, beside tshark and tcpdump on the same capture
    Replay(replay::Options),
    /// Goodput, transfer times and fairness over paths that lose packets, beside the kernel's on the same paths
    Loss(loss::Options),
    /// Throughput, connections, latency, datagrams and memory of the live appliance, beside plain routing and rivals
    Live(live::Options),
}

#[derive(Args)]
pub(crate) struct Options {
    /// How often to run each case; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
}

pub(crate) fn run(workspace: &Workspace, bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Engine(options) => engine::run(workspace, options),
        Bench::Prefilter(options) => prefilter::run(workspace, options),
        Bench::Replay(options) => replay::run(workspace, options),
        Bench::Loss(options) => loss::run(workspace, options),
        Bench::Live(options) => live::run(workspace, options),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// What the figures were measured on.
#[derive(Debug, Serialize, Deserialize)]
struct Machine {
    processor: String,
    cores: usize,
    kernel: String,
    rustc: String,
    /// Processes that wanted to run in the minute before: above 0, the machine was not idle.
    load_before: String,
}

impl Machine {
    fn describe() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let processor = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or_else(|| "unknown processor".to_owned(), |(_, model)| model.to_owned());
        let rustc = Command::new("rustc").arg("--version").output();
        Self {
            processor,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            rustc: rustc.map_or_else(
                |_| "unknown rustc".to_owned(),
                |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            ),
            load_before: read("/proc/loadavg")
                .split(' ')
                .next()
                .unwrap_or_default()
                .to_owned(),
        }
    }

    fn print(&self) {
        let Self {
            processor,
            cores,
            kernel,
            rustc,
            load_before,
        } = self;
        println!("{processor}, {cores} cores, Linux {kernel}, {rustc}; load before {load_before}\n");
    }
}

/// The figures of one case over all runs, by name.
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
struct Samples(BTreeMap<String, Vec<f64>>);

impl Samples {
    fn add(&mut self, name: &str, figure: f64) {
        self.0.entry(name.to_owned()).or_default().push(figure);
    }

    /// The median of what was measured under this name; `None` if nothing was.
    fn median(&self, name: &str) -> Option<f64> {
        let mut sorted = self.0.get(name)?.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        Some(match sorted.len() % 2 {
            0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => sorted[middle],
        })
    }
}

/// Where a bench's files go.
fn folder(workspace: &Workspace) -> Result<PathBuf> {
    let folder = workspace.target.join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

fn write_json(workspace: &Workspace, name: &str, value: &impl Serialize) -> Result<()> {
    let path = folder(workspace)?.join(name);
    let text = serde_json::to_string_pretty(value).context("cannot write JSON")?;
    fs::write(&path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    println!("\nall runs: {}", path.display());
    Ok(())
}

/// A number with separators between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_of_runs_lies_between_the_middle_ones() {
        let mut samples = Samples::default();
        for figure in [4.0, 1.0, 3.0, 100.0] {
            samples.add("ns", figure);
        }
        assert_eq!(samples.median("ns"), Some(3.5));
        assert_eq!(samples.median("bytes"), None);
    }

    #[test]
    fn numbers_are_grouped_by_thousands() {
        let numbers = [0, 999, 1000, 65_495, 1_234_567].map(grouped);
        assert_eq!(numbers, ["0", "999", "1,000", "65,495", "1,234,567"]);
    }
}
