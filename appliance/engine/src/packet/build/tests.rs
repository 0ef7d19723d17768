use std::time::Duration;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::collection::vec;
use proptest::prelude::*;

use super::super::testing::Outbox;
use super::super::transport::{IcmpMessage, Transport};
use super::*;
use crate::io::ChecksumState;
use crate::packet::PacketView;
use crate::reassembly::{Reassembler, Reassembly};
use crate::time::Timestamp;

proptest! {
    #[test]
    fn udp_datagram_arrives_as_it_was_sent(v6: bool, payload in vec(any::<u8>(), 0..2000), mtu in 1280..2100u16) {
        let (source, destination) = endpoints(v6);
        let datagram = Datagram::udp(source, destination, &payload, None).unwrap();
        let packets = sent(&datagram, mtu);
        prop_assert!(packets.iter().all(|packet| packet.len() <= usize::from(mtu)));
        let fits = payload.len() + if v6 { 48 } else { 28 } <= usize::from(mtu);
        prop_assert_eq!(packets.len() == 1, fits);
        let whole = put_together(&packets);
        prop_assert_eq!(read_udp(&whole), (source, destination, payload));
    }

    #[test]
    fn udp_super_packet_arrives_as_its_datagrams(
        v6: bool, payload in vec(any::<u8>(), 1..6000), size in 100..2500u16, mtu in 1280..2100u16,
    ) {
        let (source, destination) = endpoints(v6);
        let datagram = Datagram::udp(source, destination, &payload, NonZeroU16::new(size)).unwrap();
        let mut outbox = Outbox::default();
        let mut identification = 100;
        datagram.send(&mut outbox, mtu, IngressId(3), None, &mut identification);
        let packets = outbox.on_the_wire();
        prop_assert!(packets.iter().all(|packet| packet.len() <= usize::from(mtu)));
        // Fragments of one datagram share an identification, and each datagram has its own.
        let mut datagrams: Vec<Vec<Vec<u8>>> = Vec::new();
        for packet in packets {
            match datagrams.last_mut() {
                Some(parts) if is_later_fragment(&packet) => parts.push(packet),
                Some(_) | None => datagrams.push(vec![packet]),
            }
        }
        prop_assert_eq!(datagrams.len(), payload.len().div_ceil(size.into()));
        prop_assert_eq!(identification, 100 + datagrams.len() as u32);
        for (parts, chunk) in datagrams.iter().zip(payload.chunks(size.into())) {
            prop_assert_eq!(read_udp(&put_together(parts)), (source, destination, chunk.to_vec()));
        }
    }

    #[test]
    fn echo_reply_arrives_as_it_was_sent(v6: bool, identifier: u16, sequence: u16, payload in vec(any::<u8>(), 0..2000)) {
        let (source, destination) = endpoints(v6);
        let echo = Echo { identifier, sequence, payload: &payload };
        let reply = Datagram::echo_reply(source.ip(), destination.ip(), echo).unwrap();
        let whole = put_together(&sent(&reply, 1280));
        prop_assert_eq!(read_icmp(&whole), IcmpMessage::EchoReply(echo));
        let request = Datagram::echo_request(source.ip(), destination.ip(), echo).unwrap();
        let whole = put_together(&sent(&request, 1280));
        prop_assert_eq!(read_icmp(&whole), IcmpMessage::EchoRequest(echo));
    }
}

