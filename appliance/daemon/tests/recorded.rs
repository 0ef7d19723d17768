//! Live runs that were recorded, by tcpdump on the device or by the appliance itself, come out the same when replayed.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::programs::name_server;
use support::web::Web;
use support::{Background, Lab, SERVER, SERVER6, file, skipped, text, wait_until};
use tungate_engine::dns::Learned;
use tungate_engine::io::{PacketOut, UpstreamCommand};
use tungate_engine::journal::Decoder;
use tungate_engine::{Engine, Event, FlowId, PacketIn, Policy, ShardId, Timestamp, World};
use tungate_sim::capture::Capture;
use tungate_sim::outcome::{Emitted, FlowRecord, PacketRecord, Sink};
use tungate_sim::replay;

const POLICY: &str = "[lists]\nentries = [\"deny 203.0.113.0/24\"]\n\
                      [[rule]]\nname = \"no telnet\"\nprotocols = [\"tcp\"]\nports = [23]\naction = \"reject\"\n\
                      [[rule]]\nname = \"moved\"\ntargets = [\"198.51.100.7\"]\nprotocols = [\"tcp\"]\n\
                      action = \"redirect\"\nto = \"192.0.2.7:80\"\n";

/// Something of everything: transfers both ways, names, pings, refusals and denials.
fn make_traffic(lab: &Lab) {
    let web = Web::start(&lab.server);
    let _dnsmasq = name_server(lab, "192.0.2.8");
    web.publish("original", 3_000_001);
    let original = web.path().join("original").display().to_string();
    for (line, code) in [
        ("dig +short +time=20 +tries=1 @192.0.2.8 www.example.test A", 0),
        (
            "dig +short +time=20 +tries=1 +tcp @192.0.2.8 www.example.test A",
            0,
        ),
        ("curl -sS -f -m 60 -o /dev/null http://192.0.2.7/original", 0),
        (
            &format!("curl -sS -f -m 60 -T {original} http://[2001:db8::7]/uploaded"),
            0,
        ),
        ("curl -sS -f -m 60 -k -o /dev/null https://192.0.2.7/original", 0),
        ("curl -sS -f -m 60 -o /dev/null http://198.51.100.7/original", 0),
        ("curl -sS -m 60 http://192.0.2.7:81/", 7),
        ("curl -sS -m 60 http://192.0.2.7:23/", 7),
        ("curl -sS -m 1 http://203.0.113.7/", 28),
    ] {
        let output = lab.host.run(line);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{line}: {}",
            text(&output.stderr)
        );
    }
    for target in [SERVER, SERVER6] {
        let output = lab
            .host
            .run(&format!("ping -n -c 3 -i 0.1 -W 10 -s 2000 {target}"));
        assert!(output.status.success(), "{}", text(&output.stdout));
    }
}

/// Ended flows of a log: what each was, and what became of it.
fn flows_of(log: &str) -> Vec<Value> {
    let lines = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap_or_default());
    lines.filter(|line| line["message"] == "flow ended").collect()
}

