//! What `tungate run` does to its host, and that it takes it back.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::{Appliance, Lab, Namespace, PATIENCE, TUNGATE, file, skipped, text, wait_until};

fn connect_and_hear(client: &Namespace, server: &Namespace, address: &str) -> String {
    let listener = server.listen(address);
    let mut stream = client.connect(address).unwrap();
    let (mut accepted, peer) = listener.accept().unwrap();
    write!(accepted, "{}", peer.ip()).unwrap();
    drop(accepted);
    let mut heard = String::new();
    stream.read_to_string(&mut heard).unwrap();
    heard
}

#[test]
fn the_host_is_the_same_before_and_after() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    // What others have put there stays.
    lab.host.ip("rule add pref 8450 from 10.1.2.3 lookup 77");
    lab.host.ip("route add 203.0.113.0/24 via 10.99.0.2 table 77");
    let before = lab.host.state();
    for arguments in [&[][..], &["--fail-open"], &["--from", "uplink"]] {
        let appliance = lab.appliance(arguments);
        assert_ne!(lab.host.state(), before);
        appliance.stop();
        assert_eq!(lab.host.state(), before, "after {arguments:?}");
    }
}

#[test]
fn a_dry_run_prints_what_a_run_does_and_does_nothing() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let before = lab.host.state();
    let output = lab.host.run(&format!("{TUNGATE} run --dry-run"));
    assert!(output.status.success());
    assert_eq!(lab.host.state(), before);
    // Carried out by hand, the commands leave what a run leaves.
    let by_hand = Lab::new();
    for line in text(&output.stdout).lines() {
        let output = match line.strip_prefix("sysctl -w ") {
            None => by_hand.host.run(line),
            Some(setting) => {
                let (key, value) = setting.split_once('=').unwrap();
                by_hand
                    .host
                    .enter(|| std::fs::write(format!("/proc/sys/{key}"), value).unwrap());
                continue;
            }
        };
        assert!(output.status.success(), "{line}: {}", text(&output.stderr));
    }
    let appliance = lab.appliance(&[]);
    for arguments in ["-4 rule", "-6 rule"] {
        assert_eq!(lab.host.ip(arguments), by_hand.host.ip(arguments));
    }
    let routes = |namespace: &Namespace| {
        namespace
            .ip("-4 route show table 8400")
            .replace("dead ", "")
            .replace("linkdown ", "")
    };
    assert_eq!(routes(&lab.host), routes(&by_hand.host));
    appliance.stop();
}

#[test]
fn connections_to_the_host_and_to_neighbours_keep_their_ways() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    // The server's side has a default route, too, so that nothing but the appliance could be in the way.
    lab.server.ip("-4 route add default via 10.99.0.1");
    let appliance = lab.appliance(&[]);
    // From outside to the host, by an address that is behind its default route.
    lab.server.ip("address add 203.0.113.77/32 dev lo");
    let listener = lab.host.listen("0.0.0.0:2222");
    let address = "10.99.0.1:2222".parse().unwrap();
    let mut stream = lab.server.enter(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket
            .bind(&"203.0.113.77:0".parse::<std::net::SocketAddr>().unwrap().into())
            .unwrap();
        socket
            .connect_timeout(&std::net::SocketAddr::into(address), PATIENCE)
            .unwrap();
        TcpStream::from(socket)
    });
    listener.accept().unwrap().0.write_all(b"welcome").unwrap();
    let mut heard = String::new();
    stream.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "welcome");
    // From the host to a neighbour, which the main table has a route for.
    assert_eq!(
        connect_and_hear(&lab.host, &lab.server, "10.99.0.2:80"),
        "10.99.0.1"
    );
    appliance.signal(Signal::SIGTERM);
    let ended = appliance.log.wait(|line| line["message"] == "ended");
    assert_eq!(ended["flows"], 0, "none of this is the appliance's business");
}

