//! What a client's IP header asks of the datagram that is sent on: hop limit, and whether it may be fragmented.

use super::fragments::cut;
use super::*;

/// Clears DF.
fn may_be_fragmented(packet: &[u8]) -> Vec<u8> {
    let (mut header, payload) = Ipv4Header::from_slice(packet).expect("an IPv4 packet");
    header.dont_fragment = false;
    header.header_checksum = header.calc_header_checksum();
    let mut bytes = Vec::new();
    header.write(&mut bytes).expect("writes");
    bytes.extend_from_slice(payload);
    bytes
}

/// Cuts an IPv6 packet after `first` bytes of payload, and puts a fragment header in front of each part.
fn cut_v6(packet: &[u8], first: usize) -> [Vec<u8>; 2] {
    let (header, payload) = packet.split_at(40);
    let piece = |payload: &[u8], offset_and_more: usize| {
        let mut bytes = header.to_vec();
        bytes[4..6].copy_from_slice(&(payload.len() as u16 + 8).to_be_bytes());
        let protocol = std::mem::replace(&mut bytes[6], 44);
        bytes.extend_from_slice(&[protocol, 0]);
        bytes.extend_from_slice(&(offset_and_more as u16).to_be_bytes());
        bytes.extend_from_slice(&7_u32.to_be_bytes());
        bytes.extend_from_slice(payload);
        bytes
    };
    [piece(&payload[..first], 1), piece(&payload[first..], first)]
}

/// How the one datagram or echo request was sent on that `packets` made.
fn carriage_of(rig: &mut Rig, packets: &[Vec<u8>]) -> Carriage {
    for packet in packets {
        assert_eq!(rig.packet(packet).dropped, None);
    }
    match &rig.commands()[..] {
        [
            Command::Open(_),
            Command::Send { carriage, .. } | Command::Echo { carriage, .. },
        ] => *carriage,
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_whole_packets_that_say_so_must_stay_whole() {
    let v4 = [
        udp("10.0.0.2:5000", PEER, &pattern(100)),
        echo_request("10.0.0.2", "192.0.2.7", 1, 1, &pattern(100)),
    ];
    for packet in v4 {
        let (df, free) = (packet.clone(), may_be_fragmented(&packet));
        for (packets, dont_fragment) in [
            (vec![df], true),
            (vec![free], false),
            (cut(&packet, 48).to_vec(), false),
        ] {
            let carriage = carriage_of(&mut Rig::new(), &packets);
            assert_eq!((carriage.hop_limit, carriage.dont_fragment), (63, dont_fragment));
        }
    }
    let v6 = [
        udp("[fd00::2]:5000", "[2001:db8::9]:4000", &pattern(100)),
        echo_request("fd00::2", "2001:db8::9", 1, 1, &pattern(100)),
    ];
    for packet in v6 {
        for (packets, dont_fragment) in [
            (vec![packet.clone()], true),
            (cut_v6(&packet, 48).to_vec(), false),
        ] {
            let carriage = carriage_of(&mut Rig::new(), &packets);
            assert_eq!((carriage.hop_limit, carriage.dont_fragment), (63, dont_fragment));
        }
    }
}

#[test]
fn what_came_in_fragments_is_known_as_such_by_the_shard_that_owns_it() {
    let [first, last] = cut_v6(&udp("[fd00::2]:5000", "[2001:db8::9]:4000", &pattern(100)), 48);
    let config = Config {
        shards: 2,
        ..Config::default()
    };
    let mut rig = Rig::with(config, PolicySpec::default());
    rig.packet(&first);
    rig.packet(&last);
    assert_eq!(rig.world.forwarded_reassembled, [true]);
}

#[test]
fn redirect_to_the_other_ip_version_takes_no_part_in_path_mtu_discovery() {
    let to_v6 = Action::Redirect(address("[2001:db8::9]:4000"));
    let to_v4 = Action::Redirect(address("192.0.2.9:4000"));
    for (action, dont_fragment) in [(to_v6, false), (to_v4, true)] {
        let policy = rules(vec![rule("elsewhere", RuleMatch::default(), action)]);
        let mut rig = Rig::with(Config::default(), policy);
        let packet = udp("10.0.0.2:5000", PEER, &pattern(100));
        assert_eq!(carriage_of(&mut rig, &[packet]).dont_fragment, dont_fragment);
    }
}

#[test]
fn client_hears_what_mtu_the_way_behind_has() {
    for (client, target, header_len, kind) in [
        ("10.0.0.2:5000", PEER, 20, (3, 4)),
        ("[fd00::2]:5000", "[2001:db8::9]:4000", 40, (2, 0)),
    ] {
        let mut rig = Rig::new();
        let packet = udp(client, target, &pattern(1400));
        let flow = rig.packet(&packet).flow.expect("accepted");
        rig.upstream(
            flow,
            UpstreamEvent::Error {
                target: address(target),
                reporter: None,
                error: IcmpError::PacketTooBig { mtu: 1300 },
            },
        );
        let sent = rig.world.packets.clone();
        let [(_, message)] = &sent[..] else {
            panic!("{sent:?}")
        };
        assert_eq!(
            message[header_len + 6..][..2],
            1300_u16.to_be_bytes(),
            "RFC 1191, RFC 4443"
        );
        let [(source, message_type, code, quoted)] = &icmp_messages(&mut rig)[..] else {
            panic!("one message")
        };
        assert_eq!((*source, (*message_type, *code)), (address(target).ip(), kind));
        // The client finds its socket by addresses and ports.
        assert_eq!(quoted[header_len..][..4], packet[header_len..][..4]);
    }
}
