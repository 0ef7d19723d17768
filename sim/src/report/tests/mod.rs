//! Reports on records made by hand: what is expected was computed from the records, by head.

mod checks;
mod files;
mod json;
mod text;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;
use tungate_engine::Protocol;
use tungate_engine::policy::{Action, Policy, PolicySpec, Rule, RuleMatch, RuleRef};

use super::*;
use crate::capture::Damage;
use crate::outcome::{self, Side, Stream};
use crate::replay::Repeated;

/// SHA-256 of nothing (FIPS 180-4 example).
const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn policy(rules: &[&str]) -> Arc<Policy> {
    let rule = |name: &&str| Rule {
        name: (*name).to_owned(),
        matches: RuleMatch::default(),
        action: Action::Drop,
    };
    Arc::new(Policy::new(PolicySpec {
        rules: rules.iter().map(rule).collect(),
        ..PolicySpec::default()
    }))
}

/// A packet of a client that passed by default.
fn packet(number: u64) -> PacketRecord {
    PacketRecord {
        number,
        time: Timestamp::from_nanos(number * 1_000_000),
        side: Side::Client,
        path: Some(outcome::Path::Engine),
        reason: None,
        dropped: false,
        rule: Some((policy(&[]), RuleRef::Default)),
        flow: Some(1),
    }
}

/// The same packet dropped by the only rule of a policy.
fn dropped(number: u64, rule: &str) -> PacketRecord {
    PacketRecord {
        dropped: true,
        reason: Some("rule-drop"),
        rule: Some((policy(&[rule]), RuleRef::Rule(0))),
        ..packet(number)
    }
}

fn stream(bytes: u64) -> Stream {
    Stream {
        bytes,
        sha256: EMPTY.to_owned(),
        missing: 0,
    }
}

/// A relayed flow that received `id` bytes, begun by packet `id`.
pub(super) fn flow(id: u64) -> FlowRecord {
    FlowRecord {
        id,
        protocol: Protocol::Tcp,
        client: "10.0.0.2:40001".parse().unwrap(),
        target: "192.0.2.7:80".parse().unwrap(),
        first_packet: id,
        first_time: Timestamp::from_nanos(id * 1_000_000),
        last_time: Timestamp::from_nanos(id * 1_000_000 + 5),
        packets: 9,
        verdict: "direct",
        rule: Some("default".to_owned()),
        path: outcome::Path::Engine,
        egress: None,
        name: None,
        name_source: None,
        to_target: stream(0),
        to_client: stream(id),
        end: "fin",
        reason: None,
        anomalies: Vec::new(),
        exact: Some(true),
    }
}

fn facts() -> Facts {
    Facts {
        capture: "http-get.pcap".to_owned(),
        policy: "default".to_owned(),
        changes: Vec::new(),
        format: "pcap, little-endian".to_owned(),
        link_types: vec!["Ethernet".to_owned()],
        outcome: outcome(),
    }
}

fn outcome() -> Outcome {
    Outcome {
        totals: Totals {
            read: 4,
            judged: 3,
            not_ip: 1,
            from_client: 2,
            from_target: 1,
            pass: 2,
            drop: 1,
            parity_checked: 2,
            fidelity_flows: 2,
            fidelity_exact: 2,
            captured_bytes: 2500,
            started: 1_389_719_041_819_644_000, // 2014-01-14 17:04:01.819644 UTC
            duration: Timestamp::from_nanos(17_492_054_000),
            ..Totals::default()
        },
        by_rule: BTreeMap::from([("default".to_owned(), 2), ("ads".to_owned(), 1)]),
        by_reason: BTreeMap::from([("rule-drop", 1)]),
        digest: EMPTY.to_owned(),
        damaged: None,
    }
}

fn facts_of(totals: Totals) -> Facts {
    Facts {
        outcome: Outcome { totals, ..outcome() },
        ..facts()
    }
}

fn report(flows: impl IntoIterator<Item = FlowRecord>) -> Report {
    let mut collector = Collector::new();
    flows.into_iter().for_each(|flow| collector.flow(flow));
    collector.finish(facts()).unwrap()
}

fn as_json(report: &mut Report) -> Value {
    let mut reports = JsonReports::new(Vec::new(), false).unwrap();
    reports.add(report).unwrap();
    serde_json::from_slice(&reports.finish().unwrap()).unwrap()
}

fn assert_fits_schema(value: &Value) {
    let schema = serde_json::from_str(include_str!("../../../report.schema.json")).unwrap();
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    let errors: Vec<String> = validator
        .iter_errors(value)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

/// All that a report can hold, with another policy to compare with.
fn full_report() -> Report {
    let mut collector = Collector::new();
    collector.keep_decisions();
    collector.expect(toml::from_str("drop = 7\n[[flow]]\nid = 2\nend = \"rst\"").unwrap());
    let arp = PacketRecord {
        side: Side::None,
        path: None,
        rule: None,
        flow: None,
        reason: Some("not-ip"),
        ..packet(4)
    };
    for record in [packet(1), dropped(2, "ads"), packet(3), arp.clone()] {
        collector.packet(&record);
    }
    let ipv6 = FlowRecord {
        client: "[2001:db8::1]:4000".parse().unwrap(),
        target: "[2001:db8:0:0:1::7]:443".parse().unwrap(),
        verdict: "egress",
        egress: Some("vpn".to_owned()),
        rule: Some("streaming".to_owned()),
        name: Some("www.example.org".to_owned()),
        anomalies: vec!["hole", "no-syn"],
        exact: Some(false),
        ..flow(2)
    };
    let echo = FlowRecord {
        protocol: Protocol::Icmp,
        client: "10.0.0.2:77".parse().unwrap(),
        target: "192.0.2.9:0".parse().unwrap(),
        end: "idle",
        exact: None,
        ..flow(3)
    };
    [echo, flow(1), ipv6]
        .into_iter()
        .for_each(|flow| collector.flow(flow));
    let damaged = Some(Damage {
        after_packet: 4,
        what: "the record is cut".to_owned(),
    });
    let changes = vec![(Timestamp::from_nanos(12_500_000_000), "night.toml".to_owned())];
    let outcome = Outcome { damaged, ..outcome() };
    let mut report = collector
        .finish(Facts {
            outcome,
            changes,
            ..facts()
        })
        .unwrap();
    let mut comparison = report.comparison().unwrap();
    for record in [packet(1), packet(2), dropped(3, "games"), arp] {
        comparison.packet(&record);
    }
    [
        flow(1),
        FlowRecord {
            end: "dropped",
            ..flow(3)
        },
    ]
    .into_iter()
    .for_each(|flow| comparison.flow(flow));
    let against = comparison
        .finish("other.toml".to_owned(), EMPTY.to_owned())
        .unwrap();
    report.add_comparison(against);
    report
}
