//! Whether a replay comes to the same in every build and with any number of threads.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::workspace::Workspace;

/// Builds, and numbers of threads, that must agree with the first.
const RUNS: [(Build, &str); 6] = [
    (Build::Release, "1"),
    (Build::Release, "1"),
    (Build::Release, "2"),
    (Build::Release, "8"),
    (Build::Debug, "1"),
    (Build::Debug, "8"),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Build {
    Debug,
    Release,
}

/// Replays the captures in `folder` with a debug and a release build and with 1, 2 and 8 threads; returns how many
/// captures there are.
///
/// # Errors
///
/// The first difference, by the capture's name.
pub(crate) fn check(workspace: &Workspace, folder: &Path) -> Result<usize> {
    // With the features that the tests' builds have, so that these find all of it built.
    let debug = workspace.executable(&["build", "--workspace", "--bin=replay"])?;
    let release = workspace.executable(&["build", "--release", "--package=tungate-sim", "--bin=replay"])?;
    let mut first: Option<Vec<Value>> = None;
    for (build, jobs) in RUNS {
        let program = match build {
            Build::Debug => &debug,
            Build::Release => &release,
        };
        let reports = replay(program, folder, jobs)?;
        let Some(first) = &first else {
            first = Some(reports);
            continue;
        };
        ensure!(
            reports.len() == first.len(),
            "{build:?} with {jobs} threads reports on {} captures of {}",
            reports.len(),
            first.len()
        );
        for (report, expected) in reports.iter().zip(first) {
            ensure!(
                report["digest"] == expected["digest"],
                "{}: the digest of {build:?} with {jobs} threads is {}, that of {:?} with {} is {}",
                report["capture"],
                report["digest"],
                RUNS[0].0,
                RUNS[0].1,
                expected["digest"]
            );
            ensure!(
                report == expected,
                "{}: {build:?} with {jobs} threads gives another report under the same digest",
                report["capture"]
            );
        }
    }
    Ok(first.map_or(0, |reports| reports.len()))
}

fn replay(program: &PathBuf, folder: &Path, jobs: &str) -> Result<Vec<Value>> {
    let output = Command::new(program)
        .args(["--json", "--jobs", jobs])
        .arg(folder)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(
        output.status.success(),
        "replay --jobs {jobs} {}: {}",
        folder.display(),
        output.status
    );
    serde_json::from_slice(&output.stdout).context("the report is not an array in JSON")
}
