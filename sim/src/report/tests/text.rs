//! What people see.

use super::*;

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
