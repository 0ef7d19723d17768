//! `cargo xtask bench live`: the live appliance beside plain routing, the kernel's own relay and rivals.
//!
//! Each contender gets network namespaces of its own, with a client, an appliance and a server, joined by veth with an
//! MTU of 1500. Rounds go over all scenarios and contenders, so that what disturbs the machine for a while disturbs all
//! of them alike. While something is measured, what processes other than ours use of the machine is watched; a
//! disturbed sample is taken again, and counts only if there is no other. Everything is removed at the end, also after
//! Ctrl-C.

mod contender;
mod namespace;
mod process;
mod report;
mod scenario;
mod stage;
mod targets;
mod usage;
mod workload;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use self::contender::{Contender, Programs};
use self::namespace::make_mounts_private;
use self::process::{Process, catch_interrupts, check_interrupt};
use self::scenario::Scenario;
use self::stage::{Stage, Tools};
use self::usage::Moment;
use self::workload::{Kind, Run, WORKLOADS, Workload};
use super::{Machine, folder};
use crate::workspace::Workspace;

/// How long a contender may take to carry its first bytes.
const PATIENCE: Duration = Duration::from_secs(10);
/// Processors that others may use beside a sample, on average.
const FOREIGN: f64 = 0.25;
/// How often a sample is taken at most, until it is undisturbed.
const TRIES: u32 = 3;

/// The workloads of `--quick`.
const QUICK: [&str; 6] = [
    "tcp-up-1",
    "tcp-down-1",
    "tcp-up-8",
    "tcp-down-8",
    "connect",
    "latency-idle",
];

#[derive(Args)]
pub(crate) struct Options {
    /// One round of one second each in the router scenario: a few figures of plain routing, the relay and tungate
    #[arg(long)]
    quick: bool,
    /// Workloads, or the beginning of their names, as in tcp-up-1 or udp
    #[arg(long, value_name = "WORKLOAD", value_delimiter = ',')]
    only: Vec<String>,
    /// Without it, all that are installed
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    contenders: Vec<Contender>,
    /// Without it, all
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    scenario: Vec<Scenario>,
    /// How often to measure everything; medians count
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// How long each transfer takes
    #[arg(long, default_value_t = 1.5, value_name = "N")]
    seconds: f64,
    /// Where live.md and live.json go; target/bench without it
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Keep what live.json has of earlier runs of the same builds, and add to it
    #[arg(long)]
    add: bool,
    /// Build tun2proxy and sslocal with `cargo install` first
    #[arg(long)]
    install_rivals: bool,
}

#[derive(Serialize, Deserialize)]
struct Results {
    machine: Machine,
    /// When it was measured, or last added to.
    date: String,
    command: String,
    seconds: f64,
    /// Contenders that were not installed.
    absent: BTreeSet<Contender>,
    samples: Vec<Sample>,
}

/// What came of one workload, once.
#[derive(Serialize, Deserialize)]
struct Sample {
    scenario: Scenario,
    contender: Contender,
    workload: String,
    round: u32,
    /// Processors that others kept busy.
    foreign: f64,
    figures: BTreeMap<String, f64>,
    /// Why there are no figures.
    error: Option<String>,
}

pub(super) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "network namespaces take root here: sudo -E cargo xtask bench live"
    );
    let rivals = folder(workspace)?.join("rivals");
    if options.install_rivals {
        install_rivals(workspace, &rivals)?;
    }
    let programs = Programs::new(rivals.join("bin"));
    let plan = Plan::new(options, &programs)?;
    let scratch = TempDir::new_in(folder(workspace)?).context("cannot make a temporary folder")?;
    let tools = Tools {
        load: workspace.executable(&["build", "--release", "--package=tungate-load"])?,
        tungate: if plan.contenders.iter().any(|one| one.is_ours()) {
            workspace.executable(&["build", "--release", "--package=tungate", "--bin=tungate"])?
        } else {
            PathBuf::new()
        },
        nginx: programs.find("nginx"),
        wrk: programs.find("wrk"),
        programs,
        scratch: scratch.path().to_owned(),
    };
    catch_interrupts()?;
    make_mounts_private()?;
    nix::sys::prctl::set_child_subreaper(true).context("cannot adopt orphans")?;
    let out = options.out.clone().map_or_else(|| folder(workspace), Ok)?;
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let file = out.join("live.json");
    let mut results = Results {
        machine: Machine::describe(),
        date: today()?,
        command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        seconds: plan.seconds,
        absent: plan.absent.clone(),
        samples: Vec::new(),
    };
    if options.add && file.exists() {
        results.samples = read(&file)?.samples;
    }
    let done = plan.carry_out(&tools, &mut results);
    // What was measured before a failure or Ctrl-C is not lost.
    let text = serde_json::to_string_pretty(&results).context("cannot write JSON")?;
    fs::write(&file, text + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    let report = report::markdown(&results);
    let path = out.join("live.md");
    fs::write(&path, &report).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{report}");
    println!("all samples: {}", file.display());
    scratch.close().context("cannot remove the temporary folder")?;
    done
}

