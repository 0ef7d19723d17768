//! What a replay found out, for people and for programs.
//!
//! A [`Collector`] takes a replay's records as they become final, writes what goes to files at once and keeps counts;
//! with the replay's [`Facts`] it becomes a [`Report`]. Memory does not grow with the capture: every finished flow goes
//! to a temporary file, of which 16 bytes a flow stay in memory as an index, and only the largest flows are kept for the
//! terminal. Everything a report prints is the same on every run; times are the capture's own.

mod against;
mod attempts;
mod emitted;
pub mod expect;
mod explain;
mod flows;
mod journal;
mod json;
mod output;
mod packets;
mod rules;
mod spool;
mod table;
#[cfg(test)]
mod tests;
mod text;
mod total;

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tungate_engine::Timestamp;

use self::against::DecisionLog;
pub use self::against::{Against, Comparison};
use self::emitted::EmittedPackets;
use self::expect::{Expectations, Expecting, Mismatch};
use self::flows::{FlowSummary, Flows};
pub use self::journal::JournalReport;
pub use self::json::JsonReports;
pub(crate) use self::output::Output;
pub use self::output::OutputError;
use self::packets::PacketLines;
use self::rules::RuleNames;
use self::spool::StoredFlows;
pub use self::text::Screen;
pub use self::total::Total;
use crate::outcome::{Emitted, FlowRecord, PacketRecord, Sink, Totals};
use crate::replay::Outcome;

/// What is known of a replay besides its records.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The capture's name as it was given.
    pub capture: String,
    /// The policy's name: the files it came from, or `default`.
    pub policy: String,
    /// Policies that took over on the way: when, and from which file.
    pub changes: Vec<(Timestamp, String)>,
    /// The capture's format in words.
    pub format: String,
    /// Names of its link types, each once.
    pub link_types: Vec<String>,
    /// What the replay came to.
    pub outcome: Outcome,
}

/// Takes a replay's records.
pub struct Collector {
    rules: RuleNames,
    flows: Flows,
    packets: Option<PacketLines>,
    transcript: Option<Output>,
    emitted: Option<EmittedPackets>,
    decisions: Option<DecisionLog>,
    expecting: Option<Expecting>,
}

/// A replay as it is reported.
pub struct Report {
    facts: Facts,
    rules: RuleNames,
    flows: FlowSummary,
    stored: StoredFlows,
    decisions: Option<DecisionLog>,
    against: Option<Against>,
    mismatches: Option<Vec<Mismatch>>,
}

/// A report that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A file that was asked for could not be written.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// What does not fit into memory could not be kept on disk.
    #[error("cannot keep a temporary file in \"{}\": {error}\nhint: TMPDIR chooses another folder", .folder.display())]
    Spool {
        /// The folder for temporary files.
        folder: PathBuf,
        /// Why not.
        error: io::Error,
    },
}

impl From<io::Error> for ReportError {
    fn from(error: io::Error) -> Self {
        Self::Spool {
            folder: std::env::temp_dir(),
            error,
        }
    }
}

impl Collector {
    /// A collector that writes no files and expects nothing.
    pub fn new() -> Self {
        Self {
            rules: RuleNames::default(),
            flows: Flows::new(),
            packets: None,
            transcript: None,
            emitted: None,
            decisions: None,
            expecting: None,
        }
    }

    /// Writes a line of JSON per captured packet to `path`, `-` being standard output here and below.
    ///
    /// # Errors
    ///
    /// [`OutputError`] when the file cannot be made, here and below.
    pub fn write_packets(&mut self, path: &Path) -> Result<(), OutputError> {
        self.packets = Some(PacketLines::new(Output::create(path)?));
        Ok(())
    }

    /// Writes what goes into and comes out of the engine, a line each, to `path`.
    pub fn write_transcript(&mut self, path: &Path) -> Result<(), OutputError> {
        self.transcript = Some(Output::create(path)?);
        Ok(())
    }

    /// Writes the packets that the engine emits to `path`, a pcapng file, with the decisions as comments.
    pub fn write_emitted(&mut self, path: &Path) -> Result<(), OutputError> {
        self.emitted = Some(EmittedPackets::new(Output::create(path)?));
        Ok(())
    }

    /// Compares what is found with `expectations`.
    pub fn expect(&mut self, expectations: Expectations) {
        self.expecting = Some(Expecting::new(expectations));
    }

