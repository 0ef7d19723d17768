//! Flows that the kernel carries, with a test in the kernel's place.

mod support;

use std::time::Duration;

use support::*;
use tungate_engine::bypass::{BypassEvent, BypassNews, BypassOrder, Carried, Ends, Seen, Volume};
use tungate_engine::io::{Stage, Unreachable, UpstreamError};
use tungate_engine::policy::{Action, PolicySpec, Rule, RuleMatch};
use tungate_engine::{CloseReason, Config, DropReason, Event, IngressId, Input, Policy};

const TARGET_INITIAL: u32 = 9_000;

fn rig() -> Rig {
    let config = Config {
        bypass: true,
        ..Config::default()
    };
    Rig::with(config, PolicySpec::default())
}

fn orders(rig: &mut Rig) -> Vec<BypassOrder> {
    std::mem::take(&mut rig.world.orders)
}

fn news(rig: &mut Rig, client: &Client, event: BypassEvent) {
    let ends = Ends {
        client: client.address,
        target: client.target,
    };
    let news = BypassNews {
        ingress: IngressId(0),
        ends,
        event,
    };
    rig.handle(Input::Bypass(news));
}

fn seen(from_client: bool, flags: u8, sequence: u32, acknowledgment: u32) -> BypassEvent {
    BypassEvent::Segment(Seen {
        from_client,
        flags,
        sequence,
        acknowledgment,
        payload_len: 0,
        header_len: 20,
        timestamps: false,
    })
}

fn carried(packets: u64) -> Carried {
    let volume = Volume {
        packets,
        bytes: 140 * packets,
    };
    Carried {
        to_upstream: volume,
        to_client: volume,
    }
}

/// A flow that the target has answered.
fn open(rig: &mut Rig) -> Client {
    let client = Client::new(CLIENT, TARGET);
    rig.packet(&client.syn());
    let answer = seen(false, SYN | ACK, TARGET_INITIAL, client.sequence + 1);
    news(rig, &client, answer);
    rig.sent();
    orders(rig);
    client
}

/// How flows have ended, with their bytes.
fn closed(rig: &mut Rig) -> Vec<(CloseReason, u64, u64)> {
    let end = |event| match event {
        Event::Closed {
            reason,
            to_upstream,
            to_client,
            ..
        } => Some((reason, to_upstream, to_client)),
        _ => None,
    };
    rig.events().into_iter().filter_map(end).collect()
}

#[test]
fn a_syn_goes_on_as_it_came_and_so_do_its_repetitions() {
    for (client, target) in [(CLIENT, TARGET), (CLIENT6, TARGET6)] {
        let mut rig = rig();
        let client = Client::new(client, target);
        for _ in 0..2 {
            let judgement = rig.packet(&client.syn());
            assert_eq!(judgement.dropped, None);
            let (out, mut bytes) = rig.sent().remove(0);
            tungate_engine::packet::complete_checksum(&mut bytes, &out);
            assert_eq!(bytes, client.syn());
        }
        assert_eq!(orders(&mut rig), [BypassOrder::Begin]);
        assert_eq!((rig.commands(), rig.engine.open_flows()), (vec![], 1));
    }
}

#[test]
fn what_needs_more_than_to_be_let_through_is_terminated() {
    let rule = |target: &str, action| Rule {
        name: "it".to_owned(),
        matches: RuleMatch {
            targets: vec![target.parse().unwrap()],
            ..RuleMatch::default()
        },
        action,
    };
    let config = Config {
        bypass: true,
        ..Config::default()
    };
    let policy = PolicySpec {
        rules: vec![rule("192.0.2.8/32", Action::Redirect(TARGET.parse().unwrap()))],
        ..PolicySpec::default()
    };
    let mut rig = Rig::with(config, policy);
    for target in ["192.0.2.8:80", "192.0.2.7:53"] {
        rig.packet(&Client::new(CLIENT, target).syn());
        assert!(matches!(rig.commands()[..], [Command::Open(_)]), "{target}");
    }
    assert_eq!(orders(&mut rig), []);
}

