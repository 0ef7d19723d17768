//! Sockets towards upstreams: mark, interface and source address, before anything is sent.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};
use tungate_config::{SocketOptions, Source};

/// How sockets towards upstreams are set up.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct SocketSetup {
    /// SO_MARK: what keeps the appliance's own packets out of its device.
    mark: Option<u32>,
    /// SO_BINDTODEVICE.
    interface: Option<String>,
    source: Source,
}

impl SocketSetup {
    /// Sockets that differ from others by `mark` only.
    pub(crate) fn marked(mark: Option<u32>) -> Self {
        Self {
            mark,
            ..Self::default()
        }
    }

    /// Sockets of a configured egress; where it asks for no mark, they have `mark`.
    pub(crate) fn of(options: &SocketOptions, mark: Option<u32>) -> Self {
        Self {
            mark: options.mark.or(mark),
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
        kind: Type,
        protocol: Option<Protocol>,
        target: IpAddr,
        client: Option<IpAddr>,
    ) -> io::Result<Socket> {
        let is_ipv4 = target.is_ipv4();
        let domain = if is_ipv4 { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, kind.nonblocking().cloexec(), protocol)?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark)?;
        }
        if let Some(interface) = &self.interface {
            socket.bind_device(Some(interface.as_bytes()))?;
        }
        let source = match self.source {
            Source::Host => return Ok(socket),
            Source::Address(address) => address,
            Source::Client => {
                if is_ipv4 {
                    socket.set_ip_transparent_v4(true)?;
                } else {
                    socket.set_ip_transparent_v6(true)?;
                }
                client.unwrap_or(unspecified(is_ipv4))
            }
        };
        if source.is_ipv4() != is_ipv4 {
            return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT));
        }
        socket.bind(&SocketAddr::new(source, 0).into())?;
        Ok(socket)
    }
}

/// 0.0.0.0 or ::.
pub(crate) fn unspecified(is_ipv4: bool) -> IpAddr {
    if is_ipv4 {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    }
}
