//! Walks a TOML document key by key, so that one run finds every mistake in it.
//!
//! A [`Section`] is asked for the keys it may have; what nobody asked for is unknown. Values convert by
//! [`FromValue`], which says what is wrong without knowing where; the section adds the place.

use std::fmt::Write;
use std::ops::{Range, RangeInclusive};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::diagnostic::{Findings, Place, Problem, Severity, nearest, quoted};

/// The text of a document and what is wrong with it.
pub(crate) struct Document<'t> {
    pub(crate) findings: Findings,
    text: &'t str,
    /// Where each line begins, in bytes.
    line_starts: Vec<usize>,
    /// Lines the TOML parser rejected, in ascending order; what it made of them is a guess.
    broken_lines: Vec<usize>,
    /// Section and key, and whether the section has the key.
    #[cfg(test)]
    pub(crate) asked: Vec<(String, &'static str, bool)>,
}

/// A table of a document, while its keys are read.
pub(crate) struct Section<'d, 't> {
    pub(crate) document: &'d mut Document<'t>,
    table: &'d DeTable<'t>,
    /// Its header, where something is missing in it.
    pub(crate) span: Range<usize>,
    /// What it is called in messages, such as `[lists]`.
    what: String,
    known: Vec<&'static str>,
}

/// A type that a TOML value can stand for.
pub(crate) trait FromValue: Sized {
    /// Converts `value`; the problem's span counts within the string, if `value` is one.
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem>;
}

impl<'t> Document<'t> {
    /// Parses `text` and records what is no TOML; the table holds what could be understood.
    pub(crate) fn parse(file: &str, text: &'t str) -> (Self, Spanned<DeTable<'t>>) {
        let line_starts = std::iter::once(0)
            .chain(
                text.bytes()
                    .enumerate()
                    .filter(|&(_, byte)| byte == b'\n')
                    .map(|(at, _)| at + 1),
            )
            .collect();
        let mut document = Self {
            findings: Findings::new(file),
            text,
            line_starts,
            broken_lines: Vec::new(),
            #[cfg(test)]
            asked: Vec::new(),
        };
        let (root, errors) = DeTable::parse_recoverable(text);
        let unclosed = errors.iter().any(|error| {
            error.message().starts_with("unclosed array,")
                || error.message().starts_with("unclosed inline table,")
        });
        let unclosed = if unclosed {
            unclosed_value(root.get_ref(), text)
        } else {
            None
        };
        let mut errors: Vec<_> = errors
            .iter()
            .map(|error| (error.span().unwrap_or(0..0), error.message()))
            .filter(|(span, _)| unclosed.is_none_or(|start| span.start < start))
            .collect();
        errors.sort_by_key(|(span, _)| span.start);
        let mut header_broken = false;
        for (span, message) in errors {
            let number = document.line(span.start);
            let in_header = document.text[document.line_starts[number - 1]..]
                .trim_start()
                .starts_with('[');
            if message == "duplicate key" && header_broken && !in_header {
                continue; // The keys of a section whose header is one too many.
            }
            header_broken |= in_header;
            let (message, hint) = explain(text, &span, message);
            document.syntax_error(span, message, hint);
        }
        if let Some(start) = unclosed {
            let (what, end) = if text[start..].starts_with('[') {
                ("array", ']')
            } else {
                ("inline table", '}')
            };
            let hint = format!("close it with `{end}`");
            document.syntax_error(start..start + 1, format!("this {what} is not closed"), hint);
        }
        // Behind a broken header or within what is not closed, keys are not where they seem to be.
        if header_broken || unclosed.is_some() {
            return (document, Spanned::new(0..0, DeTable::new()));
        }
        (document, root)
    }

    /// Whether the text is no TOML, so that what seems to be missing may be there.
    pub(crate) fn is_broken(&self) -> bool {
        !self.broken_lines.is_empty()
    }

    /// Records a mistake at `span`.
    pub(crate) fn error(&mut self, span: Range<usize>, message: impl Into<String>, hint: impl Into<String>) {
        self.report(Problem::at(span, message, hint));
    }

    /// Records something that is probably not meant, at `span`.
    pub(crate) fn warning(
        &mut self,
        span: Range<usize>,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.report(Problem {
            severity: Severity::Warning,
            ..Problem::at(span, message, hint)
        });
    }

