//! The report for people: what a network engineer would show a colleague.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::{self, Display, Write as _};
use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::time::Duration;

use clap::builder::styling::{AnsiColor, Style};
use indicatif::{HumanCount, HumanDuration};
use tungate_engine::Timestamp;
use unicode_width::UnicodeWidthStr;

use super::against::{Against, Decision, FlowChange, FlowState, PacketChange};
use super::expect::Mismatch;
use super::packets::Verdict;
use super::{Facts, Report, attempts, explain, table};

/// How many rules and reasons are listed.
const LISTED: usize = 12;

/// The width of a terminal that does not tell its own.
const USUAL_WIDTH: usize = 80;

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const GOOD: Style = AnsiColor::Green.on_default();
const BAD: Style = AnsiColor::Red.on_default().bold();
pub(super) const NOTABLE: Style = AnsiColor::Yellow.on_default();

/// What a report is printed on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Screen {
    /// Columns of the terminal; `None` elsewhere, where lines are as long as they are.
    pub width: Option<usize>,
    /// Whether it shows ANSI colours.
    pub colour: bool,
}

impl Screen {
    /// Standard output as it is: colours on a terminal, unless `NO_COLOR` is set.
    pub fn stdout() -> Self {
        Self::of(&std::io::stdout())
    }

    /// Standard error, likewise.
    pub fn stderr() -> Self {
        Self::of(&std::io::stderr())
    }

    fn of(stream: &(impl IsTerminal + AsFd)) -> Self {
        if !stream.is_terminal() {
            return Self::default();
        }
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let width = terminal_size::terminal_size_of(stream);
        let width = width.map_or(USUAL_WIDTH, |(terminal_size::Width(columns), _)| columns.into());
        Self {
            width: Some(width),
            colour: !no_colour,
        }
    }

    /// What a complaint begins with.
    pub fn error_label(self) -> String {
        self.paint(BAD, "error:")
    }

    /// Where there is more to see; nothing unless somebody sits before the screen.
    pub fn hint(self) -> String {
        match self.width {
            None => String::new(),
            Some(_) => {
                let hint = "more: --packets FILE for each packet, --json for everything, --help for the rest";
                format!("{}\n", self.paint(DIM, hint))
            }
        }
    }

    pub(super) fn paint(self, style: Style, text: impl Display) -> String {
        if self.colour {
            format!("{style}{text}{style:#}")
        } else {
            text.to_string()
        }
    }
}

impl Report {
    /// The report as text, its last line ended.
    pub fn text(&self, screen: Screen) -> String {
        let mut text = Text::new(screen);
        text.facts(&self.facts);
        text.packets(self);
        text.flows(self);
        text.findings(self);
        if let Some(mismatches) = &self.mismatches {
            text.expected(mismatches);
        }
        if let Some(against) = &self.against {
            text.against(against);
        }
        text.text
    }
}

/// A report being written.
pub(super) struct Text {
    screen: Screen,
    text: String,
}

impl Text {
    pub(super) fn new(screen: Screen) -> Self {
        Self {
            screen,
            text: String::new(),
        }
    }

    pub(super) fn finish(self) -> String {
        self.text
    }

    /// The name of what is reported on.
    pub(super) fn title(&mut self, name: &str) {
        let title = self.screen.paint(BOLD, printable(name));
        self.line(title);
    }

    /// Where something could not be read on, and why.
    pub(super) fn damage(&mut self, what: &str) {
        let damage = self.paint_bad(printable(what));
        self.item("damaged", damage);
    }

    /// What a journal holds.
    pub(super) fn journal(&mut self, packets: u64, calls: u64) {
        let packets = count(packets, "packet");
        self.item(
            "entered",
            format!("{packets}, in {} of the engine", count(calls, "call")),
        );
    }

    fn facts(&mut self, facts: &Facts) {
        let totals = &facts.outcome.totals;
        self.title(&facts.capture);
        let format = [&facts.format].into_iter().chain(&facts.link_types);
        self.item(
            "format",
            format.map(String::as_str).collect::<Vec<_>>().join(", "),
        );
        let mut captured = format!(
            "{}, {}",
            count(totals.read, "packet"),
            bytes(totals.captured_bytes)
        );
        if totals.read > 0 {
            let start = humantime::format_rfc3339_seconds(super::start_time(totals));
            let _ = write!(captured, " in {} from {start}", span(totals.duration));
        }
        self.item("captured", captured);
        if let Some(damage) = &facts.outcome.damaged {
            self.damage(&format!("after packet {}: {}", damage.after_packet, damage.what));
        }
        let mut policy = match facts.policy.as_str() {
            "default" => "default: all direct, no lists".to_owned(),
            files => printable(files),
        };
        for (time, file) in &facts.changes {
            let _ = write!(policy, "; {} from {} on", printable(file), plain_seconds(*time));
        }
        self.item("policy", policy);
    }

