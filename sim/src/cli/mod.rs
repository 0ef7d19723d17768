//! The command `replay`, which is also `tungate replay`.
//!
//! Reports go to standard output, complaints and progress to standard error. What is on standard output is the same on
//! every run.

mod args;
mod inputs;
mod progress;

use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use tungate_config::{Diagnostic, Diagnostics, Loaded};
use tungate_engine::{Policy, Timestamp};

pub use self::args::Args;
use self::inputs::Inputs;
use self::progress::Progress;
use crate::capture::Capture;
use crate::outcome::Sink;
use crate::replay::{self, Options, Outcome};
use crate::report::expect::Expectations;
use crate::report::{Collector, Facts, JsonReports, Output, Report, ReportError, Screen, Total};

/// How a run ended; of several captures, the worst counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Status {
    /// As expected.
    Expected = 0,
    /// An expectation does not hold, another policy makes a difference, or the two paths contradict each other.
    Differs = 1,
    /// A capture, or another file, cannot be used.
    Unusable = 2,
}

/// Everything that is the same for all captures.
struct Session<'a> {
    args: &'a Args,
    policy: Configured,
    against: Option<Configured>,
    changes: Vec<(Timestamp, String)>,
    expectations: Option<Expectations>,
}

/// A policy and what else its configuration says, ready for a replay.
struct Configured {
    name: String,
    options: Options,
}

