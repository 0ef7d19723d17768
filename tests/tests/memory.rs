//! What an engine holds on to is bounded by what is open, however long it runs and however much has come and gone.

use std::time::Duration;

use tungate_engine::config::Limits;
use tungate_engine::io::{UpstreamError, UpstreamEvent};
use tungate_engine::policy::PolicySpec;
use tungate_engine::{Config, FlowId};
use tungate_tests::client::TcpClient;
use tungate_tests::memory::{Counting, live_bytes};
use tungate_tests::packet::{Datagram, RST, Segment, echo_request, fragments};
use tungate_tests::rig::Rig;

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn an_old_connection_takes_no_more_than_a_young_one() {
    let mut open: Option<(TcpClient, FlowId)> = None;
    assert_steady("bytes each way, and two seconds", |rig, time| {
        let (client, flow) = open.get_or_insert_with(|| rig.open(CLIENT, TARGET));
        client.send(100, rig.now);
        rig.converse(client);
        assert_eq!(rig.read_all(*flow), 100);
        assert_eq!(rig.write(*flow, u64::from(time) * 100, 100), 100);
        rig.converse(client);
        rig.pass(Duration::from_secs(2));
    });
}

/// Whichever way it ends, and at whatever rate.
#[test]
fn connections_that_have_ended_leave_nothing() {
    type Ending = fn(&mut Rig, &mut TcpClient, FlowId);
    let endings: [(&str, Ending); 4] = [
        ("closed by the client first", |rig, client, flow| {
            client.close(rig.now);
            rig.converse(client);
            rig.upstream(flow, UpstreamEvent::ReadClosed);
            rig.converse(client);
        }),
        ("closed by the upstream first", |rig, client, flow| {
            rig.upstream(flow, UpstreamEvent::ReadClosed);
            rig.converse(client);
            client.close(rig.now);
            rig.converse(client);
        }),
        ("reset by the client", |rig, client, _| {
            client.reset();
            rig.converse(client);
        }),
        ("reset by the upstream", |rig, _, flow| {
            rig.upstream(flow, UpstreamEvent::Reset)
        }),
    ];
    for (how, end) in endings {
        assert_steady(how, |rig, time| {
            let (mut client, flow) = rig.open(&address(time), TARGET);
            client.send(100, rig.now);
            rig.converse(&mut client);
            rig.read_all(flow);
            end(rig, &mut client, flow);
            // TIME-WAIT lasts ten seconds: about a thousand of them at any time.
            rig.pass(Duration::from_millis(10));
        });
    }
}

#[test]
fn attempts_that_come_to_nothing_leave_nothing() {
    assert_steady("refused", |rig, time| {
        let syn = rig.client(&address(time), TARGET).take_outbox().remove(0);
        let flow = rig.packet(&syn.packet()).flow.expect("accepted");
        rig.upstream(flow, UpstreamEvent::Failed(UpstreamError::Refused));
        rig.pass(Duration::from_millis(10));
    });
    assert_steady("given up by the client", |rig, time| {
        let syn = rig.client(&address(time), TARGET).take_outbox().remove(0);
        rig.packet(&syn.packet());
        let reset = Segment {
            flags: RST,
            sequence: syn.sequence.wrapping_add(1),
            ..syn
        };
        rig.packet(&reset.packet());
    });
    assert_steady("never answered", |rig, time| {
        let syn = rig.client(&address(time), TARGET).take_outbox().remove(0);
        rig.packet(&syn.packet());
        rig.pass(Duration::from_secs(1)); // 130 of them at any time
    });
}

#[test]
fn sessions_that_have_ended_leave_nothing() {
    let datagram = |time| Datagram {
        source: address(time).parse().expect("an address"),
        destination: TARGET.parse().expect("an address"),
        payload: vec![7; 100],
    };
    assert_steady("mappings", |rig, time| {
        rig.packet(&datagram(time).packet());
        rig.pass(Duration::from_secs(1)); // 300 of them at any time
    });
    assert_steady("one mapping, in use", |rig, _| {
        rig.packet(&datagram(1).packet());
        rig.pass(Duration::from_secs(1));
    });
    let ip = |text: &str| text.parse().expect("an address");
    assert_steady("pings", |rig, time| {
        rig.packet(&echo_request(
            ip("10.0.0.2"),
            ip("192.0.2.7"),
            time as u16,
            1,
            b"ping",
        ));
        rig.pass(Duration::from_secs(1));
    });
}

#[test]
fn fragments_that_nobody_completes_leave_nothing() {
    let whole = Datagram {
        source: CLIENT.parse().expect("an address"),
        destination: TARGET.parse().expect("an address"),
        payload: vec![7; 3000],
    };
    assert_steady("first fragments", |rig, time| {
        let first = &fragments(&whole.packet(), time, 1480)[0];
        rig.packet(first);
        rig.pass(Duration::from_millis(100)); // 300 of them at any time
    });
    assert_steady("fragments of whole datagrams", |rig, time| {
        for fragment in fragments(&whole.packet(), time, 1480) {
            rig.packet(&fragment);
        }
    });
}

// ---- helpers ---------------------------------------------------------------------------------------------------------

const CLIENT: &str = "10.0.0.2:1001";
const TARGET: &str = "192.0.2.7:80";

fn address(time: u32) -> String {
    format!("10.0.{}.2:{}", time / 250, 1001 + time % 250)
}

/// Nothing that a test does on purpose: room for tables that have grown to their working size.
const SLACK: isize = 32 << 10;

/// Does something over and over: what the engine holds after many times is what it held after a few.
fn assert_steady(what: &str, mut again: impl FnMut(&mut Rig, u32)) {
    let config = Config {
        limits: Limits {
            buffer_per_flow: 16 << 10,
            ..Limits::default()
        },
        ..Config::default()
    };
    let mut rig = Rig::new(config, PolicySpec::default());
    let mut run = |times: std::ops::Range<u32>| {
        for time in times {
            again(&mut rig, time);
            rig.world.outputs.clear();
        }
        rig.world.outputs = Vec::new();
        live_bytes()
    };
    let early = run(0..3_000);
    let late = run(3_000..8_000);
    assert!(
        late - early < SLACK,
        "{what}: {} bytes more after 5,000 times",
        late - early
    );
}
