//! Flows that are left to the kernel: for the user they are as those that are terminated.

mod support;

use std::collections::BTreeSet;
use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;
use sha2::{Digest, Sha256};
use support::peers::{Echo, is_echoed, reset};
use support::web::Web;
use support::{
    Appliance, Background, Lab, Namespace, PATIENCE, TUNGATE, file, skipped, text, wait_for_server,
    wait_until,
};
use tungate_engine::dns::Learned;
use tungate_engine::io::{PacketOut, UpstreamCommand};
use tungate_engine::journal::Decoder;
use tungate_engine::{Engine, Event, FlowId, PacketIn, Policy, ShardId, World};
use tungate_sim::replay;

const BYPASS: &str = "[bypass]\nenabled = true\n";
const POLICY: &str = "[lists]\nentries = [\"deny 192.0.2.9\", \"deny 2001:db8::9\"]\n\
                      [[rule]]\nname = \"no telnet\"\nprotocols = [\"tcp\"]\nports = [23]\naction = \"reject\"\n";
/// Bytes of a large transfer.
const LARGE: usize = 20_000_003;

/// A router with a client behind one interface and a server behind another.
struct Site {
    lab: Lab,
    client: Namespace,
    directory: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let lab = Lab::new();
        let client = lab.routed_client();
        // The server is a router, too, and has no way to these.
        lab.server.enter(|| {
            for version in ["ipv4", "ipv6"] {
                std::fs::write(format!("/proc/sys/net/{version}/conf/all/forwarding"), "1").unwrap();
            }
        });
        lab.server.ip("-4 route add unreachable 203.0.113.0/24");
        lab.server.ip("-6 route add unreachable 2001:db8:bad::/48");
        let directory = tempfile::tempdir().unwrap();
        Self {
            lab,
            client,
            directory,
        }
    }

    fn appliance(&self, configuration: &str, more: &[&str]) -> Appliance {
        let path = file(self.directory.path(), "tungate.toml", configuration);
        let arguments = [&["--from", "clients", "-c", &path], more].concat();
        Appliance::start(&self.lab.host, &arguments)
    }

    fn tungate(&self, arguments: &str) -> String {
        let output = self.lab.host.run(&format!("{TUNGATE} {arguments}"));
        assert!(output.status.success(), "{arguments}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// The client's end and the server's.
    fn connection(&self, address: &str) -> (TcpStream, TcpStream) {
        let listener = self.lab.server.listen(address);
        let client = self.client.connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        (client, server)
    }

    /// How many connections the kernel keeps for us.
    fn carried(&self) -> usize {
        let output = self.lab.host.run("conntrack -L -m 29799");
        let output = text(&output.stdout) + &text(&self.lab.host.run("conntrack -L -f ipv6 -m 29799").stdout);
        output.lines().filter(|line| line.contains("mark=29799")).count()
    }

    /// Which connections are let past the device.
    fn let_past(&self) -> String {
        let sets = ["flows4", "flows6"].map(|set| {
            let line = format!("nft list set inet tungate {set}");
            text(&self.lab.host.run(&line).stdout)
        });
        let elements = |set: &String| {
            set.split_once("elements")
                .map(|(_, elements)| elements.to_owned())
        };
        sets.iter().filter_map(elements).collect()
    }
}

fn read_all(stream: &mut TcpStream) -> Result<Vec<u8>, ErrorKind> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(error) => Err(error.kind()),
    }
}

