//! The tables.

use std::fmt::Write;

use super::contender::Contender;
use super::scenario::Scenario;
use super::workload::WORKLOADS;
use super::{FOREIGN, Results, Sample, targets};

/// The kernel's relay is a reference only from these fractions of plain routing on.
const REFERENCE_BULK: f64 = 0.65;
const REFERENCE_CONNECT: f64 = 0.5;

/// A figure that makes a row for each workload that has it.
pub(super) struct Figure {
    pub(super) name: &'static str,
    pub(super) says: &'static str,
    pub(super) digits: usize,
    /// Whether more is better.
    pub(super) more: bool,
}

const fn figure(name: &'static str, says: &'static str, digits: usize, more: bool) -> Figure {
    Figure {
        name,
        says,
        digits,
        more,
    }
}

pub(super) const FIGURES: &[Figure] = &[
    figure("gbit_per_s", "Gbit/s", 2, true),
    figure("jain", "Jain's index", 3, true),
    figure("proxy_s_per_gb", "proxy CPU-s per GB", 2, false),
    figure("machine_s_per_gb", "machine CPU-s per GB", 2, false),
    figure("per_s", "per second", 0, true),
    figure("proxy_us_each", "proxy CPU-µs each", 2, false),
    figure("p50_us", "p50 µs", 0, false),
    figure("p99_us", "p99 µs", 0, false),
    figure("lost_percent", "% lost", 2, false),
    figure("kb_each", "resident KB per connection", 1, false),
    figure("answered_again", "still answering", 0, true),
    figure("failed", "failed", 0, false),
];

/// The median of a figure, over undisturbed samples if there are any.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Summary {
    median: f64,
    least: f64,
    most: f64,
    is_disturbed: bool,
}

enum Cell {
    Measured(Summary),
    Failed,
    NotMeasured,
}

impl Results {
    fn cell(&self, scenario: Scenario, contender: Contender, workload: &str, figure: &str) -> Cell {
        let samples: Vec<_> = self
            .samples
            .iter()
            .filter(|sample| {
                sample.scenario == scenario && sample.contender == contender && sample.workload == workload
            })
            .collect();
        match summarize(&samples, figure) {
            Some(summary) => Cell::Measured(summary),
            None if samples.iter().any(|sample| sample.error.is_some()) => Cell::Failed,
            None => Cell::NotMeasured,
        }
    }

    /// `None` where nothing was measured.
    pub(super) fn median(
        &self,
        scenario: Scenario,
        contender: Contender,
        workload: &str,
        figure: &str,
    ) -> Option<f64> {
        match self.cell(scenario, contender, workload, figure) {
            Cell::Measured(summary) => Some(summary.median),
            Cell::Failed | Cell::NotMeasured => None,
        }
    }

    /// The rival that is best in a figure.
    fn best_rival(&self, scenario: Scenario, workload: &str, figure: &Figure) -> Option<(Contender, f64)> {
        let rivals = self.contenders(scenario).into_iter().filter(|one| one.is_rival());
        let figures = rivals.filter_map(|rival| {
            let median = self.median(scenario, rival, workload, figure.name)?;
            Some((rival, median))
        });
        figures.max_by(|(_, one), (_, other)| {
            let order = one.total_cmp(other);
            if figure.more { order } else { order.reverse() }
        })
    }

    fn contenders(&self, scenario: Scenario) -> Vec<Contender> {
        let samples = self.samples.iter().filter(|sample| sample.scenario == scenario);
        let mut contenders: Vec<_> = samples.map(|sample| sample.contender).collect();
        contenders.sort_unstable();
        contenders.dedup();
        contenders
    }
}

