//! Flows by way of proxies: Debian's, and some that nobody would want.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use support::peers::reset;
use support::programs::{name_server, succeed};
use support::web::{self, Web, hash};
use support::{
    Appliance, Background, Lab, PATIENCE, SERVER, SERVER6, file, skipped, text, wait_for_server, wait_until,
};

/// A proxy of Debian's that wants a login.
struct Proxy {
    program: &'static str,
    address: &'static str,
    egress: &'static str,
    start: fn(&Lab, &Path, &str) -> Background,
}

const MICROSOCKS: Proxy = Proxy {
    program: "microsocks",
    address: "10.99.0.2:1080",
    egress: "kind = \"socks5\"\naddress = \"10.99.0.2:1080\"\nusername = \"me\"\npassword = \"secret\"",
    start: |lab, _, password| {
        let line = format!("-i 10.99.0.2 -p 1080 -u me -P {password}");
        let mut microsocks = lab.server.command("microsocks");
        microsocks.args(line.split(' ')).stderr(Stdio::null());
        Background(microsocks.spawn().unwrap())
    },
};

const TINYPROXY: Proxy = Proxy {
    program: "tinyproxy",
    address: "10.99.0.2:3128",
    egress: "kind = \"http\"\naddress = \"10.99.0.2:3128\"\nusername = \"me\"\npassword = \"secret\"",
    start: |lab, directory, password| {
        let configuration = file(
            directory,
            "tinyproxy.conf",
            &format!("Port 3128\nListen 10.99.0.2\nTimeout 60\nMaxClients 50\nBasicAuth me {password}\n"),
        );
        let mut tinyproxy = lab.server.command("tinyproxy");
        tinyproxy
            .args(["-d", "-c", &configuration])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Background(tinyproxy.spawn().unwrap())
    },
};

impl Proxy {
    fn start(&self, lab: &Lab, directory: &Path, password: &str) -> Background {
        let process = (self.start)(lab, directory, password);
        wait_for_server(&lab.server, self.address);
        process
    }

    fn skipped(&self) -> bool {
        skipped(&[self.program, web::PROGRAMS[0], web::PROGRAMS[1], web::PROGRAMS[2]])
    }
}

/// A configuration by which flows of these protocols go through this egress.
fn through(directory: &Path, egress: &str, protocols: &str) -> String {
    file(
        directory,
        "tungate.toml",
        &format!(
            "[[egress]]\nname = \"proxy\"\n{egress}\n\
             [[rule]]\nname = \"by proxy\"\nprotocols = {protocols}\naction = \"egress\"\negress = \"proxy\"\n"
        ),
    )
}

/// Downloads and uploads through the proxy, and is told the truth about a port that is closed.
fn transfer_by_proxy(lab: &Lab, appliance: &Appliance, web: &Web) {
    let original = web.publish("original", 10_000_001);
    let (here, there) = (web.path().join("downloaded"), web.path().join("uploaded"));
    for host in [SERVER.to_owned(), format!("[{SERVER6}]")] {
        succeed(
            &lab.host,
            &format!("curl -sS -f -m 60 -o {} http://{host}/original", here.display()),
        );
        assert!(hash(&here) == original, "download from {host}");
        succeed(
            &lab.host,
            &format!(
                "curl -sS -f -m 60 -T {} http://{host}/uploaded",
                web.path().join("original").display()
            ),
        );
        assert!(hash(&there) == original, "upload to {host}");
        std::fs::remove_file(&there).unwrap();
    }
    let flow = appliance.log.flow_to("192.0.2.7:80");
    assert_eq!(
        (&flow["egress"], &flow["end"]),
        (&"proxy".into(), &"finished".into())
    );
    let refused = lab.host.run("curl -sS -m 60 http://192.0.2.7:81/");
    assert_eq!(
        refused.status.code(),
        Some(7),
        "couldn't connect: {}",
        text(&refused.stderr)
    );
    assert_eq!(appliance.log.flow_to("192.0.2.7:81")["end"], "connect-failed");
}

