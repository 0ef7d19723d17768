//! The pre-filter of a running appliance: the same verdicts with and without it, whatever changes meanwhile.

mod support;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;

use nix::sys::signal::Signal;
use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};
use support::{Appliance, Lab, Namespace, TUNGATE, file, skipped, text, wait_until};

/// What the appliance's lists say.
const LISTS: &str = "[lists]\nentries = [\"deny 192.0.2.7\", \"deny 192.0.2.8 udp 53\", \"deny 10.88.0.3\", \
                     \"deny 198.51.100.0/24\", \"allow 198.51.100.7\"]\n";
const PREFILTER: &str = "[prefilter]\ninterfaces = [\"clients\"]\nrequired = true\n";

/// A client behind a gateway, which has the interface `clients` to it.
struct Site {
    lab: Lab,
    client: Namespace,
    directory: tempfile::TempDir,
}

impl Site {
    /// `None` where BPF cannot be loaded.
    fn new() -> Option<Self> {
        if skipped(&["ping"]) {
            return None;
        }
        let (lab, client) = (Lab::new(), Namespace::new());
        lab.host.ip(&format!(
            "link add clients address 02:00:00:00:00:01 type veth peer name gateway address 02:00:00:00:00:02 netns {}",
            client.pid()
        ));
        for (namespace, line) in [
            (&lab.host, "address add 10.88.0.1/24 dev clients"),
            (&lab.host, "link set clients up"),
            (&client, "address add 10.88.0.2/24 dev gateway"),
            (&client, "address add 10.88.0.3/24 dev gateway"),
            (&client, "link set gateway up"),
            (&client, "route add default via 10.88.0.1"),
            (
                &client,
                "neighbour add 10.88.0.1 lladdr 02:00:00:00:00:01 dev gateway",
            ),
            (
                &lab.host,
                "neighbour add 10.88.0.2 lladdr 02:00:00:00:00:02 dev clients",
            ),
        ] {
            namespace.ip(line);
        }
        let tried = lab.host.run(&format!("{TUNGATE} prefilter attach clients"));
        if [3, 7].contains(&tried.status.code().unwrap()) {
            println!("skipped: {}", text(&tried.stderr));
            return None;
        }
        assert!(tried.status.success(), "{}", text(&tried.stderr));
        let site = Self {
            lab,
            client,
            directory: tempfile::tempdir().unwrap(),
        };
        site.run("prefilter detach clients");
        Some(site)
    }

    /// Writes the configuration, and returns its path.
    fn configure(&self, content: &str) -> String {
        file(self.directory.path(), "tungate.toml", content)
    }

    fn start(&self, content: &str) -> Appliance {
        let configuration = self.configure(content);
        self.lab.appliance(&["-c", &configuration, "--from", "clients"])
    }

    /// Runs a command that must succeed.
    fn run(&self, arguments: &str) -> String {
        let output = self.lab.host.run(&format!("{TUNGATE} {arguments}"));
        assert!(output.status.success(), "{arguments}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn counters(&self) -> Value {
        serde_json::from_str(&self.run("counters --json")).unwrap()
    }

    /// What entries have dropped.
    fn by_rule(&self) -> BTreeMap<String, u64> {
        serde_json::from_value(self.counters()["dropped_by_rule"].clone()).unwrap()
    }

    fn has_program(&self) -> bool {
        self.lab.host.ip("link show dev clients").contains("xdp")
    }

    /// How many of `count` pings are answered.
    fn answered(&self, target: &str, count: usize) -> usize {
        let output = self.client.run(&format!("ping -c {count} -i 0.05 -W 1 {target}"));
        text(&output.stdout).matches("time=").count()
    }

    fn send(&self, from: &str, target: &str, count: usize) {
        let socket = self.client.udp(from);
        for _ in 0..count {
            socket.send_to(b"datagram", target).unwrap();
        }
    }

    /// Begins a connection, and gives it up: one SYN.
    fn knock(&self, target: &str) {
        self.client.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_nonblocking(true).unwrap();
            let begun = socket.connect(&SockAddr::from(target.parse::<SocketAddr>().unwrap()));
            assert_eq!(begun.unwrap_err().raw_os_error(), Some(libc::EINPROGRESS));
        });
    }
}

