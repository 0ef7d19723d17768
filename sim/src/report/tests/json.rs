//! `--json` and its schema.

use serde_json::json;

use super::*;

#[test]
fn json_of_a_full_report_fits_its_schema() {
    assert_fits_schema(&as_json(&mut full_report()));
}

#[test]
fn json_of_an_empty_capture_fits_its_schema() {
    let totals = Totals::default();
    let mut report = Collector::new().finish(facts_of(totals)).unwrap();
    let value = as_json(&mut report);
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
    let value = as_json(&mut full_report());
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
    assert_eq!(ids(&as_json(&mut report(ended.map(flow)))), expected);
}