    fn packets(&mut self, report: &Report) {
        let totals = &report.facts.outcome.totals;
        let mut parts = vec![
            format!("{} from clients", HumanCount(totals.from_client)),
            format!("{} from targets", HumanCount(totals.from_target)),
        ];
        if totals.not_ip > 0 {
            parts.push(format!("{} not IP", HumanCount(totals.not_ip)));
        }
        if totals.unreadable > 0 {
            parts.push(format!(
                "{} unreadable (unknown link type, or no usable IP header)",
                HumanCount(totals.unreadable)
            ));
        }
        self.item("packets", parts.join(", "));
        let mut verdicts = format!("{} pass", HumanCount(totals.pass));
        if totals.drop > 0 {
            verdicts = format!(
                "{verdicts}, {}",
                self.paint_bad(format!("{} drop", HumanCount(totals.drop)))
            );
        }
        self.item("verdicts", verdicts);
        let reasons = report
            .facts
            .outcome
            .by_reason
            .iter()
            .map(|(&name, &count)| (name, count, explain::reason(name)));
        self.list("", reasons.collect());
        let by_rule = &report.facts.outcome.by_rule;
        if by_rule.keys().any(|name| name != "default") {
            self.list(
                "rules",
                by_rule
                    .iter()
                    .map(|(name, &count)| (name.as_str(), count, ""))
                    .collect(),
            );
        }
    }

    fn flows(&mut self, report: &Report) {
        let flows = &report.flows;
        if flows.count == 0 {
            return self.item("flows", "none".to_owned());
        }
        let (protocols, ends) = (counts(&flows.by_protocol), counts(&flows.by_end));
        self.item(
            "flows",
            format!("{protocols}; {}; ended {ends}", counts(&flows.by_verdict)),
        );
        let grouped: u64 = flows.attempts.iter().map(|(_, group)| group.flows).sum();
        let others = flows.count - grouped;
        if others > 0 {
            self.line(String::new());
            let mut lines = table::flows(&flows.largest, self.screen.width).into_iter();
            let heading = self.screen.paint(DIM, lines.next().unwrap_or_default());
            self.line(heading);
            lines.for_each(|line| self.line(line));
            match others - flows.largest.len() as u64 {
                0 => {}
                more => self.line(format!(
                    "  ... and {} smaller ones; --json lists all",
                    HumanCount(more)
                )),
            }
            self.line(String::new());
        }
        self.attempts(&flows.attempts);
    }

    /// Floods and scans, a line each.
    fn attempts(&mut self, groups: &[(attempts::Kind, attempts::Group)]) {
        let mut label = "attempts";
        for line in attempts::lines(groups, LISTED) {
            self.item(std::mem::take(&mut label), line);
        }
        self.more(
            groups.len() as u64,
            groups.len().min(LISTED),
            "groups of attempts",
        );
    }

    fn findings(&mut self, report: &Report) {
        let totals = &report.facts.outcome.totals;
        let anomalies = &report.flows.by_anomaly;
        let anomalies = anomalies
            .iter()
            .map(|(&name, &count)| (name, count, explain::anomaly(name)));
        self.list("anomalies", anomalies.collect());
        if totals.repaired_checksums > 0 {
            let packets = count(totals.repaired_checksums, "packet");
            self.item(
                "checksums",
                format!("of {packets} repaired: left to the network card when captured"),
            );
        }
        if totals.discarded_after_reset > 0 {
            let discarded = bytes(totals.discarded_after_reset);
            self.item(
                "discarded",
                format!("{discarded} that came after the other side's reset"),
            );
        }
        self.fidelity(totals.fidelity_exact, totals.fidelity_flows);
        self.parity(totals.parity_disagreements, totals.parity_checked);
        self.item("digest", report.facts.outcome.digest.clone());
    }

    pub(super) fn fidelity(&mut self, exact: u64, flows: u64) {
        if flows == 0 {
            return self.item("fidelity", "no TCP flow was relayed".to_owned());
        }
        let style = if exact == flows { GOOD } else { NOTABLE };
        let exact = self
            .screen
            .paint(style, format!("{} of {}", HumanCount(exact), HumanCount(flows)));
        self.item(
            "fidelity",
            format!("{exact} relayed TCP flows came out byte for byte as captured"),
        );
    }

