//! The model: reads a frame from front to back, then scans all entries.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tungate_engine::policy::{ListAction, ListEntry, ListProtocol};

/// What a packet shows to the lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: Option<u8>,
    pub(crate) port: Option<u16>,
}

/// What should become of a frame: the deciding entry's index and whether it drops, and by which address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) entry: Option<u32>,
    pub(crate) drop: bool,
    pub(crate) by_source: bool,
}

/// Judges a frame by scanning `entries`.
pub(crate) fn judge(frame: &[u8], entries: &[ListEntry], now: u64, local: &[IpAddr]) -> Expected {
    let nothing = Expected {
        entry: None,
        drop: false,
        by_source: false,
    };
    let Some(seen) = read_ethernet(frame) else {
        return nothing;
    };
    for (address, by_source) in [(seen.source, true), (seen.destination, false)] {
        let best = entries
            .iter()
            .enumerate()
            .filter(|(_, entry)| entry.expires.is_none_or(|time| now < time))
            .filter(|(_, entry)| fits(entry, address, &seen))
            .filter(|(_, entry)| entry.network.prefix_len() > 0 || !local.contains(&seen.destination))
            .max_by_key(|&(index, entry)| {
                (
                    entry.network.prefix_len(),
                    entry.ports.is_some(),
                    entry.protocol != ListProtocol::Any,
                    entry.action == ListAction::Deny,
                    std::cmp::Reverse(index),
                )
            });
        if let Some((index, entry)) = best {
            return Expected {
                entry: Some(index as u32),
                drop: entry.action == ListAction::Deny,
                by_source,
            };
        }
    }
    nothing
}

fn fits(entry: &ListEntry, address: IpAddr, seen: &Seen) -> bool {
    let protocol_fits = match entry.protocol {
        ListProtocol::Any => true,
        ListProtocol::Tcp => seen.protocol == Some(6),
        ListProtocol::Udp => seen.protocol == Some(17),
        ListProtocol::Icmp => matches!(seen.protocol, Some(1 | 58)),
    };
    let port_fits = match (entry.ports, seen.port) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(range), Some(port)) => range.first <= port && port <= range.last,
    };
    protocol_fits && port_fits && entry.network.contains(&address)
}

/// Takes bytes off the front.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn number(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn skip(&mut self, count: usize) -> Option<()> {
        self.0 = self.0.get(count..)?;
        Some(())
    }
}

/// Reads an Ethernet frame; `None` if lists have nothing to say about it.
pub(crate) fn read_ethernet(frame: &[u8]) -> Option<Seen> {
    match ip_packet(frame)? {
        (4, packet) => read_v4(packet),
        (_, packet) => read_v6(packet),
    }
}

/// The IP version that the Ethernet header names, and what is behind that header.
pub(crate) fn ip_packet(frame: &[u8]) -> Option<(u8, &[u8])> {
    let mut cursor = Cursor(frame);
    let _macs: [u8; 12] = cursor.take()?;
    let mut tags = 0;
    loop {
        match cursor.number()? {
            0x8100 | 0x88a8 | 0x9100 if tags < 2 => {
                tags += 1;
                cursor.skip(2)?;
            }
            0x0800 => return Some((4, cursor.0)),
            0x86dd => return Some((6, cursor.0)),
            _ => return None,
        }
    }
}

fn read_v4(packet: &[u8]) -> Option<Seen> {
    let header: &[u8; 20] = packet.first_chunk()?;
    let words = usize::from(header[0] % 16);
    let total = usize::from(header[2]) * 256 + usize::from(header[3]);
    if header[0] / 16 != 4 || words < 5 || total < words * 4 {
        return None;
    }
    let packet = packet.get(..total)?;
    let fragment_offset = (u16::from(header[6]) * 256 + u16::from(header[7])) % 8192;
    let payload = &packet[words * 4..];
    Some(Seen {
        source: Ipv4Addr::new(header[12], header[13], header[14], header[15]).into(),
        destination: Ipv4Addr::new(header[16], header[17], header[18], header[19]).into(),
        protocol: Some(header[9]),
        port: if fragment_offset == 0 {
            read_port(header[9], payload)
        } else {
            None
        },
    })
}

fn read_v6(packet: &[u8]) -> Option<Seen> {
    let mut cursor = Cursor(packet);
    let [version, ..] = cursor.take::<4>()?;
    let length = usize::from(cursor.number()?);
    let [next, _hops] = cursor.take()?;
    let source: [u8; 16] = cursor.take()?;
    let destination: [u8; 16] = cursor.take()?;
    if version / 16 != 6 {
        return None;
    }
    let mut cursor = Cursor(cursor.0.get(..length)?);
    let seen = |protocol, port| {
        Some(Seen {
            source: Ipv6Addr::from(source).into(),
            destination: Ipv6Addr::from(destination).into(),
            protocol,
            port,
        })
    };
    let mut kind = next;
    let mut extensions = 0;
    while let Some(unit) = extension_unit(kind) {
        extensions += 1;
        if extensions > 6 {
            return None;
        }
        let whole = cursor.0;
        let [following, count] = cursor.take()?;
        let length = match unit {
            Unit::Fragment => 8,
            Unit::Words => 4 * (usize::from(count) + 2),
            Unit::DoubleWords => 8 * (usize::from(count) + 1),
        };
        cursor = Cursor(whole.get(length..)?);
        if matches!(unit, Unit::Fragment) && (whole[2] != 0 || whole[3] >= 8) {
            return seen(extension_unit(following).is_none().then_some(following), None);
        }
        kind = following;
    }
    seen(Some(kind), read_port(kind, cursor.0))
}

enum Unit {
    Fragment,
    Words,
    DoubleWords,
}

fn extension_unit(kind: u8) -> Option<Unit> {
    match kind {
        0 | 43 | 60 | 135 => Some(Unit::DoubleWords),
        44 => Some(Unit::Fragment),
        51 => Some(Unit::Words),
        _ => None,
    }
}

fn read_port(protocol: u8, segment: &[u8]) -> Option<u16> {
    let [_, _, high, low] = *segment.first_chunk()?;
    matches!(protocol, 6 | 17).then_some(u16::from(high) * 256 + u16::from(low))
}
