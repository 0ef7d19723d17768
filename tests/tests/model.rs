//! What the appliance promises its users, by a model far simpler than it, against the engine in a small world.
//!
//! The model knows what each side has sent and whether it has ended, and no more. Whatever happens in between, every
//! byte has to arrive once and in order, ends have to be mirrored, and nothing may be left over. The world around the
//! engine checks each single step; see [`tungate_tests::world`].
//!
//! `PROPTEST_CASES` says how many scenarios to try; with ten thousand or more, the run must have reached every kind of
//! event in [`REACHED`]. A failure prints the shortest scenario found, to be given to [`play`] in a named test, and
//! leaves a transcript and a journal in `target/failures`.

use std::cell::RefCell;
use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::{
    Config as ProptestConfig, FileFailurePersistence, RngAlgorithm, TestRng, TestRunner,
};
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest};
use tungate_engine::config::{Clients, Filtering};
use tungate_engine::io::UpstreamEvent;
use tungate_engine::policy::PolicySpec;
use tungate_engine::{CloseReason, Config};
use tungate_tests::client::{End, Manner};
use tungate_tests::packet::{ACK, Message, Options, Segment};
use tungate_tests::rig::Rig;
use tungate_tests::world::scenario::{Answer, CLIENTS, Denial, ENDPOINTS, Setup, Step, TARGETS, Target};
use tungate_tests::world::{Outcome, World, play};

/// Scenarios without `PROPTEST_CASES`.
const CASES: u32 = 1000;
/// From so many scenarios on, all of [`REACHED`] is asked for.
const LONG_RUN: u32 = 10_000;

/// What a long run must have met.
const REACHED: &[&str] = &[
    "closed client-reset",
    "closed client-unresponsive",
    "closed connect-failed",
    "closed connect-timeout",
    "closed denied",
    "closed evicted",
    "closed finished",
    "closed half-close-timeout",
    "closed handshake-timeout",
    "closed idle-timeout",
    "closed replaced",
    "closed upstream-reset",
    "dropped draining",
    "dropped filtered",
    "dropped fragment-timeout",
    "dropped list-destination",
    "dropped list-source",
    "dropped no-flow",
    "dropped rule-drop",
    "dropped rule-reject",
    "dropped tcp-window",
    "established",
    "named",
    "opened icmp",
    "opened tcp",
    "opened udp",
];

#[test]
fn the_appliance_keeps_its_promises() {
    let config = config();
    let cases = config.cases;
    let strategy = Model::sequential_strategy(1..60);
    let run = TestRunner::new(config.clone()).run(&strategy, |(model, steps, seen)| {
        Relay::test_sequential(config.clone(), model, steps, seen);
        Ok(())
    });
    if let Err(failure) = run {
        panic!("{failure}");
    }
    let reached = REACHED_SO_FAR.take();
    let missing: Vec<_> = REACHED.iter().filter(|name| !reached.contains(**name)).collect();
    println!("{cases} scenarios reached {reached:?}");
    if cases >= LONG_RUN {
        assert!(
            missing.is_empty(),
            "{cases} scenarios, and never reached: {missing:?}"
        );
    }
}

#[test]
fn one_seed_makes_one_scenario() {
    let draw = || {
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[3; 32]);
        let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), rng);
        let strategy = Model::sequential_strategy(1..60);
        let mut drawn = String::new();
        for _ in 0..50 {
            let (model, steps, _) = strategy
                .new_tree(&mut runner)
                .expect("scenarios can be drawn")
                .current();
            drawn += &format!("{model:?} {steps:?}\n");
        }
        drawn
    };
    assert!(draw() == draw());
}

fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(CASES),
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        source_file: Some(file!()),
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    }
}

thread_local! {
    /// Kinds of event that the scenarios of this thread have reached.
    static REACHED_SO_FAR: RefCell<BTreeSet<String>> = RefCell::default();
}

// ---- the model ---------------------------------------------------------------------------------------------------------

