//! Compiles policy lists into the XDP program's maps and runs its bytecode.
