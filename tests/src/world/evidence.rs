//! What a failure leaves behind: a transcript to read, and a journal to replay.

use std::cell::RefCell;
use std::fmt::Write;
use std::path::PathBuf;
use std::rc::Rc;
use std::{env, fs};

use tungate_engine::journal::Header;
use tungate_engine::{FlowId, Timestamp};

use super::scenario::{Setup, Step};
use crate::recorder::{Line as PacketLine, Output};

/// Where a recorded engine writes.
pub(super) type Sink = Box<dyn FnMut(&[u8])>;

pub(super) struct Evidence {
    name: &'static str,
    lines: Vec<(Timestamp, Line)>,
    journal: Rc<RefCell<Vec<u8>>>,
}

/// One thing in a transcript, put into words only when they are needed.
pub(super) enum Line {
    Step(Step),
    Conclusion,
    Packet(Vec<u8>),
    Told(FlowId, String),
    Output(Output),
}

impl Evidence {
    pub(super) fn new(name: &'static str, header: &Header) -> Self {
        let mut journal = Vec::new();
        header.encode(&mut journal);
        Self {
            name,
            lines: Vec::new(),
            journal: Rc::new(RefCell::new(journal)),
        }
    }

    pub(super) fn sink(&self) -> Sink {
        let journal = Rc::clone(&self.journal);
        Box::new(move |block| journal.borrow_mut().extend_from_slice(block))
    }

    pub(super) fn note(&mut self, at: Timestamp, line: Line) {
        self.lines.push((at, line));
    }

    /// Writes the files, as well as it can: there is a failure already to report.
    pub(super) fn write(&self, setup: &Setup) {
        let Some(folder) = failures() else { return };
        let mut text = format!("{setup:?}\n\n");
        for (_, line) in &self.lines {
            if let Line::Step(step) = line {
                writeln!(text, "Step::{step:?},").expect("memory takes all");
            }
        }
        text.push('\n');
        for (at, line) in &self.lines {
            let seconds = at.as_nanos() / 1_000_000_000;
            let micros = at.as_nanos() / 1_000 % 1_000_000;
            write!(text, "{seconds}.{micros:06}  ").expect("memory takes all");
            match line {
                Line::Step(step) => writeln!(text, "**** {step:?}"),
                Line::Conclusion => writeln!(text, "**** all is well from here on"),
                Line::Packet(packet) => writeln!(text, "in   packet    {}", PacketLine(packet)),
                Line::Told(flow, event) => writeln!(text, "in   upstream  #{flow} {:.80}", event),
                Line::Output(output) => writeln!(text, "{output}"),
            }
            .expect("memory takes all");
        }
        let write = |extension: &str, bytes: &[u8]| {
            let path = folder.join(self.name).with_extension(extension);
            if fs::write(&path, bytes).is_ok() {
                eprintln!("  evidence    {}", path.display());
            }
        };
        write("txt", text.as_bytes());
        write("journal", &self.journal.borrow());
    }
}

/// `target/failures`, wherever `target` is: this very program runs from `target/…/deps`.
fn failures() -> Option<PathBuf> {
    let folder = env::current_exe().ok()?.ancestors().nth(3)?.join("failures");
    fs::create_dir_all(&folder).ok()?;
    Some(folder)
}
