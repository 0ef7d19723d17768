//! What a TOML value can stand for.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use toml::de::DeValue;
use tungate_engine::Protocol;
use tungate_engine::policy::PortRange;

use crate::address::{parse_network, parse_ports, parse_socket_address};
use crate::diagnostic::{Problem, quoted};
use crate::document::{FromValue, choice_of, number_of, text_of, wrong_type};

/// Longest name of a rule or egress, in characters.
const LONGEST_NAME: usize = 64;

/// Longest path of a Unix socket, in bytes: what a `sockaddr_un` has room for.
const LONGEST_SOCKET_PATH: usize = 107;

/// Shortest time that can be configured: below it, timers would do more harm than waiting.
const SHORTEST_TIME: Duration = Duration::from_millis(100);
/// Longest time that can be configured.
const LONGEST_TIME: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Units of sizes, in bytes.
const UNITS: [(&str, u64); 3] = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

/// The name of a rule or egress: what reports, counters and logs call it.
#[derive(Debug)]
pub(crate) struct Name(pub(crate) String);

/// The name of a network interface.
pub(crate) struct InterfaceName(pub(crate) String);

/// The absolute path of a Unix socket.
pub(crate) struct SocketPath(pub(crate) String);

/// The name of a group of users.
pub(crate) struct GroupName(pub(crate) String);

/// A size in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bytes(pub(crate) u64);

impl FromValue for String {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        text_of(value, "text", "\"text\"").map(str::to_owned)
    }
}

impl FromValue for bool {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        value
            .as_bool()
            .map_or_else(|| wrong_type(value, "true or false", "true"), Ok)
    }
}

impl FromValue for Duration {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        match value {
            DeValue::Integer(number) => {
                let hint = format!("with a unit: \"{number}s\" for seconds");
                Err(Problem::at(0..0, "a time needs a unit", hint))
            }
            _ => {
                let text = text_of(value, "a time as text", "\"30s\"")?;
                let time = parse_duration(text)?;
                if time < SHORTEST_TIME || time > LONGEST_TIME {
                    let (size, bound) = if time < SHORTEST_TIME {
                        ("short", "least 100ms")
                    } else {
                        ("long", "most 365d")
                    };
                    let message = format!("this time is too {size}");
                    return Err(Problem::at(0..text.len(), message, format!("use at {bound}")));
                }
                Ok(time)
            }
        }
    }
}

impl FromValue for IpNet {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        parse_network(text_of(value, "a network as text", "\"192.0.2.0/24\"")?)
    }
}

impl FromValue for SocketAddr {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        parse_socket_address(text_of(
            value,
            "an address with a port as text",
            "\"192.0.2.7:8080\"",
        )?)
    }
}

impl FromValue for PortRange {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        if let Some(number) = value.as_integer() {
            let port = u16::from_str_radix(number.as_str(), number.radix()).map_err(|_| {
                Problem::at(
                    0..0,
                    format!("{number} is not a port"),
                    "use a number from 0 to 65535, or a range such as \"8000-8100\"",
                )
            })?;
            return Ok(Self {
                first: port,
                last: port,
            });
        }
        match value.as_str() {
            None => wrong_type(value, "a port or a range of ports", "443 or \"8000-8100\""),
            Some("any") => Err(Problem::at(
                0..3,
                "`any` is not a port",
                "leave out `ports` for all ports",
            )),
            Some(text) => parse_ports(text),
        }
    }
}

impl FromValue for Protocol {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        if value.as_str() == Some("any") {
            let hint = "leave out `protocols` for all protocols";
            return Err(Problem::at(0..3, "`any` is not a protocol", hint));
        }
        let all = [Self::Tcp, Self::Udp, Self::Icmp];
        choice_of(value, &all.map(|protocol| (protocol.name(), protocol)))
    }
}