#[test]
fn bytes_are_those_between_the_first_and_the_last_number() {
    let mut rig = rig();
    let client = open(&mut rig);
    let end = client.sequence + 1 + 700;
    news(&mut rig, &client, seen(true, FIN | ACK, end, TARGET_INITIAL + 1));
    let flow = rig.events().iter().find_map(|event| match event {
        Event::Established { flow } => Some(*flow),
        _ => None,
    });
    let progress = rig.engine.progress(flow.unwrap()).unwrap();
    assert_eq!(progress.stage, Stage::ClientClosed);
    let fin = seen(false, FIN | ACK, TARGET_INITIAL + 1 + 30, end + 1);
    news(&mut rig, &client, fin);
    assert_eq!(orders(&mut rig), [BypassOrder::Count]);
    assert_eq!(closed(&mut rig), []);
    news(&mut rig, &client, BypassEvent::Counted(Some(carried(7))));
    assert_eq!(closed(&mut rig), [(CloseReason::Finished, 700, 30)]);
    assert_eq!(rig.engine.open_flows(), 0);
    // The kernel carries repeated segments for a while; then it is to forget the connection.
    rig.pass(Duration::from_secs(9));
    assert_eq!(orders(&mut rig), []);
    rig.pass(Duration::from_secs(1));
    assert_eq!(orders(&mut rig), [BypassOrder::Release]);
    news(&mut rig, &client, BypassEvent::Released(None));
    assert_eq!((closed(&mut rig), rig.segments()), (vec![], vec![]));
    // Nothing of it is left.
    let late = rig.packet(&client.segment(ACK, b""));
    assert_eq!(late.dropped, Some(DropReason::NoFlow));
}

#[test]
fn refusals_are_told_of_and_left_to_the_target() {
    let refused = CloseReason::ConnectFailed(UpstreamError::Refused);
    let unreachable = CloseReason::ConnectFailed(UpstreamError::Unreachable(Unreachable::Host));
    for reason in [refused, unreachable, CloseReason::ConnectTimeout] {
        let mut rig = rig();
        let client = Client::new(CLIENT, TARGET);
        rig.packet(&client.syn());
        rig.sent();
        orders(&mut rig);
        if reason == refused {
            news(&mut rig, &client, seen(false, RST | ACK, 0, client.sequence + 1));
        } else if reason == unreachable {
            news(&mut rig, &client, BypassEvent::Unreachable(Unreachable::Host));
        } else {
            rig.pass(Config::default().timeouts.connect);
            assert_eq!(orders(&mut rig), [BypassOrder::Release]);
            news(&mut rig, &client, BypassEvent::Released(None));
        }
        assert_eq!(closed(&mut rig), [(reason, 0, 0)]);
        assert_eq!((rig.segments(), rig.engine.open_flows()), (vec![], 0));
    }
}

#[test]
fn a_denied_client_is_asked_where_it_is_and_reset_there() {
    for is_late in [false, true] {
        let mut rig = rig();
        let client = if is_late {
            Client::new(CLIENT, TARGET)
        } else {
            open(&mut rig)
        };
        if is_late {
            rig.packet(&client.syn());
            rig.sent();
            orders(&mut rig);
        }
        deny(&mut rig, &client, is_late);
    }
}

