//! Puts a configuration together from its file and the list files it names.

use std::path::{Path, PathBuf};

use toml::de::DeTable;
use tungate_engine::Config;
use tungate_engine::policy::{EgressSpec, PolicySpec};

use crate::diagnostic::{Diagnostic, Diagnostics, Findings, Place, Severity};
use crate::document::{Document, Section};
use crate::egress::{Egress, read_egresses};
use crate::list::{Progress, read_limited, read_lists};
use crate::rules::{check_rules, into_rules, read_rules};
use crate::settings::{Control, Prefilter, read_control, read_dns, read_engine, read_prefilter};

/// Largest configuration file, in bytes.
const LARGEST_FILE: u64 = 16 << 20;

/// The complete example: every section and key with what it means; see [`show_defaults`].
const EXAMPLE: &str = include_str!("../tungate.example.toml");

/// A configuration without mistakes.
///
/// The default is what holds with no configuration file: no lists, no rules, everything direct.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Loaded {
    /// Lists, rules and the names of egresses, for the engine.
    pub policy: PolicySpec,
    /// The engine's limits and times for the whole appliance, of which each shard gets its share.
    pub engine: Config,
    /// The egresses in full; an [`EgressId`](tungate_engine::policy::EgressId) in `policy` is an index.
    pub egresses: Vec<Egress>,
    /// How the pre-filter is loaded.
    pub prefilter: Prefilter,
    /// The socket by which a running appliance is asked and told things.
    pub control: Control,
    /// The files that were read: the configuration first, then list files. When one of them changes, so may the
    /// configuration.
    pub sources: Vec<PathBuf>,
    /// What is probably not meant as it is written.
    pub warnings: Vec<Diagnostic>,
}

/// A configuration that changes nothing: every key with what it means, defaults as comments.
pub const fn show_defaults() -> &'static str {
    EXAMPLE
}

