//! Mistakes as data, and how a terminal shows them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};
use serde::Serialize;

/// Mistakes in one file beyond this number are only counted: a list of another format has one on every line.
const SHOWN_PER_FILE: usize = 100;
/// A longer line is not kept with its diagnostic, in bytes.
const KEPT_LINE: usize = 4096;
/// Offending text beyond this length is cut, in characters.
const QUOTED_CHARS: usize = 60;

/// How much a [`Diagnostic`] matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The configuration cannot be used.
    Error,
    /// It can be used, but hardly does what was meant.
    Warning,
}

/// One mistake: where it is, what is wrong and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// Whether the configuration can be used all the same.
    pub severity: Severity,
    /// The file as the caller or the configuration named it.
    pub file: Arc<str>,
    /// The place in the file; `None` when the file as a whole is meant.
    #[serde(flatten)]
    pub place: Option<Place>,
    /// What is wrong.
    pub message: String,
    /// The way out.
    pub hint: String,
}

/// A place within one line of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Line, from 1.
    pub line: usize,
    /// Column of the first offending character, from 1, in characters.
    pub column: usize,
    /// The offending text, cut after 60 characters.
    pub text: String,
    /// The line without its end, unless it is very long.
    #[serde(skip)]
    source: Option<Arc<str>>,
    /// The offending bytes of `source`.
    #[serde(skip)]
    span: Range<usize>,
}

/// Mistakes in the order of the files and of the places in them; at least one of them is an error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Diagnostics(Vec<Diagnostic>);

impl Place {
    /// The bytes `span` of `line`, which is line number `number` of its file, from 1.
    pub(crate) fn in_line(number: usize, line: &[u8], span: Range<usize>) -> Self {
        let text = |bytes: Range<usize>| String::from_utf8_lossy(&line[bytes]);
        let (start, end) = (span.start.min(line.len()), span.end.min(line.len()));
        let before = text(0..start);
        let found = text(start..end.max(start));
        Self {
            line: number,
            column: before.chars().count() + 1,
            text: quoted(&found),
            span: before.len()..before.len() + found.len(),
            source: (line.len() <= KEPT_LINE).then(|| text(0..line.len()).into()),
        }
    }
}

impl Diagnostic {
    /// The diagnostic as a terminal shows it, with the line and a mark under the place; ends without a newline.
    /// `colour` adds ANSI colours; without it the text has no escape sequences, whatever the file contains.
    pub fn render(&self, colour: bool) -> String {
        let level = match self.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let title = Group::with_title(level.primary_title(self.message.as_str()));
        let path = self.file.as_ref();
        let located = match &self.place {
            None => title.element(Origin::path(path)),
            Some(Place {
                line,
                column,
                source: None,
                ..
            }) => title.element(Origin::path(path).line(*line).char_column(*column)),
            Some(Place {
                line,
                source: Some(source),
                span,
                ..
            }) => title.element(
                Snippet::source(source.as_ref())
                    .path(path)
                    .line_start(*line)
                    .annotation(AnnotationKind::Primary.span(span.clone())),
            ),
        };
        let report = [located.element(Level::HELP.with_name("hint").message(self.hint.as_str()))];
        let renderer = if colour {
            Renderer::styled()
        } else {
            Renderer::plain()
        };
        renderer.render(&report)
    }
}

impl Diagnostics {
    /// Wraps `all` if any of them is an error.
    pub(crate) fn from_errors(all: Vec<Diagnostic>) -> Result<Vec<Diagnostic>, Self> {
        if all
            .iter()
            .any(|diagnostic| diagnostic.severity == Severity::Error)
        {
            Err(Self(all))
        } else {
            Ok(all)
        }
    }

    /// The mistakes one by one.
    pub fn iter(&self) -> std::slice::Iter<'_, Diagnostic> {
        self.0.iter()
    }

    /// All of them as a terminal shows them, with an empty line between; see [`Diagnostic::render`].
    pub fn render(&self, colour: bool) -> String {
        self.0
            .iter()
            .map(|diagnostic| diagnostic.render(colour))
            .collect::<Vec<_>>()
            .join("\n\n")
    }
}

impl IntoIterator for Diagnostics {
    type Item = Diagnostic;
    type IntoIter = std::vec::IntoIter<Diagnostic>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'d> IntoIterator for &'d Diagnostics {
    type Item = &'d Diagnostic;
    type IntoIter = std::slice::Iter<'d, Diagnostic>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Diagnostics {}

/// What is wrong with a piece of text, before its place in a file is known.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) severity: Severity,
    pub(crate) message: String,
    pub(crate) hint: String,
    /// The offending bytes within the text.
    pub(crate) span: Range<usize>,
}

impl Problem {
    /// An error about the bytes `span` of the text.
    pub(crate) fn at(span: Range<usize>, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            message: message.into(),
            hint: hint.into(),
            span,
        }
    }

    /// The same problem of a text that begins `offset` bytes further on.
    pub(crate) fn shifted(mut self, offset: usize) -> Self {
        self.span = self.span.start + offset..self.span.end + offset;
        self
    }
}

/// Collects the mistakes of one file.
#[derive(Debug)]
pub(crate) struct Findings {
    file: Arc<str>,
    found: Vec<Diagnostic>,
    counted_errors: usize,
    counted_warnings: usize,
}

