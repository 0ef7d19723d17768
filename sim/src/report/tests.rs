//! Reports on records made by hand: what is expected was computed from the records, by head.

use std::sync::Arc;

use serde_json::{Value, json};
use tungate_engine::Protocol;
use tungate_engine::policy::{Action, Policy, PolicySpec, Rule, RuleMatch, RuleRef};

use super::*;
use crate::outcome::{self, Stream};

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
fn flow(id: u64) -> FlowRecord {
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
        damaged: None,
        digest: EMPTY.to_owned(),
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
    }
}

fn report(flows: impl IntoIterator<Item = FlowRecord>) -> Report {
    let mut collector = Collector::new();
    flows.into_iter().for_each(|flow| collector.flow(flow));
    collector.finish(facts()).unwrap()
}

fn json(report: &mut Report) -> Value {
    let mut reports = JsonReports::new(Vec::new(), false).unwrap();
    reports.add(report).unwrap();
    serde_json::from_slice(&reports.finish().unwrap()).unwrap()
}

fn assert_fits_schema(value: &Value) {
    let schema = serde_json::from_str(include_str!("../../report.schema.json")).unwrap();
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
    let mut report = collector
        .finish(Facts {
            damaged,
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

#[test]
fn json_of_a_full_report_fits_its_schema() {
    assert_fits_schema(&json(&mut full_report()));
}

#[test]
fn json_of_an_empty_capture_fits_its_schema() {
    let totals = Totals::default();
    let mut report = Collector::new().finish(Facts { totals, ..facts() }).unwrap();
    let value = json(&mut report);
    assert_fits_schema(&value);
    assert_eq!((&value["flows"], &value["started"]), (&json!([]), &Value::Null));
}

#[test]
fn json_of_several_captures_is_an_array_that_fits_the_schema() {
    let mut reports = JsonReports::new(Vec::new(), true).unwrap();
    reports.add(&mut report([flow(1)])).unwrap();
    reports.add(&mut full_report()).unwrap();
    let value: Value = serde_json::from_slice(&reports.finish().unwrap()).unwrap();
    assert_eq!(value.as_array().unwrap().len(), 2);
    assert_fits_schema(&value);

    let none = JsonReports::new(Vec::new(), true).unwrap().finish().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&none).unwrap(), json!([]));
}

#[test]
fn json_has_the_documented_values() {
    let value = json(&mut full_report());
    assert_eq!(
        value["damaged"],
        json!({ "after_packet": 4, "what": "the record is cut" })
    );
    assert_eq!(value["started"], "2014-01-14T17:04:01.819644000Z");
    assert_eq!(value["duration"], 17.492054);
    assert_eq!(
        value["changes"],
        json!([{ "time": 12.5, "policy": "night.toml" }])
    );
    let verdicts = json!({
        "pass": 2, "drop": 1, "by_rule": { "default": 2, "ads": 1 }, "by_reason": { "rule-drop": 1 },
    });
    assert_eq!(value["verdicts"], verdicts);
    assert_eq!(
        value["flow_counts"]["by_protocol"],
        json!({ "tcp": 2, "icmp": 1 })
    );
    assert_eq!(
        value["flow_counts"]["by_anomaly"],
        json!({ "hole": 1, "no-syn": 1 })
    );
    let flows = &value["flows"];
    assert_eq!(flows[1]["client"], "[2001:db8::1]:4000");
    assert_eq!(
        flows[1]["target"], "[2001:db8::1:0:0:7]:443",
        "RFC 5952: the first of two equal runs is shortened"
    );
    assert_eq!(flows[2]["client"], "10.0.0.2:77");
    assert_eq!(
        flows[2]["target"], "192.0.2.9:77",
        "the identifier stands in the port's place"
    );
}

#[test]
fn flows_are_listed_by_id_whatever_the_order_of_their_ends() {
    let ids = |value: &Value| -> Vec<u64> {
        value["flows"]
            .as_array()
            .unwrap()
            .iter()
            .map(|flow| flow["id"].as_u64().unwrap())
            .collect()
    };
    let ended = (1..=500).map(|index| index * 7 % 503); // 503 is prime: each id below it at most once
    let mut expected: Vec<u64> = ended.clone().collect();
    expected.sort_unstable();
    assert_eq!(ids(&json(&mut report(ended.map(flow)))), expected);
}

#[test]
fn the_terminal_shows_the_largest_flows_and_counts_the_rest() {
    let text = report((1..=50).map(flow)).text(Screen::default());
    let shown: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("10.0.0.2:40001"))
        .collect();
    assert_eq!(shown.len(), 20);
    assert!(
        shown[0].trim_start().starts_with("50 "),
        "the flow with 50 bytes comes first: {}",
        shown[0]
    );
    assert!(shown[19].trim_start().starts_with("31 "), "{}", shown[19]);
    assert!(text.contains("30 smaller ones"), "{text}");
}

