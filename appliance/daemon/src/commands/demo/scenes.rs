//! What the client does, and what must come of it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use tungate_engine::io::Carriage;
use tungate_engine::policy::{ListAction, ListEntry, ListProtocol};

use super::origin::{BULK, CLOSED, DNS, HTTP, NAMES, PAGE_LEN, Pattern, STREAM, WEB, WEB_V6};
use super::stage::Stage;
use super::{RULE, TELNET};
use crate::commands::text::bytes;
use crate::upstream::{Ping, SocketSetup};

/// How long anything may take that is expected to happen.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for an answer that must not come.
const SILENCE: Duration = Duration::from_millis(500);
/// How long the fast transfer lasts.
const TRANSFER_TIME: Duration = Duration::from_secs(1);
const CARRIAGE: Carriage = Carriage {
    hop_limit: 64,
    dont_fragment: true,
};
/// How often progress is shown.
const SHOW_TIME: Duration = Duration::from_millis(100);

pub(super) fn play(stage: &mut Stage<'_>, ipv6: bool) {
    stage.say(
        "A client, tungate and an origin, each in a network namespace of its own. Nothing leaves this machine.\n\
         \n  client ── packets ──▶ TUN ──▶ engine: TCP, UDP, ICMP end here ── sockets ──▶ origin",
    );
    let web = |address: IpAddr| SocketAddr::new(address, HTTP);
    stage.scene("A web page over TCP", |stage| page(stage, web(WEB.into())));
    if ipv6 {
        stage.scene("The same over IPv6", |stage| page(stage, web(WEB_V6.into())));
    } else {
        stage.say("\nIPv6 is left out: this host has none.");
    }
    stage.scene("A name, asked for over UDP", name);
    stage.scene("A ping", ping);
    stage.scene("A port where nobody listens", closed_port);
    stage.scene("A rule: tcp to port 23 is rejected", rejected);
    stage.scene("A deny list, changed while a download runs", list);
    stage.scene("One connection, as fast as it goes for a second", bulk);
}

fn page(stage: &mut Stage<'_>, server: SocketAddr) -> Result<String> {
    let mut stream = connect(server)?;
    stage.opened(&server.to_string())?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: origin.example\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    drop(stream);
    let body = answer
        .windows(4)
        .position(|end| end == b"\r\n\r\n")
        .map(|end| &answer[end + 4..])
        .context("the answer has no header")?;
    ensure!(
        body.len() == PAGE_LEN,
        "the page has {} bytes, not {PAGE_LEN}",
        body.len()
    );
    ensure!(Pattern::new().is(0, body), "the page is not what the origin sent");
    let note = stage.ended(&server.to_string())?;
    ensure!(
        note.bytes("to_client") == answer.len() as u64,
        "the appliance counted otherwise"
    );
    ensure!(note.get("end") == "finished", "the flow did not end in order");
    Ok(format!(
        "the client got the page: {PAGE_LEN} bytes, as the origin sent them"
    ))
}

fn name(stage: &mut Stage<'_>) -> Result<String> {
    let server = SocketAddr::new(NAMES.into(), DNS);
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(server)?;
    // RFC 1035: a question, recursion desired, type A, class IN.
    let query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x06origin\x07example\x00\x00\x01\x00\x01";
    socket.send(query)?;
    let mut answer = [0; 512];
    let len = socket.recv(&mut answer).context("no answer")?;
    stage.opened(&server.to_string())?;
    ensure!(answer[..2] == query[..2], "the answer is not to our question");
    ensure!(
        answer[..len].ends_with(&WEB.octets()),
        "the answer is not the address"
    );
    Ok(format!("origin.example is {WEB}, says {NAMES}"))
}

fn ping(stage: &mut Stage<'_>) -> Result<String> {
    // The client's socket is of the kind that the appliance's own is.
    let client = IpAddr::from(Ipv4Addr::UNSPECIFIED);
    let mut ping =
        Ping::open(&SocketSetup::default(), client, WEB.into()).context("cannot open a ping socket")?;
    ping.socket().set_nonblocking(false)?;
    ping.socket().set_read_timeout(Some(PATIENCE))?;
    let start = Instant::now();
    ping.send(1, b"tungate", CARRIAGE)
        .map_err(|error| anyhow!("the client met {error:?}"))?;
    let mut buffer = [0; 128];
    let reply = ping.receive(&mut buffer).context("no reply")?;
    let time = start.elapsed();
    ensure!(
        reply.sequence == 1 && buffer[reply.payload] == *b"tungate",
        "the reply is not to our request"
    );
    stage.opened(&SocketAddr::new(WEB.into(), 0).to_string())?;
    Ok(format!(
        "the origin itself has answered, in {} µs",
        time.as_micros()
    ))
}

