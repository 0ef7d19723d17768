use std::net::Ipv4Addr;

use etherparse::{IpNumber, PacketBuilder};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

const TCP: u8 = 6;
const UDP: u8 = 17;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const ESP: u8 = 50;
const AUTHENTICATION: u8 = 51;
const NO_NEXT_HEADER: u8 = 59;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;

proptest! {
    #[test]
    fn no_bytes_panic(mut bytes in vec(any::<u8>(), 0..200), version in prop_oneof![Just(4u8), Just(6)]) {
        if let Some(first) = bytes.first_mut() {
            *first = version << 4 | if version == 4 { 5 + *first % 2 } else { *first & 15 };
        }
        look_at_everything(&bytes);
    }

    #[test]
    fn no_damaged_packet_panics(
        kind in 0..SAMPLES,
        damage in vec((any::<Index>(), any::<u8>()), 0..6),
        cut: Index,
    ) {
        let mut packet = sample(kind);
        for (at, byte) in damage {
            let at = at.index(packet.len());
            packet[at] = byte;
        }
        look_at_everything(&packet);
        look_at_everything(&packet[..cut.index(packet.len() + 1)]);
    }

    #[test]
    fn ipv4_fields_are_those_that_were_built(
        source: [u8; 4], destination: [u8; 4], ttl: u8, ports: (u16, u16), payload in vec(any::<u8>(), 0..50),
    ) {
        let mut packet = Vec::new();
        PacketBuilder::ipv4(source, destination, ttl).udp(ports.0, ports.1).write(&mut packet, &payload).unwrap();
        let view = PacketView::parse(&packet).unwrap();
        prop_assert_eq!(view.source(), IpAddr::from(source));
        prop_assert_eq!(view.destination(), IpAddr::from(destination));
        prop_assert_eq!(view.hop_limit(), ttl);
        prop_assert_eq!(view.protocol(), Some(UDP));
        prop_assert_eq!(view.port(), Some(ports.1));
        prop_assert_eq!(view.ports(), Some(ports));
        prop_assert_eq!(view.transport_offset(), 20);
        prop_assert_eq!(view.bytes(), &packet[..]);
        prop_assert_eq!(view.fragment(), None);
        prop_assert_eq!(view.verify_ip_checksum(), Ok(()));
        if ports.0 != 0 && ports.1 != 0 {
            prop_assert_eq!(view.verify_transport_checksum(&view.transport().unwrap()), Ok(()));
        }
    }

    #[test]
    fn ipv6_fields_are_those_that_were_built(
        source: [u8; 16], destination: [u8; 16], hop_limit: u8, ports: (u16, u16), payload in vec(any::<u8>(), 0..50),
    ) {
        let mut packet = Vec::new();
        PacketBuilder::ipv6(source, destination, hop_limit)
            .tcp(ports.0, ports.1, 1, 2)
            .ack(3)
            .write(&mut packet, &payload)
            .unwrap();
        let view = PacketView::parse(&packet).unwrap();
        prop_assert_eq!(view.source(), IpAddr::from(source));
        prop_assert_eq!(view.destination(), IpAddr::from(destination));
        prop_assert_eq!(view.hop_limit(), hop_limit);
        prop_assert_eq!(view.protocol(), Some(TCP));
        prop_assert_eq!(view.ports(), Some(ports));
        prop_assert_eq!(view.transport_offset(), 40);
        prop_assert!(view.dont_fragment());
        if ports.0 != 0 && ports.1 != 0 {
            prop_assert_eq!(view.verify_transport_checksum(&view.transport().unwrap()), Ok(()));
        }
    }
}

