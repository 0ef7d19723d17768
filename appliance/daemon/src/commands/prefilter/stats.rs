//! `tungate prefilter stats`: what was dropped, by rule and by reason, and how fast.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{self, IsTerminal, Write as _};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};
use tungate_engine::policy::RuleRef;
use tungate_prefilter::{Count, Counters};

use super::Fault;
use super::attachment::{Attachment, generation};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// Rules in a table that is shown again and again: those that drop the most.
const ROWS: usize = 20;

/// All that was dropped.
pub(super) fn dropped(counters: &Counters) -> Count {
    let drops = counters.reasons.iter().filter(|(reason, _)| reason.is_drop());
    drops.fold(Count::default(), |sum, (_, count)| Count {
        packets: sum.packets + count.packets,
        bytes: sum.bytes + count.bytes,
    })
}

/// Shows what was counted, once or until a signal or the end of the attachment.
pub(super) fn run(interface: &str, watch: bool, as_json: bool) -> Result<()> {
    let mut attachment = Attachment::open(interface)?;
    attachment.unlock();
    let mut look = Look::new(&mut attachment, None)?;
    if !watch {
        let text = if as_json {
            format!("{:#}\n", look.to_json(interface))
        } else {
            look.to_text(&attachment, usize::MAX)
        };
        return print(&text).map(drop);
    }
    let is_terminal = io::stdout().is_terminal();
    loop {
        let mut text = String::new();
        if as_json {
            writeln!(text, "{}", look.to_json(interface))?;
        } else {
            if is_terminal {
                text.push_str("\x1b[H\x1b[2J"); // home, and clear
            }
            text.push_str(&look.to_text(&attachment, ROWS));
            if !is_terminal {
                text.push('\n');
            }
        }
        if !print(&text)? {
            return Ok(());
        }
        thread::sleep(INTERVAL);
        match generation(interface)? {
            None => return Err(Fault::NotAttached(interface.to_owned()).into()),
            Some(current) if current != attachment.generation() => {
                drop(attachment);
                attachment = Attachment::open(interface)?;
                attachment.unlock();
            }
            Some(_) => {}
        }
        look = Look::new(&mut attachment, Some(&look))?;
    }
}

/// Writes to standard output; whether anybody reads it.
pub(super) fn print(text: &str) -> Result<bool> {
    let mut output = io::stdout();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Counters at one time.
struct Look {
    at: Instant,
    counters: Counters,
    /// By the rule's text: positions change with the lists.
    rules: BTreeMap<String, Row>,
    /// Packets dropped in a second, since the look before.
    per_second: Option<f64>,
}

struct Row {
    count: Count,
    per_second: Option<f64>,
}

impl Look {
    fn new(attachment: &mut Attachment, before: Option<&Self>) -> Result<Self> {
        let at = Instant::now();
        let counters = attachment.counters()?;
        let rate = |now: Count, then: Count, since: &Self| {
            now.packets.saturating_sub(then.packets) as f64 / (at - since.at).as_secs_f64()
        };
        let mut rules = BTreeMap::new();
        for &(rule, count) in &counters.rules {
            let RuleRef::List(position) = rule else { continue };
            let Some(entry) = attachment.entries().get(position as usize) else {
                continue;
            };
            let text = entry.to_string();
            let per_second = before.map(|before| {
                let then = before.rules.get(&text).map_or(Count::default(), |row| row.count);
                rate(count, then, before)
            });
            rules.insert(text, Row { count, per_second });
        }
        let per_second = before.map(|before| rate(dropped(&counters), dropped(&before.counters), before));
        Ok(Self {
            at,
            counters,
            rules,
            per_second,
        })
    }

    fn to_json(&self, interface: &str) -> Value {
        let reasons: BTreeMap<_, _> = self
            .counters
            .reasons
            .iter()
            .map(|(reason, count)| {
                (
                    reason.name(),
                    json!({ "packets": count.packets, "bytes": count.bytes }),
                )
            })
            .collect();
        let rules: Vec<_> = self
            .rules
            .iter()
            .map(|(rule, Row { count, per_second })| {
                json!({
                    "rule": rule,
                    "packets": count.packets,
                    "bytes": count.bytes,
                    "packets_per_second": per_second,
                })
            })
            .collect();
        json!({
            "interface": interface,
            "dropped_per_second": self.per_second,
            "reasons": reasons,
            "rules": rules,
        })
    }

    fn to_text(&self, attachment: &Attachment, most: usize) -> String {
        let mut text = format!("{attachment}\n");
        let rate = |per_second: f64| format!("{per_second:.0}");
        let is_watched = self.per_second.is_some();
        let mut line = |packets: &str, bytes: &str, per_second: &str, name: &str| {
            let rate = if is_watched {
                format!("  {per_second:>10}")
            } else {
                String::new()
            };
            let _ = writeln!(text, "{packets:>12}  {bytes:>14}{rate}  {name}"); // a string takes all
        };
        line("packets", "bytes", "packets/s", "reason or entry");
        for (reason, count) in &self.counters.reasons {
            line(
                &count.packets.to_string(),
                &count.bytes.to_string(),
                "",
                reason.name(),
            );
        }
        let mut rows: Vec<_> = self.rules.iter().collect();
        rows.sort_by_key(|(_, row)| std::cmp::Reverse(row.count.packets));
        for (rule, Row { count, per_second }) in rows.iter().take(most) {
            line(
                &count.packets.to_string(),
                &count.bytes.to_string(),
                &per_second.map_or_else(String::new, rate),
                rule,
            );
        }
        if rows.len() > most {
            line("", "", "", &format!("and {} more", rows.len() - most));
        }
        text
    }
}
