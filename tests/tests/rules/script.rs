//! Rule 2: what goes into the engine, and when.

use std::time::Duration;

use tungate_tests::made::host_unreachable;
use tungate_tests::packet::{ACK, FIN, RST};
use tungate_tests::script::{Conversation, Played, Script};

use super::whole;

fn conversation() -> Conversation {
    Conversation::new("10.0.0.2:40000", "192.0.2.7:80")
}

/// An established connection.
fn established() -> (Script, Conversation) {
    let (mut script, mut tcp) = (Script::new(), conversation());
    script.segments(&tcp.handshake());
    (script, tcp)
}

#[track_caller]
fn assert_streams(played: &Played, to_target: &[u8], to_client: &[u8]) {
    let flow = played.flow();
    assert_eq!(
        (&flow.to_target, &flow.to_client),
        (&whole(to_target), &whole(to_client))
    );
    assert_eq!(flow.exact, Some(true), "{:?}", flow.anomalies);
}

#[test]
fn the_syn_ack_connects_at_its_time() {
    let mut tcp = conversation();
    let mut script = Script::new();
    script.segment(&tcp.syn());
    script.wait(Duration::from_millis(250)).segment(&tcp.syn_ack());
    script.wait(Duration::from_millis(250)).segment(&tcp.ack());
    let played = script.replay();
    let connected = played.lines(&["in   upstream", "connected"]);
    assert!(
        connected.len() == 1 && connected[0].starts_with("0.250000 "),
        "{connected:?}"
    );
    let established = played.lines(&["established"]);
    assert!(
        established.len() == 1 && established[0].starts_with("0.500000 "),
        "{established:?}"
    );
}

#[test]
fn a_reset_of_the_syn_refuses() {
    let mut tcp = conversation();
    let syn = tcp.syn();
    let mut reset = tcp.from_target(RST | ACK, b"");
    reset.sequence = 0;
    let played = Script::new().segments([&syn, &reset]).replay();
    let flow = played.flow();
    assert_eq!((flow.end, flow.exact), ("refused", None));
    // RFC 9293, section 3.5.2, group 1: the client is refused as it was.
    assert_eq!(played.emitted.len(), 1);
    let (at, packet) = &played.emitted[0];
    assert_eq!(at.as_nanos(), 1_000_000);
    assert_eq!(packet[20 + 13], RST | ACK);
    assert_eq!(packet[28..32], 1001_u32.to_be_bytes(), "acknowledges the SYN");
}

#[test]
fn an_icmp_error_about_the_syn_makes_the_target_unreachable() {
    let mut tcp = conversation();
    let syn = tcp.syn();
    let mut script = Script::new();
    script.segment(&syn);
    script
        .wait(Duration::from_millis(30))
        .packet(host_unreachable(&syn));
    let played = script.replay();
    assert_eq!(played.flow().end, "unreachable");
    let failed = played.lines(&["in   upstream", "Unreachable(Host)"]);
    assert!(
        failed.len() == 1 && failed[0].starts_with("0.030000 "),
        "{failed:?}"
    );
    let told = played.lines(&["out  packet", "Unreachable(Host)"]);
    assert_eq!(told.len(), 1, "the client learns it: {:?}", played.lines);
}

#[test]
fn an_answer_that_acknowledges_something_else_is_none() {
    let mut tcp = conversation();
    let syn = tcp.syn();
    let mut stray = tcp.syn_ack();
    stray.acknowledgment += 5;
    let mut reset = tcp.from_target(RST | ACK, b"");
    (reset.sequence, reset.acknowledgment) = (0, 77);
    let mut script = Script::new();
    script.segments([&syn, &stray, &reset]);
    let played = script.replay();
    let flow = played.flow();
    assert!(flow.anomalies.contains(&"unanswered"), "{flow:?}");
    assert_eq!(played.lines(&["in   upstream"]), [""; 0]);
    // And the real answer counts.
    let mut answer = stray;
    answer.acknowledgment -= 5;
    let played = script.segments([&answer, &tcp.ack()]).replay();
    assert_eq!(played.lines(&["in   upstream", "connected"]).len(), 1);
}

