//! Packets and connections in numbers and shapes that nobody sends in good faith: nothing is left of them, and they
//! stop nobody.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};

use etherparse::{
    IpFragOffset, IpNumber, Ipv4Header, Ipv6FragmentHeader, Ipv6Header, PacketBuilder, UdpHeader,
};
use nix::sys::signal::Signal;
use socket2::{Domain, Socket, Type};
use support::packets::{DEVICE, DEVICE6, Injector, syn};
use support::peers::{Echo, held, is_echoed};
use support::{Appliance, Lab, PATIENCE, SERVER6, amount, file, skipped, text, wait_until};

#[test]
fn connections_beyond_the_descriptors_are_refused_and_the_others_live_on() {
    if skipped(&["prlimit"]) {
        return;
    }
    let lab = Lab::new();
    let appliance = Appliance::start_by(&lab.host, &["prlimit", "--nofile=150:150"]);
    let _echo = Echo::start(&lab.server, "192.0.2.7:1001");
    let mut early = lab.host.connect("192.0.2.7:1001").unwrap();
    let target: SocketAddr = "192.0.2.7:1001".parse().unwrap();
    let mut streams = lab.host.enter(|| {
        let tries = (0..200).map(|_| TcpStream::connect_timeout(&target, PATIENCE));
        tries.collect::<Vec<_>>()
    });
    let refused = streams.iter().filter(|stream| stream.is_err()).count();
    assert!((50..150).contains(&refused), "{refused} of 200 are refused");
    for stream in streams.iter_mut().flatten() {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        is_echoed(stream);
    }
    is_echoed(&mut early);
    drop(streams);
    wait_until(|| lab.host.connect("192.0.2.7:1001").is_ok());
    is_echoed(&mut early);
    appliance.stop();
}

#[test]
fn a_flood_of_syns_to_closed_ports_leaves_nothing_and_stops_nobody() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let _echo = Echo::start(&lab.server, "192.0.2.7:1001");
    let worker = appliance.worker();
    let injector = Injector::new(&lab.host);
    let flood = |count: usize| {
        for number in 0..count {
            let port = 10_000 + (number % 50_000) as u16;
            injector.send(&syn(
                port,
                [192, 0, 2, 8],
                2000 + (number / 50_000) as u16,
                number as u32,
            ));
            if number % 1000 == 0 {
                is_echoed(&mut lab.host.connect("192.0.2.7:1001").unwrap());
            }
        }
        wait_until(|| text(&lab.host.run("ss -Htan state syn-sent").stdout).is_empty());
    };
    flood(2000);
    let (descriptors, memory) = held(worker);
    flood(amount(10_000, 100_000));
    wait_until(|| held(worker).0 <= descriptors);
    let after = held(worker).1;
    assert!(after < memory + 8192, "{memory} kB before, {after} kB after");
    is_echoed(&mut lab.host.connect("192.0.2.7:1001").unwrap());
    appliance.stop();
}

#[test]
fn a_flood_of_syns_to_silence_stops_nobody() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let configuration = file(directory.path(), "tungate.toml", "[limits]\nhalf_open = 200\n");
    let appliance = lab.appliance(&["-c", &configuration]);
    let _echo = Echo::start(&lab.server, "192.0.2.7:1001");
    let injector = Injector::new(&lab.host);
    for number in 0..2000_u16 {
        // Nobody has this address.
        injector.send(&syn(10_000 + number, [192, 0, 2, 99], 80, 1));
        if number % 200 == 0 {
            is_echoed(&mut lab.host.connect("192.0.2.7:1001").unwrap());
        }
    }
    is_echoed(&mut lab.host.connect("192.0.2.7:1001").unwrap());
    drop(appliance);
}

#[test]
fn short_connections_leave_nothing_behind() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let _echo = Echo::start(&lab.server, "192.0.2.7:1001");
    let worker = appliance.worker();
    let target: SocketAddr = "192.0.2.7:1001".parse().unwrap();
    let connect = |count: usize| {
        lab.host.enter(|| {
            for _ in 0..count {
                is_echoed(&mut TcpStream::connect_timeout(&target, PATIENCE).unwrap());
            }
        });
    };
    connect(500);
    wait_until(|| text(&lab.host.run("ss -Htan state established").stdout).is_empty());
    let (descriptors, memory) = held(worker);
    connect(amount(2000, 20_000));
    wait_until(|| held(worker).0 <= descriptors);
    let after = held(worker).1;
    assert!(after < memory + 4096, "{memory} kB before, {after} kB after");
    appliance.stop();
}

#[test]
fn one_pair_of_endpoints_is_used_again_at_once() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    for (address, from) in [
        ("192.0.2.7:1001", "198.18.0.2:40000"),
        ("[2001:db8::7]:1001", "[fd74:756e::2]:40000"),
    ] {
        let listener = lab.server.listen(address);
        let (address, from): (SocketAddr, SocketAddr) = (address.parse().unwrap(), from.parse().unwrap());
        for _ in 0..20 {
            let socket = lab.host.enter(|| {
                let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket.bind(&from.into()).unwrap();
                socket.connect_timeout(&address.into(), PATIENCE).unwrap();
                socket
            });
            // The server closes first, so that it is the appliance that remembers the connection.
            let (mut server, _) = listener.accept().unwrap();
            server.write_all(b"bye").unwrap();
            server.shutdown(std::net::Shutdown::Write).unwrap();
            let mut stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut heard = String::new();
            stream.read_to_string(&mut heard).unwrap();
            assert_eq!(heard, "bye");
            drop(stream);
            server.set_read_timeout(Some(PATIENCE)).unwrap();
            assert_eq!(server.read(&mut [0]).unwrap(), 0);
        }
    }
    appliance.stop();
}

