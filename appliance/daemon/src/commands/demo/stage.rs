//! What is shown, and what came of it.

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tungate_engine::policy::ListEntry;

use super::notes::Note;
use crate::commands::text::bytes;

/// How long the appliance may take to say what it does.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time to read, where somebody reads.
const PAUSE: Duration = Duration::from_millis(700);

/// Standard output: colours and pauses are for terminals.
pub(super) struct Screen {
    is_terminal: bool,
    has_colour: bool,
}

#[derive(Clone, Copy)]
enum Style {
    Bold,
    Dim,
    Green,
    Red,
    Yellow,
}

impl Screen {
    pub(super) fn new() -> Self {
        let is_terminal = io::stdout().is_terminal();
        Self {
            is_terminal,
            has_colour: is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        }
    }

    fn styled(&self, style: Style, text: &str) -> String {
        if !self.has_colour {
            return text.to_owned();
        }
        let code = match style {
            Style::Bold => 1,
            Style::Dim => 2,
            Style::Green => 32,
            Style::Red => 31,
            Style::Yellow => 33,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// Writes a line. Who closes the output early has seen enough.
    fn line(&self, text: &str) {
        let _ = writeln!(io::stdout(), "{text}");
    }
}

/// The scenes' view of screen and appliance.
pub(super) struct Stage<'a> {
    screen: &'a Screen,
    notes: Receiver<Note>,
    change_list: &'a dyn Fn(Vec<ListEntry>),
    shown: u32,
    failed: Vec<String>,
}

impl<'a> Stage<'a> {
    pub(super) fn new(
        screen: &'a Screen,
        notes: Receiver<Note>,
        change_list: &'a dyn Fn(Vec<ListEntry>),
    ) -> Self {
        Self {
            screen,
            notes,
            change_list,
            shown: 0,
            failed: Vec::new(),
        }
    }

    /// Says something that is not checked.
    pub(super) fn say(&self, text: &str) {
        self.screen.line(text);
    }

    /// Plays a scene, which ends with what it has shown to be true.
    pub(super) fn scene(&mut self, title: &str, play: impl FnOnce(&mut Self) -> Result<String>) {
        self.shown += 1;
        self.screen
            .line(&format!("\n{}", self.screen.styled(Style::Bold, title)));
        while self.notes.try_recv().is_ok() {} // of scenes before
        let line = match play(self) {
            Ok(truth) => format!("  {} {truth}", self.screen.styled(Style::Green, "✓")),
            Err(error) => {
                self.failed.push(title.to_owned());
                format!("  {} {error:#}", self.screen.styled(Style::Red, "✗ failed:"))
            }
        };
        self.screen.line(&line);
        self.pause();
    }

    /// Whether somebody may be watching.
    pub(super) fn is_watched(&self) -> bool {
        self.screen.is_terminal
    }

    /// Waits for whoever reads.
    fn pause(&self) {
        if self.is_watched() {
            std::thread::sleep(PAUSE);
        }
    }

    /// Shows how far something is, on a terminal; the next line takes its place.
    pub(super) fn progress(&self, text: &str) {
        if self.screen.is_terminal {
            let mut output = io::stdout();
            let _ = write!(output, "\r\x1b[K  {}\r", self.screen.styled(Style::Dim, text));
            let _ = output.flush();
        }
    }

    /// Puts a list in the place of the policy's.
    pub(super) fn change_list(&self, entries: Vec<ListEntry>, said: &str) {
        (self.change_list)(entries);
        self.screen
            .line(&format!("  {}", self.screen.styled(Style::Yellow, said)));
    }

    /// Waits for the appliance to open a flow to `target`, and shows it.
    pub(super) fn opened(&mut self, target: &str) -> Result<()> {
        let note = self.wait("flow opened", target)?;
        let text = format!(
            "+ {:4} {} → {}   {} by {}",
            note.get("protocol"),
            note.get("client"),
            note.get("target"),
            note.get("egress"),
            rule_of(&note)
        );
        self.screen
            .line(&format!("  {}", self.screen.styled(Style::Dim, &text)));
        Ok(())
    }

    /// Waits for the end of a flow to `target`, and shows it.
    pub(super) fn ended(&mut self, target: &str) -> Result<Note> {
        let note = self.wait("flow ended", target)?;
        let mut text = format!(
            "- {:4} {} → {}   {} sent, {} received, {}",
            note.get("protocol"),
            note.get("client"),
            note.get("target"),
            bytes(note.bytes("to_upstream")),
            bytes(note.bytes("to_client")),
            note.get("end"),
        );
        if !note.get("detail").is_empty() {
            text.push_str(&format!(": {}", note.get("detail")));
        }
        self.screen
            .line(&format!("  {}", self.screen.styled(Style::Dim, &text)));
        Ok(note)
    }

    /// Waits for a flow to `target` to be denied, and shows it.
    pub(super) fn denied(&mut self, target: &str) -> Result<Note> {
        let note = self.wait("flow denied", target)?;
        let text = format!(
            "× {:4} {} → {}   {} by {}",
            note.get("protocol"),
            note.get("client"),
            note.get("target"),
            note.get("reason"),
            rule_of(&note)
        );
        self.screen
            .line(&format!("  {}", self.screen.styled(Style::Dim, &text)));
        Ok(note)
    }

    /// Says how it went; returns whether anything failed.
    pub(super) fn finish(self) -> bool {
        let Self {
            screen,
            shown,
            failed,
            ..
        } = self;
        let line = if failed.is_empty() {
            screen.styled(Style::Green, &format!("All {shown} were checked, and true."))
        } else {
            screen.styled(
                Style::Red,
                &format!("{} of {shown} failed: {}", failed.len(), failed.join("; ")),
            )
        };
        screen.line(&format!("\n{line}"));
        if failed.is_empty() {
            screen.line(
                "Next: `tungate exec -v -- curl http://…` puts a command of yours behind an appliance.",
            );
        }
        !failed.is_empty()
    }

    fn wait(&self, message: &str, target: &str) -> Result<Note> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let note = self
                .notes
                .recv_timeout(left)
                .ok()
                .with_context(|| format!("the appliance has not said `{message}` of {target}"))?;
            if note.get("message") == message && note.get("target") == target {
                return Ok(note);
            }
        }
    }
}

fn rule_of(note: &Note) -> String {
    match note.get("rule") {
        "default" => "default".to_owned(),
        rule => format!("`{rule}`"),
    }
}
