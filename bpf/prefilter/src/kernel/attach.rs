//! Interfaces: which mode of XDP, and why; and what keeps a program attached beyond its loader.
//!
//! *Native* mode runs in the driver, before a packet has cost anything; *generic* mode runs in the stack, for
//! drivers that have no XDP. Both give the same verdicts, with these limits: a VLAN tag that the card takes off is
//! seen in neither (`ethtool -K … rxvlan off`), generic mode sees packets that the card or the kernel has joined,
//! and native mode may refuse a large MTU.
//!
//! The program is attached by a link: it goes when the last process or file that refers to the link goes. So a
//! crash leaves nothing behind, unless the link is pinned in a BPF file system.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::{ProgramError, Xdp, XdpMode};
use rustix::fs::statfs;
use rustix::mount::{MountFlags, mount};

use super::error::KernelError;
use super::sys;

/// Which mode is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Wanted {
    /// Native, and generic where the driver will not.
    #[default]
    Best,
    /// Native or nothing.
    Native,
    /// Generic.
    Generic,
}

/// Where the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// In the driver.
    Native,
    /// In the network stack.
    Generic,
}

/// An interface with the program on it. Prints as one line for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Name of the interface.
    pub interface: String,
    /// The mode.
    pub mode: Mode,
    /// Why not native.
    pub why: Option<String>,
}

impl fmt::Display for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = match self.mode {
            Mode::Native => "native",
            Mode::Generic => "generic",
        };
        write!(f, "{}: {mode} XDP", self.interface)?;
        match &self.why {
            Some(why) => write!(f, ", since {why}"),
            None => Ok(()),
        }
    }
}

/// Attaches `program` to `interface` of this thread's network namespace.
pub(super) fn attach(
    program: &mut Xdp,
    interface: &str,
    wanted: Wanted,
) -> Result<(Attached, FdLink), KernelError> {
    if interface.contains('\0') {
        return Err(KernelError::NoInterface {
            interface: interface.to_owned(),
        });
    }
    let attached = |mode, why| Attached {
        interface: interface.to_owned(),
        mode,
        why,
    };
    let refused = match wanted {
        Wanted::Best | Wanted::Native => match try_mode(program, interface, XdpMode::Driver) {
            Ok(link) => return Ok((attached(Mode::Native, None), link)),
            Err(error) => Some(explain(interface, &classify(interface, error)?)),
        },
        Wanted::Generic => None,
    };
    if wanted == Wanted::Native {
        let reasons = format!("native: {}", refused.unwrap_or_default());
        return Err(KernelError::Attach {
            interface: interface.to_owned(),
            reasons,
        });
    }
    match try_mode(program, interface, XdpMode::Skb) {
        Ok(link) => Ok((attached(Mode::Generic, refused), link)),
        Err(error) => {
            let generic = classify(interface, error)?;
            let native = refused.map(|why| format!("native: {why}; ")).unwrap_or_default();
            let reasons = format!("{native}generic: {generic}");
            Err(KernelError::Attach {
                interface: interface.to_owned(),
                reasons,
            })
        }
    }
}

fn try_mode(program: &mut Xdp, interface: &str, mode: XdpMode) -> Result<FdLink, ProgramError> {
    let id = program.attach(interface, mode)?;
    let link = program.take_link(id)?;
    // Before 5.9 there are no links, and what is attached by netlink outlives a crash.
    FdLink::try_from(link).map_err(|_| ProgramError::IOError(io::ErrorKind::Unsupported.into()))
}

/// Tells faults that no other mode would cure from a driver's refusal.
fn classify(interface: &str, error: ProgramError) -> Result<io::Error, KernelError> {
    let error = match error {
        ProgramError::SyscallError(error) => error.io_error,
        ProgramError::IOError(error) => error,
        ProgramError::UnknownInterface { name } => return Err(KernelError::NoInterface { interface: name }),
        other => io::Error::other(other),
    };
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => Err(KernelError::Busy {
            interface: interface.to_owned(),
        }),
        Some(libc::EPERM | libc::EACCES) => Err(KernelError::NotPermitted {
            action: format!("cannot attach to {interface}"),
        }),
        _ => Ok(error),
    }
}

/// Says what a refusal of native mode is about.
fn explain(interface: &str, error: &io::Error) -> String {
    let class = Path::new("/sys/class/net").join(interface);
    let mtu = fs::read_to_string(class.join("mtu")).map(|mtu| mtu.trim().to_owned());
    let mtu = mtu.unwrap_or_else(|_| "unknown".to_owned());
    let driver = fs::read_link(class.join("device/driver"))
        .ok()
        .and_then(|path| Some(format!("driver {}", path.file_name()?.to_string_lossy())));
    let driver = driver.unwrap_or_else(|| "its driver".to_owned());
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => format!("{driver} has no native XDP"),
        Some(libc::ERANGE | libc::EMSGSIZE | libc::E2BIG) => {
            format!(
                "the MTU is too large for native XDP (it is {mtu}; of a veth, the peer's counts, up to about 3,500)"
            )
        }
        Some(libc::ENOMEM | libc::ENOSPC) => {
            format!("{driver} has no queues or memory to spare for native XDP")
        }
        _ => format!("{driver} refuses native XDP: {error} (MTU {mtu})"),
    }
}

