//! Kernel settings under /proc/sys, by their paths there: `net/ipv4/conf/eth0.5/forwarding`.

use std::path::{Path, PathBuf};
use std::{fs, io};

fn path(key: &str) -> PathBuf {
    Path::new("/proc/sys").join(key)
}

/// The present value; `None` where the kernel has no such setting.
pub(super) fn read(key: &str) -> Option<String> {
    fs::read_to_string(path(key))
        .ok()
        .map(|value| value.trim_end().to_owned())
}

/// Sets a value.
///
/// # Errors
///
/// The system's; NotFound where the kernel has no such setting.
pub(super) fn write(key: &str, value: &str) -> io::Result<()> {
    fs::write(path(key), value)
}

/// The interfaces with settings of their own under `key`.
pub(super) fn interfaces(key: &str) -> Vec<String> {
    let entries = fs::read_dir(path(key)).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name != "all" && name != "default")
        .collect();
    names.sort();
    names
}
