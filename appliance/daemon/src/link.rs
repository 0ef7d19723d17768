//! What the supervisor and the worker tell each other, over a socket pair.
//!
//! The worker's standard input is its end. One byte with descriptors comes first; then messages, each with its length
//! in front. When one of the two is gone the other reads the end.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tungate_config::Egress;
use tungate_engine::Config;
use tungate_engine::policy::PolicySpec;

use crate::control::{Ask, Done, ListChange, Refused};
use crate::driver::Layer;

/// How long the other side may take to read a message.
const SEND_TIME: Duration = Duration::from_secs(30);
/// Most descriptors at the start.
const DESCRIPTORS_MAX: usize = 32;
const LENGTH_LEN: usize = 4;

/// What the worker is told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Begin; the first order.
    Start(Box<Start>),
    /// Use another policy; answered by [`News::Replaced`].
    Replace(Ways),
    /// Change the lists of the policy in use, which can be done; answered by [`News::Replaced`].
    Change(ListChange),
    /// What [`News::Asked`] with this number came to.
    Answer(u64, Result<Done, Refused>),
    /// Say that everything goes on; answered by [`News::Alive`].
    Check,
    /// Take no new flows; answered by [`News::Drained`] when the last has ended.
    Drain,
    /// Reset what is still open, and end.
    End,
}

/// What the worker begins with, beside its descriptors: the socket to ask for others, the device's queues, and then, if
/// there are such, the bypass's two lines, the journal and the control socket.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Start {
    pub(crate) json_log: bool,
    pub(crate) engine: Config,
    pub(crate) ways: Ways,
    pub(crate) layer: Layer,
    pub(crate) udp_segmentation: bool,
    pub(crate) has_bypass: bool,
    pub(crate) has_journal: bool,
    pub(crate) has_control: bool,
    /// What sockets have for which no mark is configured.
    pub(crate) mark: u32,
}

/// A policy and the ways out that it names.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Ways {
    pub(crate) policy: PolicySpec,
    /// How many of the policy's last list entries have come by the control socket.
    pub(crate) added: usize,
    pub(crate) egresses: Vec<Egress>,
}

/// What the worker tells.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum News {
    /// It relays, with so many shards.
    Started { shards: usize },
    /// The policy has been replaced, or its lists have been changed: it is in force in all shards.
    Replaced,
    /// Somebody asks for something over the control socket; answered by [`Order::Answer`] with the same number.
    Asked(u64, Ask),
    /// All its shards have just been heard of.
    Alive,
    /// No flow is left.
    Drained,
    /// It cannot go on.
    Failed(String),
}

/// One end of the link.
#[derive(Debug)]
pub(crate) struct Link {
    stream: UnixStream,
    /// What has been read of messages that are not complete.
    read: Vec<u8>,
}

impl Link {
    /// Goes on with a socket in a runtime.
    ///
    /// # Errors
    ///
    /// The system's.
    pub(crate) fn new(stream: StdUnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream: UnixStream::from_std(stream)?,
            read: Vec::new(),
        })
    }

    /// Sends a message.
    ///
    /// # Errors
    ///
    /// If the other side has gone or does not read.
    pub(crate) async fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        let message = postcard::to_extend(message, vec![0; LENGTH_LEN]).map_err(io::Error::other)?;
        let mut message = message;
        let len = u32::try_from(message.len() - LENGTH_LEN).map_err(io::Error::other)?;
        message[..LENGTH_LEN].copy_from_slice(&len.to_le_bytes());
        timeout(SEND_TIME, self.stream.write_all(&message))
            .await
            .map_err(io::Error::from)?
    }

    /// Waits for the next message; `None` when the other side has gone. Nothing is lost when this is given up.
    ///
    /// # Errors
    ///
    /// If what comes is no message.
    pub(crate) async fn receive<M: DeserializeOwned>(&mut self) -> io::Result<Option<M>> {
        loop {
            if let Some((length, rest)) = self.read.split_first_chunk::<LENGTH_LEN>() {
                let len = u32::from_le_bytes(*length) as usize;
                if let Some(message) = rest.get(..len) {
                    let message = postcard::from_bytes(message).map_err(io::Error::other)?;
                    self.read.drain(..LENGTH_LEN + len);
                    return Ok(Some(message));
                }
                self.read.reserve(LENGTH_LEN + len - self.read.len());
            }
            match self.stream.read_buf(&mut self.read).await {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Sends the descriptors that come before all messages.
///
/// # Errors
///
/// The system's.
pub(crate) fn send_descriptors(stream: &StdUnixStream, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&[0])],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    sent.map(drop).map_err(io::Error::from)
}

/// Takes the descriptors that come before all messages.
///
/// # Errors
///
/// The system's.
pub(crate) fn receive_descriptors(stream: &StdUnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut control = nix::cmsg_space!([libc::c_int; DESCRIPTORS_MAX]);
    let mut byte = [0];
    let mut payload = [IoSliceMut::new(&mut byte)];
    let received = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut payload,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = message {
            // SAFETY: the kernel has just made these descriptors for us.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(fds)
}