#[test]
fn icmp_error_says_what_happened_and_quotes_what_fits() {
    let errors = [
        IcmpError::Unreachable(Unreachable::Network),
        IcmpError::Unreachable(Unreachable::Host),
        IcmpError::Unreachable(Unreachable::Protocol),
        IcmpError::Unreachable(Unreachable::Port),
        IcmpError::Unreachable(Unreachable::Prohibited),
        IcmpError::PacketTooBig { mtu: 1400 },
        IcmpError::TimeExceeded,
    ];
    for v6 in [false, true] {
        let (client, target) = endpoints(v6);
        for error in errors {
            for (len, expected_len) in [(0, None), (3000, Some(if v6 { 1280 } else { 576 }))] {
                let payload = vec![5; len];
                let quoted = written(&Datagram::udp(client, target, &payload, None).unwrap());
                let message = Datagram::icmp_error(target.ip(), client.ip(), error, &quoted).unwrap();
                let packet = written(&message);
                let headers = if v6 { 48 } else { 28 };
                assert_eq!(packet.len(), expected_len.unwrap_or(headers + quoted.len()));
                assert_eq!(packet[headers..], quoted[..packet.len() - headers]);
                let IcmpMessage::Error {
                    error: read,
                    quoted: Some(about),
                } = read_icmp(&packet)
                else {
                    panic!("{error:?} is read as another message");
                };
                assert_eq!(read, error);
                assert_eq!(
                    (about.source, about.destination, about.protocol),
                    (client.ip(), target.ip(), 17)
                );
                assert_eq!(about.ports, Some((client.port(), target.port())));
            }
        }
    }
}

#[test]
fn unreachable_codes_are_those_of_the_rfcs() {
    let codes = |v6: bool, error| {
        let (client, target) = endpoints(v6);
        let packet = written(&Datagram::icmp_error(target.ip(), client.ip(), error, &[]).unwrap());
        let message = &packet[if v6 { 40 } else { 20 }..];
        (
            message[0],
            message[1],
            u32::from_be_bytes(message[4..8].try_into().unwrap()),
        )
    };
    // RFC 792 and RFC 1812, section 5.2.7.1; the MTU is in the low half of the last word (RFC 1191, section 4).
    assert_eq!(codes(false, IcmpError::Unreachable(Unreachable::Port)), (3, 3, 0));
    assert_eq!(
        codes(false, IcmpError::Unreachable(Unreachable::Prohibited)),
        (3, 13, 0)
    );
    assert_eq!(codes(false, IcmpError::PacketTooBig { mtu: 1400 }), (3, 4, 1400));
    assert_eq!(codes(false, IcmpError::TimeExceeded), (11, 0, 0));
    // RFC 4443, sections 3.1 to 3.4; the pointer of a parameter problem is to the next header field.
    assert_eq!(codes(true, IcmpError::Unreachable(Unreachable::Port)), (1, 4, 0));
    assert_eq!(
        codes(true, IcmpError::Unreachable(Unreachable::Prohibited)),
        (1, 1, 0)
    );
    assert_eq!(
        codes(true, IcmpError::Unreachable(Unreachable::Protocol)),
        (4, 1, 6)
    );
    assert_eq!(codes(true, IcmpError::PacketTooBig { mtu: 1400 }), (2, 0, 1400));
    assert_eq!(codes(true, IcmpError::TimeExceeded), (3, 0, 0));
}

#[test]
fn what_no_packet_holds_is_refused() {
    let refused = |v6, len| {
        let (source, destination) = endpoints(v6);
        Datagram::udp(source, destination, &vec![0; len], None).map(|datagram| datagram.packet_len())
    };
    assert_eq!(refused(false, 65_507), Ok(65_535));
    assert_eq!(refused(false, 65_508).unwrap_err(), DropReason::TooBig);
    assert_eq!(refused(true, 65_527), Ok(65_575));
    assert_eq!(refused(true, 65_528).unwrap_err(), DropReason::TooBig);
}

#[test]
fn largest_datagrams_arrive() {
    for (v6, len) in [(false, 65_507), (true, 65_527)] {
        let (source, destination) = endpoints(v6);
        let payload = vec![9; len];
        for mtu in [1280, 1500, 65_535] {
            let packets = sent(&Datagram::udp(source, destination, &payload, None).unwrap(), mtu);
            assert_eq!(read_udp(&put_together(&packets)).2, payload);
            let super_packet = Datagram::udp(source, destination, &payload, NonZeroU16::new(1200)).unwrap();
            assert_eq!(sent(&super_packet, mtu).len(), len.div_ceil(1200));
        }
    }
}

#[test]
fn mapped_source_is_an_ipv4_source() {
    let (source, destination) = endpoints(false);
    let mapped = "[::ffff:192.0.2.7]:53".parse().unwrap();
    let packet = written(&Datagram::udp(mapped, destination, b"data", None).unwrap());
    assert_eq!(read_udp(&packet), (source, destination, b"data".to_vec()));
    let (other, _) = endpoints(true);
    assert_eq!(
        Datagram::udp(other, destination, b"data", None).unwrap_err(),
        DropReason::Filtered
    );
}

