//! Network namespaces with an appliance in them, made and removed by the tests.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

pub mod caller;
pub mod packets;
pub mod peers;
pub mod programs;
pub mod web;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use serde_json::Value;

/// How long anything may take that is expected to happen.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The program under test.
pub const TUNGATE: &str = env!("CARGO_BIN_EXE_tungate");

/// Addresses of the server behind the default route.
pub const SERVER: &str = "192.0.2.7";
pub const SERVER6: &str = "2001:db8::7";

/// `short` in an ordinary run, `long` in a soak.
pub fn amount(short: usize, long: usize) -> usize {
    if std::env::var_os("TUNGATE_LONG").is_some() {
        long
    } else {
        short
    }
}

/// Debian's own Python, which has Debian's packages.
pub const PYTHON: &str = "/usr/bin/python3";

/// Says why a test does not run here, if it cannot.
pub fn skipped(programs: &[&str]) -> bool {
    let missing = if !geteuid().is_root() {
        Some("this test needs root".to_owned())
    } else if File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .is_err()
    {
        Some("/dev/net/tun cannot be opened".to_owned())
    } else {
        let is_there = |program: &&&str| {
            !std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
                .any(|directory| directory.join(program).exists())
        };
        let found = ["ip", "unshare", "nsenter"].iter().chain(programs).find(is_there);
        found.map(|program| format!("{program} is not installed"))
    };
    if let Some(missing) = missing {
        println!("skipped: {missing}");
        return true;
    }
    false
}

/// A network namespace that lives as long as this value.
pub struct Namespace {
    /// Waits for the end of its standard input, which comes when the test ends in whatever way.
    holder: Child,
    file: File,
}

