//! Reads `tungate.toml` and list files into typed policy and settings, with a place and a hint for every mistake.

mod address;
mod coverage;
mod diagnostic;
mod document;
mod egress;
mod list;
mod load;
mod rules;
#[cfg(test)]
mod testing;
mod value;

pub use diagnostic::{Diagnostic, Diagnostics, Place, Severity};
pub use egress::{
    Egress, EgressKind, Endpoint, Group, GroupMode, HealthCheck, Host, Login, Password, Proxy, SocketOptions,
    Source,
};
pub use list::{List, Progress, list_file, parse_list};
pub use load::{Loaded, load};
