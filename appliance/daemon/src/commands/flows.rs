//! `tungate flows`: the open flows of a running appliance, once or as they change.

use std::io::{self, IsTerminal};
use std::time::Duration;

use anyhow::{Context, Result};
use terminal_size::{Height, Width, terminal_size};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::control::{client, print, print_json};
use super::{runtime, text};
use crate::cli;
use crate::control::Client;
use crate::control::api::{FLOWS, FLOWS_WATCH, Flow, Flows};

/// Columns that may be cut where a line would be too long, the first of them first, and the least that is left.
const CUT: [(&str, usize); 4] = [("name", 12), ("rule", 8), ("target", 15), ("client", 15)];
/// Rows of a table that is shown again and again where nobody says how many.
const ROWS: usize = 20;
const GAP: &str = "  ";

pub(super) fn run(arguments: &cli::Flows) -> Result<()> {
    let client = client(&arguments.control)?;
    runtime()?.block_on(async {
        if arguments.watch {
            return watch(&client, arguments).await;
        }
        let path = with_limit(FLOWS, arguments.limit.map(|limit| limit.get()));
        let flows: Flows = client.get(&path).await?;
        if arguments.json {
            return print_json(&flows);
        }
        let width = io::stdout()
            .is_terminal()
            .then(size)
            .flatten()
            .map(|(width, _)| width);
        print(&table(&flows, width))
    })
}