    /// Keeps every packet's decision for [`Report::comparison`].
    pub fn keep_decisions(&mut self) {
        self.decisions = Some(DecisionLog::new());
    }

    /// Completes the files and makes the report.
    ///
    /// # Errors
    ///
    /// [`ReportError`] when a file could not be written to its end.
    pub fn finish(self, facts: Facts) -> Result<Report, ReportError> {
        self.packets.map_or(Ok(()), PacketLines::finish)?;
        self.transcript.map_or(Ok(()), Output::finish)?;
        self.emitted.map_or(Ok(()), EmittedPackets::finish)?;
        let (flows, stored) = self.flows.finish()?;
        let mut report = Report {
            facts,
            rules: self.rules,
            flows,
            stored,
            decisions: self.decisions,
            against: None,
            mismatches: None,
        };
        report.mismatches = self.expecting.map(|expecting| expecting.finish(&report));
        Ok(report)
    }
}

impl Default for Collector {
    fn default() -> Self {
        Self::new()
    }
}

impl Sink for Collector {
    fn started(&mut self, unix_nanos: u64) {
        if let Some(emitted) = &mut self.emitted {
            emitted.started(unix_nanos);
        }
    }

    fn packet(&mut self, packet: &PacketRecord) {
        let rule = packet
            .rule
            .as_ref()
            .map(|(policy, rule)| self.rules.id(policy, *rule));
        if let Some(packets) = &mut self.packets {
            packets.add(packet, rule.map(|rule| self.rules.name(rule)));
        }
        if let Some(decisions) = &mut self.decisions {
            decisions.add(packet, rule);
        }
        if let Some(emitted) = &mut self.emitted {
            emitted.decided(packet, rule);
        }
    }

    fn flow(&mut self, flow: FlowRecord) {
        if let Some(expecting) = &mut self.expecting {
            expecting.flow(&flow);
        }
        if let Some(emitted) = &mut self.emitted {
            emitted.ended(flow.id);
        }
        self.flows.add(flow);
    }

    fn emitted(&mut self, packet: &Emitted<'_>) {
        if let Some(emitted) = &mut self.emitted {
            emitted.add(packet, &self.rules);
        }
    }

    fn line(&mut self, time: Timestamp, text: fmt::Arguments<'_>) {
        if let Some(transcript) = &mut self.transcript {
            let micros = time.as_nanos() / 1000;
            // The output keeps its first failure.
            let _ = writeln!(
                transcript,
                "{}.{:06}  {text}",
                micros / 1_000_000,
                micros % 1_000_000
            );
        }
    }

    fn wants_emitted(&self) -> bool {
        self.emitted.is_some()
    }

    fn wants_lines(&self) -> bool {
        self.transcript.is_some()
    }

    fn wants_packets(&self) -> bool {
        self.packets.is_some() || self.decisions.is_some() || self.emitted.is_some()
    }
}

impl Report {
    /// Prepares to compare with another replay of the same capture, whose records the comparison takes.
    ///
    /// # Errors
    ///
    /// [`ReportError::Spool`] when the decisions could not be kept.
    ///
    /// # Panics
    ///
    /// If [`Collector::keep_decisions`] was not asked for.
    pub fn comparison(&mut self) -> Result<Comparison<'_>, ReportError> {
        let decisions = self.decisions.as_mut().expect("decisions were kept");
        Ok(Comparison::new(decisions, &self.rules, &mut self.stored)?)
    }

    /// Adds what a comparison has found, as [`Comparison::finish`] hands it over.
    pub fn add_comparison(&mut self, against: Against) {
        self.against = Some(against);
    }

    /// Whether anything is not as expected: an expectation, the other policy, or pre-filter and engine disagree.
    pub fn differs(&self) -> bool {
        self.facts.outcome.totals.parity_disagreements > 0
            || self.against.as_ref().is_some_and(Against::differs)
            || self
                .mismatches
                .as_ref()
                .is_some_and(|mismatches| !mismatches.is_empty())
    }

    /// What was expected and not found.
    pub fn mismatches(&self) -> &[Mismatch] {
        self.mismatches.as_deref().unwrap_or_default()
    }
}

/// When the capture's first packet was captured.
fn start_time(totals: &Totals) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(totals.started)
}
