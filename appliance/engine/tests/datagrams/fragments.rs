//! Fragments, one by one and put together.

use super::*;

/// Cuts an IPv4 packet after `first` bytes of payload.
pub(crate) fn cut(packet: &[u8], first: usize) -> [Vec<u8>; 2] {
    let (header, payload) = Ipv4Header::from_slice(packet).expect("an IPv4 packet");
    let piece = |payload: &[u8], offset: usize, more: bool| {
        let mut header = header.clone();
        header.dont_fragment = false;
        header.more_fragments = more;
        header.fragment_offset = IpFragOffset::try_new((offset / 8) as u16).expect("in range");
        header.set_payload_len(payload.len()).expect("fits");
        header.header_checksum = header.calc_header_checksum();
        let mut bytes = Vec::new();
        header.write(&mut bytes).expect("writes");
        bytes.extend_from_slice(payload);
        bytes
    };
    [
        piece(&payload[..first], 0, true),
        piece(&payload[first..], first, false),
    ]
}

#[test]
fn fragments_are_judged_by_address_singly_and_by_port_together() {
    let [first, last] = cut(&udp("10.0.0.2:5000", PEER, &pattern(100)), 48);
    let mut rig = Rig::with(Config::default(), lists(vec![deny("198.51.100.0/24")]));
    for fragment in [&first, &last] {
        assert_eq!(rig.packet(fragment).dropped, Some(DropReason::ListDestination));
    }
    assert_eq!(rig.deadline, None, "nothing waits");

    // A first fragment too short for its ports (RFC 1858) does not slip past an entry with a port.
    let entry = ListEntry {
        protocol: ListProtocol::Udp,
        ports: Some(PortRange {
            first: 4_000,
            last: 4_000,
        }),
        ..deny("198.51.100.0/24")
    };
    let mut tiny = Ipv4Header::new(0, 64, IpNumber::UDP, [10, 0, 0, 2], [198, 51, 100, 9]).expect("fits");
    tiny.more_fragments = true;
    tiny.header_checksum = tiny.calc_header_checksum();
    let mut bytes = Vec::new();
    tiny.write(&mut bytes).expect("writes");
    let mut rig = Rig::with(Config::default(), lists(vec![entry]));
    assert_eq!(rig.packet(&last).dropped, None, "no port to read: held");
    assert_eq!(rig.packet(&first).dropped, Some(DropReason::ListDestination));
    assert_eq!(
        rig.packet(&bytes).dropped,
        Some(DropReason::FragmentLength),
        "an empty fragment says nothing"
    );
}

#[test]
fn a_datagram_that_stays_incomplete_is_forgotten() {
    let mut rig = Rig::new();
    let [first, _] = cut(&udp("10.0.0.2:5000", PEER, &pattern(100)), 48);
    rig.packet(&first);
    rig.pass(Duration::from_secs(30));
    assert_eq!(rig.engine.counters().drops(DropReason::FragmentTimeout), 1);
    assert_eq!(rig.deadline, None);
}

#[test]
fn a_whole_packet_goes_to_the_shard_that_owns_its_flow() {
    let packets: Vec<_> = (1..200)
        .map(|port| udp(&format!("10.0.0.2:{port}"), PEER, &pattern(100)))
        .collect();
    let mut engines: Vec<_> = (0..4)
        .map(|shard| {
            Rig::with(
                Config {
                    shard: ShardId(shard),
                    shards: 4,
                    ..Config::default()
                },
                PolicySpec::default(),
            )
        })
        .collect();
    for packet in &packets {
        let fragments = cut(packet, 48);
        let view = |bytes| tungate_engine::packet::PacketView::parse(bytes).expect("sound");
        let by_pair = tungate_engine::shard::owner(&view(&fragments[0]), 4);
        let owner = tungate_engine::shard::owner(&view(packet), 4);
        let rig = &mut engines[usize::from(by_pair.0)];
        let held = rig.packet(&fragments[1]);
        assert_eq!((held.dropped, held.flow), (None, None));
        let complete = rig.packet(&fragments[0]);
        assert_eq!((complete.dropped, complete.flow), (None, None));
        // Also where this shard is the owner: whoever counts flows is asked about every packet that belongs to one.
        let forwarded = std::mem::take(&mut rig.world.forwarded);
        let [(shard, bytes)] = &forwarded[..] else {
            panic!("{forwarded:?}")
        };
        assert_eq!(*shard, owner);
        let sliced = SlicedPacket::from_ip(bytes).expect("whole");
        let Some(TransportSlice::Udp(udp)) = sliced.transport else {
            panic!("whole")
        };
        assert_eq!(udp.payload(), pattern(100));
    }
}
