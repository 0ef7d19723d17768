//! `tungate check`: every mistake in a configuration, with its place and the way out.

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use anyhow::Result;
use tungate_config::{Diagnostic, load, show_defaults};

use crate::cli::Check;

pub(super) fn run(check: &Check) -> Result<ExitCode> {
    let Some(path) = &check.file else {
        print!("{}", show_defaults());
        return Ok(ExitCode::SUCCESS);
    };
    let (mistakes, summary, code): (Vec<Diagnostic>, _, _) = match load(path, &mut |_| ()) {
        Ok(loaded) => {
            let policy = &loaded.policy;
            let summary = format!(
                "{} is sound: {} list entries, {} rules, {} egresses",
                path.display(),
                policy.lists.len(),
                policy.rules.len(),
                policy.egresses.len()
            );
            (loaded.warnings, summary, ExitCode::SUCCESS)
        }
        Err(mistakes) => {
            let summary = format!("{} cannot be used", path.display());
            (mistakes.into_iter().collect(), summary, ExitCode::FAILURE)
        }
    };
    if check.json {
        println!("{}", serde_json::to_string_pretty(&mistakes)?);
        return Ok(code);
    }
    for mistake in &mistakes {
        println!("{}\n", mistake.render(io::stdout().is_terminal()));
    }
    println!("{summary}");
    Ok(code)
}
