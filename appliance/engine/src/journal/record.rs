//! Recording the calls of an engine, and repeating them.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::Arc;

use super::{Call, Entry, encode_block};
use crate::addr::{FlowId, ShardId};
use crate::bypass::{BypassOrder, Ends};
use crate::dns::Learned;
use crate::engine::Engine;
use crate::event::Event;
use crate::io::{Input, Judgement, PacketIn, PacketOut, UpstreamCommand, World};
use crate::policy::Policy;
use crate::time::{Deadline, Timestamp};

impl Entry<'_> {
    /// Repeats the call on `engine`, which stands for the one that was recorded. `read` is shown the bytes that the
    /// upstream of a flow took. Returns what [`step`](crate::io::step) does.
    pub fn apply(
        &self,
        engine: &mut Engine,
        world: &mut dyn World,
        mut read: impl FnMut(FlowId, &[u8]),
    ) -> (Option<Judgement>, Option<Deadline>) {
        let mut world = Repeated {
            world,
            room: &self.room,
            answers: Cell::default(),
            taken: self.taken,
        };
        let mut handle = |input| (engine.handle(self.at, input, &mut world), None);
        match &self.call {
            &Call::Packet {
                ingress,
                checksum,
                segment_size,
                reassembled,
                bytes,
            } => handle(Input::Packet(PacketIn {
                ingress,
                bytes,
                checksum,
                segment_size,
                reassembled,
            })),
            &Call::Upstream(flow, event) => handle(Input::Upstream(flow, event)),
            &Call::Bypass(news) => handle(Input::Bypass(news)),
            Call::Wakeup => handle(Input::Wakeup),
            Call::Policy(spec) => handle(Input::Policy(Arc::new(Policy::new(spec.as_ref().clone())))),
            &Call::WallClock(offset) => handle(Input::WallClock(offset)),
            Call::Learned(learned) => handle(Input::Learned(learned)),
            Call::Drain => handle(Input::Drain),
            Call::Flush => (None, engine.flush(self.at, &mut world)),
            &Call::Read(flow, taken) => {
                engine.read(self.at, flow, |bytes| {
                    let taken = bytes.len().min(taken as usize);
                    read(flow, &bytes[..taken]);
                    taken
                });
                (None, None)
            }
            &Call::Write(flow, bytes) => {
                engine.write(self.at, flow, |space| {
                    let len = bytes.len().min(space.len());
                    space[..len].copy_from_slice(&bytes[..len]);
                    len
                });
                (None, None)
            }
        }
    }
}

/// An engine whose every call is written to a journal, through `sink`, one whole block at a time.
///
/// The entry of a call is written when the call ends, also when it ends in a panic.
pub struct Recorded<S: FnMut(&[u8])> {
    engine: Engine,
    recorder: Recorder<S>,
}

impl<S: FnMut(&[u8])> Recorded<S> {
    /// Wraps `engine`, that of `shard`, before its first call. The journal's header is the caller's to write.
    pub fn new(engine: Engine, shard: ShardId, sink: S) -> Self {
        let recorder = Recorder {
            shard,
            sink,
            block: Vec::new(),
            room: RefCell::default(),
            taken: 0,
        };
        Self { engine, recorder }
    }

    /// The engine, for all that changes nothing.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Calls and records [`Engine::handle`].
    pub fn handle(&mut self, now: Timestamp, input: Input<'_>, world: &mut dyn World) -> Option<Judgement> {
        let policy; // outlives what the call borrows from it
        let call = match &input {
            &Input::Packet(PacketIn {
                ingress,
                bytes,
                checksum,
                segment_size,
                reassembled,
            }) => Call::Packet {
                ingress,
                checksum,
                segment_size,
                reassembled,
                bytes,
            },
            &Input::Upstream(flow, event) => Call::Upstream(flow, event),
            &Input::Bypass(news) => Call::Bypass(news),
            Input::Wakeup => Call::Wakeup,
            Input::Policy(new) => {
                policy = Arc::clone(new);
                Call::Policy(Cow::Borrowed(policy.spec()))
            }
            &Input::WallClock(offset) => Call::WallClock(offset),
            Input::Learned(learned) => Call::Learned(Cow::Borrowed(learned)),
            Input::Drain => Call::Drain,
        };
        let mut world = Watched {
            world,
            recorder: &mut self.recorder,
            at: now,
            call,
        };
        self.engine.handle(now, input, &mut world)
    }

