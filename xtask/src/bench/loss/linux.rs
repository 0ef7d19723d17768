//! A cell in real time: the kernel sends, or an appliance does, and the kernel receives.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Shown;
use super::cell::{Cell, Control, Figures, Task};
use super::forwarder::{End, Forwarded, NAME, forward};
use super::live::{Appliance, ORIGIN};
use super::namespace::{Namespace, ip};
use super::priority::{Priority, raise};
use super::wakes::Watch;

const SERVER: &str = "198.18.1.1";
const CLIENT: &str = "198.18.1.2";
const PORT: u16 = 5001;
/// Where the kernel sends by Cubic beside others.
const PORT_BESIDE: u16 = 5002;
/// The kernel doubles it, and counts its own structures in: about 4 MB of payload, what a flow of the engine has.
const SEND_BUFFER: libc::c_int = 2_200_000;
/// How long a transfer may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs a cell with each of these seeds. `appliance`: the program, which then sends; else the kernel does.
pub(super) fn measure(cell: &Cell, control: Control, seeds: u64, appliance: Option<&Path>) -> Result<Shown> {
    let (server, client) = (Namespace::new()?, Namespace::new()?);
    let ends = (
        End::new(&server, &format!("{SERVER}/24"))?,
        End::new(&client, &format!("{CLIENT}/24"))?,
    );
    for namespace in [&server, &client] {
        namespace.run(|| {
            set("net/ipv4/tcp_rmem", "4096 131072 67108864")?;
            set("net/ipv4/tcp_no_metrics_save", "1")
        })?;
    }
    let (appliance, listener, address) = match appliance {
        None => (None, server.run(|| listen(SERVER, PORT, control))?, SERVER),
        Some(program) => {
            client.run(|| ip(&format!("route add default via {SERVER}")))?;
            let appliance = Appliance::start(program, &server, NAME, control)?;
            let listener = appliance.origin.run(|| listen(ORIGIN, PORT, Control::Cubic))?;
            (Some(appliance), listener, ORIGIN)
        }
    };
    let mut servers = vec![(listener, address)];
    if cell.beside {
        let beside = server.run(|| listen(SERVER, PORT_BESIDE, Control::Cubic))?;
        servers.push((beside, SERVER));
    }
    let mut watch = Watch::default();
    let mut runs = Vec::new();
    for seed in 1..=seeds {
        let (figures, seen) = run(cell, seed, &ends, &client, &servers)?;
        runs.push(figures);
        watch.add(seen);
    }
    drop(appliance);
    // The answers of several flows are not told apart.
    let wakes = (cell.flows == 1).then(|| watch.wakes());
    Ok(Shown { runs, wakes })
}

/// One run: the forwarder on its own thread, a thread for each flow's two sides.
fn run(
    cell: &Cell,
    seed: u64,
    (server, client): &(End, End),
    inside: &Namespace,
    servers: &[(TcpListener, &str)],
) -> Result<(Figures, Watch)> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let forwarder = scope.spawn(|| forward((server, client), cell.path(), seed, &stop));
        let received = transfer(cell, inside, servers);
        stop.store(true, Ordering::Relaxed);
        let forwarded = forwarder.join().expect("it does not panic")?;
        let figures = figures(seed, cell.task, &received?, &forwarded);
        Ok((figures, forwarded.watch))
    })
}

fn transfer(cell: &Cell, inside: &Namespace, servers: &[(TcpListener, &str)]) -> Result<Vec<Received>> {
    let bytes = match cell.task {
        Task::Fill(_) => u64::MAX,
        Task::Transfer(bytes) => bytes,
    };
    thread::scope(|scope| {
        let began = Instant::now();
        let mut addresses = Vec::new();
        for (listener, address) in servers {
            let port = listener.local_addr().context("a listener has an address")?.port();
            addresses.push(SocketAddr::new(address.parse().expect("an address"), port));
        }
        let addresses = &addresses;
        let receivers: Vec<_> = (0..cell.flows)
            .map(|index| {
                let address = addresses[index as usize % addresses.len()];
                let receive = move || {
                    inside.enter()?;
                    raise(Priority::Sink);
                    thread::sleep(Cell::start(index).saturating_sub(began.elapsed()));
                    receive(address, cell.task, began)
                };
                scope.spawn(receive)
            })
            .collect();
        let mut senders = Vec::new();
        for index in 0..cell.flows as usize {
            let (stream, _) = servers[index % servers.len()]
                .0
                .accept()
                .context("no connection over the path")?;
            senders.push(stream.try_clone().context("cannot clone a socket")?);
            scope.spawn(move || send(stream, bytes));
        }
        let received = receivers
            .into_iter()
            .map(|receiver| receiver.join().expect("it does not panic"));
        let received = received.collect();
        for sender in senders {
            linger(&sender)?;
            // It may have been reset already.
            let _ = sender.shutdown(Shutdown::Both);
        }
        received
    })
}

