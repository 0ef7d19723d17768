//! Flows through a real device: what programs that know nothing of the appliance see.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::process::Stdio;
use std::time::Duration;

use support::peers::{connection, reset};
use support::web::{self, Web, hash};
use support::{Background, Lab, SERVER, SERVER6, amount, skipped, text, wait_for_server};

#[test]
fn downloads_and_uploads_arrive_unchanged() {
    if skipped(&web::PROGRAMS) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let web = Web::start(&lab.server);
    // Larger than any buffer on the way, and no multiple of anything.
    let len = amount(64_000_123, 1_000_000_123);
    let original = web.publish("original", len);
    for host in [SERVER.to_owned(), format!("[{SERVER6}]")] {
        let (there, here) = (web.path().join("uploaded"), web.path().join("downloaded"));
        let curl = |arguments: &str| {
            let output = lab.host.run(&format!("curl -sS -f -m 300 {arguments}"));
            assert!(output.status.success(), "{}", text(&output.stderr));
        };
        curl(&format!("-o {} http://{host}/original", here.display()));
        assert!(hash(&here) == original, "download from {host}");
        curl(&format!(
            "-T {} http://{host}/uploaded",
            web.path().join("original").display()
        ));
        assert!(hash(&there) == original, "upload to {host}");
        for path in [here, there] {
            std::fs::remove_file(path).unwrap();
        }
    }
    let flow = appliance.log.flow_to("192.0.2.7:80");
    assert_eq!(
        (&flow["end"], &flow["egress"], &flow["rule"]),
        (&"finished".into(), &"direct".into(), &"default".into())
    );
    assert!(flow["to_client"].as_u64().unwrap() > len as u64);
    appliance.stop();
}

#[test]
fn refused_and_unreachable_targets_are_seen_as_such() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    lab.server.ip("route add unreachable 198.51.100.0/24");
    lab.server.ip("-6 route add unreachable 2001:db8:1::/48");
    lab.server.enter(|| {
        for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{key}"), "1").unwrap();
        }
    });
    let unreachable = ["198.51.100.1:80", "[2001:db8:1::1]:80"];
    let without = unreachable.map(|target| lab.host.connect(target).unwrap_err().raw_os_error());
    let appliance = lab.appliance(&[]);
    for target in ["192.0.2.7:81", "[2001:db8::7]:81"] {
        assert_eq!(
            lab.host.connect(target).unwrap_err().kind(),
            ErrorKind::ConnectionRefused
        );
        let flow = appliance.log.flow_to(target);
        assert_eq!(
            (&flow["end"], &flow["detail"]),
            (&"connect-failed".into(), &"refused".into())
        );
    }
    let with = unreachable.map(|target| lab.host.connect(target).unwrap_err().raw_os_error());
    assert_eq!(with, without);
    assert!(
        appliance.log.flow_to(unreachable[0])["detail"]
            .as_str()
            .unwrap()
            .starts_with("unreachable")
    );
    appliance.stop();
}

#[test]
fn resets_stay_resets_in_both_directions() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    for (number, host) in ["192.0.2.7", "[2001:db8::7]"].into_iter().enumerate() {
        let (mut client, mut server) = connection(&lab, &format!("{host}:{}", 1000 + number));
        server.write_all(b"last words").unwrap();
        let mut heard = [0; 10];
        client.read_exact(&mut heard).unwrap();
        reset(server);
        assert_eq!(
            client.read(&mut [0]).unwrap_err().kind(),
            ErrorKind::ConnectionReset
        );

        let (client, mut server) = connection(&lab, &format!("{host}:{}", 2000 + number));
        reset(client);
        assert_eq!(
            server.read(&mut [0]).unwrap_err().kind(),
            ErrorKind::ConnectionReset
        );
    }
    assert_eq!(appliance.log.flow_to("192.0.2.7:1000")["end"], "upstream-reset");
    assert_eq!(appliance.log.flow_to("192.0.2.7:2000")["end"], "client-reset");
    appliance.stop();
}

#[test]
fn half_closes_stay_half_in_both_directions() {
    if skipped(&["nc"]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);

    // The client closes first: netcat sends its input and FIN, then waits for the answer.
    let listener = lab.server.listen("192.0.2.7:1000");
    let mut netcat = lab.host.command("nc");
    netcat
        .args(["-N", SERVER, "1000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut netcat = netcat.spawn().unwrap();
    netcat.stdin.take().unwrap().write_all(b"question").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let mut question = String::new();
    server.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    server.write_all(b"answer").unwrap();
    drop(server);
    let output = netcat.wait_with_output().unwrap();
    assert_eq!(
        (text(&output.stdout).as_str(), output.status.success()),
        ("answer", true)
    );

    // The server closes first, and still hears what the client says.
    let (mut client, mut server) = connection(&lab, "192.0.2.7:1001");
    server.write_all(b"all I have").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    let mut heard = String::new();
    client.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "all I have");
    client.write_all(b"thank you").unwrap();
    drop(client);
    let mut heard = String::new();
    server.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "thank you");

    for target in ["192.0.2.7:1000", "192.0.2.7:1001"] {
        assert_eq!(appliance.log.flow_to(target)["end"], "finished");
    }
    appliance.stop();
}

