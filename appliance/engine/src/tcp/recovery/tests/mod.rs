//! Recovery against a path that loses, and against a client that says anything.

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

/// Random ACKs, selective acknowledgments, timers and data: the books balance, and the sender can always go on.
#[test]
fn a_client_may_say_anything() {
    let steps: u64 =
        std::env::var("RECOVERY_STEPS").map_or(100_000, |steps| steps.parse().expect("a number"));
    let seed: u64 = std::env::var("RECOVERY_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    let mut random = path::Random::new(seed);
    let mut done = 0;
    while done < steps {
        done += 2_000;
        hostile_connection(&mut random, 2_000);
    }
}

fn hostile_connection(random: &mut path::Random, steps: u32) {
    let segment = [1, 48, 536, 1220, 1460, 8960][random.below(6) as usize];
    let mut now = Timestamp::from_nanos(random.below(1 << 40));
    let setup = Setup {
        segment_size: segment,
        packet_limit: u32::from(segment) * (1 + random.below(44) as u32),
        window: random.below(1 << 20),
        selective: random.below(8) > 0,
        handshake_rtt: (random.below(2) == 0).then(|| Duration::from_nanos(random.below(1 << 30))),
        congestion: [
            CongestionControl::None,
            CongestionControl::Cubic,
            CongestionControl::Bbr,
        ][random.below(3) as usize],
    };
    let mut recovery = Recovery::new(&setup, now);
    let mut queued = 0;
    let mut sequence = 0_u32;
    for _ in 0..steps {
        match random.below(8) {
            0 => queued += random.of_bits([4, 12, 20]),
            1 | 2 => {
                now = recovery.deadline().unwrap_or(now).max(now);
                recovery.on_timer(now);
            }
            3 => now = now + Duration::from_nanos(random.of_bits([16, 24, 32])),
            _ => {
                let (una, nxt) = (recovery.acknowledged(), recovery.sent());
                let near = |random: &mut path::Random| {
                    let span = (nxt - una) + 3000;
                    let grid = [1, u64::from(segment)][random.below(2) as usize];
                    (una.saturating_sub(1000) + random.below(span)) / grid * grid
                };
                let acknowledged = match random.below(4) {
                    0 => near(random),
                    1 => nxt,
                    _ => una,
                };
                let blocks: Vec<Block> = (0..random.below(5))
                    .map(|_| {
                        let start = near(random);
                        let end = match random.below(3) {
                            0 => near(random),
                            1 => start + u64::from(segment),
                            _ => nxt,
                        };
                        Block { start, end }
                    })
                    .collect();
                sequence = sequence.wrapping_add(random.below(3) as u32).wrapping_sub(1);
                let ack = Ack {
                    acknowledged,
                    window: random.of_bits([1, 10, 22]),
                    sequence,
                    carries_data: random.below(2) == 0,
                };
                let freed = recovery.on_ack(now, &ack, &blocks);
                if acknowledged > nxt {
                    assert_eq!(freed, Err(Unacceptable));
                }
                if let Ok(freed) = freed {
                    assert_eq!(recovery.acknowledged(), una + freed);
                }
            }
        }
        for _ in 0..random.below(20) {
            match recovery.next_transmit(now, queued) {
                Some(Transmit::Data { start, end, .. }) => {
                    assert!(start < end && end <= recovery.sent() && start >= recovery.acknowledged());
                    assert!(end - start <= u64::from(setup.packet_limit));
                }
                Some(Transmit::WindowProbe { .. }) => {}
                None => break,
            }
        }
    }
    // An honest client in the end: everything is delivered in a bounded number of steps.
    for _ in 0..100_000 {
        if recovery.acknowledged() == queued {
            return;
        }
        while recovery.next_transmit(now, queued).is_some() {}
        let ack = Ack {
            acknowledged: recovery.sent(),
            window: 1 << 20,
            sequence: 1 << 30,
            carries_data: false,
        };
        recovery.on_ack(now, &ack, &[]).expect("of what was sent");
        if recovery.next_transmit(now, queued).is_some() {
            continue;
        }
        let Some(at) = recovery.deadline() else { continue };
        now = at.max(now);
        recovery.on_timer(now);
    }
    panic!("stuck: {} of {queued}: {recovery:?}", recovery.acknowledged());
}
