//! `--expect FILE`: what a replay must have found, for checks that run by themselves.
//!
//! The file is TOML; every key is optional and none is compared that is not written. An unknown key is an error.
//!
//! ```toml
#![doc = include_str!("expect_example.toml")]
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tungate_engine::Protocol;

use super::Report;
use super::flows::endpoints;
use crate::outcome::{FlowRecord, Stream};

/// Every key of a file of expectations, explained.
pub const EXAMPLE: &str = include_str!("expect_example.toml");

/// The expectations of one file.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Expectations {
    digest: Option<String>,
    damaged: Option<bool>,
    read: Option<u64>,
    judged: Option<u64>,
    unreadable: Option<u64>,
    not_ip: Option<u64>,
    from_client: Option<u64>,
    from_target: Option<u64>,
    pass: Option<u64>,
    drop: Option<u64>,
    by_rule: BTreeMap<String, u64>,
    by_reason: BTreeMap<String, u64>,
    disagreements: Option<u64>,
    flows: Option<u64>,
    exact: Option<Exact>,
    by_protocol: BTreeMap<String, u64>,
    by_verdict: BTreeMap<String, u64>,
    by_end: BTreeMap<String, u64>,
    by_anomaly: BTreeMap<String, u64>,
    flow: Vec<FlowExpectation>,
}

/// A file of expectations that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ExpectError {
    /// It cannot be read.
    #[error("cannot read expectations \"{}\": {error}\nhint: check the name given with --expect", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// It says something that cannot be checked.
    #[error("expectations \"{}\": {error}hint: replay --help shows an example", .path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        error: toml::de::Error,
    },
}

/// An expectation that did not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mismatch {
    /// What was looked at, as written in the file.
    pub what: String,
    /// What was to be found.
    pub expected: String,
    /// What was found.
    pub actual: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(untagged, expecting = "a number of flows, or \"all\"")]
