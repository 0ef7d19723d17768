//! `tungate exec`, as root and as an ordinary user.
//!
//! Origins are on this host's loopback, and rules redirect documentation addresses to them: that works without any
//! right.

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use nix::unistd::geteuid;
use support::caller::{
    Caller, DeviceNode, TUN, TURNS, configuration, mode_of, output, pid, pids, program, skipped, state,
};
use support::{Background, Namespace, SERVER, SERVER6, file, text, wait_until};

/// A web server on loopback that answers every request with who asked for what, until the test ends.
fn web_server(address: &str) -> SocketAddr {
    serve_web(TcpListener::bind(address).unwrap())
}

fn serve_web(listener: TcpListener) -> SocketAddr {
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
                let mut stream = stream;
                while let Some(Ok(request)) = requests.next() {
                    while requests
                        .next()
                        .is_some_and(|line| line.is_ok_and(|line| !line.is_empty()))
                    {}
                    let answer = format!("you asked: {request}\n");
                    let _ = write!(
                        stream,
                        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{answer}",
                        answer.len()
                    );
                }
            });
        }
    });
    address
}

fn redirect(name: &str, target: &str, to: SocketAddr) -> String {
    format!("[[rule]]\nname = \"{name}\"\ntargets = [\"{target}\"]\naction = \"redirect\"\nto = \"{to}\"\n")
}

#[test]
fn a_command_reaches_web_servers_over_both_ip_versions() {
    if skipped(&["curl"]) {
        return;
    }
    let _node = DeviceNode::open();
    let directory = tempfile::tempdir().unwrap();
    let mut rules = redirect("four", "192.0.2.7/32", web_server("127.0.0.1:0"));
    let mut hosts = vec!["192.0.2.7"];
    if TcpListener::bind("[::1]:0").is_ok() {
        rules += &redirect("six", "2001:db8::7/128", web_server("[::1]:0"));
        hosts.push("[2001:db8::7]");
    } else {
        println!("skipped: IPv6, which this host has not");
    }
    let config = configuration(&directory, &rules);
    for caller in Caller::all() {
        for host in &hosts {
            let url = format!("http://{host}/page");
            let command = [
                "curl",
                "--http1.1",
                "--silent",
                "--show-error",
                "--max-time",
                "30",
                &url,
                &url,
            ];
            let output = output(caller.exec(&["-c", &config], &command));
            assert_eq!(text(&output.stderr), "", "{caller:?} {host}");
            assert_eq!(text(&output.stdout), "you asked: GET /page HTTP/1.1\n".repeat(2));
            assert_eq!(output.status.code(), Some(0));
        }
    }
}

#[test]
fn exit_codes_and_signals_come_through() {
    if skipped(&[]) {
        return;
    }
    let _node = DeviceNode::open();
    for caller in Caller::all() {
        for (script, expected) in [
            ("exit 0", 0),
            ("exit 7", 7),
            ("kill -TERM $$", 128 + 15),
            ("kill -KILL $$", 128 + 9),
            ("kill -INT $$", 128 + 2),
        ] {
            let output = output(caller.exec(&[], &["sh", "-c", script]));
            assert_eq!(
                output.status.code(),
                Some(expected),
                "{caller:?} {script}: {}",
                text(&output.stderr)
            );
        }
        let missing = output(caller.exec(&[], &["/no/such/program"]));
        assert_eq!(missing.status.code(), Some(127));
        assert!(text(&missing.stderr).contains("cannot run /no/such/program"));
        let data = output(caller.exec(&[], &["/etc/passwd"]));
        assert_eq!(data.status.code(), Some(126));
    }
}

#[test]
fn a_command_has_its_own_user_and_no_rights_that_the_user_has_not() {
    if skipped(&[]) {
        return;
    }
    let _node = DeviceNode::open();
    for caller in Caller::all() {
        let script = "id -u; grep CapEff /proc/self/status; cat /proc/sys/net/ipv4/ip_forward";
        let inside = output(caller.exec(&[], &["sh", "-c", script]));
        let outside = output({
            let mut command = caller.command("sh");
            command.args(["-c", script]);
            command
        });
        assert_eq!(
            text(&inside.stdout),
            text(&outside.stdout),
            "{}",
            text(&inside.stderr)
        );
        assert!(text(&inside.stdout).starts_with(&format!("{}\n", caller.user())));
    }
}

/// A name server on loopback that knows the same address for every name.
fn name_server(socket: UdpSocket) -> SocketAddr {
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((len, client)) = socket.recv_from(&mut query) {
            // RFC 1035: the header, the question as it was, and an address (type 1) or nothing for other types.
            let end = 12 + query[12..len].iter().position(|&label| label == 0).unwrap() + 5;
            let is_address = query[end - 4..end - 2] == [0, 1];
            let mut answer = query[..end].to_vec();
            answer[2..4].copy_from_slice(&[0x81, 0x80]);
            answer[4..12].copy_from_slice(&[0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
            if is_address {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
            }
            let _ = socket.send_to(&answer, client);
        }
    });
    address
}

