//! The worker's part of a bypass: what the kernel shows of connections, and what the keeper says of them, to the shards.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::mpsc as blocking;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, shutdown};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tungate_engine::IngressId;
use tungate_engine::bypass::{BypassEvent, BypassNews, BypassOrder, Ends, Seen};
use tungate_engine::io::IcmpError;
use tungate_engine::packet::{IcmpMessage, PacketView, Transport};

use super::keeper::Lines;
use super::netlink::{Reply, Socket, attribute, replies};
use super::{Answer, FROM_CLIENT, MESSAGE_MAX, Request};

/// How long the keeper may take to list all connections.
const LIST_TIME: Duration = Duration::from_secs(5);
const RECEIVED_MAX: usize = 1 << 16;

const LOGGED: u16 = 4 << 8;
const PAYLOAD: u16 = 9;
const PREFIX: u16 = 10;

/// Asks the keeper.
#[derive(Debug, Clone)]
pub(crate) struct Asking {
    requests: blocking::Sender<Request>,
    listings: Arc<Mutex<Listings>>,
}

/// Who waits for the end of a listing.
#[derive(Debug, Default)]
struct Listings {
    next: u64,
    waiting: BTreeMap<u64, oneshot::Sender<()>>,
}

/// What is to be watched.
pub(crate) struct Watcher {
    lines: Lines,
    requests: blocking::Receiver<Request>,
    listings: Arc<Mutex<Listings>>,
}

impl Asking {
    /// Carries out an order of the engine's.
    pub(crate) fn order(&self, ends: Ends, order: BypassOrder) {
        let request = match order {
            BypassOrder::Begin => return,
            BypassOrder::Count => Request::Count(ends),
            BypassOrder::Release => Request::Release(ends),
        };
        let _ = self.requests.send(request); // without a supervisor the worker ends
    }

    /// Returns when shards have been told what all connections have carried.
    pub(crate) async fn refresh(&self) {
        let (sender, receiver) = oneshot::channel();
        let number = {
            let mut listings = lock(&self.listings);
            let number = listings.next;
            listings.next += 1;
            listings.waiting.insert(number, sender);
            number
        };
        let _ = self.requests.send(Request::List(number));
        if timeout(LIST_TIME, receiver).await.is_err() {
            lock(&self.listings).waiting.remove(&number);
        }
    }
}

impl Watcher {
    /// Nothing is read before [`Watcher::start`].
    pub(crate) fn new(lines: Lines) -> (Self, Asking) {
        let (sender, requests) = blocking::channel();
        let listings = Arc::default();
        let asking = Asking {
            requests: sender,
            listings: Arc::clone(&listings),
        };
        let watcher = Self {
            lines,
            requests,
            listings,
        };
        (watcher, asking)
    }

    /// Starts its threads; `tell` gives news to the shard that owns the connection, and `fail` is called if the keeper is
    /// gone before this process.
    ///
    /// # Errors
    ///
    /// If the system has no more threads or descriptors.
    pub(crate) fn start(
        self,
        ingress: IngressId,
        tell: impl Fn(BypassNews) + Send + 'static,
        fail: impl Fn(String) + Send + 'static,
    ) -> io::Result<()> {
        let Self {
            lines: Lines { line, log },
            requests,
            listings,
        } = self;
        let asked = line.try_clone()?;
        std::thread::Builder::new()
            .name("bypass asks".to_owned())
            .spawn(move || {
                if let Err(error) = ask(&asked, &requests) {
                    tracing::error!(%error, "the keeper of bypassed flows cannot be asked");
                    let _ = shutdown(asked.as_raw_fd(), Shutdown::Both); // which ends the other thread
                }
            })?;
        std::thread::Builder::new()
            .name("bypass".to_owned())
            .spawn(move || {
                let watched = watch(&line, &Socket::from(log), &listings, ingress, &tell);
                fail(match watched {
                    Ok(()) => "flows are left to the kernel, and nobody keeps them any more".to_owned(),
                    Err(error) => format!("flows that the kernel carries cannot be followed: {error}"),
                });
            })?;
        Ok(())
    }
}

