use std::net::SocketAddr;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::packet::{Datagram as Built, complete_checksum};

const TIMEOUT: Duration = Duration::from_secs(30);
const IDENTIFICATION: u16 = 3;

proptest! {
    #[test]
    fn fragments_in_any_order_and_number_make_the_original(
        v6: bool,
        payload in vec(any::<u8>(), 1..4000),
        cuts in vec(1..500u16, 0..20),
        order in vec(any::<prop::sample::Index>(), 0..60),
    ) {
        let original = datagram(v6, &payload);
        let mut offsets: Vec<usize> = cuts.iter().map(|&cut| usize::from(cut) * 8).collect();
        offsets.retain(|&offset| offset < payload.len() + 8);
        let fragments = cut(&original, &offsets, IDENTIFICATION);
        prop_assume!(fragments.len() > 1);

        let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
        let mut missing: Vec<bool> = vec![true; fragments.len()];
        // Some of them in a drawn order, with repetitions, then all the rest.
        let drawn = order.iter().map(|index| index.index(fragments.len()));
        for index in drawn.chain(0..fragments.len()) {
            if !missing.contains(&true) {
                break;
            }
            missing[index] = false;
            let whole = push(&mut reassembler, Timestamp::ZERO, &fragments[index]).unwrap();
            if missing.contains(&true) {
                prop_assert_eq!(whole, None);
            } else {
                prop_assert_eq!(whole.as_ref(), Some(&original));
            }
        }
        prop_assert_eq!(reassembler.used, 0);
        prop_assert_eq!(reassembler.next_deadline(), None);
    }

    #[test]
    fn ipv4_bytes_that_came_first_win(
        parts in vec((0..40usize, 1..20usize, any::<u8>()), 1..30),
    ) {
        // Fragments of runs of one byte each, wherever; a model keeps the first value of each byte.
        const LEN: usize = 400;
        let mut model = [None; LEN];
        let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
        let header = datagram(false, &[0; LEN - 8]);
        let mut runs: Vec<_> =
            parts.iter().map(|&(at, len, byte)| (at * 8, (at + len).min(LEN / 8) * 8, byte)).collect();
        runs.retain(|&(start, end, _)| start < end && end < LEN);
        runs.extend([(0, LEN - 8, 0xee), (LEN - 8, LEN, 0xee)]);
        for (start, end, byte) in runs {
            let data = vec![byte; end - start];
            for slot in &mut model[start..end] {
                slot.get_or_insert(byte);
            }
            let whole = push(&mut reassembler, Timestamp::ZERO, &fragment_v4(&header, start, &data, end < LEN, 5));
            if end == LEN {
                let expected: Vec<u8> = model.iter().map(|slot| slot.unwrap()).collect();
                prop_assert_eq!(&whole.unwrap().unwrap()[20..], &expected);
            } else {
                prop_assert_eq!(whole, Ok(None));
            }
        }
    }

    #[test]
    fn budget_is_kept_whatever_comes(
        fragments in vec((0..50u32, 0..8000usize, 1..190usize, any::<bool>(), any::<bool>()), 1..200),
    ) {
        const BUDGET: usize = 20_000;
        let mut reassembler = Reassembler::new(BUDGET, TIMEOUT);
        for (identification, offset, len, more, v6) in fragments {
            if offset == 0 && !more {
                continue; // a whole packet
            }
            let header = datagram(v6, &[]);
            let data = vec![0; len * 8];
            let packet = if v6 {
                fragment_v6(&header, offset * 8, &data, more, identification)
            } else {
                fragment_v4(&header, offset * 8, &data, more, identification as u16)
            };
            let _ = push(&mut reassembler, Timestamp::ZERO, &packet);
            prop_assert!(reassembler.used <= BUDGET);
        }
        while reassembler.expire(Timestamp::ZERO + TIMEOUT) {}
        prop_assert_eq!(reassembler.used, 0);
    }
}

