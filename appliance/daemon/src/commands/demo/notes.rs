//! What the appliance's log says of flows, as data.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::mpsc::{Receiver, Sender, channel};

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// A log line about a flow.
#[derive(Debug, Clone, Default)]
pub(super) struct Note(BTreeMap<&'static str, String>);

impl Note {
    /// The value of a field; empty if the line has none of that name.
    pub(super) fn get(&self, field: &str) -> &str {
        self.0.get(field).map_or("", String::as_str)
    }

    /// A field that is a number of bytes.
    pub(super) fn bytes(&self, field: &str) -> u64 {
        self.get(field).parse().unwrap_or(0)
    }
}

impl Visit for Note {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

/// Has the log's lines about flows sent here, and no others written.
pub(super) fn listen() -> Receiver<Note> {
    let (sender, receiver) = channel();
    let targets = Targets::new()
        .with_target("tungate::flow", LevelFilter::DEBUG)
        .with_target("tungate::denied", LevelFilter::INFO);
    tracing_subscriber::registry()
        .with(Recorder(sender).with_filter(targets))
        .init();
    receiver
}

struct Recorder(Sender<Note>);

impl<S: Subscriber> Layer<S> for Recorder {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut note = Note::default();
        event.record(&mut note);
        let _ = self.0.send(note); // nobody listens any more
    }
}
