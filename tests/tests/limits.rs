//! Every limit and every timeout of an engine's configuration holds, with its reason and its counter.

use std::net::IpAddr;
use std::time::Duration;

use tungate_engine::config::{Limits, Timeouts};
use tungate_engine::io::{UpstreamError, UpstreamEvent};
use tungate_engine::policy::PolicySpec;
use tungate_engine::{CloseReason, Config, DropReason, Event, FlowId, Input};
use tungate_tests::client::End;
use tungate_tests::packet::{Datagram, Message, RST, Segment, echo_request, fragments};
use tungate_tests::recorder::Command;
use tungate_tests::rig::Rig;

const CLIENT: &str = "10.0.0.2:40001";
const TARGET: &str = "192.0.2.7:80";

// ---- limits ----------------------------------------------------------------------------------------------------------

#[test]
fn no_more_tcp_flows_than_the_limit() {
    let mut rig = limited(Limits {
        flows: 2,
        ..Limits::default()
    });
    let (mut first, flow) = rig.open("10.0.0.2:1001", TARGET);
    rig.open("10.0.0.3:1002", TARGET);
    let third = syn(&rig, "10.0.0.4:1003").packet();
    assert_eq!(rig.packet(&third).dropped, Some(DropReason::FlowLimit));
    assert_eq!(rig.messages(), [], "the client tries again by itself");
    assert_eq!(rig.engine.counters().drops(DropReason::FlowLimit), 1);
    // What is there goes on; and when it has ended, there is room.
    first.send(10, rig.now);
    rig.converse(&mut first);
    assert_eq!(rig.read_all(flow), 10);
    first.reset();
    rig.converse(&mut first);
    assert_eq!(rig.packet(&third).dropped, None);
    assert_eq!(rig.engine.open_flows(), 2);
}

#[test]
fn one_client_has_no_more_flows_than_its_limit() {
    let mut rig = limited(Limits {
        flows_per_client: 2,
        ..Limits::default()
    });
    let (mut first, _) = rig.open("10.0.0.2:1001", TARGET);
    rig.open("10.0.0.2:1002", TARGET);
    let third = syn(&rig, "10.0.0.2:1003").packet();
    assert_eq!(rig.packet(&third).dropped, Some(DropReason::ClientLimit));
    assert_eq!(rig.engine.counters().drops(DropReason::ClientLimit), 1);
    let other = syn(&rig, "10.0.0.3:1003").packet();
    assert_eq!(rig.packet(&other).dropped, None, "others are free");
    first.reset();
    rig.converse(&mut first);
    assert_eq!(rig.packet(&third).dropped, None);
}

#[test]
fn no_more_half_open_flows_than_the_limit() {
    let mut rig = limited(Limits {
        half_open: 2,
        ..Limits::default()
    });
    let [first, second] = ["10.0.0.2:1001", "10.0.0.2:1002"].map(|address| syn(&rig, address).packet());
    let first = rig.packet(&first).flow.expect("accepted");
    rig.packet(&second);
    let third = syn(&rig, "10.0.0.2:1003").packet();
    assert_eq!(rig.packet(&third).dropped, Some(DropReason::HalfOpenLimit));
    assert_eq!(rig.engine.counters().drops(DropReason::HalfOpenLimit), 1);
    rig.upstream(first, UpstreamEvent::Connected);
    assert_eq!(rig.packet(&third).dropped, None);
}

