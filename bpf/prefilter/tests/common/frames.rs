//! Generators: frames of every kind the lists can meet, lists around the same few addresses, and damage.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use tungate_engine::policy::{ListAction, ListEntry, ListProtocol, PortRange};

/// IPv4 addresses close together, so that prefixes of all lengths hold some and miss some.
pub(crate) fn address4() -> impl Strategy<Value = u32> {
    (
        select(vec![0x0a00_0000u32, 0x0a01_0203, 0xc000_0207, 0x0afe_fe00]),
        any::<u32>(),
        0..=32u32,
    )
        .prop_map(|(base, noise, kept)| base ^ noise.checked_shr(kept).unwrap_or(0))
}

/// IPv6 addresses close together.
pub(crate) fn address6() -> impl Strategy<Value = u128> {
    let bases = select(vec![
        0x2001_0db8_0000_0000_0000_0000_0000_0001u128,
        0x2001_0db8_00ff_0000_0000_0000_0000_0000,
        0x0000_0000_0000_0000_0000_ffff_0a01_0203,
    ]);
    (bases, any::<u128>(), 0..=128u32)
        .prop_map(|(base, noise, kept)| base ^ noise.checked_shr(kept).unwrap_or(0))
}

/// List entries, more or less specific, about `address4` and `address6`.
pub(crate) fn entry() -> impl Strategy<Value = ListEntry> {
    let network = prop_oneof![
        (address4(), 0..=32u8).prop_map(|(address, length)| {
            IpNet::V4(
                Ipv4Net::new(Ipv4Addr::from_bits(address), length)
                    .expect("a length up to 32")
                    .trunc(),
            )
        }),
        (address6(), 0..=128u8).prop_map(|(address, length)| {
            IpNet::V6(
                Ipv6Net::new(Ipv6Addr::from_bits(address), length)
                    .expect("a length up to 128")
                    .trunc(),
            )
        }),
    ];
    let protocol = select(vec![
        ListProtocol::Any,
        ListProtocol::Tcp,
        ListProtocol::Udp,
        ListProtocol::Icmp,
    ]);
    let action = select(vec![ListAction::Deny, ListAction::Allow]);
    let expires = option::weighted(0.2, 0..10u64);
    (action, network, protocol, option::of(ports()), expires).prop_map(
        |(action, network, protocol, ports, expires)| ListEntry {
            action,
            network,
            protocol,
            ports,
            expires,
        },
    )
}

fn ports() -> impl Strategy<Value = PortRange> {
    (port(), port()).prop_map(|(one, other)| PortRange {
        first: one.min(other),
        last: one.max(other),
    })
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![4 => select(vec![0, 22, 53, 80, 443, 8080, 65535]), 1 => any::<u16>()]
}

/// Whole lists.
pub(crate) fn lists() -> impl Strategy<Value = Vec<ListEntry>> {
    prop_oneof![3 => vec(entry(), 0..8), 1 => vec(entry(), 8..120)]
}

/// Frames: sound ones of every kind, some of them damaged.
pub(crate) fn frame() -> impl Strategy<Value = Vec<u8>> {
    let sound = (tags(), prop_oneof![packet4(), packet6()], vec(any::<u8>(), 0..40)).prop_map(
        |(tags, (ethertype, packet), padding)| {
            let mut frame = vec![2; 12];
            for tag in tags {
                frame.extend(tag);
            }
            frame.extend(ethertype.to_be_bytes());
            frame.extend(packet);
            frame.extend(padding);
            frame
        },
    );
    let damaged = (
        sound.boxed(),
        vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        option::of(any::<prop::sample::Index>()),
    );
    prop_oneof![
        4 => damaged.prop_map(|(mut frame, changes, cut)| {
            for (at, value) in changes {
                let at = at.index(frame.len());
                frame[at] = value;
            }
            if let Some(cut) = cut {
                frame.truncate(cut.index(frame.len() + 1));
            }
            frame
        }),
        6 => (tags(), prop_oneof![packet4(), packet6()], vec(any::<u8>(), 0..40)).prop_map(
            |(tags, (ethertype, packet), padding)| {
                let mut frame = vec![2; 12];
                frame.extend(tags.into_iter().flatten());
                frame.extend(ethertype.to_be_bytes());
                frame.extend(packet);
                frame.extend(padding);
                frame
            },
        ),
    ]
}