impl Findings {
    pub(crate) fn new(file: &str) -> Self {
        Self {
            file: file.into(),
            found: Vec::new(),
            counted_errors: 0,
            counted_warnings: 0,
        }
    }

    /// Whether there is an error among the mistakes so far.
    pub(crate) fn has_errors(&self) -> bool {
        self.found
            .iter()
            .any(|diagnostic| diagnostic.severity == Severity::Error)
    }

    /// Whether there are so many that another one would only be counted, so that its place need not be made.
    pub(crate) fn is_full(&self) -> bool {
        self.found.len() >= SHOWN_PER_FILE
    }

    /// Records a mistake.
    pub(crate) fn push(
        &mut self,
        severity: Severity,
        place: Option<Place>,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        let (message, hint) = (message.into(), hint.into());
        self.found.push(Diagnostic {
            severity,
            file: self.file.clone(),
            place,
            message,
            hint,
        });
    }

    /// Records a mistake without its text once [`Findings::is_full`].
    pub(crate) fn count(&mut self, severity: Severity) {
        match severity {
            Severity::Error => self.counted_errors += 1,
            Severity::Warning => self.counted_warnings += 1,
        }
    }

    /// All mistakes in the order of their places.
    pub(crate) fn into_sorted(mut self) -> Vec<Diagnostic> {
        self.found.sort_by_key(|diagnostic| {
            diagnostic
                .place
                .as_ref()
                .map_or((0, 0), |place| (place.line, place.column))
        });
        for (count, severity, word) in [
            (self.counted_errors, Severity::Error, "mistakes"),
            (self.counted_warnings, Severity::Warning, "warnings"),
        ] {
            if count > 0 {
                let message = format!("{count} more {word} in this file are not shown");
                self.push(severity, None, message, "correct those above first");
            }
        }
        self.found
    }
}

/// `text` with what follows its first 60 characters cut.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED_CHARS) {
        None => text.to_owned(),
        Some((cut, _)) => format!("{}…", &text[..cut]),
    }
}

/// The one of `known` that `given` was probably meant to be.
pub(crate) fn nearest<'k>(given: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let given = given.to_lowercase();
    let chars = given.chars().take(QUOTED_CHARS).count();
    if chars == QUOTED_CHARS {
        return None;
    }
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&given, candidate), candidate))
        .filter(|&(distance, candidate)| distance <= (chars.max(candidate.len()) / 3).max(1))
        .min()
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagnostic(line: &str, span: Range<usize>) -> Diagnostic {
        Diagnostic {
            severity: Severity::Error,
            file: "tungate.toml".into(),
            place: Some(Place::in_line(12, line.as_bytes(), span)),
            message: "`ports` is wrong".to_owned(),
            hint: "write it right".to_owned(),
        }
    }

    #[test]
    fn a_terminal_shows_the_line_with_a_mark_under_the_place() {
        assert_eq!(
            diagnostic("action = \"dorp\"", 10..14).render(false),
            "error: `ports` is wrong\n  \
               --> tungate.toml:12:11\n   \
                |\n\
             12 | action = \"dorp\"\n   \
                |           ^^^^\n   \
                |\n   \
                = hint: write it right"
        );
    }

    #[test]
    fn the_mark_stands_below_its_place_behind_tabs_and_wide_letters() {
        let rendered = diagnostic("\tname = \"\u{4e16}\u{754c}\" x", 17..18).render(false);
        let lines: Vec<_> = rendered.lines().collect();
        assert!(lines[1].ends_with("tungate.toml:12:14"), "{rendered}");
        // A tab shows as four blanks, each of the two letters takes two columns.
        assert_eq!(lines[4].find('^'), Some("12 | ".len() + 4 + 14), "{rendered}");
    }

    #[test]
    fn text_without_colour_has_no_escape_sequences_whatever_the_file_holds() {
        let hostile = diagnostic("a = \u{1b}[31m\u{7}", 4..9);
        assert!(!hostile.render(false).contains('\u{1b}'));
        assert!(hostile.render(true).contains('\u{1b}'));
    }

    #[test]
    fn a_very_long_line_is_not_shown_but_named() {
        let line = "x".repeat(KEPT_LINE + 1);
        let rendered = diagnostic(&line, 5..2000).render(false);
        assert!(rendered.contains("tungate.toml:12:6"), "{rendered}");
        assert!(rendered.len() < 200, "{rendered}");
    }

    #[test]
    fn json_has_severity_place_text_message_and_hint() {
        let json: serde_json::Value = serde_json::to_value(diagnostic("action = \"dorp\"", 10..14)).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "severity": "error", "file": "tungate.toml", "line": 12, "column": 11, "text": "dorp",
                "message": "`ports` is wrong", "hint": "write it right",
            })
        );
    }

    #[test]
    fn the_nearest_word_is_near() {
        assert_eq!(nearest("Prots", ["name", "ports", "protocols"]), Some("ports"));
        assert_eq!(nearest("sctp", ["tcp", "udp", "icmp", "any"]), None);
        assert_eq!(nearest("colour", ["name", "ports", "protocols"]), None);
    }
}
