//! Which engine owns a packet: a pure function, so that every queue of the device and every driver agree.
//!
//! TCP goes by its 4-tuple, the same in both directions. UDP goes by the client's endpoint alone, since one mapping
//! serves all its targets (RFC 4787, REQ-1). ICMP goes by the pair of addresses, in either order, and so do
//! fragments, whose ports may lie elsewhere: what one shard has put together it hands to the owner of the whole
//! ([`World::forward`](crate::io::World::forward)). An ICMP error goes where the packet it quotes belongs.
//!
//! The hash has no secret, so that replays agree everywhere; clients could aim at one shard, which then refuses
//! work at its limits.

use std::net::{IpAddr, SocketAddr};

use crate::addr::ShardId;
use crate::packet::{PacketView, QuotedPacket};

/// The shard, of `shards`, that owns a packet from a client.
pub fn owner(packet: &PacketView<'_>, shards: u8) -> ShardId {
    if shards <= 1 {
        return ShardId(0);
    }
    let (source, destination) = (packet.source(), packet.destination());
    let hash = match (packet.protocol(), packet.ports()) {
        (Some(6), Some((from, to))) => pair(endpoint(source, from), endpoint(destination, to)),
        (Some(17), Some((from, _))) => endpoint(source, from),
        _ => match packet.quoted() {
            Some(quoted) => hash_of_quoted(&quoted),
            None => pair(endpoint(source, 0), endpoint(destination, 0)),
        },
    };
    among(hash, shards)
}

/// The shard that owns the TCP connection between `a` and `b`, in either order.
pub fn owner_of_tcp(a: SocketAddr, b: SocketAddr, shards: u8) -> ShardId {
    among(
        pair(endpoint(a.ip(), a.port()), endpoint(b.ip(), b.port())),
        shards,
    )
}

/// The shard that owns the UDP mapping of the endpoint `client`.
pub fn owner_of_udp_client(client: SocketAddr, shards: u8) -> ShardId {
    among(endpoint(client.ip(), client.port()), shards)
}

/// A quoted packet is one that we sent: its destination is the client.
fn hash_of_quoted(quoted: &QuotedPacket) -> u64 {
    match (quoted.protocol, quoted.ports) {
        (6, Some((source, destination))) => pair(
            endpoint(quoted.source, source),
            endpoint(quoted.destination, destination),
        ),
        (17, Some((_, destination))) => endpoint(quoted.destination, destination),
        _ => pair(endpoint(quoted.source, 0), endpoint(quoted.destination, 0)),
    }
}

fn endpoint(address: IpAddr, port: u16) -> u64 {
    let (high, low) = match address {
        IpAddr::V4(address) => (0, u64::from(address.to_bits())),
        IpAddr::V6(address) => ((address.to_bits() >> 64) as u64, address.to_bits() as u64),
    };
    mix(mix(high ^ u64::from(port) << 48 ^ u64::from(address.is_ipv6())) ^ low)
}

/// The same for `a` and `b` in either order.
fn pair(a: u64, b: u64) -> u64 {
    mix(a.wrapping_add(b))
}

/// The finalizer of SplitMix64: each bit of the input changes about half the bits of the output.
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

fn among(hash: u64, shards: u8) -> ShardId {
    ShardId((((hash >> 32) * u64::from(shards.max(1))) >> 32) as u8)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use etherparse::PacketBuilder;

    use proptest::prelude::*;

    use super::*;
    use crate::io::{IcmpError, Unreachable};
    use crate::packet::{Datagram, Echo};

    const SHARDS: u8 = 16;

    proptest! {
        #[test]
        fn both_directions_of_a_tcp_connection_have_one_owner(
            client: SocketAddr, target_ip: IpAddr, target_port: u16,
        ) {
            let target = same_version(client, target_ip, target_port);
            prop_assert_eq!(owner_of(&tcp(client, target)), owner_of(&tcp(target, client)));
        }

        #[test]
        fn a_udp_client_has_one_owner_whatever_the_target(client: SocketAddr, target_ip: IpAddr, target_port: u16) {
            let target = same_version(client, target_ip, target_port);
            prop_assert_eq!(owner_of(&udp(client, target)), owner_of_udp_client(client, SHARDS));
        }

        #[test]
        fn an_icmp_error_goes_to_the_owner_of_what_it_quotes(
            client: SocketAddr, target_ip: IpAddr, target_port: u16, reporter: IpAddr,
        ) {
            let target = same_version(client, target_ip, target_port);
            let reporter = same_version(client, reporter, 0).ip();
            let error = |sent: &[u8]| {
                let unreachable = IcmpError::Unreachable(Unreachable::Port);
                write(&Datagram::icmp_error(reporter, target.ip(), unreachable, sent).unwrap())
            };
            prop_assert_eq!(owner_of(&error(&tcp(target, client))), owner_of(&tcp(client, target)));
            prop_assert_eq!(owner_of(&error(&udp(target, client))), owner_of(&udp(client, target)));
            prop_assert_eq!(owner_of(&error(&ping(target.ip(), client.ip()))), owner_of(&ping(client.ip(), target.ip())));
        }
    }

    #[test]
    fn connections_spread_evenly() {
        let mut counts = [0; SHARDS as usize];
        let target: SocketAddr = "192.0.2.7:443".parse().unwrap();
        for host in 0..64 {
            for port in 40_000..40_250 {
                let client = SocketAddr::new(Ipv4Addr::new(10, 0, 0, host).into(), port);
                counts[usize::from(owner_of(&tcp(client, target)).0)] += 1;
            }
        }
        // 16,000 connections, 1000 to a shard; the standard deviation of a fair choice is 31.
        assert!(
            counts.iter().all(|count| (850..1150).contains(count)),
            "{counts:?}"
        );
    }

    fn owner_of(packet: &[u8]) -> ShardId {
        owner(&PacketView::parse(packet).unwrap(), SHARDS)
    }

    fn same_version(like: SocketAddr, ip: IpAddr, port: u16) -> SocketAddr {
        let ip = match (like, ip) {
            (SocketAddr::V4(_), IpAddr::V6(ip)) => Ipv4Addr::from_bits(ip.to_bits() as u32).into(),
            (SocketAddr::V6(_), IpAddr::V4(ip)) => ip.to_ipv6_compatible().into(),
            _ => ip,
        };
        SocketAddr::new(ip, port)
    }

    fn tcp(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
        let mut packet = Vec::new();
        match (source.ip(), destination.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 64)
                .tcp(source.port(), destination.port(), 0, 0)
                .write(&mut packet, &[]),
            (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64)
                .tcp(source.port(), destination.port(), 0, 0)
                .write(&mut packet, &[]),
            _ => panic!("one version"),
        }
        .unwrap();
        packet
    }

    fn udp(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
        write(&Datagram::udp(source, destination, b"data", None).unwrap())
    }

    fn ping(source: IpAddr, destination: IpAddr) -> Vec<u8> {
        write(
            &Datagram::echo_request(
                source,
                destination,
                Echo {
                    identifier: 1,
                    sequence: 1,
                    payload: &[],
                },
            )
            .unwrap(),
        )
    }

    fn write(datagram: &Datagram<'_>) -> Vec<u8> {
        let mut packet = vec![0; datagram.packet_len()];
        datagram.write(&mut packet, 1, crate::IngressId(0), None);
        packet
    }
}