/// Makes sure that `folder` is in a BPF file system: one is mounted on its parent where there is none. The folder
/// itself is made.
pub(super) fn make_folder(folder: &Path) -> Result<(), KernelError> {
    let root = folder.parent().unwrap_or(folder);
    mount_bpf_fs(root)?;
    fs::create_dir_all(folder)
        .map_err(|error| KernelError::new(format!("cannot make {}", folder.display()), error))
}

/// Pins a link in `folder`, by a name that tells the mode: the kernel does not tell it of a link.
pub(super) fn pin(link: FdLink, mode: Mode, folder: &Path) -> Result<PinnedLink, KernelError> {
    let path = folder.join(mode.pin_name());
    link.pin(&path)
        .map_err(|error| KernelError::new(format!("cannot pin {}", path.display()), io::Error::other(error)))
}

/// Opens the link pinned in `folder`. `None` if there is none, or if it is on no interface any more.
pub(super) fn open(folder: &Path) -> Result<Option<(Mode, u32, PinnedLink)>, KernelError> {
    for mode in [Mode::Native, Mode::Generic] {
        let path = folder.join(mode.pin_name());
        let action = || format!("cannot open {}", path.display());
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(KernelError::new(action(), error)),
            Ok(_) => {}
        }
        let link = PinnedLink::from_pin(&path).map_err(|error| match error {
            LinkError::SyscallError(error) => KernelError::new(action(), error.io_error),
            other => KernelError::new(action(), io::Error::other(other.to_string())),
        })?;
        // A second descriptor, to ask by: that of a pinned link is not to be had.
        let asked = sys::open_pinned(&path).map_err(|error| KernelError::new(action(), error))?;
        let index = sys::link_interface(asked.as_fd()).map_err(|error| KernelError::new(action(), error))?;
        return Ok((index != 0).then_some((mode, index, link)));
    }
    Ok(None)
}

/// Whether [`Kernel::pin`](super::Kernel::pin) has put a link into `folder` that is still on an interface.
///
/// # Errors
///
/// [`KernelError::NotPermitted`] and [`KernelError::Io`].
pub fn is_attached(folder: &Path) -> Result<bool, KernelError> {
    open(folder).map(|link| link.is_some())
}

/// Takes the program whose link [`Kernel::pin`](super::Kernel::pin) has put into `folder` off its interface, and
/// removes all that is in there, and the folder. Returns whether there was anything.
///
/// # Errors
///
/// [`KernelError::NotPermitted`] and [`KernelError::Io`].
pub fn remove_pinned(folder: &Path) -> Result<bool, KernelError> {
    let failed = |path: &Path, error| KernelError::new(format!("cannot remove {}", path.display()), error);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed(folder, error)),
    };
    for mode in [Mode::Native, Mode::Generic] {
        let path = folder.join(mode.pin_name());
        let link = match sys::open_pinned(&path) {
            Ok(link) => link,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(&path, error)),
        };
        match sys::detach(link.as_fd()) {
            // It is on no interface any more.
            Err(error) if error.raw_os_error() != Some(libc::ENOLINK) => return Err(failed(&path, error)),
            Ok(()) | Err(_) => {}
        }
    }
    for entry in entries {
        let path = entry.map_err(|error| failed(folder, error))?.path();
        fs::remove_file(&path).map_err(|error| failed(&path, error))?;
    }
    fs::remove_dir(folder).map_err(|error| failed(folder, error))?;
    Ok(true)
}

impl Mode {
    fn pin_name(self) -> &'static str {
        match self {
            Self::Native => "link-native",
            Self::Generic => "link-generic",
        }
    }
}

fn mount_bpf_fs(folder: &Path) -> Result<(), KernelError> {
    const BPF_FS_MAGIC: u32 = 0xcafe_4a11;
    let failed = |error| KernelError::NoBpfFs {
        path: folder.to_owned(),
        error,
    };
    fs::create_dir_all(folder).map_err(failed)?;
    let status = statfs(folder).map_err(|error| failed(error.into()))?;
    if status.f_type as u32 == BPF_FS_MAGIC {
        return Ok(());
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("bpf", folder, "bpf", flags, None).map_err(|error| failed(error.into()))
}