/// Transfers through a proxy, then its restart, its death in the midst of a transfer, and one that lets nobody in.
fn carries_flows_and_is_known_to_fail(proxy: &Proxy) {
    if proxy.skipped() {
        return;
    }
    let lab = Lab::new();
    let web = Web::start(&lab.server);
    let directory = tempfile::tempdir().unwrap();
    let configuration = through(directory.path(), proxy.egress, "[\"tcp\"]");
    let running = proxy.start(&lab, directory.path(), "secret");
    let appliance = lab.appliance(&["-c", &configuration]);
    transfer_by_proxy(&lab, &appliance, &web);
    let ask = || {
        lab.host
            .run("curl -sS -f -m 60 -o /dev/null http://192.0.2.7/original")
            .status
            .code()
    };
    let refused = Some(7);
    // While it restarts, what comes is refused at once; what comes after is carried.
    drop(running);
    assert_eq!(ask(), refused);
    let running = proxy.start(&lab, directory.path(), "secret");
    assert_eq!(ask(), Some(0));

    web.publish("large", 100_000_001);
    let here = web.path().join("cut");
    let mut curl = lab.host.command("curl");
    curl.args("-sS -f -m 60 --limit-rate 5M http://192.0.2.7/large -o".split(' '))
        .arg(&here)
        .stderr(Stdio::null());
    let mut curl = Background(curl.spawn().unwrap());
    wait_until(|| std::fs::metadata(&here).is_ok_and(|file| file.len() > 1_000_000));
    drop(running);
    let code = curl.0.wait().unwrap().code();
    assert!(
        [Some(18), Some(56)].contains(&code),
        "cut short, and known to be: {code:?}"
    );
    assert_eq!(ask(), refused);

    let _running = proxy.start(&lab, directory.path(), "another");
    assert_eq!(ask(), refused, "a proxy that does not let us in refuses");
    let said = appliance.log.wait(|line| {
        let error = line["error"].as_str().unwrap_or_default();
        error.contains("does not accept the login of \"me\"")
    });
    assert_eq!(said["egress"], "proxy");
    appliance.stop();
}

#[test]
fn microsocks_carries_flows_and_is_known_to_fail() {
    carries_flows_and_is_known_to_fail(&MICROSOCKS);
}

#[test]
fn tinyproxy_carries_flows_and_is_known_to_fail() {
    carries_flows_and_is_known_to_fail(&TINYPROXY);
}

/// A server that tells everybody where they come from.
fn tell_where_from(lab: &Lab, address: &str) {
    let listener = lab.server.listen(address);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let from = stream.peer_addr().unwrap().ip();
            let _ = stream.write_all(from.to_string().as_bytes());
        }
    });
}

/// By whom a new connection of the host comes to the server.
fn way(lab: &Lab) -> String {
    let mut heard = String::new();
    if let Ok(mut stream) = lab.host.connect("192.0.2.7:1000") {
        let _ = stream.read_to_string(&mut heard);
    }
    heard
}

/// A proxy whose connections come from `from`.
fn proxy_from(lab: &Lab, port: u16, from: &str) -> Background {
    let mut microsocks = lab.server.command("microsocks");
    microsocks
        .args(["-i", "10.99.0.2", "-p", &port.to_string(), "-b", from])
        .stderr(Stdio::null());
    let process = Background(microsocks.spawn().unwrap());
    wait_for_server(&lab.server, &format!("10.99.0.2:{port}"));
    process
}

/// An appliance whose flows go by a group of two proxies, at ports 1080 and 1081, which it checks.
fn by_a_group(lab: &Lab, directory: &Path, mode: &str) -> Appliance {
    let egress = |name: &str, port: u16| {
        format!("[[egress]]\nname = \"{name}\"\nkind = \"socks5\"\naddress = \"10.99.0.2:{port}\"\n")
    };
    let group = format!(
        "[[egress]]\nname = \"either\"\nkind = \"group\"\nmembers = [\"first\", \"second\"]\nmode = \"{mode}\"\n\
         check = \"192.0.2.7:1000\"\ncheck_interval = \"1s\"\ncheck_timeout = \"20s\"\n\
         [[rule]]\nname = \"all\"\nprotocols = [\"tcp\"]\naction = \"egress\"\negress = \"either\"\n"
    );
    let content = [egress("first", 1080), egress("second", 1081), group].concat();
    lab.appliance(&["-c", &file(directory, "tungate.toml", &content)])
}

#[test]
fn a_group_goes_by_its_first_member_that_is_healthy() {
    if skipped(&["microsocks"]) {
        return;
    }
    let lab = Lab::new();
    tell_where_from(&lab, "192.0.2.7:1000");
    let first = proxy_from(&lab, 1080, "192.0.2.8");
    let _second = proxy_from(&lab, 1081, "192.0.2.9");
    let directory = tempfile::tempdir().unwrap();
    let appliance = by_a_group(&lab, directory.path(), "failover");
    assert_eq!(way(&lab), "192.0.2.8");
    drop(first);
    assert_eq!(
        way(&lab),
        "192.0.2.9",
        "no flow is lost by the failure of a member"
    );
    let told = |message: &str| {
        let fits = |line: &serde_json::Value| line["message"] == message && line["egress"] == "first";
        appliance.log.wait(fits);
    };
    told("a member of a group has failed");
    let _first = proxy_from(&lab, 1080, "192.0.2.8");
    told("a member of a group is healthy again");
    assert_eq!(way(&lab), "192.0.2.8");
    assert_eq!(appliance.log.flow_to("192.0.2.7:1000")["egress"], "either");
    appliance.stop();
}

