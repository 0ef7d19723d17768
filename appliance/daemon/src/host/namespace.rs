//! Network namespaces of our own, whose only way out is the device.

use std::fs::{self, OpenOptions};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

use super::netlink::Netlink;
use super::plan::{Change, MAIN, Route, RouteTo, addresses};
use super::sysctl;
use crate::driver::TRANSMIT_QUEUE_LEN;

const DEVICE_NODE: &str = "/dev/net/tun";

/// Makes sure that this user can open the TUN device node.
///
/// # Errors
///
/// What is wrong with it, and the way out.
pub(crate) fn check_device_node() -> Result<()> {
    let Err(error) = OpenOptions::new().read(true).write(true).open(DEVICE_NODE) else {
        return Ok(());
    };
    const CONTAINER: &str = "give the container the device (docker run --device /dev/net/tun)";
    let way_out = match error.raw_os_error() {
        Some(libc::ENOENT) => format!("load the kernel's module with `modprobe tun`, or {CONTAINER}"),
        Some(libc::EPERM) => CONTAINER.to_owned(),
        Some(libc::EACCES) => {
            "it needs the mode that most distributions give it: `chmod 0666 /dev/net/tun` as root".to_owned()
        }
        _ => "the kernel has no TUN support here".to_owned(),
    };
    Err(anyhow!("cannot open {DEVICE_NODE}: {error}; {way_out}"))
}

/// Enters new namespaces of these kinds; where that takes more rights than this user has, in a user namespace.
///
/// # Errors
///
/// What forbids it, and the way out. A process with several threads cannot enter a user namespace.
pub(crate) fn enter_namespaces(kinds: CloneFlags) -> Result<()> {
    if unshare(kinds).is_err() {
        let (user, group) = (geteuid(), getegid());
        unshare(kinds | CloneFlags::CLONE_NEWUSER).map_err(explain_refusal)?;
        // Without CAP_SETGID outside, groups can only be mapped once they cannot be dropped any more.
        let write = |name: &str, map: String| fs::write(format!("/proc/self/{name}"), map);
        write("setgroups", "deny".to_owned())
            .and_then(|()| write("uid_map", format!("{user} {user} 1")))
            .and_then(|()| write("gid_map", format!("{group} {group} 1")))
            .map_err(|error| explain_refusal(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EPERM))))?;
    }
    Ok(())
}

/// Says which of the many switches it was.
fn explain_refusal(error: Errno) -> anyhow::Error {
    let is = |path: &str, value: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    let way_out = if is("/proc/sys/user/max_user_namespaces", "0") {
        "they are turned off: `sysctl user.max_user_namespaces=10000` as root"
    } else if is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        "they are turned off for users: `sysctl kernel.unprivileged_userns_clone=1` as root"
    } else if is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        "AppArmor restricts them: `sysctl kernel.apparmor_restrict_unprivileged_userns=0` as root, or a profile for tungate with `userns,`"
    } else {
        "a container's or a service's sandbox may forbid them (docker run --security-opt seccomp=unconfined, systemd's RestrictNamespaces=); root does without"
    };
    anyhow!("user namespaces cannot be used: {}; {way_out}", error.desc())
}

/// Lets all groups there are send echo requests without a raw socket. Without it, they need one.
pub(crate) fn allow_pings() {
    let group = getegid();
    for range in ["0 2147483647".to_owned(), format!("{group} {group}")] {
        if fs::write("/proc/sys/net/ipv4/ping_group_range", range).is_ok() {
            return;
        }
    }
}

/// Turns loopback and `device` on in this thread's network namespace, and leads everything else to the device.
///
/// # Errors
///
/// If the process may not do that here, or somebody has done it already.
pub(crate) async fn enclose(device: &str, v4: Ipv4Addr, v6: Option<Ipv6Addr>) -> Result<()> {
    let netlink = Netlink::connect().context("cannot talk to the kernel over netlink")?;
    // The kernel need not talk on the device by itself. Where settings are read-only, it does.
    let _ = sysctl::write(&format!("net/ipv6/conf/{device}/addr_gen_mode"), "1");
    let _ = sysctl::write(&format!("net/ipv6/conf/{device}/accept_ra"), "0");
    netlink
        .set_transmit_queue_len(device, TRANSMIT_QUEUE_LEN)
        .await
        .with_context(|| format!("cannot set up {device}"))?;
    let mut changes = vec![Change::Up {
        device: "lo".to_owned(),
    }];
    changes.extend(addresses(device, v4, v6));
    for source in [Some(IpAddr::V4(v4)), v6.map(IpAddr::V6)].into_iter().flatten() {
        changes.push(Change::Route(Route {
            ipv6: source.is_ipv6(),
            table: MAIN,
            to: RouteTo::Device {
                device: device.to_owned(),
                source,
            },
        }));
    }
    for change in changes {
        netlink.make(&change).await?;
    }
    Ok(())
}

/// Turns loopback on in this thread's network namespace and gives it more addresses.
///
/// # Errors
///
/// If the process may not do that here.
pub(crate) async fn populate(addresses: &[IpAddr]) -> Result<()> {
    let netlink = Netlink::connect().context("cannot talk to the kernel over netlink")?;
    let device = || "lo".to_owned();
    netlink.make(&Change::Up { device: device() }).await?;
    for &address in addresses {
        let address = address.into();
        netlink
            .make(&Change::Address {
                device: device(),
                address,
            })
            .await?;
    }
    Ok(())
}
