//! Readiness of sockets, and what servers have in common.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Protocol, Socket, Type};

/// Which event it is: the number that its descriptor was registered with, and whether reading or writing may go on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    pub(crate) token: u64,
    pub(crate) flags: EpollFlags,
}

/// An epoll instance and room for what it reports.
pub(crate) struct Events {
    epoll: Epoll,
    buffer: Vec<EpollEvent>,
}

impl Events {
    pub(crate) fn new() -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot make an epoll instance")?;
        Ok(Self {
            epoll,
            buffer: vec![EpollEvent::empty(); 256],
        })
    }

    pub(crate) fn add(&self, socket: &impl AsFd, flags: EpollFlags, token: u64) -> io::Result<()> {
        Ok(self.epoll.add(socket, EpollEvent::new(flags, token))?)
    }

    /// Changes what is waited for.
    pub(crate) fn change(&self, socket: &impl AsFd, flags: EpollFlags, token: u64) -> io::Result<()> {
        Ok(self.epoll.modify(socket, &mut EpollEvent::new(flags, token))?)
    }

    /// Takes a socket out.
    pub(crate) fn remove(&self, socket: &impl AsFd) -> io::Result<()> {
        Ok(self.epoll.delete(socket)?)
    }

    /// Waits for events, for `timeout` at most, and appends them to `ready`, which is emptied first.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>, ready: &mut Vec<Ready>) -> Result<()> {
        ready.clear();
        let timeout = timeout.map_or(EpollTimeout::NONE, |timeout| {
            let milliseconds = timeout.as_nanos().div_ceil(1_000_000).min(60_000);
            EpollTimeout::from(milliseconds as u16)
        });
        match self.epoll.wait(&mut self.buffer, timeout) {
            Ok(count) => ready.extend(self.buffer[..count].iter().map(|event| Ready {
                token: event.data(),
                flags: event.events(),
            })),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for events"),
        }
        Ok(())
    }
}

/// A listener that several processes may share and that does not block. A transparent one also takes connections to
/// foreign addresses.
pub(crate) fn listen(address: SocketAddr, transparent: bool) -> Result<TcpListener> {
    let open = || {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM.nonblocking().cloexec(),
            Some(Protocol::TCP),
        )?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        if transparent {
            match address {
                SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
                SocketAddr::V6(_) => set_transparent_v6(&socket)?,
            }
        }
        socket.bind(&address.into())?;
        socket.listen(4096)?;
        Ok(socket.into())
    };
    open()
        .map_err(|error: io::Error| anyhow::Error::from(error).context(format!("cannot listen on {address}")))
}

fn set_transparent_v6(socket: &Socket) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let on: libc::c_int = 1;
    // SAFETY: the pointer and the length are those of a live integer.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IPV6,
            libc::IPV6_TRANSPARENT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether an operation only has to wait.
pub(crate) fn would_block(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EINTR | libc::EINPROGRESS)
    )
}