/// Reads the configuration file `path` and the list files it names, which are relative to it. `progress` is called
/// now and then while list files are read.
///
/// # Errors
///
/// Every mistake in all of these files, or why the configuration file cannot be read.
pub fn load(path: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Loaded, Diagnostics> {
    let name = path.to_string_lossy();
    let directory = path.parent().unwrap_or(Path::new(""));
    let unreadable = |place: Option<Place>, message: String, hint: &str| {
        let mut findings = Findings::new(&name);
        findings.push(Severity::Error, place, message, hint);
        Diagnostics::from_errors(findings.into_sorted()).map(|_| Loaded::default())
    };
    let bytes = match read_limited(path, LARGEST_FILE) {
        Ok(bytes) => bytes,
        Err(error) => {
            let hint = "check the name; without a configuration the defaults hold";
            return unreadable(None, format!("cannot read the configuration: {error}"), hint);
        }
    };
    match str::from_utf8(&bytes) {
        Ok(text) => {
            let mut loaded = parse(text, &name, directory, progress)?;
            loaded.sources.insert(0, path.to_owned());
            Ok(loaded)
        }
        Err(error) => {
            let at = error.valid_up_to();
            let start = bytes[..at]
                .iter()
                .rposition(|&byte| byte == b'\n')
                .map_or(0, |newline| newline + 1);
            let line = bytes[start..]
                .split(|&byte| byte == b'\n')
                .next()
                .unwrap_or_default();
            let number = bytes[..start].iter().filter(|&&byte| byte == b'\n').count() + 1;
            let place = Place::in_line(number, line, at - start..at - start + 1);
            unreadable(
                Some(place),
                "this is not UTF-8".to_owned(),
                "save the file as UTF-8",
            )
        }
    }
}

/// Reads a configuration from its text; `name` stands for the file in diagnostics.
pub(crate) fn parse(
    text: &str,
    name: &str,
    directory: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Loaded, Diagnostics> {
    let (mut document, table) = Document::parse(name, text);
    let (loaded, in_lists) = read(&mut document, table.get_ref(), directory, progress);
    let mut diagnostics = document.findings.into_sorted();
    diagnostics.extend(in_lists);
    let warnings = Diagnostics::from_errors(diagnostics)?;
    Ok(Loaded { warnings, ..loaded })
}

/// Reads all sections, and returns with them the mistakes in list files; the others go into the document's findings.
fn read<'t>(
    document: &mut Document<'t>,
    table: &DeTable<'t>,
    directory: &Path,
    progress: &mut dyn FnMut(Progress<'_>),
) -> (Loaded, Vec<Diagnostic>) {
    let mut root = Section::root(document, table);
    let lists = read_lists(&mut root, directory, progress);
    let mut egresses = read_egresses(&mut root, directory);
    let rules = read_rules(&mut root, &mut egresses);
    let resolver = read_dns(&mut root);
    let mut engine = Config::default();
    read_engine(&mut root, &mut engine);
    let prefilter = read_prefilter(&mut root);
    let control = read_control(&mut root);
    root.finish();

    if !document.is_broken() {
        check_rules(document, &rules);
        // With another mistake corrected it may be used.
        if !document.findings.has_errors() {
            egresses.warn_of_unused(document);
        }
    }
    let egresses = egresses.egresses;
    let names = egresses
        .iter()
        .map(|egress| EgressSpec {
            name: egress.name.clone(),
        })
        .collect();
    let policy = PolicySpec {
        lists: lists.entries,
        rules: into_rules(rules),
        egresses: names,
        resolver,
    };
    let loaded = Loaded {
        policy,
        engine,
        egresses,
        prefilter,
        control,
        sources: lists.files,
        warnings: Vec::new(),
    };
    (loaded, lists.diagnostics)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    fn mistakes(text: &str) -> Vec<String> {
        let found = parse(text, "tungate.toml", Path::new(""), &mut |_| ()).unwrap_err();
        found
            .iter()
            .map(|found| {
                let place = found.place.as_ref().unwrap();
                format!("{}:{} {}", place.line, place.column, found.message)
            })
            .collect()
    }

    #[test]
    fn one_run_finds_every_mistake_in_order_of_the_lines() {
        let text = "[lists]\nentries = [\"deny x\", \"allow 192.0.2.0/24 tcp 0-x\"]\nfile = []\n\n\
                    [[rule]]\nports = [1, 65536]\naction = \"accept\"\n[[rules]]\n";
        assert_eq!(
            mistakes(text),
            [
                "2:18 `x` is not an IP address",
                "2:48 `x` is not a port",
                "3:1 `file` is not a key of [lists]",
                "6:13 65536 is not a port",
                "7:11 `accept` is none of \"direct\", \"drop\", \"reject\", \"redirect\", \"egress\"",
                "8:3 `rules` is not a key of the file",
            ]
        );
    }

    #[test]
    fn what_is_no_toml_hides_no_mistake_elsewhere() {
        let text = "[lists]\nentries = [deny]\n[[rule]]\nname = \"web\naction = \"dorp\"\nports = 80\nports = [80]\n";
        assert_eq!(
            mistakes(text),
            [
                "2:12 `deny` is not a value",
                "4:12 invalid basic string",
                "5:11 `dorp` is none of \"direct\", \"drop\", \"reject\", \"redirect\", \"egress\"",
                "6:9 `ports` is a list, not a number",
                "7:1 duplicate key",
            ]
        );
    }

    #[test]
    fn a_value_left_open_is_one_mistake() {
        let rest = "\naction = \"drop\"\n[[rule]]\naction = \"x\"\n";
        assert_eq!(
            mistakes(&format!("[[rule]]\nports = [80, 90{rest}")),
            ["2:9 this array is not closed"]
        );
        assert_eq!(
            mistakes("lists = { files = []\n"),
            ["1:9 this inline table is not closed"]
        );
        assert_eq!(
            mistakes("lists = { entries = [\"deny 192.0.2.0/24\" }\n"),
            ["1:21 this array is not closed"]
        );
    }

    #[test]
    fn a_broken_header_has_no_consequences() {
        assert_eq!(
            mistakes("[[rule]\naction = \"drop\"\n"),
            ["1:8 unclosed array table"]
        );
        assert_eq!(
            mistakes("[rule]\naction = \"drop\"\n[rule]\naction = \"drop\"\n"),
            ["3:2 duplicate key"]
        );
    }

    #[test]
    fn mistakes_in_list_files_come_after_those_of_the_configuration() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(
            directory.path().join("a.txt"),
            "deny 192.0.2.0/24\ndeny 192.0.2.300\n",
        )
        .unwrap();
        let path = directory.path().join("tungate.toml");
        std::fs::write(&path, "[lists]\nfiles = [\"a.txt\", \"b.txt\"]\n").unwrap();

        let found: Vec<_> = load(&path, &mut |_| ()).unwrap_err().into_iter().collect();

        assert_eq!(found.len(), 2);
        let missing = found[0].place.as_ref().unwrap();
        assert_eq!(
            (missing.line, missing.column, &*missing.text),
            (2, 19, "\"b.txt\"")
        );
        assert!(
            found[0].message.contains("cannot read the list file"),
            "{}",
            found[0]
        );
        assert!(
            found[0].hint.contains("relative to the configuration"),
            "{}",
            found[0]
        );
        assert!(found[1].file.ends_with("a.txt"));
        let wrong = found[1].place.as_ref().unwrap();
        assert_eq!((wrong.line, wrong.column, &*wrong.text), (2, 6, "192.0.2.300"));
    }

    #[test]
    fn list_files_are_relative_to_the_configuration_and_named_as_sources() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("block.txt"), "deny 192.0.2.0/24\n").unwrap();
        let path = directory.path().join("tungate.toml");
        std::fs::write(
            &path,
            "[lists]\nentries = [\"allow ::/0\"]\nfiles = [\"block.txt\"]\n",
        )
        .unwrap();

        let loaded = load(&path, &mut |_| ()).unwrap();

        let entries: Vec<_> = loaded.policy.lists.iter().map(ToString::to_string).collect();
        assert_eq!(entries, ["allow ::/0", "deny 192.0.2.0/24"]);
        assert_eq!(loaded.sources, [path, directory.path().join("block.txt")]);
    }

    #[test]
    fn a_configuration_that_is_missing_or_no_text_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tungate.toml");
        let missing: Vec<_> = load(&path, &mut |_| ()).unwrap_err().into_iter().collect();
        assert_eq!((missing.len(), &missing[0].place), (1, &None));
        assert!(missing[0].message.contains("cannot read the configuration"));

        std::fs::write(&path, b"[lists]\n# caf\xe9\n").unwrap();
        let latin: Vec<_> = load(&path, &mut |_| ()).unwrap_err().into_iter().collect();
        let place = latin[0].place.as_ref().unwrap();
        assert_eq!((place.line, place.column), (2, 6));
        assert!(latin[0].hint.contains("UTF-8"));
    }

    /// The example with every default and example taken out of its comment.
    fn uncommented() -> String {
        let active = |line: &str| match line.strip_prefix('#') {
            Some(rest) if !rest.is_empty() && !rest.starts_with(' ') => rest.to_owned(),
            Some(_) | None => line.to_owned(),
        };
        show_defaults().lines().map(active).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_example_changes_nothing() {
        assert_eq!(
            parse(show_defaults(), "example", Path::new(""), &mut |_| ()).unwrap(),
            Loaded::default()
        );
    }

    #[test]
    fn the_example_shows_the_defaults_and_sound_examples() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("blocklist.txt"), "deny 192.0.2.99\n").unwrap();

        let loaded = parse(&uncommented(), "example", directory.path(), &mut |_| ()).unwrap();

        assert_eq!(
            (loaded.engine, loaded.prefilter),
            (Config::default(), Prefilter::default())
        );
        let entries: Vec<_> = loaded.policy.lists.iter().map(ToString::to_string).collect();
        assert_eq!(
            entries,
            [
                "deny 203.0.113.0/24",
                "allow 203.0.113.7/32 tcp 443",
                "deny 192.0.2.99/32"
            ]
        );
        let rules: Vec<_> = loaded
            .policy
            .rules
            .iter()
            .map(|rule| (rule.name.as_str(), rule.action.name()))
            .collect();
        assert_eq!(rules, [("web", "redirect"), ("office", "egress")]);
        let egresses: Vec<_> = loaded
            .egresses
            .iter()
            .map(|egress| egress.name.as_str())
            .collect();
        assert_eq!(egresses, ["uplink", "office", "backup", "any office"]);
        assert_eq!(loaded.warnings, []);
    }

    #[test]
    fn the_example_has_every_key() {
        let text = uncommented();
        let (mut document, table) = Document::parse("example", &text);
        read(&mut document, table.get_ref(), Path::new(""), &mut |_| ());
        // Kinds of egresses share keys; one may show what another only mentions.
        let family = |section: &str| section.split(" of kind").next().map(str::to_owned);
        let shown = |section: &str, key: &str| {
            document
                .asked
                .iter()
                .any(|(other, asked, found)| family(other) == family(section) && *asked == key && *found)
        };
        let missing: Vec<_> = document
            .asked
            .iter()
            .filter(|(section, key, _)| !shown(section, key))
            .collect();
        assert!(document.asked.len() > 50 && missing.is_empty(), "{missing:?}");
    }

    proptest! {
        #[test]
        fn no_text_panics_the_parser(text in "\\PC*|(.|\n)*") {
            let _ = parse(&text, "tungate.toml", Path::new(""), &mut |_| ());
        }

        #[test]
        fn no_document_of_the_right_words_panics_the_parser(words in vec(select(WORDS), 0..60)) {
            if let Err(found) = parse(&words.concat(), "tungate.toml", Path::new(""), &mut |_| ()) {
                for diagnostic in &found {
                    prop_assert!(!diagnostic.hint.is_empty());
                    prop_assert!(diagnostic.render(false).contains("hint: "));
                }
            }
        }
    }

    const WORDS: &[&str] = &[
        "[",
        "]",
        "[[rule]]\n",
        "[[egress]]\n",
        "[lists]\n",
        "[rule]\n",
        "\n",
        "\r\n",
        " ",
        " = ",
        "\"",
        "'",
        "\"\"\"",
        ",",
        ".",
        "{",
        "}",
        "#",
        "\\",
        "\\u00e9",
        "\u{e9}",
        "\u{feff}",
        "name",
        "clients",
        "ports",
        "protocols",
        "action",
        "to",
        "egress",
        "kind",
        "members",
        "entries",
        "files",
        "80",
        "-1",
        "0x",
        "1979-05-27",
        "true",
        "nan",
        "\"tcp\"",
        "\"drop\"",
        "\"redirect\"",
        "\"egress\"",
        "\"group\"",
        "\"socks5\"",
        "\"192.0.2.0/24\"",
        "\"192.0.2.1/24\"",
        "\"[::1]:0\"",
        "[\"a\"]",
        "[80, \"9-8\"]",
    ];

    #[test]
    fn an_empty_file_is_the_default_configuration() {
        assert_eq!(
            parse("", "tungate.toml", Path::new(""), &mut |_| ()).unwrap(),
            Loaded::default()
        );
    }
}