fn closed_port(stage: &mut Stage<'_>) -> Result<String> {
    let server = SocketAddr::new(WEB.into(), CLOSED);
    refused(server)?;
    stage.opened(&server.to_string())?;
    let note = stage.ended(&server.to_string())?;
    ensure!(
        note.get("detail") == "refused",
        "the appliance saw {}",
        note.get("detail")
    );
    Ok("the client is refused, as without a proxy: the origin's answer becomes its own".to_owned())
}

fn rejected(stage: &mut Stage<'_>) -> Result<String> {
    let server = SocketAddr::new(WEB.into(), TELNET);
    refused(server)?;
    let note = stage.denied(&server.to_string())?;
    ensure!(note.get("rule") == RULE, "it was the rule {}", note.get("rule"));
    Ok("the client is refused at once, and the log names the rule".to_owned())
}

fn list(stage: &mut Stage<'_>) -> Result<String> {
    let server = SocketAddr::new(STREAM.into(), HTTP);
    let name = server.to_string();
    let entry = ListEntry {
        action: ListAction::Deny,
        network: IpAddr::from(STREAM).into(),
        protocol: ListProtocol::Any,
        ports: None,
        expires: None,
    };
    let said = entry.to_string();
    let mut stream = connect(server)?;
    stage.opened(&name)?;
    watch(stage, &mut stream, 300_000)?;
    stage.change_list(vec![entry], &format!("list + {said}"));
    let changed = Instant::now();
    let note = stage.ended(&name)?;
    let time = changed.elapsed();
    ensure!(
        note.get("detail") == said,
        "the flow ended by {}",
        note.get("detail")
    );
    stream.set_read_timeout(Some(SILENCE))?;
    match io::copy(&mut stream, &mut io::sink()) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
        Err(error) => bail!("the client met {error} where it should meet silence"),
        Ok(_) => bail!("the client was told of the end, where it should meet silence"),
    }
    match TcpStream::connect_timeout(&server, SILENCE) {
        Err(error) if error.kind() == ErrorKind::TimedOut => {}
        Err(error) => bail!("the client met {error} where it should meet silence"),
        Ok(_) => bail!("a new connection was let through"),
    }
    stage.denied(&name)?;
    stage.change_list(Vec::new(), &format!("list - {said}"));
    let mut stream = connect(server)?;
    stage.opened(&name)?;
    stream.read_exact(&mut [0; 1000])?;
    Ok(format!(
        "silence {} µs after the change, for a new connection too; without the entry one came through",
        time.as_micros(),
    ))
}

fn bulk(stage: &mut Stage<'_>) -> Result<String> {
    let server = SocketAddr::new(WEB.into(), BULK);
    let mut stream = connect(server)?;
    stage.opened(&server.to_string())?;
    let pattern = Pattern::new();
    let mut buffer = vec![0; 1 << 20];
    let start = Instant::now();
    let (mut received, mut shown) = (0, Duration::ZERO);
    loop {
        let len = stream.read(&mut buffer)?;
        ensure!(len > 0, "the origin has closed");
        ensure!(
            pattern.is(received, &buffer[..len]),
            "a byte behind the first {received} is not what the origin sent"
        );
        received += len as u64;
        let time = start.elapsed();
        if time >= TRANSFER_TIME {
            drop(stream);
            stage.progress("");
            let bits_per_second = received as f64 * 8.0 / time.as_secs_f64();
            return Ok(format!(
                "{} in {:.2} s: {:.1} Gbit/s, every byte compared",
                bytes(received),
                time.as_secs_f64(),
                bits_per_second / 1e9
            ));
        }
        if time >= shown + SHOW_TIME {
            shown = time;
            stage.progress(&format!("{} received", bytes(received)));
        }
    }
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, PATIENCE)
        .with_context(|| format!("no connection to {server}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Tries to connect, which must be refused.
fn refused(server: SocketAddr) -> Result<()> {
    match TcpStream::connect_timeout(&server, PATIENCE) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => bail!("the client met {error} where it should be refused"),
        Ok(_) => bail!("the client got a connection"),
    }
}

/// Receives at least `enough` bytes, and for a while if somebody watches.
fn watch(stage: &Stage<'_>, stream: &mut TcpStream, enough: u64) -> Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let pattern = Pattern::new();
    let start = Instant::now();
    let (mut received, mut shown) = (0, Duration::ZERO);
    while received < enough || (stage.is_watched() && start.elapsed() < 10 * SHOW_TIME) {
        let len = stream.read(&mut buffer)?;
        ensure!(len > 0, "the origin has closed");
        ensure!(
            pattern.is(received, &buffer[..len]),
            "the bytes are not what the origin sent"
        );
        received += len as u64;
        if start.elapsed() >= shown + SHOW_TIME {
            shown = start.elapsed();
            stage.progress(&format!("{} received", bytes(received)));
        }
    }
    stage.progress("");
    Ok(())
}
