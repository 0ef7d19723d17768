//! Network namespaces without names: each is gone with the last thread and file that is in it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};

/// A network namespace.
pub(super) struct Namespace(File);

impl Namespace {
    /// Makes one, with its loopback up.
    pub(super) fn new() -> Result<Self> {
        let make = || -> Result<File> {
            // SAFETY: the call takes a flag and changes this thread alone, which ends here.
            let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            ensure!(done == 0, io::Error::last_os_error());
            ip("link set lo up")?;
            File::open("/proc/thread-self/ns/net").context("cannot open /proc/thread-self/ns/net")
        };
        let made = thread::scope(|scope| scope.spawn(make).join().expect("it does not panic"));
        made.context("cannot make a network namespace (this needs root)")
            .map(Self)
    }

    /// A file that stands for it, as long as it lives.
    pub(super) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// Moves this thread into it, for good.
    pub(super) fn enter(&self) -> Result<()> {
        // SAFETY: the descriptor is open, and the call changes this thread alone.
        let done = unsafe { libc::setns(self.0.as_raw_fd(), libc::CLONE_NEWNET) };
        ensure!(done == 0, io::Error::last_os_error());
        Ok(())
    }

    /// Does something in it, on a thread of its own.
    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = || {
                self.enter()?;
                work()
            };
            scope.spawn(inside).join().expect("it does not panic")
        })
    }
}

/// Runs `ip` with these arguments, in this thread's namespace.
pub(super) fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .context("cannot run ip")?;
    ensure!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
