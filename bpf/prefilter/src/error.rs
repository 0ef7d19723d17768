//! What can go wrong outside of packets.

use crate::object::ObjectError;
use crate::vm::Fault;

/// Why the pre-filter could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More list entries than can be numbered or held.
    #[error("the pre-filter cannot hold lists of {entries} entries")]
    TooManyEntries {
        /// Number of entries asked for.
        entries: usize,
    },
    /// A position behind the last entry.
    #[error("there is no list entry {position}: the lists have {entries} entries")]
    NoSuchEntry {
        /// Position asked for, from 0.
        position: u32,
        /// Number of entries.
        entries: usize,
    },
    /// The object is not the program this crate was written for.
    #[error("the pre-filter's object cannot be used: {0}")]
    Object(#[from] ObjectError),
    /// The program did what the kernel's verifier would not have let it do.
    #[error("the pre-filter's program failed: {0}")]
    Fault(#[from] Fault),
    /// The kernel would not.
    #[cfg(feature = "kernel")]
    #[error(transparent)]
    Kernel(#[from] crate::kernel::KernelError),
}