/// What became of the same traffic.
#[derive(Debug, PartialEq)]
struct Outcome {
    by_rule: BTreeMap<String, u64>,
    by_reason: Value,
    /// Protocol, target, rule, and bytes each way, of each flow.
    flows: Vec<String>,
    by_prefilter: bool,
}

fn outcome(site: &Site, configuration: &str) -> Outcome {
    let appliance = site.start(configuration);
    let echo = site.lab.server.udp("192.0.2.9:1000");
    let listener = site.lab.server.listen("192.0.2.9:80");
    // Denied by target, also of some protocols and ports alone, by source, and with a hole.
    site.send("10.88.0.2:0", "192.0.2.7:1000", 5);
    site.knock("192.0.2.7:80");
    assert_eq!(site.answered("192.0.2.7", 3), 0);
    site.send("10.88.0.2:0", "192.0.2.8:53", 4);
    site.send("10.88.0.3:0", "192.0.2.9:1000", 6);
    site.send("10.88.0.2:0", "198.51.100.9:9", 2);
    // Let through.
    assert_eq!(site.answered("192.0.2.8", 3), 3);
    let client = site.client.udp("10.88.0.2:0");
    client.send_to(b"question", "192.0.2.9:1000").unwrap();
    let (len, from) = echo.recv_from(&mut [0; 64]).unwrap();
    echo.send_to(&vec![1; len], from).unwrap();
    assert_eq!(client.recv(&mut [0; 64]).unwrap(), 8);
    let mut stream = site.client.connect("192.0.2.9:80").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    stream.write_all(&[7; 100_000]).unwrap();
    server.read_exact(&mut vec![0; 100_000]).unwrap();
    server.write_all(b"thanks").unwrap();
    stream.read_exact(&mut [0; 6]).unwrap();
    drop((stream, server));

    let ended = |flow: &Value| flow["message"] == "flow ended" && flow["protocol"] == "tcp";
    appliance.log.wait(ended);
    let counters = site.counters();
    let log = appliance.log.clone();
    appliance.stop();
    let flows = log.all();
    let mut flows: Vec<_> = flows
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["message"] == "flow ended")
        .map(|line| {
            let fields = ["protocol", "target", "rule", "to_upstream", "to_client"];
            fields.map(|field| line[field].to_string()).join(" ")
        })
        .collect();
    flows.sort();
    let dropped = counters["dropped_by_prefilter"].as_u64().unwrap();
    let by_rule: BTreeMap<String, u64> = serde_json::from_value(counters["dropped_by_rule"].clone()).unwrap();
    assert!(
        dropped == 0 || dropped == by_rule.values().sum::<u64>(),
        "{counters}"
    );
    Outcome {
        by_rule,
        by_reason: counters["dropped"].clone(),
        flows,
        by_prefilter: dropped > 0,
    }
}

#[test]
fn the_same_traffic_meets_the_same_with_and_without_it() {
    let Some(site) = Site::new() else { return };
    let expected: BTreeMap<String, u64> = [
        ("deny 192.0.2.7/32", 5 + 1 + 3),
        ("deny 192.0.2.8/32 udp 53", 4),
        ("deny 10.88.0.3/32", 6),
        ("deny 198.51.100.0/24", 2),
    ]
    .map(|(entry, packets)| (entry.to_owned(), packets))
    .into();
    let without = outcome(&site, LISTS);
    assert_eq!((&without.by_rule, without.by_prefilter), (&expected, false));
    assert_eq!(without.by_reason["list-source"], 6);
    let with = outcome(&site, &format!("{LISTS}{PREFILTER}"));
    assert!(with.by_prefilter);
    assert_eq!(with.flows.len(), 3, "{:?}", with.flows);
    assert_eq!(
        Outcome {
            by_prefilter: false,
            ..with
        },
        without
    );
    assert!(!site.has_program(), "it goes with the appliance");
}

