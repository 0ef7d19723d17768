//! What goes wrong around a running appliance, and that nothing is lost, leaked or sent another way by it.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etherparse::{
    IpFragOffset, IpNumber, Ipv4Header, Ipv6FragmentHeader, Ipv6Header, PacketBuilder, UdpHeader,
};
use nix::sys::signal::{Signal, kill};
use socket2::{Domain, Socket, Type};
use support::web::{self, Web, hash};
use support::{
    Appliance, Background, Lab, Namespace, PATIENCE, SERVER6, amount, file, skipped, text, wait_until,
};

/// The device's own address: what this host's captured connections come from.
const DEVICE: [u8; 4] = [198, 18, 0, 2];
const DEVICE6: &str = "fd74:756e::2";

/// Puts packets on the device as they are, as its clients could.
struct Injector {
    socket: OwnedFd,
    interface: i32,
}

impl Injector {
    fn new(namespace: &Namespace) -> Self {
        let (socket, interface) = namespace.enter(|| {
            // SAFETY: no memory is passed.
            let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
            assert!(socket >= 0);
            // SAFETY: the socket was just made, and nobody else owns it.
            let socket = unsafe { OwnedFd::from_raw_fd(socket) };
            (socket, nix::net::if_::if_nametoindex("tungate0").unwrap() as i32)
        });
        Self { socket, interface }
    }

    fn send(&self, packet: &[u8]) {
        let is_ipv6 = packet.first().is_some_and(|byte| byte >> 4 == 6);
        let protocol = if is_ipv6 { libc::ETH_P_IPV6 } else { libc::ETH_P_IP } as u16;
        // SAFETY: all-zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = self.interface;
        loop {
            // SAFETY: both pointers are to living values of the lengths that are passed.
            let sent = unsafe {
                libc::sendto(
                    self.socket.as_raw_fd(),
                    packet.as_ptr().cast(),
                    packet.len(),
                    0,
                    (&raw const address).cast(),
                    size_of::<libc::sockaddr_ll>() as u32,
                )
            };
            match sent {
                0.. => return,
                _ => {
                    let error = std::io::Error::last_os_error();
                    // The device's queue is full, as it is in a flood.
                    assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS), "{error}");
                    std::thread::yield_now();
                }
            }
        }
    }
}

fn syn(source_port: u16, target: [u8; 4], port: u16, sequence: u32) -> Vec<u8> {
    let mut packet = Vec::new();
    PacketBuilder::ipv4(DEVICE, target, 64)
        .tcp(source_port, port, sequence, 64_240)
        .syn()
        .write(&mut packet, &[])
        .unwrap();
    packet
}

/// What a process holds: descriptors, and kilobytes of memory.
fn held(pid: nix::unistd::Pid) -> (usize, usize) {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let memory = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    (
        descriptors,
        memory.split_whitespace().nth(1).unwrap().parse().unwrap(),
    )
}

/// Accepts connections at `address` and sends back what comes in each, until it is dropped.
struct Echo;

impl Echo {
    fn start(namespace: &Namespace, address: &str) -> Self {
        let listener = namespace.listen(address);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut writer = stream.try_clone().unwrap();
                    let _ = std::io::copy(&mut &stream, &mut writer);
                });
            }
        });
        Self
    }
}

#[track_caller]
fn is_echoed(stream: &mut TcpStream) {
    stream.write_all(b"still there?").unwrap();
    let mut heard = [0; 12];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"still there?");
}

