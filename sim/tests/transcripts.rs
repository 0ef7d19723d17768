//! What real traffic meets, as reviewed: reports and transcripts of some shipped captures under `snapshots/`.
//!
//! A change in behaviour shows here as a change in a file. Read it as a reviewer: is this what the packets deserve? Then
//! `INSTA_UPDATE=always cargo test -p tungate-sim --test transcripts` accepts it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// The captures, each with the list that it meets; without entries everything goes direct.
const CASES: &[(&str, &str)] = &[
    ("cut-file.pcap", ""),
    ("fast-open.pcap", ""),
    ("fragments-v6.pcap", ""),
    ("midstream.pcap", ""),
    ("overlap.pcap", ""),
    ("split-handshake.pcap", ""),
    ("dns-tcp.pcap", "deny 0.0.0.0/0 tcp 53\n"),
];

/// A capture's report, without its digest, and transcript.
fn replayed(capture: &str, list: &str) -> String {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("deny.list");
    fs::write(&file, list).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_replay"));
    command
        .args([capture, "--transcript", "-"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../captures"))
        .stdin(Stdio::null());
    if !list.is_empty() {
        command.arg("--list").arg(&file);
    }
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report = String::from_utf8(output.stderr).unwrap();
    let report: String = report
        .replace(&file.display().to_string(), "deny.list")
        .split_inclusive('\n')
        .filter(|line| !line.starts_with("digest "))
        .collect();
    format!("{report}\n{}", String::from_utf8(output.stdout).unwrap())
}

#[test]
fn captures_meet_what_was_reviewed() {
    let mut settings = insta::Settings::clone_current();
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| {
        for (capture, list) in CASES {
            insta::assert_snapshot!(*capture, replayed(capture, list));
        }
    });
}

#[test]
fn every_snapshot_belongs_to_a_capture() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots");
    let found: BTreeSet<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let expected = CASES.iter().map(|(capture, _)| format!("{capture}.snap"));
    assert_eq!(found, expected.collect());
}