/// Bytes without a pattern (xorshift64).
fn random(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn sum(bytes: &[u8]) -> String {
    format!("{:x?}", &Sha256::digest(bytes)[..])
}

/// What a client and a server meet, in words.
fn script(site: &Site, [server, server2, unreachable]: [&str; 3]) -> Vec<String> {
    let mut told = Vec::new();
    let mut tell = |what: &str, outcome: String| told.push(format!("{what} {server}: {outcome}"));
    let host = |address: &str, port: u16| {
        if address.contains(':') {
            format!("[{address}]:{port}")
        } else {
            format!("{address}:{port}")
        }
    };
    // The client closes first and still hears; then the server does.
    for (port, client_first) in [(1000, true), (1001, false)] {
        let (mut client, mut far) = site.connection(&host(server, port));
        let (first, second) = if client_first {
            (&mut client, &mut far)
        } else {
            (&mut far, &mut client)
        };
        first.write_all(b"question").unwrap();
        first.shutdown(Shutdown::Write).unwrap();
        let heard = read_all(second).unwrap();
        second.write_all(b"a longer answer").unwrap();
        second.shutdown(Shutdown::Write).unwrap();
        tell(
            "half-closed",
            format!("{:?} {:?}", text(&heard), read_all(first).map(|b| text(&b))),
        );
    }
    // A reset that comes when everything before it has been heard.
    for (port, by_client) in [(1002, true), (1003, false)] {
        let (mut client, mut far) = site.connection(&host(server, port));
        let mut byte = [0; 5];
        client.write_all(b"there").unwrap();
        far.read_exact(&mut byte).unwrap();
        far.write_all(b"backs").unwrap();
        client.read_exact(&mut byte).unwrap();
        client.write_all(b"!").unwrap(); // with which it acknowledges what it has heard
        far.read_exact(&mut [0]).unwrap();
        let (by, mut other) = if by_client { (client, far) } else { (far, client) };
        reset(by);
        tell("reset", format!("{:?}", read_all(&mut other)));
    }
    // Large both ways at once.
    let (client, far) = site.connection(&host(server, 1004));
    let sides = [(client, 1), (far, 2)].map(|(stream, seed)| {
        std::thread::spawn(move || {
            let bytes = random(LARGE, seed);
            let mut writer = stream.try_clone().unwrap();
            let sent = sum(&bytes);
            let sending = std::thread::spawn(move || {
                writer.write_all(&bytes).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let heard = read_all(&mut { stream }).unwrap();
            sending.join().unwrap();
            (sent, sum(&heard))
        })
    });
    let [client, far] = sides.map(|side| side.join().unwrap());
    assert_eq!((&client.0, &far.0), (&far.1, &client.1));
    tell("large", format!("{client:?}"));
    // What cannot be reached, and what may not.
    let kind = |address: &str, patience| {
        let address: SocketAddr = address.parse().unwrap();
        let result = site
            .client
            .enter(|| TcpStream::connect_timeout(&address, patience));
        format!("{:?}", result.map(drop).map_err(|error| error.kind()))
    };
    tell("refused", kind(&host(server, 999), PATIENCE));
    tell("unreachable", kind(&host(unreachable, 999), PATIENCE));
    tell("rejected", kind(&host(server, 23), PATIENCE));
    tell("denied", kind(&host(server2, 999), Duration::from_millis(300)));
    told
}

/// The ends of flows, but for what differs from run to run.
fn ends(log: &str) -> BTreeSet<String> {
    let lines = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap_or_default());
    lines
        .filter(|line| line["message"] == "flow ended")
        .map(|line| {
            let parts = [
                "target",
                "rule",
                "egress",
                "to_upstream",
                "to_client",
                "end",
                "detail",
            ];
            parts.map(|part| line[part].to_string()).join(" ")
        })
        .collect()
}

#[test]
fn clients_and_events_cannot_tell_who_carries_a_flow() {
    if skipped(&["nft", "conntrack"]) {
        return;
    }
    let runs = ["", BYPASS].map(|bypass| {
        let site = Site::new();
        let appliance = site.appliance(&format!("{POLICY}{bypass}"), &[]);
        let mut told = script(&site, ["192.0.2.7", "192.0.2.9", "203.0.113.5"]);
        told.extend(script(&site, ["2001:db8::7", "2001:db8::9", "2001:db8:bad::5"]));
        let expected = 2 * 7;
        wait_until(|| ends(&appliance.log.all()).len() >= expected);
        let counters: Value = serde_json::from_str(&site.tungate("counters --json")).unwrap();
        let log = appliance.log.clone();
        appliance.stop();
        (
            told,
            ends(&log.all()),
            counters["bypassed_flows"].as_u64().unwrap(),
            log,
        )
    });
    let [(terminated, ends, 0, _), (bypassed, ends_bypassed, count, log)] = &runs else {
        panic!("without the bypass all are terminated");
    };
    assert_eq!(terminated, bypassed);
    assert_eq!(ends, ends_bypassed, "{}", log.all());
    assert_eq!(*count, ends.len() as u64, "all of them can be left to the kernel");
}

#[test]
fn the_kernel_carries_what_foreign_programs_send() {
    if skipped(&["nft", "conntrack", "curl", "iperf3", "nginx", "openssl"]) {
        return;
    }
    let site = Site::new();
    let appliance = site.appliance(BYPASS, &[]);
    let web = Web::start(&site.lab.server);
    web.publish("original", 5_000_001);
    let target = site.directory.path().join("fetched").display().to_string();
    let output = site.client.run(&format!(
        "curl -sS -f -m 60 -o {target} http://192.0.2.7/original"
    ));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(std::fs::read(&target).unwrap() == std::fs::read(web.path().join("original")).unwrap());
    let flow = appliance.log.flow_to("192.0.2.7:80");
    assert_eq!(
        (&flow["way"], &flow["end"]),
        (&"bypassed".into(), &"finished".into())
    );

    let mut server = site.lab.server.command("iperf3");
    server
        .args(["-s", "-p", "5201"])
        .stdout(std::process::Stdio::null());
    let _server = Background(server.spawn().unwrap());
    wait_for_server(&site.lab.server, "192.0.2.8:5201");
    for line in ["-c 192.0.2.8", "-c 192.0.2.8 -R -P 3", "-c 2001:db8::8"] {
        let output = site.client.run(&format!("iperf3 --json -n 20M {line}"));
        assert!(output.status.success(), "{line}: {}", text(&output.stdout));
    }

    // While a connection lasts, it is the kernel's, with our mark and the host's address.
    let _echo = Echo::start(&site.lab.server, "192.0.2.7:1000");
    let mut stream = site.client.connect("192.0.2.7:1000").unwrap();
    is_echoed(&mut stream);
    let tracked = text(
        &site
            .lab
            .host
            .run("conntrack -L -m 29799 -p tcp --dport 1000")
            .stdout,
    );
    let expected = "src=192.0.2.7 dst=10.99.0.1 sport=1000";
    assert!(
        tracked.contains("ESTABLISHED") && tracked.contains(expected),
        "{tracked}"
    );
    let flows: Value = serde_json::from_str(&site.tungate("flows --json")).unwrap();
    let flow = flows["flows"].as_array().unwrap().iter();
    let flow: Vec<_> = flow.filter(|flow| flow["target"] == "192.0.2.7:1000").collect();
    let shown = |name: &str| flow[0][name].clone();
    assert_eq!(
        (flow.len(), shown("bypassed"), shown("state")),
        (1, true.into(), "open".into())
    );
    assert!(site.tungate("flows").contains("bypassed"));
    drop(stream);
    appliance.log.flow_to("192.0.2.7:1000");
    appliance.stop();
}

#[test]
fn a_policy_that_changes_its_mind_ends_a_flow_as_if_it_were_terminated() {
    if skipped(&["nft", "conntrack"]) {
        return;
    }
    for bypass in ["", BYPASS] {
        let site = Site::new();
        let appliance = site.appliance(bypass, &[]);
        // A reload that rejects: the client hears of it without sending anything.
        let (mut client, mut server) = site.connection("192.0.2.7:1000");
        server.write_all(b"hello").unwrap();
        client.read_exact(&mut [0; 5]).unwrap();
        let (mut other, mut far) = site.connection("192.0.2.8:1000");
        file(
            site.directory.path(),
            "tungate.toml",
            &format!(
                "{bypass}[[rule]]\nname = \"no more\"\ntargets = [\"192.0.2.7\"]\naction = \"reject\"\n"
            ),
        );
        site.tungate("reload");
        assert_eq!(read_all(&mut client), Err(ErrorKind::ConnectionReset), "{bypass}");
        let flow = appliance.log.flow_to("192.0.2.7:1000");
        assert_eq!(
            (&flow["end"], &flow["detail"]),
            (&"denied".into(), &"no more".into())
        );
        assert_eq!(flow["to_upstream"], 0);
        // What the server sends to nobody comes back as a reset.
        let heard = match server.write_all(b"still there?") {
            Ok(()) => read_all(&mut server),
            Err(error) => Err(error.kind()),
        };
        assert_eq!(heard, Err(ErrorKind::ConnectionReset), "{bypass}");
        // The other goes on, until a list denies it in silence.
        far.write_all(b"hello").unwrap();
        other.read_exact(&mut [0; 5]).unwrap();
        site.tungate("list add 192.0.2.8");
        let flow = appliance.log.flow_to("192.0.2.8:1000");
        assert_eq!((&flow["end"], &flow["to_client"]), (&"denied".into(), &5.into()));
        other.write_all(b"nobody hears").unwrap();
        far.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let heard = far.read(&mut [0; 64]).map_err(|error| error.kind());
        assert!(
            matches!(heard, Err(ErrorKind::ConnectionReset | ErrorKind::WouldBlock)),
            "{heard:?}"
        );
        assert_eq!(site.carried(), 0);
        assert_eq!(site.let_past(), "");
        appliance.stop();
    }
}

#[test]
fn ports_are_used_again_before_the_kernel_has_forgotten_them() {
    if skipped(&["nft", "conntrack"]) {
        return;
    }
    let site = Site::new();
    let appliance = site.appliance(BYPASS, &[]);
    let listener = site.lab.server.listen("192.0.2.7:1000");
    let target: SocketAddr = "192.0.2.7:1000".parse().unwrap();
    for round in 0..5 {
        // The server closes first, so that the client's side may be used again at once.
        let mut client = site.client.enter(|| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
            let source: SocketAddr = "10.50.0.2:40000".parse().unwrap();
            socket.bind(&source.into()).unwrap();
            socket.connect_timeout(&target.into(), PATIENCE).unwrap();
            TcpStream::from(socket)
        });
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut server, peer) = listener.accept().unwrap();
        assert_eq!(peer.ip().to_string(), "10.99.0.1");
        server.write_all(format!("round {round}").as_bytes()).unwrap();
        drop(server);
        assert_eq!(
            read_all(&mut client).map(|heard| text(&heard)),
            Ok(format!("round {round}"))
        );
        drop(client);
        let ended = || ends_of(&appliance, "192.0.2.7:1000");
        wait_until(|| ended() == round + 1);
    }
    appliance.stop();
}

