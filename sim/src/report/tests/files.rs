//! Files of packets and lines.

use super::*;

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
