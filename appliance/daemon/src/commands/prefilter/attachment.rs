//! An attached pre-filter between commands: program, maps and link are pinned in a BPF file system of our own, and
//! the lists that the maps were made of lie beside it.
//!
//! There are two files of lists, as there are two slots of maps. A change writes the file of the slot that is not in
//! use, fills that slot, and switches; so whatever is interrupted, the generation in the kernel names the file that
//! holds. Counts from before the last change have a file of their own, which is written last: an interruption right
//! there loses counts, and never mistakes one entry's for another's.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::{if_indextoname, if_nametoindex};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};
use tungate_engine::policy::{ListEntry, PolicySpec, RuleRef};
use tungate_prefilter::kernel::{self, Kernel, KernelError, Mode, Options, Wanted};
use tungate_prefilter::{Count, Counters, Prefilter};

use super::Fault;
pub(super) use crate::driver::unix_time;
use crate::host::namespace_cookie;

/// The BPF file system. Not below /sys, which `ip netns exec` replaces.
const PINS: &str = "/run/tungate/bpf";
/// Lists and locks.
const STATE: &str = "/run/tungate/prefilter";

/// A pre-filter that outlives its loader; nobody else changes it as long as this is held.
pub(super) struct Attachment {
    prefilter: Prefilter<Kernel>,
    lists: Lists,
    place: Place,
    lock: Option<File>,
}

/// The lists of one slot.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Lists {
    entries: Vec<ListEntry>,
    /// Interface's name when they were applied, for people who look.
    interface: String,
}

/// Where things of one interface are. An index says which interface even if its name changes, and can be part of a
/// file name, unlike names with dots; the cookie says which network namespace.
#[derive(Debug)]
struct Place {
    pins: PathBuf,
    state: PathBuf,
}

impl Place {
    fn of(interface: &str) -> Result<Self> {
        let index = if_nametoindex(interface).map_err(|_| KernelError::NoInterface {
            interface: interface.to_owned(),
        })?;
        Self::named(&format!("{}-{index}", cookie()?))
    }

    fn named(name: &str) -> Result<Self> {
        Ok(Self {
            pins: Path::new(PINS).join(name),
            state: Path::new(STATE).join(name),
        })
    }

    /// Waits for other commands to end.
    fn lock(&self) -> Result<File> {
        let path = self.state.join("lock");
        let file = fs::create_dir_all(&self.state)
            .and_then(|()| File::create(&path))
            .and_then(|file| file.lock().map(|()| file));
        file.map_err(|error| explain(&path, error))
    }

    fn lists(&self, generation: u32) -> PathBuf {
        self.state.join(format!("lists-{}", generation & 1))
    }

    fn counts(&self, generation: u32) -> PathBuf {
        self.state.join(format!("counts-{}", generation & 1))
    }

