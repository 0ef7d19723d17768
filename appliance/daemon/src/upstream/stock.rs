//! Sockets that a privileged process has opened: asked for in batches, ahead of the flows that take them.
//!
//! A socket's mark, once set, needs no privilege to be used. So this process, which has none, gets its sockets with
//! SCM_RIGHTS from one that has. A batch costs one exchange; it is asked for by a thread of its own when a shelf is
//! half empty, so a flow waits for one only when flows come faster than sockets.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak, mpsc};

use crossbeam_queue::ArrayQueue;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, send};
use serde::{Deserialize, Serialize};
use socket2::Socket;

use super::socket::{Privileges, Transport};

/// Sockets in one exchange; below the kernel's bound on descriptors in a message (SCM_MAX_FD, 253).
pub(crate) const BATCH_MAX: usize = 32;
/// A shelf with fewer sockets is filled up.
const LOW: usize = BATCH_MAX / 2;
/// Longest encoded request, and more.
pub(crate) const REQUEST_MAX: usize = 64;

const TRANSPORTS: usize = 4;

/// What is asked for: some sockets of one kind.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) privileges: Privileges,
    pub(crate) transport: Transport,
    pub(crate) is_ipv4: bool,
    pub(crate) count: u8,
}

/// The way to the process that opens sockets.
#[derive(Debug)]
pub(crate) struct Broker {
    /// One exchange at a time: a request, then its answer (SOCK_SEQPACKET).
    line: Mutex<OwnedFd>,
    mark: u32,
    refills: mpsc::Sender<Refill>,
}

/// Sockets of one set-up, ready to be used.
#[derive(Debug)]
pub(crate) struct Stock {
    broker: Arc<Broker>,
    privileges: Privileges,
    shelves: [Shelf; 2 * TRANSPORTS],
}

#[derive(Debug)]
struct Shelf {
    sockets: ArrayQueue<Socket>,
    /// A refill is on its way.
    awaited: AtomicBool,
}

/// A shelf to be filled up.
#[derive(Debug)]
struct Refill {
    stock: Weak<Stock>,
    transport: Transport,
    is_ipv4: bool,
}

impl Broker {
    /// Takes sockets from whoever is at the other end of `line`; those for which no mark is configured have `mark`.
    ///
    /// # Errors
    ///
    /// If the system has no more threads.
    pub(crate) fn new(line: OwnedFd, mark: u32) -> io::Result<Arc<Self>> {
        let (refills, orders) = mpsc::channel::<Refill>();
        std::thread::Builder::new()
            .name("sockets".to_owned())
            .spawn(move || {
                for refill in orders {
                    if let Some(stock) = refill.stock.upgrade() {
                        stock.refill(refill.transport, refill.is_ipv4);
                    }
                }
            })?;
        Ok(Arc::new(Self {
            line: Mutex::new(line),
            mark,
            refills,
        }))
    }

    pub(crate) fn mark(&self) -> u32 {
        self.mark
    }

    /// An empty stock of sockets with `privileges`.
    pub(crate) fn stock(self: &Arc<Self>, privileges: Privileges) -> Arc<Stock> {
        let shelf = |_| Shelf {
            sockets: ArrayQueue::new(2 * BATCH_MAX),
            awaited: AtomicBool::new(false),
        };
        Arc::new(Stock {
            broker: self.clone(),
            privileges,
            shelves: std::array::from_fn(shelf),
        })
    }
}

impl Stock {
    /// Takes a socket, from its shelf if there is one.
    ///
    /// # Errors
    ///
    /// What opening it has met in the other process; EPERM also for what that one does not allow.
    pub(super) fn take(self: &Arc<Self>, transport: Transport, is_ipv4: bool) -> io::Result<Socket> {
        let shelf = self.shelf(transport, is_ipv4);
        let Some(socket) = shelf.sockets.pop() else {
            return self.fetch(transport, is_ipv4);
        };
        if shelf.sockets.len() < LOW && !shelf.awaited.swap(true, Ordering::Relaxed) {
            let refill = Refill {
                stock: Arc::downgrade(self),
                transport,
                is_ipv4,
            };
            let _ = self.broker.refills.send(refill); // its thread lives as long as the broker
        }
        Ok(socket)
    }

    fn shelf(&self, transport: Transport, is_ipv4: bool) -> &Shelf {
        &self.shelves[2 * transport as usize + usize::from(is_ipv4)]
    }

    fn refill(&self, transport: Transport, is_ipv4: bool) {
        let shelf = self.shelf(transport, is_ipv4);
        // What has gone wrong is seen by the flow that finds the shelf empty.
        if let Ok(socket) = self.fetch(transport, is_ipv4) {
            let _ = shelf.sockets.push(socket);
        }
        shelf.awaited.store(false, Ordering::Relaxed);
    }

    /// Asks for a batch, returns one of it and puts the others on their shelf.
    fn fetch(&self, transport: Transport, is_ipv4: bool) -> io::Result<Socket> {
        let shelf = self.shelf(transport, is_ipv4);
        let line = self.broker.line.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody else may have asked while this thread waited.
        if shelf.sockets.len() >= LOW
            && let Some(socket) = shelf.sockets.pop()
        {
            return Ok(socket);
        }
        let count = match transport {
            Transport::Tcp | Transport::Udp => BATCH_MAX as u8,
            // While they wait, they collect what others are sent.
            Transport::Ping | Transport::RawPing => 1,
        };
        let request = Request {
            privileges: self.privileges,
            transport,
            is_ipv4,
            count,
        };
        let mut sockets = exchange(&line, &request)?.into_iter();
        let socket = sockets.next();
        for socket in sockets {
            let _ = shelf.sockets.push(socket); // one that finds no place is closed
        }
        socket.ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }
}

/// Sends a request and waits for the sockets.
fn exchange(line: &OwnedFd, request: &Request) -> io::Result<Vec<Socket>> {
    let mut space = [0; REQUEST_MAX];
    let encoded = postcard::to_slice(request, &mut space).expect("a request fits in its space");
    send(line.as_raw_fd(), encoded, MsgFlags::MSG_NOSIGNAL)?;
    let mut errno = [0; 4];
    let mut control = nix::cmsg_space!([libc::c_int; BATCH_MAX]);
    let mut payload = [IoSliceMut::new(&mut errno)];
    let received = recvmsg::<()>(
        line.as_raw_fd(),
        &mut payload,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut sockets = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = message {
            // SAFETY: the kernel has just made these descriptors for us.
            sockets.extend(
                fds.into_iter()
                    .map(|fd| Socket::from(unsafe { OwnedFd::from_raw_fd(fd) })),
            );
        }
    }
    match i32::from_ne_bytes(errno) {
        0 => Ok(sockets),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
