//! Recovery against a path that loses.

mod path;

use std::time::Duration;

use self::path::{Outcome, Path};
use super::*;

const MS: Duration = Duration::from_millis(1);

fn path(seed: u64) -> Path {
    Path {
        seed,
        rate: 12_500_000,
        delay: 10 * MS,
        queue: 256,
        loss: 0,
        ack_loss: 0,
        jitter: Duration::ZERO,
        selective: true,
        segments_per_packet: 44,
        bytes: 4 << 20,
        window: 16 << 20,
        congestion: CongestionControl::Cubic,
    }
}

#[test]
fn everything_arrives_whatever_is_lost() {
    for congestion in [
        CongestionControl::None,
        CongestionControl::Cubic,
        CongestionControl::Bbr,
    ] {
        for selective in [true, false] {
            for (loss, ack_loss, jitter) in [(0, 0, 0), (20, 20, 0), (100, 0, 0), (0, 0, 5), (20, 100, 5)] {
                for seed in 0..3 {
                    let outcome = Path {
                        bytes: 300_000,
                        loss,
                        ack_loss,
                        jitter: jitter * MS,
                        selective,
                        congestion,
                        ..path(seed)
                    }
                    .run(Duration::from_secs(600));
                    assert!(
                        outcome.finished_after.is_some(),
                        "{congestion:?} selective {selective} loss {loss}/{ack_loss} jitter {jitter} seed {seed}: {outcome:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn without_reordering_only_what_was_lost_is_sent_again() {
    for congestion in [
        CongestionControl::None,
        CongestionControl::Cubic,
        CongestionControl::Bbr,
    ] {
        for loss in [0, 1, 10] {
            let Outcome {
                statistics,
                lost,
                finished_after,
                ..
            } = Path {
                loss,
                congestion,
                // Nothing else keeps a sender without congestion control from flooding the queue.
                window: if congestion == CongestionControl::None {
                    300_000
                } else {
                    16 << 20
                },
                ..path(7)
            }
            .run(Duration::from_secs(120));
            assert!(finished_after.is_some());
            assert!(
                statistics.retransmitted <= lost + 1460 * statistics.tail_probes,
                "{congestion:?} {loss}: {lost} {statistics:?}"
            );
            assert_eq!(statistics.timeouts, 0, "{congestion:?} {loss}: {statistics:?}");
        }
    }
}
