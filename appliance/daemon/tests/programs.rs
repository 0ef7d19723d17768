//! Programs that know nothing of the appliance, between them a host that it captures and a server behind it.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use support::programs::{has_module, name_server, start, succeed};
use support::web::{self, Web, hash};
use support::{
    Background, Lab, Namespace, PYTHON, SERVER, SERVER6, TUNGATE, amount, file, skipped, text,
    wait_for_server, wait_until,
};

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
    let original = web::publish(directory.path(), "original", amount(20_000_001, 200_000_001));
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

#[test]
fn quic_carries_http3_in_both_ip_versions_and_goes_on_from_another_port() {
    if skipped(&["gtlsserver", "gtlsclient", "openssl"]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display();
    web::certificate(directory.path());
    let original = web::publish(directory.path(), "original", amount(8_000_001, 200_000_001));
    let downloads = directory.path().join("downloads");
    std::fs::create_dir(&downloads).unwrap();
    for (port, host) in [(4433, SERVER), (4434, SERVER6)] {
        let mut server = lab.server.command("gtlsserver");
        server
            .args(["--quiet", &format!("--htdocs={path}"), host, &port.to_string()])
            .args([format!("{path}/key.pem"), format!("{path}/certificate.pem")])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let _server = Background(server.spawn().unwrap());
        wait_until(|| text(&lab.server.run("ss -Huln").stdout).contains(&format!(":{port} ")));
        // In the midst of the transfer the client goes on from another port.
        for moves in ["", "--change-local-addr=20ms "] {
            succeed(
                &lab.host,
                &format!(
                    "gtlsclient --quiet --no-quic-dump --no-http-dump --exit-on-all-streams-close {moves}\
                     --download={} {host} {port} https://www.example.test:{port}/original",
                    downloads.display()
                ),
            );
            let copy = downloads.join("original");
            assert!(hash(&copy) == original, "{host} {moves}");
            std::fs::remove_file(copy).unwrap();
        }
        let target = if port == 4433 {
            format!("{host}:{port}")
        } else {
            format!("[{host}]:{port}")
        };
        let flows = text(&lab.host.run(&format!("{TUNGATE} flows")).stdout);
        assert!(flows.contains(&target), "{flows}");
    }
    appliance.stop();
}

/// Another protocol over UDP with a state of its own, by other programs.
#[test]
fn dtls_shakes_hands_and_carries_data_both_ways() {
    if skipped(&["openssl"]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let directory = tempfile::tempdir().unwrap();
    web::certificate(directory.path());
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
        "[dns]\nresolver = \"192.0.2.8\"\n\
         [[rule]]\nname = \"no telnet\"\nprotocols = [\"tcp\"]\nports = [23]\naction = \"reject\"\n",
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
        // What is denied is as well.
        lab.host.run(&format!("nc -w 10 {address} 23"));
        let denied = appliance
            .log
            .wait(|line| line["message"] == "flow denied" && line["name"] == name);
        assert_eq!(denied["rule"], "no telnet");
    }
    let flow = appliance.log.flow_to("203.0.113.99:53");
    assert_eq!(
        (&flow["rule"], &flow["egress"]),
        (&"resolver".into(), &"redirect".into())
    );
    appliance.stop();
}

/// The other way round, a netcat that listens ends as soon as it hears of the client's end (`relay` has that case).
#[test]
fn netcat_is_heard_by_a_netcat_that_has_closed_its_side() {
    if skipped(&["nc"]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    // -N: its input's end is sent as FIN, and it goes on reading until the other's.
    let netcat = |namespace: &Namespace, line: &str| {
        let mut netcat = namespace.command("nc");
        netcat
            .args(line.split(' '))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        Background(netcat.spawn().unwrap())
    };
    let mut server = netcat(&lab.server, "-N -l 192.0.2.7 1000");
    wait_until(|| text(&lab.server.run("ss -Htln").stdout).contains("192.0.2.7:1000"));
    let mut client = netcat(&lab.host, "-N 192.0.2.7 1000");
    server.0.stdin.take().unwrap().write_all(b"all I have").unwrap();
    let mut heard = [0; 10];
    client.0.stdout.as_mut().unwrap().read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"all I have");
    client.0.stdin.take().unwrap().write_all(b"thank you").unwrap();
    let mut heard = String::new();
    let output = server.0.stdout.as_mut().unwrap();
    output.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "thank you");
    assert!(server.0.wait().unwrap().success() && client.0.wait().unwrap().success());
    assert_eq!(appliance.log.flow_to("192.0.2.7:1000")["end"], "finished");
    appliance.stop();
}
