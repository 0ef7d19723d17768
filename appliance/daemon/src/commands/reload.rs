//! `tungate reload`.

use anyhow::Result;

use super::control::{client, print};
use super::{runtime, text};
use crate::cli;
use crate::control::api::{POLICY_RELOAD, Reloaded};

pub(super) fn run(arguments: &cli::Reload) -> Result<()> {
    let client = client(&arguments.control)?;
    let reloaded: Reloaded = runtime()?.block_on(client.post(POLICY_RELOAD, &()))?;
    for warning in &reloaded.warnings {
        eprintln!("{warning}");
    }
    let kept = match reloaded.kept_entries {
        0 => String::new(),
        kept => format!(", {kept} of them kept from `tungate list`"),
    };
    print(&format!(
        "in force: {}{kept}, {}\n",
        text::count(reloaded.list_entries, "list entry"),
        text::count(reloaded.rules, "rule")
    ))
}
