//! Where the log goes.

use std::fmt;
use std::io::{self, IsTerminal};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// The variable that says what to log, in the syntax of tracing's filters: `debug`, `tungate::flow=off,info`.
const VARIABLE: &str = "TUNGATE_LOG";

/// Logs to standard error: for people, or as JSON.
pub(crate) fn to_stderr(json: bool) {
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    let registry = tracing_subscriber::registry().with(filter("info"));
    if json {
        // Flows have a target of their own.
        registry
            .with(layer.json().flatten_event(true).with_target(false))
            .init();
    } else {
        registry.with(layer).init();
    }
}

/// Logs to standard error beside a command's own lines: what goes wrong and what is denied, and with `verbose` every
/// flow.
pub(crate) fn of_a_command(verbose: bool) {
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(false)
        .event_format(Short);
    let default = if verbose {
        "info"
    } else {
        "warn,tungate::denied=info"
    };
    tracing_subscriber::registry()
        .with(filter(default))
        .with(layer)
        .init();
}

/// Lines that say whose they are, and neither time nor place.
struct Short;

impl<S, N> FormatEvent<S, N> for Short
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        writer.write_str("tungate: ")?;
        if *event.metadata().level() <= Level::WARN {
            write!(writer, "{}: ", event.metadata().level().as_str().to_lowercase())?;
        }
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

fn filter(default: &str) -> EnvFilter {
    EnvFilter::try_from_env(VARIABLE).unwrap_or_else(|_| EnvFilter::new(default))
}
