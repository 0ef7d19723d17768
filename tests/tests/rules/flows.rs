//! Rules 6 and 7: where a flow begins, and flows whose beginning was not captured.

use std::time::Duration;

use tungate_sim::replay::{Midstream, Options};
use tungate_tests::packet::{ACK, FIN, RST, SYN};
use tungate_tests::script::{Conversation, Script};

use super::whole;

const CLIENT: &str = "10.0.0.2:40000";
const TARGET: &str = "192.0.2.7:80";

fn again(client_next: u32) -> Conversation {
    let mut tcp = Conversation::new(CLIENT, TARGET);
    (tcp.client_next, tcp.target_next) = (client_next, 90_000);
    tcp
}

#[test]
fn a_syn_with_another_number_starts_another_flow() {
    let (mut first, mut second) = (again(1000), again(777_000));
    let mut script = Script::new();
    script
        .segments(&first.handshake())
        .segments([&first.ask(b"first")]);
    script
        .segments(&second.handshake())
        .segments([&second.ask(b"second")]);
    let played = script.replay();
    let [a, b] = played.flows.as_slice() else {
        panic!("{:#?}", played.flows)
    };
    assert_eq!((&a.to_target, a.first_packet), (&whole(b"first"), 1));
    assert_eq!((&b.to_target, b.first_packet), (&whole(b"second"), 5));
}

#[test]
fn a_syn_sent_again_does_not() {
    let mut tcp = again(1000);
    let syn = tcp.syn();
    let mut script = Script::new();
    script.segment(&syn);
    script
        .wait(Duration::from_secs(1))
        .segments([&syn, &tcp.syn_ack(), &tcp.ack(), &syn]);
    let played = script.replay();
    assert_eq!(played.flow().anomalies, ["syn-retransmit"]);
}

#[test]
fn after_refusal_reset_or_close_the_same_syn_starts_another_flow() {
    for how in ["refused", "rst", "fin"] {
        let mut tcp = again(1000);
        let mut script = Script::new();
        match how {
            "refused" => {
                let syn = tcp.syn();
                let mut reset = tcp.from_target(RST | ACK, b"");
                reset.sequence = 0;
                script.segments([&syn, &reset]);
            }
            "rst" => {
                script.segments(&tcp.handshake());
                script.segments([&tcp.from_client(RST | ACK, b"")]);
            }
            _ => {
                script.segments(&tcp.handshake());
                script.segments([
                    &tcp.from_client(FIN | ACK, b""),
                    &tcp.from_target(FIN | ACK, b""),
                    &tcp.ack(),
                ]);
            }
        }
        let mut tcp = again(1000);
        tcp.target_next = 123_456;
        script.wait(Duration::from_secs(1)).segments(&tcp.handshake());
        script.segments([&tcp.ask(b"once more"), &tcp.target_ack()]);
        let played = script.replay();
        let ends: Vec<_> = played.flows.iter().map(|flow| flow.end).collect();
        assert_eq!(ends, [how, "open"]);
        assert_eq!(played.flows[1].to_target, whole(b"once more"), "after {how}");
    }
}

#[test]
fn other_packets_belong_to_the_last_flow() {
    let (mut first, mut second) = (again(1000), again(777_000));
    let mut script = Script::new();
    script.segments(&first.handshake());
    script.segments([&first.from_client(RST | ACK, b"")]);
    script.segments(&second.handshake());
    script.segments([&first.target_ack()]);
    let played = script.replay();
    assert_eq!(played.packets[7].flow, Some(2));
}

#[test]
fn a_connection_under_way_is_adopted() {
    let mut tcp = again(1_000_000);
    let mut script = Script::new();
    script.segments([
        &tcp.ask(b"middle of "),
        &tcp.answer(b"middle of another"),
        &tcp.ask(b"a stream"),
        &tcp.target_ack(),
    ]);
    let played = script.replay();
    let flow = played.flow();
    assert_eq!(
        (&flow.to_target, &flow.to_client),
        (&whole(b"middle of a stream"), &whole(b"middle of another"))
    );
    assert_eq!(
        (flow.exact, flow.anomalies.as_slice()),
        (Some(true), &["no-syn"][..])
    );
    let handshake = played.lines(&["in   packet", "SYN seq 999999 "]);
    assert!(
        handshake.len() == 1 && handshake[0].starts_with("0.000000 "),
        "just before: {:?}",
        played.lines
    );
}

#[test]
fn or_refused_where_that_is_asked_for() {
    let mut tcp = again(1_000_000);
    let mut script = Script::new();
    script.segments([&tcp.ask(b"middle"), &tcp.answer(b"answer")]);
    let options = Options {
        midstream: Midstream::Refuse,
        ..Options::default()
    };
    let played = script.replay_with(&options);
    assert_eq!(played.packets[0].reason, Some("no-flow"));
    assert_eq!(played.flow().anomalies, ["no-syn"]);
    assert_eq!(
        played.lines(&["out  packet", "RST"]).len(),
        1,
        "as the appliance would: {:?}",
        played.lines
    );
}

#[test]
fn a_first_packet_of_one_byte_is_a_keep_alive() {
    let mut tcp = again(1_000_000);
    let mut script = Script::new();
    script.segments([&tcp.ask(b"\0"), &tcp.target_ack()]);
    script.wait(Duration::from_secs(30)).segments([
        &tcp.ask(b"real bytes"),
        &tcp.answer(b"answer"),
        &tcp.ack(),
    ]);
    let played = script.replay();
    let flow = played.flow();
    assert_eq!(
        (&flow.to_target, &flow.to_client),
        (&whole(b"real bytes"), &whole(b"answer"))
    );
    assert_eq!(flow.anomalies, ["keep-alive", "no-syn"]);
}

#[test]
fn so_is_one_of_no_byte_below_the_next_number() {
    let mut tcp = again(1_000_000);
    let mut script = Script::new();
    let probe = tcp.ack();
    tcp.client_next += 1;
    script.segments([&probe, &tcp.target_ack()]);
    script
        .wait(Duration::from_secs(30))
        .segments([&tcp.ask(b"real bytes"), &tcp.target_ack()]);
    let played = script.replay();
    let flow = played.flow();
    assert_eq!(
        flow.to_target,
        whole(b"real bytes"),
        "the byte below was never missing"
    );
    assert_eq!(
        (flow.exact, flow.anomalies.as_slice()),
        (Some(true), &["keep-alive", "no-syn"][..])
    );
}

#[test]
fn a_split_handshake_is_refused_by_reason() {
    let mut tcp = again(1000);
    let syn = tcp.syn();
    let mut other = tcp.from_target(SYN, b"");
    other.acknowledgment = 0;
    let answer = tcp.from_client(SYN | ACK, b"");
    let played = Script::new().segments([&syn, &other, &answer]).replay();
    assert_eq!(played.packets[2].reason, Some("split-handshake"));
    assert!(played.flow().anomalies.contains(&"split-handshake"));
}
