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
use std::path::Path;

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError, Xdp, XdpMode};
use rustix::fs::statfs;
use rustix::mount::{MountFlags, mount};

use super::error::KernelError;

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

/// Pins a link, so that it stays when this process ends. The folder is made, and a BPF file system mounted on it,
/// where need be.
pub(super) fn pin(link: FdLink, attached: &Attached, folder: &Path) -> Result<PinnedLink, KernelError> {
    mount_bpf_fs(folder)?;
    let path = folder.join(pin_name(attached.mode, &attached.interface));
    let action = || format!("cannot pin {}", path.display());
    // What is there was left by a loader that is gone: this interface's link is the one at hand.
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(KernelError::new(action(), error));
        }
        Ok(()) | Err(_) => {}
    }
    link.pin(&path)
        .map_err(|error| KernelError::new(action(), io::Error::other(error)))
}

/// Finds the link that an earlier loader pinned for `interface`, and hands it to `program` without a gap. `None`
/// if there is none, or if its interface is gone.
pub(super) fn take_over(
    program: &mut Xdp,
    interface: &str,
    folder: &Path,
) -> Result<Option<(Attached, PinnedLink)>, KernelError> {
    for mode in [Mode::Native, Mode::Generic] {
        let path = folder.join(pin_name(mode, interface));
        if !path.exists() {
            continue;
        }
        let action = || format!("cannot take {} over", path.display());
        let failed = |error| KernelError::new(action(), io::Error::other(error));
        let pinned = PinnedLink::from_pin(&path).map_err(|error| match error {
            LinkError::SyscallError(error) => KernelError::new(action(), error.io_error),
            other => failed(other.to_string()),
        })?;
        let link = XdpLink::try_from(FdLink::from(pinned)).map_err(|error| failed(error.to_string()))?;
        match program.attach_to_link(link) {
            // The new owner's descriptor is let go of: the file keeps the link.
            Ok(id) => drop(program.take_link(id)),
            Err(ProgramError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::ENOLINK) =>
            {
                fs::remove_file(&path).map_err(|error| KernelError::new(action(), error))?;
                return Ok(None);
            }
            Err(error) => return Err(KernelError::program(&action(), error)),
        }
        let pinned = PinnedLink::from_pin(&path).map_err(|error| failed(error.to_string()))?;
        let why =
            Some("it was so when the program was attached".to_owned()).filter(|_| mode == Mode::Generic);
        return Ok(Some((
            Attached {
                interface: interface.to_owned(),
                mode,
                why,
            },
            pinned,
        )));
    }
    Ok(None)
}

/// Interfaces that have a link pinned in `folder`, in the order of their names.
///
/// # Errors
///
/// [`KernelError::Io`] if the folder cannot be read; one that is not there is empty.
pub fn pinned(folder: &Path) -> Result<Vec<String>, KernelError> {
    let failed = |error| KernelError::new(format!("cannot read {}", folder.display()), error);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut interfaces = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        let Some(name) = name.to_str() else { continue };
        let prefixes = [Mode::Native, Mode::Generic].map(|mode| pin_name(mode, ""));
        interfaces.extend(
            prefixes
                .iter()
                .find_map(|prefix| name.strip_prefix(prefix.as_str()))
                .map(str::to_owned),
        );
    }
    interfaces.sort_unstable();
    Ok(interfaces)
}

/// Removes the link that is pinned in `folder` for `interface`, and with it, in a moment, the program,
/// unless a process holds it. Returns whether there was one.
///
/// # Errors
///
/// [`KernelError::NotPermitted`] and [`KernelError::Io`].
pub fn remove_pinned(folder: &Path, interface: &str) -> Result<bool, KernelError> {
    let mut was_there = false;
    for mode in [Mode::Native, Mode::Generic] {
        let path = folder.join(pin_name(mode, interface));
        match fs::remove_file(&path) {
            Ok(()) => was_there = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(KernelError::new(
                    format!("cannot remove {}", path.display()),
                    error,
                ));
            }
        }
    }
    Ok(was_there)
}

/// Names the mode too: the kernel does not tell it of a link.
fn pin_name(mode: Mode, interface: &str) -> String {
    match mode {
        Mode::Native => format!("native-{interface}"),
        Mode::Generic => format!("generic-{interface}"),
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
