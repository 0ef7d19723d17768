//! A recorded run, repeated from its journal, gives the same output.

mod support;

use std::sync::Arc;
use std::time::Duration;

use support::*;
use tungate_engine::io::{ChecksumState, UpstreamEvent};
use tungate_engine::journal::{Decoder, Header, Recorded};
use tungate_engine::packet::{Datagram, complete_checksum};
use tungate_engine::policy::{Action, PolicySpec, Rule, RuleMatch};
use tungate_engine::{
    Config, Deadline, Event, FlowId, IngressId, Input, Judgement, PacketIn, Policy, ShardId, Timestamp,
};

/// What came of one call.
#[derive(Debug, PartialEq)]
struct Outcome {
    judgement: Option<Judgement>,
    deadline: Option<Deadline>,
    packets: Vec<Vec<u8>>,
    commands: Vec<(FlowId, Command)>,
    events: Vec<Event>,
    read: Vec<u8>,
    passed: Vec<u8>,
}

impl Outcome {
    fn take(
        world: &mut Recorder,
        (judgement, deadline): (Option<Judgement>, Option<Deadline>),
        read: Vec<u8>,
    ) -> Self {
        Self {
            judgement,
            deadline,
            packets: std::mem::take(&mut world.packets)
                .into_iter()
                .map(|(_, bytes)| bytes)
                .collect(),
            commands: std::mem::take(&mut world.commands),
            events: std::mem::take(&mut world.events),
            read,
            passed: std::mem::take(&mut world.passed),
        }
    }
}

type Sink<'a> = Box<dyn FnMut(&[u8]) + 'a>;

/// A recorded engine and what came of every call.
struct Run<'a> {
    engine: Recorded<Sink<'a>>,
    world: Recorder,
    now: Timestamp,
    outcomes: Vec<Outcome>,
}

impl Run<'_> {
    fn handle(&mut self, input: Input<'_>) -> Option<Judgement> {
        self.now = self.now + Duration::from_millis(1);
        let judgement = self.engine.handle(self.now, input, &mut self.world);
        self.outcomes
            .push(Outcome::take(&mut self.world, (judgement, None), vec![]));
        judgement
    }

    fn packet(&mut self, bytes: &[u8]) -> Option<FlowId> {
        let packet = PacketIn {
            ingress: IngressId(0),
            bytes,
            checksum: ChecksumState::Unverified,
            segment_size: None,
            reassembled: false,
        };
        self.handle(Input::Packet(packet))?.flow
    }

    fn flush(&mut self) -> &Outcome {
        let deadline = self.engine.flush(self.now, &mut self.world);
        self.outcomes
            .push(Outcome::take(&mut self.world, (None, deadline), vec![]));
        self.outcomes.last().expect("just pushed")
    }

    fn read(&mut self, flow: FlowId, most: usize) {
        let mut read = Vec::new();
        self.engine.read(self.now, flow, |bytes| {
            read.extend_from_slice(&bytes[..bytes.len().min(most)]);
            read.len()
        });
        self.outcomes
            .push(Outcome::take(&mut self.world, (None, None), read));
    }

    fn write(&mut self, flow: FlowId, bytes: &[u8]) {
        self.engine.write(self.now, flow, |space| {
            let len = bytes.len().min(space.len());
            space[..len].copy_from_slice(&bytes[..len]);
            len
        });
        self.outcomes
            .push(Outcome::take(&mut self.world, (None, None), vec![]));
    }
}

#[test]
fn repeating_a_journal_gives_the_same_output() {
    let header = Header {
        config: Config {
            shards: 2,
            ..Config::default()
        },
        policy: PolicySpec::default(),
        seed: [7; 32],
        start: Timestamp::ZERO,
    };
    let shard = ShardId(1);
    let mut journal = Vec::new();
    header.encode(&mut journal);
    let outcomes = {
        let engine = header.engine(shard, Arc::new(Policy::new(header.policy.clone())));
        let mut run = Run {
            engine: Recorded::new(
                engine,
                shard,
                Box::new(|block: &[u8]| journal.extend_from_slice(block)),
            ),
            world: Recorder::default(),
            now: header.start,
            outcomes: Vec::new(),
        };
        play(&mut run);
        run.outcomes
    };

    let mut decoder = Decoder::new();
    decoder.push(&journal);
    assert_eq!(decoder.header(), Ok(Some(&header)));
    let mut engine = header.engine(shard, Arc::new(Policy::new(header.policy.clone())));
    // What upstreams would take now plays no part.
    let mut world = Recorder::default();
    world.appetite = 17_000;
    for (index, expected) in outcomes.iter().enumerate() {
        let entry = decoder
            .next_entry()
            .expect("is sound")
            .expect("there is one for each call");
        assert_eq!(entry.shard, shard);
        let mut read = Vec::new();
        let result = entry.apply(&mut engine, &mut world, |_, bytes| read.extend_from_slice(bytes));
        assert_eq!(
            Outcome::take(&mut world, result, read),
            *expected,
            "call {index}: {:?}",
            entry.call
        );
    }
    assert_eq!(decoder.next_entry(), Ok(None));
    assert_eq!(decoder.finish(), Ok(()));
}