#[test]
fn a_group_goes_by_its_member_that_answers_soonest() {
    if skipped(&["microsocks"]) {
        return;
    }
    let lab = Lab::new();
    tell_where_from(&lab, "192.0.2.7:1000");
    // It takes a second for what takes the other some milliseconds.
    Puppet::start(&lab, "10.99.0.2:1080").behave(|mut stream| {
        let mut heard = [0; 10];
        let _ = stream.read_exact(&mut heard[..3]);
        let _ = stream.write_all(&[5, 0]);
        let _ = stream.read_exact(&mut heard);
        std::thread::park_timeout(Duration::from_secs(1));
        let _ = stream.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    });
    let _second = proxy_from(&lab, 1081, "192.0.2.9");
    let directory = tempfile::tempdir().unwrap();
    let appliance = by_a_group(&lab, directory.path(), "latency");
    wait_until(|| way(&lab) == "192.0.2.9");
    appliance.stop();
}

/// What a proxy does with a connection.
type Manner = fn(TcpStream);

/// A proxy that behaves as it is told.
struct Puppet(Arc<Mutex<Manner>>);

impl Puppet {
    fn start(lab: &Lab, address: &str) -> Self {
        let listener = lab.server.listen(address);
        let manner = Arc::new(Mutex::new(hang_up as Manner));
        let present = manner.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let manner = *present.lock().unwrap();
                std::thread::spawn(move || manner(stream));
            }
        });
        Self(manner)
    }

    fn behave(&self, manner: Manner) {
        *self.0.lock().unwrap() = manner;
    }
}

fn hang_up(stream: TcpStream) {
    drop(stream);
}

fn talk_nonsense(mut stream: TcpStream) {
    let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n");
    let _ = stream.read(&mut [0; 100]);
}

/// The client's side of SOCKS5, up to its request for an IPv4 address.
fn hear_socks(stream: &mut TcpStream) {
    stream.read_exact(&mut [0; 3]).unwrap();
    stream.write_all(&[5, 0]).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
}

fn answer_socks<const STATUS: u8>(mut stream: TcpStream) {
    hear_socks(&mut stream);
    stream.write_all(&[5, STATUS, 0, 1, 0, 0, 0, 0, 0, 0]).unwrap();
    serve(stream);
}

fn hear_http(stream: &mut TcpStream) {
    let mut heard = Vec::new();
    while !heard.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        heard.push(byte[0]);
    }
}

fn answer_http<const STATUS: u16>(mut stream: TcpStream) {
    hear_http(&mut stream);
    write!(stream, "HTTP/1.1 {STATUS} so it is\r\n\r\n").unwrap();
    serve(stream);
}

/// Hears a word. After "reset" it resets; else it repeats it, closes its side, and must hear the rest.
fn serve(mut stream: TcpStream) {
    let mut word = [0; 5];
    if stream.read_exact(&mut word).is_err() {
        return;
    }
    if &word == b"reset" {
        return reset(stream);
    }
    stream.write_all(&word).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "farewell");
}