#[test]
fn names_are_asked_of_a_server_that_only_this_host_can_reach() {
    if skipped(&["curl"]) {
        return;
    }
    let _node = DeviceNode::open();
    let directory = tempfile::tempdir().unwrap();
    let config = configuration(
        &directory,
        &redirect("web", "192.0.2.7/32", web_server("127.0.0.1:0")),
    );
    let resolver = name_server(UdpSocket::bind("127.0.0.1:0").unwrap()).to_string();
    for caller in Caller::all() {
        let command = [
            "curl",
            "--silent",
            "--show-error",
            "--max-time",
            "30",
            "http://www.example/",
        ];
        let output = output(caller.exec(&["-c", &config, "--resolver", &resolver], &command));
        assert_eq!(text(&output.stderr), "", "{caller:?}");
        assert_eq!(text(&output.stdout), "you asked: GET / HTTP/1.1\n");
    }
}

/// A namespace that stands for a whole host, with ordinary users who may ping.
fn host() -> Option<Namespace> {
    if !geteuid().is_root() {
        println!("skipped: a host of one's own needs root");
        return None;
    }
    let host = Namespace::new();
    host.enter(|| fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap());
    host.ip(&format!("address add {SERVER}/32 dev lo"));
    host.ip(&format!("address add {SERVER6}/128 dev lo nodad"));
    Some(host)
}

/// `command`, on `host`.
fn on(host: &Namespace, command: &Command) -> Command {
    let mut there = host.command(command.get_program().to_str().unwrap());
    there.args(command.get_args()).stdin(Stdio::null());
    there
}

#[test]
fn the_hosts_own_resolver_is_asked_though_it_listens_on_loopback_only() {
    if skipped(&["curl", "nsenter"]) {
        return;
    }
    let Some(host) = host() else { return };
    let _node = DeviceNode::open();
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let resolver = file(
        directory.path(),
        "resolv.conf",
        "nameserver 127.0.0.53\noptions edns0 trust-ad\n",
    );
    name_server(host.udp("127.0.0.53:53"));
    serve_web(host.listen("192.0.2.7:80"));
    for &caller in Caller::all() {
        let curl = "cat /etc/resolv.conf; curl --silent --show-error --max-time 30 http://www.example/";
        let exec = caller.exec(&[], &["sh", "-c", curl]);
        let mut mounted = Command::new("unshare");
        mounted
            .args([
                "--mount",
                "sh",
                "-c",
                "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"",
                &resolver,
            ])
            .arg(exec.get_program())
            .args(exec.get_args());
        let output = output(on(&host, &mounted));
        assert_eq!(text(&output.stderr), "", "{caller:?}");
        assert_eq!(
            text(&output.stdout),
            "nameserver 198.18.0.1\noptions edns0 trust-ad\nyou asked: GET / HTTP/1.1\n"
        );
    }
}

#[test]
fn pings_are_answered_by_their_targets_and_by_nobody_else() {
    if skipped(&["ping", "nsenter"]) {
        return;
    }
    let Some(host) = host() else { return };
    let _node = DeviceNode::open();
    for &caller in Caller::all() {
        let ping = |target| {
            let exec = caller.exec(&[], &["ping", "-n", "-c", "1", "-W", "10", target]);
            output(on(&host, &exec))
        };
        for target in [SERVER, SERVER6] {
            let output = ping(target);
            assert!(output.status.success(), "{caller:?} {}", text(&output.stdout));
            assert!(text(&output.stdout).contains(&format!("bytes from {target}")));
        }
        let nobody = ping("198.51.100.1");
        assert_eq!(
            nobody.status.code(),
            Some(1),
            "{caller:?} {}",
            text(&nobody.stdout)
        );
    }
}

