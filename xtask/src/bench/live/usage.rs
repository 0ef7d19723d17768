//! Processor time and memory, of processes and of the whole machine, as `/proc` tells.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};

/// `/proc` counts processor time in hundredths of a second.
const TICKS: f64 = 100.0;
/// The parent of the kernel's own threads.
const KERNEL: u32 = 2;

/// A process and all its descendants.
pub(super) fn family(process: u32) -> Vec<u32> {
    let mut family = vec![process];
    let mut at = 0;
    while let Some(&parent) = family.get(at) {
        at += 1;
        let threads = fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten();
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            family.extend(
                children
                    .split_whitespace()
                    .filter_map(|word| word.parse::<u32>().ok()),
            );
        }
    }
    family
}

struct Stat {
    parent: u32,
    /// Seconds of its own, and of children that have ended.
    own: f64,
    of_children: f64,
}

/// `None` if the process is gone.
fn stat(process: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(") ")?; // names may contain anything
    let fields: Vec<&str> = rest.split(' ').collect();
    let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some(Stat {
        parent: fields.get(1)?.parse().ok()?,
        own: (ticks(11)? + ticks(12)?) / TICKS,
        of_children: (ticks(13)? + ticks(14)?) / TICKS,
    })
}

/// Seconds of processor time that these processes and their descendants have used.
pub(super) fn processor_seconds(processes: &[u32]) -> f64 {
    let all = processes.iter().flat_map(|&process| family(process));
    all.filter_map(stat).map(|stat| stat.own + stat.of_children).sum()
}

/// Bytes that are resident for these processes and their descendants.
pub(super) fn resident_bytes(processes: &[u32]) -> u64 {
    let all = processes.iter().flat_map(|&process| family(process));
    let resident = |process: u32| {
        let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    all.filter_map(resident).sum::<u64>() * 1024
}

/// What the machine has done up to a moment, in seconds of processor time.
pub(super) struct Moment {
    at: Instant,
    /// In processes and interrupts.
    busy: f64,
    /// In processes alone, and what other machines took from this one.
    attributable: f64,
    /// In this process, its descendants and the kernel's threads.
    ours: f64,
}

/// What happened between two moments.
pub(super) struct Span {
    /// Seconds of processor time of the whole machine without the others', interrupts included.
    pub(super) busy: f64,
    /// Processors that others kept busy, on average.
    pub(super) foreign: f64,
}

impl Moment {
    pub(super) fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let line = text.lines().next().context("/proc/stat is empty")?;
        let ticks: Vec<f64> = line
            .split_whitespace()
            .skip(1)
            .filter_map(|word| word.parse().ok())
            .collect();
        let [user, nice, system, _, _, irq, softirq, steal, ..] = ticks[..] else {
            anyhow::bail!("/proc/stat says {line:?}");
        };
        let kernel = fs::read_dir("/proc").context("cannot read /proc")?.flatten();
        let kernel = kernel
            .filter_map(|entry| stat(entry.file_name().to_str()?.parse().ok()?))
            .filter(|stat| stat.parent == KERNEL)
            .map(|stat| stat.own);
        Ok(Self {
            at: Instant::now(),
            busy: (user + nice + system + irq + softirq) / TICKS,
            attributable: (user + nice + system + steal) / TICKS,
            ours: processor_seconds(&[std::process::id()]) + kernel.sum::<f64>(),
        })
    }

    pub(super) fn until(&self, later: &Self) -> Span {
        let seconds = (later.at - self.at).as_secs_f64();
        let foreign = (later.attributable - self.attributable) - (later.ours - self.ours);
        let foreign = foreign.max(0.0);
        Span {
            busy: (later.busy - self.busy - foreign).max(0.0),
            foreign: foreign / seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_uses_time_and_memory() {
        let this = std::process::id();
        assert!(family(this).contains(&this));
        assert!(resident_bytes(&[this]) > 4096);
        let before = processor_seconds(&[this]);
        while processor_seconds(&[this]) <= before {
            std::hint::black_box([0_u8; 4096]);
        }
    }

    #[test]
    fn own_work_is_not_foreign() {
        let start = Moment::now().unwrap();
        let before = processor_seconds(&[std::process::id()]);
        while processor_seconds(&[std::process::id()]) < before + 0.2 {}
        let span = start.until(&Moment::now().unwrap());
        assert!(span.busy >= 0.15, "{}", span.busy);
    }
}
