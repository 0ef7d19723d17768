//! The project's chores: `cargo xtask --help` lists them. One module each.

mod bench;
mod bpf;
mod digests;
mod soak;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::bench::Bench;
use crate::workspace::Workspace;

/// The project's chores.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Builds the XDP program and writes the object to bpf/program
    Bpf {
        /// Compare the committed object with what its source gives, and write nothing
        #[arg(long)]
        check: bool,
    },
    /// Checks everything that has to hold before a change goes in: formatting, lints, documentation, tests
    Test,
    /// Runs the long forms of the tests, with other random numbers in every round
    Soak(soak::Options),
    /// Measures on this machine
    #[command(subcommand)]
    Bench(Bench),
    /// One cell of `bench loss`, from standard input
    #[command(hide = true)]
    LossCell,
}

fn main() -> ExitCode {
    let Arguments { chore } = Arguments::parse();
    let done = Workspace::find().and_then(|workspace| match chore {
        Chore::Bpf { check } => bpf::run(&workspace, check),
        Chore::Test => test::run(&workspace),
        Chore::Soak(options) => soak::run(&workspace, &options),
        Chore::Bench(bench) => bench::run(&workspace, &bench),
        Chore::LossCell => bench::loss::run_cell().map(|()| ExitCode::SUCCESS),
    });
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