/// A flood of SYNs to targets that do not answer holds no place for long, and costs no memory but the places'.
#[test]
fn attempts_that_nobody_answers_make_room_for_others() {
    let mut rig = limited(Limits {
        half_open: 2,
        ..Limits::default()
    });
    let [first, second, third] =
        ["10.0.0.2:1001", "10.0.0.2:1002", "10.0.0.2:1003"].map(|address| syn(&rig, address).packet());
    let first = rig.packet(&first).flow.expect("accepted");
    rig.pass(Duration::from_millis(60));
    rig.packet(&second);
    rig.pass(Duration::from_millis(39));
    assert_eq!(rig.packet(&third).dropped, Some(DropReason::HalfOpenLimit));
    rig.pass(Duration::from_millis(1));
    assert_eq!(rig.packet(&third).dropped, None);
    assert_eq!(rig.engine.counters().ends()["evicted"], 1);
    // It is the first that went: news about its upstream means nothing any more.
    rig.upstream(first, UpstreamEvent::Connected);
    let fourth = syn(&rig, "10.0.0.2:1004").packet();
    assert_eq!(
        rig.packet(&fourth).dropped,
        Some(DropReason::HalfOpenLimit),
        "the second is young"
    );
    for number in 0..1000 {
        rig.pass(Duration::from_millis(100));
        let next = syn(&rig, &format!("10.0.1.{}:{}", number % 250, 2000 + number)).packet();
        assert_eq!(rig.packet(&next).dropped, None);
        assert_eq!(rig.engine.open_flows(), 2);
    }
}

/// However an attempt ends, its place among the half-open is free again.
#[test]
fn half_open_places_come_back() {
    type Ending = fn(&mut Rig, &Segment, FlowId);
    let endings: [(&str, Ending); 5] = [
        ("connected", |rig, _, flow| {
            rig.upstream(flow, UpstreamEvent::Connected);
        }),
        ("failed", |rig, _, flow| {
            rig.upstream(flow, UpstreamEvent::Failed(UpstreamError::TimedOut));
        }),
        ("given up by the client", |rig, syn, _| {
            let reset = Segment {
                flags: RST,
                sequence: syn.sequence.wrapping_add(1),
                ..syn.clone()
            };
            rig.packet(&reset.packet());
        }),
        ("replaced by another SYN", |rig, syn, _| {
            let another = Segment {
                sequence: syn.sequence.wrapping_add(77),
                ..syn.clone()
            };
            let flow = rig.packet(&another.packet()).flow.expect("accepted");
            rig.upstream(flow, UpstreamEvent::Failed(UpstreamError::Refused));
        }),
        ("timed out", |rig, _, _| rig.pass(Duration::from_secs(130))),
    ];
    for (how, end) in endings {
        let mut rig = limited(Limits {
            half_open: 1,
            ..Limits::default()
        });
        for attempt in 0..3 {
            let syn = syn(&rig, &format!("10.0.0.2:{}", 1001 + attempt));
            let judgement = rig.packet(&syn.packet());
            assert_eq!(judgement.dropped, None, "{how}, attempt {attempt}");
            end(&mut rig, &syn, judgement.flow.expect("accepted"));
        }
    }
}

#[test]
fn at_the_session_limit_the_least_recently_used_goes() {
    let mut rig = limited(Limits {
        sessions: 2,
        ..Limits::default()
    });
    let first = rig.packet(&datagram("10.0.0.2:1001", TARGET)).flow;
    rig.packet(&datagram("10.0.0.2:1002", TARGET));
    assert_eq!(rig.packet(&datagram("10.0.0.2:1001", TARGET)).flow, first);
    assert_eq!(rig.packet(&datagram("10.0.0.2:1003", TARGET)).dropped, None);
    assert_eq!(rig.engine.open_flows(), 2);
    assert_ended(&mut rig, CloseReason::Evicted, 1);
    assert_eq!(
        rig.packet(&datagram("10.0.0.2:1001", TARGET)).flow,
        first,
        "it was used more recently than the second"
    );
    // Echo sessions are among them.
    let ping = echo_request(ip("10.0.0.2"), ip("192.0.2.7"), 1, 1, b"ping");
    rig.packet(&ping);
    assert_eq!(rig.engine.open_flows(), 2);
    assert_eq!(rig.engine.counters().ends().get("evicted"), Some(&2));
}

