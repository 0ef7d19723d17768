//! A worker: some of the shards, in a thread.

use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, SyncSender};

use tungate_engine::{ShardId, Timestamp};

use super::SHARDS;
use super::ahead::{AHEAD, look_ahead};
use super::item::{Batch, Counts, End, Output, Reply};
use super::prefilter::Filter;
use super::shard::{Setup, Shard};

/// Plays the items of every `jobs`-th shard.
pub(super) struct Worker<'a> {
    pub(super) index: usize,
    pub(super) jobs: usize,
    pub(super) setup: &'a Setup,
    pub(super) filter: Filter,
    pub(super) started: &'a OnceLock<u64>,
    pub(super) work: Receiver<Box<Batch>>,
    pub(super) found: SyncSender<Box<Batch>>,
    pub(super) reply: SyncSender<Reply>,
}

/// What a worker comes to.
pub(super) struct Done {
    pub(super) counts: Counts,
    pub(super) hashes: Vec<(ShardId, [u8; 32])>,
}

impl<'a> Worker<'a> {
    /// Works until the capture is over, or nobody is there any more to work for.
    pub(super) fn run(mut self) -> Done {
        let mut shards: Vec<Shard> = Vec::new();
        let mut output: Box<Output> = Box::default();
        let mut ahead = Vec::new();
        let place: [u8; SHARDS as usize] = std::array::from_fn(|shard| (shard / self.jobs) as u8);
        while let Ok(mut batch) = self.work.recv() {
            if shards.is_empty() {
                let started = self.started.get().copied().unwrap_or(0);
                let setup = Setup {
                    started,
                    ..self.setup.clone()
                };
                self.filter.started = started;
                let own = (self.index as u8..SHARDS).step_by(self.jobs);
                shards = own.map(|shard| Shard::new(ShardId(shard), &setup)).collect();
            }
            let mut answer = None;
            let Batch { items, bytes, .. } = &mut *batch;
            for items in items.chunks(AHEAD) {
                look_ahead(items, bytes, self.setup.checksums, &mut self.filter, &mut ahead);
                for (item, ahead) in items.iter().zip(&ahead) {
                    let shard = &mut shards[usize::from(place[usize::from(item.shard.0)])];
                    std::mem::swap(&mut output, &mut shard.stage.output);
                    answer = shard.play(item, bytes, ahead);
                    std::mem::swap(&mut output, &mut shard.stage.output);
                }
            }
            match batch.end {
                End::Reply => {
                    let answer = answer.expect("what asks for a reply is the last of its batch");
                    if self.reply.send(answer).is_err() {
                        break;
                    }
                    batch.items.clear();
                    continue;
                }
                End::Epoch => on_all(&mut shards, &mut output, |shard| shard.advance(batch.until)),
                End::Capture => {
                    let mut settled = Timestamp::ZERO;
                    on_all(&mut shards, &mut output, |shard| {
                        settled = settled.max(shard.end_capture(batch.until));
                    });
                    if self.reply.send(Reply::Settled(settled)).is_err() {
                        break;
                    }
                    continue;
                }
                End::Books => on_all(&mut shards, &mut output, |shard| shard.close_books(batch.until)),
            }
            for shard in &mut shards {
                let journal = shard.host.take_journal();
                if !journal.is_empty() {
                    output.journal.push((shard.stage.shard, journal));
                }
            }
            let is_last = batch.end == End::Books;
            std::mem::swap(&mut output, &mut batch.output);
            if self.found.send(batch).is_err() || is_last {
                break;
            }
        }
        let mut counts = Counts::default();
        let mut hashes = Vec::new();
        for shard in shards {
            counts.merge(shard.counts);
            hashes.push((shard.stage.shard, shard.stage.digest.finish()));
        }
        Done { counts, hashes }
    }
}

/// Does something with each shard; what it finds goes to one output.
fn on_all(shards: &mut [Shard], output: &mut Box<Output>, mut each: impl FnMut(&mut Shard)) {
    for shard in shards {
        std::mem::swap(output, &mut shard.stage.output);
        each(shard);
        std::mem::swap(output, &mut shard.stage.output);
    }
}