enum Exact {
    Flows(u64),
    Word(All),
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
enum All {
    #[serde(rename = "all")]
    All,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct FlowExpectation {
    id: Option<u64>,
    protocol: Option<Protocol>,
    client: Option<Endpoint>,
    target: Option<Endpoint>,
    first_packet: Option<u64>,
    count: Option<u64>,
    verdict: Option<String>,
    rule: Option<String>,
    path: Option<String>,
    egress: Option<String>,
    name: Option<String>,
    end: Option<String>,
    reason: Option<String>,
    exact: Option<bool>,
    anomalies: Option<Vec<String>>,
    to_target: StreamExpectation,
    to_client: StreamExpectation,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct StreamExpectation {
    bytes: Option<u64>,
    sha256: Option<String>,
    missing: Option<u64>,
}

/// An address, with a port or whatever its port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
enum Endpoint {
    Address(IpAddr),
    AddressAndPort(SocketAddr),
}

/// Compares flows, as they end, with what is expected of them.
#[derive(Debug)]
pub(super) struct Expecting {
    expectations: Expectations,
    flows: Vec<FlowFindings>,
}

/// What has been found of the flows that one `[[flow]]` chooses.
#[derive(Debug, Default)]
struct FlowFindings {
    chosen: u64,
    /// By key: the flow with the lowest id that differs, and how many do.
    differing: BTreeMap<&'static str, Differing>,
}

#[derive(Debug)]
struct Differing {
    flow: u64,
    flows: u64,
    expected: String,
    actual: String,
}

impl Expectations {
    /// Reads the file `path`.
    ///
    /// # Errors
    ///
    /// [`ExpectError`] when it cannot be read, is not TOML, or has a key or value that means nothing.
    pub fn load(path: &Path) -> Result<Self, ExpectError> {
        let text = fs::read_to_string(path).map_err(|error| ExpectError::Io {
            path: path.to_owned(),
            error,
        })?;
        toml::from_str(&text).map_err(|error| ExpectError::Syntax {
            path: path.to_owned(),
            error,
        })
    }
}

impl Expectations {
    /// What does not hold of a journal, which has a digest and perhaps damage; whatever else is expected does not.
    pub(super) fn compare_journal(&self, digest: &String, damaged: bool) -> Vec<Mismatch> {
        let mut mismatches = Mismatches::default();
        mismatches.value("digest", self.digest.as_ref(), digest);
        mismatches.value("damaged", self.damaged.as_ref(), &damaged);
        let rest = Self {
            digest: None,
            damaged: None,
            ..self.clone()
        };
        if rest != Self::default() {
            let (what, expected) = ("all but digest and damaged", "a capture");
            mismatches.add(what.to_owned(), expected.to_owned(), "a journal".to_owned());
        }
        mismatches.0
    }
}

impl Expecting {
    pub(super) fn new(expectations: Expectations) -> Self {
        let flows = expectations
            .flow
            .iter()
            .map(|_| FlowFindings::default())
            .collect();
        Self { expectations, flows }
    }

    /// Looks at a flow that has ended.
    pub(super) fn flow(&mut self, flow: &FlowRecord) {
        for (expectation, findings) in self.expectations.flow.iter().zip(&mut self.flows) {
            if expectation.chooses(flow) {
                findings.chosen += 1;
                expectation.compare(flow, findings);
            }
        }
    }

    /// What did not hold, in the order of the file's documentation.
    pub(super) fn finish(self, report: &Report) -> Vec<Mismatch> {
        let expected = &self.expectations;
        let mut mismatches = Mismatches::default();
        let (facts, flows) = (&report.facts, &report.flows);
        let totals = &facts.outcome.totals;
        mismatches.value("digest", expected.digest.as_ref(), &facts.outcome.digest);
        mismatches.value(
            "damaged",
            expected.damaged.as_ref(),
            &facts.outcome.damaged.is_some(),
        );
        for (what, expected, actual) in [
            ("read", expected.read, totals.read),
            ("judged", expected.judged, totals.judged),
            ("unreadable", expected.unreadable, totals.unreadable),
            ("not_ip", expected.not_ip, totals.not_ip),
            ("from_client", expected.from_client, totals.from_client),
            ("from_target", expected.from_target, totals.from_target),
            ("pass", expected.pass, totals.pass),
            ("drop", expected.drop, totals.drop),
        ] {
            mismatches.value(what, expected.as_ref(), &actual);
        }
        mismatches.counts("by_rule", &expected.by_rule, |name| {
            facts.outcome.by_rule.get(name)
        });
        mismatches.counts("by_reason", &expected.by_reason, |name| {
            facts.outcome.by_reason.get(name)
        });
        mismatches.value(
            "disagreements",
            expected.disagreements.as_ref(),
            &totals.parity_disagreements,
        );
        mismatches.value("flows", expected.flows.as_ref(), &flows.count);
        match expected.exact {
            None => {}
            Some(Exact::Flows(expected)) => {
                mismatches.value("exact", Some(&expected), &totals.fidelity_exact)
            }
            Some(Exact::Word(All::All)) if totals.fidelity_exact == totals.fidelity_flows => {}
            Some(Exact::Word(All::All)) => mismatches.add(
                "exact".to_owned(),
                format!("all {}", totals.fidelity_flows),
                totals.fidelity_exact.to_string(),
            ),
        }
        mismatches.counts("by_protocol", &expected.by_protocol, |name| {
            flows.by_protocol.get(name)
        });
        mismatches.counts("by_verdict", &expected.by_verdict, |name| {
            flows.by_verdict.get(name)
        });
        mismatches.counts("by_end", &expected.by_end, |name| flows.by_end.get(name));
        mismatches.counts("by_anomaly", &expected.by_anomaly, |name| {
            flows.by_anomaly.get(name)
        });
        for (expectation, findings) in expected.flow.iter().zip(self.flows) {
            mismatches.flow(expectation, findings);
        }
        mismatches.0
    }
}

impl FlowExpectation {
    fn chooses(&self, flow: &FlowRecord) -> bool {
        let (client, target) = endpoints(flow);
        self.id.is_none_or(|id| id == flow.id)
            && self.protocol.is_none_or(|protocol| protocol == flow.protocol)
            && self.client.is_none_or(|endpoint| endpoint.fits(client))
            && self.target.is_none_or(|endpoint| endpoint.fits(target))
            && self.first_packet.is_none_or(|number| number == flow.first_packet)
    }

    fn compare(&self, flow: &FlowRecord, findings: &mut FlowFindings) {
        let path = match flow.path {
            crate::outcome::Path::Prefilter => "prefilter",
            crate::outcome::Path::Engine => "engine",
        };
        let words: [(&'static str, &Option<String>, Option<&str>); 7] = [
            ("verdict", &self.verdict, Some(flow.verdict)),
            ("rule", &self.rule, flow.rule.as_deref()),
            ("path", &self.path, Some(path)),
            ("egress", &self.egress, flow.egress.as_deref()),
            ("name", &self.name, flow.name.as_deref()),
            ("end", &self.end, Some(flow.end)),
            ("reason", &self.reason, flow.reason),
        ];
        for (key, expected, actual) in words {
            findings.compare(key, flow.id, expected.as_deref(), actual.unwrap_or("none"));
        }
        let exact = flow
            .exact
            .map_or("not relayed".to_owned(), |exact| exact.to_string());
        findings.compare(
            "exact",
            flow.id,
            self.exact.map(|exact| exact.to_string()).as_deref(),
            &exact,
        );
        let sorted = |names: &Vec<String>| {
            let mut names = names.clone();
            names.sort_unstable();
            names.join(", ")
        };
        let anomalies = flow.anomalies.join(", ");
        findings.compare(
            "anomalies",
            flow.id,
            self.anomalies.as_ref().map(sorted).as_deref(),
            &anomalies,
        );
        let streams = [
            (
                ["to_target.bytes", "to_target.sha256", "to_target.missing"],
                &self.to_target,
                &flow.to_target,
            ),
            (
                ["to_client.bytes", "to_client.sha256", "to_client.missing"],
                &self.to_client,
                &flow.to_client,
            ),
        ];
        for (keys, expected, actual) in streams {
            expected.compare(keys, flow.id, actual, findings);
        }
    }
}

impl StreamExpectation {
    fn compare(&self, keys: [&'static str; 3], flow: u64, actual: &Stream, findings: &mut FlowFindings) {
        let text = |number: u64| number.to_string();
        findings.compare(
            keys[0],
            flow,
            self.bytes.map(text).as_deref(),
            &text(actual.bytes),
        );
        findings.compare(keys[1], flow, self.sha256.as_deref(), &actual.sha256);
        findings.compare(
            keys[2],
            flow,
            self.missing.map(text).as_deref(),
            &text(actual.missing),
        );
    }
}

impl FlowFindings {
    fn compare(&mut self, key: &'static str, flow: u64, expected: Option<&str>, actual: &str) {
        let Some(expected) = expected else { return };
        if expected == actual {
            return;
        }
        let differing = self.differing.entry(key).or_insert_with(|| Differing {
            flow: u64::MAX,
            flows: 0,
            expected: expected.to_owned(),
            actual: String::new(),
        });
        differing.flows += 1;
        if flow < differing.flow {
            differing.flow = flow;
            differing.actual = actual.to_owned();
        }
    }
}

#[derive(Default)]
struct Mismatches(Vec<Mismatch>);

impl Mismatches {
    fn add(&mut self, what: String, expected: String, actual: String) {
        self.0.push(Mismatch {
            what,
            expected,
            actual,
        });
    }

    fn value<T: PartialEq + fmt::Display>(&mut self, what: &str, expected: Option<&T>, actual: &T) {
        match expected {
            Some(expected) if expected != actual => {
                self.add(what.to_owned(), expected.to_string(), actual.to_string());
            }
            Some(_) | None => {}
        }
    }

    fn counts<'a>(
        &mut self,
        what: &str,
        expected: &BTreeMap<String, u64>,
        actual: impl Fn(&str) -> Option<&'a u64>,
    ) {
        for (name, expected) in expected {
            self.value(
                &format!("{what}.{name:?}"),
                Some(expected),
                actual(name).unwrap_or(&0),
            );
        }
    }

    fn flow(&mut self, expectation: &FlowExpectation, findings: FlowFindings) {
        let what = format!("[[flow]]{expectation}");
        match expectation.count {
            Some(count) => self.value(&format!("{what} count"), Some(&count), &findings.chosen),
            None if findings.chosen == 0 => {
                self.add(what.clone(), "at least one flow".to_owned(), "none".to_owned());
            }
            None => {}
        }
        for (
            key,
            Differing {
                flow,
                flows,
                expected,
                actual,
            },
        ) in findings.differing
        {
            let which = match (findings.chosen, flows) {
                (1, _) => format!("flow {flow}"),
                (chosen, flows) => format!("flow {flow}, and {} more of {chosen}", flows - 1),
            };
            self.add(format!("{what} {key}"), expected, format!("{actual} ({which})"));
        }
    }
}

impl Endpoint {
    fn fits(self, address: SocketAddr) -> bool {
        match self {
            Self::Address(expected) => expected == address.ip(),
            Self::AddressAndPort(expected) => expected == address,
        }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match (text.parse(), text.parse()) {
            (Ok(address), _) => Ok(Self::Address(address)),
            (_, Ok(address)) => Ok(Self::AddressAndPort(address)),
            (Err(_), Err(_)) => Err(format!(
                "\"{text}\" is not an address; write for instance 192.0.2.1, 192.0.2.1:80 or [2001:db8::1]:80"
            )),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::AddressAndPort(address) => address.fmt(f),
        }
    }
}

/// The keys that choose flows.
impl fmt::Display for FlowExpectation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chosen: [(&str, Option<&dyn fmt::Display>); 5] = [
            ("id", self.id.as_ref().map(|id| id as _)),
            ("protocol", self.protocol.as_ref().map(|protocol| protocol as _)),
            ("client", self.client.as_ref().map(|endpoint| endpoint as _)),
            ("target", self.target.as_ref().map(|endpoint| endpoint as _)),
            (
                "first_packet",
                self.first_packet.as_ref().map(|number| number as _),
            ),
        ];
        chosen.into_iter().try_for_each(|(key, value)| match value {
            Some(value) => write!(f, " {key} {value}"),
            None => Ok(()),
        })
    }
}
