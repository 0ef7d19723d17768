//! What the commands to a running appliance share.

use std::io;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Serialize;

use super::Rendered;
use crate::cli;
use crate::control::api::ErrorKind;
use crate::control::{Client, Refused, Unreachable, usual_path};

/// What scripts tell failures apart by; `--help` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    Other = 1,
    Usage = 2,
    NotPermitted = 3,
    NotRunning = 6,
    NoEntry = 8,
    Refused = 9,
}

/// Carries a command out, and makes its failure an exit code.
pub(super) fn carry_out(command: impl FnOnce() -> Result<()>) -> Result<ExitCode> {
    match command() {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS), // nobody reads on, as with `| head`
        Err(error) => {
            match error.downcast_ref::<Rendered>() {
                Some(mistakes) => eprintln!("{mistakes}"),
                None => eprintln!("error: {error:#}"),
            }
            Ok(ExitCode::from(failure(&error) as u8))
        }
    }
}

/// The appliance to speak with.
pub(super) fn client(control: &cli::Control) -> Result<Client> {
    match &control.socket {
        Some(path) => Ok(Client::new(path)),
        None => Ok(Client::new(&usual_path()?)),
    }
}

/// Prints as JSON for people and programs.
pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    let mut output = io::stdout().lock();
    serde_json::to_writer_pretty(&mut output, value).map_err(io::Error::from)?;
    io::Write::write_all(&mut output, b"\n").context("cannot write")
}

/// Prints text.
pub(super) fn print(text: &str) -> Result<()> {
    let mut output = io::stdout().lock();
    io::Write::write_all(&mut output, text.as_bytes())
        .and_then(|()| io::Write::flush(&mut output))
        .context("cannot write")
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .next();
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn failure(error: &anyhow::Error) -> Failure {
    if error.is::<Rendered>() {
        return Failure::Usage;
    }
    match error.downcast_ref::<Unreachable>() {
        Some(Unreachable::NotRunning(_) | Unreachable::Ended) => return Failure::NotRunning,
        Some(Unreachable::NotPermitted(_)) => return Failure::NotPermitted,
        Some(Unreachable::Silent) => return Failure::Other,
        None => {}
    }
    match error.downcast_ref::<Refused>().map(|refused| refused.kind) {
        Some(ErrorKind::NoEntry) => Failure::NoEntry,
        Some(ErrorKind::Configuration | ErrorKind::Draining) => Failure::Refused,
        Some(ErrorKind::BadRequest | ErrorKind::NoSuchPath | ErrorKind::Method | ErrorKind::Failed)
        | None => Failure::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_have_codes_of_their_own() {
        let code = |error: anyhow::Error| failure(&error) as u8;
        let path = || "/run/x.sock".into();
        assert_eq!(code(Unreachable::NotPermitted(path()).into()), 3);
        assert_eq!(code(Unreachable::NotRunning(path()).into()), 6);
        let refused = |kind| code(Refused::new(kind, "no").into());
        assert_eq!(refused(ErrorKind::NoEntry), 8);
        assert_eq!(refused(ErrorKind::Configuration), 9);
        assert_eq!(refused(ErrorKind::Failed), 1);
    }
}
