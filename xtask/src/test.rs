//! `cargo xtask test`: all checks, cheapest first; the first that fails ends the run.
//!
//! A check that cannot do its work where it runs (no capture set, no rights, no tool) passes and prints a line that
//! starts with `skipped:` and says why. Test runners hide what passing tests print, so those lines are looked for in
//! nextest's report, or in the output of `cargo test` where nextest is not installed, and repeated at the end.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Write, stdout};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use quick_junit::Report;

use crate::bpf::{self, Compared};
use crate::digests;
use crate::workspace::Workspace;

/// What a test prints before the reason why it could not do its work.
const SKIPPED: &str = "skipped: ";

/// Runs all checks; the exit code says whether they passed.
pub(crate) fn run(workspace: &Workspace) -> Result<ExitCode> {
    let mut skips = Skips::default();
    let mut outcomes = Vec::new();
    for step in Step::ALL {
        println!("\n=== {}", step.name());
        let started = Instant::now();
        let passed = step.run(workspace, &mut skips)?;
        outcomes.push((step, passed, started.elapsed()));
        if !passed {
            break;
        }
    }
    print_summary(&outcomes, &skips);
    let passed = outcomes.iter().all(|(_, passed, _)| *passed);
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// One check. Tests come last, so that their runner's own summary stands near the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Format,
    Lints,
    Documentation,
    Examples,
    Program,
    Digests,
    Tests,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Format,
        Self::Lints,
        Self::Documentation,
        Self::Examples,
        Self::Program,
        Self::Digests,
        Self::Tests,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Format => "formatting",
            Self::Lints => "lints",
            Self::Documentation => "documentation",
            Self::Examples => "documentation examples",
            Self::Program => "the XDP program's object",
            Self::Digests => "one digest in debug and release",
            Self::Tests => "tests",
        }
    }

    fn run(self, workspace: &Workspace, skips: &mut Skips) -> Result<bool> {
        let mut cargo = workspace.cargo();
        match self {
            Self::Format => cargo.args(["fmt", "--all", "--check"]),
            Self::Lints => cargo.args(["clippy", "--workspace", "--all-targets", "--", "-Dwarnings"]),
            Self::Documentation => cargo
                .args(["doc", "--workspace", "--no-deps"])
                .env("RUSTDOCFLAGS", "-Dwarnings"),
            Self::Examples => cargo.args(["test", "--workspace", "--doc", "--quiet"]),
            Self::Program => {
                return Ok(match bpf::compare_if_changed(workspace)? {
                    Compared::Same => true,
                    Compared::Different => false,
                    Compared::Skipped(why) => {
                        println!("{SKIPPED}{why}");
                        skips.look_at(&format!("{SKIPPED}{why}"), "cargo xtask bpf --check");
                        true
                    }
                });
            }
            Self::Digests => return Ok(digests_agree(workspace)),
            Self::Tests if has_nextest(workspace) => {
                return Ok(run_nextest(workspace, cargo, skips)?.success());
            }
            Self::Tests => return Ok(run_cargo_test(cargo, skips)?.success()),
        };
        let status = cargo.status().context("cannot run cargo")?;
        Ok(status.success())
    }
}

/// Replays the shipped captures, which a debug build does in seconds.
fn digests_agree(workspace: &Workspace) -> bool {
    match digests::check(workspace, &workspace.root.join("captures")) {
        Ok(captures) => println!("{captures} captures"),
        Err(error) => {
            eprintln!("error: {error:#}");
            return false;
        }
    }
    true
}

fn has_nextest(workspace: &Workspace) -> bool {
    let asked = workspace
        .cargo()
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    asked.is_ok_and(|status| status.success())
}

fn run_nextest(workspace: &Workspace, mut cargo: Command, skips: &mut Skips) -> Result<ExitStatus> {
    // Not in cargo's target folder: nextest has a store of its own.
    let report = workspace.root.join("target/nextest/default/junit.xml");
    // A report of an earlier run must not speak for this one.
    if report.exists() {
        fs::remove_file(&report).with_context(|| format!("cannot remove {}", report.display()))?;
    }
    let status = cargo
        .args(["nextest", "run", "--workspace", "--no-fail-fast"])
        .args(["--status-level=slow", "--final-status-level=slow"])
        .status()
        .context("cannot run cargo")?;
    // Without a report nothing ran: it did not build, and has said so.
    if status.success() || report.exists() {
        let text =
            fs::read_to_string(&report).with_context(|| format!("cannot read {}", report.display()))?;
        let report = Report::deserialize_from_str(&text).context("cannot read nextest's report")?;
        for suite in &report.test_suites {
            for case in &suite.test_cases {
                let output = case.system_out.as_ref().map_or("", |output| output.as_str());
                for line in output.lines() {
                    skips.look_at(line, &format!("{} {}", suite.name.as_str(), case.name.as_str()));
                }
            }
        }
    }
    Ok(status)
}

