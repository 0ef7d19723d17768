//! The captures that ship with the project and that its own tests make: they are what they are made from, and a replay
//! finds in them what was put in.
//!
//! `MAKE_CAPTURES=1 cargo test -p tungate-tests --test made` writes them anew.

use std::fs;
use std::path::Path;

use tungate_tests::made;
use tungate_tests::script::Played;

fn made(wanted: &str) -> Played {
    let mut captures = made::captures().into_iter();
    let (_, script) = captures.find(|(name, _)| *name == wanted).expect("it is made");
    script.replay()
}

/// How many flows have ended in which way, by protocol.
fn ends(played: &Played) -> Vec<(String, usize)> {
    let mut names: Vec<_> = played
        .flows
        .iter()
        .map(|flow| format!("{} {}", flow.protocol, flow.end))
        .collect();
    names.sort();
    let groups = names.chunk_by(|one, other| one == other);
    groups.map(|group| (group[0].clone(), group.len())).collect()
}

#[test]
fn shipped_captures_are_what_they_are_made_from() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../captures");
    for (name, script) in made::captures() {
        let path = folder.join(name);
        if std::env::var_os("MAKE_CAPTURES").is_some() {
            fs::write(&path, script.pcap()).expect("it can be written");
        }
        let shipped = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(
            shipped == script.pcap(),
            "{name} differs from what it is made from: MAKE_CAPTURES=1 writes it anew"
        );
    }
}

#[test]
fn the_office_is_replayed_as_it_was_written() {
    let played = made("made-office.pcap");
    let expected = [
        ("icmp idle", 1),
        ("tcp fin", 2),
        ("tcp open", 1),
        ("tcp refused", 13),
        ("tcp rst", 1),
        ("tcp unreachable", 1),
        ("udp idle", 1),
    ];
    let expected = expected.map(|(name, count)| (name.to_owned(), count));
    let alive: Vec<_> = ends(&played)
        .into_iter()
        .map(|(name, count)| {
            (
                name.replace("icmp open", "icmp idle")
                    .replace("udp open", "udp idle"),
                count,
            )
        })
        .collect();
    assert_eq!(alive, expected);
    let totals = &played.outcome().totals;
    assert_eq!(
        (totals.drop, totals.fidelity_flows, totals.fidelity_exact),
        (0, 3, 3)
    );
    let names: Vec<_> = played
        .flows
        .iter()
        .filter_map(|flow| flow.name.as_deref())
        .collect();
    assert_eq!(names, ["www.example", "www.example"]);
}

#[test]
fn the_lossy_link_has_lost_repeated_and_reordered_and_no_byte_is_missing() {
    let played = made("made-lossy-link.pcap");
    let flow = played.flow();
    let lengths = (
        flow.to_target.bytes,
        flow.to_client.bytes,
        flow.to_target.missing + flow.to_client.missing,
    );
    assert_eq!(
        (lengths, flow.end, flow.exact),
        ((20_000, 30_000, 0), "fin", Some(true))
    );
    for anomaly in ["out-of-order", "retransmission"] {
        assert!(
            flow.anomalies.contains(&anomaly),
            "no {anomaly}: {:?}",
            flow.anomalies
        );
    }
}

#[test]
fn offload_is_repaired() {
    let played = made("made-offload.pcap");
    let flow = played.flow();
    assert_eq!(
        (flow.to_target.bytes, flow.to_client.bytes, flow.exact),
        (40_000, 40_000, Some(true))
    );
    assert_eq!(played.outcome().totals.repaired_checksums, 2);
    assert_eq!(played.outcome().totals.drop, 0);
}
