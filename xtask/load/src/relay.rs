//! The kernel's own relay: TCP is the kernel's on both sides, and bytes go from socket to socket through a pipe without
//! being copied. It is what a relay in user space can reach at best, and makes a SOCKS5 proxy that costs little.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::sys::epoll::EpollFlags;
use nix::unistd::pipe2;

use crate::events::{Events, listen, would_block};
use crate::exchange::begin_connect;
use crate::socks;

/// Bytes that a pipe holds.
const PIPE: usize = 1 << 20;
/// Pipes kept for later.
const SPARE_PIPES: usize = 64;
/// Moves per direction before others have their turn.
const TURN: usize = 16;
const LISTENER: u64 = u64::MAX;

/// How a connection says where it wants to go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// By its destination, which tproxy leaves as it is.
    Transparent,
    /// By a SOCKS5 request.
    Socks,
}

pub(crate) fn run(address: SocketAddr, kind: Kind) -> Result<()> {
    let listener = listen(address, kind == Kind::Transparent)?;
    let events = Events::new()?;
    events.add(&listener, EpollFlags::EPOLLIN, LISTENER)?;
    let relay = Relay {
        events,
        listener,
        kind,
        pairs: HashMap::new(),
        next: 0,
        pipes: Pipes(Vec::new()),
        again: VecDeque::new(),
    };
    relay.run()
}

struct Relay {
    events: Events,
    listener: TcpListener,
    kind: Kind,
    /// By number; the client's events have twice the number as their token, the upstream's one more.
    pairs: HashMap<u64, Pair>,
    next: u64,
    pipes: Pipes,
    /// Pairs whose turn ended before their bytes did.
    again: VecDeque<u64>,
}

struct Pair {
    client: TcpStream,
    upstream: Option<TcpStream>,
    stage: Stage,
    to_upstream: Direction,
    to_client: Direction,
}

enum Stage {
    /// A SOCKS5 client has not said yet where to go.
    Asking(socks::Request),
    /// An answer is owed to the client when the upstream is there; bytes that came early are for the upstream.
    Connecting {
        answer: &'static [u8],
        early: Vec<u8>,
    },
    Relaying,
    /// The client's datagrams are relayed as long as it keeps the connection.
    Associated,
}

/// Events of both sides, which are reported once per change.
fn both_ways() -> EpollFlags {
    EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET
}

