//! UDP mappings, echo sessions, fragments, lists and policy changes as a client sees them.

mod carriage;
mod fragments;
mod names;
mod policy;
#[path = "../support/mod.rs"]
mod support;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use etherparse::{IpFragOffset, IpNumber, Ipv4Header, PacketBuilder, SlicedPacket, TransportSlice};
use support::*;
use tungate_engine::config::Filtering;
use tungate_engine::io::{Carriage, IcmpError, Unreachable, UpstreamError, UpstreamEvent};
use tungate_engine::policy::{
    Action, ListAction, ListEntry, ListProtocol, PolicySpec, PortRange, Rule, RuleMatch, RuleRef,
};
use tungate_engine::{CloseReason, Config, DropReason, Event, FlowId, Input, Policy, ShardId};

const RESOLVER: &str = "192.0.2.53:53";
const PEER: &str = "198.51.100.9:4000";
/// How packets of the builders here are sent on: they have DF.
const WHOLE: Carriage = Carriage {
    hop_limit: 63,
    dont_fragment: true,
};

fn address(text: &str) -> SocketAddr {
    text.parse().expect("a socket address")
}

fn udp_with(source: &str, destination: &str, hop_limit: u8, payload: &[u8]) -> Vec<u8> {
    let (source, destination) = (address(source), address(destination));
    let mut packet = Vec::new();
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), hop_limit)
            .udp(source.port(), destination.port())
            .write(&mut packet, payload),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), hop_limit)
            .udp(source.port(), destination.port())
            .write(&mut packet, payload),
        _ => panic!("one family"),
    }
    .expect("fits");
    packet
}

fn udp(source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
    udp_with(source, destination, 64, payload)
}

fn echo_request(source: &str, destination: &str, identifier: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match (
        source.parse().expect("an address"),
        destination.parse().expect("an address"),
    ) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 64)
            .icmpv4_echo_request(identifier, sequence)
            .write(&mut packet, payload),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64)
            .icmpv6_echo_request(identifier, sequence)
            .write(&mut packet, payload),
        _ => panic!("one family"),
    }
    .expect("fits");
    packet
}

/// A datagram that the engine sent: source, destination, payload.
fn datagrams(rig: &mut Rig) -> Vec<(SocketAddr, SocketAddr, Vec<u8>)> {
    let mut all = Vec::new();
    for (out, mut bytes) in rig.sent() {
        tungate_engine::packet::segments(&mut bytes, &out, |packet| {
            let sliced = SlicedPacket::from_ip(packet).expect("the engine sends sound packets");
            let (source, destination) = match sliced.net.as_ref().expect("an IP packet") {
                etherparse::NetSlice::Ipv4(ip) => (
                    IpAddr::from(ip.header().source_addr()),
                    IpAddr::from(ip.header().destination_addr()),
                ),
                etherparse::NetSlice::Ipv6(ip) => (
                    IpAddr::from(ip.header().source_addr()),
                    IpAddr::from(ip.header().destination_addr()),
                ),
                etherparse::NetSlice::Arp(_) => panic!("no ARP on a TUN"),
            };
            let Some(TransportSlice::Udp(udp)) = &sliced.transport else {
                panic!("not UDP: {sliced:?}")
            };
            let header = udp.to_header();
            let expected = match (source, destination) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    header.calc_checksum_ipv4_raw(from.octets(), to.octets(), udp.payload())
                }
                (IpAddr::V6(from), IpAddr::V6(to)) => {
                    header.calc_checksum_ipv6_raw(from.octets(), to.octets(), udp.payload())
                }
                _ => panic!("one family"),
            };
            assert_eq!(header.checksum, expected.expect("short enough"));
            all.push((
                SocketAddr::new(source, udp.source_port()),
                SocketAddr::new(destination, udp.destination_port()),
                udp.payload().to_vec(),
            ));
        });
    }
    all
}

/// Type, code and quoted packet of the ICMP messages that the engine sent, with their source.
fn icmp_messages(rig: &mut Rig) -> Vec<(IpAddr, u8, u8, Vec<u8>)> {
    let message = |(_, bytes): (_, Vec<u8>)| {
        let sliced = SlicedPacket::from_ip(&bytes).expect("sound");
        let source = match sliced.net.as_ref().expect("an IP packet") {
            etherparse::NetSlice::Ipv4(ip) => IpAddr::from(ip.header().source_addr()),
            etherparse::NetSlice::Ipv6(ip) => IpAddr::from(ip.header().source_addr()),
            etherparse::NetSlice::Arp(_) => panic!("no ARP on a TUN"),
        };
        match &sliced.transport {
            Some(TransportSlice::Icmpv4(icmp)) => {
                (source, icmp.type_u8(), icmp.code_u8(), icmp.payload().to_vec())
            }
            Some(TransportSlice::Icmpv6(icmp)) => {
                (source, icmp.type_u8(), icmp.code_u8(), icmp.payload().to_vec())
            }
            other => panic!("not ICMP: {other:?}"),
        }
    };
    rig.sent().into_iter().map(message).collect()
}