    /// Records `problem`, whose span counts within the string at `value`.
    pub(crate) fn error_within(&mut self, value: Range<usize>, problem: Problem) {
        let raw = self.text.get(value.clone()).unwrap_or_default();
        let quote = ["\"\"\"", "'''", "\"", "'"]
            .into_iter()
            .find(|quote| raw.starts_with(quote));
        let span = match quote {
            Some(quote) if quote.len() == 1 && !(quote == "\"" && raw.contains('\\')) => {
                let start = value.start + quote.len();
                start + problem.span.start..start + problem.span.end
            }
            Some(_) | None => value.clone(),
        };
        // An empty string has no character to point at.
        let span = if span.is_empty() { value } else { span };
        self.report(Problem { span, ..problem });
    }

    /// The number, from 1, of the line that contains the byte at `offset`.
    pub(crate) fn line(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|&start| start <= offset)
    }

    fn report(&mut self, problem: Problem) {
        let number = self.line(problem.span.start);
        if self.broken_lines.binary_search(&number).is_ok() {
            return;
        }
        if self.findings.is_full() {
            return self.findings.count(problem.severity);
        }
        let place = self.place(number, &problem.span);
        self.findings
            .push(problem.severity, Some(place), problem.message, problem.hint);
    }

    /// Records one syntax error per line: further ones are mostly consequences.
    fn syntax_error(&mut self, span: Range<usize>, message: String, hint: String) {
        self.report(Problem::at(span.clone(), message, hint));
        self.broken_lines.push(self.line(span.start));
    }

    fn place(&self, number: usize, span: &Range<usize>) -> Place {
        let mut start = self.line_starts[number - 1];
        if start == 0 && self.text.starts_with('\u{feff}') {
            start = '\u{feff}'.len_utf8();
        }
        let end = self
            .line_starts
            .get(number)
            .map_or(self.text.len(), |next| next - 1);
        let line = self.text[start..end].trim_end_matches('\r');
        Place::in_line(
            number,
            line.as_bytes(),
            span.start.saturating_sub(start)..span.end.saturating_sub(start),
        )
    }
}

impl<'d, 't> Section<'d, 't> {
    /// The whole document.
    pub(crate) fn root(document: &'d mut Document<'t>, table: &'d DeTable<'t>) -> Self {
        Self {
            document,
            table,
            span: 0..0,
            what: "the file".to_owned(),
            known: Vec::new(),
        }
    }

    /// Adds to what the section is called, once that depends on its values.
    pub(crate) fn qualify(&mut self, words: &str) {
        self.what.push(' ');
        self.what.push_str(words);
    }

    /// The value of `key`, if it is there and as it should be.
    pub(crate) fn get<T: FromValue>(&mut self, key: &'static str) -> Option<Spanned<T>> {
        let value = self.value(key)?;
        self.document.convert(value)
    }

    /// The same, with an error if it is not there.
    pub(crate) fn require<T: FromValue>(&mut self, key: &'static str, example: &str) -> Option<Spanned<T>> {
        if !self.has(key) && !self.document.is_broken() {
            let message = format!("{} has no `{key}`", self.what);
            self.document.error(
                self.span.clone(),
                message,
                format!("add, for instance, {key} = {example}"),
            );
        }
        self.get(key)
    }

    /// Overwrites `setting` if `key` is there.
    pub(crate) fn set<T: FromValue>(&mut self, key: &'static str, setting: &mut T) {
        if let Some(value) = self.get(key) {
            *setting = value.into_inner();
        }
    }

    /// The values of the array `key` that are as they should be; `None` if there is no such array.
    pub(crate) fn list<T: FromValue>(&mut self, key: &'static str) -> Option<Vec<Spanned<T>>> {
        let value = self.value(key)?;
        let DeValue::Array(values) = value.get_ref() else {
            let written = self.document.text.get(value.span()).unwrap_or_default();
            let message = format!("`{key}` is a list, not {}", kind(value.get_ref()));
            self.document.error(
                value.span(),
                message,
                format!("write {key} = [{}]", quoted(written)),
            );
            return None;
        };
        Some(
            values
                .iter()
                .filter_map(|value| self.document.convert(value))
                .collect(),
        )
    }

