//! A UDP upstream by way of a SOCKS5 proxy: datagrams to and from its relay, each with a header in front that says
//! where it goes or comes from (RFC 1928, section 7).

use std::io::{self, ErrorKind, IoSlice, Read};
use std::net::SocketAddr;
use std::num::NonZeroU16;

use socket2::Socket;
use tokio::task::AbortHandle;

use super::Readiness;
use crate::egress::{Association, DATAGRAM_HEADER_MAX, parse_datagram, write_datagram_header};

/// Datagrams that wait for the association; more are lost.
const WAITING_MAX: usize = 16;
/// Datagrams in a row that are not for us, after which others have their turn.
const STRAYS_PER_CALL: usize = 32;

/// A UDP upstream by way of a proxy.
#[derive(Debug)]
pub(crate) struct Relayed {
    association: Association,
    pub(crate) readable: bool,
    /// The connection that the association hangs on may have ended.
    pub(crate) in_doubt: bool,
}

/// An association that is being made; given up when dropped.
#[derive(Debug)]
pub(crate) struct Associating {
    task: AbortHandle,
    waiting: Vec<(SocketAddr, Vec<u8>)>,
}

impl Associating {
    pub(crate) fn new(task: AbortHandle) -> Self {
        Self {
            task,
            waiting: Vec::new(),
        }
    }

    /// Keeps what is to be sent, or loses it.
    pub(crate) fn send(&mut self, target: SocketAddr, payload: &[u8], segment_size: Option<NonZeroU16>) {
        for datagram in datagrams(payload, segment_size) {
            if self.waiting.len() < WAITING_MAX {
                self.waiting.push((target, datagram.to_vec()));
            }
        }
    }

    /// Goes on with `association`, and sends what has waited for it.
    pub(crate) fn finish(mut self, association: Association) -> Relayed {
        let mut relayed = Relayed {
            association,
            readable: false,
            in_doubt: false,
        };
        for (target, payload) in self.waiting.drain(..) {
            relayed.send(target, &payload, None);
        }
        relayed
    }
}

impl Drop for Associating {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Relayed {
    /// The sockets to poll: datagrams, and the connection that the association hangs on.
    pub(crate) fn sockets(&self) -> [&Socket; 2] {
        [&self.association.socket, &self.association.control]
    }

    /// Takes note of what the poll says of one of the two.
    pub(crate) fn on_ready(&mut self, ready: Readiness) {
        self.readable |= ready.readable || ready.error;
        self.in_doubt |= ready.read_closed || ready.error;
    }

    /// Sends `payload` to `target` by the proxy. What the socket does not take is lost like any datagram.
    pub(crate) fn send(&mut self, target: SocketAddr, payload: &[u8], segment_size: Option<NonZeroU16>) {
        let mut header = [0; DATAGRAM_HEADER_MAX];
        let len = write_datagram_header(target, &mut header);
        for datagram in datagrams(payload, segment_size) {
            let parts = [IoSlice::new(&header[..len]), IoSlice::new(datagram)];
            let _ = self.association.socket.send_vectored(&parts);
        }
    }

    /// Receives a datagram: its source, and where in `buffer` its payload is.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is none.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<(SocketAddr, std::ops::Range<usize>)> {
        for _ in 0..STRAYS_PER_CALL {
            match (&self.association.socket).read(buffer) {
                Ok(len) => {
                    if let Some((source, start)) = parse_datagram(&buffer[..len]) {
                        return Ok((source, start..len));
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Err(error);
                }
                Err(_) => {} // the relay's port is closed: the control connection will tell
            }
        }
        Err(ErrorKind::WouldBlock.into())
    }

    /// Whether the association has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.in_doubt = false;
        let ended = |result| match result {
            Ok(0) => true,
            Ok(_) => false, // proxies have nothing to say here
            Err(error) => io::Error::kind(&error) != ErrorKind::WouldBlock,
        };
        ended((&self.association.control).read(&mut [0; 64]))
    }
}

fn datagrams(payload: &[u8], segment_size: Option<NonZeroU16>) -> impl Iterator<Item = &[u8]> {
    let size = segment_size.map_or(payload.len(), |size| usize::from(size.get()));
    // An empty datagram is one, too.
    let empty = payload.is_empty().then_some(payload);
    payload.chunks(size.max(1)).chain(empty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_cut_into_datagrams() {
        let cut = |payload: &[u8], size| {
            datagrams(payload, NonZeroU16::new(size))
                .map(<[u8]>::len)
                .collect::<Vec<_>>()
        };
        assert_eq!(cut(&[0; 7], 3), [3, 3, 1]);
        assert_eq!(cut(&[0; 7], 0), [7]);
        assert_eq!(cut(&[], 0), [0]);
    }
}
