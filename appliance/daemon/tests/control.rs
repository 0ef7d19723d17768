//! The control socket and its commands, with an appliance that relays.

mod support;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::{Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Group;
use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};
use support::peers::connection;
use support::{Appliance, Background, Lab, TUNGATE, file, skipped, text, wait_until};

/// Runs a command in the appliance's namespace.
fn tungate(lab: &Lab, arguments: &str) -> Output {
    lab.host.run(&format!("{TUNGATE} {arguments}"))
}

/// Runs one that must succeed, and returns what it prints.
fn run(lab: &Lab, arguments: &str) -> String {
    let output = tungate(lab, arguments);
    assert!(output.status.success(), "{arguments}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Runs one that must fail with `code`, and returns what it says.
fn fails(lab: &Lab, arguments: &str, code: i32) -> String {
    let output = tungate(lab, arguments);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments}: {said}");
    said
}

fn json(lab: &Lab, arguments: &str) -> Value {
    serde_json::from_str(&run(lab, &format!("{arguments} --json"))).unwrap()
}

/// The open flow to `target`, if there is one.
fn flow_to(lab: &Lab, target: &str) -> Option<Value> {
    let flows = json(lab, "flows");
    let flows = flows["flows"].as_array().unwrap();
    flows.iter().find(|flow| flow["target"] == target).cloned()
}

/// Sends a line over, and back.
fn talk((client, server): &(TcpStream, TcpStream)) {
    for (mut from, mut to) in [(client, server), (server, client)] {
        from.write_all(b"hello\n").unwrap();
        let mut heard = [0; 6];
        to.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello\n");
    }
}

/// A connection that is being made.
fn connecting(lab: &Lab, address: &str) -> Socket {
    lab.host.enter(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let address: std::net::SocketAddr = address.parse().unwrap();
        let begun = socket.connect(&SockAddr::from(address)).unwrap_err();
        assert_eq!(begun.raw_os_error(), Some(libc::EINPROGRESS));
        socket
    })
}

/// Where the appliance's control socket is, as its log says.
fn socket(appliance: &Appliance) -> String {
    let line = appliance.log.wait(|line| line["message"] == "relaying");
    line["control"].as_str().unwrap().to_owned()
}

#[test]
fn a_flow_is_shown_while_it_lives_and_counted_when_it_has_ended() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let pair = connection(&lab, "192.0.2.7:1000");
    talk(&pair);
    let client = pair.0.local_addr().unwrap().to_string();
    // Acknowledgements may still be on their way.
    let both = |flow: &Value| flow["to_upstream"] == 6 && flow["to_client"] == 6;
    wait_until(|| flow_to(&lab, "192.0.2.7:1000").is_some_and(|flow| both(&flow)));
    let flow = flow_to(&lab, "192.0.2.7:1000").unwrap();
    for (field, expected) in [
        ("protocol", "tcp"),
        ("client", client.as_str()),
        ("rule", "default"),
        ("egress", "direct"),
        ("state", "open"),
    ] {
        assert_eq!(flow[field], expected, "{field} of {flow}");
    }
    assert!(flow["name"].is_null() && flow["to_client_per_second"].is_null());
    assert!(flow["age_seconds"].as_f64().unwrap() >= 0.0);
    let table = run(&lab, "flows");
    assert!(table.contains(&client) && table.ends_with("1 flow\n"), "{table}");

    let (mut client, mut server) = pair;
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(server.read(&mut [0; 8]).unwrap(), 0);
    let state = |state: &str| flow_to(&lab, "192.0.2.7:1000").unwrap()["state"] == state;
    wait_until(|| state("client-closed"));
    drop(server);
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    wait_until(|| json(&lab, "flows")["total"] == 0);
    let counters = json(&lab, "counters");
    assert_eq!(counters["ended"]["finished"], 1, "{counters}");
    assert_eq!(counters["open_flows"], 0);
    assert_eq!(run(&lab, "flows"), "no flows are open\n");
    assert!(run(&lab, "counters").contains("flows ended: finished"));
    appliance.stop();
}

#[test]
fn a_watch_tells_how_fast_flows_are_and_ends_with_the_appliance() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let (mut client, mut server) = connection(&lab, "192.0.2.7:1000");
    let mut watch = lab
        .host
        .command(TUNGATE)
        .args(["flows", "--watch", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let first = next();
    assert!(first["flows"][0]["to_client_per_second"].is_null(), "{first}");
    server.write_all(&[7; 100_000]).unwrap();
    client.read_exact(&mut vec![0; 100_000]).unwrap();
    loop {
        let flow = &next()["flows"][0];
        if flow["to_client_per_second"].as_f64().unwrap() > 0.0 {
            break;
        }
    }
    drop((client, server));
    appliance.stop();
    let output = watch.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(6), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("has ended"));
}

