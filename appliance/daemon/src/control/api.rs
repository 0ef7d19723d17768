//! What goes over the control socket: bodies of HTTP requests and answers, as JSON.
//!
//! Fields are added in time and keep their meaning; what changes incompatibly gets another prefix than `/v1`.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

pub(crate) const STATUS: &str = "/v1/status";
pub(crate) const FLOWS: &str = "/v1/flows";
pub(crate) const FLOWS_WATCH: &str = "/v1/flows/watch";
pub(crate) const COUNTERS: &str = "/v1/counters";
pub(crate) const POLICY: &str = "/v1/policy";
pub(crate) const POLICY_RELOAD: &str = "/v1/policy/reload";
pub(crate) const LISTS: &str = "/v1/lists";
pub(crate) const LISTS_ADD: &str = "/v1/lists/add";
pub(crate) const LISTS_REMOVE: &str = "/v1/lists/remove";
pub(crate) const DRAIN: &str = "/v1/drain";

/// The answer of `GET /v1/status`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Status {
    /// Of the program.
    pub(crate) version: String,
    /// How long it has relayed.
    pub(crate) uptime_seconds: u64,
    /// Whether it takes no new flows, and ends when the open ones have.
    pub(crate) draining: bool,
    pub(crate) shards: usize,
    pub(crate) open_flows: usize,
    /// Bytes of TCP buffers that flows have.
    pub(crate) buffer_bytes: u64,
    /// The file that the policy came from.
    pub(crate) configuration: Option<String>,
    pub(crate) list_entries: usize,
    pub(crate) rules: usize,
    /// One for each interface that is configured.
    pub(crate) prefilter: Vec<Prefilter>,
}

/// The pre-filter on an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Prefilter {
    pub(crate) interface: String,
    pub(crate) mode: PrefilterMode,
    /// Why it is not native, where it is not.
    pub(crate) why: Option<String>,
}

/// Where lists are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PrefilterMode {
    /// In the card's driver already.
    Native,
    /// In the kernel's network stack.
    Generic,
    /// In the engine alone.
    None,
}

/// The answer of `GET /v1/flows`, and each line of `GET /v1/flows/watch`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Flows {
    /// How many are open, whatever `limit` leaves out.
    pub(crate) total: usize,
    /// The busiest first.
    pub(crate) flows: Vec<Flow>,
}

/// An open flow.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Flow {
    /// What the log calls it; no other flow of this run has it.
    pub(crate) id: String,
    /// `tcp`, `udp` or `icmp`.
    pub(crate) protocol: String,
    /// Address and port; for ICMP the port is the identifier.
    pub(crate) client: String,
    /// Address and port that the client asked for, of UDP the first.
    pub(crate) target: String,
    /// The server's name, where it is known.
    pub(crate) name: Option<String>,
    /// The rule that let it open.
    pub(crate) rule: String,
    /// The way out, by name.
    pub(crate) egress: String,
    pub(crate) state: State,
    /// The kernel carries it; its bytes are near what they are until it ends.
    pub(crate) bypassed: bool,
    pub(crate) age_seconds: f64,
    /// Payload bytes.
    pub(crate) to_upstream: u64,
    pub(crate) to_client: u64,
    /// Since the line before.
    pub(crate) to_upstream_per_second: Option<f64>,
    pub(crate) to_client_per_second: Option<f64>,
}

/// What an open flow does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    Connecting,
    Handshake,
    Open,
    ClientClosed,
    UpstreamClosed,
    Closing,
}

/// The answer of `GET /v1/counters`: since the start, and wherever a packet was dropped.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Counters {
    pub(crate) open_flows: usize,
    pub(crate) buffer_bytes: u64,
    /// Flows that were left to the kernel, of those that have opened.
    pub(crate) bypassed_flows: u64,
    /// Packets by reason; all reasons there are.
    pub(crate) dropped: BTreeMap<String, u64>,
    /// Packets by list entry or rule; those that have dropped any.
    pub(crate) dropped_by_rule: BTreeMap<String, u64>,
    /// Packets by rules of earlier policies, beyond the first 16,384.
    pub(crate) dropped_by_other_rules: u64,
    /// Flows by how they ended; what has been there.
    pub(crate) ended: BTreeMap<String, u64>,
    /// Packets that the device refused, and that found another shard too busy.
    pub(crate) lost_by_device: u64,
    pub(crate) lost_between_shards: u64,
    /// How many of the drops the pre-filter has made.
    pub(crate) dropped_by_prefilter: u64,
}

