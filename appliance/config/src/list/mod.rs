//! List files: a million lines in a fraction of a second, and a place for every line that is wrong.

mod section;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::str;

use tungate_engine::policy::{ListAction, ListEntry, ListProtocol};

pub(crate) use section::read_lists;

use crate::address::{parse_network, parse_ports};
use crate::diagnostic::{Diagnostic, Diagnostics, Findings, Place, Problem, Severity, nearest, quoted};

/// Lines between two calls of the progress callback.
const LINES_PER_PROGRESS: usize = 1 << 16;
/// Largest list file, in bytes: some 40 million entries.
const LARGEST_FILE: u64 = 1 << 30;

/// How far the reading of a list file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The file being read.
    pub file: &'a Path,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Entries found in this file so far.
    pub entries: usize,
}

/// A list, read without mistakes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    /// The entries in the order of their lines.
    pub entries: Vec<ListEntry>,
    /// What is probably not meant as it is written.
    pub warnings: Vec<Diagnostic>,
}

/// Reads the list file `path`, for entries that come by another way than a configuration.
///
/// # Errors
///
/// Every line that is wrong, or why the file cannot be read.
pub fn list_file(path: &Path, progress: &mut dyn FnMut(Progress<'_>)) -> Result<List, Diagnostics> {
    let mut entries = Vec::new();
    let diagnostics = match read_limited(path, LARGEST_FILE) {
        Ok(text) => read_lines(&text, &path.to_string_lossy(), path, &mut entries, progress),
        Err(error) => {
            let mut findings = Findings::new(&path.to_string_lossy());
            findings.push(
                Severity::Error,
                None,
                format!("cannot read the list file: {error}"),
                file_hint(&error),
            );
            findings.into_sorted()
        }
    };
    Diagnostics::from_errors(diagnostics).map(|warnings| List { entries, warnings })
}

/// Reads the lines of a list; `name` stands for the file in diagnostics.
///
/// A line is `deny|allow CIDR [tcp|udp|icmp|any] [PORT|LO-HI|any]`; `#` begins a comment, which may hold any bytes.
///
/// # Errors
///
/// Every line that is wrong.
pub fn parse_list(text: &[u8], name: &str) -> Result<List, Diagnostics> {
    let mut entries = Vec::new();
    let diagnostics = read_lines(text, name, Path::new(name), &mut entries, &mut |_| ());
    Diagnostics::from_errors(diagnostics).map(|warnings| List { entries, warnings })
}

/// Appends the entries of a list to `entries` and returns what is wrong with the others.
pub(crate) fn read_lines(
    text: &[u8],
    name: &str,
    path: &Path,
    entries: &mut Vec<ListEntry>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Vec<Diagnostic> {
    let before = entries.len();
    let mut findings = Findings::new(name);
    let lines = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let mut done = text.len() - lines.len();
    for (index, line) in lines.split_inclusive(|&byte| byte == b'\n').enumerate() {
        if index % LINES_PER_PROGRESS == 0 {
            let entries = entries.len() - before;
            progress(Progress {
                file: path,
                done: done as u64,
                total: text.len() as u64,
                entries,
            });
        }
        done += line.len();
        match parse_line(line) {
            Ok(None) => {}
            Ok(Some(entry)) => {
                if let Some(problem) = never_fits(&entry, line) {
                    report(&mut findings, problem, index + 1, line);
                }
                entries.push(entry);
            }
            Err(problem) => report(&mut findings, *problem, index + 1, line),
        }
    }
    let entries = entries.len() - before;
    progress(Progress {
        file: path,
        done: done as u64,
        total: text.len() as u64,
        entries,
    });
    findings.into_sorted()
}

/// Reads one line, with or without its end; `None` when there is nothing but blanks or a comment.
pub(crate) fn parse_line(line: &[u8]) -> Result<Option<ListEntry>, Box<Problem>> {
    let mut words = Words { line, at: 0 };
    let Some(first) = words.next() else {
        return Ok(None);
    };
    let action = match first.bytes {
        b"deny" => ListAction::Deny,
        b"allow" => ListAction::Allow,
        _ => return Err(Box::new(wrong_action(first))),
    };
    let Some(second) = words.next() else {
        return Err(Box::new(Problem::at(
            first.start..first.end(),
            "the network is missing",
            format!("write, for instance, `{} 192.0.2.0/24`", first.lossy()),
        )));
    };
    let network = second.parse(parse_network)?;
    let mut entry = ListEntry {
        action,
        network,
        protocol: ListProtocol::Any,
        ports: None,
        expires: None,
    };

    let Some(mut word) = words.next() else {
        return Ok(Some(entry));
    };
    if let Some(protocol) = protocol(word.bytes) {
        entry.protocol = protocol;
        match words.next() {
            None => return Ok(Some(entry)),
            Some(next) => word = next,
        }
    } else if !word.bytes[0].is_ascii_digit() {
        return Err(Box::new(wrong_protocol(word)));
    }
    if word.bytes != b"any" {
        entry.ports = Some(word.parse(parse_ports)?);
    }
    match words.next() {
        None => Ok(Some(entry)),
        Some(more) => Err(Box::new(Problem::at(
            more.start..words.end(),
            format!("`{}` is too much on this line", more.lossy()),
            "a line is `deny|allow CIDR [tcp|udp|icmp|any] [PORT|LO-HI|any]`; put `#` before a comment",
        ))),
    }
}

/// Warns of an entry that fits no packet.
pub(crate) fn never_fits(entry: &ListEntry, line: &[u8]) -> Option<Problem> {
    if entry.protocol != ListProtocol::Icmp || entry.ports.is_none() {
        return None;
    }
    let ports = Words { line, at: 0 }.nth(3)?;
    Some(Problem {
        severity: Severity::Warning,
        ..Problem::at(
            ports.start..ports.end(),
            "ICMP has no ports, so this entry fits no packet",
            "leave out the port",
        )
    })
}

/// Reads a whole file, unless it is larger than `largest` bytes.
pub(crate) fn read_limited(path: &Path, largest: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut text = Vec::new();
    text.try_reserve_exact(file.metadata()?.len().min(largest) as usize + 1)?;
    file.take(largest + 1).read_to_end(&mut text)?;
    if text.len() as u64 > largest {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it is larger than {largest} bytes"),
        ));
    }
    Ok(text)
}