    pub(super) fn parity(&mut self, disagreements: u64, checked: u64) {
        let packets = count(checked, "client packet");
        let text = match disagreements {
            0 if checked == 0 => "no client packet to compare pre-filter and engine by".to_owned(),
            0 => format!("pre-filter and engine agree on {packets}"),
            disagreements => {
                let contradict = format!("contradict each other on {}", HumanCount(disagreements));
                format!(
                    "pre-filter and engine {} of {packets}: please report it",
                    self.paint_bad(contradict)
                )
            }
        };
        self.item("parity", text);
    }

    pub(super) fn expected(&mut self, mismatches: &[Mismatch]) {
        if mismatches.is_empty() {
            let all = self.screen.paint(GOOD, "all as expected");
            return self.item("expected", all);
        }
        let mismatched = match mismatches.len() {
            1 => "1 expectation does not hold".to_owned(),
            more => format!("{} expectations do not hold", HumanCount(more as u64)),
        };
        let mismatched = self.paint_bad(mismatched);
        self.item("expected", mismatched);
        for mismatch in mismatches {
            self.line(format!("      {mismatch}"));
        }
    }

    fn against(&mut self, against: &Against) {
        let (packets, flows) = (&against.packets, &against.flows);
        let policy = printable(&against.policy);
        if against.differs() {
            let change = format!(
                "{} and {} change",
                count(packets.changed, "packet"),
                count(flows.changed, "flow")
            );
            let change = self.screen.paint(NOTABLE, change);
            self.item("against", format!("{policy}: {change}"));
        } else {
            let same = self.screen.paint(GOOD, "the same effect");
            self.item("against", format!("{policy}: {same}"));
        }
        if packets.changed > 0 {
            let (to_drop, to_pass) = (HumanCount(packets.pass_to_drop), HumanCount(packets.drop_to_pass));
            self.line(format!(
                "      packets: {to_drop} pass -> drop, {to_pass} drop -> pass"
            ));
        }
        if packets.other_rule + flows.other_rule > 0 {
            let packets = count(packets.other_rule, "packet");
            let flows = count(flows.other_rule, "flow");
            self.line(format!(
                "      another rule decides about {packets} and {flows}, to the same effect"
            ));
        }
        for change in &against.first_flows {
            self.flow_change(change);
        }
        self.more(flows.changed, against.first_flows.len(), "flows");
        for PacketChange {
            number,
            time,
            before,
            after,
            ..
        } in &against.first_packets
        {
            self.line(format!(
                "      packet {number} at {time:.6} s: {before} -> {after}"
            ));
        }
        self.more(packets.changed, against.first_packets.len(), "packets");
    }

    fn flow_change(&mut self, change: &FlowChange) {
        let FlowChange {
            first_packet,
            protocol,
            client,
            target,
            name,
            ..
        } = change;
        let name = name
            .as_deref()
            .map_or(String::new(), |name| format!(" ({})", printable(name)));
        self.line(format!(
            "      {protocol} {client} to {target}{name}, from packet {first_packet}"
        ));
        for (when, state) in [("before", &change.before), ("after", &change.after)] {
            match state {
                None => self.line(format!("        {when:6}  no such flow")),
                Some(state) => self.line(format!("        {when:6}  {state}")),
            }
        }
    }

    fn more(&mut self, all: u64, shown: usize, what: &str) {
        match all - shown as u64 {
            0 => {}
            more => self.line(format!(
                "      ... and {} more {what}; --json lists all",
                HumanCount(more)
            )),
        }
    }

    /// A label and its text.
    pub(super) fn item(&mut self, label: &str, text: String) {
        let label = self.screen.paint(BOLD, format!("{label:<9}"));
        self.line(format!("{label}  {text}"));
    }

    /// Names with a number and a phrase each, the highest numbers first, the first of them beside the label.
    fn list(&mut self, mut label: &str, mut entries: Vec<(&str, u64, &str)>) {
        entries.sort_by_key(|&(name, count, _)| (Reverse(count), name.to_owned()));
        let shown = &entries[..entries.len().min(LISTED)];
        let names: Vec<String> = shown.iter().map(|&(name, ..)| printable(name)).collect();
        let name_width = names.iter().map(|name| name.width()).max().unwrap_or(0);
        let counts: Vec<String> = shown
            .iter()
            .map(|&(_, count, _)| HumanCount(count).to_string())
            .collect();
        let count_width = counts.iter().map(String::len).max().unwrap_or(0);
        for ((name, count), &(.., phrase)) in names.iter().zip(&counts).zip(shown) {
            let padding = " ".repeat(name_width - name.width());
            let text = format!("{count:>count_width$}  {name}{padding}  {phrase}");
            self.item(std::mem::take(&mut label), text.trim_end().to_owned());
        }
        self.more(entries.len() as u64, shown.len(), "names");
    }

