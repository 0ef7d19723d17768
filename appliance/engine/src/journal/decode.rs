//! Reading journals.

use serde::Deserialize;

use super::{BLOCK_HEADER_LEN, BLOCK_MAX, Entry, Header, JournalError, MAGIC, PREAMBLE_LEN, VERSION};

/// Reads a journal from pieces of any size.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// How much of `bytes` has been read.
    position: usize,
    /// Where in the journal `bytes` starts.
    base: u64,
    header: Option<Header>,
}

impl Decoder {
    /// Makes one for a journal of which nothing has been read.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next bytes of the journal.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.position);
        self.base += self.position as u64;
        self.position = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The header; `None` as long as bytes are missing.
    ///
    /// # Errors
    ///
    /// Why these bytes cannot be read; calling again gives the same error.
    pub fn header(&mut self) -> Result<Option<&Header>, JournalError> {
        if self.header.is_none() {
            let start = &self.bytes[..self.bytes.len().min(MAGIC.len())];
            if !MAGIC.starts_with(start) {
                return Err(JournalError::NotAJournal);
            }
            let Some(&version) = self.bytes.get(MAGIC.len()..).and_then(|rest| rest.first_chunk()) else {
                return Ok(None);
            };
            match u32::from_le_bytes(version) {
                VERSION => {}
                found => return Err(JournalError::Version { found }),
            }
            let Some((block, next)) = block(&self.bytes, PREAMBLE_LEN, self.base)? else {
                return Ok(None);
            };
            self.header = Some(decode(block, self.base + PREAMBLE_LEN as u64)?);
            self.position = next;
        }
        Ok(self.header.as_ref())
    }

    /// The next entry, whose bytes are lent; `None` as long as bytes are missing.
    ///
    /// # Errors
    ///
    /// Why these bytes cannot be read; calling again gives the same error.
    pub fn next_entry(&mut self) -> Result<Option<Entry<'_>>, JournalError> {
        if self.header()?.is_none() {
            return Ok(None);
        }
        let offset = self.offset();
        let Some((block, next)) = block(&self.bytes, self.position, self.base)? else {
            return Ok(None);
        };
        let entry = decode(block, offset)?;
        self.position = next;
        Ok(Some(entry))
    }

    /// Makes sure that the journal may end here.
    ///
    /// # Errors
    ///
    /// [`JournalError::Cut`] within the header or an entry.
    pub fn finish(&self) -> Result<(), JournalError> {
        if self.header.is_some() && self.position == self.bytes.len() {
            Ok(())
        } else {
            Err(JournalError::Cut {
                offset: self.offset(),
            })
        }
    }

    fn offset(&self) -> u64 {
        self.base + self.position as u64
    }
}

/// The block at `position` and where the next one starts; `None` if bytes are missing.
fn block(bytes: &[u8], position: usize, base: u64) -> Result<Option<(&[u8], usize)>, JournalError> {
    let damaged = JournalError::Damaged {
        offset: base + position as u64,
    };
    let Some((header, rest)) = bytes[position..].split_first_chunk::<BLOCK_HEADER_LEN>() else {
        return Ok(None);
    };
    let [a, b, c, d, checksum @ ..] = *header;
    let len = u32::from_le_bytes([a, b, c, d]) as usize;
    if len > BLOCK_MAX {
        return Err(damaged);
    }
    let Some(block) = rest.get(..len) else {
        return Ok(None);
    };
    if crc32fast::hash(block) != u32::from_le_bytes(checksum) {
        return Err(damaged);
    }
    Ok(Some((block, position + BLOCK_HEADER_LEN + len)))
}

