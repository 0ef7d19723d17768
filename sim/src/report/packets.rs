//! `--packets`: one line of JSON per captured packet.

use std::io::Write;

use serde::Serialize;

use super::flows::seconds;
use super::output::{Output, OutputError};
use crate::outcome::{PacketRecord, Path, Side};

/// Writes JSON Lines with the keys `number`, `time`, `side`, `path`, `verdict`, `rule`, `reason` and `flow`.
pub(super) struct PacketLines {
    output: Output,
    line: Vec<u8>,
}

/// One line.
#[derive(Debug, Serialize)]
struct PacketLine<'a> {
    number: u64,
    time: f64,
    side: Side,
    path: Option<Path>,
    verdict: Option<Verdict>,
    rule: Option<&'a str>,
    reason: Option<&'static str>,
    flow: Option<u64>,
}

/// What became of a packet that was judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Pass,
    Drop,
}

impl PacketLines {
    pub(super) fn new(output: Output) -> Self {
        Self {
            output,
            line: Vec::new(),
        }
    }

    /// Writes the line of a packet about which the rule named `rule` decided.
    pub(super) fn add(&mut self, packet: &PacketRecord, rule: Option<&str>) {
        let line = PacketLine {
            number: packet.number,
            time: seconds(packet.time),
            side: packet.side,
            path: packet.path,
            verdict: Verdict::of(packet),
            rule,
            reason: packet.reason,
            flow: packet.flow,
        };
        self.line.clear();
        serde_json::to_writer(&mut self.line, &line).expect("a line of plain values, in memory");
        self.line.push(b'\n');
        let _ = self.output.write_all(&self.line); // the output keeps its first failure
    }

    pub(super) fn finish(self) -> Result<(), OutputError> {
        self.output.finish()
    }
}

impl Verdict {
    /// The verdict on `packet`; `None` where nobody judged.
    pub(super) fn of(packet: &PacketRecord) -> Option<Self> {
        match (packet.side, packet.dropped) {
            (Side::Client | Side::Target, true) => Some(Self::Drop),
            (Side::Client | Side::Target, false) => Some(Self::Pass),
            (Side::None, _) => None,
        }
    }

    /// The word used in reports.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Drop => "drop",
        }
    }
}
