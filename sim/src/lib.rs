//! Replays captures through the engine on virtual time.

pub mod capture;
pub mod cli;
pub mod link;
pub mod outcome;
pub mod replay;
pub mod report;
