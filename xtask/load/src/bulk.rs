//! Bulk transfers: as much as goes through in a time, over one or many connections.
//!
//! The client's first byte says which way. At the end of an upload the server tells how many bytes it has got; the time
//! of an upload ends when the last such word is there, so that bytes which wait in buffers do not count as carried.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use nix::sys::epoll::EpollFlags;
use serde::Serialize;

use crate::events::{Events, listen, would_block};
use crate::seconds;

/// Bytes per system call, as with iperf3.
const BLOCK: usize = 128 << 10;
/// How long the server may take to tell what it has got.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Args)]
pub(crate) struct Options {
    /// Connections are spread over these
    #[arg(required = true)]
    targets: Vec<SocketAddr>,
    #[arg(long)]
    direction: Direction,
    #[arg(long, default_value_t = 1)]
    streams: usize,
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Direction {
    Up,
    Down,
}

#[derive(Serialize)]
pub(crate) struct Transferred {
    seconds: f64,
    /// What each connection carried.
    bytes: Vec<u64>,
    /// Connections that could not be made or broke off.
    failed: usize,
}

struct Stream {
    socket: TcpStream,
    bytes: u64,
    /// The server's word about an upload, as far as it has come.
    word: Vec<u8>,
    state: State,
}

#[derive(PartialEq, Eq)]
enum State {
    Transferring,
    Waiting,
    Done,
    Failed,
}

pub(crate) fn run(options: &Options) -> Result<Transferred> {
    let mut events = Events::new()?;
    let up = options.direction == Direction::Up;
    let mut streams = Vec::new();
    let mut failed = 0;
    for number in 0..options.streams {
        let target = options.targets[number % options.targets.len()];
        let open = || {
            let mut socket = TcpStream::connect_timeout(&target, PATIENCE)?;
            socket.write_all(if up { b"u" } else { b"d" })?;
            socket.set_nonblocking(true)?;
            Ok::<_, std::io::Error>(socket)
        };
        match open() {
            Ok(socket) => {
                streams.push(Stream {
                    socket,
                    bytes: 0,
                    word: Vec::new(),
                    state: State::Transferring,
                });
            }
            Err(_) => failed += 1,
        }
    }
    let start = Instant::now();
    let interest = if up {
        EpollFlags::EPOLLOUT
    } else {
        EpollFlags::EPOLLIN
    };
    for (at, stream) in streams.iter().enumerate() {
        events.add(&stream.socket, interest, at as u64)?;
    }
    let mut block = vec![0; BLOCK];
    let mut ready = Vec::new();
    let end = start + options.seconds;
    let mut open = streams.len();
    while open > 0 {
        let now = Instant::now();
        if now >= end {
            break;
        }
        events.wait(Some(end - now), &mut ready)?;
        for event in &ready {
            let stream = &mut streams[event.token as usize];
            let moved = if up {
                stream.socket.write(&block)
            } else {
                stream.socket.read(&mut block)
            };
            match moved {
                Ok(count) if count > 0 => stream.bytes += count as u64,
                Err(error) if would_block(&error) => {}
                Ok(_) | Err(_) => {
                    stream.state = State::Failed;
                    events.remove(&stream.socket)?;
                    open -= 1;
                }
            }
        }
    }
    if up {
        collect(&mut events, &mut streams)?;
    }
    failed += streams
        .iter()
        .filter(|stream| stream.state == State::Failed)
        .count();
    Ok(Transferred {
        seconds: start.elapsed().as_secs_f64(),
        bytes: streams.iter().map(|stream| stream.bytes).collect(),
        failed,
    })
}

/// Ends uploads and takes the server's word for how much has arrived.
fn collect(events: &mut Events, streams: &mut [Stream]) -> Result<()> {
    let mut waiting = 0;
    for (at, stream) in streams.iter_mut().enumerate() {
        if stream.state == State::Transferring && stream.socket.shutdown(Shutdown::Write).is_ok() {
            events.change(&stream.socket, EpollFlags::EPOLLIN, at as u64)?;
            stream.state = State::Waiting;
            waiting += 1;
        }
    }
    let end = Instant::now() + PATIENCE;
    let mut ready = Vec::new();
    while waiting > 0 && Instant::now() < end {
        events.wait(Some(end.saturating_duration_since(Instant::now())), &mut ready)?;
        for event in &ready {
            let stream = &mut streams[event.token as usize];
            let mut buffer = [0; 8];
            match stream.socket.read(&mut buffer) {
                Ok(count) if count > 0 => {
                    stream.word.extend_from_slice(&buffer[..count]);
                    let Ok(bytes) = <[u8; 8]>::try_from(&stream.word[..]) else {
                        continue;
                    };
                    stream.bytes = u64::from_be_bytes(bytes);
                    stream.state = State::Done;
                }
                Err(error) if would_block(&error) => continue,
                Ok(_) | Err(_) => stream.state = State::Failed,
            }
            events.remove(&stream.socket)?;
            waiting -= 1;
        }
    }
    for stream in streams {
        if stream.state != State::Done {
            stream.state = State::Failed;
            stream.bytes = 0;
        }
    }
    Ok(())
}

/// What the server knows of a connection.
struct Served {
    socket: TcpStream,
    direction: Option<Direction>,
    bytes: u64,
}

pub(crate) fn serve(address: SocketAddr) -> Result<()> {
    let listener = listen(address, false)?;
    let mut events = Events::new()?;
    events.add(&listener, EpollFlags::EPOLLIN, u64::MAX)?;
    let mut served = HashMap::new();
    let mut next = 0;
    let mut block = vec![0; BLOCK];
    let mut ready = Vec::new();
    loop {
        events.wait(None, &mut ready)?;
        for event in &ready {
            if event.token == u64::MAX {
                while let Ok((socket, _)) = listener.accept() {
                    socket
                        .set_nonblocking(true)
                        .context("cannot set up a connection")?;
                    events.add(&socket, EpollFlags::EPOLLIN, next)?;
                    served.insert(
                        next,
                        Served {
                            socket,
                            direction: None,
                            bytes: 0,
                        },
                    );
                    next += 1;
                }
                continue;
            }
            let Some(connection) = served.get_mut(&event.token) else {
                continue;
            };
            if !connection.go_on(&events, event.token, &mut block) {
                served.remove(&event.token);
            }
        }
    }
}

impl Served {
    /// Moves a block; returns whether the connection goes on.
    fn go_on(&mut self, events: &Events, token: u64, block: &mut [u8]) -> bool {
        let moved = match self.direction {
            None => self.socket.read(&mut block[..1]),
            Some(Direction::Up) => self.socket.read(block),
            Some(Direction::Down) => self.socket.write(block),
        };
        match moved {
            Ok(0) => {
                if self.direction == Some(Direction::Up) {
                    // Eight bytes fit into an empty buffer. The client closes when it has them.
                    let _ = self.socket.write_all(&self.bytes.to_be_bytes());
                }
                false
            }
            Ok(_) if self.direction.is_none() => {
                let up = block[0] == b'u';
                self.direction = Some(if up { Direction::Up } else { Direction::Down });
                block[0] = 0;
                up || events.change(&self.socket, EpollFlags::EPOLLOUT, token).is_ok()
            }
            Ok(count) => {
                self.bytes += count as u64;
                true
            }
            Err(error) => would_block(&error) || error.kind() == ErrorKind::Interrupted,
        }
    }
}
