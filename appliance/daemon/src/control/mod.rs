//! The control socket: a running appliance tells what it does, and takes changes of its lists.
//!
//! The supervisor makes the socket, since that takes rights, and gives it to the worker, which serves it: no HTTP is
//! parsed with privileges. What is only to be told the worker tells itself. Changes it asks of the supervisor ([`Ask`]),
//! who has the lists, the pre-filter and the configuration, and makes them one after the other with those that signals
//! ask for. Everything that goes over the socket is a type in [`api`], shared by server and commands; `docs/control.md`
//! is its description.

mod answers;
pub(crate) mod api;
mod client;
mod lists;
mod server;
mod socket;

use serde::{Deserialize, Serialize};
use tungate_engine::policy::ListEntry;

pub(crate) use self::client::{Client, Unreachable};
pub(crate) use self::lists::{ListChange, Lists, entry_key};
pub(crate) use self::server::{Asked, Current, Server};
pub(crate) use self::socket::{Socket, remove_leftover, usual_path};
use crate::driver::RuleCounts;

/// What the worker asks of the supervisor for whoever speaks to the control socket.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Change the lists.
    Change(ListChange),
    /// Read the configuration again.
    Reload,
    /// Let open flows finish, for so many seconds or as long as is usual, and end.
    Drain { seconds: Option<u64> },
    /// Tell what it does itself.
    Report,
}

/// What the supervisor has done.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Done {
    Changed(api::Changed),
    Reloaded(api::Reloaded),
    Draining { seconds: u64 },
    Report(Report),
}

/// What the supervisor knows and the worker does not.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The file that the policy came from.
    pub(crate) configuration: Option<String>,
    pub(crate) prefilter: Vec<api::Prefilter>,
    /// What the pre-filter has dropped, by the engine's names of reasons.
    pub(crate) dropped: Vec<(String, u64)>,
    /// The same by list entry.
    pub(crate) by_rule: RuleCounts,
}

/// Why something was not done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Refused {
    pub(crate) kind: api::ErrorKind,
    pub(crate) message: String,
}

impl Refused {
    pub(crate) fn new(kind: api::ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// These entries are not in the lists.
    pub(crate) fn no_entries(missing: &[ListEntry]) -> Self {
        let names: Vec<_> = missing.iter().map(|entry| format!("`{entry}`")).collect();
        Self::new(
            api::ErrorKind::NoEntry,
            format!(
                "the lists have no entry {}; nothing was changed",
                names.join(", ")
            ),
        )
    }
}
