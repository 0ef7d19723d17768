//! `cargo xtask bench prefilter`: runs the cases of the pre-filter's benchmark, one process each. As root, beside
//! nftables and ipset where those are installed; without root, the virtual machine alone.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;

use super::{Machine, Samples, grouped, write_json};
use crate::workspace::Workspace;

/// Entries of the lists.
const ENTRIES: [u32; 4] = [1, 1_000, 100_000, 1_000_000];

/// Where packets come from: see the benchmark.
const SOURCES: [(&str, &str); 3] = [
    ("listed", "listed, dropped"),
    ("between", "between listed ones, passed"),
    ("away", "far away, passed"),
];

/// Packets per second that one thread of the virtual machine is to judge, with a thousand entries.
const VM_PACKETS: f64 = 4e6;

/// Seconds that loading a million entries may take.
const LOAD_SECONDS: f64 = 1.5;

/// A matched packet of a million entries is to be dropped at so many times nftables' rate.
const TIMES_NFT: f64 = 3.0;

#[derive(Args)]
pub(crate) struct Options {
    /// How often to run each case; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Measure lists of this many entries only
    #[arg(long)]
    entries: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Xdp,
    Nft,
    Ipset,
    Lists,
    Vm,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Xdp, Self::Nft, Self::Ipset, Self::Lists, Self::Vm];

    fn is_available(self) -> bool {
        let needed: &[&str] = match self {
            Self::Vm => return true,
            Self::Xdp | Self::Lists => &[],
            Self::Nft => &["nft", "ethtool"],
            Self::Ipset => &["ipset", "iptables", "ethtool"],
        };
        // SAFETY: asks for a number.
        let is_root = unsafe { libc::geteuid() } == 0;
        let missing = needed.iter().find(|name| {
            let asked = Command::new(name).arg("--version").stdout(Stdio::null()).status();
            asked.is_err()
        });
        match (is_root, missing) {
            (true, None) => true,
            (false, _) => {
                eprintln!("skipped: {self:?} needs root");
                false
            }
            (true, Some(missing)) => {
                eprintln!("skipped: {self:?} needs {missing}");
                false
            }
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Xdp => &["drop", "xdp"],
            Self::Nft => &["drop", "nft"],
            Self::Ipset => &["drop", "ipset"],
            Self::Lists => &["lists"],
            Self::Vm => &["vm"],
        }
    }
}

#[derive(Serialize)]
struct Results {
    machine: Machine,
    cases: Vec<Case>,
}

#[derive(Serialize)]
struct Case {
    kind: Kind,
    entries: u32,
    runs: Samples,
}

pub(super) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let program = workspace.executable(&[
        "bench",
        "--package=tungate-prefilter",
        "--features=kernel",
        "--bench=prefilter",
        "--no-run",
    ])?;
    let entries = ENTRIES
        .into_iter()
        .filter(|&entries| options.entries.is_none_or(|only| only == entries));
    let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(|kind| kind.is_available()).collect();
    let cases = entries.flat_map(|entries| {
        kinds.iter().map(move |&kind| Case {
            kind,
            entries,
            runs: Samples::default(),
        })
    });
    let mut results = Results {
        machine: Machine::describe(),
        cases: cases.collect(),
    };
    let total = results.cases.len();
    for run in 1..=options.runs {
        for (at, case) in results.cases.iter_mut().enumerate() {
            eprint!("\rrun {run} of {}, case {} of {total} ", options.runs, at + 1);
            case.measure(&program)?;
        }
    }
    eprintln!();
    results.print();
    write_json(workspace, "prefilter.json", &results)
}

impl Case {
    fn measure(&mut self, program: &Path) -> Result<()> {
        let what = format!("{:?} {}", self.kind, self.entries);
        let output = Command::new(program)
            .args(self.kind.arguments())
            .arg(self.entries.to_string())
            .output()
            .with_context(|| what.clone())?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{what}: {}\n{errors}", output.status);
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let figure = line
                .split_once(' ')
                .and_then(|(name, figure)| Some((name, figure.parse().ok()?)));
            let (name, figure) = figure.with_context(|| format!("{what} printed {line:?}"))?;
            self.runs.add(name, figure);
        }
        Ok(())
    }
}

impl Results {
    fn median(&self, kind: Kind, entries: u32, name: &str) -> Option<f64> {
        let mut cases = self.cases.iter();
        let case = cases.find(|case| case.kind == kind && case.entries == entries)?;
        case.runs.median(name)
    }

