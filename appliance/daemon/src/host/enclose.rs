//! A network namespace whose only way out is the device.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};

use super::netlink::Netlink;
use super::plan::{Change, MAIN, Route, RouteTo, addresses};
use super::sysctl;
use crate::driver::TRANSMIT_QUEUE_LEN;

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
