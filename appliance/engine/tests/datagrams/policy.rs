//! Changes of the policy under live flows, and draining.

use super::*;

#[test]
fn a_policy_change_ends_the_flows_it_denies_and_no_other() {
    let mut rig = Rig::new();
    let (denied, _) = Client::open(CLIENT, TARGET, &mut rig);
    let (mut spared, flow) = Client::open("10.0.0.2:40002", "192.0.2.8:80", &mut rig);
    rig.handle(Input::Policy(Arc::new(Policy::new(lists(vec![deny(
        "192.0.2.7/32",
    )])))));
    assert_eq!(rig.commands(), [Command::Abort]);
    let closed = rig.events();
    assert!(matches!(
        closed[..],
        [Event::Closed {
            reason: CloseReason::Denied(RuleRef::List(0)),
            ..
        }]
    ));
    assert_eq!(rig.segments(), [], "a denied client hears nothing");
    assert_eq!(
        rig.packet(&denied.segment(ACK, b"x")).dropped,
        Some(DropReason::ListDestination)
    );
    spared.send(&mut rig, b"still here");
    assert_eq!(rig.read_all(flow), b"still here");
}

#[test]
fn a_rule_that_rejects_resets_established_flows() {
    let mut rig = Rig::new();
    let (_, _) = Client::open(CLIENT, TARGET, &mut rig);
    let spec = rules(vec![rule("no", RuleMatch::default(), Action::Reject)]);
    rig.handle(Input::Policy(Arc::new(Policy::new(spec))));
    assert_eq!(rig.segment().flags & RST, RST);
    assert_eq!(rig.engine.open_flows(), 0);
}

#[test]
fn an_entry_that_expires_lets_go_by_itself() {
    let mut entry = deny("192.0.2.0/24");
    entry.expires = Some(1_000_000_100);
    let allow = ListEntry {
        action: ListAction::Allow,
        expires: Some(1_000_000_050),
        ..deny("192.0.2.7/32")
    };
    let mut rig = Rig::with(Config::default(), lists(vec![entry, allow]));
    rig.handle(Input::WallClock(1_000_000_000 * 1_000_000_000));
    let (_, _) = Client::open(CLIENT, TARGET, &mut rig);
    rig.pass(Duration::from_secs(49));
    assert_eq!(rig.engine.open_flows(), 1);
    rig.pass(Duration::from_secs(1));
    assert_eq!(rig.engine.open_flows(), 0, "the entry that allowed it is gone");
    rig.pass(Duration::from_secs(49));
    assert!(rig.packet(&Client::new(CLIENT, TARGET).syn()).dropped.is_some());
    rig.pass(Duration::from_secs(1));
    assert!(rig.packet(&Client::new(CLIENT, TARGET).syn()).dropped.is_none());
}

#[test]
fn a_draining_engine_finishes_what_it_has() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    rig.handle(Input::Drain);
    assert_eq!(
        rig.packet(&Client::new("10.0.0.2:40002", TARGET).syn()).dropped,
        Some(DropReason::Draining)
    );
    assert_eq!(rig.segment().flags & RST, RST);
    assert_eq!(
        rig.packet(&udp("10.0.0.2:5000", PEER, b"a")).dropped,
        Some(DropReason::Draining)
    );
    client.send(&mut rig, b"last");
    assert_eq!(rig.read_all(flow), b"last");
}