/// The way out when a file cannot be read.
pub(crate) fn file_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "check the name; names in a configuration are relative to the configuration file"
        }
        io::ErrorKind::PermissionDenied => "let the user who runs this read the file",
        io::ErrorKind::IsADirectory => "name a file, not a directory",
        io::ErrorKind::FileTooLarge => "check that this is the right file",
        _ => "check the file and the disk it is on",
    }
}

/// Adds the problem of one line to the findings.
fn report(findings: &mut Findings, problem: Problem, number: usize, line: &[u8]) {
    if findings.is_full() {
        return findings.count(problem.severity);
    }
    let place = Place::in_line(number, line.trim_ascii_end(), problem.span);
    findings.push(problem.severity, Some(place), problem.message, problem.hint);
}

fn protocol(word: &[u8]) -> Option<ListProtocol> {
    match word {
        b"tcp" => Some(ListProtocol::Tcp),
        b"udp" => Some(ListProtocol::Udp),
        b"icmp" => Some(ListProtocol::Icmp),
        b"any" => Some(ListProtocol::Any),
        _ => None,
    }
}

fn wrong_action(word: Word<'_>) -> Problem {
    let text = word.lossy();
    let span = word.start..word.end();
    if word.parse(parse_network).is_ok() {
        return Problem::at(
            span,
            format!("`{text}` has no action"),
            format!("write `deny {text}`; for a whole file: sed -E 's/^[0-9a-fA-F]/deny &/' FILE"),
        );
    }
    let hint = match nearest(&text, ["deny", "allow"]) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => "begin the line with `deny` or `allow`".to_owned(),
    };
    Problem::at(span, format!("`{text}` is not an action"), hint)
}

fn wrong_protocol(word: Word<'_>) -> Problem {
    let text = word.lossy();
    let hint = match nearest(&text, ["tcp", "udp", "icmp", "any"]) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None if text.starts_with("icmp") || text.starts_with("ipv6-icmp") => {
            "write `icmp`, which means ICMP and ICMPv6".to_owned()
        }
        None => "use tcp, udp, icmp or any, or a port; put `#` before a comment".to_owned(),
    };
    Problem::at(
        word.start..word.end(),
        format!("`{text}` is not a protocol"),
        hint,
    )
}

/// The words of a line before its comment.
struct Words<'a> {
    line: &'a [u8],
    at: usize,
}

