//! Netfilter's netlink messages (nfnetlink), as far as a bypass needs them: linux/netfilter/nfnetlink.h.
//!
//! Numbers in attributes are big-endian; netlink's own header has the host's order.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket, sockopt,
};
use tungate_engine::bypass::Ends;

pub(super) const REQUEST: u16 = 1;
pub(super) const ACK: u16 = 4;
pub(super) const DUMP: u16 = 0x300;
pub(super) const EXCLUSIVE: u16 = 0x200;
pub(super) const CREATE: u16 = 0x400;
pub(super) const APPEND: u16 = 0x800;

pub(super) const FAMILY_UNSPEC: u8 = 0;
pub(super) const FAMILY_INET: u8 = 1;
pub(super) const FAMILY_IPV4: u8 = 2;
pub(super) const FAMILY_IPV6: u8 = 10;

const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER_LEN: usize = 16;
const GENERIC_LEN: usize = 4;
const ATTRIBUTE_LEN: usize = 4;
const NESTED: u16 = 0x8000;

const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const SUBSYSTEM_TABLES: u16 = 10;

/// Messages that are being written.
#[derive(Default)]
pub(super) struct Messages {
    bytes: Vec<u8>,
    /// Where the message starts that is being written.
    start: usize,
    sequence: u32,
}

impl Messages {
    /// Begins a message; those before are complete. `kind` is the subsystem and what it is to do. Returns its number.
    pub(super) fn begin(&mut self, kind: u16, flags: u16, family: u8, resource: u16) -> u32 {
        self.end();
        self.start = self.bytes.len();
        self.sequence += 1;
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&self.sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        self.sequence
    }

    /// Begins a batch for the tables, which is carried out as a whole or not at all.
    pub(super) fn begin_batch(&mut self) {
        self.begin(BATCH_BEGIN, REQUEST, FAMILY_UNSPEC, SUBSYSTEM_TABLES);
    }

    /// Ends it.
    pub(super) fn end_batch(&mut self) {
        self.begin(BATCH_END, REQUEST, FAMILY_UNSPEC, SUBSYSTEM_TABLES);
    }

    /// Adds an attribute.
    pub(super) fn put(&mut self, kind: u16, value: &[u8]) {
        let len = (ATTRIBUTE_LEN + value.len()) as u16;
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    pub(super) fn put_u32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    pub(super) fn put_text(&mut self, kind: u16, text: &str) {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.put(kind, &bytes);
    }

    /// Adds an attribute that consists of those which `write` adds.
    pub(super) fn nest(&mut self, kind: u16, write: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.put(kind | NESTED, &[]);
        write(self);
        let len = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    }

    fn end(&mut self) {
        if self.bytes.len() > self.start {
            let len = (self.bytes.len() - self.start) as u32;
            self.bytes[self.start..self.start + 4].copy_from_slice(&len.to_ne_bytes());
        }
    }

    /// What has been written, complete.
    fn finish(&mut self) -> &[u8] {
        self.end();
        &self.bytes
    }

    /// Forgets what was written, but not its numbers.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.start = 0;
    }
}

/// A message that has come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Received<'a> {
    pub(super) kind: u16,
    pub(super) sequence: u32,
    /// Its attributes.
    pub(super) attributes: &'a [u8],
}

/// What a message can be.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reply<'a> {
    Message(Received<'a>),
    /// What became of the message with that number.
    Result(u32, Result<(), Errno>),
    /// The end of a listing.
    Done,
}

/// The messages in what was received at once.
pub(super) fn replies(mut bytes: &[u8]) -> impl Iterator<Item = Reply<'_>> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let message = bytes.get(..len).filter(|message| message.len() >= HEADER_LEN)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        let (header, body) = message.split_at(HEADER_LEN);
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        Some(match kind {
            ERROR => {
                let code = body
                    .first_chunk()
                    .map_or(libc::EIO, |code| -i32::from_ne_bytes(*code));
                let result = match code {
                    0 => Ok(()),
                    code => Err(Errno::from_raw(code)),
                };
                Reply::Result(sequence, result)
            }
            DONE => Reply::Done,
            kind => Reply::Message(Received {
                kind,
                sequence,
                attributes: body.get(GENERIC_LEN..).unwrap_or_default(),
            }),
        })
    })
}

/// The attributes in `bytes`, by their kinds.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let &[len_low, len_high, kind_low, kind_high, ..] = bytes else {
            return None;
        };
        let len = usize::from(u16::from_ne_bytes([len_low, len_high]));
        let value = bytes.get(ATTRIBUTE_LEN..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([kind_low, kind_high]) & 0x3fff, value))
    })
}

/// The attribute of one kind.
pub(super) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// A socket to netfilter, in the network namespace it was made in.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl Socket {
    /// # Errors
    ///
    /// The system's; EPROTONOSUPPORT where the kernel has no nfnetlink.
    pub(super) fn open() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self(fd))
    }

    /// Hears what is told to a group.
    pub(super) fn join(&self, group: u32) -> io::Result<()> {
        self.set(libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group)
    }

    /// Has the kernel try again what did not fit in.
    pub(super) fn lose_nothing(&self) -> io::Result<()> {
        self.set(libc::SOL_NETLINK, libc::NETLINK_BROADCAST_ERROR, 1)
    }

    /// Bytes that may wait to be received.
    pub(super) fn set_receive_buffer(&self, bytes: usize) -> io::Result<()> {
        Ok(setsockopt(&self.0, sockopt::RcvBufForce, &bytes)?)
    }

    fn set(&self, level: i32, option: i32, value: u32) -> io::Result<()> {
        // SAFETY: the options are numbers of 32 bits, and `value` is one.
        let result = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                size_of::<u32>() as libc::socklen_t,
            )
        };
        Errno::result(result).map(drop).map_err(io::Error::from)
    }

    pub(super) fn send(&self, messages: &mut Messages) -> io::Result<()> {
        send(self.0.as_raw_fd(), messages.finish(), MsgFlags::empty())?;
        Ok(())
    }

    /// Waits for the next messages.
    ///
    /// # Errors
    ///
    /// The system's; ENOBUFS where some did not fit in.
    pub(super) fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let len = recv(self.0.as_raw_fd(), buffer, MsgFlags::empty())?;
        Ok(&buffer[..len])
    }

    /// Takes messages that are there.
    pub(super) fn take<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        match recv(self.0.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(len) => Ok(Some(&buffer[..len])),
            Err(Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for what became of the message `number`.
    pub(super) fn result(&self, number: u32, buffer: &mut [u8]) -> io::Result<Result<(), Errno>> {
        loop {
            for reply in replies(self.receive(buffer)?) {
                if let Reply::Result(of, result) = reply
                    && of == number
                {
                    return Ok(result);
                }
            }
        }
    }

    pub(super) fn into_fd(self) -> OwnedFd {
        self.0
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Socket {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

/// The family of a connection's addresses.
pub(super) fn family(ends: &Ends) -> u8 {
    match ends.client {
        SocketAddr::V4(_) => FAMILY_IPV4,
        SocketAddr::V6(_) => FAMILY_IPV6,
    }
}

/// An address as it stands in packets.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}