    /// The same for a list that must not be empty; no values if it is not there.
    pub(crate) fn some<T: FromValue>(&mut self, key: &'static str, hint: &str) -> Vec<Spanned<T>> {
        let value = self.table.get(key);
        if let Some(value) =
            value.filter(|value| value.get_ref().as_array().is_some_and(|values| values.is_empty()))
        {
            self.document
                .error(value.span(), format!("`{key}` is empty"), hint);
        }
        self.list(key).unwrap_or_default()
    }

    /// Where the value of `key` is, if it is there.
    pub(crate) fn span_of(&self, key: &str) -> Option<Range<usize>> {
        self.table.get(key).map(Spanned::span)
    }

    /// Whether `key` is there, as whatever.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// The table `[key]`.
    pub(crate) fn section(&mut self, key: &'static str) -> Option<Section<'_, 't>> {
        let value = self.value(key)?;
        let DeValue::Table(table) = value.get_ref() else {
            let message = format!("`{key}` is a section, not {}", kind(value.get_ref()));
            self.document.error(
                value.span(),
                message,
                format!("write [{key}] on a line of its own"),
            );
            return None;
        };
        let what = format!("[{key}]");
        Some(Section {
            document: self.document,
            table,
            span: value.span(),
            what,
            known: Vec::new(),
        })
    }

    /// Calls `read` for each of the tables `[[key]]`.
    pub(crate) fn each(&mut self, key: &'static str, mut read: impl FnMut(Section<'_, 't>)) {
        let Some(value) = self.value(key) else { return };
        let wrong = |found: &str| {
            (
                format!("`{key}` is a list of sections, not {found}"),
                format!("write [[{key}]] above the keys of each"),
            )
        };
        let DeValue::Array(values) = value.get_ref() else {
            let (message, hint) = wrong(kind(value.get_ref()));
            return self.document.error(value.span(), message, hint);
        };
        for value in values {
            match value.get_ref() {
                DeValue::Table(table) => {
                    let (span, what) = (value.span(), format!("[[{key}]]"));
                    read(Section {
                        document: self.document,
                        table,
                        span,
                        what,
                        known: Vec::new(),
                    });
                }
                other => {
                    let (message, hint) = wrong(kind(other));
                    self.document.error(value.span(), message, hint);
                }
            }
        }
    }

    /// Reports the keys that nobody asked for.
    pub(crate) fn finish(self) {
        let unknown = self
            .table
            .keys()
            .filter(|key| !self.known.contains(&key.get_ref().as_ref()));
        for key in unknown {
            let name = key.get_ref();
            let hint = match nearest(name, self.known.iter().copied()) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("{} knows {}", self.what, self.known.join(", ")),
            };
            let message = format!("`{}` is not a key of {}", quoted(name), self.what);
            self.document.error(key.span(), message, hint);
        }
    }

    fn value(&mut self, key: &'static str) -> Option<&'d Spanned<DeValue<'t>>> {
        self.known.push(key);
        let value = self.table.get(key);
        #[cfg(test)]
        self.document
            .asked
            .push((self.what.clone(), key, value.is_some()));
        value
    }
}

impl Document<'_> {
    fn convert<T: FromValue>(&mut self, value: &Spanned<DeValue<'_>>) -> Option<Spanned<T>> {
        match T::from_value(value.get_ref()) {
            Ok(converted) => Some(Spanned::new(value.span(), converted)),
            Err(problem) => {
                self.error_within(value.span(), problem);
                None
            }
        }
    }
}

/// What is wrong when a value is of another type than `expected`.
pub(crate) fn wrong_type<T>(value: &DeValue<'_>, expected: &str, example: &str) -> Result<T, Problem> {
    let message = format!("this is {}, not {expected}", kind(value));
    Err(Problem::at(
        0..0,
        message,
        format!("write, for instance, {example}"),
    ))
}

/// The text of a string value that is not empty.
pub(crate) fn text_of<'v>(value: &'v DeValue<'_>, expected: &str, example: &str) -> Result<&'v str, Problem> {
    match value.as_str() {
        Some("") => Err(Problem::at(
            0..0,
            "this is empty",
            format!("write {expected}, such as {example}"),
        )),
        Some(text) => Ok(text),
        None => wrong_type(value, expected, example),
    }
}