#[test]
fn what_the_policy_denies_is_refused_and_told_with_its_rule() {
    if skipped(&["curl"]) {
        return;
    }
    let _node = DeviceNode::open();
    let directory = tempfile::tempdir().unwrap();
    let rule =
        "[[rule]]\nname = \"no plain web\"\nprotocols = [\"tcp\"]\nports = [80]\naction = \"reject\"\n";
    let config = configuration(
        &directory,
        &(rule.to_owned() + &redirect("web", "192.0.2.7/32", web_server("127.0.0.1:0"))),
    );
    for caller in Caller::all() {
        let curl = |arguments: &[&str], url: &str| {
            let command = [
                "curl",
                "--silent",
                "--max-time",
                "30",
                "--output",
                "/dev/null",
                url,
            ];
            output(caller.exec(&[&["-c", &config], arguments].concat(), &command))
        };
        let denied = curl(&[], "http://192.0.2.7/");
        assert_eq!(
            denied.status.code(),
            Some(7),
            "curl's code for a refused connection"
        );
        let told = text(&denied.stderr);
        assert_eq!(told.lines().count(), 1, "{told}");
        for part in [
            "tungate: flow denied",
            "target=192.0.2.7:80",
            "rule=no plain web",
            "reason=rule-reject",
        ] {
            assert!(told.contains(part), "{told}");
        }
        // Flows that are not denied are told of on request only.
        let quiet = curl(&[], "http://192.0.2.7:8080/");
        assert_eq!(
            (quiet.status.code(), text(&quiet.stderr)),
            (Some(0), String::new())
        );
        let told = text(&curl(&["-v"], "http://192.0.2.7:8080/").stderr);
        for part in [
            "flow ended",
            "target=192.0.2.7:8080",
            "rule=web",
            "end=\"finished\"",
        ] {
            assert!(told.contains(part), "{told}");
        }
    }
}

#[test]
fn bytes_that_a_command_leaves_behind_still_go_out() {
    if skipped(&["bash"]) {
        return;
    }
    let _node = DeviceNode::open();
    let directory = tempfile::tempdir().unwrap();
    for caller in Caller::all() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let rule = redirect("sink", "192.0.2.7/32", listener.local_addr().unwrap());
        let config = configuration(&directory, &rule);
        let script = "exec 3<>/dev/tcp/192.0.2.7/9; echo $$; head -c 300000 /dev/zero >&3";
        let mut exec = caller.exec(&["-c", &config], &["bash", "-c", script]);
        let mut process = Background(exec.stdout(Stdio::piped()).spawn().unwrap());
        let [command] = pids(&mut BufReader::new(process.0.stdout.take().unwrap()))[..] else {
            panic!("it has not started");
        };
        // The origin begins to read when the command has ended, so most bytes are still on their way then.
        let (mut stream, _) = listener.accept().unwrap();
        wait_until(|| state(command).is_none());
        assert!(state(pid(&process.0)).is_some(), "{caller:?}");
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), 300_000, "{caller:?}");
        drop(stream);
        assert_eq!(process.0.wait().unwrap().code(), Some(0), "{caller:?}");
    }
}

#[test]
fn a_way_out_that_takes_a_privilege_is_warned_of() {
    if skipped(&[]) {
        return;
    }
    let _node = DeviceNode::open();
    let directory = tempfile::tempdir().unwrap();
    let config = configuration(
        &directory,
        "[[egress]]\nname = \"office\"\nkind = \"direct\"\nmark = 5\n",
    );
    for &caller in Caller::all() {
        let output = output(caller.exec(&["-c", &config], &["true"]));
        assert_eq!(output.status.code(), Some(0));
        let told = text(&output.stderr);
        let is_warned = told.contains("tungate: warn: ") && told.contains("egress=\"office\"");
        assert_eq!(is_warned, caller.user() != 0, "{caller:?} {told}");
    }
}

#[test]
fn a_device_node_that_is_for_root_only_is_explained() {
    if skipped(&[]) || !geteuid().is_root() {
        return;
    }
    let _node = DeviceNode::closed();
    let output = output(Caller::Nobody.exec(&[], &["true"]));
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(text(&output.stdout), "");
    let message = text(&output.stderr);
    assert!(
        message.contains("cannot open /dev/net/tun: Permission denied"),
        "{message}"
    );
    assert!(message.contains("chmod 0666 /dev/net/tun"), "{message}");
}

#[test]
fn forbidden_user_namespaces_are_explained() {
    if skipped(&[]) {
        return;
    }
    let _node = DeviceNode::open();
    for &caller in Caller::all() {
        // In a user namespace of one's own, the number of those below it may be set, here to none.
        let script =
            "echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-sys_admin \"$@\"";
        let mut command = caller.command("unshare");
        command
            .args(["--user", "--map-root-user", "sh", "-c", script, "sh"])
            .arg(program())
            .args(["exec", "--", "true"]);
        let output = output(command);
        assert_eq!(output.status.code(), Some(125), "{caller:?}");
        let message = text(&output.stderr);
        assert!(message.contains("user namespaces cannot be used"), "{message}");
        assert!(
            message.contains("sysctl user.max_user_namespaces=10000"),
            "{message}"
        );
    }
}

#[test]
fn the_device_node_is_put_back() {
    if skipped(&[]) || !geteuid().is_root() {
        return;
    }
    let undisturbed = || {
        let _turn = TURNS.write().unwrap_or_else(|error| error.into_inner());
        let node = File::open(TUN).unwrap();
        node.lock().unwrap();
        mode_of(TUN)
    };
    let before = undisturbed();
    drop(DeviceNode::open());
    assert_eq!(undisturbed(), before);
    drop(DeviceNode::closed());
    assert_eq!(undisturbed(), before);
}