fn string(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[derive(Default)]
struct Flows(Vec<FlowRecord>);

impl Sink for Flows {
    fn started(&mut self, _: u64) {}

    fn packet(&mut self, _: &PacketRecord) {}

    fn emitted(&mut self, _: &Emitted<'_>) {}

    fn line(&mut self, _: Timestamp, _: std::fmt::Arguments<'_>) {}

    fn wants_emitted(&self) -> bool {
        false
    }

    fn wants_lines(&self) -> bool {
        false
    }

    fn wants_packets(&self) -> bool {
        false
    }

    fn flow(&mut self, flow: FlowRecord) {
        self.0.push(flow);
    }
}

#[test]
fn a_capture_of_the_device_replays_to_the_same_verdicts_and_bytes() {
    let programs = ["tcpdump", "dig", "dnsmasq", "ping", "nginx", "openssl", "curl"];
    if skipped(&programs) {
        return;
    }
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let configuration = file(directory.path(), "tungate.toml", POLICY);
    let appliance = lab.appliance(&["-c", &configuration]);
    let capture = directory.path().join("capture.pcap");
    let said = directory.path().join("tcpdump.log");
    let mut tcpdump = lab.host.command("tcpdump");
    tcpdump
        .args("-i tungate0 -n -U --immediate-mode -B 65536 -Z root -w".split(' '))
        .arg(&capture)
        .stderr(std::fs::File::create(&said).unwrap());
    let mut tcpdump = Background(tcpdump.spawn().unwrap());
    let said = || std::fs::read_to_string(&said).unwrap();
    wait_until(|| said().contains("listening on"));
    make_traffic(&lab);
    let log = appliance.log.clone();
    // Mappings and pings end only now.
    appliance.stop();
    kill(Pid::from_raw(tcpdump.0.id() as i32), Signal::SIGINT).unwrap();
    tcpdump.0.wait().unwrap();
    assert!(said().contains("\n0 packets dropped by kernel"), "{}", said());

    let loaded = tungate_config::load(Path::new(&configuration), &mut |_| ()).unwrap();
    let options = replay::Options {
        policy: Arc::new(Policy::new(loaded.policy)),
        config: loaded.engine,
        ..replay::Options::default()
    };
    let mut replayed = Flows::default();
    let outcome = replay::run(
        &mut Capture::open(&capture).unwrap(),
        &options,
        None,
        &mut replayed,
        &mut |_| (),
    )
    .unwrap();
    assert_eq!(
        (&outcome.damaged, outcome.totals.parity_disagreements),
        (&None, 0)
    );

    let live: BTreeSet<_> = flows_of(&log.all())
        .iter()
        .map(|flow| {
            let bytes = |key: &str| flow[key].as_u64().unwrap();
            (
                string(&flow["protocol"]),
                string(&flow["client"]),
                string(&flow["target"]),
                string(&flow["egress"]),
                string(&flow["rule"]),
                string(&flow["name"]),
                bytes("to_upstream"),
                bytes("to_client"),
            )
        })
        .collect();
    let denied = |flow: &&FlowRecord| ["reject", "drop"].contains(&flow.verdict);
    let relayed: BTreeSet<_> = replayed
        .0
        .iter()
        .filter(|flow| !denied(flow) && flow.verdict != "none")
        .map(|flow| {
            (
                flow.protocol.to_string(),
                flow.client.to_string(),
                flow.target.to_string(),
                flow.verdict.to_owned(),
                flow.rule.clone().unwrap(),
                flow.name.clone().unwrap_or_default(),
                flow.to_target.bytes,
                flow.to_client.bytes,
            )
        })
        .collect();
    assert_eq!(relayed, live);
    assert!(live.len() >= 9, "{live:?}");
    let lines = log.all();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap_or_default());
    let live: BTreeSet<_> = lines
        .filter(|line| line["message"] == "flow denied")
        .map(|line| {
            (
                string(&line["target"]),
                string(&line["rule"]),
                string(&line["reason"]),
            )
        })
        .collect();
    let replayed: BTreeSet<_> = replayed
        .0
        .iter()
        .filter(denied)
        .map(|flow| {
            (
                flow.target.to_string(),
                flow.rule.clone().unwrap(),
                flow.reason.unwrap().to_owned(),
            )
        })
        .collect();
    assert_eq!(replayed, live);
    assert_eq!(live.len(), 2);
}

/// Protocol, client and target.
type Ends = (String, String, String);

/// Hears which flows engines open and close.
#[derive(Default)]
struct Listener {
    buffer: Vec<u8>,
    opened: BTreeMap<FlowId, Ends>,
    closed: BTreeSet<(FlowId, Ends, String, u64, u64)>,
    names: BTreeMap<FlowId, String>,
}

impl World for Listener {
    fn has_room(&self) -> bool {
        true
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.buffer.resize(len, 0);
        &mut self.buffer
    }

    fn send_packet(&mut self, _: PacketOut) {}

    fn upstream(&mut self, _: FlowId, _: UpstreamCommand<'_>) {}

    fn event(&mut self, event: &Event) {
        match event {
            Event::Opened {
                flow,
                protocol,
                client,
                target,
                ..
            } => {
                let what = (protocol.to_string(), client.to_string(), target.to_string());
                self.opened.insert(*flow, what);
            }
            Event::Closed {
                flow,
                reason,
                to_upstream,
                to_client,
            } => {
                let what = self.opened.remove(flow).unwrap();
                self.closed
                    .insert((*flow, what, reason.name().to_owned(), *to_upstream, *to_client));
            }
            Event::Named { flow, name, .. } => {
                self.names.insert(*flow, name.clone());
            }
            Event::Dropped { .. } | Event::Established { .. } => {}
        }
    }

    fn forward(&mut self, _: ShardId, _: PacketIn<'_>) {}

    fn learned(&mut self, _: &Learned) {}
}

#[test]
fn a_journal_of_a_run_repeats_it() {
    let programs = ["dig", "dnsmasq", "ping", "nginx", "openssl", "curl"];
    if skipped(&programs) {
        return;
    }
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let configuration = file(directory.path(), "tungate.toml", POLICY);
    let journal = directory.path().join("it.journal");
    let appliance = lab.appliance(&["-c", &configuration, "--journal", journal.to_str().unwrap()]);
    make_traffic(&lab);
    let log = appliance.log.clone();
    appliance.stop();

    let repeat = || replay::repeat(&mut BufReader::new(std::fs::File::open(&journal).unwrap())).unwrap();
    let (first, second) = (repeat(), repeat());
    assert_eq!((&first.damaged, &first.digest), (&None, &second.digest));

    // What the engines say the second time is what the log says of the first.
    let mut decoder = Decoder::new();
    decoder.push(&std::fs::read(&journal).unwrap());
    let header = decoder.header().unwrap().unwrap().clone();
    let policy = Arc::new(Policy::new(header.policy.clone()));
    let mut engines: Vec<Engine> = (0..header.config.shards)
        .map(|shard| header.engine(ShardId(shard), Arc::clone(&policy)))
        .collect();
    let mut listener = Listener::default();
    while let Some(entry) = decoder.next_entry().unwrap() {
        entry.apply(&mut engines[usize::from(entry.shard.0)], &mut listener, |_, _| ());
    }
    let live = flows_of(&log.all());
    let expected: BTreeSet<_> = live
        .iter()
        .map(|flow| {
            (
                string(&flow["flow"]),
                (
                    string(&flow["protocol"]),
                    string(&flow["client"]),
                    string(&flow["target"]),
                ),
                string(&flow["end"]),
                flow["to_upstream"].as_u64().unwrap(),
                flow["to_client"].as_u64().unwrap(),
            )
        })
        .collect();
    let repeated: BTreeSet<_> = listener
        .closed
        .into_iter()
        .map(|(flow, what, end, up, down)| (flow.to_string(), what, end, up, down))
        .collect();
    assert_eq!(repeated, expected);
    let named = live.iter().filter(|flow| !flow["name"].is_null());
    assert!(named.clone().count() >= 1);
    let names: BTreeSet<_> = listener
        .names
        .into_iter()
        .map(|(flow, name)| (flow.to_string(), name))
        .collect();
    let expected: BTreeSet<_> = named
        .map(|flow| (string(&flow["flow"]), string(&flow["name"])))
        .collect();
    assert_eq!(names, expected);
}
