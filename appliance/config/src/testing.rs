//! What the tests of several modules share.

use std::path::Path;

use crate::diagnostic::Diagnostic;
use crate::load::{Loaded, parse};

/// A text with one place in it marked `<<like this>>`.
pub(crate) struct Marked {
    /// The text without the marks.
    pub(crate) text: String,
    line: usize,
    column: usize,
    found: String,
}

impl Marked {
    pub(crate) fn new(marked: &str) -> Self {
        let (before, rest) = marked.split_once("<<").expect("the place is marked");
        let (found, after) = rest.split_once(">>").expect("the place's end is marked");
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self {
            text: format!("{before}{found}{after}"),
            line: before.matches('\n').count() + 1,
            column: before[line_start..]
                .trim_start_matches('\u{feff}')
                .chars()
                .count()
                + 1,
            found: found.to_owned(),
        }
    }
}

/// Asserts that there is one diagnostic, at the marked place, and that it says `message` and `hint` among others.
#[track_caller]
pub(crate) fn assert_only<'d>(
    found: impl IntoIterator<Item = &'d Diagnostic>,
    marked: &Marked,
    message: &str,
    hint: &str,
) {
    let found: Vec<_> = found.into_iter().collect();
    let [only] = found[..] else {
        panic!("{} diagnostics: {found:#?}", found.len())
    };
    let place = only.place.as_ref().expect("it has a place");
    assert_eq!(
        (place.line, place.column, place.text.as_str()),
        (marked.line, marked.column, marked.found.as_str()),
        "{only}"
    );
    assert!(only.message.contains(message), "message is: {}", only.message);
    assert!(only.hint.contains(hint), "hint is: {}", only.hint);
}

/// Reads a configuration without mistakes.
#[track_caller]
pub(crate) fn read(text: &str) -> Loaded {
    parse(text, "tungate.toml", Path::new(""), &mut |_| ()).unwrap_or_else(|found| panic!("{found}"))
}

/// Reads the marked text as a configuration, in which there must be this one mistake, at the mark.
#[track_caller]
pub(crate) fn mistake(marked: &str, message: &str, hint: &str) {
    let marked = Marked::new(marked);
    let found = parse(&marked.text, "tungate.toml", Path::new(""), &mut |_| ()).unwrap_err();
    assert_only(found.iter(), &marked, message, hint);
}

/// The same for a warning.
#[track_caller]
pub(crate) fn warning(marked: &str, message: &str, hint: &str) {
    let marked = Marked::new(marked);
    assert_only(&read(&marked.text).warnings, &marked, message, hint);
}