#[test]
fn ip_header_shorter_than_it_says_is_refused() {
    let packet = v4(UDP, &udp(53));
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut packet = packet.clone();
        change(&mut packet);
        PacketView::parse(&packet).map(|_| ()).unwrap_err()
    };
    assert_eq!(PacketView::parse(&[]).unwrap_err(), DropReason::IpHeader);
    assert_eq!(refused(&|packet| packet.truncate(19)), DropReason::IpHeader);
    assert_eq!(refused(&|packet| packet[0] = 0x55), DropReason::IpHeader);
    assert_eq!(refused(&|packet| packet[0] = 0x44), DropReason::IpHeader);
    assert_eq!(refused(&|packet| packet[0] = 0x4f), DropReason::IpHeader);
    assert_eq!(
        PacketView::parse(&v6(UDP, &[])[..39]).unwrap_err(),
        DropReason::IpHeader
    );
}

#[test]
fn ip_length_that_contradicts_the_bytes_is_refused() {
    for total in [0, 19, 29] {
        let mut packet = v4(UDP, &udp(53));
        packet[2..4].copy_from_slice(&u16::to_be_bytes(total));
        assert_eq!(
            PacketView::parse(&packet).unwrap_err(),
            DropReason::IpLength,
            "{total}"
        );
    }
    let mut packet = v6(UDP, &udp(53));
    packet[5] += 1;
    assert_eq!(PacketView::parse(&packet).unwrap_err(), DropReason::IpLength);
    // A jumbogram says 0 and has a hop-by-hop header; without one, 0 is an empty packet.
    let mut packet = v6(HOP_BY_HOP, &chain(&[HOP_BY_HOP], UDP, &udp(53)));
    packet[4..6].fill(0);
    assert_eq!(PacketView::parse(&packet).unwrap_err(), DropReason::IpLength);
    assert_eq!(walked(&v6(UDP, &[])), Ok((Some(UDP), None)));
}

#[test]
fn bytes_behind_the_ip_length_are_no_part_of_the_packet() {
    for packet in [v4(UDP, &udp(53)), v6(UDP, &udp(53))] {
        let padded = [&packet[..], &[0xff; 18]].concat();
        assert_eq!(PacketView::parse(&padded).unwrap().bytes(), packet);
    }
}

#[test]
fn port_must_lie_inside_the_ip_length() {
    let port_at = |len: u16| {
        let mut packet = v4(UDP, &udp(53));
        packet[2..4].copy_from_slice(&(20 + len).to_be_bytes());
        walked(&packet)
    };
    assert_eq!(port_at(3), Ok((Some(UDP), None)));
    assert_eq!(port_at(4), Ok((Some(UDP), Some(53))));
    assert_eq!(walked(&v6(UDP, &udp(53)[..3])), Ok((Some(UDP), None)));
}

#[test]
fn extension_headers_are_walked_in_any_order() {
    let order = [DESTINATION_OPTIONS, HOP_BY_HOP, AUTHENTICATION, ROUTING, MOBILITY];
    assert_eq!(
        walked(&v6(order[0], &chain(&order, UDP, &udp(53)))),
        Ok((Some(UDP), Some(53)))
    );
}

#[test]
fn seventh_extension_header_is_too_many() {
    let six = chain(&[DESTINATION_OPTIONS; 6], UDP, &udp(53));
    assert_eq!(walked(&v6(DESTINATION_OPTIONS, &six)), Ok((Some(UDP), Some(53))));
    let seven = chain(&[DESTINATION_OPTIONS; 7], UDP, &udp(53));
    assert_eq!(
        walked(&v6(DESTINATION_OPTIONS, &seven)),
        Err(DropReason::ExtensionHeader)
    );
    let with_fragment = chain(
        &[DESTINATION_OPTIONS; 6],
        FRAGMENT,
        &fragment(0, false, UDP, &udp(53)),
    );
    assert_eq!(
        walked(&v6(DESTINATION_OPTIONS, &with_fragment)),
        Err(DropReason::ExtensionHeader)
    );
}

