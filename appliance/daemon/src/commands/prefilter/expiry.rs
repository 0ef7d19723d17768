//! Entries with a time: the program has no clock, so a process takes them out, and ends with the last one.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Fault;
use super::attachment::{Attachment, generation, keeper_lock, unix_time};

/// How often the keeper looks whether something is due: entries come by other commands, and clocks are set.
const LOOK: Duration = Duration::from_secs(1);

/// Starts a keeper, which sees to it that there is one only.
pub(super) fn start(interface: &str) -> Result<()> {
    let program = std::env::current_exe().context("cannot find this program")?;
    Command::new(program)
        .args(["prefilter", "expire", interface])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("cannot start the process that takes entries out when their time is over")?;
    Ok(())
}

/// Takes entries of `interface` out when their time is over, until there is none with a time.
pub(super) fn keep(interface: &str) -> Result<()> {
    let Some(only) = keeper_lock(interface)? else {
        return Ok(());
    };
    loop {
        let mut attachment = match Attachment::open(interface) {
            Ok(attachment) => attachment,
            Err(error) if error.is::<Fault>() => return Ok(()), // detached
            Err(error) => return Err(error),
        };
        let now = unix_time();
        let is_due = |expires: Option<u64>| expires.is_some_and(|expires| expires <= now);
        if attachment.entries().iter().any(|entry| is_due(entry.expires)) {
            attachment.apply(attachment.entries().to_vec())?;
        }
        let next = attachment
            .entries()
            .iter()
            .filter_map(|entry| entry.expires)
            .min();
        let Some(next) = next else {
            // Before the attachment's: whoever adds an entry after this finds no keeper, and starts one.
            drop(only);
            return Ok(());
        };
        let seen = attachment.generation();
        drop(attachment);
        while unix_time() < next && generation(interface)? == Some(seen) {
            thread::sleep(LOOK);
        }
    }
}
