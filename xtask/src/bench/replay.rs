//! `cargo xtask bench replay`: `replay` beside tshark and tcpdump on one capture, and its memory on long ones.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;
use tempfile::TempDir;
use tungate_sim::capture::{Capture, PcapWriter};

use super::child::{Usage, measure};
use super::{Machine, Samples, folder, grouped, write_json};
use crate::workspace::Workspace;

/// The capture of the collection in `TUNGATE_CAPTURES` that is made for this.
const CAPTURE: &str = "throughput-gz--zeek--echo-connections.pcap.gz";

/// How long the captures are whose memory is compared, in bytes.
const LENGTHS: [u64; 2] = [100_000_000, 1_000_000_000];

/// How far each repetition of a capture lies behind the one before, in nanoseconds: an hour, so that its conversations
/// find those of the last one over and forgotten.
const APART: u64 = 3_600_000_000_000;

/// Packets per second are to be so many times tshark's.
const TIMES_TSHARK: f64 = 10.0;

#[derive(Args)]
pub(crate) struct Options {
    /// What to replay; by default one from the folder that TUNGATE_CAPTURES names
    capture: Option<PathBuf>,
    /// How often to run each program; the median counts
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// How often to replay each long capture; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    long_runs: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
enum Program {
    #[serde(rename = "replay --jobs 1")]
    OneJob,
    #[serde(rename = "replay")]
    Replay,
    #[serde(rename = "tshark -q -r")]
    Tshark,
    #[serde(rename = "tcpdump -r -w /dev/null")]
    Tcpdump,
}

#[derive(Serialize)]
struct Results {
    machine: Machine,
    capture: Contents,
    programs: Vec<ProgramResults>,
    long: Vec<LongResults>,
}

#[derive(Serialize)]
struct ProgramResults {
    program: Program,
    runs: Samples,
}

#[derive(Serialize)]
struct LongResults {
    capture: Contents,
    runs: Samples,
}

/// A capture to be read.
#[derive(Debug, Clone, Serialize)]
struct Contents {
    name: String,
    packets: u64,
    bytes: u64,
}

pub(super) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let original = options.capture.clone().map_or_else(default_capture, Ok)?;
    let replay = workspace.executable(&["build", "--release", "--package=tungate-sim", "--bin=replay"])?;
    let scratch = TempDir::new_in(folder(workspace)?).context("cannot make a temporary folder")?;
    let file = scratch.path().join("capture.pcap");
    let capture = repeat(&original, &file, 1)?;
    let mut results = Results {
        machine: Machine::describe(),
        capture,
        programs: Program::installed(),
        long: Vec::new(),
    };
    for run in 1..=options.runs {
        eprint!("\rrun {run} of {} ", options.runs);
        for ProgramResults { program, runs } in &mut results.programs {
            let usage = measure(&mut program.command(&replay, &file))?;
            note(runs, usage, results.capture.packets);
        }
    }
    eprintln!();
    for length in LENGTHS {
        let long = scratch.path().join("long.pcap");
        let capture = repeat(&original, &long, length)?;
        let mut runs = Samples::default();
        for run in 1..=options.long_runs {
            eprint!(
                "\r{} bytes, run {run} of {} ",
                grouped(capture.bytes),
                options.long_runs
            );
            let usage = measure(&mut Program::Replay.command(&replay, &long))?;
            note(&mut runs, usage, capture.packets);
        }
        eprintln!();
        results.long.push(LongResults { capture, runs });
    }
    scratch.close().context("cannot remove the temporary folder")?;
    results.print();
    write_json(workspace, "replay.json", &results)
}

fn default_capture() -> Result<PathBuf> {
    let folder = std::env::var_os("TUNGATE_CAPTURES")
        .context("name a capture, or the folder of the collection in TUNGATE_CAPTURES")?;
    Ok(Path::new(&folder).join(CAPTURE))
}

/// Writes the packets of `original` to `path` until that has at least `least` bytes, once in any case. What was cut by
/// a snap length is left out: it would count as damage.
fn repeat(original: &Path, path: &Path, least: u64) -> Result<Contents> {
    let cannot_write = || format!("cannot write {}", path.display());
    let file = File::create(path).with_context(cannot_write)?;
    let mut sink = Some(BufWriter::with_capacity(1 << 20, file));
    let mut writer = None;
    let (mut packets, mut bytes) = (0, 24);
    for repetition in 0.. {
        let mut capture = Capture::open(original)?;
        let link_type = capture
            .interfaces()
            .first()
            .with_context(|| format!("{} declares no interface", original.display()))?
            .link_type;
        let writer = match &mut writer {
            Some(writer) => writer,
            none => {
                let sink = sink.take().expect("there is one writer");
                none.insert(PcapWriter::new(sink, link_type).with_context(cannot_write)?)
            }
        };
        let before = packets;
        while let Some(record) = capture.next_record()? {
            ensure!(
                record.link_type == link_type,
                "{} has packets of several link types",
                original.display()
            );
            if record.original_length as usize > record.bytes.len() {
                continue;
            }
            writer
                .write(record.unix_nanos + repetition * APART, record.bytes)
                .with_context(cannot_write)?;
            packets += 1;
            bytes += 16 + record.bytes.len() as u64;
        }
        ensure!(packets > before, "{} has no whole packets", original.display());
        if bytes >= least {
            break;
        }
    }
    let Some(writer) = writer else {
        bail!("{} was not read", original.display());
    };
    writer.finish().with_context(cannot_write)?;
    let name = original.file_name().unwrap_or_default().to_string_lossy();
    Ok(Contents {
        name: name.into_owned(),
        packets,
        bytes,
    })
}