    fn remove(&self) -> Result<()> {
        kernel::remove_pinned(&self.pins)?;
        match fs::remove_dir_all(&self.state) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(explain(&self.state, error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

impl Attachment {
    /// Attaches the pre-filter with empty lists, and leaves it there.
    pub(super) fn create(interface: &str) -> Result<Self> {
        let place = Place::of(interface)?;
        let lock = place.lock()?;
        if kernel::is_attached(&place.pins)? {
            return Err(Fault::Attached(interface.to_owned()).into());
        }
        remove_leftovers()?;
        // What a command that was killed has left here.
        kernel::remove_pinned(&place.pins)?;
        let attach = || -> Result<_> {
            let mut prefilter = Prefilter::load(Options::default())?;
            prefilter.set_local(&local_addresses()?)?;
            prefilter.backend_mut().attach(interface, Wanted::Best)?;
            Ok(prefilter)
        };
        let prefilter = match attach() {
            Ok(prefilter) => prefilter,
            Err(error) => {
                let _ = place.remove(); // what is wrong has been said
                return Err(error);
            }
        };
        let lists = Lists {
            entries: Vec::new(),
            interface: interface.to_owned(),
        };
        let mut attachment = Self {
            prefilter,
            lists,
            place,
            lock: Some(lock),
        };
        let generation = attachment.prefilter.backend().generation();
        store(&attachment.place.lists(generation), &attachment.lists)?;
        attachment.store_counts()?;
        let pins = attachment.place.pins.clone();
        attachment.prefilter.backend_mut().pin(&pins)?;
        Ok(attachment)
    }

    /// Opens the one that is there.
    pub(super) fn open(interface: &str) -> Result<Self> {
        let place = Place::of(interface)?;
        // A folder for an interface that has none would be left over.
        let not_attached = || Fault::NotAttached(interface.to_owned());
        if !place.state.exists() {
            return Err(not_attached().into());
        }
        let lock = place.lock()?;
        let Some(backend) = Kernel::open(interface, &place.pins)? else {
            return Err(not_attached().into());
        };
        let generation = backend.generation();
        let lists: Lists = restore(&place.lists(generation))?.with_context(|| {
            format!(
                "the lists of {interface} are lost: `tungate prefilter detach {interface}` and attach anew"
            )
        })?;
        let counts: Vec<(RuleRef, u64, u64)> = restore(&place.counts(generation))?.unwrap_or_default();
        let counts = counts
            .into_iter()
            .map(|(rule, packets, bytes)| (rule, Count { packets, bytes }));
        Ok(Self {
            prefilter: Prefilter::resume(backend, generation, &lists.entries, counts)?,
            lists,
            place,
            lock: Some(lock),
        })
    }

    pub(super) fn entries(&self) -> &[ListEntry] {
        &self.lists.entries
    }

    pub(super) fn in_force(&self, now: u64) -> impl Iterator<Item = &ListEntry> {
        self.lists
            .entries
            .iter()
            .filter(move |entry| entry.expires.is_none_or(|expires| expires > now))
    }

    /// Replaces the lists; those that have ended are left out.
    pub(super) fn apply(&mut self, mut entries: Vec<ListEntry>) -> Result<()> {
        let now = unix_time();
        entries.retain(|entry| entry.expires.is_none_or(|expires| expires > now));
        self.lists.entries = entries;
        let next = self.prefilter.backend().generation().wrapping_add(1);
        store(&self.place.lists(next), &self.lists)?;
        match fs::remove_file(self.place.counts(next)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(explain(&self.place.counts(next), error));
            }
            Ok(()) | Err(_) => {}
        }
        self.prefilter.set_local(&local_addresses()?)?;
        let spec = PolicySpec {
            lists: std::mem::take(&mut self.lists.entries),
            ..PolicySpec::default()
        };
        let applied = self.prefilter.apply(&spec, now);
        self.lists.entries = spec.lists;
        applied?;
        self.store_counts()
    }

    pub(super) fn counters(&mut self) -> Result<Counters> {
        Ok(self.prefilter.counters()?)
    }

    /// The generation of the lists; another one means that others have changed them.
    pub(super) fn generation(&self) -> u32 {
        self.prefilter.backend().generation()
    }

    pub(super) fn mode_name(&self) -> &'static str {
        match self.prefilter.backend().attached().map(|attached| attached.mode) {
            Some(Mode::Generic) => "generic",
            Some(Mode::Native) | None => "native",
        }
    }

    /// Lets other commands at it: from now on it is only read.
    pub(super) fn unlock(&mut self) {
        self.lock = None;
    }

    /// Detaches it, and leaves nothing.
    pub(super) fn remove(self) -> Result<()> {
        self.place.remove()
    }

    fn store_counts(&self) -> Result<()> {
        let counts: Vec<(RuleRef, u64, u64)> = self
            .prefilter
            .carried()
            .map(|(rule, Count { packets, bytes })| (rule, packets, bytes))
            .collect();
        store(&self.place.counts(self.generation()), &counts)
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefilter.backend().attached() {
            Some(attached) => attached.fmt(f),
            None => f.write_str(&self.lists.interface),
        }
    }
}

/// The generation of the lists in force on `interface`; `None` if nothing is attached any more.
pub(super) fn generation(interface: &str) -> Result<Option<u32>> {
    let kernel = Kernel::open(interface, &Place::of(interface)?.pins)?;
    Ok(kernel.map(|kernel| kernel.generation()))
}

/// A lock of `interface` that only one process can have, or `None`.
pub(super) fn keeper_lock(interface: &str) -> Result<Option<File>> {
    let path = Place::of(interface)?.state.join("keeper");
    let file = File::create(&path).map_err(|error| explain(&path, error))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(error)) => Err(explain(&path, error)),
    }
}

