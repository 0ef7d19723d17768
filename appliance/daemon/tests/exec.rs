//! `tungate exec` and `tungate demo`, as root and as an ordinary user.
//!
//! Origins are on this host's loopback, and rules redirect documentation addresses to them: that works without any
//! right. Where the device node is for root only, as no distribution ships it, the tests widen its mode meanwhile.

mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid, getuid};
use support::{Background, Namespace, SERVER, SERVER6, TUNGATE, file, text, wait_until};

const TUN: &str = "/dev/net/tun";
/// Whoever runs as this user has no rights at all.
const NOBODY: u32 = 65534;

/// Who calls the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Caller {
    /// Whoever runs the tests.
    Own,
    /// An ordinary user, where root runs the tests.
    Nobody,
}

impl Caller {
    /// Root and an ordinary user, or only the latter.
    fn all() -> &'static [Self] {
        if geteuid().is_root() {
            &[Self::Own, Self::Nobody]
        } else {
            &[Self::Own]
        }
    }

    fn user(self) -> u32 {
        match self {
            Self::Own => getuid().as_raw(),
            Self::Nobody => NOBODY,
        }
    }

    fn command(self, program: impl AsRef<Path>) -> Command {
        match self {
            Self::Own => Command::new(program.as_ref()),
            Self::Nobody => {
                let mut command = Command::new("setpriv");
                command
                    .args([
                        &format!("--reuid={NOBODY}"),
                        &format!("--regid={NOBODY}"),
                        "--clear-groups",
                    ])
                    .arg(program.as_ref());
                command
            }
        }
    }

    /// `tungate exec`, with arguments up to `--` and the command behind it.
    fn exec(self, arguments: &[&str], command: &[&str]) -> Command {
        let mut exec = self.command(program());
        exec.arg("exec")
            .args(arguments)
            .arg("--")
            .args(command)
            .stdin(Stdio::null());
        exec
    }
}

/// The program, at a place that everybody can reach.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<(PathBuf, Option<tempfile::TempDir>)> = OnceLock::new();
    let (path, _) = PROGRAM.get_or_init(|| {
        let built = PathBuf::from(TUNGATE);
        let everybody =
            |path: &Path| fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0);
        if !geteuid().is_root() || built.ancestors().all(everybody) {
            return (built, None);
        }
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let copy = directory.path().join("tungate");
        fs::copy(built, &copy).unwrap();
        (copy, Some(directory))
    });
    path
}

/// The TUN device node, with a mode of the test's choice as long as this lives.
struct DeviceNode {
    _turn: Turn,
}

