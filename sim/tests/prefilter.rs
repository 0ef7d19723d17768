//! The pre-filter in a replay: it changes where a packet is dropped and nothing else, and its verdicts are those of an
//! independent reader of list and capture.

#[path = "../../bpf/prefilter/tests/common/model.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod model;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tungate_engine::policy::{PolicySpec, RuleRef};
use tungate_prefilter::{Action, Sampling, Vm};
use tungate_sim::capture::{Capture, LinkType};

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

fn replay(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_replay"));
    command
        .args(arguments)
        .current_dir(root())
        .stdin(Stdio::null())
        .env("NO_COLOR", "1");
    command
}

fn replay_all(prefilter: &str, captures: &[PathBuf]) -> Vec<Value> {
    let mut command = replay(&["--list", LIST, "--json", "--prefilter", prefilter]);
    let output = command.args(captures).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Whether this kernel runs the program for us; else says why not.
#[cfg(feature = "kernel")]
fn is_kernel_willing() -> bool {
    use tungate_sim::replay::Prefiltering;
    match Prefiltering::Kernel.check() {
        Ok(()) => true,
        Err(error) => {
            println!("skipped: {}", error.to_string().replace('\n', "; "));
            false
        }
    }
}

#[cfg(feature = "kernel")]
#[test]
fn the_kernel_and_the_virtual_machine_come_to_one_report() {
    if !is_kernel_willing() {
        return;
    }
    // A kernel takes seconds to load and let go of a program with its maps, once for each capture.
    let captures = match env::var_os("TUNGATE_LONG") {
        Some(_) => folders(),
        None => vec![root().join("captures")],
    };
    let (in_kernel, in_vm) = (replay_all("kernel", &captures), replay_all("vm", &captures));
    let mut left_out = 0;
    for (mut in_kernel, mut in_vm) in in_kernel.into_iter().zip(in_vm) {
        let [kernel, vm] = [&mut in_kernel, &mut in_vm].map(|report| report["parity"].take());
        assert_eq!(kernel["disagreements"], 0, "{}", in_kernel["capture"]);
        // What a network card has joined is too long for the kernel; nothing else is left out.
        let asked = |parity: &Value| parity["checked"].as_u64().unwrap();
        left_out += asked(&vm) - asked(&kernel);
        if asked(&vm) > asked(&kernel) {
            for report in [&mut in_kernel, &mut in_vm] {
                let flows = report["flows"].as_array_mut().unwrap();
                flows.iter_mut().for_each(|flow| drop(flow["path"].take()));
            }
        }
        assert_eq!(in_kernel, in_vm);
    }
    println!("{left_out} packets were too long for the kernel");
}

#[cfg(feature = "kernel")]
#[test]
fn a_change_of_lists_in_mid_capture_is_one_swap_in_the_kernel_too() {
    if !is_kernel_willing() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let change = folder.path().join("change.toml");
    fs::write(
        &change,
        "[lists]\nentries = [\"deny 192.150.187.43/32 tcp 80\"]\n",
    )
    .unwrap();
    let change = format!("5s={}", change.display());
    let packets = |prefilter| {
        let capture = "captures/web-page.pcap";
        let arguments = [
            capture,
            "--packets",
            "-",
            "--change",
            &change,
            "--prefilter",
            prefilter,
        ];
        let output = replay(&arguments).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let in_kernel = packets("kernel");
    assert_eq!(in_kernel, packets("vm"));
    assert!(in_kernel.contains(r#""path":"prefilter""#), "{in_kernel}");
}

#[cfg(feature = "kernel")]
#[test]
fn without_rights_the_kernel_is_not_asked_and_the_way_out_is_said() {
    let replay = env!("CARGO_BIN_EXE_replay");
    let capture = root().join("captures/web-page.pcap").canonicalize().unwrap();
    let folder = tempfile::tempdir().unwrap();
    // Where an ordinary user can read both.
    let place = |from: &Path| {
        let to = folder.path().join(from.file_name().unwrap());
        fs::copy(from, &to).unwrap();
        to
    };
    let (program, capture) = (place(Path::new(replay)), place(&capture));
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(folder.path(), mode).unwrap();
    let mut command = Command::new("setpriv");
    let command = command.args(["--reuid=65534", "--clear-groups"]).arg(program);
    let command = command
        .arg(capture)
        .args(["--prefilter", "kernel"])
        .env("NO_COLOR", "1");
    let Ok(output) = command.stdin(Stdio::null()).output() else {
        println!("skipped: there is no setpriv to become an ordinary user");
        return;
    };
    let message = String::from_utf8(output.stderr).unwrap();
    if message.contains("setpriv:") {
        println!("skipped: {message}");
        return;
    }
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("not permitted\nhint: run as root"), "{message}");
    assert!(output.stdout.is_empty());
}

#[test]
fn the_prefilter_changes_the_path_and_nothing_else() {
    let mut with = replay_all("vm", &folders());
    let mut without = replay_all("off", &folders());
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

/// All files of [`folders`] that are captures.
fn captures() -> Vec<PathBuf> {
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
    captures
}

/// A frame as it is, cut, padded, tagged, and with single bytes changed.
fn variants(frame: &[u8]) -> Vec<Vec<u8>> {
    let tagged = |tags: usize| {
        let tag = [0x81, 0x00, 0x00, 0x07];
        [&frame[..12], &tag.repeat(tags), &frame[12..]].concat()
    };
    let mut variants: Vec<_> = [14, 33, 53, frame.len() / 2, frame.len() - 1, frame.len()]
        .into_iter()
        .map(|length| frame[..length.min(frame.len())].to_vec())
        .collect();
    variants.push([frame, &[0x55; 9]].concat());
    variants.extend([1, 2, 3].map(tagged));
    let headers = frame.len().min(80);
    for change in 0..8 {
        let mut changed = frame.to_vec();
        // Spread over the headers in a different way for each frame.
        let at = (12 + change * 37 + frame.iter().map(|&byte| usize::from(byte)).sum::<usize>()) % headers;
        changed[at] = changed[at].wrapping_add(1 << change);
        variants.push(changed);
    }
    variants
}

#[test]
fn real_packets_and_damaged_ones_are_judged_as_a_scan_of_the_list_does() {
    const PER_CAPTURE: usize = 200;
    let list = tungate_config::list_file(&root().join(LIST), &mut |_| ()).unwrap();
    let policy = PolicySpec {
        lists: list.entries,
        ..PolicySpec::default()
    };
    let mut vm = Vm::simulated(Sampling::default()).unwrap();
    vm.apply(&policy, 0).unwrap();
    let (mut judged, mut dropped) = (0, 0);
    for path in captures() {
        let Ok(mut capture) = Capture::open(&path) else {
            continue;
        };
        let mut frames = Vec::new();
        while let Ok(Some(record)) = capture.next_record() {
            if record.link_type == LinkType::ETHERNET && record.bytes.len() > 34 {
                frames.push(record.bytes.to_vec());
            }
            if frames.len() == PER_CAPTURE {
                break;
            }
        }
        for frame in frames.iter().flat_map(|frame| variants(frame)) {
            let verdict = vm.run(&frame).unwrap();
            let expected = model::judge(&frame, &policy.lists, 0, &[]);
            let is_drop = verdict.action == Action::Drop;
            assert_eq!(
                (is_drop, verdict.rule),
                (expected.drop, expected.entry.map(RuleRef::List)),
                "{}: {frame:02x?}",
                path.display()
            );
            judged += 1;
            dropped += usize::from(is_drop);
        }
    }
    assert!(
        judged > 20_000 && dropped > 2_000,
        "{dropped} of {judged} dropped"
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
    let captures = captures();
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