/// Everything that the model knows.
#[derive(Debug, Clone, Default)]
struct Model {
    setup: Setup,
    connections: [Option<Connection>; CLIENTS as usize],
    denied: BTreeSet<Target>,
    /// The engine takes no new flows.
    draining: bool,
    device_full: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Connection {
    client: Side,
    upstream: Side,
    answer: Option<Answer>,
    /// The policy or a shut-down has stood in its way.
    hindered: bool,
}

/// What one side has done.
#[derive(Debug, Clone, Copy, Default)]
struct Side {
    sent: u64,
    closed: bool,
    reset: bool,
    stalled: bool,
}

impl Side {
    fn may_write(self) -> bool {
        !self.closed && !self.reset
    }
}

impl Connection {
    /// Both sides want it, and nothing but time and a bad link can have come between them.
    fn is_sound(&self) -> bool {
        !self.client.reset
            && !self.upstream.reset
            && !self.hindered
            && matches!(self.answer, None | Some(Answer::Accepts))
    }

    /// What holds at any time.
    fn check(&self, outcome: Outcome) {
        assert!(
            outcome.client_received <= self.upstream.sent,
            "{self:?} {outcome:?}"
        );
        assert!(
            outcome.upstream_received <= self.client.sent,
            "{self:?} {outcome:?}"
        );
        if outcome.client_has_fin {
            assert!(
                self.upstream.closed && outcome.client_received == self.upstream.sent,
                "{self:?} {outcome:?}"
            );
        }
        if outcome.upstream_has_fin {
            assert!(
                self.client.closed && outcome.upstream_received == self.client.sent,
                "{self:?} {outcome:?}"
            );
        }
    }

    /// What holds at the end, when both sides have closed and nothing is under way: it was either completed, or there is
    /// a reason why not, and the upstream knows.
    fn check_end(&self, outcome: Outcome) {
        self.check(outcome);
        let complete = Outcome {
            client_received: self.upstream.sent,
            client_has_fin: true,
            // When all is said and only not heard yet, a client may still reset; and one whose last ACK from the
            // engine was lost may repeat its FIN when the engine's TIME-WAIT is over, or give up on a dead link.
            client_end: match outcome.client_end {
                Some(End::Aborted) if self.client.reset => Some(End::Aborted),
                Some(End::Reset) => Some(End::Reset),
                Some(End::TimedOut) => Some(End::TimedOut),
                _ => Some(End::Finished),
            },
            upstream_received: self.client.sent,
            upstream_has_fin: true,
            upstream_aborted: false,
            closed: Some(CloseReason::Finished),
            flows: outcome.flows,
        };
        // One that had sent and received everything may have been let go in order before the client's side was done.
        let upstream_is_done = outcome.upstream_has_fin && self.upstream.closed;
        let upstream_knows = outcome.upstream_aborted || upstream_is_done;
        let client_gave_up = outcome.client_end == Some(End::TimedOut);
        let is_as_it_should_be = match outcome.closed {
            Some(CloseReason::Finished) => outcome == complete,
            // Time and a bad link: the world has checked that it took that long.
            Some(
                CloseReason::ConnectTimeout
                | CloseReason::HandshakeTimeout
                | CloseReason::IdleTimeout
                | CloseReason::HalfCloseTimeout
                | CloseReason::ClientUnresponsive,
            ) => upstream_knows,
            // A client that has given up, or was reset for an earlier flow, resets what its last SYN has opened; and one
            // that has finished does so when its last ACKs were lost for longer than its TIME-WAIT.
            Some(CloseReason::ClientReset | CloseReason::Replaced) => {
                let client_is_done = outcome.client_end == Some(End::Finished) && upstream_is_done;
                upstream_knows && (self.client.reset || client_gave_up || client_is_done || outcome.flows > 1)
            }
            Some(CloseReason::UpstreamReset) => self.upstream.reset,
            Some(CloseReason::ConnectFailed(error)) => {
                self.answer.and_then(Answer::error) == Some(error)
                    && (outcome.client_received, outcome.upstream_received) == (0, 0)
            }
            Some(CloseReason::Denied(_)) => upstream_knows && self.hindered,
            Some(CloseReason::Evicted | CloseReason::BufferLimit | CloseReason::Internal) => false,
            // There was no flow: no SYN has come through, or none was let through.
            None => (!self.is_sound() || client_gave_up) && outcome.client_received == 0,
        };
        assert!(is_as_it_should_be, "{self:?} {outcome:?}");
    }
}

impl ReferenceStateMachine for Model {
    type State = Self;
    type Transition = Step;

    fn init_state() -> BoxedStrategy<Self> {
        setups()
            .prop_map(|setup| Self {
                setup,
                ..Self::default()
            })
            .boxed()
    }

