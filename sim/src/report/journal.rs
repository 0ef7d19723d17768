//! What repeating a journal has found out: whether the engine still does the same.

use serde::{Serialize, Serializer};
use tungate_engine::journal::JournalError;

use super::Screen;
use super::expect::{Expectations, Mismatch};
use super::json::SCHEMA;
use super::text::Text;
use crate::replay::Repeated;

/// A journal's replay as it is reported.
#[derive(Debug, Clone, Serialize)]
pub struct JournalReport {
    schema: u32,
    journal: String,
    digest: String,
    packets: u64,
    calls: u64,
    #[serde(serialize_with = "as_text")]
    damaged: Option<JournalError>,
    mismatches: Option<Vec<Mismatch>>,
}

impl JournalReport {
    /// Reports on the journal called `name`, compared with `expectations`, of which the digest and the damage count:
    /// a journal knows nothing else.
    pub fn new(name: String, repeated: Repeated, expectations: Option<&Expectations>) -> Self {
        let Repeated {
            calls,
            packets,
            digest,
            damaged,
        } = repeated;
        let mismatches = expectations.map(|expected| expected.compare_journal(&digest, damaged.is_some()));
        Self {
            schema: SCHEMA,
            journal: name,
            digest,
            packets,
            calls,
            damaged,
            mismatches,
        }
    }

    /// Whether anything is not as expected.
    pub fn differs(&self) -> bool {
        self.mismatches
            .as_ref()
            .is_some_and(|mismatches| !mismatches.is_empty())
    }

    /// The report as text, its last line ended.
    pub fn text(&self, screen: Screen) -> String {
        let mut text = Text::new(screen);
        text.title(&self.journal);
        text.item("format", "journal".to_owned());
        text.journal(self.packets, self.calls);
        if let Some(damage) = &self.damaged {
            text.damage(&damage.to_string());
        }
        text.item("digest", self.digest.clone());
        if let Some(mismatches) = &self.mismatches {
            text.expected(mismatches);
        }
        text.finish()
    }
}

fn as_text<S: Serializer>(damaged: &Option<JournalError>, serializer: S) -> Result<S::Ok, S::Error> {
    damaged.map(|error| error.to_string()).serialize(serializer)
}
