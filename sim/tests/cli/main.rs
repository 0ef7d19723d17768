//! The command `replay` as its users meet it: exit codes, complaints, and what lands where.

mod damage;
mod outputs;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use tungate_sim::capture::{LinkType, PcapWriter};

/// IPv4, UDP from 192.0.2.1 port 1000 to 198.51.100.2 port 2000 without payload and UDP checksum.
///
/// The header's words without the checksum add up to 0x4500 + 0x001c + 0x4011 + 0xc000 + 0x0201 + 0xc633 + 0x6402 =
/// 0x27163, folded 0x7165; its complement is 0x8e9a.
const DATAGRAM: [u8; 28] = [
    0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0x8e, 0x9a, 192, 0, 2, 1, 198, 51, 100, 2, // IPv4
    0x03, 0xe8, 0x07, 0xd0, 0, 8, 0, 0, // UDP
];

const DROP_ALL: &str = "[[rule]]\nname = \"nothing goes\"\naction = \"drop\"\n";

/// A folder for one test's files, and the command run in it.
struct Bench {
    folder: TempDir,
}

struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Bench {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    /// Writes a capture of `packets` datagrams, one a second, each from another client port.
    fn capture(&self, name: &str, packets: u16) {
        self.write(name, capture(LinkType::RAW, packets));
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_replay"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null());
        command
    }

    fn replay(&self, arguments: &[&str]) -> Ran {
        Ran::from(self.command(arguments).output().unwrap())
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().expect("no signal ended it"),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    /// It ended with `code`, printed no report, and complained with all of `phrases`.
    #[track_caller]
    fn complained(&self, code: i32, phrases: &[&str]) {
        assert_eq!((self.code, self.stdout.as_str()), (code, ""), "{}", self.stderr);
        for phrase in phrases {
            assert!(self.stderr.contains(phrase), "no {phrase:?} in: {}", self.stderr);
        }
    }
}

fn capture(link_type: LinkType, packets: u16) -> Vec<u8> {
    let mut writer = PcapWriter::new(Vec::new(), link_type).unwrap();
    for index in 0..packets {
        let mut packet = DATAGRAM;
        packet[20..22].copy_from_slice(&(1000 + index).to_be_bytes());
        writer
            .write(
                1_700_000_000_000_000_000 + u64::from(index) * 1_000_000_000,
                &packet,
            )
            .unwrap();
    }
    writer.finish().unwrap()
}

#[test]
fn without_arguments_it_prints_its_help_and_exits_2() {
    let ran = Bench::new().replay(&[]);
    ran.complained(2, &["Usage: replay", "tungate.toml", "Exit status:"]);
}

#[test]
fn a_capture_replays_and_exits_0() {
    let bench = Bench::new();
    bench.capture("a.pcap", 3);
    let ran = bench.replay(&["a.pcap"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{}", ran.stdout);
    assert!(ran.stdout.starts_with("a.pcap\n"), "{}", ran.stdout);
    assert!(
        ran.stdout
            .contains("3 packets, 84 B in 2 s from 2023-11-14T22:13:20Z"),
        "{}",
        ran.stdout
    );
}

/// tshark shows 86 bytes on the second connection's SYN, acknowledged by its SYN-ACK. The engine acknowledges the SYN
/// alone, so the client has to send them again.
#[test]
fn data_on_a_syn_reaches_the_target() {
    let capture = concat!(env!("CARGO_MANIFEST_DIR"), "/../captures/fast-open.pcap");
    let report = Bench::new().replay(&["--json", capture]).json();
    let flow = &report["flows"].as_array().unwrap()[1];
    assert_eq!(flow["client"], "10.99.99.1:55534");
    assert_eq!(flow["anomalies"], serde_json::json!(["syn-data"]));
    assert_eq!(
        (&flow["to_target"]["bytes"], &flow["to_target"]["missing"]),
        (&86.into(), &0.into())
    );
    assert_eq!(report["fidelity"]["exact"], report["fidelity"]["flows"]);
}

#[test]
fn a_bad_policy_exits_2_with_its_place() {
    let bench = Bench::new();
    bench.capture("a.pcap", 1);
    bench.write("bad.toml", "[lists]\nentries = [\"deny 192.0.2.0/33\"]\n");
    for option in ["-c", "--against", "--change"] {
        let file = if option == "--change" {
            "1s=bad.toml"
        } else {
            "bad.toml"
        };
        bench
            .replay(&["a.pcap", option, file])
            .complained(2, &["bad.toml:2:", "192.0.2.0/33", "hint"]);
    }
    bench.write("bad.list", "deny 192.0.2.0/24\nforbid ::/0\n");
    bench
        .replay(&["a.pcap", "--list", "bad.list"])
        .complained(2, &["bad.list:2:", "forbid", "hint"]);
    bench
        .replay(&["a.pcap", "-c", "none.toml"])
        .complained(2, &["none.toml", "hint"]);
}

#[test]
fn bad_options_exit_2_and_say_how_to_write_them() {
    let bench = Bench::new();
    bench.capture("a.pcap", 1);
    bench
        .replay(&["a.pcap", "--change", "12=x.toml"])
        .complained(2, &["--change", "12.5s"]);
    bench
        .replay(&["a.pcap", "--clients", "everyone"])
        .complained(2, &["--clients", "10.0.0.0/8"]);
    bench
        .replay(&["a.pcap", "--jobs", "0"])
        .complained(2, &["--jobs"]);
}

#[test]
fn a_list_drops_what_it_denies() {
    let bench = Bench::new();
    bench.capture("a.pcap", 3);
    bench.write("deny.list", "deny 198.51.100.0/24 udp 2000\n");
    let ran = bench.replay(&["--json", "a.pcap", "--list", "deny.list"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    assert_eq!(report["policy"], "deny.list");
    assert_eq!(report["verdicts"]["drop"], 3);
    assert_eq!(report["verdicts"]["by_reason"]["list-destination"], 3);
    assert_eq!(report["verdicts"]["by_rule"]["deny 198.51.100.0/24 udp 2000"], 3);
}

#[test]
fn a_policy_change_holds_from_its_time_on() {
    let bench = Bench::new();
    bench.capture("a.pcap", 5); // at 0, 1, 2, 3 and 4 s
    bench.write("night.toml", DROP_ALL);
    let ran = bench.replay(&["--json", "a.pcap", "--change", "2.5s=night.toml"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    assert_eq!(
        (&report["verdicts"]["pass"], &report["verdicts"]["drop"]),
        (&3.into(), &2.into())
    );
    assert_eq!(report["changes"][0]["time"], 2.5);
}

#[test]
fn expectations_decide_between_0_and_1() {
    let bench = Bench::new();
    bench.capture("a.pcap", 3);
    bench.write(
        "good.toml",
        "read = 3\ndrop = 0\nflows = 3\n[[flow]]\nclient = \"192.0.2.1:1001\"\n",
    );
    bench.write("wrong.toml", "read = 3\ndrop = 12\n");
    let good = bench.replay(&["a.pcap", "--expect", "good.toml"]);
    assert_eq!(good.code, 0, "{}", good.stdout);
    assert!(good.stdout.contains("all as expected"), "{}", good.stdout);
    let wrong = bench.replay(&["a.pcap", "--expect", "wrong.toml"]);
    assert_eq!(wrong.code, 1, "{}", wrong.stdout);
    assert!(
        wrong.stdout.contains("drop: expected 12, found 0\n"),
        "{}",
        wrong.stdout
    );
    let json = bench.replay(&["--json", "a.pcap", "--expect", "wrong.toml"]);
    assert_eq!(
        (json.code, &json.json()["mismatches"][0]["expected"]),
        (1, &"12".into())
    );
}

#[test]
fn expectations_that_cannot_be_read_exit_2() {
    let bench = Bench::new();
    bench.capture("a.pcap", 1);
    bench.write("typo.toml", "dorp = 0\n");
    bench
        .replay(&["a.pcap", "--expect", "typo.toml"])
        .complained(2, &["typo.toml", "line 1", "`dorp`", "hint: "]);
    bench
        .replay(&["a.pcap", "--expect", "none.toml"])
        .complained(2, &["none.toml", "hint: "]);
}

#[test]
fn against_the_same_policy_exits_0_and_against_another_1() {
    let bench = Bench::new();
    bench.capture("a.pcap", 3);
    bench.write("open.toml", "");
    bench.write("closed.toml", DROP_ALL);
    let same = bench.replay(&["a.pcap", "--against", "open.toml"]);
    assert_eq!(same.code, 0, "{}", same.stdout);
    assert!(
        same.stdout.contains("open.toml: the same effect"),
        "{}",
        same.stdout
    );
    let other = bench.replay(&["--json", "a.pcap", "--against", "closed.toml"]);
    assert_eq!(other.code, 1, "{}", other.stdout);
    let against = &other.json()["against"];
    assert_eq!(
        (&against["packets"]["pass_to_drop"], &against["flows"]["changed"]),
        (&3.into(), &3.into())
    );
    assert_eq!(against["changed_packets"][2]["after"]["rule"], "nothing goes");
    let back = bench.replay(&["--json", "a.pcap", "-c", "closed.toml", "--against", "open.toml"]);
    assert_eq!(back.json()["against"]["packets"]["drop_to_pass"], 3);
}

#[test]
fn a_capture_from_a_pipe_is_replayed_also_twice() {
    let bench = Bench::new();
    bench.write("closed.toml", DROP_ALL);
    for (name, reported) in [("-", "standard input"), ("/dev/stdin", "/dev/stdin")] {
        for (more, code) in [(&[][..], 0), (&["--against", "closed.toml"], 1)] {
            let arguments = [&["--json", name], more].concat();
            let mut child = bench
                .command(&arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            child
                .stdin
                .take()
                .unwrap()
                .write_all(&capture(LinkType::RAW, 3))
                .unwrap();
            let ran = Ran::from(child.wait_with_output().unwrap());
            assert_eq!(ran.code, code, "{}", ran.stderr);
            let report = ran.json();
            assert_eq!(
                (&report["capture"], &report["packets"]["read"]),
                (&reported.into(), &3.into())
            );
        }
    }
}

#[test]
fn one_unusable_capture_of_several_exits_2_and_the_others_are_reported() {
    let bench = Bench::new();
    bench.capture("a.pcap", 1);
    bench.capture("c.pcap", 1);
    let ran = bench.replay(&["--json", "a.pcap", "b.pcap", "c.pcap"]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("b.pcap"), "{}", ran.stderr);
    assert_eq!(ran.json().as_array().unwrap().len(), 2);
}

#[test]
fn what_is_printed_fits_the_schema() {
    let bench = Bench::new();
    bench.capture("a.pcap", 3);
    bench.write("closed.toml", DROP_ALL);
    bench.write("wrong.toml", "drop = 12\n");
    let schema = serde_json::from_str(include_str!("../../report.schema.json")).unwrap();
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    let ran = bench.replay(&[
        "--json",
        "a.pcap",
        "a.pcap",
        "--against",
        "closed.toml",
        "--expect",
        "wrong.toml",
    ]);
    let errors: Vec<String> = validator
        .iter_errors(&ran.json())
        .map(|error| error.to_string())
        .collect();
    assert!(errors.is_empty(), "{errors:#?}");
}

#[test]
fn a_journal_replays_to_the_digest_of_its_capture() {
    let bench = Bench::new();
    bench.capture("a.pcap", 3);
    let whole = bench.replay(&["--json", "a.pcap", "--journal", "a.journal"]);
    assert_eq!(whole.code, 0, "{}", whole.stderr);
    let digest = whole.json()["digest"].as_str().unwrap().to_owned();
    bench.write("expect.toml", format!("digest = \"{digest}\"\n"));
    let again = bench.replay(&["--json", "a.journal", "--expect", "expect.toml"]);
    assert_eq!(again.code, 0, "{}{}", again.stdout, again.stderr);
    assert_eq!(
        (&again.json()["journal"], &again.json()["packets"]),
        (&"a.journal".into(), &3.into())
    );
    let text = bench.replay(&["a.journal"]);
    assert_eq!(
        (text.code, text.stdout.contains(&digest)),
        (0, true),
        "{}",
        text.stdout
    );

    let refused = bench.replay(&["a.journal", "--packets", "lines"]);
    refused.complained(2, &["--packets does not go with \"a.journal\"", "hint: "]);
    assert_eq!(bench.names(), ["a.journal", "a.pcap", "expect.toml"]);

    let journal = fs::read(bench.path("a.journal")).unwrap();
    bench.write("cut.journal", &journal[..journal.len() - 1]);
    let cut = bench.replay(&["--json", "cut.journal"]);
    assert_eq!(cut.code, 0, "{}", cut.stderr);
    assert!(
        cut.json()["damaged"].as_str().unwrap().contains("cut short"),
        "{}",
        cut.stdout
    );
    bench.write("bare.journal", &journal[..20]);
    bench.replay(&["bare.journal"]).complained(
        2,
        &["journal \"bare.journal\" cannot be used", "cut short", "hint: "],
    );
    let mut foreign = journal;
    foreign[15] ^= 0x40; // behind the magic number
    bench.write("foreign.journal", foreign);
    bench.replay(&["foreign.journal"]).complained(
        2,
        &[
            "journal \"foreign.journal\" cannot be used",
            "format version",
            "the version of tungate that wrote it",
        ],
    );
}

/// Every capture of the collection in `TUNGATE_CAPTURES`; without it, one made here.
fn captures(bench: &Bench) -> PathBuf {
    match std::env::var_os("TUNGATE_CAPTURES") {
        Some(folder) => folder.into(),
        None => {
            bench.capture("a.pcap", 500);
            Path::new("a.pcap").to_owned()
        }
    }
}

#[test]
fn every_run_prints_the_same_whatever_the_number_of_jobs() {
    let bench = Bench::new();
    let captures = captures(&bench);
    let captures = captures.to_str().unwrap();
    let run = |arguments: &[&str]| {
        let ran = bench.replay(arguments);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        ran.stdout
    };
    let first = run(&["--json", captures]);
    for jobs in ["1", "2", "8"] {
        assert!(
            run(&["--json", captures, "--jobs", jobs]) == first,
            "another report with {jobs} jobs"
        );
    }
    assert!(run(&[captures]) == run(&[captures, "--jobs", "1"]));
}
