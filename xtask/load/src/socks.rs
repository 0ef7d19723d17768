//! SOCKS5 (RFC 1928) as a server: CONNECT and UDP ASSOCIATE to addresses, without a login.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::events::would_block;

/// The answer to a request that is granted; the address is of no use to the client.
pub(crate) const GRANTED: &[u8] = &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0];

/// How long an association lives without datagrams.
const IDLE: Duration = Duration::from_secs(60);

/// What a client has said so far.
#[derive(Default)]
pub(crate) struct Request {
    heard: Vec<u8>,
    is_greeted: bool,
}

pub(crate) enum Wish {
    Connect { target: SocketAddr, early: Vec<u8> },
    Associate,
}

impl Request {
    /// Reads what there is, and greets; `None` until the client's wish is known.
    ///
    /// # Errors
    ///
    /// If the client is gone, or wants what is not served here.
    pub(crate) fn hear(&mut self, client: &mut TcpStream) -> Result<Option<Wish>> {
        let mut buffer = [0; 512];
        loop {
            match client.read(&mut buffer) {
                Ok(0) => bail!("the client has left"),
                Ok(count) => self.heard.extend_from_slice(&buffer[..count]),
                Err(error) if would_block(&error) => break,
                Err(error) => return Err(error.into()),
            }
        }
        if !self.is_greeted {
            let [5, methods, rest @ ..] = &self.heard[..] else {
                return Ok(None);
            };
            let Some((_, rest)) = rest.split_at_checked(usize::from(*methods)) else {
                return Ok(None);
            };
            self.heard = rest.to_vec();
            self.is_greeted = true;
            client.write_all(&[5, 0])?;
        }
        let [5, command, _, rest @ ..] = &self.heard[..] else {
            return Ok(None);
        };
        let Some((target, rest)) = read_address(rest)? else {
            return Ok(None);
        };
        match command {
            1 => Ok(Some(Wish::Connect {
                target,
                early: rest.to_vec(),
            })),
            3 => Ok(Some(Wish::Associate)),
            _ => bail!("command {command} is not served"),
        }
    }
}

/// Reads an address as requests and datagrams have it; `None` if more bytes have to come.
fn read_address(bytes: &[u8]) -> Result<Option<(SocketAddr, &[u8])>> {
    let Some((&kind, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    let length = match kind {
        1 => 4,
        4 => 16,
        _ => bail!("address type {kind} is not served"),
    };
    let Some((address, rest)) = rest.split_at_checked(length + 2) else {
        return Ok(None);
    };
    let (address, port) = address.split_at(length);
    let address = match <[u8; 4]>::try_from(address) {
        Ok(octets) => IpAddr::V4(Ipv4Addr::from(octets)),
        Err(_) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(address)?)),
    };
    let port = u16::from_be_bytes([port[0], port[1]]);
    Ok(Some((SocketAddr::new(address, port), rest)))
}

fn write_address(bytes: &mut Vec<u8>, address: SocketAddr) {
    match address.ip() {
        IpAddr::V4(address) => {
            bytes.push(1);
            bytes.extend(address.octets());
        }
        IpAddr::V6(address) => {
            bytes.push(4);
            bytes.extend(address.octets());
        }
    }
    bytes.extend(address.port().to_be_bytes());
}

/// Starts to relay a client's datagrams, and tells it where to send them.
pub(crate) fn associate(client: &mut TcpStream) -> Result<()> {
    let relay = UdpSocket::bind((client.local_addr()?.ip().to_canonical(), 0))?;
    let mut answer = vec![5, 0, 0];
    write_address(&mut answer, relay.local_addr()?);
    client.write_all(&answer)?;
    relay.set_read_timeout(Some(IDLE))?;
    thread::spawn(move || {
        let _ = relay_datagrams(&Arc::new(relay)); // ends when it has been idle
    });
    Ok(())
}

/// Sends the client's datagrams on, each target's by a socket of its own whose answers a thread takes back.
fn relay_datagrams(relay: &Arc<UdpSocket>) -> Result<()> {
    let mut targets: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let current = Arc::new(Mutex::new(None));
    let mut buffer = vec![0; 64 << 10];
    loop {
        let (count, client) = relay.recv_from(&mut buffer)?;
        *current.lock().expect("no thread panics with it") = Some(client);
        let [0, 0, 0, rest @ ..] = &buffer[..count] else {
            continue;
        };
        let Some((target, payload)) = read_address(rest)? else {
            continue;
        };
        let socket = match targets.get(&target) {
            Some(socket) => socket,
            None => {
                ensure!(targets.len() < 1000, "too many targets");
                let any: IpAddr = if target.is_ipv4() {
                    Ipv4Addr::UNSPECIFIED.into()
                } else {
                    Ipv6Addr::UNSPECIFIED.into()
                };
                let socket = Arc::new(UdpSocket::bind((any, 0))?);
                socket.connect(target)?;
                socket.set_read_timeout(Some(IDLE))?;
                let (answers, relay, current) = (socket.clone(), relay.clone(), current.clone());
                thread::spawn(move || {
                    let client = || *current.lock().expect("no thread panics with it");
                    let _ = return_datagrams(&answers, target, &relay, client);
                });
                targets.entry(target).or_insert(socket)
            }
        };
        // A datagram that cannot be sent is lost, as datagrams may be.
        let _ = socket.send(payload);
    }
}

fn return_datagrams(
    socket: &UdpSocket,
    target: SocketAddr,
    relay: &UdpSocket,
    client: impl Fn() -> Option<SocketAddr>,
) -> io::Result<()> {
    let mut header = vec![0, 0, 0];
    write_address(&mut header, target);
    let start = header.len();
    let mut buffer = vec![0; 64 << 10];
    buffer[..start].copy_from_slice(&header);
    loop {
        match socket.recv(&mut buffer[start..]) {
            Ok(count) => {
                if let Some(client) = client() {
                    let _ = relay.send_to(&buffer[..start + count], client);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        }
    }
}
