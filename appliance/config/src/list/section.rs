//! The section `[lists]`.

use std::path::{Path, PathBuf};

use toml::de::DeValue;
use tungate_engine::policy::ListEntry;

use super::{LARGEST_FILE, Progress, file_hint, never_fits, parse_line, read_limited, read_lines};
use crate::diagnostic::{Diagnostic, Problem};
use crate::document::{FromValue, Section, wrong_type};

/// List entries and what reading the files they came from brought to light.
#[derive(Default)]
pub(crate) struct ReadLists {
    pub(crate) entries: Vec<ListEntry>,
    pub(crate) files: Vec<PathBuf>,
    pub(crate) diagnostics: Vec<Diagnostic>,
}

/// Reads `[lists]`; names of files are relative to `directory`.
pub(crate) fn read_lists(
    root: &mut Section<'_, '_>,
    directory: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> ReadLists {
    let mut lists = ReadLists::default();
    let Some(mut section) = root.section("lists") else {
        return lists;
    };
    for entry in section.list::<EntryText>("entries").unwrap_or_default() {
        let line = entry.get_ref().0.as_bytes();
        let problem = match parse_line(line) {
            Ok(None) => Some(Problem::at(
                0..line.len(),
                "this is no entry",
                "write, for instance, \"deny 192.0.2.0/24\"",
            )),
            Ok(Some(parsed)) => {
                let warning = never_fits(&parsed, line);
                lists.entries.push(parsed);
                warning
            }
            Err(problem) => Some(*problem),
        };
        if let Some(problem) = problem {
            section.document.error_within(entry.span(), problem);
        }
    }
    for file in section.list::<String>("files").unwrap_or_default() {
        let path = directory.join(file.get_ref());
        if lists.files.contains(&path) {
            section
                .document
                .warning(file.span(), "this list file is named twice", "name it once");
            continue;
        }
        match read_limited(&path, LARGEST_FILE) {
            Ok(text) => {
                let name = path.to_string_lossy();
                lists
                    .diagnostics
                    .extend(read_lines(&text, &name, &path, &mut lists.entries, progress));
            }
            Err(error) => {
                let message = format!("cannot read the list file {}: {error}", path.display());
                section.document.error(file.span(), message, file_hint(&error));
            }
        }
        lists.files.push(path);
    }
    section.finish();
    lists
}

/// A list entry as text, which may be empty.
struct EntryText(String);

impl FromValue for EntryText {
    fn from_value(value: &DeValue<'_>) -> Result<Self, Problem> {
        match value.as_str() {
            Some(text) => Ok(Self(text.to_owned())),
            None => wrong_type(value, "a list entry as text", "\"deny 192.0.2.0/24\""),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{mistake, warning};

    #[test]
    fn mistakes_in_lists_are_named_with_their_place_and_the_way_out() {
        mistake(
            "<<list>> = 1",
            "`list` is not a key of the file",
            "did you mean `lists`?",
        );
        mistake(
            "lists = <<3>>",
            "`lists` is a section, not a number",
            "write [lists] on a line of its own",
        );
        mistake(
            "[lists]\nentries = <<\"deny 192.0.2.0/24\">>",
            "is a list, not text",
            "entries = [\"deny 192.0.2.0/24\"]",
        );
        mistake(
            "[lists]\nentries = [<<7>>]",
            "this is a number, not a list entry",
            "\"deny 192.0.2.0/24\"",
        );
        mistake(
            "[lists]\nentries = ['deny <<192.0.2.1/24>>']",
            "bits set",
            "192.0.2.0/24",
        );
        mistake(
            "[lists]\nentries = [<<\"deny 192.0.2.1/24 \\u0023\">>]",
            "bits set",
            "192.0.2.0/24",
        );
        mistake("[lists]\nentries = [<<\"\">>]", "no entry", "deny 192.0.2.0/24");
        mistake(
            "[lists]\nfiles = [<<\"missing.txt\">>]",
            "cannot read the list file missing.txt",
            "relative to",
        );
        mistake(
            "[lists]\n<<entires>> = []",
            "`entires` is not a key of [lists]",
            "did you mean `entries`?",
        );
        mistake(
            "[lists]\n<<x>> = []",
            "`x` is not a key of [lists]",
            "[lists] knows entries, files",
        );
        mistake(
            "\u{feff}<<lits>> = []",
            "`lits` is not a key",
            "did you mean `lists`?",
        );
        warning(
            "[lists]\nentries = [\"deny ::/0 icmp <<8>>\"]",
            "ICMP has no ports",
            "leave out",
        );
    }
}
