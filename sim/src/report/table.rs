//! The table of flows, as wide as the terminal allows.

use tungate_engine::event::NameSource;
use unicode_width::UnicodeWidthStr;

use super::flows::endpoints;
use super::text::{by, bytes, printable};
use crate::outcome::FlowRecord;

/// One flow's cells, by [`COLUMNS`].
type Cells = [String; COLUMNS.len()];

/// Title and alignment (whether to the right) of each column.
const COLUMNS: [(&str, bool); 10] = [
    ("flow", true),
    ("", false),
    ("client", false),
    ("target", false),
    ("sent", true),
    ("received", true),
    ("end", false),
    ("decision", false),
    ("name", false),
    ("anomalies", false),
];
const CLIENT: usize = 2;
const TARGET: usize = 3;

/// The columns that stand below the flow's line when there is less and less room.
const BELOW: [&[usize]; 5] = [&[], &[9], &[7, 8, 9], &[3, 7, 8, 9], &[2, 3, 7, 8, 9]];

const GAP: &str = "  ";
const INDENT: &str = "  ";

/// Lays out `flows`, a line each in at most `width` columns where that is possible, else with more lines per flow and
/// no cell cut; without a width always a line each. The first line is the heading.
pub(super) fn flows(flows: &[FlowRecord], width: Option<usize>) -> Vec<String> {
    let rows: Vec<Cells> = flows.iter().map(cells).collect();
    let limit = width.unwrap_or(usize::MAX);
    let mut layouts = BELOW.iter().map(|below| lay_out(&rows, below, limit)).peekable();
    loop {
        let lines = layouts.next().expect("the last layout is taken as it is");
        if layouts.peek().is_none() || lines.iter().all(|line| line.width() <= limit) {
            return lines;
        }
    }
}

fn cells(flow: &FlowRecord) -> Cells {
    let (client, target) = endpoints(flow);
    [
        flow.id.to_string(),
        flow.protocol.to_string(),
        client.to_string(),
        target.to_string(),
        bytes(flow.to_target.bytes),
        bytes(flow.to_client.bytes),
        flow.end.to_owned(),
        decision(flow),
        name(flow),
        flow.anomalies.join(", "),
    ]
}

/// What the client has said itself stands as it is; what it was told by DNS is marked.
fn name(flow: &FlowRecord) -> String {
    let name = printable(flow.name.as_deref().unwrap_or_default());
    match flow.name_source {
        Some(NameSource::Dns) => format!("{name} (dns)"),
        Some(NameSource::FirstBytes) | None => name,
    }
}

/// Such as `direct`, `egress vpn by "streaming"`, `drop by "deny 192.0.2.0/24"`.
fn decision(flow: &FlowRecord) -> String {
    let mut text = flow.verdict.to_owned();
    if let Some(egress) = &flow.egress {
        text = format!("{text} {}", printable(egress));
    }
    text + &by(flow.rule.as_deref())
}

fn lay_out(rows: &[Cells], below: &[usize], limit: usize) -> Vec<String> {
    let beside = |column: &usize| !below.contains(column);
    // A column that is empty throughout is left out.
    let used = |column: &usize| rows.iter().any(|row| !row[*column].is_empty());
    let columns: Vec<usize> = (0..COLUMNS.len()).filter(beside).filter(used).collect();
    let widths: Vec<usize> = columns
        .iter()
        .map(|&column| {
            let cells = rows.iter().map(|row| row[column].width());
            cells.max().unwrap_or(0).max(COLUMNS[column].0.width())
        })
        .collect();
    let line = |text: &dyn Fn(usize) -> String| {
        let mut line = String::new();
        for (&column, &width) in columns.iter().zip(&widths) {
            let text = text(column);
            let padding = " ".repeat(width - text.width());
            line += if line.is_empty() { INDENT } else { GAP };
            line += &if COLUMNS[column].1 {
                padding + &text
            } else {
                text + &padding
            };
        }
        line.truncate(line.trim_end().len());
        line
    };
    let mut lines = vec![line(&|column| COLUMNS[column].0.to_owned())];
    let below_indent = INDENT.len() + widths.first().copied().unwrap_or(0) + GAP.len();
    for row in rows {
        lines.push(line(&|column| row[column].clone()));
        let mut phrases = Vec::new();
        for &column in below {
            match column {
                CLIENT => phrases.push(format!("from {}", row[CLIENT])),
                TARGET => phrases.push(format!("to {}", row[TARGET])),
                _ if row[column] == "direct" => {}
                _ => phrases.extend(
                    row[column]
                        .split(", ")
                        .filter(|part| !part.is_empty())
                        .map(str::to_owned),
                ),
            }
        }
        lines.extend(wrap(&phrases, below_indent, limit));
    }
    lines
}

/// Joins `phrases` to lines of at most `limit` columns, none of them cut.
fn wrap(phrases: &[String], indent: usize, limit: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for phrase in phrases {
        match lines.last_mut() {
            Some(line) if line.width() + GAP.len() + phrase.width() <= limit => {
                line.push_str(", ");
                line.push_str(phrase);
            }
            Some(_) | None => lines.push(" ".repeat(indent) + phrase),
        }
    }
    lines
}