/// A word and where it begins in its line.
#[derive(Clone, Copy)]
struct Word<'a> {
    start: usize,
    bytes: &'a [u8],
}

impl Words<'_> {
    /// The end of the last word before the comment.
    fn end(&self) -> usize {
        let comment = self
            .line
            .iter()
            .position(|&byte| byte == b'#')
            .unwrap_or(self.line.len());
        self.line[..comment].trim_ascii_end().len()
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = Word<'a>;

    fn next(&mut self) -> Option<Word<'a>> {
        let rest = &self.line[self.at..];
        let start = self.at + rest.iter().position(|byte| !byte.is_ascii_whitespace())?;
        let rest = &self.line[start..];
        let length = rest
            .iter()
            .position(|&byte| byte.is_ascii_whitespace() || byte == b'#')
            .unwrap_or(rest.len());
        if length == 0 {
            self.at = self.line.len();
            return None;
        }
        self.at = start + length;
        Some(Word {
            start,
            bytes: &rest[..length],
        })
    }
}

impl Word<'_> {
    fn end(&self) -> usize {
        self.start + self.bytes.len()
    }

    fn lossy(&self) -> String {
        quoted(&String::from_utf8_lossy(self.bytes))
    }

    /// Reads the word with `parse`, whose problem it places in the line.
    fn parse<T>(&self, parse: impl Fn(&str) -> Result<T, Problem>) -> Result<T, Box<Problem>> {
        match str::from_utf8(self.bytes) {
            Ok(text) => parse(text).map_err(|problem| Box::new(problem.shifted(self.start))),
            Err(_) => Err(Box::new(Problem::at(
                self.start..self.end(),
                format!("`{}` is not UTF-8", self.lossy()),
                "only comments may hold other characters",
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use ipnet::IpNet;
    use proptest::prelude::*;
    use tungate_engine::policy::PortRange;

    use super::*;
    use crate::testing::{Marked, assert_only};

    fn entries(text: &str) -> Vec<String> {
        parse_list(text.as_bytes(), "list")
            .unwrap()
            .entries
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    /// Reads the marked text as a list, in which there must be this one mistake, at the mark.
    #[track_caller]
    fn mistake(marked: &str, message: &str, hint: &str) {
        let marked = Marked::new(marked);
        let found = parse_list(marked.text.as_bytes(), "list").unwrap_err();
        assert_only(found.iter(), &marked, message, hint);
    }

    #[test]
    fn a_list_holds_entries_comments_and_empty_lines() {
        let text = "\u{feff}# block these\r\n\r\ndeny 203.0.113.0/24\r\n\tallow  203.0.113.7/32 tcp 443 # but not this\r\n\
                    deny 2001:db8::/32 any 8000-8100#tight\ndeny 192.0.2.1\ndeny ::/0 icmp\ndeny 0.0.0.0/0 udp any";
        assert_eq!(
            entries(text),
            [
                "deny 203.0.113.0/24",
                "allow 203.0.113.7/32 tcp 443",
                "deny 2001:db8::/32 any 8000-8100",
                "deny 192.0.2.1/32",
                "deny ::/0 icmp",
                "deny 0.0.0.0/0 udp",
            ]
        );
    }

    #[test]
    fn a_port_may_follow_the_network() {
        assert_eq!(
            entries("deny 192.0.2.0/24 53\ndeny 192.0.2.0/24 any\n"),
            ["deny 192.0.2.0/24 any 53", "deny 192.0.2.0/24"]
        );
    }

    #[test]
    fn an_ipv4_mapped_network_is_an_ipv6_network() {
        let list = parse_list(b"deny ::ffff:192.0.2.0/120", "list").unwrap();
        assert!(matches!(list.entries[0].network, IpNet::V6(_)));
    }

    #[test]
    fn a_comment_may_hold_any_bytes() {
        assert_eq!(
            parse_list(b"deny 192.0.2.0/24 # caf\xe9\n# \xff\xfe\x00\n", "list")
                .unwrap()
                .entries
                .len(),
            1
        );
    }

    #[test]
    fn lines_that_are_wrong_are_named_with_their_place_and_the_way_out() {
        mistake(
            "deny 192.0.2.0/24\n<<203.0.113.0/24>>\n",
            "has no action",
            "write `deny 203.0.113.0/24`",
        );
        mistake(
            "<<dney>> 192.0.2.0/24",
            "`dney` is not an action",
            "did you mean `deny`?",
        );
        mistake(
            "<<Deny>> 192.0.2.0/24",
            "`Deny` is not an action",
            "did you mean `deny`?",
        );
        mistake(
            "<<0.0.0.0>> ads.example\n",
            "has no action",
            "write `deny 0.0.0.0`",
        );
        mistake(
            "  <<deny>>  # nothing",
            "the network is missing",
            "`deny 192.0.2.0/24`",
        );
        mistake(
            "deny <<192.0.2.256>>/24",
            "`192.0.2.256` is not an IP address",
            "at most 255",
        );
        mistake(
            "deny <<192.0.02.0>>/24",
            "`192.0.02.0` is not an IP address",
            "write 192.0.2.0 if it is decimal",
        );
        mistake(
            "deny <<10>>/8",
            "`10` is not an IP address",
            "write all four numbers: 10.0.0.0",
        );
        mistake("deny <<fe80::1%eth0>>", "not an IP address", "leave out the zone");
        mistake(
            "deny <<ads.example.com>>",
            "not an IP address",
            "names are not looked up",
        );
        mistake(
            "deny 192.0.2.0/<<33>>",
            "`33` is not a prefix length of IPv4",
            "0 to 32",
        );
        mistake(
            "deny 192.0.2.0/<<024>>",
            "`024` is not a prefix length",
            "0 to 32",
        );
        mistake("deny 192.0.2.0/<<+8>>", "`+8` is not a prefix length", "0 to 32");
        mistake(
            "deny 2001:db8::/<<129>>",
            "`129` is not a prefix length of IPv6",
            "0 to 128",
        );
        mistake(
            "deny 192.0.2.0/<<255.255.255.0>>",
            "not a prefix length",
            "192.0.2.0/24",
        );
        mistake(
            "deny <<192.0.2.7/24>>",
            "bits set behind its prefix",
            "write 192.0.2.0/24 for the network, or 192.0.2.7/32",
        );
        mistake(
            "deny <<2001:db8::1/32>>",
            "bits set behind its prefix",
            "write 2001:db8::/32",
        );
        mistake(
            "deny 192.0.2.0/24 <<tpc>> 80",
            "`tpc` is not a protocol",
            "did you mean `tcp`?",
        );
        mistake(
            "deny 192.0.2.0/24 <<icmpv6>>",
            "`icmpv6` is not a protocol",
            "icmp",
        );
        mistake("deny 192.0.2.0/24 <<sctp>>", "`sctp` is not a protocol", "tcp");
        mistake(
            "deny 192.0.2.0/24 tcp <<65536>>",
            "`65536` is not a port",
            "0 to 65535",
        );
        mistake(
            "deny 192.0.2.0/24 tcp <<080>>",
            "`080` is not a port",
            "0 to 65535",
        );
        mistake(
            "deny 192.0.2.0/24 tcp <<http>>",
            "`http` is not a port",
            "0 to 65535",
        );
        mistake(
            "deny 192.0.2.0/24 tcp 80-<<x>>",
            "`x` is not a port",
            "0 to 65535",
        );
        mistake(
            "deny 192.0.2.0/24 tcp <<90-80>>",
            "ends before it begins",
            "write 80-90",
        );
        mistake(
            "deny 192.0.2.0/24 tcp 80 <<from the office>> # x",
            "is too much on this line",
            "put `#` before a comment",
        );
        mistake(
            "deny 192.0.2.0/24 <<caf\u{e9}>>",
            "is not a protocol",
            "put `#` before a comment",
        );
    }

    #[test]
    fn every_wrong_line_is_reported_up_to_a_hundred_and_the_rest_are_counted() {
        let text: String = (0..1_000).map(|n| format!("192.0.2.{}\n", n % 256)).collect();
        let found: Vec<_> = parse_list(text.as_bytes(), "list")
            .unwrap_err()
            .into_iter()
            .collect();
        assert_eq!(found.len(), 101);
        assert_eq!(found[99].place.as_ref().unwrap().line, 100);
        assert_eq!(found[100].place, None);
        assert_eq!(found[100].message, "900 more mistakes in this file are not shown");
    }

    #[test]
    fn warnings_refuse_no_list_however_many_they_are() {
        let list = parse_list("deny 192.0.2.0/24 icmp 8\n".repeat(1_000).as_bytes(), "list").unwrap();
        assert_eq!((list.entries.len(), list.warnings.len()), (1_000, 101));
        assert_eq!(
            list.warnings[100].message,
            "900 more warnings in this file are not shown"
        );
    }

    #[test]
    fn an_icmp_entry_with_a_port_is_kept_with_a_warning() {
        let list = parse_list(b"deny 192.0.2.0/24 icmp 8", "list").unwrap();
        assert_eq!(list.entries.len(), 1);
        assert_only(
            list.warnings.iter(),
            &Marked::new("deny 192.0.2.0/24 icmp <<8>>"),
            "ICMP has no ports",
            "leave out",
        );
    }

    #[test]
    fn a_missing_list_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("missing.txt");
        let found: Vec<_> = list_file(&path, &mut |_| ()).unwrap_err().into_iter().collect();
        assert_eq!(&*found[0].file, path.to_str().unwrap());
        assert!(
            found[0].message.starts_with("cannot read the list file: "),
            "{}",
            found[0].message
        );
        assert!(
            list_file(directory.path(), &mut |_| ()).is_err(),
            "a directory is no list"
        );
    }

    #[test]
    fn a_million_lines_load_with_progress() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("million.txt");
        let mut text = String::from("# a million networks\n");
        for n in 0..1_000_000_u32 {
            writeln!(text, "deny {}/24 tcp 443", Ipv4Addr::from(0x1000_0000 + (n << 8))).unwrap();
        }
        std::fs::write(&path, &text).unwrap();

        let mut seen = Vec::new();
        let list = list_file(&path, &mut |progress| {
            seen.push((progress.done, progress.entries))
        })
        .unwrap();

        assert_eq!(list.entries.len(), 1_000_000);
        assert_eq!(list.entries[999_999].to_string(), text.lines().last().unwrap());
        assert!(seen.len() > 10 && seen.is_sorted(), "{seen:?}");
        assert_eq!(seen.last(), Some(&(text.len() as u64, 1_000_000)));
    }

    fn any_entry() -> impl Strategy<Value = ListEntry> {
        let network = prop_oneof![
            (any::<u32>(), 0..=32_u8).prop_map(|(bits, length)| (IpAddr::V4(Ipv4Addr::from(bits)), length)),
            (any::<u128>(), 0..=128_u8).prop_map(|(bits, length)| (IpAddr::V6(Ipv6Addr::from(bits)), length)),
            (any::<u32>(), 96..=128_u8)
                .prop_map(|(bits, length)| (IpAddr::V6(Ipv4Addr::from(bits).to_ipv6_mapped()), length)),
        ];
        let action = prop_oneof![Just(ListAction::Deny), Just(ListAction::Allow)];
        let protocol = prop_oneof![
            Just(ListProtocol::Tcp),
            Just(ListProtocol::Udp),
            Just(ListProtocol::Icmp),
            Just(ListProtocol::Any)
        ];
        let ports = proptest::option::of(any::<(u16, u16)>()).prop_map(|ports| {
            ports.map(|(a, b)| PortRange {
                first: a.min(b),
                last: a.max(b),
            })
        });
        (action, network, protocol, ports).prop_map(|(action, (address, length), protocol, ports)| {
            ListEntry {
                action,
                network: IpNet::new_assert(address, length).trunc(),
                protocol,
                ports,
                expires: None,
            }
        })
    }

    proptest! {
        #[test]
        fn an_entry_reads_back_as_it_prints(entry in any_entry()) {
            prop_assert_eq!(parse_line(entry.to_string().as_bytes()).unwrap(), Some(entry));
        }

        #[test]
        fn no_bytes_panic_the_parser(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_list(&bytes, "list");
        }

        #[test]
        fn no_line_of_the_right_words_panics_the_parser(
            words in proptest::collection::vec(
                proptest::sample::select(vec!["deny", "allow", " ", "\t", "192.0.2.0", "/", "24", "2001:db8::", "tcp", "any",
                    "80", "-", "#", "\n", "\r", "\u{e9}", "%", ".", ":", "[", "]"]), 0..12),
        ) {
            let text = words.concat();
            if let Err(found) = parse_list(text.as_bytes(), "list") {
                prop_assert!(!found.render(false).is_empty() && !found.render(true).is_empty());
            }
        }
    }
}
