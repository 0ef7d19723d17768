//! Rule 8: bytes that were acknowledged but not captured.

use std::time::Duration;

use tungate_tests::packet::{ACK, FIN};
use tungate_tests::script::{Conversation, Script};

use super::with_missing;

fn established() -> (Script, Conversation) {
    let (mut script, mut tcp) = (Script::new(), Conversation::new("10.0.0.2:40000", "192.0.2.7:80"));
    script.segments(&tcp.handshake());
    (script, tcp)
}

#[test]
fn an_acknowledgment_that_passes_a_hole_fills_it() {
    for from_client in [true, false] {
        let (mut script, mut tcp) = established();
        let parts = if from_client {
            [tcp.ask(b"before "), tcp.ask(b"(gone)"), tcp.ask(b" after")]
        } else {
            [
                tcp.answer(b"before "),
                tcp.answer(b"(gone)"),
                tcp.answer(b" after"),
            ]
        };
        script.segments([&parts[0], &parts[2]]);
        script.segments([&if from_client { tcp.target_ack() } else { tcp.ack() }]);
        // Much later, so that not the capture's end fills it.
        script.wait(Duration::from_secs(9)).segments([&tcp.target_ack()]);
        let played = script.replay();
        let flow = played.flow();
        let (holed, other) = if from_client {
            (&flow.to_target, &flow.to_client)
        } else {
            (&flow.to_client, &flow.to_target)
        };
        assert_eq!(
            (holed, other),
            (&with_missing(b"before  after", 6), &with_missing(b"", 0))
        );
        assert!(flow.anomalies.contains(&"hole"));
        assert_eq!(flow.exact, Some(true), "as far as it was captured");
        let bytes = played.lines(&[if from_client { "out  bytes" } else { "in   bytes" }]);
        assert!(
            bytes.last().unwrap().starts_with("0."),
            "soon after it: {bytes:?}"
        );
    }
}

#[test]
fn a_fin_fills_what_is_missing_before_it() {
    let (mut script, mut tcp) = established();
    let [_, rest] = [tcp.answer(b"(gone)"), tcp.answer(b"rest")];
    script.segments([&rest, &tcp.from_target(FIN | ACK, b"")]);
    let mut other = Conversation::new("10.0.0.3:40000", "192.0.2.7:80");
    script.wait(Duration::from_secs(120)).segments(&other.handshake());
    let played = script.replay();
    assert_eq!(played.flows[0].to_client, with_missing(b"rest", 6));
    let fin = played.lines(&["in   upstream", "fin"]);
    assert!(
        fin[0].starts_with("64."),
        "after the time for retransmissions: {fin:?}"
    );
}

#[test]
fn the_captures_end_fills_the_rest() {
    let (mut script, mut tcp) = established();
    let [_, rest] = [tcp.ask(b"(gone)"), tcp.ask(b"rest")];
    script.segments([&rest]);
    let played = script.replay();
    assert_eq!(played.flow().to_target, with_missing(b"rest", 6));
}

#[test]
fn a_tail_cut_by_the_snap_length_is_filled_at_once() {
    let (mut script, mut tcp) = established();
    let packet = tcp.answer(b"captured, and not captured").packet();
    let kept = packet.len() - b", and not captured".len();
    script.cut(packet, kept);
    script.segments([&tcp.ack(), &tcp.answer(b"; next"), &tcp.ack()]);
    let played = script.replay();
    let flow = played.flow();
    assert_eq!(flow.to_client, with_missing(b"captured; next", 18));
    assert_eq!(flow.anomalies, ["snap-cut"]);
    let given = played.lines(&["in   bytes"]);
    assert!(given[0].contains("len 26"), "{given:?}");
}

#[test]
fn the_place_of_a_hole_holds_zeros() {
    let (mut script, mut tcp) = established();
    let [_, rest] = [tcp.answer(b"(gone)"), tcp.answer(b"rest")];
    script.segments([&rest, &tcp.ack()]);
    let played = script.replay();
    let last = &played.emitted.last().expect("the engine has sent it").1;
    assert!(last.ends_with(b"\0\0\0\0\0\0rest"), "{last:?}");
}
