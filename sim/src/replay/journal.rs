//! Journals: everything that enters the engines of a replay, written down, and repeated without a capture.
//!
//! The digest depends on nothing but what enters and leaves the engines, so repeating a journal comes to the same one;
//! if it does not, the engine has changed, or is not deterministic.

use std::io::{self, Read, Write};
use std::sync::Arc;

use tungate_engine::dns::Learned;
use tungate_engine::io::{PacketOut, UpstreamCommand};
use tungate_engine::journal::{Decoder, Header, JournalError};
use tungate_engine::{Config, Engine, Event, FlowId, PacketIn, Policy, ShardId, Timestamp, World};

use super::Options;
use super::digest::{Digest, combine};

/// Most shards that a journal may speak of; numbers of shards have 8 bits.
const SHARDS_MAX: u8 = u8::MAX;

/// What repeating a journal comes to.
#[derive(Debug, Clone)]
pub struct Repeated {
    /// Calls of engines.
    pub calls: u64,
    /// Packets that entered.
    pub packets: u64,
    /// As in [`Outcome::digest`](super::Outcome::digest).
    pub digest: String,
    /// Where the journal could not be read on, and why.
    pub damaged: Option<JournalError>,
}

/// Writes the start of a replay's journal.
pub(super) fn write_header(config: &Config, options: &Options, journal: &mut dyn Write) -> io::Result<()> {
    let header = Header {
        config: config.clone(),
        policy: options.policy.spec().clone(),
        seed: options.seed,
        start: Timestamp::ZERO,
    };
    let mut bytes = Vec::new();
    header.encode(&mut bytes);
    journal.write_all(&bytes)
}

/// Repeats a journal on engines of its own.
///
/// # Errors
///
/// When `journal` cannot be read, or is none ([`io::ErrorKind::InvalidData`]). Damage behind its header is part of the
/// outcome.
pub fn repeat(mut journal: impl Read) -> io::Result<Repeated> {
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut decoder = Decoder::new();
    let mut buffer = vec![0; 1 << 16];
    while decoder.header().map_err(invalid)?.is_none() {
        let len = journal.read(&mut buffer)?;
        if len == 0 {
            decoder.finish().map_err(invalid)?;
        }
        decoder.push(&buffer[..len]);
    }
    let header = decoder.header().map_err(invalid)?.expect("it was there").clone();
    let policy = Arc::new(Policy::new(header.policy.clone()));
    let shards = header.config.shards.clamp(1, SHARDS_MAX);
    let mut engines: Vec<(Engine, Listener)> = (0..shards)
        .map(|shard| {
            (
                header.engine(ShardId(shard), Arc::clone(&policy)),
                Listener::new(),
            )
        })
        .collect();
    let mut repeated = Repeated {
        calls: 0,
        packets: 0,
        digest: String::new(),
        damaged: None,
    };
    loop {
        match play(&mut decoder, &mut engines, &mut repeated) {
            Ok(()) => {}
            Err(damage) => {
                repeated.damaged = Some(damage);
                break;
            }
        }
        let len = journal.read(&mut buffer)?;
        if len == 0 {
            repeated.damaged = decoder.finish().err();
            break;
        }
        decoder.push(&buffer[..len]);
    }
    let hashes: Vec<_> = engines
        .into_iter()
        .map(|(_, listener)| listener.digest.finish())
        .collect();
    repeated.digest = combine(&hashes);
    Ok(repeated)
}

/// Repeats the calls that have been read completely.
fn play(
    decoder: &mut Decoder,
    engines: &mut [(Engine, Listener)],
    repeated: &mut Repeated,
) -> Result<(), JournalError> {
    while let Some(entry) = decoder.next_entry()? {
        let Some((engine, listener)) = engines.get_mut(usize::from(entry.shard.0)) else {
            continue; // no engine of this number was ever made
        };
        listener.now = entry.at;
        let mut read = Vec::new();
        let (judgement, _) = entry.apply(engine, listener, |flow, bytes| read.push((flow, bytes.to_vec())));
        for (flow, bytes) in read {
            listener.digest.read(flow, &bytes);
        }
        repeated.calls += 1;
        if let Some(judgement) = judgement {
            repeated.packets += 1;
            listener.digest.judgement(&judgement);
        }
    }
    Ok(())
}

/// Hears what an engine says, and nothing more.
struct Listener {
    digest: Digest,
    now: Timestamp,
    buffer: Vec<u8>,
    lent: usize,
}

impl Listener {
    fn new() -> Self {
        Self {
            digest: Digest::new(),
            now: Timestamp::ZERO,
            buffer: vec![0; 1 << 16],
            lent: 0,
        }
    }
}

impl World for Listener {
    fn has_room(&self) -> bool {
        true
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.lent = len;
        &mut self.buffer[..len]
    }

    fn send_packet(&mut self, packet: PacketOut) {
        self.digest.packet(self.now, &packet, &self.buffer[..self.lent]);
    }

    fn upstream(&mut self, flow: FlowId, command: UpstreamCommand<'_>) {
        self.digest.command(self.now, flow, &command);
    }

    fn event(&mut self, event: &Event) {
        self.digest.event(self.now, event);
    }

    fn forward(&mut self, shard: ShardId, packet: PacketIn<'_>) {
        self.digest.forward(shard, packet.bytes);
    }

    // The journal has it among what the other engines were told.
    fn learned(&mut self, _: &Learned) {}
}
