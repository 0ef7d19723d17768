//! A network between clients and the engine that is not perfect: what the send half is measured and tested on.
//!
//! ```text
//!  upstream ─▶ engine ─▶ queue ─▶ rate ─▶ loss ─▶ delay ─▶ client     one `Pipe` per direction, shared by all flows
//!  (always      ▲                                            │
//!   has data)   └── delay ◀─ loss ◀─ rate ◀─ queue ◀─────────┘ acknowledgments, and what clients send
//! ```
//!
//! A [`Pipe`] is one direction of a path, for packets of any kind: the simulation sends headers through it, the
//! forwarder of `cargo xtask bench loss --linux` the kernel's packets, on the real clock. A [`Receiver`] acknowledges
//! like Linux. A client is a connection around one; a [`Run`] is clients, pipes and an engine on virtual time.
//!
//! Nobody is late unless told so: with a [`Lateness`] what moves the packets and what sends them wakes up as real threads
//! do, and what has come meanwhile is done at once.
//!
//! Everything is a function of its seed. Nothing here reads a clock.

mod client;
mod fault;
mod lateness;
mod pipe;
mod queue;
mod receiver;
mod run;
mod wire;

pub use self::client::{Manner, Pause, Stage, Upload};
pub use self::fault::{Loss, Reordering};
pub use self::lateness::{IDLE, Lateness, PARTS, Quantiles, idle_class};
pub use self::pipe::{Pipe, PipeCounts, Shape};
pub use self::queue::{Discipline, Queue};
pub use self::receiver::{Acknowledging, Receiver, Report, Window};
pub use self::run::{FlowOutcome, Outcome, Run, Traffic};
