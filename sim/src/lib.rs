//! Replays captures through the engine on virtual time.

pub mod capture;
pub mod outcome;