#[test]
fn forged_resets_and_random_packets_end_nothing() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let _echo = Echo::start(&lab.server, "192.0.2.7:1001");
    let mut stream = lab.host.connect("192.0.2.7:1001").unwrap();
    is_echoed(&mut stream);
    let injector = Injector::new(&lab.host);
    let port = stream.local_addr().unwrap().port();
    let mut random = Random(1);
    for _ in 0..200 {
        let mut packet = Vec::new();
        PacketBuilder::ipv4(DEVICE, [192, 0, 2, 7], 64)
            .tcp(port, 1001, random.next() as u32, 1000)
            .rst()
            .write(&mut packet, &[])
            .unwrap();
        injector.send(&packet);
    }
    is_echoed(&mut stream);
    for _ in 0..amount(20_000, 1_000_000) {
        let len = 1 + random.next() as usize % 200;
        let mut packet: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        // Often enough something that looks like a packet from the open connection.
        if random.next().is_multiple_of(2) && len > 40 {
            let header = syn(port, [192, 0, 2, 7], 1001, random.next() as u32);
            let kept = random.next() as usize % header.len();
            packet[..kept].copy_from_slice(&header[..kept]);
        }
        injector.send(&packet);
    }
    is_echoed(&mut lab.host.connect("192.0.2.7:1001").unwrap());
    appliance.signal(Signal::SIGTERM);
    drop(stream);
    let ended = appliance.log.wait(|line| line["message"] == "ended");
    println!("{ended}");
    assert!(
        !appliance.log.all().contains("\"internal\""),
        "{}",
        appliance.log.all()
    );
}

struct Random(u64);

impl Random {
    /// xorshift64*: as good as it has to be.
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }
}

#[test]
fn fragments_in_any_order_and_extension_headers_pass() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let injector = Injector::new(&lab.host);
    let payload: Vec<u8> = (0..4000_u32).map(|at| (at ^ (at >> 8)) as u8).collect();

    let (client, server) = (lab.host.udp("198.18.0.2:5000"), lab.server.udp("192.0.2.7:1000"));
    let header = UdpHeader::with_ipv4_checksum(
        5000,
        1000,
        &Ipv4Header::new(0, 64, IpNumber::UDP, DEVICE, [192, 0, 2, 7]).unwrap(),
        &payload,
    );
    let datagram = [&header.unwrap().to_bytes()[..], &payload].concat();
    let mut fragments = Vec::new();
    for (number, part) in datagram.chunks(1000).enumerate() {
        let mut ip = Ipv4Header::new(part.len() as u16, 64, IpNumber::UDP, DEVICE, [192, 0, 2, 7]).unwrap();
        ip.identification = 77;
        ip.fragment_offset = IpFragOffset::try_new((number * 1000 / 8) as u16).unwrap();
        ip.more_fragments = (number + 1) * 1000 < datagram.len();
        ip.header_checksum = ip.calc_header_checksum();
        fragments.push([&ip.to_bytes()[..], part].concat());
    }
    exchange_out_of_order(&injector, fragments, &client, &server, &payload);

    let (source, target): (std::net::Ipv6Addr, std::net::Ipv6Addr) =
        (DEVICE6.parse().unwrap(), SERVER6.parse().unwrap());
    let address = format!("[{DEVICE6}]:5000");
    let (client, server) = (lab.host.udp(&address), lab.server.udp("[2001:db8::7]:1000"));
    let header = UdpHeader::with_ipv6_checksum(
        5000,
        1000,
        &Ipv6Header {
            source: source.octets(),
            destination: target.octets(),
            ..Ipv6Header::default()
        },
        &payload,
    );
    let datagram = [&header.unwrap().to_bytes()[..], &payload].concat();
    let mut fragments = Vec::new();
    for (number, part) in datagram.chunks(1000).enumerate() {
        let fragment = Ipv6FragmentHeader::new(
            IpNumber::UDP,
            IpFragOffset::try_new((number * 1000 / 8) as u16).unwrap(),
            (number + 1) * 1000 < datagram.len(),
            77,
        );
        // Hop-by-hop options and destination options before it, of padding alone.
        let options = [&[60, 0, 1, 4, 0, 0, 0, 0][..], &[44, 0, 1, 4, 0, 0, 0, 0]].concat();
        let ip = Ipv6Header {
            payload_length: (options.len() + 8 + part.len()) as u16,
            next_header: IpNumber(0),
            hop_limit: 64,
            source: source.octets(),
            destination: target.octets(),
            ..Ipv6Header::default()
        };
        fragments.push([&ip.to_bytes()[..], &options, &fragment.to_bytes(), part].concat());
    }
    exchange_out_of_order(&injector, fragments, &client, &server, &payload);
    appliance.stop();
}

/// Sends fragments last first, and the second twice; the server gets them whole, and so does the client its answer.
fn exchange_out_of_order(
    injector: &Injector,
    mut fragments: Vec<Vec<u8>>,
    client: &UdpSocket,
    server: &UdpSocket,
    payload: &[u8],
) {
    fragments.reverse();
    fragments.swap(0, 1);
    fragments.iter().for_each(|fragment| injector.send(fragment));
    let mut buffer = vec![0; 65_536];
    let (len, from) = server.recv_from(&mut buffer).unwrap();
    assert!(buffer[..len] == *payload, "{len} bytes");
    server.send_to(payload, from).unwrap();
    let len = client.recv(&mut buffer).unwrap();
    assert!(buffer[..len] == *payload, "{len} bytes");
}
