//! What carries the maps and runs the program.

use tungate_bpf_abi::{Count, Event, Key6, REASONS, Reason};

use crate::error::Error;
use crate::tables::{Image, Patch};

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// It goes on to the engine.
    Pass,
    /// It is gone.
    Drop,
}

/// What the program decided about one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Outcome {
    /// What becomes of the packet.
    pub action: Action,
    /// Why.
    pub reason: Reason,
    /// Number of the rule that decided.
    pub rule: Option<u32>,
}

/// Which packets are reported as events. For a packet to be one, its number in its reason's counter, on the CPU
/// that handles it, must be divisible by 2 to the power given here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Sampling {
    /// One in 2ⁿ dropped packets, n below 64; `None` for none.
    pub drops: Option<u8>,
    /// One in 2ⁿ passed packets, n below 64; `None` for none.
    pub passes: Option<u8>,
}

impl Sampling {
    /// Every packet is reported.
    pub const ALL: Self = Self {
        drops: Some(0),
        passes: Some(0),
    };

    /// The masks the program compares with, by reason.
    pub(crate) fn masks(self) -> [u64; REASONS] {
        Reason::ALL.map(|reason| {
            let power = if reason.is_drop() { self.drops } else { self.passes };
            power
                .and_then(|power| 1u64.checked_shl(u32::from(power)))
                .map_or(u64::MAX, |one_in| one_in - 1)
        })
    }
}

/// A place where the program runs. [`Prefilter`](crate::Prefilter) is the only caller that keeps slots, lists and
/// generations straight; a slot is 0 or 1, the lowest bit of the generation it belongs to.
pub trait Backend {
    /// Replaces the contents of `slot`, which is not in use, and zeroes its rules' counters.
    ///
    /// # Errors
    ///
    /// Where the backend cannot hold the image or reach its maps; like all errors here.
    fn fill(&mut self, slot: u32, image: &Image) -> Result<(), Error>;

    /// Puts `generation` into use with one write, and returns when no packet is judged by the one before.
    fn activate(&mut self, generation: u32) -> Result<(), Error>;

    /// Changes the contents of `slot` while it is in use.
    fn patch(&mut self, slot: u32, patch: &Patch) -> Result<(), Error>;

    /// Replaces the set of the host's own addresses.
    fn set_local(&mut self, addresses: &[Key6]) -> Result<(), Error>;

    /// Packets and bytes by reason since the program was loaded.
    fn reason_counts(&mut self) -> Result<[Count; REASONS], Error>;

    /// Packets and bytes by rule of `slot` since it was filled; rules that were never met may be left out, and so
    /// are rules that have no counter of their own.
    fn rule_counts(&mut self, slot: u32) -> Result<Vec<(u32, Count)>, Error>;

    /// Takes the oldest event.
    fn next_event(&mut self) -> Result<Option<Event>, Error>;

    /// Runs the program over one frame, starting at its Ethernet header. Counts and reports as for real packets.
    fn run(&mut self, frame: &[u8]) -> Result<Outcome, Error>;
}
