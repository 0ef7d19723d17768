//! The engine, with everything that enters it written to a journal where one is wanted, and what it says hashed.

use std::sync::{Arc, Mutex};

use tungate_engine::journal::Recorded;
use tungate_engine::{Config, Deadline, Engine, FlowId, Input, Judgement, Timestamp};

use super::digest::Digest;
use super::shard::Setup;
use super::stage::Stage;

/// An engine that is being replayed.
pub(super) enum Host {
    Plain(Box<Engine>),
    Recorded(Box<Recorded<Sink>>, Arc<Mutex<Vec<u8>>>),
}

type Sink = Box<dyn FnMut(&[u8]) + Send>;

impl Host {
    pub(super) fn new(config: Config, setup: &Setup) -> Self {
        let shard = config.shard;
        let policy = Arc::clone(&setup.policies[0]);
        let engine = Engine::new(config, policy, setup.seed, Timestamp::ZERO);
        if !setup.journal {
            return Self::Plain(Box::new(engine));
        }
        let blocks = Arc::new(Mutex::new(Vec::new()));
        let written = Arc::clone(&blocks);
        let sink: Sink = Box::new(move |block| {
            written
                .lock()
                .expect("writing to memory does not panic")
                .extend_from_slice(block);
        });
        Self::Recorded(Box::new(Recorded::new(engine, shard, sink)), blocks)
    }

    pub(super) fn handle(
        &mut self,
        now: Timestamp,
        input: Input<'_>,
        stage: &mut Stage,
    ) -> Option<Judgement> {
        let judgement = match self {
            Self::Plain(engine) => engine.handle(now, input, stage),
            Self::Recorded(engine, _) => engine.handle(now, input, stage),
        };
        if let Some(judgement) = &judgement {
            stage.digest.judgement(judgement);
        }
        judgement
    }

    pub(super) fn flush(&mut self, now: Timestamp, stage: &mut Stage) -> Option<Deadline> {
        match self {
            Self::Plain(engine) => engine.flush(now, stage),
            Self::Recorded(engine, _) => engine.flush(now, stage),
        }
    }

    /// Takes all bytes that wait for a flow's upstream in one piece; returns how many.
    pub(super) fn read(
        &mut self,
        now: Timestamp,
        flow: FlowId,
        digest: &mut Digest,
        take: impl FnOnce(&[u8]),
    ) -> usize {
        let all = |bytes: &[u8]| {
            digest.read(flow, bytes);
            take(bytes);
            bytes.len()
        };
        match self {
            Self::Plain(engine) => engine.read(now, flow, all),
            Self::Recorded(engine, _) => engine.read(now, flow, all),
        }
    }

    pub(super) fn write(
        &mut self,
        now: Timestamp,
        flow: FlowId,
        fill: impl FnOnce(&mut [u8]) -> usize,
    ) -> usize {
        match self {
            Self::Plain(engine) => engine.write(now, flow, fill),
            Self::Recorded(engine, _) => engine.write(now, flow, fill),
        }
    }

    /// The journal's blocks since the last time.
    pub(super) fn take_journal(&mut self) -> Vec<u8> {
        match self {
            Self::Plain(_) => Vec::new(),
            Self::Recorded(_, blocks) => {
                std::mem::take(&mut *blocks.lock().expect("writing to memory does not panic"))
            }
        }
    }
}
