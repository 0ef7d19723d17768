//! `--json`: everything, for programs. `report.schema.json` describes it.
//!
//! One object per capture, one line per top-level key and per flow, so that the output reads well in a pager and can be
//! compared by line. Flows are streamed from disk.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};

use serde::Serialize;
use tungate_engine::Timestamp;

use super::JournalReport;
use super::flows::seconds;
use super::spool::Spool;
use super::{Report, ReportError, start_time};
use crate::outcome::Totals;

/// The value of `schema`: it grows when a key changes its meaning or goes.
pub(super) const SCHEMA: u32 = 1;

/// Writes the reports of several captures, or of one.
pub struct JsonReports<W> {
    output: W,
    array: bool,
    reports: u64,
}

/// Writes an object, key by key.
struct Object<'a> {
    output: &'a mut dyn Write,
    indent: &'static str,
    first: bool,
}

impl<W: Write> JsonReports<W> {
    /// Begins an array of reports if there are `several` captures, else the one object.
    ///
    /// # Errors
    ///
    /// What `output` reports, here and below.
    pub fn new(mut output: W, several: bool) -> io::Result<Self> {
        if several {
            output.write_all(b"[")?;
        }
        Ok(Self {
            output,
            array: several,
            reports: 0,
        })
    }

    /// Writes one report.
    ///
    /// # Errors
    ///
    /// [`ReportError::Spool`] when flows could not be kept on disk, or what the output reports.
    pub fn add(&mut self, report: &mut Report) -> Result<(), ReportError> {
        self.separate()?;
        report.write_json(&mut self.output)?;
        self.end()
    }

    /// Writes the report on a journal.
    ///
    /// # Errors
    ///
    /// What the output reports.
    pub fn add_journal(&mut self, report: &JournalReport) -> Result<(), ReportError> {
        self.separate()?;
        serde_json::to_writer(&mut self.output, report).map_err(io::Error::from)?;
        self.end()
    }

    fn separate(&mut self) -> io::Result<()> {
        self.reports += 1;
        match (self.array, self.reports) {
            (false, _) => Ok(()),
            (true, 1) => self.output.write_all(b"\n"),
            (true, _) => self.output.write_all(b",\n"),
        }
    }

    fn end(&mut self) -> Result<(), ReportError> {
        if !self.array {
            self.output.write_all(b"\n")?;
        }
        Ok(())
    }

    /// Where the reports go.
    pub fn output(&self) -> &W {
        &self.output
    }

    /// Ends the array and hands the output back.
    ///
    /// # Errors
    ///
    /// What the output reports.
    pub fn finish(mut self) -> io::Result<W> {
        if self.array {
            self.output.write_all(b"\n]\n")?;
        }
        Ok(self.output)
    }
}

