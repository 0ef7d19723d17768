//! What the appliance promises its users, by a model far simpler than it, against the engine in a small world.
//!
//! The model knows what each side has sent and whether it has ended, and no more. Whatever happens in between, every
//! byte has to arrive once and in order, ends have to be mirrored, and nothing may be left over. The world around the
//! engine checks each single step; see [`tungate_tests::world`].
//!
//! `PROPTEST_CASES` says how many scenarios to try; with ten thousand or more, the run must have reached every kind of
//! event in [`REACHED`]. A failure prints the shortest scenario found, to be given to
//! [`play`](tungate_tests::world::play) in a named test (`bugs`), and leaves a transcript and a journal in `target/failures`.

mod bugs;
mod steps;

use std::cell::RefCell;
use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{
    Config as ProptestConfig, FileFailurePersistence, RngAlgorithm, TestRng, TestRunner,
};
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest};
use tungate_engine::CloseReason;
use tungate_tests::client::End;
use tungate_tests::world::scenario::{Answer, CLIENTS, Setup, Step, Target};
use tungate_tests::world::{Outcome, World};

use self::steps::{conversation, datagrams, setups, surroundings, times};

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