fn ends_of(appliance: &Appliance, target: &str) -> usize {
    let log = appliance.log.all();
    log.lines()
        .filter(|line| line.contains("flow ended") && line.contains(target))
        .count()
}

#[test]
fn the_host_is_as_it_was_after_an_end_and_after_a_kill() {
    if skipped(&["nft", "conntrack"]) {
        return;
    }
    let site = Site::new();
    let host = &site.lab.host;
    let settings = || {
        host.enter(|| {
            let read = |name| std::fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}"));
            // Where nothing was tracked before, the kernel's defaults hold.
            (
                read("acct").unwrap_or("0\n".to_owned()),
                read("events").unwrap_or("2\n".to_owned()),
            )
        })
    };
    let before = (host.state(), settings());
    let appliance = site.appliance(BYPASS, &[]);
    assert_ne!(host.state(), before.0);
    let (mut client, mut server) = site.connection("192.0.2.7:1000");
    client.write_all(b"hello").unwrap();
    server.read_exact(&mut [0; 5]).unwrap();
    appliance.signal(Signal::SIGTERM);
    appliance.signal(Signal::SIGINT);
    assert_eq!(read_all(&mut client), Err(ErrorKind::ConnectionReset));
    let flow = appliance.log.flow_to("192.0.2.7:1000");
    assert_eq!(
        (&flow["end"], &flow["to_upstream"]),
        (&"denied".into(), &5.into())
    );
    drop(appliance);
    assert_eq!((host.state(), settings()), before);
    assert_eq!(site.carried(), 0);

    for kill_worker in [false, true] {
        let mut appliance = site.appliance(BYPASS, &[]);
        let (mut client, mut server) = site.connection("192.0.2.7:1001");
        client.write_all(b"hello").unwrap();
        server.read_exact(&mut [0; 5]).unwrap();
        if kill_worker {
            nix::sys::signal::kill(appliance.worker(), Signal::SIGKILL).unwrap();
        } else {
            appliance.signal(Signal::SIGKILL);
        }
        appliance.process.wait().unwrap();
        // Nobody judges any more, so nothing passes.
        wait_until(|| !text(&host.run("nft list tables").stdout).contains("tungate"));
        wait_until(|| host.ip("-4 route show table 8400").contains("dead linkdown"));
        let _ = client.write_all(b"nobody hears");
        server.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let heard = server.read(&mut [0; 64]).map_err(|error| error.kind());
        assert!(
            matches!(heard, Err(ErrorKind::WouldBlock | ErrorKind::ConnectionReset)),
            "{heard:?}"
        );
        let appliance = site.appliance(BYPASS, &[]);
        assert_eq!(site.carried(), 0);
        appliance.stop();
        assert_eq!((host.state(), settings()), before);
    }
}

