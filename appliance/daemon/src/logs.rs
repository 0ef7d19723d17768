//! Where the log goes.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, IsTerminal, Write};

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
        .with_writer(|| Lines)
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
        .with_writer(|| Lines)
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

/// More bytes than this do not wait.
const GATHERED_MAX: usize = 64 << 10;

thread_local! {
    /// This thread's lines that wait to be written; `None`: they do not wait.
    static GATHERED: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

/// Has this thread's lines wait for [`write_gathered`], or the end of the returned value: a thread that has many would
/// otherwise spend a call of the system, and the lock that all threads share, on each.
pub(crate) fn gather() -> impl Drop {
    struct Gathering;
    impl Drop for Gathering {
        fn drop(&mut self) {
            write_gathered();
            GATHERED.set(None);
        }
    }
    GATHERED.set(Some(Vec::new()));
    Gathering
}

/// Writes what waits. A thread that gathers lines calls it before it sleeps.
pub(crate) fn write_gathered() {
    GATHERED.with_borrow_mut(|gathered| {
        if let Some(lines) = gathered.as_mut().filter(|lines| !lines.is_empty()) {
            let _ = io::stderr().write_all(lines); // there is nobody to tell
            lines.clear();
        }
    });
}

/// Standard error, by way of the lines that wait.
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let waits = GATHERED.with_borrow_mut(|gathered| {
            let lines = gathered.as_mut()?;
            lines.extend_from_slice(line);
            Some(lines.len())
        });
        match waits {
            None => return io::stderr().write(line),
            Some(len) if len >= GATHERED_MAX => write_gathered(),
            Some(_) => {}
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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