fn tags() -> impl Strategy<Value = Vec<[u8; 4]>> {
    let tag = (select(vec![0x8100u16, 0x88a8, 0x9100]), any::<u16>()).prop_map(|(kind, tag)| {
        let (kind, tag) = (kind.to_be_bytes(), tag.to_be_bytes());
        [kind[0], kind[1], tag[0], tag[1]]
    });
    prop_oneof![5 => Just(Vec::new()), 3 => vec(tag.clone(), 1..3), 1 => vec(tag, 3..4)]
}

/// Transport payloads: enough for a port, or not.
fn segment() -> impl Strategy<Value = (u8, Vec<u8>)> {
    let protocol = prop_oneof![
        6 => select(vec![6u8, 17]),
        2 => select(vec![1u8, 58, 50, 51, 59, 47, 132]),
        1 => any::<u8>()
    ];
    let payload = prop_oneof![
        6 => (port(), vec(any::<u8>(), 0..24)).prop_map(|(port, rest)| {
            let mut payload = vec![0x30, 0x39];
            payload.extend(port.to_be_bytes());
            payload.extend(rest);
            payload
        }),
        1 => vec(any::<u8>(), 0..4)
    ];
    (protocol, payload)
}

fn packet4() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let fragment = prop_oneof![5 => select(vec![0u16, 0x4000]), 1 => Just(0x2000u16), 2 => any::<u16>()];
    let length = prop_oneof![8 => Just(None), 1 => any::<u16>().prop_map(Some)];
    (
        address4(),
        address4(),
        segment(),
        vec(any::<u8>(), 0..5),
        fragment,
        length,
    )
        .prop_map(
            |(source, destination, (protocol, payload), options, fragment, length)| {
                let header_length = 20 + options.len() * 4;
                let total = length.unwrap_or((header_length + payload.len()) as u16);
                let mut packet = vec![0x40 | (header_length / 4) as u8, 0];
                packet.extend(total.to_be_bytes());
                packet.extend([0, 0]);
                packet.extend(fragment.to_be_bytes());
                packet.extend([64, protocol, 0, 0]);
                packet.extend(source.to_be_bytes());
                packet.extend(destination.to_be_bytes());
                packet.extend(options.iter().flat_map(|&byte| [byte; 4]));
                packet.extend(payload);
                (0x0800, packet)
            },
        )
}

fn packet6() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let length = prop_oneof![8 => Just(None), 1 => any::<u16>().prop_map(Some)];
    (address6(), address6(), segment(), vec(extension(), 0..8), length).prop_map(
        |(source, destination, (protocol, payload), extensions, length)| {
            let mut kinds: Vec<u8> = extensions.iter().map(|&(kind, _)| kind).collect();
            kinds.push(protocol);
            let mut body = Vec::new();
            for (index, (_, extension)) in extensions.into_iter().enumerate() {
                body.push(kinds[index + 1]);
                body.extend(extension);
            }
            body.extend(payload);
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend(length.unwrap_or(body.len() as u16).to_be_bytes());
            packet.extend([kinds[0], 64]);
            packet.extend(source.to_be_bytes());
            packet.extend(destination.to_be_bytes());
            packet.extend(body);
            (0x86dd, packet)
        },
    )
}

/// An extension header's number, and its bytes behind the next header field.
fn extension() -> impl Strategy<Value = (u8, Vec<u8>)> {
    let options = (select(vec![0u8, 43, 60, 135]), 0..3u8).prop_map(|(kind, units)| {
        let mut bytes = vec![units];
        bytes.resize(usize::from(units) * 8 + 7, 0);
        (kind, bytes)
    });
    let authentication = (0..5u8).prop_map(|words| {
        let mut bytes = vec![words];
        bytes.resize((usize::from(words) + 2) * 4 - 1, 0);
        (51, bytes)
    });
    let fragment = prop_oneof![2 => Just(0u16), 1 => Just(1u16), 1 => any::<u16>()].prop_map(|offset| {
        let [high, low] = offset.to_be_bytes();
        (44, vec![0, high, low, 0, 0, 0, 1])
    });
    prop_oneof![5 => options, 2 => authentication, 2 => fragment]
}
