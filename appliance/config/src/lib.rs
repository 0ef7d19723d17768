//! Reads `tungate.toml` and list files into typed policy and settings, with a place and a hint for every mistake.