    /// Calls and records [`Engine::flush`].
    pub fn flush(&mut self, now: Timestamp, world: &mut dyn World) -> Option<Deadline> {
        let mut world = Watched {
            world,
            recorder: &mut self.recorder,
            at: now,
            call: Call::Flush,
        };
        self.engine.flush(now, &mut world)
    }

    /// Calls and records [`Engine::read`].
    pub fn read(&mut self, now: Timestamp, flow: FlowId, take: impl FnOnce(&[u8]) -> usize) -> usize {
        let recorder = &mut self.recorder;
        let mut lent = false;
        let taken = self.engine.read(now, flow, |bytes| {
            lent = true;
            let taken = take(bytes);
            recorder.write(now, &Call::Read(flow, taken as u32));
            taken
        });
        if !lent {
            self.recorder.write(now, &Call::Read(flow, 0));
        }
        taken
    }

    /// Calls and records [`Engine::write`].
    pub fn write(&mut self, now: Timestamp, flow: FlowId, fill: impl FnOnce(&mut [u8]) -> usize) -> usize {
        let recorder = &mut self.recorder;
        let mut lent = false;
        let filled = self.engine.write(now, flow, |space| {
            lent = true;
            let filled = fill(space);
            recorder.write(now, &Call::Write(flow, &space[..filled]));
            filled
        });
        if !lent {
            self.recorder.write(now, &Call::Write(flow, &[]));
        }
        filled
    }
}

/// Writes entries for one shard.
struct Recorder<S> {
    shard: ShardId,
    sink: S,
    block: Vec<u8>,
    /// As in [`Entry::room`], of the call that is being made.
    room: RefCell<Vec<u32>>,
    /// As in [`Entry::taken`].
    taken: u32,
}

impl<S: FnMut(&[u8])> Recorder<S> {
    fn write(&mut self, at: Timestamp, call: &Call<'_>) {
        let room = self.room.get_mut();
        if room.len() % 2 == 1 {
            room.pop(); // the last answers were yes
        }
        self.block.clear();
        encode_block(&(self.shard, at, call, &*room, self.taken), &mut self.block);
        room.clear();
        self.taken = 0;
        (self.sink)(&self.block);
    }

    fn on_room(&self, answer: bool) {
        let mut room = self.room.borrow_mut();
        if room.is_empty() {
            room.push(0);
        }
        if answer == (room.len().is_multiple_of(2)) {
            room.push(0);
        }
        *room.last_mut().expect("pushed above") += 1;
    }
}

/// The world during a recorded call, at whose end the entry is written.
struct Watched<'a, S: FnMut(&[u8])> {
    world: &'a mut dyn World,
    recorder: &'a mut Recorder<S>,
    at: Timestamp,
    call: Call<'a>,
}

impl<S: FnMut(&[u8])> Drop for Watched<'_, S> {
    fn drop(&mut self) {
        self.recorder.write(self.at, &self.call);
    }
}

impl<S: FnMut(&[u8])> World for Watched<'_, S> {
    fn has_room(&self) -> bool {
        let answer = self.world.has_room();
        self.recorder.on_room(answer);
        answer
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.world.packet_buffer(len)
    }

    fn send_packet(&mut self, packet: PacketOut) {
        self.world.send_packet(packet);
    }

    fn upstream(&mut self, flow: FlowId, command: UpstreamCommand<'_>) {
        self.world.upstream(flow, command);
    }

    fn offer(&mut self, flow: FlowId, bytes: &[u8]) -> usize {
        let taken = self.world.offer(flow, bytes).min(bytes.len());
        self.recorder.taken = taken as u32;
        taken
    }

    fn bypass(&mut self, flow: FlowId, ends: Ends, order: BypassOrder) {
        self.world.bypass(flow, ends, order);
    }

    fn event(&mut self, event: &Event) {
        self.world.event(event);
    }

    fn forward(&mut self, shard: ShardId, packet: PacketIn<'_>) {
        self.world.forward(shard, packet);
    }

    fn learned(&mut self, learned: &Learned) {
        self.world.learned(learned);
    }
}

/// The world during a repeated call: whether it has room is what was recorded.
struct Repeated<'a> {
    world: &'a mut dyn World,
    room: &'a [u32],
    /// Answers given so far.
    answers: Cell<u32>,
    taken: u32,
}

