//! IP reassembly: fragments in, whole packets out.
//!
//! The fragments of a datagram have ingress, addresses and identification in common, in IPv4 the protocol too. They
//! may come in any order and more than once. A datagram waits for its last fragment until a timeout that counts
//! from the first to arrive (RFC 8200, section 4.5; RFC 1122, section 3.3.2); when the memory budget is used up,
//! the datagram that has waited longest goes.
//!
//! Overlaps: in IPv6 a fragment that overlaps another is a reason to discard the whole datagram and everything that
//! still comes of it until the timeout (RFC 5722, RFC 8200); in IPv4, where RFC 791 leaves it open, the bytes that
//! came first win. Exact duplicates are no overlap: networks make them, and RFC 8200 allows to pass over them, as
//! Linux does.
//!
//! A first fragment may end before its transport header does (RFC 1858, RFC 7112): nothing here looks at one, and
//! the whole packet is judged again.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::addr::IngressId;
use crate::event::DropReason;
use crate::io::ChecksumState;
use crate::packet::checksum::sum;
use crate::packet::{FragmentView, PacketView};
use crate::time::Timestamp;

/// Fragments of one datagram: enough for 65,535 bytes by a link that carries 296, the smallest MTU in RFC 1191.
const PIECES_MAX: usize = 256;

/// Memory that a datagram takes apart from its bytes: an entry in each of two trees, whose nodes are at least about
/// half full.
const OVERHEAD: usize = 2 * (size_of::<Datagram>() + size_of::<Key>() + 2 * size_of::<u64>());

/// Puts fragmented datagrams together, within bounds of memory and time.
#[derive(Debug)]
pub struct Reassembler {
    budget: usize,
    timeout: Duration,
    used: usize,
    next_serial: u64,
    /// By serial number, which is also the order of deadlines.
    datagrams: BTreeMap<u64, Datagram>,
    serials: BTreeMap<Key, u64>,
}

/// What became of a fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reassembly {
    /// It waits for the others, or said nothing new.
    Held,
    /// The packet is whole. Its transport checksum is trusted if that of every fragment was.
    Complete(ChecksumState),
    /// It was dropped, for one of the fragment reasons.
    Dropped(DropReason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    ingress: IngressId,
    identification: u32,
    /// `None` in IPv6.
    protocol: Option<u8>,
    source: IpAddr,
    destination: IpAddr,
}

#[derive(Debug)]
struct Datagram {
    key: Key,
    deadline: Timestamp,
    /// What its memory was counted as.
    cost: usize,
    /// An overlap was found: nothing is kept but the key.
    discarded: bool,
    checksum: ChecksumState,
    /// Headers of the first fragment, made out as those of the whole packet but for the length.
    headers: Vec<u8>,
    /// Length of the data, once the last fragment is here.
    total: Option<u32>,
    /// Length of all pieces.
    received: u32,
    /// Where the data so far ends.
    end: u32,
    /// What has been received, by offset; pieces do not overlap.
    pieces: Vec<Piece>,
    /// Their bytes, in order of arrival.
    bytes: Vec<u8>,
}

/// A run of data, at `at` in [`Datagram::bytes`].
#[derive(Debug, Clone, Copy)]
struct Piece {
    offset: u32,
    len: u32,
    at: u32,
}

impl Reassembler {
    /// Makes one that holds `budget` bytes, counting its own bookkeeping, each no longer than `timeout`.
    pub fn new(budget: usize, timeout: Duration) -> Self {
        let (datagrams, serials) = (BTreeMap::new(), BTreeMap::new());
        Self {
            budget,
            timeout,
            used: 0,
            next_serial: 0,
            datagrams,
            serials,
        }
    }