#[test]
fn fragments_take_no_more_memory_than_the_limit() {
    const BUDGET: u32 = 64 << 10;
    let mut rig = limited(Limits {
        reassembly_bytes: BUDGET,
        ..Limits::default()
    });
    let whole = Datagram {
        payload: vec![7; 3000],
        ..parsed_datagram("10.0.0.2:1001", TARGET)
    };
    let pieces = |identification| fragments(&whole.packet(), identification, 1480);
    const COUNT: u32 = 200;
    for identification in 0..COUNT {
        assert_eq!(rig.packet(&pieces(identification)[0]).dropped, None);
    }
    let evicted = rig.engine.counters().drops(DropReason::FragmentMemory);
    let held = u64::from(COUNT) - evicted;
    assert!(
        held * 1480 <= u64::from(BUDGET),
        "{held} fragments of 1,480 bytes are held"
    );
    assert!(held > 20, "only {held} fragments are held");
    assert_eq!(rig.events().len() as u64, evicted, "each is told");
    // The oldest have gone: the latest can be completed, the first not.
    for (identification, sent) in [(COUNT - 1, 1), (0, 0)] {
        for piece in &pieces(identification)[1..] {
            assert_eq!(rig.packet(piece).dropped, None);
        }
        let is_send =
            |command: &Command| matches!(command, Command::Send { payload, .. } if payload.len() == 3000);
        assert_eq!(
            rig.commands().iter().filter(|command| is_send(command)).count(),
            sent
        );
    }
}

#[test]
fn buffers_take_no_more_memory_than_the_limit() {
    const BUDGET: u64 = 2 * (64 << 10) + 2 * (16 << 10);
    let mut rig = limited(Limits {
        buffer_bytes: BUDGET,
        buffer_per_flow: 64 << 10,
        ..Limits::default()
    });
    let (mut first, _) = rig.open("10.0.0.2:1001", TARGET);
    assert_eq!(rig.engine.buffer_bytes(), 2 * (64 << 10));
    rig.open("10.0.0.2:1002", TARGET);
    assert_eq!(
        rig.engine.buffer_bytes(),
        BUDGET,
        "the second flow gets what is left"
    );
    let mut third = rig.client("10.0.0.2:1003", TARGET);
    let flow = rig
        .packet(&third.take_outbox().remove(0).packet())
        .flow
        .expect("accepted");
    rig.events();
    rig.commands();
    rig.upstream(flow, UpstreamEvent::Connected);
    assert_eq!(rig.commands(), [Command::Abort]);
    assert_ended(&mut rig, CloseReason::BufferLimit, 1);
    rig.converse(&mut third);
    assert_eq!(third.end(), Some(End::Refused), "the client is told");
    first.reset();
    rig.converse(&mut first);
    rig.open("10.0.0.2:1004", TARGET);
    assert_eq!(rig.engine.buffer_bytes(), BUDGET);
}

#[test]
fn one_flow_buffers_no_more_than_its_limit() {
    for capacity in [16 << 10, 64 << 10, 1 << 20] {
        let mut rig = limited(Limits {
            buffer_per_flow: capacity,
            ..Limits::default()
        });
        let (mut client, flow) = rig.open(CLIENT, TARGET);
        assert_eq!(rig.engine.buffer_bytes(), 2 * u64::from(capacity));
        // Neither side reads: each direction takes its capacity and not a byte more. (The window is told in units
        // of its scale, 32 bytes at most.)
        client.send(8 << 20, rig.now);
        rig.converse(&mut client);
        let taken = client.acknowledged();
        assert!(
            (u64::from(capacity) - 31..=capacity.into()).contains(&taken),
            "{taken} bytes"
        );
        client.set_reading(false);
        rig.world.full = true;
        assert_eq!(rig.write(flow, 0, 8 << 20), capacity as usize);
        rig.world.full = false;
        rig.flush();
        // And nothing of it is lost.
        client.set_reading(true);
        rig.converse(&mut client);
        assert_eq!(client.received(), u64::from(capacity));
        assert_eq!(rig.read_all(flow) as u64, taken);
    }
}