/// With `is_late`, the target's answer is seen only when the client, which knows it, has been denied.
fn deny(rig: &mut Rig, client: &Client, is_late: bool) {
    let policy = PolicySpec {
        rules: vec![Rule {
            name: "no more".to_owned(),
            matches: RuleMatch::default(),
            action: Action::Reject,
        }],
        ..PolicySpec::default()
    };
    rig.handle(Input::Policy(std::sync::Arc::new(Policy::new(policy))));
    assert_eq!((orders(rig), closed(rig)), (vec![BypassOrder::Release], vec![]));
    if is_late {
        let answer = seen(false, SYN | ACK, TARGET_INITIAL, client.sequence + 1);
        news(rig, client, answer);
    }
    news(rig, client, BypassEvent::Released(Some(carried(5))));
    let probe = rig.segment();
    // Behind the client's window, whatever that is by now.
    assert_eq!((probe.flags, probe.sequence), (ACK, TARGET_INITIAL));
    let answer = Client {
        expected: TARGET_INITIAL + 1 + 2_000,
        ..Client::new(CLIENT, TARGET)
    };
    let at = client.sequence + 1 + 50;
    rig.packet(&answer.segment_at(at, ACK, b""));
    let reset = rig.segment();
    assert_eq!((reset.flags, reset.sequence), (RST, TARGET_INITIAL + 2_001));
    let ends = closed(rig);
    assert!(
        matches!(ends[..], [(CloseReason::Denied(_), 50, 2_000)]),
        "{ends:?}"
    );
}

#[test]
fn a_flow_without_packets_ends_and_one_with_some_does_not() {
    let mut rig = rig();
    let client = open(&mut rig);
    let idle = Config::default().timeouts.tcp_idle;
    let mut packets = 0;
    for round in 1..=12 {
        rig.pass(idle / 4);
        assert_eq!(orders(&mut rig), [BypassOrder::Count], "round {round}");
        if round <= 8 {
            packets += 1;
        }
        news(&mut rig, &client, BypassEvent::Counted(Some(carried(packets))));
    }
    assert_eq!(orders(&mut rig), [BypassOrder::Release]);
    news(&mut rig, &client, BypassEvent::Released(Some(carried(packets))));
    rig.pass(Duration::from_secs(1)); // the client does not answer the probe
    assert!(matches!(closed(&mut rig)[..], [(CloseReason::IdleTimeout, ..)]));
}

#[test]
fn a_syn_between_the_same_ends_waits_until_the_old_connection_is_forgotten() {
    let mut rig = rig();
    let client = open(&mut rig);
    news(
        &mut rig,
        &client,
        seen(true, RST | ACK, client.sequence + 1, TARGET_INITIAL + 1),
    );
    news(&mut rig, &client, BypassEvent::Counted(Some(carried(3))));
    assert_eq!(closed(&mut rig), [(CloseReason::ClientReset, 0, 0)]);
    orders(&mut rig);
    let again = Client {
        sequence: client.sequence + 1_000_000,
        ..Client::new(CLIENT, TARGET)
    };
    rig.packet(&again.syn());
    assert_eq!(
        (orders(&mut rig), rig.segments()),
        (vec![BypassOrder::Release], vec![])
    );
    // That the kernel had forgotten it by then says nothing of the order.
    news(&mut rig, &client, BypassEvent::Gone(carried(3)));
    assert_eq!(rig.segments(), []);
    news(&mut rig, &client, BypassEvent::Released(None));
    assert_eq!(
        (orders(&mut rig), rig.segment().sequence),
        (vec![BypassOrder::Begin], again.sequence)
    );
    assert_eq!(rig.engine.open_flows(), 1);
}

#[test]
fn bypassed_flows_count_in_the_limits() {
    let mut config = Config {
        bypass: true,
        ..Config::default()
    };
    config.limits.flows = 1;
    let mut rig = Rig::with(config, PolicySpec::default());
    let client = open(&mut rig);
    let second = rig.packet(&Client::new("10.0.0.3:40001", TARGET).syn());
    assert_eq!(second.dropped, Some(DropReason::FlowLimit));
    news(&mut rig, &client, BypassEvent::Gone(carried(2)));
    assert!(matches!(closed(&mut rig)[..], [(CloseReason::IdleTimeout, ..)]));
    assert_eq!(
        rig.packet(&Client::new("10.0.0.3:40001", TARGET).syn()).dropped,
        None
    );
}