#[test]
fn ipv6_overlap_discards_the_datagram_and_what_still_comes_of_it() {
    let packet = datagram(true, &[7; 100]);
    let fragments = cut(&packet, &[32, 64], 9);
    let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
    assert_eq!(push(&mut reassembler, Timestamp::ZERO, &fragments[0]), Ok(None));
    let overlapping = fragment_v6(&packet, 24, &[7; 16], true, 9);
    assert_eq!(
        push(&mut reassembler, Timestamp::ZERO, &overlapping),
        Err(DropReason::FragmentOverlap)
    );
    for late in &fragments {
        assert_eq!(
            push(&mut reassembler, Timestamp::ZERO, late),
            Err(DropReason::FragmentOverlap)
        );
    }
    // After the timeout the identification is free again; the datagram was counted when it was discarded.
    assert!(!reassembler.expire(Timestamp::ZERO + TIMEOUT));
    push(&mut reassembler, Timestamp::ZERO, &fragments[0]).unwrap();
    push(&mut reassembler, Timestamp::ZERO, &fragments[1]).unwrap();
    assert_eq!(
        push(&mut reassembler, Timestamp::ZERO, &fragments[2]),
        Ok(Some(packet))
    );
}

#[test]
fn ipv6_fragment_with_other_bytes_in_the_same_place_is_an_overlap() {
    let packet = datagram(true, &[7; 100]);
    let fragments = cut(&packet, &[32], 9);
    let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
    push(&mut reassembler, Timestamp::ZERO, &fragments[1]).unwrap();
    assert_eq!(push(&mut reassembler, Timestamp::ZERO, &fragments[1]), Ok(None));
    let mut other = fragments[1].clone();
    *other.last_mut().unwrap() ^= 1;
    assert_eq!(
        push(&mut reassembler, Timestamp::ZERO, &other),
        Err(DropReason::FragmentOverlap)
    );
}

#[test]
fn lengths_that_no_fragment_has_are_refused() {
    let v4 = datagram(false, &[]);
    let v6 = datagram(true, &[]);
    for packet in [
        fragment_v4(&v4, 0, &[0; 20], true, 1), // not a multiple of eight
        fragment_v6(&v6, 0, &[0; 20], true, 1),
        fragment_v4(&v4, 65_512, &[0; 8], false, 1), // with its header, one byte more than IPv4 can say
        fragment_v6(&v6, 65_528, &[0; 8], false, 1), // the same without
        fragment_v4(&v4, 8, &[], true, 1),
    ] {
        let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
        assert_eq!(
            push(&mut reassembler, Timestamp::ZERO, &packet),
            Err(DropReason::FragmentLength)
        );
        assert_eq!(reassembler.used, 0);
    }
    let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
    assert_eq!(
        push(
            &mut reassembler,
            Timestamp::ZERO,
            &fragment_v4(&v4, 65_504, &[0; 8], false, 1)
        ),
        Ok(None)
    );
    assert_eq!(
        push(
            &mut reassembler,
            Timestamp::ZERO,
            &fragment_v6(&v6, 65_520, &[0; 15], false, 1)
        ),
        Ok(None)
    );
}

#[test]
fn data_behind_the_last_fragment_is_refused() {
    let packet = datagram(false, &[7; 92]);
    let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
    push(
        &mut reassembler,
        Timestamp::ZERO,
        &fragment_v4(&packet, 64, &[1; 36], false, 3),
    )
    .unwrap();
    let behind = fragment_v4(&packet, 96, &[1; 8], true, 3);
    assert_eq!(
        push(&mut reassembler, Timestamp::ZERO, &behind),
        Err(DropReason::FragmentLength)
    );
    let sooner = fragment_v4(&packet, 8, &[1; 8], false, 3);
    assert_eq!(
        push(&mut reassembler, Timestamp::ZERO, &sooner),
        Err(DropReason::FragmentLength)
    );

    let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
    push(&mut reassembler, Timestamp::ZERO, &behind).unwrap();
    let last = fragment_v4(&packet, 64, &[1; 36], false, 3);
    assert_eq!(
        push(&mut reassembler, Timestamp::ZERO, &last),
        Err(DropReason::FragmentLength)
    );
}

