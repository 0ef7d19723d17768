//! What the program can be asked to do, one module each.

mod check;
mod control;
mod counters;
mod demo;
mod drain;
mod exec;
mod flows;
mod list;
mod prefilter;
mod reload;
mod run;
mod text;
mod why;

use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use tungate_config::{Diagnostics, Loaded, load};

pub(crate) use self::prefilter::local_addresses;
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
        Command::Flows(flows) => control::carry_out(|| flows::run(&flows)),
        Command::Counters(counters) => control::carry_out(|| counters::run(&counters)),
        Command::List(list) => control::carry_out(|| list::run(&list)),
        Command::Reload(reload) => control::carry_out(|| reload::run(&reload)),
        Command::Drain(drain) => control::carry_out(|| drain::run(&drain)),
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

/// Mistakes in a configuration, as standard error shows them.
#[derive(Debug)]
pub(crate) struct Rendered(Diagnostics);

impl Rendered {
    /// Without colours, wherever they are shown.
    pub(crate) fn plain(&self) -> String {
        self.0.render(false)
    }
}

impl From<Diagnostics> for Rendered {
    fn from(diagnostics: Diagnostics) -> Self {
        Self(diagnostics)
    }
}

impl std::fmt::Display for Rendered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.render(io::stderr().is_terminal()))
    }
}

impl std::error::Error for Rendered {}
