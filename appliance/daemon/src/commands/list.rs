//! `tungate list`: the lists of a running appliance.

use std::io::{self, IsTerminal};
use std::time::Duration;

use anyhow::Result;
use tungate_config::list_file;
use tungate_engine::policy::ListEntry;

use super::control::{client, print, print_json};
use super::prefilter::parse_entry;
use super::{Rendered, runtime, text};
use crate::cli;
use crate::control::api::{Add, Changed, Entries, LISTS, LISTS_ADD, LISTS_REMOVE, Named, Origin};

pub(super) fn run(command: &cli::List) -> Result<()> {
    match command {
        cli::List::Add {
            control,
            ttl,
            entries,
        } => {
            let client = client(control)?;
            let body = Add {
                entries: lines(entries)?,
                ttl_seconds: ttl.map(|ttl| ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0)),
            };
            let changed: Changed = runtime()?.block_on(client.post(LISTS_ADD, &body))?;
            let until = ttl.map_or_else(String::new, |ttl| {
                format!(" for {}", humantime::format_duration(ttl))
            });
            let done = match (changed.added, changed.renewed) {
                (added, 0) => format!("{added} added{until}"),
                (0, renewed) => format!("{renewed} there already, renewed{until}"),
                (added, renewed) => format!("{added} added, {renewed} there already and renewed{until}"),
            };
            tell(&done, &changed)
        }
        cli::List::Remove { control, entries } => {
            let client = client(control)?;
            let body = Named {
                entries: lines(entries)?,
            };
            let changed: Changed = runtime()?.block_on(client.post(LISTS_REMOVE, &body))?;
            tell(&format!("{} removed", changed.removed), &changed)
        }
        cli::List::Load { control, file } => {
            let client = client(control)?;
            let body = Named {
                entries: of_file(file)?,
            };
            let changed: Changed = runtime()?.block_on(client.put(LISTS, &body))?;
            tell(
                &format!("{} removed, {} added", changed.removed, changed.added),
                &changed,
            )
        }
        cli::List::Show {
            control,
            address,
            json,
        } => {
            let client = client(control)?;
            let path = match address {
                Some(address) => format!("{LISTS}?address={address}"),
                None => LISTS.to_owned(),
            };
            let entries: Entries = runtime()?.block_on(client.get(&path))?;
            if *json {
                print_json(&entries)
            } else {
                print(&table(&entries))
            }
        }
    }
}

fn tell(done: &str, changed: &Changed) -> Result<()> {
    for warning in &changed.warnings {
        eprintln!("warning: {warning}");
    }
    let total = text::count(changed.total, "entry");
    print(&format!("{done}; the lists have {total}\n"))
}

/// The entries that a command names, as list files have them.
fn lines(entries: &cli::ListEntries) -> Result<Vec<String>> {
    match &entries.file {
        Some(file) => of_file(file),
        None => Ok(vec![parse_entry(&entries.entry)?.to_string()]),
    }
}

fn of_file(file: &std::path::Path) -> Result<Vec<String>> {
    let list = list_file(file, &mut |_| ()).map_err(Rendered::from)?;
    for warning in &list.warnings {
        eprintln!("{}\n", warning.render(io::stderr().is_terminal()));
    }
    Ok(list.entries.iter().map(ListEntry::to_string).collect())
}

fn table(entries: &Entries) -> String {
    let mut table = String::new();
    for entry in &entries.entries {
        let origin = match entry.origin {
            Origin::Configuration => "",
            Origin::Control => "by `tungate list`",
        };
        let end = entry.expires_in_seconds.map(|seconds| {
            let time = text::time(Duration::from_secs(seconds));
            format!("for another {time}")
        });
        let notes: Vec<_> = [Some(origin.to_owned()).filter(|origin| !origin.is_empty()), end]
            .into_iter()
            .flatten()
            .collect();
        let line = format!("{:<40}  {}", entry.entry, notes.join(", "));
        table.push_str(line.trim_end());
        table.push('\n');
    }
    let shown = entries.entries.len();
    if shown < entries.total {
        let total = text::count(entries.total, "entry");
        table.push_str(&format!("{shown} of {total}\n"));
    } else if shown == 0 {
        table.push_str("the lists are empty\n");
    }
    table
}