#[test]
fn clients_behind_an_interface_are_relayed_and_the_host_is_not() {
    if skipped(&["ping"]) {
        return;
    }
    let lab = Lab::new();
    let client = lab.routed_client();
    let before = lab.host.state();
    let appliance = Appliance::start(&lab.host, &["--from", "clients"]);
    // The server has no route to the clients: it sees the appliance.
    assert_eq!(
        connect_and_hear(&client, &lab.server, "192.0.2.7:1000"),
        "10.99.0.1"
    );
    assert_eq!(
        connect_and_hear(&client, &lab.server, "[2001:db8::7]:1000"),
        "fd99::1"
    );
    assert_eq!(
        appliance.log.flow_to("192.0.2.7:1000")["client"]
            .as_str()
            .unwrap()
            .split(':')
            .next(),
        Some("10.50.0.2")
    );
    let output = client.run("ping -n -c 1 -W 10 192.0.2.7");
    assert!(output.status.success(), "{}", text(&output.stdout));
    connect_and_hear(&lab.host, &lab.server, "192.0.2.8:1000");
    appliance.signal(Signal::SIGTERM);
    let ended = appliance.log.wait(|line| line["message"] == "ended");
    assert_eq!(ended["flows"], 3, "two connections and the ping");
    drop(appliance);
    assert_eq!(lab.host.state(), before);
}

#[test]
fn a_killed_appliance_lets_nothing_go_direct_until_cleanup() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let before = lab.host.state();
    let (v4, v6) = (
        lab.server.listen("192.0.2.7:1000"),
        lab.server.listen("[2001:db8::7]:1000"),
    );
    let kill = |arguments: &[&str]| {
        let mut appliance = lab.appliance(arguments);
        appliance.signal(Signal::SIGKILL);
        appliance.process.wait().unwrap();
    };
    kill(&[]);
    // Until the kernel has noticed, the device drops what comes.
    wait_until(|| lab.host.ip("-4 route show table 8400").contains("dead linkdown"));
    assert_eq!(
        lab.host.connect("192.0.2.7:1000").unwrap_err().kind(),
        ErrorKind::HostUnreachable
    );
    let address = "[2001:db8::7]:1000".parse().unwrap();
    let result = lab
        .host
        .enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(2)));
    assert_eq!(result.unwrap_err().kind(), ErrorKind::TimedOut);
    for listener in [&v4, &v6] {
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    }
    let output = lab.host.run(&format!("{TUNGATE} cleanup"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(lab.host.state(), before);
    lab.host.connect("192.0.2.7:1000").unwrap();

    // The next run recognises what is there, and works.
    kill(&["--from", "uplink"]);
    let appliance = lab.appliance(&[]);
    appliance.log.wait(|line| {
        line["message"]
            .as_str()
            .is_some_and(|text| text.contains("undone now"))
    });
    lab.host.connect("192.0.2.7:1000").unwrap();
    appliance.stop();
    assert_eq!(lab.host.state(), before);

    // Where the operator prefers so, traffic goes its usual way at once.
    kill(&["--fail-open"]);
    wait_until(|| !lab.host.ip("-o link").contains("tungate0"));
    lab.host.connect("192.0.2.7:1000").unwrap();
}

#[test]
fn a_second_appliance_in_the_same_namespace_is_refused() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let state = lab.host.state();
    let output = lab.host.run(&format!("{TUNGATE} run"));
    assert!(!output.status.success());
    let message = text(&output.stderr);
    assert!(
        message.contains("already runs") && message.contains(&appliance.process.id().to_string()),
        "{message}"
    );
    assert_eq!(lab.host.state(), state);
    appliance.stop();
}

