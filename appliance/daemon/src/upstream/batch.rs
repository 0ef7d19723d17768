//! Datagrams received many at a time, and joined where the device takes them so.
//!
//! One call of the system fills many places (recvmmsg). Neighbours of one source and size then make one super-packet,
//! as if the kernel had joined them (UDP_GRO), which it does only where its device does: so that a client gets a burst
//! by one write to the device.

use std::io;
use std::mem::size_of;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;

use nix::errno::Errno;
use nix::sys::socket::{SockaddrLike, SockaddrStorage};
use socket2::Socket;

use super::address::from_storage;

/// Datagrams, or super-packets of the kernel's, in one call.
pub(crate) const BATCH_MAX: usize = 64;
/// Room for each: whatever a socket can receive. Places start at different cache sets.
const PLACE: usize = 65_536 + 3 * 64;
/// Datagrams in one super-packet (UDP_MAX_SEGMENTS of older kernels).
const JOINED_MAX: usize = 64;
/// Bytes in one super-packet; with all headers it stays below the 65,536 bytes that the kernel would cut up again.
const JOINED_BYTES_MAX: usize = 65_000;
/// Room for a control message with the size of segments, and more.
const CONTROL_LEN: usize = 64;

/// What was received.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Datagrams<'a> {
    pub(crate) source: SocketAddr,
    pub(crate) payload: &'a [u8],
    /// The size of each datagram in `payload`, of which only the last may be shorter; `None`: it is one datagram.
    pub(crate) segment_size: Option<NonZeroU16>,
}

/// Places for datagrams, used again and again.
pub(crate) struct Batch {
    bytes: Box<[u8]>,
    joined: Vec<u8>,
    addresses: Box<[libc::sockaddr_storage]>,
    controls: Box<[Control]>,
    headers: Box<[libc::mmsghdr]>,
    parts: Box<[libc::iovec]>,
    received: usize,
    next: usize,
}

/// A buffer for control messages, aligned as they are.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_LEN]);

impl Batch {
    pub(crate) fn new() -> Self {
        // SAFETY: all zeros are a valid value of these plain structures of the system's.
        let (address, header, part) = unsafe {
            (
                std::mem::zeroed::<libc::sockaddr_storage>(),
                std::mem::zeroed::<libc::mmsghdr>(),
                std::mem::zeroed::<libc::iovec>(),
            )
        };
        Self {
            // Zero pages from the kernel: a place costs memory only where datagrams have been.
            bytes: vec![0; BATCH_MAX * PLACE].into_boxed_slice(),
            joined: Vec::new(),
            addresses: vec![address; BATCH_MAX].into_boxed_slice(),
            controls: vec![Control([0; CONTROL_LEN]); BATCH_MAX].into_boxed_slice(),
            headers: vec![header; BATCH_MAX].into_boxed_slice(),
            parts: vec![part; BATCH_MAX].into_boxed_slice(),
            received: 0,
            next: 0,
        }
    }

