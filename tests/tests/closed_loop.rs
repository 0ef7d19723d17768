//! What the small world's clients and upstreams say to each other is captured at the appliance's device and replayed: the
//! replay has to find every byte of every connection, whatever the link has lost, repeated and reordered.
//!
//! The capture is read by the simulator, which knows nothing of the world; what was said is known from the scenario.

use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, RngAlgorithm, TestRng, TestRunner};
use sha2::{Digest, Sha256};
use tungate_engine::CloseReason;
use tungate_sim::outcome::Stream;
use tungate_tests::client::End;
use tungate_tests::world::World;
use tungate_tests::world::scenario::{Answer, Setup, Step, tcp_addresses};

/// Scenarios without `PROPTEST_CASES`, the same ones every time.
const CASES: u32 = 150;

/// How many clients there are: one over IPv4, one over IPv6.
const CLIENTS: u8 = 2;

#[derive(Debug, Clone)]
struct Story {
    setup: Setup,
    link: Step,
    steps: Vec<Step>,
}

fn stories() -> impl Strategy<Value = Story> {
    let setup =
        (any::<u8>(), 1_u8..4, any::<bool>(), any::<bool>()).prop_map(|(seed, batch, scaled, large)| Setup {
            seed,
            batch,
            window_scale: scaled.then_some(7),
            client_largest: if large { 20_000 } else { 1460 },
            ..Setup::default()
        });
    let link = (0_u8..20, 0_u8..10, 0_u16..60, 0_u16..30).prop_map(
        |(loss, repeats, delay_millis, jitter_millis)| Step::LinkBecomes {
            loss,
            repeats,
            delay_millis,
            jitter_millis,
        },
    );
    let client = || 0..CLIENTS;
    let step = prop_oneof![
        4 => (client(), 1_u32..40_000).prop_map(|(client, bytes)| Step::ClientSends { client, bytes }),
        4 => (client(), 1_u32..40_000).prop_map(|(client, bytes)| Step::UpstreamSends { client, bytes }),
        4 => (0_u32..3_000).prop_map(|millis| Step::TimePasses { millis }),
        1 => client().prop_map(|client| Step::ClientStalls { client }),
        1 => client().prop_map(|client| Step::ClientResumes { client }),
        1 => client().prop_map(|client| Step::UpstreamStalls { client }),
        1 => client().prop_map(|client| Step::UpstreamResumes { client }),
    ];
    (setup, link, proptest::collection::vec(step, 1..25)).prop_map(|(setup, link, steps)| Story {
        setup,
        link,
        steps,
    })
}

fn stream(bytes: &[u8]) -> Stream {
    let hash = Sha256::digest(bytes);
    Stream {
        bytes: bytes.len() as u64,
        sha256: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
        missing: 0,
    }
}

/// Plays a story and replays its capture; returns how many connections were compared.
fn check(story: &Story) -> Result<u32, TestCaseError> {
    let mut world = World::new(story.setup.clone(), "closed-loop");
    world.tap();
    for client in 0..CLIENTS {
        world.apply(&Step::ClientConnects { client });
        world.apply(&Step::UpstreamAnswers {
            client,
            answer: Answer::Accepts,
        });
    }
    world.apply(&story.link);
    story.steps.iter().for_each(|step| world.apply(step));
    world.conclude();
    let played = world.capture().replay();
    let mut compared = 0;
    for client in 0..CLIENTS {
        let outcome = world.outcome(client).expect("it has connected");
        let ended = (outcome.flows, outcome.client_end, outcome.closed);
        if ended != (1, Some(End::Finished), Some(CloseReason::Finished)) {
            continue; // given up on a link like that
        }
        let (address, target) = tcp_addresses(client);
        let mut flows = played
            .flows
            .iter()
            .filter(|flow| (flow.client, flow.target) == (address, target));
        let flow = flows.next().expect("the connection was captured");
        let (asked, answered) = world.said(client);
        prop_assert_eq!(
            &flow.to_target,
            &stream(&asked),
            "client {}: {:?}",
            client,
            flow.anomalies
        );
        prop_assert_eq!(
            &flow.to_client,
            &stream(&answered),
            "client {}: {:?}",
            client,
            flow.anomalies
        );
        prop_assert_eq!(
            (flow.end, flow.exact),
            ("fin", Some(true)),
            "client {}: {:?}",
            client,
            flow.anomalies
        );
        compared += 1;
    }
    Ok(compared)
}

#[test]
fn a_replay_finds_every_byte_that_the_world_has_said() {
    let asked = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    let config = Config {
        cases: asked.unwrap_or(CASES),
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        source_file: Some(file!()),
        max_shrink_iters: 2_000,
        ..Config::default()
    };
    let cases = config.cases;
    let compared = std::cell::Cell::new(0);
    let mut runner = match asked {
        Some(_) => TestRunner::new(config),
        None => TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32])),
    };
    let run = runner.run(&stories(), |story| {
        compared.set(compared.get() + check(&story)?);
        Ok(())
    });
    if let Err(failure) = run {
        panic!("{failure}");
    }
    println!("{} connections of {cases} scenarios compared", compared.get());
    assert!(
        compared.get() >= cases,
        "too few connections came to their end to mean anything"
    );
}

/// The byte before the last is lost so often that it comes again only seconds after the FIN.
#[test]
fn a_byte_that_comes_again_long_after_the_fin_is_no_hole() {
    let story = Story {
        setup: Setup {
            seed: 43,
            window_scale: None,
            client_largest: 20_000,
            ..Setup::default()
        },
        link: Step::LinkBecomes {
            loss: 17,
            repeats: 1,
            delay_millis: 0,
            jitter_millis: 5,
        },
        steps: vec![
            Step::ClientSends {
                client: 0,
                bytes: 20_001,
            },
            Step::ClientSends { client: 0, bytes: 1 },
            Step::ClientSends { client: 1, bytes: 1 },
            Step::UpstreamSends {
                client: 0,
                bytes: 7301,
            },
            Step::TimePasses { millis: 594 },
            Step::TimePasses { millis: 2411 },
        ],
    };
    assert_eq!(check(&story).expect("all bytes are found"), 2);
}