#[test]
fn a_draining_engine_takes_no_new_flows() {
    let mut rig = limited(Limits::default());
    let (mut open, flow) = rig.open(CLIENT, TARGET);
    let mapping = rig.packet(&datagram("10.0.0.2:1001", TARGET)).flow;
    rig.input(Input::Drain);
    let mut late = rig.client("10.0.0.2:1002", TARGET);
    let syn = late.take_outbox().remove(0);
    assert_eq!(rig.packet(&syn.packet()).dropped, Some(DropReason::Draining));
    rig.converse(&mut late);
    assert_eq!(late.end(), Some(End::Refused), "the client is told");
    let stray = rig.packet(&datagram("10.0.0.2:1003", TARGET));
    assert_eq!(stray.dropped, Some(DropReason::Draining));
    assert_eq!(rig.engine.counters().drops(DropReason::Draining), 2);
    // The open ones go on.
    open.send(10, rig.now);
    rig.converse(&mut open);
    assert_eq!(rig.read_all(flow), 10);
    assert_eq!(rig.packet(&datagram("10.0.0.2:1001", TARGET)).flow, mapping);
}

// ---- timeouts --------------------------------------------------------------------------------------------------------

#[test]
fn connecting_takes_no_longer_than_its_timeout() {
    let mut rig = with(|timeouts| timeouts.connect = Duration::from_secs(7));
    let syn = syn(&rig, CLIENT).packet();
    rig.packet(&syn);
    rig.pass(Duration::from_secs(3));
    rig.packet(&syn); // repeating it buys no time
    rig.commands();
    assert_ends_after(&mut rig, Duration::from_secs(4), CloseReason::ConnectTimeout);
    assert_eq!(rig.commands(), [Command::Abort]);
    assert_eq!(rig.messages(), [], "silence is what the client would have met");
}

#[test]
fn the_handshake_takes_no_longer_than_its_timeout() {
    let mut rig = with(|timeouts| timeouts.handshake = Duration::from_secs(7));
    let syn = syn(&rig, CLIENT).packet();
    let flow = rig.packet(&syn).flow.expect("accepted");
    rig.pass(Duration::from_secs(60)); // the time it took to connect does not count
    rig.upstream(flow, UpstreamEvent::Connected);
    rig.commands();
    assert_ends_after(&mut rig, Duration::from_secs(7), CloseReason::HandshakeTimeout);
    assert_eq!(rig.commands(), [Command::Abort]);
    assert_reset(&mut rig);
}

#[test]
fn a_silent_connection_ends_after_the_idle_timeout() {
    let mut rig = with(|timeouts| timeouts.tcp_idle = Duration::from_secs(500));
    let (mut client, flow) = rig.open(CLIENT, TARGET);
    // Bytes of either side start the time anew.
    rig.pass(Duration::from_secs(400));
    client.send(1, rig.now);
    rig.converse(&mut client);
    assert_eq!(rig.read_all(flow), 1);
    rig.pass(Duration::from_secs(400));
    rig.write(flow, 0, 1);
    rig.converse(&mut client);
    rig.commands();
    assert_ends_after(&mut rig, Duration::from_secs(500), CloseReason::IdleTimeout);
    assert_eq!(rig.commands(), [Command::Abort]);
    assert_reset(&mut rig);
}

