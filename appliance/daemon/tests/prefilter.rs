//! The pre-filter by hand: `tungate prefilter` on virtual cables between namespaces.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use support::{Namespace, TUNGATE, file, skipped, text, wait_until};
use tungate_prefilter::kernel::{Kernel, Options, Wanted};

/// A host and a neighbour, joined by a cable that is `veth0` here.
struct Cable {
    host: Namespace,
    neighbour: Namespace,
}

impl Cable {
    /// `None` without rights to load BPF.
    fn new() -> Option<Self> {
        if skipped(&["ping"]) {
            return None;
        }
        let (host, neighbour) = (Namespace::new(), Namespace::new());
        for namespace in [&host, &neighbour] {
            // Only what a test sends is to be counted.
            namespace.enter(|| fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap());
        }
        host.ip(&format!(
            "link add veth0 address 02:00:00:00:00:01 type veth peer name far address 02:00:00:00:00:02 netns {}",
            neighbour.pid()
        ));
        for (namespace, device, address, other, mac) in [
            (&host, "veth0", "10.77.0.1/24", "10.77.0.2", "02:00:00:00:00:02"),
            (
                &neighbour,
                "far",
                "10.77.0.2/24",
                "10.77.0.1",
                "02:00:00:00:00:01",
            ),
        ] {
            namespace.ip(&format!("address add {address} dev {device}"));
            namespace.ip(&format!("link set {device} up"));
            namespace.ip(&format!("neighbour add {other} lladdr {mac} dev {device}"));
        }
        let cable = Self { host, neighbour };
        let tried = cable.tungate("attach veth0");
        if [3, 7].contains(&tried.status.code().unwrap()) {
            println!("skipped: {}", text(&tried.stderr));
            return None;
        }
        assert!(tried.status.success(), "{}", text(&tried.stderr));
        cable.run("detach veth0");
        Some(cable)
    }

    fn tungate(&self, arguments: &str) -> Output {
        self.host.run(&format!("{TUNGATE} prefilter {arguments}"))
    }

