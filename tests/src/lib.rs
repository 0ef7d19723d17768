//! Tests across crates; see the folder `tests/`. Here is what several of them need.

pub mod client;
pub mod made;
pub mod memory;
pub mod packet;
pub mod pattern;
pub mod recorder;
pub mod rig;
pub mod script;
pub mod world;
