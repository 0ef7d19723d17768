//! Replays of real captures against what tshark, tcpflow and an independent reader found in them.
//!
//! Every conversation that the oracle calls clean has to come out of the engine byte for byte, both ways. One that ends
//! in RST may lose what lay behind it.

use std::collections::HashMap;
use std::fmt::Arguments;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tungate_engine::{Protocol, Timestamp};
use tungate_sim::capture::Capture;
use tungate_sim::outcome::{Emitted, FlowRecord, PacketRecord, Sink, Stream};
use tungate_sim::replay::{self, Checksums, Options, Outcome};

/// The captures and their oracle; `None`, said aloud, where they are not at hand.
fn captures() -> Option<Vec<(PathBuf, Value)>> {
    let Some(folder) = std::env::var_os("TUNGATE_CAPTURES") else {
        println!("skipped: TUNGATE_CAPTURES names no folder of captures with an oracle");
        return None;
    };
    let folder = PathBuf::from(folder);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder.join("oracle")).expect("the oracle is there") {
        let path = entry.expect("a readable folder").path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let text = std::fs::read_to_string(&path).expect("a readable oracle");
            let oracle: Value = serde_json::from_str(&text).expect("the oracle is JSON");
            let name = oracle["capture"].as_str().expect("an oracle names its capture");
            found.push((folder.join(name), oracle));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(!found.is_empty(), "no oracle in {}", folder.display());
    Some(found)
}

#[derive(Default)]
struct Flows {
    tcp: HashMap<(String, String, u64), FlowRecord>,
    packets: u64,
    last: u64,
}

impl Sink for Flows {
    fn started(&mut self, _: u64) {}

    fn packet(&mut self, record: &PacketRecord) {
        assert_eq!(record.number, self.last + 1, "records come in file order");
        self.last = record.number;
        self.packets += 1;
    }

    fn flow(&mut self, record: FlowRecord) {
        if record.protocol == Protocol::Tcp {
            let key = (
                record.client.to_string(),
                record.target.to_string(),
                record.first_packet,
            );
            let before = self.tcp.insert(key, record);
            assert!(before.is_none(), "one record per flow");
        }
    }