    /// Runs a command that must succeed.
    fn run(&self, arguments: &str) -> String {
        let output = self.tungate(arguments);
        assert!(output.status.success(), "{arguments}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs a command that must fail with `code`, and returns what it says.
    fn fails(&self, arguments: &str, code: i32) -> String {
        let output = self.tungate(arguments);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{arguments}: {}",
            text(&output.stderr)
        );
        text(&output.stderr)
    }

    /// How many of three pings are answered.
    fn answered(&self) -> usize {
        let output = self.host.run("ping -c 3 -i 0.05 -W 1 10.77.0.2");
        text(&output.stdout).matches("time=").count()
    }

    fn stats(&self) -> Value {
        serde_json::from_str(&self.run("stats veth0 --json")).unwrap()
    }

    fn has_program(&self) -> bool {
        self.host.ip("link show dev veth0").contains("xdp")
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        let _ = self.tungate("detach veth0"); // the interface's end would do, but for the files
    }
}

#[test]
fn the_readme_shows_what_happens() {
    let Some(cable) = Cable::new() else { return };
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md")).unwrap();
    let (_, section) = readme.split_once("\n## Drops before the appliance\n").unwrap();
    let (_, block) = section.split_once("```console\n").unwrap();
    let (block, _) = block.split_once("```").unwrap();
    let path = format!(
        "{}:{}",
        Path::new(TUNGATE).parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let mut shown = String::new();
    for line in block.lines().filter_map(|line| line.strip_prefix("# ")) {
        let mut shell: Command = cable.host.command("sh");
        let output = shell.args(["-c", line]).env("PATH", &path).output().unwrap();
        shown.push_str(&format!(
            "# {line}\n{}{}",
            text(&output.stdout),
            text(&output.stderr)
        ));
    }
    assert_eq!(shown, block);
    assert!(!cable.has_program());
}

#[test]
fn a_prefix_with_a_time_lets_traffic_pass_again_when_it_is_over() {
    let Some(cable) = Cable::new() else { return };
    cable.run("attach veth0");
    cable.run("add veth0 10.77.0.2 --ttl 2s");
    assert_eq!(cable.answered(), 0);
    wait_until(|| cable.answered() == 3);
    assert!(cable.run("status veth0").contains("entries  0"));
}

#[test]
fn a_list_file_is_loaded_as_a_whole_and_counts_stay_with_its_entries() {
    let Some(cable) = Cable::new() else { return };
    let directory = tempfile::tempdir().unwrap();
    let lines: String = (0..100_000u32)
        .map(|number| format!("deny {}\n", std::net::Ipv4Addr::from(0x0b00_0000 + number * 7)))
        .collect();
    let list = file(directory.path(), "list", &format!("{lines}deny 10.77.0.2 icmp\n"));
    cable.run("attach veth0");
    cable.run("add veth0 deny 10.77.0.2 icmp");
    assert_eq!(cable.answered(), 0);
    assert!(
        cable
            .run(&format!("load veth0 {list}"))
            .starts_with("veth0: 100001 entries loaded")
    );
    assert_eq!(cable.answered(), 0);
    let stats = cable.stats();
    assert_eq!(stats["rules"][0]["rule"], "deny 10.77.0.2/32 icmp");
    assert_eq!(stats["reasons"]["list-source"]["packets"], 6);
    // Entries from 65,536 on have no counter of their own; the three from before the change are still known.
    assert_eq!(stats["rules"][0]["packets"], 3);

    let wrong = file(directory.path(), "wrong", "deny 192.0.2.0/24\ndeny 192.0.2.300\n");
    let message = cable.fails(&format!("load veth0 {wrong}"), 1);
    assert!(message.contains("wrong:2:6"), "{message}");
    assert!(
        cable.run("status veth0").contains("entries  100001"),
        "the lists stay as they were"
    );
}

#[test]
fn failures_have_codes_and_say_the_way_out() {
    let Some(cable) = Cable::new() else { return };
    assert!(
        cable
            .fails("add veth0 192.0.2.1", 6)
            .contains("prefilter attach veth0")
    );
    assert!(cable.fails("detach veth0", 6).contains("prefilter status"));
    assert!(cable.fails("attach veth7", 4).contains("`ip link` lists"));
    cable.run("attach veth0");
    assert!(cable.fails("attach veth0", 5).contains("prefilter detach veth0"));
    assert!(cable.fails("remove veth0 192.0.2.1", 8).contains("--entries"));
    assert!(cable.fails("add veth0 192.0.2.300", 1).contains("192.0.2.300"));
    cable.fails("add veth0", 2);

    let mut ordinary = cable.host.command("setpriv");
    let ordinary = ordinary.args([
        "--reuid=65534",
        "--clear-groups",
        TUNGATE,
        "prefilter",
        "detach",
        "veth0",
    ]);
    let ordinary = ordinary.output().unwrap();
    assert_eq!(ordinary.status.code(), Some(3), "{}", text(&ordinary.stderr));
    assert!(text(&ordinary.stderr).contains("hint: run as root"));
    assert!(cable.has_program());
}

#[test]
fn a_program_of_others_is_left_alone() {
    let Some(cable) = Cable::new() else { return };
    let other = cable.host.enter(|| {
        let mut other = Kernel::new(Options::default()).unwrap();
        other.attach("veth0", Wanted::Best).unwrap();
        other
    });
    let message = cable.fails("attach veth0", 5);
    assert!(message.contains("`ip link show dev veth0` names it"), "{message}");
    cable.fails("detach veth0", 6);
    assert!(cable.has_program());
    drop(other);
    cable.run("attach veth0");
    assert!(cable.run("status").starts_with("veth0: native XDP"));
    let elsewhere = cable.neighbour.run(&format!("{TUNGATE} prefilter status"));
    assert!(text(&elsewhere.stdout).contains("no interface of this network namespace"));
}

#[test]
fn a_command_in_mounts_of_its_own_leaves_the_program_attached() {
    let Some(cable) = Cable::new() else { return };
    // As `ip netns exec` does.
    let mut command = cable.host.command("unshare");
    let attached = command.args(["--mount", TUNGATE, "prefilter", "attach", "veth0"]);
    assert!(attached.status().unwrap().success());
    assert!(cable.has_program());
    cable.run("add veth0 10.77.0.2");
    assert_eq!(cable.answered(), 0);
}

#[test]
fn a_loader_that_is_killed_leaves_nothing_attached_that_cannot_be_used() {
    let Some(cable) = Cable::new() else { return };
    for microseconds in [0, 5_000, 20_000, 60_000, 120_000] {
        let mut loader = cable.host.command(TUNGATE);
        let mut loader = loader.args(["prefilter", "attach", "veth0"]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_micros(microseconds)); // any moment will do
        let _ = loader.kill();
        loader.wait().unwrap();
        if cable.has_program() {
            // It was killed at its very end: all is in place.
            cable.run("detach veth0");
        }
        cable.run("attach veth0");
        cable.run("detach veth0");
        assert!(!cable.has_program());
    }
}