/// Calls that between them use every kind of entry, and end with a TCP flow that a new policy denies.
fn play(run: &mut Run<'_>) {
    run.handle(Input::WallClock(1_700_000_000_000_000_000));
    let mut client = Client::new(CLIENT, TARGET);
    let flow = run.packet(&client.syn()).expect("a flow");
    run.handle(Input::Upstream(flow, UpstreamEvent::Connected));
    let syn_ack = Segment::parse_from(run.flush());
    assert_eq!(syn_ack.flags, SYN | ACK);
    client.sequence += 1;
    client.expected = syn_ack.sequence.wrapping_add(1);
    run.packet(&client.segment(ACK | PSH, b"a question"));
    run.flush();
    run.read(flow, 4);
    run.read(flow, 100);
    run.read(flow, 100);
    assert_eq!(
        run.outcomes
            .iter()
            .map(|outcome| &outcome.read[..])
            .collect::<Vec<_>>()
            .concat(),
        b"a question"
    );

    // Of a large segment the upstream takes a part at once.
    client.sequence += 10;
    run.world.appetite = 15_000;
    run.packet(&client.segment(ACK, &pattern(20_000)));
    assert_eq!(
        run.outcomes.last().map(|outcome| outcome.passed.len()),
        Some(15_000)
    );
    run.flush();
    run.read(flow, 20_000);
    assert_eq!(run.outcomes.last().map(|outcome| outcome.read.len()), Some(5_000));

    // The device is full at first, so that what leaves depends on its answers.
    run.write(flow, &pattern(5000));
    run.world.full = true;
    assert!(run.flush().packets.is_empty());
    run.world.full = false;
    assert!(!run.flush().packets.is_empty());

    let question = Datagram::udp(
        client.address,
        "192.0.2.53:53".parse().expect("an address"),
        b"?",
        None,
    );
    let question = question.expect("fits");
    let mut packet = vec![0; question.packet_len()];
    let out = question.write(&mut packet, 1, IngressId(0), None);
    complete_checksum(&mut packet, &out);
    let session = run.packet(&packet).expect("a session");
    let answer = UpstreamEvent::Datagram {
        source: "192.0.2.53:53".parse().expect("an address"),
        payload: b"!",
        segment_size: None,
    };
    run.handle(Input::Upstream(session, answer));
    assert_eq!(run.outcomes.last().map(|outcome| outcome.packets.len()), Some(1));

    run.handle(Input::Drain);
    let rule = Rule {
        name: "nothing".into(),
        matches: RuleMatch::default(),
        action: Action::Drop,
    };
    let policy = PolicySpec {
        rules: vec![rule],
        ..PolicySpec::default()
    };
    run.handle(Input::Policy(Arc::new(Policy::new(policy))));
    run.flush();
    assert!(
        run.outcomes
            .iter()
            .flat_map(|outcome| &outcome.events)
            .any(|event| matches!(event, Event::Closed { .. }))
    );
    run.now = run.now + Duration::from_secs(600);
    run.handle(Input::Wakeup);
    run.flush();
    run.write(flow, b"too late");
    run.read(flow, 1);
}

impl Segment {
    fn parse_from(outcome: &Outcome) -> Self {
        let mut packet = outcome.packets[0].clone();
        let out = tungate_engine::io::PacketOut {
            ingress: IngressId(0),
            flow: None,
            header_len: 20,
            partial_checksum: Some(16),
            segment_size: None,
        };
        complete_checksum(&mut packet, &out);
        Self::parse(&packet).expect("a segment")
    }
}
