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
    let several: Vec<&Cell> = fills.into_iter().filter(|cell| cell.flows > 1).collect();
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
    print_lateness(measured, words);
}

fn print_table(measured: &[Measured], cells: &[&Cell], figure: impl Fn(&[Figures]) -> Spread) {
    let find = |cell: &Cell, sender| {
        let found = measured
            .iter()
            .find(|each| each.cell == *cell && each.sender == sender);
        found.map(|found| figure(&found.shown.runs))
    };
    // Columns of senders that nothing is known of would only take room.
    let is_known = |sender: &Sender| cells.iter().any(|cell| find(cell, *sender).is_some());
    let senders: Vec<Sender> = SENDERS.into_iter().filter(is_known).collect();
    let mut titles: Vec<String> = senders.iter().map(|sender| sender.name().to_owned()).collect();
    let controls = [Control::Cubic, Control::Bbr];
    let has_both = |control: &Control| {
        [Sender::Engine(*control), Sender::Linux(*control)]
            .iter()
            .all(is_known)
    };
    let compared: Vec<Control> = controls.into_iter().filter(has_both).collect();
    titles.extend(
        compared
            .iter()
            .map(|control| format!("{} ÷ Linux", control.name())),
    );
    println!(
        "| Mbit/s, round trip, queue, loss, flows | {} |",
        titles.join(" | ")
    );
    println!("|---|{}", "---|".repeat(titles.len()));
    for cell in cells {
        let text =
            |spread: Option<Spread>| spread.map_or_else(|| "–".to_owned(), |spread| spread.to_string());
        let mut columns: Vec<String> = senders.iter().map(|sender| text(find(cell, *sender))).collect();
        columns.extend(compared.iter().map(|control| {
            let ours = find(cell, Sender::Engine(*control));
            let theirs = find(cell, Sender::Linux(*control));
            ours.zip(theirs).map_or_else(
                || "–".to_owned(),
                |(ours, theirs)| format!("{:.2}", ours.median / theirs.median),
            )
        }));
        println!("| {cell} | {} |", columns.join(" | "));
    }
}

/// How late the forwarder was, over all runs that used it.
fn print_lateness(measured: &[Measured], words: &[String]) {
    let wanted = measured.iter().filter(|each| each.cell.has(words));
    let late: Vec<[u64; 3]> = wanted
        .flat_map(|each| &each.shown.runs)
        .filter_map(|run| run.late)
        .collect();
    if late.is_empty() {
        return;
    }
    let column = |at: usize| late.iter().map(move |late| late[at]);
    let [median, outer, most] = [0, 1, 2].map(|at| Spread::of(column(at).map(|micros| micros as f64)).median);
    let [worst_median, worst_outer, worst] = [0, 1, 2].map(|at| column(at).max().unwrap_or(0));
    println!(
        "\nThe forwarder was late by {median:.0} µs for the median packet, by {outer:.0} µs for the 99th percentile and \
         by {most:.0} µs at most (medians of {} runs); in the worst by {worst_median}, {worst_outer} and {worst} µs.",
        late.len()
    );
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