impl Report {
    fn write_json(&mut self, output: &mut dyn Write) -> Result<(), ReportError> {
        let facts = &self.facts;
        let totals = &facts.outcome.totals;
        let mut object = Object::begin(output, " ")?;
        object.key("schema", &SCHEMA)?;
        object.key("capture", &facts.capture)?;
        object.key("digest", &facts.outcome.digest)?;
        object.key("policy", &facts.policy)?;
        object.key(
            "changes",
            &facts.changes.iter().map(Change::from).collect::<Vec<_>>(),
        )?;
        object.key("format", &facts.format)?;
        object.key("link_types", &facts.link_types)?;
        let started =
            (totals.read > 0).then(|| humantime::format_rfc3339_nanos(start_time(totals)).to_string());
        object.key("started", &started)?;
        object.key("duration", &seconds(totals.duration))?;
        object.key("captured_bytes", &totals.captured_bytes)?;
        object.key("damaged", &facts.outcome.damaged)?;
        object.key("packets", &Packets::from(totals))?;
        object.key(
            "verdicts",
            &Verdicts {
                pass: totals.pass,
                drop: totals.drop,
                by_rule: &facts.outcome.by_rule,
                by_reason: &facts.outcome.by_reason,
            },
        )?;
        let (checked, disagreements) = (totals.parity_checked, totals.parity_disagreements);
        object.key(
            "parity",
            &Parity {
                checked,
                disagreements,
            },
        )?;
        object.key(
            "fidelity",
            &Fidelity {
                flows: totals.fidelity_flows,
                exact: totals.fidelity_exact,
            },
        )?;
        object.key("discarded_after_reset", &totals.discarded_after_reset)?;
        object.key("flow_counts", &self.flows)?;
        object.key("mismatches", &self.mismatches)?;
        object.open("against")?;
        match &mut self.against {
            None => object.output.write_all(b"null")?,
            Some(against) => {
                let mut inner = Object::begin(&mut *object.output, "  ")?;
                inner.key("policy", &against.policy)?;
                inner.key("digest", &against.digest)?;
                inner.key("packets", &against.packets)?;
                inner.key("flows", &against.flows)?;
                inner.lines("changed_packets", &mut against.changed_packets)?;
                inner.lines("changed_flows", &mut against.changed_flows)?;
                inner.end(" }")?;
            }
        }
        object.open("flows")?;
        object.output.write_all(b"[")?;
        let mut flows = self.stored.read()?;
        let mut separator: &[u8] = b"\n  ";
        while let Some(flow) = flows.next()? {
            object.output.write_all(separator)?;
            object.output.write_all(flow)?;
            separator = b",\n  ";
        }
        object
            .output
            .write_all(if self.flows.count == 0 { b"]" } else { b"\n ]" })?;
        object.end("}")?;
        Ok(())
    }
}

#[derive(Serialize)]
struct Change<'a> {
    time: f64,
    policy: &'a str,
}

#[derive(Serialize)]
struct Packets {
    read: u64,
    judged: u64,
    unreadable: u64,
    not_ip: u64,
    from_client: u64,
    from_target: u64,
    repaired_checksums: u64,
}

#[derive(Serialize)]
struct Verdicts<'a> {
    pass: u64,
    drop: u64,
    by_rule: &'a BTreeMap<String, u64>,
    by_reason: &'a BTreeMap<&'static str, u64>,
}

#[derive(Serialize)]
struct Parity {
    checked: u64,
    disagreements: u64,
}

#[derive(Serialize)]
struct Fidelity {
    flows: u64,
    exact: u64,
}

impl<'a> From<&'a (Timestamp, String)> for Change<'a> {
    fn from((time, policy): &'a (Timestamp, String)) -> Self {
        Self {
            time: seconds(*time),
            policy,
        }
    }
}

impl From<&Totals> for Packets {
    fn from(totals: &Totals) -> Self {
        Self {
            read: totals.read,
            judged: totals.judged,
            unreadable: totals.unreadable,
            not_ip: totals.not_ip,
            from_client: totals.from_client,
            from_target: totals.from_target,
            repaired_checksums: totals.repaired_checksums,
        }
    }
}

impl<'a> Object<'a> {
    fn begin(output: &'a mut dyn Write, indent: &'static str) -> io::Result<Self> {
        output.write_all(b"{\n")?;
        Ok(Self {
            output,
            indent,
            first: true,
        })
    }

    /// Begins a key whose value the caller writes.
    fn open(&mut self, key: &str) -> io::Result<()> {
        let separator = if self.first { "" } else { ",\n" };
        self.first = false;
        write!(self.output, "{separator}{}\"{key}\": ", self.indent)
    }

    fn key(&mut self, key: &str, value: &impl Serialize) -> io::Result<()> {
        self.open(key)?;
        serde_json::to_writer(&mut *self.output, value).map_err(io::Error::from)
    }

    /// Writes a list of which each line of `spool` is an item.
    fn lines(&mut self, key: &str, spool: &mut Spool) -> io::Result<()> {
        self.open(key)?;
        self.output.write_all(b"[")?;
        let mut first = true;
        for line in spool.read()?.split(b'\n') {
            self.output.write_all(if first { b"\n" } else { b",\n" })?;
            write!(self.output, "{} ", self.indent)?;
            self.output.write_all(&line?)?;
            first = false;
        }
        self.output.write_all(b"]")
    }

    fn end(self, brace: &str) -> io::Result<()> {
        write!(self.output, "\n{brace}")
    }
}