#[test]
fn extension_header_that_is_cut_is_refused() {
    for kind in [HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS, MOBILITY] {
        assert_eq!(
            walked(&v6(kind, &[UDP, 0, 0, 0, 0, 0, 0])),
            Err(DropReason::ExtensionHeader),
            "{kind}"
        );
        assert_eq!(
            walked(&v6(kind, &[UDP, 1, 0, 0, 0, 0, 0, 0])),
            Err(DropReason::ExtensionHeader),
            "{kind}"
        );
    }
    assert_eq!(
        walked(&v6(FRAGMENT, &[UDP, 0, 0, 0, 0, 0, 0])),
        Err(DropReason::ExtensionHeader)
    );
    assert_eq!(
        walked(&v6(AUTHENTICATION, &[UDP])),
        Err(DropReason::ExtensionHeader)
    );
    assert_eq!(
        walked(&v6(AUTHENTICATION, &[UDP, 4, 0, 0, 0, 0, 0, 0])),
        Err(DropReason::ExtensionHeader)
    );
}

#[test]
fn authentication_header_counts_in_units_of_four_bytes() {
    for units in [0u8, 1, 4] {
        let mut payload = vec![0; (usize::from(units) + 2) * 4];
        payload[..2].copy_from_slice(&[UDP, units]);
        payload.extend(udp(53));
        assert_eq!(
            walked(&v6(AUTHENTICATION, &payload)),
            Ok((Some(UDP), Some(53))),
            "{units}"
        );
    }
    // Over IPv4 it is a protocol like any other.
    assert_eq!(
        walked(&v4(AUTHENTICATION, &chain(&[AUTHENTICATION], UDP, &udp(53)))),
        Ok((Some(51), None))
    );
}

#[test]
fn other_protocols_have_no_port() {
    for protocol in [ESP, NO_NEXT_HEADER, 47, 58, 132, 255] {
        assert_eq!(walked(&v6(protocol, &udp(53))), Ok((Some(protocol), None)));
        assert_eq!(walked(&v4(protocol, &udp(53))), Ok((Some(protocol), None)));
        let packet = v6(protocol, &udp(53));
        let transport = PacketView::parse(&packet).unwrap().transport();
        assert_eq!(transport.is_err(), protocol != 58);
    }
}

#[test]
fn icmp_belongs_to_ipv4_and_icmpv6_to_ipv6() {
    let echo = [8, 0, 0, 0, 0, 0, 0, 0];
    let of = |packet: Vec<u8>| {
        PacketView::parse(&packet)
            .unwrap()
            .transport()
            .map(|_| ())
            .unwrap_err()
    };
    assert_eq!(of(v6(1, &echo)), DropReason::UnsupportedProtocol);
    assert_eq!(of(v4(58, &echo)), DropReason::UnsupportedProtocol);
}

#[test]
fn only_the_first_ipv4_fragment_has_a_port() {
    let mut packet = v4(UDP, &[udp(53), vec![0; 8]].concat());
    packet[4..6].copy_from_slice(&[0xab, 0xcd]);
    packet[6] = 0x20; // more fragments
    let view = PacketView::parse(&packet).unwrap();
    assert_eq!((view.protocol(), view.port()), (Some(UDP), Some(53)));
    assert_eq!(
        view.fragment(),
        Some(FragmentView {
            offset: 0,
            more: true,
            identification: 0xabcd,
            payload: &packet[20..],
            next_header: UDP,
            headers: &packet[..20],
            next_header_at: 9,
        })
    );
    assert_eq!(view.transport().unwrap_err(), DropReason::ExtensionHeader);

    packet[6..8].copy_from_slice(&[0, 3]);
    let view = PacketView::parse(&packet).unwrap();
    assert_eq!(
        (view.protocol(), view.port(), view.ports()),
        (Some(UDP), None, None)
    );
    assert_eq!(
        view.fragment().map(|fragment| (fragment.offset, fragment.more)),
        Some((24, false))
    );
}