#[test]
fn a_half_closed_connection_ends_after_its_timeout() {
    for upstream_first in [false, true] {
        let mut rig = with(|timeouts| timeouts.half_close = Duration::from_secs(50));
        let (mut client, flow) = rig.open(CLIENT, TARGET);
        rig.pass(Duration::from_secs(40));
        if upstream_first {
            rig.upstream(flow, UpstreamEvent::ReadClosed);
        } else {
            client.close(rig.now);
        }
        rig.converse(&mut client);
        // The time runs from the last byte of the other direction.
        rig.pass(Duration::from_secs(40));
        if upstream_first {
            client.send(1, rig.now);
            rig.converse(&mut client);
            assert_eq!(rig.read_all(flow), 1);
        } else {
            rig.write(flow, 0, 1);
        }
        rig.converse(&mut client);
        rig.commands();
        assert_ends_after(&mut rig, Duration::from_secs(50), CloseReason::HalfCloseTimeout);
        assert_eq!(rig.commands(), [Command::Abort]);
        assert_reset(&mut rig);
    }
}

#[test]
fn a_client_that_acknowledges_nothing_is_given_up_after_the_timeout() {
    let mut rig = with(|timeouts| timeouts.unacknowledged = Duration::from_secs(100));
    let (_, flow) = rig.open(CLIENT, TARGET);
    rig.pass(Duration::from_secs(1000));
    rig.write(flow, 0, 1);
    rig.commands();
    assert_ends_after(
        &mut rig,
        Duration::from_secs(100),
        CloseReason::ClientUnresponsive,
    );
    assert_eq!(rig.commands(), [Command::Abort]);
    assert_reset(&mut rig);
}

#[test]
fn a_client_that_answers_probes_of_its_closed_window_is_not_given_up() {
    let mut rig = with(|timeouts| timeouts.unacknowledged = Duration::from_secs(100));
    let (mut client, flow) = rig.open(CLIENT, TARGET);
    client.set_reading(false);
    let given = rig.write(flow, 0, 2 << 20) as u64;
    for _ in 0..500 {
        rig.converse(&mut client);
        rig.pass(Duration::from_secs(1));
    }
    assert_eq!(ends(&mut rig), []);
    client.set_reading(true);
    for _ in 0..100 {
        rig.converse(&mut client);
        rig.pass(Duration::from_secs(1));
    }
    assert_eq!(client.received(), given);
}

#[test]
fn a_udp_mapping_ends_after_its_timeout() {
    let mut rig = with(|timeouts| timeouts.udp = Duration::from_secs(50));
    let flow = rig.packet(&datagram(CLIENT, TARGET)).flow.expect("accepted");
    // Datagrams of either side start the time anew.
    rig.pass(Duration::from_secs(40));
    rig.packet(&datagram(CLIENT, "192.0.2.8:9"));
    rig.pass(Duration::from_secs(40));
    rig.upstream(
        flow,
        UpstreamEvent::Datagram {
            source: TARGET.parse().expect("an address"),
            payload: b"answer",
            segment_size: None,
        },
    );
    rig.commands();
    assert_ends_after(&mut rig, Duration::from_secs(50), CloseReason::IdleTimeout);
    assert_eq!(rig.commands(), [Command::Close]);
}

#[test]
fn a_mapping_for_questions_to_dns_alone_ends_after_its_own_timeout() {
    const RESOLVER: &str = "192.0.2.53:53";
    let dns = |timeouts: &mut Timeouts| timeouts.dns = Duration::from_secs(5);
    let mut rig = with(dns);
    rig.packet(&datagram(CLIENT, RESOLVER));
    assert_ends_after(&mut rig, Duration::from_secs(5), CloseReason::IdleTimeout);
    // One that serves other targets, too, is an ordinary one.
    let mut rig = with(dns);
    rig.packet(&datagram(CLIENT, RESOLVER));
    rig.packet(&datagram(CLIENT, TARGET));
    assert_ends_after(&mut rig, Duration::from_secs(300), CloseReason::IdleTimeout);
}

#[test]
fn an_echo_session_ends_after_its_timeout() {
    let mut rig = with(|timeouts| timeouts.icmp = Duration::from_secs(50));
    let ping = echo_request(ip("fd00::2"), ip("2001:db8::7"), 9, 1, b"ping");
    let flow = rig.packet(&ping).flow.expect("accepted");
    rig.pass(Duration::from_secs(40));
    rig.upstream(
        flow,
        UpstreamEvent::EchoReply {
            sequence: 1,
            payload: b"ping",
        },
    );
    rig.commands();
    assert_ends_after(&mut rig, Duration::from_secs(50), CloseReason::IdleTimeout);
    assert_eq!(rig.commands(), [Command::Close]);
}

