//! `tungate demo`, as root and as an ordinary user.

mod support;

use std::process::{Command, Stdio};

use nix::unistd::geteuid;
use support::caller::{Caller, DeviceNode, output, program, skipped};
use support::text;

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