    /// What makes sense: connections are made, used and ended, datagrams sent and answered, and now and then the world
    /// around changes.
    fn transitions(model: &Self) -> BoxedStrategy<Step> {
        let mut choices: Vec<(u32, BoxedStrategy<Step>)> = vec![
            (8, times().prop_map(|millis| Step::TimePasses { millis }).boxed()),
            (6, datagrams()),
            (2, surroundings(model.device_full)),
        ];
        for client in 0..CLIENTS {
            match model.connections[usize::from(client)] {
                None => choices.push((4, Just(Step::ClientConnects { client }).boxed())),
                Some(connection) => choices.push((6, conversation(client, connection))),
            }
        }
        prop::strategy::Union::new_weighted(choices).boxed()
    }

    fn preconditions(model: &Self, step: &Step) -> bool {
        let connection = |client: u8| model.connections[usize::from(client)];
        let is = |client: u8, holds: fn(Connection) -> bool| connection(client).is_some_and(holds);
        match *step {
            Step::ClientConnects { .. } => true,
            Step::UpstreamAnswers { client, .. } => is(client, |connection| connection.answer.is_none()),
            Step::ClientSends { client, .. } | Step::ClientCloses { client } => {
                is(client, |connection| connection.client.may_write())
            }
            Step::UpstreamSends { client, .. } | Step::UpstreamCloses { client } => {
                is(client, |connection| connection.upstream.may_write())
            }
            Step::ClientResets { client } => is(client, |connection| !connection.client.reset),
            Step::UpstreamResets { client } => is(client, |connection| !connection.upstream.reset),
            Step::ClientStalls { client } => is(client, |connection| !connection.client.stalled),
            Step::ClientResumes { client } => is(client, |connection| connection.client.stalled),
            Step::UpstreamStalls { client } => is(client, |connection| !connection.upstream.stalled),
            Step::UpstreamResumes { client } => is(client, |connection| connection.upstream.stalled),
            Step::DeviceFills => !model.device_full,
            Step::DeviceDrains => model.device_full,
            Step::EngineDrains => !model.draining,
            Step::AllAllowed => !model.denied.is_empty(),
            Step::TargetDenied { .. }
            | Step::DatagramSent { .. }
            | Step::DatagramAnswered { .. }
            | Step::PingSent { .. }
            | Step::PingAnswered { .. }
            | Step::LinkBecomes { .. }
            | Step::TimePasses { .. } => true,
        }
    }

    fn apply(mut model: Self, step: &Step) -> Self {
        match *step {
            Step::ClientConnects { client } => {
                model.connections[usize::from(client)] = Some(Connection::default());
            }
            Step::UpstreamAnswers { client, answer } => model.connection(client).answer = Some(answer),
            Step::ClientSends { client, bytes } => model.connection(client).client.sent += u64::from(bytes),
            Step::UpstreamSends { client, bytes } => {
                model.connection(client).upstream.sent += u64::from(bytes)
            }
            Step::ClientCloses { client } => model.connection(client).client.closed = true,
            Step::UpstreamCloses { client } => model.connection(client).upstream.closed = true,
            Step::ClientResets { client } => model.connection(client).client.reset = true,
            Step::UpstreamResets { client } => model.connection(client).upstream.reset = true,
            Step::ClientStalls { client } => model.connection(client).client.stalled = true,
            Step::ClientResumes { client } => model.connection(client).client.stalled = false,
            Step::UpstreamStalls { client } => model.connection(client).upstream.stalled = true,
            Step::UpstreamResumes { client } => model.connection(client).upstream.stalled = false,
            Step::TargetDenied { target, .. } => {
                model.denied.insert(target);
            }
            Step::AllAllowed => model.denied.clear(),
            Step::EngineDrains => model.draining = true,
            Step::DeviceFills => model.device_full = true,
            Step::DeviceDrains => model.device_full = false,
            Step::DatagramSent { .. }
            | Step::DatagramAnswered { .. }
            | Step::PingSent { .. }
            | Step::PingAnswered { .. }
            | Step::LinkBecomes { .. }
            | Step::TimePasses { .. } => {}
        }
        for client in 0..CLIENTS {
            let hindered = model.draining || model.denied.contains(&Target::OfClient(client));
            if let Some(connection) = &mut model.connections[usize::from(client)] {
                connection.hindered |= hindered;
            }
        }
        model
    }
}

impl Model {
    fn connection(&mut self, client: u8) -> &mut Connection {
        self.connections[usize::from(client)]
            .as_mut()
            .expect("asked of a client that has connected")
    }
}

// ---- the appliance under test ------------------------------------------------------------------------------------------

struct Relay;

impl StateMachineTest for Relay {
    type SystemUnderTest = World;
    type Reference = Model;

