//! Rules 3 and 4: sequence numbers, windows and options between the captured peers and the engine.

use std::time::Duration;

use etherparse::{PacketBuilder, TcpHeader, TcpOptionElement};
use tungate_sim::replay::Options;
use tungate_tests::packet::{ACK, Message, Reader, SYN, Segment};
use tungate_tests::script::{Conversation, Played, Script};

use super::whole;

fn established() -> (Script, Conversation) {
    let (mut script, mut tcp) = (Script::new(), Conversation::new("10.0.0.2:40000", "192.0.2.7:80"));
    script.segments(&tcp.handshake());
    (script, tcp)
}

/// The segments that the engine sent.
fn sent(played: &Played) -> Vec<Segment> {
    let read = |(_, packet): &(_, Vec<u8>)| match Reader::default().read(packet) {
        Some(Message::Tcp(segment)) => segment,
        other => panic!("{other:?}"),
    };
    played.emitted.iter().map(read).collect()
}

/// Words of a line of the transcript behind `name`, as a number.
#[track_caller]
fn number(line: &str, name: &str) -> u32 {
    let mut words = line.split(' ').skip_while(|word| *word != name);
    words
        .nth(1)
        .and_then(|word| word.parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {line}"))
}

/// A segment with options of a test's choice and a right checksum.
fn with_options(segment: &Segment, options: &[TcpOptionElement]) -> Vec<u8> {
    let mut header = TcpHeader::new(
        segment.source.port(),
        segment.destination.port(),
        segment.sequence,
        segment.window,
    );
    header.acknowledgment_number = segment.acknowledgment;
    (header.syn, header.ack) = (segment.has(SYN), segment.has(ACK));
    header.set_options(options).expect("they fit");
    with_header(segment, header)
}

fn with_header(segment: &Segment, header: TcpHeader) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4([10, 0, 0, 2], [192, 0, 2, 7], 64)
        .tcp_header(header)
        .write(&mut packet, &segment.payload)
        .expect("it fits");
    packet
}

#[test]
fn acknowledgments_are_mapped_by_their_place_in_the_stream() {
    let (mut script, mut tcp) = established();
    script.segments([
        &tcp.answer(&[7; 100]),
        &tcp.ack(),
        &tcp.answer(&[8; 50]),
        &tcp.ack(),
    ]);
    let played = script.replay();
    let first = sent(&played)[0].sequence;
    assert_ne!(first, 5000, "the engine has numbers of its own");
    let acks = played.lines(&["in   packet", "10.0.0.2:40000 > "]);
    let numbers: Vec<_> = acks[1..]
        .iter()
        .map(|line| number(line, "ack").wrapping_sub(first))
        .collect();
    assert_eq!(numbers, [1, 101, 151]);
}

#[test]
fn nothing_is_acknowledged_before_the_engine_has_sent_it() {
    // The client's acknowledgment was captured ahead of what it acknowledges, as taps on two wires do.
    let (mut script, mut tcp) = established();
    let (bytes, ack) = (tcp.answer(&[7; 100]), tcp.ack());
    script.segments([&ack]);
    script.wait(Duration::from_millis(10)).segments([&bytes]);
    let played = script.replay();
    let first = sent(&played)[0].sequence;
    let acks = played.lines(&["in   packet", "10.0.0.2:40000 > "]);
    let acknowledged: Vec<_> = acks[1..]
        .iter()
        .map(|line| number(line, "ack").wrapping_sub(first))
        .collect();
    // The handshake's, the early one cut to what was sent, and the rest at the instant that the bytes come.
    assert_eq!(acknowledged, [1, 1, 101]);
    assert!(acks[3].starts_with("0.014000 "), "{acks:?}");
    assert_eq!(played.flow().exact, Some(true));
}

#[test]
fn bytes_wait_200_milliseconds_for_their_captured_acknowledgment() {
    let (mut script, mut tcp) = established();
    script.segments([&tcp.answer(&[7; 100])]);
    // Something captured later keeps the capture from ending.
    let mut other = Conversation::new("10.0.0.3:40000", "192.0.2.7:80");
    script.wait(Duration::from_secs(5)).segments([&other.syn()]);
    let played = script.replay();
    let acks = played.lines(&["in   packet", "10.0.0.2:40000 > ", "ACK"]);
    assert!(acks[1].starts_with("0.203000 "), "{acks:?}");
}

#[test]
fn at_the_captures_end_all_is_acknowledged() {
    let (mut script, mut tcp) = established();
    script.segments([&tcp.answer(&[7; 100])]);
    let played = script.replay();
    let acks = played.lines(&["in   packet", "10.0.0.2:40000 > ", "ACK"]);
    assert!(acks.len() == 2 && acks[1].starts_with("0.003000 "), "{acks:?}");
}

