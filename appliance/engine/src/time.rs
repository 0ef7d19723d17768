//! Time as the driver tells it: the engine has no clock.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Nanoseconds since the driver's epoch: process start when live, the first packet in a replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The driver's epoch.
    pub const ZERO: Self = Self(0);
    /// Later than any time a driver reaches (584 years).
    pub const MAX: Self = Self(u64::MAX);

    /// The time `nanos` nanoseconds after the epoch.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the epoch.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time from `earlier` to `self`; zero when `earlier` is later.
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    /// Saturates at [`Timestamp::MAX`].
    fn add(self, later_by: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(later_by.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}

impl Sub<Duration> for Timestamp {
    type Output = Self;

    /// Saturates at the epoch.
    fn sub(self, earlier_by: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(u64::try_from(earlier_by.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}

/// Seconds with nine decimals, as captures print time.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:09}", self.0 / 1_000_000_000, self.0 % 1_000_000_000)
    }
}

/// When to wake the engine, and why; the reason turns a busy loop into a one-line diagnosis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    /// The earliest time at which something is due.
    pub at: Timestamp,
    /// What is due then.
    pub reason: WakeReason,
}

/// What a [`Deadline`] is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WakeReason {
    /// A TCP timer: retransmission, zero-window probe, TIME-WAIT, or one of the flow's limits.
    Tcp,
    /// A UDP or ICMP session has been silent for its idle time.
    Session,
    /// A datagram's fragments have waited for the rest too long.
    Reassembly,
    /// A list entry or a rule changes its standing at this time.
    Policy,
}