fn note(runs: &mut Samples, usage: Usage, packets: u64) {
    let seconds = usage.elapsed.as_secs_f64();
    runs.add("seconds", seconds);
    runs.add("processor_seconds", usage.processor.as_secs_f64());
    runs.add("packets_per_second", packets as f64 / seconds);
    runs.add("peak_bytes", usage.peak as f64);
}

impl Program {
    /// Those that are there: tshark and tcpdump may not be.
    fn installed() -> Vec<ProgramResults> {
        let is_installed = |name: &str| Command::new(name).arg("--version").output().is_ok();
        let programs = [Self::OneJob, Self::Replay, Self::Tshark, Self::Tcpdump].into_iter();
        programs
            .filter(|program| match program {
                Self::OneJob | Self::Replay => true,
                Self::Tshark => is_installed("tshark"),
                Self::Tcpdump => is_installed("tcpdump"),
            })
            .map(|program| ProgramResults {
                program,
                runs: Samples::default(),
            })
            .collect()
    }

    fn command(self, replay: &Path, capture: &Path) -> Command {
        let mut command = match self {
            Self::OneJob | Self::Replay => Command::new(replay),
            Self::Tshark => Command::new("tshark"),
            Self::Tcpdump => Command::new("tcpdump"),
        };
        match self {
            Self::OneJob => command.arg("--jobs=1").arg(capture),
            Self::Replay => command.arg(capture),
            Self::Tshark => command.args(["-q", "-r"]).arg(capture),
            Self::Tcpdump => command.arg("-r").arg(capture).args(["-w", "/dev/null"]),
        };
        command
    }

    fn name(self) -> &'static str {
        match self {
            Self::OneJob => "`replay --jobs 1`",
            Self::Replay => "`replay`",
            Self::Tshark => "`tshark -q -r`",
            Self::Tcpdump => "`tcpdump -r … -w /dev/null`",
        }
    }
}

impl Results {
    fn print(&self) {
        println!("## Replay\n");
        self.machine.print();
        println!(
            "{}, unpacked: {} packets, {} bytes.\n",
            self.capture.name,
            grouped(self.capture.packets),
            grouped(self.capture.bytes)
        );
        println!("| program | packets/s | seconds | processor seconds | peak memory |");
        println!("|---|---|---|---|---|");
        for ProgramResults { program, runs } in &self.programs {
            print_row(program.name(), runs);
        }
        println!("\n### Memory on long captures\n");
        println!(
            "The same packets again and again, each time an hour later; `replay` with its default jobs.\n"
        );
        println!("| capture | packets/s | seconds | processor seconds | peak memory |");
        println!("|---|---|---|---|---|");
        for LongResults { capture, runs } in &self.long {
            let megabytes = capture.bytes / 1_000_000;
            let name = format!("{} MB, {} packets", grouped(megabytes), grouped(capture.packets));
            print_row(&name, runs);
        }
        println!("\n### Target\n");
        let speed = |wanted: Program| {
            let found = self.programs.iter().find(|each| each.program == wanted);
            found.and_then(|each| each.runs.median("packets_per_second"))
        };
        match (speed(Program::Replay), speed(Program::Tshark)) {
            (Some(ours), Some(theirs)) => {
                let times = ours / theirs;
                let word = if times >= TIMES_TSHARK {
                    "reached"
                } else {
                    "MISSED"
                };
                println!("- packets/s, times tshark's: {times:.1} of {TIMES_TSHARK:.0}, {word}");
            }
            (Some(_) | None, None) | (None, Some(_)) => println!("- tshark is not installed: not compared"),
        }
    }
}

fn print_row(name: &str, runs: &Samples) {
    let median = |figure| runs.median(figure).expect("every program was measured");
    println!(
        "| {name} | {} | {:.3} | {:.3} | {:.1} MB |",
        grouped(median("packets_per_second") as u64),
        median("seconds"),
        median("processor_seconds"),
        median("peak_bytes") / 1e6
    );
}
