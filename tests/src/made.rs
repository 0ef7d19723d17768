//! Captures that the tests' own worlds and scripts make: they ship with the project, and anybody can make them again.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::{Icmpv4Type, PacketBuilder, icmpv4};

use crate::packet::{ACK, Datagram, FIN, PSH, RST, Segment, echo_request};
use crate::script::{Conversation, Script};
use crate::world::World;
use crate::world::scenario::{Answer, Setup, Step};

/// The captures by name.
pub fn captures() -> [(&'static str, Script); 3] {
    [
        ("made-office.pcap", office()),
        ("made-lossy-link.pcap", lossy_link()),
        ("made-offload.pcap", offload()),
    ]
}

const WEB: &str = "198.51.100.80:80";
const RESOLVER: &str = "198.51.100.53:53";

/// Two seconds in a small office: a name looked up, pages fetched over both versions of IP, a ping, and connections that
/// are refused, unreachable, unanswered and reset, with a scan of one host's ports from outside.
fn office() -> Script {
    let mut script = Script::new();
    let query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x07example\x00\x00\x01\x00\x01";
    let mut reply = query.to_vec();
    (reply[2], reply[3], reply[7]) = (0x81, 0x80, 1);
    reply.extend_from_slice(b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x0e\x10\x00\x04\xc6\x33\x64\x50");
    script.packet(datagram("192.0.2.10:53124", RESOLVER, query));
    script
        .wait(MILLISECOND * 12)
        .packet(datagram(RESOLVER, "192.0.2.10:53124", &reply));

    page(&mut script, "192.0.2.10:40001", WEB, 30_000);
    page(
        &mut script,
        "[2001:db8:1::10]:40100",
        "[2001:db8:2::80]:80",
        4_000,
    );

    let mut telnet = Conversation::new("192.0.2.11:40200", "198.51.100.9:23");
    let syn = telnet.syn();
    let mut refusal = telnet.from_target(RST | ACK, b"");
    (refusal.sequence, refusal.window) = (0, 0);
    script.segments([&syn, &refusal]);

    let syn = Conversation::new("192.0.2.11:40201", "203.0.113.77:443").syn();
    script.wait(MILLISECOND * 100).segment(&syn);
    script.wait(MILLISECOND * 40).packet(host_unreachable(&syn));

    let (host, gateway) = ([192, 0, 2, 12], [198, 51, 100, 1]);
    for sequence in 1..=3 {
        script.wait(MILLISECOND * 200).packet(echo_request(
            host.into(),
            gateway.into(),
            77,
            sequence,
            &[0x21; 48],
        ));
        let mut reply = Vec::new();
        PacketBuilder::ipv4(gateway, host, 64)
            .icmpv4_echo_reply(77, sequence)
            .write(&mut reply, &[0x21; 48])
            .expect("it fits");
        script.wait(MILLISECOND * 8).packet(reply);
    }

    let mut reset = Conversation::new("192.0.2.12:40300", "198.51.100.22:22");
    script.segments(&reset.handshake());
    script.segments([
        &reset.answer(b"SSH-2.0-example\r\n"),
        &reset.ack(),
        &reset.from_client(RST | ACK, b""),
    ]);

    for port in [21, 22, 23, 25, 80, 110, 143, 443, 445, 3389, 5900, 8080] {
        let mut probe = Conversation::new("203.0.113.66:61000", &format!("192.0.2.10:{port}"));
        let syn = probe.syn();
        let mut closed = probe.from_target(RST | ACK, b"");
        (closed.sequence, closed.window) = (0, 0);
        script.segments([&syn, &closed]);
    }

    let lonely = Conversation::new("192.0.2.10:40400", "203.0.113.200:8443").syn();
    script.segments([&lonely]);
    script.wait(Duration::from_secs(1)).segment(&lonely);
    script
}

/// A connection over a link that loses, repeats and reorders packets, as it looks at the appliance's device.
fn lossy_link() -> Script {
    let mut world = World::new(
        Setup {
            seed: 5,
            ..Setup::default()
        },
        "made-lossy-link",
    );
    world.tap();
    let client = 0;
    for step in [
        Step::ClientConnects { client },
        Step::UpstreamAnswers {
            client,
            answer: Answer::Accepts,
        },
        Step::LinkBecomes {
            loss: 6,
            repeats: 4,
            delay_millis: 20,
            jitter_millis: 8,
        },
        Step::ClientSends {
            client,
            bytes: 20_000,
        },
        Step::UpstreamSends {
            client,
            bytes: 30_000,
        },
        Step::TimePasses { millis: 20_000 },
    ] {
        world.apply(&step);
    }
    world.conclude();
    world.capture().clone()
}

/// A connection captured on a host whose network card segments and sums: packets of 20,000 bytes, of which only the
/// pseudo-header is summed up.
fn offload() -> Script {
    let mut script = Script::new();
    let mut tcp = Conversation::new("192.0.2.10:40500", WEB);
    script.segments(&tcp.handshake());
    for index in 0..2_u8 {
        let request = tcp.from_client(ACK | PSH, &vec![b'a' + index; 20_000]);
        script.wait(MILLISECOND).packet(unfinished(&request));
        script.segments([&tcp.target_ack()]);
        script
            .wait(MILLISECOND)
            .packet(unfinished(&tcp.answer(&vec![b'A' + index; 20_000])));
        script.segments([&tcp.ack()]);
    }
    script.segments([
        &tcp.from_client(FIN | ACK, b""),
        &tcp.from_target(FIN | ACK, b""),
        &tcp.ack(),
    ]);
    script
}

const MILLISECOND: Duration = Duration::from_millis(1);

/// A page of `len` bytes, fetched over a connection of its own.
fn page(script: &mut Script, client: &str, server: &str, len: usize) {
    let mut tcp = Conversation::new(client, server);
    script.wait(MILLISECOND * 20).segments(&tcp.handshake());
    script.segments([
        &tcp.from_client(ACK | PSH, b"GET / HTTP/1.1\r\nHost: www.example\r\n\r\n"),
        &tcp.target_ack(),
    ]);
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\n\r\n");
    let mut answer = head.into_bytes();
    answer.resize(answer.len() + len, b'.');
    for part in answer.chunks(2 * 1400) {
        let (first, second) = part.split_at(part.len().min(1400));
        script.segments([&tcp.answer(first), &tcp.answer(second), &tcp.ack()]);
    }
    script.segments([
        &tcp.from_client(FIN | ACK, b""),
        &tcp.from_target(FIN | ACK, b""),
        &tcp.ack(),
    ]);
}

fn datagram(source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
    let address = |text: &str| text.parse::<SocketAddr>().expect("address and port");
    let datagram = Datagram {
        source: address(source),
        destination: address(destination),
        payload: payload.to_vec(),
    };
    datagram.packet()
}

/// What a router says of a segment that it cannot deliver.
pub fn host_unreachable(segment: &Segment) -> Vec<u8> {
    let IpAddr::V4(client) = segment.source.ip() else {
        panic!("a segment over IPv4")
    };
    let mut packet = Vec::new();
    PacketBuilder::ipv4([198, 51, 100, 1], client.octets(), 64)
        .icmpv4(Icmpv4Type::DestinationUnreachable(
            icmpv4::DestUnreachableHeader::Host,
        ))
        .write(&mut packet, &segment.packet())
        .expect("it fits");
    packet
}

/// A packet over IPv4 as it is before the network card has summed it up: the checksum is that of the pseudo-header.
pub fn unfinished(segment: &Segment) -> Vec<u8> {
    let mut packet = segment.packet();
    let words = packet[12..20]
        .chunks_exact(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum = words.sum::<u32>() + 6 + packet.len() as u32 - 20;
    let folded = ((sum & 0xffff) + (sum >> 16)) as u16;
    packet[36..38].copy_from_slice(&folded.to_be_bytes());
    packet
}
