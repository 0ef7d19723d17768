//! Where the workspace is, and how its cargo is called.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// The workspace that this program belongs to.
#[derive(Debug, Deserialize)]
pub(crate) struct Workspace {
    /// The folder of the top `Cargo.toml`.
    #[serde(rename = "workspace_root")]
    pub(crate) root: PathBuf,
    /// Where cargo builds.
    #[serde(rename = "target_directory")]
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn find() -> Result<Self> {
        let output = cargo()
            .args(["metadata", "--format-version=1", "--no-deps"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        ensure!(output.status.success(), "cargo metadata: {}", output.status);
        serde_json::from_slice(&output.stdout).context("cannot read what cargo metadata says")
    }

    /// A cargo command that starts at the root.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = cargo();
        command.current_dir(&self.root).stdin(Stdio::null());
        command
    }

    /// Builds with a cargo command line that makes one executable, and says where it is.
    pub(crate) fn executable(&self, arguments: &[&str]) -> Result<PathBuf> {
        let output = self
            .cargo()
            .args(arguments)
            .args(["--quiet", "--message-format=json-render-diagnostics"])
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        ensure!(
            output.status.success(),
            "cargo {}: {}",
            arguments.join(" "),
            output.status
        );
        let lines = output.stdout.split(|&byte| byte == b'\n');
        let mut executables =
            lines.filter_map(|line| serde_json::from_slice::<Artifact>(line).ok()?.executable);
        executables
            .next_back()
            .with_context(|| format!("cargo {} has built no executable", arguments.join(" ")))
    }
}

/// What cargo says about something it has built.
#[derive(Deserialize)]
struct Artifact {
    executable: Option<PathBuf>,
}

/// The cargo that runs this program.
fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}