#[test]
fn an_acknowledgment_proves_a_syn_ack_that_was_not_captured() {
    let mut tcp = conversation();
    let [syn, _, _] = tcp.handshake();
    let mut script = Script::new();
    script.segment(&syn);
    script.wait(Duration::from_secs(1)).segment(&tcp.ask(b"hello"));
    script.wait(Duration::from_secs(1)).segment(&tcp.answer(b"world"));
    let played = script.replay();
    assert_streams(&played, b"hello", b"world");
    assert!(played.flow().anomalies.contains(&"no-syn-ack"));
    let connected = played.lines(&["in   upstream", "connected"]);
    assert!(
        connected[0].starts_with("1.000000 "),
        "just before that segment: {connected:?}"
    );
}

#[test]
fn a_syn_ack_ahead_of_its_syn_waits_for_it() {
    let mut tcp = conversation();
    let [syn, syn_ack, ack] = tcp.handshake();
    let mut script = Script::new();
    script.segment(&syn_ack);
    script
        .wait(Duration::from_millis(2_900))
        .segments([&syn, &ack, &tcp.ask(b"hello")]);
    let played = script.replay();
    assert_streams(&played, b"hello", b"");
    assert_eq!(played.flow().anomalies, [""; 0]);
    // After three seconds it is taken for a connection whose SYN was not captured.
    let mut script = Script::new();
    script.segment(&syn_ack);
    script
        .wait(Duration::from_millis(3_100))
        .segments([&ack, &tcp.answer(b"late")]);
    let played = script.replay();
    assert!(played.flow().anomalies.contains(&"no-syn"));
    let connected = played.lines(&["in   upstream", "connected"]);
    assert!(connected[0].starts_with("3.000000 "), "{connected:?}");
}

#[test]
fn payload_reaches_the_engine_in_the_order_of_the_stream() {
    let (mut script, mut tcp) = established();
    let [first, second, third] = [tcp.answer(b"one, "), tcp.answer(b"two, "), tcp.answer(b"three")];
    script.segments([&second, &third]);
    script
        .wait(Duration::from_millis(50))
        .segments([&first, &tcp.ack()]);
    let played = script.replay();
    assert_streams(&played, b"", b"one, two, three");
    assert_eq!(played.flow().anomalies, ["out-of-order"]);
    let given = played.lines(&["in   bytes"]);
    assert!(
        given[0].starts_with("0.055000 "),
        "when all before it is there: {given:?}"
    );
}

#[test]
fn retransmissions_and_keep_alives_are_no_stream_data() {
    let (mut script, mut tcp) = established();
    let answer = tcp.answer(b"answer");
    script.segments([&answer, &tcp.ack(), &answer]);
    let mut probe = tcp.target_ack();
    (probe.sequence, probe.payload) = (probe.sequence - 1, b"x".to_vec());
    script.wait(Duration::from_secs(60)).segments([
        &probe,
        &tcp.ack(),
        &tcp.answer(b" and more"),
        &tcp.ack(),
    ]);
    let played = script.replay();
    assert_streams(&played, b"", b"answer and more");
    assert_eq!(played.flow().anomalies, ["keep-alive", "retransmission"]);
}

#[test]
fn bytes_outside_the_window_are_no_stream_data() {
    let (mut script, mut tcp) = established();
    script.segments([&tcp.answer(b"inside"), &tcp.ack()]);
    let mut far = tcp.target_ack();
    far.payload = b"far outside".to_vec();
    far.sequence += 500 << 7;
    script.segments([&far, &tcp.answer(b" again"), &tcp.ack()]);
    let played = script.replay();
    assert_streams(&played, b"", b"inside again");
    assert!(played.flow().anomalies.contains(&"outside-window"));
}

#[test]
fn payload_on_a_reset_is_not_delivered() {
    let (mut script, mut tcp) = established();
    script.segments([
        &tcp.answer(b"answer"),
        &tcp.ack(),
        &tcp.from_target(RST | ACK, b"go away"),
    ]);
    let played = script.replay();
    let flow = played.flow();
    assert_eq!((&flow.to_client, flow.end), (&whole(b"answer"), "rst"));
    assert!(flow.anomalies.contains(&"reset-data"));
}

#[test]
fn of_two_bytes_from_the_target_for_one_place_the_first_counts() {
    let (mut script, mut tcp) = established();
    // The gap in front keeps both from being delivered before they meet.
    let [gap, first] = [tcp.answer(b"head "), tcp.answer(b"first")];
    let mut second = first.clone();
    second.payload = b"other".to_vec();
    script.segments([&first, &second, &gap]);
    let played = script.replay();
    assert_streams(&played, b"", b"head first");
    assert!(played.flow().anomalies.contains(&"overlap"));
}

