//! Where a capture's or a journal's bytes come from.

use std::fs::File;
use std::io::{self, Chain, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use tungate_engine::journal;

use super::is_dash;
use crate::capture::{Capture, OpenError};
use crate::report::ReportError;

/// An input, which can be opened once, or again and again.
pub(super) struct Source<'a> {
    path: &'a Path,
    kind: Kind,
}

enum Kind {
    File,
    /// A pipe gives its bytes once.
    Pipe(Option<Box<dyn Read + Send>>),
    /// What came by a pipe.
    Kept(File),
}

/// An input, told apart by its first bytes.
pub(super) enum Opened {
    Capture(Capture),
    Journal(Box<dyn Read>),
}

impl<'a> Source<'a> {
    /// Prepares to open `path`; `-` is standard input. What comes by a pipe and is to be opened `twice` is copied to
    /// disk.
    ///
    /// # Errors
    ///
    /// When there is no room on disk for what comes by the pipe.
    pub(super) fn new(path: &'a Path, twice: bool) -> Result<Self, ReportError> {
        let pipe: Option<Box<dyn Read + Send>> = match File::open(path) {
            _ if is_dash(path) => Some(Box::new(io::stdin())),
            Ok(pipe) if !path.is_file() && !path.is_dir() => Some(Box::new(pipe)),
            Ok(_) | Err(_) => None, // what cannot be opened as a file either will say why
        };
        let kind = match pipe {
            None => Kind::File,
            Some(pipe) if !twice => Kind::Pipe(Some(pipe)),
            Some(mut pipe) => {
                let mut file = tempfile::tempfile()?;
                io::copy(&mut pipe, &mut file)?;
                Kind::Kept(file)
            }
        };
        Ok(Self { path, kind })
    }

    /// What reports call it.
    pub(super) fn name(&self) -> String {
        if is_dash(self.path) {
            "standard input".to_owned()
        } else {
            self.path.display().to_string()
        }
    }

    /// Opens it.
    ///
    /// # Errors
    ///
    /// Why it is neither a capture nor a journal.
    pub(super) fn open(&mut self) -> Result<Opened, OpenError> {
        let pipe: Box<dyn Read + Send> = match &mut self.kind {
            Kind::File => {
                return match File::open(self.path).map(peek) {
                    Ok((true, file)) => Ok(Opened::Journal(Box::new(file))),
                    Ok((false, _)) | Err(_) => self.reopen().map(Opened::Capture),
                };
            }
            Kind::Pipe(pipe) => pipe.take().expect("a pipe that is opened twice is kept"),
            Kind::Kept(_) => return self.reopen().map(Opened::Capture), // journals are not opened twice
        };
        match peek(pipe) {
            (true, pipe) => Ok(Opened::Journal(Box::new(pipe))),
            (false, pipe) => Capture::from_reader(self.name(), pipe).map(Opened::Capture),
        }
    }

    /// Opens a capture once more.
    ///
    /// # Errors
    ///
    /// Why it is none.
    pub(super) fn reopen(&mut self) -> Result<Capture, OpenError> {
        match &mut self.kind {
            Kind::File => Capture::open(self.path),
            Kind::Kept(file) => {
                let again = file.seek(SeekFrom::Start(0)).and_then(|_| file.try_clone());
                let name = self.name();
                match again {
                    Ok(file) => Capture::from_reader(name, file),
                    Err(error) => Err(OpenError::Io { name, error }),
                }
            }
            Kind::Pipe(_) => unreachable!("a pipe that is opened twice is kept"),
        }
    }
}

/// Whether the first bytes are a journal's, and all bytes.
fn peek<R: Read>(mut source: R) -> (bool, Chain<Cursor<Vec<u8>>, R>) {
    let mut start = Vec::new();
    // What fails now fails again when the rest is read.
    let _ = source
        .by_ref()
        .take(journal::MAGIC.len() as u64)
        .read_to_end(&mut start);
    (start == journal::MAGIC, Cursor::new(start).chain(source))
}
