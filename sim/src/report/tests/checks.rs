//! Expectations, other policies, and contradictions.

use serde_json::json;

use super::*;

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
fn of_a_journal_the_digest_and_the_damage_are_compared() {
    let report = |expected: &str| {
        let repeated = Repeated {
            calls: 9,
            packets: 3,
            digest: EMPTY.to_owned(),
            damaged: None,
        };
        let expected: Expectations = toml::from_str(expected).unwrap();
        JournalReport::new("a.journal".to_owned(), repeated, Some(&expected))
    };
    let good = report(&format!("digest = \"{EMPTY}\"\ndamaged = false"));
    assert!(!good.differs());
    let text = good.text(Screen::default());
    assert!(
        text.contains("a.journal\n") && text.contains("3 packets, in 9 calls of the engine"),
        "{text}"
    );
    let other = report("digest = \"00\"");
    assert!(other.differs());
    assert!(
        other
            .text(Screen::default())
            .contains("digest: expected 00, found e3b0c4")
    );
    assert!(report("drop = 0").differs(), "a journal does not tell");

    let mut reports = JsonReports::new(Vec::new(), false).unwrap();
    reports.add_journal(&good).unwrap();
    assert_fits_schema(&serde_json::from_slice(&reports.finish().unwrap()).unwrap());
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
    let value = as_json(&mut report)["against"].clone();
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
        ..outcome().totals
    };
    let report = Collector::new().finish(facts_of(totals)).unwrap();
    assert!(report.differs());
    assert!(
        report
            .text(Screen::default())
            .contains("contradict each other on 1 of 2 client packets")
    );
}