    /// Receives what waits at `socket`, as far as there are places, and returns how many there were; what the batch
    /// held before is gone.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is nothing, or the socket's.
    pub(crate) fn receive(&mut self, socket: &Socket) -> io::Result<usize> {
        (self.received, self.next) = (0, 0);
        for (index, place) in self.bytes.chunks_exact_mut(PLACE).enumerate() {
            self.parts[index] = libc::iovec {
                iov_base: place.as_mut_ptr().cast(),
                iov_len: place.len(),
            };
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = (&raw mut self.addresses[index]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.parts[index];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[index]).cast();
            header.msg_controllen = CONTROL_LEN as _;
            header.msg_flags = 0;
        }
        // SAFETY: the headers have just been pointed at places that are ours and that nothing else refers to.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH_MAX as libc::c_uint,
                libc::MSG_DONTWAIT,
                null_mut(),
            )
        };
        self.received = Errno::result(received)? as usize;
        Ok(self.received)
    }

    /// Takes the next datagram of the batch, joined with those behind it that can go in one super-packet.
    pub(crate) fn next(&mut self) -> Option<Datagrams<'_>> {
        let (first, source) = loop {
            let index = self.next;
            if index == self.received {
                return None;
            }
            self.next += 1;
            if let Some(source) = self.source(index) {
                break (index, source);
            }
        };
        let (len, segment_size) = (self.len(first), self.segment_size(first));
        let mut count = 1;
        let mut bytes = len;
        if segment_size.is_none() && len > 0 {
            while self.next < self.received && count < JOINED_MAX {
                let (index, next_len) = (self.next, self.len(self.next));
                let fits = (1..=len).contains(&next_len)
                    && bytes + next_len <= JOINED_BYTES_MAX
                    && self.segment_size(index).is_none()
                    && self.source(index) == Some(source);
                if !fits {
                    break;
                }
                self.next += 1;
                count += 1;
                bytes += next_len;
                if next_len < len {
                    break; // only the last may be shorter
                }
            }
        }
        if count == 1 {
            return Some(Datagrams {
                source,
                payload: &self.bytes[first * PLACE..][..len],
                segment_size,
            });
        }
        self.joined.clear();
        for index in first..first + count {
            self.joined
                .extend_from_slice(&self.bytes[index * PLACE..][..self.headers[index].msg_len as usize]);
        }
        Some(Datagrams {
            source,
            payload: &self.joined,
            segment_size: u16::try_from(len).ok().and_then(NonZeroU16::new),
        })
    }

    fn len(&self, index: usize) -> usize {
        self.headers[index].msg_len as usize
    }

    fn source(&self, index: usize) -> Option<SocketAddr> {
        let len = self.headers[index].msg_hdr.msg_namelen;
        let address = (&raw const self.addresses[index]).cast();
        // SAFETY: the system has written an address of this length there.
        let address = unsafe { SockaddrStorage::from_raw(address, Some(len)) };
        address.as_ref().and_then(from_storage)
    }

    /// The size of the datagrams that the kernel has joined.
    fn segment_size(&self, index: usize) -> Option<NonZeroU16> {
        let header = &self.headers[index].msg_hdr;
        // SAFETY: the header points at our buffer and says how much of it the system has filled with control messages,
        // along which these calls walk; a message of this kind carries an int.
        let size = unsafe {
            let mut message = libc::CMSG_FIRSTHDR(header);
            loop {
                let found = message.as_ref()?;
                if (found.cmsg_level, found.cmsg_type) == (libc::SOL_UDP, libc::UDP_GRO) {
                    break libc::CMSG_DATA(message).cast::<libc::c_int>().read_unaligned();
                }
                message = libc::CMSG_NXTHDR(header, message);
            }
        };
        u16::try_from(size).ok().and_then(NonZeroU16::new)
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    /// All that waits at `socket`, as the super-packets it comes in.
    fn receive_all(batch: &mut Batch, socket: &Socket) -> Vec<(SocketAddr, Vec<u8>, Option<u16>)> {
        let mut all = Vec::new();
        while batch.receive(socket).is_ok() {
            while let Some(datagrams) = batch.next() {
                let size = datagrams.segment_size.map(NonZeroU16::get);
                all.push((datagrams.source, datagrams.payload.to_vec(), size));
            }
        }
        all
    }

    #[test]
    fn joined_datagrams_are_those_that_came_in_their_order_and_sizes() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(receiver) = UdpSocket::bind(local) else {
                continue;
            };
            let senders = [UdpSocket::bind(local).unwrap(), UdpSocket::bind(local).unwrap()];
            let to = receiver.local_addr().unwrap();
            let receiver = Socket::from(receiver);
            // Runs of one size, shorter and longer ones between, empty ones, a change of source in the midst of a run.
            let sizes = [
                (0, 100, 70),
                (0, 40, 1),
                (0, 100, 2),
                (1, 100, 2),
                (0, 100, 1),
                (0, 0, 2),
                (0, 1, 3),
                (1, 1400, 60),
                (1, 9000, 1),
                (0, 7, 1),
            ];
            let mut sent = Vec::new();
            let mut received = Vec::new();
            let mut batch = Batch::new();
            for (sender, len, times) in sizes {
                for _ in 0..times {
                    let datagram = vec![sent.len() as u8; len];
                    senders[sender].send_to(&datagram, to).unwrap();
                    sent.push((senders[sender].local_addr().unwrap(), datagram));
                }
                if len == 1400 {
                    // The socket's buffer holds no more.
                    received.extend(receive_all(&mut batch, &receiver));
                }
            }
            received.extend(receive_all(&mut batch, &receiver));
            assert!(received.len() * 4 < sent.len(), "runs are joined");
            let mut cut = Vec::new();
            for (source, payload, size) in received {
                match size {
                    None => cut.push((source, payload)),
                    Some(size) => {
                        assert!(payload.len() <= JOINED_BYTES_MAX && payload.len() > usize::from(size));
                        let datagrams = payload.chunks(size.into());
                        assert!(datagrams.len() <= JOINED_MAX);
                        cut.extend(datagrams.map(|datagram| (source, datagram.to_vec())));
                    }
                }
            }
            assert!(cut == sent);
        }
    }
}
