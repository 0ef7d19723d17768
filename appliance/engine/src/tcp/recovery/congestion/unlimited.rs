//! No congestion control.

use super::{Congestion, Sample};
use crate::time::Timestamp;

/// The client's window alone limits what is sent.
#[derive(Debug)]
pub(super) struct Unlimited;

impl Congestion for Unlimited {
    fn on_ack(&mut self, _: &Sample) {}

    fn on_congestion(&mut self, _: Timestamp, _: u64) {}

    fn on_recovered(&mut self, _: Timestamp, _: bool) {}

    fn on_timeout(&mut self, _: Timestamp, _: u64, _: u64, _: bool) {}

    fn undo(&mut self, _: Timestamp) {}

    fn on_idle(&mut self, _: Timestamp) {}

    fn set_segment_size(&mut self, _: u32) {}

    fn window(&self) -> u64 {
        u64::MAX
    }

    fn recovery_target(&self) -> Option<u64> {
        None
    }

    fn pacing_rate(&self) -> Option<u64> {
        None
    }
}
