//! The engine as a sender over imperfect paths: everything arrives, whatever happens on the way.

use std::time::Duration;

use tungate_engine::config::Clients;
use tungate_engine::recovery::CongestionControl::{self, Bbr, Cubic};
use tungate_engine::{CloseReason, Config};
use tungate_sim::link::{
    Acknowledging, Discipline, Loss, Manner, Outcome, Pause, Queue, Reordering, Run, Shape, Stage, Traffic,
    Upload, Window,
};

/// A path of 20 ms and 100 Mbit/s towards the client.
fn path() -> (Shape, Shape) {
    let way = Shape::delay(Duration::from_millis(10));
    let queue = Queue {
        packets: 256,
        discipline: Discipline::TailDrop,
    };
    let down = Shape {
        rate: 100_000_000,
        queue,
        ..way
    };
    (down, way)
}

fn config(control: CongestionControl) -> Config {
    let mut config = Config {
        clients: Clients::Routed,
        congestion: Some(control),
        ..Config::default()
    };
    config.limits.buffer_bytes = 64 << 20;
    // Where a fifth is lost both ways, so many SYN-ACKs and answers may be.
    config.timeouts.handshake = Duration::from_secs(600);
    // A burst is counted in packets, of which only one leaves per timeout when it has taken all that was in flight: ten of
    // them take five minutes, after which a client would rightly be given up.
    config.timeouts.unacknowledged = Duration::from_secs(3_600);
    config
}

fn transfer(seed: u64, path: (Shape, Shape), bytes: u64, manner: Manner, limit: u64) -> Outcome {
    transfer_by(Cubic, seed, path, bytes, manner, limit)
}

fn transfer_by(
    control: CongestionControl,
    seed: u64,
    path: (Shape, Shape),
    bytes: u64,
    manner: Manner,
    limit: u64,
) -> Outcome {
    let traffic = Traffic {
        start: Duration::ZERO,
        bytes,
        manner,
    };
    let mut run = Run::new(seed, path, config(control), vec![traffic]);
    run.finish(Duration::from_secs(limit));
    run.outcome()
}

fn assert_complete(outcome: &Outcome, bytes: u64) {
    for flow in &outcome.flows {
        assert_eq!(flow.received, bytes, "{outcome:?}");
        assert_eq!(flow.stage, Stage::Finished, "{outcome:?}");
        assert_eq!(flow.closed, Some(CloseReason::Finished), "{outcome:?}");
    }
}

#[test]
fn a_clean_path_delivers_at_its_rate() {
    let (down, up) = path();
    let down = Shape {
        queue: Queue {
            packets: 10_000,
            ..down.queue
        },
        ..down
    };
    let outcome = transfer(1, (down, up), 10_000_000, Manner::default(), 60);
    assert_complete(&outcome, 10_000_000);
    assert_eq!(outcome.to_client.queue_drops, 0);
    let flow = &outcome.flows[0];
    assert_eq!((flow.retransmitted, flow.duplicates), (0, 0));
    // No faster than the rate: 6850 packets of 1500 bytes, and two round trips at least.
    assert!(flow.finished_after.unwrap() > Duration::from_millis(822 + 40));
}

#[test]
fn one_seed_gives_one_outcome() {
    let (down, up) = path();
    let down = Shape {
        loss: Loss::Random(0.01),
        ..down
    };
    let run = |seed| transfer(seed, (down, up), 1_000_000, Manner::default(), 600);
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}

