//! The processes of `tungate exec`: signals, stops, the terminal, and whose end ends whom.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use nix::sys::signal::{SigHandler, Signal, kill, signal};
use support::caller::{Caller, DeviceNode, pid, pids, program, skipped, state};
use support::{Background, wait_until};

/// Starts a script behind the appliance; it says who it is before anything else.
fn start(caller: Caller, script: &str) -> (Background, BufReader<std::process::ChildStdout>) {
    let mut exec = caller.exec(&[], &["sh", "-c", script]);
    let mut process = Background(exec.stdout(Stdio::piped()).spawn().unwrap());
    let stdout = BufReader::new(process.0.stdout.take().unwrap());
    (process, stdout)
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

/// Whoever runs the tests may ignore interrupts, as shells do for what they run in the background; processes inherit
/// that.
fn hear_interrupts() {
    // SAFETY: the default action runs no code of ours.
    unsafe { signal(Signal::SIGINT, SigHandler::SigDfl) }.unwrap();
}

#[test]
fn the_terminal_is_the_commands() {
    if skipped(&["script", "stty"]) {
        return;
    }
    hear_interrupts();
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
    hear_interrupts();
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
