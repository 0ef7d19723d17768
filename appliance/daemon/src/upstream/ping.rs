//! An ICMP upstream: echo requests to one target, by a ping socket, or by a raw one where those are not allowed.
//!
//! Ping sockets (SOCK_DGRAM, IPPROTO_ICMP) need no privilege but the group in `net.ipv4.ping_group_range`; the kernel
//! chooses the identifier and sorts the replies. Raw sockets need CAP_NET_RAW and see every reply of the target.

use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::Socket;
use tungate_engine::IngressId;
use tungate_engine::io::{Carriage, IcmpError};
use tungate_engine::packet::{Datagram, Echo};

use super::Readiness;
use super::errors::{SendError, next_send_error, send_error};
use super::headers::Headers;
use super::socket::{SocketSetup, Transport};

/// Length of an echo message's header.
const HEADER_LEN: usize = 8;
const ECHO_REPLY: u8 = 0;
const ECHO_REPLY_V6: u8 = 129;

/// Messages in a row that are no replies of ours, or errors, after which others have their turn.
const ERRORS_PER_CALL: usize = 32;

/// Identifiers of raw sockets, which nobody else hands out.
static NEXT_IDENTIFIER: AtomicU16 = AtomicU16::new(1);

/// An ICMP upstream.
#[derive(Debug)]
pub(crate) struct Ping {
    socket: Socket,
    target: IpAddr,
    kind: Kind,
    headers: Headers,
    /// The sequence number of the request that this host found too big last. Its entry in the error queue has none.
    too_big: Option<u16>,
    /// What was reported of that; the next ones like it say nothing new.
    reported: Option<SendError>,
    /// The request that is being made.
    request: Vec<u8>,
    pub(crate) readable: bool,
    pub(crate) error: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The kernel sees to identifiers.
    Datagram,
    /// Replies with this identifier are ours; over IPv4 they come with their IP header.
    Raw { identifier: u16 },
}

/// An echo reply; its payload is this range of the buffer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) sequence: u16,
    pub(crate) payload: std::ops::Range<usize>,
}

impl Ping {
    /// Opens a socket for echo requests to `target`.
    ///
    /// # Errors
    ///
    /// Those of [`SocketSetup::open`]; EPERM or EACCES where neither kind is allowed.
    pub(crate) fn open(setup: &SocketSetup, client: IpAddr, target: IpAddr) -> io::Result<Self> {
        let open = |transport| setup.open(transport, target, Some(client));
        let (socket, kind) = match open(Transport::Ping) {
            Ok(socket) => (socket, Kind::Datagram),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                let identifier = NEXT_IDENTIFIER.fetch_add(1, Ordering::Relaxed);
                (open(Transport::RawPing)?, Kind::Raw { identifier })
            }
            Err(error) => return Err(error),
        };
        if target.is_ipv4() {
            setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        }
        // Nobody but the target answers a ping.
        socket.connect(&SocketAddr::new(target, 0).into())?;
        Ok(Self {
            socket,
            target,
            kind,
            headers: Headers::default(),
            too_big: None,
            reported: None,
            request: Vec::new(),
            readable: false,
            error: false,
        })
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Takes note of what the poll says.
    pub(crate) fn on_ready(&mut self, ready: Readiness) {
        self.readable |= ready.readable || ready.error;
        self.error |= ready.error;
    }

