//! Tables of what has been measured.

use super::Measured;
use super::cell::{Cell, Control, Figures, Sender, Task};

const SENDERS: [Sender; 6] = [
    Sender::Engine(Control::Cubic),
    Sender::Live(Control::Cubic),
    Sender::Linux(Control::Cubic),
    Sender::Engine(Control::Bbr),
    Sender::Live(Control::Bbr),
    Sender::Linux(Control::Bbr),
];

/// Prints the tables of all cells whose names contain all `words`.
pub(super) fn print(measured: &[Measured], words: &[String]) {
    let mut cells: Vec<Cell> = Vec::new();
    for each in measured {
        if each.cell.has(words) && !cells.contains(&each.cell) {
            cells.push(each.cell);
        }
    }
    let is_fill = |cell: &&Cell| matches!(cell.task, Task::Fill(_));
    let (fills, transfers): (Vec<&Cell>, Vec<&Cell>) = cells.iter().partition(is_fill);
    if !fills.is_empty() {
        println!("Megabits of payload per second: median, and least to most, over the runs of a cell.\n");
        print_table(measured, &fills, |runs| {
            Spread::of(runs.iter().map(Figures::goodput))
        });
    }
    let several: Vec<_> = fills.into_iter().filter(|cell| cell.flows > 1).collect();
    if !several.is_empty() {
        println!("\nFairness between the flows, by Jain's index.\n");
        print_table(measured, &several, |runs| {
            Spread::of(runs.iter().map(Figures::fairness))
        });
    }
    if !transfers.is_empty() {
        println!("\nMilliseconds from the SYN to the last byte: median, and 1st to 99th percentile.\n");
        print_table(measured, &transfers, |runs| {
            Spread::of(runs.iter().map(|run| run.millis.unwrap_or(f64::INFINITY)))
        });
    }
}

fn print_table(measured: &[Measured], cells: &[&Cell], figure: impl Fn(&[Figures]) -> Spread) {
    println!(
        "| rate, round trip, queue, loss, flows | {} |",
        SENDERS.map(Sender::name).join(" | ")
    );
    println!("|---|{}", "---|".repeat(SENDERS.len()));
    for cell in cells {
        let columns = SENDERS.map(|sender| {
            let found = measured
                .iter()
                .find(|each| each.cell == **cell && each.sender == sender);
            found.map_or_else(|| "–".to_owned(), |found| figure(&found.runs).to_string())
        });
        println!("| {cell} | {} |", columns.join(" | "));
    }
}

/// The middle of some figures, and how far they reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Spread {
    /// Of at least one figure. Of a hundred and more, the outermost hundredths do not count.
    pub(super) fn of(figures: impl Iterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = figures.collect();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len() - 1;
        let at = |part: f64| sorted[(last as f64 * part).round() as usize];
        let outer = if sorted.len() >= 100 { 0.01 } else { 0.0 };
        Self {
            median: f64::midpoint(sorted[last / 2], sorted[sorted.len() / 2]),
            low: at(outer),
            high: at(1.0 - outer),
        }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { median, low, high } = self;
        let digits = match median {
            ..10.0 => 2,
            ..100.0 => 1,
            _ => 0,
        };
        write!(f, "**{median:.digits$}** ({low:.digits$}–{high:.digits$})")
    }
}
