//! Which captures the arguments name.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::capture::{Capture, OpenError};

/// What there is to replay.
#[derive(Debug, Default)]
pub(super) struct Inputs {
    /// Files, and `-` for standard input, in the order of the arguments; those of a folder by name.
    pub(super) captures: Vec<PathBuf>,
    /// Files in the folders that are no captures.
    pub(super) left_out: u64,
    /// Arguments in which nothing was found.
    pub(super) errors: Vec<FolderError>,
}

/// A folder in which nothing is to be replayed.
#[derive(Debug, thiserror::Error)]
pub(super) enum FolderError {
    /// It cannot be listed.
    #[error("cannot list folder \"{}\": {error}\nhint: name the captures inside it", .path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// It holds no capture.
    #[error("folder \"{}\" holds no captures{}\nhint: folders below it are not searched; name them", .path.display(), others(*.files))]
    Empty {
        /// The folder.
        path: PathBuf,
        /// How many other files it holds.
        files: u64,
    },
}

impl Inputs {
    /// Replaces the folders among `arguments` by the captures in them.
    pub(super) fn find(arguments: &[PathBuf]) -> Self {
        let mut inputs = Self::default();
        for path in arguments {
            if !path.is_dir() {
                inputs.captures.push(path.clone());
                continue;
            }
            match inputs.search(path) {
                Ok((0, files)) => inputs.errors.push(FolderError::Empty {
                    path: path.clone(),
                    files,
                }),
                Ok((_, files)) => inputs.left_out += files,
                Err(error) => inputs.errors.push(FolderError::Io {
                    path: path.clone(),
                    error,
                }),
            }
        }
        inputs
    }

    /// Adds the captures in a folder; returns how many there are, and how many other files.
    fn search(&mut self, folder: &Path) -> io::Result<(u64, u64)> {
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder)? {
            paths.push(entry?.path());
        }
        paths.sort_unstable();
        let (mut captures, mut others) = (0, 0);
        // Reading from a pipe would wait for its writer.
        for path in paths.into_iter().filter(|path| path.is_file()) {
            if may_be_replayed(&path) {
                captures += 1;
                self.captures.push(path);
            } else {
                others += 1;
            }
        }
        Ok((captures, others))
    }
}

/// Whether a file's first bytes are those of a capture, sound or not, or the file cannot be read at all: replaying it
/// tells what is wrong.
fn may_be_replayed(path: &Path) -> bool {
    match Capture::open(path) {
        Ok(_) | Err(OpenError::Io { .. } | OpenError::Unusable { .. }) => true,
        Err(OpenError::Empty { .. } | OpenError::NotACapture { .. } | OpenError::Unsupported { .. }) => false,
    }
}

fn others(files: u64) -> String {
    match files {
        0 => String::new(),
        1 => " (1 other file)".to_owned(),
        files => format!(" ({files} other files)"),
    }
}