fn figures(seed: u64, task: Task, received: &[Received], forwarded: &Forwarded) -> Figures {
    let part = |part: usize| {
        let last = forwarded.late.len().saturating_sub(1);
        forwarded
            .late
            .get(last * part / 100)
            .map_or(0, |nanos| u64::from(nanos / 1000))
    };
    let goodput = match task {
        Task::Fill(seconds) => received
            .iter()
            .map(|received| received.bytes as f64 * 8e-6 / seconds as f64)
            .collect(),
        Task::Transfer(_) => Vec::new(),
    };
    Figures {
        seed,
        goodput,
        millis: received[0].finished_after.map(|after| after.as_secs_f64() * 1e3),
        drops: (forwarded.to_client.queue_drops, forwarded.to_client.lost),
        retransmitted: None,
        spurious: None,
        late: Some([part(50), part(99), part(100)]),
    }
}

/// What a receiver has seen.
struct Received {
    bytes: u64,
    finished_after: Option<Duration>,
}

/// Receives until the end of a transfer, or of the time that began at `all_began`.
fn receive(server: SocketAddr, task: Task, all_began: Instant) -> Result<Received> {
    let began = Instant::now();
    let mut stream = TcpStream::connect(server).context("cannot connect over the path")?;
    let end = match task {
        Task::Fill(seconds) => all_began + Duration::from_secs(seconds),
        Task::Transfer(_) => began + LIMIT,
    };
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    let mut finished_after = None;
    while let Some(left) = end
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
    {
        stream
            .set_read_timeout(Some(left))
            .context("cannot set a timeout")?;
        match stream.read(&mut buffer) {
            Ok(0) => {
                finished_after = Some(began.elapsed());
                break;
            }
            Ok(len) => bytes += len as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("cannot receive"),
        }
    }
    // What is still on its way is answered by RST, and the sender ends.
    linger(&stream)?;
    Ok(Received {
        bytes,
        finished_after,
    })
}

/// Sends so many bytes and FIN, or until the connection breaks: then the receiver has enough.
fn send(mut stream: TcpStream, mut bytes: u64) {
    raise(Priority::Source);
    let buffer = vec![7; 1 << 18];
    while bytes > 0 {
        let len = bytes.min(buffer.len() as u64) as usize;
        if stream.write_all(&buffer[..len]).is_err() {
            return;
        }
        bytes -= len as u64;
    }
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read(&mut [0]); // until the receiver has closed as well
}

fn listen(address: &str, port: u16, control: Control) -> Result<TcpListener> {
    let listener = TcpListener::bind((address, port)).context("cannot listen")?;
    let name = control.name().as_bytes();
    option(&listener, libc::IPPROTO_TCP, libc::TCP_CONGESTION, name)
        .with_context(|| format!("this kernel has no {}", control.name()))?;
    option(
        &listener,
        libc::SOL_SOCKET,
        libc::SO_SNDBUFFORCE,
        &SEND_BUFFER.to_ne_bytes(),
    )?;
    let timeout = [LIMIT.as_secs() as libc::time_t, 0]
        .map(libc::time_t::to_ne_bytes)
        .concat();
    option(&listener, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &timeout)?;
    Ok(listener)
}

/// Closing resets the connection.
fn linger(stream: &TcpStream) -> Result<()> {
    let value: [libc::c_int; 2] = [1, 0];
    option(
        stream,
        libc::SOL_SOCKET,
        libc::SO_LINGER,
        &value.map(libc::c_int::to_ne_bytes).concat(),
    )
}

fn option(socket: &impl AsRawFd, level: libc::c_int, name: libc::c_int, value: &[u8]) -> Result<()> {
    // SAFETY: pointer and length are those of a live slice.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    ensure!(
        done == 0,
        "cannot set a socket option: {}",
        io::Error::last_os_error()
    );
    Ok(())
}

fn set(name: &str, value: &str) -> Result<()> {
    fs::write(format!("/proc/sys/{name}"), value).with_context(|| format!("cannot set {name}"))
}
