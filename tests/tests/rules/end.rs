//! Rule 10: the order of what happens at one instant, time that goes back, and the capture's end.

use std::sync::Arc;
use std::time::Duration;

use tungate_engine::policy::{Action, PolicySpec, Rule, RuleMatch};
use tungate_engine::{Policy, Timestamp};
use tungate_sim::replay::Options;
use tungate_tests::packet::{ACK, FIN};
use tungate_tests::script::{Conversation, Script};

use super::whole;

fn conversation(host: u8) -> Conversation {
    Conversation::new(&format!("10.0.0.{host}:40000"), "192.0.2.7:80")
}

#[test]
fn at_one_instant_a_policy_comes_first_then_packets_in_file_order_then_deadlines() {
    let mut tcp = conversation(2);
    let mut script = Script::new();
    script.segments(&tcp.handshake());
    script.segments([&tcp.answer(b"wait for an acknowledgment")]);
    // 200 ms later exactly: the model's acknowledgment is due, a packet is captured, and a policy takes over.
    let mut other = conversation(3);
    script.wait(Duration::from_millis(200)).segment(&other.syn());
    let drop_all = PolicySpec {
        rules: vec![Rule {
            name: "night".to_owned(),
            matches: RuleMatch {
                clients: vec!["10.0.0.3/32".parse().unwrap()],
                ..RuleMatch::default()
            },
            action: Action::Drop,
        }],
        ..PolicySpec::default()
    };
    let options = Options {
        changes: vec![(
            Timestamp::ZERO + Duration::from_millis(203),
            Arc::new(Policy::new(drop_all)),
        )],
        ..Options::default()
    };
    let played = script.replay_with(&options);
    assert_eq!(
        played.packets[4].reason,
        Some("rule-drop"),
        "the policy is there before the packet"
    );
    let at: Vec<_> = played.lines(&["0.203000 "]);
    let place = |part: &str| {
        at.iter()
            .position(|line| line.contains(part))
            .unwrap_or_else(|| panic!("{part}: {at:#?}"))
    };
    assert!(place("in   policy") < place("10.0.0.3:40000 > "), "{at:#?}");
    assert!(place("10.0.0.3:40000 > ") < place("10.0.0.2:40000 > "), "{at:#?}");
}

#[test]
fn a_time_that_goes_back_counts_as_the_latest_seen() {
    let mut tcp = conversation(2);
    let [syn, syn_ack, ack] = tcp.handshake();
    let mut script = Script::new();
    script.segment(&syn);
    script.at(Duration::from_secs(10)).segment(&syn_ack);
    script
        .at(Duration::from_secs(4))
        .segments([&ack, &tcp.ask(b"hello")]);
    let played = script.replay();
    let times: Vec<_> = played
        .packets
        .iter()
        .map(|packet| packet.time.as_nanos() / 1_000_000_000)
        .collect();
    assert_eq!(times, [0, 10, 10, 10]);
    assert_eq!(played.flow().to_target, whole(b"hello"));
    assert_eq!(
        played.outcome().totals.duration,
        Timestamp::ZERO + Duration::from_secs(10)
    );
}

#[test]
fn time_runs_on_at_the_captures_end_until_all_is_settled() {
    let mut tcp = conversation(2);
    let mut script = Script::new();
    script.segments(&tcp.handshake());
    script.segments([
        &tcp.ask(b"bye"),
        &tcp.from_client(FIN | ACK, b""),
        &tcp.from_target(FIN | ACK, b"so long"),
    ]);
    let played = script.replay();
    let flow = played.flow();
    assert_eq!(
        (&flow.to_target, &flow.to_client, flow.end),
        (&whole(b"bye"), &whole(b"so long"), "fin")
    );
}

#[test]
fn what_lives_then_is_open() {
    let mut tcp = conversation(2);
    let mut script = Script::new();
    script.segments(&tcp.handshake());
    script.segments([&tcp.ask(b"still here")]);
    assert_eq!(script.replay().flow().end, "open");
}

#[test]
fn a_syn_that_nobody_answers_times_out_or_is_open_and_unanswered() {
    let mut script = Script::new();
    script.segment(&conversation(2).syn());
    let played = script.replay();
    assert_eq!(
        (played.flow().end, played.flow().anomalies.as_slice()),
        ("open", &["unanswered"][..])
    );
    // Longer than a connect may take: 130 s.
    script
        .wait(Duration::from_secs(131))
        .segment(&conversation(3).syn());
    let played = script.replay();
    let ends: Vec<_> = played.flows.iter().map(|flow| flow.end).collect();
    assert_eq!(ends, ["timeout", "open"]);
}