#[test]
fn sack_blocks_are_mapped_like_acknowledgments() {
    let (mut script, mut tcp) = established();
    let answer = tcp.answer(&[7; 100]);
    let mut ack = tcp.ack();
    ack.acknowledgment = 5001;
    let block = TcpOptionElement::SelectiveAcknowledgement((5051, 5101), [None, None, None]);
    script.segments([&answer]);
    script
        .wait(Duration::from_millis(1))
        .packet(with_options(&ack, &[block]));
    let mut journal = Vec::new();
    // What entered the engine is in a journal, byte for byte.
    let mut capture =
        tungate_sim::capture::Capture::from_reader("script", std::io::Cursor::new(script.pcap())).unwrap();
    tungate_sim::replay::run(
        &mut capture,
        &Options::default(),
        Some(&mut journal),
        &mut Played::default(),
        &mut |_| {},
    )
    .unwrap();
    let first = sent(&script.replay())[0].sequence;
    let mut mapped = vec![5, 10];
    mapped.extend_from_slice(&first.wrapping_add(51).to_be_bytes());
    mapped.extend_from_slice(&first.wrapping_add(101).to_be_bytes());
    assert!(
        journal.windows(10).any(|bytes| bytes == mapped),
        "edges of the engine's own numbers"
    );
}

#[test]
fn windows_are_scaled_from_the_captured_scale_to_the_clients() {
    // The captured pair scales by 7. The client's SYN goes in as captured, so the engine hears the same window.
    let (mut script, mut tcp) = established();
    tcp.window = 300;
    script.segments([&tcp.ask(b"x")]);
    let played = script.replay();
    let lines = played.lines(&["in   packet", "len 1"]);
    assert_eq!(number(lines[0], "win"), 300);

    // A target without window scaling: the captured field means bytes, and the engine hears as many, in units of 128.
    let mut tcp = Conversation::new("10.0.0.2:40000", "192.0.2.7:80");
    let mut script = Script::new();
    let syn = tcp.syn();
    let mut syn_ack = tcp.syn_ack();
    syn_ack.options.window_scale = None;
    script.segments([&syn, &syn_ack]);
    let [mut large, mut small] = [tcp.ack(), tcp.ask(b"x")];
    (large.window, small.window) = (12_800, 100);
    script.segments([&large, &small]);
    let played = script.replay();
    let lines = played.lines(&["in   packet", "10.0.0.2:40000 > "]);
    assert_eq!(number(lines[1], "win"), 12_800 / 128);
    assert_eq!(number(lines[2], "win"), 1, "never rounded to a closed window");
}

#[test]
fn a_client_that_was_never_captured_goes_on_receiving() {
    // Much more than the window that a handshake which was made up may offer.
    let mut tcp = Conversation::new("10.0.0.2:40000", "192.0.2.7:80");
    let mut script = Script::new();
    let parts: Vec<Vec<u8>> = (0..200).map(|index| vec![index; 1400]).collect();
    tcp.syn();
    script.segments([&tcp.syn_ack()]);
    for part in &parts {
        script.segments([&tcp.answer(part)]);
    }
    let played = script.replay();
    assert_eq!(played.flow().to_client, whole(&parts.concat()));
    assert_eq!(played.flow().exact, Some(true), "{:?}", played.flow().anomalies);
}

#[test]
fn timestamps_are_not_negotiated() {
    let mut tcp = Conversation::new("10.0.0.2:40000", "192.0.2.7:80");
    let (syn, syn_ack) = (tcp.syn(), tcp.syn_ack());
    let stamp = TcpOptionElement::Timestamp(1, 0);
    let mut script = Script::new();
    script.packet(with_options(
        &syn,
        &[TcpOptionElement::MaximumSegmentSize(1460), stamp],
    ));
    script.segments([
        &syn_ack,
        &tcp.ack(),
        &tcp.ask(b"hello"),
        &tcp.answer(b"world"),
        &tcp.ack(),
    ]);
    let played = script.replay();
    assert_eq!(
        (&played.flow().to_target, &played.flow().to_client),
        (&whole(b"hello"), &whole(b"world"))
    );
    for (_, packet) in &played.emitted {
        let options = &packet[40..20 + usize::from(packet[32] >> 4) * 4];
        assert!(!options.windows(2).any(|pair| pair == [8, 10]), "{options:?}");
    }
}

#[test]
fn signatures_are_taken_off_and_noted() {
    let mut tcp = Conversation::new("10.0.0.2:40000", "192.0.2.7:80");
    let (syn, syn_ack) = (tcp.syn(), tcp.syn_ack());
    let mut header = TcpHeader::new(40000, 80, syn.sequence, syn.window);
    header.syn = true;
    let mut signature = [0x55; 20];
    (signature[0], signature[1], signature[18], signature[19]) = (19, 18, 1, 1); // RFC 2385: MD5
    header.set_options_raw(&signature).expect("they fit");
    let mut script = Script::new();
    script.packet(with_header(&syn, header));
    script.segments([&syn_ack, &tcp.ack(), &tcp.ask(b"signed")]);
    let played = script.replay();
    assert_eq!(played.flow().to_target, whole(b"signed"));
    assert_eq!(played.flow().anomalies, ["authentication-option"]);
}

#[test]
fn a_wrong_checksum_stays_wrong_through_all_mapping() {
    let (mut script, mut tcp) = established();
    script.segments([&tcp.answer(b"from the target"), &tcp.ack()]);
    let mut packet = tcp.ask(b"broken").packet();
    packet[20 + 17] ^= 0x10;
    script.packet(packet);
    let played = script.replay();
    assert_eq!(played.packets[5].reason, Some("tcp-checksum"));
    assert_eq!(played.flow().to_target, whole(b""));
}