    fn init_test(model: &Model) -> World {
        World::new(model.setup.clone(), "model")
    }

    fn apply(mut world: World, _: &Model, step: Step) -> World {
        world.apply(&step);
        world
    }

    fn check_invariants(world: &World, model: &Model) {
        for client in 0..CLIENTS {
            if let Some(connection) = &model.connections[usize::from(client)] {
                connection.check(world.outcome(client).expect("the client has connected"));
            }
        }
    }

    fn teardown(mut world: World, mut model: Model) {
        world.conclude();
        for client in 0..CLIENTS {
            if let Some(connection) = &mut model.connections[usize::from(client)] {
                connection.client.closed = true;
                connection.upstream.closed = true;
                connection.check_end(world.outcome(client).expect("the client has connected"));
            }
        }
        REACHED_SO_FAR.with_borrow_mut(|reached| reached.extend(world.reached().map(str::to_owned)));
    }
}

// ---- what can happen: the simplest first ---------------------------------------------------------------------------------

fn setups() -> impl Strategy<Value = Setup> {
    let peers = (
        0..4u8,
        select(vec![Clients::Local, Clients::Routed]),
        select(vec![Filtering::EndpointIndependent, Filtering::AddressDependent]),
        select(vec![1500, 1280, 9000u16]),
        select(vec![1 << 20, 64 << 10, 16 << 10u32]),
        select(vec![1, 8u8]),
        select(vec![1 << 20, 1000, 17u32]),
    );
    let clients = (
        select(vec![Some(1460), None, Some(88), Some(8960)]),
        select(vec![Some(7), None, Some(0), Some(2)]),
        select(vec![256 << 10, 65_535, 5000u32]),
        select(vec![1460, 40_000u32]),
        select(vec![Manner::Linux, Manner::Bsd]),
    );
    (peers, clients).prop_map(
        |(peers, (max_segment_size, window_scale, client_buffer, client_largest, client_manner))| {
            let (seed, clients, filtering, mtu, buffer_per_flow, batch, chunk) = peers;
            Setup {
                seed,
                clients,
                filtering,
                mtu,
                buffer_per_flow,
                batch,
                chunk,
                max_segment_size,
                window_scale,
                client_buffer,
                client_largest,
                client_manner,
            }
        },
    )
}

fn times() -> impl Strategy<Value = u32> {
    prop_oneof![
        8 => 1..300u32,
        4 => 300..5_000u32,
        2 => 5_000..40_000u32,
        1 => 40_000..400_000u32,
        1 => 7_000_000..8_000_000u32,
    ]
}

fn lengths() -> impl Strategy<Value = u32> {
    prop_oneof![3 => 1..100u32, 3 => 100..5_000u32, 2 => 5_000..30_000u32, 1 => 30_000..150_000u32]
}

/// What may happen to a connection.
fn conversation(client: u8, connection: Connection) -> BoxedStrategy<Step> {
    let one = |weight: u32, step: Step| (weight, Just(step).boxed());
    let mut choices = vec![one(1, Step::ClientConnects { client })];
    if connection.answer.is_none() {
        let answers = vec![Answer::Accepts; 6].into_iter().chain([
            Answer::Refuses,
            Answer::IsUnreachable,
            Answer::TimesOut,
        ]);
        let answers = select(answers.collect::<Vec<_>>());
        choices.push((
            12,
            answers
                .prop_map(move |answer| Step::UpstreamAnswers { client, answer })
                .boxed(),
        ));
    }
    if connection.client.may_write() {
        choices.push((
            10,
            lengths()
                .prop_map(move |bytes| Step::ClientSends { client, bytes })
                .boxed(),
        ));
        choices.push(one(3, Step::ClientCloses { client }));
    }
    if connection.upstream.may_write() {
        choices.push((
            10,
            lengths()
                .prop_map(move |bytes| Step::UpstreamSends { client, bytes })
                .boxed(),
        ));
        choices.push(one(3, Step::UpstreamCloses { client }));
    }
    if !connection.client.reset {
        choices.push(one(1, Step::ClientResets { client }));
    }
    if !connection.upstream.reset {
        choices.push(one(1, Step::UpstreamResets { client }));
    }
    choices.push(if connection.client.stalled {
        one(3, Step::ClientResumes { client })
    } else {
        one(2, Step::ClientStalls { client })
    });
    choices.push(if connection.upstream.stalled {
        one(3, Step::UpstreamResumes { client })
    } else {
        one(2, Step::UpstreamStalls { client })
    });
    prop::strategy::Union::new_weighted(choices).boxed()
}

fn datagrams() -> BoxedStrategy<Step> {
    let bytes = || prop_oneof![0..100u16, 100..3_000u16, 3_000..20_000u16];
    prop_oneof![
        3 => (0..ENDPOINTS, 0..TARGETS, bytes())
            .prop_map(|(endpoint, target, bytes)| Step::DatagramSent { endpoint, target, bytes }),
        // One beyond the targets is a stranger.
        3 => (0..ENDPOINTS, 0..=TARGETS, bytes())
            .prop_map(|(endpoint, source, bytes)| Step::DatagramAnswered { endpoint, source, bytes }),
        3 => (0..ENDPOINTS, 0..TARGETS, bytes())
            .prop_map(|(endpoint, target, bytes)| Step::PingSent { endpoint, target, bytes }),
        1 => (0..ENDPOINTS, 0..TARGETS, bytes())
            .prop_map(|(endpoint, target, bytes)| Step::PingAnswered { endpoint, target, bytes }),
    ]
    .boxed()
}

/// What changes for all.
fn surroundings(device_full: bool) -> BoxedStrategy<Step> {
    let target = prop_oneof![
        (0..CLIENTS).prop_map(Target::OfClient),
        (0..TARGETS).prop_map(Target::OfEndpoints),
    ];
    let how = select(vec![Denial::List, Denial::Drop, Denial::Reject]);
    prop_oneof![
        8 => (select(vec![0, 1, 10, 40, 100u8]), select(vec![0, 1, 20u8]), 0..200u16, select(vec![0, 5, 300u16]))
            .prop_map(|(loss, repeats, delay_millis, jitter_millis)| Step::LinkBecomes {
                loss,
                repeats,
                delay_millis,
                jitter_millis
            }),
        8 => Just(if device_full { Step::DeviceDrains } else { Step::DeviceFills }),
        3 => (target, how).prop_map(|(target, how)| Step::TargetDenied { target, how }),
        2 => Just(Step::AllAllowed),
        1 => Just(Step::EngineDrains),
    ]
    .boxed()
}

// ---- scenarios that were bugs --------------------------------------------------------------------------------------------

/// How client 0 fares in a scenario with this beginning: it connects to a target that accepts.
fn outcome(setup: Setup, steps: &[Step]) -> Outcome {
    let connected = [
        Step::ClientConnects { client: 0 },
        Step::UpstreamAnswers {
            client: 0,
            answer: Answer::Accepts,
        },
    ];
    let world = play(setup, &[&connected, steps].concat());
    world.outcome(0).expect("it has connected")
}

/// The FIN took the place of the SYN that was not acknowledged yet, and was never sent.
#[test]
fn an_upstream_that_closes_at_once_is_heard_to_do_so() {
    let steps = [
        Step::ClientConnects { client: 0 },
        Step::UpstreamCloses { client: 0 },
        Step::UpstreamAnswers {
            client: 0,
            answer: Answer::Accepts,
        },
    ];
    let outcome = play(Setup::default(), &steps)
        .outcome(0)
        .expect("it has connected");
    assert!(
        outcome.client_has_fin && outcome.closed == Some(CloseReason::Finished),
        "{outcome:?}"
    );
}

/// In LAST-ACK the stack was deaf to the window that opened, and the last byte came by a probe, if at all.
#[test]
fn a_client_that_has_closed_and_reads_late_gets_every_byte() {
    let setup = Setup {
        client_buffer: 5000,
        window_scale: None,
        ..Setup::default()
    };
    let outcome = outcome(
        setup,
        &[
            Step::ClientStalls { client: 0 },
            Step::ClientCloses { client: 0 },
            Step::UpstreamSends {
                client: 0,
                bytes: 5001,
            },
            Step::UpstreamCloses { client: 0 },
            Step::TimePasses { millis: 183_000 },
        ],
    );
    assert_eq!(
        (outcome.client_received, outcome.closed),
        (5001, Some(CloseReason::Finished))
    );
}

/// When the client's connection was over its FIN was forgotten, and the upstream aborted after all.
#[test]
fn an_upstream_that_reads_when_the_client_has_gone_gets_every_byte_and_fin() {
    let outcome = outcome(
        Setup::default(),
        &[
            Step::UpstreamStalls { client: 0 },
            Step::ClientSends { client: 0, bytes: 1 },
            Step::ClientCloses { client: 0 },
            Step::UpstreamCloses { client: 0 },
            Step::TimePasses { millis: 100_000 },
        ],
    );
    assert!(
        outcome.upstream_received == 1 && outcome.upstream_has_fin,
        "{outcome:?}"
    );
    assert_eq!(outcome.closed, Some(CloseReason::Finished));
}

/// After ten seconds of its TIME-WAIT the stack threw away what had not been read, and the upstream was told FIN.
#[test]
fn bytes_that_wait_for_a_stalled_upstream_outlive_time_wait() {
    let outcome = outcome(
        Setup::default(),
        &[
            Step::UpstreamStalls { client: 0 },
            Step::UpstreamCloses { client: 0 },
            Step::ClientSends { client: 0, bytes: 1 },
            Step::ClientCloses { client: 0 },
            Step::TimePasses { millis: 100_000 },
        ],
    );
    assert!(
        outcome.upstream_received == 1 && outcome.upstream_has_fin,
        "{outcome:?}"
    );
    assert_eq!(outcome.closed, Some(CloseReason::Finished));
}

/// A jumbo client's segment size made one fast retransmission of eight segments, far beyond its window.
#[test]
fn a_fast_retransmission_to_a_jumbo_client_is_one_segment() {
    let config = Config {
        mtu: 1280,
        ..Config::default()
    };
    let mut rig = Rig::new(config, PolicySpec::default());
    let mut client = rig.client("10.0.0.2:40000", "192.0.2.10:443");
    let mut syn = client.take_outbox().remove(0);
    syn.options.max_segment_size = Some(8960);
    syn.options.sack_permitted = false; // or a duplicate ACK would have to say what for
    let flow = rig.packet(&syn.packet()).flow.expect("accepted");
    rig.upstream(flow, UpstreamEvent::Connected);
    rig.converse(&mut client);
    rig.write(flow, 0, 50_000);
    let sent: Vec<_> = rig.messages();
    let Message::Tcp(first) = &sent[0] else {
        panic!("a segment, not {:?}", sent[0])
    };
    let duplicate = Segment {
        source: first.destination,
        destination: first.source,
        flags: ACK,
        sequence: first.acknowledgment,
        acknowledgment: first.sequence,
        window: 500,
        options: Options::default(),
        payload: Vec::new(),
    };
    for _ in 0..4 {
        rig.packet(&duplicate.packet()); // the first says something new: the window
    }
    let again = rig.messages();
    assert!(
        matches!(&again[..], [Message::Tcp(one)] if one.payload == first.payload),
        "{} of them",
        again.len()
    );
}

/// The SYN that had made a connection, repeated by the network when it was over, made another.
#[test]
fn a_late_duplicate_of_its_own_syn_does_not_replace_a_finished_connection() {
    let mut world = World::new(
        Setup {
            seed: 2,
            ..Setup::default()
        },
        "scenario",
    );
    let (repeats, quiet) = ((100, 2_000), (0, 0));
    let link = |(repeats, jitter_millis)| Step::LinkBecomes {
        loss: 0,
        repeats,
        delay_millis: 0,
        jitter_millis,
    };
    let answer = Answer::Accepts;
    for step in [
        link(repeats),
        Step::ClientConnects { client: 0 },
        link(quiet),
        Step::UpstreamAnswers { client: 0, answer },
        Step::UpstreamCloses { client: 0 },
        Step::ClientCloses { client: 0 },
    ] {
        world.apply(&step);
    }
    world.conclude();
    let outcome = world.outcome(0).expect("it has connected");
    assert_eq!((outcome.flows, outcome.closed), (1, Some(CloseReason::Finished)));
}
