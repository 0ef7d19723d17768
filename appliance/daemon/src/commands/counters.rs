//! `tungate counters`: what was dropped, and how flows ended.

use std::fmt::Write;

use anyhow::Result;

use super::control::{client, print, print_json};
use super::{runtime, text};
use crate::cli;
use crate::control::api::{COUNTERS, Counters};

pub(super) fn run(arguments: &cli::Counters) -> Result<()> {
    let client = client(&arguments.control)?;
    let counters: Counters = runtime()?.block_on(client.get(COUNTERS))?;
    if arguments.json {
        return print_json(&counters);
    }
    print(&table(&counters)?)
}

fn table(counters: &Counters) -> Result<String> {
    let mut table = String::new();
    let mut line = |number: u64, what: &str| writeln!(table, "{number:>14}  {what}");
    line(counters.open_flows as u64, "flows open")?;
    for (reason, &count) in &counters.ended {
        line(count, &format!("flows ended: {reason}"))?;
    }
    for (reason, &count) in counters.dropped.iter().filter(|(_, count)| **count > 0) {
        line(count, &format!("packets dropped: {reason}"))?;
    }
    for (rule, &count) in &counters.dropped_by_rule {
        line(count, &format!("packets dropped by `{rule}`"))?;
    }
    for (count, what) in [
        (
            counters.dropped_by_other_rules,
            "packets dropped by other rules of earlier policies",
        ),
        (counters.bypassed_flows, "flows left to the kernel"),
        (
            counters.dropped_by_prefilter,
            "of these packets dropped by the pre-filter",
        ),
        (counters.lost_by_device, "packets lost: the device took no more"),
        (counters.lost_between_shards, "packets lost: a shard was too busy"),
    ] {
        if count > 0 {
            line(count, what)?;
        }
    }
    writeln!(table, "{:>14}  of buffers", text::bytes(counters.buffer_bytes))?;
    Ok(table)
}
