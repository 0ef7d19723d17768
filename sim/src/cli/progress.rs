//! How far a replay has come, for whoever sits before the terminal.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressStyle};

/// Work shorter than this shows no progress.
const QUIET: Duration = Duration::from_millis(500);

/// A bar on standard error while a capture is replayed, and how fast that was.
pub(super) struct Progress {
    began: Instant,
    busy: Duration,
    packets: u64,
    terminal: bool,
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            busy: Duration::ZERO,
            packets: 0,
            terminal: stderr().is_terminal(),
            bar: None,
        }
    }

    /// A replay begins.
    pub(super) fn start(&mut self) {
        self.began = Instant::now();
    }

    /// So many packets were read, from so many bytes of the file's `size`.
    pub(super) fn at(&mut self, packets: u64, bytes: u64, size: Option<u64>) {
        let elapsed = self.began.elapsed();
        if !self.terminal || elapsed < QUIET {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let (bar, template) = match size {
                Some(size) => (ProgressBar::new(size), "{bar:30} {percent:>3} %  {msg}"),
                None => (ProgressBar::no_length(), "{spinner} {msg}"),
            };
            let style = ProgressStyle::with_template(template).expect("the template is sound");
            bar.with_style(style.progress_chars("=> ").tick_chars("-\\|/ "))
        });
        bar.set_message(message(packets, bytes, size, elapsed));
        bar.set_position(bytes);
    }

    /// The replay has ended.
    pub(super) fn stop(&mut self, packets: u64) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        self.busy += self.began.elapsed();
        self.packets += packets;
    }

    /// Tells the speed, on a terminal.
    pub(super) fn tell_speed(&self) {
        let seconds = self.busy.as_secs_f64();
        if self.terminal && self.packets > 0 && seconds > 0.0 {
            let speed = HumanCount((self.packets as f64 / seconds) as u64);
            eprintln!(
                "{} packets in {:.1?}: {speed} packets/s",
                HumanCount(self.packets),
                self.busy
            );
        }
    }
}

/// Such as `188,416 packets, 1,402,331 packets/s, 3 seconds left`.
fn message(packets: u64, bytes: u64, size: Option<u64>, elapsed: Duration) -> String {
    let speed = packets as f64 / elapsed.as_secs_f64();
    let so_far = format!(
        "{} packets, {} packets/s",
        HumanCount(packets),
        HumanCount(speed as u64)
    );
    match size {
        Some(size) if bytes > 0 => {
            let left = elapsed.mul_f64(size.saturating_sub(bytes) as f64 / bytes as f64);
            format!("{so_far}, {} left", HumanDuration(left))
        }
        Some(_) | None => so_far,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_goes_by_the_whole_speed_so_far() {
        let text = |bytes, size| message(3_000, bytes, size, Duration::from_secs(2));
        assert_eq!(
            text(1_000, Some(3_000)),
            "3,000 packets, 1,500 packets/s, 4 seconds left"
        );
        assert_eq!(text(1_000, None), "3,000 packets, 1,500 packets/s");
        assert_eq!(text(0, Some(3_000)), "3,000 packets, 1,500 packets/s");
    }
}