impl FromValue for Name {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let text = text_of(value, "a name", "\"web\"")?;
        let problem = |message: &str, hint: &str| Err(Problem::at(0..text.len(), message, hint));
        if text.trim() != text || text.contains(char::is_control) {
            return problem(
                "a name has no blanks around it and no control characters",
                "take them out",
            );
        }
        if text.chars().count() > LONGEST_NAME {
            return problem("this name is too long", "use at most 64 characters");
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromValue for InterfaceName {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let text = text_of(value, "the name of an interface", "\"eth0\"")?;
        let sound =
            text.len() <= 15 && !text.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control());
        if !sound {
            let message = format!("`{}` is not the name of an interface", quoted(text));
            let hint = "use at most 15 bytes without blanks and slashes; `ip link` shows the names";
            return Err(Problem::at(0..text.len(), message, hint));
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromValue for SocketPath {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let text = text_of(value, "a path", "\"/run/tungate/control.sock\"")?;
        let problem = |message: String, hint: &str| Err(Problem::at(0..text.len(), message, hint));
        if !text.starts_with('/') || text.contains('\0') {
            let hint = "write it from the root on, such as \"/run/tungate/control.sock\"";
            return problem(format!("`{}` is not an absolute path", quoted(text)), hint);
        }
        if text.len() > LONGEST_SOCKET_PATH {
            return problem(
                "this path is too long for a socket".to_owned(),
                "use at most 107 bytes",
            );
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromValue for GroupName {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let text = text_of(value, "the name of a group", "\"adm\"")?;
        if text.is_empty() || text.contains(|c: char| c == ':' || c.is_whitespace() || c.is_control()) {
            let message = format!("`{}` is not the name of a group", quoted(text));
            return Err(Problem::at(
                0..text.len(),
                message,
                "`getent group` shows the names",
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromValue for u64 {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        number_of(value, 0..=i64::MAX as u64)
    }
}

impl FromValue for Ipv4Addr {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let text = text_of(value, "an IPv4 address", "\"192.0.2.1\"")?;
        text.parse().map_err(|_| {
            let message = format!("`{}` is not an IPv4 address", quoted(text));
            Problem::at(0..text.len(), message, "write one such as \"192.0.2.1\"")
        })
    }
}

impl FromValue for Ipv6Addr {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        let text = text_of(value, "an IPv6 address", "\"2001:db8::1\"")?;
        text.parse().map_err(|_| {
            let message = format!("`{}` is not an IPv6 address", quoted(text));
            Problem::at(0..text.len(), message, "write one such as \"2001:db8::1\"")
        })
    }
}

impl FromValue for Bytes {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        if value.is_integer() {
            return u64::from_value(value).map(Self);
        }
        let text = text_of(value, "a size", "\"4 MiB\"")?;
        let (digits, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
        let unit = UNITS
            .iter()
            .find(|(name, _)| *name == unit.trim_start())
            .map(|&(_, bytes)| bytes);
        let number = digits.parse::<u64>().ok();
        let bytes = number
            .zip(unit)
            .and_then(|(number, unit)| number.checked_mul(unit));
        bytes.map(Self).ok_or_else(|| {
            let hint = "write a number of bytes, or a number with KiB, MiB or GiB, such as \"4 MiB\"";
            Problem::at(0..text.len(), format!("`{}` is not a size", quoted(text)), hint)
        })
    }
}

impl fmt::Display for Bytes {
    /// In the largest unit that leaves no fraction.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().rev().find(|(_, unit)| self.0.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{} {name}", self.0 / unit),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// Reads numbers with the units `ms`, `s`, `m`, `h` or `d`, such as `30s` or `2h 4m`.
fn parse_duration(text: &str) -> Result<Duration, Problem> {
    let problem = || {
        let hint = "write numbers with ms, s, m, h or d, such as \"30s\" or \"2h 4m\"";
        Problem::at(0..text.len(), format!("`{}` is not a time", quoted(text)), hint)
    };
    let mut sum = Duration::ZERO;
    let mut rest = text.trim();
    loop {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().map_err(|_| problem())?;
        rest = rest[digits..].trim_start();
        let letters = rest.bytes().take_while(u8::is_ascii_lowercase).count();
        let millis: u64 = match &rest[..letters] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(problem()),
        };
        let part = number.checked_mul(millis).map(Duration::from_millis);
        sum = part.and_then(|part| sum.checked_add(part)).ok_or_else(problem)?;
        rest = rest[letters..].trim_start();
        if rest.is_empty() {
            return Ok(sum);
        }
    }
}