    /// Takes the fragment `packet`. When it was the last one missing, `whole` becomes the packet they make: without
    /// fragment headers, with lengths and IPv4 checksum set right, its transport checksum not looked at. A packet
    /// that is no fragment is whole. Call [`Reassembler::evict`] afterwards.
    pub fn push(
        &mut self,
        now: Timestamp,
        ingress: IngressId,
        packet: &PacketView<'_>,
        checksum: ChecksumState,
        whole: &mut Vec<u8>,
    ) -> Reassembly {
        let Some(fragment) = packet.fragment() else {
            whole.clear();
            whole.extend_from_slice(packet.bytes());
            return Reassembly::Complete(checksum);
        };
        if let Err(reason) = check_length(packet, &fragment) {
            return Reassembly::Dropped(reason);
        }
        let key = Key {
            ingress,
            identification: fragment.identification,
            protocol: (!packet.is_ipv6()).then_some(fragment.next_header),
            source: packet.source(),
            destination: packet.destination(),
        };
        let serial = *self.serials.entry(key).or_insert_with(|| {
            let serial = self.next_serial;
            self.next_serial += 1;
            self.datagrams
                .insert(serial, Datagram::new(key, now + self.timeout));
            serial
        });
        let datagram = self.datagrams.get_mut(&serial).expect("every key has a datagram");
        let result = datagram.push(packet, &fragment, checksum);
        let cost = datagram.memory();
        self.used = self.used - std::mem::replace(&mut datagram.cost, cost) + cost;
        match result {
            Ok(false) => Reassembly::Held,
            Ok(true) => {
                let datagram = self.remove(serial);
                datagram.write(whole);
                Reassembly::Complete(datagram.checksum)
            }
            Err(reason) => Reassembly::Dropped(reason),
        }
    }

    /// Lets the oldest datagram go while the budget is exceeded, for [`DropReason::FragmentMemory`]; says whether one
    /// went and there may be more. The last fragment taken may exceed the budget until then.
    pub fn evict(&mut self) -> bool {
        self.remove_oldest_while(|reassembler| reassembler.used > reassembler.budget)
    }

    /// When the next datagram will have waited too long.
    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.datagrams
            .first_key_value()
            .map(|(_, datagram)| datagram.deadline)
    }

    /// Lets a datagram go that has waited too long at `now`, for [`DropReason::FragmentTimeout`]; says whether one
    /// went and there may be more.
    pub fn expire(&mut self, now: Timestamp) -> bool {
        self.remove_oldest_while(|reassembler| {
            reassembler
                .next_deadline()
                .is_some_and(|deadline| deadline <= now)
        })
    }

    /// Removes datagrams, the oldest first, until one is gone that has not been counted as dropped before.
    fn remove_oldest_while(&mut self, condition: impl Fn(&Self) -> bool) -> bool {
        while condition(self) {
            let (&oldest, _) = self
                .datagrams
                .first_key_value()
                .expect("the condition is about datagrams");
            if !self.remove(oldest).discarded {
                return true;
            }
        }
        false
    }

    fn remove(&mut self, serial: u64) -> Datagram {
        let datagram = self
            .datagrams
            .remove(&serial)
            .expect("only what is there is removed");
        self.serials.remove(&datagram.key);
        self.used -= datagram.cost;
        datagram
    }
}

/// Refuses lengths that no datagram's fragment has.
fn check_length(packet: &PacketView<'_>, fragment: &FragmentView<'_>) -> Result<(), DropReason> {
    let len = fragment.payload.len();
    if len == 0 || (fragment.more && !len.is_multiple_of(8)) {
        return Err(DropReason::FragmentLength);
    }
    check_whole(
        packet.source(),
        fragment.headers.len(),
        usize::from(fragment.offset) + len,
    )
}

/// Refuses a packet that is longer than its IP length field can say.
fn check_whole(source: IpAddr, headers: usize, data: usize) -> Result<(), DropReason> {
    let not_counted = if source.is_ipv6() { 40 } else { 0 };
    if headers - not_counted + data > usize::from(u16::MAX) {
        return Err(DropReason::FragmentLength);
    }
    Ok(())
}

impl Datagram {
    fn new(key: Key, deadline: Timestamp) -> Self {
        Self {
            key,
            deadline,
            cost: 0,
            discarded: false,
            checksum: ChecksumState::Trusted,
            headers: Vec::new(),
            total: None,
            received: 0,
            end: 0,
            pieces: Vec::new(),
            bytes: Vec::new(),
        }
    }

