//! A TCP upstream: bytes go between its socket and the engine's buffers without a stop.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::time::Duration;

use socket2::Socket;
use tungate_engine::io::UpstreamEvent;
use tungate_engine::{FlowId, Timestamp};

use super::Readiness;
use super::errors::connect_error;
use super::socket::{SocketSetup, Transport};
use crate::driver::Machine;

/// Bytes per direction before other flows have their turn.
const QUANTUM: usize = 512 << 10;

/// A TCP upstream.
#[derive(Debug)]
pub(crate) struct Tcp {
    socket: Socket,
    connected: bool,
    /// What the poll has said and no call has disproved since.
    readable: bool,
    writable: bool,
    /// The poll has seen FIN: a short read is not the end of what is there.
    read_closed: bool,
    /// The connection is lost, or could not be made.
    broken: bool,
    /// The client has sent FIN, and all before it has been written; passed on in the next turn, if the socket is not
    /// closed before.
    close_wanted: bool,
    /// The engine has bytes for the socket.
    has_bytes: bool,
    /// The engine has room for bytes from the socket.
    has_room: bool,
    /// FIN has been passed on.
    finished: bool,
}

/// What came of a turn.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// What the engine has to know.
    pub(crate) news: Option<UpstreamEvent<'static>>,
    /// There was more to do than one turn may.
    pub(crate) again: bool,
    /// Bytes that have moved, both ways together.
    pub(crate) moved: usize,
}

impl Tcp {
    /// Starts to connect to `target`.
    ///
    /// # Errors
    ///
    /// The system's, where it knows at once that it cannot be done.
    pub(crate) fn connect(setup: &SocketSetup, client: IpAddr, target: SocketAddr) -> io::Result<Self> {
        let socket = setup.open(Transport::Tcp, target.ip(), Some(client))?;
        // What the client sends goes on as the client has cut it.
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&target.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        Ok(Self::new(socket, false))
    }

    /// Takes over a connection that somebody else has made.
    pub(crate) fn connected(socket: Socket) -> Self {
        Self::new(socket, true)
    }

    fn new(socket: Socket, connected: bool) -> Self {
        Self {
            socket,
            connected,
            readable: false,
            writable: false,
            read_closed: false,
            broken: false,
            close_wanted: false,
            has_bytes: false,
            has_room: false,
            finished: false,
        }
    }

    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Takes note of what the poll says.
    pub(crate) fn on_ready(&mut self, ready: Readiness) {
        self.readable |= ready.readable || ready.read_closed || ready.error;
        self.writable |= ready.writable || ready.error;
        self.read_closed |= ready.read_closed;
        self.broken |= ready.error;
    }

    /// Bytes from the client wait in the engine.
    pub(crate) fn on_bytes(&mut self) {
        self.has_bytes = true;
    }

    /// Takes bytes from the client past the engine's buffer, if the socket does; returns how many.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> usize {
        if !self.connected || !self.writable || self.broken {
            return 0;
        }
        self.send(bytes)
    }

    /// Writes to the socket; returns how many bytes it took.
    fn send(&mut self, bytes: &[u8]) -> usize {
        match retry(|| (&self.socket).write(bytes)) {
            Ok(taken) => {
                self.writable = taken == bytes.len();
                taken
            }
            Err(error) => {
                self.writable = false;
                if error.kind() != ErrorKind::WouldBlock {
                    // Reading will tell how it ended.
                    self.broken = true;
                    self.readable = true;
                }
                0
            }
        }
    }

    /// Whether the connection is lost and the engine has yet to hear of it.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// The engine has room for bytes to the client.
    pub(crate) fn on_room(&mut self) {
        self.has_room = true;
    }

    /// The client has sent FIN, and all before it has been written.
    pub(crate) fn close_write(&mut self) {
        self.close_wanted = true;
    }

    /// Lets go of the connection with a reset.
    pub(crate) fn abort(self) {
        let _ = self.socket.set_linger(Some(Duration::ZERO));
    }

    /// Moves bytes as far as socket, engine and fairness allow.
    pub(crate) fn turn(&mut self, id: FlowId, now: Timestamp, machine: &mut Machine) -> Progress {
        if !self.connected {
            return self.finish_connect();
        }
        let mut progress = Progress::default();
        if !self.broken {
            progress.again |= self.write_socket(id, now, machine, &mut progress.moved);
        }
        if std::mem::take(&mut self.close_wanted) {
            // It fails where the connection is lost, which reading will tell.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        let (news, again) = self.read_socket(id, now, machine, &mut progress.moved);
        progress.again |= again;
        // A lost connection's last bytes go to the client as far as there is room; nobody waits for more.
        progress.news = match news {
            None if self.broken && !again => Some(UpstreamEvent::Reset),
            news => news,
        };
        progress
    }

    fn finish_connect(&mut self) -> Progress {
        if !self.writable {
            return Progress::default();
        }
        // The poll tells of errors: where it has not, there is none to ask for.
        let error = if std::mem::take(&mut self.broken) {
            self.socket.take_error()
        } else {
            Ok(None)
        };
        let news = match error {
            Ok(None) => {
                self.connected = true;
                UpstreamEvent::Connected
            }
            Ok(Some(error)) | Err(error) => UpstreamEvent::Failed(connect_error(&error)),
        };
        Progress {
            news: Some(news),
            again: self.readable,
            moved: 0,
        }
    }

    /// Adds what it has moved, and returns whether there is more to do.
    fn write_socket(&mut self, id: FlowId, now: Timestamp, machine: &mut Machine, moved: &mut usize) -> bool {
        let mut left = QUANTUM;
        while self.has_bytes && self.writable {
            if left == 0 {
                return true;
            }
            let mut taken = None;
            machine.read(now, id, |bytes| *taken.insert(self.send(bytes)));
            match taken {
                None => self.has_bytes = false,
                Some(taken) => {
                    left = left.saturating_sub(taken);
                    *moved += taken;
                }
            }
        }
        false
    }

    /// Adds what it has moved, and returns what the engine has to know and whether there is more to do.
    fn read_socket(
        &mut self,
        id: FlowId,
        now: Timestamp,
        machine: &mut Machine,
        moved: &mut usize,
    ) -> (Option<UpstreamEvent<'static>>, bool) {
        let mut left = QUANTUM;
        while self.has_room && self.readable && !self.finished {
            if left == 0 {
                return (None, true);
            }
            let mut read = None;
            machine.write(now, id, |space| {
                let result = retry(|| (&self.socket).read(space));
                let filled = result.as_ref().map_or(0, |filled| *filled);
                read = Some((result, space.len()));
                filled
            });
            match read {
                None => self.has_room = false,
                Some((Ok(0), _)) if self.broken => return (Some(UpstreamEvent::Reset), false),
                Some((Ok(0), _)) => {
                    self.finished = true;
                    return (Some(UpstreamEvent::ReadClosed), false);
                }
                Some((Ok(filled), lent)) => {
                    self.readable = filled == lent || self.read_closed || self.broken;
                    left = left.saturating_sub(filled);
                    *moved += filled;
                }
                Some((Err(error), _)) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Some((Err(_), _)) => return (Some(UpstreamEvent::Reset), false),
            }
        }
        (None, false)
    }
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
