//! Why the kernel would not, and what to do about it.

use std::io;
use std::path::PathBuf;

use aya::maps::MapError;
use aya::programs::ProgramError;
use aya::{EbpfError, VerifierLogLevel};

/// Why the pre-filter does not run in the kernel.
///
/// The first line of the text is the fault, the rest, where there is one, begins with `hint:`.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The process may not load BPF.
    #[error(
        "{action}: not permitted\n\
         hint: run as root, or grant CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON; \
         in containers seccomp and kernel lockdown may forbid bpf(2) as well"
    )]
    NotPermitted {
        /// What was tried.
        action: String,
    },
    /// The kernel has no BPF, or lacks a part that is needed.
    #[error(
        "{action}: this kernel cannot do that ({error})\n\
         hint: Linux 5.13 or later with CONFIG_BPF_SYSCALL is needed; this is {release}"
    )]
    TooOld {
        /// What was tried.
        action: String,
        /// What the kernel said.
        error: io::Error,
        /// The kernel's release.
        release: String,
    },
    /// The verifier rejected the program.
    #[error(
        "the kernel's verifier rejects the XDP program: {error}\n{log}\nhint: this is Linux {release}; please report it"
    )]
    Rejected {
        /// What the kernel said.
        error: io::Error,
        /// The end of the verifier's log.
        log: String,
        /// The kernel's release.
        release: String,
    },
    /// There is no such interface.
    #[error(
        "there is no network interface {interface:?}\nhint: `ip link` lists those of this network namespace"
    )]
    NoInterface {
        /// Name asked for.
        interface: String,
    },
    /// Another XDP program is attached.
    #[error(
        "{interface} has another XDP program attached\n\
         hint: `ip link show dev {interface}` names it, and `ip link set dev {interface} xdp off` removes it \
         unless a running process holds it"
    )]
    Busy {
        /// Name of the interface.
        interface: String,
    },
    /// The interface takes the program in none of the modes that were tried.
    #[error("cannot attach to {interface}: {reasons}")]
    Attach {
        /// Name of the interface.
        interface: String,
        /// By mode, what the kernel said.
        reasons: String,
    },
    /// Not enough memory for the lists.
    #[error(
        "no memory for {what} of {elements} elements\n\
         hint: lists take about 80 bytes per prefix, and twice that while they are replaced"
    )]
    NoMemory {
        /// What was to be created.
        what: &'static str,
        /// How many elements.
        elements: u32,
    },
    /// A frame that the kernel does not run a program over.
    #[error("the kernel does not run programs over frames of {length} bytes (it takes {least} to {most})")]
    FrameLength {
        /// Bytes in the frame.
        length: usize,
        /// Shortest it takes.
        least: usize,
        /// Longest it takes, about.
        most: usize,
    },
    /// A run that left no event, so that the rule is not known.
    #[error("a single run needs events of every packet: load the program with `Sampling::ALL`")]
    NotSampled,
    /// There is no BPF file system to pin in, and none could be mounted.
    #[error(
        "{path} is not in a BPF file system, and none could be mounted there: {error}\n\
         hint: `mount -t bpf bpf {path}`",
        path = .path.display()
    )]
    NoBpfFs {
        /// The folder.
        path: PathBuf,
        /// Why mounting failed.
        error: io::Error,
    },
    /// Any other failure.
    #[error("{action}: {error}")]
    Io {
        /// What was tried.
        action: String,
        /// What the kernel said.
        error: io::Error,
    },
}

impl KernelError {
    /// Classifies what a system call said.
    pub(super) fn new(action: impl Into<String>, error: io::Error) -> Self {
        let action = action.into();
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted { action },
            Some(libc::ENOSYS) => Self::TooOld {
                action,
                error,
                release: release(),
            },
            _ => Self::Io { action, error },
        }
    }

    /// Classifies what aya says about loading.
    pub(super) fn loading(error: EbpfError) -> Self {
        const ACTION: &str = "cannot load the XDP program";
        match error {
            EbpfError::MapError(MapError::CreateError { name, io_error }) => {
                let action = format!("cannot create the map {name}");
                match io_error.raw_os_error() {
                    Some(libc::EINVAL) => Self::TooOld {
                        action,
                        error: io_error,
                        release: release(),
                    },
                    _ => Self::new(action, io_error),
                }
            }
            EbpfError::MapError(error) => Self::map(ACTION, error),
            EbpfError::ProgramError(error) => Self::program(ACTION, error),
            other => Self::Io {
                action: ACTION.to_owned(),
                error: io::Error::other(other),
            },
        }
    }

    /// Classifies what aya says about a map.
    pub(super) fn map(action: &str, error: MapError) -> Self {
        match error {
            MapError::SyscallError(error) => Self::new(action, error.io_error),
            MapError::CreateError { io_error, .. } | MapError::IoError(io_error) => {
                Self::new(action, io_error)
            }
            other => Self::Io {
                action: action.to_owned(),
                error: io::Error::other(other),
            },
        }
    }

    /// Classifies what aya says about the program.
    pub(super) fn program(action: &str, error: ProgramError) -> Self {
        match error {
            ProgramError::LoadError {
                io_error,
                verifier_log,
            } => match io_error.raw_os_error() {
                Some(libc::EPERM) if verifier_log.to_string().is_empty() => Self::new(action, io_error),
                _ => Self::Rejected {
                    error: io_error,
                    log: last_lines(&verifier_log.to_string(), 12),
                    release: release(),
                },
            },
            ProgramError::SyscallError(error) => Self::new(action, error.io_error),
            ProgramError::IOError(error) => Self::new(action, error),
            other => Self::Io {
                action: action.to_owned(),
                error: io::Error::other(other),
            },
        }
    }
}

/// How much the verifier is to say: nothing unless it rejects the program.
pub(super) const VERIFIER_LOG: VerifierLogLevel = VerifierLogLevel::DEBUG;

/// The kernel's release, as `uname -r` prints it.
fn release() -> String {
    let read = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    read.map_or_else(|_| "unknown".to_owned(), |release| release.trim().to_owned())
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Makes an error of the system's into what has failed because of it.
pub(super) fn failed(action: &'static str) -> impl Fn(io::Error) -> KernelError {
    move |error| KernelError::new(action, error)
}
