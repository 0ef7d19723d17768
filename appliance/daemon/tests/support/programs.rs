//! Programs of others, started for a test.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use super::{Background, Lab, Namespace, PYTHON, text, wait_for_server};

/// Runs a program to its end, which must be good.
#[track_caller]
pub fn succeed(namespace: &Namespace, line: &str) -> Output {
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
pub fn has_module(name: &str) -> bool {
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
pub fn start(namespace: &Namespace, program: &str, arguments: &[&str], ready: &str) -> Background {
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

/// Names answered by dnsmasq in the server's namespace.
pub fn name_server(lab: &Lab, address: &str) -> Background {
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
