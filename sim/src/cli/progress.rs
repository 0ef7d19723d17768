//! How far a replay has come, for whoever sits before the terminal.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

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
        if !self.terminal || self.began.elapsed() < QUIET {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let (bar, template) = match size {
                Some(size) => (
                    ProgressBar::new(size),
                    "{bar:30} {percent:>3} %  {msg} packets, {binary_bytes_per_sec}, {eta} left",
                ),
                None => (
                    ProgressBar::no_length(),
                    "{spinner} {msg} packets, {binary_bytes_per_sec}",
                ),
            };
            let style = ProgressStyle::with_template(template).expect("the template is sound");
            bar.with_style(style.progress_chars("=> ").tick_chars("-\\|/ "))
                .with_elapsed(self.began.elapsed())
        });
        bar.set_message(HumanCount(packets).to_string());
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