/// Passes requests on until there is nobody who could have any.
fn ask(line: &OwnedFd, requests: &blocking::Receiver<Request>) -> io::Result<()> {
    let mut buffer = [0; MESSAGE_MAX];
    for request in requests {
        let message = postcard::to_slice(&request, &mut buffer).map_err(io::Error::other)?;
        match send(line.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => {}
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads until the keeper has gone. Segments come before its answers, which may be about the same connection.
fn watch(
    line: &OwnedFd,
    log: &Socket,
    listings: &Mutex<Listings>,
    ingress: IngressId,
    tell: &dyn Fn(BypassNews),
) -> io::Result<()> {
    let mut buffer = vec![0; RECEIVED_MAX];
    let mut answer = [0; MESSAGE_MAX];
    let news = |ends, event| {
        tell(BypassNews { ingress, ends, event });
    };
    loop {
        let mut fds = [
            PollFd::new(line.as_fd(), PollFlags::POLLIN),
            PollFd::new(log.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        loop {
            match log.take(&mut buffer) {
                Ok(None) => break,
                Ok(Some(bytes)) => {
                    for reply in replies(bytes) {
                        if let Reply::Message(message) = reply
                            && message.kind == LOGGED
                            && let Some(packet) = attribute(message.attributes, PAYLOAD)
                            && let Some(prefix) = attribute(message.attributes, PREFIX)
                            && let Some((ends, event)) =
                                seen(packet, prefix.strip_suffix(&[0]) == Some(FROM_CLIENT.as_bytes()))
                        {
                            news(ends, event);
                        }
                    }
                }
                // Conntrack tells of the ends that were missed.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
        loop {
            let len = match recv(line.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(Errno::ECONNRESET) => return Ok(()),
                Ok(len) => len,
                Err(Errno::EAGAIN | Errno::EINTR) => break,
                Err(error) => return Err(error.into()),
            };
            match postcard::from_bytes(&answer[..len]).map_err(io::Error::other)? {
                Answer::News(ends, event) => news(ends, event),
                Answer::Listed(number) => {
                    if let Some(waiting) = lock(listings).waiting.remove(&number) {
                        let _ = waiting.send(()); // nobody waits any more
                    }
                }
            }
        }
    }
}

/// What the start of a packet says: a segment of a connection, or an error about one that is for its client.
fn seen(packet: &[u8], from_client: bool) -> Option<(Ends, BypassEvent)> {
    // What was cut off is missing from the length.
    let mut packet = packet.to_vec();
    let is_ipv4 = packet.first()? >> 4 == 4;
    let (field, rest) = if is_ipv4 { (2, 0) } else { (4, 40) };
    let length: &mut [u8; 2] = packet.get_mut(field..field + 2)?.try_into().ok()?;
    let total = usize::from(u16::from_be_bytes(*length)) + rest;
    let there = u16::try_from(packet.len().checked_sub(rest)?).ok()?;
    packet[field..field + 2].copy_from_slice(&there.to_be_bytes());
    let view = PacketView::parse(&packet).ok()?;
    match view.transport().ok()? {
        Transport::Tcp(segment) => {
            let source = SocketAddr::new(view.source(), segment.source_port);
            let destination = SocketAddr::new(view.destination(), segment.destination_port);
            let headers = view.transport_offset() + usize::from(segment.header_len);
            let event = Seen {
                from_client,
                flags: segment.flags.0,
                sequence: segment.sequence,
                acknowledgment: segment.acknowledgment,
                payload_len: total.saturating_sub(headers) as u16,
                header_len: segment.header_len,
                timestamps: segment.options.timestamps.is_some(),
            };
            let (client, target) = if from_client {
                (source, destination)
            } else {
                (destination, source)
            };
            let ends = Ends { client, target };
            Some((ends, BypassEvent::Segment(event)))
        }
        Transport::Icmp(message) => match message.message {
            IcmpMessage::Error {
                error: IcmpError::Unreachable(unreachable),
                quoted: Some(quoted),
            } if quoted.source == view.destination() && quoted.protocol == 6 => {
                let (from, to) = quoted.ports?;
                let ends = Ends {
                    client: SocketAddr::new(quoted.source, from),
                    target: SocketAddr::new(quoted.destination, to),
                };
                Some((ends, BypassEvent::Unreachable(unreachable)))
            }
            _ => None,
        },
        Transport::Udp(_) => None,
    }
}

fn lock(listings: &Mutex<Listings>) -> std::sync::MutexGuard<'_, Listings> {
    listings.lock().unwrap_or_else(PoisonError::into_inner)
}