/// Nothing that a proxy does looks like a connection to the target, and what it does later is what the target's
/// connection does.
fn what_the_proxy_does_is_what_clients_see(
    kind: &str,
    says_yes: Manner,
    failures: &[(Manner, &[ErrorKind])],
) {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let puppet = Puppet::start(&lab, "10.99.0.2:1080");
    let directory = tempfile::tempdir().unwrap();
    let egress = format!("kind = \"{kind}\"\naddress = \"10.99.0.2:1080\"");
    let configuration = through(directory.path(), &egress, "[\"tcp\"]");
    let appliance = lab.appliance(&["-c", &configuration]);
    for (number, (manner, expected)) in failures.iter().enumerate() {
        puppet.behave(*manner);
        let kind = lab.host.connect("192.0.2.7:80").map(|_| ()).unwrap_err().kind();
        assert!(expected.contains(&kind), "failure {number}: {kind:?}");
    }
    puppet.behave(says_yes);
    let connect = || lab.host.connect("192.0.2.7:80").unwrap();
    let mut client = connect();
    client.write_all(b"reset").unwrap();
    assert_eq!(
        client.read(&mut [0]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    let mut client = connect();
    client.write_all(b"hello").unwrap();
    let mut heard = String::new();
    client.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "hello");
    client.write_all(b"farewell").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let ends = |wanted: &str| {
        let fits = |line: &serde_json::Value| line["message"] == "flow ended" && line["end"] == wanted;
        appliance.log.wait(fits);
    };
    ends("upstream-reset");
    ends("finished");
    appliance.stop();
}

const REFUSED: &[ErrorKind] = &[ErrorKind::ConnectionRefused];

#[test]
fn what_a_socks5_proxy_does_is_what_clients_see() {
    what_the_proxy_does_is_what_clients_see(
        "socks5",
        answer_socks::<0>,
        &[
            (hang_up, REFUSED),
            (reset, REFUSED),
            (talk_nonsense, REFUSED),
            (answer_socks::<1>, REFUSED), // a general failure
            (
                answer_socks::<2>,
                &[ErrorKind::HostUnreachable, ErrorKind::PermissionDenied],
            ),
            (answer_socks::<3>, &[ErrorKind::NetworkUnreachable]),
            (answer_socks::<4>, &[ErrorKind::HostUnreachable]),
            (answer_socks::<5>, REFUSED),
        ],
    );
}

#[test]
fn what_an_http_proxy_does_is_what_clients_see() {
    what_the_proxy_does_is_what_clients_see(
        "http",
        answer_http::<200>,
        &[
            (hang_up, REFUSED),
            (reset, REFUSED),
            (talk_nonsense, REFUSED),
            (
                answer_http::<403>,
                &[ErrorKind::HostUnreachable, ErrorKind::PermissionDenied],
            ),
            (answer_http::<407>, REFUSED),
            (answer_http::<500>, REFUSED),
            (answer_http::<502>, REFUSED),
        ],
    );
}

#[test]
fn dante_carries_datagrams_and_again_after_its_restart() {
    if skipped(&["danted", "dig", "dnsmasq"]) {
        return;
    }
    let lab = Lab::new();
    let _dnsmasq = name_server(&lab, "192.0.2.8");
    let directory = tempfile::tempdir().unwrap();
    let proxy = file(
        directory.path(),
        "danted.conf",
        "internal: 10.99.0.2 port = 1080\nexternal: 192.0.2.9\nsocksmethod: none\nclientmethod: none\n\
         user.privileged: root\nuser.unprivileged: root\n\
         client pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\nsocks pass { from: 0.0.0.0/0 to: 0.0.0.0/0 }\n",
    );
    let start = || {
        let mut danted = lab.server.command("danted");
        danted
            .args(["-f", &proxy, "-p", directory.path().join("pid").to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // With its children it is a group, which ends as a whole.
        let danted = Background(danted.process_group(0).spawn().unwrap());
        wait_for_server(&lab.server, "10.99.0.2:1080");
        danted
    };
    let mut danted = start();
    let egress = "kind = \"socks5\"\naddress = \"10.99.0.2:1080\"";
    let configuration = through(directory.path(), egress, "[\"udp\", \"tcp\"]");
    let appliance = lab.appliance(&["-c", &configuration]);
    let ask = |transport: &str| {
        let line = format!("dig +short +time=20 +tries=1 {transport} @192.0.2.8 www.example.test A");
        text(&succeed(&lab.host, &line).stdout)
    };
    for transport in ["+notcp", "+tcp"] {
        assert_eq!(ask(transport), "192.0.2.7\n", "{transport}");
    }
    assert_eq!(appliance.log.flow_to("192.0.2.8:53")["egress"], "proxy");

    // Its end is the end of what goes by it; what is sent when it is back finds its way.
    let client = lab.host.udp("0.0.0.0:0");
    let server = lab.server.udp("192.0.2.7:1000");
    let mut buffer = [0; 16];
    client.send_to(b"one", "192.0.2.7:1000").unwrap();
    server.recv_from(&mut buffer).unwrap();
    killpg(Pid::from_raw(danted.0.id() as i32), Signal::SIGKILL).unwrap();
    danted.0.wait().unwrap();
    wait_until(|| lab.server.connect("10.99.0.2:1080").is_err());
    assert_eq!(appliance.log.flow_to("192.0.2.7:1000")["end"], "connect-failed");
    let _danted = start();
    client.send_to(b"two", "192.0.2.7:1000").unwrap();
    let (len, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"two");
    server.send_to(b"answer", from).unwrap();
    assert_eq!(client.recv(&mut buffer).unwrap(), 6);
    appliance.stop();
}