/// Hears how flows end.
#[derive(Default)]
struct Listener {
    buffer: Vec<u8>,
    closed: BTreeSet<(String, String, u64, u64)>,
}

impl World for Listener {
    fn has_room(&self) -> bool {
        true
    }

    fn packet_buffer(&mut self, len: usize) -> &mut [u8] {
        self.buffer.resize(len, 0);
        &mut self.buffer
    }

    fn send_packet(&mut self, _: PacketOut) {}

    fn upstream(&mut self, _: FlowId, _: UpstreamCommand<'_>) {}

    fn event(&mut self, event: &Event) {
        if let Event::Closed {
            flow,
            reason,
            to_upstream,
            to_client,
        } = event
        {
            let end = (
                flow.to_string(),
                reason.name().to_owned(),
                *to_upstream,
                *to_client,
            );
            self.closed.insert(end);
        }
    }

    fn forward(&mut self, _: ShardId, _: PacketIn<'_>) {}

    fn learned(&mut self, _: &Learned) {}
}

#[test]
fn a_journal_repeats_the_ends_of_bypassed_flows() {
    if skipped(&["nft", "conntrack"]) {
        return;
    }
    let site = Site::new();
    let journal = site.directory.path().join("it.journal");
    let appliance = site.appliance(
        &format!("{POLICY}{BYPASS}"),
        &["--journal", journal.to_str().unwrap()],
    );
    script(&site, ["192.0.2.7", "192.0.2.9", "203.0.113.5"]);
    wait_until(|| ends(&appliance.log.all()).len() >= 7);
    let log = appliance.log.clone();
    appliance.stop();

    let repeat = || replay::repeat(&mut BufReader::new(std::fs::File::open(&journal).unwrap())).unwrap();
    let (first, second) = (repeat(), repeat());
    assert_eq!((&first.damaged, &first.digest), (&None, &second.digest));
    let bytes = std::fs::read(&journal).unwrap();
    assert!(bytes.len() < LARGE / 10, "what the kernel carries is not in it");
    let mut decoder = Decoder::new();
    decoder.push(&bytes);
    let header = decoder.header().unwrap().unwrap().clone();
    let policy = Arc::new(Policy::new(header.policy.clone()));
    let mut engines: Vec<Engine> = (0..header.config.shards)
        .map(|shard| header.engine(ShardId(shard), Arc::clone(&policy)))
        .collect();
    let mut listener = Listener::default();
    while let Some(entry) = decoder.next_entry().unwrap() {
        entry.apply(&mut engines[usize::from(entry.shard.0)], &mut listener, |_, _| ());
    }
    let log = log.all();
    let lines = log
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap_or_default());
    let expected: BTreeSet<_> = lines
        .filter(|line| line["message"] == "flow ended")
        .map(|line| {
            let word = |name: &str| line[name].as_str().unwrap().to_owned();
            let number = |name: &str| line[name].as_u64().unwrap();
            (
                word("flow"),
                word("end"),
                number("to_upstream"),
                number("to_client"),
            )
        })
        .collect();
    assert_eq!(listener.closed, expected);
}

#[test]
fn where_there_can_be_no_bypass_nothing_starts() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), "tungate.toml", BYPASS);
    for (line, way_out) in [
        (format!("{TUNGATE} run -c {path}"), "--from INTERFACE"),
        (format!("{TUNGATE} exec -c {path} -- true"), "leave it out"),
    ] {
        let output = lab.host.run(&line);
        assert!(!output.status.success());
        let said = text(&output.stderr);
        assert!(
            said.contains("bypass.enabled") && said.contains(way_out),
            "{said}"
        );
    }
}
