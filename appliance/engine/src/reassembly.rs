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
mod tests;
