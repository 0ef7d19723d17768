//! How late those who take part get to run: what is due waits until its thread is awake, and what has come meanwhile
//! is done at once. A queue of a few packets feels that; longer ones do not.

use std::time::Duration;

use tungate_engine::Timestamp;

use super::fault::Chance;

/// How long a thread needs from the moment when there is something to do until it does it, by how long it has done
/// nothing before: an idle core sleeps deeper, and its caches are cold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lateness {
    /// After less idle time than each of [`IDLE`], and after more than the last.
    pub after_idle: [Quantiles; 4],
}

/// Bounds between short and long idle times.
pub const IDLE: [Duration; 3] = [
    Duration::from_micros(200),
    Duration::from_millis(1),
    Duration::from_millis(5),
];

/// A distribution in microseconds: what lies at each of [`PARTS`], and even between two of them.
pub type Quantiles = [f64; 11];

/// From the least to the most. A run has some ten thousand wake-ups: coarser parts would make the longest of them usual.
pub const PARTS: [f64; 11] = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 0.9999, 0.99999, 1.0];

/// Wakes a thread.
#[derive(Debug, Clone)]
pub(super) struct Waker {
    lateness: Option<Lateness>,
    chance: Chance,
    /// Where in its distribution the next wake-up is.
    part: f64,
    /// When it last did something.
    active: Timestamp,
}

impl Waker {
    /// Of a thread that is never late where there is no `lateness`.
    pub(super) fn new(lateness: Option<Lateness>, mut chance: Chance) -> Self {
        Self {
            part: chance.fraction(),
            lateness,
            chance,
            active: Timestamp::ZERO,
        }
    }

    /// When it does what is due at `due`, if nothing is due before.
    pub(super) fn wakes(&self, due: Timestamp) -> Timestamp {
        let Some(lateness) = &self.lateness else {
            return due;
        };
        let class = idle_class(due.since(self.active));
        due.max(self.active) + at(&lateness.after_idle[class], self.part)
    }

    /// It is awake, and does all that is due.
    pub(super) fn wake(&mut self, now: Timestamp) {
        self.active = now;
        self.part = self.chance.fraction();
    }
}

/// Which of [`Lateness::after_idle`] holds after this time.
pub fn idle_class(idle: Duration) -> usize {
    IDLE.partition_point(|bound| *bound <= idle)
}

/// What lies at this part of a distribution.
fn at(quantiles: &Quantiles, part: f64) -> Duration {
    let upper = PARTS
        .partition_point(|bound| *bound <= part)
        .clamp(1, PARTS.len() - 1);
    let (from, to) = (PARTS[upper - 1], PARTS[upper]);
    let share = (part - from) / (to - from);
    let micros = quantiles[upper - 1] + share * (quantiles[upper] - quantiles[upper - 1]);
    Duration::from_secs_f64(micros * 1e-6)
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUANTILES: Quantiles = [0.0, 5.0, 6.0, 7.0, 9.0, 15.0, 30.0, 70.0, 300.0, 390.0, 400.0];
    const LATENESS: Lateness = Lateness {
        after_idle: [QUANTILES, QUANTILES, [100.0; 11], [200.0; 11]],
    };

    fn micros(micros: u64) -> Timestamp {
        Timestamp::from_nanos(micros * 1000)
    }

    #[test]
    fn a_thread_is_as_late_as_its_distribution_says() {
        let mut waker = Waker::new(Some(LATENESS), Chance::new(1, 0));
        let mut lateness: Vec<f64> = (1..=100_000)
            .map(|turn| {
                let due = micros(turn * 900);
                let woken = waker.wakes(due);
                waker.wake(due);
                woken.since(due).as_secs_f64() * 1e6
            })
            .collect();
        lateness.sort_by(f64::total_cmp);
        for (part, expected) in PARTS.into_iter().zip(QUANTILES).take(7) {
            let found = lateness[((lateness.len() - 1) as f64 * part) as usize];
            assert!(
                (found - expected).abs() < 1.0,
                "{part}: {found} µs, not {expected}"
            );
        }
        assert!(lateness[0] >= 0.0 && lateness[lateness.len() - 1] <= 400.0);
    }

    #[test]
    fn what_has_slept_longer_wakes_later() {
        let waker = Waker::new(Some(LATENESS), Chance::new(1, 0));
        assert_eq!(waker.wakes(micros(4999)), micros(5099));
        assert_eq!(waker.wakes(micros(5000)), micros(5200));
    }

    #[test]
    fn what_is_due_while_a_thread_is_awake_waits_for_its_next_turn() {
        let mut waker = Waker::new(Some(LATENESS), Chance::new(1, 0));
        waker.wake(micros(700));
        assert!(waker.wakes(micros(600)) >= micros(700));
    }

    #[test]
    fn without_lateness_all_is_done_when_it_is_due() {
        let waker = Waker::new(None, Chance::new(1, 0));
        assert_eq!(waker.wakes(micros(5000)), micros(5000));
    }
}