impl Relay {
    fn run(mut self) -> Result<()> {
        let mut ready = Vec::new();
        loop {
            let timeout = (!self.again.is_empty()).then_some(Duration::ZERO);
            self.events.wait(timeout, &mut ready)?;
            for event in &ready {
                match event.token {
                    LISTENER => self.accept(),
                    token => self.go_on(token / 2, token % 2 == 1),
                }
            }
            for _ in 0..self.again.len() {
                if let Some(number) = self.again.pop_front() {
                    self.go_on(number, false);
                }
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((client, _)) = self.listener.accept() {
            let number = self.next;
            self.next += 1;
            // Who is gone already, or wants to go where nothing leads, is forgotten.
            if let Ok(pair) = self.begin(client, number) {
                self.pairs.insert(number, pair);
            }
        }
    }

    fn begin(&self, client: TcpStream, number: u64) -> Result<Pair> {
        client.set_nonblocking(true)?;
        client.set_nodelay(true)?;
        self.events.add(&client, both_ways(), number * 2)?;
        let (stage, upstream) = match self.kind {
            Kind::Socks => (Stage::Asking(socks::Request::default()), None),
            Kind::Transparent => {
                let upstream = connect(&self.events, number, client.local_addr()?)?;
                let stage = Stage::Connecting {
                    answer: &[],
                    early: Vec::new(),
                };
                (stage, Some(upstream))
            }
        };
        Ok(Pair {
            client,
            upstream,
            stage,
            to_upstream: Direction::default(),
            to_client: Direction::default(),
        })
    }

    fn go_on(&mut self, number: u64, from_upstream: bool) {
        let Some(pair) = self.pairs.get_mut(&number) else {
            return;
        };
        match pair.go_on(&self.events, number, from_upstream, &mut self.pipes) {
            Ok(Outcome::Waiting) => {}
            Ok(Outcome::TurnOver) => self.again.push_back(number),
            Ok(Outcome::Over) | Err(_) => {
                self.pairs.remove(&number);
            }
        }
    }
}

fn connect(events: &Events, number: u64, target: SocketAddr) -> Result<TcpStream> {
    let upstream = begin_connect(target)?;
    upstream.set_nodelay(true)?;
    events.add(&upstream, both_ways(), number * 2 + 1)?;
    Ok(upstream)
}

enum Outcome {
    Waiting,
    TurnOver,
    Over,
}

impl Pair {
    fn go_on(
        &mut self,
        events: &Events,
        number: u64,
        from_upstream: bool,
        pipes: &mut Pipes,
    ) -> Result<Outcome> {
        match &mut self.stage {
            Stage::Asking(request) => {
                let Some(wish) = request.hear(&mut self.client)? else {
                    return Ok(Outcome::Waiting);
                };
                match wish {
                    socks::Wish::Connect { target, early } => {
                        self.upstream = Some(connect(events, number, target)?);
                        let answer = socks::GRANTED;
                        self.stage = Stage::Connecting { answer, early };
                    }
                    socks::Wish::Associate => {
                        socks::associate(&mut self.client)?;
                        self.stage = Stage::Associated;
                    }
                }
                Ok(Outcome::Waiting)
            }
            Stage::Connecting { answer, early } => {
                let Some(upstream) = self.upstream.as_mut().filter(|_| from_upstream) else {
                    return Ok(Outcome::Waiting);
                };
                if let Some(error) = upstream.take_error()? {
                    return Err(error.into());
                }
                self.client.write_all(answer)?;
                upstream.write_all(early)?;
                self.stage = Stage::Relaying;
                self.relay(pipes)
            }
            Stage::Relaying => self.relay(pipes),
            Stage::Associated => match self.client.read(&mut [0; 16]) {
                Err(error) if would_block(&error) => Ok(Outcome::Waiting),
                Ok(_) | Err(_) => Ok(Outcome::Over),
            },
        }
    }

    fn relay(&mut self, pipes: &mut Pipes) -> Result<Outcome> {
        let upstream = self.upstream.as_ref().expect("it is connected");
        let is_first_over = self.to_upstream.pump(&self.client, upstream, pipes)?;
        let is_second_over = self.to_client.pump(upstream, &self.client, pipes)?;
        Ok(if is_first_over || is_second_over {
            Outcome::TurnOver
        } else if self.to_upstream.is_shut && self.to_client.is_shut {
            Outcome::Over
        } else {
            Outcome::Waiting
        })
    }
}

/// One way through a pair.
#[derive(Default)]
struct Direction {
    /// Held while bytes are in it.
    pipe: Option<Pipe>,
    waiting: usize,
    has_ended: bool,
    is_shut: bool,
}

impl Direction {
    /// Moves what can be moved; returns whether the turn ended first.
    fn pump(&mut self, from: &TcpStream, to: &TcpStream, pipes: &mut Pipes) -> io::Result<bool> {
        if self.is_shut {
            return Ok(false);
        }
        let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
        for _ in 0..TURN {
            if self.waiting == 0 && !self.has_ended {
                let pipe = match &self.pipe {
                    Some(pipe) => pipe,
                    None => self.pipe.insert(pipes.take()?),
                };
                match splice(from, None, &pipe.writer, None, PIPE, flags) {
                    Ok(0) => self.has_ended = true,
                    Ok(count) => self.waiting = count,
                    Err(Errno::EAGAIN) => {
                        pipes.give_back(self.pipe.take());
                        return Ok(false);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            if self.waiting > 0 {
                let pipe = self.pipe.as_ref().expect("bytes wait in it");
                match splice(&pipe.reader, None, to, None, self.waiting, flags) {
                    Ok(count) => self.waiting -= count,
                    Err(Errno::EAGAIN) => return Ok(false),
                    Err(error) => return Err(error.into()),
                }
            }
            if self.waiting == 0 && self.has_ended {
                pipes.give_back(self.pipe.take());
                to.shutdown(Shutdown::Write)?;
                self.is_shut = true;
                return Ok(false);
            }
        }
        Ok(true)
    }
}

struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
}

/// Empty pipes.
struct Pipes(Vec<Pipe>);

impl Pipes {
    fn take(&mut self) -> io::Result<Pipe> {
        if let Some(pipe) = self.0.pop() {
            return Ok(pipe);
        }
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        fcntl(&writer, FcntlArg::F_SETPIPE_SZ(PIPE as libc::c_int))?;
        Ok(Pipe { reader, writer })
    }

    fn give_back(&mut self, pipe: Option<Pipe>) {
        self.0.extend(pipe.filter(|_| self.0.len() < SPARE_PIPES));
    }
}