#[test]
fn a_reload_replaces_the_policy_only_if_it_is_sound() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let path = file(
        directory.path(),
        "tungate.toml",
        "[lists]\nentries = [\"deny 192.0.2.8\"]\n",
    );
    let appliance = lab.appliance(&["-c", &path]);
    let listener = lab.server.listen("0.0.0.0:1000");
    let try_connect = |address: &str| {
        let address = address.parse().unwrap();
        lab.host
            .enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)))
    };
    let reload = |message: &str| {
        let seen = appliance.log.all().lines().count();
        appliance.signal(Signal::SIGHUP);
        wait_until(|| {
            appliance
                .log
                .all()
                .lines()
                .skip(seen)
                .any(|line| line.contains(message))
        });
    };
    assert_eq!(
        try_connect("192.0.2.8:1000").unwrap_err().kind(),
        ErrorKind::TimedOut
    );
    let mut affected = try_connect("192.0.2.7:1000").unwrap();
    let (mut far, _) = listener.accept().unwrap();

    file(
        directory.path(),
        "tungate.toml",
        "[lists]\nentries = [\"deny 192.0.2.300\"]\n",
    );
    reload("is not an IP address");
    far.write_all(b"x").unwrap();
    affected.read_exact(&mut [0]).unwrap();
    assert_eq!(
        try_connect("192.0.2.8:1000").unwrap_err().kind(),
        ErrorKind::TimedOut
    );

    // What is denied now ends, with the rule as its reason; what was denied is allowed.
    file(
        directory.path(),
        "tungate.toml",
        "[[rule]]\nname = \"no more\"\ntargets = [\"192.0.2.7\"]\naction = \"reject\"\n",
    );
    reload("the policy has been replaced");
    affected.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(
        affected.read(&mut [0]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    let flow = appliance.log.flow_to("192.0.2.7:1000");
    assert_eq!(
        (&flow["end"], &flow["detail"]),
        (&"denied".into(), &"no more".into())
    );
    assert_eq!(
        try_connect("192.0.2.7:1000").unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
    try_connect("192.0.2.8:1000").unwrap();
    appliance.stop();
}

#[test]
fn open_flows_finish_after_sigterm_and_a_second_one_resets_them() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let listener = lab.server.listen("192.0.2.7:1000");
    let others = lab.server.listen("192.0.2.7:1001");
    for second in [false, true] {
        let appliance = lab.appliance(&[]);
        let mut client = lab.host.connect("192.0.2.7:1000").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        appliance.signal(Signal::SIGTERM);
        appliance.log.wait(|line| {
            line["message"]
                .as_str()
                .is_some_and(|text| text.starts_with("ending"))
        });
        // The shards hear of it a moment later.
        wait_until(|| match lab.host.connect("192.0.2.7:1001") {
            Ok(client) => {
                drop((client, others.accept().unwrap()));
                false
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
                true
            }
        });
        server.write_all(b"still here").unwrap();
        client.read_exact(&mut [0; 10]).unwrap();
        if second {
            appliance.signal(Signal::SIGTERM);
            assert_eq!(
                client.read(&mut [0]).unwrap_err().kind(),
                ErrorKind::ConnectionReset
            );
            server.set_read_timeout(Some(PATIENCE)).unwrap();
            assert_eq!(
                server.read(&mut [0]).unwrap_err().kind(),
                ErrorKind::ConnectionReset
            );
        } else {
            drop(server);
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
            drop(client);
        }
        let end = if second { "denied" } else { "finished" };
        assert_eq!(appliance.log.flow_to("192.0.2.7:1000")["end"], end);
        appliance.log.wait(|line| line["message"] == "ended");
    }
}

#[test]
fn a_configuration_with_mistakes_changes_nothing() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let path = file(directory.path(), "tungate.toml", "[limits]\nflow = 7\n");
    let before = lab.host.state();
    let output = lab.host.run(&format!("{TUNGATE} run -c {path}"));
    assert!(!output.status.success());
    let message = text(&output.stderr);
    assert!(
        message.contains("`flow` is not a key of [limits]") && message.contains("tungate.toml:2:1"),
        "{message}"
    );
    let output = lab.host.run(&format!("{TUNGATE} run --from nowhere0"));
    assert!(
        text(&output.stderr).contains("there is no interface \"nowhere0\""),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(lab.host.state(), before);
}

#[test]
fn a_check_lists_mistakes_without_root() {
    let directory = tempfile::tempdir().unwrap();
    let path = file(
        directory.path(),
        "tungate.toml",
        "[[rule]]\nports = [80, 70000]\naction = \"dorp\"\n",
    );
    let check = |arguments: &[&str]| {
        std::process::Command::new(TUNGATE)
            .arg("check")
            .args(arguments)
            .stderr(Stdio::inherit())
            .output()
            .unwrap()
    };
    let output = check(&[&path]);
    assert!(!output.status.success());
    let report = text(&output.stdout);
    assert!(
        report.contains("70000 is not a port") && report.contains("tungate.toml:3:11"),
        "{report}"
    );
    let mistakes: Value = serde_json::from_slice(&check(&[&path, "--json"]).stdout).unwrap();
    assert_eq!(
        (mistakes.as_array().unwrap().len(), &mistakes[0]["line"]),
        (2, &2.into())
    );

    let defaults = check(&["--show-defaults"]);
    assert!(defaults.status.success());
    let path = file(directory.path(), "defaults.toml", &text(&defaults.stdout));
    let output = check(&[&path]);
    assert!(output.status.success(), "{}", text(&output.stdout));
}
