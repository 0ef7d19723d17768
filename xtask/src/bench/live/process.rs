//! Processes that are ended with the value that stands for them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;

/// How long a process may take to end when it is asked to.
const PATIENCE: Duration = Duration::from_secs(3);
/// Time between two looks at a process.
const LOOK: Duration = Duration::from_millis(5);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C, or a request to end, an error of whatever waits next, so that everything is removed on the way out.
/// All waits are bounded.
pub(super) fn catch_interrupts() -> Result<()> {
    extern "C" fn note(_: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only stores into an atomic.
        unsafe { sigaction(signal, &action) }.context("cannot catch signals")?;
    }
    Ok(())
}

/// # Errors
///
/// If Ctrl-C was pressed.
pub(super) fn check_interrupt() -> Result<()> {
    ensure!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
    Ok(())
}

/// Sleeps, but not beyond Ctrl-C.
pub(super) fn pause(duration: Duration) -> Result<()> {
    let end = Instant::now() + duration;
    while Instant::now() < end {
        check_interrupt()?;
        thread::sleep(end.saturating_duration_since(Instant::now()).min(10 * LOOK));
    }
    Ok(())
}

/// A process with its children. They end with this value.
pub(super) struct Process {
    name: String,
    child: Child,
    /// What it says on standard error.
    log: PathBuf,
}

impl Process {
    /// Starts a process whose standard output and error go to files in `folder`.
    pub(super) fn start(mut command: Command, folder: &Path) -> Result<Self> {
        let program = Path::new(command.get_program()).file_name().unwrap_or_default();
        let name = program.to_string_lossy().into_owned();
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let log = folder.join(format!("{number}-{name}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = command
            .stdout(Stdio::piped())
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name, child, log })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// # Errors
    ///
    /// If it has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} has ended: {status}; {}", self.name, self.last_words()),
        }
    }

    /// Waits for its end, which must be a good one, and reads the line of JSON that it has printed.
    pub(super) fn result<T: DeserializeOwned>(mut self, patience: Duration) -> Result<T> {
        let end = Instant::now() + patience;
        let status = loop {
            check_interrupt()?;
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(
                Instant::now() < end,
                "{} has not ended after {patience:?}",
                self.name
            );
            thread::sleep(LOOK);
        };
        ensure!(status.success(), "{} {status}: {}", self.name, self.last_words());
        let mut text = String::new();
        let mut output = self.child.stdout.take().expect("it is piped");
        output.read_to_string(&mut text)?;
        serde_json::from_str(&text).with_context(|| format!("{} printed {text:?}", self.name))
    }

    /// Its standard output.
    pub(super) fn take_output(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Writes a line to its standard input, which must be piped.
    pub(super) fn tell(&mut self, line: &str) -> Result<()> {
        let input = self.child.stdin.as_mut().context("its input is not piped")?;
        writeln!(input, "{line}").with_context(|| format!("cannot write to {}", self.name))
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(3).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" / ")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.child.id() as i32);
        if let Ok(None) = self.child.try_wait() {
            let _ = kill(pid, Signal::SIGTERM);
            let end = Instant::now() + PATIENCE;
            while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
                thread::sleep(LOOK);
            }
        }
        // Its process group outlives it if it has left children behind.
        let _ = kill(Pid::from_raw(-pid.as_raw()), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
