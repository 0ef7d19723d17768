//! Puts reports where they belong, one after the other.

use std::io::{self, Write};

use super::{Args, Reported, is_dash};
use crate::report::{JsonReports, Output, ReportError, Screen, Total};

/// Prints one report after the other.
pub(super) enum Printer {
    Json(JsonReports<Output>),
    Text {
        output: Output,
        screen: Screen,
        several: bool,
        total: Total,
    },
}

impl Printer {
    /// Reports go to standard output, or to standard error where a file goes to standard output.
    pub(super) fn new(args: &Args, several: bool) -> io::Result<Self> {
        if args.json {
            return Ok(Self::Json(JsonReports::new(Output::stdout(), several)?));
        }
        let elsewhere = args.outputs().iter().any(|(_, path)| is_dash(path));
        let (output, screen) = match elsewhere {
            false => (Output::stdout(), Screen::stdout()),
            true => (Output::stderr(), Screen::stderr()),
        };
        Ok(Self::Text {
            output,
            screen,
            several,
            total: Total::default(),
        })
    }

    pub(super) fn print(&mut self, reported: &mut Reported) -> Result<(), ReportError> {
        match (self, reported) {
            (Self::Json(reports), Reported::Capture(report)) => reports.add(report),
            (Self::Json(reports), Reported::Journal(report)) => reports.add_journal(report),
            (
                Self::Text {
                    output,
                    screen,
                    several,
                    total,
                },
                reported,
            ) => {
                let text = match reported {
                    Reported::Capture(report) => {
                        total.add(report);
                        report.text(*screen)
                    }
                    Reported::Journal(report) => {
                        total.add_journal(report);
                        report.text(*screen)
                    }
                };
                output.write_all(text.as_bytes())?;
                if *several {
                    output.write_all(b"\n")?;
                }
                output.flush()?;
                Ok(())
            }
        }
    }

    /// Whether nobody reads what is printed any more.
    pub(super) fn is_closed(&self) -> bool {
        match self {
            Self::Json(reports) => reports.output().is_closed(),
            Self::Text { output, .. } => output.is_closed(),
        }
    }

    pub(super) fn finish(self, unusable: u64, left_out: u64) -> Result<(), ReportError> {
        match self {
            Self::Json(reports) => reports.finish()?.finish()?,
            Self::Text {
                mut output,
                screen,
                several,
                total,
            } => {
                if several {
                    output.write_all(total.text(screen, unusable, left_out).as_bytes())?;
                }
                output.write_all(screen.hint().as_bytes())?;
                output.finish()?;
            }
        }
        Ok(())
    }
}