#[test]
fn a_list_entry_ends_the_flows_that_it_denies_and_no_others() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let mut denied = connection(&lab, "192.0.2.7:1000");
    let other = connection(&lab, "192.0.2.8:1000");
    talk(&denied);
    talk(&other);
    assert_eq!(
        run(&lab, "list add 192.0.2.7"),
        "1 added; the lists have 1 entry\n"
    );
    // The command has returned, so it is in force: the flow is gone, and its upstream knows.
    assert_eq!(flow_to(&lab, "192.0.2.7:1000"), None);
    let ended = appliance.log.flow_to("192.0.2.7:1000");
    assert_eq!(
        (&ended["end"], &ended["detail"]),
        (&"denied".into(), &"deny 192.0.2.7/32".into())
    );
    assert_eq!(
        denied.1.read(&mut [0; 8]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    talk(&other);
    wait_until(|| flow_to(&lab, "192.0.2.8:1000").is_some_and(|flow| flow["to_client"] == 12));
    // A new one meets silence, which is counted by the entry.
    let listener = lab.server.listen("192.0.2.7:1001");
    let waiting = connecting(&lab, "192.0.2.7:1001");
    let dropped = || json(&lab, "counters")["dropped_by_rule"]["deny 192.0.2.7/32"].as_u64();
    wait_until(|| dropped().unwrap_or(0) > 0);
    assert_eq!(flow_to(&lab, "192.0.2.7:1001"), None);
    let counted = dropped();
    let show = json(&lab, "list show");
    assert_eq!(show["total"], 1);
    assert_eq!(show["entries"][0]["entry"], "deny 192.0.2.7/32");
    assert_eq!(show["entries"][0]["origin"], "control");
    assert_eq!(run(&lab, "list show 192.0.2.8"), "0 of 1 entry\n");

    run(&lab, "list remove deny 192.0.2.7");
    // Its next attempt comes through.
    drop((listener.accept().unwrap(), waiting));
    assert!(dropped() >= counted, "counts stay when an entry goes");
    talk(&other);
    drop(other);
    appliance.stop();
}

#[test]
fn entries_with_a_time_end_by_themselves() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let listener = lab.server.listen("192.0.2.7:1000");
    let appliance = lab.appliance(&[]);
    run(&lab, "list add --ttl 1h deny 192.0.2.7 tcp 1000");
    let left = || json(&lab, "list show")["entries"][0]["expires_in_seconds"].as_u64();
    assert!((3_500..=3_600).contains(&left().unwrap()));
    assert_eq!(
        run(&lab, "list add --ttl 1s deny 192.0.2.7 tcp 1000"),
        "1 there already, renewed for 1s; the lists have 1 entry\n"
    );
    // The kernel tries again after a second.
    drop((
        lab.host.connect("192.0.2.7:1000").unwrap(),
        listener.accept().unwrap(),
    ));
    assert_eq!(left(), None);
    assert_eq!(run(&lab, "list show"), "the lists are empty\n");
    appliance.stop();
}

#[test]
fn a_reload_ends_the_flows_that_a_rule_rejects_and_keeps_added_entries() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let configure = |content: &str| file(directory.path(), "tungate.toml", content);
    let lists = "[lists]\nentries = [\"deny 192.0.2.9\"]\n";
    let configuration = configure(lists);
    let appliance = lab.appliance(&["-c", &configuration]);
    let mut rejected = connection(&lab, "192.0.2.7:1000");
    let other = connection(&lab, "192.0.2.8:1000");
    talk(&rejected);
    run(&lab, "list add deny 203.0.113.1");
    run(&lab, "list remove deny 192.0.2.9");

    configure(&format!(
        "{lists}[[rule]]\nname = \"no more\"\ntargets = [\"192.0.2.7\"]\naction = \"rejct\"\n"
    ));
    let said = fails(&lab, "reload", 9);
    assert!(said.contains("rejct") && said.contains("hint"), "{said}");
    talk(&rejected);
    assert_eq!(json(&lab, "list show")["total"], 1);

    configure(&format!(
        "{lists}[[rule]]\nname = \"no more\"\ntargets = [\"192.0.2.7\"]\naction = \"reject\"\n"
    ));
    assert_eq!(
        run(&lab, "reload"),
        "in force: 2 list entries, 1 of them kept from `tungate list`, 1 rule\n"
    );
    // A rejection is one that the client notices.
    for end in [&mut rejected.0, &mut rejected.1] {
        assert_eq!(
            end.read(&mut [0; 8]).unwrap_err().kind(),
            ErrorKind::ConnectionReset
        );
    }
    let ended = appliance.log.flow_to("192.0.2.7:1000");
    assert_eq!(
        (&ended["end"], &ended["detail"]),
        (&"denied".into(), &"no more".into())
    );
    talk(&other);
    assert_eq!(
        run(&lab, "list show"),
        format!(
            "deny 192.0.2.9/32\n{:<40}  by `tungate list`\n",
            "deny 203.0.113.1/32"
        )
    );
    let list = file(
        directory.path(),
        "new.txt",
        "deny 203.0.113.7\nallow 203.0.113.8 tcp 443\n",
    );
    assert_eq!(
        run(&lab, &format!("list load {list}")),
        "2 removed, 2 added; the lists have 2 entries\n"
    );
    drop(other);
    appliance.stop();
}

