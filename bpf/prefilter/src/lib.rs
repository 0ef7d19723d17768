//! The pre-filter's loaders: lists become map contents, and the XDP program runs over them.
//!
//! [`Prefilter`] keeps lists and maps in step. What carries the maps is a [`Backend`]: [`vm::Machine`] runs the
//! committed bytecode without root and the same on every machine; with the feature `kernel`, `kernel::Kernel` loads
//! it into the kernel. Both run the very same object ([`OBJECT`]) on the very same contents.
//!
//! The contract: what the program drops, the engine would drop by the same list entry. So only lists are exported;
//! see [`NotExported`] for what is not, and why.

mod backend;
mod error;
#[cfg(feature = "kernel")]
pub mod kernel;
mod object;
mod prefilter;
mod tables;
pub mod vm;

pub use backend::{Action, Backend, Outcome, Sampling};
pub use error::Error;
pub use object::{MAPS, MapDefinition, MapShape, OBJECT, ObjectError, PROGRAM, Program};
pub use prefilter::{Applied, Counters, NotExported, PacketEvent, Prefilter, Verdict, Why};
pub use tables::{Image, Patch, Room};
pub use tungate_bpf_abi::{Count, Reason};
pub use vm::Vm;
