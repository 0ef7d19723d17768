//! `cargo xtask bench loss`: the engine as a sender over imperfect paths, on virtual time; with `--linux` also the
//! kernel's Cubic and BBR over the same paths, in real time.
//!
//! Cells run in processes of their own, several at a time as far as their rates allow. What a cell has shown is kept
//! in `target/bench/loss.json`, where another run of the same cell replaces it: the grid can be measured in pieces.

mod cell;
mod forwarder;
mod linux;
mod live;
mod model;
mod namespace;
mod priority;
mod table;
mod wakes;

use std::io::{Write, stdin, stdout};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fs, thread};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};

use self::cell::{Cell, Control, Figures, Losses, Sender, Task};
use self::wakes::Wakes;
use super::{Machine, folder};
use crate::workspace::Workspace;

#[derive(Args)]
pub(crate) struct Options {
    /// How often to run each cell, each time with another seed; the median counts
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Seconds for which a cell is filled
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// A tenth of the cells, three seeds
    #[arg(long)]
    quick: bool,
    /// Measure the kernel's senders too, in namespaces and in real time; needs root
    #[arg(long)]
    linux: bool,
    /// Measure a running appliance too, in the same way
    #[arg(long)]
    live: bool,
    /// Do not run the model
    #[arg(long)]
    no_model: bool,
    /// Only cells whose name has all of these words, or one of several: `100M 20ms 1%|3% x8`
    #[arg(long, value_name = "WORDS", value_delimiter = ' ')]
    only: Vec<String>,
    /// Processes at a time, for the model
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    jobs: u8,
}

/// All that has been measured.
#[derive(Serialize, Deserialize, Default)]
struct Results {
    measured: Vec<Measured>,
}

#[derive(Serialize, Deserialize, Clone)]
struct Measured {
    /// When: a day.
    date: String,
    cell: Cell,
    sender: Sender,
    #[serde(flatten)]
    shown: Shown,
}

/// What the runs of a cell have shown.
#[derive(Serialize, Deserialize, Clone)]
struct Shown {
    runs: Vec<Figures>,
    /// How late threads were, in real time and with one flow.
    #[serde(default)]
    wakes: Option<Wakes>,
}

/// A piece of work for a process.
#[derive(Serialize, Deserialize, Clone)]
struct Work {
    cell: Cell,
    sender: Sender,
    seeds: u64,
    /// The program of a live one.
    appliance: Option<PathBuf>,
    /// How late threads are in the model.
    #[serde(default)]
    wakes: Wakes,
}

pub(super) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let program = if cfg!(debug_assertions) {
        workspace.executable(&["build", "--release", "--package=xtask", "--bin=xtask"])?
    } else {
        std::env::current_exe().context("cannot find this program")?
    };
    let appliance = match options.live {
        true => Some(workspace.executable(&["build", "--release", "--package=tungate", "--bin=tungate"])?),
        false => None,
    };
    let path = folder(workspace)?.join("loss.json");
    let mut results = Results::read(&path)?;
    let work = |senders: [Sender; 2], results: &Results| -> Vec<Work> {
        let cells = cells(options);
        cells
            .into_iter()
            .flat_map(|(cell, seeds)| {
                senders.map(|sender| Work {
                    cell,
                    sender,
                    seeds,
                    appliance: appliance.clone(),
                    wakes: results.wakes(&cell).unwrap_or_default(),
                })
            })
            .collect()
    };
    let mut senders = Vec::new();
    if options.linux {
        senders.push([Sender::Linux(Control::Cubic), Sender::Linux(Control::Bbr)]);
    }
    if options.live {
        senders.push([Sender::Live(Control::Cubic), Sender::Live(Control::Bbr)]);
    }
    for senders in senders {
        let mut work = work(senders, &results);
        // What the forwarder carries at a time: more would make it late.
        for megabits in [10, 100, 200, 1000] {
            let (now, later): (Vec<Work>, Vec<Work>) =
                work.into_iter().partition(|work| work.cell.megabits == megabits);
            let jobs = usize::try_from(400 / megabits).unwrap_or(1).clamp(1, 16);
            results.merge(carry_out(&program, &now, jobs)?);
            work = later;
        }
    }
    if !options.no_model {
        // Last, for then it is known how late a running appliance has been.
        let work = work(
            [Sender::Engine(Control::Cubic), Sender::Engine(Control::Bbr)],
            &results,
        );
        results.merge(carry_out(&program, &work, options.jobs.into())?);
    }
    results.write(&path)?;
    println!("## Loss\n");
    Machine::describe().print();
    table::print(&results.measured, &options.only);
    println!("\nall runs: {}", path.display());
    Ok(())
}

/// What a process of its own does: reads a piece of work, writes figures.
pub(crate) fn run_cell() -> Result<()> {
    let work: Work = serde_json::from_reader(stdin()).context("cannot read what to measure")?;
    let shown = match work.sender {
        Sender::Engine(control) => {
            let runs = (1..=work.seeds).map(|seed| model::measure(&work.cell, control, seed, &work.wakes));
            Shown {
                runs: runs.collect(),
                wakes: None,
            }
        }
        Sender::Linux(control) => linux::measure(&work.cell, control, work.seeds, None)?,
        Sender::Live(control) => linux::measure(&work.cell, control, work.seeds, work.appliance.as_deref())?,
    };
    serde_json::to_writer(stdout(), &shown).context("cannot write the figures")
}