#[test]
fn fragments_wait_no_longer_than_the_timeout() {
    let mut rig = with(|timeouts| timeouts.reassembly = Duration::from_secs(7));
    let whole = Datagram {
        payload: vec![7; 3000],
        ..parsed_datagram(CLIENT, TARGET)
    };
    let pieces = fragments(&whole.packet(), 1, 1480);
    rig.packet(&pieces[0]);
    rig.pass(Duration::from_secs(5));
    rig.packet(&pieces[1]); // the time counts from the first
    rig.pass(Duration::from_secs(2) - Duration::from_nanos(1));
    assert_eq!(rig.engine.counters().drops(DropReason::FragmentTimeout), 0);
    rig.pass(Duration::from_nanos(1));
    assert_eq!(rig.engine.counters().drops(DropReason::FragmentTimeout), 1);
    assert_eq!(rig.events().len(), 1);
    rig.packet(&pieces[2]);
    assert_eq!(rig.commands(), [], "the rest alone makes nothing");
}

// ---- helpers ---------------------------------------------------------------------------------------------------------

fn limited(limits: Limits) -> Rig {
    let config = Config {
        limits,
        ..Config::default()
    };
    Rig::new(config, PolicySpec::default())
}

fn with(set: impl FnOnce(&mut Timeouts)) -> Rig {
    let mut config = Config::default();
    set(&mut config.timeouts);
    Rig::new(config, PolicySpec::default())
}

/// The first segment of the client at `address`.
fn syn(rig: &Rig, address: &str) -> Segment {
    rig.client(address, TARGET).take_outbox().remove(0)
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn parsed_datagram(source: &str, target: &str) -> Datagram {
    Datagram {
        source: source.parse().expect("a socket address"),
        destination: target.parse().expect("a socket address"),
        payload: b"datagram".to_vec(),
    }
}

fn datagram(source: &str, target: &str) -> Vec<u8> {
    parsed_datagram(source, target).packet()
}

fn ends(rig: &mut Rig) -> Vec<CloseReason> {
    let reason = |event| match event {
        Event::Closed { reason, .. } => Some(reason),
        Event::Dropped { .. } | Event::Opened { .. } | Event::Established { .. } | Event::Named { .. } => {
            None
        }
    };
    rig.events().into_iter().filter_map(reason).collect()
}

/// Checks that since the last look at events `count` flows have ended, all for `reason`, and no others before.
fn assert_ended(rig: &mut Rig, reason: CloseReason, count: u64) {
    assert_eq!(ends(rig), vec![reason; count as usize]);
    assert_eq!(rig.engine.counters().ends().get(reason.name()), Some(&count));
}

/// Checks that the only flow ends when `timeout` has passed from now on, not before, for `reason`.
fn assert_ends_after(rig: &mut Rig, timeout: Duration, reason: CloseReason) {
    rig.events();
    rig.pass(timeout - Duration::from_nanos(1));
    assert_eq!(rig.engine.open_flows(), 1, "it lives for {timeout:?}");
    rig.pass(Duration::from_nanos(1));
    assert_eq!(
        rig.engine.open_flows(),
        0,
        "it lives for no more than {timeout:?}"
    );
    assert_ended(rig, reason, 1);
    assert_eq!(rig.engine.buffer_bytes(), 0);
}

/// Checks that the last packet to the client is a reset.
fn assert_reset(rig: &mut Rig) {
    let messages = rig.messages();
    assert!(
        matches!(messages.last(), Some(Message::Tcp(segment)) if segment.has(RST)),
        "{messages:?}"
    );
}
