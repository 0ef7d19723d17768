//! Names that clients learn by DNS, and the resolver that answers in others' place.

use tungate_engine::dns::Learned;
use tungate_engine::event::NameSource;
use tungate_engine::io::Open;

use super::*;

const CLIENT: &str = "10.0.0.2:5353";

/// A question for the IPv4 address of `name`; with an `address`, the answer to it (RFC 1035, section 4).
fn message(id: u16, name: &str, address: Option<[u8; 4]>) -> Vec<u8> {
    let (flags, answers) = match address {
        None => (0x0100_u16, 0),
        Some(_) => (0x8180, 1),
    };
    let mut message = Vec::new();
    for field in [id, flags, 1, answers, 0, 0] {
        message.extend_from_slice(&field.to_be_bytes());
    }
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend_from_slice(label.as_bytes());
    }
    message.extend_from_slice(&[0, 0, 1, 0, 1]);
    if let Some(address) = address {
        // The question's name, type A, class IN, 300 s, 4 bytes.
        message.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4]);
        message.extend_from_slice(&address);
    }
    message
}

/// Has `client` ask for `name`, and `from` answer.
fn look_up(rig: &mut Rig, client: &str, name: &str, from: &str) {
    let server = match address(client) {
        SocketAddr::V4(_) => RESOLVER,
        SocketAddr::V6(_) => "[2001:db8::53]:53",
    };
    let judgement = rig.packet(&udp(client, server, &message(7, name, None)));
    let answer = message(7, name, Some([198, 51, 100, 9]));
    let event = UpstreamEvent::Datagram {
        source: address(from),
        payload: &answer,
        segment_size: None,
    };
    rig.upstream(judgement.flow.unwrap(), event);
}

/// The name that a new connection of `client` to 198.51.100.9 gets.
fn name_of_connection(rig: &mut Rig, client: &str) -> Option<(String, NameSource)> {
    rig.events();
    rig.packet(&Client::new(client, "198.51.100.9:443").syn());
    rig.events().into_iter().find_map(|event| match event {
        Event::Named { name, source, .. } => Some((name, source)),
        _ => None,
    })
}

fn by_dns(name: &str) -> Option<(String, NameSource)> {
    Some((name.to_owned(), NameSource::Dns))
}

#[test]
fn a_flow_has_the_name_that_its_client_was_told() {
    let mut rig = Rig::new();
    look_up(&mut rig, CLIENT, "www.example.org", RESOLVER);
    assert_eq!(
        name_of_connection(&mut rig, "10.0.0.2:1000"),
        by_dns("www.example.org")
    );
    assert_eq!(
        name_of_connection(&mut rig, "10.0.0.3:1000"),
        None,
        "who has not asked knows no name"
    );
    // A mapping has the name of its first target, and so has a ping.
    rig.packet(&udp("10.0.0.2:2000", "198.51.100.9:443", b"quic"));
    rig.packet(&echo_request("10.0.0.2", "198.51.100.9", 1, 1, b""));
    let named = rig
        .events()
        .iter()
        .filter(|event| matches!(event, Event::Named { .. }))
        .count();
    assert_eq!(named, 2);
    // The time to live was 300 s.
    rig.pass(Duration::from_secs(299));
    assert_eq!(
        name_of_connection(&mut rig, "10.0.0.2:1001"),
        by_dns("www.example.org")
    );
    rig.pass(Duration::from_secs(1));
    assert_eq!(name_of_connection(&mut rig, "10.0.0.2:1002"), None);
}

#[test]
fn this_host_is_one_client_with_both_its_addresses() {
    let mut rig = Rig::new();
    look_up(
        &mut rig,
        "[fd74:756e::2]:5353",
        "www.example.org",
        "[2001:db8::53]:53",
    );
    assert_eq!(
        name_of_connection(&mut rig, "198.18.0.2:1000"),
        by_dns("www.example.org")
    );
    assert_eq!(name_of_connection(&mut rig, "198.18.0.3:1000"), None);
}

#[test]
fn an_answer_from_somebody_else_teaches_nothing() {
    let mut rig = Rig::new();
    look_up(&mut rig, CLIENT, "www.example.org", "203.0.113.66:53");
    assert_eq!(rig.sent().len(), 1, "it passes, since mappings let anybody in");
    assert_eq!(name_of_connection(&mut rig, "10.0.0.2:1000"), None);
}

