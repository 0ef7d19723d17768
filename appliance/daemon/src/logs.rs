//! Where the log goes.
//!
//! Whoever reads the log may be slow, or stand still: a pager, a full disk, a journal that is being rotated. A process
//! that relays has a thread for that ([`writer`]): others hand whole lines over and go on, and never wait for a
//! reader. What the reader leaves lying beyond a bound is lost, counted, and told of when it reads again.

mod writer;

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

pub(crate) use self::writer::start as start_writer;
use self::writer::{WRITER, write_out};

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

thread_local! {
    /// This thread's lines that wait to be handed over; `None`: they do not wait.
    static GATHERED: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

/// Has this thread's lines wait for [`hand_over`], or the end of the returned value: a thread that has many would
/// otherwise take the lock that all threads share for each.
pub(crate) fn gather() -> impl Drop {
    struct Gathering;
    impl Drop for Gathering {
        fn drop(&mut self) {
            hand_over();
            GATHERED.set(None);
        }
    }
    GATHERED.set(Some(Vec::new()));
    Gathering
}

/// Gives the lines that wait to the thread that writes. A thread that gathers lines calls it before it sleeps.
pub(crate) fn hand_over() {
    GATHERED.with_borrow_mut(|gathered| {
        if let Some(lines) = gathered.as_mut().filter(|lines| !lines.is_empty()) {
            write(lines);
            lines.clear();
        }
    });
}

/// Writes whole lines: by the thread for that, where there is one.
fn write(lines: &[u8]) {
    match WRITER.get() {
        Some(writer) => writer.push(lines),
        None => write_out(lines),
    }
}

/// Standard error, by way of the lines that wait.
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let waits = GATHERED.with_borrow_mut(|gathered| {
            gathered
                .as_mut()
                .map(|lines| lines.extend_from_slice(line))
                .is_some()
        });
        if !waits {
            write(line);
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