fn run_cargo_test(mut cargo: Command, skips: &mut Skips) -> Result<ExitStatus> {
    let mut child = cargo
        .args([
            "test",
            "--workspace",
            "--lib",
            "--bins",
            "--tests",
            "--no-fail-fast",
        ])
        .args(["--", "--show-output"])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let output = child.stdout.take().expect("piped above");
    let mut filter = ShownOutput::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read what cargo test prints")?;
        let line = String::from_utf8_lossy(&line);
        if filter.passes(&line, skips) {
            writeln!(stdout(), "{line}").context("cannot print")?;
        }
    }
    child.wait().context("cannot wait for cargo")
}

/// Keeps what passing tests have printed from the terminal, looking through it for skipped checks.
#[derive(Debug, Default)]
struct ShownOutput {
    in_successes: bool,
    test: String,
}

impl ShownOutput {
    fn passes(&mut self, line: &str, skips: &mut Skips) -> bool {
        match line {
            "successes:" => self.in_successes = true,
            "failures:" => self.in_successes = false,
            _ if line.starts_with("test result: ") => self.in_successes = false,
            _ => {}
        }
        if let Some(test) = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.test = test.to_owned();
        }
        skips.look_at(line, &self.test);
        !self.in_successes
    }
}

/// Checks that were skipped: tests by reason.
#[derive(Debug, Default)]
struct Skips(BTreeMap<String, Vec<String>>);

impl Skips {
    fn look_at(&mut self, line: &str, test: &str) {
        // With one thread the test's name stands on the same line.
        if let Some((before, reason)) = line.split_once(SKIPPED)
            && (before.is_empty() || before.starts_with("test "))
        {
            self.0.entry(reason.to_owned()).or_default().push(test.to_owned());
        }
    }
}

impl fmt::Display for Skips {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (reason, tests) in &self.0 {
            writeln!(f, "{SKIPPED}{reason}")?;
            for test in tests {
                writeln!(f, "    {test}")?;
            }
        }
        Ok(())
    }
}

fn print_summary(outcomes: &[(Step, bool, Duration)], skips: &Skips) {
    println!("\n=== summary");
    for step in Step::ALL {
        let outcome = outcomes.iter().find(|(ran, ..)| *ran == step);
        let (word, seconds) = match outcome {
            Some((_, true, took)) => ("passed", format!("{:8.1} s", took.as_secs_f64())),
            Some((_, false, took)) => ("FAILED", format!("{:8.1} s", took.as_secs_f64())),
            None => ("not run", String::new()),
        };
        println!("{:<34}{word:<8}{seconds}", step.name());
    }
    print!("{skips}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skipped_checks_are_found_in_the_output_of_cargo_test() {
        let output = "\
running 3 tests
test fails ... FAILED
test skips ... ok
test talks ... ok

successes:

---- skips stdout ----
skipped: no rights

---- talks stdout ----
it was skipped: not so


successes:
    skips
    talks

failures:

---- fails stdout ----
what went wrong

failures:
    fails

test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        let mut skips = Skips::default();
        let mut filter = ShownOutput::default();
        let shown: Vec<_> = output
            .lines()
            .filter(|line| filter.passes(line, &mut skips))
            .collect();
        assert_eq!(skips.to_string(), "skipped: no rights\n    skips\n");
        assert!(shown.contains(&"what went wrong"));
        assert!(
            shown
                .last()
                .is_some_and(|line| line.starts_with("test result: FAILED"))
        );
        assert!(!shown.iter().any(|line| line.contains("it was skipped")));
    }

    #[test]
    fn a_skipped_check_is_found_behind_its_tests_name() {
        let mut skips = Skips::default();
        skips.look_at("test skips ... skipped: no rights", "suite skips");
        assert_eq!(skips.to_string(), "skipped: no rights\n    suite skips\n");
    }
}