    /// Takes a fragment; says whether the datagram is complete.
    fn push(
        &mut self,
        packet: &PacketView<'_>,
        fragment: &FragmentView<'_>,
        checksum: ChecksumState,
    ) -> Result<bool, DropReason> {
        if self.discarded {
            return Err(DropReason::FragmentOverlap);
        }
        let offset = u32::from(fragment.offset);
        let end = offset + fragment.payload.len() as u32;
        let ends_elsewhere = match self.total {
            Some(total) => end > total || (!fragment.more && end != total),
            None => !fragment.more && end < self.end,
        };
        if ends_elsewhere {
            if packet.is_ipv6() {
                self.discard();
            }
            return Err(DropReason::FragmentLength);
        }
        if packet.is_ipv6() && self.overlaps(offset, end) {
            if self.holds(offset, fragment.payload) {
                return Ok(false);
            }
            self.discard();
            return Err(DropReason::FragmentOverlap);
        }
        self.insert(offset, fragment.payload)?;
        self.end = self.end.max(end);
        if !fragment.more {
            self.total = Some(end);
        }
        if offset == 0 && self.headers.is_empty() {
            self.headers.extend_from_slice(fragment.headers);
            self.headers[usize::from(fragment.next_header_at)] = fragment.next_header;
        }
        if checksum == ChecksumState::Unverified {
            self.checksum = ChecksumState::Unverified;
        }
        if self.total != Some(self.received) {
            return Ok(false);
        }
        // The first fragment's headers count, which may be longer than this one's.
        if check_whole(self.key.source, self.headers.len(), self.received as usize).is_err() {
            self.discard();
            return Err(DropReason::FragmentLength);
        }
        Ok(true)
    }

    fn discard(&mut self) {
        let gone = std::mem::replace(self, Self::new(self.key, self.deadline));
        self.cost = gone.cost;
        self.discarded = true;
    }

    fn overlaps(&self, offset: u32, end: u32) -> bool {
        let behind = self
            .pieces
            .partition_point(|piece| piece.offset + piece.len <= offset);
        self.pieces.get(behind).is_some_and(|piece| piece.offset < end)
    }

    /// Whether just this run of data has come as one piece before.
    fn holds(&self, offset: u32, data: &[u8]) -> bool {
        self.pieces
            .binary_search_by_key(&offset, |piece| piece.offset)
            .is_ok_and(|index| self.pieces[index].of(&self.bytes) == data)
    }

    /// Adds what is new of `data`.
    fn insert(&mut self, offset: u32, data: &[u8]) -> Result<(), DropReason> {
        let end = offset + data.len() as u32;
        let mut index = self
            .pieces
            .partition_point(|piece| piece.offset + piece.len <= offset);
        let mut from = offset;
        while from < end {
            let next = self.pieces.get(index).copied();
            let to = next.map_or(end, |piece| piece.offset.min(end));
            if from < to {
                if self.pieces.len() == PIECES_MAX {
                    return Err(DropReason::FragmentMemory);
                }
                let piece = Piece {
                    offset: from,
                    len: to - from,
                    at: self.bytes.len() as u32,
                };
                self.bytes
                    .extend_from_slice(&data[(from - offset) as usize..(to - offset) as usize]);
                self.pieces.insert(index, piece);
                self.received += piece.len;
                index += 1;
            }
            let Some(piece) = next else { break };
            from = to.max(piece.offset + piece.len);
            index += 1;
        }
        Ok(())
    }

    /// Writes the whole packet.
    fn write(&self, packet: &mut Vec<u8>) {
        packet.clear();
        packet.extend_from_slice(&self.headers);
        for piece in &self.pieces {
            packet.extend_from_slice(piece.of(&self.bytes));
        }
        if self.key.source.is_ipv6() {
            let len = (packet.len() - 40) as u16;
            packet[4..6].copy_from_slice(&len.to_be_bytes());
        } else {
            let len = packet.len() as u16;
            packet[2..4].copy_from_slice(&len.to_be_bytes());
            packet[6..8].fill(0); // flags and offset
            packet[10..12].fill(0);
            let checksum = !sum(&packet[..self.headers.len()]);
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
    }

    fn memory(&self) -> usize {
        OVERHEAD
            + self.headers.capacity()
            + self.bytes.capacity()
            + self.pieces.capacity() * size_of::<Piece>()
    }
}

impl Piece {
    fn of(self, bytes: &[u8]) -> &[u8] {
        &bytes[self.at as usize..][..self.len as usize]
    }
}

#[cfg(test)]
mod tests {
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

    fn push(
        reassembler: &mut Reassembler,
        now: Timestamp,
        packet: &[u8],
    ) -> Result<Option<Vec<u8>>, DropReason> {
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
}