/// A usage that makes no sense, or an input that cannot be replayed in this way.
#[derive(Debug, thiserror::Error)]
enum UsageError {
    #[error("{option} takes one capture, but there are {captures}\nhint: replay them one by one")]
    OneCapture { option: &'static str, captures: usize },
    #[error("{first} and {second} both go to standard output\nhint: name a file for one of them")]
    OneOutput {
        first: &'static str,
        second: &'static str,
    },
}

/// Runs the command; the exit code is 0 if all is as expected, 1 if something differs, and 2 if a file cannot be used.
pub fn run(args: &Args) -> ExitCode {
    let status = prepare(args).and_then(|(session, inputs)| session.replay_all(&inputs));
    let status = status.unwrap_or_else(|error| {
        complain(error.as_ref());
        Status::Unusable
    });
    ExitCode::from(status as u8)
}

fn prepare(args: &Args) -> Result<(Session<'_>, Inputs), Box<dyn Error>> {
    let inputs = Inputs::find(&args.captures);
    check_outputs(args, inputs.captures.len())?;
    let mut loaded = args
        .config
        .as_deref()
        .map_or_else(|| Ok(Loaded::default()), load)?;
    for list in &args.list {
        let found = tungate_config::list_file(list, &mut |_| ())?;
        warn(&found.warnings);
        loaded.policy.lists.extend(found.entries);
    }
    let names = args
        .config
        .iter()
        .chain(&args.list)
        .map(|path| path.display().to_string());
    let name = names.collect::<Vec<_>>().join(" + ");
    let mut policy = Configured::new(
        if name.is_empty() {
            "default".to_owned()
        } else {
            name
        },
        loaded,
        args,
    );
    let mut changes = Vec::new();
    for change in &args.change {
        let time = Timestamp::ZERO + change.after;
        policy
            .options
            .changes
            .push((time, Arc::new(Policy::new(load(&change.file)?.policy))));
        changes.push((time, change.file.display().to_string()));
    }
    policy.options.changes.sort_by_key(|&(time, _)| time);
    changes.sort_by_key(|&(time, _)| time);
    let against = match &args.against {
        Some(path) => Some(Configured::new(path.display().to_string(), load(path)?, args)),
        None => None,
    };
    let expectations = args.expect.as_deref().map(Expectations::load).transpose()?;
    Ok((
        Session {
            args,
            policy,
            against,
            changes,
            expectations,
        },
        inputs,
    ))
}

/// Tells on standard error what is wrong.
fn complain(error: &(dyn Error + 'static)) {
    let screen = Screen::stderr();
    match error.downcast_ref::<Diagnostics>() {
        Some(diagnostics) => eprintln!("{}", diagnostics.render(screen.colour)),
        None => eprintln!("{} {error}", screen.error_label()),
    }
}

fn warn(warnings: &[Diagnostic]) {
    let colour = Screen::stderr().colour;
    warnings
        .iter()
        .for_each(|warning| eprintln!("{}", warning.render(colour)));
}

/// Refuses outputs that would overwrite or mingle with each other.
fn check_outputs(args: &Args, captures: usize) -> Result<(), UsageError> {
    let outputs = outputs(args);
    match outputs.first() {
        Some(&(option, _)) if captures > 1 => return Err(UsageError::OneCapture { option, captures }),
        Some(_) | None => {}
    }
    let json = args.json.then_some("--json");
    let mut to_stdout = json.into_iter().chain(
        outputs
            .iter()
            .filter(|(_, path)| is_dash(path))
            .map(|&(option, _)| option),
    );
    match (to_stdout.next(), to_stdout.next()) {
        (Some(first), Some(second)) => Err(UsageError::OneOutput { first, second }),
        (Some(_) | None, None) | (None, Some(_)) => Ok(()),
    }
}

/// The files to write, each with its option.
fn outputs(args: &Args) -> Vec<(&'static str, &Path)> {
    let all = [
        ("--packets", &args.packets),
        ("--out", &args.out),
        ("--transcript", &args.transcript),
        ("--journal", &args.journal),
    ];
    all.into_iter()
        .filter_map(|(option, path)| Some((option, path.as_deref()?)))
        .collect()
}

fn is_dash(path: &Path) -> bool {
    path == Path::new("-")
}

/// Reads a configuration and prints its warnings.
fn load(path: &Path) -> Result<Loaded, Diagnostics> {
    let loaded = tungate_config::load(path, &mut |_| ())?;
    warn(&loaded.warnings);
    Ok(loaded)
}

impl Configured {
    fn new(name: String, loaded: Loaded, args: &Args) -> Self {
        let options = Options {
            policy: Arc::new(Policy::new(loaded.policy)),
            changes: Vec::new(),
            clients: args.clients.clone(),
            midstream: args.midstream,
            checksums: args.checksums,
            congestion: args.congestion,
            jobs: args.jobs.or_else(|| std::thread::available_parallelism().ok()),
        };
        Self { name, options }
    }
}

impl Session<'_> {
    fn replay_all(&self, inputs: &Inputs) -> Result<Status, Box<dyn Error>> {
        let several = inputs.captures.len() > 1;
        let mut status = Status::Expected;
        let mut unusable = inputs.errors.len() as u64;
        inputs.errors.iter().for_each(|error| complain(error));
        let mut progress = Progress::new();
        let mut printer = Printer::new(self.args, several)?;
        for path in &inputs.captures {
            match self.replay(path, &mut progress) {
                Ok(mut report) => {
                    status = status.max(if report.differs() {
                        Status::Differs
                    } else {
                        Status::Expected
                    });
                    printer.print(&mut report)?;
                }
                Err(error) => {
                    complain(error.as_ref());
                    unusable += 1;
                }
            }
            if printer.is_closed() {
                break;
            }
        }
        printer.finish(unusable, inputs.left_out)?;
        progress.tell_speed();
        Ok(if unusable > 0 { Status::Unusable } else { status })
    }

    fn replay(&self, path: &Path, progress: &mut Progress) -> Result<Report, Box<dyn Error>> {
        let mut source = Source::new(path, self.against.is_some())?;
        let mut capture = source.open()?;
        let mut collector = Collector::new();
        if let Some(path) = &self.args.packets {
            collector.write_packets(path)?;
        }
        if let Some(path) = &self.args.out {
            collector.write_emitted(path)?;
        }
        if let Some(path) = &self.args.transcript {
            collector.write_transcript(path)?;
        }
        if let Some(expectations) = &self.expectations {
            collector.expect(expectations.clone());
        }
        if self.against.is_some() {
            collector.keep_decisions();
        }
        let outcome = play(&mut capture, &self.policy.options, &mut collector, progress);
        let mut report = collector.finish(Facts {
            capture: source.name(),
            policy: self.policy.name.clone(),
            changes: self.changes.clone(),
            format: capture.format().to_string(),
            link_types: link_types(&capture),
            damaged: outcome.damaged,
            digest: outcome.digest,
            totals: outcome.totals,
        })?;
        if let Some(against) = &self.against {
            let mut comparison = report.comparison()?;
            let outcome = play(&mut source.open()?, &against.options, &mut comparison, progress);
            let found = comparison.finish(against.name.clone(), outcome.digest)?;
            report.add_comparison(found);
        }
        Ok(report)
    }
}

fn play(capture: &mut Capture, options: &Options, sink: &mut dyn Sink, progress: &mut Progress) -> Outcome {
    let size = capture.size();
    progress.start();
    let outcome = replay::run(capture, options, sink, &mut |at| {
        progress.at(at.packets, at.bytes, size)
    });
    progress.stop(outcome.totals.read);
    outcome
}

fn link_types(capture: &Capture) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for interface in capture.interfaces() {
        let name = interface.link_type.to_string();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Where a capture's bytes come from.
enum Source<'a> {
    File(&'a Path),
    Stdin,
    /// What came by a pipe, kept to be read more than once.
    Kept {
        path: &'a Path,
        file: File,
    },
}

impl<'a> Source<'a> {
    /// Standard input and pipes give their bytes once: what is to be read `twice` is copied to disk.
    fn new(path: &'a Path, twice: bool) -> Result<Self, ReportError> {
        let kept = |mut pipe: Box<dyn Read>| -> Result<Self, ReportError> {
            let mut file = tempfile::tempfile()?;
            io::copy(&mut pipe, &mut file)?;
            Ok(Self::Kept { path, file })
        };
        match (is_dash(path), twice) {
            (true, true) => kept(Box::new(io::stdin())),
            (true, false) => Ok(Self::Stdin),
            (false, true) if path.exists() && !path.is_file() => match File::open(path) {
                Ok(pipe) => kept(Box::new(pipe)),
                Err(_) => Ok(Self::File(path)), // whose opening will tell why
            },
            (false, true | false) => Ok(Self::File(path)),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Stdin => "standard input".to_owned(),
            Self::Kept { path, .. } if is_dash(path) => "standard input".to_owned(),
            Self::File(path) | Self::Kept { path, .. } => path.display().to_string(),
        }
    }

    fn open(&mut self) -> Result<Capture, Box<dyn Error>> {
        Ok(match self {
            Self::File(path) => Capture::open(path)?,
            Self::Stdin => Capture::from_reader(self.name(), io::stdin())?,
            Self::Kept { file, .. } => {
                let mut file = file.try_clone()?;
                file.seek(SeekFrom::Start(0))?;
                Capture::from_reader(self.name(), file)?
            }
        })
    }
}

/// Prints one report after the other.
enum Printer {
    Json(JsonReports<Output>),
    Text {
        output: Output,
        screen: Screen,
        several: bool,
        total: Total,
    },
}

impl Printer {
    /// Reports go to standard output, or to standard error where a file goes to standard output.
    fn new(args: &Args, several: bool) -> io::Result<Self> {
        if args.json {
            return Ok(Self::Json(JsonReports::new(Output::stdout(), several)?));
        }
        let elsewhere = outputs(args).iter().any(|(_, path)| is_dash(path));
        let (output, screen) = match elsewhere {
            false => (Output::stdout(), Screen::stdout()),
            true => (Output::stderr(), Screen::stderr()),
        };
        Ok(Self::Text {
            output,
            screen,
            several,
            total: Total::default(),
        })
    }

    fn print(&mut self, report: &mut Report) -> Result<(), Box<dyn Error>> {
        match self {
            Self::Json(reports) => reports.add(report)?,
            Self::Text {
                output,
                screen,
                several,
                total,
            } => {
                total.add(report);
                output.write_all(report.text(*screen).as_bytes())?;
                if *several {
                    output.write_all(b"\n")?;
                }
                output.flush()?;
            }
        }
        Ok(())
    }

    /// Whether nobody reads what is printed any more.
    fn is_closed(&self) -> bool {
        match self {
            Self::Json(reports) => reports.output().is_closed(),
            Self::Text { output, .. } => output.is_closed(),
        }
    }

    fn finish(self, unusable: u64, left_out: u64) -> Result<(), Box<dyn Error>> {
        match self {
            Self::Json(reports) => reports.finish()?.finish()?,
            Self::Text {
                mut output,
                screen,
                several,
                total,
            } => {
                if several {
                    output.write_all(total.text(screen, unusable, left_out).as_bytes())?;
                }
                output.write_all(screen.hint().as_bytes())?;
                output.finish()?;
            }
        }
        Ok(())
    }
}
