//! The project's chores: `cargo xtask test`, `bench`, `soak`, `bpf`.
fn main() {}
