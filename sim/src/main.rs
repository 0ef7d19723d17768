//! The binary `replay`.

use std::process::ExitCode;

use clap::Parser;
use tungate_sim::cli;

#[derive(Parser)]
#[command(name = "replay", version, arg_required_else_help = true)]
struct Command {
    #[command(flatten)]
    args: cli::Args,
}

fn main() -> ExitCode {
    cli::run(&Command::parse().args)
}
