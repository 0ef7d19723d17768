//! Standing between a caller and a child: signals go on to it, its stops and its end are made one's own.
//!
//! What the terminal sends (interrupt, stop, window size) goes to the whole foreground process group, so the command
//! has got it already; what somebody sends to this process is meant for the command and goes on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, kill, raise, sigaction, sigprocmask,
};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Signals that are taken, for the command or for ourselves.
const TAKEN: [Signal; 10] = [
    Signal::SIGCHLD,
    Signal::SIGCONT,
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGTSTP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];
/// How long processes that the command has left behind have to end when asked to.
const END_TIME: Duration = Duration::from_secs(1);

/// How a process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Exited(i32),
    Signaled(Signal),
}

/// How a child has ended, and whether the terminal's user had asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) fate: Fate,
    pub(super) interrupted: bool,
}

/// Signals, taken as data. They stay blocked in this process and its threads.
pub(super) struct Signals {
    fd: SignalFd,
    before: SigSet,
}

/// Signals that a runtime waits for.
pub(super) struct Listening {
    fd: AsyncFd<Descriptor>,
    interrupted: bool,
}

/// So that it can be polled.
struct Descriptor(SignalFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Signals {
    /// Takes signals from here on.
    pub(super) fn block() -> io::Result<Self> {
        let taken: SigSet = TAKEN.into_iter().collect();
        let mut before = SigSet::empty();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&taken), Some(&mut before))?;
        let fd = SignalFd::with_flags(&taken, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { fd, before })
    }

    /// The mask from before, for a child.
    pub(super) fn mask_before(&self) -> SigSet {
        self.before
    }

    /// A signal that asks for the end and has come already.
    pub(super) fn early_end(&self) -> Option<Signal> {
        std::iter::from_fn(|| self.fd.read_signal().ok().flatten())
            .filter_map(|info| signal_of(&info))
            .find(|signal| asks_for_end(*signal))
    }

    /// Goes on in a runtime.
    pub(super) fn listen(self) -> io::Result<Listening> {
        // SAFETY: the descriptor stays open and the same as long as it is owned there.
        let fd = unsafe { AsyncFd::register_with_interest(Descriptor(self.fd), Interest::READABLE) }?;
        Ok(Listening {
            fd,
            interrupted: false,
        })
    }
}

impl Listening {
    /// Waits for the end of `child`. Signals of senders that `forwarded` allows go on to it; when it stops, so do we.
    pub(super) async fn supervise(
        &mut self,
        child: Pid,
        forwarded: impl Fn(Pid) -> bool,
    ) -> io::Result<Ended> {
        loop {
            if let Some(fate) = reap(child)? {
                return Ok(Ended {
                    fate,
                    interrupted: self.interrupted,
                });
            }
            let info = self.next().await?;
            let Some(signal) = signal_of(&info).filter(|signal| *signal != Signal::SIGCHLD) else {
                continue;
            };
            // Codes above zero are the kernel's.
            if info.ssi_code > 0 {
                self.interrupted |= signal == Signal::SIGINT;
            } else if forwarded(Pid::from_raw(info.ssi_pid as i32)) {
                let _ = kill(child, signal); // it may have ended, which is seen next
            }
        }
    }

    /// Waits for a signal that asks for the end.
    pub(super) async fn asked_to_end(&mut self) {
        while let Ok(info) = self.next().await {
            if signal_of(&info).is_some_and(asks_for_end) {
                return;
            }
        }
    }

    async fn next(&mut self) -> io::Result<siginfo> {
        self.fd
            .async_io(Interest::READABLE, |fd| match fd.0.read_signal()? {
                Some(info) => Ok(info),
                None => Err(io::ErrorKind::WouldBlock.into()),
            })
            .await
    }
}

/// Ends in the way of `signal`, without a core dump: the command has left one if anybody wants it.
pub(super) fn die_by(signal: Signal) -> ! {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action runs no code of ours.
    let _ = unsafe { sigaction(signal, &default) };
    let _ = raise(signal);
    let _ = SigSet::from(signal).thread_unblock();
    std::process::exit(128 + signal as i32)
}

/// Ends all children of this process and theirs, which must come to it when orphaned: on request at first.
pub(super) fn end_children() {
    let deadline = Instant::now() + END_TIME;
    let mut pause = Duration::from_millis(1);
    loop {
        let signal = if Instant::now() < deadline {
            Signal::SIGTERM
        } else {
            Signal::SIGKILL
        };
        if !any_child_left(signal) {
            return;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// Ends all children of this process and theirs at once.
pub(super) fn kill_children() {
    while any_child_left(Signal::SIGKILL) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn any_child_left(signal: Signal) -> bool {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => break,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
    for child in children() {
        let _ = kill(child, signal);
        let _ = kill(child, Signal::SIGCONT);
    }
    true
}

/// The children of all threads of this process.
fn children() -> Vec<Pid> {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .filter_map(|pid| pid.parse().ok())
                .map(Pid::from_raw)
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Takes note of children that have ended or stopped; returns how `child` ended.
fn reap(child: Pid) -> io::Result<Option<Fate>> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => return Ok(Some(Fate::Exited(code))),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                return Ok(Some(Fate::Signaled(signal)));
            }
            Ok(WaitStatus::Stopped(pid, _)) if pid == child => {
                // Whoever waits for us sees it, and may continue us later.
                raise(Signal::SIGSTOP)?;
                let _ = kill(child, Signal::SIGCONT);
            }
            Ok(WaitStatus::StillAlive) => return Ok(None),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn signal_of(info: &siginfo) -> Option<Signal> {
    Signal::try_from(info.ssi_signo as i32).ok()
}

fn asks_for_end(signal: Signal) -> bool {
    matches!(
        signal,
        Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP | Signal::SIGQUIT
    )
}