/// Two ends, the second of which is the client's.
fn endpoints(v6: bool) -> (SocketAddr, SocketAddr) {
    if v6 {
        (
            "[2001:db8::7]:53".parse().unwrap(),
            "[fd00::2]:4000".parse().unwrap(),
        )
    } else {
        ("192.0.2.7:53".parse().unwrap(), "10.0.0.2:4000".parse().unwrap())
    }
}

fn sent(datagram: &Datagram<'_>, mtu: u16) -> Vec<Vec<u8>> {
    let mut outbox = Outbox::default();
    datagram.send(&mut outbox, mtu, IngressId(3), None, &mut 7);
    assert!(outbox.packets.iter().all(|(out, _)| out.ingress == IngressId(3)));
    outbox.on_the_wire()
}

fn written(datagram: &Datagram<'_>) -> Vec<u8> {
    let mut packet = vec![0xaa; datagram.packet_len()];
    let out = datagram.write(&mut packet, 7, IngressId(0), None);
    super::super::complete_checksum(&mut packet, &out);
    packet
}

fn is_later_fragment(packet: &[u8]) -> bool {
    PacketView::parse(packet)
        .unwrap()
        .fragment()
        .is_some_and(|fragment| fragment.offset != 0)
}

fn put_together(packets: &[Vec<u8>]) -> Vec<u8> {
    let mut reassembler = Reassembler::new(1 << 20, Duration::from_secs(1));
    let mut whole = Vec::new();
    for (index, packet) in packets.iter().enumerate() {
        let view = PacketView::parse(packet).unwrap();
        assert_eq!(view.verify_ip_checksum(), Ok(()));
        let taken = reassembler.push(
            Timestamp::ZERO,
            IngressId(0),
            &view,
            ChecksumState::Trusted,
            &mut whole,
        );
        let is_last = index + 1 == packets.len();
        assert_eq!(
            taken == Reassembly::Complete(ChecksumState::Trusted),
            is_last,
            "{taken:?}"
        );
    }
    whole
}

/// Reads a datagram by another's parser and checksum.
fn read_udp(packet: &[u8]) -> (SocketAddr, SocketAddr, Vec<u8>) {
    let sliced = SlicedPacket::from_ip(packet).unwrap();
    let Some(TransportSlice::Udp(udp)) = &sliced.transport else {
        panic!("no datagram")
    };
    let (source, destination, checksum): (IpAddr, IpAddr, _) = match &sliced.net {
        Some(NetSlice::Ipv4(ip)) => {
            let header = ip.header();
            assert_eq!(
                header.header_checksum(),
                header.to_header().calc_header_checksum()
            );
            let checksum = udp
                .to_header()
                .calc_checksum_ipv4(&header.to_header(), udp.payload());
            (
                header.source_addr().into(),
                header.destination_addr().into(),
                checksum,
            )
        }
        Some(NetSlice::Ipv6(ip)) => {
            let header = ip.header();
            let checksum = udp
                .to_header()
                .calc_checksum_ipv6(&header.to_header(), udp.payload());
            (
                header.source_addr().into(),
                header.destination_addr().into(),
                checksum,
            )
        }
        _ => panic!("no IP packet"),
    };
    assert_eq!(udp.checksum(), checksum.unwrap());
    (
        SocketAddr::new(source, udp.source_port()),
        SocketAddr::new(destination, udp.destination_port()),
        udp.payload().to_vec(),
    )
}

fn read_icmp(packet: &[u8]) -> IcmpMessage<'_> {
    let view = PacketView::parse(packet).unwrap();
    let transport = view.transport().unwrap();
    assert_eq!(view.verify_ip_checksum(), Ok(()));
    assert_eq!(view.verify_transport_checksum(&transport), Ok(()));
    match transport {
        Transport::Icmp(icmp) => icmp.message,
        other => panic!("{other:?}"),
    }
}
