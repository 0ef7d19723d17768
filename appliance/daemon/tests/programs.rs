//! Programs that know nothing of the appliance, between them a host that it captures and a server behind it.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;
use support::web::{self, Web, hash};
use support::{
    Appliance, Background, Lab, Namespace, PYTHON, SERVER, SERVER6, amount, file, skipped, text,
    wait_for_server, wait_until,
};

/// Runs a program to its end, which must be good.
#[track_caller]
fn succeed(namespace: &Namespace, line: &str) -> Output {
    let output = namespace.run(line);
    assert!(
        output.status.success(),
        "{line}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    output
}

/// Whether Debian's Python has a module.
fn has_module(name: &str) -> bool {
    let found = Command::new(PYTHON)
        .args(["-c", &format!("import {name}")])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        println!("skipped: Python has no module {name}");
    }
    found
}

/// Starts a program that says `ready` in a line of its output.
fn start(namespace: &Namespace, program: &str, arguments: &[&str], ready: &str) -> Background {
    let mut process = namespace
        .command(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(process.stdout.take().unwrap());
    let process = Background(process);
    let mut line = String::new();
    while !line.contains(ready) {
        line.clear();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "{program} has ended");
    }
    // The rest of its output must not block it.
    std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
    process
}

#[test]
fn http2_carries_many_transfers_in_one_flow_named_by_tls() {
    if skipped(&web::PROGRAMS) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let web = Web::start(&lab.server);
    let original = web.publish("original", 3_000_001);
    let downloads = web.path().join("downloads");
    std::fs::create_dir(&downloads).unwrap();
    let curl = "curl -sS -f -k -m 120 --http2 --resolve www.example.test:443:192.0.2.7";
    let url = "https://www.example.test";
    let written = format!("--write-out %{{http_version}}\\n -o {}/#1", downloads.display());
    let output = succeed(
        &lab.host,
        &format!("{curl} --parallel {written} {url}/original?[1-9]"),
    );
    assert_eq!(text(&output.stdout), "2\n".repeat(9));
    for number in 1..=9 {
        assert!(hash(&downloads.join(number.to_string())) == original, "{number}");
    }
    let path = web.path().join("original");
    succeed(&lab.host, &format!("{curl} -T {} {url}/uploaded", path.display()));
    assert!(hash(&web.path().join("uploaded")) == original);
    let flow = appliance.log.flow_to("192.0.2.7:443");
    assert_eq!(
        (&flow["name"], &flow["name_source"]),
        (&"www.example.test".into(), &"first-bytes".into())
    );
    appliance.stop();
}

