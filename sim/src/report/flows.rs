//! Flows as the report shows them: all of them on disk, counts and the largest in memory.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::io;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use tungate_engine::event::NameSource;
use tungate_engine::{Protocol, Timestamp};

use super::attempts::{self, Attempts};
use super::spool::{FlowSpool, StoredFlows};
use crate::outcome::{FlowRecord, Path, Stream};

/// How many flows the terminal shows.
const LARGEST: usize = 20;

/// Counts of the flows of one capture, as `--json` has them, and the largest of them.
#[derive(Debug, Default, Serialize)]
pub(super) struct FlowSummary {
    pub(super) count: u64,
    pub(super) by_protocol: BTreeMap<&'static str, u64>,
    pub(super) by_verdict: BTreeMap<&'static str, u64>,
    pub(super) by_end: BTreeMap<&'static str, u64>,
    pub(super) by_anomaly: BTreeMap<&'static str, u64>,
    /// Floods and scans.
    #[serde(skip)]
    pub(super) attempts: Vec<(attempts::Kind, attempts::Group)>,
    /// Of the others, most bytes first; of equals the lower id.
    #[serde(skip)]
    pub(super) largest: Vec<FlowRecord>,
}

/// Takes flows as they end.
pub(super) struct Flows {
    summary: FlowSummary,
    largest: BinaryHeap<Reverse<BySize>>,
    attempts: Attempts,
    spool: FlowSpool,
}

/// Orders flows by bytes both ways, then the lower id as the larger.
struct BySize(FlowRecord);

impl Flows {
    pub(super) fn new() -> Self {
        Self {
            summary: FlowSummary::default(),
            largest: BinaryHeap::new(),
            attempts: Attempts::default(),
            spool: FlowSpool::new(),
        }
    }

    pub(super) fn add(&mut self, flow: FlowRecord) {
        let summary = &mut self.summary;
        summary.count += 1;
        *summary.by_protocol.entry(flow.protocol.name()).or_default() += 1;
        *summary.by_verdict.entry(flow.verdict).or_default() += 1;
        *summary.by_end.entry(flow.end).or_default() += 1;
        for anomaly in &flow.anomalies {
            *summary.by_anomaly.entry(anomaly).or_default() += 1;
        }
        self.spool.push(flow.id, &FlowJson::from(&flow));
        self.attempts.add(&flow);
        self.largest.push(Reverse(BySize(flow)));
        if self.largest.len() > LARGEST {
            self.largest.pop();
        }
    }

    /// Ends the taking.
    ///
    /// # Errors
    ///
    /// As [`FlowSpool::finish`].
    pub(super) fn finish(mut self) -> io::Result<(FlowSummary, StoredFlows)> {
        let largest = self.largest.into_sorted_vec();
        let groups = self.attempts.finish();
        let largest = largest.into_iter().map(|Reverse(BySize(flow))| flow);
        self.summary.largest = largest.filter(|flow| !attempts::holds(&groups, flow)).collect();
        self.summary.attempts = groups;
        Ok((self.summary, self.spool.finish()?))
    }
}

impl BySize {
    fn key(&self) -> (u64, Reverse<u64>) {
        (
            self.0.to_target.bytes + self.0.to_client.bytes,
            Reverse(self.0.id),
        )
    }
}

impl Ord for BySize {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for BySize {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for BySize {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for BySize {}

/// A flow in `--json`.
#[derive(Debug, Serialize)]
pub(super) struct FlowJson<'a> {
    id: u64,
    protocol: Protocol,
    client: String,
    target: String,
    name: Option<&'a str>,
    name_source: Option<NameSource>,
    first_packet: u64,
    packets: u64,
    first_time: f64,
    last_time: f64,
    verdict: &'static str,
    rule: Option<&'a str>,
    path: Path,
    egress: Option<&'a str>,
    to_target: &'a Stream,
    to_client: &'a Stream,
    end: &'static str,
    reason: Option<&'static str>,
    exact: Option<bool>,
    anomalies: &'a [&'static str],
}

/// What is read back of a flow to compare it with its like under another policy.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct FlowLine {
    pub(super) id: u64,
    pub(super) protocol: String,
    pub(super) client: String,
    pub(super) target: String,
    pub(super) name: Option<String>,
    pub(super) first_packet: u64,
    pub(super) verdict: String,
    pub(super) rule: Option<String>,
    pub(super) egress: Option<String>,
    pub(super) end: String,
    pub(super) to_target: StreamLine,
    pub(super) to_client: StreamLine,
}

/// One direction of a [`FlowLine`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StreamLine {
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

impl<'a> From<&'a FlowRecord> for FlowJson<'a> {
    fn from(flow: &'a FlowRecord) -> Self {
        let (client, target) = endpoints(flow);
        Self {
            id: flow.id,
            protocol: flow.protocol,
            client: client.to_string(),
            target: target.to_string(),
            name: flow.name.as_deref(),
            name_source: flow.name_source,
            first_packet: flow.first_packet,
            packets: flow.packets,
            first_time: seconds(flow.first_time),
            last_time: seconds(flow.last_time),
            verdict: flow.verdict,
            rule: flow.rule.as_deref(),
            path: flow.path,
            egress: flow.egress.as_deref(),
            to_target: &flow.to_target,
            to_client: &flow.to_client,
            end: flow.end,
            reason: flow.reason,
            exact: flow.exact,
            anomalies: &flow.anomalies,
        }
    }
}

/// Client and target as reports print them: RFC 5952, IPv6 in brackets; ICMP has its identifier in the port's place.
pub(super) fn endpoints(flow: &FlowRecord) -> (SocketAddr, SocketAddr) {
    let target = match flow.protocol {
        Protocol::Tcp | Protocol::Udp => flow.target,
        Protocol::Icmp => SocketAddr::new(flow.target.ip(), flow.client.port()),
    };
    (flow.client, target)
}

/// Seconds as JSON has them; exact to the nanosecond for captures of up to 48 days.
pub(super) fn seconds(time: Timestamp) -> f64 {
    time.as_nanos() as f64 / 1e9
}
