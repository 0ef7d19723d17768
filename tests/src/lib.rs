//! Tests across crates; see the folder `tests/`.
