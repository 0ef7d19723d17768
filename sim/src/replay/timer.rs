//! Timers of the modelled peers.

use tungate_engine::Timestamp;

/// When something is due. By default never: then it is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Timer(Timestamp);

impl Timer {
    /// Due never.
    pub(super) const OFF: Self = Self(Timestamp::MAX);

    pub(super) fn at(time: Timestamp) -> Self {
        Self(time)
    }

    pub(super) fn is_on(self) -> bool {
        self != Self::OFF
    }

    pub(super) fn is_due(self, now: Timestamp) -> bool {
        self.0 <= now
    }

    /// When it is due; [`Timestamp::MAX`] is never.
    pub(super) fn due(self) -> Timestamp {
        self.0
    }
}

impl Default for Timer {
    fn default() -> Self {
        Self::OFF
    }
}