#[test]
fn ipv6_fragments_are_walked_as_far_as_they_can_be() {
    // The first goes on to the transport header.
    let packet = v6(
        HOP_BY_HOP,
        &chain(&[HOP_BY_HOP], FRAGMENT, &fragment(0, true, UDP, &udp(53))),
    );
    let view = PacketView::parse(&packet).unwrap();
    assert_eq!((view.protocol(), view.port()), (Some(UDP), Some(53)));
    assert_eq!(
        view.fragment(),
        Some(FragmentView {
            offset: 0,
            more: true,
            identification: 0x0102_0304,
            payload: &udp(53),
            next_header: UDP,
            headers: &packet[..48],
            next_header_at: 40, // in the hop-by-hop header
        })
    );
    // Later ones stop, with the protocol if it stands in the fragment header.
    assert_eq!(
        walked(&v6(FRAGMENT, &fragment(8, true, UDP, &udp(53)))),
        Ok((Some(UDP), None))
    );
    assert_eq!(
        walked(&v6(FRAGMENT, &fragment(8, false, ROUTING, &udp(53)))),
        Ok((None, None))
    );
    assert_eq!(
        walked(&v6(FRAGMENT, &fragment(8, false, ESP, &udp(53)))),
        Ok((Some(ESP), None))
    );
}

#[test]
fn atomic_fragment_is_a_whole_packet() {
    let packet = v6(FRAGMENT, &fragment(0, false, UDP, &udp(53)));
    let view = PacketView::parse(&packet).unwrap();
    assert_eq!(
        (view.protocol(), view.port(), view.fragment()),
        (Some(UDP), Some(53), None)
    );
    assert!(matches!(view.transport(), Ok(Transport::Udp(_))));
    // And it may carry a fragment that is none.
    let nested = fragment(0, false, FRAGMENT, &fragment(8, false, UDP, &udp(53)));
    let packet = v6(FRAGMENT, &nested);
    let view = PacketView::parse(&packet).unwrap();
    let next_header_at = view
        .fragment()
        .map(|fragment| (fragment.offset, fragment.next_header_at));
    assert_eq!(next_header_at, Some((8, 40)));
}

#[test]
fn ipv4_header_checksum_is_verified() {
    // The header that Wikipedia's article on the IPv4 header checksum works out by hand, with its checksum b861.
    let mut packet = [
        0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0x00, 0x01, 0xc0,
        0xa8, 0x00, 0xc7,
    ]
    .to_vec();
    packet.resize(0x73, 0);
    let view = PacketView::parse(&packet).unwrap();
    assert_eq!(view.verify_ip_checksum(), Ok(()));
    assert!(view.dont_fragment());
    packet[11] ^= 1;
    assert_eq!(
        PacketView::parse(&packet).unwrap().verify_ip_checksum(),
        Err(DropReason::IpChecksum)
    );
}

#[test]
fn wrong_transport_checksums_are_found() {
    for (kind, reason) in [
        (0, DropReason::TcpChecksum),
        (1, DropReason::UdpChecksum),
        (2, DropReason::IcmpChecksum),
    ] {
        for v6 in [0, 3] {
            let mut packet = sample(kind + v6);
            let verify = |packet: &[u8]| {
                let view = PacketView::parse(packet).unwrap();
                view.verify_transport_checksum(&view.transport().unwrap())
            };
            assert_eq!(verify(&packet), Ok(()));
            *packet.last_mut().unwrap() ^= 1;
            assert_eq!(verify(&packet), Err(reason));
        }
    }
}

#[test]
fn udp_may_go_without_a_checksum_over_ipv4_only() {
    let verify = |packet: Vec<u8>| {
        let view = PacketView::parse(&packet).unwrap();
        view.verify_transport_checksum(&view.transport().unwrap())
    };
    assert_eq!(verify(v4(UDP, &udp(53))), Ok(()));
    assert_eq!(verify(v6(UDP, &udp(53))), Err(DropReason::UdpChecksum));
}