/// Interfaces of this network namespace with a pre-filter attached by hand.
pub(super) fn interfaces() -> Result<Vec<String>> {
    let prefix = format!("{}-", cookie()?);
    let mut interfaces = Vec::new();
    for name in known(Path::new(PINS))? {
        let Some(index) = name.strip_prefix(&prefix).and_then(|index| index.parse().ok()) else {
            continue;
        };
        if kernel::is_attached(&Path::new(PINS).join(&name))?
            && let Ok(interface) = if_indextoname(index)
        {
            interfaces.push(interface.to_string_lossy().into_owned());
        }
    }
    interfaces.sort_unstable();
    Ok(interfaces)
}

/// Removes what there is of pre-filters whose interfaces are gone, or whose loader was killed, in all namespaces.
/// Returns how many they were.
pub(crate) fn remove_leftovers() -> Result<usize> {
    let mut count = 0;
    let mut names = known(Path::new(PINS))?;
    names.extend(known(Path::new(STATE))?);
    names.sort_unstable();
    names.dedup();
    for name in names {
        let place = Place::named(&name)?;
        // Whoever has the lock is at work.
        let Ok(lock) = File::open(place.state.join("lock")) else {
            if !kernel::is_attached(&place.pins)? {
                place.remove()?;
                count += 1;
            }
            continue;
        };
        if lock.try_lock().is_ok() && !kernel::is_attached(&place.pins)? {
            place.remove()?;
            count += 1;
        }
    }
    Ok(count)
}

/// Whether two entries differ in their end alone.
pub(super) fn same(a: &ListEntry, b: &ListEntry) -> bool {
    (a.action, a.network, a.protocol, a.ports) == (b.action, b.network, b.protocol, b.ports)
}

/// The addresses of this host: packets to them are not judged by entries of prefix length 0.
pub(crate) fn local_addresses() -> Result<Vec<IpAddr>> {
    let addresses = getifaddrs().context("cannot list the addresses of this host")?;
    let mut addresses: Vec<IpAddr> = addresses
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
        })
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// Goes back to the mounts of the system's first process if ours are a private copy of them, as in `ip netns exec`:
/// what is mounted there goes with the command, and a pinned program with it. Elsewhere, as in containers, there is
/// nothing to go back to.
pub(super) fn leave_private_mounts() {
    let node = |path: &str| fs::metadata(path).map(|data| (data.dev(), data.ino())).ok();
    let (ours, first) = (node("/proc/self/ns/mnt"), node("/proc/1/ns/mnt"));
    if first.is_none() || ours == first || node("/") != node("/proc/1/root/") {
        return;
    }
    let here = File::open(".");
    if let Ok(namespace) = File::open("/proc/1/ns/mnt")
        && setns(namespace, CloneFlags::CLONE_NEWNS).is_ok()
        && let Ok(here) = here
    {
        let _ = nix::unistd::fchdir(here); // relative names then mean what they meant
    }
}

fn cookie() -> Result<u64> {
    namespace_cookie().context("cannot tell the network namespace")
}

/// Names of [`Place`]s in a folder. The kernel has files of its own in a BPF file system.
fn known(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(explain(folder, error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(|error| explain(folder, error))?.file_name();
        let is_place = |name: &str| {
            let parts = name.split_once('-');
            parts.is_some_and(|(cookie, index)| cookie.parse::<u64>().is_ok() && index.parse::<u32>().is_ok())
        };
        names.extend(name.into_string().ok().filter(|name| is_place(name)));
    }
    Ok(names)
}

fn store<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let new = path.with_extension("new");
    let bytes = postcard::to_stdvec(value).context("cannot encode lists")?;
    fs::write(&new, bytes)
        .and_then(|()| fs::rename(&new, path))
        .map_err(|error| explain(path, error))
}

fn restore<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(explain(path, error)),
    };
    let value = postcard::from_bytes(&bytes).with_context(|| format!("{} is damaged", path.display()))?;
    Ok(Some(value))
}

fn explain(path: &Path, error: io::Error) -> anyhow::Error {
    let action = format!("cannot use {}", path.display());
    match error.kind() {
        io::ErrorKind::PermissionDenied => KernelError::NotPermitted { action }.into(),
        _ => anyhow::Error::from(error).context(action),
    }
}