/// Counts connections and datagrams that leave the host on their own: without the appliance's mark.
fn watch_the_way_out(lab: &Lab) {
    let directory = tempfile::tempdir().unwrap();
    let table = "table inet watch { chain out { type filter hook output priority 0; policy accept;\n\
                 oifname uplink meta mark != 0x7467 tcp flags & (syn | ack) == syn counter\n\
                 oifname uplink meta mark != 0x7467 meta l4proto udp counter\n }\n }\n";
    let table = file(directory.path(), "watch.nft", table);
    let output = lab.host.run(&format!("nft -f {table}"));
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[track_caller]
fn nothing_went_out_directly(lab: &Lab) {
    let counters = text(&lab.host.run("nft list table inet watch").stdout);
    assert_eq!(counters.matches("packets 0 bytes 0").count(), 2, "{counters}");
}

#[test]
fn a_server_that_dies_in_the_midst_is_seen_to_and_comes_back() {
    if skipped(&web::PROGRAMS) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let mut web = Web::start(&lab.server);
    let original = web.publish("original", 30_000_000);
    let here = web.path().join("downloaded");
    let url = format!("-o {} http://192.0.2.7/original", here.display());
    let mut curl = lab.host.command("curl");
    curl.args("-sS -f -m 60 --limit-rate 5M".split(' '))
        .args(url.split(' '));
    let mut curl = Background(curl.stderr(std::process::Stdio::null()).spawn().unwrap());
    wait_until(|| std::fs::metadata(&here).is_ok_and(|file| file.len() > 1_000_000));
    web.kill();
    let status = curl.0.wait().unwrap();
    assert!(
        [Some(18), Some(56)].contains(&status.code()),
        "cut short, and known to be: {status}"
    );
    let refused = lab.host.run(&format!("curl -sS -m 60 {url}"));
    assert_eq!(refused.status.code(), Some(7), "{}", text(&refused.stderr));
    web.restart(&lab.server);
    let again = lab.host.run(&format!("curl -sS -f -m 60 {url}"));
    assert!(
        again.status.success() && hash(&here) == original,
        "{}",
        text(&again.stderr)
    );
    appliance.stop();
}

#[test]
fn a_client_that_is_killed_leaves_nothing() {
    if skipped(&web::PROGRAMS) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let web = Web::start(&lab.server);
    web.publish("original", 30_000_000);
    let mut curl = lab.host.command("curl");
    curl.args("-sS --limit-rate 5M -o /dev/null http://192.0.2.7/original".split(' '));
    let mut curl = curl.spawn().unwrap();
    // The client's end, the appliance's and the server's.
    let ends = || {
        let sockets = |namespace: &Namespace, port: &str| {
            let output = namespace.run(&format!("ss -Htn state established {port} = :80"));
            text(&output.stdout).lines().count()
        };
        (sockets(&lab.host, "dport"), sockets(&lab.server, "sport"))
    };
    wait_until(|| ends() == (2, 1));
    curl.kill().unwrap();
    curl.wait().unwrap();
    assert_eq!(appliance.log.flow_to("192.0.2.7:80")["end"], "client-reset");
    wait_until(|| ends() == (0, 0));
    appliance.stop();
}

#[test]
fn a_client_that_is_cut_off_is_given_up() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let client = Namespace::new();
    lab.host.ip(&format!(
        "link add clients type veth peer name lan netns {}",
        client.pid()
    ));
    for (namespace, device, address) in [
        (&lab.host, "clients", "10.50.0.1/24"),
        (&client, "lan", "10.50.0.2/24"),
    ] {
        namespace.ip(&format!("address add {address} dev {device}"));
        namespace.ip(&format!("link set {device} up"));
    }
    client.ip("-4 route add default via 10.50.0.1");
    let directory = tempfile::tempdir().unwrap();
    let configuration = file(
        directory.path(),
        "tungate.toml",
        "[timeouts]\nunacknowledged = \"3s\"\n",
    );
    let appliance = Appliance::start(&lab.host, &["--from", "clients", "-c", &configuration]);
    let listener = lab.server.listen("192.0.2.7:1000");
    let _stream = client.connect("192.0.2.7:1000").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.ip("link set lan down");
    server.write_all(&[7; 10_000]).unwrap();
    assert_eq!(
        appliance.log.flow_to("192.0.2.7:1000")["end"],
        "client-unresponsive"
    );
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(
        server.read(&mut [0]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    appliance.stop();
}

#[test]
fn a_transfer_goes_on_after_the_link_was_down() {
    if skipped(&web::PROGRAMS) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let web = Web::start(&lab.server);
    let original = web.publish("original", 12_000_000);
    let here = web.path().join("downloaded");
    let mut curl = lab.host.command("curl");
    curl.args("-sS -f -m 60 --limit-rate 6M http://192.0.2.7/original -o".split(' '))
        .arg(&here);
    let mut curl = Background(curl.spawn().unwrap());
    wait_until(|| std::fs::metadata(&here).is_ok_and(|file| file.len() > 1_000_000));
    lab.server.ip("link set downlink down");
    wait_until(|| lab.host.ip("-o link show uplink").contains("NO-CARRIER"));
    assert!(curl.0.try_wait().unwrap().is_none());
    lab.server.ip("link set downlink up");
    assert!(curl.0.wait().unwrap().success());
    assert!(hash(&here) == original);
    appliance.stop();
}

#[test]
fn a_server_that_does_not_read_costs_bounded_memory() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let _echo = Echo::start(&lab.server, "192.0.2.7:1001");
    let listener = lab.server.listen("192.0.2.7:1000");
    let mut clients: Vec<_> = (0..8)
        .map(|_| {
            let client = lab.host.connect("192.0.2.7:1000").unwrap();
            client
                .set_write_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            (client, listener.accept().unwrap().0)
        })
        .collect();
    let (_, before) = held(appliance.worker());
    let block = [7; 1 << 16];
    for (client, _) in &mut clients {
        let mut sent = 0_usize;
        while let Ok(len) = client.write(&block) {
            sent += len;
            assert!(sent < 64 << 20, "nothing holds the client back");
        }
    }
    let (_, after) = held(appliance.worker());
    // A buffer in each direction for each flow, at most: [limits] buffer_per_flow.
    assert!(
        after < before + 8 * 2 * 1024 + 4096,
        "{before} kB before, {after} kB after"
    );
    is_echoed(&mut lab.host.connect("192.0.2.7:1001").unwrap());
    appliance.stop();
}

#[test]
fn a_resolver_that_is_silent_holds_up_nobody() {
    if skipped(&["dig"]) {
        return;
    }
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let configuration = file(directory.path(), "tungate.toml", "[timeouts]\ndns = \"2s\"\n");
    let appliance = lab.appliance(&["-c", &configuration]);
    let _echo = Echo::start(&lab.server, "192.0.2.7:1001");
    // Nobody has this address.
    let mut dig = lab.host.command("dig");
    dig.args("+time=2 +tries=1 @192.0.2.99 www.example.test A".split(' '));
    let mut dig = Background(dig.stdout(std::process::Stdio::null()).spawn().unwrap());
    is_echoed(&mut lab.host.connect("192.0.2.7:1001").unwrap());
    assert_eq!(dig.0.wait().unwrap().code(), Some(9), "no reply");
    assert_eq!(appliance.log.flow_to("192.0.2.99:53")["end"], "idle-timeout");
    appliance.stop();
}

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

#[test]
fn a_policy_that_is_replaced_all_the_time_disturbs_nobody() {
    if skipped(&web::PROGRAMS) {
        return;
    }
    let lab = Lab::new();
    let web = Web::start(&lab.server);
    let original = web.publish("original", 30_000_001);
    let directory = tempfile::tempdir().unwrap();
    let policy = |number: usize| {
        let content = format!(
            "[lists]\nentries = [\"deny 203.0.113.{number}\"]\n\
             [[rule]]\nname = \"number {number}\"\ntargets = [\"198.51.100.{number}\"]\naction = \"reject\"\n"
        );
        // A reload never sees half a file.
        let new = file(directory.path(), "new.toml", &content);
        let path = directory.path().join("tungate.toml");
        std::fs::rename(new, &path).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let appliance = lab.appliance(&["-c", &policy(0)]);
    let finished = AtomicBool::new(false);
    let reloads = std::thread::scope(|scope| {
        let reloading = scope.spawn(|| {
            let mut reloads = 0;
            while !finished.load(Ordering::Relaxed) {
                policy(reloads % 250);
                appliance.signal(Signal::SIGHUP);
                reloads += 1;
                std::thread::park_timeout(Duration::from_millis(100));
            }
            reloads
        });
        let transfers = (0..4).map(|number| {
            let (lab, web) = (&lab, &web);
            scope.spawn(move || {
                let here = web.path().join(format!("downloaded{number}"));
                let line = format!(
                    "curl -sS -f -m 120 --limit-rate 15M http://192.0.2.7/original -o {}",
                    here.display()
                );
                let output = lab.host.run(&line);
                assert!(output.status.success(), "{}", text(&output.stderr));
                assert!(hash(&here) == original);
            })
        });
        let transfers: Vec<_> = transfers.collect();
        let results: Vec<_> = transfers.into_iter().map(|transfer| transfer.join()).collect();
        finished.store(true, Ordering::Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
        reloading.join().unwrap()
    });
    assert!(reloads >= 10, "{reloads} reloads");
    // Signals that come while one is worked off become one.
    wait_until(|| appliance.log.all().contains("the policy has been replaced"));
    appliance.stop();
}

#[test]
fn killed_under_load_nothing_goes_another_way() {
    if skipped(&["nft"]) {
        return;
    }
    let lab = Lab::new();
    watch_the_way_out(&lab);
    let before = lab.host.state();
    let _echo = Echo::start(&lab.server, "192.0.2.7:1001");
    let _echo6 = Echo::start(&lab.server, "[2001:db8::7]:1001");
    for worker_only in [true, false] {
        let mut appliance = lab.appliance(&[]);
        is_echoed(&mut lab.host.connect("192.0.2.7:1001").unwrap());
        let finished = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let clients: Vec<_> = ["192.0.2.7:1001", "[2001:db8::7]:1001"]
                .into_iter()
                .map(|address| {
                    let (lab, finished) = (&lab, &finished);
                    scope.spawn(move || {
                        let address: SocketAddr = address.parse().unwrap();
                        let local = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                        lab.host.enter(|| {
                            let udp = UdpSocket::bind(local).unwrap();
                            while !finished.load(Ordering::Relaxed) {
                                let _ = udp.send_to(b"leak?", address);
                                let _ = TcpStream::connect_timeout(&address, Duration::from_millis(20));
                            }
                        });
                    })
                })
                .collect();
            let pause = Instant::now();
            wait_until(|| pause.elapsed() > Duration::from_millis(300));
            let victim = if worker_only {
                appliance.worker()
            } else {
                nix::unistd::Pid::from_raw(appliance.process.id() as i32)
            };
            kill(victim, Signal::SIGKILL).unwrap();
            appliance.process.wait().unwrap();
            // The load goes on while only the kill switch stands.
            let pause = Instant::now();
            wait_until(|| pause.elapsed() > Duration::from_millis(500));
            finished.store(true, Ordering::Relaxed);
            clients.into_iter().for_each(|client| client.join().unwrap());
        });
        nothing_went_out_directly(&lab);
        // The next one finds its way through what was left, and leaves nothing.
        let appliance = lab.appliance(&[]);
        is_echoed(&mut lab.host.connect("192.0.2.7:1001").unwrap());
        nothing_went_out_directly(&lab);
        appliance.stop();
    }
    let counted = lab.host.state();
    assert_eq!(counted, before);
    // The watch works: without an appliance it sees what goes out.
    lab.host.connect("192.0.2.7:1001").unwrap();
    let counters = text(&lab.host.run("nft list table inet watch").stdout);
    assert_eq!(counters.matches("packets 0 bytes 0").count(), 1, "{counters}");
}

#[test]
fn a_mapping_lives_through_silence() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let (client, server) = (lab.host.udp("0.0.0.0:0"), lab.server.udp("192.0.2.7:1000"));
    client.send_to(b"here", "192.0.2.7:1000").unwrap();
    let mut buffer = [0; 10];
    let (_, from) = server.recv_from(&mut buffer).unwrap();
    // RFC 4787, REQ-5, wants two minutes at the least; what gives up sooner does so after 30 s.
    let pause = Instant::now();
    let silence = Duration::from_secs(amount(1, 35) as u64);
    while pause.elapsed() < silence {
        std::thread::park_timeout(silence - pause.elapsed());
    }
    server.send_to(b"there", from).unwrap();
    assert_eq!(client.recv(&mut buffer).unwrap(), 5);
    appliance.stop();
}