/// The integer of a value, which must be in `range`.
pub(crate) fn number_of(value: &DeValue<'_>, range: RangeInclusive<u64>) -> Result<u64, Problem> {
    let Some(number) = value.as_integer() else {
        return wrong_type(value, "a number", "1000");
    };
    match u64::from_str_radix(number.as_str(), number.radix()) {
        Ok(number) if range.contains(&number) => Ok(number),
        Ok(_) | Err(_) => {
            let hint = format!("use a number from {} to {}", range.start(), range.end());
            Err(Problem::at(0..0, format!("{number} is out of range"), hint))
        }
    }
}

/// The one of `choices` that a string value names.
pub(crate) fn choice_of<T: Copy>(value: &DeValue<'_>, choices: &[(&'static str, T)]) -> Result<T, Problem> {
    let mut all = String::new();
    for (index, (name, _)) in choices.iter().enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        write!(all, "{comma}\"{name}\"").expect("a String takes everything");
    }
    let text = text_of(value, &format!("one of {all}"), &format!("\"{}\"", choices[0].0))?;
    choices
        .iter()
        .find(|(name, _)| *name == text)
        .map(|&(_, choice)| choice)
        .ok_or_else(|| {
            let hint = match nearest(text, choices.iter().map(|&(name, _)| name)) {
                Some(meant) => format!("did you mean \"{meant}\"?"),
                None => format!("use one of {all}"),
            };
            Problem::at(
                0..text.len(),
                format!("`{}` is none of {all}", quoted(text)),
                hint,
            )
        })
}

/// A value's type with its article.
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "text",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date or time",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a section",
    }
}

/// Where the array or inline table begins that swallows the rest of the text: the outermost that reaches its end, or
/// the innermost of those that begin on the same line and are not closed.
fn unclosed_value(table: &DeTable<'_>, text: &str) -> Option<usize> {
    let mut starts = Vec::new();
    table
        .values()
        .for_each(|value| reaching_end(value, text, &mut starts));
    let first = *starts.first()?;
    starts
        .into_iter()
        .rfind(|&start| !text[first..start].contains('\n'))
}

/// Collects where those arrays and inline tables in `value` begin that reach the end of the text; outer ones first,
/// inner ones only if they are not closed.
fn reaching_end(value: &Spanned<DeValue<'_>>, text: &str, starts: &mut Vec<usize>) {
    let raw = text.get(value.span()).unwrap_or_default();
    let reaches_end = raw.starts_with(['[', '{']) && value.span().end >= text.trim_end().len();
    let closing = if raw.starts_with('[') { ']' } else { '}' };
    if reaches_end && (starts.is_empty() || !raw.ends_with(closing)) {
        starts.push(value.span().start);
    }
    match value.get_ref() {
        DeValue::Array(values) => values.iter().for_each(|value| reaching_end(value, text, starts)),
        DeValue::Table(table) => table.values().for_each(|value| reaching_end(value, text, starts)),
        DeValue::String(_)
        | DeValue::Integer(_)
        | DeValue::Float(_)
        | DeValue::Boolean(_)
        | DeValue::Datetime(_) => {}
    }
}

/// Puts what the TOML parser says into words that name the way out.
fn explain(text: &str, span: &Range<usize>, message: &str) -> (String, String) {
    let found = text.get(span.clone()).unwrap_or_default();
    if message.starts_with("string values must be quoted")
        || message.starts_with("invalid boolean")
        || message.starts_with("invalid float")
    {
        if found.is_empty() {
            return (
                "the value is missing".to_owned(),
                "write it behind the `=`".to_owned(),
            );
        }
        let found = quoted(found);
        return (
            format!("`{found}` is not a value"),
            format!("put text between quotes: \"{found}\""),
        );
    }
    let (message, expected) = message.split_once(", expected ").unwrap_or((message, ""));
    let hint = match message {
        "duplicate key" => {
            let header = text[..span.start].ends_with('[') && !text[..span.start].ends_with("[[");
            match header && matches!(found, "rule" | "egress") {
                true => format!("write [[{found}]], as there may be several"),
                false => "keep one of them; all keys of a section go under one header".to_owned(),
            }
        }
        "key with no value" => "write KEY = VALUE".to_owned(),
        _ if expected == "`\"`" => "close the text with a quote".to_owned(),
        _ if matches!(expected, "" | "nothing") => {
            "each line is [SECTION], [[SECTION]] or KEY = VALUE".to_owned()
        }
        _ => format!("expected {expected}"),
    };
    (message.to_owned(), hint)
}
