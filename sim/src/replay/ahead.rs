//! What can be found out about packets before they are played, many at a time.
//!
//! Nothing of what they lead to matters to it. The engine and the modelled peers fill a processor's instruction cache by
//! themselves: done packet by packet, between their turns, it would have both out of that cache all the time.

use super::item::{Item, What};
use super::prefilter::{Filter, Seen};
use super::repair::Checksums;
use super::tcp::CapturedSegment;
use crate::outcome::Side;

/// How many items are looked at before they are played: enough to share what it takes to change over, few enough that
/// their packets are still in the cache.
pub(super) const AHEAD: usize = 64;

/// What was found out about one item.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// What the pre-filter made of it, if it is a packet from a client.
    pub(super) seen: Option<Seen>,
    /// Its segment, if it is a packet with a sound TCP header.
    pub(super) segment: Option<CapturedSegment>,
}

/// Looks at `items`; `ahead` gets an entry for each.
pub(super) fn look_ahead(
    items: &[Item],
    bytes: &[u8],
    checksums: Checksums,
    filter: &mut Filter,
    ahead: &mut Vec<Ahead>,
) {
    ahead.clear();
    for item in items {
        ahead.push(Ahead {
            seen: filter.look_at(item, bytes),
            segment: None,
        });
    }
    for (item, ahead) in items.iter().zip(ahead) {
        let (side, packet) = match &item.what {
            What::Packet(side, _, packet) => (*side, packet),
            What::Answer(_, packet) => (Side::Target, packet),
            _ => continue,
        };
        ahead.segment = CapturedSegment::read(side, packet, &bytes[packet.ip()], checksums);
    }
}
