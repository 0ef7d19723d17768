//! The journal: everything that enters an engine, in order, so that a run can be repeated byte for byte.
//!
//! A journal starts with [`MAGIC`] and the format's version as a little-endian 32-bit number. Blocks follow, each with
//! its length and CRC-32 (as in gzip) in front, both little-endian and 32 bits: first the [`Header`], then one block
//! for each [`Entry`], encoded by postcard. A journal that was cut, by a full disk or a crash, is good up to the cut.
//! Entries of several shards may be mixed; only the order within one shard means something.
//!
//! [`Recorded`] writes what it lets through to an engine. To repeat a run, make engines from [`Header::engine`] and
//! [`apply`](Entry::apply) each entry to the one that it names.
//!
//! Of IPv6 addresses, scope and flow label are not kept. Any change to a type in here, or to one that its fields name, is a new [`VERSION`].

mod decode;
mod record;

use std::borrow::Cow;
use std::num::NonZeroU16;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use decode::Decoder;
pub use record::Recorded;

use crate::addr::{FlowId, IngressId, ShardId};
use crate::bypass::BypassNews;
use crate::config::Config;
use crate::dns::Learned;
use crate::engine::Engine;
use crate::io::{ChecksumState, UpstreamEvent};
use crate::policy::{Policy, PolicySpec};
use crate::time::Timestamp;

/// What every journal starts with.
pub const MAGIC: &[u8; 15] = b"tungate-journal";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 5;

const PREAMBLE_LEN: usize = MAGIC.len() + size_of::<u32>();
/// Length and checksum.
const BLOCK_HEADER_LEN: usize = 8;
/// Longest block: a policy of some millions of entries. More is a damaged length.
const BLOCK_MAX: usize = 1 << 28;

/// What the engines of a run were made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The configuration of shard 0, which says how many there are; the others differ in [`Config::shard`] only.
    pub config: Config,
    /// The policy at the start.
    pub policy: PolicySpec,
    /// The seed of every engine.
    pub seed: [u8; 32],
    /// When the engines were made.
    pub start: Timestamp,
}

/// One call of an engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry<'a> {
    /// Whose engine was called.
    pub shard: ShardId,
    /// The time it was told.
    pub at: Timestamp,
    /// The call.
    #[serde(borrow)]
    pub call: Call<'a>,
    /// What [`World::has_room`](crate::io::World::has_room) answered during the call: how often yes, then how often no, and so on. All answers
    /// behind the last of these were yes.
    pub room: Vec<u32>,
    /// How many bytes [`World::offer`](crate::io::World::offer) took during the call, which makes one offer at most.
    pub taken: u32,
}

/// The calls an engine has, with what the caller put in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call<'a> {
    /// [`Engine::handle`] with [`Input::Packet`](crate::io::Input::Packet).
    Packet {
        /// As in [`PacketIn`](crate::io::PacketIn).
        ingress: IngressId,
        /// As in [`PacketIn`](crate::io::PacketIn).
        checksum: ChecksumState,
        /// As in [`PacketIn`](crate::io::PacketIn).
        segment_size: Option<NonZeroU16>,
        /// As in [`PacketIn`](crate::io::PacketIn).
        reassembled: bool,
        /// The packet.
        #[serde(borrow, with = "serde_bytes")]
        bytes: &'a [u8],
    },
    /// [`Engine::handle`] with [`Input::Upstream`](crate::io::Input::Upstream).
    Upstream(FlowId, #[serde(borrow)] UpstreamEvent<'a>),
    /// [`Engine::handle`] with [`Input::Bypass`](crate::io::Input::Bypass): all that is known of a flow that the kernel has
    /// carried.
    Bypass(BypassNews),
    /// [`Engine::handle`] with [`Input::Wakeup`](crate::io::Input::Wakeup).
    Wakeup,
    /// [`Engine::handle`] with [`Input::Policy`](crate::io::Input::Policy).
    Policy(Cow<'a, PolicySpec>),
    /// [`Engine::handle`] with [`Input::WallClock`](crate::io::Input::WallClock).
    WallClock(i64),
    /// [`Engine::handle`] with [`Input::Learned`](crate::io::Input::Learned).
    Learned(Cow<'a, Learned>),
    /// [`Engine::handle`] with [`Input::Drain`](crate::io::Input::Drain).
    Drain,
    /// [`Engine::flush`].
    Flush,
    /// [`Engine::read`] from this flow, of which this many bytes were taken.
    Read(FlowId, u32),
    /// [`Engine::write`] of these bytes to this flow.
    Write(FlowId, #[serde(borrow, with = "serde_bytes")] &'a [u8]),
}

/// Why a journal cannot be read further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum JournalError {
    /// The first bytes are others.
    #[error("this is not a tungate journal: it does not start with \"tungate-journal\"")]
    NotAJournal,
    /// Another version of the format.
    #[error(
        "this journal has format version {found}, but only {VERSION} can be read: replay it with the version of \
         tungate that wrote it"
    )]
    Version {
        /// The version it has.
        found: u32,
    },
    /// A block does not fit its checksum or means nothing.
    #[error("the journal is damaged at byte {offset}: what comes before it can be replayed")]
    Damaged {
        /// Where the block starts.
        offset: u64,
    },
    /// The end is missing.
    #[error("the journal is cut short at byte {offset}: what comes before it can be replayed")]
    Cut {
        /// Where the incomplete block starts.
        offset: u64,
    },
}

impl Header {
    /// Makes the engine of `shard`; `policy` is built from [`Header::policy`], once for all shards.
    pub fn engine(&self, shard: ShardId, policy: Arc<Policy>) -> Engine {
        Engine::new(
            Config {
                shard,
                ..self.config.clone()
            },
            policy,
            self.seed,
            self.start,
        )
    }

    /// Appends the start of a journal to `journal`.
    pub fn encode(&self, journal: &mut Vec<u8>) {
        journal.extend_from_slice(MAGIC);
        journal.extend_from_slice(&VERSION.to_le_bytes());
        encode_block(self, journal);
    }
}

impl Entry<'_> {
    /// Appends the entry to `journal`.
    pub fn encode(&self, journal: &mut Vec<u8>) {
        encode_block(self, journal);
    }
}

fn encode_block(value: &impl Serialize, journal: &mut Vec<u8>) {
    let start = journal.len();
    journal.extend_from_slice(&[0; BLOCK_HEADER_LEN]);
    let mut encoded = postcard::to_extend(value, std::mem::take(journal)).expect("memory takes any value");
    let (header, block) = encoded[start..].split_at_mut(BLOCK_HEADER_LEN);
    header[..4].copy_from_slice(&(block.len() as u32).to_le_bytes());
    header[4..].copy_from_slice(&crc32fast::hash(block).to_le_bytes());
    *journal = encoded;
}