fn summarize(samples: &[&Sample], figure: &str) -> Option<Summary> {
    let values = |disturbed: bool| {
        let samples = samples
            .iter()
            .filter(|sample| disturbed || sample.foreign <= FOREIGN);
        let mut values: Vec<f64> = samples
            .filter_map(|sample| sample.figures.get(figure).copied())
            .collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let mut chosen = values(false);
    let is_disturbed = chosen.is_empty();
    if is_disturbed {
        chosen = values(true);
    }
    let (least, most) = (*chosen.first()?, *chosen.last()?);
    let middle = chosen.len() / 2;
    let median = if chosen.len() % 2 == 0 {
        f64::midpoint(chosen[middle - 1], chosen[middle])
    } else {
        chosen[middle]
    };
    Some(Summary {
        median,
        least,
        most,
        is_disturbed,
    })
}

/// The whole report.
pub(super) fn markdown(results: &Results) -> String {
    let mut text = String::new();
    let machine = &results.machine;
    let _ = writeln!(text, "# Live\n");
    let _ = writeln!(
        text,
        "{}, by `{}`: {}, {} cores, Linux {}, {}.\n",
        results.date, results.command, machine.processor, machine.cores, machine.kernel, machine.rustc
    );
    let _ = writeln!(
        text,
        "Medians (least–most) of {} s each; all of it, load and servers included, on the same cores. `~`: no sample \
         without foreign load. `–`: not measured. Ratios are tungate's figure to the other's; ↑ more is better, ↓ less.\n",
        results.seconds
    );
    if !results.absent.is_empty() {
        let names: Vec<_> = results.absent.iter().map(|contender| contender.name()).collect();
        let _ = writeln!(text, "Not installed, so absent: {}.\n", names.join(", "));
    }
    let mut scenarios: Vec<_> = results.samples.iter().map(|sample| sample.scenario).collect();
    scenarios.sort_unstable();
    scenarios.dedup();
    for &scenario in &scenarios {
        write_table(&mut text, results, scenario);
    }
    write_reference(&mut text, results);
    targets::write(&mut text, results);
    write_capacity(&mut text, results);
    write_errors(&mut text, results);
    text
}

fn write_table(text: &mut String, results: &Results, scenario: Scenario) {
    let contenders = results.contenders(scenario);
    let names: Vec<_> = contenders.iter().map(|contender| contender.name()).collect();
    let _ = writeln!(text, "## {}\n", scenario.describe());
    let _ = writeln!(
        text,
        "| figure | {} | of plain | of relay | of best rival |",
        names.join(" | ")
    );
    let _ = writeln!(text, "|---|{}---|---|---|", "---|".repeat(contenders.len()));
    for workload in WORKLOADS {
        for figure in FIGURES {
            let cells: Vec<_> = contenders
                .iter()
                .map(|&contender| results.cell(scenario, contender, workload.name, figure.name))
                .collect();
            if !cells.iter().any(|cell| matches!(cell, Cell::Measured(_))) {
                continue;
            }
            // Nothing failed, nobody was treated unfairly: no row.
            let is_silent = figure.name == "failed"
                && cells.iter().all(|cell| match cell {
                    Cell::Measured(summary) => summary.most == 0.0,
                    Cell::Failed | Cell::NotMeasured => true,
                });
            if is_silent {
                continue;
            }
            let arrow = if figure.more { "↑" } else { "↓" };
            let shown: Vec<_> = cells.iter().map(|cell| show(cell, figure.digits)).collect();
            let ours = results.median(scenario, Contender::Tungate, workload.name, figure.name);
            let ratio = |other: Option<f64>| match (ours, other) {
                (Some(ours), Some(other)) if other > 0.0 => format!("{:.2}", ours / other),
                _ => "–".to_owned(),
            };
            let reference =
                |contender| ratio(results.median(scenario, contender, workload.name, figure.name));
            let rival = results.best_rival(scenario, workload.name, figure);
            let rival = match rival {
                Some((rival, value)) if ours.is_some() => {
                    format!("{} {}", ratio(Some(value)), rival.name())
                }
                _ => "–".to_owned(),
            };
            let _ = writeln!(
                text,
                "| {}: {} {arrow} | {} | {} | {} | {rival} |",
                workload.name,
                figure.says,
                shown.join(" | "),
                reference(Contender::Plain),
                reference(Contender::Relay),
            );
        }
    }
    text.push('\n');
}

fn show(cell: &Cell, digits: usize) -> String {
    match cell {
        Cell::NotMeasured => "–".to_owned(),
        Cell::Failed => "failed".to_owned(),
        Cell::Measured(summary) => {
            let Summary {
                median,
                least,
                most,
                is_disturbed,
            } = *summary;
            let mark = if is_disturbed { "~" } else { "" };
            if least == most {
                format!("{mark}{median:.digits$}")
            } else {
                format!("{mark}{median:.digits$} ({least:.digits$}–{most:.digits$})")
            }
        }
    }
}

/// Says whether the kernel's relay is worth its name here.
fn write_reference(text: &mut String, results: &Results) {
    let ratio = |workload, figure| {
        let relay = results.median(Scenario::Router, Contender::Relay, workload, figure)?;
        let plain = results.median(Scenario::Router, Contender::Plain, workload, figure)?;
        Some(relay / plain)
    };
    let checks = [
        ("one stream up", ratio("tcp-up-1", "gbit_per_s"), REFERENCE_BULK),
        (
            "one stream down",
            ratio("tcp-down-1", "gbit_per_s"),
            REFERENCE_BULK,
        ),
        ("connections", ratio("connect", "per_s"), REFERENCE_CONNECT),
    ];
    let said: Vec<_> = checks
        .iter()
        .filter_map(|&(what, ratio, bound)| {
            let ratio = ratio?;
            let word = if ratio >= bound { "is" } else { "is NOT" };
            Some(format!(
                "on {what} it {word} a reference: {ratio:.2} of plain routing, {bound} are asked for"
            ))
        })
        .collect();
    if !said.is_empty() {
        let _ = writeln!(text, "The kernel relay: {}.\n", said.join("; "));
    }
}

/// What a core would carry that did nothing but tungate's work: the arithmetic of docs/capacity.md.
fn write_capacity(text: &mut String, results: &Results) {
    const GIB: f64 = (1_u64 << 30) as f64;
    let rows = [
        ("tcp-up-1", "proxy_s_per_gb", "Gbit/s, one upload", 8.0),
        ("tcp-down-1", "proxy_s_per_gb", "Gbit/s, one download", 8.0),
        ("tcp-up-8", "proxy_s_per_gb", "Gbit/s, eight uploads", 8.0),
        ("tcp-down-8", "proxy_s_per_gb", "Gbit/s, eight downloads", 8.0),
        ("connect", "proxy_us_each", "connections per second", 1e6),
        (
            "udp-64-up",
            "proxy_us_each",
            "datagrams of 64 B up per second",
            1e6,
        ),
        (
            "udp-64-down",
            "proxy_us_each",
            "datagrams of 64 B down per second",
            1e6,
        ),
        ("hold", "kb_each", "held connections per GiB", GIB / 1024.0),
    ];
    let rows: Vec<_> = rows
        .iter()
        .filter_map(|(workload, figure, what, whole)| {
            let each = results.median(Scenario::Router, Contender::Tungate, workload, figure)?;
            let digits = usize::from(*whole < 100.0);
            (each > 0.0).then(|| format!("| {what} | {:.digits$} |", whole / each))
        })
        .collect();
    if !rows.is_empty() {
        let _ = writeln!(text, "## What a core of the proxy alone would carry\n");
        let _ = writeln!(text, "| of | by arithmetic |\n|---|---|\n{}\n", rows.join("\n"));
    }
}

fn write_errors(text: &mut String, results: &Results) {
    let failed = results.samples.iter().filter_map(|sample| {
        let error = sample.error.as_ref()?;
        Some(format!(
            "- {} {} {}, round {}: {error}",
            sample.scenario.name(),
            sample.contender.name(),
            sample.workload,
            sample.round
        ))
    });
    let lines: Vec<_> = failed.collect();
    if !lines.is_empty() {
        let _ = writeln!(text, "## What failed\n\n{}\n", lines.join("\n"));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn sample(foreign: f64, value: f64) -> Sample {
        Sample {
            scenario: Scenario::Router,
            contender: Contender::Tungate,
            workload: "connect".to_owned(),
            round: 1,
            foreign,
            figures: BTreeMap::from([("per_s".to_owned(), value)]),
            error: None,
        }
    }

    #[test]
    fn disturbed_samples_count_only_where_there_are_no_others() {
        let (calm, busy) = (sample(0.1, 10.0), sample(0.9, 2.0));
        let mixed = summarize(&[&calm, &busy], "per_s").unwrap();
        assert_eq!((mixed.median, mixed.is_disturbed), (10.0, false));
        let alone = summarize(&[&busy], "per_s").unwrap();
        assert_eq!((alone.median, alone.is_disturbed), (2.0, true));
        assert_eq!(summarize(&[&busy], "p50_us"), None);
    }
}