#[test]
fn a_stalled_reader_holds_back_only_its_own_flow() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let _appliance = lab.appliance(&[]);
    let (mut stalled, mut server) = connection(&lab, "192.0.2.7:1000");
    server
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let block = [7; 1 << 16];
    let mut sent = 0;
    // All buffers on the way are filled when a write times out: some megabytes, however much there is to send.
    while let Ok(len) = server.write(&block) {
        sent += len;
        assert!(sent < 64 << 20, "nothing holds the server back");
    }
    let (mut client, mut other) = connection(&lab, "192.0.2.7:1001");
    other.write_all(b"not affected").unwrap();
    drop(other);
    let mut heard = String::new();
    client.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "not affected");

    drop(server);
    let mut received = Vec::new();
    stalled.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), sent);
}

#[test]
fn pings_are_answered_by_their_targets_alone() {
    if skipped(&["ping"]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    for target in [SERVER, SERVER6] {
        for size in [8, 1400, 20_000] {
            let output = lab
                .host
                .run(&format!("ping -n -c 3 -i 0.1 -W 10 -s {size} {target}"));
            assert!(output.status.success(), "{}", text(&output.stdout));
        }
    }
    // The server has no such address and does not forward: nobody answers.
    let output = lab.host.run("ping -n -c 1 -W 1 192.0.2.99");
    assert!(
        text(&output.stdout).contains(" 0 received"),
        "{}",
        text(&output.stdout)
    );
    appliance.stop();
}

#[test]
fn traceroute_shows_the_way_behind_the_appliance() {
    if skipped(&["traceroute"]) {
        return;
    }
    let lab = Lab::new();
    lab.server.enter(|| {
        for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{key}"), "1").unwrap();
        }
    });
    // One more host, behind the server.
    let far = support::Namespace::new();
    lab.server.ip(&format!(
        "link add far type veth peer name near netns {}",
        far.pid()
    ));
    for (namespace, device, number) in [(&lab.server, "far", 1), (&far, "near", 2)] {
        namespace.ip(&format!("address add 203.0.113.{number}/24 dev {device}"));
        namespace.ip(&format!("address add 2001:db8:2::{number}/64 dev {device} nodad"));
        namespace.ip(&format!("link set {device} up"));
    }
    far.ip("-4 route add default via 203.0.113.1");
    far.ip("-6 route add default via 2001:db8:2::1");
    // Hosts answer a few probes at once only.
    for host in [&lab.server, &far] {
        host.enter(|| {
            for key in ["ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"] {
                std::fs::write(format!("/proc/sys/net/{key}"), "0").unwrap();
            }
        });
    }
    let _appliance = lab.appliance(&[]);
    for (target, hops) in [
        ("203.0.113.2", ["198.18.0.1", "10.99.0.2", "203.0.113.2"]),
        ("2001:db8:2::2", ["fd74:756e::1", "fd99::2", "2001:db8:2::2"]),
    ] {
        for method in ["--udp", "--icmp"] {
            let line = format!("traceroute {method} -n -q 1 -w 10 {target}");
            let output = text(&lab.host.run(&line).stdout);
            let shown: Vec<_> = output
                .lines()
                .skip(1)
                .filter_map(|line| line.split_whitespace().nth(1))
                .collect();
            assert_eq!(shown, hops, "{output}");
        }
    }
}

#[test]
fn datagrams_pass_both_ways_whatever_their_size() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let _appliance = lab.appliance(&[]);
    for (local, remote) in [("0.0.0.0:0", "192.0.2.7:1000"), ("[::]:0", "[2001:db8::7]:1000")] {
        let (client, server) = (lab.host.udp(local), lab.server.udp(remote));
        let mut buffer = vec![0; 65_536];
        for size in [0, 1, 1472, 1473, 20_000, 65_000] {
            let datagram: Vec<u8> = (0..size).map(|at: u32| at as u8 ^ (at >> 8) as u8).collect();
            client.send_to(&datagram, remote).unwrap();
            let (len, from) = server.recv_from(&mut buffer).unwrap();
            assert!(buffer[..len] == datagram, "to the server: {len} of {size} bytes");
            server.send_to(&datagram, from).unwrap();
            let (len, from) = client.recv_from(&mut buffer).unwrap();
            assert_eq!(from, remote.parse().unwrap());
            assert!(buffer[..len] == datagram, "to the client: {len} of {size} bytes");
        }
    }
}