impl World for Repeated<'_> {
    fn has_room(&self) -> bool {
        let mut left = self.answers.get();
        self.answers.set(left + 1);
        for (index, &run) in self.room.iter().enumerate() {
            match left.checked_sub(run) {
                Some(behind) => left = behind,
                None => return index % 2 == 0,
            }
        }
        true
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.world.packet_buffer(len)
    }

    fn send_packet(&mut self, packet: PacketOut) {
        self.world.send_packet(packet);
    }

    fn upstream(&mut self, flow: FlowId, command: UpstreamCommand<'_>) {
        self.world.upstream(flow, command);
    }

    /// The world is shown what was taken.
    fn offer(&mut self, flow: FlowId, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.taken as usize);
        self.world.offer(flow, &bytes[..taken]);
        taken
    }

    fn bypass(&mut self, flow: FlowId, ends: Ends, order: BypassOrder) {
        self.world.bypass(flow, ends, order);
    }

    fn event(&mut self, event: &Event) {
        self.world.event(event);
    }

    fn forward(&mut self, shard: ShardId, packet: PacketIn<'_>) {
        self.world.forward(shard, packet);
    }

    fn learned(&mut self, learned: &Learned) {
        self.world.learned(learned);
    }

    fn vacate(&mut self, memory: NonNull<[u8]>) {
        self.world.vacate(memory);
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::addr::IngressId;
    use crate::config::Config;
    use crate::io::ChecksumState;
    use crate::journal::{Decoder, Header};
    use crate::policy::PolicySpec;

    proptest! {
        #[test]
        fn answers_about_room_are_repeated_as_recorded(answers in vec(any::<bool>(), 0..30)) {
            let mut block = Vec::new();
            let mut recorder = Recorder {
                shard: ShardId(0),
                sink: |bytes: &[u8]| block.extend_from_slice(bytes),
                block: Vec::new(),
                room: RefCell::default(),
                taken: 0,
            };
            for &answer in &answers {
                recorder.on_room(answer);
            }
            recorder.write(Timestamp::ZERO, &Call::Flush);
            prop_assert_eq!(recorder.room.into_inner(), []);
            let mut decoder = Decoder::new();
            let mut start = Vec::new();
            header().encode(&mut start);
            decoder.push(&start);
            decoder.push(&block);
            let entry = decoder.next_entry().unwrap().unwrap();
            let repeated = Repeated { world: &mut Nowhere, room: &entry.room, answers: Cell::default(), taken: 0 };
            for &answer in &answers {
                prop_assert_eq!(repeated.has_room(), answer);
            }
            prop_assert!(repeated.has_room());
            prop_assert!(answers.contains(&false) || entry.room.is_empty());
        }
    }

    #[test]
    fn call_that_panics_is_written_all_the_same() {
        let mut written = 0;
        let header = header();
        let engine = header.engine(ShardId(0), Arc::new(Policy::new(header.policy.clone())));
        let mut recorded = Recorded::new(engine, ShardId(0), |_: &[u8]| written += 1);
        let packet = PacketIn {
            ingress: IngressId(0),
            bytes: &[],
            checksum: ChecksumState::Trusted,
            segment_size: None,
            reassembled: false,
        };
        // The drop of an empty packet is an event, at which this world panics.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            recorded.handle(Timestamp::ZERO, Input::Packet(packet), &mut Nowhere)
        }));
        assert!(result.is_err());
        drop(recorded);
        assert_eq!(written, 1);
    }

    /// A world in which nothing may happen.
    struct Nowhere;

    impl World for Nowhere {
        fn has_room(&self) -> bool {
            panic!("nobody asks")
        }

        fn packet_buffer(&mut self, _: usize) -> &mut [u8] {
            panic!("no packets")
        }

        fn send_packet(&mut self, _: PacketOut) {
            panic!("no packets")
        }

        fn upstream(&mut self, _: FlowId, _: UpstreamCommand<'_>) {
            panic!("no commands")
        }

        fn event(&mut self, _: &Event) {
            panic!("no events")
        }

        fn forward(&mut self, _: ShardId, _: PacketIn<'_>) {
            panic!("no shards")
        }

        fn learned(&mut self, _: &Learned) {
            panic!("no questions")
        }
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
}
