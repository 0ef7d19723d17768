//! Connections as the kernel keeps them: linux/netfilter/nfnetlink_conntrack.h.

use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;
use tungate_engine::bypass::{Carried, Ends, Volume};

use super::netlink::{
    ACK, DUMP, FAMILY_UNSPEC, Messages, REQUEST, Received, Reply, Socket, attribute, family, octets, replies,
};
use crate::host::MARK;

const SUBSYSTEM: u16 = 1 << 8;
const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;

const ORIGINAL: u16 = 1;
const CTA_MARK: u16 = 8;
const COUNTERS_ORIGINAL: u16 = 9;
const COUNTERS_REPLY: u16 = 10;
const CTA_MARK_MASK: u16 = 21;

const TCP: u8 = 6;

/// The group that is told of connections that are forgotten.
pub(super) const FORGOTTEN: u32 = 3;

/// A connection of ours, and what it has carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tracked {
    pub(super) ends: Ends,
    pub(super) carried: Carried,
}

/// Asks for one connection. `None`: there is none, or not of ours.
///
/// # Errors
///
/// The system's.
pub(super) fn get(
    socket: &Socket,
    messages: &mut Messages,
    ends: &Ends,
    buffer: &mut [u8],
) -> io::Result<Option<Carried>> {
    messages.clear();
    let number = messages.begin(GET, REQUEST | ACK, family(ends), 0);
    put_ends(messages, ends);
    socket.send(messages)?;
    let mut found = None;
    loop {
        for reply in replies(socket.receive(buffer)?) {
            match reply {
                Reply::Message(message) if message.sequence == number => {
                    found = read(&message).map(|tracked| tracked.carried);
                }
                Reply::Result(of, result) if of == number => {
                    return match result {
                        Ok(()) => Ok(found),
                        Err(Errno::ENOENT) => Ok(None),
                        Err(error) => Err(error.into()),
                    };
                }
                Reply::Message(_) | Reply::Result(..) | Reply::Done => {}
            }
        }
    }
}

/// Has the kernel forget a connection, if there is one.
///
/// # Errors
///
/// The system's.
pub(super) fn delete(
    socket: &Socket,
    messages: &mut Messages,
    ends: &Ends,
    buffer: &mut [u8],
) -> io::Result<()> {
    messages.clear();
    let number = messages.begin(DELETE, REQUEST | ACK, family(ends), 0);
    put_ends(messages, ends);
    socket.send(messages)?;
    match socket.result(number, buffer)? {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Has the kernel forget all connections of ours.
///
/// # Errors
///
/// The system's.
pub(super) fn delete_all(socket: &Socket) -> io::Result<()> {
    let mut messages = Messages::default();
    let number = messages.begin(DELETE, REQUEST | ACK, FAMILY_UNSPEC, 0);
    put_mark(&mut messages);
    socket.send(&mut messages)?;
    match socket.result(number, &mut vec![0; 1 << 16])? {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Lists all connections of ours.
///
/// # Errors
///
/// The system's, and those of `tell`.
pub(super) fn list(
    socket: &Socket,
    messages: &mut Messages,
    buffer: &mut [u8],
    mut tell: impl FnMut(Tracked) -> io::Result<()>,
) -> io::Result<()> {
    messages.clear();
    messages.begin(GET, REQUEST | DUMP, FAMILY_UNSPEC, 0);
    put_mark(messages);
    socket.send(messages)?;
    loop {
        for reply in replies(socket.receive(buffer)?) {
            match reply {
                Reply::Message(message) => read(&message).map_or(Ok(()), &mut tell)?,
                Reply::Result(_, Ok(())) | Reply::Done => return Ok(()),
                Reply::Result(_, Err(error)) => return Err(error.into()),
            }
        }
    }
}

/// The connection that an event says is forgotten, if it was ours.
pub(super) fn forgotten(message: &Received<'_>) -> Option<Tracked> {
    (message.kind == DELETE).then(|| tracked(message)).flatten()
}

fn read(message: &Received<'_>) -> Option<Tracked> {
    (message.kind == NEW).then(|| tracked(message)).flatten()
}

fn tracked(message: &Received<'_>) -> Option<Tracked> {
    let mark = attribute(message.attributes, CTA_MARK)?;
    if mark != MARK.to_be_bytes() {
        return None;
    }
    let tuple = attribute(message.attributes, ORIGINAL)?;
    let (addresses, ports) = (attribute(tuple, 1)?, attribute(tuple, 2)?);
    if attribute(ports, 1)? != [TCP] {
        return None;
    }
    let end = |v4, v6, port| {
        let address = match attribute(addresses, v4) {
            Some(octets) => IpAddr::from(<[u8; 4]>::try_from(octets).ok()?),
            None => IpAddr::from(<[u8; 16]>::try_from(attribute(addresses, v6)?).ok()?),
        };
        let port = u16::from_be_bytes(attribute(ports, port)?.try_into().ok()?);
        Some(SocketAddr::new(address, port))
    };
    Some(Tracked {
        ends: Ends {
            client: end(1, 3, 2)?,
            target: end(2, 4, 3)?,
        },
        carried: Carried {
            to_upstream: volume(message, COUNTERS_ORIGINAL),
            to_client: volume(message, COUNTERS_REPLY),
        },
    })
}

/// Zero where the kernel does not count.
fn volume(message: &Received<'_>, kind: u16) -> Volume {
    let counters = attribute(message.attributes, kind).unwrap_or_default();
    let number = |kind| {
        let bytes = attribute(counters, kind).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_be_bytes)
    };
    Volume {
        packets: number(1),
        bytes: number(2),
    }
}

fn put_ends(messages: &mut Messages, ends: &Ends) {
    let (source, destination) = if ends.client.is_ipv4() { (1, 2) } else { (3, 4) };
    messages.nest(ORIGINAL, |tuple| {
        tuple.nest(1, |addresses| {
            addresses.put(source, &octets(ends.client.ip()));
            addresses.put(destination, &octets(ends.target.ip()));
        });
        tuple.nest(2, |ports| {
            ports.put(1, &[TCP]);
            ports.put(2, &ends.client.port().to_be_bytes());
            ports.put(3, &ends.target.port().to_be_bytes());
        });
    });
}

fn put_mark(messages: &mut Messages) {
    messages.put_u32(CTA_MARK, MARK);
    messages.put_u32(CTA_MARK_MASK, u32::MAX);
}
