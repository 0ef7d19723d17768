//! A UDP upstream: one unconnected socket for a mapping and all its targets (RFC 4787, REQ-1).
//!
//! Datagrams of one size go out and come in as super-packets where the kernel joins and cuts them (UDP_SEGMENT,
//! UDP_GRO). ICMP errors about what was sent come by the socket's error queue (IP_RECVERR).

use std::io::{self, ErrorKind, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};
use socket2::Socket;
use tungate_engine::io::{Carriage, IcmpError};

use super::Readiness;
use super::batch::{BATCH_MAX, Batch};
use super::errors::{SendError, next_send_error, send_error};
use super::headers::Headers;
use super::socket::{SocketSetup, Transport, unspecified};

/// Datagrams that the kernel cuts from one send (UDP_MAX_SEGMENTS of older kernels).
const SEGMENTS_MAX: usize = 64;

/// Errors in a row after which the socket is left alone until the next turn.
const ERRORS_PER_CALL: usize = 8;

/// A UDP upstream.
#[derive(Debug)]
pub(crate) struct Udp {
    socket: Socket,
    is_ipv4: bool,
    headers: Headers,
    /// Whether the kernel has not refused to cut super-packets yet.
    segmentation: bool,
    /// Where something was sent last that this host found too big. Its entry in the error queue has the MTU, but no port.
    too_big_for: Option<SocketAddr>,
    /// What was reported of that; the next ones like it say nothing new.
    reported: Option<SendError>,
    pub(crate) readable: bool,
    pub(crate) error: bool,
}