/// Flows with the longest addresses there are, and every column filled.
fn wide_flows() -> Vec<FlowRecord> {
    let wide = FlowRecord {
        client: "[2001:db8:1111:2222:3333:4444:5555:6666]:40000".parse().unwrap(),
        target: "[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:50000".parse().unwrap(),
        verdict: "drop",
        rule: Some("deny 2001:db8::/32".to_owned()),
        name: Some("www.example.org".to_owned()),
        anomalies: vec!["hole", "no-syn", "overlap"],
        ..flow(1)
    };
    vec![wide, flow(2)]
}

#[test]
fn flows_fit_into_terminals_of_60_80_and_120_columns_with_nothing_cut() {
    for width in [60, 80, 120] {
        for flows in [wide_flows(), (1..=3).map(flow).collect()] {
            let lines = table::flows(&flows, Some(width));
            for line in &lines {
                assert!(
                    line.chars().count() <= width,
                    "{} > {width}: {line}",
                    line.chars().count()
                );
            }
            let text = lines.join("\n");
            for flow in &flows {
                assert!(text.contains(&flow.client.to_string()) && text.contains(&flow.target.to_string()));
                assert!(
                    flow.name.as_ref().is_none_or(|name| text.contains(name)),
                    "{text}"
                );
                assert!(
                    flow.anomalies.iter().all(|anomaly| text.contains(anomaly)),
                    "{text}"
                );
            }
        }
    }
}

#[test]
fn without_a_terminal_every_flow_is_one_line() {
    let lines = table::flows(&wide_flows(), None);
    assert_eq!(lines.len(), 3, "a heading and two flows: {lines:#?}");
    assert!(
        lines[1].contains("www.example.org") && lines[1].ends_with("hole, no-syn, overlap"),
        "{}",
        lines[1]
    );
}

#[test]
fn without_a_terminal_there_are_no_colours_and_with_one_there_are() {
    assert!(!full_report().text(Screen::default()).contains('\x1b'));
    let colourful = full_report().text(Screen {
        width: Some(100),
        colour: true,
    });
    assert!(colourful.contains("\x1b["));
    assert_eq!(
        anstyle_stripped(&colourful),
        full_report().text(Screen {
            width: Some(100),
            colour: false
        })
    );
}

fn anstyle_stripped(text: &str) -> String {
    let mut plain = String::new();
    let mut parts = text.split("\x1b[");
    plain += parts.next().unwrap();
    parts.for_each(|part| plain += part.split_once('m').unwrap().1);
    plain
}

#[test]
fn names_from_the_network_cannot_control_the_terminal() {
    let name = Some("\x1b[2Jevil\u{202e}\n.example".to_owned());
    let text = report([FlowRecord { name, ..flow(1) }]).text(Screen::default());
    assert!(text.contains(r"\u{1b}[2Jevil\u{202e}\n.example"), "{text}");
}

#[test]
fn a_packet_line_has_the_documented_keys() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("packets.jsonl");
    let mut collector = Collector::new();
    collector.write_packets(&path).unwrap();
    collector.packet(&PacketRecord {
        path: Some(outcome::Path::Prefilter),
        ..dropped(12, "a \"b\"")
    });
    let unreadable = PacketRecord {
        side: Side::None,
        path: None,
        reason: Some("unreadable"),
        rule: None,
        flow: None,
        ..packet(13)
    };
    collector.packet(&unreadable);
    collector.finish(facts()).unwrap();
    let expected = concat!(
        r#"{"number":12,"time":0.012,"side":"client","path":"prefilter","verdict":"drop","rule":"a \"b\"","#,
        r#""reason":"rule-drop","flow":1}"#,
        "\n",
        r#"{"number":13,"time":0.013,"side":"none","path":null,"verdict":null,"rule":null,"#,
        r#""reason":"unreadable","flow":null}"#,
        "\n",
    );
    assert_eq!(std::fs::read_to_string(path).unwrap(), expected);
}

#[test]
fn a_transcript_line_begins_with_seconds_since_the_first_packet() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("transcript");
    let mut collector = Collector::new();
    collector.write_transcript(&path).unwrap();
    collector.line(
        Timestamp::from_nanos(31_200_999),
        format_args!("in   upstream  #1 connected"),
    );
    collector.finish(facts()).unwrap();
    assert_eq!(
        std::fs::read_to_string(path).unwrap(),
        "0.031200  in   upstream  #1 connected\n"
    );
}