#[test]
fn checksum_under_a_routing_header_covers_the_last_address() {
    let last = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x99);
    let via = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x98);
    // Source routing lists addresses in order of travel, segment routing in reverse.
    for (kind, segments_left, list, expected) in [
        (0, 2, [via, last], last),
        (0, 0, [via, last], DESTINATION),
        (2, 1, [via, last], last),
        (4, 1, [last, via], last),
        (3, 1, [via, last], DESTINATION), // compressed addresses: not read
    ] {
        let mut routing = vec![UDP, 4, kind, segments_left, 0, 0, 0, 0];
        routing.extend(list.iter().flat_map(|address| address.octets()));
        let mut datagram = udp(53);
        let sum = add(
            pseudo_header(SOURCE.into(), expected.into(), UDP, datagram.len()),
            sum(&datagram),
        );
        datagram[6..8].copy_from_slice(&(!sum).to_be_bytes());
        let packet = v6(ROUTING, &[routing, datagram].concat());
        let view = PacketView::parse(&packet).unwrap();
        assert_eq!(view.final_destination(), IpAddr::from(expected), "type {kind}");
        assert_eq!(view.destination(), IpAddr::from(DESTINATION));
        assert_eq!(
            view.verify_transport_checksum(&view.transport().unwrap()),
            Ok(()),
            "type {kind}"
        );
    }
}

#[test]
fn addresses_that_no_socket_answers_are_found() {
    let check = |source: &str, destination: &str| {
        let (source, destination): (IpAddr, IpAddr) = (source.parse().unwrap(), destination.parse().unwrap());
        let packet = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => v4_between(source, destination, UDP, &udp(53)),
            (IpAddr::V6(source), IpAddr::V6(destination)) => v6_between(source, destination, UDP, &udp(53)),
            _ => unreachable!("the test pairs one version"),
        };
        PacketView::parse(&packet).unwrap().address_check()
    };
    for source in ["0.0.0.0", "224.0.0.1", "255.255.255.255"] {
        assert_eq!(
            check(source, "192.0.2.7"),
            Some(DropReason::SourceAddress),
            "{source}"
        );
    }
    for source in ["::", "ff02::1"] {
        assert_eq!(
            check(source, "2001:db8::7"),
            Some(DropReason::SourceAddress),
            "{source}"
        );
    }
    assert_eq!(check("10.0.0.2", "0.0.0.0"), Some(DropReason::DestinationAddress));
    assert_eq!(check("2001:db8::2", "::"), Some(DropReason::DestinationAddress));
    assert_eq!(check("10.0.0.2", "239.1.2.3"), Some(DropReason::Multicast));
    assert_eq!(check("2001:db8::2", "ff0e::1"), Some(DropReason::Multicast));
    assert_eq!(check("10.0.0.2", "255.255.255.255"), Some(DropReason::Broadcast));
    // Loopback captures hold packets from a host to itself.
    assert_eq!(check("127.0.0.1", "127.0.0.1"), None);
    assert_eq!(check("::1", "::1"), None);
    assert_eq!(check("10.0.0.2", "192.0.2.7"), None);
}

#[test]
fn errors_are_not_sent_about_errors_later_fragments_or_groups() {
    let may = |packet: &[u8]| PacketView::parse(packet).unwrap().may_cause_error();
    for kind in 0..SAMPLES {
        assert!(may(&sample(kind)), "{kind}");
    }
    for kind in [3, 4, 5, 11, 12] {
        assert!(!may(&v4(1, &[kind, 0, 0, 0, 0, 0, 0, 0])), "ICMP {kind}");
    }
    for kind in [1, 2, 3, 4, 127, 137] {
        assert!(!may(&v6(58, &[kind, 0, 0, 0, 0, 0, 0, 0])), "ICMPv6 {kind}");
    }
    assert!(may(&v6(58, &[128, 0, 0, 0, 0, 0, 0, 0])));
    assert!(may(&v6(FRAGMENT, &fragment(0, true, UDP, &udp(53)))));
    assert!(!may(&v6(FRAGMENT, &fragment(8, true, UDP, &udp(53)))));
    assert!(!may(&v4_between(
        Ipv4Addr::new(10, 0, 0, 2),
        Ipv4Addr::new(224, 0, 0, 1),
        UDP,
        &udp(53)
    )));
}

