//! Datagrams, many per system call: as fast as they go, or at a rate.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};
use std::{io, ptr};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;
use socket2::SockRef;

use crate::seconds;

/// Datagrams per system call.
const BATCH: usize = 32;
/// Room for one datagram.
const DATAGRAM: usize = 2048;
/// Bytes that wait in a socket.
const SOCKET_BUFFER: usize = 4 << 20;
/// How long it has to be quiet for a receiver to have seen the last one.
const QUIET: Duration = Duration::from_millis(400);
/// How long the first one may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time between two greetings.
const GREETING_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Args)]
pub(crate) struct SendOptions {
    /// Send to this address
    #[arg(long, required_unless_present = "listen")]
    to: Option<SocketAddr>,
    /// Wait here for a datagram, and send to its sender
    #[arg(long, conflicts_with = "to")]
    listen: Option<SocketAddr>,
    #[arg(long)]
    size: usize,
    /// Datagrams per second; as many as go without it
    #[arg(long)]
    rate: Option<u32>,
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
}

#[derive(Args)]
pub(crate) struct ReceiveOptions {
    /// Receive here
    #[arg(long, required_unless_present = "greet")]
    listen: Option<SocketAddr>,
    /// Greet this address until it sends
    #[arg(long, conflicts_with = "listen")]
    greet: Option<SocketAddr>,
}

#[derive(Serialize)]
pub(crate) struct Sent {
    datagrams: u64,
    seconds: f64,
}

#[derive(Serialize)]
pub(crate) struct Received {
    datagrams: u64,
    /// From the first to the last.
    seconds: f64,
}

pub(crate) fn send(options: &SendOptions) -> Result<Sent> {
    let socket = match (options.to, options.listen) {
        (_, Some(address)) => {
            let socket = bind(address)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            let (_, client) = socket.recv_from(&mut [0; DATAGRAM]).context("nobody has asked")?;
            socket.connect(client)?;
            socket
        }
        (Some(target), None) => connect(target)?,
        (None, None) => unreachable!("the command line has one of them"),
    };
    let payload = vec![1; options.size];
    let mut batch = Batch::new(payload.len());
    let start = Instant::now();
    let mut datagrams = 0;
    loop {
        let elapsed = start.elapsed();
        if elapsed >= options.seconds {
            break;
        }
        let wanted = match options.rate {
            None => BATCH,
            Some(rate) => {
                let due = (elapsed.as_secs_f64() * f64::from(rate)) as u64;
                due.saturating_sub(datagrams).min(BATCH as u64) as usize
            }
        };
        if wanted == 0 {
            thread::sleep(Duration::from_micros(100));
            continue;
        }
        match batch.send(&socket, wanted) {
            Ok(count) => datagrams += count as u64,
            // Full queues, and ICMP errors of earlier ones.
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOBUFS | libc::EAGAIN | libc::ECONNREFUSED | libc::EINTR) => {}
                _ => return Err(error).context("cannot send"),
            },
        }
    }
    Ok(Sent {
        datagrams,
        seconds: start.elapsed().as_secs_f64(),
    })
}

pub(crate) fn receive(options: &ReceiveOptions) -> Result<Received> {
    let socket = match (options.listen, options.greet) {
        (Some(address), _) => bind(address)?,
        (None, Some(target)) => connect(target)?,
        (None, None) => unreachable!("the command line has one of them"),
    };
    let begun = Instant::now();
    socket.set_read_timeout(Some(GREETING_INTERVAL))?;
    let mut batch = Batch::new(DATAGRAM);
    let mut datagrams = 0;
    let (mut first, mut last) = (begun, begun);
    loop {
        let received = batch.receive(&socket);
        let now = Instant::now();
        match received {
            Ok(count) => {
                if datagrams == 0 {
                    first = now;
                }
                last = now;
                datagrams += count as u64;
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                if datagrams == 0 && options.greet.is_some() {
                    socket.send(b"hello").context("cannot greet")?;
                }
                let patience = if datagrams == 0 { PATIENCE } else { QUIET };
                if now - last >= patience {
                    break;
                }
            }
            // An ICMP error about a greeting.
            Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => {
                thread::sleep(GREETING_INTERVAL);
            }
            Err(error) => return Err(error).context("cannot receive"),
        }
    }
    Ok(Received {
        datagrams,
        seconds: (last - first).as_secs_f64(),
    })
}

fn bind(address: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(address).with_context(|| format!("cannot bind {address}"))?;
    widen(&socket)?;
    Ok(socket)
}

fn connect(target: SocketAddr) -> Result<UdpSocket> {
    let any: SocketAddr = if target.is_ipv4() {
        ([0; 4], 0).into()
    } else {
        ([0; 16], 0).into()
    };
    let socket = bind(any)?;
    socket
        .connect(target)
        .with_context(|| format!("cannot reach {target}"))?;
    Ok(socket)
}

/// Enlarges the receive buffer, as far as this user may.
fn widen(socket: &UdpSocket) -> Result<()> {
    let bytes = SOCKET_BUFFER as libc::c_int;
    // SAFETY: the pointer and the length are those of a live integer.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    if done < 0 {
        SockRef::from(socket).set_recv_buffer_size(SOCKET_BUFFER)?;
    }
    Ok(())
}

/// What a system call for many datagrams takes. The headers point into the other two, which stay where they are.
struct Batch {
    headers: Vec<libc::mmsghdr>,
    _slices: Vec<libc::iovec>,
    _bytes: Vec<u8>,
}

impl Batch {
    fn new(size: usize) -> Self {
        let mut bytes = vec![1_u8; BATCH * size];
        let mut slices: Vec<_> = bytes
            .chunks_mut(size.max(1))
            .map(|chunk| libc::iovec {
                iov_base: chunk.as_mut_ptr().cast(),
                iov_len: chunk.len(),
            })
            .collect();
        let headers = slices
            .iter_mut()
            .map(|slice| {
                // SAFETY: all zeros are a value of this structure of numbers and pointers.
                let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
                header.msg_hdr.msg_iov = ptr::from_mut(slice);
                header.msg_hdr.msg_iovlen = 1;
                header
            })
            .collect();
        Self {
            headers,
            _slices: slices,
            _bytes: bytes,
        }
    }

    fn send(&mut self, socket: &UdpSocket, count: usize) -> io::Result<usize> {
        let headers = &mut self.headers[..count];
        // SAFETY: the headers point to buffers that live as long as `self`; the kernel reads them and writes lengths.
        let sent =
            unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), headers.len() as u32, 0) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        let headers = &mut self.headers[..];
        // SAFETY: the headers point to buffers of the lengths they name, which live as long as `self` and which
        // nobody else uses.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                headers.len() as u32,
                libc::MSG_WAITFORONE,
                ptr::null_mut(),
            )
        };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }
}
