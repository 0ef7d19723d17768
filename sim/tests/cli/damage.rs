//! Files that are no capture, or only a part of one.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;
use tungate_sim::capture::LinkType;

use super::{Bench, DATAGRAM, capture};

#[test]
fn a_missing_file_exits_2() {
    Bench::new()
        .replay(&["none.pcap"])
        .complained(2, &["error: ", "none.pcap", "No such file", "hint: "]);
}

#[test]
fn a_capture_that_may_not_be_read_exits_2() {
    let bench = Bench::new();
    bench.capture("secret.pcap", 1);
    fs::set_permissions(bench.path("secret.pcap"), Permissions::from_mode(0o0)).unwrap();
    if fs::File::open(bench.path("secret.pcap")).is_ok() {
        println!("skipped: this user may read every file");
        return;
    }
    bench
        .replay(&["secret.pcap"])
        .complained(2, &["\"secret.pcap\"", "Permission denied", "hint: "]);
}

#[test]
fn an_empty_file_exits_2() {
    let bench = Bench::new();
    bench.write("empty.pcap", "");
    bench
        .replay(&["empty.pcap"])
        .complained(2, &["\"empty.pcap\" is empty", "hint: "]);
}

#[test]
fn a_file_that_is_no_capture_exits_2() {
    let bench = Bench::new();
    bench.write("notes.txt", "remember the milk");
    bench
        .replay(&["notes.txt"])
        .complained(2, &["\"notes.txt\" is not a capture", "hint: "]);
    let ran = bench.replay(&["--json", "notes.txt"]);
    assert_eq!(
        (ran.code, ran.stdout.as_str()),
        (2, ""),
        "half a JSON document is worse than none"
    );
}

#[test]
fn a_folder_without_captures_exits_2() {
    let bench = Bench::new();
    fs::create_dir(bench.path("logs")).unwrap();
    bench.write("logs/notes.txt", "remember the milk");
    bench
        .replay(&["logs"])
        .complained(2, &["folder \"logs\" holds no captures (1 other file)", "hint: "]);
}

#[test]
fn a_folder_is_searched_for_captures_by_content_in_the_order_of_names() {
    let bench = Bench::new();
    fs::create_dir(bench.path("in")).unwrap();
    bench.write("in/notes.pcap", "no capture in spite of its name");
    bench.capture("in/b", 2);
    bench.capture("in/a.txt", 1);
    let ran = bench.replay(&["--json", "in"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let names: Vec<_> = ran
        .json()
        .as_array()
        .unwrap()
        .iter()
        .map(|report| report["capture"].clone())
        .collect();
    assert_eq!(names, ["in/a.txt", "in/b"]);
    let text = bench.replay(&["in"]).stdout;
    assert!(
        text.contains("2 captures\n") && text.contains("1 file: no captures"),
        "{text}"
    );
}

#[test]
fn a_cut_capture_gives_its_whole_report_with_the_damage_and_exits_0() {
    let bench = Bench::new();
    let whole = capture(LinkType::RAW, 3);
    bench.write("cut.pcap", &whole[..whole.len() - 5]);
    let ran = bench.replay(&["--json", "cut.pcap"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    assert_eq!(
        (&report["packets"]["read"], &report["damaged"]["after_packet"]),
        (&2.into(), &2.into())
    );
    let text = bench.replay(&["cut.pcap"]);
    assert_eq!(text.code, 0);
    assert!(
        text.stdout.contains("damaged    after packet 2: "),
        "{}",
        text.stdout
    );
}

#[test]
fn a_cut_gzip_gives_its_whole_report_with_the_damage_and_exits_0() {
    let bench = Bench::new();
    let mut packed = GzEncoder::new(Vec::new(), Compression::none());
    packed.write_all(&capture(LinkType::RAW, 1000)).unwrap();
    let packed = packed.finish().unwrap();
    bench.write("whole.gz", &packed);
    assert_eq!(
        bench.replay(&["--json", "whole.gz"]).json()["packets"]["read"],
        1000
    );
    bench.write("cut.gz", &packed[..packed.len() / 2]);
    let ran = bench.replay(&["--json", "cut.gz"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    // A record has 16 + 28 bytes and nothing is compressed, so half the file holds nearly half of them.
    let read = report["packets"]["read"].as_u64().unwrap();
    assert!((450..=500).contains(&read), "{read}");
    assert_eq!(report["damaged"]["after_packet"], read);
    let what = report["damaged"]["what"].as_str().unwrap();
    assert!(what.contains("gzip stream ends early"), "{what}");
    bench.write("bare.gz", &packed[..5]);
    bench
        .replay(&["bare.gz"])
        .complained(2, &["\"bare.gz\"", "gzip stream ends early", "hint: "]);
}

#[test]
fn an_absurd_snap_length_is_no_reason_to_refuse_a_capture() {
    let bench = Bench::new();
    for snap_length in [0, 1, 0x7fff_ffff, u32::MAX] {
        let mut bytes = capture(LinkType::RAW, 3);
        bytes[16..20].copy_from_slice(&u32::to_le_bytes(snap_length));
        bench.write("snap.pcap", bytes);
        let ran = bench.replay(&["--json", "snap.pcap"]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let report = ran.json();
        assert_eq!(
            (&report["packets"]["judged"], &report["damaged"]),
            (&3.into(), &Value::Null),
            "snap length {snap_length}"
        );
    }
}

#[test]
fn a_record_of_absurd_length_ends_the_capture_and_not_the_report() {
    let bench = Bench::new();
    let mut bytes = capture(LinkType::RAW, 3);
    let third = 24 + 2 * (16 + DATAGRAM.len());
    bytes[third + 8..third + 12].copy_from_slice(&u32::to_le_bytes(0xffff_fff0));
    bench.write("huge.pcap", bytes);
    let ran = bench.replay(&["--json", "huge.pcap"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    assert_eq!(report["packets"]["read"], 2);
    assert_eq!(report["damaged"]["after_packet"], 2);
}

#[test]
fn a_capture_whose_file_header_is_cut_exits_2() {
    let bench = Bench::new();
    bench.write("cut.pcap", &capture(LinkType::RAW, 3)[..10]);
    bench
        .replay(&["cut.pcap"])
        .complained(2, &["\"cut.pcap\"", "10 of its 24 bytes", "hint: "]);
}

#[test]
fn packets_of_an_unknown_link_type_are_counted_as_unreadable() {
    let bench = Bench::new();
    bench.write("radio.pcap", capture(LinkType(147), 3)); // LINKTYPE_USER0: private use
    let ran = bench.replay(&["--json", "radio.pcap"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let packets = &ran.json()["packets"];
    assert_eq!(
        (&packets["read"], &packets["unreadable"], &packets["judged"]),
        (&3.into(), &3.into(), &0.into())
    );
    let text = bench.replay(&["radio.pcap"]).stdout;
    assert!(
        text.contains("link type 147") && text.contains("3 unreadable (unknown link type"),
        "{text}"
    );
}
