//! Whether an acknowledgment may wait for data to go with (RFC 9293, section 3.8.6.3).
//!
//! Where requests are answered soon, the answer acknowledges its request, and one packet of three is saved. Nobody knows
//! beforehand that an answer will come, and a client that holds back the rest of its request until the first part is
//! acknowledged (RFC 896) would stand still meanwhile. So a flow has to have answered a few times in a row before its
//! acknowledgments wait at all, and one that waited in vain costs it that for a long time.

use std::time::Duration;

use crate::time::Timestamp;

/// The longest that an acknowledgment waits. RFC 9293 allows half a second, and Linux takes 40 ms at least.
const WAIT_MAX: Duration = Duration::from_millis(25);

/// Answers in time before acknowledgments wait.
const ANSWERS_WANTED: i8 = 3;

/// As many more after one has waited in vain.
const ANSWERS_OWED: i8 = 32;

/// What is known of how soon a flow's requests are answered.
#[derive(Debug)]
pub(super) struct Delay {
    /// When bytes came that have not been answered; [`Timestamp::MAX`] without such bytes.
    asked: Timestamp,
    /// Answers in time since the last in vain, less those that are owed for it.
    answers: i8,
}

impl Delay {
    pub(super) fn new() -> Self {
        Self {
            asked: Timestamp::MAX,
            answers: 0,
        }
    }

    /// Bytes have come at `now`, and are to be acknowledged. Returns until when that may wait, if at all.
    pub(super) fn on_request(&mut self, now: Timestamp) -> Option<Timestamp> {
        self.asked = now;
        (self.answers >= ANSWERS_WANTED).then(|| now + WAIT_MAX)
    }

    /// Bytes leave for the client.
    pub(super) fn on_answer(&mut self, now: Timestamp) {
        if self.asked == Timestamp::MAX {
            return;
        }
        if now.since(self.asked) < WAIT_MAX {
            self.answers = (self.answers + 1).min(ANSWERS_WANTED);
        }
        self.asked = Timestamp::MAX;
    }

    /// An acknowledgment has waited, and no answer has come.
    pub(super) fn on_silence(&mut self) {
        self.answers = -ANSWERS_OWED;
    }
}
