//! The sums over several captures, behind their reports.

use std::fmt::Write as _;

use indicatif::HumanCount;

use super::journal::JournalReport;
use super::text::{NOTABLE, Text, count};
use super::{Report, Screen};

/// Sums over several captures.
#[derive(Debug, Default)]
pub struct Total {
    captures: u64,
    journals: u64,
    damaged: u64,
    packets: u64,
    dropped: u64,
    flows: u64,
    fidelity: (u64, u64),
    parity: (u64, u64),
    differing: u64,
}

impl Total {
    /// Adds one capture's report.
    pub fn add(&mut self, report: &Report) {
        let totals = &report.facts.outcome.totals;
        self.captures += 1;
        self.damaged += u64::from(report.facts.outcome.damaged.is_some());
        self.packets += totals.read;
        self.dropped += totals.drop;
        self.flows += report.flows.count;
        self.fidelity.0 += totals.fidelity_exact;
        self.fidelity.1 += totals.fidelity_flows;
        self.parity.0 += totals.parity_disagreements;
        self.parity.1 += totals.parity_checked;
        self.differing += u64::from(report.differs());
    }

    /// Adds one journal's report, of which little can be summed up.
    pub fn add_journal(&mut self, report: &JournalReport) {
        self.journals += 1;
        self.differing += u64::from(report.differs());
    }

    /// The sums as text, with the numbers of captures that could not be used and of files that are no captures.
    pub fn text(&self, screen: Screen, unusable: u64, left_out: u64) -> String {
        let mut text = Text::new(screen);
        let mut title = count(self.captures, "capture");
        if self.journals > 0 {
            let _ = write!(title, ", {}", count(self.journals, "journal"));
        }
        text.title(&title);
        let mut parts = vec![
            count(self.packets, "packet"),
            format!("{} dropped", HumanCount(self.dropped)),
            count(self.flows, "flow"),
        ];
        for (number, word) in [
            (self.damaged, "damaged"),
            (unusable, "unusable"),
            (self.differing, "not as expected"),
        ] {
            if number > 0 {
                parts.push(screen.paint(NOTABLE, format!("{number} {word}")));
            }
        }
        text.item("total", parts.join(", "));
        if left_out > 0 {
            text.item("left out", format!("{}: no captures", count(left_out, "file")));
        }
        text.fidelity(self.fidelity.0, self.fidelity.1);
        text.parity(self.parity.0, self.parity.1);
        text.finish()
    }
}
