//! Time as the engine wants it.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use tungate_engine::Timestamp;

/// Seconds since the Unix epoch.
pub(crate) fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Counts from the moment it was made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    epoch: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self {
            epoch: Instant::now(),
        }
    }

    /// Time since the clock was made; never goes back.
    pub(crate) fn now(&self) -> Timestamp {
        Timestamp::from_nanos(u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Nanoseconds from the Unix epoch to the moment the clock was made, by the wall clock as it is set now.
    pub(crate) fn wall_offset(&self) -> i64 {
        let since_unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as i128);
        i64::try_from(since_unix - i128::from(self.now().as_nanos())).unwrap_or(0)
    }
}
