//! Many connections that stay open and do next to nothing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use nix::sys::epoll::EpollFlags;
use serde::Serialize;

use crate::events::{Events, would_block};
use crate::exchange::{MESSAGE, PATIENCE, begin_connect};
use crate::print;

/// Connections that are being opened or asked at the same time.
const PARALLEL: usize = 64;

#[derive(Args)]
pub(crate) struct Options {
    /// Connections are spread over these
    #[arg(required = true)]
    targets: Vec<SocketAddr>,
    #[arg(long)]
    connections: usize,
}

#[derive(Serialize)]
struct Answers {
    answered: usize,
}

/// Opens the connections and asks each once, tells how many have answered, waits for a line on standard input, asks
/// again and tells again.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut events = Events::new()?;
    let mut held: Vec<Option<TcpStream>> = Vec::with_capacity(options.connections);
    let mut targets = options.targets.iter().cycle();
    held.resize_with(options.connections, || None);
    let answered = ask_all(&mut events, &mut held, |_| {
        begin_connect(*targets.next().expect("there is at least one target")).ok()
    })?;
    print(&Answers { answered })?;
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .context("cannot read a line")?;
    let answered = ask_all(&mut events, &mut held, |socket| socket)?;
    print(&Answers { answered })
}

/// Asks every connection, some at a time; `open` gets what there is and returns what is to be asked. Those that do
/// not answer are closed. Returns how many did.
fn ask_all(
    events: &mut Events,
    held: &mut [Option<TcpStream>],
    mut open: impl FnMut(Option<TcpStream>) -> Option<TcpStream>,
) -> Result<usize> {
    let mut begun: Vec<Option<Instant>> = vec![None; held.len()];
    let (mut next, mut under_way, mut answered) = (0, 0, 0);
    let mut ready = Vec::new();
    while next < held.len() || under_way > 0 {
        while next < held.len() && under_way < PARALLEL {
            let is_new = held[next].is_none();
            held[next] = open(held[next].take());
            if let Some(socket) = &held[next] {
                if is_new {
                    events.add(socket, EpollFlags::EPOLLOUT, next as u64)?;
                } else {
                    events.change(socket, EpollFlags::EPOLLOUT, next as u64)?;
                }
                begun[next] = Some(Instant::now());
                under_way += 1;
            }
            next += 1;
        }
        events.wait(Some(PATIENCE / 10), &mut ready)?;
        for event in &ready {
            let at = event.token as usize;
            let Some(socket) = &mut held[at] else {
                continue;
            };
            let goes_on = if event.flags.contains(EpollFlags::EPOLLOUT) {
                socket.write(&[1; MESSAGE]).is_ok_and(|count| count == MESSAGE)
                    && events.change(socket, EpollFlags::EPOLLIN, event.token).is_ok()
            } else {
                match socket.read(&mut [0; MESSAGE]) {
                    Ok(MESSAGE) => {
                        events.change(socket, EpollFlags::empty(), event.token)?;
                        answered += 1;
                        under_way -= usize::from(begun[at].take().is_some());
                        true
                    }
                    Ok(_) => false,
                    Err(error) => would_block(&error),
                }
            };
            if !goes_on {
                held[at] = None;
                under_way -= usize::from(begun[at].take().is_some());
            }
        }
        if ready.is_empty() {
            for (at, begun) in begun.iter_mut().enumerate() {
                if begun.is_some_and(|begun| begun.elapsed() > PATIENCE) {
                    (held[at], *begun) = (None, None);
                    under_way -= 1;
                }
            }
        }
    }
    Ok(answered)
}