#[test]
fn bursts_of_datagrams_keep_their_order_and_sizes() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let _appliance = lab.appliance(&[]);
    // Few enough for the buffers of the sockets, which are read only when the burst is over.
    let sizes = [200; 20].into_iter().chain([1200; 12]).chain([7, 0, 1452, 1]);
    for (local, remote) in [("0.0.0.0:0", "192.0.2.7:1000"), ("[::]:0", "[2001:db8::7]:1000")] {
        let (client, server) = (lab.host.udp(local), lab.server.udp(remote));
        let mut buffer = [0; 2000];
        for round in 0..10 {
            let burst: Vec<_> = sizes
                .clone()
                .enumerate()
                .map(|(index, size)| vec![(round * 36 + index) as u8; size])
                .collect();
            for datagram in &burst {
                client.send_to(datagram, remote).unwrap();
            }
            let mut back = None;
            for datagram in &burst {
                let (len, from) = server.recv_from(&mut buffer).unwrap();
                assert!(
                    buffer[..len] == *datagram,
                    "to the server: {len} of {}",
                    datagram.len()
                );
                back = Some(from);
            }
            for datagram in &burst {
                server.send_to(datagram, back.unwrap()).unwrap();
            }
            for datagram in &burst {
                let (len, _) = client.recv_from(&mut buffer).unwrap();
                assert!(
                    buffer[..len] == *datagram,
                    "to the client: {len} of {}",
                    datagram.len()
                );
            }
        }
    }
}

#[test]
fn one_mapping_serves_all_targets_and_lets_strangers_in() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let _appliance = lab.appliance(&[]);
    let client = lab.host.udp("0.0.0.0:0");
    let (first, second) = (lab.server.udp("192.0.2.7:1000"), lab.server.udp("192.0.2.8:2000"));
    let stranger = lab.server.udp("192.0.2.9:3000");
    let mut buffer = [0; 100];
    client.send_to(b"to the first", "192.0.2.7:1000").unwrap();
    let (_, seen_by_first) = first.recv_from(&mut buffer).unwrap();
    client.send_to(b"to the second", "192.0.2.8:2000").unwrap();
    let (_, seen_by_second) = second.recv_from(&mut buffer).unwrap();
    assert_eq!(seen_by_first, seen_by_second);
    stranger.send_to(b"hello", seen_by_first).unwrap();
    let (len, from) = client.recv_from(&mut buffer).unwrap();
    assert_eq!(
        (&buffer[..len], from),
        (&b"hello"[..], "192.0.2.9:3000".parse().unwrap())
    );
}

#[test]
fn closed_udp_ports_are_reported_to_the_client() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let _appliance = lab.appliance(&[]);
    for (local, target) in [("0.0.0.0:0", "192.0.2.7:1000"), ("[::]:0", "[2001:db8::7]:1000")] {
        let client = lab.host.udp(local);
        lab.host.enter(|| client.connect(target).unwrap());
        client.send(b"anyone?").unwrap();
        assert_eq!(
            client.recv(&mut [0]).unwrap_err().kind(),
            ErrorKind::ConnectionRefused
        );
    }
}

#[test]
fn names_are_looked_up_over_udp_and_tcp() {
    if skipped(&["dig", "dnsmasq"]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let mut dnsmasq = lab.server.command("dnsmasq");
    dnsmasq.args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--bind-interfaces",
        "--listen-address=192.0.2.7",
        "--address=/example.test/203.0.113.5",
        "--user=root",
        "--pid-file=",
    ]);
    let _dnsmasq = Background(dnsmasq.stderr(Stdio::null()).spawn().unwrap());
    wait_for_server(&lab.server, "192.0.2.7:53");
    for transport in ["+notcp", "+tcp"] {
        let output = lab.host.run(&format!(
            "dig +short +time=10 {transport} @192.0.2.7 www.example.test A"
        ));
        assert_eq!(text(&output.stdout), "203.0.113.5\n", "{transport}");
    }
    assert_eq!(appliance.log.flow_to("192.0.2.7:53")["protocol"], "tcp");
    appliance.stop();
}

#[test]
fn iperf3_runs_in_all_directions_and_protocols() {
    if skipped(&["iperf3"]) {
        return;
    }
    let lab = Lab::new();
    let _appliance = lab.appliance(&[]);
    for target in [SERVER, SERVER6] {
        for options in ["", "-R", "-P 8", "-u -b 50M", "-u -b 50M -R"] {
            let mut server = lab.server.command("iperf3");
            server
                .args(["-s", "-1", "-B", target, "--forceflush"])
                .stdout(Stdio::piped());
            let mut server = Background(server.spawn().unwrap());
            let mut line = String::new();
            let mut output = std::io::BufReader::new(server.0.stdout.take().unwrap());
            while !line.contains("Server listening") {
                line.clear();
                assert_ne!(std::io::BufRead::read_line(&mut output, &mut line).unwrap(), 0);
            }
            // The rest of its output must not block it.
            std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
            let output = lab.host.run(&format!("iperf3 -J -t 1 -c {target} {options}"));
            let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            assert!(output.status.success(), "{options}: {}", report["error"]);
            let end = &report["end"];
            let sum = if options.contains("-u") {
                &end["sum"]
            } else {
                &end["sum_received"]
            };
            let rate = sum["bits_per_second"].as_f64().unwrap();
            println!("{target} {options}: {:.0} Mbit/s", rate / 1e6);
            assert!(rate > 1e6, "{options}: {rate} bit/s");
        }
    }
}