#[test]
fn failures_have_a_message_and_a_code() {
    if skipped(&["setpriv"]) {
        return;
    }
    let lab = Lab::new();
    let said = fails(&lab, "flows", 6);
    assert!(
        said.contains("no appliance is running here") && said.contains("tungate run"),
        "{said}"
    );
    let appliance = lab.appliance(&[]);
    let said = fails(&lab, "list remove deny 192.0.2.7", 8);
    assert!(said.contains("no entry `deny 192.0.2.7/32`"), "{said}");
    let said = fails(&lab, "list add deny 192.0.2.7/99", 2);
    assert!(said.contains("192.0.2.7/99"), "{said}");
    let said = fails(&lab, "reload", 9);
    assert!(said.contains("--config"), "{said}");
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups";
    let path = socket(&appliance);
    let output = lab
        .host
        .run(&format!("{nobody} {TUNGATE} flows --control {path}"));
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("[control]"));
    appliance.stop();
    assert!(
        !std::path::Path::new(&path).exists(),
        "the socket goes with the appliance"
    );
    fails(&lab, "flows", 6);
}

#[test]
fn members_of_the_configured_group_may_open_the_socket() {
    if skipped(&["setpriv"]) {
        return;
    }
    let Some(group) = Group::from_name("adm").unwrap() else {
        println!("skipped: there is no group adm");
        return;
    };
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let configuration = file(directory.path(), "tungate.toml", "[control]\ngroup = \"adm\"\n");
    let appliance = lab.appliance(&["-c", &configuration]);
    let path = socket(&appliance);
    let by = |group: u32, arguments: &str| {
        let line = format!(
            "setpriv --reuid=65534 --regid={group} --clear-groups {TUNGATE} {arguments} --control {path}"
        );
        lab.host.run(&line).status.code().unwrap()
    };
    assert_eq!(by(group.gid.as_raw(), "list add 203.0.113.7"), 0);
    assert_eq!(by(65_534, "list add 203.0.113.8"), 3);
    let line = appliance
        .log
        .wait(|line| line["message"] == "lists have been changed");
    assert_eq!(
        (&line["user"], &line["change"]),
        (&65_534.into(), &"add deny 203.0.113.7/32".into())
    );
    appliance.stop();
}

