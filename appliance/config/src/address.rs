//! Addresses, networks and ports as text.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use tungate_engine::policy::PortRange;

use crate::diagnostic::{Problem, quoted};

/// Reads `ADDRESS/LENGTH`, or an address alone for the network of just this address.
pub(crate) fn parse_network(text: &str) -> Result<IpNet, Problem> {
    let Some(slash) = text.find('/') else {
        return parse_address(text).map(IpNet::from);
    };
    let address = parse_address(&text[..slash])?;
    let (longest, family) = if address.is_ipv4() {
        (32, "IPv4")
    } else {
        (128, "IPv6")
    };
    let digits = &text[slash + 1..];
    let length = match decimal(digits) {
        Some(length) if length <= longest => length as u8,
        Some(_) | None => {
            let message = format!("`{}` is not a prefix length of {family}", quoted(digits));
            let hint = match netmask_length(address, digits) {
                Some(length) => format!("write the netmask as a prefix length: {address}/{length}"),
                None => format!("use a number from 0 to {longest}"),
            };
            return Err(Problem::at(slash + 1..text.len(), message, hint));
        }
    };
    let network = IpNet::new_assert(address, length);
    if network.addr() != network.network() {
        return Err(Problem::at(
            0..text.len(),
            format!("`{text}` has bits set behind its prefix of {length} bits"),
            format!(
                "write {} for the network, or {address}/{longest} for the one address",
                network.trunc()
            ),
        ));
    }
    Ok(network)
}

/// Reads an address without a zone.
pub(crate) fn parse_address(text: &str) -> Result<IpAddr, Problem> {
    text.parse().map_err(|_| {
        Problem::at(
            0..text.len(),
            format!("`{}` is not an IP address", quoted(text)),
            address_hint(text),
        )
    })
}

/// Reads `ADDRESS:PORT`, with an IPv6 address in brackets.
pub(crate) fn parse_socket_address(text: &str) -> Result<SocketAddr, Problem> {
    text.parse().map_err(|_| {
        let problem = |message: String, hint: String| Problem::at(0..text.len(), message, hint);
        let message = format!("`{}` is not an address with a port", quoted(text));
        if let Ok(address) = text.parse::<IpAddr>() {
            let example = SocketAddr::new(address, 8080);
            return problem(format!("`{text}` has no port"), format!("add one: {example}"));
        }
        if let Some((scheme, _)) = text.split_once("://") {
            return problem(message, format!("leave out `{scheme}://`"));
        }
        let Some((host, port)) = text.rsplit_once(':') else {
            return problem(message, address_hint(text));
        };
        let host_start = usize::from(host.starts_with('['));
        let host = host.trim_start_matches('[').trim_end_matches(']');
        match host.parse::<IpAddr>() {
            Err(_) => Problem::at(
                host_start..host_start + host.len(),
                format!("`{}` is not an IP address", quoted(host)),
                address_hint(host),
            ),
            Ok(IpAddr::V6(address)) if !text.starts_with('[') => problem(
                message,
                format!("put the address into brackets: [{address}]:{port}"),
            ),
            Ok(_) => match parse_port(port) {
                Err(wrong) => wrong.shifted(text.len() - port.len()),
                Ok(_) => problem(
                    message,
                    "write ADDRESS:PORT, or [ADDRESS]:PORT for IPv6".to_owned(),
                ),
            },
        }
    })
}

/// Reads `PORT` or `LO-HI`.
pub(crate) fn parse_ports(text: &str) -> Result<PortRange, Problem> {
    let Some(dash) = text.find('-') else {
        return parse_port(text).map(|port| PortRange {
            first: port,
            last: port,
        });
    };
    let first = parse_port(&text[..dash])?;
    let last = parse_port(&text[dash + 1..]).map_err(|problem| problem.shifted(dash + 1))?;
    if last < first {
        return Err(Problem::at(
            0..text.len(),
            format!("the port range `{text}` ends before it begins"),
            format!("write {last}-{first}"),
        ));
    }
    Ok(PortRange { first, last })
}

/// Reads a port number.
pub(crate) fn parse_port(text: &str) -> Result<u16, Problem> {
    decimal(text)
        .and_then(|port| u16::try_from(port).ok())
        .ok_or_else(|| {
            Problem::at(
                0..text.len(),
                format!("`{}` is not a port", quoted(text)),
                "use a number from 0 to 65535, or a range such as 8000-8100",
            )
        })
}

/// Reads a decimal number of at most 9 digits without sign or leading zeros.
fn decimal(text: &str) -> Option<u32> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text.len() == 1 || !text.starts_with('0'));
    (plain && text.len() <= 9).then(|| text.parse().ok()).flatten()
}

/// The prefix length that the netmask `text` stands for.
fn netmask_length(address: IpAddr, text: &str) -> Option<u8> {
    let mask: IpAddr = match address {
        IpAddr::V4(_) => text.parse::<Ipv4Addr>().ok()?.into(),
        IpAddr::V6(_) => text.parse::<Ipv6Addr>().ok()?.into(),
    };
    ipnet::ip_mask_to_prefix(mask).ok()
}

fn address_hint(text: &str) -> String {
    if text.is_empty() {
        return "write an address such as 192.0.2.1 or 2001:db8::1".to_owned();
    }
    if text.contains('%') {
        return "leave out the zone behind `%`".to_owned();
    }
    let numbers: Vec<&str> = text.split('.').collect();
    let all_digits = numbers
        .iter()
        .all(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()));
    if all_digits && numbers.len() < 4 {
        let padded = numbers
            .into_iter()
            .chain(["0"; 4])
            .take(4)
            .collect::<Vec<_>>()
            .join(".");
        return format!("write all four numbers: {}", quoted(&padded));
    }
    if all_digits && numbers.len() == 4 {
        let plain: Vec<&str> = numbers
            .iter()
            .map(|n| match n.trim_start_matches('0') {
                "" => "0",
                rest => rest,
            })
            .collect();
        return match plain.join(".").parse::<Ipv4Addr>() {
            Ok(address) => format!("leading zeros may mean octal numbers; write {address} if it is decimal"),
            Err(_) => "each of the four numbers is at most 255".to_owned(),
        };
    }
    if text.bytes().any(|byte| byte.is_ascii_alphabetic()) && !text.contains(':') {
        return "names are not looked up here; write the address, such as 192.0.2.1 or 2001:db8::1"
            .to_owned();
    }
    "write an address such as 192.0.2.1 or 2001:db8::1".to_owned()
}