    fn emitted(&mut self, _: &Emitted<'_>) {}

    fn line(&mut self, _: Timestamp, _: Arguments<'_>) {}

    fn wants_emitted(&self) -> bool {
        false
    }

    fn wants_lines(&self) -> bool {
        false
    }

    fn wants_packets(&self) -> bool {
        true
    }
}

fn replay(path: &Path, options: &Options) -> (Flows, Outcome) {
    let mut flows = Flows::default();
    let mut capture = Capture::open(path).expect("a capture");
    let outcome =
        replay::run(&mut capture, options, None, &mut flows, &mut |_| {}).expect("no journal to fail");
    (flows, outcome)
}

/// An endpoint as the oracle writes it, "address port".
fn endpoint(text: &Value) -> String {
    let (address, port) = text
        .as_str()
        .and_then(|text| text.split_once(' '))
        .expect("address and port");
    let address = address.parse().expect("an address");
    std::net::SocketAddr::new(address, port.parse().expect("a port")).to_string()
}

fn unclean(conversation: &Value) -> Vec<&str> {
    let reasons = conversation["unclean"].as_array();
    reasons.into_iter().flatten().filter_map(Value::as_str).collect()
}

/// What is wrong with one direction of a conversation; `None` if nothing.
fn compare(stream: &Stream, oracle: &Value) -> Option<String> {
    let bytes = oracle["bytes"].as_u64().unwrap_or(0);
    let same = stream.bytes == bytes
        && (bytes == 0 || oracle["sha256"].as_str() == Some(stream.sha256.as_str()))
        && stream.missing == 0;
    (!same).then(|| {
        format!(
            "{} bytes, {} missing; the oracle has {bytes}",
            stream.bytes, stream.missing
        )
    })
}

/// Compares the conversations that `choose` picks. Returns how many there were, and what is wrong.
fn check(checksums: Checksums, choose: impl Fn(&Value) -> bool) -> Option<(u64, Vec<String>)> {
    let options = Options {
        checksums,
        ..Options::default()
    };
    let (mut compared, mut wrong, mut lost) = (0, Vec::new(), Vec::new());
    for (path, oracle) in captures()? {
        let conversations: Vec<&Value> = oracle["tcp"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|c| choose(c))
            .collect();
        if conversations.is_empty() {
            continue;
        }
        let (flows, _) = replay(&path, &options);
        for conversation in conversations {
            compared += 1;
            let first = conversation["first_packet"].as_u64().expect("a number");
            let (client, target) = (
                endpoint(&conversation["client"]),
                endpoint(&conversation["server"]),
            );
            let name = format!(
                "{}: {client} > {target} from packet {first}",
                path.file_name().unwrap_or_default().display()
            );
            let Some(flow) = flows.tcp.get(&(client, target, first)) else {
                wrong.push(format!("{name}: no such flow"));
                continue;
            };
            let ends_in_reset = conversation["end"]
                .as_str()
                .is_some_and(|end| end.contains("rst"));
            let up = compare(&flow.to_target, &conversation["c2s"]);
            let down = compare(&flow.to_client, &conversation["s2c"]);
            for (direction, stream, difference) in
                [("target", &flow.to_target, up), ("client", &flow.to_client, down)]
            {
                // What was under way to whoever resets a connection is lost.
                let is_lawful = ends_in_reset && flow.end == "rst" && stream.missing == 0;
                match difference {
                    Some(difference) if is_lawful => {
                        lost.push(format!("{name} to {direction}: {difference}"))
                    }
                    Some(difference) => wrong.push(format!(
                        "{name} to {direction}: {difference}; end {} {:?} {:?}",
                        flow.end, flow.reason, flow.anomalies
                    )),
                    None => {}
                }
            }
            if flow.exact != Some(true) {
                wrong.push(format!("{name}: not exact {:?} {:?}", flow.end, flow.anomalies));
            }
        }
    }
    println!("{compared} compared; resets cost: {lost:#?}");
    assert!(lost.len() <= 2, "resets cost more than they have to");
    Some((compared, wrong))
}

#[test]
fn clean_conversations_come_out_byte_for_byte() {
    let Some((compared, wrong)) = check(Checksums::Auto, |conversation| conversation["clean"] == true) else {
        return;
    };
    assert!(
        wrong.is_empty(),
        "{} of {compared}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(compared > 600, "only {compared} clean conversations");
}

#[test]
fn with_checksums_ignored_so_do_those_with_bad_ones() {
    let found = check(Checksums::Ignore, |conversation| {
        conversation["verdict"] == "agreed"
            && unclean(conversation) == ["bad-checksum"]
            && conversation["handshake"] == true
            && conversation.get("tunnel").is_none()
    });
    let Some((compared, wrong)) = found else { return };
    assert!(
        wrong.is_empty(),
        "{} of {compared}:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    assert!(compared > 100, "only {compared} such conversations");
}

#[test]
fn every_packet_is_accounted_for_and_the_number_of_threads_changes_nothing() {
    let Some(captures) = captures() else { return };
    for (path, oracle) in captures {
        let jobs = |jobs| Options {
            jobs: std::num::NonZeroUsize::new(jobs),
            ..Options::default()
        };
        let (flows, one) = replay(&path, &jobs(1));
        let (_, three) = replay(&path, &jobs(3));
        let name = path.display();
        assert_eq!(one.digest, three.digest, "{name}");
        let totals = &one.totals;
        assert_eq!(Some(totals.read), oracle["own"]["packets"].as_u64(), "{name}");
        assert_eq!(flows.packets, totals.read, "{name}");
        assert_eq!(
            totals.read,
            totals.judged + totals.unreadable + totals.not_ip,
            "{name}"
        );
        assert_eq!(totals.judged, totals.from_client + totals.from_target, "{name}");
        assert_eq!(totals.judged, totals.pass + totals.drop, "{name}");
        assert_eq!(one.by_reason.values().sum::<u64>(), totals.drop, "{name}");
        assert_eq!(oracle["own"]["file_cut"] == true, one.damaged.is_some(), "{name}");
    }
}