impl Udp {
    /// Opens a socket for targets of the family of `target`, on a port of its own.
    ///
    /// # Errors
    ///
    /// Those of [`SocketSetup::open`].
    pub(crate) fn open(setup: &SocketSetup, client: IpAddr, target: IpAddr) -> io::Result<Self> {
        let socket = setup.open(Transport::Udp, target, Some(client))?;
        let is_ipv4 = target.is_ipv4();
        if is_ipv4 {
            setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        }
        // Linux 5.0; without it datagrams come one by one.
        let _ = setsockopt(&socket, sockopt::UdpGroSegment, &true);
        if socket
            .local_addr()?
            .as_socket()
            .is_none_or(|local| local.port() == 0)
        {
            socket.bind(&SocketAddr::new(unspecified(is_ipv4), 0).into())?;
        }
        Ok(Self {
            socket,
            is_ipv4,
            headers: Headers::default(),
            segmentation: true,
            too_big_for: None,
            reported: None,
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

    /// Sends `payload` to `target`, in datagrams of `segment_size` bytes if given.
    ///
    /// # Errors
    ///
    /// What the client is to be told. A datagram that the socket has no room for is lost like any other.
    pub(crate) fn send(
        &mut self,
        target: SocketAddr,
        payload: &[u8],
        segment_size: Option<NonZeroU16>,
        carriage: Carriage,
    ) -> Result<(), IcmpError> {
        self.headers.set(&self.socket, self.is_ipv4, carriage);
        let Some(size) = segment_size.map(|size| usize::from(size.get())) else {
            return self.send_one(target, payload);
        };
        for batch in payload.chunks(size * SEGMENTS_MAX) {
            if self.segmentation && batch.len() > size && self.send_segments(target, batch, size as u16) {
                continue;
            }
            for datagram in batch.chunks(size) {
                self.send_one(target, datagram)?;
            }
        }
        Ok(())
    }

    fn send_one(&mut self, target: SocketAddr, payload: &[u8]) -> Result<(), IcmpError> {
        let address = target.into();
        // An error about an earlier datagram is reported in this one's place, which has then not been sent.
        let result = self
            .socket
            .send_to(payload, &address)
            .or_else(|error| match error.kind() {
                ErrorKind::WouldBlock => Err(error),
                _ => self.socket.send_to(payload, &address),
            });
        match result {
            Ok(_) => Ok(()),
            // The error queue has this one, with the MTU.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                self.error = true;
                self.too_big_for = Some(target);
                Ok(())
            }
            Err(error) => send_error(&error).map_or(Ok(()), Err),
        }
    }

    /// Sends a super-packet; `false` where the kernel does not.
    fn send_segments(&mut self, target: SocketAddr, payload: &[u8], size: u16) -> bool {
        let address = SockaddrStorage::from(target);
        let send = || {
            sendmsg(
                self.socket.as_raw_fd(),
                &[IoSlice::new(payload)],
                &[ControlMessage::UdpGsoSegments(&size)],
                MsgFlags::empty(),
                Some(&address),
            )
        };
        match send() {
            Ok(_) | Err(Errno::EAGAIN) => true,
            // No such option, or a way out without checksum offload.
            Err(Errno::ENOPROTOOPT | Errno::EIO) => {
                self.segmentation = false;
                false
            }
            Err(_) => false, // a segment that needs fragments, or an error about an earlier datagram
        }
    }

    /// Receives datagrams into `batch`. Errors about datagrams that were sent do not show here: the error queue has the
    /// whole story.
    pub(crate) fn receive(&mut self, batch: &mut Batch) {
        for _ in 0..ERRORS_PER_CALL {
            match batch.receive(&self.socket) {
                // Fewer than there is room for is all there was; what has come since, the poll tells.
                Ok(received) => {
                    self.readable = received == BATCH_MAX;
                    return;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return;
                }
                Err(_) => self.error = true,
            }
        }
    }

    /// The next error about something that was sent.
    pub(crate) fn next_error(&mut self) -> Option<SendError> {
        loop {
            let mut found = next_send_error(&self.socket, &mut []);
            self.error = found.is_some();
            if let Some(found) = &mut found
                && found.is_local()
                && let Some(target) = self.too_big_for
                && target.ip() == found.target.ip()
            {
                found.target = target;
            }
            let repeated = found.is_some_and(|found| found.is_local()) && found == self.reported;
            self.reported = found;
            if !repeated {
                return found;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use tungate_engine::io::Unreachable;

    use super::*;

    const CARRIAGE: Carriage = Carriage {
        hop_limit: 64,
        dont_fragment: false,
    };

    fn open(target: SocketAddr) -> Udp {
        Udp::open(&SocketSetup::default(), target.ip(), target.ip()).unwrap()
    }

    /// Waits until the poll would say that `udp` is ready.
    fn wait(udp: &Udp) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let mut fds = [PollFd::new(udp.socket.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(5000_u16)).unwrap(), 1);
    }

    #[test]
    fn super_packets_arrive_as_datagrams_of_their_size() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(server) = UdpSocket::bind(local) else {
                continue;
            };
            let target = server.local_addr().unwrap();
            let payload: Vec<_> = (0..100 * 300 + 7).map(|at| (at / 300) as u8).collect();
            open(target)
                .send(target, &payload, NonZeroU16::new(300), CARRIAGE)
                .unwrap();
            let mut received = Vec::new();
            let mut buffer = [0; 2000];
            while received.len() < payload.len() {
                let len = server.recv(&mut buffer).unwrap();
                assert!(len == 300 || received.len() + len == payload.len());
                received.extend_from_slice(&buffer[..len]);
            }
            assert!(received == payload);
        }
    }

    #[test]
    fn one_socket_hears_from_everyone() {
        let (first, second) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        let mut udp = open(first.local_addr().unwrap());
        udp.send(first.local_addr().unwrap(), b"hello", None, CARRIAGE)
            .unwrap();
        let (_, from) = first.recv_from(&mut [0; 16]).unwrap();
        second.send_to(b"unasked", from).unwrap();
        wait(&udp);
        let mut batch = Batch::new();
        udp.readable = true;
        udp.receive(&mut batch);
        let received = batch.next().unwrap();
        assert_eq!(received.payload, b"unasked");
        assert_eq!(received.source, second.local_addr().unwrap());
        assert_eq!(batch.next(), None);
        assert!(!udp.readable);
    }

    #[test]
    fn closed_ports_are_reported_with_their_address_and_stop_nothing() {
        let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let open_port = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut udp = open(closed);
        udp.send(closed, b"anyone?", None, CARRIAGE).unwrap();
        udp.send(open_port.local_addr().unwrap(), b"you!", None, CARRIAGE)
            .unwrap();
        wait(&udp);
        let expected = SendError {
            target: closed,
            reporter: Some(closed.ip()),
            error: IcmpError::Unreachable(Unreachable::Port),
        };
        assert_eq!(udp.next_error(), Some(expected));
        assert_eq!(udp.next_error(), None);
        let mut buffer = [0; 16];
        assert_eq!(open_port.recv(&mut buffer).unwrap(), 4);
    }
}
