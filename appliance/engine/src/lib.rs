//! The appliance's whole behaviour as a state machine without I/O, clock or entropy of its own.
//!
//! Packets, upstream events and time come in through [`Engine::handle`]; packets, commands to upstream sockets
//! and events go out, in one order, through the driver's [`World`]. Bulk data is lent, never queued: see
//! [`Engine::read`] and [`Engine::write`]. `ARCHITECTURE.md` has the picture.

pub mod addr;
pub mod bypass;
pub mod config;
mod counters;
pub mod dns;
mod engine;
pub mod event;
mod flow;
pub mod io;
pub mod journal;
pub mod packet;
pub mod policy;
pub mod reassembly;
mod relay;
mod session;
pub mod shard;
mod sniff;
mod tcp;
pub mod time;
mod timers;

pub use addr::{FlowId, IngressId, Protocol, ShardId};
pub use config::Config;
pub use counters::Counters;
pub use engine::Engine;
pub use event::{CloseReason, DropReason, Event};
pub use io::{Input, Judgement, PacketIn, World, step};
pub use policy::Policy;
pub use tcp::recovery;
pub use time::{Deadline, Timestamp, WakeReason};