#[test]
fn files_are_copied_by_scp_in_both_directions() {
    if skipped(&["sshd", "ssh", "scp", "ssh-keygen"]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display().to_string();
    for key in ["host", "user"] {
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f", &format!("{path}/{key}")])
            .status()
            .unwrap();
        assert!(made.success());
    }
    let configuration = file(
        directory.path(),
        "sshd.conf",
        &format!(
            "ListenAddress 192.0.2.7:22\nListenAddress [2001:db8::7]:22\nHostKey {path}/host\nUsePAM no\n\
             AuthorizedKeysFile {path}/user.pub\nStrictModes no\nPermitRootLogin yes\nPidFile none\n\
             Subsystem sftp internal-sftp\n"
        ),
    );
    // It wants a folder in /run, which is the host's.
    let script = format!(
        "mount -t tmpfs none /run && mkdir -m 755 /run/sshd && exec \"$(command -v sshd)\" -D -f {configuration}"
    );
    let mut sshd = lab.server.command("unshare");
    sshd.args(["--mount", "sh", "-c", &script]).stderr(Stdio::null());
    let _sshd = Background(sshd.spawn().unwrap());
    wait_for_server(&lab.server, "192.0.2.7:22");

    let options = format!(
        "-q -i {path}/user -o UserKnownHostsFile={path}/known -o StrictHostKeyChecking=accept-new -o BatchMode=yes"
    );
    let len = amount(20_000_001, 200_000_001) as u32;
    let content: Vec<u8> = (0..len)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    std::fs::write(directory.path().join("original"), content).unwrap();
    let original = hash(&directory.path().join("original"));
    for host in [SERVER.to_owned(), format!("[{SERVER6}]")] {
        succeed(
            &lab.host,
            &format!("scp {options} {path}/original root@{host}:{path}/up"),
        );
        succeed(
            &lab.host,
            &format!("scp {options} root@{host}:{path}/original {path}/down"),
        );
        for copy in ["up", "down"] {
            let copy = directory.path().join(copy);
            assert!(hash(&copy) == original, "{host}: {}", copy.display());
            std::fs::remove_file(copy).unwrap();
        }
    }
    // What a command writes, reads and ends with comes through the same connection.
    let mut ssh = lab.host.command("ssh");
    ssh.args(options.split(' '))
        .args(["root@192.0.2.7", "cat; echo to stderr >&2; exit 7"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut ssh = ssh.spawn().unwrap();
    ssh.stdin.take().unwrap().write_all(b"to stdin").unwrap();
    let output = ssh.wait_with_output().unwrap();
    assert_eq!(
        (text(&output.stdout), text(&output.stderr), output.status.code()),
        ("to stdin".to_owned(), "to stderr\n".to_owned(), Some(7))
    );
    appliance.stop();
}

#[test]
fn websockets_carry_messages_both_ways_and_close_in_order() {
    if skipped(&[PYTHON]) || !has_module("websockets") {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let server = r#"
import asyncio, websockets
async def echo(socket, *_):
    try:
        async for message in socket:
            await socket.send(message)
    except websockets.ConnectionClosed:
        pass
async def main():
    async with websockets.serve(echo, "192.0.2.7", 8000, max_size=None):
        print("listening", flush=True)
        await asyncio.Future()
asyncio.run(main())
"#;
    let client = r#"
import asyncio, os, websockets
async def main():
    async with websockets.connect("ws://192.0.2.7:8000/", max_size=None) as socket:
        for size in [0, 1, 125, 126, 65535, 65536, 3000000]:
            message = os.urandom(size)
            await socket.send(message)
            assert await socket.recv() == message, size
        await (await socket.ping())
        await socket.send("text")
        assert await socket.recv() == "text"
        await socket.close(4000, "enough")
    assert socket.close_code == 4000, socket.close_code
    print("all well")
asyncio.run(asyncio.wait_for(main(), 60))
"#;
    let _server = start(&lab.server, PYTHON, &["-c", server], "listening");
    let output = lab.host.command(PYTHON).args(["-c", client]).output().unwrap();
    assert_eq!(text(&output.stdout), "all well\n", "{}", text(&output.stderr));
    assert_eq!(appliance.log.flow_to("192.0.2.7:8000")["end"], "finished");
    appliance.stop();
}

/// DTLS stands for the protocols over UDP with a state of their own; Debian's OpenSSL has no QUIC.
#[test]
fn dtls_shakes_hands_and_carries_data_both_ways() {
    if skipped(&["openssl"]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let directory = tempfile::tempdir().unwrap();
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            "/CN=example.test",
        ])
        .args(["-keyout", "key.pem", "-out", "certificate.pem"])
        .current_dir(&directory)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    for (number, host) in [SERVER.to_owned(), format!("[{SERVER6}]")].iter().enumerate() {
        let endpoint = format!("{host}:{}", 4433 + number);
        let mut server = lab.server.command("openssl");
        server
            .args(["s_server", "-dtls1_2", "-accept", &endpoint, "-quiet"])
            .args(["-cert", "certificate.pem", "-key", "key.pem"])
            .current_dir(&directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut server = Background(server.spawn().unwrap());
        wait_until(|| text(&lab.server.run("ss -Huln").stdout).contains(&endpoint));
        let mut client = lab.host.command("openssl");
        client
            .args(["s_client", "-dtls1_2", "-connect", &endpoint, "-quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut client = Background(client.spawn().unwrap());
        // Neither reads its input before they have shaken hands.
        client
            .0
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"to the server\n")
            .unwrap();
        let mut heard = String::new();
        BufReader::new(server.0.stdout.take().unwrap())
            .read_line(&mut heard)
            .unwrap();
        assert_eq!(heard, "to the server\n");
        server
            .0
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"to the client\n")
            .unwrap();
        let mut heard = String::new();
        BufReader::new(client.0.stdout.take().unwrap())
            .read_line(&mut heard)
            .unwrap();
        assert_eq!(heard, "to the client\n");
    }
    appliance.stop();
}

#[test]
fn asyncio_holds_two_thousand_connections_at_once() {
    if skipped(&[PYTHON]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let server = r#"
import asyncio, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
async def serve(reader, writer):
    while line := await reader.readline():
        writer.write(line)
    writer.write(b"bye\n")
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "192.0.2.7", 8000, backlog=4096)
    print("listening", flush=True)
    await server.serve_forever()
asyncio.run(main())
"#;
    let client = r#"
import asyncio, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
COUNT = 2000
async def main():
    everybody = asyncio.Barrier(COUNT) if hasattr(asyncio, "Barrier") else None
    async def talk(number):
        reader, writer = await asyncio.open_connection("192.0.2.7", 8000)
        if everybody:
            await everybody.wait()
        for turn in range(5):
            line = b"%d %d\n" % (number, turn)
            writer.write(line)
            assert await reader.readline() == line
        writer.write_eof()
        assert await reader.read() == b"bye\n"
        writer.close()
    await asyncio.gather(*(talk(number) for number in range(COUNT)))
    print("all well")
asyncio.run(asyncio.wait_for(main(), 120))
"#;
    let _server = start(&lab.server, PYTHON, &["-c", server], "listening");
    let output = lab.host.command(PYTHON).args(["-c", client]).output().unwrap();
    assert_eq!(text(&output.stdout), "all well\n", "{}", text(&output.stderr));
    appliance.signal(Signal::SIGTERM);
    let ended = appliance.log.wait(|line| line["message"] == "ended");
    assert_eq!(ended["flows"], 2000);
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

#[test]
fn microsocks_carries_flows_with_a_password_and_after_its_restart() {
    let programs = ["microsocks", web::PROGRAMS[0], web::PROGRAMS[1], web::PROGRAMS[2]];
    if skipped(&programs) {
        return;
    }
    let lab = Lab::new();
    let web = Web::start(&lab.server);
    let directory = tempfile::tempdir().unwrap();
    let egress = "kind = \"socks5\"\naddress = \"10.99.0.2:1080\"\nusername = \"me\"\npassword = \"secret\"";
    let configuration = through(directory.path(), egress, "[\"tcp\"]");
    let proxy = |password: &str| {
        let line = format!("-i 10.99.0.2 -p 1080 -u me -P {password}");
        let mut microsocks = lab.server.command("microsocks");
        let process = Background(
            microsocks
                .args(line.split(' '))
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        );
        wait_for_server(&lab.server, "10.99.0.2:1080");
        process
    };
    let running = proxy("secret");
    let appliance = lab.appliance(&["-c", &configuration]);
    transfer_by_proxy(&lab, &appliance, &web);
    let ask = || {
        lab.host
            .run("curl -sS -f -m 60 -o /dev/null http://192.0.2.7/original")
            .status
            .code()
    };
    // It restarts: what comes meanwhile is refused at once, what comes after is carried.
    drop(running);
    assert_eq!(ask(), Some(7));
    let running = proxy("secret");
    assert_eq!(ask(), Some(0));
    drop(running);
    let _running = proxy("another");
    assert_eq!(ask(), Some(7), "a proxy that does not let us in refuses");
    appliance.stop();
}

#[test]
fn tinyproxy_carries_flows_with_a_password() {
    let programs = ["tinyproxy", web::PROGRAMS[0], web::PROGRAMS[1], web::PROGRAMS[2]];
    if skipped(&programs) {
        return;
    }
    let lab = Lab::new();
    let web = Web::start(&lab.server);
    let directory = tempfile::tempdir().unwrap();
    let proxy = file(
        directory.path(),
        "tinyproxy.conf",
        "Port 3128\nListen 10.99.0.2\nTimeout 60\nMaxClients 50\nBasicAuth me secret\n",
    );
    let mut tinyproxy = lab.server.command("tinyproxy");
    tinyproxy
        .args(["-d", "-c", &proxy])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let _tinyproxy = Background(tinyproxy.spawn().unwrap());
    wait_for_server(&lab.server, "10.99.0.2:3128");
    let egress = "kind = \"http\"\naddress = \"10.99.0.2:3128\"\nusername = \"me\"\npassword = \"secret\"";
    let configuration = through(directory.path(), egress, "[\"tcp\"]");
    let appliance = lab.appliance(&["-c", &configuration]);
    transfer_by_proxy(&lab, &appliance, &web);
    appliance.stop();
}

/// Names answered by dnsmasq in the server's namespace.
fn name_server(lab: &Lab, address: &str) -> Background {
    let mut dnsmasq = lab.server.command("dnsmasq");
    dnsmasq.args([
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
    ]);
    dnsmasq.args([
        "--bind-interfaces",
        "--user=root",
        "--pid-file=",
        "--local-ttl=120",
    ]);
    dnsmasq.args([
        &format!("--listen-address={address}"),
        "--host-record=www.example.test,192.0.2.7,2001:db8::7",
        "--cname=alias.example.test,www.example.test",
    ]);
    let dnsmasq = Background(dnsmasq.stderr(Stdio::null()).spawn().unwrap());
    wait_for_server(&lab.server, &format!("{address}:53"));
    dnsmasq
}

#[test]
fn dante_carries_datagrams() {
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
    let mut danted = lab.server.command("danted");
    danted
        .args(["-f", &proxy, "-p", directory.path().join("pid").to_str().unwrap()])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let danted = Background(danted.spawn().unwrap());
    wait_for_server(&lab.server, "10.99.0.2:1080");
    let egress = "kind = \"socks5\"\naddress = \"10.99.0.2:1080\"";
    let configuration = through(directory.path(), egress, "[\"udp\", \"tcp\"]");
    let appliance = lab.appliance(&["-c", &configuration]);
    for transport in ["+notcp", "+tcp"] {
        let output = succeed(
            &lab.host,
            &format!("dig +short +time=20 +tries=1 {transport} @192.0.2.8 www.example.test A"),
        );
        assert_eq!(text(&output.stdout), "192.0.2.7\n", "{transport}");
    }
    assert_eq!(appliance.log.flow_to("192.0.2.8:53")["egress"], "proxy");
    appliance.stop();
    drop(danted);
}

#[test]
fn flows_carry_the_names_that_clients_asked_for_and_a_resolver_answers_everybody() {
    if skipped(&["dig", "dnsmasq", "nc"]) {
        return;
    }
    let lab = Lab::new();
    let _dnsmasq = name_server(&lab, "192.0.2.8");
    let directory = tempfile::tempdir().unwrap();
    // Nobody answers at the address that is asked.
    let configuration = file(
        directory.path(),
        "tungate.toml",
        "[dns]\nresolver = \"192.0.2.8\"\n",
    );
    let appliance = lab.appliance(&["-c", &configuration]);
    let listener = lab.server.listen("0.0.0.0:1000");
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let listener = lab.server.listen("[2001:db8::7]:1000");
    std::thread::spawn(move || listener.incoming().for_each(drop));
    for (transport, name, kind, address, target) in [
        ("+notcp", "alias.example.test", "A", "192.0.2.7", "192.0.2.7:1000"),
        (
            "+tcp",
            "www.example.test",
            "AAAA",
            "2001:db8::7",
            "[2001:db8::7]:1000",
        ),
    ] {
        let output = succeed(
            &lab.host,
            &format!("dig +short +time=20 +tries=1 {transport} @203.0.113.99 {name} {kind}"),
        );
        assert_eq!(text(&output.stdout).lines().last(), Some(address), "{transport}");
        lab.host.run(&format!("nc -w 10 {address} 1000"));
        let flow = appliance.log.flow_to(target);
        assert_eq!(
            (&flow["name"], &flow["name_source"]),
            (&name.into(), &"dns".into()),
            "{flow}"
        );
    }
    let flow = appliance.log.flow_to("203.0.113.99:53");
    assert_eq!(
        (&flow["rule"], &flow["egress"]),
        (&"resolver".into(), &"redirect".into())
    );
    appliance.stop();
}

#[test]
fn netcat_hears_and_is_heard_after_either_side_has_closed() {
    if skipped(&["nc"]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    // -N: its input's end is sent as FIN, and it goes on reading until the other's.
    for (port, server_first) in [(1000, true), (1001, false)] {
        let netcat = |namespace: &Namespace, line: &str| {
            let mut netcat = namespace.command("nc");
            netcat
                .args(line.split(' '))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            Background(netcat.spawn().unwrap())
        };
        let mut server = netcat(&lab.server, &format!("-N -l 192.0.2.7 {port}"));
        wait_until(|| text(&lab.server.run("ss -Htln").stdout).contains(&format!("192.0.2.7:{port}")));
        let mut client = netcat(&lab.host, &format!("-N 192.0.2.7 {port}"));
        let (first, second) = if server_first {
            (&mut server.0, &mut client.0)
        } else {
            (&mut client.0, &mut server.0)
        };
        first.stdin.take().unwrap().write_all(b"all I have").unwrap();
        let mut heard = [0; 10];
        second.stdout.as_mut().unwrap().read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"all I have");
        second.stdin.take().unwrap().write_all(b"thank you").unwrap();
        let mut heard = String::new();
        first.stdout.as_mut().unwrap().read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "thank you");
        assert!(first.wait().unwrap().success() && second.wait().unwrap().success());
        let flow = appliance.log.flow_to(&format!("192.0.2.7:{port}"));
        assert_eq!(flow["end"], "finished");
    }
    appliance.stop();
}

#[test]
fn a_narrower_path_behind_the_appliance_takes_what_the_device_takes() {
    if skipped(&["ping"]) {
        return;
    }
    let lab = Lab::new();
    lab.host.ip("link set uplink mtu 1300");
    lab.server.ip("link set downlink mtu 1300");
    let appliance = lab.appliance(&[]);
    for target in [SERVER, SERVER6] {
        for size in [1400, 3000] {
            succeed(
                &lab.host,
                &format!("ping -n -c 2 -i 0.2 -W 20 -s {size} {target}"),
            );
        }
    }
    let (client, server) = (lab.host.udp("0.0.0.0:0"), lab.server.udp("192.0.2.7:1000"));
    for size in [1400, 3000] {
        client.send_to(&vec![7; size], "192.0.2.7:1000").unwrap();
        let (len, from) = server.recv_from(&mut [0; 4000]).unwrap();
        server.send_to(&vec![7; len], from).unwrap();
        assert_eq!(client.recv(&mut [0; 4000]).unwrap(), size);
    }
    appliance.stop();
}