#[test]
fn long_headers_on_the_first_fragment_do_not_make_too_long_a_packet() {
    let mut long = datagram(false, &[]);
    long.splice(20..20, [1; 40]); // options that do nothing
    long[0] = 0x4f;
    let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
    let short = datagram(false, &[]);
    push(
        &mut reassembler,
        Timestamp::ZERO,
        &fragment_v4(&short, 32_752, &[0; 32_760], false, 3),
    )
    .unwrap();
    let first = fragment_v4(&long, 0, &[0; 32_752], true, 3);
    assert_eq!(
        push(&mut reassembler, Timestamp::ZERO, &first),
        Err(DropReason::FragmentLength)
    );
}

#[test]
fn same_identification_elsewhere_is_another_datagram() {
    let packet = datagram(false, &[7; 92]);
    let fragments = cut(&packet, &[48], 3);
    let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
    push_from(&mut reassembler, Timestamp::ZERO, 0, &fragments[0]).unwrap();
    assert_eq!(
        push_from(&mut reassembler, Timestamp::ZERO, 1, &fragments[1]),
        Ok(None)
    );
    let mut other_protocol = fragments[1].clone();
    other_protocol[9] = 6;
    assert_eq!(
        push_from(&mut reassembler, Timestamp::ZERO, 0, &other_protocol),
        Ok(None)
    );
    assert_eq!(
        push_from(&mut reassembler, Timestamp::ZERO, 0, &fragments[1]),
        Ok(Some(packet))
    );
}

#[test]
fn incomplete_datagram_goes_at_its_deadline() {
    let fragments = cut(&datagram(false, &[7; 92]), &[48], 3);
    let start = Timestamp::from_nanos(5);
    let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
    push(&mut reassembler, start, &fragments[0]).unwrap();
    assert_eq!(reassembler.next_deadline(), Some(start + TIMEOUT));
    assert!(!reassembler.expire(start + TIMEOUT - Duration::from_nanos(1)));
    assert!(reassembler.expire(start + TIMEOUT));
    assert!(!reassembler.expire(start + TIMEOUT));
    assert_eq!(reassembler.used, 0);
}

#[test]
fn the_oldest_datagram_makes_room() {
    let mut reassembler = Reassembler::new(5000, TIMEOUT);
    let packet = datagram(false, &[7; 1992]);
    for (identification, is_full) in [(0, false), (1, false), (2, true)] {
        let first = &cut(&packet, &[1504], identification)[0];
        let at = Timestamp::from_nanos(identification.into());
        let view = PacketView::parse(first).unwrap();
        let taken = reassembler.push(at, IngressId(0), &view, ChecksumState::Trusted, &mut Vec::new());
        assert_eq!(taken, Reassembly::Held);
        assert_eq!(reassembler.evict(), is_full);
    }
    assert!(!reassembler.evict());
    assert_eq!(
        reassembler.next_deadline(),
        Some(Timestamp::from_nanos(1) + TIMEOUT)
    );
}

#[test]
fn one_unverified_fragment_makes_the_packet_unverified() {
    let fragments = cut(&datagram(false, &[7; 92]), &[48], 3);
    for (first, second, expected) in [
        (
            ChecksumState::Trusted,
            ChecksumState::Trusted,
            ChecksumState::Trusted,
        ),
        (
            ChecksumState::Unverified,
            ChecksumState::Trusted,
            ChecksumState::Unverified,
        ),
        (
            ChecksumState::Trusted,
            ChecksumState::Unverified,
            ChecksumState::Unverified,
        ),
    ] {
        let mut reassembler = Reassembler::new(1 << 20, TIMEOUT);
        let last = [first, second]
            .into_iter()
            .zip(&fragments)
            .map(|(checksum, fragment)| {
                let view = PacketView::parse(fragment).unwrap();
                reassembler.push(Timestamp::ZERO, IngressId(0), &view, checksum, &mut Vec::new())
            });
        assert_eq!(last.last(), Some(Reassembly::Complete(expected)));
    }
}