fn read(file: &Path) -> Result<Results> {
    let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is from another version", file.display()))
}

fn today() -> Result<String> {
    let output = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    let output = output.context("cannot ask for the date")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Builds the rivals that crates.io has.
fn install_rivals(workspace: &Workspace, root: &Path) -> Result<()> {
    for (package, more) in [
        ("tun2proxy", &[][..]),
        (
            "shadowsocks-rust",
            &[
                "--no-default-features",
                "--features=local,local-tun,aead-cipher",
                "--bin=sslocal",
            ],
        ),
    ] {
        let status = workspace
            .cargo()
            .args(["install", "--locked", "--quiet", package, "--root"])
            .arg(root)
            .args(more)
            .status()
            .context("cannot run cargo")?;
        ensure!(status.success(), "cargo install {package}: {status}");
    }
    Ok(())
}

/// What is to be done.
struct Plan {
    rounds: u32,
    seconds: f64,
    scenarios: Vec<Scenario>,
    contenders: Vec<Contender>,
    absent: BTreeSet<Contender>,
    workloads: Vec<&'static Workload>,
}

impl Plan {
    fn new(options: &Options, programs: &Programs) -> Result<Self> {
        let chosen = |chosen: &[Contender], otherwise: &[Contender]| {
            let list = if chosen.is_empty() { otherwise } else { chosen };
            list.to_vec()
        };
        let wanted = if options.quick {
            chosen(
                &options.contenders,
                &[Contender::Plain, Contender::Relay, Contender::Tungate],
            )
        } else {
            // The bypass is another configuration: it is measured where it is asked for.
            let usual = Contender::value_variants().iter().copied();
            let usual: Vec<_> = usual.filter(|one| *one != Contender::Bypass).collect();
            chosen(&options.contenders, &usual)
        };
        let (contenders, absent) = wanted
            .into_iter()
            .partition::<Vec<_>, _>(|one| one.is_there(programs));
        let scenarios = match (&options.scenario[..], options.quick) {
            ([], true) => vec![Scenario::Router],
            ([], false) => Scenario::value_variants().to_vec(),
            (some, _) => some.to_vec(),
        };
        for name in &options.only {
            if !WORKLOADS.iter().any(|workload| workload.name.starts_with(name)) {
                let names: Vec<_> = WORKLOADS.iter().map(|workload| workload.name).collect();
                bail!("there is no workload {name}; there are {}", names.join(", "));
            }
        }
        let is_chosen = |workload: &&Workload| match (&options.only[..], options.quick) {
            ([], true) => QUICK.contains(&workload.name),
            ([], false) => true,
            (some, _) => some.iter().any(|name| workload.name.starts_with(name)),
        };
        Ok(Self {
            rounds: options.rounds.unwrap_or(if options.quick { 1 } else { 3 }),
            seconds: if options.quick { 1.0 } else { options.seconds },
            scenarios,
            contenders,
            absent: absent.into_iter().collect(),
            workloads: WORKLOADS.iter().filter(is_chosen).collect(),
        })
    }

    fn carry_out(&self, tools: &Tools, results: &mut Results) -> Result<()> {
        let earlier = results.samples.iter().map(|sample| sample.round).max();
        let first = earlier.map_or(1, |round| round + 1);
        for round in first..first + self.rounds {
            // Holding connections takes so long that one round has to do.
            let is_wanted = |workload: &&&Workload| workload.kind != Kind::Hold || round == first;
            let workloads: Vec<_> = self.workloads.iter().filter(is_wanted).copied().collect();
            for &scenario in &self.scenarios {
                for &contender in &self.contenders {
                    if contender.takes_part(scenario) {
                        let samples = &mut results.samples;
                        self.measure(tools, scenario, contender, round, &workloads, samples)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Measures one contender in one scenario. What fails is noted as failed; only what concerns all is an error.
    fn measure(
        &self,
        tools: &Tools,
        scenario: Scenario,
        contender: Contender,
        round: u32,
        workloads: &[&Workload],
        samples: &mut Vec<Sample>,
    ) -> Result<()> {
        let mut started = None;
        for workload in workloads {
            if !applies(workload.kind, contender, tools) {
                continue;
            }
            for _ in 0..TRIES {
                let mut sample = Sample {
                    scenario,
                    contender,
                    workload: workload.name.to_owned(),
                    round,
                    foreign: 0.0,
                    figures: BTreeMap::new(),
                    error: None,
                };
                let mut is_startable = true;
                if started.is_none() {
                    match start(tools, scenario, contender) {
                        Ok(new) => started = Some(new),
                        Err(error) => {
                            check_interrupt()?;
                            sample.error = Some(format!("it does not start: {error:#}"));
                            is_startable = false;
                        }
                    }
                }
                if let Some((processes, stage)) = &mut started
                    && let Err(error) = self.try_once(processes, stage, workload.kind, &mut sample)
                {
                    check_interrupt()?;
                    sample.error = Some(format!("{error:#}"));
                    started = None; // the next one gets a fresh stage
                }
                let is_disturbed = sample.foreign > FOREIGN;
                tell(&sample, is_disturbed);
                samples.push(sample);
                if !is_startable {
                    return Ok(());
                }
                if !is_disturbed {
                    break;
                }
            }
            if workload.kind.leaves_traces() {
                started = None;
            }
        }
        Ok(())
    }

    fn try_once(
        &self,
        processes: &mut [Process],
        stage: &Stage<'_>,
        kind: Kind,
        sample: &mut Sample,
    ) -> Result<()> {
        let run = Run {
            stage,
            processes: &processes.iter().map(Process::id).collect::<Vec<_>>(),
            seconds: self.seconds,
        };
        let before = Moment::now()?;
        let figures = run.measure(kind)?;
        sample.foreign = before.until(&Moment::now()?).foreign;
        for process in processes {
            process.check()?;
        }
        sample.figures = figures
            .into_iter()
            .map(|(name, figure)| (name.to_owned(), figure))
            .collect();
        Ok(())
    }
}

/// Whether a contender can be asked for this, with the tools that are there.
fn applies(kind: Kind, contender: Contender, tools: &Tools) -> bool {
    let is_carried = !kind.is_datagrams() || contender.carries_datagrams();
    let has_tools = !kind.needs_http() || (tools.nginx.is_some() && tools.wrk.is_some());
    is_carried && has_tools
}

fn start<'a>(
    tools: &'a Tools,
    scenario: Scenario,
    contender: Contender,
) -> Result<(Vec<Process>, Stage<'a>)> {
    let is_plain = contender == Contender::Plain;
    let stage = Stage::build(tools, scenario, contender.join(scenario), is_plain)?;
    let mut processes = contender.start(&stage)?;
    if !is_plain {
        stage.wait_for_capture(PATIENCE)?;
    }
    let ready = stage.client().wait_for_echo(stage.echo_targets()[0], PATIENCE);
    for process in &mut processes {
        process.check()?;
    }
    ready?;
    Ok((processes, stage))
}

/// Says how it is going.
fn tell(sample: &Sample, is_disturbed: bool) {
    let Sample {
        scenario,
        contender,
        workload,
        round,
        foreign,
        figures,
        error,
    } = sample;
    let said = match error {
        Some(error) => format!("failed: {error}"),
        None => {
            let figures = figures.iter().map(|(name, figure)| {
                let digits = if *figure < 100.0 { 2 } else { 0 };
                format!("{name} {figure:.digits$}")
            });
            figures.collect::<Vec<_>>().join(", ")
        }
    };
    let note = if is_disturbed {
        format!(" (disturbed: others used {foreign:.2} processors)")
    } else {
        String::new()
    };
    eprintln!(
        "{round} {} {} {workload}: {said}{note}",
        scenario.name(),
        contender.name()
    );
}
