//! Opens sockets for the worker: of the kinds, marks and freedoms that the configuration gives it, and no others.

use std::collections::BTreeSet;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair,
};
use socket2::Socket;
use tungate_config::{Egress, EgressKind, SocketOptions};

use crate::host::MARK;
use crate::upstream::socket::{Privileges, open};
use crate::upstream::stock::{BATCH_MAX, REQUEST_MAX, Request};

/// What sockets the worker may have.
#[derive(Debug, Clone)]
pub(super) struct Allowed(Arc<Mutex<BTreeSet<Privileges>>>);

impl Allowed {
    /// Those of the configured egresses, and of flows that leave by none.
    pub(super) fn by(egresses: &[Egress]) -> Self {
        Self(Arc::new(Mutex::new(privileges(egresses))))
    }

    /// Allows what `egresses` need, too.
    pub(super) fn add(&self, egresses: &[Egress]) {
        self.lock().extend(privileges(egresses));
    }

    /// Allows no more than what `egresses` need.
    pub(super) fn keep_only(&self, egresses: &[Egress]) {
        *self.lock() = privileges(egresses);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<Privileges>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the configured sockets are set up; a proxy's and a direct egress's alike.
pub(super) fn socket_options(egresses: &[Egress]) -> impl Iterator<Item = &SocketOptions> {
    egresses.iter().filter_map(|egress| match &egress.kind {
        EgressKind::Direct { socket } => Some(socket),
        EgressKind::Socks5(proxy) | EgressKind::Http(proxy) => Some(&proxy.socket),
        EgressKind::Group(_) => None,
    })
}

fn privileges(egresses: &[Egress]) -> BTreeSet<Privileges> {
    socket_options(egresses)
        .chain([&SocketOptions::default()])
        .map(|options| Privileges::of(options, Some(MARK)))
        .collect()
}

/// Starts a thread that opens sockets for whoever has the other end of the returned line, until that is closed.
///
/// # Errors
///
/// The system's.
pub(super) fn serve(allowed: Allowed) -> io::Result<OwnedFd> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    std::thread::Builder::new()
        .name("sockets".to_owned())
        .spawn(move || {
            if let Err(error) = answer_all(&ours, &allowed) {
                tracing::error!(%error, "the worker can be given no more sockets");
            }
        })?;
    Ok(theirs)
}

fn answer_all(line: &OwnedFd, allowed: &Allowed) -> io::Result<()> {
    let mut buffer = [0; REQUEST_MAX];
    loop {
        let len = match recv(line.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        };
        let request = postcard::from_bytes(&buffer[..len]).map_err(io::Error::other)?;
        let (sockets, errno) = match open_batch(&request, allowed) {
            Ok(sockets) => (sockets, 0),
            Err(error) => (Vec::new(), error.raw_os_error().unwrap_or(libc::EIO)),
        };
        match send_sockets(line, &sockets, errno) {
            Ok(()) => {}
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(()),
            Err(error) => send_sockets(line, &[], error as i32)?,
        }
    }
}

/// Opens as many sockets as are asked for, or as there can be.
fn open_batch(request: &Request, allowed: &Allowed) -> io::Result<Vec<Socket>> {
    if !allowed.lock().contains(&request.privileges) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    let mut sockets = Vec::new();
    for _ in 0..usize::from(request.count).clamp(1, BATCH_MAX) {
        match open(request.privileges, request.transport, request.is_ipv4) {
            Ok(socket) => sockets.push(socket),
            Err(error) if sockets.is_empty() => return Err(error),
            Err(_) => break,
        }
    }
    Ok(sockets)
}

fn send_sockets(line: &OwnedFd, sockets: &[Socket], errno: i32) -> Result<(), Errno> {
    let fds: Vec<_> = sockets
        .iter()
        .map(Socket::as_fd)
        .map(|fd: BorrowedFd<'_>| fd.as_raw_fd())
        .collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let rights = if fds.is_empty() { &rights[..0] } else { &rights };
    let errno = errno.to_ne_bytes();
    sendmsg::<()>(
        line.as_raw_fd(),
        &[IoSlice::new(&errno)],
        rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map(drop)
}