/// The answer of `GET /v1/policy`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Policy {
    pub(crate) list_entries: usize,
    /// In the order in which they are tried.
    pub(crate) rules: Vec<Rule>,
    pub(crate) egresses: Vec<Egress>,
}

/// A rule. An empty condition always holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Rule {
    pub(crate) name: String,
    pub(crate) clients: Vec<String>,
    pub(crate) targets: Vec<String>,
    pub(crate) protocols: Vec<String>,
    pub(crate) ports: Vec<String>,
    /// `direct`, `egress`, `redirect`, `reject` or `drop`.
    pub(crate) action: String,
    /// The egress's name, or where it redirects to.
    pub(crate) to: Option<String>,
}

/// A named way out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Egress {
    pub(crate) name: String,
    /// `direct`, `socks5`, `http` or `group`.
    pub(crate) kind: String,
}

/// The answer of `GET /v1/lists`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Entries {
    /// How many are in force, whatever `address` and `limit` leave out.
    pub(crate) total: usize,
    pub(crate) entries: Vec<Entry>,
}

/// A list entry in force.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// As a list file has it.
    pub(crate) entry: String,
    pub(crate) origin: Origin,
    /// How much longer it holds; for ever without.
    pub(crate) expires_in_seconds: Option<u64>,
}

/// Where a list entry came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Origin {
    Configuration,
    Control,
}

/// The body of `POST /v1/lists/add`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Add {
    pub(crate) entries: Vec<String>,
    /// How long they hold; until they are removed without.
    #[serde(default)]
    pub(crate) ttl_seconds: Option<u64>,
}

/// The body of `POST /v1/lists/remove` and of `PUT /v1/lists`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Named {
    pub(crate) entries: Vec<String>,
}

/// What a change of the lists came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Changed {
    pub(crate) added: usize,
    /// Were there, and may have got another end.
    pub(crate) renewed: usize,
    pub(crate) removed: usize,
    /// Entries that there are.
    pub(crate) total: usize,
    /// What is probably not meant so.
    pub(crate) warnings: Vec<String>,
}

/// The answer of `POST /v1/policy/reload`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Reloaded {
    pub(crate) list_entries: usize,
    /// Those of them that the control socket has added, now or earlier.
    pub(crate) kept_entries: usize,
    pub(crate) rules: usize,
    pub(crate) warnings: Vec<String>,
}

/// The body of `POST /v1/drain`, which may be left out.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Drain {
    /// How long open flows may go on; 10 without.
    #[serde(default)]
    pub(crate) seconds: Option<u64>,
}

/// The answer of `POST /v1/drain`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Draining {
    pub(crate) seconds: u64,
    pub(crate) open_flows: usize,
}

/// Every answer that is not a success.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) error: Error,
}

/// What is wrong.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Error {
    pub(crate) kind: ErrorKind,
    /// For people; may have several lines.
    pub(crate) message: String,
}

/// What is wrong, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ErrorKind {
    /// 400: the request cannot be understood.
    BadRequest,
    /// 404: there is no such path.
    NoSuchPath,
    /// 405: the path is there, and the method is not for it.
    Method,
    /// 404: a list entry that is to be removed is not there.
    NoEntry,
    /// 409: the configuration has mistakes, or there is none.
    Configuration,
    /// 409: it is draining.
    Draining,
    /// 500: the appliance could not do it.
    Failed,
}

impl ErrorKind {
    pub(crate) const fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::NoSuchPath | Self::NoEntry => 404,
            Self::Method => 405,
            Self::Configuration | Self::Draining => 409,
            Self::Failed => 500,
        }
    }
}

impl State {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Handshake => "handshake",
            Self::Open => "open",
            Self::ClientClosed => "client-closed",
            Self::UpstreamClosed => "upstream-closed",
            Self::Closing => "closing",
        }
    }
}

impl fmt::Display for Prefilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { interface, mode, why } = self;
        match mode {
            PrefilterMode::Native => write!(f, "{interface}: native XDP")?,
            PrefilterMode::Generic => write!(f, "{interface}: generic XDP")?,
            PrefilterMode::None => write!(f, "{interface}: no pre-filter")?,
        }
        match why {
            Some(why) => write!(f, ", since {why}"),
            None => Ok(()),
        }
    }
}
