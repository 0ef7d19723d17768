//! Where output goes.

use std::fs;
use std::process::Stdio;

use serde_json::Value;

use super::Bench;

#[test]
fn files_are_written_whole_and_the_report_makes_room_on_standard_output() {
    let bench = Bench::new();
    bench.capture("a.pcap", 3);
    let ran = bench.replay(&[
        "a.pcap",
        "--packets",
        "-",
        "--out",
        "out.pcapng",
        "--transcript",
        "lines",
    ]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let numbers: Vec<Value> = ran
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        numbers
            .iter()
            .map(|line| line["number"].as_u64().unwrap())
            .collect::<Vec<_>>(),
        [1, 2, 3]
    );
    assert!(
        ran.stderr.starts_with("a.pcap\n"),
        "the report is on standard error: {}",
        ran.stderr
    );
    assert_eq!(bench.names(), ["a.pcap", "lines", "out.pcapng"]);
    assert_eq!(
        fs::read(bench.path("out.pcapng")).unwrap()[..4],
        [0x0a, 0x0d, 0x0d, 0x0a]
    );
}

#[test]
fn outputs_that_would_mingle_are_refused() {
    let bench = Bench::new();
    bench.capture("a.pcap", 1);
    let both = bench.replay(&["a.pcap", "--json", "--packets", "-"]);
    both.complained(2, &["--json and --packets both go to standard output", "hint: "]);
    let several = bench.replay(&["a.pcap", "a.pcap", "--packets", "lines"]);
    several.complained(2, &["--packets takes one capture, but there are 2", "hint: "]);
    assert_eq!(bench.names(), ["a.pcap"]);
}

#[test]
fn an_output_that_cannot_be_written_exits_2_and_leaves_nothing() {
    let bench = Bench::new();
    bench.capture("a.pcap", 1);
    let ran = bench.replay(&["a.pcap", "--packets", "no/such/folder/lines"]);
    ran.complained(
        2,
        &[
            "cannot write \"no/such/folder/lines\"",
            "No such file or directory",
            "hint: ",
        ],
    );
    bench
        .replay(&["a.pcap", "--packets", "/dev/full"])
        .complained(2, &["cannot write \"/dev/full\""]);
    assert_eq!(bench.names(), ["a.pcap"]);
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let bench = Bench::new();
    bench.capture("a.pcap", 1);
    let mut child = bench
        .command(&["a.pcap", "a.pcap"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), output.stderr.as_slice()),
        (Some(0), &b""[..])
    );
}