#[test]
fn emitted_packets_carry_the_decision_as_a_comment_and_the_captures_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.pcapng");
    let mut collector = Collector::new();
    collector.write_emitted(&path).unwrap();
    collector.started(1_000_000_000_000_000_000);
    let emitted = |nanos, flow, cause| Emitted {
        time: Timestamp::from_nanos(nanos),
        bytes: b"\x45 an IP packet",
        flow,
        cause,
    };
    collector.packet(&packet(1));
    collector.emitted(&emitted(1, Some(1), Some(1)));
    collector.packet(&PacketRecord {
        flow: None,
        ..dropped(2, "ads")
    });
    collector.emitted(&emitted(2, None, Some(2)));
    collector.emitted(&emitted(3, Some(1), None));
    collector.finish(facts()).unwrap();

    let mut capture = crate::capture::Capture::open(&path).unwrap();
    for nanos in 1..=3 {
        let record = capture.next_record().unwrap().unwrap();
        assert_eq!(record.unix_nanos, 1_000_000_000_000_000_000 + nanos);
        assert_eq!(record.bytes, b"\x45 an IP packet");
    }
    assert_eq!(capture.next_record(), Ok(None));
    let file = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
    for comment in [
        "flow 1 by \"default\", for packet 1\0",
        "for packet 2: drop, rule-drop by \"ads\"\0",
        "flow 1 by \"default\"\0",
    ] {
        assert!(file.contains(comment), "{comment}");
    }
}

fn mismatches(toml: &str) -> Vec<String> {
    let mut collector = Collector::new();
    collector.expect(toml::from_str(toml).unwrap());
    collector.packet(&dropped(2, "ads"));
    let refused = FlowRecord {
        client: "10.0.0.3:40001".parse().unwrap(),
        end: "refused",
        exact: None,
        anomalies: vec!["no-syn", "syn-retransmit"],
        ..flow(2)
    };
    [flow(3), refused, flow(1)]
        .into_iter()
        .for_each(|flow| collector.flow(flow));
    let report = collector.finish(facts()).unwrap();
    assert_eq!(report.differs(), !report.mismatches().is_empty());
    report.mismatches().iter().map(ToString::to_string).collect()
}

#[test]
fn expectations_that_hold_are_no_mismatch() {
    let everything = format!(
        r#"
        digest = "{EMPTY}"
        damaged = false
        read = 4
        drop = 1
        by_rule.ads = 1
        by_rule.other = 0
        by_reason.rule-drop = 1
        disagreements = 0
        flows = 3
        exact = "all"
        by_end = {{ fin = 2, refused = 1 }}
        [[flow]]
        client = "10.0.0.2"
        count = 2
        end = "fin"
        exact = true
        to_target = {{ bytes = 0, sha256 = "{EMPTY}", missing = 0 }}
        [[flow]]
        client = "10.0.0.3:40001"
        target = "192.0.2.7"
        protocol = "tcp"
        verdict = "direct"
        rule = "default"
        anomalies = ["syn-retransmit", "no-syn"]
        [[flow]]
        target = "192.0.2.8"
        count = 0
        "#
    );
    assert_eq!(mismatches(&everything), [""; 0]);
    assert_eq!(mismatches("exact = 2"), [""; 0]);
}

#[test]
fn a_mismatch_tells_what_was_expected_and_what_was_found() {
    assert_eq!(mismatches("drop = 12"), ["drop: expected 12, found 1"]);
    assert_eq!(
        mismatches("by_rule.\"deny ::/0\" = 3"),
        ["by_rule.\"deny ::/0\": expected 3, found 0"]
    );
    assert_eq!(mismatches("exact = 1"), ["exact: expected 1, found 2"]);
    assert_eq!(
        mismatches("damaged = true"),
        ["damaged: expected true, found false"]
    );
    assert_eq!(
        mismatches("[[flow]]\ntarget = \"192.0.2.7:80\"\nend = \"rst\""),
        ["[[flow]] target 192.0.2.7:80 end: expected rst, found fin (flow 1, and 2 more of 3)"]
    );
    assert_eq!(
        mismatches("[[flow]]\nid = 2\nto_client.bytes = 9"),
        ["[[flow]] id 2 to_client.bytes: expected 9, found 2 (flow 2)"]
    );
    assert_eq!(
        mismatches("[[flow]]\nclient = \"10.0.0.9\""),
        ["[[flow]] client 10.0.0.9: expected at least one flow, found none"]
    );
    assert_eq!(
        mismatches("[[flow]]\ncount = 4"),
        ["[[flow]] count: expected 4, found 3"]
    );
}

#[test]
fn the_example_of_expectations_can_be_read() {
    toml::from_str::<Expectations>(expect::EXAMPLE).unwrap();
}

