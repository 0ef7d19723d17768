//! A client that says anything.

use std::time::Duration;

use tungate_engine::Timestamp;
use tungate_engine::recovery::{Ack, Block, CongestionControl, Recovery, Setup, Transmit, Unacceptable};

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    /// Of at most one of these numbers of bits.
    fn of_bits(&mut self, bits: [u32; 3]) -> u64 {
        let bits = bits[self.below(3) as usize];
        self.below(1 << bits)
    }
}

/// The number in an environment variable.
pub(crate) fn number_of(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// Random ACKs, selective acknowledgments, timers and data: the books balance, and the sender can always go on.
#[test]
fn a_client_may_say_anything() {
    let steps = number_of("RECOVERY_STEPS", 100_000);
    let mut random = Random(number_of("RECOVERY_SEED", 1));
    let mut done = 0;
    while done < steps {
        done += 2_000;
        hostile_connection(&mut random, 2_000);
    }
}

fn hostile_connection(random: &mut Random, steps: u32) {
    let segment = [48, 536, 1220, 1460, 8960][random.below(5) as usize];
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
            0 => queued += random.of_bits([4, 10, 16]),
            1 | 2 => {
                now = recovery.deadline().unwrap_or(now).max(now);
                recovery.on_timer(now);
            }
            3 => now = now + Duration::from_nanos(random.of_bits([16, 24, 32])),
            _ => {
                let (una, nxt) = (recovery.acknowledged(), recovery.sent());
                let near = |random: &mut Random| {
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
    for _ in 0..1_000_000 {
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