#[test]
fn changes_are_in_force_in_both_when_they_are_answered() {
    let Some(site) = Site::new() else { return };
    let appliance = site.start(PREFILTER);
    assert!(site.has_program());
    let line = appliance.log.wait(|line| {
        line["message"]
            .as_str()
            .is_some_and(|line| line.starts_with("pre-filter on"))
    });
    assert_eq!(line["message"], "pre-filter on clients: native XDP");
    assert_eq!(site.answered("192.0.2.7", 2), 2);
    let listener = site.lab.server.listen("192.0.2.7:80");
    let _stream = site.client.connect("192.0.2.7:80").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(support::PATIENCE)).unwrap();

    site.run("list add 192.0.2.7");
    // An established flow ends, though the pre-filter lets none of its packets come any more.
    assert_eq!(
        server.read(&mut [0; 8]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    let ended = appliance.log.flow_to("192.0.2.7:80");
    assert_eq!(ended["detail"], "deny 192.0.2.7/32");
    assert_eq!(site.answered("192.0.2.7", 3), 0);
    let counters = site.counters();
    assert!(
        counters["dropped_by_prefilter"].as_u64().unwrap() >= 3,
        "{counters}"
    );
    assert_eq!(
        counters["dropped_by_prefilter"],
        counters["dropped_by_rule"]["deny 192.0.2.7/32"]
    );

    // Counts outlive their entry, one of many that change at once, and a reload.
    let list = file(
        site.directory.path(),
        "list.txt",
        "deny 192.0.2.8\nallow 192.0.2.8 icmp\n",
    );
    let counted = site.by_rule()["deny 192.0.2.7/32"];
    site.run(&format!("list load {list}"));
    assert_eq!(site.answered("192.0.2.7", 2), 2);
    assert_eq!(site.answered("192.0.2.8", 2), 2);
    site.send("10.88.0.2:0", "192.0.2.8:9", 4);
    wait_until(|| site.by_rule().get("deny 192.0.2.8/32") == Some(&4));
    assert!(site.by_rule()["deny 192.0.2.7/32"] >= counted);
    site.configure(&format!("[lists]\nentries = [\"deny 192.0.2.9\"]\n{PREFILTER}"));
    site.run("reload");
    site.send("10.88.0.2:0", "192.0.2.9:9", 2);
    site.send("10.88.0.2:0", "192.0.2.8:9", 1);
    wait_until(|| site.by_rule().get("deny 192.0.2.8/32") == Some(&5));
    assert_eq!(site.by_rule()["deny 192.0.2.9/32"], 2);
    let counters = site.counters();
    let dropped: u64 = site.by_rule().values().sum();
    assert_eq!(counters["dropped_by_prefilter"], dropped);

    // An entry with a time goes by itself in both.
    site.run("list add --ttl 2s 192.0.2.7");
    assert_eq!(site.answered("192.0.2.7", 1), 0);
    wait_until(|| site.answered("192.0.2.7", 1) == 1);
    site.run("list remove 192.0.2.8");
    site.run("list remove 192.0.2.9");
    assert_eq!(site.answered("192.0.2.9", 2), 2);
    appliance.stop();
    assert!(!site.has_program());
}

#[test]
fn a_crash_leaves_none() {
    let Some(site) = Site::new() else { return };
    let mut appliance = site.start(PREFILTER);
    assert!(site.has_program());
    appliance.signal(Signal::SIGKILL);
    appliance.process.wait().unwrap();
    wait_until(|| !site.has_program());
    site.run("cleanup");
}

#[test]
fn without_it_the_appliance_runs_on_unless_it_is_required() {
    let Some(site) = Site::new() else { return };
    let before = site.lab.host.state();
    let absent = "[prefilter]\ninterfaces = [\"absent0\"]\n";
    let appliance = site.start(&format!("{absent}{LISTS}"));
    let line = appliance.log.wait(|line| line["level"] == "WARN");
    let message = line["message"].as_str().unwrap();
    assert!(
        message.contains("userspace") && message.contains("\"absent0\""),
        "{message}"
    );
    assert_eq!(site.answered("192.0.2.7", 1), 0);
    assert_eq!(site.counters()["dropped_by_prefilter"], 0);
    appliance.stop();

    // Somebody else's program is left alone.
    site.run("prefilter attach clients");
    let configuration = site.configure(&format!("{PREFILTER}{LISTS}"));
    let arguments = format!("run -c {configuration} --from clients");
    let output = site.lab.host.run(&format!("{TUNGATE} {arguments}"));
    assert!(!output.status.success());
    let said = text(&output.stderr);
    assert!(
        said.contains("[prefilter] requires") && said.contains("another XDP program"),
        "{said}"
    );
    assert!(site.has_program());
    site.run("prefilter detach clients");
    assert_eq!(site.lab.host.state(), before);
}
