//! How connections end, on either side's wish or by time.

use super::*;

#[test]
fn client_closes_first_and_data_still_flows_back() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    client.send(&mut rig, b"question");
    client.finish(&mut rig);
    assert_eq!(
        rig.commands(),
        [Command::Readable],
        "not before all bytes are read"
    );
    assert_eq!(rig.read_all(flow), b"question");
    assert_eq!(rig.commands(), [Command::CloseWrite]);
    rig.segments();
    rig.write(flow, b"answer");
    assert_eq!(client.receive(&mut rig), (b"answer".to_vec(), false));
    rig.upstream(flow, UpstreamEvent::ReadClosed);
    assert_eq!(rig.commands(), [Command::Close]);
    assert_eq!(client.receive(&mut rig), (vec![], true));
    assert_eq!(closed(&mut rig), [CloseReason::Finished]);
    assert_eq!((rig.engine.open_flows(), rig.engine.buffer_bytes()), (0, 0));
}

#[test]
fn upstream_closes_first_and_data_still_flows_forth() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    rig.write(flow, b"banner");
    rig.upstream(flow, UpstreamEvent::ReadClosed);
    assert_eq!(client.receive(&mut rig), (b"banner".to_vec(), true));
    client.send(&mut rig, b"late");
    assert_eq!(rig.read_all(flow), b"late");
    client.finish(&mut rig);
    let commands = rig.commands();
    assert_eq!(commands, [Command::Readable, Command::CloseWrite, Command::Close]);
    let events = rig.events();
    assert!(matches!(
        events[..],
        [Event::Closed {
            reason: CloseReason::Finished,
            to_upstream: 4,
            to_client: 6,
            ..
        }]
    ));
    assert_eq!((rig.engine.open_flows(), rig.engine.buffer_bytes()), (0, 0));
}

/// The last segment comes before the one ahead of it: its FIN counts as soon as nothing is missing.
#[test]
fn a_fin_that_overtakes_bytes_counts_once_they_have_come() {
    let mut rig = Rig::new();
    let (client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    let data = pattern(200);
    let behind = client.sequence.wrapping_add(100);
    rig.packet(&client.segment_at(behind, ACK | FIN, &data[100..]));
    assert_eq!(rig.commands(), []);
    rig.packet(&client.segment_at(client.sequence, ACK, &data[..100]));
    assert_eq!(rig.read_all(flow), data);
    assert_eq!(rig.commands(), [Command::Readable, Command::CloseWrite]);
    let acknowledged = rig.segments().pop().expect("an ACK").acknowledgment;
    assert_eq!(acknowledged, client.sequence.wrapping_add(201));
}

/// The same client, which has not heard of its FIN and repeats all that it thinks lost.
#[test]
fn a_fin_is_taken_with_bytes_that_had_come_without_it() {
    let mut rig = Rig::new();
    let (client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    rig.packet(&client.segment(ACK, b"all of it"));
    rig.packet(&client.segment(ACK | FIN, b"all of it"));
    assert_eq!(rig.read_all(flow), b"all of it");
    assert_eq!(rig.commands(), [Command::Readable, Command::CloseWrite]);
}

/// The acknowledgment of our FIN is lost, and comes again only on a FIN that is a repetition: the connection ends.
#[test]
fn a_lost_acknowledgment_of_our_fin_comes_with_the_clients_repeated_fin() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    client.finish(&mut rig);
    rig.read_all(flow);
    rig.upstream(flow, UpstreamEvent::ReadClosed);
    rig.commands();
    let fin = rig.segments().pop().expect("our FIN");
    assert_eq!(fin.flags & FIN, FIN);
    client.expected = client.expected.wrapping_add(1);
    assert_eq!(closed(&mut rig), []);
    rig.packet(&client.segment_at(client.sequence - 1, ACK | FIN, &[]));
    assert_eq!(closed(&mut rig), [CloseReason::Finished]);
    assert_eq!((rig.engine.open_flows(), rig.engine.buffer_bytes()), (0, 0));
}

#[test]
fn a_lost_last_ack_is_repeated_in_time_wait() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    rig.upstream(flow, UpstreamEvent::ReadClosed);
    assert!(client.receive(&mut rig).1);
    client.finish(&mut rig);
    let ack = rig.segment();
    assert_eq!((ack.flags, ack.acknowledgment), (ACK, client.sequence));
    rig.packet(&client.segment_at(client.sequence - 1, ACK | FIN, &[]));
    let again = rig.segment();
    assert_eq!(
        (again.flags, again.acknowledgment, again.sequence),
        (ACK, client.sequence, client.expected)
    );
    rig.pass(Duration::from_secs(10));
    assert_eq!(
        rig.packet(&client.segment(ACK, b"x")).dropped,
        Some(DropReason::NoFlow),
        "all forgotten"
    );
}

