//! What the appliance changes on its host, and how it is undone.
//!
//! Everything goes through [`HostSetup`], which remembers what it did. Rules and routes carry a protocol number and a
//! table of ours, so those that a crash left behind are recognised; the old values of kernel settings are kept in a
//! file beside the lock that makes the appliance the only one in its network namespace.

mod namespace;
mod netlink;
mod plan;
mod sysctl;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

pub(crate) use namespace::{allow_pings, check_device_node, enclose, enter_namespaces, populate};
pub(crate) use plan::{Capture, Change, MARK, device_addresses};

use self::netlink::Netlink;
use crate::bypass;
use crate::driver::{Device, Layer};

/// Where locks and old values are kept.
const DIRECTORY: &str = "/run/tungate";
/// What the device is called; one appliance in a network namespace has one.
pub(crate) const DEVICE: &str = "tungate0";

/// Changes of the host, and what it takes to undo them.
pub(crate) struct HostSetup {
    netlink: Netlink,
    made: Vec<Change>,
    saved: Saved,
    /// Held as long as the setup lasts.
    _lock: File,
}

/// The old values of kernel settings, in a file that outlives a crash.
#[derive(Debug)]
struct Saved {
    path: PathBuf,
    settings: Vec<Setting>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Setting {
    key: String,
    value: String,
}

impl HostSetup {
    /// Makes sure that no other appliance works in this network namespace, and removes what a crash left behind.
    ///
    /// # Errors
    ///
    /// If there is another one, or the process may not change the host.
    pub(crate) async fn begin() -> Result<Self> {
        let namespace = namespace_cookie().context("cannot tell the network namespace")?;
        let directory = Path::new(DIRECTORY);
        let hint =
            || format!("cannot write to {DIRECTORY}: run this as root, or without changes by --dry-run");
        fs::create_dir_all(directory).with_context(hint)?;
        let lock = take_lock(&directory.join(format!("{namespace}.lock")))?;
        let saved = Saved::load(directory.join(format!("{namespace}.json")))?;
        let mut setup = Self {
            netlink: Netlink::connect().context("cannot talk to the kernel over netlink")?,
            made: Vec::new(),
            saved,
            _lock: lock,
        };
        let left = setup
            .netlink
            .remove_all(DEVICE)
            .await
            .context("cannot remove what an earlier run left behind")?;
        if sysctl::read("net/netfilter/nf_conntrack_max").is_some() {
            bypass::forget_all();
        }
        let settings = setup.saved.settings.len();
        setup.saved.restore()?;
        if left + settings > 0 {
            tracing::warn!(
                changes = left,
                settings,
                "an earlier run ended without undoing its changes: undone now"
            );
        }
        Ok(setup)
    }

    /// Makes the device. With `persistent` it stays when the process dies.
    pub(crate) fn create_device(
        &self,
        layer: Layer,
        mtu: u16,
        queues: u8,
        persistent: bool,
    ) -> io::Result<Device> {
        Device::create(DEVICE, layer, mtu, queues, persistent)
    }

    /// Makes changes, in their order. What was made before one that fails stays, for [`HostSetup::undo`].
    pub(crate) async fn make(&mut self, changes: Vec<Change>) -> Result<()> {
        for change in changes {
            if let Change::Sysctl {
                key, lasting: true, ..
            } = &change
            {
                self.saved.keep(key)?;
            }
            self.netlink.make(&change).await?;
            tracing::debug!("{change}");
            self.made.push(change);
        }
        Ok(())
    }

    /// Whether there are rules that capture traffic.
    pub(crate) fn captures(&self) -> bool {
        self.made.iter().any(|change| matches!(change, Change::Rule(_)))
    }

    /// Takes back rules that were made.
    pub(crate) async fn take_back(&mut self, changes: &[Change]) -> Result<()> {
        for change in changes {
            self.netlink.take_back(change).await?;
            self.made.retain(|made| made != change);
        }
        Ok(())
    }

    /// Undoes everything, the latest first. What cannot be undone is reported, and the rest still is.
    ///
    /// # Errors
    ///
    /// The first thing that could not be undone.
    pub(crate) async fn undo(mut self) -> Result<()> {
        let mut result = Ok(());
        for change in std::mem::take(&mut self.made).iter().rev() {
            let undone = self.netlink.take_back(change).await;
            result = result.and(undone);
        }
        result = result.and(self.netlink.delete_device(DEVICE).await.map(drop));
        result.and(self.saved.restore())
    }
}

/// Removes what a crash left behind.
///
/// # Errors
///
/// If an appliance is running, or the process may not change the host.
pub(crate) async fn clean_up() -> Result<()> {
    HostSetup::begin().await?.undo().await
}

/// Whether this network namespace can have IPv6 addresses.
pub(crate) fn has_ipv6() -> bool {
    sysctl::read("net/ipv6/conf/all/disable_ipv6").is_some_and(|disabled| disabled == "0")
        && sysctl::read("net/ipv6/conf/default/disable_ipv6").is_some_and(|disabled| disabled == "0")
}

/// A number that names this network namespace, and no other as long as the system runs (Linux 5.14).
pub(crate) fn namespace_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option is a number of 64 bits, and `len` says that there is room for one.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn take_lock(path: &Path) -> Result<File> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("cannot open {}: run this as root", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let pid = fs::read_to_string(path).unwrap_or_default();
            bail!(
                "tungate already runs in this network namespace, as process {}: stop that one first",
                pid.trim()
            );
        }
        Err(TryLockError::Error(error)) => return Err(anyhow!(error).context("cannot lock")),
    }
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

impl Saved {
    fn load(path: PathBuf) -> Result<Self> {
        let settings = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| {
                format!(
                    "{} is damaged: look at its settings and remove it",
                    path.display()
                )
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        Ok(Self { path, settings })
    }

    /// Notes a setting's present value, before it is changed.
    fn keep(&mut self, key: &str) -> Result<()> {
        let Some(value) = sysctl::read(key) else {
            return Ok(());
        };
        if self.settings.iter().any(|kept| kept.key == key) {
            return Ok(()); // the value from before the first change counts
        }
        self.settings.push(Setting {
            key: key.to_owned(),
            value,
        });
        self.store()
    }

    /// Writes the old values back and forgets them.
    fn restore(&mut self) -> Result<()> {
        let mut result = Ok(());
        for setting in self.settings.drain(..).rev() {
            let written = match sysctl::write(&setting.key, &setting.value) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()), // its interface is gone
                written => {
                    written.with_context(|| format!("cannot set {} back to {}", setting.key, setting.value))
                }
            };
            result = result.and(written);
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                result.and(Err(error).with_context(|| format!("cannot remove {}", self.path.display())))
            }
            Ok(()) | Err(_) => result,
        }
    }

    /// The whole file is replaced at once, so that a crash leaves the old one or the new one.
    fn store(&self) -> Result<()> {
        let new = self.path.with_extension("new");
        let written = serde_json::to_vec(&self.settings)
            .map_err(io::Error::from)
            .and_then(|text| fs::write(&new, text))
            .and_then(|()| fs::rename(&new, &self.path));
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }
}
