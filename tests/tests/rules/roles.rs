//! Rule 1: who is client and who is target.

use std::time::Duration;

use tungate_sim::outcome::{FlowRecord, Side};
use tungate_sim::replay::Options;
use tungate_tests::packet::{ACK, Datagram, SYN};
use tungate_tests::script::{Conversation, Script};

const CLIENT: &str = "10.0.0.2:40000";
const TARGET: &str = "192.0.2.7:80";

fn roles(flow: &FlowRecord) -> (String, String) {
    (flow.client.to_string(), flow.target.to_string())
}

fn expected(client: &str, target: &str) -> (String, String) {
    (client.to_owned(), target.to_owned())
}

fn datagram(source: &str, destination: &str) -> Vec<u8> {
    let datagram = Datagram {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        payload: b"datagram".to_vec(),
    };
    datagram.packet()
}

#[test]
fn the_sender_of_the_syn_is_the_client() {
    let mut tcp = Conversation::new(CLIENT, TARGET);
    let (syn, syn_ack) = (tcp.syn(), tcp.syn_ack());
    // Even where another packet of the same conversation was captured before it.
    let played = Script::new().segments([&syn_ack, &syn, &tcp.ack()]).replay();
    assert_eq!(roles(played.flow()), expected(CLIENT, TARGET));
    assert_eq!(played.packets[1].side, Side::Client);
}

#[test]
fn without_a_syn_the_receiver_of_the_syn_ack_is_the_client() {
    let mut tcp = Conversation::new(CLIENT, TARGET);
    let [_, syn_ack, ack] = tcp.handshake();
    let played = Script::new().segments([&syn_ack, &ack]).replay();
    assert_eq!(roles(played.flow()), expected(CLIENT, TARGET));
}

#[test]
fn without_either_the_sender_of_the_first_packet_is_the_client() {
    let mut tcp = Conversation::new(CLIENT, TARGET);
    tcp.handshake();
    let (ask, answer) = (tcp.ask(b"one"), tcp.answer(b"two"));
    let played = Script::new().segments([&ask, &answer]).replay();
    assert_eq!(roles(played.flow()), expected(CLIENT, TARGET));
    let played = Script::new().segments([&answer, &ask]).replay();
    assert_eq!(roles(played.flow()), expected(TARGET, CLIENT));
}

#[test]
fn where_only_some_networks_have_clients_nobody_else_is_one() {
    let mut inside = Conversation::new(TARGET, CLIENT);
    let options = Options {
        clients: vec!["10.0.0.0/8".parse().unwrap()],
        ..Options::default()
    };
    let played = Script::new().segments(&inside.handshake()).replay_with(&options);
    assert_eq!(roles(played.flow()), expected(CLIENT, TARGET));
    let sides: Vec<_> = played.packets.iter().map(|packet| packet.side).collect();
    assert_eq!(sides, [Side::Target, Side::Client, Side::Target]);

    let mut outside = Conversation::new("192.0.2.1:1", "192.0.2.7:80");
    let played = Script::new().segments(&outside.handshake()).replay_with(&options);
    assert!(played.flows.is_empty(), "{:?}", played.flows);
    let totals = &played.outcome().totals;
    assert_eq!((totals.judged, totals.from_target, totals.drop), (3, 3, 0));
}

#[test]
fn when_both_sides_send_a_syn_the_first_is_the_client() {
    let mut tcp = Conversation::new(CLIENT, TARGET);
    let syn = tcp.syn();
    let mut other = tcp.from_target(SYN, b"");
    other.acknowledgment = 0;
    let both = [tcp.from_client(SYN | ACK, b""), tcp.from_target(SYN | ACK, b"")];
    let played = Script::new()
        .segments([&syn, &other, &both[0], &both[1]])
        .replay();
    let flow = played.flow();
    assert_eq!(roles(flow), expected(CLIENT, TARGET));
    assert!(
        flow.anomalies.contains(&"split-handshake"),
        "{:?}",
        flow.anomalies
    );
}

#[test]
fn udp_to_a_live_mapping_comes_from_the_target_whoever_sends_it() {
    const INSIDE: &str = "10.0.0.2:5000";
    const STRANGER: &str = "198.51.100.9:1234";
    let mut script = Script::new();
    script.packet(datagram(INSIDE, "192.0.2.7:7000"));
    script
        .wait(Duration::from_secs(299))
        .packet(datagram(STRANGER, INSIDE));
    // A mapping's idle time is 300 s, and what comes in does not refresh it for ever.
    script
        .wait(Duration::from_secs(700))
        .packet(datagram(STRANGER, INSIDE));
    let played = script.replay();
    let sides: Vec<_> = played.packets.iter().map(|packet| packet.side).collect();
    assert_eq!(sides, [Side::Client, Side::Target, Side::Client]);
    assert_eq!(roles(&played.flows[2]), expected(STRANGER, INSIDE));
}