    /// Sends an echo request.
    ///
    /// # Errors
    ///
    /// What the client is to be told.
    pub(crate) fn send(
        &mut self,
        sequence: u16,
        payload: &[u8],
        carriage: Carriage,
    ) -> Result<(), IcmpError> {
        self.headers.set(&self.socket, self.target.is_ipv4(), carriage);
        let identifier = match self.kind {
            Kind::Datagram => 0,
            Kind::Raw { identifier } => identifier,
        };
        let echo = Echo {
            identifier,
            sequence,
            payload,
        };
        // The kernel fills in the ICMPv6 checksum, whose pseudo-header has a source address that only it knows.
        let Ok(datagram) = Datagram::echo_request(self.target, self.target, echo) else {
            return Ok(()); // no IP packet holds it, so no client has sent it
        };
        self.request.resize(datagram.packet_len(), 0);
        let header_len = usize::from(
            datagram
                .write(&mut self.request, 0, IngressId(0), None)
                .header_len,
        );
        let message = &self.request[header_len..];
        // As with UDP: an error about an earlier request may be reported in this one's place.
        let result = self.socket.send(message).or_else(|error| match error.kind() {
            ErrorKind::WouldBlock => Err(error),
            _ => self.socket.send(message),
        });
        match result {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                self.error = true;
                self.too_big = Some(sequence);
                Ok(())
            }
            Err(error) => send_error(&error).map_or(Ok(()), Err),
        }
    }

    /// Receives an echo reply.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is none.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Reply> {
        for _ in 0..ERRORS_PER_CALL {
            match (&self.socket).read(buffer) {
                Ok(len) => {
                    if let Some(reply) = parse(&buffer[..len], self.kind, self.target.is_ipv4()) {
                        return Ok(reply);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Err(error);
                }
                // About an earlier request; the error queue has the whole story.
                Err(_) => self.error = true,
            }
        }
        Err(ErrorKind::WouldBlock.into())
    }

    /// The next error about something that was sent.
    pub(crate) fn next_error(&mut self) -> Option<SendError> {
        loop {
            let mut request = [0; HEADER_LEN];
            let mut found = next_send_error(&self.socket, &mut request);
            self.error = found.is_some();
            if let Some(found) = &mut found {
                let quoted = u16::from_be_bytes([request[6], request[7]]);
                let sequence = self.too_big.filter(|_| found.is_local()).unwrap_or(quoted);
                found.target = SocketAddr::new(self.target, sequence);
            }
            let repeated = found.is_some_and(|found| found.is_local()) && found == self.reported;
            self.reported = found;
            if !repeated {
                return found;
            }
        }
    }
}

/// Finds the echo reply in what a socket has given.
fn parse(received: &[u8], kind: Kind, is_ipv4: bool) -> Option<Reply> {
    let start = match kind {
        Kind::Raw { .. } if is_ipv4 => usize::from(received.first()? & 0xf) * 4,
        Kind::Raw { .. } | Kind::Datagram => 0,
    };
    let &[
        message_type,
        0,
        _,
        _,
        id_high,
        id_low,
        sequence_high,
        sequence_low,
        ..,
    ] = received.get(start..)?
    else {
        return None;
    };
    let is_reply = message_type == if is_ipv4 { ECHO_REPLY } else { ECHO_REPLY_V6 };
    let is_ours = match kind {
        Kind::Datagram => true,
        Kind::Raw { identifier } => identifier == u16::from_be_bytes([id_high, id_low]),
    };
    (is_reply && is_ours).then(|| Reply {
        sequence: u16::from_be_bytes([sequence_high, sequence_low]),
        payload: start + HEADER_LEN..received.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_of_both_kinds_and_versions_are_found() {
        let message = |kind| [&[kind, 0, 9, 9, 0x12, 0x34, 0, 7][..], b"payload"].concat();
        let with_header = |message: Vec<u8>| [&[0x46][..], &[0; 23], &message].concat();
        let raw = Kind::Raw { identifier: 0x1234 };
        let reply = |start: usize| {
            Some(Reply {
                sequence: 7,
                payload: start + 8..start + 15,
            })
        };
        assert_eq!(parse(&message(0), Kind::Datagram, true), reply(0));
        assert_eq!(parse(&message(129), Kind::Datagram, false), reply(0));
        assert_eq!(parse(&message(129), raw, false), reply(0));
        assert_eq!(parse(&with_header(message(0)), raw, true), reply(24));
        assert_eq!(parse(&with_header(message(8)), raw, true), None);
        assert_eq!(
            parse(&with_header(message(0)), Kind::Raw { identifier: 1 }, true),
            None
        );
        assert_eq!(parse(&with_header(message(0))[..30], raw, true), None);
        assert_eq!(parse(&[], raw, true), None);
    }
}