/// Shows flows until the appliance ends, or nobody reads any more.
async fn watch(client: &Client, arguments: &cli::Flows) -> Result<()> {
    let is_terminal = io::stdout().is_terminal() && !arguments.json;
    let limit = arguments.limit.map(|limit| limit.get());
    // A terminal can become larger while it is watched.
    let asked = if arguments.json {
        limit
    } else {
        limit.or(Some(if is_terminal { 500 } else { ROWS }))
    };
    let mut lines = client.lines(&with_limit(FLOWS_WATCH, asked)).await?;
    loop {
        let line = lines.next().await?;
        if arguments.json {
            print(&format!("{}\n", String::from_utf8_lossy(&line)))?;
            continue;
        }
        let mut flows: Flows =
            serde_json::from_slice(&line).context("the appliance's answer is not understood")?;
        if is_terminal {
            let (width, height) = size().unwrap_or((80, ROWS + 3));
            // Beside the flows there are a line of names, one that sums up, and the cursor's.
            flows.flows.truncate(height.saturating_sub(3).max(1));
            let text = table(&flows, Some(width));
            // Written over what was there, so that nothing flickers.
            print(&format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")))?;
        } else {
            print(&format!("{}\n", table(&flows, None)))?;
        }
    }
}

fn with_limit(path: &str, limit: Option<usize>) -> String {
    match limit {
        Some(limit) => format!("{path}?limit={limit}"),
        None => path.to_owned(),
    }
}

fn size() -> Option<(usize, usize)> {
    let (Width(width), Height(height)) = terminal_size()?;
    Some((width.into(), height.into()))
}

/// A column: its name, and whether numbers stand in it.
struct Column {
    name: &'static str,
    is_number: bool,
    cells: Vec<String>,
}

fn table(flows: &Flows, width: Option<usize>) -> String {
    let column = |name, is_number, cell: &dyn Fn(&Flow) -> String| Column {
        name,
        is_number,
        cells: flows.flows.iter().map(cell).collect(),
    };
    let rate = |rate: Option<f64>| rate.map_or_else(String::new, |rate| text::bytes(rate as u64) + "/s");
    let mut columns = vec![
        column("", false, &|flow| flow.protocol.clone()),
        column("client", false, &|flow| flow.client.clone()),
        column("target", false, &|flow| flow.target.clone()),
        column("name", false, &|flow| flow.name.clone().unwrap_or_default()),
        column("rule", false, &|flow| flow.rule.clone()),
        column("egress", false, &|flow| flow.egress.clone()),
        column("sent", true, &|flow| text::bytes(flow.to_upstream)),
        column("", true, &|flow| rate(flow.to_upstream_per_second)),
        column("received", true, &|flow| text::bytes(flow.to_client)),
        column("", true, &|flow| rate(flow.to_client_per_second)),
        column("age", true, &|flow| {
            text::time(Duration::from_secs_f64(flow.age_seconds))
        }),
        column("way", false, &|flow| {
            if flow.bypassed { "bypassed" } else { "" }.to_owned()
        }),
        column("state", false, &|flow| flow.state.name().to_owned()),
    ];
    columns.retain(|column| column.cells.iter().any(|cell| !cell.is_empty()));
    let mut widths: Vec<usize> = columns
        .iter()
        .map(|column| {
            column
                .cells
                .iter()
                .map(|cell| cell.width())
                .max()
                .unwrap_or(0)
                .max(column.name.len())
        })
        .collect();
    if let Some(width) = width {
        let mut excess =
            (widths.iter().sum::<usize>() + GAP.len() * widths.len().saturating_sub(1)).saturating_sub(width);
        for (name, least) in CUT {
            if let Some(place) = columns.iter().position(|column| column.name == name) {
                let cut = excess.min(widths[place].saturating_sub(least));
                widths[place] -= cut;
                excess -= cut;
            }
        }
    }
    let mut table = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = (&Column, &str)>| {
        let cells: Vec<_> = cells
            .zip(&widths)
            .map(|((column, cell), &width)| {
                let cell = cut(cell, width);
                let blank = " ".repeat(width - cell.width());
                if column.is_number {
                    blank + &cell
                } else {
                    cell + &blank
                }
            })
            .collect();
        let line = cells.join(GAP);
        table.push_str(&cut(line.trim_end(), width.unwrap_or(usize::MAX)));
        table.push('\n');
    };
    if !flows.flows.is_empty() {
        line(&mut columns.iter().map(|column| (column, column.name)));
    }
    for row in 0..flows.flows.len() {
        line(&mut columns.iter().map(|column| (column, column.cells[row].as_str())));
    }
    let total = text::count(flows.total, "flow");
    let shown = flows.flows.len();
    table.push_str(&match flows.total {
        0 => "no flows are open\n".to_owned(),
        all if shown < all => format!("{shown} of {total}\n"),
        _ => format!("{total}\n"),
    });
    table
}

/// The beginning of `cell` that fits, with a mark where it is not all. Control characters, which a client's server name
/// may be made of, are not shown.
fn cut(cell: &str, width: usize) -> String {
    let cell: String = cell.chars().filter(|letter| !letter.is_control()).collect();
    if cell.width() <= width {
        return cell;
    }
    let mut shown = String::new();
    for letter in cell.chars() {
        if shown.width() + letter.width().unwrap_or(0) + 1 > width {
            break;
        }
        shown.push(letter);
    }
    shown + "…"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::State;

    fn flow(name: Option<&str>) -> Flow {
        Flow {
            id: "0.1.0".to_owned(),
            protocol: "tcp".to_owned(),
            client: "10.0.0.2:40000".to_owned(),
            target: "192.0.2.7:443".to_owned(),
            name: name.map(str::to_owned),
            rule: "default".to_owned(),
            egress: "direct".to_owned(),
            state: State::Open,
            bypassed: false,
            age_seconds: 61.5,
            to_upstream: 1_000,
            to_client: 2_000_000,
            to_upstream_per_second: None,
            to_client_per_second: None,
        }
    }

    fn flows(flows: Vec<Flow>) -> Flows {
        Flows {
            total: flows.len(),
            flows,
        }
    }

    #[test]
    fn columns_that_say_nothing_are_left_out() {
        let shown = table(&flows(vec![flow(None)]), None);
        assert_eq!(
            shown,
            "     client          target         rule     egress     sent  received        age  state\n\
             tcp  10.0.0.2:40000  192.0.2.7:443  default  direct  1.00 kB   2.00 MB  1 min 1 s  open\n\
             1 flow\n"
        );
        assert_eq!(table(&flows(Vec::new()), None), "no flows are open\n");
    }

    #[test]
    fn a_narrow_terminal_gets_no_longer_lines_than_fit() {
        let long = "a-very-long-name-of-a-server-somewhere.example";
        for width in [40, 90, 100, 120, 200] {
            let shown = table(&flows(vec![flow(Some(long)), flow(None)]), Some(width));
            assert!(
                shown.lines().all(|line| line.width() <= width),
                "{width}:\n{shown}"
            );
            assert_eq!(shown.contains(long), width == 200, "{shown}");
        }
    }

    #[test]
    fn what_a_client_calls_its_server_cannot_move_the_cursor() {
        assert_eq!(cut("a\x1b[2Jb\u{9b}31m", 20), "a[2Jb31m");
        assert_eq!(cut("日本語のサーバ", 7), "日本語…");
    }
}