#[test]
fn a_mistake_in_expectations_is_told_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("expect.toml");
    for (text, place, what) in [
        ("read = 4\ndorp = 1\n", "line 2", "unknown field `dorp`"),
        (
            "[[flow]]\nend = \"fin\"\nsource = \"::1\"\n",
            "line 3",
            "unknown field `source`",
        ),
        (
            "[[flow]]\nclient = \"nobody\"\n",
            "line 2",
            "\"nobody\" is not an address",
        ),
        ("exact = \"most\"\n", "line 1", "a number of flows, or \"all\""),
        ("drop = -1\n", "line 1", "-1"),
    ] {
        std::fs::write(&path, text).unwrap();
        let error = Expectations::load(&path).unwrap_err().to_string();
        assert!(
            error.contains("expect.toml") && error.contains(place) && error.contains(what),
            "{error}"
        );
    }
    let error = Expectations::load(&folder.path().join("none.toml"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("none.toml") && error.contains("hint: "), "{error}");
}

/// What changes when the first policy's records are those of `before` and the other's those of `after`.
fn against(
    before: (&[PacketRecord], &[FlowRecord]),
    after: (&[PacketRecord], &[FlowRecord]),
) -> (Report, Value) {
    let mut collector = Collector::new();
    collector.keep_decisions();
    before.0.iter().for_each(|packet| collector.packet(packet));
    before.1.iter().for_each(|flow| collector.flow(flow.clone()));
    let mut report = collector.finish(facts()).unwrap();
    let mut comparison = report.comparison().unwrap();
    after.0.iter().for_each(|packet| comparison.packet(packet));
    after.1.iter().for_each(|flow| comparison.flow(flow.clone()));
    let against = comparison
        .finish("other.toml".to_owned(), EMPTY.to_owned())
        .unwrap();
    report.add_comparison(against);
    let value = json(&mut report)["against"].clone();
    (report, value)
}

#[test]
fn a_policy_with_the_same_effect_makes_no_difference() {
    let renamed = FlowRecord {
        rule: Some("games".to_owned()),
        ..flow(2)
    };
    let (report, value) = against(
        (&[packet(1), dropped(2, "ads")], &[flow(2), flow(1)]),
        (&[packet(1), dropped(2, "games")], &[flow(1), renamed]),
    );
    assert!(!report.differs());
    assert_eq!(
        value["packets"],
        json!({ "changed": 0, "pass_to_drop": 0, "drop_to_pass": 0, "other_rule": 1 })
    );
    assert_eq!(
        value["flows"],
        json!({ "changed": 0, "only_before": 0, "only_after": 0, "other_rule": 1 })
    );
    assert_eq!(
        (&value["changed_packets"], &value["changed_flows"]),
        (&json!([]), &json!([]))
    );
}

#[test]
fn changed_packets_and_flows_are_counted_and_listed() {
    let gone = FlowRecord {
        verdict: "drop",
        end: "dropped",
        to_client: stream(0),
        ..flow(4)
    };
    let (report, value) = against(
        (
            &[packet(1), dropped(2, "ads"), packet(3)],
            &[flow(1), flow(2), flow(4)],
        ),
        (
            &[packet(1), packet(2), dropped(3, "games")],
            &[flow(3), flow(1), gone],
        ),
    );
    assert!(report.differs());
    assert_eq!(
        value["packets"],
        json!({ "changed": 2, "pass_to_drop": 1, "drop_to_pass": 1, "other_rule": 0 })
    );
    assert_eq!(
        value["flows"],
        json!({ "changed": 3, "only_before": 1, "only_after": 1, "other_rule": 0 })
    );
    assert_eq!(
        value["changed_packets"],
        json!([
            {
                "number": 2, "time": 0.002, "side": "client",
                "before": { "verdict": "drop", "rule": "ads", "reason": "rule-drop" },
                "after": { "verdict": "pass", "rule": "default", "reason": null },
            },
            {
                "number": 3, "time": 0.003, "side": "client",
                "before": { "verdict": "pass", "rule": "default", "reason": null },
                "after": { "verdict": "drop", "rule": "games", "reason": "rule-drop" },
            },
        ])
    );
    let flows = value["changed_flows"].as_array().unwrap();
    let ids = |when: &str| {
        flows
            .iter()
            .map(|flow| flow[when]["id"].as_u64())
            .collect::<Vec<_>>()
    };
    assert_eq!(ids("before"), [Some(2), None, Some(4)]);
    assert_eq!(ids("after"), [None, Some(3), Some(4)]);
}

#[test]
fn a_contradiction_between_the_paths_differs_without_being_asked() {
    let totals = Totals {
        parity_disagreements: 1,
        ..facts().totals
    };
    let report = Collector::new().finish(Facts { totals, ..facts() }).unwrap();
    assert!(report.differs());
    assert!(
        report
            .text(Screen::default())
            .contains("contradict each other on 1 of 2 client packets")
    );
}
