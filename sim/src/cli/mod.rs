//! The command `replay`, which is also `tungate replay`.
//!
//! Reports go to standard output, complaints and progress to standard error. What is on standard output is the same on
//! every run.

mod args;
mod inputs;
mod printer;
mod progress;
mod source;

use std::error::Error;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use tungate_config::{Diagnostic, Diagnostics, Loaded};
use tungate_engine::journal::JournalError;
use tungate_engine::{Config, Policy, Timestamp};

pub use self::args::Args;
use self::inputs::Inputs;
use self::printer::Printer;
use self::progress::Progress;
use self::source::{Opened, Source};
use crate::capture::Capture;
use crate::outcome::Sink;
use crate::replay::{self, Options, Outcome};
use crate::report::expect::Expectations;
use crate::report::{Collector, Facts, JournalReport, Output, OutputError, Report, Screen};

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

/// What one input has come to.
enum Reported {
    Capture(Box<Report>),
    Journal(JournalReport),
}

/// A usage that makes no sense, or an input that cannot be replayed in this way.
#[derive(Debug, thiserror::Error)]
enum UsageError {
    #[error("{option} takes one capture, but there are {captures}\nhint: replay them one by one")]
    OneCapture { option: &'static str, captures: usize },
    #[error("{option} does not go with \"{name}\", which is a journal\nhint: a journal holds its own policy")]
    Journal { option: &'static str, name: String },
    #[error("journal \"{name}\" cannot be used: {error}{}", journal_hint(.error))]
    BadJournal { name: String, error: io::Error },
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
    args.prefilter.check()?;
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
    let outputs = args.outputs();
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

/// The way out, where the error does not say it itself.
fn journal_hint(error: &io::Error) -> &'static str {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<JournalError>());
    match inner {
        Some(JournalError::NotAJournal | JournalError::Damaged { .. } | JournalError::Cut { .. }) => {
            "\nhint: its very beginning is damaged; record or copy it again"
        }
        Some(JournalError::Version { .. }) | None => "",
    }
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
            // A capture has no kernel behind it that could carry flows: verdicts are the same.
            config: Config {
                bypass: false,
                ..loaded.engine
            },
            clients: args.clients.clone(),
            midstream: args.midstream,
            checksums: args.checksums,
            congestion: args.congestion,
            prefilter: args.prefilter,
            jobs: args.jobs,
            ..Options::default()
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
                Ok(mut reported) => {
                    status = status.max(if reported.differs() {
                        Status::Differs
                    } else {
                        Status::Expected
                    });
                    printer.print(&mut reported)?;
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

    fn replay(&self, path: &Path, progress: &mut Progress) -> Result<Reported, Box<dyn Error>> {
        let mut source = Source::new(path, self.against.is_some())?;
        match source.open()? {
            Opened::Journal(journal) => self.replay_journal(source.name(), journal),
            Opened::Capture(capture) => self.replay_capture(&mut source, capture, progress),
        }
    }

    fn replay_journal(&self, name: String, journal: Box<dyn Read>) -> Result<Reported, Box<dyn Error>> {
        if let Some(option) = self.args.for_captures_only() {
            return Err(UsageError::Journal { option, name }.into());
        }
        match replay::repeat(journal) {
            Ok(repeated) => Ok(Reported::Journal(JournalReport::new(
                name,
                repeated,
                self.expectations.as_ref(),
            ))),
            Err(error) => Err(UsageError::BadJournal { name, error }.into()),
        }
    }

    fn replay_capture(
        &self,
        source: &mut Source<'_>,
        mut capture: Capture,
        progress: &mut Progress,
    ) -> Result<Reported, Box<dyn Error>> {
        let mut collector = self.collector()?;
        let mut journal = self.args.journal.as_deref().map(Output::create).transpose()?;
        let outcome = play(
            &mut capture,
            &self.policy.options,
            journal.as_mut(),
            &mut collector,
            progress,
        )?;
        journal.map_or(Ok(()), Output::finish)?;
        let mut report = collector.finish(Facts {
            capture: source.name(),
            policy: self.policy.name.clone(),
            changes: self.changes.clone(),
            format: capture.format().to_string(),
            link_types: link_types(&capture),
            outcome,
        })?;
        if let Some(against) = &self.against {
            let mut capture = source.reopen()?;
            let mut comparison = report.comparison()?;
            let outcome = play(&mut capture, &against.options, None, &mut comparison, progress)?;
            let found = comparison.finish(against.name.clone(), outcome.digest)?;
            report.add_comparison(found);
        }
        Ok(Reported::Capture(Box::new(report)))
    }

    /// A collector that writes the files that were asked for.
    fn collector(&self) -> Result<Collector, OutputError> {
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
        Ok(collector)
    }
}

impl Reported {
    fn differs(&self) -> bool {
        match self {
            Self::Capture(report) => report.differs(),
            Self::Journal(report) => report.differs(),
        }
    }
}

fn play(
    capture: &mut Capture,
    options: &Options,
    journal: Option<&mut Output>,
    sink: &mut dyn Sink,
    progress: &mut Progress,
) -> io::Result<Outcome> {
    let size = capture.size();
    let journal = journal.map(|output| output as &mut dyn Write);
    progress.start();
    let outcome = replay::run(capture, options, journal, sink, &mut |at: replay::Progress| {
        progress.at(at.packets, at.bytes, size);
    })?;
    progress.stop(outcome.totals.read);
    Ok(outcome)
}

/// The names of the capture's link types, each once.
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