/// Decodes a block that starts at `offset`; all of it must mean something.
fn decode<'a, T: Deserialize<'a>>(block: &'a [u8], offset: u64) -> Result<T, JournalError> {
    match postcard::take_from_bytes(block) {
        Ok((value, [])) => Ok(value),
        Ok(_) | Err(_) => Err(JournalError::Damaged { offset }),
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::net::{IpAddr, SocketAddr};
    use std::num::NonZeroU16;
    use std::time::Duration;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::addr::{FlowId, IngressId, ShardId};
    use crate::config::Config;
    use crate::dns::Learned;
    use crate::io::{ChecksumState, IcmpError, Unreachable, UpstreamError, UpstreamEvent};
    use crate::journal::Call;
    use crate::policy::PolicySpec;
    use crate::time::Timestamp;

    proptest! {
        #[test]
        fn entries_come_back_whatever_pieces_the_journal_comes_in(
            calls in vec(call(), 0..20),
            cuts in vec(any::<Index>(), 0..20),
        ) {
            let entries = entries(&calls);
            let journal = encoded(&entries);
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(journal.len())).collect();
            cuts.extend([0, journal.len()]);
            cuts.sort_unstable();
            let mut decoder = Decoder::new();
            let mut expected = entries.iter();
            for cut in cuts.windows(2) {
                decoder.push(&journal[cut[0]..cut[1]]);
                while let Some(entry) = decoder.next_entry().unwrap() {
                    prop_assert_eq!(Some(&entry), expected.next());
                }
            }
            prop_assert_eq!(expected.next(), None);
            prop_assert_eq!(decoder.header(), Ok(Some(&header())));
            prop_assert_eq!(decoder.finish(), Ok(()));
        }

        #[test]
        fn journal_is_good_up_to_the_block_that_was_cut(calls in vec(call(), 1..10), cut: Index) {
            let entries = entries(&calls);
            let journal = encoded(&entries);
            let starts = block_starts(&entries);
            let cut = cut.index(journal.len());
            let mut decoder = Decoder::new();
            decoder.push(&journal[..cut]);
            let mut good = 0;
            while let Some(entry) = decoder.next_entry().unwrap() {
                prop_assert_eq!(&entry, &entries[good]);
                good += 1;
            }
            let whole = starts.partition_point(|&start| start <= cut);
            prop_assert_eq!(good, whole.saturating_sub(1));
            match starts.contains(&cut) {
                true => prop_assert_eq!(decoder.finish(), Ok(())),
                false => {
                    let offset = if whole == 0 { 0 } else { starts[whole - 1] as u64 };
                    prop_assert_eq!(decoder.finish(), Err(JournalError::Cut { offset }));
                }
            }
        }

        #[test]
        fn damaged_block_is_named_and_what_comes_before_it_is_read(
            calls in vec(call(), 1..10),
            at: Index,
            bit in 0..8u8,
        ) {
            let entries = entries(&calls);
            let mut journal = encoded(&entries);
            let starts = block_starts(&entries);
            let at = starts[0] + at.index(journal.len() - starts[0]);
            journal[at] ^= 1 << bit;
            let damaged = starts.partition_point(|&start| start <= at) - 1;
            let mut decoder = Decoder::new();
            decoder.push(&journal);
            for entry in &entries[..damaged] {
                prop_assert_eq!(decoder.next_entry(), Ok(Some(entry.clone())));
            }
            let offset = starts[damaged] as u64;
            // A length that grew by the damage looks like a journal that goes on.
            let end = decoder.next_entry().map(|entry| entry.is_some());
            let end = if end == Ok(false) { decoder.finish() } else { end.map(|_| ()) };
            prop_assert!(
                end == Err(JournalError::Damaged { offset }) || end == Err(JournalError::Cut { offset }),
                "{:?}", end
            );
        }

        #[test]
        fn any_bytes_are_refused_or_read_without_a_panic(bytes in vec(any::<u8>(), 0..200), start in 0..3usize) {
            let good = encoded(&[]);
            let starts = [0, PREAMBLE_LEN, good.len()];
            let mut decoder = Decoder::new();
            decoder.push(&good[..starts[start]]);
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_entry() {}
        }

    }

    #[test]
    fn other_files_and_versions_are_told_apart() {
        let mut decoder = Decoder::new();
        decoder.push(b"\xd4\xc3\xb2\xa1");
        assert_eq!(decoder.next_entry(), Err(JournalError::NotAJournal));

        let mut journal = encoded(&[]);
        journal[MAGIC.len()] = 99;
        let mut decoder = Decoder::new();
        decoder.push(&journal);
        assert_eq!(decoder.next_entry(), Err(JournalError::Version { found: 99 }));
    }

    fn header() -> Header {
        Header {
            config: Config {
                shards: 3,
                ..Config::default()
            },
            policy: PolicySpec::default(),
            seed: [9; 32],
            start: Timestamp::from_nanos(5),
        }
    }

    fn entries<'a>(calls: &'a [(u8, u64, Call<'static>, Vec<u32>)]) -> Vec<Entry<'a>> {
        let entry = |(shard, at, call, room): &'a (u8, u64, Call<'static>, Vec<u32>)| Entry {
            shard: ShardId(*shard),
            at: Timestamp::from_nanos(*at),
            call: call.clone(),
            room: room.clone(),
            taken: room.iter().fold(0, |taken, &run| taken ^ run),
        };
        calls.iter().map(entry).collect()
    }

    fn encoded(entries: &[Entry<'_>]) -> Vec<u8> {
        let mut journal = Vec::new();
        header().encode(&mut journal);
        for entry in entries {
            entry.encode(&mut journal);
        }
        journal
    }

    /// Where each entry starts, and where the journal ends.
    fn block_starts(entries: &[Entry<'_>]) -> Vec<usize> {
        (0..=entries.len())
            .map(|count| encoded(&entries[..count]).len())
            .collect()
    }

    fn call() -> impl Strategy<Value = (u8, u64, Call<'static>, Vec<u32>)> {
        let flow = any::<u32>().prop_map(|slot| FlowId::new(ShardId(2), 1, slot));
        let bytes = vec(any::<u8>(), 0..300).prop_map(|bytes| &*bytes.leak());
        let size = any::<Option<NonZeroU16>>();
        let address = any::<SocketAddr>().prop_map(|address| match address {
            SocketAddr::V6(v6) => SocketAddr::new((*v6.ip()).into(), v6.port()), // scope and flow label are lost
            v4 => v4,
        });
        let event = prop_oneof![
            Just(UpstreamEvent::Connected),
            Just(UpstreamEvent::Failed(UpstreamError::Unreachable(
                Unreachable::Host
            ))),
            Just(UpstreamEvent::ReadClosed),
            Just(UpstreamEvent::Reset),
            (address.clone(), bytes.clone(), size.clone()).prop_map(|(source, payload, segment_size)| {
                UpstreamEvent::Datagram {
                    source,
                    payload,
                    segment_size,
                }
            }),
            (any::<u16>(), bytes.clone())
                .prop_map(|(sequence, payload)| UpstreamEvent::EchoReply { sequence, payload }),
            (address, any::<Option<IpAddr>>(), any::<u16>()).prop_map(|(target, reporter, mtu)| {
                UpstreamEvent::Error {
                    target,
                    reporter,
                    error: IcmpError::PacketTooBig { mtu },
                }
            }),
        ];
        let checksum = prop_oneof![Just(ChecksumState::Trusted), Just(ChecksumState::Unverified)];
        let packet = (any::<u16>(), checksum, size, any::<bool>(), bytes.clone());
        let name = (
            any::<IpAddr>(),
            any::<u32>().prop_map(|seconds| Duration::from_secs(seconds.into())),
        );
        let learned = (any::<u16>(), any::<IpAddr>(), ".{0,20}", vec(name, 0..4)).prop_map(
            |(ingress, client, name, addresses)| Learned {
                ingress: IngressId(ingress),
                client,
                name,
                addresses,
            },
        );
        let call = prop_oneof![
            packet.prop_map(|(ingress, checksum, segment_size, reassembled, bytes)| {
                Call::Packet {
                    ingress: IngressId(ingress),
                    checksum,
                    segment_size,
                    reassembled,
                    bytes,
                }
            }),
            (flow.clone(), event).prop_map(|(flow, event)| Call::Upstream(flow, event)),
            Just(Call::Wakeup),
            Just(Call::Policy(Cow::Owned(PolicySpec::default()))),
            any::<i64>().prop_map(Call::WallClock),
            learned.prop_map(|learned| Call::Learned(Cow::Owned(learned))),
            Just(Call::Drain),
            Just(Call::Flush),
            (flow.clone(), any::<u32>()).prop_map(|(flow, taken)| Call::Read(flow, taken)),
            (flow, bytes).prop_map(|(flow, bytes)| Call::Write(flow, bytes)),
        ];
        (any::<u8>(), any::<u64>(), call, vec(any::<u32>(), 0..4))
    }
}