fn deny(network: &str) -> ListEntry {
    ListEntry {
        action: ListAction::Deny,
        network: network.parse().expect("a network"),
        protocol: ListProtocol::Any,
        ports: None,
        expires: None,
    }
}

fn rule(name: &str, matches: RuleMatch, action: Action) -> Rule {
    Rule {
        name: name.into(),
        matches,
        action,
    }
}

fn rules(rules: Vec<Rule>) -> PolicySpec {
    PolicySpec {
        rules,
        ..PolicySpec::default()
    }
}

fn lists(lists: Vec<ListEntry>) -> PolicySpec {
    PolicySpec {
        lists,
        ..PolicySpec::default()
    }
}

fn datagram_from(source: &str, payload: &'static [u8]) -> UpstreamEvent<'static> {
    UpstreamEvent::Datagram {
        source: address(source),
        payload,
        segment_size: None,
    }
}

// ---- UDP -----------------------------------------------------------------------------------------------------------

#[test]
fn a_question_and_its_answer_pass() {
    for (client, target) in [
        ("10.0.0.2:5000", RESOLVER),
        ("[fd00::2]:5000", "[2001:db8::53]:53"),
    ] {
        let mut rig = Rig::new();
        let flow = rig
            .packet(&udp(client, target, b"question"))
            .flow
            .expect("accepted");
        let commands = rig.commands();
        assert!(matches!(commands[0], Command::Open(open) if open.client == address(client)));
        let sent = Command::Send {
            target: address(target),
            payload: b"question".to_vec(),
            carriage: WHOLE,
        };
        assert_eq!(commands[1..], [sent]);
        let answer = UpstreamEvent::Datagram {
            source: address(target),
            payload: b"answer",
            segment_size: None,
        };
        rig.upstream(flow, answer);
        assert_eq!(
            datagrams(&mut rig),
            [(address(target), address(client), b"answer".to_vec())]
        );
    }
}

#[test]
fn one_mapping_serves_all_targets_of_an_endpoint() {
    let mut rig = Rig::new();
    let first = rig.packet(&udp("10.0.0.2:5000", RESOLVER, b"a")).flow;
    let second = rig.packet(&udp("10.0.0.2:5000", PEER, b"b")).flow;
    assert_eq!(first, second, "RFC 4787, REQ-1");
    assert_ne!(first, rig.packet(&udp("10.0.0.2:5001", PEER, b"c")).flow);
    let opens = rig
        .commands()
        .iter()
        .filter(|command| matches!(command, Command::Open(_)))
        .count();
    assert_eq!(opens, 2);
}

#[test]
fn strangers_get_in_or_not_as_configured() {
    for (filtering, admitted) in [
        (Filtering::EndpointIndependent, 1),
        (Filtering::AddressDependent, 0),
    ] {
        let mut rig = Rig::with(
            Config {
                udp_filtering: filtering,
                ..Config::default()
            },
            PolicySpec::default(),
        );
        let flow = rig
            .packet(&udp("10.0.0.2:5000", RESOLVER, b"a"))
            .flow
            .expect("accepted");
        rig.upstream(flow, datagram_from(PEER, b"hello"));
        assert_eq!(datagrams(&mut rig).len(), admitted);
        assert_eq!(
            rig.engine.counters().drops(DropReason::Filtered),
            1 - admitted as u64
        );
        rig.packet(&udp("10.0.0.2:5000", PEER, b"hello yourself"));
        rig.upstream(flow, datagram_from("198.51.100.9:9", b"another port"));
        assert_eq!(datagrams(&mut rig).len(), 1, "its address is known now");
    }
}

#[test]
fn lists_judge_what_comes_from_outside() {
    let mut rig = Rig::with(Config::default(), lists(vec![deny("198.51.100.0/24")]));
    let flow = rig
        .packet(&udp("10.0.0.2:5000", RESOLVER, b"a"))
        .flow
        .expect("accepted");
    rig.events();
    rig.upstream(flow, datagram_from(PEER, b"hello"));
    assert_eq!(datagrams(&mut rig), []);
    let dropped = Event::Dropped {
        reason: DropReason::ListSource,
        rule: Some(RuleRef::List(0)),
        flow: Some(flow),
    };
    assert_eq!(rig.events(), [dropped]);
}

#[test]
fn a_redirected_target_answers_under_its_own_name() {
    let to = Action::Redirect(address("127.0.0.1:5353"));
    let dns = RuleMatch {
        ports: vec![PortRange { first: 53, last: 53 }],
        ..RuleMatch::default()
    };
    let mut rig = Rig::with(Config::default(), rules(vec![rule("dns", dns, to)]));
    let flow = rig
        .packet(&udp("10.0.0.2:5000", RESOLVER, b"q"))
        .flow
        .expect("accepted");
    assert!(
        matches!(&rig.commands()[1], Command::Send { target, .. } if *target == address("127.0.0.1:5353"))
    );
    rig.upstream(flow, datagram_from("127.0.0.1:5353", b"a"));
    assert_eq!(
        datagrams(&mut rig),
        [(address(RESOLVER), address("10.0.0.2:5000"), b"a".to_vec())]
    );
    rig.upstream(flow, datagram_from(PEER, b"forged"));
    assert_eq!(datagrams(&mut rig), []);
}

#[test]
fn mappings_live_while_they_are_used() {
    let mut rig = Rig::new();
    rig.packet(&udp("10.0.0.2:5000", PEER, b"a"));
    rig.packet(&udp("10.0.0.2:5001", RESOLVER, b"a"));
    rig.pass(Duration::from_secs(20));
    assert_eq!(rig.engine.open_flows(), 1, "the question to port 53 is over");
    rig.pass(Duration::from_secs(270));
    rig.packet(&udp("10.0.0.2:5000", PEER, b"b"));
    rig.pass(Duration::from_secs(299));
    assert_eq!(rig.engine.open_flows(), 1);
    rig.pass(Duration::from_secs(1));
    assert_eq!(rig.engine.open_flows(), 0);
    assert_eq!(rig.deadline, None);
}

#[test]
fn the_least_recently_used_mapping_goes_first() {
    let mut config = Config::default();
    config.limits.sessions = 3;
    let mut rig = Rig::with(config, PolicySpec::default());
    let send = |rig: &mut Rig, port: u16| rig.packet(&udp(&format!("10.0.0.2:{port}"), PEER, b"a")).flow;
    let flows: Vec<_> = (1..=3).map(|port| send(&mut rig, port)).collect();
    send(&mut rig, 1);
    rig.events();
    send(&mut rig, 4);
    let evicted: Vec<FlowId> = rig
        .events()
        .into_iter()
        .filter_map(|event| match event {
            Event::Closed {
                flow,
                reason: CloseReason::Evicted,
                ..
            } => Some(flow),
            _ => None,
        })
        .collect();
    assert_eq!(evicted, [flows[1].expect("accepted")]);
    assert_eq!(rig.engine.open_flows(), 3);
}

#[test]
fn a_super_packet_becomes_one_send_with_its_segment_size() {
    let mut rig = Rig::new();
    let packet = udp("10.0.0.2:5000", PEER, &pattern(4_000));
    let input = tungate_engine::PacketIn {
        ingress: tungate_engine::IngressId(0),
        bytes: &packet,
        checksum: tungate_engine::io::ChecksumState::Trusted,
        segment_size: std::num::NonZeroU16::new(1_400),
        reassembled: false,
    };
    let flow = rig
        .handle(Input::Packet(input))
        .and_then(|judgement| judgement.flow)
        .expect("accepted");
    assert!(matches!(&rig.commands()[1], Command::Send { payload, .. } if payload.len() == 4_000));
    let data = pattern(4_000);
    let size = std::num::NonZeroU16::new(1_400);
    rig.upstream(
        flow,
        UpstreamEvent::Datagram {
            source: address(PEER),
            payload: &data,
            segment_size: size,
        },
    );
    assert_eq!(rig.world.packets.len(), 1, "one write");
    let lengths: Vec<_> = datagrams(&mut rig)
        .into_iter()
        .map(|(_, _, payload)| payload.len())
        .collect();
    assert_eq!(lengths, [1_400, 1_400, 1_200]);
}

#[test]
fn a_datagram_larger_than_the_mtu_reaches_the_client_in_fragments() {
    for (client, target, most) in [
        ("10.0.0.2:5000", PEER, 1_500),
        ("[fd00::2]:5000", "[2001:db8::9]:4000", 1_500),
    ] {
        let mut rig = Rig::new();
        let flow = rig.packet(&udp(client, target, b"a")).flow.expect("accepted");
        let data = pattern(8_000);
        rig.upstream(
            flow,
            UpstreamEvent::Datagram {
                source: address(target),
                payload: &data,
                segment_size: None,
            },
        );
        let sent = rig.sent();
        assert!(sent.len() >= 6 && sent.iter().all(|(_, bytes)| bytes.len() <= most));
        // A client that is such an engine itself gets it back together.
        let mut receiver = Rig::new();
        for (_, bytes) in sent.iter().rev() {
            assert_eq!(receiver.packet(bytes).dropped, None);
        }
        let commands = receiver.commands();
        assert!(matches!(&commands[1], Command::Send { payload, .. } if *payload == data));
    }
}

#[test]
fn errors_from_outside_reach_the_client() {
    // Type and code by RFC 792, RFC 1191 and RFC 4443.
    let cases = [
        (IcmpError::Unreachable(Unreachable::Port), (3, 3), (1, 4)),
        (IcmpError::Unreachable(Unreachable::Host), (3, 1), (1, 3)),
        (IcmpError::Unreachable(Unreachable::Prohibited), (3, 13), (1, 1)),
        (IcmpError::PacketTooBig { mtu: 1_400 }, (3, 4), (2, 0)),
        (IcmpError::TimeExceeded, (11, 0), (3, 0)),
    ];
    for (client, target, reporter) in [
        ("10.0.0.2:5000", PEER, "203.0.113.1"),
        ("[fd00::2]:5000", "[2001:db8::9]:4000", "2001:db8::1"),
    ] {
        for (error, v4, v6) in cases {
            let mut rig = Rig::new();
            let flow = rig.packet(&udp(client, target, b"a")).flow.expect("accepted");
            let reporter: IpAddr = reporter.parse().expect("an address");
            rig.upstream(
                flow,
                UpstreamEvent::Error {
                    target: address(target),
                    reporter: Some(reporter),
                    error,
                },
            );
            let messages = icmp_messages(&mut rig);
            let [(source, kind, code, quoted)] = &messages[..] else {
                panic!("{messages:?}")
            };
            assert_eq!((*kind, *code), if reporter.is_ipv4() { v4 } else { v6 });
            assert_eq!(*source, reporter);
            let quoted = etherparse::LaxSlicedPacket::from_ip(quoted).expect("quotes an IP packet");
            let Some(TransportSlice::Udp(udp)) = quoted.transport else {
                panic!("quotes UDP")
            };
            assert_eq!((udp.source_port(), udp.destination_port()), (5_000, 4_000));
        }
    }
}

#[test]
fn rejected_datagrams_are_answered_and_dropped_ones_are_not() {
    for (action, answers, reason) in [
        (Action::Reject, 1, DropReason::RuleReject),
        (Action::Drop, 0, DropReason::RuleDrop),
    ] {
        let mut rig = Rig::with(
            Config::default(),
            rules(vec![rule("no", RuleMatch::default(), action)]),
        );
        assert_eq!(
            rig.packet(&udp("10.0.0.2:5000", PEER, b"a")).dropped,
            Some(reason)
        );
        assert_eq!(icmp_messages(&mut rig).len(), answers);
        assert_eq!(rig.commands(), []);
    }
}

#[test]
fn an_expired_hop_limit_is_reported_by_the_appliance() {
    for (client, target, router, kind) in [
        (
            "10.0.0.2:5000",
            PEER,
            IpAddr::from(Config::default().router_v4),
            11,
        ),
        (
            "[fd00::2]:5000",
            "[2001:db8::9]:4000",
            IpAddr::from(Config::default().router_v6),
            3,
        ),
    ] {
        let mut rig = Rig::new();
        assert_eq!(
            rig.packet(&udp_with(client, target, 1, b"a")).dropped,
            Some(DropReason::HopLimit)
        );
        let messages = icmp_messages(&mut rig);
        assert_eq!((messages[0].0, messages[0].1), (router, kind));
    }
}

#[test]
fn a_session_that_cannot_be_opened_is_told_to_the_client() {
    let mut rig = Rig::new();
    let flow = rig
        .packet(&udp("10.0.0.2:5000", PEER, b"a"))
        .flow
        .expect("accepted");
    rig.upstream(
        flow,
        UpstreamEvent::Failed(UpstreamError::Unreachable(Unreachable::Network)),
    );
    assert_eq!(icmp_messages(&mut rig).len(), 1);
    assert_eq!(rig.engine.open_flows(), 0);
}

#[test]
fn what_no_socket_can_answer_is_dropped_by_reason() {
    let cases = [
        ("0.0.0.0:68", "255.255.255.255:67", DropReason::SourceAddress),
        ("10.0.0.2:68", "255.255.255.255:67", DropReason::Broadcast),
        ("10.0.0.2:5353", "224.0.0.251:5353", DropReason::Multicast),
        ("[fd00::2]:5353", "[ff02::fb]:5353", DropReason::Multicast),
        ("224.0.0.1:1", "10.0.0.2:1", DropReason::SourceAddress),
        ("10.0.0.2:1", "0.0.0.0:1", DropReason::DestinationAddress),
        ("10.0.0.2:0", PEER, DropReason::PortZero),
    ];
    for (source, destination, reason) in cases {
        let mut rig = Rig::new();
        assert_eq!(
            rig.packet(&udp(source, destination, b"a")).dropped,
            Some(reason),
            "{source} > {destination}"
        );
        assert_eq!(rig.sent(), []);
    }
}

#[test]
fn a_packet_to_itself_is_an_ordinary_one() {
    let mut rig = Rig::new();
    assert_eq!(
        rig.packet(&udp("127.0.0.1:5000", "127.0.0.1:5000", b"a")).dropped,
        None
    );
}

#[test]
fn a_wrong_checksum_is_a_reason_and_none_is_not() {
    let mut rig = Rig::new();
    let mut packet = udp("10.0.0.2:5000", PEER, b"abc");
    packet[26] ^= 0x55;
    assert_eq!(rig.packet(&packet).dropped, Some(DropReason::UdpChecksum));
    packet[26..28].fill(0);
    assert_eq!(rig.packet(&packet).dropped, None, "RFC 768: none was made");
    let mut packet = udp("[fd00::2]:5000", "[2001:db8::9]:4000", b"abc");
    packet[46..48].fill(0);
    assert_eq!(
        rig.packet(&packet).dropped,
        Some(DropReason::UdpChecksum),
        "RFC 8200, section 8.1"
    );
}

// ---- ICMP ----------------------------------------------------------------------------------------------------------

#[test]
fn an_echo_is_answered_by_its_target_only() {
    for (client, target, reply) in [("10.0.0.2", "192.0.2.7", 0), ("fd00::2", "2001:db8::7", 129)] {
        let mut rig = Rig::new();
        let flow = rig
            .packet(&echo_request(client, target, 77, 1, b"ping"))
            .flow
            .expect("accepted");
        assert_eq!(rig.sent(), []);
        assert_eq!(
            rig.commands()[1..],
            [Command::Echo {
                sequence: 1,
                payload: b"ping".to_vec(),
                carriage: WHOLE,
            }]
        );
        rig.upstream(
            flow,
            UpstreamEvent::EchoReply {
                sequence: 1,
                payload: b"ping",
            },
        );
        let sent = rig.sent();
        let sliced = SlicedPacket::from_ip(&sent[0].1).expect("sound");
        let (kind, header) = match sliced.transport.expect("ICMP") {
            TransportSlice::Icmpv4(icmp) => (icmp.type_u8(), icmp.bytes5to8()),
            TransportSlice::Icmpv6(icmp) => {
                let octets = |text: &str| text.parse::<std::net::Ipv6Addr>().expect("an address").octets();
                assert!(icmp.is_checksum_valid(octets(target), octets(client)));
                (icmp.type_u8(), icmp.bytes5to8())
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(kind, reply);
        assert_eq!(header, [0, 77, 0, 1]);
    }
}

#[test]
fn two_pings_with_one_identifier_are_two_sessions() {
    let mut rig = Rig::new();
    let first = rig
        .packet(&echo_request("10.0.0.2", "192.0.2.7", 77, 1, b""))
        .flow;
    assert_ne!(
        first,
        rig.packet(&echo_request("10.0.0.2", "192.0.2.8", 77, 1, b""))
            .flow
    );
    assert_eq!(
        first,
        rig.packet(&echo_request("10.0.0.2", "192.0.2.7", 77, 2, b""))
            .flow
    );
    rig.pass(Duration::from_secs(60));
    assert_eq!(rig.engine.open_flows(), 0);
}