#[test]
fn a_syn_in_time_wait_makes_a_new_flow() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    rig.upstream(flow, UpstreamEvent::ReadClosed);
    assert!(client.receive(&mut rig).1);
    client.finish(&mut rig);
    rig.sent();
    let mut again = Client {
        sequence: client.sequence + 1,
        ..client
    };
    let second = again.connect(&mut rig);
    assert_ne!(second, flow);
    again.send(&mut rig, b"new");
    assert_eq!(rig.read_all(second), b"new");
}

#[test]
fn a_syn_with_another_number_replaces_one_that_waits() {
    let mut rig = Rig::new();
    let client = Client::new(CLIENT, TARGET);
    rig.packet(&client.syn());
    rig.packet(
        &Client {
            sequence: 5_000,
            ..client
        }
        .syn(),
    );
    assert!(matches!(
        rig.commands()[..],
        [Command::Open(_), Command::Abort, Command::Open(_)]
    ));
    assert_eq!(closed(&mut rig), [CloseReason::Replaced]);
}

#[test]
fn half_closed_flow_expires_after_its_last_byte() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    client.finish(&mut rig);
    rig.commands();
    rig.pass(Duration::from_secs(200));
    rig.segments();
    rig.write(flow, b"slow");
    assert_eq!(client.receive(&mut rig).0, b"slow");
    rig.pass(Duration::from_secs(239));
    assert_eq!(rig.engine.open_flows(), 1, "the timer runs from the last byte");
    rig.pass(Duration::from_secs(1));
    assert_eq!(rig.commands(), [Command::Abort]);
    assert_eq!(rig.segment().flags & RST, RST);
    assert_eq!(closed(&mut rig), [CloseReason::HalfCloseTimeout]);
}

#[test]
fn an_idle_flow_lives_as_long_as_rfc_5382_asks() {
    let mut rig = Rig::new();
    let (client, _) = Client::open(CLIENT, TARGET, &mut rig);
    rig.pass(Duration::from_secs(7439));
    assert_eq!(rig.engine.open_flows(), 1);
    // A keep-alive: one byte below what is expected. It is answered, and counts.
    rig.packet(&client.segment_at(client.sequence - 1, ACK, &[]));
    assert_eq!(rig.segment().acknowledgment, client.sequence);
    rig.pass(Duration::from_secs(7439));
    assert_eq!(rig.engine.open_flows(), 1);
    rig.pass(Duration::from_secs(1));
    assert_eq!(closed(&mut rig), [CloseReason::IdleTimeout]);
}

#[test]
fn a_client_that_vanishes_is_given_up() {
    let mut rig = Rig::new();
    let (_, flow) = Client::open(CLIENT, TARGET, &mut rig);
    rig.pass(Duration::from_secs(1000)); // silence before the data counts for nothing
    rig.write(flow, b"anyone?");
    rig.pass(Duration::from_secs(299));
    assert_eq!(rig.engine.open_flows(), 1);
    assert!(rig.segments().len() > 5, "retransmitted");
    rig.pass(Duration::from_secs(1));
    assert_eq!(closed(&mut rig), [CloseReason::ClientUnresponsive]);
}

#[test]
fn a_window_that_closes_with_data_in_flight_does_not_hang_the_flow() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open(CLIENT, TARGET, &mut rig);
    client.window = 20;
    rig.packet(&client.segment(ACK, &[]));
    let data = pattern(2_560); // fills 20 << 7 exactly
    rig.write(flow, &data);
    let segments = rig.segments();
    // The first arrives, the second is lost; the ACK of the first closes the window, and later it opens again.
    client.expected = client.expected.wrapping_add(segments[0].payload.len() as u32);
    client.window = 0;
    rig.packet(&client.segment(ACK, &[]));
    client.window = 20;
    rig.packet(&client.segment(ACK, &[]));
    let mut received = segments[0].payload.clone();
    for _ in 0..10 {
        rig.pass(Duration::from_secs(1));
        received.extend(client.receive(&mut rig).0);
    }
    assert!(received == data, "{} of {} bytes", received.len(), data.len());
}
