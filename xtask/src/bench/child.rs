//! Processes whose time and memory are measured.

use std::io;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// What a process has used.
#[derive(Debug, Clone, Copy)]
pub(super) struct Usage {
    /// From its start to its end.
    pub(super) elapsed: Duration,
    /// Of all its threads, in user mode and in the kernel.
    pub(super) processor: Duration,
    /// The most memory that was resident at one time, in bytes. No less than what this program had resident itself
    /// when it started the process: the kernel counts that in.
    pub(super) peak: u64,
}

/// Runs a command to its end, without input or output.
pub(super) fn measure(command: &mut Command) -> Result<Usage> {
    let what = format!("{command:?}");
    let started = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| what.clone())?;
    let (status, usage) = wait(child.id()).with_context(|| what.clone())?;
    let elapsed = started.elapsed();
    ensure!(status.success(), "{what}: {status}");
    let time = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64)
    };
    Ok(Usage {
        elapsed,
        processor: time(usage.ru_utime) + time(usage.ru_stime),
        peak: usage.ru_maxrss as u64 * 1024,
    })
}

/// Waits for a child, whom nobody else waits for.
fn wait(process: u32) -> io::Result<(ExitStatus, libc::rusage)> {
    use std::os::unix::process::ExitStatusExt;
    let mut status = 0;
    loop {
        // SAFETY: all zeros are a value of this structure of numbers.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: both pointers are to live variables of the types that the call fills.
        let waited = unsafe { libc::wait4(process as libc::pid_t, &raw mut status, 0, &raw mut usage) };
        if waited >= 0 {
            return Ok((ExitStatus::from_raw(status), usage));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_fails_is_no_measurement() {
        assert!(measure(&mut Command::new("false")).is_err());
    }

    #[test]
    fn elapsed_time_covers_what_a_process_sleeps() {
        let usage = measure(Command::new("sleep").arg("0.05")).unwrap();
        assert!(usage.elapsed >= Duration::from_millis(50), "{usage:?}");
        assert!(usage.processor < usage.elapsed, "{usage:?}");
    }
}
