//! What conversations are found by.

use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};

/// What a conversation is found by: its endpoints as numbers, which are compared and hashed at one go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    addresses: (u128, u128),
    /// Ports, and what the endpoints have in common.
    rest: u64,
}

impl Key {
    /// Of both directions, and whether `one` comes first in it.
    #[inline]
    pub(super) fn tcp(one: (IpAddr, u16), other: (IpAddr, u16)) -> (Self, bool) {
        let (one, other) = ((number(one.0), one.1), (number(other.0), other.1));
        if one <= other {
            (Self::new(1, one, other), true)
        } else {
            (Self::new(1, other, one), false)
        }
    }

    pub(super) fn udp(client: SocketAddr, target: SocketAddr) -> Self {
        let end = |address: SocketAddr| (number(address.ip()), address.port());
        Self::new(2, end(client), end(target))
    }

    /// The client's port is the identifier.
    pub(super) fn echo(client: SocketAddr, target: IpAddr) -> Self {
        Self::new(3, (number(client.ip()), client.port()), (number(target), 0))
    }

    /// Of both directions.
    pub(super) fn pair(one: IpAddr, other: IpAddr, protocol: u8) -> Self {
        let (low, high) = sorted(one, other);
        Self::new(4, (number(low), protocol.into()), (number(high), 0))
    }

    pub(super) fn new(
        kind: u64,
        (first, first_port): (u128, u16),
        (second, second_port): (u128, u16),
    ) -> Self {
        Self {
            addresses: (first, second),
            rest: kind << 32 | u64::from(first_port) << 16 | u64::from(second_port),
        }
    }

    pub(super) fn is_tcp(&self) -> bool {
        self.rest >> 32 == 1
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u128(self.addresses.0);
        state.write_u128(self.addresses.1);
        state.write_u64(self.rest);
    }
}

/// An address as a number. IPv4 addresses stand where no IPv6 address does that could be on a network: those that begin
/// with zeros and `0xfffe` are not assigned.
pub(super) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => 0xfffe_0000_0000 | u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

pub(super) fn sorted(a: IpAddr, b: IpAddr) -> (IpAddr, IpAddr) {
    (a.min(b), a.max(b))
}
