//! Files that appear whole or not at all.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// A file that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {name}: {error}{}", hint(.error))]
pub struct OutputError {
    /// What was to be written.
    pub name: String,
    /// Why it could not be.
    pub error: io::Error,
}

/// Something being written: a file, which gets its name when it is complete, or standard output.
///
/// What exists under the name stays untouched until [`Output::finish`]. Pipes and devices are written to directly.
/// Writing always succeeds: the first failure is kept, everything after it ignored, and `finish` tells, so that the
/// middle of a replay has nothing to handle.
pub(crate) struct Output {
    name: String,
    target: Target,
    failure: Option<io::Error>,
}

enum Target {
    Stream(BufWriter<Box<dyn Write>>),
    Direct(BufWriter<File>),
    Replace {
        file: BufWriter<NamedTempFile>,
        path: PathBuf,
    },
}

impl Output {
    /// Begins to write `path`; `-` is standard output.
    ///
    /// # Errors
    ///
    /// [`OutputError`] when its folder does not exist or may not be written to.
    pub(crate) fn create(path: &Path) -> Result<Self, OutputError> {
        if path == Path::new("-") {
            return Ok(Self::stdout());
        }
        match Target::open(path) {
            Ok(target) => Ok(Self {
                name: format!("\"{}\"", path.display()),
                target,
                failure: None,
            }),
            Err(error) => Err(OutputError {
                name: format!("\"{}\"", path.display()),
                error,
            }),
        }
    }

    /// Writes to standard output.
    pub(crate) fn stdout() -> Self {
        Self::stream("to standard output", io::stdout())
    }

    /// Writes to standard error.
    pub(crate) fn stderr() -> Self {
        Self::stream("to standard error", io::stderr())
    }

    fn stream(name: &str, stream: impl Write + 'static) -> Self {
        Self {
            name: name.to_owned(),
            target: Target::Stream(BufWriter::new(Box::new(stream))),
            failure: None,
        }
    }

    /// Whether nobody reads it any more (`... | head`).
    pub(crate) fn is_closed(&self) -> bool {
        self.failure
            .as_ref()
            .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
    }

    /// Completes the file and gives it its name.
    ///
    /// # Errors
    ///
    /// The first failure since the beginning. A reader of standard output that went away (`... | head`) is none.
    pub(crate) fn finish(mut self) -> Result<(), OutputError> {
        self.flush().expect("failures are kept");
        let failure = match (self.failure, self.target) {
            (Some(error), Target::Stream(_)) if error.kind() == ErrorKind::BrokenPipe => None,
            (Some(error), _) => Some(error),
            (None, Target::Stream(_) | Target::Direct(_)) => None,
            (None, Target::Replace { file, path }) => match file.into_inner() {
                Ok(file) => file.persist(&path).err().map(|failed| failed.error),
                Err(failed) => Some(failed.into_error()),
            },
        };
        failure.map_or(Ok(()), |error| {
            Err(OutputError {
                name: self.name,
                error,
            })
        })
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.failure.is_none() {
            let written = match &mut self.target {
                Target::Stream(writer) => writer.write_all(bytes),
                Target::Direct(writer) => writer.write_all(bytes),
                Target::Replace { file, .. } => file.write_all(bytes),
            };
            self.failure = written.err();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.failure.is_none() {
            let flushed = match &mut self.target {
                Target::Stream(writer) => writer.flush(),
                Target::Direct(writer) => writer.flush(),
                Target::Replace { file, .. } => file.flush(),
            };
            self.failure = flushed.err();
        }
        Ok(())
    }
}

impl Target {
    fn open(path: &Path) -> io::Result<Self> {
        // Behind a link it is the file that is replaced, not the link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => return Err(ErrorKind::IsADirectory.into()),
            Ok(metadata) if !metadata.is_file() => {
                return Ok(Self::Direct(BufWriter::new(
                    OpenOptions::new().write(true).open(&path)?,
                )));
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let folder = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            Some(_) | None => Path::new("."),
        };
        fs::metadata(folder)?; // whose error reads better than that of a temporary file
        let file = tempfile::Builder::new()
            .prefix(".replay-")
            .permissions(Permissions::from_mode(0o666)) // less the umask, as for any new file
            .tempfile_in(folder)
            .map_err(|error| io::Error::from(error.kind()))?;
        Ok(Self::Replace {
            file: BufWriter::new(file),
            path,
        })
    }
}

/// The way out, where the error does not say it itself.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound => "\nhint: its folder does not exist; create it first",
        ErrorKind::IsADirectory => "\nhint: name a file inside it",
        ErrorKind::PermissionDenied => "\nhint: choose a folder you may write to",
        ErrorKind::StorageFull => "\nhint: free some space or choose another disk",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_seen_under_the_name_before_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("packets.jsonl");
        fs::write(&path, "old").unwrap();
        let mut output = Output::create(&path).unwrap();
        output.write_all(b"new").unwrap();
        output.flush().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        output.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "the temporary name is gone"
        );
    }

    #[test]
    fn an_abandoned_output_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("packets.jsonl");
        drop(Output::create(&path).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_link_stays_a_link_to_the_new_content() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let mut output = Output::create(&link).unwrap();
        output.write_all(b"new").unwrap();
        output.finish().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn a_full_device_is_written_directly_and_its_failure_told_at_the_end() {
        let mut output = Output::create(Path::new("/dev/full")).unwrap();
        output.write_all(&[0; 100_000]).unwrap();
        output.write_all(b"more").unwrap();
        let error = output.finish().unwrap_err();
        assert_eq!(error.error.kind(), ErrorKind::StorageFull);
        assert!(
            error.to_string().starts_with("cannot write \"/dev/full\": "),
            "{error}"
        );
        assert!(
            Path::new("/dev/full").metadata().is_ok(),
            "the device is still there"
        );
    }

    #[test]
    fn a_missing_folder_is_named_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let error = Output::create(&folder.path().join("no/such/file"))
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains("no/such/file") && error.contains("create it first"),
            "{error}"
        );
        let error = Output::create(folder.path()).err().unwrap().to_string();
        assert!(error.contains("name a file inside it"), "{error}");
    }
}
