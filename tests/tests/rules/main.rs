//! The rules of replay, each shown on a capture of a few packets.
//!
//! A capture says what a client and a target have told each other. A replay has another peer between them, so it needs
//! rules: who is who, what goes into the engine, how numbers are mapped, what is made up. Every module here is about one
//! or two of them, in the order in which `tungate_sim::replay` applies them.

mod checksums;
mod end;
mod flows;
mod frames;
mod holes;
mod model;
mod numbers;
mod roles;
mod script;

use sha2::{Digest, Sha256};
use tungate_sim::outcome::Stream;

/// A stream of these bytes, none of which is missing.
fn whole(bytes: &[u8]) -> Stream {
    with_missing(bytes, 0)
}

/// A stream of these captured bytes, and as many that are not.
fn with_missing(bytes: &[u8], missing: u64) -> Stream {
    let hash = Sha256::digest(bytes);
    Stream {
        bytes: bytes.len() as u64,
        sha256: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
        missing,
    }
}
