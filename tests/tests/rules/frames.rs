//! Rule 11: what the pre-filter is shown.

use std::sync::Arc;

use tungate_engine::Policy;
use tungate_engine::policy::{ListAction, ListEntry, ListProtocol, PolicySpec};
use tungate_sim::capture::LinkType;
use tungate_sim::outcome::{Path, Side};
use tungate_sim::replay::Options;
use tungate_tests::script::{Conversation, Played, Script};

/// A policy that denies the target.
fn denied() -> Options {
    let entry = ListEntry {
        action: ListAction::Deny,
        network: "192.0.2.7/32".parse().unwrap(),
        protocol: ListProtocol::Any,
        ports: None,
        expires: None,
    };
    Options {
        policy: Arc::new(Policy::new(PolicySpec {
            lists: vec![entry],
            ..PolicySpec::default()
        })),
        ..Options::default()
    }
}

/// Which path dropped a SYN captured with this link header; that both agree, and that its flow is told so.
fn path(link_type: LinkType, header: &[u8]) -> Path {
    let syn = Conversation::new("10.0.0.2:40000", "192.0.2.7:80").syn();
    let frame = [header, &syn.packet()].concat();
    let played: Played = Script::of(link_type).packet(frame).replay_with(&denied());
    let record = &played.packets[0];
    assert_eq!(
        (record.side, record.reason),
        (Side::Client, Some("list-destination"))
    );
    let totals = &played.outcome().totals;
    assert_eq!((totals.parity_checked, totals.parity_disagreements), (1, 0));
    let path = record.path.expect("it was judged");
    assert_eq!((played.flow().path, played.flow().verdict), (path, "drop"));
    path
}

const MACS: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];

#[test]
fn ethernet_frames_are_shown_as_captured() {
    let ethernet = |tags: &[u8]| path(LinkType::ETHERNET, &[&MACS[..], tags].concat());
    assert_eq!(ethernet(&[8, 0]), Path::Prefilter);
    assert_eq!(ethernet(&[0x81, 0, 0, 7, 8, 0]), Path::Prefilter, "a VLAN tag");
    assert_eq!(
        ethernet(&[0x88, 0xa8, 0, 7, 0x81, 0, 0, 8, 8, 0]),
        Path::Prefilter,
        "two"
    );
    // What the program does not understand it passes up, and the engine comes to the same verdict.
    let three = [0x88, 0xa8, 0, 7, 0x81, 0, 0, 8, 0x81, 0, 0, 9, 8, 0];
    assert_eq!(ethernet(&three), Path::Engine, "three");
    let pppoe = [0x88, 0x64, 0x11, 0, 0, 1, 0, 2 + 52, 0, 0x21];
    assert_eq!(ethernet(&pppoe), Path::Engine, "PPPoE");
}

#[test]
fn others_get_an_ethernet_header() {
    assert_eq!(path(LinkType::RAW, &[]), Path::Prefilter);
    let cooked = [0, 0, 0, 1, 0, 6, 2, 0, 0, 0, 0, 1, 0, 0, 8, 0];
    assert_eq!(path(LinkType::LINUX_SLL, &cooked), Path::Prefilter);
}
