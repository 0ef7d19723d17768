//! The far side: servers with documentation addresses (RFC 5737, RFC 3849) on this namespace's loopback.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

pub(super) const WEB: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
pub(super) const WEB_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
pub(super) const NAMES: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
/// Sends without end, at an easy pace.
pub(super) const STREAM: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

pub(super) const HTTP: u16 = 80;
pub(super) const DNS: u16 = 53;
/// Sends without end, as fast as it goes (the port of chargen, RFC 864).
pub(super) const BULK: u16 = 19;
/// Nobody listens here.
pub(super) const CLOSED: u16 = 81;

/// Length of a page.
pub(super) const PAGE_LEN: usize = 100_000;
/// A prime, so that no loss of whole blocks or segments goes unseen.
const PERIOD: usize = 65_521;
const PACE: Duration = Duration::from_millis(10);

/// What the servers send: byte for byte known at both ends.
pub(super) struct Pattern(Vec<u8>);

impl Pattern {
    pub(super) fn new() -> Self {
        let byte = |index: usize| (index % PERIOD * 31 + index % PERIOD / 256) as u8;
        Self((0..2 * PERIOD).map(byte).collect())
    }

    /// At most `len` bytes from `offset` on, and at least one if any are asked for.
    pub(super) fn at(&self, offset: u64, len: usize) -> &[u8] {
        let start = (offset % PERIOD as u64) as usize;
        &self.0[start..start + len.min(PERIOD)]
    }

    /// Whether `bytes` are what is at `offset`.
    pub(super) fn is(&self, mut offset: u64, bytes: &[u8]) -> bool {
        bytes.chunks(PERIOD).all(|chunk| {
            let same = self.at(offset, chunk.len()) == chunk;
            offset += chunk.len() as u64;
            same
        })
    }
}

/// The addresses that the servers need.
pub(super) fn addresses() -> [IpAddr; 4] {
    [WEB.into(), WEB_V6.into(), NAMES.into(), STREAM.into()]
}

/// Starts the servers on those of their addresses that are there, on threads that go with the process.
pub(super) fn start(addresses: &[IpAddr]) -> io::Result<()> {
    for &address in addresses {
        if address == NAMES {
            let socket = UdpSocket::bind((address, DNS))?;
            std::thread::spawn(move || serve_names(&socket));
        } else if address == STREAM {
            serve(SocketAddr::new(address, HTTP), send_slowly)?;
        } else {
            serve(SocketAddr::new(address, HTTP), send_page)?;
            serve(SocketAddr::new(address, BULK), send_fast)?;
        }
    }
    Ok(())
}

fn serve(address: SocketAddr, answer: fn(TcpStream) -> io::Result<()>) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            // Clients go when they have seen enough.
            std::thread::spawn(move || answer(stream));
        }
    });
    Ok(())
}

fn send_page(mut stream: TcpStream) -> io::Result<()> {
    let request = BufReader::new(stream.try_clone()?);
    for line in request.lines() {
        if line?.is_empty() {
            break;
        }
    }
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {PAGE_LEN}\r\nConnection: close\r\n\r\n"
    )?;
    let pattern = Pattern::new();
    let mut sent = 0;
    while sent < PAGE_LEN {
        let part = pattern.at(sent as u64, PAGE_LEN - sent);
        stream.write_all(part)?;
        sent += part.len();
    }
    Ok(())
}

fn send_slowly(stream: TcpStream) -> io::Result<()> {
    send_pattern(stream, || std::thread::sleep(PACE))
}

fn send_fast(stream: TcpStream) -> io::Result<()> {
    send_pattern(stream, || ())
}

fn send_pattern(mut stream: TcpStream, pause: impl Fn()) -> io::Result<()> {
    let pattern = Pattern::new();
    let mut sent = 0;
    loop {
        let part = pattern.at(sent, PERIOD);
        stream.write_all(part)?;
        sent += part.len() as u64;
        pause();
    }
}

/// Answers every question with the web server's address (RFC 1035).
fn serve_names(socket: &UdpSocket) {
    let mut query = [0; 512];
    while let Ok((len, client)) = socket.recv_from(&mut query) {
        let mut answer = query[..len].to_vec();
        if len < 12 {
            continue;
        }
        answer[2..4].copy_from_slice(&[0x81, 0x80]); // a response, and no error
        answer[6..8].copy_from_slice(&[0, 1]); // one answer
        // The question's name, type A, class IN, for a minute, four bytes long.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(WEB.octets());
        let _ = socket.send_to(&answer, client); // a lost answer is asked for again
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_known_at_every_offset_and_notices_losses() {
        let pattern = Pattern::new();
        let whole: Vec<u8> = (0..4)
            .flat_map(|part| pattern.at(part * PERIOD as u64, PERIOD).to_vec())
            .collect();
        assert!(pattern.is(0, &whole));
        assert!(pattern.is(70_000, &whole[70_000..]));
        for lost in [1, 1448, 1460, 65_536] {
            assert!(!pattern.is(1000, &whole[1000 + lost..]), "{lost}");
        }
    }
}
