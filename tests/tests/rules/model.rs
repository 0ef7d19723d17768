//! Rule 5: the modelled client is a TCP.

use std::time::Duration;

use tungate_engine::Config;
use tungate_sim::replay::Options;
use tungate_tests::packet::{ACK, FIN, RST};
use tungate_tests::pattern::Pattern;
use tungate_tests::script::{Conversation, Script};

use super::whole;

const STREAM: Pattern = Pattern { key: 1, head: &[] };

fn established() -> (Script, Conversation) {
    let (mut script, mut tcp) = (Script::new(), Conversation::new("10.0.0.2:40000", "192.0.2.7:80"));
    script.segments(&tcp.handshake());
    (script, tcp)
}

fn bytes(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    STREAM.fill(0, &mut bytes);
    bytes
}

/// Buffers of the least size: the engine's window is smaller than the captured server's.
fn small_buffers() -> Options {
    let mut config = Config::default();
    config.limits.buffer_per_flow = 16 << 10;
    Options {
        config,
        ..Options::default()
    }
}

#[test]
fn bytes_beyond_the_engines_window_are_sent_when_it_opens() {
    let (mut script, mut tcp) = established();
    // The captured server's window was 500 << 7 = 64,000 bytes, and the client used it at one instant.
    script.segments([&tcp.target_ack()]);
    let stream = bytes(60_000);
    for part in stream.chunks(1460) {
        script.segment(&tcp.ask(part));
    }
    script.segments([
        &tcp.target_ack(),
        &tcp.from_client(FIN | ACK, b""),
        &tcp.from_target(FIN | ACK, b""),
        &tcp.ack(),
    ]);
    let played = script.replay_with(&small_buffers());
    let flow = played.flow();
    assert_eq!(
        (&flow.to_target, flow.end, flow.exact),
        (&whole(&stream), "fin", Some(true))
    );
    assert!(
        played.packets.iter().all(|packet| packet.reason.is_none()),
        "nothing went in that did not fit"
    );
}

#[test]
fn probes_of_a_closed_window_are_answered_with_it() {
    let (mut script, mut tcp) = established();
    script.segments([&tcp.answer(b"read me")]);
    tcp.window = 0;
    script.segments([&tcp.ack()]);
    let mut second = tcp.answer(b"and me");
    script.wait(Duration::from_secs(5)).segment(&second);
    tcp.window = 500;
    let mut opens = tcp.ack();
    opens.acknowledgment -= 6;
    script.wait(Duration::from_secs(20)).segment(&opens);
    second.window = 500;
    script.segments([&second, &tcp.ack()]);
    let played = script.replay();
    assert_eq!(played.flow().to_client, whole(b"read meand me"));
    assert!(played.flow().anomalies.contains(&"zero-window"));
    // Between 5 s and 25 s the engine probes (below what the client expects, so that it must answer), and every time
    // hears that the window is closed.
    let between = |line: &&&str| !line.starts_with("0.") && !line.starts_with("25.");
    let probes = played.lines(&["out  packet"]);
    let answers = played.lines(&["in   packet", " win 0"]);
    let probes = probes.iter().filter(between).count();
    assert!(probes >= 2, "{:#?}", played.lines);
    assert_eq!(
        answers.iter().filter(between).count(),
        probes,
        "{:#?}",
        played.lines
    );
}

#[test]
fn data_on_the_syn_goes_again_at_once_where_the_syn_ack_leaves_it_out() {
    let mut tcp = Conversation::new("10.0.0.2:40000", "192.0.2.7:80");
    let mut syn = tcp.syn();
    syn.payload = b"early".to_vec();
    tcp.client_next += 5;
    let syn_ack = tcp.syn_ack(); // takes it
    let mut script = Script::new();
    script.segments([&syn, &syn_ack, &tcp.ack()]);
    let played = script.replay();
    let flow = played.flow();
    assert_eq!((&flow.to_target, flow.exact), (&whole(b"early"), Some(true)));
    assert_eq!(flow.anomalies, ["syn-data"]);
    let read = played.lines(&["out  bytes"]);
    assert!(
        read.len() == 1 && read[0].starts_with("0.001000 "),
        "at the SYN-ACK: {read:?}"
    );
}

#[test]
fn what_the_engine_does_not_acknowledge_is_sent_again() {
    // Every other segment first: more gaps than the engine keeps track of, so it drops some that the captured server
    // took. Nobody was captured sending them again.
    let (mut script, mut tcp) = established();
    let stream = bytes(50_000);
    let segments: Vec<_> = stream.chunks(500).map(|part| tcp.ask(part)).collect();
    script.segments(segments.iter().skip(1).step_by(2));
    script.segments(segments.iter().step_by(2));
    script.segments([&tcp.target_ack()]);
    let played = script.replay();
    let flow = played.flow();
    assert_eq!((&flow.to_target, flow.exact), (&whole(&stream), Some(true)));
    let went_in = played.lines(&["in   packet", " len "]).len();
    assert!(
        went_in > segments.len(),
        "{went_in} segments, and {} were captured",
        segments.len()
    );
}

#[test]
fn captured_retransmissions_go_in_as_captured() {
    let (mut script, mut tcp) = established();
    let ask = tcp.ask(b"again and again");
    script.segments([&ask, &ask, &ask, &tcp.target_ack()]);
    let played = script.replay();
    assert_eq!(played.lines(&["in   packet", "len 15"]).len(), 3);
    assert_eq!(played.flow().to_target, whole(b"again and again"));
}

#[test]
fn after_its_reset_the_client_answers_every_segment_by_a_reset() {
    let (mut script, mut tcp) = established();
    let ask = tcp.ask(b"question");
    // The engine refuses a reset that is not exactly at RCV.NXT (RFC 5961, section 3.2) and challenges it.
    let mut reset = tcp.from_client(RST, b"");
    reset.sequence += 100;
    script.segments([&ask, &reset]);
    let played = script.replay();
    assert_eq!(played.flow().end, "rst", "{:#?}", played.lines);
    let resets = played.lines(&["in   packet", "RST"]);
    assert_eq!(
        resets.len(),
        2,
        "the captured one, and the answer to the challenge: {resets:?}"
    );
}

#[test]
fn a_lost_output_of_the_engine_is_no_faithful_flow() {
    // Shown by `outputs_that_never_arrive_break_fidelity` inside the simulator; here its counterpart: nothing is lost.
    let (mut script, mut tcp) = established();
    script.segments([&tcp.answer(&bytes(40_000)), &tcp.ack()]);
    assert_eq!(script.replay().flow().exact, Some(true));
}
