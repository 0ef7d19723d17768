//! Short exchanges: how many connections a second, and how long an answer takes.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use nix::sys::epoll::EpollFlags;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use crate::events::{Events, listen, would_block};
use crate::seconds;

/// Bytes of a request and of its answer.
pub(crate) const MESSAGE: usize = 64;
/// Connections that are under way at the same time.
const PARALLEL: usize = 32;
/// How long an answer may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Args)]
pub(crate) struct Options {
    /// Connections are spread over these
    #[arg(required = true)]
    targets: Vec<SocketAddr>,
    #[arg(long, value_parser = seconds)]
    seconds: Duration,
}

#[derive(Serialize)]
pub(crate) struct Connected {
    seconds: f64,
    completed: u64,
    failed: u64,
}

/// Connects, asks, takes the answer and closes, as often as it goes.
pub(crate) fn connect(options: &Options) -> Result<Connected> {
    let mut events = Events::new()?;
    let mut targets = options.targets.iter().cycle();
    let mut next_target = || *targets.next().expect("there is at least one target");
    let mut exchanges = Vec::new();
    let (mut completed, mut failed) = (0, 0);
    let start = Instant::now();
    for token in 0..PARALLEL as u64 {
        exchanges.push(Exchange::begin(&events, next_target(), token)?);
    }
    let mut ready = Vec::new();
    while start.elapsed() < options.seconds {
        events.wait(Some(Duration::from_millis(100)), &mut ready)?;
        for event in &ready {
            let exchange = &mut exchanges[event.token as usize];
            match exchange.go_on(&events, event.token) {
                Progress::Waiting => continue,
                Progress::Done => completed += 1,
                Progress::Failed => failed += 1,
            }
            *exchange = Exchange::begin(&events, next_target(), event.token)?;
        }
        for (token, exchange) in exchanges.iter_mut().enumerate() {
            if exchange.begun.elapsed() > PATIENCE {
                failed += 1;
                *exchange = Exchange::begin(&events, next_target(), token as u64)?;
            }
        }
    }
    Ok(Connected {
        seconds: start.elapsed().as_secs_f64(),
        completed,
        failed,
    })
}

struct Exchange {
    socket: TcpStream,
    begun: Instant,
    has_asked: bool,
    answered: usize,
}

enum Progress {
    Waiting,
    Done,
    Failed,
}

impl Exchange {
    fn begin(events: &Events, target: SocketAddr, token: u64) -> Result<Self> {
        let socket = begin_connect(target)?;
        events.add(&socket, EpollFlags::EPOLLOUT, token)?;
        Ok(Self {
            socket,
            begun: Instant::now(),
            has_asked: false,
            answered: 0,
        })
    }

    fn go_on(&mut self, events: &Events, token: u64) -> Progress {
        if !self.has_asked {
            self.has_asked = true;
            let asked = self.socket.write(&[1; MESSAGE]);
            let is_asked = asked.is_ok_and(|count| count == MESSAGE)
                && events.change(&self.socket, EpollFlags::EPOLLIN, token).is_ok();
            return if is_asked {
                Progress::Waiting
            } else {
                Progress::Failed
            };
        }
        match self.socket.read(&mut [0; MESSAGE]) {
            Ok(count) if count > 0 => {
                self.answered += count;
                if self.answered == MESSAGE {
                    Progress::Done
                } else {
                    Progress::Waiting
                }
            }
            Err(error) if would_block(&error) => Progress::Waiting,
            Ok(_) | Err(_) => Progress::Failed,
        }
    }
}

/// Starts to connect; the socket is writable when that has come to an end.
pub(crate) fn begin_connect(target: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(
        Domain::for_address(target),
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )
    .context("cannot make a socket")?;
    match socket.connect(&target.into()) {
        Err(error) if !would_block(&error) => {
            Err(error).with_context(|| format!("cannot connect to {target}"))
        }
        Ok(()) | Err(_) => Ok(socket.into()),
    }
}

#[derive(Serialize)]
pub(crate) struct Delays {
    exchanges: usize,
    p50_us: f64,
    p99_us: f64,
}

/// Asks again and again over one connection.
pub(crate) fn latency(options: &Options) -> Result<Delays> {
    let target = options.targets[0];
    let mut socket = TcpStream::connect_timeout(&target, PATIENCE)
        .with_context(|| format!("cannot connect to {target}"))?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut delays = Vec::new();
    let end = Instant::now() + options.seconds;
    let mut message = [1; MESSAGE];
    loop {
        let asked = Instant::now();
        if asked >= end {
            break;
        }
        socket.write_all(&message).context("cannot ask")?;
        socket.read_exact(&mut message).context("no answer")?;
        delays.push(asked.elapsed());
    }
    delays.sort_unstable();
    let percentile = |percent: usize| {
        let at = (delays.len() * percent / 100).min(delays.len().saturating_sub(1));
        delays.get(at).map_or(0.0, |delay| delay.as_secs_f64() * 1e6)
    };
    Ok(Delays {
        exchanges: delays.len(),
        p50_us: percentile(50),
        p99_us: percentile(99),
    })
}

/// Sends back what comes. Who sends more than a socket's buffer holds without reading is cut off.
pub(crate) fn serve(address: SocketAddr) -> Result<()> {
    let listener = listen(address, false)?;
    let mut events = Events::new()?;
    events.add(&listener, EpollFlags::EPOLLIN, u64::MAX)?;
    let mut connections = HashMap::new();
    let mut next = 0;
    let mut buffer = [0; 4096];
    let mut ready = Vec::new();
    loop {
        events.wait(None, &mut ready)?;
        for event in &ready {
            if event.token == u64::MAX {
                while let Ok((socket, _)) = listener.accept() {
                    socket.set_nonblocking(true)?;
                    socket.set_nodelay(true)?;
                    events.add(&socket, EpollFlags::EPOLLIN, next)?;
                    connections.insert(next, socket);
                    next += 1;
                }
                continue;
            }
            let Some(socket) = connections.get_mut(&event.token) else {
                continue;
            };
            let goes_on = match socket.read(&mut buffer) {
                Ok(0) => false,
                Ok(count) => socket.write_all(&buffer[..count]).is_ok(),
                Err(error) => would_block(&error),
            };
            if !goes_on {
                connections.remove(&event.token);
            }
        }
    }
}