#[test]
fn an_answer_that_a_list_keeps_from_the_client_teaches_nothing() {
    let deny = ListEntry {
        action: ListAction::Deny,
        network: "10.0.0.2/32".parse().unwrap(),
        protocol: ListProtocol::Udp,
        ports: Some(PortRange {
            first: 5353,
            last: 5353,
        }),
        expires: None,
    };
    let policy = PolicySpec {
        lists: vec![deny],
        ..PolicySpec::default()
    };
    let mut rig = Rig::with(Config::default(), policy);
    look_up(&mut rig, CLIENT, "www.example.org", RESOLVER);
    assert_eq!(name_of_connection(&mut rig, "10.0.0.2:1000"), None);
}

#[test]
fn answers_over_tcp_name_flows_too_and_other_shards_hear_of_them() {
    let mut rig = Rig::new();
    let (mut client, flow) = Client::open("10.0.0.2:4000", RESOLVER, &mut rig);
    let framed = |message: Vec<u8>| [&(message.len() as u16).to_be_bytes()[..], &message].concat();
    client.send(&mut rig, &framed(message(9, "tcp.example.org", None)));
    rig.read_all(flow);
    let answer = framed(message(9, "tcp.example.org", Some([198, 51, 100, 9])));
    for part in answer.chunks(10) {
        rig.write(flow, part);
    }
    assert_eq!(client.receive(&mut rig).0, answer);
    assert_eq!(
        name_of_connection(&mut rig, "10.0.0.2:1000"),
        by_dns("tcp.example.org")
    );

    let expected = Learned {
        ingress: tungate_engine::IngressId(0),
        client: "10.0.0.2".parse().unwrap(),
        name: "tcp.example.org".to_owned(),
        addresses: vec![("198.51.100.9".parse().unwrap(), Duration::from_secs(300))],
    };
    assert_eq!(rig.world.learned, [expected]);
    let mut other = Rig::new();
    other.handle(Input::Learned(&rig.world.learned[0]));
    assert_eq!(
        name_of_connection(&mut other, "10.0.0.2:1000"),
        by_dns("tcp.example.org")
    );
    assert!(other.world.learned.is_empty(), "it is not passed on");
}

#[test]
fn a_resolver_answers_in_place_of_those_that_clients_ask() {
    let resolver = "[2001:db8::53]:5300";
    let rule = Rule {
        name: "this one itself".to_owned(),
        matches: RuleMatch {
            targets: vec!["203.0.113.53/32".parse().unwrap()],
            ..RuleMatch::default()
        },
        action: Action::Direct,
    };
    let policy = PolicySpec {
        rules: vec![rule],
        resolver: Some(address(resolver)),
        ..PolicySpec::default()
    };
    let mut rig = Rig::with(Config::default(), policy);
    let asked = |rig: &mut Rig| {
        let commands = rig.commands();
        commands.iter().find_map(|command| match command {
            Command::Open(Open { target, .. }) => Some(target.to_string()),
            _ => None,
        })
    };
    let judgement = rig.packet(&udp(CLIENT, RESOLVER, &message(7, "example.org", None)));
    assert_eq!(judgement.rule, Some(RuleRef::Resolver));
    assert_eq!(asked(&mut rig).as_deref(), Some(resolver));
    let answer = message(7, "example.org", Some([198, 51, 100, 9]));
    let event = UpstreamEvent::Datagram {
        source: address(resolver),
        payload: &answer,
        segment_size: None,
    };
    rig.upstream(judgement.flow.unwrap(), event);
    let [(source, destination, payload)] = &datagrams(&mut rig)[..] else {
        panic!("one answer")
    };
    assert_eq!((*source, *destination), (address(RESOLVER), address(CLIENT)));
    assert_eq!(*payload, answer);
    assert_eq!(
        name_of_connection(&mut rig, "10.0.0.2:1000"),
        by_dns("example.org")
    );
    rig.commands();

    rig.packet(&Client::new("10.0.0.2:1001", RESOLVER).syn());
    assert_eq!(asked(&mut rig).as_deref(), Some(resolver), "over TCP");
    rig.packet(&udp("10.0.0.2:1002", "203.0.113.53:53", b"?"));
    assert_eq!(
        asked(&mut rig).as_deref(),
        Some("203.0.113.53:53"),
        "a rule says otherwise"
    );
    rig.packet(&udp("10.0.0.2:1003", "192.0.2.53:123", b"?"));
    assert_eq!(asked(&mut rig).as_deref(), Some("192.0.2.53:123"), "no query");
}