/// The cells, each with how many seeds.
fn cells(options: &Options) -> Vec<(Cell, u64)> {
    let seeds = if options.quick {
        3.min(options.seeds)
    } else {
        options.seeds
    };
    let losses = [
        Losses::None,
        Losses::Random(0.01),
        Losses::Random(0.1),
        Losses::Random(1.0),
        Losses::Random(3.0),
        Losses::Bursts,
    ];
    let mut cells = Vec::new();
    for (megabits, round_trip_millis, queue) in [
        (10, 1, 64),
        (10, 20, 64),
        (10, 100, 100),
        (100, 1, 256),
        (100, 20, 256),
        (100, 100, 256),
        (1000, 1, 1000),
        (1000, 20, 2000),
        (1000, 100, 2000),
    ] {
        for loss in losses {
            for flows in [1, 8] {
                let task = Task::Fill(options.seconds);
                let cell = Cell {
                    megabits,
                    round_trip_millis,
                    queue,
                    loss,
                    flows,
                    task,
                    beside: false,
                };
                if !options.quick || (flows == 1 && round_trip_millis == 20 && megabits == 100) {
                    cells.push((cell, seeds));
                }
            }
        }
    }
    let base = Cell {
        megabits: 100,
        round_trip_millis: 20,
        queue: 256,
        loss: Losses::None,
        flows: 1,
        task: Task::Fill(options.seconds),
        beside: false,
    };
    for queue in [5, 10] {
        cells.push((Cell { queue, ..base }, seeds));
    }
    let faster = Cell {
        megabits: 200,
        queue: 512,
        loss: Losses::Random(0.1),
        ..base
    };
    cells.push((faster, seeds));
    for loss in [Losses::None, Losses::Random(1.0), Losses::Random(3.0)] {
        for bytes in [10_000, 100_000, 1_000_000] {
            let task = Task::Transfer(bytes);
            cells.push((Cell { loss, task, ..base }, 20 * seeds));
        }
    }
    for flows in [2, 8] {
        for beside in [false, true] {
            let task = Task::Fill(6 * options.seconds);
            let cell = Cell {
                flows,
                task,
                beside,
                ..base
            };
            cells.push((cell, seeds.min(3)));
        }
    }
    cells.retain(|(cell, _)| cell.has(&options.only));
    cells
}

/// Runs every piece of work in a process of its own, `jobs` of them at a time.
fn carry_out(program: &PathBuf, work: &[Work], jobs: usize) -> Result<Vec<Measured>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let (date, total) = (today(), work.len());
    let worker = || -> Result<()> {
        while let Some(work) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            let shown = measure(program, work)?;
            let mut done = done.lock().expect("no worker has panicked");
            done.push(Measured {
                date: date.clone(),
                cell: work.cell,
                sender: work.sender,
                shown,
            });
            eprint!("\r{} of {total} ", done.len());
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })?;
    eprintln!();
    Ok(done.into_inner().expect("no worker has panicked"))
}

fn measure(program: &PathBuf, work: &Work) -> Result<Shown> {
    let what = || format!("{} by {}", work.cell, work.sender.name());
    let mut child = Command::new(program)
        .arg("loss-cell")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(what)?;
    let text = serde_json::to_vec(work).context("cannot write what to measure")?;
    child
        .stdin
        .take()
        .expect("it is piped")
        .write_all(&text)
        .with_context(what)?;
    let output = child.wait_with_output().with_context(what)?;
    ensure!(output.status.success(), "{}: {}", what(), output.status);
    serde_json::from_slice(&output.stdout).with_context(what)
}

/// The day, by the clock of this machine.
fn today() -> String {
    let output = Command::new("date").arg("+%F").output();
    output.map_or_else(
        |_| "some day".to_owned(),
        |output| String::from_utf8_lossy(&output.stdout).trim().to_owned(),
    )
}

impl Results {
    fn read(path: &PathBuf) -> Result<Self> {
        match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text)
                .with_context(|| format!("{} is of another version: remove it", path.display())),
            Err(_) => Ok(Self::default()),
        }
    }

    /// How late threads were where a running appliance has sent over the same path. By Cubic: what is paced answers an
    /// acknowledgment when its time has come.
    fn wakes(&self, cell: &Cell) -> Option<Wakes> {
        let live = |measured: &&Measured| {
            measured.sender == Sender::Live(Control::Cubic) && measured.cell.to_string() == cell.to_string()
        };
        self.measured.iter().find(live)?.shown.wakes
    }

    fn write(&self, path: &PathBuf) -> Result<()> {
        let text = serde_json::to_vec(self).context("cannot write JSON")?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    fn merge(&mut self, new: Vec<Measured>) {
        let key = |measured: &Measured| (measured.cell.to_string(), measured.sender);
        for measured in new {
            self.measured.retain(|old| key(old) != key(&measured));
            self.measured.push(measured);
        }
    }
}
