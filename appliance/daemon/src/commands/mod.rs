//! What the program can be asked to do, one module each.

mod check;
mod demo;
mod exec;
mod prefilter;
mod run;
mod why;

use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use tungate_config::{Diagnostics, Loaded, load};

pub(crate) use self::run::{capture_of, closed, create_journal, explain_device, report, runtime};
use crate::cli::{Arguments, Command};
use crate::worker;

/// Carries a command out.
pub(crate) fn carry_out(arguments: Arguments) -> Result<ExitCode> {
    match arguments.command {
        Command::Run(run) => run::run(&run),
        Command::Exec(exec) => exec::run(&exec),
        Command::Demo => demo::run(),
        Command::Prefilter(command) => prefilter::run(&command),
        Command::Check(check) => check::run(&check),
        Command::Why(why) => why::run(&why),
        Command::Cleanup => run::clean_up(),
        Command::Worker => worker::run(),
    }
}

/// Reads a configuration, or gives what holds without one; warnings go to standard error.
pub(crate) fn configuration(path: Option<&Path>) -> Result<Loaded> {
    let Some(path) = path else {
        return Ok(Loaded::default());
    };
    let loaded = load(path, &mut |_| ()).map_err(Rendered::from)?;
    for warning in &loaded.warnings {
        eprintln!("{}\n", warning.render(io::stderr().is_terminal()));
    }
    Ok(loaded)
}

/// Mistakes in a configuration, as a terminal shows them.
#[derive(Debug)]
pub(crate) struct Rendered(String);

impl From<Diagnostics> for Rendered {
    fn from(diagnostics: Diagnostics) -> Self {
        Self(diagnostics.render(io::stderr().is_terminal()))
    }
}

impl std::fmt::Display for Rendered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Rendered {}
