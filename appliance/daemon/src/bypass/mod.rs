//! Flows that the kernel carries, while the appliance judges, counts and ends them: see `docs/bypass.md`.
//!
//! The engine decides, and sends a flow's SYN on by the device. The [`Keeper`] is the supervisor's part, a thread that has
//! the [table] of rules and conntrack, and is asked over a line to count or forget a connection. The [`Watcher`] is the
//! worker's: it reads the segments that the kernel shows, and tells shards of them and of the keeper's answers.

mod conntrack;
mod keeper;
mod netlink;
mod table;
mod watcher;

use serde::{Deserialize, Serialize};
use tungate_engine::bypass::{BypassEvent, Ends};

pub(crate) use keeper::{Keeper, Lines, forget_all};
pub(crate) use watcher::{Asking, Watcher};

/// The group of netfilter's log that segments are shown to.
const LOG_GROUP: u16 = 29_799;
/// What is said of a segment: who has sent it, or that it is an error.
const FROM_CLIENT: &str = "client";
const FROM_TARGET: &str = "target";
const ERROR: &str = "error";
/// Bytes that are shown of one: an ICMPv6 error with the headers it quotes.
const SEEN_LEN: u32 = 128;
/// The longest message on the line, and more.
const MESSAGE_MAX: usize = 256;

/// What the worker asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Request {
    /// What a connection has carried.
    Count(Ends),
    /// To forget a connection.
    Release(Ends),
    /// What all have carried; the answer ends with [`Answer::Listed`] and this number.
    List(u64),
}

/// What the keeper answers, or tells by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Answer {
    News(Ends, BypassEvent),
    Listed(u64),
}

/// An interface that forwards only because a bypass needs that: nothing but bypassed flows may pass it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Opened {
    pub(crate) interface: String,
    pub(crate) ipv6: bool,
}
