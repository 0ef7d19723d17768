//! What happens to packets by chance: loss, reordering, duplication.

use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};

/// How packets are lost behind the queue.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Loss {
    /// None is.
    #[default]
    None,
    /// Each with this probability, by itself.
    Random(f64),
    /// In bursts: the two-state model of Gilbert and Elliott with a good state that loses nothing and a bad state that
    /// loses everything. `share` of all packets are lost, in runs of `length` packets on average (at least 1).
    Burst {
        /// Part of all packets, below 1.
        share: f64,
        /// Mean number of packets lost in a row.
        length: f64,
    },
}

/// A share of packets that takes longer, so that others overtake them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reordering {
    /// Part of all packets.
    pub share: f64,
    /// Each of them takes up to this much longer, evenly distributed.
    pub most: Duration,
}

/// Draws that come true with a given probability, from a stream of their own: turning one kind of fault on does not
/// change what another does.
#[derive(Debug, Clone)]
pub(super) struct Chance {
    rng: ChaCha8Rng,
}

impl Chance {
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self { rng }
    }

    /// `true` with this probability.
    pub(super) fn comes(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.fraction() < probability
    }

    /// Evenly from 0 to `most`.
    pub(super) fn up_to(&mut self, most: Duration) -> Duration {
        most.mul_f64(self.fraction())
    }

    /// Evenly from 0 to below 1.
    pub(super) fn fraction(&mut self) -> f64 {
        (self.rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Decides packet by packet which is lost.
#[derive(Debug, Clone)]
pub(super) struct Loser {
    loss: Loss,
    chance: Chance,
    /// In the bad state of [`Loss::Burst`].
    is_bad: bool,
}

impl Loser {
    pub(super) fn new(loss: Loss, chance: Chance) -> Self {
        Self {
            loss,
            chance,
            is_bad: false,
        }
    }

    pub(super) fn loses(&mut self) -> bool {
        match self.loss {
            Loss::None => false,
            Loss::Random(probability) => self.chance.comes(probability),
            Loss::Burst { share, length } => {
                // The share of time in the bad state is enter / (enter + leave).
                let leave = 1.0 / length.max(1.0);
                let enter = leave * share / (1.0 - share);
                let turns = if self.is_bad { leave } else { enter };
                if self.chance.comes(turns) {
                    self.is_bad = !self.is_bad;
                }
                self.is_bad
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PACKETS: u32 = 200_000;

    fn lost(loss: Loss, seed: u64) -> Vec<bool> {
        let mut loser = Loser::new(loss, Chance::new(seed, 0));
        (0..PACKETS).map(|_| loser.loses()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// Five standard deviations of a binomial distribution: one in two million.
        #[test]
        fn random_loss_has_its_rate(seed: u64, probability in 0.0..0.3_f64) {
            let count = lost(Loss::Random(probability), seed).into_iter().filter(|lost| *lost).count() as f64;
            let packets = f64::from(PACKETS);
            let deviation = (packets * probability * (1.0 - probability)).sqrt();
            prop_assert!((count - packets * probability).abs() <= 5.0 * deviation + 1.0, "{count}");
        }

        /// Runs have geometric lengths: the mean of n has a deviation of about length / sqrt(n).
        #[test]
        fn bursts_have_their_length_and_share(seed: u64, share in 0.005..0.05_f64, length in 1.0..20.0_f64) {
            let lost = lost(Loss::Burst { share, length }, seed);
            let runs = lost.chunk_by(|one, next| one == next).filter(|run| run[0]).count() as f64;
            let count = lost.iter().filter(|lost| **lost).count() as f64;
            let mean = count / runs;
            prop_assert!((mean - length).abs() <= 5.0 * length / runs.sqrt() + 0.1, "{mean} in {runs} runs");
            let expected = f64::from(PACKETS) * share;
            let spread = 5.0 * (2.0 * expected * length).sqrt();
            prop_assert!((count - expected).abs() <= spread, "{count} of {expected}");
        }
    }

    #[test]
    fn losses_do_not_come_in_pairs_by_themselves() {
        let lost = lost(Loss::Random(0.1), 3);
        let pairs = lost.windows(2).filter(|pair| pair[0] && pair[1]).count() as f64;
        let expected = f64::from(PACKETS) * 0.01;
        assert!(
            (pairs - expected).abs() < 5.0 * (1.4 * expected).sqrt(),
            "{pairs}"
        );
    }
}
