//! The program, translated from the committed bytecode when this crate is built; see `build/translate.rs`.

use super::Fault;
use super::memory::Memory;

/// Runs the program with the context at `context`; returns what it returns.
///
/// # Errors
///
/// [`Fault`] for what the kernel's verifier would have ruled out.
pub(super) fn run(memory: &mut Memory, packet: &[u8], context: u64) -> Result<u64, Fault> {
    translated::function_0(memory, packet, [context, 0, 0, 0, 0])
}

#[allow(warnings, clippy::all, reason = "made by a program")]
mod translated {
    use super::{Fault, Memory};

    include!(concat!(env!("OUT_DIR"), "/bytecode.rs"));
}