#[test]
fn http_by_hand_gets_answers_and_reasons() {
    if skipped(&["curl"]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let path = socket(&appliance);
    let curl = |arguments: &[&str]| -> (u64, Value) {
        let output = lab
            .host
            .command("curl")
            .args(["-sS", "--unix-socket", &path, "-w", "\n%{http_code}"])
            .args(arguments)
            .output()
            .unwrap();
        let printed = text(&output.stdout);
        let (body, code) = printed.rsplit_once('\n').unwrap();
        (code.parse().unwrap(), serde_json::from_str(body).unwrap())
    };
    let (code, status) = curl(&["http://localhost/v1/status"]);
    assert_eq!((code, &status["draining"]), (200, &false.into()));
    let (code, policy) = curl(&["http://localhost/v1/policy"]);
    assert_eq!((code, policy["rules"].as_array().unwrap().len()), (200, 0));
    let add = r#"{"entries": ["deny 203.0.113.0/24", "allow 203.0.113.7 tcp 443"], "ttl_seconds": 60}"#;
    let (code, changed) = curl(&["--data", add, "http://localhost/v1/lists/add"]);
    assert_eq!(
        (code, &changed["added"], &changed["total"]),
        (200, &2.into(), &2.into())
    );
    let (_, entries) = curl(&["http://localhost/v1/lists?address=203.0.113.7&limit=1"]);
    assert_eq!(entries["total"], 2);
    assert_eq!(entries["entries"].as_array().unwrap().len(), 1);
    let put = [
        "-X",
        "PUT",
        "--data",
        r#"{"entries": []}"#,
        "http://localhost/v1/lists",
    ];
    assert_eq!(curl(&put).1["removed"], 2);
    for (arguments, expected, kind) in [
        (&["http://localhost/v1/nothing"][..], 404, "no-such-path"),
        (&["-X", "DELETE", "http://localhost/v1/lists"], 405, "method"),
        (&["http://localhost/v1/flows?limit=0"], 400, "bad-request"),
        (&["http://localhost/v1/flows?address=::1"], 400, "bad-request"),
        (
            &["--data", "{", "http://localhost/v1/lists/add"],
            400,
            "bad-request",
        ),
        (
            &["--data", r#"{"entries": []}"#, "http://localhost/v1/lists/add"],
            400,
            "bad-request",
        ),
        (
            &[
                "--data",
                r#"{"entries": ["deny 10.0.0.0/99"]}"#,
                "http://localhost/v1/lists/add",
            ],
            400,
            "bad-request",
        ),
        (
            &[
                "--data",
                r#"{"entries": ["deny 10.0.0.0/8"]}"#,
                "http://localhost/v1/lists/remove",
            ],
            404,
            "no-entry",
        ),
        (
            &["-X", "POST", "http://localhost/v1/policy/reload"],
            409,
            "configuration",
        ),
    ] {
        let (code, failure) = curl(arguments);
        assert_eq!(
            (code, &failure["error"]["kind"]),
            (expected, &kind.into()),
            "{failure}"
        );
        assert!(!failure["error"]["message"].as_str().unwrap().is_empty());
    }
    appliance.stop();
}

#[test]
fn a_drained_appliance_finishes_what_is_open_and_ends() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let before = lab.host.state();
    let mut appliance = lab.appliance(&[]);
    let pair = connection(&lab, "192.0.2.7:1000");
    let drain = lab
        .host
        .command(TUNGATE)
        .args(["drain", "--timeout", "10min"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    appliance.log.wait(|line| {
        line["message"]
            .as_str()
            .is_some_and(|message| message.starts_with("ending"))
    });
    talk(&pair);
    let listener = lab.server.listen("192.0.2.7:1001");
    // A refusal, as soon as the shards know.
    wait_until(|| match lab.host.connect("192.0.2.7:1001") {
        Ok(_) => listener.accept().is_err(),
        Err(error) => error.kind() == ErrorKind::ConnectionRefused,
    });
    talk(&pair);
    let said = fails(&lab, "list add 203.0.113.1", 9);
    assert!(said.contains("ending"), "{said}");
    assert!(appliance.process.try_wait().unwrap().is_none());
    drop(pair);
    assert!(appliance.process.wait().unwrap().success());
    let output = drain.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(
        text(&output.stdout),
        "no new flows; 1 open flow may go on for 600 s\nended\n"
    );
    assert_eq!(lab.host.state(), before);
}

#[test]
fn what_a_crash_leaves_is_no_appliance_and_stops_none() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let mut appliance = lab.appliance(&[]);
    let path = socket(&appliance);
    kill(
        nix::unistd::Pid::from_raw(appliance.process.id() as i32),
        Signal::SIGKILL,
    )
    .unwrap();
    appliance.process.wait().unwrap();
    wait_until(|| tungate(&lab, "flows").status.code() == Some(6)); // the worker follows at once
    assert!(std::path::Path::new(&path).exists());
    run(&lab, "cleanup");
    assert!(!std::path::Path::new(&path).exists());
    // Nor does it stand in the way of the next one.
    std::os::unix::net::UnixListener::bind(&path).unwrap();
    let appliance = lab.appliance(&[]);
    assert_eq!(run(&lab, "flows"), "no flows are open\n");
    appliance.stop();
    assert!(!std::path::Path::new(&path).exists());
}

#[test]
fn lists_that_change_all_the_time_disturb_no_flow() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let pair = connection(&lab, "192.0.2.7:1000");
    // A flow list is asked for at the same time.
    let watch = lab
        .host
        .command(TUNGATE)
        .args(["flows", "--watch"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let watch = Background(watch);
    for number in 0..20 {
        run(&lab, &format!("list add deny 203.0.113.{number}"));
        talk(&pair);
    }
    for number in 0..20 {
        run(&lab, &format!("list remove deny 203.0.113.{number}"));
        talk(&pair);
    }
    drop(watch);
    assert_eq!(json(&lab, "flows")["total"], 1);
    drop(pair);
    appliance.stop();
}
