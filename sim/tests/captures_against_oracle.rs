//! Reads real captures and compares with what an independent reader found in them.
//!
//! The directory named by `TUNGATE_CAPTURES` holds captures and, in `oracle/`, one JSON file for each.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tungate_sim::capture::link::{self, LinkView, Payload};
use tungate_sim::capture::{ByteOrder, Capture, FileKind};

const ARP: LinkView = LinkView::NotIp(Payload::EtherType(0x0806));

/// What reading a capture to its end gives.
#[derive(Default)]
struct Findings {
    packets: u64,
    ip: u64,
    arp: u64,
    other: u64,
    unreadable: u64,
    cut_by_snap_length: u64,
    damage: Option<String>,
}

#[test]
fn real_captures_are_read_as_an_independent_reader_reads_them() {
    let Some(directory) = env::var_os("TUNGATE_CAPTURES").map(PathBuf::from) else {
        println!("skipped: TUNGATE_CAPTURES is not set");
        return;
    };
    let mut compared = 0;
    for entry in fs::read_dir(directory.join("oracle")).expect("the captures have an oracle directory") {
        let path = entry.expect("the oracle directory can be listed").path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let name = path.file_stem().expect("an oracle file has a name");
            let oracle: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            compare(&directory.join(name), &oracle["own"]);
            compared += 1;
        }
    }
    assert!(compared > 0, "no oracle files in {}", directory.display());
    println!("{compared} captures compared");
}

fn compare(path: &Path, oracle: &Value) {
    let name = path.display();
    let mut capture = Capture::open(path).unwrap_or_else(|error| panic!("{error}"));
    let found = read(&mut capture);

    let format = capture.format();
    let (kind, nanoseconds) = match format.kind {
        FileKind::Pcap => ("pcap", false),
        FileKind::PcapNanoseconds => ("pcap", true),
        FileKind::PcapModified => ("modified pcap", false),
        FileKind::Pcapng => ("pcapng", false),
    };
    let byte_order = match format.byte_order {
        ByteOrder::Little => "little",
        ByteOrder::Big => "big",
    };
    assert_eq!(oracle["format"], kind, "{name}: format");
    assert_eq!(oracle["nanosecond"], nanoseconds, "{name}: nanoseconds");
    assert_eq!(oracle["endian"], byte_order, "{name}: byte order");
    assert_eq!(oracle["gzip"], format.gzip, "{name}: gzip");
    let link_types: Vec<u16> = capture
        .interfaces()
        .iter()
        .map(|interface| interface.link_type.0)
        .collect();
    assert_eq!(oracle["linktypes"], Value::from(link_types), "{name}: link types");

    assert_eq!(oracle["packets"], found.packets, "{name}: packets");
    assert_eq!(
        oracle["file_cut"],
        found.damage.is_some(),
        "{name}: {:?}",
        found.damage
    );
    let stat = |key: &str| oracle["stats"][key].as_u64().unwrap_or(0);
    assert_eq!(stat("ip"), found.ip, "{name}: IP packets");
    assert_eq!(stat("arp"), found.arp, "{name}: ARP packets");
    assert_eq!(
        stat("snap_truncated"),
        found.cut_by_snap_length,
        "{name}: packets cut by the snap length"
    );
    assert_eq!(
        found.packets,
        found.ip + found.arp + found.other + found.unreadable,
        "{name}: every packet is counted once"
    );

    let size = fs::metadata(path).expect("the capture was opened").len();
    assert_eq!(capture.size(), Some(size), "{name}: size");
    if found.damage.is_none() {
        assert_eq!(capture.position(), size, "{name}: position at the end");
    }
}

fn read(capture: &mut Capture) -> Findings {
    let mut found = Findings::default();
    loop {
        match capture.next_record() {
            Ok(Some(record)) => {
                found.packets += 1;
                assert_eq!(record.number, found.packets);
                if (record.bytes.len() as u64) < u64::from(record.original_length) {
                    found.cut_by_snap_length += 1;
                }
                match link::ip_of(record.link_type, record.bytes) {
                    LinkView::Ip(_) => found.ip += 1,
                    ARP => found.arp += 1,
                    LinkView::NotIp(_) => found.other += 1,
                    LinkView::Unreadable(_) => found.unreadable += 1,
                }
            }
            Ok(None) => return found,
            Err(damage) => {
                assert_eq!(damage.after_packet, found.packets);
                found.damage = Some(damage.what);
            }
        }
    }
}
