//! Addresses between the standard library's types and the system's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use nix::sys::socket::SockaddrStorage;

/// The internet address in `storage`, if it holds one.
pub(crate) fn from_storage(storage: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = storage.as_sockaddr_in() {
        return Some(SocketAddrV4::new(v4.ip(), v4.port()).into());
    }
    let v6 = storage.as_sockaddr_in6()?;
    Some(SocketAddrV6::new(v6.ip(), v6.port(), v6.flowinfo(), v6.scope_id()).into())
}

/// The address alone.
pub(crate) fn ip_of_v4(address: &libc::sockaddr_in) -> IpAddr {
    Ipv4Addr::from_bits(u32::from_be(address.sin_addr.s_addr)).into()
}

/// The address alone.
pub(crate) fn ip_of_v6(address: &libc::sockaddr_in6) -> IpAddr {
    Ipv6Addr::from(address.sin6_addr.s6_addr).into()
}
