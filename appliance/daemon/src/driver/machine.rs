//! An engine, recorded to a journal or not.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::{Arc, Mutex};

use tungate_engine::io::Judgement;
use tungate_engine::journal::{Header, Recorded};
use tungate_engine::{Deadline, Engine, FlowId, Input, ShardId, Timestamp, World};

/// An engine, recorded to a journal or not.
pub(crate) enum Machine {
    Plain(Engine),
    Recorded(Recorded<Sink>),
}

/// Where a recorded engine's journal goes.
type Sink = Box<dyn FnMut(&[u8])>;

impl Machine {
    /// Wraps `engine`, that of `shard`.
    pub(crate) fn new(engine: Engine, shard: ShardId, journal: Option<Journal>) -> Self {
        match journal {
            None => Self::Plain(engine),
            Some(journal) => {
                let sink: Sink = Box::new(move |block| journal.append(block));
                Self::Recorded(Recorded::new(engine, shard, sink))
            }
        }
    }

    /// The engine, for all that changes nothing.
    pub(crate) fn engine(&self) -> &Engine {
        match self {
            Self::Plain(engine) => engine,
            Self::Recorded(recorded) => recorded.engine(),
        }
    }

    /// [`Engine::handle`].
    pub(crate) fn handle(
        &mut self,
        now: Timestamp,
        input: Input<'_>,
        world: &mut dyn World,
    ) -> Option<Judgement> {
        match self {
            Self::Plain(engine) => engine.handle(now, input, world),
            Self::Recorded(recorded) => recorded.handle(now, input, world),
        }
    }

    /// [`Engine::flush`].
    pub(crate) fn flush(&mut self, now: Timestamp, world: &mut dyn World) -> Option<Deadline> {
        match self {
            Self::Plain(engine) => engine.flush(now, world),
            Self::Recorded(recorded) => recorded.flush(now, world),
        }
    }

    /// [`Engine::read`].
    pub(crate) fn read(&mut self, now: Timestamp, flow: FlowId, take: impl FnOnce(&[u8]) -> usize) -> usize {
        match self {
            Self::Plain(engine) => engine.read(now, flow, take),
            Self::Recorded(recorded) => recorded.read(now, flow, take),
        }
    }

    /// [`Engine::write`].
    pub(crate) fn write(
        &mut self,
        now: Timestamp,
        flow: FlowId,
        fill: impl FnOnce(&mut [u8]) -> usize,
    ) -> usize {
        match self {
            Self::Plain(engine) => engine.write(now, flow, fill),
            Self::Recorded(recorded) => recorded.write(now, flow, fill),
        }
    }
}

/// A journal file that all shards write to, whole blocks at a time.
#[derive(Debug, Clone)]
pub(crate) struct Journal(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    file: BufWriter<File>,
    /// A journal is good up to where it was cut, so nothing is written behind a failure.
    failed: bool,
}

impl Journal {
    /// Starts a journal in `file`, which is empty.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(crate) fn start(file: File, header: &Header) -> io::Result<Self> {
        let mut start = Vec::new();
        header.encode(&mut start);
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&start)?;
        file.flush()?;
        Ok(Self(Arc::new(Mutex::new(State { file, failed: false }))))
    }

    /// Writes what is buffered. Whoever made the journal calls it when the shards have ended.
    ///
    /// # Errors
    ///
    /// If it cannot be written.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.lock().file.flush()
    }

    fn append(&self, block: &[u8]) {
        let mut state = self.lock();
        if state.failed {
            return;
        }
        if let Err(error) = state.file.write_all(block) {
            state.failed = true;
            tracing::error!(%error, "the journal cannot be written: it ends here");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
