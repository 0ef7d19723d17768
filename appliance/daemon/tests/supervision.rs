//! The two processes of `tungate run`: what each may do, and what is left when either ends.

mod support;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;

use nix::sys::signal::{Signal, kill};
use support::{Appliance, Lab, PATIENCE, TUNGATE, file, skipped, text, wait_until};

/// The fields of /proc/PID/status.
fn status(pid: i32) -> BTreeMap<String, String> {
    std::fs::read_to_string(format!("/proc/{pid}/status"))
        .unwrap()
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
        .collect()
}

#[test]
fn the_process_that_relays_is_an_ordinary_user_without_capabilities() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let appliance = lab.appliance(&[]);
    let worker = appliance.worker().as_raw();
    for thread in std::fs::read_dir(format!("/proc/{worker}/task")).unwrap() {
        let thread = thread.unwrap().file_name().into_string().unwrap();
        let status = status(thread.parse().unwrap());
        for kind in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status[kind], "0000000000000000", "{kind} of {}", status["Name"]);
        }
        assert!(!status["Uid"].split_whitespace().any(|uid| uid == "0"));
        assert!(!status["Gid"].split_whitespace().any(|gid| gid == "0"));
        assert_eq!(status["Groups"], "");
        assert_eq!(status["NoNewPrivs"], "1");
    }
    // And yet its connections have the mark that keeps them out of the device.
    let _listener = lab.server.listen("192.0.2.7:1000");
    lab.host.connect("192.0.2.7:1000").unwrap();
    appliance.stop();
}

#[test]
fn when_the_relaying_process_dies_nothing_goes_direct() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let before = lab.host.state();
    let listener = lab.server.listen("192.0.2.7:1000");
    listener.set_nonblocking(true).unwrap();
    let mut appliance = lab.appliance(&[]);
    kill(appliance.worker(), Signal::SIGKILL).unwrap();
    assert!(!appliance.process.wait().unwrap().success());
    wait_until(|| appliance.log.all().contains("traffic is refused"));
    wait_until(|| lab.host.ip("-4 route show table 8400").contains("dead linkdown"));
    assert_eq!(
        lab.host.connect("192.0.2.7:1000").unwrap_err().kind(),
        ErrorKind::HostUnreachable
    );
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);

    // The next run takes over from there.
    let appliance = lab.appliance(&[]);
    lab.host.connect("192.0.2.7:1000").unwrap();
    appliance.stop();
    assert_eq!(lab.host.state(), before);

    // Where the operator prefers so, everything is undone.
    let mut appliance = lab.appliance(&["--fail-open"]);
    kill(appliance.worker(), Signal::SIGKILL).unwrap();
    assert!(!appliance.process.wait().unwrap().success());
    assert_eq!(lab.host.state(), before);
    lab.host.connect("192.0.2.7:1000").unwrap();
}

#[test]
fn whenever_the_end_comes_the_host_is_as_before() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let before = lab.host.state();
    let changes = {
        let output = lab.host.run(&format!("{TUNGATE} run --dry-run --from uplink"));
        text(&output.stdout).lines().count()
    };
    assert!(changes > 10, "there are {changes} changes to interrupt");
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
        for moment in (1..changes).step_by(4) {
            let debug = [("TUNGATE_LOG", "debug")];
            let mut appliance = Appliance::spawn(&lab.host, &["--from", "uplink"], &debug);
            let made = |log: &str| log.lines().filter(|line| line.contains("\"DEBUG\"")).count();
            wait_until(|| made(&appliance.log.all()) >= moment);
            appliance.signal(signal);
            let status = appliance.process.wait().unwrap();
            if signal == Signal::SIGKILL {
                // The worker follows at once.
                wait_until(|| lab.host.run(&format!("{TUNGATE} cleanup")).status.success());
            } else {
                assert!(status.success(), "{signal}: {}", appliance.log.all());
            }
            assert_eq!(lab.host.state(), before, "{signal} after {moment} changes");
        }
    }
}

#[test]
fn the_service_manager_hears_of_start_reload_and_end() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    let configuration = file(directory.path(), "tungate.toml", "");
    let path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let environment = [
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("WATCHDOG_USEC", "300000"),
    ];
    let mut appliance = Appliance::spawn(&lab.host, &["-c", &configuration], &environment);
    let hear = |expected: &str| {
        let mut buffer = [0; 256];
        loop {
            let len = socket.recv(&mut buffer).unwrap();
            let message = text(&buffer[..len]);
            if message.lines().any(|line| line == expected) {
                return message;
            }
            // In between there may be signs of life, and nothing else.
            assert_eq!(message.trim_end(), "WATCHDOG=1");
        }
    };
    hear("READY=1");
    hear("WATCHDOG=1");
    hear("WATCHDOG=1");
    appliance.signal(Signal::SIGHUP);
    let reloading = hear("RELOADING=1");
    assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
    hear("READY=1");
    // A worker that hangs is no longer vouched for.
    let worker = appliance.worker();
    kill(worker, Signal::SIGSTOP).unwrap();
    socket
        .set_read_timeout(Some(std::time::Duration::from_millis(600)))
        .unwrap();
    let mut heard = 0;
    while socket.recv(&mut [0; 256]).is_ok() {
        heard += 1;
    }
    assert!(heard <= 2, "one that was on its way, or two");
    kill(worker, Signal::SIGCONT).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    hear("WATCHDOG=1");
    appliance.signal(Signal::SIGTERM);
    hear("STOPPING=1");
    assert!(appliance.process.wait().unwrap().success());
}

#[test]
fn password_files_and_marks_take_effect_at_a_reload() {
    if skipped(&[]) {
        return;
    }
    let lab = Lab::new();
    let directory = tempfile::tempdir().unwrap();
    // Nobody but root can read it.
    let secret = file(directory.path(), "secret", "one\n");
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
    let configure = |mark: &str| {
        let content = format!(
            "[[egress]]\nname = \"proxy\"\nkind = \"http\"\naddress = \"10.99.0.2:3128\"\n{mark}\
             username = \"me\"\npassword_file = \"secret\"\n\
             [[rule]]\naction = \"egress\"\negress = \"proxy\"\nprotocols = [\"tcp\"]\n",
        );
        file(directory.path(), "tungate.toml", &content)
    };
    let configuration = configure("");
    let proxy = lab.server.listen("10.99.0.2:3128");
    let appliance = lab.appliance(&["-c", &configuration]);
    let request = || {
        std::thread::scope(|scope| {
            scope.spawn(|| lab.host.connect("192.0.2.7:1000"));
            let (mut stream, _) = proxy.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                request.push(byte[0]);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
            text(&request)
        })
    };
    // RFC 7617: base64 of "me:one" and "me:two".
    assert!(request().contains("Basic bWU6b25l"));
    file(directory.path(), "secret", "two\n");
    configure("mark = 0x10\n");
    appliance.signal(Signal::SIGHUP);
    appliance
        .log
        .wait(|line| line["message"] == "the policy has been replaced");
    // Only packets with the new mark get to the proxy.
    lab.host.ip("rule add pref 1 fwmark 0x7467 prohibit");
    assert!(request().contains("Basic bWU6dHdv"));
    appliance.stop();
}
