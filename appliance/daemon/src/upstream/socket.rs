//! Sockets towards upstreams: mark, interface and source address, before anything is sent.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use tungate_config::{SocketOptions, Source};

use super::stock::{Broker, Stock};

/// How sockets towards upstreams are set up.
#[derive(Debug, Default)]
pub(crate) struct SocketSetup {
    origin: Origin,
    /// SO_BINDTODEVICE, which takes no privilege on a socket without an interface (Linux 5.7).
    interface: Option<String>,
    source: Source,
}

/// Where sockets come from.
#[derive(Debug)]
enum Origin {
    /// This process opens them.
    Own(Privileges),
    /// A privileged process has opened them.
    Stock(Arc<Stock>),
}

/// What of a socket's set-up takes a privilege.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub(crate) struct Privileges {
    /// SO_MARK.
    pub(crate) mark: Option<u32>,
    /// IP_TRANSPARENT, which allows source addresses that are not the host's.
    pub(crate) transparent: bool,
}

/// What a socket is to carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Transport {
    Tcp,
    Udp,
    /// Echo requests and replies of ICMP or ICMPv6, sorted by the kernel.
    Ping,
    /// All of ICMP or ICMPv6.
    RawPing,
}

impl Default for Origin {
    fn default() -> Self {
        Self::Own(Privileges::default())
    }
}

impl Privileges {
    /// What sockets of a configured egress need; where it asks for no mark, they have `mark`.
    pub(crate) fn of(options: &SocketOptions, mark: Option<u32>) -> Self {
        Self {
            mark: options.mark.or(mark),
            transparent: options.source == Source::Client,
        }
    }
}

impl SocketSetup {
    /// Sockets of a configured egress. They come from `broker`, with its mark where none is asked for; without a broker
    /// they are opened here.
    pub(crate) fn of(options: &SocketOptions, broker: Option<&Arc<Broker>>) -> Self {
        let origin = match broker {
            None => Origin::Own(Privileges::of(options, None)),
            Some(broker) => Origin::Stock(broker.stock(Privileges::of(options, Some(broker.mark())))),
        };
        Self {
            origin,
            interface: options.interface.clone(),
            source: options.source,
        }
    }

    /// Opens a socket that does not block, of the address family of `target`, on behalf of `client`.
    ///
    /// # Errors
    ///
    /// The system's: EPERM where a mark or a foreign address needs a privilege, ENODEV for an interface that is not
    /// there, EADDRNOTAVAIL for an address of another host or family.
    pub(crate) fn open(
        &self,
        transport: Transport,
        target: IpAddr,
        client: Option<IpAddr>,
    ) -> io::Result<Socket> {
        let is_ipv4 = target.is_ipv4();
        let socket = match &self.origin {
            Origin::Own(privileges) => open(*privileges, transport, is_ipv4)?,
            Origin::Stock(stock) => stock.take(transport, is_ipv4)?,
        };
        if let Some(interface) = &self.interface {
            socket.bind_device(Some(interface.as_bytes()))?;
        }
        let source = match self.source {
            Source::Host => return Ok(socket),
            Source::Address(address) => address,
            Source::Client => client.unwrap_or(unspecified(is_ipv4)),
        };
        if source.is_ipv4() != is_ipv4 {
            return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
        }
        socket.bind(&SocketAddr::new(source, 0).into())?;
        Ok(socket)
    }
}

/// Opens a socket that does not block.
///
/// # Errors
///
/// The system's: EPERM without the privileges.
pub(crate) fn open(privileges: Privileges, transport: Transport, is_ipv4: bool) -> io::Result<Socket> {
    let domain = if is_ipv4 { Domain::IPV4 } else { Domain::IPV6 };
    let icmp = if is_ipv4 {
        Protocol::ICMPV4
    } else {
        Protocol::ICMPV6
    };
    let (kind, protocol) = match transport {
        Transport::Tcp => (Type::STREAM, None),
        Transport::Udp => (Type::DGRAM, None),
        Transport::Ping => (Type::DGRAM, Some(icmp)),
        Transport::RawPing => (Type::RAW, Some(icmp)),
    };
    let socket = Socket::new(domain, kind.nonblocking().cloexec(), protocol)?;
    if let Some(mark) = privileges.mark {
        socket.set_mark(mark)?;
    }
    if privileges.transparent {
        if is_ipv4 {
            socket.set_ip_transparent_v4(true)?;
        } else {
            socket.set_ip_transparent_v6(true)?;
        }
    }
    Ok(socket)
}

/// 0.0.0.0 or ::.
pub(crate) fn unspecified(is_ipv4: bool) -> IpAddr {
    if is_ipv4 {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    }
}