#[test]
fn overlaps_of_the_client_meet_the_engine_and_are_told() {
    let (mut script, mut tcp) = established();
    let [gap, first] = [tcp.ask(b"head "), tcp.ask(b"first")];
    let mut second = first.clone();
    second.payload = b"other".to_vec();
    script.segments([&first, &second, &gap]);
    let played = script.replay();
    let flow = played.flow();
    assert!(
        [whole(b"head first"), whole(b"head other")].contains(&flow.to_target),
        "one or the other"
    );
    assert!(flow.anomalies.contains(&"overlap"));
}

#[test]
fn a_fin_takes_effect_behind_everything_before_it() {
    let (mut script, mut tcp) = established();
    let [bytes, fin] = [tcp.answer(b"last words"), tcp.from_target(FIN | ACK, b"")];
    script.segments([&fin]);
    script
        .wait(Duration::from_millis(100))
        .segments([&bytes, &tcp.ack(), &tcp.from_client(FIN | ACK, b"")]);
    script.segments([&tcp.target_ack()]);
    let played = script.replay();
    assert_streams(&played, b"", b"last words");
    assert_eq!(played.flow().end, "fin");
    let fins = played.lines(&["in   upstream", "fin"]);
    assert!(fins.len() == 1 && fins[0].starts_with("0.104000 "), "{fins:?}");
}

#[test]
fn a_reset_takes_effect_at_its_time_behind_what_was_contiguous() {
    let (mut script, mut tcp) = established();
    let [first, gap, beyond] = [
        tcp.answer(b"contiguous"),
        tcp.answer(b"gap"),
        tcp.answer(b"beyond"),
    ];
    script.segments([&first, &beyond, &tcp.from_target(RST | ACK, b"")]);
    script.wait(Duration::from_millis(10)).segments([&gap]);
    let played = script.replay();
    let flow = played.flow();
    assert_eq!((&flow.to_client, flow.end), (&whole(b"contiguous"), "rst"));
    let resets = played.lines(&["in   upstream", "reset"]);
    assert!(
        resets.len() == 1 && resets[0].starts_with("0.005000 "),
        "{resets:?}"
    );
}

#[test]
fn data_behind_a_fin_is_an_anomaly_and_no_data() {
    let (mut script, mut tcp) = established();
    script.segments([&tcp.answer(b"all"), &tcp.from_target(FIN | ACK, b"")]);
    script.segments([&tcp.answer(b"or not"), &tcp.from_client(FIN | ACK, b"")]);
    let played = script.replay();
    let flow = played.flow();
    assert_eq!(flow.to_client, whole(b"all"));
    assert!(flow.anomalies.contains(&"data-after-fin"), "{:?}", flow.anomalies);
}

#[test]
fn what_the_target_sends_after_the_clients_reset_is_discarded_and_counted() {
    let (mut script, mut tcp) = established();
    script.segments([
        &tcp.answer(b"heard"),
        &tcp.from_client(RST | ACK, b""),
        &tcp.answer(b"unheard"),
    ]);
    let played = script.replay();
    let flow = played.flow();
    assert_eq!((&flow.to_client, flow.end), (&whole(b"heard"), "rst"));
    assert!(flow.anomalies.contains(&"data-after-reset"));
    assert_eq!(played.outcome().totals.discarded_after_reset, 7);
}

#[test]
fn what_the_client_sends_after_the_targets_reset_meets_the_engines_answer() {
    let (mut script, mut tcp) = established();
    script.segments([&tcp.from_target(RST | ACK, b""), &tcp.ask(b"anybody there?")]);
    let played = script.replay();
    assert_eq!(played.flow().to_target, whole(b""));
    assert_eq!(played.packets[4].reason, Some("no-flow"));
    // RFC 9293, section 3.10.7.1: a reset in answer to whoever knows of no reset.
    let resets = played.lines(&["out  packet", "RST"]);
    assert_eq!(resets.len(), 2, "{:?}", played.lines);
    assert!(resets[1].starts_with("0.004000 "), "{resets:?}");
}
