//! Giving up everything that relaying does not need.

use std::io;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::prctl::set_dumpable;
use nix::unistd::{Gid, Uid, User, geteuid, setgroups, setresgid, setresuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

/// Who the worker is, where the system has such a user.
const USER: &str = "tungate";
/// Who it is elsewhere: nobody.
const NOBODY: u32 = 65_534;

/// Becomes an ordinary user without capabilities, and without a way to get any. To be called while there is one
/// thread.
///
/// # Errors
///
/// If something cannot be given up.
pub(super) fn drop_privileges() -> Result<()> {
    // The bounding set first: it takes a capability.
    limit_capabilities().context("cannot rule new capabilities out")?;
    if geteuid().is_root() {
        become_user().context("cannot become an ordinary user")?;
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).context("cannot give capabilities up")?;
    // Nobody but root looks into this process.
    set_dumpable(false)?;
    Ok(())
}

fn become_user() -> Result<()> {
    let (user, group) = match User::from_name(USER) {
        Ok(Some(user)) if !user.uid.is_root() => (user.uid, user.gid),
        Ok(_) | Err(_) => (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY)),
    };
    let become_it = || {
        setgroups(&[])?;
        setresgid(group, group, group)?;
        setresuid(user, user, user)
    };
    match become_it() {
        // A user namespace need not have other users, nor let its root change groups.
        Err(Errno::EINVAL | Errno::EPERM) if is_in_user_namespace() => Ok(()),
        result => Ok(result?),
    }
}

/// Whether users here are not all users there are.
fn is_in_user_namespace() -> bool {
    let all = ["0", "0", "4294967295"];
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !map.split_whitespace().eq(all))
}

fn limit_capabilities() -> io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    for capability in CapabilitySet::all().iter() {
        match remove_capability_from_bounding_set(capability) {
            // The kernel does not know it. Or a service without CAP_SETPCAP may not: no program that it could run has
            // capabilities all the same.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