#[test]
fn traffic_class_is_read_in_both_versions() {
    let mut packet = v4(UDP, &udp(53));
    packet[1] = 0xb9;
    assert_eq!(PacketView::parse(&packet).unwrap().traffic_class(), 0xb9);
    let mut packet = v6(UDP, &udp(53));
    packet[..2].copy_from_slice(&[0x6b, 0x90]);
    assert_eq!(PacketView::parse(&packet).unwrap().traffic_class(), 0xb9);
}

const SOURCE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
const DESTINATION: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);

/// Protocol and port as lists see them.
fn walked(packet: &[u8]) -> Result<(Option<u8>, Option<u16>), DropReason> {
    PacketView::parse(packet).map(|view| (view.protocol(), view.port()))
}

fn v4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    v4_between(
        Ipv4Addr::new(10, 0, 0, 2),
        Ipv4Addr::new(192, 0, 2, 7),
        protocol,
        payload,
    )
}

fn v4_between(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4(source.octets(), destination.octets(), 64);
    builder.write(&mut packet, IpNumber(protocol), payload).unwrap();
    packet
}

fn v6(next_header: u8, payload: &[u8]) -> Vec<u8> {
    v6_between(SOURCE, DESTINATION, next_header, payload)
}

fn v6_between(source: Ipv6Addr, destination: Ipv6Addr, next_header: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next_header, 64]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    packet
}

/// A UDP header without data or checksum.
fn udp(port: u16) -> Vec<u8> {
    [&4000u16.to_be_bytes()[..], &port.to_be_bytes(), &[0, 8, 0, 0]].concat()
}

/// Extension headers of the least length of these kinds, of which the first is named elsewhere.
fn chain(kinds: &[u8], last: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for next in kinds[1..].iter().copied().chain([last]) {
        // Eight bytes are 0 in units of eight and also 0 in the units of the authentication header.
        bytes.extend([next, 0, 0, 0, 0, 0, 0, 0]);
    }
    bytes.extend(payload);
    bytes
}

fn fragment(offset: u16, more: bool, next_header: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![next_header, 0];
    bytes.extend((offset | u16::from(more)).to_be_bytes());
    bytes.extend([1, 2, 3, 4]);
    bytes.extend(payload);
    bytes
}

const SAMPLES: usize = 6;

/// A sound packet: TCP, UDP or an echo request, over IPv4 and then over IPv6.
fn sample(kind: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    let v4 = || PacketBuilder::ipv4([10, 0, 0, 2], [192, 0, 2, 7], 64);
    let v6 = || PacketBuilder::ipv6(SOURCE.octets(), DESTINATION.octets(), 64);
    let payload = b"data";
    let written = match kind {
        0 => v4().tcp(4000, 80, 1, 1000).ack(5).write(&mut packet, payload),
        1 => v4().udp(4000, 53).write(&mut packet, payload),
        2 => v4().icmpv4_echo_request(1, 2).write(&mut packet, payload),
        3 => v6().tcp(4000, 80, 1, 1000).ack(5).write(&mut packet, payload),
        4 => v6().udp(4000, 53).write(&mut packet, payload),
        _ => v6().icmpv6_echo_request(1, 2).write(&mut packet, payload),
    };
    written.unwrap();
    packet
}

/// Calls all that reads a packet.
fn look_at_everything(bytes: &[u8]) {
    let Ok(view) = PacketView::parse(bytes) else {
        return;
    };
    assert!(view.bytes().len() <= bytes.len());
    assert!(view.transport_offset() <= view.bytes().len());
    let _ = (
        view.hop_limit(),
        view.traffic_class(),
        view.dont_fragment(),
        view.ports(),
        view.quoted(),
    );
    let _ = (
        view.address_check(),
        view.may_cause_error(),
        view.final_destination(),
        view.verify_ip_checksum(),
    );
    if let Some(fragment) = view.fragment() {
        assert!(usize::from(fragment.next_header_at) < fragment.headers.len());
        assert_eq!(fragment.offset % 8, 0);
    }
    if let Ok(transport) = view.transport() {
        let _ = view.verify_transport_checksum(&transport);
        let _ = QuotedPacket::parse(view.bytes());
    }
}