fn push(reassembler: &mut Reassembler, now: Timestamp, packet: &[u8]) -> Result<Option<Vec<u8>>, DropReason> {
    push_from(reassembler, now, 0, packet)
}

fn push_from(
    reassembler: &mut Reassembler,
    now: Timestamp,
    ingress: u16,
    packet: &[u8],
) -> Result<Option<Vec<u8>>, DropReason> {
    let view = PacketView::parse(packet).unwrap();
    assert!(view.fragment().is_some(), "the test pushes fragments");
    let mut whole = Vec::new();
    let taken = reassembler.push(now, IngressId(ingress), &view, ChecksumState::Trusted, &mut whole);
    while reassembler.evict() {}
    match taken {
        Reassembly::Held => Ok(None),
        Reassembly::Complete(_) => Ok(Some(whole)),
        Reassembly::Dropped(reason) => Err(reason),
    }
}

fn datagram(v6: bool, payload: &[u8]) -> Vec<u8> {
    let (client, target): (SocketAddr, SocketAddr) = if v6 {
        (
            "[2001:db8::2]:4000".parse().unwrap(),
            "[2001:db8::7]:53".parse().unwrap(),
        )
    } else {
        ("10.0.0.2:4000".parse().unwrap(), "192.0.2.7:53".parse().unwrap())
    };
    let built = Built::udp(client, target, payload, None).unwrap();
    let mut packet = vec![0; built.packet_len()];
    let out = built.write(&mut packet, IDENTIFICATION, IngressId(0), None);
    complete_checksum(&mut packet, &out);
    packet
}

/// Cuts `packet` before each of `offsets` in its IP payload.
fn cut(packet: &[u8], offsets: &[usize], identification: u16) -> Vec<Vec<u8>> {
    let v6 = packet[0] >> 4 == 6;
    let data = &packet[if v6 { 40 } else { 20 }..];
    let mut bounds: Vec<usize> = offsets.iter().copied().chain([0, data.len()]).collect();
    bounds.sort_unstable();
    bounds.dedup();
    bounds
        .windows(2)
        .map(|bound| {
            let (part, more) = (&data[bound[0]..bound[1]], bound[1] < data.len());
            if v6 {
                fragment_v6(packet, bound[0], part, more, identification.into())
            } else {
                fragment_v4(packet, bound[0], part, more, identification)
            }
        })
        .collect()
}

/// A fragment with the headers of `packet`.
fn fragment_v4(packet: &[u8], offset: usize, data: &[u8], more: bool, identification: u16) -> Vec<u8> {
    let header_len = usize::from(packet[0] & 15) * 4;
    let mut fragment = [&packet[..header_len], data].concat();
    let len = fragment.len() as u16;
    fragment[2..4].copy_from_slice(&len.to_be_bytes());
    fragment[4..6].copy_from_slice(&identification.to_be_bytes());
    fragment[6..8].copy_from_slice(&(u16::from(more) << 13 | (offset / 8) as u16).to_be_bytes());
    fragment
}

fn fragment_v6(packet: &[u8], offset: usize, data: &[u8], more: bool, identification: u32) -> Vec<u8> {
    let offset_and_more = offset as u16 | u16::from(more);
    let mut fragment = packet[..40].to_vec();
    fragment.extend([packet[6], 0]);
    fragment.extend(offset_and_more.to_be_bytes());
    fragment.extend(identification.to_be_bytes());
    fragment.extend(data);
    let len = (fragment.len() - 40) as u16;
    fragment[4..6].copy_from_slice(&len.to_be_bytes());
    fragment[6] = 44;
    fragment
}
