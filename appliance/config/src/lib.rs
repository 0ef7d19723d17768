//! Reads `tungate.toml` and list files into typed policy and settings, with a place and a hint for every mistake.
//!
//! [`load`] reads a configuration with all its list files, [`list_file`] a single list. Either returns all mistakes
//! at once as [`Diagnostics`], which render for a terminal and serialize to JSON. What holds without a configuration
//! is [`Loaded::default`].
//!
//! # Format
//!
//! The keys with their defaults, as [`show_defaults`] returns them:
//!
//! ```toml
#![doc = include_str!("../tungate.example.toml")]
//! ```

mod address;
mod coverage;
mod diagnostic;
mod document;
mod egress;
mod list;
mod load;
mod rules;
mod settings;
#[cfg(test)]
mod testing;
mod value;

pub use diagnostic::{Diagnostic, Diagnostics, Place, Severity};
pub use egress::{
    Egress, EgressKind, Endpoint, Group, GroupMode, HealthCheck, Host, Login, Password, Proxy, SocketOptions,
    Source,
};
pub use list::{List, Progress, list_file, parse_list};
pub use load::{Loaded, load, show_defaults};
pub use settings::{Control, Prefilter};