impl Namespace {
    pub fn new() -> Self {
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo; read line"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        holder.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let file = File::open(format!("/proc/{}/ns/net", holder.id())).unwrap();
        let namespace = Self { holder, file };
        // Addresses that are still being checked for duplicates would delay everything by a second.
        namespace.enter(|| std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap());
        namespace.ip("link set lo up");
        namespace
    }

    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// A command that will run in the namespace.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/proc/{}/ns/net", self.holder.id()))
            .arg(program);
        command
    }

    /// Runs a command line without quotes to its end.
    pub fn run(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        self.command(words.next().unwrap()).args(words).output().unwrap()
    }

    /// Runs `ip`, which must succeed.
    pub fn ip(&self, arguments: &str) -> String {
        let output = self.run(&format!("ip {arguments}"));
        assert!(
            output.status.success(),
            "ip {arguments}: {}",
            text(&output.stderr)
        );
        text(&output.stdout)
    }

    /// Calls `work` on a thread in the namespace; sockets it opens stay in there.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    pub fn listen(&self, address: &str) -> TcpListener {
        self.enter(|| TcpListener::bind(address).unwrap())
    }

    pub fn udp(&self, address: &str) -> UdpSocket {
        let socket = self.enter(|| UdpSocket::bind(address).unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    pub fn connect(&self, address: &str) -> std::io::Result<TcpStream> {
        let address: SocketAddr = address.parse().unwrap();
        let stream = self.enter(|| TcpStream::connect_timeout(&address, PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Routes, rules, addresses, links and settings: what must be the same before and after.
    pub fn state(&self) -> String {
        let mut state = String::new();
        for arguments in [
            "-4 rule",
            "-6 rule",
            "-4 route show table all",
            "-6 route show table all",
            "-o address",
            "-o link",
        ] {
            state.push_str(&format!("# {arguments}\n{}", self.ip(arguments)));
        }
        if Path::new("/usr/sbin/nft").exists() {
            state.push_str(&format!("# nft\n{}", text(&self.run("nft list ruleset").stdout)));
        }
        let settings = self.enter(|| {
            let mut settings = Vec::new();
            for family in ["ipv4", "ipv6"] {
                read_settings(Path::new(&format!("/proc/sys/net/{family}")), &mut settings);
            }
            settings.sort();
            settings.concat()
        });
        // Routes that the kernel learns by talking to neighbours, and counters of time.
        state
            .lines()
            .filter(|line| !line.contains("fe80::"))
            .collect::<Vec<_>>()
            .join("\n")
            + "\n"
            + &settings
    }
}

/// All settings below `directory`, but for those that cannot be read.
fn read_settings(directory: &Path, settings: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            read_settings(&entry.path(), settings);
        } else if let Ok(value) = std::fs::read_to_string(entry.path()) {
            settings.push(format!("{}={value}", entry.path().display()));
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// A host with a default route, and a server behind it.
pub struct Lab {
    pub host: Namespace,
    pub server: Namespace,
}

impl Lab {
    pub fn new() -> Self {
        let (host, server) = (Namespace::new(), Namespace::new());
        host.ip(&format!(
            "link add uplink type veth peer name downlink netns {}",
            server.pid()
        ));
        for (namespace, device, v4, v6) in [
            (&host, "uplink", "10.99.0.1/24", "fd99::1/64"),
            (&server, "downlink", "10.99.0.2/24", "fd99::2/64"),
        ] {
            namespace.ip(&format!("address add {v4} dev {device}"));
            namespace.ip(&format!("address add {v6} dev {device} nodad"));
            namespace.ip(&format!("link set {device} up"));
        }
        for number in 7..=9 {
            server.ip(&format!("address add 192.0.2.{number}/32 dev lo"));
            server.ip(&format!("address add 2001:db8::{number}/128 dev lo nodad"));
        }
        host.ip("-4 route add default via 10.99.0.2");
        host.ip("-6 route add default via fd99::2");
        Self { host, server }
    }

    /// A client behind the host's interface `clients`, which is its way to everything.
    pub fn routed_client(&self) -> Namespace {
        let client = Namespace::new();
        self.host.ip(&format!(
            "link add clients type veth peer name lan netns {}",
            client.pid()
        ));
        for (namespace, device, v4, v6) in [
            (&self.host, "clients", "10.50.0.1/24", "fd50::1/64"),
            (&client, "lan", "10.50.0.2/24", "fd50::2/64"),
        ] {
            namespace.ip(&format!("address add {v4} dev {device}"));
            namespace.ip(&format!("address add {v6} dev {device} nodad"));
            namespace.ip(&format!("link set {device} up"));
        }
        client.ip("-4 route add default via 10.50.0.1");
        client.ip("-6 route add default via fd50::1");
        client
    }

    /// An appliance that captures what the host sends.
    pub fn appliance(&self, arguments: &[&str]) -> Appliance {
        Appliance::start(&self.host, arguments)
    }
}

/// A running `tungate run`.
pub struct Appliance {
    pub process: Child,
    pub log: Log,
}

impl Appliance {
    pub fn start(namespace: &Namespace, arguments: &[&str]) -> Self {
        let appliance = Self::spawn(namespace, arguments, &[]);
        appliance.log.wait(|line| line["message"] == "relaying");
        appliance
    }

    /// Starts one by another program, such as one that sets limits.
    pub fn start_by(namespace: &Namespace, program: &[&str]) -> Self {
        let mut command = namespace.command(program[0]);
        command.args(&program[1..]).args([TUNGATE, "run", "--json"]);
        let appliance = Self::follow(command);
        appliance.log.wait(|line| line["message"] == "relaying");
        appliance
    }

    /// Starts one without waiting until it works.
    pub fn spawn(namespace: &Namespace, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = namespace.command(TUNGATE);
        command
            .args(["run", "--json"])
            .args(arguments)
            .envs(environment.iter().copied());
        Self::follow(command)
    }

    fn follow(mut command: Command) -> Self {
        let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Log::follow(process.stderr.take().unwrap());
        Self { process, log }
    }

    /// The process that relays.
    pub fn worker(&self) -> Pid {
        let pid = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        Pid::from_raw(children.trim().parse().unwrap())
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    /// Asks it to end, and waits until it has.
    pub fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.process.wait().unwrap();
        assert!(status.success(), "{status}: {}", self.log.all());
    }
}

impl Drop for Appliance {
    fn drop(&mut self) {
        if let Ok(None) = self.process.try_wait() {
            self.signal(Signal::SIGTERM);
            self.signal(Signal::SIGINT); // a second one: at once
            let _ = self.process.wait();
        }
        if std::thread::panicking() {
            println!("{}", self.log.all());
        }
    }
}

/// The log of a process, line by line.
#[derive(Clone)]
pub struct Log(Arc<(Mutex<Lines>, Condvar)>);

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    ended: bool,
}

impl Log {
    fn follow(stream: impl Read + Send + 'static) -> Self {
        let log = Self(Arc::default());
        let shared = log.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                shared.lines().lines.push(line);
                shared.0.1.notify_all();
            }
            shared.lines().ended = true;
            shared.0.1.notify_all();
        });
        log
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        // A test that fails while it looks does no harm to them.
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a line, and returns the first that fits.
    pub fn wait(&self, fits: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.lines();
        let mut seen = 0;
        loop {
            for line in &lines.lines[seen..] {
                let line = serde_json::from_str(line).unwrap_or(Value::Null);
                if fits(&line) {
                    return line;
                }
            }
            seen = lines.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero() && !lines.ended,
                "it has not come:\n{}",
                lines.lines.join("\n")
            );
            lines = self.0.1.wait_timeout(lines, left).unwrap().0;
        }
    }

    /// Waits for the end of a flow to `target`, and returns its line.
    pub fn flow_to(&self, target: &str) -> Value {
        self.wait(|line| line["message"] == "flow ended" && line["target"] == target)
    }

    pub fn all(&self) -> String {
        self.lines().lines.join("\n")
    }
}

/// A process that is killed at the end.
pub struct Background(pub Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until `namespace` accepts connections at `address`, as a server that is just starting does.
pub fn wait_for_server(namespace: &Namespace, address: &str) {
    wait_until(|| namespace.connect(address).is_ok());
}

/// Asks again and again, with growing pauses, until the answer is yes.
pub fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(1);
    while !done() {
        assert!(Instant::now() < deadline, "it has not happened");
        std::thread::park_timeout(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Writes `content` to a file in `directory` and returns its path.
pub fn file(directory: &Path, name: &str, content: &str) -> String {
    let path = directory.join(name);
    File::create(&path)
        .unwrap()
        .write_all(content.as_bytes())
        .unwrap();
    path.to_str().unwrap().to_owned()
}
