//! The engine as a sender over imperfect paths: everything arrives, whatever happens on the way.

use std::time::Duration;

use tungate_engine::config::Clients;
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

fn config() -> Config {
    let mut config = Config {
        clients: Clients::Routed,
        ..Config::default()
    };
    config.limits.buffer_bytes = 64 << 20;
    config
}

fn transfer(seed: u64, (down, up): (Shape, Shape), bytes: u64, manner: Manner, limit: u64) -> Outcome {
    let traffic = Traffic {
        start: Duration::ZERO,
        bytes,
        manner,
    };
    let mut run = Run::new(seed, (down, up), config(), vec![traffic]);
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

#[test]
fn whatever_happens_on_the_way_everything_arrives_and_both_sides_close() {
    for (name, path, manner) in hardships() {
        for seed in 0..3 {
            let outcome = transfer(seed, path, 1_000_000, manner, 600);
            eprintln!("{name}, seed {seed}: {:?}", outcome.flows[0]);
            assert_complete(&outcome, 1_000_000);
            assert_eq!(
                outcome.flows[0].uploaded,
                manner.upload.map_or(0, |upload| upload.bytes)
            );
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
    let mut run = Run::new(1, (down, up), config(), vec![traffic]).over_ipv6();
    run.finish(Duration::from_secs(600));
    assert_complete(&run.outcome(), 1_000_000);
}