/// Paths and clients under which nothing may be lost, repeated or left open.
fn hardships() -> Vec<(&'static str, (Shape, Shape), Manner)> {
    let (down, up) = path();
    let lossy = |shape: Shape, share| Shape {
        loss: Loss::Random(share),
        ..shape
    };
    let reordered = |shape: Shape| Shape {
        reordering: Some(Reordering {
            share: 0.3,
            most: Duration::from_millis(5),
        }),
        ..shape
    };
    let codel = Queue {
        packets: 1000,
        discipline: Discipline::CoDel,
    };
    let slow = Shape { rate: 300_000, ..up };
    let bursts = Loss::Burst {
        share: 0.02,
        length: 10.0,
    };
    let upload = Some(Upload {
        bytes: 300_000,
        rate: 8_000_000,
    });
    let manner = Manner::default();
    let closes_first = Manner {
        closes_first: true,
        ..manner
    };
    let pause = |shrinks, is_update_lost| Manner {
        pause: Some(Pause {
            from: Duration::from_millis(100),
            until: Duration::from_secs(3),
            shrinks,
            is_update_lost,
        }),
        ..manner
    };
    vec![
        ("queue drops", (down, up), manner),
        ("loss both ways", (lossy(down, 0.02), lossy(up, 0.02)), manner),
        ("bursts", (Shape { loss: bursts, ..down }, up), manner),
        ("ACK loss", (down, lossy(up, 0.3)), manner),
        ("reordering", (reordered(down), reordered(up)), manner),
        ("reordering and loss", (reordered(lossy(down, 0.01)), up), manner),
        (
            "duplicates",
            (
                Shape {
                    duplicates: 0.1,
                    ..down
                },
                Shape {
                    duplicates: 0.1,
                    ..up
                },
            ),
            manner,
        ),
        ("CoDel", (Shape { queue: codel, ..down }, up), manner),
        ("slow way back", (down, slow), manner),
        (
            "no SACK",
            (lossy(down, 0.01), up),
            Manner {
                sack: false,
                ..manner
            },
        ),
        (
            "stretched ACKs",
            (lossy(down, 0.01), up),
            Manner {
                acknowledging: Acknowledging::Stretched(32),
                ..manner
            },
        ),
        (
            "autotuned window",
            (down, up),
            Manner {
                window: Window::Autotuned(6 << 20),
                ..manner
            },
        ),
        (
            "small window",
            (lossy(down, 0.01), up),
            Manner {
                window: Window::Fixed(20_000),
                ..manner
            },
        ),
        (
            "small segments",
            (lossy(down, 0.01), up),
            Manner {
                segment_size: 536,
                ..manner
            },
        ),
        (
            "upload",
            (lossy(down, 0.01), lossy(up, 0.01)),
            Manner { upload, ..manner },
        ),
        (
            "client closes first",
            (lossy(down, 0.02), lossy(up, 0.02)),
            closes_first,
        ),
        (
            "client closes first, heavy loss",
            (lossy(down, 0.1), lossy(up, 0.1)),
            closes_first,
        ),
        ("heavy loss both ways", (lossy(down, 0.2), lossy(up, 0.2)), manner),
        (
            "upload, then close",
            (lossy(down, 0.02), lossy(up, 0.02)),
            Manner {
                upload,
                ..closes_first
            },
        ),
        ("window closes", (down, up), pause(false, false)),
        (
            "window closes, update lost",
            (lossy(down, 0.02), up),
            pause(false, true),
        ),
        ("window shrinks", (down, up), pause(true, false)),
        (
            "window shrinks, update lost",
            (lossy(down, 0.02), up),
            pause(true, true),
        ),
    ]
}

/// The number in an environment variable.
fn number_of(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn whatever_happens_on_the_way_everything_arrives_and_both_sides_close() {
    let seeds = number_of("LINK_SEEDS", 2);
    let bytes = number_of("LINK_BYTES", 500_000);
    let first = 1_000 * number_of("LINK_SEED", 0);
    for (name, path, manner) in hardships() {
        for control in [Cubic, Bbr] {
            let mut slowest = Duration::ZERO;
            for seed in first..first + seeds {
                let outcome = transfer_by(control, seed, path, bytes, manner, 3_600);
                let flow = &outcome.flows[0];
                let what = format!("{name}, {control:?}, seed {seed}: {outcome:?}");
                assert_eq!(flow.received, bytes, "{what}");
                assert_eq!(
                    flow.uploaded,
                    manner.upload.map_or(0, |upload| upload.bytes),
                    "{what}"
                );
                assert_eq!(flow.stage, Stage::Finished, "{what}");
                assert_eq!(flow.closed, Some(CloseReason::Finished), "{what}");
                slowest = slowest.max(flow.finished_after.expect("it has ended"));
            }
            eprintln!("{name}, {control:?}: {slowest:.1?} at most");
        }
    }
}

#[test]
fn ipv6_is_the_same_but_for_its_header() {
    let (down, up) = path();
    let manner = Manner {
        segment_size: 1440,
        ..Manner::default()
    };
    let traffic = Traffic {
        start: Duration::ZERO,
        bytes: 1_000_000,
        manner,
    };
    let down = Shape {
        loss: Loss::Random(0.01),
        ..down
    };
    let mut run = Run::new(1, (down, up), config(Bbr), vec![traffic]).over_ipv6();
    run.finish(Duration::from_secs(600));
    assert_complete(&run.outcome(), 1_000_000);
}
