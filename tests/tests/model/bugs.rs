//! Scenarios that were bugs.

use tungate_engine::io::UpstreamEvent;
use tungate_engine::policy::PolicySpec;
use tungate_engine::{CloseReason, Config};
use tungate_tests::packet::{ACK, Message, Options, Segment};
use tungate_tests::rig::Rig;
use tungate_tests::world::scenario::{Answer, Setup, Step};
use tungate_tests::world::{Outcome, World, play};

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
