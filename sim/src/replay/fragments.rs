//! Fragments: whose they are, and putting together those of packets on their way to clients.
//!
//! Only a first fragment has ports. It says who sends its datagram; a fragment that comes before it is guessed to be
//! from whoever was last seen as the target or client of the other address.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use tungate_engine::io::ChecksumState;
use tungate_engine::packet::PacketView;
use tungate_engine::reassembly::{Reassembler, Reassembly};
use tungate_engine::{IngressId, Timestamp};

use super::roles::{Place, Roles, Sender};

/// Bytes of targets' fragments that may wait; far more than an engine takes, for any number of clients.
const BUDGET: usize = 64 << 20;

/// How long a datagram waits for its fragments, and is remembered; as long as any receiver does (RFC 1122, 3.3.2).
const PATIENCE: Duration = Duration::from_secs(120);

/// Datagrams of which fragments have been seen.
pub(super) struct Fragments {
    senders: BTreeMap<Key, (Sender, Option<Place>)>,
    order: VecDeque<(Timestamp, Key)>,
    reassembler: Reassembler,
    whole: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    identification: u32,
}

impl Fragments {
    pub(super) fn new() -> Self {
        Self {
            senders: BTreeMap::new(),
            order: VecDeque::new(),
            reassembler: Reassembler::new(BUDGET, PATIENCE),
            whole: Vec::new(),
        }
    }

    /// Who has sent the fragment `view`, and the conversation it belongs to, where that is known.
    pub(super) fn sender(
        &mut self,
        now: Timestamp,
        view: &PacketView<'_>,
        roles: &mut Roles,
    ) -> (Sender, Option<Place>) {
        while let Some((_, key)) = self.order.pop_front_if(|(at, _)| *at < now) {
            self.senders.remove(&key);
        }
        let Some(fragment) = view.fragment() else {
            unreachable!("asked about fragments only")
        };
        let key = Key {
            source: view.source(),
            destination: view.destination(),
            identification: fragment.identification,
        };
        let known = self.senders.get(&key).copied();
        if let Some((sender, Some(place))) = known {
            return (sender, Some(place));
        }
        let ports = match fragment.payload.first_chunk() {
            Some(&[a, b, c, d]) if fragment.offset == 0 => {
                let ports = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                Some((fragment.next_header, ports))
            }
            Some(_) | None => None,
        };
        let (found, place) = roles.of_fragment(now, key.source, key.destination, ports);
        let sender = known.map_or(found, |(sender, _)| sender);
        if self.senders.insert(key, (sender, place)).is_none() {
            self.order.push_back((now + PATIENCE, key));
        }
        (sender, place)
    }

    /// Takes a target's fragment; returns the whole packet if it was the last one missing.
    pub(super) fn push(&mut self, now: Timestamp, view: &PacketView<'_>) -> Option<&[u8]> {
        while self.reassembler.expire(now) {}
        let pushed = self.reassembler.push(
            now,
            IngressId(0),
            view,
            ChecksumState::Unverified,
            &mut self.whole,
        );
        while self.reassembler.evict() {}
        match pushed {
            Reassembly::Complete(_) => Some(&self.whole),
            Reassembly::Held | Reassembly::Dropped(_) => None,
        }
    }
}