#[expect(dead_code, reason = "they are held")]
enum Turn {
    Open(RwLockReadGuard<'static, ()>),
    Closed(RwLockWriteGuard<'static, ()>),
}

/// Tests that need the node open share it; those that need it closed have it alone.
static TURNS: RwLock<()> = RwLock::new(());
/// What the tests of this process have changed.
static CHANGED: Mutex<Changed> = Mutex::new(Changed {
    times: 0,
    mode: 0,
    lock: None,
});

struct Changed {
    times: u32,
    /// What it was before.
    mode: u32,
    /// Held meanwhile, so that no other process with these tests does the same.
    lock: Option<File>,
}

impl DeviceNode {
    /// Lets everybody open it, as distributions do.
    fn open() -> Self {
        Self::with_mode(
            Turn::Open(TURNS.read().unwrap_or_else(|error| error.into_inner())),
            0o666,
        )
    }

    /// Lets nobody but root open it.
    fn closed() -> Self {
        Self::with_mode(
            Turn::Closed(TURNS.write().unwrap_or_else(|error| error.into_inner())),
            0o600,
        )
    }

    fn with_mode(turn: Turn, mode: u32) -> Self {
        if geteuid().is_root() {
            let mut changed = CHANGED.lock().unwrap();
            if changed.times == 0 {
                let node = File::open(TUN).unwrap();
                node.lock().unwrap();
                changed.lock = Some(node);
                changed.mode = mode_of(TUN);
            }
            changed.times += 1;
            fs::set_permissions(TUN, fs::Permissions::from_mode(mode)).unwrap();
        }
        Self { _turn: turn }
    }
}

impl Drop for DeviceNode {
    fn drop(&mut self) {
        if geteuid().is_root() {
            let mut changed = CHANGED.lock().unwrap();
            changed.times -= 1;
            if changed.times == 0 {
                fs::set_permissions(TUN, fs::Permissions::from_mode(changed.mode)).unwrap();
                changed.lock = None;
            }
        }
    }
}

fn mode_of(path: &str) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Says why a test does not run here, if it cannot.
fn skipped(programs: &[&str]) -> bool {
    let is_missing = |program: &&&str| {
        !std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .any(|directory| directory.join(program).exists())
    };
    let missing = if !Path::new(TUN).exists() {
        Some(format!("{TUN} is not there"))
    } else if !geteuid().is_root() && File::options().read(true).write(true).open(TUN).is_err() {
        Some(format!("this user cannot open {TUN}"))
    } else if !namespaces_work() {
        Some("this user may not make namespaces".to_owned())
    } else {
        let found = ["setpriv", "unshare"].iter().chain(programs).find(is_missing);
        found.map(|program| format!("{program} is not installed"))
    };
    if let Some(missing) = missing {
        println!("skipped: {missing}");
        return true;
    }
    false
}

fn namespaces_work() -> bool {
    Caller::all().iter().all(|caller| {
        let made = caller
            .command("unshare")
            .args(["--user", "--net", "true"])
            .stderr(Stdio::null())
            .status();
        made.is_ok_and(|status| status.success())
    })
}

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

/// A configuration in a file that everybody can read.
fn configuration(directory: &tempfile::TempDir, content: &str) -> String {
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    file(directory.path(), "tungate.toml", content)
}

fn redirect(name: &str, target: &str, to: SocketAddr) -> String {
    format!("[[rule]]\nname = \"{name}\"\ntargets = [\"{target}\"]\naction = \"redirect\"\nto = \"{to}\"\n")
}

fn output(mut command: Command) -> Output {
    command.output().unwrap()
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

/// Starts a script behind the appliance; it says who it is before anything else.
fn start(caller: Caller, script: &str) -> (Background, BufReader<std::process::ChildStdout>) {
    let mut exec = caller.exec(&[], &["sh", "-c", script]);
    let mut process = Background(exec.stdout(Stdio::piped()).spawn().unwrap());
    let stdout = BufReader::new(process.0.stdout.take().unwrap());
    (process, stdout)
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

fn pids(stdout: &mut impl BufRead) -> Vec<Pid> {
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    line.split_whitespace()
        .map(|pid| Pid::from_raw(pid.parse().unwrap()))
        .collect()
}

/// The state of a process as `ps` has it; `None` when it is gone.
fn state(pid: Pid) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?
        .1
        .chars()
        .next()
        .filter(|state| *state != 'Z')
}

#[test]
fn nothing_is_left_when_any_of_the_processes_is_killed() {
    if skipped(&[]) {
        return;
    }
    let _node = DeviceNode::open();
    for &caller in Caller::all() {
        for (victim, expected) in [
            ("command", Some(128 + 9)),
            ("inside", Some(128 + 9)),
            ("outside", None),
        ] {
            let script = "sleep 300 & echo $$ $PPID $!; wait";
            let (mut process, mut stdout) = start(caller, script);
            let [command, inside, grandchild] = pids(&mut stdout)[..] else {
                panic!("it has not started");
            };
            let killed = match victim {
                "command" => command,
                "inside" => inside,
                _ => pid(&process.0),
            };
            kill(killed, Signal::SIGKILL).unwrap();
            assert_eq!(process.0.wait().unwrap().code(), expected, "{caller:?} {victim}");
            wait_until(|| {
                [command, inside, grandchild]
                    .into_iter()
                    .all(|pid| state(pid).is_none())
            });
        }
    }
}

#[test]
fn signals_to_the_program_reach_the_command() {
    if skipped(&[]) {
        return;
    }
    let _node = DeviceNode::open();
    for &caller in Caller::all() {
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1] {
            let name = signal.as_str().strip_prefix("SIG").unwrap();
            let script = format!("trap 'exit 9' {name}; sleep 300 & echo $$; wait");
            let (mut process, mut stdout) = start(caller, &script);
            pids(&mut stdout);
            kill(pid(&process.0), signal).unwrap();
            assert_eq!(process.0.wait().unwrap().code(), Some(9), "{caller:?} {signal}");
        }
    }
}

#[test]
fn the_program_stops_and_goes_on_with_the_command() {
    if skipped(&[]) {
        return;
    }
    let _node = DeviceNode::open();
    for &caller in Caller::all() {
        let (mut process, mut stdout) = start(caller, "kill -STOP $$; echo continued");
        let outside = pid(&process.0);
        wait_until(|| state(outside) == Some('T'));
        kill(outside, Signal::SIGCONT).unwrap();
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "continued\n");
        assert_eq!(process.0.wait().unwrap().code(), Some(0), "{caller:?}");
    }
}

#[test]
fn the_terminal_is_the_commands() {
    if skipped(&["script", "stty"]) {
        return;
    }
    let _node = DeviceNode::open();
    for &caller in Caller::all() {
        let in_terminal = |line: &str| {
            let mut command = caller.command("script");
            command
                .env("SHELL", "/bin/sh")
                .args(["--quiet", "--return", "--command", line, "/dev/null"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            Background(command.spawn().unwrap())
        };
        // In the place of the terminal's shell, which may be one that dies by the interrupt whatever its command does.
        let exec = format!("exec {} exec --", program().display());
        let mut size = in_terminal(&format!("stty rows 33 cols 99; {exec} stty size"));
        let mut shown = String::new();
        size.0.stdout.take().unwrap().read_to_string(&mut shown).unwrap();
        assert_eq!(shown.trim(), "33 99", "{caller:?}");

        let mut interrupted = in_terminal(&format!(
            "{exec} sh -c 'trap \"echo caught; exit 3\" INT; sleep 300 & echo ready; wait'"
        ));
        let mut lines = BufReader::new(interrupted.0.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap().trim(), "ready");
        interrupted.0.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
        let rest: Vec<_> = lines.map_while(Result::ok).collect();
        assert!(rest.iter().any(|line| line.contains("caught")), "{rest:?}");
        assert_eq!(interrupted.0.wait().unwrap().code(), Some(3), "{caller:?}");
    }
}

#[test]
fn an_interrupt_at_the_terminal_ends_the_program_in_the_way_of_the_command() {
    if skipped(&["script", "bash"]) {
        return;
    }
    let _node = DeviceNode::open();
    let line = format!(
        "{} exec -- sh -c 'echo ready; exec sleep 300'; echo died $?",
        program().display()
    );
    let mut process = Command::new("script")
        // This shell waits to see how its command ends.
        .env("SHELL", "/bin/bash")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map(Background)
        .unwrap();
    let mut lines = BufReader::new(process.0.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap().trim(), "ready");
    process.0.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
    let rest: Vec<_> = lines.map_while(Result::ok).collect();
    // A shell goes on with its next command only if the one before has not died by the interrupt itself.
    assert!(!rest.iter().any(|line| line.contains("died")), "{rest:?}");
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
fn the_demo_shows_what_is_true_and_ends() {
    if skipped(&["script"]) {
        return;
    }
    let _node = DeviceNode::open();
    for &caller in Caller::all() {
        let mut demo = caller.command(program());
        demo.arg("demo");
        let piped = output(demo);
        let shown = text(&piped.stdout);
        assert_eq!(
            piped.status.code(),
            Some(0),
            "{caller:?}:\n{shown}{}",
            text(&piped.stderr)
        );
        assert!(!shown.contains('\x1b'), "colours are for terminals");
        let scenes = shown.lines().filter(|line| line.starts_with("  ✓ ")).count();
        assert!(
            shown.contains(&format!("All {scenes} were checked, and true.")),
            "{shown}"
        );
        for part in [
            "+ tcp ",
            "- tcp ",
            "+ udp ",
            "+ icmp ",
            "by `no telnet`",
            "denied: deny 198.51.100.7/32",
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
    }
    let line = format!("{} demo", program().display());
    let mut command = Command::new("script");
    command
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .stdin(Stdio::null());
    let terminal = output(command);
    assert_eq!(terminal.status.code(), Some(0));
    assert!(text(&terminal.stdout).contains("\x1b[32m"));
}

#[test]
fn a_demo_that_cannot_be_shown_fails() {
    if skipped(&[]) || !geteuid().is_root() {
        return;
    }
    let _node = DeviceNode::closed();
    let mut demo = Caller::Nobody.command(program());
    demo.arg("demo");
    let output = output(demo);
    assert_eq!(output.status.code(), Some(1));
    let message = text(&output.stderr);
    assert!(
        message.contains("cannot open /dev/net/tun: Permission denied"),
        "{message}"
    );
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