    fn print(&self) {
        println!("## Pre-filter\n");
        self.machine.print();
        println!("### A packet at the far end of a virtual cable\n");
        println!(
            "Nanoseconds of one CPU per packet, from the cable's near end to its end, without what making it takes, \
             and the rate that comes to; native XDP, nftables at ingress, and ipset in iptables' raw table. *Program* \
             is a run of the XDP program alone, as the kernel keeps its time.\n"
        );
        println!("| sources | entries | program | XDP | nftables | ipset |");
        println!("|---|---|---|---|---|---|");
        for (sources, name) in SOURCES {
            for entries in ENTRIES {
                let cell = |kind| {
                    let ns = self.median(kind, entries, &format!("{sources}_path_ns"));
                    ns.map_or_else(
                        || "–".to_owned(),
                        |ns| format!("{} ns, {:.2} M/s", ns.round(), 1e3 / ns),
                    )
                };
                let run = self.median(Kind::Xdp, entries, &format!("{sources}_run_ns"));
                let run = run.map_or_else(|| "–".to_owned(), |ns| format!("{} ns", ns.round()));
                let cells = [Kind::Xdp, Kind::Nft, Kind::Ipset].map(cell).join(" | ");
                println!("| {name} | {} | {run} | {cells} |", grouped(entries.into()));
            }
        }
        println!("\n### Lists\n");
        println!(
            "| entries | load | memory of maps | swap of all | add one | remove one | add after a removal | nftables: load, add one | ipset: load, add one |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
        for entries in ENTRIES {
            let lists = |name, scale: f64, unit| {
                let figure = self.median(Kind::Lists, entries, name);
                figure.map_or_else(
                    || "–".to_owned(),
                    |figure| format!("{:.2} {unit}", figure * scale),
                )
            };
            let other = |kind| {
                let load = self.median(kind, entries, "load_seconds");
                let add = self.median(kind, entries, "add_microseconds");
                load.zip(add).map_or_else(
                    || "–".to_owned(),
                    |(load, add)| format!("{load:.2} s, {:.1} ms", add / 1e3),
                )
            };
            println!(
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                grouped(entries.into()),
                lists("load_seconds", 1.0, "s"),
                lists("map_bytes", 1e-6, "MB"),
                lists("swap_seconds", 1.0, "s"),
                lists("add_microseconds", 1.0, "µs"),
                lists("remove_microseconds", 1.0, "µs"),
                lists("add_after_removal_microseconds", 1e-3, "ms"),
                other(Kind::Nft),
                other(Kind::Ipset)
            );
        }
        println!("\n### Virtual machine\n");
        println!("| entries | ns per packet | packets/s |");
        println!("|---|---|---|");
        for entries in ENTRIES {
            if let Some(ns) = self.median(Kind::Vm, entries, "ns_per_packet") {
                println!(
                    "| {} | {ns:.0} | {} |",
                    grouped(entries.into()),
                    grouped((1e9 / ns) as u64)
                );
            }
        }
        println!("\n### Targets\n");
        let target = |what: &str, figure: Option<f64>, bound: f64, is_reached: fn(f64, f64) -> bool| {
            let Some(figure) = figure else {
                return println!("- {what}: not measured");
            };
            let word = if is_reached(figure, bound) {
                "reached"
            } else {
                "MISSED"
            };
            println!("- {what}: {figure:.2} of {bound:.2}, {word}");
        };
        let at_least = |figure, bound| figure >= bound;
        let at_most = |figure, bound| figure <= bound;
        let vm = self.median(Kind::Vm, 1_000, "ns_per_packet");
        target(
            "virtual machine, million packets/s",
            vm.map(|ns| 1e3 / ns),
            VM_PACKETS / 1e6,
            at_least,
        );
        let million = |kind, name| self.median(kind, 1_000_000, name);
        target(
            "seconds to load 1,000,000 entries",
            million(Kind::Lists, "load_seconds"),
            LOAD_SECONDS,
            at_most,
        );
        let xdp = million(Kind::Xdp, "listed_path_ns");
        let times = xdp
            .zip(million(Kind::Nft, "listed_path_ns"))
            .map(|(ours, theirs)| theirs / ours);
        target(
            "matched drops of 1,000,000 entries, times nftables' rate",
            times,
            TIMES_NFT,
            at_least,
        );
    }
}