    fn paint_bad(&self, text: String) -> String {
        self.screen.paint(BAD, text)
    }

    fn line(&mut self, text: String) {
        self.text += &text;
        self.text.push('\n');
    }
}

impl Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, expected, actual) = (
            printable(&self.what),
            printable(&self.expected),
            printable(&self.actual),
        );
        write!(f, "{what}: expected {expected}, found {actual}")
    }
}

/// Such as `drop by "deny 192.0.2.0/24" (list-destination)`.
impl Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.verdict.map_or("not judged", Verdict::name))?;
        f.write_str(&by(self.rule.as_deref()))?;
        self.reason.map_or(Ok(()), |reason| write!(f, " ({reason})"))
    }
}

impl Display for FlowState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.verdict)?;
        if let Some(egress) = &self.egress {
            write!(f, " {}", printable(egress))?;
        }
        f.write_str(&by(self.rule.as_deref()))?;
        let (to_target, to_client) = (bytes(self.to_target.bytes), bytes(self.to_client.bytes));
        write!(
            f,
            ", end {}, {to_target} to target, {to_client} to client",
            self.end
        )
    }
}

/// Such as ` by "deny 192.0.2.0/24"`; nothing for the default, which nobody has written.
pub(super) fn by(rule: Option<&str>) -> String {
    match rule {
        None | Some("default") => String::new(),
        Some(rule) => format!(" by \"{}\"", printable(rule)),
    }
}

/// `text` without what a terminal acts on or hides: control characters and changes of direction become escapes.
pub(super) fn printable(text: &str) -> String {
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    let escaped = |c: char| {
        if hidden(c) {
            c.escape_default().to_string()
        } else {
            c.to_string()
        }
    };
    text.chars().map(escaped).collect()
}

/// Such as `17.492054 s`, or `7384.5 s (2 hours)` where seconds say little.
fn span(time: Timestamp) -> String {
    let seconds = plain_seconds(time);
    match Duration::from_nanos(time.as_nanos()) {
        short if short < Duration::from_secs(120) => seconds,
        long => format!("{seconds} ({})", HumanDuration(long)),
    }
}

/// Such as `17.492054 s`, with no more decimals than there are.
fn plain_seconds(time: Timestamp) -> String {
    let seconds = time.to_string();
    format!("{} s", seconds.trim_end_matches('0').trim_end_matches('.'))
}

/// Bytes with three digits that count, such as `83.5 kB`.
pub(super) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    while value >= 999.5 {
        value /= 1000.0;
        unit = units.next().unwrap_or_default();
    }
    let decimals = if unit == "B" || value >= 99.95 {
        0
    } else {
        1 + usize::from(value < 9.995)
    };
    format!("{value:.decimals$} {unit}")
}

/// `1 packet`, `2,000 packets`.
pub(super) fn count(number: u64, what: &str) -> String {
    format!(
        "{} {what}{}",
        HumanCount(number),
        if number == 1 { "" } else { "s" }
    )
}

/// `12 fin, 1 open`, the highest first.
fn counts(by_name: &BTreeMap<&'static str, u64>) -> String {
    let mut counts: Vec<_> = by_name.iter().collect();
    counts.sort_by_key(|&(name, count)| (Reverse(count), name));
    counts
        .iter()
        .map(|(name, count)| format!("{} {name}", HumanCount(**count)))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits_that_count() {
        for (count, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.00 kB"),
            (9_994, "9.99 kB"),
            (9_996, "10.0 kB"),
            (83_457, "83.5 kB"),
            (99_960, "100 kB"),
            (999_499, "999 kB"),
            (999_500, "1.00 MB"),
            (u64::MAX, "18.4 EB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn seconds_have_as_many_decimals_as_they_need() {
        let text = |nanos| plain_seconds(Timestamp::from_nanos(nanos));
        assert_eq!(text(17_492_054_000), "17.492054 s");
        assert_eq!(text(20_000_000_000), "20 s");
        assert_eq!(text(0), "0 s");
        assert_eq!(text(1), "0.000000001 s");
        assert_eq!(
            span(Timestamp::from_nanos(7_384_500_000_000)),
            "7384.5 s (2 hours)"
        );
    }
}
