//! The pre-filter in a replay: it changes where a packet is dropped and nothing else, and its verdicts are those of an
//! independent reader of list and capture.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Seven entries that between them use prefixes, protocols, ports, both actions and both IP versions.
const LIST: &str = "tests/independent/seven.list";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The shipped captures, and those of the directory that `TUNGATE_CAPTURES` names.
fn folders() -> Vec<PathBuf> {
    let more = env::var_os("TUNGATE_CAPTURES").map(PathBuf::from);
    if more.is_none() {
        println!("skipped: TUNGATE_CAPTURES is not set, so that only the shipped captures are read");
    }
    [root().join("captures")].into_iter().chain(more).collect()
}

fn is_there(program: &str) -> bool {
    let asked = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    asked.is_ok_and(|output| output.status.success())
}

fn replay_all(prefilter: &str) -> Vec<Value> {
    let output = Command::new(env!("CARGO_BIN_EXE_replay"))
        .args(folders())
        .args(["--list", LIST, "--json", "--prefilter", prefilter])
        .current_dir(root())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_prefilter_changes_the_path_and_nothing_else() {
    let mut with = replay_all("vm");
    let mut without = replay_all("off");
    assert!(
        with.len() > 15 && with.len() == without.len(),
        "{} captures",
        with.len()
    );
    let mut checked = 0;
    let mut early = 0;
    for (with, without) in with.iter_mut().zip(&mut without) {
        assert_eq!(with["parity"]["disagreements"], 0, "{}", with["capture"]);
        assert_eq!(without["parity"]["checked"], 0);
        checked += with["parity"]["checked"].as_u64().unwrap();
        with["parity"].take();
        without["parity"].take();
        let flows = with["flows"].as_array_mut().unwrap().iter_mut();
        for (with, without) in flows.zip(without["flows"].as_array_mut().unwrap()) {
            assert_eq!(without["path"], "engine");
            early += u64::from(with["path"] == "prefilter");
            with["path"] = without["path"].clone();
        }
        assert_eq!(with, without);
    }
    assert!(
        checked > 1000,
        "only {checked} packets went through the pre-filter"
    );
    assert!(
        early > 10,
        "the pre-filter has dropped the packets of only {early} flows"
    );
}

#[test]
fn list_verdicts_are_those_of_an_independent_reader() {
    for program in ["python3", "tshark"] {
        if !is_there(program) {
            println!("skipped: there is no {program} to judge captures independently");
            return;
        }
    }
    let mut captures = Vec::new();
    for folder in folders() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy();
            let name = name.strip_suffix(".gz").unwrap_or(&name);
            if name.ends_with(".pcap") || name.ends_with(".pcapng") {
                captures.push(path);
            }
        }
    }
    let Output { status, stdout, .. } = Command::new("python3")
        .args(["tests/independent/lists.py", env!("CARGO_BIN_EXE_replay"), LIST])
        .args(&captures)
        .current_dir(root())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let report = String::from_utf8(stdout).unwrap();
    assert!(status.success(), "{report}");
    assert_eq!(
        report.lines().filter(|line| line.ends_with(" 0 wrong")).count(),
        captures.len(),
        "{report}"
    );
}
