//! The privileged part of a bypass: the table of rules, and conntrack.
//!
//! One thread does one thing after the other, which gives its answers their order: what it tells of a connection before
//! [`BypassEvent::Released`] is about the one that was released, and what comes later is about another.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, recv, send, shutdown, socketpair,
};
use tungate_engine::bypass::{BypassEvent, Carried, Ends};

use super::conntrack::{self, FORGOTTEN, Tracked};
use super::netlink::{ACK, FAMILY_UNSPEC, Messages, REQUEST, Reply, Socket, replies};
use super::{Answer, LOG_GROUP, MESSAGE_MAX, Opened, Request, SEEN_LEN, table};

/// Connections that end at once must find room: 64 KiB are some two hundred.
const EVENT_BUFFER: usize = 16 << 20;
/// The same for segments that are shown.
const LOG_BUFFER: usize = 16 << 20;
const RECEIVED_MAX: usize = 1 << 16;

const LOG_CONFIGURE: u16 = 4 << 8 | 1;

/// The table and its thread, which lasts as long as this.
pub(crate) struct Keeper {
    line: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// The worker's ends.
#[derive(Debug)]
pub(crate) struct Lines {
    /// For requests and answers.
    pub(crate) line: OwnedFd,
    /// Where segments are shown.
    pub(crate) log: OwnedFd,
}

impl Keeper {
    /// Makes the table for clients behind `interfaces` whose packets go to `device`, and serves the worker that gets the
    /// lines.
    ///
    /// # Errors
    ///
    /// What the kernel lacks or refuses.
    pub(crate) fn start(device: &str, interfaces: &[String], opened: &[Opened]) -> Result<(Self, Lines)> {
        let hint = "bypass.enabled needs the kernel's nf_tables, nf_conntrack, nf_conntrack_netlink and nfnetlink_log, \
                    and CAP_NET_ADMIN: load them (`modprobe nf_tables nf_conntrack_netlink nfnetlink_log`), or leave \
                    bypass.enabled out";
        let (orders, events, log) = prepare(device, interfaces, opened).context(hint)?;
        let (line, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        let mut state = State {
            line: line.try_clone()?,
            orders,
            events,
            messages: Messages::default(),
            buffer: vec![0; RECEIVED_MAX].into_boxed_slice(),
        };
        let thread = std::thread::Builder::new()
            .name("bypass".to_owned())
            .spawn(move || {
                if let Err(error) = state.serve() {
                    tracing::error!(%error, "the bypass has failed");
                }
                // The worker goes on only with a keeper.
                let _ = shutdown(state.line.as_raw_fd(), Shutdown::Both);
                // Bypassed flows have nobody any more who would know of them.
                if let Err(error) = conntrack::delete_all(&state.orders) {
                    tracing::warn!(%error, "connections that the kernel carried are not forgotten");
                }
            })?;
        let keeper = Self {
            line,
            thread: Some(thread),
        };
        Ok((
            keeper,
            Lines {
                line: theirs,
                log: log.into_fd(),
            },
        ))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = shutdown(self.line.as_raw_fd(), Shutdown::Both); // the worker may have closed it
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Has the kernel forget connections that an appliance which was killed has left, if it tracks any.
pub(crate) fn forget_all() {
    if let Ok(socket) = Socket::open()
        && let Err(error) = conntrack::delete_all(&socket)
    {
        tracing::debug!(%error, "there is no conntrack to look through");
    }
}

fn prepare(device: &str, interfaces: &[String], opened: &[Opened]) -> Result<(Socket, Socket, Socket)> {
    let orders = Socket::open().context("cannot talk to netfilter")?;
    table::make(&orders, device, interfaces, opened).context("cannot make the table of rules")?;
    conntrack::delete_all(&orders).context("cannot talk to conntrack")?;
    let events = Socket::open()?;
    events.set_receive_buffer(EVENT_BUFFER)?;
    events.lose_nothing()?;
    events.join(FORGOTTEN).context("cannot hear of connections")?;
    let log = Socket::open()?;
    log.set_receive_buffer(LOG_BUFFER)?;
    configure_log(&log).context("cannot have segments logged (group 29799 may be in use)")?;
    Ok((orders, events, log))
}

/// Has the segments of the group sent to a socket, each at once.
fn configure_log(socket: &Socket) -> io::Result<()> {
    const COPY_PACKET: u8 = 2;
    let mut mode = SEEN_LEN.to_be_bytes().to_vec();
    mode.extend_from_slice(&[COPY_PACKET, 0]);
    let threshold = 1_u32.to_be_bytes();
    let (bind, mode, threshold): (&[u8], &[u8], &[u8]) = (&[1], &mode, &threshold);
    for (kind, value) in [(1, bind), (2, mode), (5, threshold)] {
        let mut messages = Messages::default();
        let number = messages.begin(LOG_CONFIGURE, REQUEST | ACK, FAMILY_UNSPEC, LOG_GROUP);
        messages.put(kind, value);
        socket.send(&mut messages)?;
        socket.result(number, &mut [0; 4096])??;
    }
    Ok(())
}

struct State {
    line: OwnedFd,
    /// Owns the table.
    orders: Socket,
    events: Socket,
    messages: Messages,
    buffer: Box<[u8]>,
}

impl State {
    /// Serves until the line is closed.
    fn serve(&mut self) -> io::Result<()> {
        let mut request = [0; MESSAGE_MAX];
        loop {
            let mut fds = [
                PollFd::new(self.line.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.events.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            // What has ended by itself comes before what is asked now.
            self.tell_of_ends(None)?;
            let len = match recv(self.line.as_raw_fd(), &mut request, MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(Errno::ECONNRESET) => return Ok(()),
                Ok(len) => len,
                Err(Errno::EAGAIN | Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let told = match postcard::from_bytes(&request[..len]).map_err(io::Error::other)? {
                Request::Count(ends) => self.count(ends),
                Request::Release(ends) => self.release(ends),
                Request::List(number) => self.list(number),
            };
            match told {
                Err(error) if is_closed(&error) => return Ok(()),
                told => told?,
            }
        }
    }

    fn count(&mut self, ends: Ends) -> io::Result<()> {
        let carried = conntrack::get(&self.orders, &mut self.messages, &ends, &mut self.buffer)?;
        self.tell(Answer::News(ends, BypassEvent::Counted(carried)))
    }

    fn release(&mut self, ends: Ends) -> io::Result<()> {
        table::remove(&self.orders, &mut self.messages, &ends, &mut self.buffer)?;
        conntrack::delete(&self.orders, &mut self.messages, &ends, &mut self.buffer)?;
        // What it has carried comes with the event, which is there by now.
        let carried = self.tell_of_ends(Some(ends))?;
        self.tell(Answer::News(ends, BypassEvent::Released(carried)))
    }

    fn list(&mut self, number: u64) -> io::Result<()> {
        let line = &self.line;
        conntrack::list(&self.orders, &mut self.messages, &mut self.buffer, |tracked| {
            let news = BypassEvent::Counted(Some(tracked.carried));
            tell(line, &Answer::News(tracked.ends, news))
        })?;
        self.tell(Answer::Listed(number))
    }

    /// Tells of connections that the kernel has forgotten, and takes them out of the table. Returns what `released` has
    /// carried, of which the worker hears otherwise.
    fn tell_of_ends(&mut self, released: Option<Ends>) -> io::Result<Option<Carried>> {
        let mut found = None;
        loop {
            let mut ended: Vec<Tracked> = Vec::new();
            match self.events.take(&mut self.buffer) {
                Ok(None) => return Ok(found),
                Ok(Some(bytes)) => {
                    for reply in replies(bytes) {
                        if let Reply::Message(message) = reply {
                            ended.extend(conntrack::forgotten(&message));
                        }
                    }
                }
                // The kernel will tell again of what did not fit in.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => continue,
                Err(error) => return Err(error),
            }
            for tracked in ended {
                if Some(tracked.ends) == released {
                    found = Some(tracked.carried);
                    continue;
                }
                table::remove(&self.orders, &mut self.messages, &tracked.ends, &mut self.buffer)?;
                let news = Answer::News(tracked.ends, BypassEvent::Gone(tracked.carried));
                match self.tell(news) {
                    Err(error) if is_closed(&error) => return Ok(found), // seen by who reads the line
                    told => told?,
                }
            }
        }
    }

    fn tell(&self, answer: Answer) -> io::Result<()> {
        tell(&self.line, &answer)
    }
}

fn tell(line: &OwnedFd, answer: &Answer) -> io::Result<()> {
    let mut buffer = [0; MESSAGE_MAX];
    let message = postcard::to_slice(answer, &mut buffer).map_err(io::Error::other)?;
    send(line.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}

fn is_closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}
