//! `tungate prefilter`: the pre-filter on an interface, without an appliance.
//!
//! Each command opens what the one before has pinned (see [`Attachment`]), does its work and ends; between commands
//! the program is the kernel's alone. Only where entries have a time, a process stays until the last one has ended.

mod attachment;
mod expiry;
mod stats;

use std::fmt::Write;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tungate_config::{Progress, list_file, parse_list};
use tungate_engine::policy::ListEntry;
use tungate_prefilter::kernel::KernelError;

use self::attachment::{Attachment, same, unix_time};
pub(crate) use self::attachment::{local_addresses, remove_leftovers};
use super::Rendered;
use crate::cli::{Prefilter, PrefilterTarget};

/// Longest time an entry may be given; without one it has no end.
const LONGEST_TTL: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// What scripts tell failures apart by; `--help` and the README list them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    Other = 1,
    NotPermitted = 3,
    NoInterface = 4,
    Busy = 5,
    NotAttached = 6,
    Refused = 7,
    NoEntry = 8,
}

/// A failure with its exit code, where it is not the kernel's.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(
        "{0} has no pre-filter that `tungate prefilter attach` has attached\n\
         hint: `tungate prefilter attach {0}` attaches one, `tungate prefilter status` shows those there are"
    )]
    NotAttached(String),
    #[error(
        "{0} has the pre-filter already\n\
         hint: `tungate prefilter status {0}` says more, and `tungate prefilter detach {0}` takes it off"
    )]
    Attached(String),
    #[error("there is no entry `{entry}`\nhint: `tungate prefilter status {interface} --entries` lists them")]
    NoEntry { entry: String, interface: String },
}

pub(super) fn run(command: &Prefilter) -> Result<ExitCode> {
    match carry_out(command) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if error.is::<Rendered>() => Err(error),
        Err(error) => {
            eprintln!("error: {error:#}");
            Ok(ExitCode::from(failure(&error) as u8))
        }
    }
}

fn failure(error: &anyhow::Error) -> Failure {
    match error.downcast_ref() {
        Some(Fault::NotAttached(_)) => return Failure::NotAttached,
        Some(Fault::Attached(_)) => return Failure::Busy,
        Some(Fault::NoEntry { .. }) => return Failure::NoEntry,
        None => {}
    }
    let kernel = match error.downcast_ref() {
        Some(tungate_prefilter::Error::Kernel(error)) => Some(error),
        _ => error.downcast_ref(),
    };
    match kernel {
        Some(KernelError::NotPermitted { .. }) => Failure::NotPermitted,
        Some(KernelError::NoInterface { .. }) => Failure::NoInterface,
        Some(KernelError::Busy { .. }) => Failure::Busy,
        Some(
            KernelError::TooOld { .. }
            | KernelError::Rejected { .. }
            | KernelError::Attach { .. }
            | KernelError::NoMemory { .. }
            | KernelError::NoBpfFs { .. },
        ) => Failure::Refused,
        Some(KernelError::FrameLength { .. } | KernelError::NotSampled | KernelError::Io { .. }) | None => {
            Failure::Other
        }
    }
}

fn carry_out(command: &Prefilter) -> Result<()> {
    attachment::leave_private_mounts();
    match command {
        Prefilter::Attach(PrefilterTarget { interface }) => {
            println!("{}", Attachment::create(interface)?);
            Ok(())
        }
        Prefilter::Detach(PrefilterTarget { interface }) => {
            Attachment::open(interface)?.remove()?;
            println!("{interface}: detached");
            Ok(())
        }
        Prefilter::Status {
            interface,
            entries,
            json,
        } => status(interface.as_deref(), *entries, *json),
        Prefilter::Add {
            interface,
            entry,
            ttl,
        } => add(interface, entry, *ttl),
        Prefilter::Remove { interface, entry } => remove(interface, entry),
        Prefilter::Load { interface, file } => load(interface, file),
        Prefilter::Stats {
            interface,
            watch,
            json,
        } => stats::run(interface, *watch, *json),
        Prefilter::Expire(PrefilterTarget { interface }) => expiry::keep(interface),
    }
}

fn add(interface: &str, words: &[String], ttl: Option<Duration>) -> Result<()> {
    let mut entry = parse_entry(words)?;
    let mut attachment = Attachment::open(interface)?;
    if let Some(ttl) = ttl {
        if ttl.is_zero() || ttl > LONGEST_TTL {
            bail!("the time of an entry is more than 0 and at most 365 days");
        }
        entry.expires = Some(unix_time() + ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0));
    }
    let mut entries = attachment.entries().to_vec();
    let renewed = match entries.iter_mut().find(|other| same(other, &entry)) {
        Some(other) => {
            other.expires = entry.expires;
            true
        }
        None => {
            entries.push(entry.clone());
            false
        }
    };
    attachment.apply(entries)?;
    drop(attachment);
    if entry.expires.is_some() {
        expiry::start(interface)?;
    }
    let until = ttl.map_or_else(String::new, |ttl| {
        format!(" for {}", humantime::format_duration(ttl))
    });
    let done = if renewed {
        "was there already, renewed"
    } else {
        "added"
    };
    println!("{interface}: {entry} {done}{until}");
    Ok(())
}

fn remove(interface: &str, words: &[String]) -> Result<()> {
    let entry = parse_entry(words)?;
    let mut attachment = Attachment::open(interface)?;
    let mut entries = attachment.entries().to_vec();
    let Some(position) = entries.iter().position(|other| same(other, &entry)) else {
        return Err(Fault::NoEntry {
            entry: entry.to_string(),
            interface: interface.to_owned(),
        }
        .into());
    };
    entries.remove(position);
    attachment.apply(entries)?;
    println!("{interface}: {entry} removed");
    Ok(())
}

fn load(interface: &str, file: &Path) -> Result<()> {
    let mut attachment = Attachment::open(interface)?;
    let start = Instant::now();
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template(
        "{msg} [{bar:30}] {bytes} of {total_bytes}, {eta} left",
    )?);
    bar.set_message(format!("reading {}", file.display()));
    let read = list_file(file, &mut |Progress { done, total, .. }| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let list = read.map_err(Rendered::from)?;
    for warning in &list.warnings {
        eprintln!("{}\n", warning.render(io::stderr().is_terminal()));
    }
    let reading = start.elapsed();
    let spinner = ProgressBar::new_spinner();
    spinner.set_message("loading");
    spinner.enable_steady_tick(Duration::from_millis(100));
    let start = Instant::now();
    let count = list.entries.len();
    attachment.apply(list.entries)?;
    spinner.finish_and_clear();
    println!(
        "{interface}: {count} entries loaded (read in {:.2} s, in force after another {:.2} s)",
        reading.as_secs_f64(),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn status(interface: Option<&str>, with_entries: bool, as_json: bool) -> Result<()> {
    let interfaces = match interface {
        Some(interface) => vec![interface.to_owned()],
        None => attachment::interfaces()?,
    };
    let mut objects = Vec::new();
    let mut text = String::new();
    for interface in &interfaces {
        let mut attachment = Attachment::open(interface)?;
        let dropped = stats::dropped(&attachment.counters()?);
        let now = unix_time();
        let in_force: Vec<&ListEntry> = attachment.in_force(now).collect();
        let next = in_force.iter().filter_map(|entry| entry.expires).min();
        let next = next.map(|next| next - now);
        let mut object = json!({
            "interface": interface,
            "mode": attachment.mode_name(),
            "entries": in_force.len(),
            "next_expiry_seconds": next,
            "dropped": { "packets": dropped.packets, "bytes": dropped.bytes },
        });
        let next = next.map_or_else(String::new, |next| format!("; the next ends in {next} s"));
        write!(
            text,
            "{attachment}\n  entries  {}{next}\n  dropped  {} packets, {} bytes\n",
            in_force.len(),
            dropped.packets,
            dropped.bytes
        )?;
        if with_entries {
            let lines: Vec<String> = in_force.iter().map(|entry| entry.to_string()).collect();
            text.extend(lines.iter().map(|line| format!("  {line}\n")));
            object["list"] = json!(lines);
        }
        objects.push(object);
    }
    if as_json {
        text = format!("{:#}\n", json!(objects));
    } else if interfaces.is_empty() {
        text.push_str("no interface of this network namespace has a pre-filter attached by hand\n");
    }
    stats::print(&text).map(drop)
}

/// Reads an entry as list files have it; without an action it is denied.
pub(super) fn parse_entry(words: &[String]) -> Result<ListEntry> {
    let mut text = words.join(" ");
    if !text.starts_with("deny ") && !text.starts_with("allow ") {
        text.insert_str(0, "deny ");
    }
    let list = parse_list(text.as_bytes(), "entry").map_err(Rendered::from)?;
    let mut entries = list.entries.into_iter();
    match (entries.next(), entries.next()) {
        (Some(entry), None) => Ok(entry),
        _ => Err(anyhow!(
            "one entry is needed, as in `192.0.2.0/24` or `deny 192.0.2.0/24 tcp 443`"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_without_an_action_denies() {
        let entry = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            parse_entry(&words).map(|entry| entry.to_string())
        };
        assert_eq!(entry(&["192.0.2.0/24"]).unwrap(), "deny 192.0.2.0/24");
        assert_eq!(
            entry(&["allow", "2001:db8::/32", "tcp", "443"]).unwrap(),
            "allow 2001:db8::/32 tcp 443"
        );
        assert!(entry(&["192.0.2.0/33"]).unwrap_err().is::<Rendered>());
        assert!(entry(&["192.0.2.1\ndeny 192.0.2.2"]).is_err());
    }

    #[test]
    fn failures_have_codes_of_their_own() {
        let interface = || "eth0".to_owned();
        let code = |error: anyhow::Error| failure(&error) as u8;
        assert_eq!(code(Fault::NotAttached(interface()).into()), 6);
        assert_eq!(code(Fault::Attached(interface()).into()), 5);
        let kernel = |error: KernelError| code(tungate_prefilter::Error::from(error).into());
        let action = String::new;
        assert_eq!(kernel(KernelError::NotPermitted { action: action() }), 3);
        assert_eq!(
            kernel(KernelError::NoInterface {
                interface: interface()
            }),
            4
        );
        assert_eq!(
            kernel(KernelError::Busy {
                interface: interface()
            }),
            5
        );
        let refused = KernelError::Attach {
            interface: interface(),
            reasons: String::new(),
        };
        assert_eq!(kernel(refused), 7);
        let direct = KernelError::NoInterface {
            interface: interface(),
        };
        assert_eq!(code(direct.into()), 4);
        assert_eq!(code(anyhow!("anything")), 1);
    }
}
